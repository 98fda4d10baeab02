"""Recovery over a base in 4 or 8 bits: what trains, what it is merged onto, what is refused."""

import gc
import json
import sys

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from runs import make_data, make_module, make_trainer, write_model
from safetensors.torch import load_file
from tiny import tiny_model
from transformers import AutoModelForCausalLM

import prunelight
from prunelight.callbacks import (
    DLP,
    DynamicSlicing,
    ShortGPT,
    SliceGPT,
    WeightPruning,
    WidthPruning,
)
from prunelight.cli import main
from prunelight.models.families.matrices import matrices
from prunelight.recovery.lora import LoRA
from prunelight.recovery.prepared_model import PreparedModel, RecoverySettings
from prunelight.recovery.quantization import BitsAndBytes, quantize
from prunelight.recovery.zeros.gradual_zeros import Schedule
from prunelight.run.checkpoints import check_same_run, read_metadata
from prunelight.run.strategies import check_strategy
from prunelight.training.recovery_module import RecoveryModule

pytest.importorskip("bitsandbytes", reason="pip install 'prunelight[quantization]'")
KINDS = ("nf4", "fp4", "int8")
WIDTHS = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
STAGES = ["dense", "pruned", "quantized", "recovered"]


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny", **WIDTHS)


def fit(name, root, *callbacks, ckpt_path=None, trainer=None, **arguments):
    pl.seed_everything(0, verbose=False)  # adapters start from random numbers
    module = make_module(name, **{"quantization": "nf4", **arguments})
    made = make_trainer(root, *callbacks, **(trainer or {}))
    made.fit(module, make_data(name, root), ckpt_path=ckpt_path, weights_only=True)
    return module


def weights_of(root):
    return load_file(root / "final" / "model.safetensors")


