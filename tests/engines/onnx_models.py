"""Save the models that docs/exporting.md tries in ONNX, and what transformers 5 computes from them.

python tests/engines/onnx_models.py FOLDER
envs/onnx/bin/python tests/engines/onnx_reader.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from cases import family_model, token_ids
from loaders import State, tokenizer_of
from readers import read_transformers

import prunelight
from prunelight.pruning.remove_layers import remove_layers

_THETA = 500_000.0  # not the default
# Name -> family, layers that go, rope_theta or None, whether prunelight saves it.
MODELS = {
    "llama": ("llama", (2, 5), None, True),
    "llama-theta": ("llama", (2, 5), _THETA, True),
    "llama-theta-transformers": ("llama", (2, 5), _THETA, False),
    "qwen3": ("qwen3", (2, 5), None, True),
    "smollm3": ("smollm3", (1,), None, True),
    "gemma3": ("gemma3", (1,), None, True),
    "phi3": ("phi3", (2, 5), None, True),
}


def main(folder: str) -> None:
    """Save all of them."""
    tokenizer, ids = tokenizer_of(State("tiny", "", lambda: family_model("llama")))
    for name, (family, layers, theta, ours) in MODELS.items():
        model, directory = family_model(family), Path(folder) / name
        if theta is not None:
            model.config.rope_parameters["rope_theta"] = theta
            model = type(model)._from_config(model.config).eval()  # rotations of this base
            model.load_state_dict(family_model(family).state_dict())
        remove_layers(model, layers)
        if ours:
            prunelight.save(model, tokenizer, directory)
        else:
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
        job = {"directory": str(directory), "ids": ids, "options": {}}
        np.save(Path(folder) / f"{name}.npy", read_transformers(job))
    np.save(Path(folder) / "ids.npy", np.array(token_ids()))


if __name__ == "__main__":
    main(sys.argv[1])
