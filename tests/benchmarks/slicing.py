"""Slicing on SmolLM2-135M: perplexity and true parameters, before and after LoRA, and the cost.

    python tests/benchmarks/slicing.py quality --calibration c4.jsonl --evaluation wiki.test.txt
    python tests/benchmarks/slicing.py recover --calibration c4.jsonl --evaluation wiki.test.txt
    python tests/benchmarks/slicing.py cost

Methods are calibrated on the first half of the documents of `--calibration` and evaluated on
`--evaluation` and on the second half. Without files, both texts are those that come with
prunelight.
"""

import argparse
import copy
import re
import time

import lightning.pytorch as pl
import torch

import prunelight
from prunelight.calibration import evaluating, micro_batches
from prunelight.callbacks import DynamicSlicing, ShortGPT, SliceGPT
from prunelight.components import principal_components
from prunelight.data import TextDataModule
from prunelight.evaluation import measuring
from prunelight.metrics import parameter_bytes, parameter_count
from prunelight.module import RecoveryModule
from prunelight.recovery import LoRA
from prunelight.windows import calibration_windows, read_documents

CPU = torch.device("cpu")


def methods():
    """Name -> what makes a callback from a slice ratio."""
    found = {
        "SliceGPT": lambda r: SliceGPT(r),
        "SliceGPT, normalized": lambda r: SliceGPT(r, signal="normalized"),
        "SliceGPT, sliced embeddings": lambda r: SliceGPT(r, embedding="sliced"),
        "SliceGPT, random": lambda r: SliceGPT(r, orientation="random"),
        "SliceGPT, shared": lambda r: SliceGPT(r, rotation="shared"),
        "SliceGPT, shared, normalized": lambda r: SliceGPT(
            r, rotation="shared", signal="normalized"
        ),
        "DynamicSlicing": lambda r: DynamicSlicing(r),
        "DynamicSlicing, normalized": lambda r: DynamicSlicing(r, signal="normalized"),
    }
    for share in (75, 50, 25, 0):
        found[f"base {share} %"] = lambda r, s=share: DynamicSlicing(r, r * s / 100)
    return found


def chosen(pattern):
    return {name: make for name, make in methods().items() if re.fullmatch(pattern, name)}


def apply(model, windows, method):
    pruned = copy.deepcopy(model)
    plan = method.plan(pruned, windows)
    return prunelight.apply(pruned, plan, windows), plan


def quality(model, data, ratios, pattern):
    dense = parameter_count(model)
    print("dense", told(prunelight.perplexity(model, e) for e in data[1:]), flush=True)
    for name, make in chosen(pattern).items():
        for ratio in ratios:
            sliced, plan = apply(model, data[0], make(ratio))
            found = told(prunelight.perplexity(sliced, e) for e in data[1:])
            print(f"{name} | {ratio} | {size(sliced, dense)} | {found} | {plan.found}", flush=True)


def recover(model, tokenizer, data, ratios, pattern, steps):
    """Perplexity before and after LoRA on the bundled text, the same for each method."""
    dense = parameter_count(model)
    for name, make in chosen(pattern).items():
        for ratio in ratios:
            pl.seed_everything(0, verbose=False)
            module = RecoveryModule(
                "in memory", lora=LoRA(dropout=0.0), learning_rate=1e-3, warmup_steps=5
            )
            module.model, plan = apply(model, data[0], make(ratio))
            module.tokenizer = tokenizer
            told_size = size(module.model, dense)
            before = told(prunelight.perplexity(module.model, e) for e in data[1:])
            trainer = pl.Trainer(
                accelerator="cpu",
                max_steps=steps,
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=False,
                default_root_dir=f"/tmp/prunelight-benchmark/{name.replace(' ', '-')}-{ratio}",
            )
            trainer.fit(module, TextDataModule(tokenizer, batch_size=2).train_dataloader())
            after = told(prunelight.perplexity(module.model, e) for e in data[1:])
            bases = plan.found.get("base_ratio", ratio)
            print(
                f"{name} (base {bases}) | {ratio} | {told_size} | {before} -> {after}", flush=True
            )


def cost(model, windows, ratio):
    with evaluating(model):
        start = time.perf_counter()
        for batch in micro_batches(model, windows):
            model(**batch)
        unit = time.perf_counter() - start
    hidden = model.config.hidden_size
    gram = torch.randn(hidden, hidden, dtype=torch.float64)
    gram = gram @ gram.T
    start = time.perf_counter()
    principal_components(gram, hidden)
    decompositions = (2 * model.config.num_hidden_layers - 1) * (time.perf_counter() - start)
    method = SliceGPT(ratio)
    plan = method.plan(model, windows)
    with measuring(CPU) as idle:
        pass
    with measuring(CPU) as phase:
        sliced = prunelight.apply(copy.deepcopy(model), plan, windows)
    buffer = windows.numel() * hidden * model.dtype.itemsize
    above = phase.peak_bytes - idle.peak_bytes - parameter_bytes(model)
    with evaluating(sliced):
        start = time.perf_counter()
        for batch in micro_batches(sliced, windows):
            sliced(**batch)
        fast = time.perf_counter() - start
    print(
        f"{windows.numel()} tokens: slicing {phase.seconds / unit:.2f} F, of which about "
        f"{decompositions / unit:.2f} F eigendecompositions; memory above the two models "
        f"{above / buffer:.2f} activation buffers ({above / parameter_bytes(model):.2f} "
        f"checkpoints); a forward of the sliced model {fast / unit:.2f} F",
        flush=True,
    )


def speed(model, ratio):
    """Forward time of a sliced model and of one with a fifth of its layers removed."""
    windows = torch.randint(1000, (8, 256))
    short = ShortGPT(num_layers=6)
    models = {"dense": model, "24 layers": apply(model, windows, short)[0]}
    models["sliced"] = apply(model, windows, SliceGPT(ratio))[0]
    for _ in range(3):
        for name, one in models.items():
            with evaluating(one):
                start = time.perf_counter()
                for batch in micro_batches(one, windows):
                    one(**batch)
                print(name, f"{time.perf_counter() - start:.2f} s", flush=True)


def size(model, dense):
    count = parameter_count(model)
    return f"{count / 1e6:.1f}M ({100 * (count / dense - 1):+.1f} %)"


def told(values):
    return ", ".join(f"{value:.2f}" for value in values)


def documents(path):
    return [row["text"] for row in read_documents(path)]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("quality", "recover", "cost", "speed"))
    parser.add_argument("--calibration", default="sample:calibration")
    parser.add_argument("--evaluation", default="sample:validation")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--validation-samples", type=int, default=16)
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.1, 0.2, 0.25, 0.3])
    parser.add_argument("--methods", default=".*", help="a regular expression of whole names")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    model, tokenizer = prunelight.load("smollm2-135m", dtype=options.dtype)
    texts = documents(options.calibration)
    half = len(texts) // 2 or len(texts)
    windows = calibration_windows(
        tokenizer, texts[:half], options.samples, options.seq_len, seed=options.seed
    )
    held_out = [documents(options.evaluation), *([texts[half:]] if len(texts) > 1 else [])]
    data = [
        windows,
        *(calibration_windows(tokenizer, t, options.validation_samples, 512) for t in held_out),
    ]
    if options.what == "quality":
        quality(model, data, options.ratios, options.methods)
    elif options.what == "recover":
        recover(model, tokenizer, data, options.ratios, options.methods, options.steps)
    elif options.what == "cost":
        cost(model, windows, options.ratios[-1])
    else:
        speed(model, options.ratios[-1])


if __name__ == "__main__":
    main()
