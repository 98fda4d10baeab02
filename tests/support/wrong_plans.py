"""Plans at random, as a hand or a program may write them: several steps, odd values, odd JSON.

Most cannot be carried out.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from surgery import layer_indices
from tiny import tiny_model, token_windows
from transformers import PreTrainedModel

import prunelight
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.matrices import matrices
from prunelight.planning.fingerprints import describe_model
from prunelight.planning.plan import Plan

LAYERS = 6
ODD_VALUES = (None, -1, 0, 1.5, float("nan"), float("inf"), "x", "", True, [], {}, [None], 10**30)


def random_step(draw: random.Random, names: list[str], hidden_size: int) -> dict[str, Any]:
    """Return a step of a plan in JSON; its parts fit a model of 6 layers more often than not."""
    some = [*range(LAYERS)] + [LAYERS] * (draw.random() < 0.05)
    kinds = ["remove_layers", "merge_layers", "drop_sublayers", "prune_width"] * 2
    kind = draw.choice([*kinds, "slice_hidden", *["sparsify"] * 3])
    if kind == "remove_layers":
        return {"kind": kind, "layers": draw.sample(some, draw.randint(1, 3))}
    if kind == "merge_layers":
        first = draw.randrange(LAYERS - 1)
        merge = draw.choice(["top", "difference_sum", "released", "mean"])
        return {"kind": kind, "groups": [[first, first + 1]], "merge": merge}
    if kind == "drop_sublayers":
        parts = {part: draw.sample(some, draw.randint(0, 2)) for part in ("attention", "mlp")}
        return {"kind": kind, **parts}
    if kind == "prune_width":
        left = draw.sample(range(LAYERS), draw.choice([LAYERS, LAYERS, LAYERS - 1, LAYERS - 2]))
        counts = [draw.choice([24, 32])] * LAYERS if draw.random() < 0.7 else [24, 32] * LAYERS
        step = {"neurons": {str(i): [*range(counts[i])] for i in left}}
        if draw.random() < 0.3:
            step["heads"] = {str(i): [0] for i in left}
        return {"kind": kind, **step, "correction": draw.random() < 0.3}
    if kind == "slice_hidden":
        width = draw.choice([hidden_size // 2, hidden_size, hidden_size + 8])
        dims = [width] * (2 * LAYERS) + [draw.choice([hidden_size, width])]
        return {"kind": kind, "residual_dims": dims}
    chosen = draw.sample(names, draw.randint(1, len(names)))
    pattern = draw.choice([None, None, "2:4", "4:16", "2:5"])
    shares = {name: 0.5 if pattern == "2:4" else 0.75 for name in chosen}
    solver = draw.choice(["magnitude", "wanda", "sparsegpt", "wanda_variant", "alps"])
    return {"kind": kind, "sparsity": shares, "solver": solver, "pattern": pattern}


def random_plan(draw: random.Random, model: PreTrainedModel) -> dict[str, Any]:
    """Return a plan for the model, in JSON."""
    names = [*matrices(model)]
    steps = [random_step(draw, names, model.config.hidden_size) for _ in range(draw.randint(1, 4))]
    plan = Plan("by hand", {}, describe_model(model), ()).to_dict()
    return {**plan, "steps": steps}


def edited(plan: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """Return the plan with one value, key or entry changed somewhere, as an edit may do."""
    plan = copy.deepcopy(plan)
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in [*entries]:
            places.append((value, key))
            if isinstance(part, (dict, list)):
                walk(part)

    walk(plan["steps"])
    holder, key = draw.choice([*places, *((plan, key) for key in plan)])
    what = draw.choice(["change", "change", "change", "remove", "rename"])
    if what == "change" or isinstance(holder, list):
        holder[key] = draw.choice(ODD_VALUES)
    else:
        value = holder.pop(key)
        if what == "rename":
            holder[f"{key}s"] = value
    return plan


def bits(model: PreTrainedModel) -> tuple[Any, ...]:
    """Return all of a model that a step may change; NaN is equal to itself."""
    tensors = {
        name: (tensor.shape, tensor.detach().contiguous().view(torch.uint8).clone())
        for name, tensor in model.state_dict().items()
    }
    facts = (type(model), model.config.to_dict(), layer_indices(model))
    return facts, tensors, [*decoder_layers(model)]


def check_same_bits(before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
    """Check that a model is bit for bit what it was, in the same layers."""
    assert before[0] == after[0]
    assert all(now is then for now, then in zip(before[2], after[2], strict=True))
    assert [*before[1]] == [*after[1]]
    for (shape, old), (new_shape, new) in zip(before[1].values(), after[1].values(), strict=True):
        assert shape == new_shape
        assert torch.equal(old, new)


def try_plan(draw: random.Random, family: str) -> str | None:
    """Apply a random plan, every second one edited; return why it was refused.

    A refused plan must leave the model as it was.
    """
    model = tiny_model(family)
    plan = random_plan(draw, model)
    if draw.random() >= 0.5:
        plan = edited(plan, draw)
    windows = token_windows(8, 16)
    sevens = {"input_ids": windows, "attention_mask": torch.full_like(windows, 7)}
    odd = (None, windows + 10_000, windows[:, :0], sevens)
    given = draw.choice(odd) if draw.random() < 0.3 else windows
    before = bits(model)
    try:
        prunelight.apply(model, Plan.from_dict(plan), given, strict=False)
    except (ValueError, TypeError) as error:
        check_same_bits(before, bits(model))
        return str(error)
    return None