@pytest.fixture(scope="module", params=["nf4", "int8"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def run(kind, name, tmp_path_factory):
    """The directory of a run with 2:4 zeros, and its module."""
    root = tmp_path_factory.mktemp(kind)
    return root, fit(name, root, WeightPruning(pattern="2:4"), quantization=kind)


def test_the_report_shows_the_quantized_base_before_its_recovery(run, kind):
    root, _ = run
    record = json.loads((root / "report.json").read_text())
    _, pruned, quantized, recovered = stages = record["stages"]
    assert [stage["name"] for stage in stages] == STAGES
    assert quantized["perplexity"] != pruned["perplexity"] != recovered["perplexity"]
    assert quantized["size_bytes"] < 0.7 * pruned["size_bytes"]
    assert quantized["parameters"] == pruned["parameters"]
    assert quantized["linear_sparsity"] == pruned["linear_sparsity"] == 0.5
    assert record["recovery"]["quantization"].startswith(kind)


def test_the_result_is_the_base_in_full_precision_plus_the_masked_update(run):
    root, _ = run
    (base,) = root.glob("pruned-*/model.safetensors")
    base, final = load_file(base), weights_of(root)
    state = torch.load(root / "checkpoints" / "epoch=1.ckpt", weights_only=True)["state_dict"]
    adapted, scaling = 0, LoRA().alpha / LoRA().r
    for key, W in base.items():
        prefix = f"model.base_model.model.{key.removesuffix('.weight')}"
        if f"{prefix}.lora_A.default.weight" not in state:
            assert torch.equal(final[key], W), key
            continue
        A, B = (state[f"{prefix}.lora_{x}.default.weight"] for x in "AB")
        assert (B != 0).any()
        expected = W + (W != 0) * (scaling * B @ A)
        torch.testing.assert_close(final[key], expected, rtol=1e-5, atol=1e-7)
        assert torch.equal(final[key] != 0, W != 0), key
        adapted += 1
    assert adapted == 7 * WIDTHS["num_hidden_layers"]


def test_the_result_loads_in_plain_transformers_without_traces_of_quantization(run):
    root, module = run
    loaded = AutoModelForCausalLM.from_pretrained(root / "final")
    assert getattr(loaded.config, "quantization_config", None) is None
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, module.model(ids).logits)


def test_checkpoints_hold_adapters_only_and_name_base_and_quantization(run, kind):
    root, module = run
    checkpoint = torch.load(root / "checkpoints" / "epoch=0.ckpt", weights_only=True)
    assert all(".lora_" in key for key in checkpoint["state_dict"])
    assert checkpoint["prunelight"]["base"] == str(module.base.resolve())
    assert checkpoint["prunelight"]["quantization"]["kind"] == kind


def test_a_resumed_run_equals_an_uninterrupted_one(run, kind, name, tmp_path):
    root, _ = run
    callback = WeightPruning(pattern="2:4")
    fit(name, tmp_path, callback, quantization=kind, ckpt_path=root / "checkpoints/epoch=0.ckpt")
    found, expected = weights_of(tmp_path), weights_of(root)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_checkpoint_of_another_quantization_is_refused():
    ours = {"base": "b", "fingerprint": "f", "recovery": "lora", "zeros": "kept"}
    saved = read_metadata({"prunelight": ours})  # of a version without quantization
    with pytest.raises(ValueError, match="with quantization none on.*this run .*quantization nf4"):
        check_same_run(saved, {**ours, "quantization": {"kind": "nf4"}})


METHODS = {
    "depth": ("llama", lambda: ShortGPT(num_layers=1)),
    "sublayers": ("llama", lambda: ShortGPT(num_layers=1, granularity="mlp")),
    "width": ("llama", lambda: WidthPruning(neuron_ratio=0.5, head_ratio=0.5)),
    "slicing": ("llama", lambda: SliceGPT(0.5, round_to=64, embedding="full")),
    "own widths": ("llama", lambda: DynamicSlicing(0.3, 0.0, round_to=64, embedding="full")),
    "transposed": ("gpt2", lambda: DLP(0.5)),
    "fused experts": ("mixtral", lambda: DLP(0.5)),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_recovers_in_4_bits(method, name, tmp_path):
    family, make = METHODS[method]
    if family != "llama":
        name = write_model(tmp_path / "model", family, **WIDTHS)
    module = fit(name, tmp_path, make(), trainer={"max_epochs": 1, "limit_train_batches": 1})
    assert [stage.name for stage in module.record.stages] == STAGES
    assert "recovered" in (tmp_path / "report.md").read_text()
    base, final = (
        AutoModelForCausalLM.from_pretrained(next(tmp_path.glob(n))) for n in ("pruned-*", "final")
    )
    moved = 0
    for key, matrix in matrices(final).items():
        before = matrices(base)[key].parameter
        moved += not torch.equal(matrix.parameter, before)
        if "DLP" in str(module.record.plans):
            assert torch.equal(matrix.parameter != 0, before != 0), key
    assert moved == len(matrices(final))


def test_without_training_the_quantized_base_is_only_evaluated(name, tmp_path):
    module = fit(name, tmp_path, ShortGPT(num_layers=1), recovery="none")
    assert [stage.name for stage in module.record.stages] == STAGES[:3]
    (base,) = tmp_path.glob("pruned-*/model.safetensors")
    base, final = load_file(base), weights_of(tmp_path)
    assert all(torch.equal(final[key], base[key]) for key in base)


def test_zeros_may_be_filled_if_asked(name, tmp_path):
    module = fit(name, tmp_path, DLP(0.5), keep_zeros=False)
    assert module.record.stages[-1].linear_sparsity < 0.01
    assert any("keep_zeros=False filled zeros" in text for text in module.record.warnings)
    adapter = tmp_path / "adapter" / "adapter_model.safetensors"
    assert adapter.stat().st_mode == (tmp_path / "final" / "config.json").stat().st_mode
    # peft finds the base by the path in adapter_config.json; the card needs none.
    assert str(tmp_path) not in (tmp_path / "adapter" / "README.md").read_text()


def test_the_base_may_be_named_and_the_checkpoint_validates_in_4_bits(name, tmp_path):
    module = fit(name, tmp_path, quantization="fp4")
    assert [stage.name for stage in module.record.stages] == ["dense", *STAGES[2:]]
    again, data = make_module(name, quantization="fp4"), make_data(name, tmp_path)
    trainer = make_trainer(tmp_path)
    path = tmp_path / "checkpoints" / "epoch=1.ckpt"
    (told,) = trainer.validate(again, data, ckpt_path=path, verbose=False, weights_only=True)
    layer = again.model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer")
    assert type(layer).__name__ == "Linear4bit"
    # The merged model is in full precision, what was validated is not.
    assert told["val/perplexity"] == pytest.approx(module.record.stages[-1].perplexity, rel=0.05)


# --- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_update_of_a_quantized_weight_has_outputs_and_gradients_of_its_formula(
    kind, name, checkpointing
):
    model, tokenizer = prunelight.load(name)
    windows = torch.arange(3, 35).repeat(8, 1) % len(tokenizer)
    plan = DLP(0.5).plan(model, windows)
    prunelight.apply(model, plan, windows)
    dense = {key: m.parameter.detach().clone() for key, m in matrices(model).items()}
    settings = RecoverySettings("lora", LoRA(dropout=0.0), gradient_checkpointing=checkpointing)
    settings = RecoverySettings(**{**vars(settings), "quantization": kind})
    adapted = PreparedModel(model, [plan], settings)
    layer = adapted.model.base_model.model.model.layers[1].mlp.up_proj
    A, B = layer.lora_A.default.weight, layer.lora_B.default.weight
    torch.nn.init.normal_(B)
    x = torch.randn(2, 5, 128, requires_grad=True)
    found = layer(x)
    mask = (dense["model.layers.1.mlp.up_proj"] != 0).float()
    expected = layer.base_layer(x) + x @ (mask * (2.0 * B @ A)).T
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    weights = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), (x, A, B)),
        torch.autograd.grad((expected * weights).sum(), (x, A, B)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    adapted.model(windows).logits.mean().backward()
    assert A.grad is not None


def test_rounding_to_zero_does_not_freeze_a_weight():
    """NF4 makes zeros of small weights: a mask read from these would leave them untrained."""
    model = tiny_model(**WIDTHS)
    matrix = matrices(model)["model.layers.0.mlp.up_proj"]
    assert (matrix.parameter != 0).all()
    quantize(model, "nf4", BitsAndBytes())
    layer = model.model.layers[0].mlp.up_proj
    import bitsandbytes

    rounded = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert (rounded == 0).any()


def test_a_base_that_changed_meanwhile_is_refused(name):
    settings = RecoverySettings(quantization="nf4")
    adapted = PreparedModel(prunelight.load(name)[0], [], settings)
    with pytest.raises(ValueError, match="has fingerprint .*it was changed meanwhile; train again"):
        adapted.rebuild_on(tiny_model(**WIDTHS, vocab_size=99), [], {})


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantization": "int4"}, "quantization='int4' must be one of none, nf4, fp4, int8"),
        ({"quantization": "nf4", "recovery": "full"}, "recovery='full' trains it; set recovery=lo"),
        (
            {"quantization": "int8", "bitsandbytes": BitsAndBytes(use_double_quant=False)},
            "use_double_quant=False.* has no effect with quantization='int8'",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RecoveryModule("x", **arguments)


def test_an_unknown_compute_dtype_is_refused():
    with pytest.raises(ValueError, match="compute_dtype='int8' must be one of auto, float32"):
        BitsAndBytes(compute_dtype="int8")


def test_a_missing_package_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes")
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [])
    with pytest.raises(ImportError, match=r"bitsandbytes; install it with: pip install 'prunel"):
        RecoveryModule("x", quantization="nf4")


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (
            lambda: SliceGPT(0.25, embedding="full"),
            r"residual_dims\[1\]=96 must be a multiple of 64 for 4-bit recovery; set round_to=64",
        ),
        (lambda: DynamicSlicing(0.25), "round_to=8 must be a multiple of 64 .*; set round_to=64"),
        (
            lambda: WidthPruning(neuron_ratio=0.25, multiple=32),
            "intermediate_size=96 must be a multiple of 64 .*; set multiple=64 or quantization=non",
        ),
        (
            lambda: DLP(0.5, schedule=Schedule(1, 5, every=2)),
            "quantization=nf4 packs them; prune at fit start",
        ),
    ],
)
def test_pruning_that_does_not_suit_4_bits_is_refused_before_anything_is_computed(
    callback, message, name, tmp_path
):
    with pytest.raises(ValueError, match=message):
        fit(name, tmp_path, callback())
    assert not list(tmp_path.glob("pruned-*"))


