"""Wrong inputs by the hundred, each answered in one line; right ones, of which none is refused.

The inputs are values of every option, misspelt names, configs with random edits, and plans with
random steps and edits. All go through the command line of this process, which stops where a model
would first compute. A run with other numbers: python tests/reliability/inputs.py --configs 500
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from rows import Row, run
from warm_command import End
from wrong_commands import TinyRun, misspellings, random_config, whole_runs
from wrong_inputs import Case, option_cases
from wrong_plans import try_plan


def judge(case: Case, end: End) -> str:
    """Return what is wrong with the end of a run; "" if nothing is."""
    if case.right:
        return "" if end.kind == "first forward" else f"refused: {end.text}"
    if end.kind != "one line":
        return f"{end.kind}: {end.text}"
    return "" if case.is_named_in(end.text) else f"names no value: {end.text}"


def row(what: str, ends: Iterable[tuple[Case, End]]) -> list[Row]:
    """Return the rows of wrong inputs and of right ones, and print the faults."""
    tried, faults, loaded = Counter(), Counter(), 0
    for case, end in ends:
        fault = judge(case, end)
        tried[case.right] += 1
        faults[case.right] += bool(fault)
        loaded += not case.right and end.loaded
        if fault:
            print(f"{case} -> {fault}"[:400], flush=True)
    note = f"{loaded} after the model was read, since they depend on it"
    rows = [Row(f"wrong {what}: one line", tried[False], tried[False] - faults[False], note)]
    if tried[True]:
        rows.append(Row(f"right {what}: not refused", tried[True], tried[True] - faults[True]))
    return rows


def measure(options: argparse.Namespace) -> list[Row]:
    """Try all inputs."""
    with tempfile.TemporaryDirectory() as directory:
        tiny = TinyRun(Path(directory))
        rows = row("values of options", ((c, tiny.end_of(c)) for c in option_cases()))
        rows += row("names and files", ((c, tiny.call(c)) for c in misspellings(tiny)))
        rows += row("combinations", ((c, tiny.call(c)) for c in whole_runs(tiny)))
        seeds = [random.Random(seed) for seed in range(options.configs)]
        edits = [tiny.call(random_config(tiny, draw)) for draw in seeds]
    bad = [end for end in edits if end.kind not in ("one line", "first forward")]
    refused = sum(end.kind == "one line" for end in edits)
    for end in bad:
        print(f"config -> {end.kind}: {end.text}"[:400])
    note = f"{refused} refused, the others are still right"
    rows.append(
        Row("edits of a config: one line or a run", len(edits), len(edits) - len(bad), note)
    )
    numbers = range(options.plans)
    plans = [try_plan(random.Random(seed), family) for seed in numbers for family in FAMILIES]
    note = f"{sum(map(bool, plans))} refused with the model bit for bit as it was"
    rows.append(Row("plans: carried out whole or refused", len(plans), len(plans), note))
    return rows


FAMILIES = ("llama", "qwen3", "gpt2", "mixtral")

if __name__ == "__main__":
    run("inputs", measure, configs=200, plans=50)
