"""Damage to files by a seed: flipped bytes, lost ends, zeros, edits of JSON, swapped files."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path


def flip(file: Path, rng: random.Random) -> None:
    """Change one bit."""
    _change(file, rng, 1, lambda byte: byte ^ (1 << rng.randrange(8)))


def scramble(file: Path, rng: random.Random) -> None:
    """Change some bytes in a row."""
    _change(file, rng, rng.randrange(2, 9), lambda byte: byte ^ rng.randrange(1, 256))


def blank(file: Path, rng: random.Random) -> None:
    """Replace a stretch by zeros, as a disk does that lost a sector."""
    before = file.read_bytes()
    while file.read_bytes() == before:
        _change(file, rng, rng.randrange(1, 65), lambda byte: 0)


def cut(file: Path, rng: random.Random) -> None:
    """Lose the end: some bytes of it, or most of the file."""
    size = file.stat().st_size
    lost = rng.choice([rng.randrange(1, min(size, 60)), rng.randrange(1, size)])
    file.write_bytes(file.read_bytes()[:-lost])


def grow(file: Path, rng: random.Random) -> None:
    """Get bytes at the end."""
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.randrange(1, 40)))


def edit(file: Path, rng: random.Random) -> None:
    """Change one number of a JSON file, or add a key to one without numbers."""
    values = json.loads(file.read_text(encoding="utf-8"))
    numbers = [key for key, value in values.items() if isinstance(value, int | float)]
    if numbers:
        key = rng.choice(numbers)
        values[key] = not values[key] if isinstance(values[key], bool) else values[key] + 1
    else:
        values["key"] = 1
    file.write_text(json.dumps(values, indent=1), encoding="utf-8")


KINDS: dict[str, Callable[[Path, random.Random], None]] = {
    "flip": flip,
    "scramble": scramble,
    "blank": blank,
    "cut": cut,
    "grow": grow,
}


def damage(file: Path, rng: random.Random) -> str:
    """Damage a file in a random way; return what was done."""
    kinds = [*KINDS, *(["edit"] if file.suffix == ".json" else [])]
    kind = rng.choice(kinds)
    (edit if kind == "edit" else KINDS[kind])(file, rng)
    return f"{kind} of {file.name}"


def swap(one: Path, other: Path) -> str:
    """Give two files each other's names; return what was done."""
    kept = one.with_name("kept")
    shutil.move(one, kept)
    shutil.move(other, one)
    shutil.move(kept, other)
    return f"swap of {one.name} and {other.name}"


def _change(file: Path, rng: random.Random, length: int, change: Callable[[int], int]) -> None:
    data = bytearray(file.read_bytes())
    first = rng.randrange(max(1, len(data) - length))
    for place in range(first, min(first + length, len(data))):
        data[place] = change(data[place])
    file.write_bytes(data)
