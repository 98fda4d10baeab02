"""From results of cells to rows, rankings, ties and fronts: plain data that table and page show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from prunelight.calibration.self_written import is_self_written, sources_read
from prunelight.comparison.amounts.goals import factor_of
from prunelight.comparison.grid import DENSE, Cell
from prunelight.comparison.settings import ComparisonSettings
from prunelight.comparison.statistics import Paired, front, paired
from prunelight.comparison.telling.additivity import Additivity, additivity
from prunelight.planning.fingerprints import without_folders
from prunelight.runtime.origin import date_now

Result = dict[str, Any]


@dataclass(frozen=True)
class OfSeed:
    """What a method gave with one seed.

    Attributes:
        seed: of calibration windows and training.
        perplexity: text -> value.
        prune_forwards: time to score and prune, in F; None for the dense model and for fits.
    """

    seed: int
    perplexity: dict[str, float]
    prune_forwards: float | None


@dataclass
class Row:
    """A method at an amount, all seeds together.

    Attributes:
        label: of the method; "dense" for the dense model.
        group: what `asked` is a share of: "parameters", "zeros" or a method's own "ratio"; "own"
            where nothing is asked for.
        asked: share that was asked for; None for the dense model, and where the arguments say it.
        recovered: the model was trained after the pruning.
        arguments: of the method; of the first one, in a series.
        failed: why there is no result, in one line; "" if there is one.
        missing: its cells are not run yet.
        share_removed: of all parameters, counted on the model.
        zeros: share of zeros in the weights of decoder layers, counted on the model.
        layers: decoder layers that are left.
        perplexity: text -> value, low and high of the 95 % interval.
        kl: KL(dense || model) in nats, mean over the texts, with its interval.
        same_top1: share of tokens with the dense model's most likely next token, likewise.
        tasks: task -> value and standard error of its headline metric.
        flips: task -> questions that went right to wrong, and wrong to right.
        mean_accuracy: over the tasks; None without tasks.
        prune_forwards: time to score and prune, in F.
        serving: what serving costs, where it was measured.
        latency: time of a generation as a factor of the dense model's, with its spread, where
            methods are compared at equal latency.
        on_text: the method beside the best of its group, by mean ln perplexity.
        on_tasks: the same by mean accuracy.
        on_front: no other row of the group was asked for as much or more and is as good.
        plan: what the method decided with the first seed, `Plan.to_dict()` without what it found
            on the way; empty for the dense model and for fits.
        same_as: label of an earlier row with the same figures on every window: the same model.
        then: method and arguments of each later method of a series.
        decoder_weights_left: share of the dense model's decoder weights that are there.
        seeds: what each seed gave.
    """

    label: str
    group: str
    asked: float | None
    recovered: bool
    arguments: dict[str, Any]
    failed: str = ""
    missing: bool = False
    share_removed: float = 0.0
    zeros: float = 0.0
    layers: int = 0
    perplexity: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    kl: tuple[float, float, float] | None = None
    same_top1: tuple[float, float, float] | None = None
    tasks: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    flips: dict[str, tuple[float, float]] = field(default_factory=dict)
    mean_accuracy: float | None = None
    prune_forwards: float | None = None
    serving: dict[str, Any] = field(default_factory=dict)
    latency: tuple[float, float, float] | None = None
    on_text: Paired | None = None
    on_tasks: Paired | None = None
    on_front: bool = False
    plan: dict[str, Any] = field(default_factory=dict)
    same_as: str = ""
    then: list[dict[str, Any]] = field(default_factory=list)
    decoder_weights_left: float = 1.0
    seeds: list[OfSeed] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Label and amount."""
        return self.label if self.asked is None else f"{self.label}, {self.asked:.3g}"

    @property
    def amount(self) -> float:
        """Share of all parameters that are gone; of decoder weights that are zero or gone."""
        if self.group != "zeros":
            return self.share_removed
        return 1 - (1 - self.zeros) * self.decoder_weights_left

    @property
    def contest(self) -> tuple[str, float | None, bool]:
        """What the row is compared within: group, amount, recovered."""
        return self.group, self.asked, self.recovered

    @property
    def measured(self) -> bool:
        """Whether there is a result."""
        return not self.failed and not self.missing


