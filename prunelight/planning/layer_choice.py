"""Choose the decoder layers to remove from scores and a target; numbers in, numbers out.

Of equal scores the lower index is chosen, so that a choice is reproducible. Nothing here knows a
model.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from fractions import Fraction
from statistics import fmean
from typing import Any

# Scores that need no data, and so no forward: only the place of a layer, or a seed.
DATA_FREE_SCORES = ("sequential", "reverse", "random")


def layers_to_remove(ratio: float | None, num_layers: int | None, total: int) -> int:
    """Return how many of `total` decoder layers to remove.

    Args:
        ratio: share of the decoder layers, in [0, 1), rounded to the nearest whole layer.
        num_layers: the number itself. Exactly one of the two must be given.
        total: number of decoder layers of the model.

    Raises:
        ValueError: if both or neither are given, or nothing would be left.
    """
    check_depth_target(ratio, num_layers)
    count = round(ratio * total) if ratio is not None else num_layers
    assert count is not None
    if count >= total:
        given = f"num_layers={num_layers}" if ratio is None else f"ratio={ratio}"
        raise ValueError(
            f"{given} would remove {count} of {total} decoder layers; at least one must stay"
        )
    return count


def layers_left(
    total: int, ratio: float | None, num_layers: int | None, protected: Collection[int] = ()
) -> int:
    """Return how many layers stay, of a model or of what earlier methods leave of it.

    Raises:
        ValueError: see `layers_to_remove`; or if too few layers may be removed.
    """
    count = layers_to_remove(ratio, num_layers, total)
    lowest_scores([0.0] * total, count, protected)
    return total - count


def check_depth_target(ratio: float | None, num_layers: int | None) -> None:
    """Check a depth target before any model is loaded.

    Raises:
        ValueError: unless exactly one of ratio in [0, 1) and num_layers >= 0 is given.
    """
    if (ratio is None) == (num_layers is None):
        raise ValueError(
            f"ratio={ratio} and num_layers={num_layers}: give exactly one of the two "
            "(ratio is the share of decoder layers, num_layers how many are removed)"
        )
    if ratio is not None and not 0 <= ratio < 1:
        raise ValueError(f"ratio={ratio} must lie in [0, 1); 0.2 removes one layer in five")
    if num_layers is not None and num_layers < 0:
        raise ValueError(f"num_layers={num_layers} must be at least 0")


def check_one_target(targets: Mapping[str, Any], what: str = "layers") -> None:
    """Check that exactly one of several targets is given: name -> value, None if not given.

    Raises:
        ValueError: if none or several are given; names all.
    """
    given = [f"{name}={value}" for name, value in targets.items() if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"{' and '.join(given) or f'nothing says how many {what} go'}: give exactly one of "
            f"{', '.join(targets)}"
        )


def layers_for_parameters(
    parameter_ratio: float, layer_sizes: Sequence[int], total_parameters: int
) -> int:
    """Return the number of layers that holds nearly a share of all parameters, by their mean size.

    Args:
        parameter_ratio: share of all parameters of the model to remove, in [0, 1).
        layer_sizes: parameters of each layer, or of each sublayer.
        total_parameters: of the model, embeddings included.

    Returns:
        The number whose share is nearest; of equally near ones the smaller.

    Raises:
        ValueError: if more than the share of all layers but one is asked for.
    """
    share = fmean(layer_sizes) / total_parameters  # of one layer
    most = len(layer_sizes) - 1
    if parameter_ratio > (most + 0.5) * share:
        raise ValueError(
            f"parameter_ratio={parameter_ratio} is out of reach: {most} of {len(layer_sizes)} "
            f"layers hold {most * share:.3f} of all parameters, and one must stay; lower it"
        )
    return min(range(most + 1), key=lambda count: (abs(count * share - parameter_ratio), count))


def layers_by_hand(layers: Sequence[int], total: int, protected: Collection[int] = ()) -> list[int]:
    """Return layers that were named by hand as indices in [0, total), in ascending order.

    Args:
        layers: indices; negative ones count from the end.
        total: number of decoder layers of the model.
        protected: layers that may not be among them.

    Raises:
        ValueError: if a layer does not exist, is named twice or protected, or none would be left.
    """
    outside = [i for i in layers if not -total <= i < total]
    if outside:
        raise ValueError(
            f"layers={outside} must lie in [{-total}, {total - 1}] (negative ones count from the "
            f"end): the model has {total} decoder layers; name others"
        )
    chosen = sorted(i % total for i in layers)
    for layer in chosen:
        names = [i for i in layers if i % total == layer]
        if len(names) > 1:
            raise ValueError(
                f"layers={[*layers]} names layer {layer} twice, as {names[0]} and as {names[1]}; "
                "name each layer once (negative ones count from the end)"
            )
    if both := sorted(resolve_indices(protected, total) & {*chosen}):
        raise ValueError(
            f"layers={[*layers]} and protected={[*protected]} both name {both}; a layer either "
            "goes or stays"
        )
    if len(chosen) == total:
        raise ValueError(
            f"layers={[*layers]} would remove {total} of {total} decoder layers; at least one must "
            "stay"
        )
    return chosen


def data_free_scores(score: str, total: int, seed: int | None = None) -> list[float]:
    """Return scores of layers that need no data; the lowest go first (ShortGPT, Section 4.3).

    "sequential" lets the shallowest layers go first: the paper calls shallower layers "less
    important". Its next sentence (the negative index) would give the opposite order; we follow the
    first, because the paper's "reverse" order is the opposite one. "random" draws from [0, 1).

    Args:
        score: one of `DATA_FREE_SCORES`.
        total: number of layers.
        seed: of "random".
    """
    if score == "random":
        generator = random.Random(seed)
        return [generator.random() for _ in range(total)]
    order = [float(layer) for layer in range(total)]
    return order if score == "sequential" else order[::-1]


def lowest_scores(
    scores: Sequence[float],
    count: int,
    protected: Collection[int] = (),
    fits: Sequence[Sequence[bool]] | None = None,
) -> list[int]:
    """Return the indices of the `count` lowest scores, in ascending order of index.

    Args:
        scores: one for each layer.
        count: how many to choose.
        protected: layers that are not chosen; negative ones count from the end.
        fits: [i][k] says whether layer i can stay when k layers below it are chosen. The choice
            then has the lowest sum of scores that this allows. None: every layer can.

    Raises:
        ValueError: if a protected index does not exist or too few unprotected ones are left.
    """
    protected = resolve_indices(protected, len(scores))
    unprotected = [i for i in range(len(scores)) if i not in protected]
    if count > len(unprotected):
        raise ValueError(
            f"{count} layers to remove, but only {len(unprotected)} of {len(scores)} are not "
            f"protected (protected={sorted(protected)}); remove fewer or protect fewer"
        )
    if fits is None:
        return sorted(sorted(unprotected, key=lambda i: (scores[i], i))[:count])
    if infinite := [i for i in unprotected if not math.isfinite(scores[i])]:
        raise ValueError(
            f"scores[{infinite[0]}]={scores[infinite[0]]} must be finite to compare sets of layers;"
            f" protect layer {infinite[0]}"
        )
    # Number of chosen layers so far -> (sum of their scores, the layers). Fractions add without
    # rounding: equal sums are equal, whatever the order.
    best: dict[int, tuple[Fraction, list[int]]] = {0: (Fraction(0), [])}
    for layer, score in enumerate(scores):
        following = {k: choice for k, choice in best.items() if fits[layer][k]}
        for k, (total, chosen) in best.items():
            if layer not in protected and k < count:
                choice = (total + Fraction(score), [*chosen, layer])
                following[k + 1] = min(choice, following.get(k + 1, choice))
        best = following
    if count not in best:
        raise ValueError(f"no {count} layers can be chosen such that all others can stay")
    return best[count][1]


def lowest_window(scores: Sequence[float], size: int, protected: Collection[int] = ()) -> list[int]:
    """Return the layers of the contiguous window with the lowest score.

    Args:
        scores: score of the window that starts at layer i, for i = 0 .. total - size.
        size: layers in a window.
        protected: layers that no window may contain.

    Raises:
        ValueError: if a protected index does not exist or every window contains a protected layer.
    """
    protected = resolve_indices(protected, len(scores) + size - 1)
    if size == 0:
        return []
    starts = [i for i in range(len(scores)) if not protected & set(range(i, i + size))]
    if not starts:
        raise ValueError(
            f"every window of {size} contiguous layers contains a protected one "
            f"(protected={sorted(protected)}); remove fewer or protect fewer"
        )
    start = min(starts, key=lambda i: (scores[i], i))
    return list(range(start, start + size))


def resolve_indices(indices: Collection[int], total: int) -> set[int]:
    """Return layer indices as a set in [0, total); negative ones count from the end, as in Python.

    Raises:
        ValueError: if an index does not exist.
    """
    outside = [i for i in indices if not -total <= i < total]
    if outside:
        raise ValueError(f"protected={outside} must lie in [{-total}, {total - 1}]")
    return {i % total for i in indices}


def runs_of(layers: Iterable[int]) -> list[list[int]]:
    """Return layers as runs of neighbours, both in order.

    >>> runs_of({5, 3, 4, 9})
    [[3, 4, 5], [9]]
    """
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return runs
