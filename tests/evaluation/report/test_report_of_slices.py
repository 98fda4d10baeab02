"""What the report and the picture say of sliced hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_records import PNG, make_plan, make_record, make_sparse, markdown, table_rows

from prunelight.evaluation.report.layer_plots import plot_layers
from prunelight.evaluation.report.plan_facts import PlanFacts

HIDDEN, LAYERS = 64, 10
DIMS = [64, 48, *([48, 48] * 3), *([32, 32] * 6), 64]
EXPLAINED = [1.0, *([0.99] * 7), *([0.9] * 12), 1.0]


def make_sliced(dims: list[int] = DIMS, **changes: Any) -> dict[str, Any]:
    """A plan of one slice step; `changes` are those of the step or of the plan."""
    step = {
        "kind": "slice_hidden",
        "residual_dims": dims,
        "signal": "residual",
        "orientation": "pca",
        "rotation": "per_layer",
        "seed": 0,
    }
    step |= {name: value for name, value in changes.items() if name in step}
    plan = make_plan(method="SliceGPT", arguments={"slice_ratio": 0.4}, scores={}, steps=[step])
    plan["model"] = {**plan["model"], "hidden_size": HIDDEN}
    return plan | {name: value for name, value in changes.items() if name not in step}


def make_sliced_record(plan: dict[str, Any], explained: list[float] | None = None, **changes: Any):
    outcomes = [] if explained is None else [{"explained_variance": explained}]
    return make_record(plans=[plan], outcomes=outcomes, **changes)


def test_the_report_tells_widths_share_and_variance_and_how_to_load(tmp_path: Path) -> None:
    text = markdown(tmp_path, make_sliced_record(make_sliced(), EXPLAINED))
    for told in (
        "SliceGPT: 40.00 % of the hidden width sliced (widths 32 to 48)",
        "- widths at attentions and MLPs: 32 to 48 of 64",
        "- mean share removed: 40.00 %",
        "- width of the embeddings: 64",
        "- signal: residual",
        "- orientation: pca",
        "- rotation: per_layer",
        "- explained variance: 0.9 to 0.99",
        "shortcuts between the rotations, and a head that was untied, are counted",
        "![widths of the decoder layers](layers.png)",
        "import prunelight  # its class",
    ):
        assert told in text, told
    assert str(DIMS) not in text, "the widths stand in the table, not in a line"


def test_the_table_of_layers_has_widths_and_variances_at_attention_and_mlp(tmp_path: Path) -> None:
    rows = table_rows(markdown(tmp_path, make_sliced_record(make_sliced(), EXPLAINED)))
    assert ["0", "64", "48", "1", "0.99"] in rows
    assert ["9", "32", "32", "0.9", "0.9"] in rows


def test_embeddings_left_whole_do_not_count_for_the_mean_share() -> None:
    plan = make_sliced([64, *[48] * 19, 64])
    sliced, whole = make_sliced([48] * 20 + [64]), make_sliced([64] * 21)
    for cut in (plan, sliced, whole):
        share = "0.00 %" if cut is whole else "25.00 %"
        assert PlanFacts(cut).nominal() == f"{share} of the hidden width sliced"


def test_one_rotation_is_told_as_a_stock_model(tmp_path: Path) -> None:
    plan = make_sliced([48] * 21, rotation="shared")
    text = markdown(tmp_path, make_sliced_record(plan, [0.97]))
    assert "25.00 % of the hidden width sliced (one rotation)" in text
    assert "this is a stock model, which loads and runs like any other" in text
    assert "- explained variance: 0.97\n" in text
    assert "explained variance at" not in text
    assert "import prunelight" not in text


@pytest.mark.parametrize(
    ("rotation", "told"),
    [
        ("per_layer", "Shortcuts (and a head that was untied) add more parameters than this"),
        ("shared", "An untied head adds more parameters than this slice removes."),
    ],
)
def test_a_slice_that_adds_parameters_says_so(rotation: str, told: str, tmp_path: Path) -> None:
    found = {"parameters": 138_600_000, "parameters_before": 134_500_000}
    plan = make_sliced([48] * 21, rotation=rotation, found=found)
    text = markdown(tmp_path, make_sliced_record(plan, [0.9] * 21))
    assert told in text
    assert "- parameters: 138.6M" in text
    smaller = make_sliced([48] * 21, rotation=rotation, found={**found, "parameters": 1_000_000})
    assert "more parameters than this" not in markdown(tmp_path, make_sliced_record(smaller))


def test_the_bases_that_a_sweep_tried_are_told_with_their_perplexities(tmp_path: Path) -> None:
    found = {"base_ratio": 0.0, "perplexity_of_base_ratio": {"0.3": 136.83, "0": 98.7123}}
    text = markdown(tmp_path, make_sliced_record(make_sliced(found=found)))
    assert "- perplexity of base ratio: 0.3: 136.8, 0: 98.71" in text


def test_zeros_after_slicing_take_their_own_outcome(tmp_path: Path) -> None:
    sparse, outcome = make_sparse([0.5] * LAYERS)
    record = make_record(
        plans=[make_sliced(), sparse], outcomes=[{"explained_variance": EXPLAINED}, outcome]
    )
    text = markdown(tmp_path, record)
    assert "explained variance: 0.9 to 0.99" in text
    assert "sparsity of decoder layers: 50.00 %" in text


def test_the_picture_shows_widths_against_the_dense_one_and_the_variance() -> None:
    scores = {"layer_redundancy": [0.1 * i for i in range(10)], "block_influence": [0.2] * 10}
    plan = make_sliced(scores=scores)
    panels = plot_layers(PlanFacts(plan), {"explained_variance": EXPLAINED}).axes
    labels = [axes.get_ylabel().partition("\n")[0] for axes in panels]
    assert labels == ["layer redundancy", "width", "explained"], "influence is 1 - redundancy"
    bars = [bar.get_height() for bar in panels[1].patches]
    assert bars == [*DIMS[:-1:2], *DIMS[1::2]]
    (dense,) = (line.get_ydata()[0] for line in panels[1].lines)
    assert dense == HIDDEN
    assert [list(line.get_ydata()) for line in panels[2].lines] == [
        EXPLAINED[:-1:2],
        EXPLAINED[1::2],
    ]


def test_without_an_outcome_the_picture_shows_the_widths_alone(tmp_path: Path) -> None:
    panels = plot_layers(PlanFacts(make_sliced())).axes
    assert [axes.get_ylabel() for axes in panels] == ["width\ndashed: dense"]
    assert "explained" not in markdown(tmp_path, make_sliced_record(make_sliced()))
    assert (tmp_path / "layers.png").read_bytes()[:8] == PNG
