"""Scores of heads and neurons, against plain computations."""

import copy

import pytest
import torch
from lively_models import inputs_of
from tiny import tiny_model, token_windows

from prunelight.models.families.layers import decoder_layers
from prunelight.scoring.width_scores import SCORES, width_scores

WINDOWS = token_windows(8, 32)


@pytest.mark.parametrize("score", ["wanda", "fluctuation"])
def test_scores_from_activations_are_those_of_a_plain_computation(score):
    model = tiny_model("qwen2")
    found = width_scores(model, WINDOWS, score)
    for kind, path in (("heads", "self_attn.o_proj"), ("neurons", "mlp.down_proj")):
        for index, x in enumerate(inputs_of(model, WINDOWS, path)):
            weight = decoder_layers(model)[index].get_submodule(path).weight.double()
            if score == "wanda":
                columns = weight.abs().sum(0) * x.norm(dim=0)
            else:
                columns = weight.square().sum(0) * x.var(dim=0, correction=0)
            expected = columns.view(2, -1).sum(1) if kind == "heads" else columns
            assert torch.allclose(found[kind][index].double(), expected, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_taylor_scores_are_those_of_one_plain_backward(family):
    model = tiny_model(family)
    found = width_scores(model, WINDOWS, "taylor")
    other = copy.deepcopy(model)
    other(WINDOWS, labels=WINDOWS, use_cache=False).loss.backward()
    for index, layer in enumerate(decoder_layers(other)):
        attention, mlp = layer.self_attn, layer.mlp
        if family == "phi3":
            qkv = (attention.qkv_proj.weight * attention.qkv_proj.weight.grad).abs().sum(1)
            q, k, v = qkv.split([32, 16, 16])
            up = (mlp.gate_up_proj.weight * mlp.gate_up_proj.weight.grad).abs().sum(1)
            rows = up.view(2, 64).sum(0)
        else:
            q, k, v = (
                (p.weight * p.weight.grad).abs().sum(1)
                for p in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            rows = sum(
                (p.weight * p.weight.grad).abs().sum(1) for p in (mlp.gate_proj, mlp.up_proj)
            )
        o, down = attention.o_proj.weight, mlp.down_proj.weight
        groups = sum(part.view(2, -1).sum(1) for part in (q, k, v, (o * o.grad).abs().sum(0)))
        neurons = rows + (down * down.grad).abs().sum(0)
        assert torch.allclose(found["heads"][index], groups, rtol=1e-3)
        assert torch.allclose(found["neurons"][index], neurons, rtol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side):
    model, short = tiny_model(), WINDOWS[:, :20]
    pads = [torch.full((8, 6), 9), torch.zeros(8, 6, dtype=torch.long)]
    parts = [[short, pads[0]], [torch.ones_like(short), pads[1]]]
    ids, mask = (torch.cat(part[:: 1 if side == "right" else -1], 1) for part in parts)
    for score in SCORES:
        plain = width_scores(model, short, score)
        padded = width_scores(model, {"input_ids": ids, "attention_mask": mask}, score)
        for kind in plain:
            for x, y in zip(plain[kind], padded[kind], strict=True):
                assert torch.allclose(x, y, rtol=1e-3)