def test_heads_that_do_not_suit_4_bits_are_refused(tmp_path):
    name = write_model(tmp_path / "model", **WIDTHS, num_attention_heads=8, num_key_value_heads=8)
    message = r"num_attention_heads \* head_dim=32 must be a multiple of 64 .*set quantization=int8"
    with pytest.raises(ValueError, match=message):
        fit(name, tmp_path, WidthPruning(num_key_value_heads=2))


def test_a_model_with_widths_that_do_not_suit_is_refused_and_int8_takes_it(tmp_path):
    name = write_model(tmp_path / "model", num_hidden_layers=2, hidden_size=96)
    message = "in_features of model.layers.0.self_attn.q_proj=96 must be .*; set quantization=int8"
    with pytest.raises(ValueError, match=message):
        fit(name, tmp_path)
    model, _ = prunelight.load(name)
    quantize(model, "int8", BitsAndBytes())
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear8bitLt"


def test_a_model_that_is_quantized_already_is_refused(name, tmp_path):
    module = make_module(name, quantization="int8")
    module.run.load_model().config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(TypeError, match="tiny' is quantized already; give the one in full precis"):
        make_trainer(tmp_path, ShortGPT(num_layers=1)).fit(module, make_data(name, tmp_path))


def test_a_model_that_is_only_in_memory_is_refused_unless_its_pruned_base_is_on_disk(
    name, tmp_path
):
    module = make_module("in memory", quantization="nf4")
    module.model, module.tokenizer = prunelight.load(name)
    data = make_data(name, tmp_path)
    short = {"limit_train_batches": 1, "max_epochs": 1}
    with pytest.raises(ValueError, match="exists only in memory; save it .*directory as name"):
        make_trainer(tmp_path, **short).fit(module, data)
    make_trainer(tmp_path, ShortGPT(num_layers=1), **short).fit(module, data)
    make_trainer(tmp_path, **short).fit(module, data)  # its result is on disk, too


