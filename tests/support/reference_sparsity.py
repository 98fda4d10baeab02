"""A slow second implementation of the sparsity formulas, written from the papers, for comparison.

Nothing of prunelight is used: ranks come from stable sorts, SparseGPT updates every later column at
once, and `prune` runs the model from its embeddings for each decoder layer instead of replaying
layers.
Amounts are a share of zeros (float) or a pair (kept, of).
"""

# T tokens, I in_features, O out_features

import math
from collections import Counter
from contextlib import suppress

import torch
from torch import nn

BLOCK_SIZE = 128
DAMPENING = 0.01


def count(n, sparsity):
    return math.floor(n * sparsity + 1e-6)


def smallest(scores, k):
    """True at the k smallest scores, ties to the lower index in row-major order."""
    order = torch.sort(scores.flatten(), stable=True).indices
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[:k]] = True
    return mask.view(scores.shape)


def smallest_of_rows(scores, k):
    order = torch.sort(scores, dim=-1, stable=True).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order[:, :k], True)


def smallest_of_groups(scores, kept, of):
    groups = scores.reshape(-1, of)
    return smallest_of_rows(groups, of - kept).view(scores.shape)


def magnitude(weight, amount):
    scores = weight.double().abs()
    if isinstance(amount, tuple):
        return smallest_of_groups(scores, *amount)
    return smallest(scores, count(scores.numel(), amount))


def wanda(weight, norms, amount):
    scores = weight.double().abs() * norms.double()
    if isinstance(amount, tuple):
        return smallest_of_groups(scores, *amount)
    return smallest_of_rows(scores, count(weight.shape[1], amount))


def damped(hessian):
    diagonal = hessian.diagonal()
    return hessian + DAMPENING * diagonal.mean() * torch.eye(len(hessian), dtype=hessian.dtype)


def sparsegpt(weight, hessian, amount, *, block_size=BLOCK_SIZE, dtype=torch.float64):
    """SparseGPT (arXiv:2301.00774, algorithm 1) with every update made at once."""
    w, h = weight.to(dtype).clone(), hessian.to(dtype).clone()
    rows, columns = w.shape
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    inverse = torch.linalg.inv(damped(h))
    u = torch.linalg.cholesky((inverse + inverse.T) / 2, upper=True)
    mask = torch.zeros_like(w, dtype=torch.bool)
    for i in range(columns):
        if isinstance(amount, tuple):
            kept, of = amount
            if i % of == 0:
                group = slice(i, i + of)
                mask[:, group] = smallest_of_groups((w / u.diagonal())[:, group].abs(), kept, of)
        elif i % block_size == 0:
            end = min(i + block_size, columns)
            k = count(rows * end, amount) - count(rows * i, amount)
            mask[:, i:end] = smallest((w / u.diagonal())[:, i:end].abs(), k)
        error = torch.where(mask[:, i], w[:, i], 0) / u[i, i]
        w[:, i:] -= torch.outer(error, u[i, i:])
        w[mask[:, i], i] = 0
    return w


# --- yardsticks on small matrices -------------------------------------------------------------


def objective(weight, sparse, hessian):
    """tr((W - W') H (W - W')^T)."""
    difference = (weight.double() - sparse.double()).detach()
    return torch.einsum("oi,ij,oj->", difference, hessian.double(), difference).item()


def obs(weight, hessian, mask):
    """Optimal Brain Surgeon, column by column, with the inverse Hessian of the columns to come."""
    w, inverse = weight.double().clone(), torch.linalg.inv(damped(hessian.double()))
    for i in range(w.shape[1]):
        removed = torch.where(mask[:, i], w[:, i], 0) / inverse[i, i]
        w -= torch.outer(removed, inverse[i])
        w[mask[:, i], i] = 0
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return w


def optimum(weight, hessian, mask):
    """The best weights with these zeros: for each row, least squares on the columns it keeps."""
    w, h = weight.double(), damped(hessian.double())
    best = torch.zeros_like(w)
    for row, (values, pruned) in enumerate(zip(w, mask, strict=True)):
        keep = ~pruned
        best[row, keep] = torch.linalg.solve(h[keep][:, keep], h[keep] @ values)
    return best


