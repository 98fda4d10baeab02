"""Zeros stay zero: masks of full training, masked LoRA, and whole runs on a sparse model."""

import json
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear, ParamWrapper
from runs import make_data, make_module, make_trainer, write_model
from tiny import tiny_model, token_windows
from torch import nn
from transformers import AutoModelForCausalLM

import prunelight
from prunelight.models.families.layers import Matrix, matrices
from prunelight.models.sizes import zero_share
from prunelight.planning.fingerprints import describe_model
from prunelight.planning.plan import Plan
from prunelight.planning.steps import Sparsify
from prunelight.recovery.lora import LoRA, attach_lora, merge_lora
from prunelight.recovery.zeros.masked_lora import (
    MaskedLora,
    MaskedSum,
    MaskedUpdate,
    mask_adapters,
)
from prunelight.recovery.zeros.planned_zeros import PlannedZeros
from prunelight.recovery.zeros.weight_masks import WeightMasks, ZeroRecord, pack_mask, unpack_mask
from prunelight.run.run_state import plan_files
from prunelight.training.recovery_module import RecoveryModule

FAMILIES = ("llama", "gpt2", "mixtral")  # Linear, Conv1D, fused experts


@torch.no_grad()
def put_zeros(found, seed=0):
    """Set about half of the weights to zero; every group of four keeps two or more in rows."""
    generator = torch.Generator().manual_seed(seed)
    for matrix in found:
        shape = matrix.parameter.shape
        order = torch.rand(*shape[:-1], shape[-1] // 4, 4, generator=generator).argsort(-1)
        matrix.parameter.masked_fill_((order < 2).view(shape), 0)


def sparse_model(family="llama"):
    model = tiny_model(family)
    put_zeros(matrices(model).values())
    return model


def linear(rows=6, columns=8):
    torch.manual_seed(0)
    matrix = Matrix("layer", nn.Linear(columns, rows))
    put_zeros([matrix])
    return matrix


def train(matrix, optimizer, steps=3, clip=None, weight=None):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(5, matrix.in_features, generator=generator)
        used = matrix.parameter if weight is None else weight()
        (x @ used.T).square().sum().backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([matrix.parameter], clip)
        optimizer.step()
        optimizer.zero_grad()


# --- bits


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (9,), (3, 5), (2, 3, 11)])
def test_masks_survive_packing(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    bits = pack_mask(mask)
    assert (bits.dtype, bits.numel()) == (torch.uint8, (mask.numel() + 7) // 8)
    assert torch.equal(unpack_mask(bits, mask), mask)


def test_bits_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"16 packed bits do not fit shape \(3, 8\)"):
        unpack_mask(pack_mask(torch.ones(2, 8) > 0), torch.ones(3, 8))


# --- full training

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
}


@pytest.fixture(params=OPTIMIZERS)
def make_optimizer(request):
    return OPTIMIZERS[request.param]


def test_zeros_and_their_state_stay_zero(make_optimizer):
    matrix = linear()
    before, pruned = matrix.parameter.detach().clone(), matrix.parameter == 0
    optimizer = make_optimizer([matrix.parameter])
    masks = WeightMasks([matrix])
    masks.watch(optimizer)
    train(matrix, optimizer)
    masks.check()
    assert torch.equal(matrix.parameter == 0, pruned)
    assert not torch.signbit(matrix.parameter[pruned]).any(), "0.0, not -0.0"
    assert not torch.equal(matrix.parameter, before)
    states = [
        value
        for value in optimizer.state[matrix.parameter].values()
        if value is not None and value.shape == pruned.shape
    ]
    assert all((value[pruned] == 0).all() for value in states)


def test_state_from_before_the_masks_is_forgotten():
    matrix = linear()
    optimizer = OPTIMIZERS["AdamW"]([matrix.parameter])
    train(matrix, optimizer)
    put_zeros([matrix], seed=5)
    pruned = matrix.parameter == 0
    state = optimizer.state[matrix.parameter]
    assert (state["exp_avg"][pruned] != 0).any()
    WeightMasks([matrix]).apply(optimizer)
    assert (state["exp_avg"][pruned] == 0).all()
    assert (state["exp_avg_sq"][pruned] == 0).all()
    assert (state["exp_avg"][~pruned] != 0).all()


