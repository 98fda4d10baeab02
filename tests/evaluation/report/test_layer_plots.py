"""The pictures of layers: what their panels show, for any plan."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from report_records import (
    MIXED,
    PNG,
    PROJECTIONS,
    UNSTRUCTURED,
    make_plan,
    make_record,
    make_sparse,
    make_sparse_record,
    markdown,
)

from prunelight.evaluation.report.layer_plots import plot_layers
from prunelight.evaluation.report.plan_facts import PlanFacts
from prunelight.evaluation.report.report import write_report
from prunelight.planning.steps import Sparsify


def test_each_plan_with_scores_gets_its_own_picture(tmp_path: Path) -> None:
    plans = [make_plan(scores={}), make_plan(), make_plan(method="Second")]
    names = [path.name for path in write_report(tmp_path, make_record(plans=plans))]
    assert names == ["report.json", "layers.png", "layers-2.png", "report.html", "report.md"]
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.index("(layers.png)") < text.index("## Second") < text.index("(layers-2.png)")


@pytest.mark.parametrize(
    "scores",
    [
        {"block_influence": [0.9, 0.01, *[0.1] * 8]},  # a log scale
        {"angular_distance": [0.4] * 8},  # one entry a window of three
        {"angular_distance": [0.4] * 2},  # windows so long that none starts at a removed layer
        {"block_influence": [math.inf, math.nan, 0.0, -0.1, *[1] * 6]},
        {"block_influence": [math.nan] * 10},
    ],
)
def test_the_picture_is_drawn_for_any_list_of_scores(tmp_path: Path, scores: dict) -> None:
    assert_drawn(make_plan(scores=scores), None, tmp_path)


def assert_drawn(plan: dict, outcome: dict | None, directory: Path) -> None:
    path = directory / "picture.png"
    plot_layers(PlanFacts(plan), outcome).savefig(path)
    data = path.read_bytes()
    assert data.startswith(PNG)
    assert len(data) > 5000


@pytest.mark.parametrize("made", [UNSTRUCTURED, MIXED, make_sparse([0.5] * 4), make_sparse([0.7])])
def test_a_picture_of_zeros_has_a_panel_for_all_that_is_known(tmp_path: Path, made: tuple) -> None:
    plan, outcome = made
    assert_drawn(plan, outcome, tmp_path)
    labels = [axes.get_ylabel() for axes in plot_layers(PlanFacts(plan), outcome).axes]
    # The heat map of projections has names of projections; the last axes are its colour bar.
    expected = [
        "median of |W| ‖X‖",
        "zeros (%)\ndashed: planned",
        "",
        "reconstruction\nerror",
        "zeros (%)",
    ]
    assert [label.replace(" (log scale)", "") for label in labels] == expected
    uniform = plan | {"scores": {"sparsity": plan["scores"]["sparsity"]}}
    assert len(plot_layers(PlanFacts(uniform)).axes) == 3


def test_the_bars_and_the_heat_map_show_what_was_achieved() -> None:
    plan, outcome = UNSTRUCTURED
    facts = PlanFacts(plan)
    _, bars, heat, errors, _ = plot_layers(facts, outcome).axes
    heights = [patch.get_height() for patch in bars.patches]
    zeros = facts.layer_zeros(facts.steps_of(Sparsify)[0], outcome)
    assert heights == pytest.approx([100 * x for x in zeros.layers])
    assert [text.get_text() for text in heat.get_yticklabels()][::6] == [
        PROJECTIONS[0],
        "mlp.down_proj",
    ]
    assert heat.images[0].get_array().shape == (7, 30)
    assert [patch.get_height() for patch in errors.patches] == outcome["reconstruction_error"]
    assert {axes.get_xlim() for axes in (bars, heat, errors)} == {(-0.8, 29.8)}


def test_scores_of_projections_are_drawn_as_rows() -> None:
    plan, outcome = make_sparse([0.5, 0.6, 0.7])
    plan["scores"] = {f"median_mlp.{name}": [0.1, 0.2, 9.0] for name in ("up", "down")} | {
        "median_c_proj": [0.1] * 6,
        "sparsity": [0.5, 0.6, 0.7],
    }  # c_proj: two in each layer
    figure = plot_layers(PlanFacts(plan), outcome)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["mlp.up", "mlp.down"]
    assert figure.axes[0].images[0].get_array().tolist() == [[0.1, 0.2, 9.0]] * 2
    assert "median of |W| ‖X‖" in [axes.get_ylabel() for axes in figure.axes]  # of the colour bar


def test_an_outcome_of_an_earlier_version_shows_the_planned_shares(tmp_path: Path) -> None:
    plan, outcome = make_sparse([0.5, 0.6])
    del outcome["layer_sparsity"]  # a base on disk may have been made before there was one
    text = markdown(tmp_path, make_sparse_record((plan, outcome)))
    assert "| 1 | 0.02 | 60.00 % | 0.03 |" in text


def test_a_plan_without_a_list_of_scores_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match=r"must hold a list of numbers.*; skip the picture"):
        plot_layers(PlanFacts(make_plan(scores={})))


def test_every_score_of_layers_has_a_panel_and_dropped_sublayers_are_shaded_in_theirs() -> None:
    plan = make_plan()
    plan["scores"] = {"attention_influence": [0.1] * 10, "mlp_influence": [0.2] * 9 + [None]}
    plan["steps"] = [{"kind": "drop_sublayers", "attention": [2], "mlp": [4, 5]}]
    panels = plot_layers(PlanFacts(plan)).axes
    assert [axes.get_ylabel() for axes in panels] == ["attention influence", "mlp influence"]
    shaded = [[p for p in axes.patches if p.get_height() == 1] for axes in panels]
    assert [len(patches) for patches in shaded] == [1, 2]