@dataclass
class Summary:
    """All that a comparison found.

    Attributes:
        settings: of the comparison.
        facts: what identifies model, windows and texts.
        rows: the dense one first.
        command: by which it was started.
        date: of the summary.
        device: that the cells ran on.
        forward_seconds: F.
        additivity: how the harms of pruning and of fewer bits combine, where that was measured.
    """

    settings: ComparisonSettings
    facts: dict[str, Any]
    rows: list[Row]
    command: str
    date: str
    device: str
    forward_seconds: float | None
    additivity: list[Additivity] = field(default_factory=list)

    @property
    def dense(self) -> Row:
        """The row of the dense model."""
        return self.rows[0]

    @property
    def texts(self) -> str:
        """The held-out texts and their sources, without folders of this machine."""
        given = self.settings.data.texts.items()
        return ", ".join(f"{name} ({without_folders(source)})" for name, source in given)

    @property
    def calibration(self) -> str:
        """The calibration windows and their sources, without folders of this machine."""
        data = self.settings.data
        sources = ", ".join(without_folders(source) for source in sources_read(data.calibration))
        behind = "that the dense model wrote behind" if is_self_written(data.calibration) else "of"
        return f"{data.num_calibration} windows {behind} {sources}"

    @property
    def num_missing(self) -> int:
        """Rows whose cells are not all run yet."""
        return sum(row.missing for row in self.rows)

    def contests(self) -> dict[tuple[str, float | None, bool], list[Row]]:
        """Return the rows by what they are compared within, without the dense one."""
        found: dict[tuple[str, float | None, bool], list[Row]] = {}
        searched = self.settings.quality_target is not None
        for row in self.rows[1:]:
            group, asked, recovered = row.contest
            found.setdefault((group, None if searched else asked, recovered), []).append(row)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"format": 1, **asdict(self)}


def summarize(
    settings: ComparisonSettings,
    facts: dict[str, Any],
    cells: Sequence[tuple[Cell, Result | None]],
    command: str = "",
) -> Summary:
    """Return the summary of cells, of which some may not be run yet."""
    grouped: dict[Any, list[tuple[Cell, Result | None]]] = {}
    for cell, result in cells:
        key = (cell.label, cell.group, cell.asked, cell.recovered, cell.fault)
        grouped.setdefault(key, []).append((cell, result))
    of_dense = next((r for c, r in cells if c.label == DENSE and r), None)
    rows, results = [], []
    for members in grouped.values():
        of_row = [result for _, result in members if result is not None]
        rows.append(_row(members, of_row, of_dense))
        results.append(of_row)
    summary = Summary(
        settings=settings,
        facts=facts,
        rows=rows,
        command=command,
        date=date_now(),
        device=next((r["device"] for _, r in cells if r and not r["failed"]), ""),
        forward_seconds=next(
            (r["forward_seconds"] for _, r in cells if r and not r["failed"]), None
        ),
        additivity=additivity(cells),
    )
    if settings.quality_target is None and settings.amounts is not None:
        _rank(summary, dict(zip(map(id, rows), results, strict=True)))
    for group in ("parameters", "ratio", "zeros", "own"):
        _mark_front(rows, group)
    return summary


def _row(
    members: Sequence[tuple[Cell, Result | None]], results: Sequence[Result], dense: Result | None
) -> Row:
    cell = members[0][0]
    row = Row(cell.label, cell.group, cell.asked, cell.recovered, cell.arguments or {})
    row.then = cell.then
    row.failed = next((result["failed"] for result in results if result["failed"]), "")
    row.missing = not row.failed and len(results) < len(members)
    if not row.measured:
        return row
    row.share_removed = fmean(result["share_removed"] for result in results)
    row.zeros = fmean(result["zeros"] for result in results)
    row.decoder_weights_left = fmean(result.get("decoder_weights_left", 1.0) for result in results)
    row.layers = results[0]["layers"]
    row.seeds = [
        OfSeed(
            member.seed,
            {text["text"]: text["perplexity"]["value"] for text in result["texts"]},
            result.get("prune_forwards"),
        )
        for (member, _), result in zip(members, results, strict=True)
    ]
    row.plan = {k: v for k, v in (results[0].get("plan") or {}).items() if k != "found"}
    counts = [text["window_tokens"] for text in results[0]["texts"]]
    for position, text in enumerate(results[0]["texts"]):
        nll = window_means(results, "texts", "window_nll")[position]
        one = paired([[nll]], [counts[position]], lower_is_better=True)[0]
        low, high = math.exp(one.low), math.exp(one.high)
        row.perplexity[text["text"]] = math.exp(one.value), low, high
    if results[0].get("divergence"):
        for name, key in (("kl", "window_kl"), ("same_top1", "window_same_top1")):
            one = paired([window_means(results, "divergence", key)], counts, lower_is_better=True)[
                0
            ]
            setattr(row, name, (one.value, one.low, one.high))
    for name, task in (results[0].get("tasks") or {}).items():
        of_task = [result["tasks"][name] for result in results]
        errors = [x["stderr"] for x in of_task if x["stderr"] is not None]
        row.tasks[name] = fmean(x["value"] for x in of_task), fmean(errors) if errors else None
        reference = ((dense or {}).get("tasks") or {}).get(name)
        if reference and task["outcomes"] and task["fingerprint"] == reference["fingerprint"]:
            row.flips[name] = _flips(reference["outcomes"], [x["outcomes"] for x in of_task])
    row.mean_accuracy = fmean(value for value, _ in row.tasks.values()) if row.tasks else None
    times = [result["prune_forwards"] for result in results if "prune_forwards" in result]
    row.prune_forwards = fmean(times) if times else None
    row.serving = results[0].get("serving") or {}
    if results[0].get("latency"):
        median, low, high = map(fmean, zip(*map(factor_of, results), strict=True))
        row.latency = median, low, high
    return row


