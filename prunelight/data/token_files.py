"""Examples in a file that several processes map: the text is tokenised once, and is in memory once.

The file is safetensors. All parts of one kind lie one after another; where each example ends stands
beside them. Labels that are the tokens themselves are not written twice.
"""

# T tokens of an example

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from prunelight.runtime.files.atomic_files import atomic_replacement

PARTS = ("input_ids", "labels", "position_ids")
_JOINED = "joined"


def write_examples(examples: Sequence[tuple[Tensor, ...]], joined: str, file: Path) -> None:
    """Write examples, whole or not at all; a file of that name is replaced.

    Args:
        examples: token ids, labels and possibly positions of each, int32 (T,).
        joined: how their rows became a text.
        file: in a directory that exists.
    """
    tensors = {"lengths": torch.tensor([len(example[0]) for example in examples])}
    alike = all(example[0] is example[1] for example in examples)
    for place, name in enumerate(PARTS):
        if examples and place < len(examples[0]) and not (name == "labels" and alike):
            tensors[name] = torch.cat([example[place] for example in examples])
    with atomic_replacement(file) as temporary:
        save_file(tensors, temporary, metadata={_JOINED: joined})


def read_examples(file: Path) -> tuple[list[tuple[Tensor, ...]], str]:
    """Return examples, mapped from a file of `write_examples`, and how their rows became a text."""
    with safe_open(file, framework="pt") as opened:
        parts = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        joined = opened.metadata()[_JOINED]
    ends = [0, *parts.pop("lengths").cumsum(0).tolist()]
    examples: list[tuple[Tensor, ...]] = []
    for start, end in pairwise(ends):
        ids = parts["input_ids"][start:end]
        labels = parts["labels"][start:end] if "labels" in parts else ids
        positions = [parts["position_ids"][start:end]] if "position_ids" in parts else []
        examples.append((ids, labels, *positions))
    return examples, joined
