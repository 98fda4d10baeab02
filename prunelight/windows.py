"""Text into token windows: reading sources, packing text, instruction examples.

Windows never overlap. Documents are tokenised whole (chunks give other tokens at their joints) and
joined by eos. Perplexity of the Gemma family explodes without BOS, so `bos="auto"` starts each of
its windows with it; other families are left as the pruning papers measure them. Deliberately not
done: streaming corpora larger than memory, loss on more than the last reply of a conversation.
"""

# N windows, T seq_len, S tokens of a stream

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet  # comes with datasets
import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

Bos = Literal["auto", "always", "never"]
Row = dict[str, Any]
Messages = list[dict[str, str]]

IGNORED_LABEL = -100  # the label that torch's cross-entropy skips
SAMPLES = {  # that come with prunelight
    **{f"sample:{name}": f"{name}.txt" for name in ("train", "calibration", "validation")},
    "sample:instructions": "instructions.jsonl",
}
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
INSTRUCTION_FIELDS = (("messages",), ("prompt", "response"), ("instruction", "output"))
DATASET_NAME = re.compile(r"([^:\[\]]+)(?::([^\[\]]+))?(?:\[(.+)\])?")  # name:config[split]

# The Alpaca template as alpaca-lora writes it: a new line after "### Response:", unlike Stanford.
ALPACA_TEMPLATE = (
    "Below is an instruction that describes a task{context}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
ALPACA_CONTEXT = ", paired with an input that provides further context"


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    num_samples: int = 128,
    seq_len: int = 2048,
    *,
    seed: int = 0,
    bos: Bos = "auto",
) -> Tensor:
    """Draw non-overlapping token windows from a text; the same seed gives the same windows.

    Args:
        tokenizer: the model's tokenizer.
        text: one document, or several, which are joined by the eos token.
        num_samples: windows to draw; 128 of 2048 tokens is what SparseGPT, Wanda and DLP use.
        seq_len: tokens of a window, with its BOS token where there is one.
        seed: of a private generator; the global random state is neither read nor changed.
        bos: "always" starts every window with the BOS token, "never" adds none, "auto" is "always"
            for tokenizers of the Gemma family (BOS token `<bos>`) and "never" for others.

    Returns:
        LongTensor (num_samples, seq_len).

    Raises:
        ValueError: if a number is out of range, the text holds fewer windows than asked for, or
            `bos="always"` meets a tokenizer that has no BOS token.
    """
    stream = tokenize_documents(tokenizer, [text] if isinstance(text, str) else text)
    windows = pack(stream, seq_len, bos_token_id=bos_token_id(tokenizer, bos))  # (N, T)
    return windows[sample_indices(len(windows), num_samples, seed=seed)]


def bos_token_id(tokenizer: PreTrainedTokenizerBase, bos: Bos) -> int | None:
    """The token that must start every window, or None.

    Raises:
        ValueError: if `bos` is not a known choice, or is "always" without a BOS token.
    """
    if bos not in ("auto", "always", "never"):
        raise ValueError(f"bos={bos!r} must be 'auto', 'always' or 'never'")
    if bos == "always" and tokenizer.bos_token_id is None:
        raise ValueError("bos='always' needs a tokenizer with a BOS token; set bos='auto'")
    wanted = bos == "always" or (bos == "auto" and tokenizer.bos_token == "<bos>")
    return tokenizer.bos_token_id if wanted else None


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens and without the warning about long texts."""
    encode = partial(tokenizer.__call__, add_special_tokens=False, verbose=False)
    return encode([*texts])["input_ids"] if texts else []


def tokenize_documents(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    """One token stream, (S,): the documents in order, eos between them, blank ones skipped."""
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    documents = tokenize(tokenizer, [text for text in texts if text.strip()])
    stream = [token for document in documents for token in (*document, *eos)]
    return stream[: len(stream) - len(eos)] if stream else stream


def pack(tokens: Sequence[int], seq_len: int, *, bos_token_id: int | None = None) -> Tensor:
    """Cut a token stream, (S,), into consecutive windows, LongTensor (N, seq_len).

    With `bos_token_id` each window is that token and seq_len - 1 tokens of the stream. The tail
    that does not fill a window is left out.

    Raises:
        ValueError: if `seq_len` is below 2.
    """
    if seq_len < 2:
        raise ValueError(f"seq_len={seq_len} must be at least 2: one token predicts the next")
    width = seq_len if bos_token_id is None else seq_len - 1
    windows = torch.tensor(tokens[: len(tokens) // width * width]).long().view(-1, width)
    return windows if bos_token_id is None else pad(windows, (1, 0), value=bos_token_id)


def sample_indices(available: int, num_samples: int, *, seed: int) -> Tensor:
    """Draw `num_samples` different indices below `available`, in random order, LongTensor (N,).

    Raises:
        ValueError: if `num_samples` is below 1 or above `available`.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be at least 1; the default is 128")
    if num_samples > available:
        raise ValueError(
            f"the text holds {available} windows but num_samples={num_samples} were asked for; "
            "give more text, or lower num_samples or seq_len"
        )
    return torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:num_samples]


