"""What must hold on real weights and real text: SmolLM2-135M on the bundled sample."""

import copy
import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM

import prunelight
from prunelight.architecture import decoder_layers
from prunelight.callbacks import ShortGPT
from prunelight.data import TextDataModule
from prunelight.evaluation import greedy_tokens

pytestmark = pytest.mark.real
NUM_REMOVED = 6


@pytest.fixture(scope="module")
def windows(smollm2):
    data = TextDataModule(smollm2[1], seq_len=256, num_calibration=4, num_validation=4)
    return data.calibration_windows(), data.validation_windows()


@pytest.fixture(scope="module")
def plan(smollm2, windows):
    return ShortGPT(num_layers=NUM_REMOVED).plan(smollm2[0], windows[0])


def states_of(model, ids):
    """All L + 1 raw hidden states, by hooks of this test's own."""
    states = []
    handles = [
        layer.register_forward_hook(lambda m, args, out: states.append((args[0], out)))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return [states[0][0], *(out for _, out in states)]


def test_the_removed_layers_are_those_of_a_plain_cosine_computation(smollm2, windows, plan):
    states = [state.double() for state in states_of(smollm2[0], windows[0])]
    scores = []
    for before, after in itertools.pairwise(states):
        cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
        scores.append(1 - cosine.mean().item())
    assert plan.scores["block_influence"] == pytest.approx(scores, abs=1e-6)
    expected = sorted(sorted(range(30), key=scores.__getitem__)[:NUM_REMOVED])
    assert list(plan.steps[0].layers) == expected


def test_the_sink_shows_in_the_scores_of_the_first_token(plan):
    first = plan.scores["block_influence_first_token"]
    assert first[11] > 0.5, "layer 11 writes the attention sink"
    assert max(first[12:24]) < 1e-3, "the layers after it leave the sink alone"
    assert plan.scores["block_influence"][11] < 0.1, "which the mean over tokens does not show"


def test_logits_equal_those_of_the_model_with_the_layers_skipped_by_hand(smollm2, windows, plan):
    model, _ = smollm2
    pruned = prunelight.apply(copy.deepcopy(model), plan)
    skipped = copy.deepcopy(model)
    for index in plan.steps[0].layers:
        decoder_layers(skipped)[index].forward = lambda hidden_states, **_: hidden_states
    with torch.no_grad():
        ids = windows[1][:2]
        assert torch.equal(pruned(ids).logits, skipped(ids, use_cache=False).logits)


def test_the_pruned_model_reloads_in_plain_transformers_and_generates(
    smollm2, windows, plan, tmp_path
):
    model, tokenizer = smollm2
    pruned = prunelight.apply(copy.deepcopy(model), plan)
    saved = prunelight.save(pruned, tokenizer, tmp_path / "out", plan=plan)
    assert "equal weights, logits and cached generation" in saved.verification
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert prunelight.perplexity(reloaded, windows[1]) == prunelight.perplexity(pruned, windows[1])
    prompt = tokenizer("The river", return_tensors="pt")["input_ids"]
    assert torch.equal(greedy_tokens(reloaded, prompt, 8), greedy_tokens(pruned, prompt, 8))


def test_dense_perplexity_is_that_of_a_language_model_and_pruning_costs(smollm2, windows, plan):
    model, _ = smollm2
    dense = prunelight.perplexity(model, windows[1])
    pruned = prunelight.perplexity(prunelight.apply(copy.deepcopy(model), plan), windows[1])
    assert 10 < dense < 40
    assert dense < pruned < 1000
