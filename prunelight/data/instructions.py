"""Instruction rows become tokens and labels; only the tokens of the response have labels.

Deliberately not done: labels on earlier replies of a conversation than the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from prunelight.data.rows import as_text, describe
from prunelight.data.token_windows import Bos, bos_token_id, tokenize
from prunelight.losses import IGNORED_LABEL

Messages = list[dict[str, str]]

INSTRUCTION_FIELDS = (("messages",), ("prompt", "response"), ("instruction", "output"))

# Alpaca's template as alpaca-lora writes it: unlike Stanford's, with a new line after "Response:".
ALPACA_TEMPLATE = (
    "Below is an instruction that describes a task{context}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)

ALPACA_CONTEXT = ", paired with an input that provides further context"


def is_instruction_row(row: Mapping[str, Any]) -> bool:
    """Return whether a row has the fields of an instruction; a text field beside them is ignored.

    `INSTRUCTION_FIELDS` lists the fields.
    """
    return any(all(field in row for field in fields) for fields in INSTRUCTION_FIELDS)


def check_instruction(row: Mapping[str, Any]) -> None:
    """Check that the fields of an instruction row can be read.

    Raises:
        ValueError: naming the field, and what it is instead of text or messages.
    """
    _conversation(row)


def instruction_example(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, seq_len: int, bos: Bos = "auto"
) -> tuple[list[int], list[int]] | None:
    """Return tokens and labels of one instruction row; only the response has labels.

    Args:
        row: fields `messages` (each with role and content; the last reply is the response), or
            `prompt` and `response`, or `instruction`, `output` and possibly `input`.
        tokenizer: the model's tokenizer. Its chat template renders the row. Without a chat template
            a row with `instruction` gets Alpaca's template, other rows stay prompt and response.
        seq_len: longer examples are cut to this many tokens.
        bos: see `calibration_windows`; a BOS token that the template already wrote is not repeated.

    Returns:
        input_ids and labels, lists of the same length; labels are -100 on the prompt. None if the
        row has no response, or if the prompt fills `seq_len`.

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
    if whole_ids[: len(prompt_ids)] == prompt_ids:  # else one token spans prompt and response
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
    """Return the messages of a row, and its prompt for tokenizers without a chat template."""
    if "messages" in row:
        messages = _messages(row["messages"])
        return messages, "".join(f"{message['content']}\n\n" for message in messages[:-1])
    fields = ("prompt", "response") if "prompt" in row and "response" in row else None
    asked, answered = fields or ("instruction", "output")
    user = as_text(row[asked], asked)
    reply = "" if row[answered] is None else as_text(row[answered], answered)
    prompt = user
    if fields is None:
        given = row.get("input")
        extra = "" if given is None else as_text(given, "input")
        context, section = (ALPACA_CONTEXT, f"### Input:\n{extra}\n\n") if extra else ("", "")
        prompt = ALPACA_TEMPLATE.format(context=context, instruction=user, input=section)
        user = f"{user}\n\n{extra}" if extra else user
    turns = (("user", user), ("assistant", reply))
    return [{"role": role, "content": content} for role, content in turns], prompt


def _messages(given: Any) -> Messages:
    """Return the messages of a row; the texts of a content that is a list of parts are joined."""
    if given is None:
        return []
    if not isinstance(given, (list, tuple)):
        raise ValueError(f"field 'messages' is {describe(given)}, and no list of messages")
    messages = []
    for message in given:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {message!r:.60} must have strings as role and content")
        content = message.get("content")
        parts = content if isinstance(content, list) else [content]
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
        strings = [text for text in texts if isinstance(text, str)]
        if not texts or len(strings) < len(texts):
            raise ValueError(f"message {message!r:.60} must have strings as role and content")
        # Other fields of a message, such as a name, are its template's business.
        whole = as_text("".join(strings), "content")
        messages.append({**message, "role": as_text(message["role"], "role"), "content": whole})
    return messages


def _render_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[str, str]:
    """Return prompt and response as the chat template writes them."""
    write = tokenizer.apply_chat_template
    try:
        prompt = str(write(messages[:-1], tokenize=False, add_generation_prompt=True))
        whole = str(write(messages, tokenize=False))
    except TemplateError as error:
        refusal = f"the tokenizer's chat template refuses {messages!r:.80} ({error})"
        remedy = "change the rows or set tokenizer.chat_template=None"
        raise ValueError(f"{refusal}; {remedy}") from error
    # A reasoning model's template ends the prompt with a tag that it leaves out of a full chat.
    return prompt, whole[len(prompt) :] if whole.startswith(prompt) else messages[-1]["content"]
