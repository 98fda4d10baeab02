"""Methods on a streamed model whose layers compute on the emulated device: FAMILY METHOD ...

Writes one JSON line a method: what differs from the CPU, and what was moved.
"""

import copy
import json
import re
import sys

from emulated_device import BYTES, DEVICE, Emulating
from methods_table import METHODS, VARIANTS
from tiny import tiny_model, token_windows

from prunelight.evaluation.perplexity import evaluate
from prunelight.models.placement import move_if_it_fits
from prunelight.models.sizes import parameter_bytes
from prunelight.pruning.apply import apply

WINDOWS = token_windows(8, 16)


def pruned(model, make, device=None):
    """Return the plan, the pruned model, its perplexity, and what planning cost.

    That is the bytes moved, and how many weights lie elsewhere afterwards.
    """
    BYTES.clear()
    home = [weight.data_ptr() for weight in model.parameters()]
    plan = make().plan(model, WINDOWS)
    cost = dict(BYTES)
    cost["strayed"] = sum(
        weight.data_ptr() != place for weight, place in zip(model.parameters(), home, strict=True)
    )
    result = apply(model, plan, WINDOWS, device=device)
    return plan, result, evaluate(result, WINDOWS).perplexity, cost


def _rounded(plan):
    """Return the steps of a plan as text, shares of zeros to five digits."""
    return re.sub(r"0\.\d+", lambda found: f"{float(found[0]):.5f}", str(plan.steps))


def compared(name, family):
    model = tiny_model(family)
    if "healed" in name:  # torch does not exchange the memory of a weight with a gradient's node
        model.requires_grad_(False)
    make = {**METHODS, **VARIANTS}[name].make
    plan, dense, perplexity, _ = pruned(copy.deepcopy(model), make)
    with Emulating():
        streamed = move_if_it_fits(copy.deepcopy(model), DEVICE, offload=True)
        other, result, other_perplexity, cost = pruned(streamed, make, DEVICE)
    ours, theirs = dense.state_dict(), result.state_dict()
    return {
        "name": name,
        "decisions": [_rounded(plan), _rounded(other)],
        "weights": max(float((ours[key] - theirs[key]).abs().max()) for key in ours),
        "perplexity": abs(perplexity / other_perplexity - 1),
        "home": sorted({weight.device.type for weight in result.parameters()}),
        "strayed": cost["strayed"],
        "to_device": cost.get("to", 0) / parameter_bytes(model),
    }


def main(family, names):
    for name in names:
        try:
            found = compared(name, family)
        except Exception as error:  # of one method; the others are still compared
            found = {"name": name, "error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
