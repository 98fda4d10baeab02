"""Width pruning on SmolLM2-135M: perplexity by score, and by allocation across layers.

    python tests/benchmarks/width.py quality --calibration c4.jsonl --evaluation wiki.test.txt

The model is calibrated on the first half of the documents of `--calibration` and evaluated on
`--evaluation` and on the second half. Without files, both texts are those that come with
prunelight.
"""

import copy

from common import data_of, parser, perplexities, size

import prunelight
from prunelight.callbacks import WidthPruning
from prunelight.models.sizes import parameter_count
from prunelight.scoring.width_scores import SCORES

ALLOCATIONS = ("uniform", "global")


def quality(options):
    model, tokenizer = prunelight.load(options.model, dtype=options.dtype)
    data, dense = data_of(tokenizer, options), parameter_count(model)
    print("dense", perplexities(model, data), flush=True)
    for ratio in options.ratios:
        for score in options.scores:
            for allocation in ALLOCATIONS:
                width, groups = model.config.intermediate_size, model.config.num_key_value_heads
                kept = {"intermediate_size": 32 * round(width * (1 - ratio) / 32), "multiple": 32}
                if options.heads:
                    kept = {"num_key_value_heads": round(groups * (1 - ratio))}
                method = WidthPruning(**kept, score=score, allocation=allocation)
                pruned = copy.deepcopy(model)
                plan = method.plan(pruned, data[0])
                pruned = prunelight.apply(pruned, plan, data[0])
                (step,) = plan.steps
                counts = sorted(map(len, (step.heads or step.neurons).values()))
                told = f"{counts[0]} to {counts[-1]}"
                figures = (size(pruned, dense), told, perplexities(pruned, data))
                print(ratio, score, allocation, *figures, sep=" | ", flush=True)


if __name__ == "__main__":
    asked = parser(__doc__, ["quality"], samples=16, seq_len=512)
    asked.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.4])
    asked.add_argument("--scores", nargs="+", choices=SCORES, default=["wanda", "fluctuation"])
    asked.add_argument("--heads", action="store_true", help="prune heads instead of neurons")
    quality(asked.parse_args())