def window_means(results: Sequence[Result], section: str, key: str) -> list[list[float]]:
    """Return [text][window]: a figure of each window, the mean over the seeds."""
    texts = range(len(results[0][section]))
    return [
        [fmean(seeds) for seeds in zip(*(r[section][text][key] for r in results), strict=True)]
        for text in texts
    ]


def _flips(reference: str, outcomes: Sequence[str]) -> tuple[float, float]:
    """Return questions that went right to wrong and wrong to right, the mean over the seeds."""
    wrong = fmean(sum(a > b for a, b in zip(reference, o, strict=True)) for o in outcomes)
    right = fmean(sum(a < b for a, b in zip(reference, o, strict=True)) for o in outcomes)
    return wrong, right


def _rank(summary: Summary, results: dict[int, list[Result]]) -> None:
    """Compare the methods of each contest: on the same windows, and on the same questions."""
    for rows in summary.contests().values():
        taking_part = [row for row in rows if row.measured]
        if not taking_part:
            continue
        of_rows = [results[id(row)] for row in taking_part]
        counts = [text["window_tokens"] for text in of_rows[0][0]["texts"]]
        sums = [window_means(of_row, "texts", "window_nll") for of_row in of_rows]
        for row, place in zip(taking_part, paired(sums, counts, lower_is_better=True), strict=True):
            row.on_text = place
        for position, row in enumerate(taking_part):
            earlier = sums.index(sums[position])
            row.same_as = taking_part[earlier].label if earlier < position else ""
        tasks = [
            name for name, task in (of_rows[0][0].get("tasks") or {}).items() if task["outcomes"]
        ]
        if not tasks:
            continue
        answers = [[_answers(of_row, name) for name in tasks] for of_row in of_rows]
        questions = [[1.0] * len(answers[0][i]) for i in range(len(tasks))]
        for row, place in zip(
            taking_part, paired(answers, questions, lower_is_better=False), strict=True
        ):
            row.on_tasks = place


def _answers(results: Sequence[Result], task: str) -> list[float]:
    """Return 1 for a right and 0 for a wrong answer of each question, the mean over the seeds."""
    of_seeds = [[float(x) for x in result["tasks"][task]["outcomes"]] for result in results]
    return [fmean(seeds) for seeds in zip(*of_seeds, strict=True)]


def mean_log_perplexity(row: Row) -> float:
    """Return the mean over the texts of ln perplexity."""
    return fmean(math.log(value) for value, _, _ in row.perplexity.values())


def _mark_front(rows: Sequence[Row], group: str) -> None:
    """Mark what no other row of the group beats in the amount asked for and in perplexity.

    Not in the true share: layers come in whole numbers, and half a layer more is no merit. Where
    nothing was asked for, the true share is what there is.
    """
    for recovered in (False, True):
        of_group = [
            row
            for row in rows[1:]
            if row.measured and row.group == group and row.recovered == recovered
        ]
        points = [
            (-(row.amount if row.asked is None else row.asked), mean_log_perplexity(row))
            for row in of_group
        ]
        for index in front(points):
            of_group[index].on_front = True
