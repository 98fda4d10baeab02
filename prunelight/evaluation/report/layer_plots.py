"""The picture of a plan: panels above each other, over the same decoder layers.

One panel shows the scores that decided. Sparsity adds the share of zeros of each layer and of each
projection, and the reconstruction error. Slicing adds the widths and the variance that they
explain. This module needs neither torch nor lightning, and matplotlib only for drawing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from prunelight.evaluation.report.plan_facts import (
    Json,
    LayerZeros,
    PlanFacts,
    by_sublayer,
    explained_variance,
)
from prunelight.planning.steps import SliceHidden, Sparsify

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Drawing = tuple[float, Callable[[Axes], None]]  # height in inches, function that draws a panel


# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, GREEN, ORANGE, _PALE = "#0072b2", "#009e73", "#d55e00", "#faeadf"

_LABELS = {
    "median": "median of |W| ‖X‖",
    "mean": "mean of |W| ‖X‖",
    "outlier_ratio": "share of outliers",
}


def has_layer_plots(plan: PlanFacts) -> bool:
    """Return whether `plot_layers` has something to draw of a plan."""
    return bool(plan.score_lists() or plan.steps_of(Sparsify) or plan.steps_of(SliceHidden))


def plot_layers(plan: PlanFacts, outcome: Json | None = None) -> Figure:
    """Draw the scores of a plan over the decoder layers, its zeros and its widths.

    Each list of scores of layers has a panel of its own; lists of projections share one. The
    angular distance has one entry a window, at the window's first layer. A scale is logarithmic if
    all values are positive and span more than a factor of 20. Removed layers are shaded.

    Args:
        plan: what decided.
        outcome: of its last sparsify and slice steps together, see `prunelight.apply`; None shows
            what was planned.

    Raises:
        ValueError: if there is nothing to draw, see `has_layer_plots`.
    """
    outcome = outcome or {}
    drawings = _score_drawings(plan)
    for zeros in plan.steps_of(Sparsify)[-1:]:
        layer_zeros = plan.layer_zeros(zeros, outcome)
        drawings += _zeros_drawings(layer_zeros, zeros.planned_share(plan))
    for step in plan.steps_of(SliceHidden):
        drawings += _width_drawings(
            by_sublayer(step.residual_dims),
            explained_variance(step, outcome),
            plan.model["hidden_size"],
        )
    if not drawings:
        raise ValueError(
            f"scores={plan.scores} of the {plan.method} plan must hold a list of numbers to "
            "be drawn; skip the picture for this plan"
        )
    title = f"{plan.title}\n{plan.nominal()}"
    figure = draw_panels(drawings, title, min(max(7.0, 2.5 + 0.16 * plan.num_layers), 13.0))
    panels = figure.axes[: len(drawings)]
    for axes in panels:
        _shade(axes, plan.removed_layers)
    shaded = " (shaded: gone)" if plan.layer_outcomes() else ""
    panels[-1].set_xlabel(f"decoder layer{shaded}")
    panels[-1].set_xlim(-0.8, plan.num_layers - 0.2)
    return figure


def draw_panels(drawings: Sequence[Drawing], title: str, width: float) -> Figure:
    """Draw panels above each other over the same layers; `width` of the figure in inches."""
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


def _score_drawings(plan: PlanFacts) -> list[Drawing]:
    lists = {n: x for n, x in plan.score_lists().items() if not n.endswith("_first_token")}
    if "layer_redundancy" in lists:  # which is 1 - influence, stretched
        lists.pop("block_influence", None)
    kind = next((kind for kind in _LABELS if any(name.startswith(kind) for name in lists)), "")
    if len(lists) > 1 and plan.steps_of(Sparsify):
        rows = {name.removeprefix(f"{kind}_"): row for name, row in lists.items()}
        return [_rows_drawing(rows, _LABELS.get(kind, kind))]
    drawings: list[Drawing] = []
    for name, scores in lists.items():
        label = _LABELS.get(kind, name.replace("_", " "))
        if len(scores) < plan.num_layers:
            label += " from here"  # of the window that starts there
        sublayer = name.removesuffix("_influence")
        dropped = {i for step in plan.steps for i in step.dropped_sublayers.get(sublayer, ())}
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
        """Draw two bars a layer: the widths before its attention and before its MLP."""
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
    """Draw one bar a layer, on a log scale if `_is_wide`; shade some layers."""
    _shade(axes, shaded)
    heights = [x if math.isfinite(x) else math.nan for x in values]  # inf breaks axes
    axes.bar(range(len(values)), heights, color=color)
    if _is_wide(values):
        axes.set_yscale("log")
        lowest = min(x for x in values if math.isfinite(x))
        axes.set_ylim(bottom=lowest / 2)  # or the shortest bar would have no height
        label += " (log scale)"
    axes.set_ylabel(label)


def _shade(axes: Axes, layers: Iterable[int]) -> None:
    for layer in layers:
        axes.axvspan(layer - 0.5, layer + 0.5, color=_PALE, linewidth=0, zorder=0)


def _rows_drawing(rows: dict[str, list[float]], label: str, margin: float = 0) -> Drawing:
    """Return a heat map with one row a projection; `margin` widens the range of its colours."""

    def draw(axes: Axes) -> None:
        values = [x for row in rows.values() for x in row if math.isfinite(x)]
        norm = "log" if not margin and _is_wide(values) else None
        image = axes.imshow(list(rows.values()), aspect="auto", interpolation="nearest", norm=norm)
        image.set_clim(min(values) - margin, max(values) + margin)
        axes.set_yticks(range(len(rows)), list(rows), fontsize=7)
        axes.tick_params(axis="y", length=0)
        axes.spines[:].set_visible(False)
        axes.figure.colorbar(image, ax=axes, label=label, aspect=10, pad=0.02)

    return 0.4 + 0.18 * len(rows), draw


def _is_wide(values: list[float]) -> bool:
    """Return whether values need a log scale: all are positive, and span more than 20 to 1."""
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) > 20 * min(finite)
