"""Write memory.json, the table of docs/large-models.md: model sizes and cards, by the estimate.

    python docs/results/memory.py && python docs/results/tables.py

The configs are those of public models, written here, since a hub need not be there.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from prunelight.planner.memory import estimate

FOLDER = Path(__file__).resolve().parent
LONG: dict[str, Any] = {"vocab_size": 128256, "num_key_value_heads": 8}
MODELS: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {
        **LONG,
        **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
        **{"num_attention_heads": 32, "tie_word_embeddings": True},
    },
    "Llama-2-7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    "Llama-3.1-8B": {
        **LONG,
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    },
    "Llama-3.1-70B": {
        **LONG,
        **{"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80},
        "num_attention_heads": 64,
    },
}
# Column -> settings, and devices of fsdp2.
WAYS: dict[str, tuple[dict[str, Any], int]] = {
    "LoRA": ({}, 1),
    "LoRA, checkpointing": ({"gradient_checkpointing": True}, 1),
    "LoRA over NF4, checkpointing": (
        {"quantization": "nf4", "gradient_checkpointing": True},
        1,
    ),
    "LoRA, checkpointing, 8 cards": ({"gradient_checkpointing": True}, 8),
    "full, checkpointing, 8 cards": ({"recovery": "full", "gradient_checkpointing": True}, 8),
}
COMMAND = "prunelight estimate MODEL --gradient_checkpointing true --devices 8 --strategy fsdp2"


def gigabytes(count: int) -> str:
    """Return bytes as text."""
    return f"{count / 1e9:.1f}"


def row(name: str) -> list[str]:
    """Return the cells of a model."""
    with tempfile.TemporaryDirectory() as directory:
        LlamaConfig(**MODELS[name]).save_pretrained(directory)
        parts = [
            estimate(directory, dtype="bfloat16", devices=devices, strategy="fsdp2", **settings)
            for settings, devices in WAYS.values()
        ]
    pruning = [gigabytes(parts[0][kind]) for kind in ("whole", "streamed")]
    return [name, *pruning, *(gigabytes(part["total"]) for part in parts)]


def main() -> None:
    """Write the file."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=FOLDER, capture_output=True, text=True
    )
    table = {
        "title": "GB on each card, by the estimate: bfloat16, one window of 2048 tokens on a card",
        "commands": ["python docs/results/memory.py", COMMAND],
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "columns": ["", "pruning, whole", "pruning, streamed", *WAYS],
        "rows": [row(name) for name in MODELS],
    }
    text = json.dumps(table, indent=1, ensure_ascii=False) + "\n"
    (FOLDER / "memory.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
