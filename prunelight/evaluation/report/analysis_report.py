"""The files of an analysis: analysis.json, its pictures, and analysis.md."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from prunelight.evaluation.report.heat_maps import plot_angles, plot_cka, plot_states
from prunelight.evaluation.report.plan_facts import Json
from prunelight.evaluation.report.writing import bullets, write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_analysis(directory: Path, analysis: Json) -> list[Path]:
    """Write analysis.json, its pictures, and analysis.md last; return their paths.

    Args:
        directory: is created if needed.
        analysis: an `Analysis` (scoring/analysis.py) as a dict.
    """
    directory.mkdir(parents=True, exist_ok=True)
    name = analysis["model"]["name"][-60:]
    angles = analysis["angular_distance"]
    files: dict[str, str | Figure] = {
        "analysis.json": json.dumps(analysis, indent=1) + "\n",
        "analysis-cka.png": plot_cka(analysis["cka"], f"CKA between hidden states: {name}"),
        "analysis-angular_distance.png": plot_angles(
            angles, f"Angular distance over windows: {name}"
        ),
        "analysis-layers.png": plot_states(analysis, name),
        "analysis.md": _markdown(analysis),
    }
    for file, content in files.items():
        write_whole(directory / file, content)
    return [directory / file for file in files]


def _markdown(analysis: Json) -> str:
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
        "![CKA between hidden states](analysis-cka.png)",
        "Bright blocks along the diagonal are runs of layers whose states are much alike.",
        "![angular distance over windows](analysis-angular_distance.png)",
        "The white dots are the windows of each size whose input and output differ least.",
        "![Block Influence, token norms, attention sinks](analysis-layers.png)",
        "## Made from",
        bullets(facts),
    ]
    return "\n\n".join(parts) + "\n"
