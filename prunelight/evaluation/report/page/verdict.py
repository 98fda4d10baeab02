"""The verdict on a run in plain words: what was done, gained and lost, and what is unknown.

Every sentence follows from figures of the record by a rule that stands here, so that the same
record always gives the same words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from prunelight.evaluation.probes.results import COLLAPSED
from prunelight.evaluation.report.examined import (
    asks,
    collapsed,
    divergences,
    is_tie,
    mean_of_tasks,
    measured_names,
    middle,
    probes_of,
    speeds_of,
    task_names,
    tasks_of,
    verdicts_of,
)
from prunelight.evaluation.report.figures import count, decimal, methods_of, plans_of, sparsified
from prunelight.evaluation.report.record import RunRecord, Stage

# Perplexity against the dense model's, up to this ratio -> words.
GRADES = (
    (0.98, "better than"),
    (1.02, "about as good as"),
    (1.10, "slightly worse than"),
    (1.50, "clearly worse than"),
    (3.00, "much worse than"),
    (math.inf, "far worse than"),
)
# Examiner -> what is not known without it.
_UNKNOWN = {
    "tasks": "zero-shot tasks",
    "probes": "collapse probes (arithmetic, copying, repetition)",
    "divergence": "how far its predictions moved from the dense model's (KL)",
}


def verdict_of(record: RunRecord) -> list[str]:
    """Return the verdict on a run; the first sentence says the most."""
    dense, last = record.stages[0], record.stages[-1]
    sentences = [_headline(record, dense, last), _what_was_done(record)]
    sentences += _on_tasks(dense, last) + _on_probes(dense, last) + _on_divergence(last)
    sentences += _on_speed(dense, last)
    if sparsified(record):  # what this hardware gains of zeros, and why
        sentences += verdicts_of(last)
    sentences.append(_not_measured(record))
    return [sentence for sentence in sentences if sentence]


def grade(ratio: float) -> str:
    """Return how a model with a perplexity this many times the dense model's compares with it."""
    if not math.isfinite(ratio):
        return "unusable beside"
    return next(words for limit, words in GRADES if ratio <= limit)


def is_tie_on_text(stage: Stage) -> bool:
    """Return whether the interval of the perplexity ratio, if there is one, holds 1."""
    told = divergences([stage]).get(stage.name, {}).get("ln_perplexity_ratio")
    return isinstance(told, dict) and told.get("low", 1) <= 0 <= told.get("high", -1)


def _headline(record: RunRecord, dense: Stage, last: Stage) -> str:
    gain = _gain(record, dense, last)
    if last is dense:
        return f"{gain}: it was measured as it is."
    ratio = last.perplexity / dense.perplexity if dense.perplexity else math.nan
    numbers = f"perplexity {decimal(dense.perplexity)} → {decimal(last.perplexity)}"
    if math.isfinite(ratio) and ratio > 1.1:
        numbers += f", {ratio:.3g} times"
    words = "a tie with" if is_tie_on_text(last) else grade(ratio)
    return f"{gain}; on held-out text it is {words} the dense model ({numbers})."


def _gain(record: RunRecord, dense: Stage, last: Stage) -> str:
    methods, name = methods_of(record), record.model
    removed = 1 - last.parameters / dense.parameters
    parts = []
    if removed >= 0.0005:
        sizes = f"{count(dense.parameters)} → {count(last.parameters)} parameters"
        parts.append(f"made {name} {100 * removed:.1f} % smaller ({sizes})")
    if sparsified(record):
        share = f"set {100 * last.linear_sparsity:.1f} % of the decoder weights to zero"
        parts.append(share if parts else f"{share} in {name}")
    if not record.plans:
        return f"{name} was not pruned"
    return f"{methods} {' and '.join(parts) or f'left {name} as large as it was'}"


def _what_was_done(record: RunRecord) -> str:
    done = [f"{plan.method}: {plan.nominal()}" for plan in plans_of(record)]
    mode, tokens = record.recovery.get("mode"), record.recovery.get("tokens_seen")
    if mode in (None, "none"):
        done.append("no training after it")
    else:
        spent = f" on {tokens:,} tokens" if isinstance(tokens, int) else ""
        steps = record.recovery.get("optimizer_steps")
        told = f" in {steps:,} steps" if isinstance(steps, int) else ""
        words = {"lora": "LoRA", "full": "training of all weights"}.get(mode, str(mode))
        done.append(f"then recovered by {words}{spent}{told}")
    return f"What was done: {'; '.join(done)}."


def _on_speed(dense: Stage, last: Stage) -> list[str]:
    told = speeds_of(last)
    if not told or last is dense:
        return []
    words = [
        f"{what} no difference beyond noise"
        if low <= 1 <= high
        else f"{what} {median:.3g} times as fast ({low:.3g} to {high:.3g})"
        for what, median, low, high in told
    ]
    return [f"Speed on this machine, timed in turn with the dense model: {'; '.join(words)}."]


def _on_tasks(dense: Stage, last: Stage) -> list[str]:
    names = [name for name in task_names([last]) if name in tasks_of(dense)]
    if last is dense or not names:
        return []
    ties = [name for name in names if is_tie(dense, last, name)]
    before, after = mean_of_tasks(dense), mean_of_tasks(last)
    words = f"mean {before:.3f} → {after:.3f}" if len(names) > 1 else f"{before:.3f} → {after:.3f}"
    if len(ties) == len(names):
        told = "a tie with the dense model: no difference beyond noise"
    elif ties:
        told = f"differs beyond noise on {len(names) - len(ties)}, a tie on {', '.join(ties)}"
    else:
        told = "differs beyond noise on each" if len(names) > 1 else "differs beyond noise"
    tasks = f"{len(names)} tasks" if len(names) > 1 else names[0]
    return [f"On {tasks}: {words}; {told}."]


def _on_probes(dense: Stage, last: Stage) -> list[str]:
    counted = [
        name for name, one in probes_of(last).items() if one.get("verdict") in ("kept", COLLAPSED)
    ]
    if last is dense or not counted:
        return []
    if fallen := collapsed(last):
        told = _listed([asks(name) for name in fallen])
        return [f"Collapse: it no longer does what the dense model does in these probes: {told}."]
    probes = "probes that count" if len(counted) > 1 else "probe that counts"
    return [f"It shows no collapse in the {len(counted)} {probes}."]


def _on_divergence(last: Stage) -> list[str]:
    told = divergences([last]).get(last.name, {})
    top, kl = middle(told.get("same_top1")), middle(told.get("kl"))
    if not (math.isfinite(top) and math.isfinite(kl)):
        return []
    return [
        f"It picks the dense model's most likely next token {100 * top:.1f} % of the time; the "
        f"mean KL is {kl:.3g} nats."
    ]


def _not_measured(record: RunRecord) -> str:
    known = measured_names(record.stages)
    unknown = [words for name, words in _UNKNOWN.items() if name not in known]
    if not unknown:
        return ""
    text = f"Not measured: {_listed(unknown)}."
    return f"{text} Perplexity alone can hide a collapse." if "probes" not in known else text


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
