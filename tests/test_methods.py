"""One table of methods; every method must plan, apply, train, resume, save, reload and generate."""

import json

import lightning.pytorch as pl
import pytest
import torch
from runs import SEQ_LEN, make_data, make_module, make_trainer, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunelight
from prunelight.callbacks import ShortGPT
from prunelight.evaluation import greedy_tokens

METHODS = {
    "ShortGPT by number": (lambda: ShortGPT(num_layers=2), 4),
    "ShortGPT by ratio": (lambda: ShortGPT(ratio=0.5), 3),
    "ShortGPT, sinks ignored, ends protected": (
        lambda: ShortGPT(num_layers=1, ignore_first_tokens=4, protected=[0, -1]),
        5,
    ),
    "ShortGPT, angular": (lambda: ShortGPT(num_layers=2, score="angular"), 4),
}
RECOVERIES = ("lora", "full")


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(params=METHODS, scope="module")
def method(request):
    return METHODS[request.param]


def test_the_plan_survives_json_and_leads_to_a_model_that_reloads(method, name, tmp_path):
    make, layers = method
    model, tokenizer = prunelight.load(name)
    windows = make_data(name, tmp_path).calibration_windows()
    plan = make().plan(model, windows)
    plan.save(tmp_path / "plan.json")
    assert prunelight.Plan.load(tmp_path / "plan.json") == plan
    model = prunelight.apply(model, plan, windows)
    assert model.config.num_hidden_layers == layers
    prunelight.save(model, tokenizer, tmp_path / "out", plan=plan)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert prunelight.perplexity(again, windows) == prunelight.perplexity(model, windows)


@pytest.mark.parametrize("recovery", RECOVERIES)
def test_a_fit_prunes_trains_and_leaves_a_model_that_generates(method, recovery, name, tmp_path):
    make, layers = method
    data = make_data(name, tmp_path)
    module = make_module(name, recovery=recovery)
    make_trainer(tmp_path, make()).fit(module, data)
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert final.config.num_hidden_layers == layers
    ids = AutoTokenizer.from_pretrained(tmp_path / "final")("The river", return_tensors="pt")
    with torch.no_grad():
        uncached = final.generate(**ids, do_sample=False, max_new_tokens=6, use_cache=False)
    cached = greedy_tokens(final, ids["input_ids"], 6)
    assert torch.equal(cached[:, : uncached.shape[1]], uncached)
    stages = {s["name"]: s for s in json.loads((tmp_path / "report.json").read_text())["stages"]}
    assert list(stages) == ["dense", "pruned", "recovered"]
    assert stages["recovered"]["perplexity"] < stages["pruned"]["perplexity"]
    assert stages["recovered"]["perplexity"] == pytest.approx(
        prunelight.perplexity(final, data.validation_windows())
    )


@pytest.mark.parametrize("recovery", RECOVERIES)
def test_a_resumed_run_equals_one_that_was_never_stopped(method, recovery, name, tmp_path):
    make, _ = method

    def run(root, epochs, ckpt_path=None):
        pl.seed_everything(0, verbose=False)  # adapters start from random numbers
        trainer = make_trainer(root, make(), max_epochs=epochs)
        # A constant rate: any other schedule depends on the end, which differs here.
        module = make_module(name, recovery=recovery, lr_scheduler="constant")
        trainer.fit(module, make_data(name, tmp_path), ckpt_path=ckpt_path, weights_only=True)
        return AutoModelForCausalLM.from_pretrained(root / "final").state_dict()

    whole = run(tmp_path / "whole", 2)
    run(tmp_path / "parts", 1)
    scored = sorted((tmp_path / "parts").glob("pruned-*/model.safetensors"))
    written = [file.stat().st_mtime_ns for file in scored]
    parts = run(tmp_path / "parts", 2, tmp_path / "parts" / "checkpoints" / "epoch=0.ckpt")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert len(written) == 1
    assert [file.stat().st_mtime_ns for file in scored] == written, "the base was made again"


def test_two_methods_in_one_run_act_in_list_order(name, tmp_path):
    trainer = make_trainer(tmp_path, ShortGPT(num_layers=2), ShortGPT(ratio=0.5, score="angular"))
    trainer.fit(make_module(name), make_data(name, tmp_path))
    (base,) = tmp_path.glob("pruned-*")
    first, second = (prunelight.Plan.load(base / file) for file in ("plan.json", "plan-2.json"))
    assert (first.model["num_hidden_layers"], second.model["num_hidden_layers"]) == (6, 4)
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert final.config.num_hidden_layers == 2
    assert final.config.max_position_embeddings >= SEQ_LEN