def read_documents(source: str, *, split: str = "train", text_field: str = "text") -> list[Row]:
    """Read a source as rows that each hold a text or an instruction with its response.

    Args:
        source: a .txt (one document), .jsonl, .json or .parquet file; `sample:train`,
            `sample:calibration`, `sample:validation` or `sample:instructions`; or a dataset that
            `datasets.load_dataset` knows, as `name`, `name:config` or `name:config[split]`.
        split: of a dataset that names none.
        text_field: the field that holds the text.

    Returns:
        Rows. Rows that are the lines of one text (as WikiText has on the hub) are joined into one.

    Raises:
        FileNotFoundError: if `source` is written like a path and does not exist.
        ValueError: if it cannot be read, is empty, or a row has no text and no instruction.
    """
    rows = _read_source(source, split, text_field)
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{source}: row {index} must be an object with fields: {row!r:.50}")
        if not is_instruction_row(row) and not isinstance(row.get(text_field), str):
            raise ValueError(
                f"{source}: row {index} has no text in field {text_field!r}, only the fields "
                f"{sorted(row)}; set text_field to the one that holds the text"
            )
    if not any(is_instruction_row(row) or row[text_field].strip() for row in rows):
        raise ValueError(f"{source} is empty; give a source that holds text")
    return _join_lines(rows, text_field)


def _read_source(source: str, split: str, text_field: str) -> list[Any]:
    if source in SAMPLES:
        with as_file(files("prunelight") / "sample" / SAMPLES[source]) as path:
            return _read_file(path, text_field)
    if source.startswith("sample:"):
        raise ValueError(f"source {source!r} is no bundled sample; they are {', '.join(SAMPLES)}")
    path = Path(source).expanduser()
    if path.is_dir() or (path.exists() and path.suffix not in SUFFIXES):
        raise ValueError(f"source {source!r} must be a file that ends in {', '.join(SUFFIXES)}")
    if path.exists():
        return _read_file(path, text_field)
    if path.suffix in SUFFIXES or source.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"source {source!r} does not exist; check the path")
    return _read_dataset(source, split)


def _read_file(path: Path, text_field: str) -> list[Any]:
    try:
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise ValueError("it holds NUL bytes")
        if path.suffix == ".txt":
            return [{text_field: text}]
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:  # also UnicodeDecodeError, JSONDecodeError and ArrowInvalid
        kind = "UTF-8 text" if path.suffix == ".txt" else f"{path.suffix} data"
        raise ValueError(f"{path} is not {kind} ({error}); give another file or suffix") from error


def _read_dataset(source: str, split: str) -> list[Any]:
    from datasets import load_dataset  # one second to import, and only needed here

    name = DATASET_NAME.fullmatch(source)
    try:
        if name is None:
            raise ValueError("it is not written name:config[split]")
        return load_dataset(name[1], name[2], split=name[3] or split).to_list()
    except Exception as error:  # the hub's errors have no common base
        rule = f"source {source!r} is neither a file nor a dataset that can be reached ({error})"
        raise ValueError(f"{rule}; give a local file: {', '.join(SUFFIXES)}") from error


