"""What a plan says about each decoder layer, read from its JSON form, and the picture of it.

One picture a plan, its panels above each other over the same layers: the scores that decided; for
sparsity also the share of zeros of each layer, of each projection, and what the zeros changed; for
slicing the widths, and the variance that they explain. Like report.py it needs neither torch nor
lightning, and matplotlib only once something is drawn.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Drawing = tuple[float, Callable[[Axes], None]]  # height in inches, what draws into a panel

Json: TypeAlias = dict[str, Any]
# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, GREEN, ORANGE, _PALE = "#0072b2", "#009e73", "#d55e00", "#faeadf"
_LABELS = {
    "median": "median of |W| ‖X‖",
    "mean": "mean of |W| ‖X‖",
    "outlier_ratio": "share of outliers",
}


def percent(share: float) -> str:
    """Return a share in [0, 1] as text."""
    return f"{100 * share:.2f} %"


def removed_layers(plan: Json) -> list[int]:
    """Return the decoder layers that are gone after a plan, those merged into others included."""
    removed = [i for step in plan["steps"] for i in step.get("layers", ())]
    return sorted(removed + [i for group in merged_groups(plan) for i in group[:-1]])


def merged_groups(plan: Json) -> list[list[int]]:
    """Return the windows of decoder layers that a plan merges into their highest."""
    return [group for step in plan["steps"] for group in step.get("groups", ())]


def fates(plan: Json) -> dict[int, str]:
    """Return what becomes of the decoder layers that a plan does something to, but for zeros."""
    told: dict[int, str] = {}
    for step in plan["steps"]:
        told |= dict.fromkeys(step.get("layers", ()), "**removed**")
        for group in step.get("groups", ()):
            told |= dict.fromkeys(group[:-1], f"**merged into {group[-1]}**")
        for name in ("attention", "mlp") if step["kind"] == "drop_sublayers" else ():
            for layer in step[name]:
                told[layer] = f"{told.get(layer, 'without')} **{name}**"
    return told


def steps_of(plan: Json, kind: str) -> list[Json]:
    """Return the steps of a plan of one kind."""
    return [step for step in plan["steps"] if step["kind"] == kind]


def has_own_class(plan: Json) -> bool:
    """Return whether a plan leaves a model of a class that transformers does not have."""
    before = plan["model"]["model_type"].startswith("prunelight_")  # an earlier run's doing
    sliced = any(step["rotation"] == "per_layer" for step in steps_of(plan, "slice_hidden"))
    return before or sliced or bool(steps_of(plan, "drop_sublayers"))


def score_lists(plan: Json) -> dict[str, list[float]]:
    """Return the scores that decided, at most one a decoder layer (or a window that starts there).

    The planned "sparsity" is what they decided: see `layer_zeros`.
    """
    num_layers = plan["model"]["num_hidden_layers"]
    fewest = num_layers if steps_of(plan, "sparsify") else 1
    return {
        name: [math.nan if score is None else score for score in scores]
        for name, scores in plan["scores"].items()
        if fewest <= len(scores) <= num_layers and name != "sparsity"
    }


def nominal(plan: Json) -> str:
    """Return the ratio in the method's own terms: of decoder layers, of weights or of widths."""
    num_layers, parts = plan["model"]["num_hidden_layers"], []
    merged = sum(len(group) - 1 for group in merged_groups(plan))
    counts = [(len(removed_layers(plan)) - merged, "decoder layers removed")]
    counts += [(merged, "decoder layers merged away")]
    for step in steps_of(plan, "drop_sublayers"):
        counts += [(len(step["attention"]), "attentions dropped")]
        counts += [(len(step["mlp"]), "MLPs dropped")]
    for count, what in counts:
        if count:
            parts.append(f"{count} of {num_layers} {what} ({percent(count / num_layers)})")
    for step in steps_of(plan, "prune_width"):
        for name, text, field in (
            ("heads", "key-value groups", "num_key_value_heads"),
            ("neurons", "neurons", "intermediate_size"),
        ):
            if step[name]:
                kept = len(next(iter(step[name].values())))
                before = plan.get("found", {}).get(f"{field}_before", "all")
                parts.append(f"{kept} of {before} {text} kept in every layer")
    for step in steps_of(plan, "slice_hidden"):
        widths = [step["residual_dims"][site] for site in sliced_sites(plan, step)]
        how = f" (widths {min(widths)} to {max(widths)})" if len(set(widths)) > 1 else ""
        how += " (one rotation)" if step["rotation"] == "shared" else ""
        parts.append(f"{percent(share_sliced(plan, step))} of the hidden width sliced{how}")
    for step in steps_of(plan, "sparsify"):
        mixed = " on average" if len(set(step["sparsity"].values())) > 1 else ""
        pattern = f" ({step['pattern']} pattern{mixed})" if step["pattern"] else ""
        parts.append(f"{percent(_planned(plan, step))} of the weights of decoder linears{pattern}")
    return ", ".join(parts) or "no layer removed"


