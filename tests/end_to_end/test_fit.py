"""How a fit runs: what is trained, saved, reused and refused."""

import json
import shutil
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from runs import make_data, make_module, make_trainer, write_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import prunelight
from prunelight.callbacks import ShortGPT
from prunelight.evaluation.perplexity import evaluate
from prunelight.recovery.lora import LoRA
from prunelight.training.recovery_module import RecoveryModule


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def fitted(name, tmp_path):
    module, data = make_module(name), make_data(name, tmp_path)
    trainer = make_trainer(tmp_path, ShortGPT(num_layers=2))
    trainer.fit(module, data)
    return trainer, module, data


def test_the_run_directory_holds_base_plan_result_report_and_picture(fitted, tmp_path):
    (base,) = tmp_path.glob("pruned-*")
    for file in (base / "plan.json", base / "config.json", tmp_path / "final" / "plan.json"):
        assert file.is_file()
    assert prunelight.Plan.load(base / "plan.json").method == "ShortGPT"
    for report in ("report.md", "report.json", "report.html", "layers.png"):
        assert (tmp_path / report).stat().st_size > 0
    assert not list(tmp_path.glob(".*tmp*")), "nothing half-written is left"


def test_a_second_run_reuses_the_base_and_says_so(fitted, name, tmp_path):
    (base,) = tmp_path.glob("pruned-*/model.safetensors")
    written = base.stat().st_mtime_ns
    make_trainer(tmp_path, ShortGPT(num_layers=2)).fit(
        make_module(name, recovery="none"), make_data(name, tmp_path)
    )
    assert base.stat().st_mtime_ns == written
    costs = json.loads((tmp_path / "report.json").read_text())["costs"]
    assert {cost["name"] for cost in costs if cost["reused"]} >= {"score and plan (ShortGPT)"}


@pytest.mark.parametrize(
    ("callback", "arguments"),
    [
        (ShortGPT(num_layers=3), {}),
        (ShortGPT(num_layers=2, ignore_first_tokens=1), {}),
        (ShortGPT(num_layers=2), {"seed": 1}),
        (ShortGPT(num_layers=2), {"num_calibration": 3}),
    ],
)
def test_other_arguments_or_calibration_make_another_base(
    fitted, name, tmp_path, callback, arguments
):
    make_trainer(tmp_path, callback).fit(
        make_module(name, recovery="none"), make_data(name, tmp_path, **arguments)
    )
    assert len(list(tmp_path.glob("pruned-*/plan.json"))) == 2


def test_other_validation_text_measures_again_but_keeps_the_decision(fitted, name, tmp_path):
    (plan,) = tmp_path.glob("pruned-*/plan.json")
    before = prunelight.Plan.load(plan)
    module, data = make_module(name, recovery="none"), make_data(name, tmp_path, num_validation=2)
    make_trainer(tmp_path, ShortGPT(num_layers=2)).fit(module, data)
    assert prunelight.Plan.load(plan).steps == before.steps
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    expected = prunelight.perplexity(final, data.validation_windows())
    assert module.record.stages[-1].perplexity == pytest.approx(expected)


