"""The default search of SlidingLayerMerging: at most 10 forwards, and never far from ShortGPT."""

import copy

import pytest
import reference_sliding as reference
import torch
from lively_models import lively
from tiny import tiny_model, token_windows

from prunelight.callbacks import ShortGPT, SlidingLayerMerging
from prunelight.models.families.layers import decoder_layers
from prunelight.scoring.bounded import search
from prunelight.scoring.bounded.search import MOST_FORWARDS, part_windows

WINDOWS = token_windows(6, 16)


def removed_by(plan):
    return sorted(i for step in plan.steps for group in step.groups for i in group[:-1])


def deep_model(depth=24):
    model = lively(tiny_model(num_hidden_layers=8))
    for _ in range(depth // 8 - 1):
        decoder_layers(model).extend(copy.deepcopy(decoder_layers(model)[:8]))
    model.config.num_hidden_layers = depth
    with torch.no_grad():
        for index, layer in enumerate(decoder_layers(model)):
            layer.mlp.down_proj.weight.mul_(0.5 + (7 * index % 24) / 24)
    return model


class Work:
    """Counts the layers and heads that run, in layers of all windows, apart from our own counts."""

    def __init__(self, model, windows):
        self.layers = self.heads = 0.0
        total, handles = windows.numel(), []

        def count(name):
            def hook(module, args, output):
                if output.shape[:-1].numel() > 16:  # not the probe of a few tokens
                    setattr(self, name, getattr(self, name) + output.shape[:-1].numel() / total)

            return hook

        handles = [layer.mlp.register_forward_hook(count("layers")) for layer in model.model.layers]
        handles.append(model.lm_head.register_forward_hook(count("heads")))
        self.close = lambda: [handle.remove() for handle in handles]


@pytest.mark.parametrize("criterion", ["nll", "kl", "cosine"])
@pytest.mark.parametrize("count", [2, 7])
def test_the_search_stays_within_ten_forwards_and_counts_them_right(criterion, count):
    model, windows = deep_model(), token_windows(6, 32)
    work = Work(model, windows)
    plan = SlidingLayerMerging(num_layers=count, criterion=criterion).plan(model, windows)
    work.close()
    head = sum(p.numel() for p in model.lm_head.parameters())
    layer = sum(p.numel() for p in decoder_layers(model)[0].parameters())
    if criterion == "kl":  # the product of the model's own distribution with the head's weight
        work.heads += 1
    whole = 24 * layer + (0 if criterion == "cosine" else head)
    spent = work.layers * layer + (0 if criterion == "cosine" else work.heads * head)
    assert plan.found["forwards"] == pytest.approx(spent / whole, rel=0.02)
    assert spent / whole <= MOST_FORWARDS
    assert len(removed_by(plan)) == count


@pytest.mark.parametrize("ignored", [0, 1])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_shortgpts_own_layers_are_among_those_compared(ignored, count):
    model = lively(tiny_model(num_hidden_layers=8))
    method = SlidingLayerMerging(num_layers=count, ignore_first_tokens=ignored)
    # The last layer is in no window, so the one below it has nothing to be merged into.
    theirs = ShortGPT(num_layers=count, protected=[-2, -1], ignore_first_tokens=ignored)
    found, plan = method.plan(model, WINDOWS).found, theirs.plan(model, WINDOWS)
    assert found["block_influence_layers"] == sorted(plan.steps[0].layers)


@pytest.mark.parametrize("criterion", ["nll", "kl", "cosine", "cosine_flat"])
@pytest.mark.parametrize("count", [2, 4, 6])
def test_it_never_loses_to_shortgpts_layers_on_the_windows_that_judge(criterion, count):
    model = deep_model(8)
    plan = SlidingLayerMerging(num_layers=count, criterion=criterion).plan(model, WINDOWS)
    _, judge = part_windows(WINDOWS, 0)

    def on_judge(removed):
        merged = reference.merged_model(model, reference_groups(removed), "top")
        return reference.similarity(model, merged, judge, criterion)

    ours, theirs = removed_by(plan), plan.found["block_influence_layers"]
    assert on_judge(ours) >= on_judge(theirs) - 1e-6
    whole = reference.merged_model(model, reference_groups(ours), "top")
    expected = reference.similarity(model, whole, WINDOWS, criterion)
    assert plan.found["similarity"] == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(("deviation", "chosen"), [(0.0, "swaps"), (1.5, "block_influence")])
@pytest.mark.parametrize("count", [3, 5])
def test_a_set_that_is_better_by_chance_alone_is_not_taken(count, deviation, chosen, monkeypatch):
    """Swaps are a little better here, over 45 tokens that judge."""
    monkeypatch.setattr(search, "_DEVIATION", deviation)
    plan = SlidingLayerMerging(num_layers=count).plan(deep_model(8), WINDOWS)
    assert plan.found["chosen"] == chosen


def reference_groups(removed):
    groups = []
    for layer in sorted(removed):
        if groups and groups[-1][1] == layer:
            groups[-1] = (groups[-1][0], layer + 1)
        else:
            groups.append((layer, layer + 1))
    return groups


def test_a_layer_that_does_nothing_goes_first():
    model = deep_model(8)
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.get_submodule(f"model.layers.5.{name}").weight.zero_()
    plan = SlidingLayerMerging(num_layers=1).plan(model, WINDOWS)
    assert removed_by(plan) == [5]
    assert plan.found["similarity"] == pytest.approx(1, abs=1e-5)


def test_windows_are_parted_only_where_both_parts_can_tell_something():
    first, judge = part_windows(WINDOWS, 0)
    assert torch.equal(first, WINDOWS[::2])
    assert torch.equal(judge, WINDOWS[1::2])
    assert part_windows(WINDOWS[:1], 0)[1] is None
    assert part_windows(WINDOWS, 14)[1] is None  # a token in each window is left
    mask = torch.ones_like(WINDOWS)
    mask[1::2, 1:] = 0
    assert part_windows({"input_ids": WINDOWS, "attention_mask": mask}, 0)[1] is None
    model = deep_model(8)
    plan = SlidingLayerMerging(num_layers=2).plan(model, WINDOWS[:1])
    assert plan.found["windows_that_judge"] is False
    assert len(removed_by(plan)) == 2
