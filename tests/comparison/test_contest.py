"""A contest of tiny models from start to end: cells, reuse, failures, searches, recovery."""

import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
from runs import write_model

from prunelight.comparison.amounts.goals import KeepQuality, Measured, SaveTime
from prunelight.comparison.amounts.matching import Rung
from prunelight.comparison.contest import compare
from prunelight.comparison.settings import (
    ComparisonSettings,
    DataSettings,
    LauncherSettings,
    ModelSettings,
)
from prunelight.comparison.telling import page as page_module
from prunelight.comparison.telling.verdict import verdict
from prunelight.evaluation.report.plan_facts import PlanFacts

METHODS = [
    {"class_path": "prunelight.callbacks.ShortGPT"},
    {"class_path": "prunelight.callbacks.SLEB"},
    {"class_path": "prunelight.callbacks.WidthPruning", "init_args": {"multiple": 8}},
    {"class_path": "prunelight.callbacks.DLP"},
    {
        "class_path": "prunelight.callbacks.SliceGPT",  # of the whole width: it cannot go so far
        "init_args": {"round_to": 32},
    },
]
DATA = DataSettings(seq_len=32, num_calibration=4, num_windows=6)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("compared") / "tiny")


@pytest.fixture(scope="module")
def contest(model, tmp_path_factory):
    settings = ComparisonSettings(
        ModelSettings(model, "float32"),
        METHODS,
        zeros=[0.5],
        data=DATA,
        out=str(tmp_path_factory.mktemp("contest") / "out"),
    )
    return settings, compare(settings, "prunelight compare")


def rows_of(summary):
    return {row.label: row for row in summary.rows}


def results_of(settings):
    return {file: file.stat().st_mtime_ns for file in Path(settings.out).rglob("result.json")}


def test_every_method_has_a_row_and_one_of_each_group_is_best(contest):
    _, summary = contest
    rows = rows_of(summary)
    assert [*rows] == ["dense", "ShortGPT", "SLEB", "WidthPruning", "DLP", "SliceGPT"]
    places = [row.on_text for row in summary.rows if row.on_text]
    assert sum(place.best for place in places) == 2  # of parameters, of zeros
    assert rows["DLP"].share_removed == 0
    assert rows["DLP"].zeros == pytest.approx(0.5, abs=0.03)
    for name in ("ShortGPT", "SLEB", "WidthPruning"):
        assert 0.15 < rows[name].share_removed < 0.35
        assert rows[name].kl[0] > 0
        assert rows[name].prune_forwards > 0


def test_no_folder_of_this_machine_is_in_what_a_contest_publishes(model, tmp_path):
    text = tmp_path / "own.txt"
    text.write_text("The river runs past the old mill and down to the sea. " * 60)
    settings = ComparisonSettings(
        ModelSettings(model, "float32"),
        METHODS[:1],
        data=replace(DATA, texts={"own": str(text)}, calibration=str(text), num_windows=2),
        out=str(tmp_path / "out"),
    )
    compare(settings, f"prunelight compare --out {Path(settings.out).name}")
    for name in ("comparison.json", "comparison.md", "report.html"):
        content = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert "own.txt" in content
        assert str(tmp_path) not in content
        assert str(Path(model).parent) not in content


def test_a_method_that_cannot_prune_this_model_is_a_row_with_its_reason(contest):
    settings, summary = contest
    assert "SliceGPT cannot make this model smaller" in rows_of(summary)["SliceGPT"].failed
    text = (Path(settings.out) / "comparison.md").read_text(encoding="utf-8")
    assert "SliceGPT did not take part: SliceGPT cannot make this model smaller." in text


def test_the_figures_are_those_of_an_evaluation_by_itself(contest):
    import prunelight
    from prunelight.evaluation.quality.text_quality import text_quality
    from prunelight.evaluation.quality.text_windows import text_windows

    settings, summary = contest
    dense, tokenizer = prunelight.load(settings.model.name, dtype="float32")
    text = text_windows(tokenizer, "sample:validation", 32, max_windows=6)
    alone = text_quality(dense, text).perplexity.value
    assert rows_of(summary)["dense"].perplexity["wikitext2"][0] == pytest.approx(alone)


def test_files_hold_the_verdict_the_table_and_a_page_without_network(contest):
    settings, summary = contest
    out = Path(settings.out)
    told = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    assert len(told["rows"]) == len(summary.rows)
    assert told["verdict"][0].startswith("At 25% fewer parameters, ")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert told["verdict"][0].partition(" (dense")[0] in page
    removed = PlanFacts(rows_of(summary)["SLEB"].plan).removed_layers
    assert f"SLEB, 0.25: {', '.join(map(str, removed))}" in page
    assert "Scores of SLEB, 0.25" in page
    assert "plan" not in told["rows"][1]
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert len(page.encode()) < 2_000_000