def test_a_config_with_other_settings_makes_another_base(fitted, name, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(name, copied)
    config = json.loads((copied / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 5000.0
    (copied / "config.json").write_text(json.dumps(config))
    make_trainer(tmp_path, ShortGPT(num_layers=2)).fit(
        make_module(str(copied), recovery="none"), make_data(name, tmp_path)
    )
    assert len(list(tmp_path.glob("pruned-*/plan.json"))) == 2


def test_a_damaged_record_of_a_base_leads_to_a_new_one(fitted, name, tmp_path, caplog):
    (measured,) = tmp_path.glob("pruned-*/measured.json")
    measured.write_text(measured.read_text()[:100])
    module = make_module(name, recovery="none")
    make_trainer(tmp_path, ShortGPT(num_layers=2)).fit(module, make_data(name, tmp_path))
    assert "pruning anew" in caplog.text
    assert not any(cost.reused for cost in module.record.costs)


def test_speeds_of_another_device_are_measured_again(fitted, name, tmp_path):
    (measured,) = tmp_path.glob("pruned-*/measured.json")
    record = json.loads(measured.read_text())
    record["device"] = "NVIDIA H100"
    record["stages"][0]["decode_tokens_per_second"] = 1e30
    measured.write_text(json.dumps(record))
    module = make_module(name, recovery="none")
    make_trainer(tmp_path, ShortGPT(num_layers=2)).fit(module, make_data(name, tmp_path))
    assert module.record.device == "cpu"
    assert [stage.num_layers for stage in module.record.stages] == [6, 4]
    assert module.record.stages[0].decode_tokens_per_second < 1e30


def test_recovery_none_saves_the_pruned_weights_themselves(name, tmp_path):
    module = make_module(name, recovery="none")
    make_trainer(tmp_path, ShortGPT(num_layers=2)).fit(module, make_data(name, tmp_path))
    (base,) = tmp_path.glob("pruned-*")
    pruned, final = (load_file(d / "model.safetensors") for d in (base, tmp_path / "final"))
    assert pruned.keys() == final.keys()
    assert all(torch.equal(pruned[key], final[key]) for key in pruned)
    assert [stage.name for stage in module.record.stages] == ["dense", "pruned"]


def test_a_fit_without_pruning_recovers_the_named_model(name, tmp_path):
    module = make_module(name, recovery="full")
    make_trainer(tmp_path).fit(module, make_data(name, tmp_path))
    dense, recovered = module.record.stages
    assert (dense.name, recovered.name) == ("dense", "recovered")
    assert recovered.perplexity < dense.perplexity
    assert recovered.num_layers == 6


def test_lora_trains_adapters_only_and_checkpoints_hold_them_only(fitted, tmp_path):
    checkpoint = torch.load(tmp_path / "checkpoints" / "epoch=1.ckpt", weights_only=True)
    assert checkpoint["state_dict"]
    assert all("lora_" in key for key in checkpoint["state_dict"])
    assert checkpoint["prunelight"]["config"]["num_hidden_layers"] == 4
    (base,) = tmp_path.glob("pruned-*")
    assert checkpoint["prunelight"]["base"] == str(base)


class Modes(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        self.training = all(module.training for module in pl_module.model.modules())

    def on_validation_batch_end(self, trainer, pl_module, *args):
        self.validating = any(module.training for module in pl_module.model.modules())


def test_the_model_really_is_in_train_mode_after_a_validation_too(name, tmp_path):
    modes = Modes()
    trainer = make_trainer(tmp_path, ShortGPT(num_layers=2), modes, val_check_interval=1)
    trainer.fit(make_module(name), make_data(name, tmp_path))
    assert modes.training
    assert not modes.validating


def test_validation_metrics_equal_those_of_the_public_function(fitted, tmp_path):
    trainer, module, data = fitted
    (measured,) = trainer.validate(module, data, verbose=False)
    expected = evaluate(module.model, data.validation_windows())
    assert measured["val/perplexity"] == pytest.approx(expected.perplexity)
    assert measured["val/accuracy"] == pytest.approx(expected.accuracy)
    assert set(trainer.test(module, data, verbose=False)[0]) == {"test/perplexity", "test/accuracy"}


def test_a_checkpoint_validates_after_the_merge_and_in_a_new_process_state(fitted, name, tmp_path):
    trainer, module, data = fitted
    path = tmp_path / "checkpoints" / "epoch=1.ckpt"
    merged = trainer.validate(module, data, verbose=False)[0]["val/perplexity"]
    adapted = trainer.validate(module, data, ckpt_path=path, verbose=False)[0]["val/perplexity"]
    assert adapted == pytest.approx(merged, rel=1e-5)  # W + BA merged or apart: rounding only
    loaded = RecoveryModule.load_from_checkpoint(path, name=name, lora=LoRA(dropout=0.0))
    again = make_trainer(tmp_path / "other").validate(loaded, data, verbose=False)
    assert again[0]["val/perplexity"] == pytest.approx(adapted)


def test_half_precision_does_not_touch_the_metric(name, tmp_path):
    module, data = make_module(name, dtype="bfloat16"), make_data(name, tmp_path, num_validation=12)
    trainer = make_trainer(tmp_path, precision="bf16-true")
    (measured,) = trainer.validate(module, data, verbose=False)
    expected = prunelight.perplexity(module.model, data.validation_windows())
    assert measured["val/perplexity"] == pytest.approx(expected, rel=1e-3)


def test_full_recovery_of_half_precision_weights_warns_and_says_so_in_the_report(
    name, tmp_path, caplog
):
    module = make_module(name, dtype="bfloat16", recovery="full")
    make_trainer(tmp_path).fit(module, make_data(name, tmp_path))
    assert "small updates are lost" in caplog.text
    assert "small updates are lost" in (tmp_path / "report.md").read_text()


def test_gradient_checkpointing_leads_to_the_same_weights(name, tmp_path):
    weights = []
    for checkpointing in (False, True):
        root = tmp_path / str(checkpointing)
        pl.seed_everything(0, verbose=False)  # adapters start from random numbers
        module = make_module(name, gradient_checkpointing=checkpointing)
        make_trainer(root, ShortGPT(num_layers=2)).fit(module, make_data(name, tmp_path))
        weights.append(load_file(root / "final" / "model.safetensors"))
    assert all(torch.allclose(weights[0][k], weights[1][k], atol=1e-6) for k in weights[0])


def test_adapters_stay_float32_over_a_bfloat16_base(name, tmp_path):
    module = make_module(name, dtype="bfloat16")
    module.lora = LoRA(dropout=0.0)
    dtypes = {}

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            for parameter in pl_module.model.parameters():
                dtypes.setdefault(parameter.requires_grad, set()).add(parameter.dtype)

    make_trainer(tmp_path, ShortGPT(num_layers=2), Look()).fit(module, make_data(name, tmp_path))
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert final.dtype == torch.bfloat16


def test_optimizer_and_schedule_are_the_users_choice(name, tmp_path):
    make = partial(torch.optim.SGD, lr=0.5)
    module = make_module(name, lr_scheduler="cosine", warmup_steps=2, optimizer=make)
    trainer = make_trainer(tmp_path, ShortGPT(num_layers=2))
    trainer.fit(module, make_data(name, tmp_path))
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["initial_lr"] == 0.5
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)  # cosine ends at zero
    assert trainer.global_step == 6


def test_a_model_in_memory_can_be_given_instead_of_a_name(name, tmp_path):
    module = make_module("unused")
    module.model, module.tokenizer = prunelight.load(name)
    make_trainer(tmp_path, ShortGPT(num_layers=2)).fit(module, make_data(name, tmp_path))
    assert module.record.stages[1].num_layers == 4


def test_a_second_fit_goes_on_with_the_recovered_model(fitted, name, tmp_path):
    _, module, data = fitted
    make_trainer(tmp_path, ShortGPT(num_layers=2)).fit(module, data)
    assert module.model.config.num_hidden_layers == 4


# --- refusals


def test_a_checkpoint_of_another_base_is_refused_with_both_names(fitted, name, tmp_path):
    path = tmp_path / "checkpoints" / "epoch=0.ckpt"
    trainer = make_trainer(tmp_path / "other", ShortGPT(num_layers=3))
    with pytest.raises(ValueError, match=r"trained by lora with .* this run trains by lora"):
        trainer.fit(make_module(name), make_data(name, tmp_path), ckpt_path=path)


def test_a_checkpoint_of_another_recovery_or_rank_is_refused(fitted, name, tmp_path):
    path = tmp_path / "checkpoints" / "epoch=0.ckpt"
    data = make_data(name, tmp_path)
    with pytest.raises(ValueError, match="trained by lora .* trains by full"):
        make_trainer(tmp_path, ShortGPT(num_layers=2)).fit(
            make_module(name, recovery="full"), data, ckpt_path=path
        )
    with pytest.raises(ValueError, match="LoRA settings must be those"):
        make_trainer(tmp_path, ShortGPT(num_layers=2)).fit(
            make_module(name, lora=LoRA(targets=["q_proj"])), data, ckpt_path=path
        )


def test_a_foreign_checkpoint_is_refused(name, tmp_path):
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0"}, tmp_path / "odd.ckpt")
    with pytest.raises(ValueError, match="no key 'prunelight'"):
        RecoveryModule.load_from_checkpoint(tmp_path / "odd.ckpt", name=name)


def test_a_final_directory_that_is_not_ours_is_refused_before_any_work(name, tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="was not written by prunelight"):
        make_trainer(tmp_path, ShortGPT(num_layers=2)).fit(
            make_module(name), make_data(name, tmp_path)
        )
    assert [p.name for p in (tmp_path / "final").iterdir()] == ["thesis.tex"]
    assert not list(tmp_path.glob("pruned-*"))


def test_a_report_that_is_not_ours_is_refused(name, tmp_path):
    (tmp_path / "report.md").write_text("my thesis")
    with pytest.raises(FileExistsError, match="report.md exists and was not written by prunelight"):
        make_trainer(tmp_path, ShortGPT(num_layers=2)).fit(
            make_module(name), make_data(name, tmp_path)
        )


def test_lora_targets_that_fit_nothing_are_refused_before_any_pruning(name, tmp_path):
    module = make_module(name, lora=LoRA(targets=["q_porj"]))
    with pytest.raises(ValueError, match="'q_porj' fits no module of llama"):
        make_trainer(tmp_path, ShortGPT(num_layers=2)).fit(module, make_data(name, tmp_path))
    assert not list(tmp_path.glob("pruned-*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recovery": "qlora"}, "recovery='qlora' must be one of none, lora, full"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be at least 0"),
        ({"dtype": "int8"}, "dtype='int8' must be one of"),
        ({"lr_scheduler": "linaer"}, "lr_scheduler='linaer' must be one of linear, cosine"),
    ],
)
def test_a_module_argument_out_of_range_is_named(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_module(name, **arguments)


def test_an_open_ended_schedule_is_refused(name, tmp_path):
    trainer = make_trainer(tmp_path, max_epochs=-1, limit_train_batches=None)
    with pytest.raises(ValueError, match="set trainer.max_steps or trainer.max_epochs"):
        trainer.fit(make_module(name), make_data(name, tmp_path))


def test_pruning_a_lightning_module_without_a_model_is_refused(tmp_path):
    with pytest.raises(TypeError, match="BoringModel.model is missing; .* a transformers"):
        make_trainer(tmp_path, ShortGPT(num_layers=1)).fit(BoringModel())


def test_pruning_without_calibration_data_is_refused(name, tmp_path):
    loader = torch.utils.data.DataLoader([0])
    with pytest.raises(ValueError, match="give the Trainer a TextDataModule"):
        make_trainer(tmp_path, ShortGPT(num_layers=1)).fit(make_module(name), loader)


def test_windows_longer_than_the_model_allows_are_refused(name, tmp_path):
    data = make_data(name, tmp_path, seq_len=129, num_calibration=1, num_validation=1)
    with pytest.raises(ValueError, match="^seq_len=129 must be at most 128"):
        make_trainer(tmp_path, ShortGPT(num_layers=1)).fit(make_module(name), data)
    for own in ("calibration_seq_len", "validation_seq_len"):
        data = make_data(name, tmp_path, num_calibration=1, num_validation=1, **{own: 129})
        with pytest.raises(ValueError, match=f"^{own}=129 must be at most 128"):
            make_trainer(tmp_path, ShortGPT(num_layers=1)).fit(make_module(name), data)
