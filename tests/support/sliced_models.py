"""Small sliced models, the widths they are cut to, and what tests of them are parametrized by."""

import copy
from functools import cache

import pytest
import torch
from tiny import tiny_model, token_windows

import prunelight
from prunelight.models.families.own_classes.sliced import FAMILIES
from prunelight.planning.fingerprints import describe_model
from prunelight.planning.plan import Plan
from prunelight.planning.steps import SliceHidden

D, LAYERS = 32, 6
WHOLE = (D,) * (2 * LAYERS + 1)
FULL = (D, *[24] * (2 * LAYERS - 1), D)  # embeddings stay whole
CUT = (*[24] * (2 * LAYERS), D)
VARIED = (20, 24, 28, 24, 30, 16, 8, 24, 26, 28, 32, 32, D)
WINDOWS = token_windows(8, 16)
# Norms with weights (and biases), epsilons that matter, and layers that do something.
SETTINGS = {family: {"rms_norm_eps": 1e-3} for family in FAMILIES} | {"opt": {}}


@cache
def dense_model(family="llama", tied=True):
    model = tiny_model(family, tie_word_embeddings=tied, **SETTINGS[family])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif "layers" in name:
                parameter.mul_(5)
    return model


def plan_of(model, dims, **options):
    return Plan("by hand", {}, describe_model(model), (SliceHidden(tuple(dims), **options),))


def sliced(family, tied, dims, windows=WINDOWS, **options):
    model = copy.deepcopy(dense_model(family, tied))
    return prunelight.apply(model, plan_of(model, dims, **options), windows)


@torch.no_grad()
def logits(model, windows=WINDOWS):
    return model(windows).logits


FULL_CUT_VARIED = pytest.mark.parametrize(
    ("tied", "dims"),
    [(True, FULL), (True, CUT), (False, VARIED)],
    ids=["tied, full", "tied, cut", "untied, varied"],
)
BOTH = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
EACH = pytest.mark.parametrize("family", FAMILIES)
