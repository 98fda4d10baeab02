"""Speed of an evaluation against a bare transformers loop, at equal batch and dtype.

    python tests/benchmarks/evaluation_speed.py [MODEL] [--windows N] [--rounds N]

The bare loop sums `model(ids, labels=ids).loss` over the same batches. Rounds alternate, so that
both meet the same machine. `divergence` reads two models, and its bare loop does too.
"""

import argparse
import statistics
import time

import torch

import prunelight
from prunelight.evaluation.quality.divergence import against_reference
from prunelight.evaluation.quality.text_quality import text_quality
from prunelight.evaluation.quality.text_windows import text_windows


def bare_loop(models, ids, batch_size):
    """Return the perplexity of each model."""
    totals = [0.0] * len(models)
    with torch.no_grad():
        for batch in ids.split(batch_size):
            for index, model in enumerate(models):
                loss = model(input_ids=batch, labels=batch, use_cache=False).loss
                totals[index] += loss.item() * len(batch)
    return [float(torch.tensor(total / len(ids)).exp()) for total in totals]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    model, tokenizer = prunelight.load(given.model, dtype="float32")
    reference, _ = prunelight.load(given.model, dtype="float32")
    text = text_windows(tokenizer, "sample:validation", given.seq_len, max_windows=given.windows)
    tokens = given.batch_size * given.seq_len
    contests = {
        "text_quality": (
            lambda: [text_quality(model, text, batch_tokens=tokens).perplexity.value],
            lambda: bare_loop([model], text.ids, given.batch_size),
        ),
        "against_reference": (
            lambda: [
                quality.perplexity.value
                for quality in against_reference(model, reference, text, batch_tokens=tokens)[:2]
            ],
            lambda: bare_loop([model, reference], text.ids, given.batch_size),
        ),
    }
    for name, (ours, bare) in contests.items():
        assert torch.tensor(ours()).allclose(torch.tensor(bare()), rtol=1e-4)
        seconds = []
        for _ in range(given.rounds):
            pair = []
            for call in (ours, bare):
                began = time.perf_counter()
                call()
                pair.append(time.perf_counter() - began)
            seconds.append(pair)
        ratios = sorted(theirs / own for own, theirs in seconds)
        print(
            f"{name}: {statistics.median(ratios):.3f} of the bare loop's speed "
            f"({ratios[0]:.3f} to {ratios[-1]:.3f}; {given.rounds} rounds in turn, "
            f"{statistics.median(own for own, _ in seconds):.2f} s)"
        )


if __name__ == "__main__":
    main()
