"""Depth pruning on SmolLM2-135M: perplexity of methods, and what the sliding search costs.

    python tests/benchmarks/depth.py quality --calibration c4.jsonl --evaluation wiki.test.txt
    python tests/benchmarks/depth.py recover --calibration c4.jsonl --evaluation wiki.test.txt
    python tests/benchmarks/depth.py cost
    python tests/benchmarks/depth.py speed

Methods are calibrated on the first half of the documents of `--calibration` and evaluated on
`--evaluation` and on the second half. Without files, both texts are those that come with
prunelight. Ratios are taken in one run, the two sides in turn.
"""

import copy
import re
import statistics
import time
from collections import Counter
from functools import partial

import torch
from common import data_of, lora, measuring, parser, perplexities, told

import prunelight
from prunelight.calibration.windows import micro_batches
from prunelight.callbacks import SLEB, ShortenedLlama, ShortGPT, SlidingLayerMerging, WidthPruning
from prunelight.evaluation.speed import LatencyProtocol, measure_latency, measure_speed
from prunelight.models.families.layers import decoder_layers
from prunelight.models.forward import evaluating
from prunelight.models.sizes import parameter_bytes, parameter_count
from prunelight.pruning.merge_layers import merged_layer
from prunelight.scoring.width_scores import SCORES

CPU = torch.device("cpu")
MERGES = ("top", "difference_sum", "released", "mean")
CRITERIA = ("nll", "kl", "cka", "cosine")


def with_width(model, windows, method, count, **options):
    """Apply a depth method, then prune neurons until as many parameters are gone as by `count`."""
    target = parameter_count(model) - count * parameter_count(decoder_layers(model)[0])
    pruned = apply(model, windows, method) if method else copy.deepcopy(model)
    width, hidden = pruned.config.intermediate_size, pruned.config.hidden_size
    per_neuron = 3 * hidden * len(decoder_layers(pruned))
    wanted = width - (parameter_count(pruned) - target) / per_neuron
    narrow = WidthPruning(intermediate_size=32 * round(wanted / 32), multiple=32, **options)
    return prunelight.apply(pruned, narrow.plan(pruned, windows), windows)


def apply(model, windows, method):
    pruned = copy.deepcopy(model)
    return prunelight.apply(pruned, method.plan(pruned, windows), windows)


def methods():
    """Name -> what makes a model with as many parameters as if `count` layers were removed."""

    def plain(make):
        return lambda model, windows, count: apply(model, windows, make(count))

    found = {
        "ShortGPT": plain(lambda n: ShortGPT(num_layers=n)),
        "angular": plain(lambda n: ShortGPT(num_layers=n, score="angular")),
        "SLEB": plain(lambda n: SLEB(num_layers=n)),
        "Shortened LLaMA, perplexity": plain(lambda n: ShortenedLlama(num_layers=n)),
        "Shortened LLaMA, Taylor": plain(lambda n: ShortenedLlama(num_layers=n, score="taylor")),
        "Shortened LLaMA, magnitude": plain(
            lambda n: ShortenedLlama(num_layers=n, score="magnitude")
        ),
    }
    found["SLM"] = plain(lambda n: SlidingLayerMerging(num_layers=n))
    for limit in ("merge", "model"):
        for merge in MERGES:
            for criterion in CRITERIA:
                if merge == "top" or criterion in ("nll", "cosine"):
                    found[f"SLM, {merge}, {criterion}, limit {limit}"] = plain(
                        lambda n, m=merge, c=criterion, x=limit: SlidingLayerMerging(
                            num_layers=n, merge=m, criterion=c, limit=x, search="sliding"
                        )
                    )
    for score in SCORES:
        for fitted in (True, False):
            found[f"width alone, {score}, {'fitted' if fitted else 'cut'}"] = (
                lambda m, w, n, s=score, c=fitted: with_width(m, w, None, n, score=s, correction=c)
            )
    found["SLM of 3 layers less, then width"] = lambda m, w, n: with_width(
        m, w, SlidingLayerMerging(num_layers=n - 3, search="sliding"), n
    )
    return found


def quality(model, data, counts, pattern):
    print("dense", perplexities(model, data), flush=True)
    for name, make in methods().items():
        if not re.search(pattern, name):
            continue
        for count in counts:
            if count <= 3 and name.startswith("SLM of 3"):
                continue  # nothing is left for the depth
            pruned = make(model, data[0], count)
            found = perplexities(pruned, data)
            size = parameter_count(pruned) / 1e6
            left = len(decoder_layers(model)) - count
            print(f"{name} | {left} layers | {size:.1f}M | {found}", flush=True)


def recover(model, tokenizer, data, counts, pattern, steps):
    """Perplexity before and after LoRA on the bundled text, the same for each method."""
    for name, make in methods().items():
        if not re.search(pattern, name):
            continue
        for count in counts:
            make_it = partial(make, model, data[0], count)
            found = lora(make_it, tokenizer, data, steps, f"{abs(hash(name))}-{count}")
            left = len(decoder_layers(model)) - count
            print(f"{name} | {left} layers | {found}", flush=True)