def test_training_with_masks_is_training_of_the_masked_weight(make_optimizer):
    """Clipping and optimizers that mix entries of a matrix see the gradient of m * W."""
    matrix, plain = linear(), linear()
    masks = WeightMasks([matrix])
    optimizer = make_optimizer([matrix.parameter])
    masks.watch(optimizer)
    train(matrix, optimizer, clip=0.5)
    mask = plain.parameter != 0
    train(
        plain,
        make_optimizer([plain.parameter]),
        clip=0.5,
        weight=lambda: plain.parameter * mask,
    )
    assert torch.equal(matrix.parameter, plain.parameter * mask)


def test_codes_of_an_8_bit_optimizer_are_left_alone():
    matrix = linear()
    optimizer = torch.optim.SGD([matrix.parameter])
    codes = torch.full(matrix.parameter.shape, 7, dtype=torch.uint8)
    optimizer.state[matrix.parameter]["codes"] = codes
    WeightMasks([matrix]).apply(optimizer)
    assert (codes == 7).all()


def test_dense_masks_shrink_and_never_grow():
    matrix = Matrix("layer", nn.Linear(8, 6))
    masks = WeightMasks([matrix])
    optimizer = OPTIMIZERS["AdamW"]([matrix.parameter])
    masks.watch(optimizer)
    train(matrix, optimizer)
    assert (matrix.parameter != 0).all()
    first, second = (torch.ones(6, 8, dtype=torch.bool) for _ in range(2))
    first[:, 0] = second[0] = False
    masks.update("layer", first)
    assert (matrix.parameter[:, 0] == 0).all()
    masks.update("layer", second)
    train(matrix, optimizer)
    assert torch.equal(matrix.parameter != 0, first & second)
    assert torch.equal(optimizer.state[matrix.parameter]["exp_avg"] != 0, first & second)


def test_masks_end_with_unwatch():
    matrix = linear()
    optimizer = OPTIMIZERS["SGD"]([matrix.parameter])
    masks = WeightMasks([matrix])
    masks.watch(optimizer)
    masks.unwatch()
    train(matrix, optimizer)
    with pytest.raises(RuntimeError, match="24 weights of layer are pruned and no longer zero"):
        masks.check()


def test_masks_follow_the_model_to_its_device():
    matrix = linear()
    masks = WeightMasks([matrix])
    matrix.owner.to("meta")
    assert masks.pruned("layer").device.type == "meta"


@pytest.mark.parametrize("fill", [1.0, float("nan")])
def test_a_filled_zero_is_found(fill):
    matrix = linear()
    masks, record = WeightMasks([matrix]), ZeroRecord([matrix])
    masks.check()
    record.check()
    matrix.parameter.data[matrix.parameter == 0] = fill
    for keeper in (masks, record):
        with pytest.raises(RuntimeError, match="24 weights of layer are pruned and no longer zero"):
            keeper.check()


def test_the_state_of_masks_restores_them_and_the_zeros(tmp_path):
    torch.save(WeightMasks([linear(5, 12)]).state_dict(), tmp_path / "masks.pt")
    state = torch.load(tmp_path / "masks.pt", weights_only=True)
    assert {name: bits.numel() for name, bits in state.items()} == {"layer": 8}  # of 60 weights
    other = Matrix("layer", nn.Linear(12, 5))
    masks = WeightMasks([other])
    masks.load_state_dict(state)
    assert torch.equal(other.parameter == 0, linear(5, 12).parameter == 0)
    with pytest.raises(ValueError, match="masks of 1 matrices are only on one side, e.g. layer"):
        masks.load_state_dict({})


# --- LoRA


def adapted(family="llama", dropout=0.0, **settings):
    """A sparse model with masked adapters that have an effect."""
    model = sparse_model(family)
    names = list(matrices(model))
    wrapped = attach_lora(model, LoRA(r=2, dropout=dropout, **settings))
    mask_adapters(wrapped, names)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return wrapped.eval()


def plain_delta(layer):
    """s * B A of an adapter, in the shape of the weight, written out without peft."""
    A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    if not isinstance(layer, ParamWrapper):
        delta = B @ A
        return layer.scaling["default"] * (delta.T if layer.fan_in_fan_out else delta)
    experts = layer.get_param().shape[0]
    rank = layer.r["default"]
    pairs = [(B[:, e::experts], A[e * rank : (e + 1) * rank]) for e in range(experts)]
    return layer.scaling["default"] * torch.stack([b @ a for b, a in pairs])