def round_to_nearest(weight, bits, group_size):
    """Asymmetric integer grid for each row and group of columns, with zero on the grid."""
    rows, columns = weight.shape
    groups = weight.double().reshape(rows, columns // group_size, group_size)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-30)
    zero = (-low / scale).round()
    integers = ((groups / scale).round() + zero).clamp(0, 2**bits - 1)
    return ((integers - zero) * scale).view(rows, columns)


# --- allocation -------------------------------------------------------------------------------


def weighted_mean(values, sizes):
    return sum(v * s for v, s in zip(values, sizes, strict=True)) / sum(sizes)


def centred(bonus, sizes, target):
    """Sparsities around the target, where a layer with a higher bonus is denser."""
    return [target + weighted_mean(bonus, sizes) - b for b in bonus]


def min_max(values):
    low, high = min(values), max(values)
    return [(v - low) / (high - low) if high > low else 0.0 for v in values]


def dlp(scores, sizes, target, alpha=0.15):
    return centred([2 * alpha * (1 - v) for v in min_max(scores)], sizes, target)


def owl(ratios, sizes, target, alpha=0.08):
    return centred([2 * alpha * v for v in min_max(ratios)], sizes, target)


def clipped(sparsities, sizes, target):
    """Shift all layers alike until the mean of the clipped ones is the target."""

    def at(shift):
        return [min(max(s + shift, 0.0), 1 - 1e-9) for s in sparsities]

    low, high = -1.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if weighted_mean(at(middle), sizes) < target else (low, middle)
    return at(high)


def round_to_patterns(sparsities, kept, of):
    """Deal out kept x layers, one by one, to the layer furthest below its share (ties: the last).

    The last, because the lower index is pruned first.
    """
    dealt = [1] * len(sparsities)
    for _ in range((kept - 1) * len(sparsities)):
        need = [of * (1 - s) - n if n < of else -of for s, n in zip(sparsities, dealt, strict=True)]
        dealt[max(range(len(need)), key=lambda i: (need[i], i))] += 1
    return dealt


# --- the model --------------------------------------------------------------------------------


def linears(model, layer):
    """Name -> `Linear` of one decoder layer of a llama-like model."""
    prefix = f"model.layers.{layer}."
    modules = model.model.layers[layer].named_modules()
    return {prefix + name: m for name, m in modules if isinstance(m, nn.Linear)}


class Enough(Exception):
    pass


@torch.no_grad()
def grams(model, windows, modules, last=None, *, dtype=torch.float64, diagonal=False):
    """Run up to a layer, window by window; X^T X of each module's input, or its diagonal."""
    sums = {}

    def stop(*_):
        raise Enough

    def add(name):
        def hook(_, inputs):
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).to(dtype)  # (T, I)
            sums[name] = sums.get(name, 0) + (x.square().sum(0) if diagonal else x.T @ x)

        return hook

    handles = [m.register_forward_pre_hook(add(name)) for name, m in modules.items()]
    if last is not None:
        handles.append(last.register_forward_hook(stop))
    try:
        for window in windows:
            with suppress(Enough):
                model(input_ids=window[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return sums


@torch.no_grad()
def layer_scores(model, windows, *, outlier_factor=5.0, per_linear=False):
    """{statistic or "outlier_ratio": one per layer or linear} of |W_ij| x ||X_j||, dense."""
    layers = [linears(model, layer) for layer in range(len(model.model.layers))]
    modules = {name: m for layer in layers for name, m in layer.items()}
    squares = grams(model, windows, modules, model.model.layers[-1], diagonal=True)
    groups = [[name] for name in modules] if per_linear else [list(layer) for layer in layers]
    names = ("median", "mean", "sum", "max", "std", "var", "outlier_ratio")
    scores = {name: [] for name in names}
    for names in groups:
        parts = [modules[n].weight.double().abs() * squares[n].sqrt() for n in names]
        a = torch.sort(torch.cat([part.flatten() for part in parts])).values
        scores["median"].append(a[(len(a) - 1) // 2].item())  # the lower of two middle ones
        scores["mean"].append(a.mean().item())
        scores["sum"].append(a.sum().item())
        scores["max"].append(a[-1].item())
        scores["std"].append(a.std(correction=0).item())
        scores["var"].append(a.var(correction=0).item())
        scores["outlier_ratio"].append((a > outlier_factor * a.mean()).double().mean().item())
    return scores


@torch.no_grad()
def lamp(model, target):
    """Name -> share of zeros: the lowest LAMP scores of all linears, in float64 (arXiv:2010.07611).

    Scores as its Eq. 2 has them: sorted, each square over the sum of those from it on.
    """
    scores, owners = [], []
    for layer in range(len(model.model.layers)):
        for name, module in linears(model, layer).items():
            squares = module.weight.double().flatten().square().sort().values
            tail = squares.sum() - squares.cumsum(0) + squares
            scores.append(squares / tail)
            owners += [name] * len(squares)
    lowest = torch.cat(scores).argsort()[: int(len(owners) * target + 1e-6)]
    zeros = Counter(owners[i] for i in lowest.tolist())
    return {name: zeros[name] / size for name, size in Counter(owners).items()}


def allocate(model, windows, allocation, target, *, alpha=None, per_linear=False):
    """Name -> share of zeros, for allocation "uniform", "owl", "dlp" (median) or "dlp_mean".

    Any other name is that of a statistic which stands for DLP's median.
    """
    layers = [linears(model, layer) for layer in range(len(model.model.layers))]
    groups = [[n] for layer in layers for n in layer] if per_linear else [list(x) for x in layers]
    sizes = [sum(model.get_submodule(n).weight.numel() for n in names) for names in groups]
    if allocation == "uniform":
        shares = [target] * len(groups)
    else:
        kind = {"dlp": "median", "dlp_mean": "mean", "owl": "outlier_ratio"}
        kind = kind.get(allocation, allocation)
        scores = layer_scores(model, windows, per_linear=per_linear)[kind]
        rule = owl if allocation == "owl" else dlp
        shares = rule(scores, sizes, target, **({} if alpha is None else {"alpha": alpha}))
        shares = clipped(shares, sizes, target)
    return {name: share for names, share in zip(groups, shares, strict=True) for name in names}


@torch.no_grad()
def prune(
    model,
    windows,
    allocation="uniform",
    solver="wanda",
    sparsity=None,
    pattern=None,
    *,
    alpha=None,
    per_linear=False,
    dtype=torch.float64,
):
    """Prune a llama-like model in place and return name -> planned share of zeros.

    Args:
        model: has `model.model.layers`, is in eval mode.
        windows: token ids (N, T), no padding.
        allocation: "uniform", "owl", "dlp" (median) or "dlp_mean".
        solver: "magnitude", "wanda" or "sparsegpt".
        sparsity: share of zeros in all linears of the decoder layers, or None with a pattern.
        pattern: (kept, of); with another allocation than uniform each layer gets its own kept.
        alpha: half the spread of the allocation, None for the papers' values.
        per_linear: allocate to each linear instead of each layer (not with a pattern).
        dtype: of the statistics and of SparseGPT.
    """
    target = sparsity if pattern is None else 1 - pattern[0] / pattern[1]
    shares = allocate(model, windows, allocation, target, alpha=alpha, per_linear=per_linear)
    amounts = dict(shares)
    if pattern is not None:
        layers = [linears(model, layer) for layer in range(len(model.model.layers))]
        kept = round_to_patterns([shares[next(iter(names))] for names in layers], *pattern)
        amounts = {n: (k, pattern[1]) for k, names in zip(kept, layers, strict=True) for n in names}
        shares = {name: 1 - k / of for name, (k, of) in amounts.items()}
    for layer in range(len(model.model.layers)):
        modules = linears(model, layer)
        hessian = solver == "sparsegpt"
        last = model.model.layers[layer]
        sums = grams(model, windows, modules, last, dtype=dtype, diagonal=not hessian)
        for name, module in modules.items():
            weight = module.weight.data
            if solver == "sparsegpt":
                pruned = sparsegpt(weight, sums[name], amounts[name], dtype=dtype)
            elif solver == "wanda":
                mask = wanda(weight, sums[name].sqrt(), amounts[name])
                pruned = weight.masked_fill(mask, 0)
            else:
                pruned = weight.masked_fill(magnitude(weight, amounts[name]), 0)
            weight.copy_(pruned)
    return shares