def naive_loop(windows, measure, depth):
    """Go the way of the released loop until it has merged these windows of `depth` layers.

    It runs a whole merged model for each window that it tries, and for each that it keeps.
    """
    measure([])
    done, high, low = [], depth - 2, depth - 3
    while low >= 0:
        measure([*done, (low, high)])
        if any(a <= low and high <= b for a, b in windows):
            low -= 1
        elif low + 1 != high:
            done.append((low + 1, high))
            measure(done)
            high, low = low, low - 1
        else:
            high, low = high - 1, low - 1


def layers_of(windows, depth):
    return depth - sum(high - low for low, high in windows)


def windows_of(plan):
    return [(group[0], group[-1]) for group in plan.steps[0].groups]


def run_merged(model, calibration, windows):
    """One step of the released loop: a copy of the merged model, and a forward with its loss."""
    layers = list(decoder_layers(model))
    kept = dict(enumerate(layers))
    for low, high in windows:
        kept[high] = merged_layer(model, range(low, high + 1), "top")
        for gone in range(low, high):
            kept.pop(gone)
    model.model.layers = torch.nn.ModuleList(kept.values())
    candidate = copy.deepcopy(model)
    model.model.layers = torch.nn.ModuleList(layers)
    candidate.config.num_hidden_layers = len(kept)
    with evaluating(candidate):
        for batch in micro_batches(candidate, calibration):
            candidate(**batch, labels=batch["input_ids"]).loss.item()


def cost(model, windows, counts):
    depth = len(decoder_layers(model))
    for count in counts:
        method = SlidingLayerMerging(num_layers=count, search="sliding")
        with evaluating(model):
            start = time.perf_counter()
            for batch in micro_batches(model, windows):
                model(**batch)
            unit = time.perf_counter() - start
        with measuring(CPU) as idle:
            pass
        with measuring(CPU) as phase:
            plan = method.plan(model, windows)
        above = (phase.peak_bytes - idle.peak_bytes) / parameter_bytes(model)
        threshold = min(plan.found["threshold"], 1.0)  # above it by rounding
        one = SlidingLayerMerging(threshold=threshold, limit="merge").plan(model, windows)
        calls = Counter()
        for name, found in (("search", plan), ("one", one)):
            measured = []
            naive_loop(
                windows_of(found),
                lambda merged, to=measured: to.append(layers_of(merged, depth)),
                depth,
            )
            calls[name] = sum(measured)
        start = time.perf_counter()
        naive_loop(windows_of(plan), lambda merged: run_merged(model, windows, merged), depth)
        naive = time.perf_counter() - start
        found, single = plan.found["layer_forwards"], one.found["layer_forwards"]
        print(
            f"{depth - count} layers: search {found} layer forwards, naive loop that ends in the "
            f"same windows {calls['search']}; one threshold {single}, naive loop with it "
            f"{calls['one']}; time of the search {phase.seconds / unit:.1f} F, of the naive loop "
            f"{naive / unit:.1f} F; memory above the loaded model {above:.2f} checkpoints",
            flush=True,
        )


def speed(model, tokenizer, counts, rounds):
    protocol = LatencyProtocol(num_tokens=32, num_warmup=1, num_runs=3)
    for count in counts:
        pruned = apply(model, None, FirstLayers(count))
        pairs = {"prefill": [], "decode": [], "latency, 32 tokens": []}
        for _ in range(rounds):
            dense, small = measure_speed(model), measure_speed(pruned)
            pairs["prefill"].append(small.prefill / dense.prefill)
            pairs["decode"].append(small.decode / dense.decode)
            times = [
                measure_latency(m, tokenizer, protocol).latency_seconds for m in (model, pruned)
            ]
            pairs["latency, 32 tokens"].append(times[0] / times[1])
        depth = len(decoder_layers(model))
        left, goal = depth - count, depth / (depth - count)
        for name, ratios in pairs.items():
            median = statistics.median(ratios)
            print(f"{left} layers, {name}: {median:.3f} (1 / share {goal:.3f})", told(ratios))


class FirstLayers:
    """Removes the layers in the middle: which ones does not matter for speed."""

    def __init__(self, count):
        self.count = count

    def plan(self, model, windows):
        from prunelight.planning.fingerprints import describe_model
        from prunelight.planning.plan import Plan
        from prunelight.planning.steps import RemoveLayers

        first = (len(decoder_layers(model)) - self.count) // 2
        layers = tuple(range(first, first + self.count))
        return Plan("by hand", {}, describe_model(model), (RemoveLayers(layers),))


def main():
    asked = parser(__doc__, ("quality", "recover", "cost", "speed"), samples=8, seq_len=256)
    asked.add_argument("--counts", type=int, nargs="*", default=[3, 6, 9])
    asked.add_argument("--methods", default="", help="a regular expression of names")
    asked.add_argument("--rounds", type=int, default=5)
    options = asked.parse_args()
    model, tokenizer = prunelight.load(options.model, dtype=options.dtype)
    data = data_of(tokenizer, options)
    if options.what == "quality":
        quality(model, data, options.counts, options.methods)
    elif options.what == "recover":
        recover(model, tokenizer, data, options.counts, options.methods, options.steps)
    elif options.what == "cost":
        cost(model, data[0], options.counts)
    else:
        speed(model, tokenizer, options.counts, options.rounds)


if __name__ == "__main__":
    main()
