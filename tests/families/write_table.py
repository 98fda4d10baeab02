"""Sweep over all families and write docs/families.md.

python tests/families/write_table.py                  # in two processes
python tests/families/write_table.py --processes 8
python tests/families/write_table.py llama gpt2       # print the cells of these, write nothing
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "families.md"
COMMAND = "python tests/families/write_table.py"
PACKAGES = ("transformers", "peft", "torch")
COLUMNS = {
    "Load": ("loading",),
    "Depth": ("depth",),
    "Slicing": ("slicing",),
    "Width": ("width",),
    "Sparsity": ("magnitude", "wanda", "dlp"),
    "LoRA": ("lora",),
}
LINE = re.compile(r"^\| `([^`]+)` \| (.*) \|$", re.MULTILINE)
REASON = re.compile(r"^(\d+)\. (.*)$", re.MULTILINE)
FAULT = re.compile("(^|only: |; )(late|silent|ugly|untestable): ")
INTRODUCTION = """# Families

<!-- Written by `{command}`; do not edit. -->

What each kind of pruning does to each causal-LM class of transformers. The models are tiny and
random, one a class. "yes": plan, apply, `prunelight.save` and a plain reload by
`AutoModelForCausalLM` give the same numbers. Depth is also compared with the dense model that skips
the same layers. A number: refused in one line before any forward; the reasons stand below the
table. "late", "silent" or "ugly" in a reason is a fault of ours.

- Load: a directory of transformers, read by `prunelight.load`.
- Depth: two of the layers, chosen by `ShortGPT`.
- Slicing: a quarter of the hidden width, by `SliceGPT`.
- Width: a quarter of the neurons and half of the key-value groups, by `WidthPruning`.
- Sparsity: half of the weights, by `WeightPruning` with magnitude and Wanda, and by `DLP`.
- LoRA: the default adapters, trained for one step and merged.

Versions: {versions}. Command: `{command}`.
"""


def versions() -> str:
    """The versions on which the outcome depends."""
    return ", ".join(f"{name} {version(name).partition('+')[0]}" for name in PACKAGES)


def cells_of(family: str) -> dict[str, tuple[str, str]]:
    """The outcome and reason of each kind of pruning of a family; runs in a process of its own."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support"), str(Path(__file__).parent)]
    import torch
    from cells import KINDS, run_cell

    torch.set_num_threads(1)
    cells = {kind: run_cell(family, kind) for kind in KINDS}
    return {kind: (cell.outcome, cell.reason) for kind, cell in cells.items()}


def summary(family: str, cells: Mapping[str, tuple[str, str]], kinds: Iterable[str]) -> str:
    """One cell of the table: "yes", or why not; which kinds, if they differ."""
    texts = {}
    for kind in kinds:
        outcome, reason = cells[kind]
        reason = re.sub(rf"\b{re.escape(family)}\b", "this family", reason)
        texts[kind] = {"works": "yes", "refused": reason}.get(outcome, f"{outcome}: {reason}")
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    working = [kind for kind, text in texts.items() if text == "yes"]
    refused = "; ".join(sorted({text for text in texts.values() if text != "yes"}))
    return f"{' and '.join(working)} only: {refused}" if working else refused


def row(family: str, cells: Mapping[str, tuple[str, str]]) -> list[str]:
    """The texts of a family, one a column."""
    return [summary(family, cells, kinds) for kinds in COLUMNS.values()]


def page(rows: Mapping[str, list[str]], not_built: Mapping[str, str]) -> str:
    """The whole page."""
    reasons: dict[str, int] = {}

    def short(text: str) -> str:
        if text == "yes":
            return text
        number = str(reasons.setdefault(text, len(reasons) + 1))
        kinds, only, _ = text.partition(" only: ")
        return f"{kinds} only ({number})" if only else number

    lines = [
        f"| `{family}` | {' | '.join(short(x) for x in texts)} |" for family, texts in rows.items()
    ]
    counts = []
    for place, column in enumerate(COLUMNS):
        kinds = Counter("yes" if texts[place] == "yes" else "no" for texts in rows.values())
        partly = sum(
            " only: " in texts[place] and not FAULT.search(texts[place]) for texts in rows.values()
        )
        fail = sum(bool(FAULT.search(texts[place])) for texts in rows.values())
        refused = kinds["no"] - partly - fail
        counts.append(f"| {column} | {kinds['yes']} | {partly} | {refused} | {fail} |")
    dashes = "| --- |" + " --- |" * len(COLUMNS)
    total = len(rows) + len(not_built)
    parts = [
        INTRODUCTION.format(command=COMMAND, versions=versions()),
        f"{len(rows)} of {total} families were built:\n",
        "| | work | partly | refused | fail |\n| --- | ---: | ---: | ---: | ---: |",
        *counts,
        f"\n| Family | {' | '.join(COLUMNS)} |\n{dashes}",
        *lines,
        "\n## Reasons\n",
        *(f"{number}. {text}" for text, number in reasons.items()),
        "\n## Not built\n",
        *(f"- `{family}`: {reason}." for family, reason in not_built.items()),
    ]
    return "\n".join(parts) + "\n"


def written_rows() -> dict[str, list[str]]:
    """The texts of docs/families.md, by family, with the reasons in full."""
    text = PAGE.read_text(encoding="utf-8")
    reasons = dict(REASON.findall(text))
    rows = {}
    for family, cells in LINE.findall(text):
        numbers = [re.sub(r".*\((\d+)\)$", r"\1", cell) for cell in cells.split(" | ")]
        rows[family] = [reasons.get(cell, cell) for cell in numbers]
    return rows


def written_with() -> str:
    """The versions that docs/families.md was written with."""
    if not PAGE.exists():
        return ""
    found = re.search(r"^Versions: (.*?)\. Command", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else ""


def main() -> None:
    """Run the sweep; write the page, or print the cells of the families that are named."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("families", nargs="*")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from tiny_families import FAMILIES, NOT_BUILT

    families = arguments.families or FAMILIES
    with ProcessPoolExecutor(arguments.processes, get_context("spawn")) as pool:
        found = dict(zip(families, pool.map(cells_of, families), strict=True))
    bad = {
        f"{family} {kind}": f"{outcome}: {reason}"
        for family, cells in found.items()
        for kind, (outcome, reason) in cells.items()
        if outcome not in ("works", "refused")
    }
    for name, text in bad.items():
        print(name, text, file=sys.stderr)
    if arguments.families:
        for family, cells in found.items():
            print(
                family,
                *(f"  {k}: {outcome} {why}" for k, (outcome, why) in cells.items()),
                sep="\n",
            )
        return
    rows = {family: row(family, cells) for family, cells in found.items()}
    PAGE.write_text(page(rows, NOT_BUILT), encoding="utf-8")
    print(f"{len(rows)} families, {len(bad)} cells that neither work nor are refused -> {PAGE}")


if __name__ == "__main__":
    main()
