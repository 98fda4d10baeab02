"""What each plan decided and why, as a section of the page: scores with the cut, zeros, widths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from prunelight.evaluation.report.figures import Carried, finding, plans_carried_out
from prunelight.evaluation.report.page import charts
from prunelight.evaluation.report.page.frame import (
    Section,
    bullets,
    details,
    facts,
    figure,
    figures,
    paragraph,
    table,
)
from prunelight.evaluation.report.plan_facts import (
    HEALING_ERRORS,
    Json,
    PlanFacts,
    by_sublayer,
    explained_variance,
    healed_by,
    healing_lines,
    layer_columns,
    percent,
)
from prunelight.evaluation.report.record import RunRecord
from prunelight.planning.steps import Heal, SliceHidden, Sparsify

_MANY = 44  # decoder layers from which a chart takes the whole width of the page


class Meaning(NamedTuple):
    """What a score is called, and what a low value of it says."""

    label: str
    words: str
    high_goes: bool = False  # the highest go first


_MEANINGS = {
    "block_influence": Meaning(
        "Block Influence",
        "Block Influence is 1 minus the cosine between what enters a layer and what leaves it. Low "
        "means that the layer changes little, so it can go.",
    ),
    "attention_influence": Meaning(
        "influence of attention",
        "1 minus the cosine between what enters a layer's attention and what leaves it. Low means "
        "that the attention changes little, so it can go.",
    ),
    "mlp_influence": Meaning(
        "influence of MLP",
        "1 minus the cosine between what enters a layer's MLP and what leaves it. Low means that "
        "the MLP changes little, so it can go.",
    ),
    "angular_distance": Meaning(
        "angular distance",
        "The angle, as a share of pi, between the states before and after as many layers as go, "
        "from this layer on. Low means that these layers turn the state little.",
    ),
    "relative_magnitude": Meaning(
        "relative magnitude",
        "The norm of what a layer adds over the norm of what leaves it. Low means that the layer "
        "adds little beside what passes through.",
    ),
    "sequential": Meaning("place from below", "The shallowest layers go first; no data are read."),
    "reverse": Meaning("place from above", "The deepest layers go first; no data are read."),
    "random": Meaning("random number", "Drawn with the seed; the lowest go. No data are read."),
    "perplexity": Meaning(
        "rise of the NLL (nats)",
        "How much the text gets less likely without the layer. Low means that it is not missed.",
    ),
    "taylor": Meaning(
        "Taylor score",
        "Sum of |weight \u00d7 gradient| over a layer: to first order, what its loss costs. "
        "Low means that it is not missed.",
    ),
    "magnitude": Meaning(
        "magnitude", "Sum of |weight| over a layer. Low means that the layer weighs little."
    ),
    "kl_without": Meaning(
        "KL without it, healed (nats)",
        "How far the model's predictions move when this layer alone goes and the layer before it "
        "is fitted anew. Low means that the others make up for it. Later layers were chosen after "
        "earlier ones had gone, so the lowest bars need not be the removed ones.",
    ),
    "similarity_without": Meaning(
        "similarity without it",
        "How alike the model stays to the dense one (1: the same) when this layer alone goes. High "
        "means that it is not missed. Later layers were chosen after earlier ones had gone, so the "
        "highest bars need not be the removed ones.",
        high_goes=True,
    ),
    "similarity_when_reached": Meaning(
        "similarity when reached",
        "How alike the model was to the dense one (1: the same) when the search reached the layer. "
        "Low means that merging it as well would have cost too much.",
        high_goes=True,
    ),
    "layer_redundancy": Meaning(
        "layer redundancy",
        "How little a layer changes its input, from 0 to 1 over the layers. Low means that the "
        "layer does much, and keeps more of its width.",
        high_goes=True,
    ),
    "median": Meaning(
        "median of |W| ‖X‖",
        "The median of weight times norm of its input. Low means that few weights stand out, so "
        "the layer loses more of them.",
    ),
    "mean": Meaning(
        "mean of |W| ‖X‖",
        "The mean of weight times norm of its input. Low means that the layer's weights "
        "matter less.",
    ),
    "outlier_ratio": Meaning(
        "share of outliers",
        "The share of weights whose |W| ‖X‖ is far above the mean. Low means that few stand out, "
        "so the layer loses more weights.",
    ),
    "expert_reap": Meaning(
        "mean score of experts (REAP)",
        "Gate times norm of the output, mean over the experts of a layer. It grows with depth, so "
        "that experts are compared within their layer alone.",
    ),
    "expert_frequency": Meaning(
        "mean share of tokens of an expert",
        "How many tokens an expert gets, mean over the experts of a layer. Equal in all layers "
        "where a token takes equally many.",
    ),
    "share_of_experts_score_removed": Meaning(
        "share of the experts' score removed",
        "The part of the scores of all experts that the removed ones held. High means that this "
        "layer lost experts that mattered.",
    ),
    "share_of_heads_score_kept": Meaning(
        "share of the heads' score kept",
        "The part of the importance of all heads that the kept ones hold. Low means that this "
        "layer lost heads that mattered.",
    ),
    "share_of_neurons_score_kept": Meaning(
        "share of the neurons' score kept",
        "The part of the importance of all neurons that the kept ones hold. Low means that this "
        "layer lost neurons that mattered.",
    ),
}


def decision_sections(record: RunRecord) -> list[Section]:
    """Return one section a plan: what it did, the charts that show why, and its settings."""
    carried_out = plans_carried_out(record)
    return [
        Section(
            f"What {carried.plan.method} decided"
            + (f" (step {number} of {len(carried_out)})" if len(carried_out) > 1 else ""),
            _parts(carried),
            f"{carried.plan.nominal()}.",
        )
        for number, carried in enumerate(carried_out, start=1)
    ]


def _parts(carried: Carried) -> list[Markup | str]:
    plan, outcome = carried.plan, carried.together
    drawn = [*_score_figures(plan), *_zero_figures(plan, outcome)]
    drawn += [*_width_figures(plan, outcome), *_kept_figures(plan), *_cka_figures(plan)]
    parts: list[Markup | str] = []
    if len(drawn) == 1:  # alone it takes the whole width, unless it is a map
        alone = _score_figures(plan, wide="cka" not in plan.found) or drawn
        parts.append(alone[0] if len(alone) == 1 else figures(drawn))
    elif drawn:
        parts.append(figures(drawn))
    for step, own in zip(carried.plan.steps, carried.outcomes, strict=True):
        if isinstance(step, Sparsify) and own.get("notes"):
            parts.append(bullets([str(note) for note in own["notes"]]))
        elif isinstance(step, Heal) and (lines := healing_lines(step, own)):
            summary = f"{sum(map(bool, healed_by(own)))} of {len(step.layers)} layers healed"
            parts.append(details(summary, paragraph(HEALING_ERRORS), bullets(lines)))
    columns = layer_columns(plan, outcome)
    gone = plan.layer_outcomes()
    rows = [[cell.replace("**", "") for cell in row] for row in zip(*columns.values(), strict=True)]
    marked = [layer for layer in range(plan.num_layers) if layer in gone]
    if len(columns) > 1:
        summary = f"All {plan.num_layers} decoder layers as a table"
        parts.append(details(summary, table([*columns], rows, marked=marked)))
    settings = {
        k: v for k, v in plan.arguments.items() if not isinstance(v, dict) and v is not None
    }
    calibration = {f"calibration {k}": v for k, v in plan.calibration.items()}
    found = {k: finding(k, v) for k, v in plan.found.items() if k != "cka"}
    told = {name.replace("_", " "): value for name, value in {**settings, **calibration}.items()}
    parts.append(details("Settings and findings", facts(told), *_findings(found)))
    return parts


def score_figures(plan: Json) -> list[Markup]:
    """Return a chart of each kind of score of a plan, `Plan.to_dict()`, with the cut."""
    return _score_figures(PlanFacts(plan))


def _findings(found: Json) -> list[Markup]:
    told = {name.replace("_", " "): value for name, value in found.items()}
    return [paragraph("Found on the way:"), facts(told)] if told else []


def meaning_of(name: str) -> Meaning:
    """Return what a list of scores means; its name without words where it is not known."""
    kind = next((kind for kind in _MEANINGS if name == kind or name.startswith(f"{kind}_")), "")
    if name in _MEANINGS:
        return _MEANINGS[name]
    return _MEANINGS.get(kind, Meaning(name.replace("_", " "), ""))


def cut_of(scores: Sequence[float], gone: Sequence[int], *, high_goes: bool) -> float | None:
    """Return the level between the layers that go and those that stay.

    None if scores alone do not part them: layers were protected, or chosen in turn.
    """
    sign = -1 if high_goes else 1
    finite = {i: sign * x for i, x in enumerate(scores) if math.isfinite(x)}
    below = [x for i, x in finite.items() if i in set(gone)]
    above = [x for i, x in finite.items() if i not in set(gone)]
    if not below or not above or max(below) > min(above):
        return None
    return sign * (max(below) + min(above)) / 2


def _score_figures(plan: PlanFacts, *, wide: bool = False) -> list[Markup]:
    lists = {n: x for n, x in plan.score_lists().items() if not n.endswith("_first_token")}
    if "layer_redundancy" in lists:  # which is 1 - influence, stretched
        lists.pop("block_influence", None)
    if len(lists) > 1 and plan.steps_of(Sparsify):
        return [_projections_figure(lists)]
    wide = wide or plan.num_layers > _MANY
    return [_score_figure(plan, name, scores, wide) for name, scores in lists.items()]


def _projections_figure(lists: dict[str, list[float]]) -> Markup:
    kind = next((kind for kind in _MEANINGS if all(n.startswith(kind) for n in lists)), "")
    meaning = _MEANINGS.get(kind, Meaning("score", ""))
    rows = {name.removeprefix(f"{kind}_"): row for name, row in lists.items()}
    chart = charts.heat_map(
        [*rows.values()],
        alt=f"{meaning.label} of each projection in each decoder layer",
        x_label="decoder layer",
        bar_label=meaning.label,
        row_names=[*rows],
        height=0.9 + 0.22 * len(rows),
    )
    return figure(chart, meaning.words)


def _score_figure(plan: PlanFacts, name: str, scores: list[float], wide: bool) -> Markup:
    meaning = meaning_of(name)
    sublayer = name.removesuffix("_influence")
    dropped = [i for step in plan.steps for i in step.dropped_sublayers.get(sublayer, ())]
    gone = dropped if name.endswith("_influence") and name != "block_influence" else []
    gone = gone or [*plan.removed_layers]
    whole = len(scores) == plan.num_layers  # else of windows that start at a layer
    cut = cut_of(scores, gone, high_goes=meaning.high_goes) if whole and gone else None
    if not whole and gone and gone[0] < len(scores):
        words = f"{meaning.words} The chosen window starts at layer {gone[0]}."
    else:
        side = "above" if meaning.high_goes else "below"
        words = meaning.words
        words += "" if cut is None else f" The line is the cut: layers {side} it go."
    if whole and gone and cut is None and not meaning.high_goes:
        words += " The score alone does not part them: some layers may not go, or go in turn."
    merged = bool(plan.merged_groups)
    chart = charts.bar_chart(
        {meaning.label: scores},
        [str(layer) for layer in range(len(scores))],
        alt=_told(meaning.label, scores, gone),
        y_label=meaning.label,
        x_label="decoder layer" if whole else "first layer of the window",
        line=None if cut is None else (cut, "cut"),
        shaded=[layer for layer in gone if layer < len(scores)],
        shaded_label="merged away" if merged else "removed",
        wide=wide,
    )
    return figure(chart, words.strip(), wide=wide)


def _told(label: str, values: Sequence[float], gone: Sequence[int] = ()) -> str:
    """Return in words what a chart over layers shows."""
    finite = {i: x for i, x in enumerate(values) if math.isfinite(x)}
    if not finite:
        return f"{label} over the decoder layers"
    low, high = min(finite, key=finite.__getitem__), max(finite, key=finite.__getitem__)
    text = (
        f"{label} over the decoder layers: lowest {finite[low]:.3g} at layer {low}, highest "
        f"{finite[high]:.3g} at layer {high}"
    )
    return f"{text}; gone: {', '.join(map(str, gone))}" if gone else text


def _zero_figures(plan: PlanFacts, outcome: Json) -> list[Markup]:
    drawn = []
    for step in plan.steps_of(Sparsify)[-1:]:
        zeros = plan.layer_zeros(step, outcome)
        shares = [100 * share for share in zeros.layers]
        chart = charts.bar_chart(
            {"zeros": shares},
            [str(layer) for layer in range(len(shares))],
            alt=_told("Zeros (%)", shares),
            y_label="zeros (%)",
            x_label="decoder layer",
            line=(100 * step.planned_share(plan), "planned on the whole"),
            log=False,
            top=100,
            wide=plan.num_layers > _MANY,
        )
        words = "Share of zeros among the weights of each decoder layer."
        drawn.append(figure(chart, words, wide=plan.num_layers > _MANY))
        rows = {path: [100 * share for share in row] for path, row in zeros.projections.items()}
        if rows and _varies(rows):
            chart = charts.heat_map(
                [*rows.values()],
                alt="Zeros (%) of each projection in each decoder layer",
                x_label="decoder layer",
                bar_label="zeros (%)",
                row_names=[*rows],
                height=0.9 + 0.22 * len(rows),
            )
            drawn.append(figure(chart, "Share of zeros of each projection."))
        if zeros.errors:
            chart = charts.bar_chart(
                {"error": zeros.errors},
                [str(layer) for layer in range(len(zeros.errors))],
                alt=_told("Reconstruction error", zeros.errors),
                y_label="reconstruction error",
                x_label="decoder layer",
            )
            words = (
                "How far the outputs of a layer's matrices are from what they were. Low is good."
            )
            drawn.append(figure(chart, words))
    return drawn


def _varies(rows: dict[str, list[float]]) -> bool:
    """Whether projections of a layer differ: else the bars say it all."""
    columns = zip(*rows.values(), strict=True)
    spans = [max(c) - min(c) for c in ([x for x in c if math.isfinite(x)] for c in columns) if c]
    return bool(spans) and max(spans) > 0.5


def _width_figures(plan: PlanFacts, outcome: Json) -> list[Markup]:
    drawn = []
    for step in plan.steps_of(SliceHidden):
        hidden, widths = plan.model["hidden_size"], by_sublayer(step.residual_dims)
        labels = [str(layer) for layer in range(plan.num_layers)]
        many = plan.num_layers > _MANY
        chart = charts.bar_chart(
            {f"at {name}": row for name, row in widths.items()},
            labels,
            alt=_told("Width before the attention", widths["attention"]),
            y_label="width of the hidden states",
            x_label="decoder layer",
            line=(hidden, f"dense: {hidden}"),
            log=False,
            wide=many,
        )
        removed = percent(step.share_removed(hidden))
        words = (
            f"Width that each sublayer reads; {removed} of the hidden width is gone in the mean."
        )
        drawn.append(figure(chart, words, wide=many))
        if explained := explained_variance(step, outcome):
            chart = charts.line_chart(
                {f"at {name}": (range(len(row)), row) for name, row in explained.items()},
                alt=_told("Explained variance at attention", explained["attention"]),
                x_label="decoder layer",
                y_label="explained variance",
                wide=many,
            )
            words = (
                "Share of the signal that the kept directions hold. Low means that much is lost."
            )
            drawn.append(figure(chart, words, wide=many))
    return drawn


def _kept_figures(plan: PlanFacts) -> list[Markup]:
    """Return the heads and neurons that each layer keeps, where layers differ."""
    drawn = []
    for field, what in (("key_value_heads", "KV heads"), ("intermediate_sizes", "neurons")):
        kept = plan.found.get(f"layer_{field}")
        if not isinstance(kept, list):
            continue
        names = (f"num_{field}_before", f"{field.removesuffix('s')}_before")
        before = next((plan.found[name] for name in names if name in plan.found), None)
        chart = charts.bar_chart(
            {what: kept},
            [str(layer) for layer in range(len(kept))],
            alt=_told(f"Number of {what}", kept),
            y_label=f"{what} kept",
            x_label="decoder layer",
            line=None if before is None else (before, f"dense: {before}"),
            log=False,
            wide=plan.num_layers > _MANY,
        )
        drawn.append(figure(chart, f"{what} that each layer keeps.", wide=plan.num_layers > _MANY))
    return drawn


def _cka_figures(plan: PlanFacts) -> list[Markup]:
    if "cka" not in plan.found:
        return []
    groups = plan.merged_groups
    chart = charts.heat_map(
        plan.found["cka"],
        alt="CKA of each pair of hidden states"
        + "".join(f"; merged into one layer: {group[0]} to {group[-1]}" for group in groups),
        x_label="hidden state (0: embeddings, i: after layer i - 1)",
        y_label="hidden state",
        bar_label="CKA (debiased)",
        outlines=[(group[0] + 1, group[-1] + 1) for group in groups],
        limits=(min(0.0, *map(min, plan.found["cka"])), 1.0),
    )
    words = "How alike the hidden states are. Bright squares along the diagonal are runs of layers "
    words += "that change little" + ("; framed: merged into one layer." if groups else ".")
    return [figure(chart, words)]
