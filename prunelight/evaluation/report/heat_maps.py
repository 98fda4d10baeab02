"""Heat maps over pairs of layers, and curves over layers, for reports and analyses.

This module needs neither torch nor lightning, and matplotlib only for drawing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from prunelight.evaluation.report.layer_plots import BLUE, GREEN, ORANGE, draw_bars, draw_panels
from prunelight.evaluation.report.plan_facts import Json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from prunelight.evaluation.report.layer_plots import Drawing


def plot_cka(
    cka: Sequence[Sequence[float]], title: str, groups: Sequence[Sequence[int]] = ()
) -> Figure:
    """Draw CKA of every pair of hidden states, with merged windows outlined.

    Args:
        cka: (L + 1, L + 1); row 0 is the state before layer 0, row i + 1 the state after layer i.
        title: of the picture.
        groups: decoder layers of each merged window; the states after them are outlined.
    """
    from matplotlib.patches import Rectangle

    figure, axes = _square(title)
    image = axes.imshow(cka, vmin=min(0.0, *map(min, cka)), vmax=1, origin="lower", cmap="magma")
    figure.colorbar(image, ax=axes, label="CKA (debiased)", shrink=0.8)
    for group in groups:
        corner, size = (group[0] + 0.5, group[0] + 0.5), len(group)
        axes.add_patch(Rectangle(corner, size, size, fill=False, edgecolor="#00ffd0", linewidth=2))
    outlined = "; outlined: merged into one layer" if groups else ""
    axes.set_xlabel(f"hidden states (0: embeddings, i: after layer i - 1){outlined}")
    axes.set_ylabel("hidden states")
    return figure


def plot_angles(angles: Sequence[Sequence[float]], title: str) -> Figure:
    """Draw the angular distance over windows of layers.

    Args:
        angles: row n - 1 holds the windows of n layers, by their first layer.
        title: of the picture.
    """
    figure, axes = _square(title)
    padded = [[*row, *[math.nan] * (len(angles) - len(row))] for row in angles]
    extent = (-0.5, len(angles) - 0.5, 0.5, len(angles) + 0.5)
    image = axes.imshow(padded, origin="lower", cmap="viridis_r", extent=extent)
    figure.colorbar(image, ax=axes, label="angular distance (share of pi)", shrink=0.8)
    closest = [min(range(len(row)), key=row.__getitem__) for row in angles]
    axes.plot(closest, range(1, len(angles) + 1), "o", color="white", markersize=3, label="closest")
    axes.legend(loc="upper right", facecolor="grey", labelcolor="white")
    axes.set_xlabel("first layer of the window")
    axes.set_ylabel("layers in the window")
    return figure


def _square(title: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # the object API: no pyplot, no global state

    figure = Figure((7, 6), 150, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=10)
    axes.locator_params(integer=True)
    return figure, axes


def plot_states(analysis: Json, title: str) -> Figure:
    """Draw Block Influence, token norms and attention sinks over the decoder layers."""

    def influence(axes: Axes) -> None:
        draw_bars(axes, values=analysis["block_influence"], label="Block Influence", color=BLUE)
        first = analysis["block_influence_first_token"]
        axes.plot(range(len(first)), first, "o", color=ORANGE, markersize=4, label="first token")
        axes.legend(fontsize=8)

    def norms(axes: Axes) -> None:
        named = analysis["token_norms"].items()
        for (name, values), color in zip(named, (BLUE, GREEN, ORANGE), strict=True):
            places = range(-1, len(values) - 1)
            axes.plot(places, values, "o-", color=color, markersize=3, label=name)
        axes.set_yscale("log")
        axes.set_ylabel("token norm\n(log scale)")
        axes.legend(fontsize=8)

    def sinks(axes: Axes) -> None:
        shares = [math.nan if x is None else 100 * x for x in analysis["attention_to_first_token"]]
        axes.bar(range(len(shares)), shares, color=ORANGE)
        axes.set_ylabel("attention to the\nfirst token (%)")

    drawings: list[Drawing] = [(2.4, influence), (2.4, norms)]
    drawings += [(2.4, sinks)] if any(analysis["attention_to_first_token"]) else []
    figure = draw_panels(drawings, title, 8)
    figure.axes[-1].set_xlabel("decoder layer (-1: embeddings)")
    figure.axes[-1].set_xlim(-1.8, len(analysis["block_influence"]) - 0.2)
    return figure