def test_two_methods_that_make_the_same_model_are_told(model, tmp_path):
    twice = [METHODS[0], {**METHODS[0], "label": "again"}]
    settings = ComparisonSettings(
        ModelSettings(model, "float32"), twice, data=DATA, out=str(tmp_path / "out")
    )
    summary = compare(settings)
    assert [row.same_as for row in summary.rows] == ["", "", "ShortGPT"]
    told = " ".join(verdict(summary))
    assert "again and ShortGPT have the same figures on every window" in told


def test_a_second_run_computes_nothing_and_loads_no_model(contest, caplog):
    settings, summary = contest
    before = results_of(settings)
    with caplog.at_level(logging.INFO, "prunelight"):
        again = compare(settings, "prunelight compare")
    assert results_of(settings) == before
    assert "loading" not in caplog.text
    assert again.rows == summary.rows


def test_a_lost_cell_alone_is_run_again_and_gives_the_same(contest):
    settings, summary = contest
    before = results_of(settings)
    lost = next(
        file
        for file in before
        if json.loads(file.read_text(encoding="utf-8"))["cell"]["label"] == "SLEB"
    )
    lost.write_text('{"format": 1, "cell"', encoding="utf-8")  # as a full disk leaves it
    again = compare(settings)
    after = results_of(settings)
    assert {file for file in before if after[file] != before[file]} == {lost}
    for row, new in zip(summary.rows, again.rows, strict=True):
        assert (row.label, row.perplexity, row.kl) == (new.label, new.perplexity, new.kl)


def test_more_amounts_join_the_same_comparison_and_other_settings_are_refused(contest):
    settings, _ = contest
    before = results_of(settings)
    more = compare(replace(settings, amounts=[0.1, 0.25], methods=METHODS[:1]))
    assert [row.asked for row in more.rows] == [None, 0.1, 0.25]
    assert len(results_of(settings)) == len(before) + 1
    other = replace(settings, data=replace(DATA, num_windows=5))
    with pytest.raises(ValueError, match=r"holds another comparison, with data.num_windows=6 inst"):
        compare(other)
    compare(settings)  # what the next test of this module finds


def test_a_contest_of_an_older_version_without_some_settings_goes_on(contest):
    settings, summary = contest
    file = Path(settings.out) / "grid.json"
    kept = json.loads(file.read_text(encoding="utf-8"))
    del kept["settings"]["data"]["text_seq_len"], kept["settings"]["published"]
    file.write_text(json.dumps({**kept, "key": "of the older version"}), encoding="utf-8")
    before = results_of(settings)
    again = compare(settings)
    assert [row.perplexity for row in again.rows] == [row.perplexity for row in summary.rows]
    assert results_of(settings) == before


def test_files_of_others_are_not_replaced(contest, tmp_path):
    settings, _ = contest
    (tmp_path / "comparison.md").write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match="is none of a comparison; set another out"):
        compare(replace(settings, out=str(tmp_path)))
    (tmp_path / "comparison.md").unlink()
    (tmp_path / "grid.json").write_text("{}", encoding="utf-8")
    with pytest.raises(FileExistsError, match="is no grid of this version"):
        compare(replace(settings, out=str(tmp_path)))


def test_a_wrong_task_ends_before_the_model_is_loaded(tmp_path):
    settings = ComparisonSettings(
        ModelSettings("no model at all"), METHODS, tasks=["piqq"], out=str(tmp_path / "out")
    )
    with pytest.raises(ValueError, match="task 'piqq' is unknown to lm-eval; the nearest names"):
        compare(settings)


def test_too_short_a_text_is_refused(contest, tmp_path):
    settings, _ = contest
    long = replace(settings, data=replace(DATA, num_windows=10**6), out=str(tmp_path))
    with pytest.raises(ValueError, match="num_windows=1000000 are asked for; lower one of them"):
        compare(long)


def test_processes_side_by_side_give_the_same(contest, tmp_path):
    settings, summary = contest
    launcher = LauncherSettings("joblib", n_jobs=2)
    wanted = ["dense", "ShortGPT", "DLP"]
    methods = [METHODS[0], METHODS[3]]
    both = compare(replace(settings, methods=methods, out=str(tmp_path), launcher=launcher))
    rows, alone = rows_of(both), rows_of(summary)
    assert [*rows] == wanted
    for name in wanted:
        assert rows[name].perplexity["wikitext2"] == pytest.approx(
            alone[name].perplexity["wikitext2"]
        )


