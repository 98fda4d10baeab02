"""The report: what it says must be what was recorded, and it must survive odd runs."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_records import (
    MIXED,
    PNG,
    PROJECTIONS,
    REMOVED,
    UNSTRUCTURED,
    make_plan,
    make_record,
    make_sparse,
    make_sparse_record,
    markdown,
    printed,
    table_rows,
)

from prunelight.evaluation.report import report
from prunelight.evaluation.report.plan_facts import PlanFacts
from prunelight.evaluation.report.record import Cost, RunRecord
from prunelight.evaluation.report.report import write_report
from prunelight.planning.steps import Sparsify


def test_a_non_finite_perplexity_is_shown_as_it_is_and_without_a_change() -> None:
    dense, pruned, _ = make_record().stages
    text = printed(make_record(stages=[dense, replace(pruned, perplexity=math.inf)]))
    row = next(line for line in text.splitlines() if "perplexity" in line)
    assert row.split("│")[3].strip() == "inf"


def test_the_table_shows_figures_and_changes_against_dense() -> None:
    text = printed(make_record())
    for cell in (
        "10 ",
        "7 (-30.0 %)",
        "134.5M",
        "113.3M (-15.8 %)",
        "226.6 (-15.8 %)",
        "25 (+25.0 %)",
        "0.4500 (-10.0 %)",
        "1,240 (\u00d71.24, 1.2 to 1.3)",
        "no difference",  # 1 lies within its rounds
    ):
        assert cell in text
    assert "300 (\u00d715)" in text  # +1400 % would be harder to read
    assert "score and plan (reused): 2.2 s (1.1 F), peak 6e-07 GB (2 checkpoints)" in text
    assert "recovery: 30 s (15 F), peak 9e-07 GB (3 checkpoints)" in text


def test_the_costs_of_this_start_are_summed_without_what_earlier_ones_took(tmp_path: Path) -> None:
    costs = [
        Cost("score and plan", 50.0, 25.0, 10**9, reused=True),
        Cost("recover", 300.0, 150.0, 3 * 10**9, earlier_seconds=120.0),
        Cost("write the report", 0.6, 0.3, 2 * 10**9),
    ]
    text = markdown(tmp_path, make_record(costs=costs))
    assert "| recover (2 min of it in earlier starts) | 5 min | 150 | 3 GB |" in text
    assert "| this start, all in all | 3.01 min | 90.3 | 3 GB |" in text
    assert "write the report" not in printed(make_record(costs=costs))  # under 1 %


def test_speeds_that_were_not_measured_in_turn_are_not_compared(tmp_path: Path) -> None:
    text = markdown(tmp_path, make_record(stages=make_record().stages[:2]))
    assert "| prefill tokens/s | 1,000 | 1,240 |" in text
    assert "in turn" not in text


def test_the_table_fits_into_100_columns_and_keeps_brackets_of_names() -> None:
    text = printed(make_record(model="runs/[bold]tiny"))
    assert "runs/[bold]tiny" in text
    assert "…" not in text


def test_the_table_of_an_unchanged_model_says_plus_zero() -> None:
    dense = make_record().stages[0]
    text = printed(make_record(stages=[dense, replace(dense, name="pruned", perplexity=19.9999)]))
    assert "10 (+0.0 %)" in text
    assert "-0.0 %" not in text


def test_a_cost_without_a_known_unit_is_marked(tmp_path: Path) -> None:
    costs = [Cost("recovery", 30.0, math.nan, 900)]
    record = make_record(costs=costs, forward_seconds=math.nan)
    assert "recovery: 30 s (? F)" in printed(record)
    assert "through the dense model. Peak" in markdown(tmp_path, record)


def test_the_report_names_every_file_it_wrote(tmp_path: Path) -> None:
    written = write_report(tmp_path / "new" / "run", make_record())
    assert [path.name for path in written] == [
        "report.json",
        "layers.png",
        "report.html",
        "report.md",
    ]
    assert sorted(written) == sorted((tmp_path / "new" / "run").iterdir())


def test_the_markdown_marks_each_removed_layer_with_its_scores(tmp_path: Path) -> None:
    text = markdown(tmp_path, make_record())
    for layer in REMOVED:
        assert re.search(rf"\| {layer} \| .* \| \*\*removed\*\* \|", text)
    assert text.count("**removed**") == len(REMOVED)
    assert "layers: [5, 6, 8]" in text
    assert "| 9 | 0.3 | 0.7654 | kept |" in text


def test_the_markdown_puts_the_true_share_beside_the_nominal_ratio(tmp_path: Path) -> None:
    text = markdown(tmp_path, make_record())
    assert "Nominal ratio: 3 of 10 decoder layers removed (30.00 %)" in text
    assert "True share of all parameters removed: 15.76 %" in text


def test_the_markdown_holds_all_that_was_recorded(tmp_path: Path) -> None:
    text = markdown(tmp_path, make_record())
    for phrase in (
        "perplexity 20 -> 25 (+25.0 %)",
        "> - Only 8 windows were measured.",
        "| recovery | 30 s | 15 | 9e-07 GB | 3 | 30 |",
        "F is one forward of the calibration set through the dense model (2 s here).",
        "- tokens seen: 1000",
        "- text: held-out text",
        "- final: reloaded, logits equal",
        'AutoModelForCausalLM.from_pretrained("final")',
        "- torch: 2.13",
        "![scores of the decoder layers](layers.png)",
    ):
        assert phrase in text


def test_a_report_of_removed_layers_knows_nothing_of_zeros(tmp_path: Path) -> None:
    record = make_record()
    record.stages[1] = replace(record.stages[1], sparsity=0.1, linear_sparsity=0.1)
    text = printed(record) + markdown(tmp_path, record)
    assert "zero" not in text
    assert "sparsity" not in text
    assert "True share of all parameters removed: 15.76 %\n" in text
    assert "| layer | block influence | block influence first token | fate |" in text


def test_the_table_shows_zeros_in_percent_and_no_change(tmp_path: Path) -> None:
    record = make_sparse_record()
    rows = {row[0]: row[1:] for row in table_rows(markdown(tmp_path, record))}
    assert rows["zeros in decoder linears"] == ["0.00 %", "69.97 %", "69.97 %"]
    assert rows["zeros in all parameters"] == ["0.00 %", "55.20 %", "55.20 %"]
    assert "69.97 %" in printed(record)
    assert "55.20 %" in printed(record)


def test_a_sparse_report_says_what_was_asked_and_what_came_of_it(tmp_path: Path) -> None:
    text = markdown(tmp_path, make_sparse_record())
    for phrase in (
        "zeros in decoder linears 0.00 % -> 69.97 %",
        "- Nominal ratio: 70.00 % of the weights of decoder linears\n",
        "True share of all parameters removed: 0.00 %; zeros among all parameters: 55.20 %\n",
        "- solver: wanda\n- matrices: 210\n",
        "- sparsity of decoder layers: 54.86 % to 84.90 %\n",  # 316 and 489 of 576
        "- Layer 3 saw 500 tokens, fewer than the 1,536 inputs of down_proj.",
        "- alpha: 0.15",
        "| layer | median | sparsity | reconstruction error |\n",
        "| 29 | 0.3 | 84.90 % | 0.31 |\n",
    ):
        assert phrase in text
    assert "q_proj" not in text
    assert "dampening" not in text
    assert max(map(len, text.splitlines())) < 300


def test_a_report_of_mixed_patterns_names_the_average_and_each_layer(tmp_path: Path) -> None:
    text = markdown(tmp_path, make_sparse_record(MIXED))
    for phrase in (
        "Nominal ratio: 75.00 % of the weights of decoder linears (2:8 pattern on average)",
        "2:8 zeros are stored",
        "| 0 | 0.01 | 62.50 % | 0.02 |",
        "| 29 | 0.3 | 87.50 % | 0.31 |",
    ):
        assert phrase in text


def test_one_pattern_for_all_layers_is_no_average() -> None:
    told = PlanFacts(make_sparse([0.5] * 4, pattern="2:4")[0]).nominal()
    assert told == "50.00 % of the weights of decoder linears (2:4 pattern)"


@pytest.mark.parametrize("made", [UNSTRUCTURED, MIXED])
def test_one_sentence_says_that_zeros_alone_give_no_speed(tmp_path: Path, made: tuple) -> None:
    text = markdown(tmp_path, make_sparse_record(made))
    found = re.findall(r"[^.\n]*do not by themselves make inference faster[^.\n]*\.", text)
    assert len(found) == 1
    assert found[0].endswith("or the files smaller: speed comes from depth, width and slicing.")


def test_options_of_the_solver_are_told_with_its_step(tmp_path: Path) -> None:
    plan, outcome = make_sparse([0.7] * 4)
    plan["steps"][0] |= {"solver": "sparsegpt", "options": {"dampening": 0.01, "block_size": 128}}
    text = markdown(tmp_path, make_sparse_record((plan, outcome)))
    assert "- solver: sparsegpt" in text
    assert "- dampening: 0.01\n- block size: 128\n- Layer 3 saw" in text


def test_a_schedule_is_told_in_one_sentence(tmp_path: Path) -> None:
    plan, _ = make_sparse([0.7] * 4)
    schedule = {"start_step": 10, "end_step": 500, "every": 20, "curve": "cubic"}
    plan["arguments"]["schedule"] = schedule
    text = markdown(tmp_path, make_sparse_record((plan, {}), outcomes=[]))
    sentence = "Sparsity rises from step 10 to step 500 every 20 steps along a cubic curve."
    assert text.count(sentence) == 1
    assert "schedule" not in text.replace("scheduler", "")


def test_without_a_schedule_none_is_told(tmp_path: Path) -> None:
    plan, outcome = make_sparse([0.7] * 4)
    plan["arguments"]["schedule"] = None
    assert "Sparsity rises" not in markdown(tmp_path, make_sparse_record((plan, outcome)))


def test_outcomes_go_to_their_steps_over_several_plans(tmp_path: Path) -> None:
    (first, told), (second, other) = make_sparse([0.5] * 4), make_sparse([0.7] * 4)
    other["notes"] = ["The second note."]
    record = make_sparse_record(plans=[first, make_plan(), second], outcomes=[told, other])
    text = markdown(tmp_path, record)
    parts = re.split(r"\n## (?:DLP|ShortGPT)", text)
    assert "Layer 3 saw" in parts[1]
    assert "note" not in parts[2]
    assert "The second note." in parts[3]
    assert "[scores of the decoder layers](layers-3.png)" in parts[3]
    assert "3 of 10 decoder layers removed (30.00 %) + " in text


def test_a_gradual_step_does_not_take_the_outcome_of_another(tmp_path: Path) -> None:
    (gradual, _), (second, told) = make_sparse([0.5] * 4), make_sparse([0.7] * 4)
    schedule = {"start_step": 10, "end_step": 500, "every": 20, "curve": "cubic"}
    gradual["arguments"]["schedule"] = schedule
    text = markdown(tmp_path, make_sparse_record(plans=[gradual, second], outcomes=[told]))
    first, last = text.split("\n## DLP")[1:]
    assert "Layer 3 saw" not in first
    assert "Layer 3 saw" in last


def test_layers_removed_and_made_sparse_by_one_plan_are_told_apart(tmp_path: Path) -> None:
    plan, outcome = make_sparse([0.5, 0.6, 0.7, 0.8])
    plan["steps"].insert(0, {"kind": "remove_layers", "layers": [1]})
    # Layers of an outcome are those that were left: 0, 2 and 3.
    outcome = {
        "sparsity": {
            f"model.layers.{new}.{name}": share
            for new, share in enumerate([0.49, 0.69, 0.79])
            for name in PROJECTIONS
        },
        "layer_sparsity": [0.49, 0.69, 0.79],
        "reconstruction_error": [0.1, 0.2, 0.3],
        "notes": [],
    }
    text = markdown(tmp_path, make_sparse_record((plan, outcome)))
    assert "| layer | median | sparsity | reconstruction error | fate |" in text
    assert "| 1 | 0.02 |  | nan | **removed** |" in text
    assert "| 3 | 0.04 | 79.00 % | 0.3 | kept |" in text


def test_projections_of_one_name_are_told_apart_and_experts_are_averaged() -> None:
    shares = {
        "transformer.h.0.attn.c_proj": 0.5,
        "transformer.h.0.mlp.c_proj": 0.6,
        "transformer.h.1.mlp.experts.0.w1": 0.7,
        "transformer.h.1.mlp.experts.1.w1": 0.8,
    }
    plan, _ = make_sparse([0.0, 0.0])
    plan["scores"], plan["steps"][0]["sparsity"] = {}, shares
    facts = PlanFacts(plan)
    zeros = facts.layer_zeros(facts.steps_of(Sparsify)[0], {})
    assert list(zeros.projections) == ["attn.c_proj", "mlp.c_proj", "mlp.experts.w1"]
    assert zeros.projections["mlp.c_proj"] == pytest.approx([0.6, math.nan], nan_ok=True)
    assert zeros.projections["mlp.experts.w1"] == pytest.approx([math.nan, 0.75], nan_ok=True)
    assert all(map(math.isnan, zeros.layers))  # the plan does not say


def test_a_run_without_plans_recovery_or_model_is_reported(tmp_path: Path) -> None:
    record = make_record(
        plans=[], stages=make_record().stages[:1], costs=[], recovery={}, verification={}
    )
    assert "No pruning: org/tiny" in printed(record)
    text = markdown(tmp_path, record)
    assert "No pruning, dense -> dense: layers 10 -> 10, parameters 134.5M -> 134.5M, " in text
    assert "None: the weights were not trained after pruning." in text
    assert "No model was saved." in text
    assert "from_pretrained" not in text
    assert not list(tmp_path.glob("*.png"))


def test_an_infinite_reconstruction_error_is_reported(tmp_path: Path) -> None:
    plan, outcome = make_sparse([0.5, 0.0, 0.7, 0.999])
    outcome["reconstruction_error"] = [math.nan, math.inf, 0.1, -0.0]
    text = markdown(tmp_path, make_sparse_record((plan, outcome)))
    assert "| 1 | 0.02 | 0.00 % | inf |" in text
    assert (tmp_path / "layers.png").exists()


def test_a_step_without_matrices_is_reported(tmp_path: Path) -> None:
    plan, _ = make_sparse([0.5, 0.5])
    plan["steps"][0]["sparsity"] = {}
    text = markdown(tmp_path, make_sparse_record((plan, {})))
    assert "- matrices: 0\n" in text


def test_when_drawing_fails_the_record_is_safe_and_nothing_is_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(self: Any, path: Path, **options: Any) -> None:
        Path(path).write_bytes(PNG)
        raise OSError("no space left")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", disk_full)
    with pytest.raises(OSError, match="no space left"):
        write_report(tmp_path, make_record())
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    data = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert RunRecord.from_dict(data) == make_record()


def test_an_error_leaves_the_earlier_report_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = markdown(tmp_path, make_record())
    monkeypatch.setattr(report, "_markdown", lambda record, sections: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(tmp_path, make_record(model="org/other"))
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == before
    assert not list(tmp_path.glob(".*"))


def test_report_and_plots_need_neither_torch_nor_lightning_nor_matplotlib() -> None:
    directory = str(Path(report.__file__).parents[2])
    code = (
        "import sys, types\n"
        "package = types.ModuleType('prunelight')\n"  # the package itself imports all of it
        f"package.__path__ = [{directory!r}]\n"
        "sys.modules['prunelight'] = package\n"
        "import prunelight.evaluation.report.report\n"
        "assert 'prunelight.evaluation.report.layer_plots' in sys.modules\n"
        "assert not {'torch', 'lightning', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def with_steps(*steps: dict[str, Any], **changes: Any) -> RunRecord:
    return make_record(plans=[{**make_plan(), "steps": list(steps), **changes}])


def test_merged_and_dropped_layers_are_told_by_their_fate(tmp_path: Path) -> None:
    num_layers = make_plan()["model"]["num_hidden_layers"]
    record = with_steps(
        {"kind": "remove_layers", "layers": [9]},
        {"kind": "merge_layers", "groups": [[3, 4, 5]], "merge": "top"},
        {"kind": "drop_sublayers", "attention": [7, 8], "mlp": [8]},
        found={"threshold": 0.51234567, "cka": [[1.0] * 4] * 4},
    )
    write_report(tmp_path, record)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for told in (
        f"1 of {num_layers} decoder layers removed",
        f"2 of {num_layers} decoder layers merged away",
        f"2 of {num_layers} attentions dropped",
        f"1 of {num_layers} MLPs dropped",
        "| **removed** |",
        "| **merged into 5** |",
        "| without **attention** |",
        "| without **attention** **mlp** |",
        "- threshold: 0.5123",
        "import prunelight  # its class",
        "merged windows outlined](cka-2.png)",
    ):
        assert told in text, told
    assert "[1.0, 1.0" not in text, "the whole CKA map stands in the text"
    assert (tmp_path / "cka-2.png").read_bytes()[:4] == PNG[:4]


@pytest.mark.parametrize("by_hand", [False, True])  # layers by hand have no scores to draw
def test_a_heal_step_tells_of_each_layer_what_became_of_it(tmp_path: Path, by_hand: bool) -> None:
    record = with_steps(
        {"kind": "remove_layers", "layers": [3]},
        {"kind": "heal", "layers": [2, 5], "mode": "linear", "ridges": [0.1, 1.0]},
        **({"scores": {}} if by_hand else {}),
    )
    outcome = {
        "healed": ["model.layers.2.mlp.down_proj"],
        "ridge": [0.1, 0.0],
        "error_before": [0.125, 0.0312],
        "error_after": [0.0651, 0.0312],
        "notes": ["calibrate on more text"],
    }
    write_report(tmp_path, replace(record, outcomes=[outcome]))
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text(encoding="utf-8").replace("&gt;", ">")
        assert "layer 2: error 0.125 -> 0.0651 (ridge 0.1)" in text
        assert "layer 5: error 0.0312, old weights kept" in text
        assert "calibrate on more text" in text
        assert "calibration windows that were held out" in text


def test_a_width_step_tells_how_many_of_how_many(tmp_path: Path) -> None:
    record = with_steps(
        {
            "kind": "prune_width",
            "heads": {},
            "neurons": {str(i): [1, 2, 3] for i in range(10)},
            "correction": True,
        },
        found={"intermediate_size": 3, "intermediate_size_before": 8},
    )
    write_report(tmp_path, record)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "3 of 8 neurons kept in every layer" in text
    assert "[1, 2, 3]" not in text
    assert "import prunelight" not in text


def test_a_model_that_already_had_a_class_of_ours_is_loaded_with_it(tmp_path: Path) -> None:
    model = {**make_plan()["model"], "model_type": "prunelight_llama"}
    text = markdown(tmp_path, make_record(plans=[make_plan(model=model)]))
    assert "import prunelight  # its class" in text


def test_latency_is_told_with_its_deviation_where_it_was_measured(tmp_path: Path) -> None:
    stages = [
        replace(make_record().stages[0], latency_seconds=2.0, latency_deviation=0.1, throughput=64),
        replace(
            make_record().stages[1],
            latency_seconds=1.0,
            latency_deviation=0.2,
            factors={"latency_seconds": [0.5, 0.45, 0.6]},
        ),
        make_record().stages[2],
    ]
    write_report(tmp_path, make_record(stages=stages))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| latency (s) | 2.000 ± 0.100 | 1.000 ± 0.200 (\u00d70.5, 0.45 to 0.6) |  |" in text
    assert "| throughput (tokens/s) | 64 |  |  |" in text
    write_report(tmp_path, make_record())
    assert "latency" not in (tmp_path / "report.md").read_text(encoding="utf-8")
