"""A tokenizer as llama.cpp keeps it: tokens, kinds, merges or scores, and how text is split first.

llama.cpp has no regular expressions of its own in a file. It knows splits by name, so the split in
tokenizer.json must be one of `SPLITS`. Two kinds of tokenizer are written: BPE over bytes (GPT-2's
and its kin) and BPE over characters with bytes for the unknown ones (Llama 2's, Gemma's). The
latter's merges become scores: llama.cpp merges the pair with the highest score first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_OTHER = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

GPT2 = "the split of GPT-2"  # ByteLevel(use_regex=True) has it built in
DIGITS = "each digit alone"
LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
TEKKEN = rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}|{_OTHER}"
GPT4O = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_BEFORE}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_OTHER}"
)
# (splits one after another, whether a whole word that is a token skips the merges) -> the name.
SPLITS = {
    ((GPT2,), False): "gpt-2",
    ((DIGITS, GPT2), False): "smollm",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "dbrx",
    ((QWEN2,), False): "qwen2",
    ((TEKKEN,), True): "tekken",
    ((GPT4O,), False): "gpt-4o",
}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # gguf's TokenType
_SPACE = "▁"
_REMEDY = (
    "llama.cpp's own converter may know it: python convert_hf_to_gguf.py DIRECTORY --outfile "
    "MODEL.gguf, in a clone of llama.cpp"
)


def tokenizer_keys(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> dict[str, Any]:
    """Return the keys of a tokenizer by the names of the methods of gguf's writer.

    Args:
        tokenizer: a fast one.
        vocabulary: rows of the embedding; rows without a token become unused tokens.

    Raises:
        ValueError: if llama.cpp has no such kind of tokenizer, or knows no name for its split.
    """
    facts = tokenizer_facts(tokenizer)
    added = {token["id"]: token for token in facts["added_tokens"]}
    texts = {index: text for text, index in facts["model"]["vocab"].items()}
    texts |= {index: token["content"] for index, token in added.items()}
    unknown = facts["model"].get("unk_token")
    tokens = [texts.get(index, f"[PAD{index}]") for index in range(vocabulary)]
    kinds = [
        _kind(index, texts.get(index), added, unknown, over_bytes=is_over_bytes(facts))
        for index in range(vocabulary)
    ]
    keys: dict[str, Any] = {"token_list": tokens, "token_types": kinds}
    if is_over_bytes(facts):
        keys |= {"tokenizer_model": "gpt2", "tokenizer_pre": split_name(facts)}
        keys["token_merges"] = [" ".join(pair) for pair in _merges(facts)]
    else:
        keys |= {"tokenizer_model": "llama", "tokenizer_pre": "default"}
        keys["token_scores"] = _scores(facts, tokens)
        keys["add_space_prefix"] = _prepends_space(facts)
    return {**keys, **_special_keys(tokenizer)}


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what tokenizer.json says, after checking that llama.cpp has such a tokenizer.

    Raises:
        ValueError: if it has none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no tokenizer.json, from which a GGUF is written; "
            f"{_REMEDY}"
        )
    facts: dict[str, Any] = json.loads(backend.to_str())
    kind = facts["model"]["type"]
    if kind != "BPE":
        raise ValueError(f"a tokenizer of kind {kind} is not written here, only BPE; {_REMEDY}")
    if is_over_bytes(facts):
        split_name(facts)
    elif not facts["model"].get("byte_fallback"):
        raise ValueError(
            "a BPE tokenizer that knows neither bytes (ByteLevel) nor byte_fallback is not written "
            f"here; {_REMEDY}"
        )
    return facts


def is_over_bytes(facts: Mapping[str, Any]) -> bool:
    """Return whether tokens are made of bytes, as GPT-2's."""
    return any(step["type"] == "ByteLevel" for step in _steps(facts["pre_tokenizer"]))


def split_name(facts: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for how a tokenizer over bytes splits text first.

    Raises:
        ValueError: if it has no name.
    """
    normalizers = {step["type"] for step in _steps(facts["normalizer"])}
    splits = tuple(
        text for step in _steps(facts["pre_tokenizer"]) if (text := _split(step)) is not None
    )
    name = SPLITS.get((splits, bool(facts["model"].get("ignore_merges"))))
    if name is None or not normalizers <= {"NFC"}:
        told = " then ".join(repr(split) for split in splits) or "no split"
        extra = f", after the normalizers {sorted(normalizers)}" if normalizers else ""
        raise ValueError(f"llama.cpp's name for the split {told}{extra} is not known; {_REMEDY}")
    return name


def _steps(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer, those within a Sequence too."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        inner = part.get("pretokenizers") or part.get("normalizers") or []
        return [step for within in inner for step in _steps(within)]
    return [part]


def _split(step: Mapping[str, Any]) -> str | None:
    """Return what a step splits by; None for a step that does not split."""
    if step["type"] == "ByteLevel":
        if step.get("add_prefix_space"):
            return "a space before the text"
        return GPT2 if step.get("use_regex", True) else None
    if step["type"] == "Digits" and step.get("individual_digits"):
        return DIGITS
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        pattern = step["pattern"].get("Regex")
        return DIGITS if pattern == r"\p{N}" else str(pattern)
    return f"{step['type']}"


def _kind(
    index: int,
    text: str | None,
    added: Mapping[int, Mapping[str, Any]],
    unknown: str | None,
    *,
    over_bytes: bool,
) -> int:
    if text is None:
        return _UNUSED
    if not over_bytes and text == unknown:
        return _UNKNOWN
    if index in added:
        return _CONTROL if added[index]["special"] else _USER_DEFINED
    is_byte = not over_bytes and len(text) == 6 and text.startswith("<0x") and text[-1] == ">"
    return _BYTE if is_byte else _NORMAL


def _merges(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = facts["model"]["merges"]
    split = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in pairs)
    return [(first, second) for first, second in split]


def _scores(facts: Mapping[str, Any], tokens: list[str]) -> list[float]:
    """Return a score for each token: minus the place of the first merge that makes it."""
    merges = _merges(facts)
    places: dict[str, int] = {}
    for place, pair in enumerate(merges):
        places.setdefault("".join(pair), place)
    return [-float(places.get(token, len(merges))) for token in tokens]


def _prepends_space(facts: Mapping[str, Any]) -> bool:
    """Return whether a space is put before the text."""
    for step in (*_steps(facts["normalizer"]), *_steps(facts["pre_tokenizer"])):
        if step["type"] == "Prepend" and step["prepend"] == _SPACE:
            return True
        if step["type"] == "Metaspace":
            return bool(step.get("prepend_scheme", "always") != "never")
    return False


def _special_keys(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the ids of special tokens, whether they surround a text, and the chat template."""
    keys: dict[str, Any] = {}
    for name in ("bos", "eos", "unk", "pad"):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            keys[f"{name}_token_id"] = index
    ids = tokenizer("a")["input_ids"]
    keys["add_bos_token"] = bool(ids) and ids[0] == tokenizer.bos_token_id
    keys["add_eos_token"] = bool(ids) and ids[-1] == tokenizer.eos_token_id
    template = tokenizer.chat_template
    if isinstance(template, dict):
        keys["chat_template"] = [{"name": k, "template": v} for k, v in template.items()]
    elif template:
        keys["chat_template"] = template
    return keys