@pytest.mark.parametrize("name", ["max_kld", "min_top1"])
def test_a_search_takes_the_most_that_keeps_the_limit(name, model, tmp_path):
    limit = {"max_kld": 0.0012, "min_top1": 0.4}[name]
    settings = ComparisonSettings(
        ModelSettings(model, "float32"),
        [METHODS[0], METHODS[3]],
        data=DATA,
        out=str(tmp_path / "out"),
        **{name: limit},
    )
    summary = compare(settings)

    def keeps(result):
        measured = KeepQuality(name, limit).measure([result])
        return measured.high <= limit if name == "max_kld" else measured.low >= limit

    results = [json.loads(file.read_text(encoding="utf-8")) for file in results_of(settings)]
    for row in summary.rows[1:]:
        tried = [r for r in results if r["cell"]["label"] == row.label and not r["cell"]["fault"]]
        assert len(tried) <= math.ceil(math.log2(96)) + 1
        kept = [r["cell"]["asked"] for r in tried if keeps(r)]
        lost = [r["cell"]["asked"] for r in tried if not keeps(r)]
        if row.failed:
            assert f"no amount keeps {name}" in row.failed
            assert not kept
        else:
            assert row.asked == max(kept)
        assert not kept or not lost or max(kept) < min(lost)
    again = compare(settings)
    assert again.rows == summary.rows


