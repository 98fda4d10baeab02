"""Pruning and fewer bits in one contest: rows that add up, those that do not, those not defined."""

import json
import math
from pathlib import Path

import pytest
from runs import write_model

from prunelight.comparison.contest import compare
from prunelight.comparison.grid import Cell
from prunelight.comparison.settings import ComparisonSettings, DataSettings, ModelSettings
from prunelight.comparison.statistics import combined
from prunelight.comparison.telling.additivity import Additivity, additivity, sentence, table_of
from prunelight.comparison.telling.verdict import verdict

COUNTS = [10.0] * 6


def figures(nats):
    """The texts of a model that loses so many nats a token, more on some windows than on others."""
    nll = [10 * (3 + nats + 0.1 * window) for window in range(6)]
    return [{"text": "a", "window_tokens": COUNTS, "window_nll": nll}]


def result(nats, in_bits, **orders):
    told = {name: {"failed": None, "texts": figures(x)} for name, x in orders.items()}
    of_kind = {"prune first": {"failed": None, "texts": figures(in_bits)}, **told}
    return {"failed": None, "texts": figures(nats), "quantized": {"nf4": of_kind}}


def rows_of(pruned, quantized, both):
    cells = [(Cell("dense"), result(0, quantized)), (Cell("A", asked=0.2), result(pruned, both))]
    return additivity(cells)


def test_harms_that_add_up_have_no_interaction():
    (row,) = rows_of(0.5, 0.2, 0.7)
    assert (row.pruning, row.quantization, row.both) == pytest.approx((0.5, 0.2, 0.7))
    assert row.beyond == pytest.approx((0, 0, 0), abs=1e-9)
    assert row.label == "A"


@pytest.mark.parametrize(
    ("both", "words"),
    [
        (0.73, "nearly add up"),
        (0.9, "harm more together"),
        (0.5, "harm less together"),
    ],
)
def test_what_is_beyond_the_sum_is_told_with_its_share(both, words):
    (row,) = rows_of(0.5, 0.2, both)
    assert row.beyond[0] == pytest.approx(both - 0.7)
    assert row.share == pytest.approx((both - 0.7) / 0.7)
    assert row.verdict == words
    assert table_of([row])[0][-1] == words
    assert ("not in A" in sentence([row])) == (words != "nearly add up")


def test_an_interval_that_holds_zero_means_that_they_add_up():
    row = Additivity(
        "A", "zeros", 0.5, False, "nf4", "prune first", "", 0.1, 0.1, 0.3, (0.1, -1, 1)
    )
    assert row.verdict == "add up"


def test_a_sum_that_is_not_positive_has_no_share():
    (row,) = rows_of(-0.5, 0.2, -0.3)
    assert math.isnan(row.share)
    assert table_of([row])[0][-2] == ""


def test_without_quantizations_there_is_no_row():
    cells = [(Cell("dense"), {"failed": None, "texts": figures(0)})]
    assert additivity(cells) == []
    assert sentence([]) == ""


def test_a_combination_of_values_is_paired_over_windows():
    sums = [[[1.0, 2.0, 3.0]], [[2.0, 3.0, 4.0]]]
    value, low, high = combined(sums, [[1.0, 1.0, 1.0]], (-1, 1))
    assert (value, low, high) == pytest.approx((1, 1, 1))  # the same on every window
    with pytest.raises(ValueError, match="must be measured on the same windows"):
        combined(sums, [[1.0, 1.0]], (-1, 1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantizations": ["int3"]}, "quantizations='int3' must be one of nf4, fp4, int8, gptq"),
        ({"quantizations": ["nf4", "nf4"]}, "holds 'nf4' twice"),
        ({"quantize_first": True}, "quantize_first=True has no effect without quantizations"),
    ],
)
def test_wrong_settings_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        ComparisonSettings(ModelSettings("x"), [{"class_path": "ShortGPT"}], **changes)


