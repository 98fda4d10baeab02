"""Windows of a text on which a method scores layers, apart from the calibration text.

A method has a model and calibration windows, and no tokenizer: the model's name gives it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from transformers import PreTrainedModel

from prunelight.calibration.windows import Windows, check_windows
from prunelight.models.loading import load_tokenizer
from prunelight.training.text_datamodule import TextDataModule


def windows_of_text(
    model: PreTrainedModel,
    text: str | list[str],
    count: int,
    seq_len: int,
    seed: int,
    argument: str,
) -> Windows:
    """Return windows of a text, cut as `TextDataModule` cuts calibration windows.

    Args:
        model: loaded by name; its tokenizer is loaded by that name.
        text: source or sources, see `prunelight.data.sources.read_documents`.
        count: windows that are drawn.
        seq_len: tokens of a window, and the most of an instruction example.
        seed: draws them.
        argument: what a user calls the text, for errors.

    Returns:
        LongTensor (count, seq_len), or for instructions input_ids and attention_mask, (count, T).

    Raises:
        ValueError: if the model has no name, or the text holds too few windows.
        OSError: if the text cannot be read.
    """
    name = model.config._name_or_path
    if not name:
        raise ValueError(
            f"{argument}={text!r} needs the model's tokenizer, and this model has no name to find "
            "it by; load it with prunelight.load, or give windows to plan(redundancy_windows=)"
        )
    try:
        module = TextDataModule(
            load_tokenizer(name),
            calibration=text,
            seq_len=seq_len,
            num_calibration=count,
            seed=seed,
        )
        if module.self_written:
            raise ValueError("a method reads a text of its own, which the model does not write")
        windows = module.calibration_windows()
    except (ValueError, OSError) as error:
        raise type(error)(f"{argument}={text!r}: {error}") from error
    check_windows(model, windows)
    return windows


def file_digests(text: str | list[str] | None) -> list[str]:
    """Return 16 hex digits of each local file among the sources of a text.

    The hub's corpora are pinned, and a file may change under its name.
    """
    sources = [text] if isinstance(text, str) else text or []
    files = [Path(source).expanduser() for source in sources]
    return [hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in files if f.is_file()]
