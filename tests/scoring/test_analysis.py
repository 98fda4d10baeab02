"""The analysis equals plain computations and changes nothing."""

from dataclasses import asdict

import pytest
import torch
from reference_sliding import debiased_cka
from tiny import FAMILIES, NUM_LAYERS, tiny_model, token_windows

import prunelight
from prunelight.models.families.layers import decoder_layers
from prunelight.models.placement import move_if_it_fits
from prunelight.pruning.drop_sublayers import drop_sublayers
from prunelight.scoring.analysis import attention_to_first_token
from prunelight.scoring.angular_distance import angular_distances
from prunelight.scoring.block_influence import block_influences

WINDOWS = token_windows(4, 24)


def states_of(model, windows, **arguments):
    found = []
    handles = [
        layer.register_forward_hook(lambda m, args, out: found.append((args[0], out)))
        for layer in decoder_layers(model)
    ]
    with torch.no_grad():
        model(windows, use_cache=False, **arguments)
    for handle in handles:
        handle.remove()
    return [found[0][0], *(out for _, out in found)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_looked_at_and_is_unchanged(family):
    model = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    found = prunelight.analyze(model, WINDOWS)
    assert torch.tensor(found.cka).shape == (NUM_LAYERS + 1, NUM_LAYERS + 1)
    assert found.block_influence == block_influences(model, WINDOWS, ignore_first_tokens=1).mean
    assert len(found.token_norms["median"]) == NUM_LAYERS + 1
    none = family in ("mamba", "mamba2", "rwkv", "falcon")  # Falcon keeps its weights to itself
    assert found.attention_to_first_token.count(None) == (NUM_LAYERS if none else 0)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert model.config.to_dict() == config
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("ignored", [0, 1, 5])
def test_what_is_told_is_what_a_plain_computation_gives(ignored):
    model = tiny_model()
    found = prunelight.analyze(model, WINDOWS, ignore_first_tokens=ignored)
    states = [state[:, ignored:] for state in states_of(model, WINDOWS)]
    for i in (0, 3, 6):
        for j in (1, 3, 5):
            expected = debiased_cka(states[i].flatten(0, 1), states[j].flatten(0, 1))
            assert found.cka[i][j] == pytest.approx(expected, abs=1e-5)
    influence = block_influences(model, WINDOWS, ignore_first_tokens=ignored)
    assert found.block_influence == influence.mean
    assert found.block_influence_first_token == influence.first_token
    for size in range(1, NUM_LAYERS + 1):
        expected = angular_distances(model, WINDOWS, size)
        assert found.angular_distance[size - 1] == pytest.approx(expected, abs=1e-6)
    norms = [state.norm(dim=-1) for state in states_of(model, WINDOWS)]
    assert found.token_norms["largest"] == pytest.approx([n.max().item() for n in norms])
    assert found.token_norms["median"] == pytest.approx([n.median().item() for n in norms])
    assert found.token_norms["first token"] == pytest.approx([n[:, 0].mean().item() for n in norms])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side):
    model, short = tiny_model(), WINDOWS[:, :17]
    pads = [torch.full((4, 5), 7), torch.zeros(4, 5, dtype=torch.long)]
    parts = [[short, pads[0]], [torch.ones_like(short), pads[1]]]
    ids, mask = (torch.cat(part[:: 1 if side == "right" else -1], 1) for part in parts)
    plain, padded = (
        asdict(prunelight.analyze(model, windows))
        for windows in (short, {"input_ids": ids, "attention_mask": mask})
    )
    names = ("block_influence", "token_norms", "angular_distance", "attention_to_first_token")
    for name in ("cka", *names):
        flat = [torch.tensor(list(_numbers(x[name]))) for x in (plain, padded)]
        assert torch.allclose(*flat, atol=1e-5), name


@pytest.mark.parametrize("family", ["llama", "rwkv", "opt"])
def test_a_streamed_model_is_told_of_as_one_on_its_device(family):
    model, windows = tiny_model(family), token_windows(300, 24)  # four micro-batches
    expected = asdict(prunelight.analyze(model, windows))
    elsewhere = torch.device("cpu:0")  # another place than cpu
    found = asdict(prunelight.analyze(move_if_it_fits(model, elsewhere, offload=True), windows))
    names = ("cka", "block_influence", "token_norms", "angular_distance")
    for name in (*names, *([] if family == "rwkv" else ["attention_to_first_token"])):
        flat = [torch.tensor(list(_numbers(x[name]))) for x in (found, expected)]
        assert torch.allclose(*flat, atol=1e-5), name


def _numbers(value):
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _numbers(part)
    else:
        yield value


def test_attention_to_the_first_token_is_that_of_the_models_own_weights():
    model = tiny_model("qwen3")
    found = attention_to_first_token(model, WINDOWS)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(WINDOWS, output_attentions=True, use_cache=False).attentions
    expected = [layer[:, :, 1:, 0].mean().item() for layer in weights]
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_layer_without_attention_has_no_attention_to_tell_of():
    model = drop_sublayers(tiny_model(), [3, 5], [])
    found = prunelight.analyze(model, WINDOWS).attention_to_first_token
    assert [i for i, share in enumerate(found) if share is None] == [3, 5]


def test_the_rbf_kernel_sees_other_similarities():
    model = tiny_model()
    linear, rbf = (prunelight.analyze(model, WINDOWS, kernel=k).cka for k in ("linear", "rbf"))
    assert linear[0][6] != pytest.approx(rbf[0][6], abs=1e-3)
    assert rbf[3][3] == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel": "cubic"}, "kernel='cubic' must be one of linear, rbf"),
        ({"ignore_first_tokens": 24}, r"ignore_first_tokens=24 must lie in \[0, 23\]"),
        ({"ignore_first_tokens": -1}, "ignore_first_tokens=-1 must lie in"),
    ],
)
def test_bad_arguments_are_refused_before_any_forward(arguments, message, monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(type(model), "forward", None)
    with pytest.raises(ValueError, match=message):
        prunelight.analyze(model, WINDOWS, **arguments)


def test_broken_weights_are_named():
    model = tiny_model()
    decoder_layers(model)[2].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN in the hidden states after decoder layer 2"):
        prunelight.analyze(model, WINDOWS)