def sliced_sites(plan: Json, step: Json) -> range:
    """Return the sites before attentions and MLPs, less that of embeddings left whole."""
    hidden, (first, *others, _) = plan["model"]["hidden_size"], step["residual_dims"]
    whole = first == hidden and min(others) < hidden
    return range(int(whole), 1 + len(others))


def share_sliced(plan: Json, step: Json) -> float:
    """Return the share of the hidden width that a slice step removes, mean over the MLPs.

    At attentions it is the same, but for the first one's where the embeddings are left whole.
    """
    return 1 - _mean(step["residual_dims"][1::2]) / plan["model"]["hidden_size"]


def _planned(plan: Json, step: Json) -> float:
    """Return the share of zeros that a step aims at in all decoder linears together."""
    if step["pattern"]:
        kept, _, group = step["pattern"].partition(":")
        return 1 - int(kept) / int(group)
    asked = plan["arguments"].get("sparsity")
    return _mean(list(step["sparsity"].values())) if asked is None else asked


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


class LayerZeros(NamedTuple):
    """What a sparsify step does to each decoder layer; NaN where that is not known."""

    layers: list[float]  # share of zeros in the linears of each decoder layer
    projections: dict[str, list[float]]  # path of a projection -> its share in each decoder layer
    errors: list[float]  # reconstruction error of each decoder layer; empty if not measured


def layer_zeros(plan: Json, step: Json, told: Json) -> LayerZeros:
    """Tell a sparsify step by layer and projection: as `told` by its outcome, else as planned.

    Several matrices of one path in a layer (experts) are averaged.
    """
    dense = range(plan["model"]["num_hidden_layers"])
    # An outcome counts the layers that were left, a plan those of the dense model.
    gone = removed_layers({"steps": plan["steps"][: plan["steps"].index(step)]})
    left = [layer for layer in dense if layer not in gone]

    def spread(values: Iterable[float]) -> list[float]:
        known = dict(zip(left, values, strict=True))
        return [known.get(layer, math.nan) for layer in dense]

    cells: dict[str, list[list[float]]] = {}
    shares: dict[str, float] = told.get("sparsity") or step["sparsity"]
    for name, share in shares.items():
        _, index, path = re.split(r"\.(\d+)\.", name, maxsplit=1)
        row = cells.setdefault(re.sub(r"\.\d+(?=\.)", "", path), [[] for _ in dense])
        row[(left if told else dense)[int(index)]].append(share)
    planned = plan["scores"].get("sparsity", [math.nan] * len(dense))
    errors = told.get("reconstruction_error")
    return LayerZeros(
        layers=spread(told["layer_sparsity"]) if "layer_sparsity" in told else planned,
        projections={path: [_mean(shares) for shares in row] for path, row in cells.items()},
        errors=spread(errors) if errors else [],
    )


