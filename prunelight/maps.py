"""Heat maps over pairs of layers, and the pictures and files of an analysis.

Like report.py it needs neither torch nor lightning, and matplotlib only once something is drawn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunelight.files import replacing
from prunelight.plots import BLUE, GREEN, ORANGE, draw_bars

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIDE = 6.0  # inches of a heat map


def plot_cka(
    cka: Sequence[Sequence[float]], title: str, groups: Sequence[Sequence[int]] = ()
) -> Figure:
    """Draw CKA of every pair of hidden states, with the windows that were merged outlined.

    Args:
        cka: (L + 1, L + 1); row 0 is the state before layer 0, row i + 1 the one after layer i.
        title: of the picture.
        groups: decoder layers of each merged window; what is outlined are their outputs.
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
    """Draw the angular distance over every window of layers.

    Args:
        angles: row n - 1 holds the windows of n layers, by their first layer.
        title: of the picture.
    """
    figure, axes = _square(title)
    padded = [[*row, *[math.nan] * (len(angles) - len(row))] for row in angles]
    extent = (-0.5, len(angles) - 0.5, 0.5, len(angles) + 0.5)
    image = axes.imshow(padded, origin="lower", cmap="viridis_r", extent=extent)
    figure.colorbar(image, ax=axes, label="angular distance (share of pi)", shrink=0.8)
    best = [min(range(len(row)), key=row.__getitem__) for row in angles]
    axes.plot(best, range(1, len(angles) + 1), "o", color="white", markersize=3, label="closest")
    axes.legend(loc="upper right", facecolor="grey", labelcolor="white")
    axes.set_xlabel("first layer of the window")
    axes.set_ylabel("layers in the window")
    return figure


def _square(title: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # the object API: no pyplot, no global state

    figure = Figure((_SIDE + 1, _SIDE), 150, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=10)
    axes.locator_params(integer=True)
    return figure, axes


def plot_states(analysis: dict[str, Any], title: str) -> Figure:
    """Draw Block Influence, token norms and attention sinks over the decoder layers.

    Args:
        analysis: an `analysis.Analysis` as a dict.
        title: of the picture.
    """
    from matplotlib.figure import Figure

    def influence(axes: Axes) -> None:
        draw_bars(axes, values=analysis["block_influence"], label="Block Influence", color=BLUE)
        first = analysis["block_influence_first_token"]
        axes.plot(range(len(first)), first, "o", color=ORANGE, markersize=4, label="first token")
        axes.legend(fontsize=8)

    def norms(axes: Axes) -> None:
        for (name, values), color in zip(
            analysis["token_norms"].items(), (BLUE, GREEN, ORANGE), strict=True
        ):
            axes.plot(range(-1, len(values) - 1), values, "o-", color=color, markersize=3)
            axes.lines[-1].set_label(name)
        axes.set_yscale("log")
        axes.set_ylabel("token norm\n(log scale)")
        axes.legend(fontsize=8)

    def sinks(axes: Axes) -> None:
        shares = [math.nan if x is None else 100 * x for x in analysis["attention_to_first_token"]]
        axes.bar(range(len(shares)), shares, color=ORANGE)
        axes.set_ylabel("attention to the\nfirst token (%)")

    panels: list[Callable[[Axes], None]] = [influence, norms]
    panels += [sinks] if any(analysis["attention_to_first_token"]) else []
    figure = Figure((8, 0.8 + 2.4 * len(panels)), 150, layout="constrained")
    rows = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, draw in zip(rows, panels, strict=True):
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.locator_params(axis="x", nbins=20, integer=True)
    rows[-1].set_xlabel("decoder layer (-1: embeddings)")
    rows[-1].set_xlim(-1.8, len(analysis["block_influence"]) - 0.2)
    rows[0].set_title(title, loc="left", fontsize=10)
    return figure


def write_analysis(directory: Path, analysis: dict[str, Any]) -> list[Path]:
    """Write analysis.json, its pictures, and analysis.md last; returns their paths.

    Args:
        directory: created if needed.
        analysis: an `analysis.Analysis` as a dict.
    """
    directory.mkdir(parents=True, exist_ok=True)
    name = analysis["model"]["name"][-60:]
    figures = (
        ("cka.png", plot_cka(analysis["cka"], f"CKA between hidden states: {name}")),
        (
            "angular_distance.png",
            plot_angles(analysis["angular_distance"], f"Angular distance over windows: {name}"),
        ),
        ("layers.png", plot_states(analysis, name)),
    )
    with replacing(directory / "analysis.json") as temporary:
        temporary.write_text(json.dumps(analysis, indent=1) + "\n", encoding="utf-8")
    for file, figure in figures:
        with replacing(directory / file) as temporary:
            figure.savefig(temporary, format="png")
    with replacing(directory / "analysis.md") as temporary:
        temporary.write_text(_markdown(analysis), encoding="utf-8")
    pictures = [file for file, _ in figures]
    return [directory / file for file in ("analysis.json", *pictures, "analysis.md")]


def _markdown(analysis: dict[str, Any]) -> str:
    norms, influence = analysis["token_norms"], analysis["block_influence"]
    loudest = max(range(1, len(norms["largest"])), key=lambda i: norms["largest"][i])
    order = sorted(range(len(influence)), key=influence.__getitem__)
    lines = [
        f"- Lowest Block Influence: layers {', '.join(map(str, order[:5]))}",
        f"- Largest token norm: {norms['largest'][loudest]:,.4g} after layer {loudest - 1}, "
        f"{norms['largest'][loudest] / norms['median'][loudest]:,.0f} times the median there",
    ]
    if shares := [x for x in analysis["attention_to_first_token"] if x is not None]:
        mean = math.fsum(shares) / len(shares)
        lines.append(f"- Attention to the first token: {100 * mean:.0f} % in the mean over layers")
    facts = {**analysis["model"], **analysis["calibration"], **analysis["settings"]}
    parts = [
        f"# Analysis: {analysis['model']['name']}",
        "\n".join(lines),
        "![CKA between hidden states](cka.png)",
        "Bright blocks along the diagonal are runs of layers whose states are much alike.",
        "![angular distance over windows](angular_distance.png)",
        "The white dots are the windows of each size whose input and output differ least.",
        "![Block Influence, token norms, attention sinks](layers.png)",
        "## Made from",
        "\n".join(f"- {key.replace('_', ' ')}: {value}" for key, value in facts.items()),
    ]
    return "\n\n".join(parts) + "\n"
