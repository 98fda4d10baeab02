"""Instruction rows into tokens and labels, with the loss on the response only.

Deliberately not done: loss on more than the last reply of a conversation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from prunelight.data.token_windows import Bos, bos_token_id, tokenize
from prunelight.losses import IGNORED_LABEL

Messages = list[dict[str, str]]

INSTRUCTION_FIELDS = (("messages",), ("prompt", "response"), ("instruction", "output"))

# The Alpaca template as alpaca-lora writes it: a new line after "### Response:", unlike Stanford.
ALPACA_TEMPLATE = (
    "Below is an instruction that describes a task{context}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)

ALPACA_CONTEXT = ", paired with an input that provides further context"


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