@pytest.mark.slow
def test_at_equal_latency_each_method_takes_the_choice_whose_time_is_nearest(tmp_path):
    deep = write_model(tmp_path / "deep", num_hidden_layers=8)
    settings = ComparisonSettings(
        ModelSettings(deep, "float32"),
        [METHODS[0], METHODS[3]],
        amounts=[0.5],
        data=DATA,
        equal="latency",
        out=str(tmp_path / "out"),
    )
    summary = compare(settings)
    rows = rows_of(summary)
    assert "zeros save no time" in rows["DLP"].failed
    results = [json.loads(file.read_text(encoding="utf-8")) for file in results_of(settings)]
    factors = {
        r["cell"]["arguments"]["num_layers"]: r["latency"]["median"]
        for r in results
        if r["cell"]["label"] == "ShortGPT"
    }
    assert 3 <= len(factors) <= 4  # of 7 choices
    chosen = rows["ShortGPT"]
    assert chosen.asked == 0.5
    distances = {number: abs(factor - 0.5) for number, factor in factors.items()}
    assert chosen.arguments["num_layers"] == min(distances, key=distances.get)
    assert chosen.latency[1] <= chosen.latency[0] <= chosen.latency[2]
    assert "less time of a generation" in " ".join(verdict(summary))
    assert "| latency |" in (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")


def test_a_share_of_time_that_cannot_be_saved_is_told():
    rungs = [Rung({"num_layers": n}, 0.1 * n) for n in range(1, 4)]
    tried = {1: Measured(0.9, 0.9, 0.9), 2: Measured(0.8, 0.8, 0.8)}
    with pytest.raises(ValueError, match=r"at most 20.0% of the time can be saved, not 50.0%"):
        SaveTime(0.5).choose(tried, rungs)
    assert SaveTime(0.12).choose(tried, rungs) == 1


def test_recovered_cells_are_fits_that_are_measured_like_the_others(model, tmp_path):
    settings = ComparisonSettings(
        ModelSettings(model, "float32"),
        METHODS[:1],
        data=DATA,
        seeds=[0, 1],
        recovery={
            "model": {"recovery": "full", "learning_rate": 0.01, "warmup_steps": 0},
            "data": {"batch_size": 2, "num_validation": 2},
            "trainer": {"max_steps": 6, "num_sanity_val_steps": 0},
        },
        out=str(tmp_path / "out"),
    )
    summary = compare(settings)
    dense, pruned, recovered = summary.rows
    assert not recovered.failed
    assert (pruned.recovered, recovered.recovered) == (False, True)
    assert pruned.share_removed == recovered.share_removed > 0
    for name in dense.perplexity:
        assert recovered.perplexity[name][0] < pruned.perplexity[name][0]
    assert not [*Path(settings.out).rglob("*.safetensors")], "models are removed once measured"
    before = results_of(settings)
    assert len(before) == 5
    assert compare(settings).rows == summary.rows
    assert results_of(settings) == before


# --- a sweep, at each method's own ratio ---------------------------------------------------------


@pytest.fixture(scope="module")
def swept_contest(model, tmp_path_factory):
    base = {"class_path": "prunelight.callbacks.DynamicSlicing", "init_args": {"round_to": 2}}
    settings = ComparisonSettings(
        ModelSettings(model, "float32"),
        [
            {**base, "sweep": {"base_ratio": [0.2, 0.0, 0.1]}},
            {**base, "label": "half", "sweep": {"signal": ["residual", "normalized"]}},
            METHODS[0],
            METHODS[3],
        ],
        amounts=[0.34],
        zeros=[0.5],
        equal="ratio",
        data=replace(DATA, num_calibration=8),
        out=str(tmp_path_factory.mktemp("swept") / "out"),
    )
    return settings, compare(settings)


def test_a_sweep_is_a_method_for_each_value(swept_contest):
    rows = rows_of(swept_contest[1])
    bases = [f"DynamicSlicing, base_ratio {base}" for base in (0.2, 0.0, 0.1)]
    signals = ["half, signal residual", "half, signal normalized"]
    assert [*rows] == ["dense", *bases, *signals, "ShortGPT", "DLP"]
    assert [rows[label].arguments["base_ratio"] for label in bases] == [0.2, 0.0, 0.1]
    assert all(row.measured for row in rows.values())


def test_at_equal_ratio_each_method_removes_the_amount_of_its_own_measure(swept_contest):
    rows = rows_of(swept_contest[1])
    assert rows["ShortGPT"].arguments == {"ratio": 0.34}
    assert rows["ShortGPT"].layers == round(0.66 * 6)
    assert rows["half, signal residual"].arguments["slice_ratio"] == 0.34
    assert rows["DLP"].group == "zeros"
    assert rows["DLP"].arguments == {"sparsity": 0.5}
    assert {row.group for row in rows.values()} == {"parameters", "ratio", "zeros"}  # dense first


def test_the_page_draws_a_curve_over_the_swept_numbers_for_each_text(swept_contest):
    settings, summary = swept_contest
    page = (Path(settings.out) / "report.html").read_text(encoding="utf-8")
    assert [*summary.dense.perplexity] == ["wikitext2", "instructions"]
    for text in summary.dense.perplexity:
        assert f"Perplexity on {text} against base_ratio" in page
    assert "against signal" not in page, "words have no axis"
    assert "0.34 of the layers, of the hidden width or of the neurons removed" in page
    told = json.loads((Path(settings.out) / "comparison.json").read_text(encoding="utf-8"))
    assert told["verdict"][0].startswith("At a ratio of 34%, ")


def test_a_page_that_is_written_again_draws_the_same_scores_no_second_time(contest):
    _, summary = contest
    told = page_module.page(summary, [])
    before = page_module._drawn_scores.cache_info()
    assert page_module.page(summary, []) == told
    after = page_module._drawn_scores.cache_info()
    assert after.misses == before.misses
    assert after.hits > before.hits


# --- files that options name ----------------------------------------------------------------------


@pytest.fixture
def contest_of_a_file(model, tmp_path):
    text = tmp_path / "scored.txt"
    text.write_text("The river runs past the old mill and down to the sea. " * 60)
    settings = ComparisonSettings(
        ModelSettings(model, "float32"),
        [
            METHODS[0],
            {
                "class_path": "prunelight.callbacks.DynamicSlicing",
                "init_args": {"round_to": 2, "base_ratio": 0.0, "redundancy_text": str(text)},
            },
        ],
        data=replace(DATA, num_calibration=8),
        out=str(tmp_path / "out"),
    )
    return settings, text


def test_a_text_that_changes_under_its_name_makes_the_cells_of_its_method_anew(contest_of_a_file):
    settings, text = contest_of_a_file
    scores = compare(settings).rows[2].plan["scores"]["block_influence"]
    before = results_of(settings)
    text.write_text("0123456789 +-*/ = ( ) [ ] { } < > ! ? ; : , . # & % $ @ " * 60)
    again = compare(settings)
    after = results_of(settings)
    assert again.rows[2].plan["scores"]["block_influence"] != scores
    assert len(after) == len(before) + 1, "the other method's cells are those of before"
    assert {file: after[file] for file in before} == before


def test_a_text_that_is_written_again_as_it_was_computes_nothing(contest_of_a_file):
    settings, text = contest_of_a_file
    compare(settings)
    before = results_of(settings)
    text.write_text(text.read_text())
    compare(settings)
    assert results_of(settings) == before


def test_the_text_of_a_recovery_that_changes_makes_the_recovered_cells_anew(model, tmp_path):
    text = tmp_path / "train.txt"
    text.write_text("The river runs past the old mill and down to the sea. " * 60)
    settings = ComparisonSettings(
        ModelSettings(model, "float32"),
        METHODS[:1],
        data=DATA,
        recovery={
            "model": {"recovery": "full", "learning_rate": 0.01, "warmup_steps": 0},
            "data": {"train": str(text), "batch_size": 2, "num_validation": 2},
            "trainer": {"max_steps": 2, "num_sanity_val_steps": 0},
        },
        out=str(tmp_path / "out"),
    )
    first = compare(settings).rows
    before = results_of(settings)
    text.write_text("0123456789 +-*/ = ( ) [ ] { } < > ! ? ; : , . # & % $ @ " * 60)
    again = compare(settings).rows
    assert len(results_of(settings)) == len(before) + 1
    assert again[1].perplexity == first[1].perplexity
    assert again[2].perplexity != first[2].perplexity