def by_sublayer(sites: list[Any]) -> dict[str, list[Any]]:
    """Return what sites of the hidden states have before each attention and before each MLP."""
    return {"attention": sites[:-1:2], "MLP": sites[1::2]}


def explained_variance(step: Json, outcome: Json) -> dict[str, list[float]]:
    """Return the share of the energy that a slice step keeps `by_sublayer`; {} if not measured."""
    measured = "explained_variance" in outcome and step["rotation"] == "per_layer"
    return by_sublayer(outcome["explained_variance"]) if measured else {}


def plot_layers(plan: Json, outcome: Json | None = None) -> Figure:
    """Draw the scores of a plan over the decoder layers, its zeros and its widths.

    Each list of scores of layers has a panel (the angular distance has one entry a window, at the
    window's first layer), those of projections share one. The scale is logarithmic if all are
    positive and span more than a factor of 20. Removed layers are shaded.

    Args:
        plan: `Plan.to_dict()`.
        outcome: of its last sparsify and slice steps together, see `surgery.apply`; None shows
            what was planned.

    Raises:
        ValueError: if there is no list of scores and no sparsify or slice step.
    """
    num_layers, told = plan["model"]["num_hidden_layers"], outcome or {}
    drawings = _score_drawings(plan)
    for step in steps_of(plan, "sparsify")[-1:]:
        drawings += _zeros_drawings(layer_zeros(plan, step, told), _planned(plan, step))
    for step in steps_of(plan, "slice_hidden"):
        drawings += _width_drawings(
            by_sublayer(step["residual_dims"]),
            explained_variance(step, told),
            plan["model"]["hidden_size"],
        )
    if not drawings:
        raise ValueError(
            f"scores={plan['scores']} of the {plan['method']} plan must hold a list of numbers to "
            "be drawn; skip the picture for this plan"
        )
    title = f"{plan['method']}: {plan['model']['name'][-60:]}\n{nominal(plan)}"
    figure = draw_panels(drawings, title, min(max(7.0, 2.5 + 0.16 * num_layers), 13.0))
    panels = figure.axes[: len(drawings)]
    for axes in panels:
        _shade(axes, removed_layers(plan))
    panels[-1].set_xlabel(f"decoder layer{' (shaded: gone)' if fates(plan) else ''}")
    panels[-1].set_xlim(-0.8, num_layers - 0.2)
    return figure


