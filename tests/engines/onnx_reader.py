"""Export models to ONNX and compare what ONNX Runtime computes; see onnx_models.py.

Runs in an environment with optimum-onnx and onnxruntime; nothing of prunelight is imported.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from readers import log_softmax


def main(folder: str) -> None:
    """Print for each model the largest difference of a log-probability, or the refusal."""
    from optimum.onnxruntime import ORTModelForCausalLM

    ids = torch.tensor(np.load(Path(folder) / "ids.npy"))[None]
    places = torch.arange(ids.shape[1])[None]
    for expected in sorted(Path(folder).glob("*.npy")):
        if expected.stem == "ids":
            continue
        try:
            model = ORTModelForCausalLM.from_pretrained(expected.with_suffix(""), export=True)
            logits = model(ids, attention_mask=torch.ones_like(ids), position_ids=places).logits[0]
            difference = np.abs(log_softmax(logits.numpy()) - np.load(expected)).max()
            sys.stdout.write(f"{expected.stem}: {difference:.2g}\n")
        except Exception as error:  # an engine refuses in many ways
            words = " ".join(str(error).split())[:200]
            sys.stdout.write(f"{expected.stem}: {type(error).__name__}: {words}\n")


if __name__ == "__main__":
    main(sys.argv[1])
