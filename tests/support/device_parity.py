"""A method on the CPU against the same with a model elsewhere: what differs, and what it cost."""

import copy
import re
from collections import Counter

from methods_table import METHODS, VARIANTS
from tiny import tiny_model, token_windows

from prunelight.evaluation.perplexity import evaluate
from prunelight.models.sizes import parameter_count
from prunelight.pruning.apply import apply

# It refuses windows of so little text on any device.
TOO_LITTLE_TEXT = ("DynamicSlicing, sweep",)
NAMES = [
    name
    for name, method in {**METHODS, **VARIANTS}.items()
    if not method.gradual and name not in TOO_LITTLE_TEXT
]
# They change weights while they search, and put the old numbers back.
SEARCHES = (
    "depth by healing",
    "depth and width in a budget",
    "a budget, widths by layer",
    "DLP by deviation, alpha chosen",
    "ramp, Wanda",
)
# It compares KLs that a tiny random model makes equal up to rounding: the plan may differ.
NEAR_TIES = ("a budget, widths by layer",)


def pruned(model, make, windows, device=None, moved=None):
    """Return the plan, the pruned model, its perplexity, and what planning cost.

    That is the bytes moved, as `moved` counts them, and how many weights lie elsewhere afterwards.
    """
    moved = Counter() if moved is None else moved
    moved.clear()
    home = [weight.data_ptr() for weight in model.parameters()]
    plan = make().plan(model, windows)
    cost = dict(moved)
    cost["strayed"] = sum(
        weight.data_ptr() != place for weight, place in zip(model.parameters(), home, strict=True)
    )
    result = apply(model, plan, windows, device=device)
    return plan, result, evaluate(result, windows).perplexity, cost


def compared(name, family, put, device, *, num_windows=8, moved=None):
    """Return what differs between a method on the CPU and with a model that `put` puts elsewhere.

    Args:
        name: of a method of the table.
        family: of the tiny model.
        put: returns the model, moved or made to compute on the device.
        device: where layers compute.
        num_windows: of 16 tokens.
        moved: counts bytes that are copied "to" the device.
    """
    model, windows = tiny_model(family), token_windows(num_windows, 16)
    if "heal" in name or "budget" in name:
        model.requires_grad_(False)  # torch does not exchange the memory of a gradient's node
    make = {**METHODS, **VARIANTS}[name].make
    plan, ours, perplexity, _ = pruned(copy.deepcopy(model), make, windows)
    other_model = put(copy.deepcopy(model))
    other, theirs, other_perplexity, cost = pruned(other_model, make, windows, device, moved)
    num_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return {
        "name": name,
        "decisions": [_rounded(plan), _rounded(other)],
        "size": parameter_count(theirs) / parameter_count(ours),
        "perplexity": abs(perplexity / other_perplexity - 1),
        "home": sorted({weight.device.type for weight in theirs.parameters()}),
        "strayed": cost["strayed"],
        "to_device": cost.get("to", 0) / num_bytes,
    }


def check(row, home):
    """Assert that a method did the same, and left the model where it was."""
    assert "error" not in row, row["error"]
    assert row["decisions"][0] == row["decisions"][1] or row["name"] in NEAR_TIES
    assert abs(row["size"] - 1) < (0.05 if row["name"] in NEAR_TIES else 1e-9)
    assert row["perplexity"] < 1e-2  # kernels round in another order, which may choose a ridge
    assert row["home"] == [home]
    assert row["strayed"] == 0 or row["name"] in SEARCHES  # planning copies no weight back


def _rounded(plan):
    """Return the steps of a plan as text, shares of zeros to five digits."""
    return re.sub(r"0\.\d+", lambda found: f"{float(found[0]):.5f}", str(plan.steps))