@torch.no_grad()
def reference(wrapped, family):
    """The sparse model with m * s B A added to its weights."""
    model = sparse_model(family)
    found = matrices(model)
    paths = {id(module): name for name, module in wrapped.get_base_model().named_modules()}
    for layer in wrapped.get_base_model().modules():
        if isinstance(layer, (Linear, ParamWrapper)):
            name = paths[id(layer)]
            if isinstance(layer, ParamWrapper):
                name = f"{name.partition('.base_layer')[0]}.{layer.parameter_name}"
            W = found[name].parameter
            W.add_(((W != 0) * plain_delta(layer)).float())
    return model


@torch.no_grad()
def logits_of(model):
    return model(token_windows()).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_lora_computes_with_w_plus_the_masked_update(family):
    wrapped = adapted(family)
    expected = logits_of(reference(wrapped, family))
    assert (logits_of(sparse_model(family)) - expected).abs().max() > 1e-2
    # x W + x D and x (W + D) round differently in float32, through 6 layers.
    torch.testing.assert_close(logits_of(wrapped), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_keeps_every_zero_and_gives_w_plus_the_update(family):
    wrapped = adapted(family)
    sparse, expected = matrices(sparse_model(family)), matrices(reference(wrapped, family))
    merged = matrices(merge_lora(wrapped))
    for name, matrix in merged.items():
        W = matrix.parameter
        assert torch.equal(W == 0, sparse[name].parameter == 0)
        torch.testing.assert_close(W, expected[name].parameter, rtol=1e-5, atol=1e-6)
    groups = merged["model.layers.0.self_attn.q_proj"] if family == "llama" else None
    if groups is not None:
        assert ((groups.parameter.view(32, -1, 4) != 0).sum(-1) == 2).all(), "2:4 stays 2:4"


def test_unmerging_gives_the_sparse_weights_back():
    wrapped = adapted()
    before = wrapped.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.clone()
    wrapped.merge_adapter()
    W = wrapped.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    assert torch.equal(W == 0, before == 0)
    assert not torch.equal(W, before)
    wrapped.unmerge_adapter()
    torch.testing.assert_close(W, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_adapters_equal_those_of_plain_autograd(family):
    def gradients(wrapped):
        wrapped.get_base_model().set_experts_implementation("eager")  # the fused one has no float64
        wrapped.double()(token_windows(), labels=token_windows()).loss.backward()
        return {n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad}

    masked, unmasked = adapted(family), adapted(family)
    for layer in unmasked.modules():
        if isinstance(layer, Linear):  # the same products, with the mask and nothing recomputed
            layer.lora_variant["default"] = PlainVariant()
        elif isinstance(layer, ParamWrapper):
            layer.__class__ = PlainParamWrapper
    expected = gradients(unmasked)
    for name, gradient in gradients(masked).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)
        assert gradient.abs().max() > 0


class PlainVariant:
    def forward(self, module, active_adapter, x, result, **kwargs):
        W = module.get_base_layer().weight
        update = module.get_delta_weight(active_adapter) * (W != 0)
        return result + x @ (update if module.fan_in_fan_out else update.T)


class PlainParamWrapper(ParamWrapper):
    def get_delta_factors(self, adapter_name):  # peft then adds identity @ update
        update = self.get_delta_weight(adapter_name) * (self.get_param() != 0)
        return torch.eye(update.shape[1]).to(update).expand(len(update), -1, -1), update, 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_kept_weight_that_merging_would_cancel_stays_apart_from_the_zeros(dtype):
    W = torch.tensor([[0.5, -0.25, 0.0, 1.0]], dtype=dtype)
    adapter = SimpleNamespace(get_delta_weight=lambda _: torch.tensor([[-0.5, 0.25, 9.0, 1.0]]))
    merged = MaskedLora.merge_safe(adapter, "default", W)
    assert merged.dtype == dtype
    assert ((merged == 0) == (W == 0)).all()
    assert merged[0, 3] == 2
    assert torch.equal(merged[0, :2].sign(), W[0, :2].sign())
    assert merged[0, :2].abs().max() < 1e-4


def test_custom_gradients_pass_the_numerical_check():
    generator = torch.Generator().manual_seed(0)

    def random(*shape, zeros=False):
        value = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return value * (value > 0) if zeros else value.requires_grad_()

    x, A, B = random(2, 3, 4), random(2, 4), random(5, 2)
    y, W = random(2, 3, 5), random(5, 4, zeros=True)
    assert torch.autograd.gradcheck(MaskedUpdate.apply, (x, y, W, A, B, 0.7, False))

    def joined(x, A, B):  # as with a frozen base product that is cut off from the graph
        return MaskedUpdate.apply(x, (x @ W.T).detach(), W, A, B, 0.7, True)

    def plain(x, A, B):
        return x @ W.T + x @ (0.7 * (W != 0) * (B @ A)).T

    found = []
    for call in (joined, plain):
        output = call(x, A, B)
        found.append((output, *torch.autograd.grad((output**2).sum(), (x, A, B))))
    assert all(torch.allclose(a, b) for a, b in zip(*found, strict=True))
    lhs, rhs = random(2, 5, 3), random(2, 3, 4)
    assert torch.autograd.gradcheck(MaskedSum.apply, (random(2, 5, 4, zeros=True), lhs, rhs, 0.7))


def test_dropout_acts_on_the_input_of_the_update_only():
    wrapped = adapted(dropout=0.5)
    layer = wrapped.get_base_model().model.layers[0].mlp.up_proj.train()
    W, x = layer.get_base_layer().weight, torch.randn(3, 32)
    torch.manual_seed(0)
    found = layer(x)
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    delta = (plain_delta(layer) * (W != 0)).float()
    torch.testing.assert_close(found, x @ W.T + dropped @ delta.T)


def test_autograd_keeps_no_dense_update_and_no_mask():
    wrapped = adapted().train()
    weights = {p.data_ptr() for p in wrapped.parameters()}
    kept = []

    def keep(tensor):
        if tensor.data_ptr() not in weights and tensor.shape in ((64, 32), (32, 64)):
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        wrapped(token_windows(), labels=token_windows())
    assert kept == []


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_lora_works_under_autocast_and_over_half_precision(family):
    exact = logits_of(adapted(family))
    wrapped = adapted(family)
    with torch.autocast("cpu", torch.bfloat16):
        out = wrapped(token_windows(), labels=token_windows())
    assert out.logits.dtype == torch.bfloat16
    # bfloat16 has 8 bits; on average, since near a tie a router may choose another expert.
    assert (out.logits - exact).abs().mean() < 0.05 * exact.abs().mean()
    out.loss.backward()
    gradients = [p.grad for p in wrapped.parameters() if p.requires_grad]
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)
    half = wrapped.bfloat16()
    assert logits_of(half).dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_zeros_that_are_added_during_training_count_at_once(family):
    wrapped = adapted(family)
    name, matrix = next(reversed(matrices(sparse_model(family)).items()))
    masks = WeightMasks([matrix_of(wrapped, name)])
    kept = torch.rand(matrix.parameter.shape) < 0.5
    masks.update(name, kept)
    merged = matrices(merge_lora(wrapped))[name].parameter
    masks.check()
    assert torch.equal(merged != 0, kept & (matrix.parameter != 0))


