"""report.html: it says what was recorded, whole and safe, and the same whenever it is drawn."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from examined_stages import HOSTILE, make_examined_record
from html_pages import read_page
from report_records import MIXED, make_plan, make_record, make_sparse, make_sparse_record, markdown

from prunelight.evaluation.report.examined import flips_of, is_tie, task_grid
from prunelight.evaluation.report.page.decisions import cut_of
from prunelight.evaluation.report.page.run_page import run_page
from prunelight.evaluation.report.page.verdict import GRADES, grade, verdict_of
from prunelight.evaluation.report.record import RunRecord
from prunelight.evaluation.report.report import write_report
from prunelight.evaluation.report.writing import markdown_table


def headings(page: str) -> list[str]:
    return [part.split("</h2>")[0] for part in page.split("<h2>")[1:]]


def test_a_page_with_everything_is_whole_and_runs_nothing() -> None:
    page = run_page(make_examined_record())
    reader = read_page(page)
    assert HOSTILE in reader.text
    assert "<script" not in page
    assert "<img" not in page
    expected = ["Warning", "Before and after", "Tasks", "Collapse probes"]
    expected += ["Divergence", "Samples"]
    expected += ["What ShortGPT decided", "Training", "Cost of serving", "Loads in"]
    expected += ["Time and memory of the run", "Where this comes from"]
    assert headings(page) == expected
    assert reader.tags.count("h1") == 1


def test_every_stage_stands_in_the_table_with_its_tokens() -> None:
    record = make_examined_record()
    table = read_page(run_page(record)).tables[0]
    assert table[0] == ["", "dense", "pruned", "recovered"]
    rows = {row[0]: row[1:] for row in table[1:]}
    assert rows["perplexity"] == ["20", "300 (\u00d715)", "25 (+25.0 %)"]
    assert rows["tokens looked at"] == ["0", "256", "256"]
    assert rows["tokens trained on"] == ["0", "0", "1,000"]
    assert rows["tasks, mean"] == ["0.750", "0.450", "0.650"]
    assert rows["KL to the dense model"] == ["", "0.9 (0.88 to 0.92)", "0.3 (0.28 to 0.32)"]


def test_sections_without_data_are_left_out() -> None:
    page = run_page(make_record(plans=[], warnings=[], costs=[], recovery={}))
    read_page(page)
    assert headings(page) == ["Before and after", "Where this comes from"]


def test_a_page_drawn_from_the_file_equals_the_first(tmp_path) -> None:
    write_report(tmp_path, make_examined_record())
    first = (tmp_path / "report.html").read_text(encoding="utf-8")
    again = RunRecord.from_dict(json.loads((tmp_path / "report.json").read_text()))
    assert run_page(again) == first
    for fact in ("2026-01-02 03:04 UTC", "prunelight fit --config quickstart.yaml", "sample:train"):
        assert fact in first


@pytest.mark.parametrize(
    "record",
    [
        make_record(),
        make_record(plans=[]),
        make_record(stages=make_record().stages[:1]),
        make_sparse_record(),
        make_sparse_record(MIXED),
        make_sparse_record(make_sparse([0.5] * 60)),
        make_record(plans=[make_plan(), make_plan(method="Other")]),
        make_record(plans=[make_plan(scores={})]),
        make_record(recovery={"mode": "none"}, loads_in={"vLLM": "yes"}),
        make_record(stages=[replace(s, perplexity=math.inf) for s in make_record().stages]),
        make_record(sections={"Training": "| a | b |\n|---|---|\n| 1 | <b> |"}),
        make_record(forward_seconds=math.nan),
    ],
    ids=lambda record: f"{len(record.plans)} plans, {len(record.stages)} stages",
)
def test_odd_runs_have_a_page_too(record) -> None:
    read_page(run_page(RunRecord.from_dict(record.to_dict())))


def test_older_and_emptier_answers_leave_gaps() -> None:
    record = make_examined_record()
    odd = [
        {},
        {
            "tasks": {"arc_easy": {"value": 0.5}, "bad": 3},
            "samples": [3, {"text": "x"}],
            "serving": {},
        },
        {"tasks": 3, "divergence": {"kl": 0.3}, "samples": None, "serving": {}},
    ]
    stages = [replace(s, examined=x) for s, x in zip(record.stages, odd, strict=True)]
    reader = read_page(run_page(replace(record, stages=stages)))
    assert "0.500" in reader.text
    assert ["mean KL to the dense model (nats)", "0.3"] in [row for t in reader.tables for row in t]


# --- the verdict


def test_the_verdict_says_what_was_done_what_it_costs_and_what_is_unknown() -> None:
    first, done, *others = verdict_of(make_record())
    assert first == (
        "ShortGPT made org/tiny 15.8 % smaller (134.5M → 113.3M parameters); on held-out text it "
        "is clearly worse than the dense model (perplexity 20 → 25, 1.25 times)."
    )
    assert done == (
        "What was done: ShortGPT: 3 of 10 decoder layers removed (30.00 %); then recovered by LoRA "
        "on 1,000 tokens."
    )
    text = " ".join(others)
    assert "prefill 1.24 times as fast (1.2 to 1.3); decode no difference beyond noise" in text
    assert "Not measured: zero-shot tasks, collapse probes" in text
    assert "Perplexity alone can hide a collapse." in text


def test_the_verdict_on_zeros_says_that_they_are_zeros() -> None:
    first = verdict_of(make_sparse_record())[0]
    assert first.startswith("DLP set 70.0 % of the decoder weights to zero in org/tiny; ")
    assert verdict_of(make_sparse_record(stages=make_record().stages[:1]))[0].endswith("as it is.")


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (0.9, "better"),
        (1.0, "as good as"),
        (1.05, "slightly"),
        (1.3, "clearly"),
        (2, "much"),
        (9, "far"),
        (math.inf, "unusable"),
        (math.nan, "unusable"),
    ],
)
def test_a_ratio_of_perplexities_has_its_word(ratio, words) -> None:
    assert words in grade(ratio)
    assert [limit for limit, _ in GRADES] == sorted(limit for limit, _ in GRADES)


def test_an_interval_around_one_is_a_tie_on_text() -> None:
    record = make_examined_record()
    last = record.stages[-1]
    close = last.examined["divergence"] | {
        "ln_perplexity_ratio": {"value": 0.01, "low": -0.02, "high": 0.04}
    }
    stages = [*record.stages[:2], replace(last, examined=last.examined | {"divergence": close})]
    assert "it is a tie with the dense model" in verdict_of(replace(record, stages=stages))[0]


def test_the_verdict_names_probes_that_collapsed() -> None:
    record = make_examined_record()
    assert "no collapse in the 1 probe that" in " ".join(verdict_of(record))
    fallen = " ".join(verdict_of(replace(record, stages=record.stages[:2])))
    assert "Collapse: it no longer does what" in fallen
    assert "adds two numbers of two digits" in fallen
    assert "Not measured" not in fallen


def test_a_speed_within_noise_is_called_no_difference_whatever_its_median() -> None:
    record = make_examined_record()
    last = record.stages[-1]
    rate = {"measured": [0.63, 0.5, 1.1], "ideal": 1.19}
    found = last.examined["serving"] | {"ratios": {"1": {"decode_tokens_per_second": rate}}}
    stages = [*record.stages[:2], replace(last, examined=last.examined | {"serving": found})]
    text = " ".join(verdict_of(replace(record, stages=stages)))
    assert "decode, batch 1 no difference beyond noise" in text
    assert "Decoding is 1.24" not in text


# --- tasks: flips and ties


def test_flips_are_counted_between_equal_questions_only() -> None:
    dense, pruned, _ = make_examined_record().stages
    assert flips_of(dense, pruned, "arc_easy") == (30, 0, 100)
    assert not is_tie(dense, pruned, "arc_easy")
    other = replace(
        pruned,
        examined={
            "tasks": {"arc_easy": {**pruned.examined["tasks"]["arc_easy"], "fingerprint": "q2"}}
        },
    )
    assert flips_of(dense, other, "arc_easy") is None


def test_flips_that_were_recorded_are_taken() -> None:
    dense, pruned, _ = make_examined_record().stages
    told = {"arc_easy": {"right_to_wrong": 5, "wrong_to_right": 4, "num_questions": 50}}
    recorded = replace(pruned, examined=pruned.examined | {"flips": told})
    assert flips_of(dense, recorded, "arc_easy") == (5, 4, 50)
    assert is_tie(dense, recorded, "arc_easy")


def test_without_answers_a_difference_within_its_error_is_a_tie() -> None:
    dense = make_examined_record().stages[0]
    tasks = [{"t": {"value": value, "stderr": 0.02}} for value in (0.50, 0.46, 0.40)]
    first, close, far = (replace(dense, examined={"tasks": x}) for x in tasks)
    assert is_tie(first, close, "t")
    assert not is_tie(first, far, "t")
    assert task_grid([first, far]).rows[0][-1] == "differs"
    assert task_grid([first]).head == ["task", "dense"]


# --- the cut


def test_the_cut_lies_between_what_goes_and_what_stays() -> None:
    assert cut_of([0.9, 0.1, 0.2, 0.4], [1, 2], high_goes=False) == pytest.approx(0.3)
    assert cut_of([0.9, 0.1, 0.2, 0.4], [0], high_goes=True) == pytest.approx(0.65)
    assert cut_of([0.9, 0.1, 0.2, 0.4], [1, 3], high_goes=False) is None
    assert cut_of([math.nan, 0.1], [], high_goes=False) is None


def test_the_chart_of_scores_has_the_cut_and_says_what_low_means() -> None:
    plan = make_plan(
        scores={"block_influence": [0.9, 0.3, 0.2, 0.2, 0.1, 0.03, 0.04, 0.1, 0.05, 0.3]}
    )
    text = read_page(run_page(make_record(plans=[plan]))).text
    assert "Low means that the layer changes little, so it can go." in text
    assert "The line is the cut: layers below it go." in text
    assert "lowest 0.03 at layer 5, highest 0.9 at layer 0; gone: 5, 6, 8" in text


# --- Markdown


def test_a_bar_in_a_cell_is_escaped_once() -> None:
    assert markdown_table(["a"], [["x|y"], [r"x\|y"], ["x\ny"]]).splitlines()[2:] == [
        r"| x\|y |",
        r"| x\|y |",
        "| x y |",
    ]


def test_the_markdown_has_the_same_figures_in_short(tmp_path) -> None:
    text = markdown(tmp_path, make_examined_record())
    for line in (
        "## Tasks",
        "| arc_easy (acc_norm, 0-shot, 100 questions) | 0.800 ± 0.020 | 0.500 ± 0.020 |",
        "10 / 0 of 100 | differs |",
        "| adds two numbers of two digits | 16 of 20 | 10 of 20 | 14 of 20 | kept |",
        "| same most likely token | 0.71 (0.7 to 0.72) | 0.71 (0.7 to 0.72) |",
        "| batch 1: decode tokens/s | 20 (19 to 21) | 24.8 (23.6 to 26) | 24.8 (23.6 to 26) |",
        "After `2 + 2 =`:",
        "- dense: `4`",
        "- command: prunelight fit --config quickstart.yaml",
    ):
        assert line in text
    assert f"``Once {HOSTILE}``" in text or f"`` Once {HOSTILE} ``" in text
