"""A family of transformers that the table does not have is added by one entry of the table.

docs/add-a-family.md promises this: the entry alone gives depth pruning, zeros in the projections
that it names, LoRA on them, and, where it names sublayers, narrow and dropped ones.
"""

import copy
import os
import subprocess
import sys

import pytest
import torch
from generation import generate
from tiny import FAMILIES, NUM_LAYERS, tiny_model, token_windows
from transformers import AutoModelForCausalLM

import prunelight
from prunelight.callbacks import ShortGPT, WeightPruning, WidthPruning
from prunelight.models.families.architectures import ARCHITECTURES, Architecture, Sublayers
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.matrices import lora_targets, matrices
from prunelight.models.sizes import zero_share
from prunelight.recovery.lora import LoRA, attach_lora, merge_lora

WINDOWS = token_windows(4, 16)
# Neither has the names of a Llama. The layers of a GPT-J run attention and MLP side by side, so its
# entry names no sublayers.
ENTRIES = {
    "gptj": Architecture(
        layers="transformer.h",
        projections=("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"),
    ),
    "apertus": Architecture(
        layers="model.layers",
        projections=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
        sublayers=Sublayers(
            attention_norm="attention_layernorm",
            mlp_norm="feedforward_layernorm",
            neurons=("up_proj",),
        ),
    ),
}
CONFIGS = {"gptj": {"rotary_dim": 4}, "apertus": {}}  # beside the common settings of tiny.py


@pytest.fixture(params=ENTRIES)
def family(request, monkeypatch):
    """The name of a family, while the table has its entry, and nothing else of it."""
    assert request.param not in ARCHITECTURES, "prunelight has this family: test another one here"
    monkeypatch.setitem(FAMILIES, request.param, CONFIGS[request.param])
    monkeypatch.setitem(ARCHITECTURES, request.param, ENTRIES[request.param])
    return request.param


def lively(family):
    """A tiny model whose layers change the hidden states more than at initialisation."""
    model = tiny_model(family)
    with torch.no_grad():
        for parameter in decoder_layers(model).parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return model


@torch.no_grad()
def logits(model):
    return model(WINDOWS, use_cache=False).logits


def check_cache(model):
    """Check that the model generates with its cache what it generates without."""
    (tokens, cached), (expected_tokens, expected) = (
        generate(model, WINDOWS[:2], use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(tokens, expected_tokens)
    # Single tokens and whole sequences are summed in different orders by the kernels.
    assert (cached - expected).abs().max() < 1e-4 * expected.abs().max()


def test_shortgpt_prunes_and_saves_a_new_family(family, tmp_path, tiny_tokenizer):
    model = lively(family)
    plan = ShortGPT(num_layers=2).plan(model, WINDOWS)
    model = prunelight.apply(model, plan)
    prunelight.save(model, tiny_tokenizer, tmp_path / "out", plan=plan)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(reloaded) is type(model)
    assert len(decoder_layers(reloaded)) == NUM_LAYERS - 2
    assert torch.equal(logits(reloaded), logits(model))
    check_cache(reloaded)


def test_zeros_go_into_the_projections_of_the_entry_and_nowhere_else(family):
    model = lively(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model = prunelight.apply(model, WeightPruning(0.5).plan(model, WINDOWS), WINDOWS)
    found = matrices(model)
    assert {name.rpartition(".")[2] for name in found} == set(ENTRIES[family].projections)
    assert len(found) == NUM_LAYERS * len(ENTRIES[family].projections)
    assert zero_share(m.parameter for m in found.values()) == pytest.approx(0.5, abs=0.01)
    changed = {name for name, old in before.items() if not model.state_dict()[name].equal(old)}
    assert changed == {f"{name}.weight" for name in found}
    check_cache(model)


def test_lora_adapts_the_projections_of_the_entry_and_merges(family):
    model = lively(family)
    names, parameters = lora_targets(model)
    assert (set(names), parameters) == (set(ENTRIES[family].projections), [])
    wrapped = attach_lora(copy.deepcopy(model), LoRA(r=2, dropout=0.0))
    adapters = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert len(adapters) == 2 * NUM_LAYERS * len(ENTRIES[family].projections)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.copy_(0.1 * torch.randn_like(parameter))
    adapted = logits(wrapped)
    merged = merge_lora(wrapped)
    # W x + B A x and (W + B A) x are rounded differently.
    assert (logits(merged) - adapted).abs().max() < 1e-3 * adapted.abs().max()
    check_cache(merged)


def test_sublayers_are_narrowed_where_the_entry_names_them(family):
    model, method = lively(family), WidthPruning(neuron_ratio=0.5, multiple=8)
    if ENTRIES[family].sublayers is None:
        with pytest.raises(TypeError, match=f"attention and MLP of {family} cannot be pruned"):
            method.plan(model, WINDOWS)
        return
    model = prunelight.apply(model, method.plan(model, WINDOWS), WINDOWS)
    assert model.config.intermediate_size == 32
    check_cache(model)


def test_layers_of_different_widths_load_again_without_the_entry(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "apertus", {})
    model, method = lively("apertus"), WidthPruning(0.25, 0.25, multiple=8, allocation="global")
    with monkeypatch.context() as with_entry:
        with_entry.setitem(ARCHITECTURES, "apertus", ENTRIES["apertus"])
        model = prunelight.apply(model, method.plan(model, WINDOWS), WINDOWS)
        model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(reloaded).__name__ == "LayerWidthsApertusForCausalLM"
    assert torch.equal(logits(reloaded), logits(model))
    check_cache(reloaded)


FRESH = """
import sys
from prunelight.models.families.architectures import ARCHITECTURES, Architecture, Sublayers
ARCHITECTURES["apertus"] = {entry!r}

import tiny
import prunelight
from prunelight.callbacks import ShortGPT
from transformers import AutoModelForCausalLM

tiny.FAMILIES["apertus"] = {{}}
model, windows = tiny.tiny_model("apertus"), tiny.token_windows()
method = ShortGPT(num_layers=2, granularity="attention")
model = prunelight.apply(model, method.plan(model, windows), windows)
model.save_pretrained(sys.argv[1])
reloaded = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(reloaded).__name__ == "PrunelightApertusForCausalLM"
assert sum(reloaded.config.drop_attention) == 2
assert reloaded(windows).logits.equal(model(windows).logits)
"""


def test_an_entry_that_stands_in_the_table_lets_attentions_be_dropped(tmp_path):
    path = os.pathsep.join(sys.path)
    script = FRESH.format(entry=ENTRIES["apertus"])
    process = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert "apertus" not in ARCHITECTURES, "the config names what the entry named"
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reloaded.config.sublayer_names["mlp_norm"] == "feedforward_layernorm"
    check_cache(reloaded)
