"""Whole runs on a sparse model: zeros are kept in checkpoints and result, or filled if asked."""

import json

import lightning.pytorch as pl
import pytest
import torch
from peft import PeftModel
from runs import make_data, make_module, make_trainer, write_model
from tiny import tiny_model, token_windows
from transformers import AutoModelForCausalLM
from zeros import put_zeros

import prunelight
from prunelight.callbacks import WeightPruning
from prunelight.models.families.matrices import matrices
from prunelight.models.sizes import zero_share
from prunelight.planning.fingerprints import describe_model
from prunelight.planning.plan import Plan
from prunelight.planning.steps import Sparsify
from prunelight.recovery.lora import LoRA
from prunelight.recovery.zeros.planned_zeros import PlannedZeros
from prunelight.run.run_state import plan_files, plans_beside
from prunelight.training.recovery_module import RecoveryModule


@torch.no_grad()
def logits_of(model):
    return model(token_windows()).logits


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


def save_sparse(name, directory, *, prune=True):
    """Save a model with half of its weights zero, and the plan that says so."""
    model, tokenizer = prunelight.load(name)
    found = matrices(model)
    described = describe_model(model)
    if prune:
        put_zeros(found.values())
    step = Sparsify({name: 0.5 for name in found if "q_proj" not in name}, "magnitude")
    plan = Plan("DLP", {}, described, (step,))
    prunelight.save(model, tokenizer, directory, plan=plan)
    return str(directory)


@pytest.fixture(scope="module")
def sparse(dense, tmp_path_factory):
    return save_sparse(dense, tmp_path_factory.mktemp("model") / "sparse")


def planned(directory):
    """Return the weights of a directory that the plan of `save_sparse` names."""
    found = matrices(AutoModelForCausalLM.from_pretrained(directory))
    return {name: m.parameter.detach() for name, m in found.items() if "q_proj" not in name}


def assert_same_zeros(directory, base):
    before, after = planned(base), planned(directory)
    for name, weight in after.items():
        assert torch.equal(weight == 0, before[name] == 0), name
    assert any(not torch.equal(after[name], before[name]) for name in after), "it was trained"


RECOVERIES = ("lora", "full")


@pytest.mark.parametrize(
    ("recovery", "arguments"),
    [("lora", {"precision": "bf16-mixed", "gradient_clip_val": 0.1}), ("full", {})],
)
def test_a_run_keeps_zeros_in_checkpoints_and_result(recovery, arguments, dense, sparse, tmp_path):
    module = make_module(sparse, recovery=recovery, gradient_checkpointing=bool(arguments))
    trainer = make_trainer(tmp_path, **arguments)
    trainer.fit(module, make_data(sparse, tmp_path))
    assert_same_zeros(tmp_path / "final", sparse)
    _, recovered = module.record.stages
    assert recovered.perplexity < module.record.stages[0].perplexity
    before = planned(sparse)
    state = torch.load(tmp_path / "checkpoints" / "epoch=0.ckpt", weights_only=True)["state_dict"]
    if recovery == "full":
        for name, weight in before.items():
            assert torch.equal(state[f"model.{name}.weight"] == 0, weight == 0)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["recovery"]["keep_zeros"] is True
    assert (tmp_path / "final" / "plan.json").is_file(), "the next run knows of the zeros"


@pytest.mark.parametrize("recovery", RECOVERIES)
def test_a_checkpoint_of_a_sparse_run_validates_on_its_own(recovery, sparse, tmp_path):
    module, data = make_module(sparse, recovery=recovery), make_data(sparse, tmp_path)
    trainer = make_trainer(tmp_path)
    trainer.fit(module, data)
    expected = trainer.validate(module, data, verbose=False)[0]["val/perplexity"]
    path = tmp_path / "checkpoints" / "epoch=1.ckpt"
    loaded = RecoveryModule.load_from_checkpoint(
        path, name=sparse, recovery=recovery, lora=LoRA(dropout=0.0)
    )
    again = make_trainer(tmp_path / "other").validate(loaded, data, verbose=False)
    assert again[0]["val/perplexity"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match=r"with zeros kept, this run .* with zeros not kept"):
        RecoveryModule.load_from_checkpoint(
            path, name=sparse, recovery=recovery, lora=LoRA(dropout=0.0), keep_zeros=False
        )


@pytest.mark.parametrize("recovery", RECOVERIES)
def test_without_keep_zeros_they_are_filled_and_the_report_says_so(recovery, sparse, tmp_path):
    module = make_module(sparse, recovery=recovery, keep_zeros=False)
    make_trainer(tmp_path).fit(module, make_data(sparse, tmp_path))
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert zero_share(final.model.layers.parameters()) < 0.01
    (warning,) = module.record.warnings
    assert "the sparsity of the decoder layers' matrices went from 0.5000 to 0.0" in warning
    assert "keep_zeros=False filled zeros" in (tmp_path / "report.md").read_text()
    assert module.record.recovery["keep_zeros"] is False
    assert (tmp_path / "adapter").is_dir() == (recovery == "lora")
    if recovery == "lora":
        assert "adapter/ holds the adapters unmerged" in warning
        base = AutoModelForCausalLM.from_pretrained(sparse)
        unmerged = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        torch.testing.assert_close(logits_of(unmerged), logits_of(final), rtol=1e-4, atol=1e-4)
        module = make_module(sparse, keep_zeros=False)  # replaces what is ours
        make_trainer(tmp_path).fit(module, make_data(sparse, tmp_path))


