"""Rows of several methods: shares of what goes, counted before, and the same total for all rows."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import write_model
from tiny import tiny_model, token_windows

import prunelight
from prunelight.comparison.amounts.matching import (
    Outlines,
    callbacks_of,
    check_rung,
    ladder,
    nearest,
    own_ratio,
    shorter,
)
from prunelight.comparison.contest import compare
from prunelight.comparison.methods import entrants_of
from prunelight.comparison.settings import ComparisonSettings, DataSettings, ModelSettings
from prunelight.models.sizes import linear_sparsity, parameter_count

SHORTGPT = {"class_path": "ShortGPT"}
LATER = {
    "WidthPruning": {"multiple": 2},
    "SliceGPT": {"round_to": 2},
    "DynamicSlicing": {"round_to": 2, "base_ratio": 0.0},
    "SlidingLayerMerging": {},
    "WeightPruning": {},
}


def series(later="WidthPruning", share=(0.5, 0.5), first=SHORTGPT, **entry):
    callbacks = [first, {"class_path": later, "init_args": LATER[later]}]
    (made,) = entrants_of([{"callbacks": callbacks, "share": [*share], **entry}])
    return made


def prune(model, methods, windows):
    for method in methods:
        with torch.no_grad():
            plan = method.plan(model, windows)
            model = prunelight.apply(model, plan, windows)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("later", [name for name in LATER if name != "WeightPruning"])
def test_what_is_counted_for_a_series_is_what_both_methods_remove(later, tied):
    row, model = series(later), tiny_model(tie_word_embeddings=tied)
    windows = token_windows(num_samples=32, seq_len=24)
    before, rung = parameter_count(model), nearest(row, model, 0.45)
    assert parameter_count(model) == before
    check_rung(row, rung, Outlines(model))
    removed = 1 - parameter_count(prune(model, callbacks_of(row, rung), windows)) / before
    # DynamicSlicing asks for a share, and takes the widths that remove at least so much.
    assert removed == pytest.approx(rung.share, abs=0.02 if later == "DynamicSlicing" else 1e-9)


def test_each_split_reaches_the_same_total_and_the_later_method_makes_up_for_whole_layers():
    model = tiny_model(num_hidden_layers=12, intermediate_size=256)
    shares = []
    for first in (0.0, 0.25, 0.5, 0.75):
        rung = nearest(series(share=(first, 1 - first)), model, 0.4)
        shares.append(rung.share)
        if first:
            alone = nearest(entrants_of([SHORTGPT])[0], model, 0.4 * first)
            assert rung.arguments == alone.arguments
    neuron = 3 * 32 * 12 / parameter_count(model)
    assert shares == pytest.approx([0.4] * 4, abs=2 * neuron)


def test_a_method_without_a_share_takes_no_part():
    model = tiny_model()
    depth, width = series(share=(1, 0)), series(share=(0, 1))
    assert [part.label for part in depth.parts] == ["ShortGPT"]
    assert [part.label for part in width.parts] == ["WidthPruning"]
    assert nearest(depth, model, 0.4) == nearest(entrants_of([SHORTGPT])[0], model, 0.4)


@pytest.mark.parametrize("share", [(0, 1), (0.5, 0.5), (1, 0)])
def test_before_zeros_layers_are_shares_of_the_weights_that_are_zero_or_gone(share):
    row, model = series("WeightPruning", share), tiny_model()
    assert row.puts_zeros
    rung = nearest(row, model, 0.5)
    assert rung.share == pytest.approx(0.5)
    pruned = prune(tiny_model(), callbacks_of(row, rung), token_windows())
    left = len(pruned.model.layers) / 6
    assert len(pruned.model.layers) == {0: 6, 0.5: 4, 1: 3}[share[0]]
    assert 1 - left * (1 - linear_sparsity(pruned)) == pytest.approx(0.5, abs=0.01)


def test_three_methods_share_what_goes():
    callbacks = [SHORTGPT, {"class_path": "SlidingLayerMerging"}, {"class_path": "WeightPruning"}]
    (row,) = entrants_of([{"callbacks": callbacks, "share": [0.4, 0.3, 0.3]}])
    rung = nearest(row, tiny_model(num_hidden_layers=12), 0.5)
    assert (rung.arguments, rung.then[0]) == ({"num_layers": 2}, {"num_layers": 2})
    assert rung.share == pytest.approx(0.5)


def test_a_shorter_model_holds_no_values_and_the_model_stays_as_it_is():
    model = tiny_model(tie_word_embeddings=True)
    left = shorter(model, 4, protected=[0])
    assert {parameter.device.type for parameter in left.parameters()} == {"meta"}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    layer = parameter_count(model.model.layers[0])
    assert parameter_count(left) == parameter_count(model) - 2 * layer
    assert (left.config.num_hidden_layers, model.config.num_hidden_layers) == (4, 6)


def test_a_ladder_of_a_series_climbs():
    rungs = ladder(series(), tiny_model())
    shares = [rung.share for rung in rungs]
    assert shares == sorted(shares)
    assert len({(str(rung.arguments), str(rung.then)) for rung in rungs}) == len(rungs)


@pytest.mark.parametrize(
    ("share", "amount", "message"),
    [
        ((0.1, 0.9), 0.2, r"ShortGPT gets 2.0% to remove in .*, less than half of one decoder lay"),
        ((0.95, 0.05), 0.27, r"nothing is left for WidthPruning in .*: whole layers before it rem"),
        ((0.5, 0.5), 0.99, r"WidthPruning can remove at most .*; lower the amount"),
    ],
)
def test_a_share_that_no_whole_layer_meets_is_refused(share, amount, message):
    with pytest.raises(ValueError, match=message):
        nearest(series(share=share), tiny_model(), amount)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"share": [0.5, 0.4]}, r"share=\[0.5, 0.4\] of the row .* adds to 0.9, and must add to 1"),
        ({"share": [1.0]}, r"must hold a number in \[0, 1\] for each of its 2 callbacks"),
        ({"share": [1.5, -0.5]}, r"share=\[1.5, -0.5\] of the row .* must hold a number in"),
        ({"share": None}, r"share=None of the row .*, such as \[0.5, 0.5\]"),
        ({"callbacks": [SHORTGPT]}, "must be a list of at least two; write a single method as"),
        ({"callbacks": []}, r"callbacks=\[\] of the row '' must be a list of at least two"),
        (
            {"callbacks": ["WidthPruning", "ShortGPT"]},
            "WidthPruning stands before ShortGPT in the row .*; put it last",
        ),
        (
            {
                "callbacks": [
                    {**SHORTGPT, "init_args": {"granularity": "attention"}},
                    "WidthPruning",
                ]
            },
            "only methods that remove whole decoder layers may stand before another",
        ),
        (
            {"callbacks": ["WeightPruning", "SliceGPT"]},
            "WeightPruning stands before SliceGPT in the row",
        ),
        ({"sweep": {"ratio": [0.2]}}, "sweep of ratio: several callbacks take a sweep of share"),
        ({"sweep": {"share": [[1, 0]]}}, r"share=\[0.5, 0.5\] stands beside a sweep of share"),
        ({"shares": [0.5, 0.5]}, "has no key 'shares'; did you mean share"),
        (
            {"callbacks": [{**SHORTGPT, "init_args": {"num_layers": 2}}, "WidthPruning"]},
            "num_layers=2 of ShortGPT says how much",
        ),
    ],
)
def test_a_bad_series_is_refused(entry, message):
    whole = {"callbacks": [SHORTGPT, {"class_path": "WidthPruning"}], "share": [0.5, 0.5], **entry}
    with pytest.raises(ValueError, match=message) as refused:
        entrants_of([whole])
    assert "\n" not in str(refused.value)


def test_a_series_has_no_ratio_of_its_own():
    with pytest.raises(ValueError, match="holds several callbacks, each with a measure of its own"):
        own_ratio(series(), 0.25)


# --- from start to end -----------------------------------------------------------------------

GRID = [
    {
        "label": "depth and width",
        "callbacks": [SHORTGPT, {"class_path": "WidthPruning", "init_args": {"multiple": 2}}],
        "sweep": {"share": [[0, 1], [0.5, 0.5], [1, 0]]},
    },
    {
        "label": "depth and zeros",
        "callbacks": [SHORTGPT, "WeightPruning"],
        "share": [0.5, 0.5],
    },
    SHORTGPT,
]


@pytest.fixture(scope="module")
def contest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("series")
    settings = ComparisonSettings(
        ModelSettings(write_model(folder / "model"), "float32"),
        GRID,
        amounts=[0.4],
        zeros=[0.5],
        data=DataSettings(seq_len=32, num_calibration=4, num_windows=4),
        out=str(folder / "out"),
    )
    return settings, compare(settings)


def test_the_splits_are_rows_of_one_contest(contest):
    _, summary = contest
    rows = {row.label: row for row in summary.rows[1:]}
    assert not [row.failed for row in rows.values() if row.failed]
    splits = [rows[f"depth and width, share {share}"] for share in ([0, 1], [0.5, 0.5], [1, 0])]
    assert [row.layers for row in splits] == [6, 4, 2]
    shares = [row.share_removed for row in splits]
    assert shares == pytest.approx([shares[0]] * 3, abs=0.05)  # half a layer
    assert {row.contest for row in splits} == {("parameters", 0.4, False)}
    zeros = rows["depth and zeros"]
    assert (zeros.group, zeros.layers) == ("zeros", 4)
    assert zeros.amount == pytest.approx(0.5, abs=0.02)


def test_a_series_that_is_recovered_is_a_fit_with_all_its_methods(contest, tmp_path):
    settings, _ = contest
    summary = compare(
        replace(
            settings,
            methods=[{**GRID[0], "sweep": {"share": [[0.5, 0.5]]}}],
            recovery={
                "model": {"recovery": "full", "learning_rate": 0.01, "warmup_steps": 0},
                "data": {"batch_size": 2, "num_validation": 2},
                "trainer": {"max_steps": 2, "num_sanity_val_steps": 0},
            },
            out=str(tmp_path / "out"),
        )
    )
    _, pruned, recovered = summary.rows
    assert recovered.recovered
    assert not recovered.failed
    assert (recovered.layers, recovered.share_removed) == (pruned.layers, pruned.share_removed)
    assert recovered.perplexity != pruned.perplexity


def test_all_by_depth_is_the_row_of_that_method_alone(contest):
    settings, summary = contest
    rows = {row.label: row for row in summary.rows}
    assert rows["depth and width, share [1, 0]"].perplexity == rows["ShortGPT"].perplexity
    cells = {file.parent.name for file in Path(settings.out).rglob("result.json")}
    assert len(cells) == 1 + 4, "the same model is made once"


def test_the_page_draws_a_curve_over_the_first_methods_share(contest):
    settings, _ = contest
    page = (Path(settings.out) / "report.html").read_text(encoding="utf-8")
    assert "Perplexity on wikitext2 against share of what goes by ShortGPT" in page


def test_a_result_holds_the_plans_of_all_methods(contest):
    settings, _ = contest
    results = [json.loads(file.read_text()) for file in Path(settings.out).rglob("result.json")]
    for result in results:
        if result["cell"]["then"]:
            assert result["plan"]["method"] == "ShortGPT"
            (later,) = result["later_plans"]
            assert later["method"] in ("WidthPruning", "WeightPruning")


def test_another_argument_of_the_later_method_is_another_cell_and_the_same_is_none(contest):
    settings, summary = contest
    before = {*Path(settings.out).rglob("result.json")}
    assert compare(settings).rows == summary.rows
    assert {*Path(settings.out).rglob("result.json")} == before
    changed = {"class_path": "WeightPruning", "init_args": {"solver": "magnitude"}}
    compare(replace(settings, methods=[{**GRID[1], "callbacks": [SHORTGPT, changed]}]))
    assert len({*Path(settings.out).rglob("result.json")} - before) == 1


def test_a_search_goes_over_the_amounts_of_a_series(tmp_path):
    settings = ComparisonSettings(
        ModelSettings(write_model(tmp_path / "model"), "float32"),
        [{"callbacks": GRID[0]["callbacks"], "share": [0.5, 0.5]}],
        data=DataSettings(seq_len=32, num_calibration=4, num_windows=4),
        max_kld=0.02,
        out=str(tmp_path / "out"),
    )
    row = compare(settings).rows[1]
    assert row.share_removed > 0
    assert row.then[0]["arguments"]["neuron_ratio"] > 0
