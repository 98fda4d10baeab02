"""Runs of tiny models: a model directory, its data, and a quiet Trainer."""

from __future__ import annotations

import string
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from text_tokenizers import make_tokenizer
from tiny import tiny_model

from prunelight.evaluation.serving import cost
from prunelight.evaluation.serving.measured import ServingProtocol
from prunelight.recovery.lora import LoRA
from prunelight.training.recovery_module import RecoveryModule
from prunelight.training.text_datamodule import TextDataModule

TEXT = "The river runs past the old mill and down to the sea. " * 40
# Of many different tokens, which sliced embeddings need.
_SYMBOLS = string.digits + string.ascii_letters + string.punctuation
VARIED_TEXT = " ".join(_SYMBOLS[start : start + 9] for start in range(len(_SYMBOLS) - 9)) * 3
SEQ_LEN = 32


def measure_speed_briefly() -> None:
    """Spare tiny runs two thirds of their time, which goes into speeds that no test looks at."""
    cost.BRIEFLY = ServingProtocol(
        8, 2, batch_size=2, batch_prompt_tokens=4, num_rounds=1, num_batch_rounds=1
    )


def write_model(directory: Path, family: str = "llama", **changes: object) -> str:
    """Save a tiny random model with a real tokenizer as a transformers directory."""
    tokenizer = make_tokenizer(bos_token="<s>")
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    settings = {"vocab_size": len(tokenizer), "pad_token_id": tokens["eos_token_id"], **tokens}
    tiny_model(family, **{**settings, **changes}).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def local_paths(directory: Path, *places: Path | str) -> list[tuple[str, str]]:
    """Return the files of a directory in which a place of this machine stands, with that place."""
    return [
        (file.name, str(place))
        for file in sorted(directory.rglob("*"))
        if file.is_file()
        for place in places
        if str(place).encode() in file.read_bytes()
    ]


def make_data(name: str, directory: Path, **arguments: object) -> TextDataModule:
    """Return data of a few short windows: 4 to calibrate, 8 to train on, 3 to validate."""
    text = directory / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    settings = {
        "train": str(text),
        "validation": str(text),
        "calibration": str(text),
        "seq_len": SEQ_LEN,
        "batch_size": 2,
        "num_calibration": 4,
        "num_validation": 3,
    }
    return TextDataModule(name, **{**settings, **arguments})


def make_module(name: str, **arguments: object) -> RecoveryModule:
    """Return a module that trains fast and without randomness."""
    settings = {
        "lora": LoRA(dropout=0.0),
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "probes": False,  # which are tested where they matter, and slow a tiny run down
    }
    return RecoveryModule(name, **{**settings, **arguments})


def make_trainer(root: Path, *callbacks: pl.Callback, **arguments: object) -> pl.Trainer:
    """Return a quiet CPU trainer of two short epochs that keeps a checkpoint of each."""
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "limit_train_batches": 3,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": root,
    }
    checkpoint = ModelCheckpoint(dirpath=root / "checkpoints", filename="{epoch}", save_top_k=-1)
    return pl.Trainer(callbacks=[*callbacks, checkpoint], **{**settings, **arguments})
