"""LoRA: what is adapted and trained, and what merging leaves."""

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from saved_bytes import adapted, per_unit
from tiny import tiny_model, token_windows

from prunelight.models.sizes import parameter_count
from prunelight.recovery.lora import (
    LoRA,
    attach_lora,
    freeze,
    keep_as_peft,
    merge_lora,
    train_all,
)


def disturbed(model):
    """Give the adapters an effect: LoRA starts with B = 0."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(0.2 * noise)
    return model.eval()


@torch.no_grad()
def logits_of(model):
    return model(token_windows()).logits


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "lora.r=0 must be at least 1"),
        ({"alpha": 0}, "lora.alpha=0 must be above 0"),
        ({"dropout": 1.0}, r"lora.dropout=1.0 must lie in \[0, 1\)"),
        ({"dropout": -0.1}, r"lora.dropout=-0.1 must lie in \[0, 1\)"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**settings)


def test_targets_that_fit_no_module_are_named_and_leave_the_model_alone():
    model = tiny_model()
    before = logits_of(model)
    with pytest.raises(ValueError, match=r"lora.targets=\['nothing'\] fit no module of llama"):
        attach_lora(model, LoRA(targets=["nothing"]))
    assert torch.equal(logits_of(model), before)
    assert not any("lora" in name for name, _ in model.named_modules())


def test_attaching_changes_no_logits():
    model = tiny_model()
    before = logits_of(model)
    assert torch.equal(logits_of(attach_lora(model, LoRA()).eval()), before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "rwkv", "gpt_oss"])
def test_only_adapters_are_trainable(family):
    model = tiny_model(family)
    dense = parameter_count(model)
    wrapped = attach_lora(model, LoRA(r=2))
    trainable = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert parameter_count(wrapped) == dense + parameter_count(wrapped, trainable=True)


def test_adapters_of_a_bfloat16_model_are_float32():
    wrapped = attach_lora(tiny_model(dtype=torch.bfloat16), LoRA())
    assert {p.dtype for p in wrapped.parameters() if p.requires_grad} == {torch.float32}
    assert wrapped.model.model.embed_tokens.weight.dtype == torch.bfloat16


def test_all_projections_of_the_family_are_adapted_unless_targets_are_named():
    def adapted(settings):
        names = (name for name, _ in attach_lora(tiny_model(), settings).named_parameters())
        return {name.split(".lora_")[0].split(".")[-1] for name in names if ".lora_" in name}

    mlp = {"gate_proj", "up_proj", "down_proj"}
    assert adapted(LoRA()) == {"q_proj", "k_proj", "v_proj", "o_proj"} | mlp
    assert adapted(LoRA(targets=["q_proj"])) == {"q_proj"}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_merging_keeps_the_adapted_logits_and_leaves_no_adapters(family):
    model = tiny_model(family)
    dense = logits_of(model)
    names = set(model.state_dict())
    wrapped = disturbed(attach_lora(model, LoRA(r=4)))
    adapted = logits_of(wrapped)
    assert (adapted - dense).abs().max() > 1e-3  # or the test below would prove nothing
    merged = merge_lora(wrapped)
    assert type(merged) is type(model)
    assert set(merged.state_dict()) == names
    # (W + B A) x and W x + B (A x) round differently in float32, through 6 layers.
    torch.testing.assert_close(logits_of(merged), adapted, rtol=1e-4, atol=1e-4)


def test_merging_an_rwkv_whose_weights_are_halved_keeps_the_logits_of_training():
    model = tiny_model("rwkv")
    wrapped = disturbed(attach_lora(model, LoRA(dropout=0))).train()
    adapted = logits_of(wrapped)
    logits_of(wrapped.eval())  # halves the base's weights in memory, but not the adapters
    merged = merge_lora(wrapped)
    # As above; a merge at the wrong scale differs by more than 1.
    torch.testing.assert_close(logits_of(merged.train()), adapted, rtol=1e-4, atol=1e-4)


def test_merging_an_adapter_with_nan_is_refused():
    wrapped = disturbed(attach_lora(tiny_model(), LoRA()))
    weight = next(p for name, p in wrapped.named_parameters() if "lora_B" in name)
    weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        merge_lora(wrapped)


def test_freeze_and_train_all_are_opposites():
    model = tiny_model()
    freeze(model)
    assert parameter_count(model, trainable=True) == 0
    train_all(model)
    assert parameter_count(model, trainable=True) == parameter_count(model)


# --- what is kept until the backward ----------------------------------------------------------


def trained_step(dtype, dropout, autocast, as_peft):
    """Return the loss of a step and the gradients of all adapters."""
    model = attach_lora(tiny_model(dtype=dtype), LoRA(dropout=dropout))
    for layer in model.modules():
        if as_peft and isinstance(layer, LoraLayer):
            keep_as_peft(layer)
    disturbed(model).train()
    torch.manual_seed(1)
    windows = token_windows()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(windows, labels=windows, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
)
def test_what_is_kept_changes_no_bit_of_loss_and_gradients(dtype, autocast, dropout):
    ours, of_peft = (trained_step(dtype, dropout, autocast, as_peft) for as_peft in (False, True))
    assert len(ours) > 2
    for mine, theirs in zip(ours, of_peft, strict=True):
        assert mine.dtype == theirs.dtype == torch.float32 or mine is ours[0]
        assert torch.equal(mine, theirs)


def test_adapters_share_the_input_of_their_base_and_keep_none_of_it_in_float32():
    """A byte a number for dropout is left: 4 projections of 1 unit, 2 of 1 and one of 2.75."""
    masks = 3 + 1 + 2 + 2.75
    lean, of_peft = (per_unit(adapted(torch.bfloat16, 0.05, as_peft=p)) for p in (False, True))
    without = per_unit(adapted(torch.bfloat16, 0.0))
    assert lean - without == pytest.approx(masks, abs=0.1)
    # dropout(x) in float32, and on the CPU its mask in float32 too.
    assert of_peft - lean > 4 * masks
    only_float32 = per_unit(adapted(torch.bfloat16, 0.0), torch.float32)
    frozen = per_unit(adapted(torch.bfloat16, 0.0, as_peft=True), torch.float32)
    assert frozen - only_float32 >= 4 * masks - 0.1
