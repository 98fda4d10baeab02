"""The report: what it says must be what was recorded, and it must survive odd runs."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from prunelight import report
from prunelight.report import Cost, RunRecord, Stage, plot_layers, summary_table, write_report

PNG = b"\x89PNG\r\n\x1a\n"
REMOVED = [5, 6, 8]


def make_plan(**changes: Any) -> dict[str, Any]:
    plan = {
        "format": 1,
        "method": "ShortGPT",
        "arguments": {"num_layers": 3},
        "model": {"name": "org/tiny", "model_type": "llama", "num_hidden_layers": 10},
        "calibration": {"num_samples": 4, "seq_len": 64, "seed": 0},
        "scores": {
            "block_influence": [0.9, 0.3, 0.2, 0.2, 0.1, 0.03, 0.04, 0.1, 0.05, 0.3],
            "block_influence_first_token": [0.8, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.7654],
        },
        "versions": {},
        "steps": [{"kind": "remove_layers", "layers": REMOVED}],
    }
    return plan | changes


def make_record(**changes: Any) -> RunRecord:
    values: dict[str, Any] = {
        "model": "org/tiny",
        "device": "cpu (test)",
        "dtype": "float32",
        "fingerprint": "abc123",
        "plans": [make_plan()],
        "stages": [
            Stage("dense", 10, 134_500_000, 269_000_000, 20.0, 0.5, 1000.0, 20.0),
            Stage("pruned", 7, 113_300_000, 226_600_000, 300.0, 0.25, 1240.0, 25.0),
            Stage("recovered", 7, 113_300_000, 226_600_000, 25.0, 0.45, 1240.0, 25.0),
        ],
        "costs": [
            Cost("score and plan", 2.2, 1.1, 600, reused=True),
            Cost("recovery", 30.0, 15.0, 900),
        ],
        "checkpoint_bytes": 300,
        "layer_bytes": 30,
        "recovery": {"mode": "lora", "r": 8, "tokens_seen": 1000},
        "evaluation": {"text": "held-out text", "windows": 8},
        "verification": {"pruned-abc123": "logits equal", "final": "reloaded, logits equal"},
        "versions": {"torch": "2.13"},
        "warnings": ["Only 8 windows were measured."],
        "forward_seconds": 2.0,
    }
    return RunRecord(**(values | changes))


def printed(record: RunRecord) -> str:
    console = Console(width=100, file=io.StringIO())
    console.print(summary_table(record))
    return console.file.getvalue()


def markdown(directory: Path, record: RunRecord) -> str:
    write_report(directory, record)
    return (directory / "report.md").read_text(encoding="utf-8")


def test_a_record_survives_the_way_through_json() -> None:
    record = make_record()
    assert RunRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_survive_in_valid_json(tmp_path: Path, value: float) -> None:
    stages = [make_record().stages[0], replace(make_record().stages[1], perplexity=value)]
    plan = make_plan(scores={"block_influence": [value] + [0.1] * 9})
    record = make_record(stages=stages, plans=[plan], evaluation={"worst": [value, "NaN-free"]})
    write_report(tmp_path, record)
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    data = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    again = RunRecord.from_dict(data)
    assert repr(again) == repr(record)  # repr, since NaN is not equal to itself


def test_a_non_finite_perplexity_is_shown_as_it_is_and_without_a_change() -> None:
    dense, pruned, _ = make_record().stages
    text = printed(make_record(stages=[dense, replace(pruned, perplexity=math.inf)]))
    row = next(line for line in text.splitlines() if "perplexity" in line)
    assert row.split("│")[3].strip() == "inf"


def test_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match=r"report format=2 must be 1; read it with the version"):
        RunRecord.from_dict(make_record().to_dict() | {"format": 2})


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
        "1,240 (\u00d71.24)",
        "25 (\u00d71.25)",
    ):
        assert cell in text
    assert "300 (\u00d715)" in text  # +1400 % would be harder to read
    assert "score and plan (reused): 1.1 F, peak 2 checkpoints" in text
    assert "recovery: 15 F, peak 3 checkpoints" in text


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
    assert "recovery: ? F" in printed(record)
    assert "through the dense model. Peak" in markdown(tmp_path, record)


def test_without_a_dense_stage_no_change_is_claimed() -> None:
    text = printed(make_record(stages=make_record().stages[1:]))
    assert "%" not in text
    assert "\u00d7" not in text


def test_the_report_names_every_file_it_wrote(tmp_path: Path) -> None:
    written = write_report(tmp_path / "new" / "run", make_record())
    assert [path.name for path in written] == ["report.json", "layers.png", "report.md"]
    assert sorted(written) == sorted((tmp_path / "new" / "run").iterdir())


def test_the_markdown_marks_each_removed_layer_with_its_scores(tmp_path: Path) -> None:
    text = markdown(tmp_path, make_record())
    for layer in REMOVED:
        assert f"| **{layer}** |" in text
    assert text.count("**removed**") == len(REMOVED)
    assert "layers: [5, 6, 8]" in text
    assert "| 9 | 0.3 | 0.7654 | kept |" in text


def test_the_markdown_puts_the_true_share_beside_the_nominal_ratio(tmp_path: Path) -> None:
    text = markdown(tmp_path, make_record())
    assert "Nominal ratio: 3 of 10 decoder layers removed (30.0 %)" in text
    assert "True share of all parameters removed: 15.8 %" in text


def test_the_markdown_holds_all_that_was_recorded(tmp_path: Path) -> None:
    text = markdown(tmp_path, make_record())
    for phrase in (
        "perplexity 20 -> 25 (+25.0 %)",
        "> - Only 8 windows were measured.",
        "| recovery | 15 | 3 | 30 | 30 |",
        "F is one forward of the calibration set through the dense model (2 s here).",
        "- tokens seen: 1000",
        "- text: held-out text",
        "- final: reloaded, logits equal",
        'AutoModelForCausalLM.from_pretrained("final")',
        "- torch: 2.13",
        "![scores of the decoder layers](layers.png)",
    ):
        assert phrase in text


def test_merged_and_dropped_layers_are_told_apart(tmp_path: Path) -> None:
    steps = [
        {"kind": "merge_layers", "groups": [[1, 2], [5, 6, 7]], "merge": "top"},
        {"kind": "drop_sublayers", "attention": [3], "mlp": [3, 4]},
    ]
    text = markdown(tmp_path, make_record(plans=[make_plan(steps=steps)]))
    assert text.count("**merged into 7**") == 2
    assert "**merged into 2**" in text
    assert "**no attention, no mlp**" in text
    assert "3 of 10 decoder layers removed" in text


def test_a_sparse_plan_reports_its_sparsity_and_promises_no_speed(tmp_path: Path) -> None:
    sparsity = {f"model.layers.{i}.self_attn.q_proj": 0.5 for i in range(10)}
    steps = [{"kind": "sparsify", "sparsity": sparsity, "solver": "wanda", "pattern": None}]
    plan = make_plan(method="DLP", arguments={"sparsity": 0.5}, steps=steps)
    text = markdown(tmp_path, make_record(plans=[plan]))
    assert "Nominal ratio: sparsity 0.5" in text
    assert "neither smaller nor faster" in text


def test_pages_of_numbers_are_left_to_the_json(tmp_path: Path) -> None:
    sparsity = {f"model.layers.{i}.self_attn.q_proj": 0.5 for i in range(200)}
    steps = [{"kind": "sparsify", "sparsity": sparsity, "solver": "wanda", "pattern": None}]
    text = markdown(tmp_path, make_record(plans=[make_plan(steps=steps)]))
    assert "(in report.json)" in text
    assert max(map(len, text.splitlines())) < 600


def test_a_run_without_plans_recovery_or_model_is_reported(tmp_path: Path) -> None:
    record = make_record(
        plans=[], stages=make_record().stages[:1], costs=[], recovery={}, verification={}
    )
    assert "No pruning: org/tiny" in printed(record)
    text = markdown(tmp_path, record)
    assert "The dense model: layers 10, parameters 134.5M, perplexity 20" in text
    assert "None: the weights were not trained after pruning." in text
    assert "No model was saved." in text
    assert "from_pretrained" not in text
    assert not list(tmp_path.glob("*.png"))


def test_a_run_without_measurements_is_reported(tmp_path: Path) -> None:
    assert "Nothing was measured." in markdown(tmp_path, make_record(stages=[]))


def test_each_plan_with_scores_gets_its_own_picture(tmp_path: Path) -> None:
    plans = [make_plan(scores={}), make_plan(), make_plan(method="Second")]
    names = [path.name for path in write_report(tmp_path, make_record(plans=plans))]
    assert names == ["report.json", "layers.png", "layers-2.png", "report.md"]
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.index("(layers.png)") < text.index("## Second") < text.index("(layers-2.png)")


@pytest.mark.parametrize(
    "scores",
    [
        {"block_influence": [0.9, 0.01, *[0.1] * 8]},  # a log scale
        {"angular_distance": [0.4] * 8},  # one entry a window of three
        {"angular_distance": [0.4] * 2},  # windows so long that none starts at a removed layer
        {"residual_energy": [0.4] * 21},  # longer than the model
        {"block_influence": [None, math.nan, 0.0, -0.1, *[1] * 6]},
        {"block_influence": [math.nan] * 10},
    ],
)
def test_the_picture_is_drawn_for_any_list_of_scores(tmp_path: Path, scores: dict) -> None:
    path = tmp_path / "picture.png"
    plot_layers(make_plan(scores=scores), path)
    data = path.read_bytes()
    assert data.startswith(PNG)
    assert len(data) > 5000
    assert list(tmp_path.iterdir()) == [path]


def test_a_plan_without_a_list_of_scores_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold a list of numbers.*; skip the picture"):
        plot_layers(make_plan(scores={"total": 3.0}), tmp_path / "picture.png")
    assert not list(tmp_path.iterdir())


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


def test_the_module_alone_imports_neither_torch_nor_lightning_nor_matplotlib() -> None:
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('report', {report.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules['report'] = module\n"
        "spec.loader.exec_module(module)\n"
        "assert not {'torch', 'lightning', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
