"""Examiners of a run's stages: the collapse probes, and samples of generated text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from weakref import ref

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunelight.evaluation.probes.probing import run_probes
from prunelight.evaluation.probes.questions import SEED
from prunelight.evaluation.probes.results import ProbeResult, compare_probes, verdict
from prunelight.evaluation.probes.samples import NEW_TOKENS, PROMPTS, Sample, samples
from prunelight.evaluation.report.plan_facts import Json
from prunelight.evaluation.report.record import Stage
from prunelight.runtime.processes import ProcessGroup

VERSION = 1  # of the questions; another one asks a reused base again


class SamplesExaminer:
    """Continues a few fixed prompts at each stage, on rank 0.

    Attributes:
        examines: the name of the answer in a stage: a list of {"prompt", "text"}.
        latest: the last model and its samples, for the probes that are asked after it.
    """

    examines = "samples"

    def __init__(self) -> None:
        self.latest: tuple[ref[PreTrainedModel], list[Sample]] | None = None

    def check_examination(self, name: str, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Check nothing: there are no settings."""

    def describe_examination(self) -> Json:
        """Return what is continued, and how far."""
        return {"prompts": len(PROMPTS), "new_tokens": NEW_TOKENS, "version": VERSION}

    def examine(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        earlier: Sequence[Stage],
        group: ProcessGroup,
    ) -> list[dict[str, str]]:
        """Return prompts and what the model makes of them."""
        found = group.run_on_rank_zero(partial(samples, model, tokenizer))
        self.latest = (ref(model), found)
        return samples_json(found)

    def handed_over(self, model: PreTrainedModel) -> list[Sample] | None:
        """Return the samples of a model that was just examined, and forget them."""
        latest, self.latest = self.latest, None
        return latest[1] if latest is not None and latest[0]() is model else None


class ProbesExaminer:
    """Asks the collapse probes at each stage, on rank 0, and judges them beside the dense stage.

    Args:
        generated: examiner that is asked before this one, whose texts need not be generated again.

    Attributes:
        examines: the name of the answer in a stage, see `probes_json`.
    """

    examines = "probes"

    def __init__(self, generated: SamplesExaminer | None = None) -> None:
        self.generated = generated

    def check_examination(self, name: str, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Check nothing: there are no settings."""

    def describe_examination(self) -> Json:
        """Return from which seed the questions come."""
        return {"seed": SEED, "version": VERSION}

    def examine(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        earlier: Sequence[Stage],
        group: ProcessGroup,
    ) -> Json:
        """Return the score of each probe, and the verdict beside the dense stage."""
        generated = None if self.generated is None else self.generated.handed_over(model)
        ask = partial(run_probes, model, tokenizer, generated=generated)
        results = group.run_on_rank_zero(ask)
        dense = earlier[0].examined.get(self.examines) if earlier else None
        return probes_json(results, None if dense is None else probe_results(dense))


def probes_json(
    results: Mapping[str, ProbeResult], dense: Mapping[str, ProbeResult] | None = None
) -> Json:
    """Return the results of probes as JSON: name -> right, total, chance, note and score.

    With results of the dense model, each also has its "verdict" beside that.
    """
    told: Json = {name: {**asdict(one), "score": one.score} for name, one in results.items()}
    for name, one in (dense or {}).items():
        if name in results:
            told[name]["verdict"] = verdict(name, one, results[name])
    return told


def probe_results(told: Json) -> dict[str, ProbeResult]:
    """Return the results that `probes_json` gave as JSON."""
    names = ("right", "total", "chance", "note")
    return {probe: ProbeResult(**{n: one[n] for n in names}) for probe, one in told.items()}


def samples_json(found: Sequence[Sample]) -> list[dict[str, str]]:
    """Return samples as JSON, for a table side by side."""
    return [{"prompt": sample.prompt, "text": sample.text} for sample in found]


def collapse_warnings(stages: Sequence[Stage]) -> list[str]:
    """Return a warning for each probe by which the last stage collapsed and perplexity hides it.

    Args:
        stages: of a run; the first is the dense model.
    """
    dense, last = stages[0], stages[-1]
    before, after = (stage.examined.get(ProbesExaminer.examines) for stage in (dense, last))
    if dense is last or before is None or after is None:
        return []
    ratio = last.perplexity / dense.perplexity
    results = probe_results(before), probe_results(after)
    warnings = compare_probes(*results, perplexity_ratio=ratio)
    return [f"{last.name}: {text}" for text in warnings]