def draw_panels(drawings: Sequence[Drawing], title: str, width: float) -> Figure:
    """Draw panels above each other over the same layers; `width` is that of the figure, inches."""
    from matplotlib.figure import Figure  # the object API: no pyplot, no global state

    heights = [height for height, _ in drawings]
    figure = Figure((width, 0.8 + sum(heights)), 150, layout="constrained")
    panels = figure.subplots(len(heights), sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    for axes, (_, draw) in zip(panels, drawings, strict=True):
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.locator_params(axis="x", nbins=20, integer=True)
    panels[0].set_title(title, loc="left", fontsize=10)
    return figure


def _score_drawings(plan: Json) -> list[Drawing]:
    lists = {n: x for n, x in score_lists(plan).items() if not n.endswith("_first_token")}
    if "layer_redundancy" in lists:  # which is 1 - influence, stretched
        lists.pop("block_influence", None)
    kind = next((kind for kind in _LABELS if any(name.startswith(kind) for name in lists)), "")
    if len(lists) > 1 and steps_of(plan, "sparsify"):
        rows = {name.removeprefix(f"{kind}_"): row for name, row in lists.items()}
        return [_rows_drawing(rows, _LABELS.get(kind, kind))]
    drawings: list[Drawing] = []
    for name, scores in lists.items():
        label = _LABELS.get(kind, name.replace("_", " "))
        if len(scores) < plan["model"]["num_hidden_layers"]:
            label += " from here"  # of the window that starts there
        sublayer = name.removesuffix("_influence")
        dropped = {i for step in plan["steps"] for i in step.get(sublayer, ())}
        draw = partial(draw_bars, values=scores, label=label, color=BLUE, shaded=dropped)
        drawings.append((3.0 if len(lists) == 1 else 2.2, draw))
    return drawings


def _zeros_drawings(zeros: LayerZeros, planned: float) -> list[Drawing]:
    def draw_shares(axes: Axes) -> None:
        axes.bar(range(len(zeros.layers)), [100 * share for share in zeros.layers], color=GREEN)
        axes.axhline(100 * planned, color="black", linewidth=1, linestyle="--")
        axes.set_ylim(0, 100)
        axes.set_ylabel("zeros (%)\ndashed: planned")

    rows = {path: [100 * share for share in row] for path, row in zeros.projections.items()}
    drawings: list[Drawing] = [(2.0, draw_shares)]
    drawings += [_rows_drawing(rows, "zeros (%)", margin=5)] if rows else []
    if zeros.errors:
        label = "reconstruction\nerror"
        drawings.append((1.6, partial(draw_bars, values=zeros.errors, label=label, color=ORANGE)))
    return drawings


def _width_drawings(
    widths: dict[str, list[int]], explained: dict[str, list[float]], hidden: int
) -> list[Drawing]:
    def draw_widths(axes: Axes) -> None:
        """Two bars a layer, before its attention and its MLP."""
        for (name, row), color, side in zip(
            widths.items(), (GREEN, ORANGE), (-0.2, 0.2), strict=True
        ):
            places = [layer + side for layer in range(len(row))]
            axes.bar(places, row, 0.4, color=color, label=f"at {name}")
        axes.axhline(hidden, color="black", linewidth=1, linestyle="--")
        axes.set_ylim(0, 1.3 * hidden)  # room for the legend
        axes.legend(loc="upper right", ncols=2, fontsize=8, frameon=False)
        axes.set_ylabel("width\ndashed: dense")

    def draw_explained(axes: Axes) -> None:
        for row, color in zip(explained.values(), (GREEN, ORANGE), strict=True):
            axes.plot(range(len(row)), row, "o-", color=color, markersize=4)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.set_ylabel("explained\nvariance")

    return [(2.2, draw_widths), *([(1.8, draw_explained)] if explained else [])]


def draw_bars(
    axes: Axes, *, values: list[float], label: str, color: str, shaded: Iterable[int] = ()
) -> None:
    """Draw one bar a layer, on a log scale where the values want one; shade some layers."""
    _shade(axes, shaded)
    drawn = [x if math.isfinite(x) else math.nan for x in values]  # inf breaks axes
    axes.bar(range(len(values)), drawn, color=color)
    if _is_wide(values):
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(x for x in values if math.isfinite(x)) / 2)  # the shortest is seen
        label += " (log scale)"
    axes.set_ylabel(label)


def _shade(axes: Axes, layers: Iterable[int]) -> None:
    for layer in layers:
        axes.axvspan(layer - 0.5, layer + 0.5, color=_PALE, linewidth=0, zorder=0)


def _rows_drawing(rows: dict[str, list[float]], label: str, margin: float = 0) -> Drawing:
    """A heat map, one row a projection; `margin` widens the range of its colours."""

    def draw(axes: Axes) -> None:
        every = [x for row in rows.values() for x in row if math.isfinite(x)]
        norm = "log" if not margin and _is_wide(every) else None
        image = axes.imshow(list(rows.values()), aspect="auto", interpolation="nearest", norm=norm)
        image.set_clim(min(every) - margin, max(every) + margin)
        axes.set_yticks(range(len(rows)), list(rows), fontsize=7)
        axes.tick_params(axis="y", length=0)
        axes.spines[:].set_visible(False)
        axes.figure.colorbar(image, ax=axes, label=label, aspect=10, pad=0.02)

    return 0.4 + 0.18 * len(rows), draw


def _is_wide(values: list[float]) -> bool:
    """Return whether values want a log scale: all positive, and they differ enough."""
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) > 20 * min(finite)
