"""What a plan says about each decoder layer, read from its JSON form, and the picture of it.

One picture a plan, its panels above each other over the same layers: the scores that decided; for
sparsity also the share of zeros of each layer, of each projection, and what the zeros changed. Like
report.py it needs neither torch nor lightning, and matplotlib only once something is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_BLUE, _GREEN, _ORANGE, _PALE = "#0072b2", "#009e73", "#d55e00", "#faeadf"
_PALETTE = (_BLUE, _ORANGE, _GREEN, "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")
_LABELS = {
    "median": "median of |W| ‖X‖",
    "mean": "mean of |W| ‖X‖",
    "outlier_ratio": "share of outliers",
}


# --- reading a plan ------------------------------------------------------------------------------


def fates(plan: dict[str, Any]) -> dict[int, str]:
    """Return what happened to each decoder layer that did not stay whole."""
    found: dict[int, str] = {}
    for step in plan["steps"]:
        found |= dict.fromkeys(step.get("layers", ()), "removed")
        for group in step.get("groups", ()):
            kept = group[-1] if step.get("merge") == "top" else group[0]
            found |= {layer: f"merged into {kept}" for layer in group if layer != kept}
        for part in ("attention", "mlp"):
            for layer in step.get(part, ()):
                found[layer] = f"{found[layer]}, no {part}" if layer in found else f"no {part}"
    return found


def _removed(plan: dict[str, Any]) -> list[int]:
    return sorted(layer for layer, fate in fates(plan).items() if not fate.startswith("no "))


def score_lists(plan: dict[str, Any]) -> dict[str, list[float]]:
    """Return those scores of a plan that are lists of numbers; None becomes NaN."""
    lists = {name: x for name, x in (plan.get("scores") or {}).items() if isinstance(x, list) and x}
    return {
        name: [math.nan if score is None else float(score) for score in scores]
        for name, scores in lists.items()
        if all(isinstance(score, int | float | None) for score in scores)
    }


def sparsify_steps(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the steps of a plan that put zeros into weights."""
    return [step for step in plan["steps"] if step["kind"] == "sparsify"]


def drawable(plan: dict[str, Any]) -> bool:
    """Return whether a plan holds numbers that a picture can show."""
    return bool(score_lists(plan) or sparsify_steps(plan))


def nominal(plan: dict[str, Any]) -> str:
    """Return the ratio in the method's own terms: of decoder layers or of weights."""
    removed, num_layers = len(_removed(plan)), plan["model"]["num_hidden_layers"]
    parts = []
    if removed:
        share = f"{100 * removed / num_layers:.1f} %"
        parts.append(f"{removed} of {num_layers} decoder layers removed ({share})")
    for step in sparsify_steps(plan):
        if step.get("pattern"):
            mixed = len(set(step["sparsity"].values())) > 1
            parts.append(f"{step['pattern']} pattern{' on average' if mixed else ''}")
        else:
            share = f"{100 * _planned(plan, step):.1f} %"
            parts.append(f"{share} of the weights of decoder linears")
    return ", ".join(parts) or "no layer removed"


def _planned(plan: dict[str, Any], step: dict[str, Any]) -> float:
    """Return the share of zeros that a step aims at in all decoder linears together."""
    if step.get("pattern"):
        kept, _, group = step["pattern"].partition(":")
        return 1 - int(kept) / int(group)
    asked = plan["arguments"].get("sparsity")
    return layer_zeros(plan, step).mean if asked is None else float(asked)


@dataclass(frozen=True)
class LayerZeros:
    """What a sparsify step does to each decoder layer; NaN where it does nothing.

    Attributes:
        layers: share of zeros in the linears of each decoder layer, in [0, 1].
        projections: name of a projection -> its share of zeros in each decoder layer.
        errors: reconstruction error of each decoder layer; empty if not measured.
    """

    layers: list[float]
    projections: dict[str, list[float]]
    errors: list[float]

    @property
    def mean(self) -> float:
        """Return the mean over the decoder layers that get zeros."""
        return _mean([share for share in self.layers if math.isfinite(share)])


