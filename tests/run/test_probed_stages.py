"""A fit's report has probes, samples and divergence of each stage; it warns of hidden collapse."""

import json

import pytest
from probed_models import knowing_model
from runs import make_data, make_module, make_trainer, write_model

from prunelight.callbacks import ShortGPT
from prunelight.evaluation.probes.examiner import probe_results
from prunelight.evaluation.quality.reference_logits import ReferenceLogits
from prunelight.run.run_state import DENSE_PREDICTIONS

ASKED = {"probes", "samples", "divergence"}


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


def fit(name, root, *callbacks, data=(), **arguments):
    module = make_module(name, **{"probes": True, **arguments})
    make_trainer(root, *callbacks).fit(module, make_data(name, root, **dict(data)))
    return module.record


def test_a_fit_that_forgets_what_perplexity_does_not_ask_warns_in_its_report(tmp_path):
    model, tokenizer = knowing_model()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    name, root = str(tmp_path / "model"), tmp_path / "run"
    root.mkdir()
    record = fit(name, root, recovery="full", learning_rate=1e-2)
    dense, recovered = record.stages
    assert recovered.perplexity < 1.5 * dense.perplexity, "perplexity says that all is well"
    told = json.loads((root / "report.json").read_text())["warnings"]
    (warning,) = [text for text in told if "the probe copying" in text]
    before, after = (probe_results(stage.examined["probes"])["copying"] for stage in record.stages)
    assert warning.startswith("recovered: perplexity is")
    assert f"fell from {before.score:.2f} to {after.score:.2f}" in warning
    assert recovered.examined["probes"]["copying"]["verdict"] == "collapsed"
    assert not [text for text in told if "the probe sums" in text], "the dense model cannot add"


def test_each_stage_has_its_answers_and_their_costs(name, tmp_path):
    record = fit(name, tmp_path, ShortGPT(num_layers=2))
    assert all(stage.examined.keys() >= ASKED for stage in record.stages)
    rows = {cost.name for cost in record.costs}
    stages = [stage.name for stage in record.stages]
    assert {f"examine {stage}: {examiner}" for stage in stages for examiner in ASKED} <= rows
    prompts = [[sample["prompt"] for sample in s.examined["samples"]] for s in record.stages]
    assert prompts[0] == prompts[1] == prompts[2] != []
    dense, pruned, recovered = (stage.examined["divergence"] for stage in record.stages)
    assert dense["bytes"] > 0
    for later in (pruned, recovered):
        assert later["kl"]["value"] > 0
        assert len(later["kl_by_position"]) > 1
        assert later["long_text"]["tokens"] > 32, "longer than the held-out windows"


def test_a_stage_that_is_the_dense_model_has_no_divergence(name, tmp_path):
    record = fit(name, tmp_path, recovery="full", learning_rate=1e-30)
    divergence = record.stages[-1].examined["divergence"]
    assert divergence["kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert divergence["same_top1"]["value"] == 1.0
    assert record.stages[0].examined["probes"] == {
        probe: {key: value for key, value in answer.items() if key != "verdict"}
        for probe, answer in record.stages[-1].examined["probes"].items()
    }
    assert not record.warnings


def test_the_dense_predictions_outlive_a_restart_and_are_made_again_where_they_are_gone(
    name, tmp_path
):
    first = fit(name, tmp_path, ShortGPT(num_layers=2), recovery="none")
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / DENSE_PREDICTIONS).iterdir()}
    assert {file.name for file in files} == {"held_out.safetensors", "long_text.safetensors"}
    second = fit(name, tmp_path, ShortGPT(num_layers=2))
    assert {file: file.stat().st_mtime_ns for file in files} == files
    assert second.stages[1].examined == first.stages[1].examined
    assert second.stages[2].examined["divergence"]["kl"]["value"] > 0
    for file in files:
        file.unlink()
    fit(name, tmp_path, ShortGPT(num_layers=2), recovery="none")
    for file in files:
        assert ReferenceLogits.load(file).log_probabilities.isfinite().all()


def test_other_held_out_text_is_compared_with_the_dense_model_on_it(name, tmp_path):
    fit(name, tmp_path, ShortGPT(num_layers=2), recovery="none")
    file = tmp_path / DENSE_PREDICTIONS / "held_out.safetensors"
    before = ReferenceLogits.load(file)
    fit(name, tmp_path, ShortGPT(num_layers=2), recovery="none", data={"num_validation": 2})
    assert len(ReferenceLogits.load(file).input_ids) == 2 < len(before.input_ids)


def test_predictions_of_another_dense_model_in_the_same_directory_are_not_compared_with(
    name, tmp_path
):
    other = write_model(tmp_path / "other", seed=1)
    first = fit(name, tmp_path, ShortGPT(num_layers=2), recovery="none")
    fit(other, tmp_path, ShortGPT(num_layers=2), recovery="none")
    again = fit(name, tmp_path, ShortGPT(num_layers=2), recovery="none")
    assert again.stages[1].examined["divergence"] == first.stages[1].examined["divergence"]
    file = tmp_path / DENSE_PREDICTIONS / "held_out.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    third = fit(name, tmp_path, ShortGPT(num_layers=2))
    assert third.stages[2].examined["divergence"]["kl"]["value"] > 0, "damaged, so made again"


def test_probes_false_asks_nothing(name, tmp_path):
    record = fit(name, tmp_path, ShortGPT(num_layers=2), recovery="none", probes=False)
    assert not any(stage.examined.keys() & ASKED for stage in record.stages)
    assert not (tmp_path / DENSE_PREDICTIONS).exists()
