"""What the collapse probes see of SmolLM2-135M-Instruct without some of its layers.

    python tests/benchmarks/probes.py 0 1 2 4 6

Prints one line a probe and number of removed layers (ShortGPT), beside perplexity, and what probes
and samples cost in units of F: one forward of 16 x 512 tokens, by the clock of this process.
Without downloads; the weights are de-quantized from a Q4_1 GGUF.
"""

from __future__ import annotations

import copy
import sys
import time

import prunelight
from prunelight.callbacks import ShortGPT
from prunelight.data.sources import read_documents
from prunelight.evaluation.perplexity import perplexity
from prunelight.evaluation.probes.probing import run_probes
from prunelight.evaluation.probes.results import compare_probes, verdict
from prunelight.evaluation.probes.samples import samples


def main(removed: list[int]) -> None:
    """Print the table."""
    dense, tokenizer = prunelight.load("smollm2-135m", dtype="float32")
    text, other = (
        read_documents(f"sample:{name}")[0]["text"] for name in ("validation", "calibration")
    )
    windows = prunelight.calibration_windows(tokenizer, text, num_samples=4, seq_len=512)
    calibration = prunelight.calibration_windows(tokenizer, other, num_samples=8, seq_len=256)
    begun = time.process_time()
    before = perplexity(dense, windows)
    forward = 4 * (time.process_time() - begun)
    first = None
    for number in removed:
        model = dense
        if number:
            model = copy.deepcopy(dense)
            plan = ShortGPT(num_layers=number).plan(model, calibration)
            model = prunelight.apply(model, plan)
        begun = time.process_time()
        results = run_probes(model, tokenizer, generated=samples(model, tokenizer))
        cost = (time.process_time() - begun) / forward
        ratio = perplexity(model, windows) / before
        first = first or results
        print(f"{number} layers removed: perplexity x {ratio:.2f}, probes cost {cost:.2f} F")
        for name, result in results.items():
            judged = verdict(name, first[name], result)
            print(f"  {name:15} {result.right:3}/{result.total:3} {result.score:.2f} {judged}")
        for text in compare_probes(first, results, perplexity_ratio=ratio):
            print("  warning:", text)
        sys.stdout.flush()


if __name__ == "__main__":
    main([int(number) for number in sys.argv[1:]] or [0])