def test_a_sharded_strategy_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, strategy=ModelParallelStrategy(tensor_parallel_size=1))
    with pytest.raises(ValueError, match="quantization=nf4 packs weights, which strategy ModelPar"):
        check_strategy(trainer, "nf4")


# --- by configuration ----------------------------------------------------------------------------


def test_an_8_bit_optimizer_is_a_matter_of_configuration(name, tmp_path):
    data = make_data(name, tmp_path)
    config = {
        "model": {
            "name": name,
            "quantization": "nf4",
            "bitsandbytes": {"use_double_quant": False, "compute_dtype": "float32"},
            "lora": {"r": 32, "dropout": 0.0},  # 32 * 128 numbers: the fewest that get 8-bit states
            "optimizer": {
                "class_path": "bitsandbytes.optim.AdamW8bit",
                "init_args": {"lr": 1e-3},
            },
        },
        "data": {"train": data.sources["train"], "validation": data.sources["validation"]},
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 2,
            "default_root_dir": str(tmp_path / "run"),
            "enable_progress_bar": False,
        },
    }
    config["data"] |= {"seq_len": 32, "batch_size": 2, "num_validation": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    main(["fit", "--config", str(tmp_path / "config.json")])
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    states = torch.load(path, weights_only=True)["optimizer_states"][0]["state"].values()
    moments = [state["__bnb_optimizer_quant_state__"]["state1"] for state in states]
    # bitsandbytes keeps fewer than 4096 numbers in 32 bits.
    assert {m.dtype for m in moments if m.numel() >= 4096} == {torch.uint8}
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["recovery"]["quantization"].startswith(
        "nf4 (single quantization, compute dtype f"
    )


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_packed_weights_are_gone_before_the_merged_model_is_measured(kind, name, tmp_path):
    data, packed = make_data(name, tmp_path), []
    windows = data.validation_windows

    def counting():  # the run asks for its held-out windows before it measures a model
        alive = (type(thing).__name__ for thing in gc.get_objects())
        packed.append(sum(name in ("Linear4bit", "Linear8bitLt") for name in alive))
        return windows()

    data.validation_windows = counting
    trainer = make_trainer(tmp_path, WeightPruning(pattern="2:4"))
    trainer.fit(make_module(name, quantization=kind), data)
    before, quantized, recovered = packed[0], max(packed), packed[-1]
    assert recovered == before < quantized


def test_a_quantized_stage_is_asked_by_the_probes_and_compared_with_the_dense_model(
    name, kind, tmp_path
):
    record = fit(name, tmp_path, ShortGPT(num_layers=1), quantization=kind, probes=True).record
    assert [stage.name for stage in record.stages] == STAGES
    for stage in record.stages:
        assert stage.examined["probes"]["sums_2_digits"]["score"] is not None
        assert stage.examined["samples"]
    pruned, quantized, _ = (
        stage.examined["divergence"]["kl"]["value"] for stage in record.stages[1:]
    )
    assert 0 < abs(quantized - pruned) < 0.5