def matrix_of(wrapped, name):
    owner, _, parameter_name = name.rpartition(".")
    module = wrapped.get_base_model().get_submodule(owner)
    if isinstance(module, ParamWrapper):
        return Matrix(name, module.get_base_layer(), parameter_name)
    return Matrix(name, getattr(module, parameter_name).get_base_layer())


def test_matrices_without_an_adapter_are_frozen_and_left_alone():
    wrapped = adapted(targets=["q_proj"])
    masked = [m for m in wrapped.modules() if isinstance(m, Linear) and m.lora_variant]
    assert len(masked) == 6
    before = logits_of(wrapped)
    torch.testing.assert_close(logits_of(merge_lora(wrapped)), before, rtol=1e-4, atol=1e-4)


def test_plans_of_another_model_are_refused():
    step = Sparsify({"model.layers.9.mlp.up_proj": 0.5}, "magnitude")
    with pytest.raises(ValueError, match=r"1 matrices that the model does not have, e.g. model.l"):
        PlannedZeros.find(tiny_model(), [Plan("DLP", {}, {}, (step,))])


# --- runs


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
    assert checkpoint["prunelight"]["zeros"] == "not kept"


def test_plans_are_read_in_the_order_they_were_carried_out_and_only_from_our_directories(tmp_path):
    names = ["plan.json", "plan-2.json", "plan-10.json"]
    for name in reversed(names):
        (tmp_path / name).write_text("{}")
    assert plan_files(tmp_path) == []
    (tmp_path / "prunelight.json").write_text("{}")
    assert [file.name for file in plan_files(tmp_path)] == names


class Vandal(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        matrix = pl_module._adapted.zeros.matrices[0]
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