def layer_zeros(
    plan: dict[str, Any], step: dict[str, Any], outcome: dict[str, Any] | None = None
) -> LayerZeros:
    """Sum a sparsify step up by layer and projection: as achieved, or as planned without outcome.

    Several matrices of one name in a layer (experts) are averaged. A record has no sizes, so the
    share of a layer of unequal matrices is the one that the plan states, moved by what its matrices
    missed on average.
    """
    num_layers, outcome = plan["model"]["num_hidden_layers"], outcome or {}
    # An outcome counts the layers that were left, a plan those of the dense model.
    gone = {i for s in plan["steps"][: plan["steps"].index(step)] for i in s.get("layers", ())}
    left = [layer for layer in range(num_layers) if layer not in gone]
    reached = {}
    for name, share in outcome.get("sparsity", {}).items():
        layer, path = _place(name)
        reached[left[layer], path] = share
    cells: list[dict[str, list[tuple[float, float]]]] = [{} for _ in range(num_layers)]
    for name, wanted in step["sparsity"].items():
        layer, path = _place(name)
        if layer in left:
            pair = (wanted, reached.get((layer, path), wanted))
            cells[layer].setdefault(_without_numbers(path), []).append(pair)
    stated = score_lists(plan).get("sparsity", [])
    layers = [
        _layer_share(
            [pair for pairs in cells[layer].values() for pair in pairs],
            stated[layer] if len(stated) == num_layers else None,
        )
        for layer in range(num_layers)
    ]
    errors = outcome.get("reconstruction_error") or []
    by_layer = dict(zip(left, errors, strict=False))
    return LayerZeros(
        layers,
        {
            name: [_mean([got for _, got in cells[i].get(path, [])]) for i in range(num_layers)]
            for path, name in _short_names(cells).items()
        },
        [float(by_layer.get(layer, math.nan)) for layer in range(num_layers)] if errors else [],
    )


def _place(name: str) -> tuple[int, str]:
    """Split the name of a matrix: model.layers.3.mlp.up_proj -> (3, mlp.up_proj)."""
    parts = name.split(".")
    start = next(index for index, part in enumerate(parts) if part.isdigit())
    return int(parts[start]), ".".join(parts[start + 1 :])


def _without_numbers(path: str) -> str:
    return ".".join(part for part in path.split(".") if not part.isdigit())