def test_a_contest_measures_each_model_in_fewer_bits_in_both_orders(tmp_path):
    for package in ("bitsandbytes", "compressed_tensors"):
        pytest.importorskip(package, reason="pip install 'prunelight[quantization,gptq]'")
    name = write_model(
        tmp_path / "model", num_hidden_layers=4, hidden_size=64, intermediate_size=128
    )
    settings = ComparisonSettings(
        ModelSettings(name, "float32"),
        [
            {"class_path": "prunelight.callbacks.ShortGPT"},
            {"class_path": "prunelight.callbacks.WidthPruning", "init_args": {"multiple": 64}},
            {"class_path": "prunelight.callbacks.SliceGPT", "init_args": {"round_to": 8}},
            {"class_path": "prunelight.callbacks.DLP"},
        ],
        zeros=[0.5],
        data=DataSettings(seq_len=32, num_calibration=4, num_windows=4),
        out=str(tmp_path / "out"),
        quantizations=["nf4", "int8", "gptq"],
        quantize_first=True,
    )
    summary = compare(settings)
    rows = {(row.label, row.kind, row.order): row for row in summary.additivity}
    assert len(rows) == 4 * 3 * 2
    for kind in settings.quantizations:
        for order in ("prune first", "quantize first"):
            assert not rows["ShortGPT", kind, order].failed
        for label in ("WidthPruning", "SliceGPT", "DLP"):
            assert "is a quantized" in rows[label, kind, "quantize first"].failed
        for label in ("WidthPruning", "DLP"):
            assert not rows[label, kind, "prune first"].failed
    # Sliced widths are no multiples of 64; int8 and GPTQ with a scale a row take them.
    assert "must be a multiple of 64" in rows["SliceGPT", "nf4", "prune first"].failed
    assert not rows["SliceGPT", "gptq", "prune first"].failed
    out = Path(settings.out)
    told = json.loads((out / "comparison.json").read_text())
    assert len(told["additivity"]) == len(rows)
    assert "## Do the harms of pruning and of fewer bits add up?" in (
        out / "comparison.md"
    ).read_text(encoding="utf-8")
    assert any("add up" in line for line in verdict(summary))
    assert "not defined: " in (out / "report.html").read_text(encoding="utf-8")
    times = {file: file.stat().st_mtime_ns for file in out.rglob("result.json")}
    assert compare(settings).additivity == summary.additivity
    assert times == {file: file.stat().st_mtime_ns for file in out.rglob("result.json")}


def test_harms_are_measured_with_and_without_recovery(tmp_path):
    pytest.importorskip("bitsandbytes", reason="pip install 'prunelight[quantization]'")
    settings = ComparisonSettings(
        ModelSettings(write_model(tmp_path / "model"), "float32"),
        [
            {"class_path": "prunelight.callbacks.SlidingLayerMerging"},
            {"class_path": "prunelight.callbacks.DLP"},
        ],
        zeros=[0.5],
        data=DataSettings(seq_len=32, num_calibration=6, num_windows=4),
        out=str(tmp_path / "out"),
        quantizations=["int8"],
        quantize_first=True,
        recovery={
            "model": {"recovery": "full", "learning_rate": 0.01, "warmup_steps": 0},
            "data": {"batch_size": 2, "num_validation": 2},
            "trainer": {"max_steps": 3, "num_sanity_val_steps": 0},
        },
    )
    rows = {(row.label, row.recovered, row.order): row for row in compare(settings).additivity}
    for label in ("SlidingLayerMerging", "DLP"):
        pruned = rows[label, False, "prune first"]
        recovered = rows[label, True, "prune first"]
        assert not pruned.failed
        assert not recovered.failed
        assert recovered.both < pruned.both, "what was trained is what was quantized"
        assert recovered.quantization == pruned.quantization, "the dense model is one"
        assert (label, True, "quantize first") not in rows, "a trained model is pruned already"
        assert "quantized" in rows[label, False, "quantize first"].failed
