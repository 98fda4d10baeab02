"""Contests without amounts, where a method's threshold says how much goes; and claims."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from runs import write_model

from prunelight.cli import main
from prunelight.comparison.contest import compare
from prunelight.comparison.methods import entrants_of
from prunelight.comparison.settings import Claim, ComparisonSettings, DataSettings, ModelSettings
from prunelight.comparison.telling.claim import claim_holds, judged, sentence
from prunelight.comparison.telling.verdict import verdict

SLM = {"class_path": "SlidingLayerMerging", "label": "SLM"}
SHORTGPT = {"class_path": "ShortGPT"}
DATA = DataSettings(seq_len=32, num_calibration=6, num_windows=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("own") / "tiny")


# --- each method at its own amount ---------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(model, tmp_path_factory):
    settings = ComparisonSettings(
        ModelSettings(model, "float32"),
        [
            {**SLM, "sweep": {"threshold": [0.9, 0.999999]}},
            {**SHORTGPT, "sweep": {"num_layers": [1, 2]}},
            {"class_path": "WeightPruning", "init_args": {"sparsity": 0.5}},
            {"class_path": "ShortGPT", "init_args": {"num_layers": 6}, "label": "too much"},
        ],
        amounts=None,
        data=DATA,
        out=str(tmp_path_factory.mktemp("swept") / "out"),
    )
    return settings, compare(settings)


def test_each_row_removes_what_its_own_arguments_say(swept):
    rows = {row.label: row for row in swept[1].rows}
    assert [rows[f"ShortGPT, num_layers {n}"].layers for n in (1, 2)] == [5, 4]
    layers = [rows[f"SLM, threshold {t}"].layers for t in (0.9, 0.999999)]
    assert layers[0] < layers[-1]
    assert rows["WeightPruning"].zeros == pytest.approx(0.5, abs=0.03)
    assert "6" in rows["too much"].failed
    assert {(row.asked, row.group) for row in swept[1].rows[1:]} == {(None, "own"), (None, "zeros")}


def test_rows_of_different_amounts_are_not_ranked_and_the_front_is_by_true_share(swept):
    rows = [row for row in swept[1].rows[1:] if row.measured and row.group == "own"]
    assert all(row.on_text is None for row in rows)
    most = max(rows, key=lambda row: row.share_removed)
    assert any(row.on_front for row in rows if row.share_removed == most.share_removed)


def test_the_page_shows_the_share_removed_against_perplexity_as_a_curve_a_method(swept):
    settings, summary = swept
    page = (Path(settings.out) / "report.html").read_text(encoding="utf-8")
    assert "Perplexity against share of all parameters removed (%)" in page
    assert "Share removed (%) against threshold" in page
    assert "Perplexity on wikitext2 against threshold" in page
    told = verdict(summary)
    assert any(line.startswith("Each row is at its own amount: ") for line in told)
    assert any("too much did not take part" in line for line in told)
    markdown = (Path(settings.out) / "comparison.md").read_text(encoding="utf-8")
    assert "*each at its own amount*" in markdown
    assert "*each at its own amount, zeros*" in markdown


def test_a_contest_of_own_amounts_goes_on_where_it_was(swept):
    settings, summary = swept
    before = {file: file.stat().st_mtime_ns for file in Path(settings.out).rglob("result.json")}
    assert compare(settings).rows == summary.rows
    after = {file: file.stat().st_mtime_ns for file in Path(settings.out).rglob("result.json")}
    assert after == before


def test_callbacks_of_one_row_may_say_their_own_amounts():
    parts = [
        {**SHORTGPT, "init_args": {"num_layers": 2}},
        {"class_path": "WidthPruning", "init_args": {"neuron_ratio": 0.5}},
    ]
    (row,) = entrants_of([{"callbacks": parts}], own_amounts=True)
    row.check()
    assert row.share == ()
    with pytest.raises(ValueError, match=r"share=\[0.5, 0.5\] .* has no effect with amounts=null"):
        entrants_of([{"callbacks": parts, "share": [0.5, 0.5]}], own_amounts=True)


def test_a_method_that_says_no_amount_is_refused_where_the_comparison_says_none(model, tmp_path):
    settings = ComparisonSettings(
        ModelSettings(model), [SHORTGPT], amounts=None, out=str(tmp_path / "out")
    )
    with pytest.raises(ValueError, match="ShortGPT: "):
        compare(settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zeros": [0.5]}, r"zeros=\[0.5\] has no effect with amounts=null"),
        ({"equal": "ratio"}, "equal='ratio' has no effect with amounts=null"),
        ({"max_kld": 0.1}, "max_kld=0.1 has no effect with amounts=null"),
        ({"claim": Claim("SLM", "ShortGPT")}, "claim=.* has no effect with amounts=null"),
    ],
)
def test_what_has_no_effect_without_amounts_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ComparisonSettings(ModelSettings("x"), [SHORTGPT], amounts=None, **changes)


# --- claims --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def claimed(model, tmp_path_factory):
    settings = ComparisonSettings(
        ModelSettings(model, "float32"),
        [SLM, SHORTGPT],
        amounts=[0.2, 0.4],
        seeds=[0, 1],
        data=DATA,
        claim=Claim("SLM", "ShortGPT", loss=0.5, forwards=1e6),
        out=str(tmp_path_factory.mktemp("claimed") / "out"),
    )
    return settings, compare(settings)


def test_a_claim_is_judged_at_each_amount_with_each_seed(claimed):
    settings, summary = claimed
    found = judged(summary)
    assert [(one.asked, one.seed) for one in found] == [(0.2, 0), (0.2, 1), (0.4, 0), (0.4, 1)]
    assert claim_holds(summary)
    assert verdict(summary)[0].startswith("The claim holds: SLM has at most 1.5 times")
    markdown = (Path(settings.out) / "comparison.md").read_text(encoding="utf-8")
    assert markdown.count("| holds |") == 4
    assert "Does the claim hold?" in (Path(settings.out) / "report.html").read_text()


def test_the_ratio_of_a_claim_is_that_of_the_results_of_its_seed(claimed):
    settings, summary = claimed
    value = {}
    for file in Path(settings.out).rglob("result.json"):
        result = json.loads(file.read_text(encoding="utf-8"))
        cell = result["cell"]
        nll = [text["perplexity"]["value"] for text in result["texts"]]
        value[cell["label"], cell["asked"], cell["seed"]] = (nll[0] * nll[1]) ** 0.5
    for one in judged(summary):
        ratio = value["SLM", one.asked, one.seed] / value["ShortGPT", one.asked, one.seed]
        assert one.ratio == pytest.approx(ratio)


@pytest.mark.parametrize(
    "claim",
    [
        Claim("SLM", "ShortGPT", loss=0.5, forwards=1e-6),
        Claim("dense", "ShortGPT", loss=0.5),
    ],
)
def test_a_claim_that_fails_or_has_no_results_does_not_hold(claimed, claim):
    settings, summary = claimed
    other = replace(summary, settings=replace(settings, claim=claim))
    assert not claim_holds(other)
    assert "The claim holds" not in sentence(other)


def test_one_seed_that_fails_is_enough(claimed):
    settings, summary = claimed
    rows = {(row.label, row.asked): row for row in summary.rows}
    slm = rows["SLM", 0.4]
    worse = {text: 1.1 * value for text, value in rows["ShortGPT", 0.4].seeds[1].perplexity.items()}
    changed = replace(slm, seeds=[slm.seeds[0], replace(slm.seeds[1], perplexity=worse)])
    other = replace(
        summary,
        rows=[changed if row is slm else row for row in summary.rows],
        settings=replace(settings, claim=Claim("SLM", "ShortGPT", loss=0.05)),
    )
    assert not claim_holds(other)
    assert "fails at 0.4 with seed 1: at most 1.100 times" in sentence(other)


def test_a_claim_about_others_is_refused_before_the_model_is_read(tmp_path):
    settings = ComparisonSettings(
        ModelSettings("no model"),
        [SLM, SHORTGPT],
        claim=Claim("SLM", "ShortGTP"),
        out=str(tmp_path / "out"),
    )
    with pytest.raises(ValueError, match=r"claim.against='ShortGTP' is no label .*mean ShortGPT"):
        compare(settings)
    with pytest.raises(ValueError, match="claim.method='A' and claim.against are the same"):
        Claim("A", "A")
    with pytest.raises(ValueError, match="claim.loss=-1 must be at least 0"):
        Claim("A", "B", loss=-1)


@pytest.mark.parametrize(("forwards", "status"), [("1e6", 0), ("1e-6", 1)])
def test_the_command_ends_with_the_status_of_the_claim(claimed, forwards, status, capsys):
    settings, _ = claimed
    texts = json.dumps(settings.data.texts)
    options = [
        *("--model.name", settings.model.name, "--model.dtype", "float32", "--data.texts", texts),
        *("--methods", json.dumps(settings.methods), "--amounts", "[0.2,0.4]", "--seeds", "[0,1]"),
        *("--data.seq_len", "32", "--data.num_calibration", "6", "--data.num_windows", "4"),
        *("--claim.method", "SLM", "--claim.against", "ShortGPT", "--claim.loss", "0.5"),
        *("--claim.forwards", forwards, "--out", settings.out),
    ]
    if status:
        with pytest.raises(SystemExit) as stopped:
            main(["compare", *options])
        assert stopped.value.code == status
    else:
        main(["compare", *options])
    assert "The claim " in capsys.readouterr().out