def _short_names(cells: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Map paths to their last part, but where two share it: GPT-2 has two of the name c_proj."""
    paths = list(dict.fromkeys(path for row in cells for path in row))
    last = [path.rpartition(".")[2] for path in paths]
    return {
        path: path if last.count(short) > 1 else short
        for path, short in zip(paths, last, strict=True)
    }


def _layer_share(pairs: list[tuple[float, float]], stated: float | None) -> float:
    """Return the share of zeros of a layer from what each matrix wanted and got."""
    wanted = [pair[0] for pair in pairs]
    if not pairs:
        return math.nan
    share = _mean(wanted) if stated is None else min(max(stated, min(wanted)), max(wanted))
    return share + _mean([got - want for want, got in pairs])


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def sparsify_facts(
    plan: dict[str, Any], step: dict[str, Any], outcome: dict[str, Any], measured: float = 0.0
) -> dict[str, str]:
    """Return the totals of a sparsify step, ready to be shown.

    The achieved sparsity is the one measured on the model, else the mean over its decoder layers.
    """
    zeros = layer_zeros(plan, step, outcome)
    shares = {layer: share for layer, share in enumerate(zeros.layers) if math.isfinite(share)}
    facts = {
        "solver": step["solver"],
        "pattern": step.get("pattern") or "none (unstructured)",
        "matrices": f"{len(step['sparsity'])} in {len(shares)} decoder layers",
        "planned sparsity of decoder linears": percent(_planned(plan, step)),
    }
    if outcome:
        facts["achieved sparsity of decoder linears"] = percent(measured or zeros.mean)
    for label, chosen in (("densest", min), ("sparsest", max)) if shares else ():
        layer = chosen(shares, key=shares.__getitem__)
        facts[f"{label} decoder layer ({layer})"] = percent(shares[layer])
    return facts


def layer_table(
    plan: dict[str, Any], outcome: dict[str, Any] | None = None
) -> dict[str, list[str]]:
    """Return columns of cells, one a decoder layer; bold what did not stay whole.

    Scores, then zeros and reconstruction error of the last sparsify step, then what became of the
    layer (left out where zeros are all that happened).
    """
    num_layers, steps, found = plan["model"]["num_hidden_layers"], sparsify_steps(plan), fates(plan)
    columns = {"layer": [f"**{i}**" if i in found else str(i) for i in range(num_layers)]}
    for name, scores in score_lists(plan).items():
        missing = num_layers - len(scores)
        if missing >= 0 and not (steps and name == "sparsity"):
            title = name.replace("_", " ") + (" from here" if missing else "")
            columns[title] = [*(f"{score:.4g}" for score in scores), *[""] * missing]
    if steps:
        zeros = layer_zeros(plan, steps[-1], outcome)
        columns["sparsity"] = [percent(x) if math.isfinite(x) else "" for x in zeros.layers]
        if zeros.errors:
            columns["reconstruction error"] = [f"{error:.4g}" for error in zeros.errors]
    if found or (len(columns) > 1 and not steps):
        told = [f"**{found[i]}**" if i in found else "kept" for i in range(num_layers)]
        columns["fate"] = told
    return columns


def percent(share: float) -> str:
    """Return a share in [0, 1] as text."""
    return f"{100 * share:.2f} %"


# --- drawing -------------------------------------------------------------------------------------


def plot_layers(plan: dict[str, Any], outcome: dict[str, Any] | None = None) -> Figure:
    """Draw the scores of a plan over the decoder layers, and the zeros of its last sparsify step.

    Of the scores of layers the first list with one entry a layer is drawn, else the first list (the
    angular distance has one entry a window, at the window's first layer); of the scores of
    projections all. The scale is logarithmic if all are positive and span more than a factor of 20.

    Args:
        plan: `Plan.to_dict()`.
        outcome: of its last sparsify step, see `surgery.apply`; None shows what was planned.

    Raises:
        ValueError: if there is neither a list of scores nor a sparsify step.
    """
    from matplotlib.figure import Figure  # the object API: no pyplot, no global state

    if not drawable(plan):
        raise ValueError(
            f"scores={plan.get('scores')} of the {plan['method']} plan must hold a list of "
            "numbers to be drawn; skip the picture for this plan"
        )
    num_layers, steps = plan["model"]["num_hidden_layers"], sparsify_steps(plan)
    zeros = layer_zeros(plan, steps[-1], outcome) if steps else LayerZeros([], {}, [])
    lists = {k: x for k, x in score_lists(plan).items() if not (steps and k == "sparsity")}
    heights = [2.4 if steps else 4.0] if lists else []
    heights += [2.0, 0.4 + 0.18 * len(zeros.projections)] if steps else []
    heights += [1.6] if zeros.errors else []
    width = min(max(7.0, 2.5 + 0.16 * num_layers), 13.0)
    figure = Figure((width, sum(heights)), 150, layout="constrained")
    panels = figure.subplots(len(heights), sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    panels[-1].set_xlabel("decoder layer")
    remaining, widest = iter(panels), num_layers
    whole = {name: scores for name, scores in lists.items() if len(scores) == num_layers}
    if steps and len(whole) > 1:
        _draw_lines(next(remaining), whole)
    elif lists:
        name = next(iter(whole or lists))
        removed, widest = _removed(plan), max(num_layers, len(lists[name]))
        _draw_scores(next(remaining), name, lists[name], removed=removed, num_layers=num_layers)
        if removed or not steps:
            figure.legend(loc="outside lower center", ncols=2, frameon=False)
    if steps:
        _draw_sparsity(next(remaining), zeros.layers, _planned(plan, steps[-1]))
        _draw_projections(figure, next(remaining), zeros.projections)
    if zeros.errors:
        axes = next(remaining)
        axes.bar(range(num_layers), _drawn(zeros.errors), color=_ORANGE)
        _finish(axes, "reconstruction\nerror", zeros.errors)
    panels[-1].set_xlim(-0.8, widest - 0.2)
    panels[-1].locator_params(axis="x", nbins=20, integer=True)
    for axes in panels[:-1]:
        axes.label_outer()
    model = plan["model"]["name"]
    model = model if len(model) <= 60 else f"...{model[-57:]}"
    panels[0].set_title(f"{plan['method']}: {model}\n{nominal(plan)}", loc="left", fontsize=10)
    return figure


def _draw_scores(
    axes: Axes, name: str, scores: list[float], *, removed: list[int], num_layers: int
) -> None:
    marked, labels, place = removed, ("kept", f"removed ({len(removed)})"), "decoder layer"
    if len(scores) < num_layers:
        marked, labels = removed[:1], ("score of a window", "first window taken")
        place = "decoder layer (a window's score stands at its first; removed layers shaded)"
    elif len(scores) > num_layers:
        marked, labels, removed, place = [], ("score", ""), [], f"entry of {name}"
    marked = [index for index in marked if index < len(scores)]
    plain = sorted(set(range(len(scores))) - set(marked))
    heights = _drawn(scores)
    style: dict[str, Any] = {"color": _ORANGE, "hatch": "////", "edgecolor": "white"}
    axes.bar(plain, [heights[index] for index in plain], label=labels[0], color=_BLUE)
    if marked:
        axes.bar(marked, [heights[i] for i in marked], label=labels[1], linewidth=0, **style)
    for layer in removed:
        axes.axvspan(layer - 0.5, layer + 0.5, color=_PALE, linewidth=0, zorder=0)
    unit = "nats" if {"nll", "kl"} & set(name.split("_")) else "dimensionless"
    _finish(axes, _LABELS.get(name, f"{name.replace('_', ' ')} ({unit})"), scores)
    axes.set_xlabel(place)


def _draw_lines(axes: Axes, lists: dict[str, list[float]]) -> None:
    """Scores of projections, "median_q_proj" and others: one line each."""
    first = next(iter(lists))
    kind = next((key for key in _LABELS if first.startswith(f"{key}_")), "")
    for index, (name, scores) in enumerate(lists.items()):
        style: dict[str, Any] = {"color": _PALETTE[index % len(_PALETTE)], "linewidth": 1}
        label = name.removeprefix(f"{kind}_")
        axes.plot(_drawn(scores), label=label, marker="osD^vPX*"[index % 8], markersize=3, **style)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7, frameon=False)
    every = [score for scores in lists.values() for score in scores]
    _finish(axes, _LABELS.get(kind, "score"), every)


def _drawn(values: list[float]) -> list[float]:
    return [x if math.isfinite(x) else math.nan for x in values]  # inf breaks axes


def _finish(axes: Axes, label: str, values: list[float]) -> None:
    """Label the axis of values, on a log scale if they are positive and differ enough."""
    finite = [value for value in values if math.isfinite(value)]
    if finite and min(finite) > 0 and max(finite) > 20 * min(finite):
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(finite) / 2)  # so that the shortest bar is seen
        label = f"{label[:-1]}, log scale)" if label.endswith(")") else f"{label} (log scale)"
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_sparsity(axes: Axes, shares: list[float], planned: float) -> None:
    axes.bar(range(len(shares)), [100 * share for share in shares], color=_GREEN)
    axes.axhline(100 * planned, color="black", linewidth=1, linestyle="--")
    beside: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center"}
    text = axes.text(1.01, 100 * planned, f"planned\n{100 * planned:.1f} %", fontsize=8, **beside)
    text.set_in_layout(False)  # it stands above the colour bar of the next panel
    axes.set_ylim(0, 100)
    axes.set_ylabel("zeros (%)")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_projections(figure: Figure, axes: Axes, shares: dict[str, list[float]]) -> None:
    rows = [[100 * share for share in row] for row in shares.values()] or [[math.nan]]
    finite = [share for row in rows for share in row if math.isfinite(share)] or [0.0]
    middle = (max(finite) + min(finite)) / 2
    reach = max(max(finite) - middle, 5)  # else rounding to whole weights would look like much
    image = axes.imshow(rows, aspect="auto", cmap="viridis", interpolation="nearest")
    image.set_clim(middle - reach, middle + reach)
    axes.set_yticks(range(len(shares)), list(shares), fontsize=7)
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="zeros (%)", aspect=10, pad=0.02)
