"""Pairs of layers of each family: the rule allows those that really can go, and no other."""

import copy
from itertools import combinations

import pytest
from cells import CLOSE, HELD_OUT, dense_cache_agrees, dense_model
from interchange import description, looks_the_same, with_weights_of
from reference import cache_agrees, decoder_list, difference, lists_that_run, logits, skip_by_hand
from selection import marked
from tiny_families import FAMILIES

from prunelight.models.families.removable import removable_layers
from prunelight.pruning.remove_layers import remove_layers

# Refused although the pairs could go, for a reason beyond the weights.
TWO_STREAMS = {"reformer"}  # its layers hand on two hidden states, which no score compares


def one_list_runs(model, path):
    count = len(model.get_submodule(path))
    return sum(len(x) == count for x in lists_that_run(model, HELD_OUT).values()) == 1


def shortened(model, removed):
    """What transformers builds from the config and the weights that the package leaves."""
    model = copy.deepcopy(model)
    remove_layers(model, removed)
    config = type(model.config).from_dict(model.config.to_dict())
    rebuilt = type(model)(config).eval()
    rebuilt.load_state_dict(model.state_dict())
    return rebuilt


def pairs(layers):
    """All pairs of layers; of layers that look alike those at the ends and in the middle."""
    last = len(layers) - 1
    if all(description(layer) == description(layers[0]) for layer in layers):
        return [(0, 1), (0, last), (last // 2, last // 2 + 1), (last - 1, last)]
    return list(combinations(range(len(layers)), 2))


def generates(family, shorter):
    """Whether a shorter model generates with its cache as the dense one does."""
    if not dense_cache_agrees(family):
        return True
    try:
        return cache_agrees(shorter, HELD_OUT[:2])
    except Exception:  # such as a hybrid without any attention
        return False


def gap_to(expected, shorten, *arguments):
    """How far a shorter model is from the expected logits; infinite if it cannot run at all."""
    try:
        return difference(logits(shorten(*arguments), HELD_OUT), expected)
    except Exception:
        return float("inf")


@pytest.mark.parametrize("family", marked(FAMILIES))
def test_the_rule_allows_the_pairs_that_can_go(family):
    model = dense_model(family)
    path, layers = decoder_list(model, HELD_OUT)
    try:
        rule = removable_layers(model)
    except (TypeError, ValueError) as error:
        rule, why = None, str(error)
    wrongly_allowed, wrongly_refused = {}, {}
    for pair in pairs(layers):
        fault = why if rule is None else rule.fault(pair)
        looks = looks_the_same(model, path, pair)
        if fault and not looks:
            continue
        expected = logits(skip_by_hand(model, HELD_OUT, pair), HELD_OUT)
        if not fault:
            gap = gap_to(expected, shortened, model, pair)
            if not gap <= CLOSE:
                wrongly_allowed[pair] = gap
        elif one_list_runs(model, path):
            gap = gap_to(expected, with_weights_of, model, path, pair)
            if gap <= CLOSE and generates(family, with_weights_of(model, path, pair)):
                wrongly_refused[pair] = fault
    assert wrongly_allowed == {}
    assert wrongly_refused == {} or family in TWO_STREAMS