def test_an_adapter_directory_that_is_not_ours_is_refused(sparse, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="adapter exists and was not written by prunelight"):
        make_trainer(tmp_path).fit(make_module(sparse), make_data(sparse, tmp_path))


def test_a_dense_model_has_no_masks(dense, tmp_path):
    module = make_module(dense, recovery="full")
    make_trainer(tmp_path).fit(module, make_data(dense, tmp_path))
    assert module.masks is None
    assert "keep_zeros" not in module.record.recovery
    checkpoint = torch.load(tmp_path / "checkpoints" / "epoch=0.ckpt", weights_only=True)
    assert checkpoint["prunelight"]["zeros"] == "not_kept"


def test_plans_are_read_in_the_order_they_were_carried_out_and_only_from_our_directories(tmp_path):
    names = ["plan.json", "plan-2.json", "plan-10.json"]
    for name in reversed(names):
        (tmp_path / name).write_text("{}")
    assert plan_files(tmp_path) == []
    (tmp_path / "prunelight.json").write_text("{}")
    assert [file.name for file in plan_files(tmp_path)] == names


def sparse_base(name, root):
    """Prune to half the weights, and return the directory of the base."""
    module = make_module(name, recovery="none")
    make_trainer(root, WeightPruning(0.5)).fit(module, make_data(name, root))
    (base,) = root.glob("pruned-*")
    return base


def test_zeros_are_kept_by_the_plan_in_measured_json_if_plan_json_is_gone(dense, tmp_path, caplog):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    base = sparse_base(dense, tmp_path / "one")
    expected = Plan.load(base / "plan.json")
    (base / "plan.json").unlink()
    assert plans_beside(base) == [expected]
    assert "measured.json holds 1 plans whose files are gone" in caplog.text
    module = make_module(str(base), recovery="lora")
    make_trainer(tmp_path / "two").fit(module, make_data(str(base), tmp_path / "two"))
    assert_same_zeros(tmp_path / "two" / "final", base)
    assert Plan.load(tmp_path / "two" / "final" / "plan.json") == expected


@pytest.mark.parametrize("recovery", ["lora", "full"])
def test_zeros_that_nothing_describes_are_kept_and_told(sparse, tmp_path, recovery):
    """As in a model that others pruned."""
    stranger = tmp_path / "stranger"
    model, tokenizer = prunelight.load(sparse)
    model.save_pretrained(stranger)
    tokenizer.save_pretrained(stranger)
    module = make_module(str(stranger), recovery=recovery)
    make_trainer(tmp_path).fit(module, make_data(str(stranger), tmp_path))
    assert_same_zeros(tmp_path / "final", sparse)
    (told,) = [text for text in module.record.warnings if "no plan describes" in text]
    assert "42 of 42 matrices hold zeros that no plan describes (0.5" in told
    assert "count as planned (keep_zeros=False fills them)" in told


def test_few_zeros_that_nothing_describes_are_told_before_they_are_filled():
    model = tiny_model()
    with torch.no_grad():
        for matrix in matrices(model).values():
            matrix.parameter[:, :2] = 0  # 2 of 32 or 64 columns
    zeros = PlannedZeros.find(model, [])
    assert not zeros.planned
    assert "they are too few for pruning, and a recovery fills them" in zeros.warning
    assert PlannedZeros.find(tiny_model(), []).warning == ""


class Vandal(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        matrix = pl_module.run.prepared.zeros.matrices[0]
        matrix.parameter.data[matrix.parameter == 0] = 1.0


@pytest.mark.parametrize("recovery", RECOVERIES)
def test_a_filled_zero_stops_the_run_at_the_next_checkpoint(recovery, sparse, tmp_path):
    trainer = make_trainer(tmp_path, Vandal())
    with pytest.raises(RuntimeError, match="256 weights of model.layers.0.self_attn.k_proj"):
        trainer.fit(make_module(sparse, recovery=recovery), make_data(sparse, tmp_path))
    assert not (tmp_path / "final").exists()


def test_batches_need_no_attention_mask(sparse, tmp_path):
    ids = token_windows(4, 8) % 60
    batches = torch.utils.data.DataLoader(
        [{"input_ids": row, "labels": row} for row in ids], batch_size=2
    )
    module = make_module(sparse)
    make_trainer(tmp_path, max_epochs=1).fit(module, batches, batches)
    assert module.tokens_seen == 32
    assert_same_zeros(tmp_path / "final", sparse)
