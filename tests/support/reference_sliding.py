"""The sliding loop written plainly: a copy of the model and a whole forward a candidate.

Slow, and independent of the package's merging, replay and criteria.
"""

import copy
import math

import torch
from torch.nn.functional import cosine_similarity, cross_entropy


def debiased_cka(x, y):
    """CKA of (n, D) and (n, E) with the unbiased HSIC, from whole Gram matrices in float64."""
    return hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y))


def hsic(x, y):
    n = len(x)
    k, m = x.double() @ x.double().T, y.double() @ y.double().T
    k.fill_diagonal_(0)
    m.fill_diagonal_(0)
    ones = torch.ones(n, dtype=torch.float64)
    value = (k @ m).trace() + (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
    return ((value - 2 / (n - 2) * ones @ k @ m @ ones) / (n * (n - 3))).item()


@torch.no_grad()
def final_states(model, windows):
    return model.model(windows, use_cache=False).last_hidden_state


@torch.no_grad()
def similarity(dense, other, windows, criterion):
    if criterion in ("cosine", "cosine_flat", "cka"):
        x, y = final_states(dense, windows), final_states(other, windows)
        if criterion == "cosine_flat":  # as the released code has it, but in float64
            flat = x.flatten(1).double(), y.flatten(1).double()
            return cosine_similarity(*flat, dim=-1).mean().item()
        if criterion == "cosine":
            return cosine_similarity(x.double(), y.double(), dim=-1).mean().item()
        return debiased_cka(x.flatten(0, 1), y.flatten(0, 1))
    p, q = (m(windows, use_cache=False).logits.double() for m in (dense, other))
    if criterion == "kl":
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        return math.exp(-(p.exp() * (p - q)).sum(-1).mean().item())
    losses = [cross_entropy(z[:, :-1].flatten(0, 1), windows[:, 1:].flatten()) for z in (p, q)]
    return math.exp((losses[0] - losses[1]).item())


@torch.no_grad()
def merged_model(model, groups, merge):
    """Return a copy with each window (low, high) merged into one layer."""
    model = copy.deepcopy(model)
    layers, gone = model.model.layers, set()
    for low, high in groups:
        window = [dict(layers[i].named_parameters()) for i in range(low, high + 1)]
        for name, parameter in layers[high].named_parameters():
            lowest, highest = window[0][name], window[-1][name]
            if merge == "difference_sum":
                lowest = lowest.clone()
                new = lowest + sum(other[name] - lowest for other in window[1:])
            elif merge == "mean":
                new = sum(other[name] for other in window) / len(window)
            elif merge == "released":
                new = highest if name.endswith("proj.weight") else lowest
            else:
                new = lowest if merge == "lowest" else highest
            parameter.copy_(new.clone())
        gone |= set(range(low, high))
    model.model.layers = torch.nn.ModuleList(x for i, x in enumerate(layers) if i not in gone)
    model.config.num_hidden_layers = len(model.model.layers)
    return model


def slide(model, windows, threshold, merge, criterion, *, by_merge=False, protected=()):
    """Return (groups from the top down, similarity, how many layers have run)."""
    total = model.config.num_hidden_layers
    high, low, groups, before, layer_forwards = total - 1, total - 2, [], 1.0, total
    while low >= 0:
        accepted = False
        if high not in protected and low not in protected:
            candidate = merged_model(model, [*groups, (low, high)], merge)
            layer_forwards += candidate.config.num_hidden_layers
            now = similarity(model, candidate, windows, criterion)
            accepted = (now / before if by_merge else now) >= threshold
        if accepted:
            before, low = now, low - 1
        else:
            if low + 1 < high:
                groups.append((low + 1, high))
            high, low = low, low - 1
    if low + 1 < high:
        groups.append((low + 1, high))
    return groups, before, layer_forwards
