"""Plans written by hand."""

from prunelight.planning.fingerprints import describe_model
from prunelight.planning.plan import Plan
from prunelight.planning.steps import RemoveLayers

FACTS = {
    "name": "org/tiny",
    "model_type": "llama",
    "num_hidden_layers": 6,
    "hidden_size": 32,
    "fingerprint": "0123456789abcdef",
}


def make_plan(**changes):
    values = {
        "method": "ShortGPT",
        "arguments": {"ratio": 0.5, "num_layers": None, "protected": [0, -1]},
        "model": FACTS,
        "calibration": {"num_samples": 4, "seq_len": 16, "fingerprint": "fe"},
        "scores": {"block_influence": [0.1, 0.25, 1 / 3]},
        "versions": {"torch": "2.13"},
        "steps": (RemoveLayers((3, 1)), RemoveLayers((4,))),
    }
    return Plan(**{**values, **changes})


def plan_for(model, *layers, **changes):
    return make_plan(model=describe_model(model), steps=(RemoveLayers(layers),), **changes)