def _join_lines(rows: list[Row], text_field: str) -> list[Row]:
    """Undo a split into lines: some rows are blank and all others end in a new line."""
    texts = [row.get(text_field) for row in rows]
    if "" not in texts or not all(text == "" or str(text).endswith("\n") for text in texts):
        return rows
    return [{text_field: "".join(text or " \n" for text in texts)}]  # " \n" as in wiki.train.raw


def is_instruction_row(row: Mapping[str, Any]) -> bool:
    """Whether a row has the fields of `instruction_example`; they win over a text field."""
    return any(all(field in row for field in fields) for fields in INSTRUCTION_FIELDS)


def instruction_example(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, seq_len: int, bos: Bos = "auto"
) -> tuple[list[int], list[int]] | None:
    """Tokens and labels of one instruction row, with the loss on the response only.

    Args:
        row: `messages` (role, content; the last reply is the response), or `prompt` and `response`,
            or `instruction`, `output` and possibly `input`.
        tokenizer: its chat template is used if it has one; else instruction rows get the Alpaca
            template and other rows are plain prompt and response.
        seq_len: longer examples are cut to this many tokens.
        bos: see `calibration_windows`; a BOS token that the template already gave is not repeated.

    Returns:
        input_ids and labels of the same length (labels are -100 on the prompt), or None if there is
        no response, or none of it fits in `seq_len`.

    Raises:
        ValueError: if the messages are malformed or the chat template refuses them.
    """
    messages, prompt = _conversation(row)
    response = messages[-1]["content"] if len(messages) > 1 else ""
    if not response.strip() or messages[-1]["role"] != "assistant":
        return None
    if tokenizer.chat_template:
        prompt, response = _render_chat(tokenizer, messages)
    prompt_ids, whole_ids, response_ids = tokenize(tokenizer, [prompt, prompt + response, response])
    if whole_ids[: len(prompt_ids)] == prompt_ids:  # else a token spans the joint
        response_ids = whole_ids[len(prompt_ids) :]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in response_ids:
        response_ids = [*response_ids, tokenizer.eos_token_id]
    start = bos_token_id(tokenizer, bos)
    if start is not None and prompt_ids[:1] != [start]:
        prompt_ids = [start, *prompt_ids]
    if len(prompt_ids) >= seq_len:
        return None
    labels = [IGNORED_LABEL] * len(prompt_ids) + response_ids
    return (prompt_ids + response_ids)[:seq_len], labels[:seq_len]


def _conversation(row: Mapping[str, Any]) -> tuple[Messages, str]:
    """The messages of a row, and its prompt for tokenizers without a chat template."""
    if "messages" in row:
        messages = row["messages"] or []
        for message in messages:
            if not all(isinstance(message.get(key), str) for key in ("role", "content")):
                raise ValueError(f"message {message!r} must have strings as role and content")
        return messages, "".join(f"{message['content']}\n\n" for message in messages[:-1])
    if "prompt" in row and "response" in row:
        user, reply = row["prompt"], row["response"]
        prompt = user
    else:
        user, reply, given = row["instruction"], row["output"], row.get("input")
        context, section = (ALPACA_CONTEXT, f"### Input:\n{given}\n\n") if given else ("", "")
        prompt = ALPACA_TEMPLATE.format(context=context, instruction=user, input=section)
        user = f"{user}\n\n{given}" if given else user
    pair = (("user", user), ("assistant", reply or ""))
    return [{"role": role, "content": content} for role, content in pair], prompt


def _render_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[str, str]:
    """Prompt and response as the chat template writes them."""
    write = tokenizer.apply_chat_template
    try:
        prompt = str(write(messages[:-1], tokenize=False, add_generation_prompt=True))
        whole = str(write(messages, tokenize=False))
    except TemplateError as error:
        rule = f"the tokenizer's chat template refuses {messages!r:.80} ({error})"
        raise ValueError(f"{rule}; change the rows or set tokenizer.chat_template=None") from error
    # Reasoning models open the reply with a tag that their template drops from a finished one.
    return prompt, whole[len(prompt) :] if whole.startswith(prompt) else messages[-1]["content"]
