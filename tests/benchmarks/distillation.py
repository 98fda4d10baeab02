"""Distillation on SmolLM2-135M: what each loss recovers, its memory, and the cost of its cache.

    python tests/benchmarks/distillation.py quality --losses lm kd_topk kd
    python tests/benchmarks/distillation.py teacher
    python tests/benchmarks/distillation.py cache
    python tests/benchmarks/distillation.py chunks

`quality` prunes by ShortGPT and recovers by LoRA on the same tokens with each loss, in a process of
its own; memory is the peak of that process while it trains. `teacher` recovers the dense model on
the same tokens, for --teacher ("teacher correction", arXiv:2408.11796). `cache` compares writing
the teacher cache to one forward of the same windows (F), in CPU time, which does not mind a busy
machine, and tells what float16 costs. `chunks` compares one loss and gradient with and without
chunks.
"""

import argparse
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from common import measuring

import prunelight
from prunelight.calibration.windows import micro_batches
from prunelight.callbacks import ShortGPT
from prunelight.losses import top_k, top_k_loss
from prunelight.models.forward import evaluating
from prunelight.recovery.distillation.objective import Distillation, Objective
from prunelight.recovery.distillation.teacher_cache import TeacherCache
from prunelight.recovery.lora import LoRA
from prunelight.training.recovery_module import RecoveryModule
from prunelight.training.text_datamodule import TextDataModule

NAME = "smollm2-135m"
CPU = torch.device("cpu")


def data_of(options, validation=None):
    return TextDataModule(
        NAME,
        train=options.train,
        validation=validation or options.validation,
        seq_len=options.seq_len,
        batch_size=options.batch_size,
        num_calibration=4,
        num_validation=options.validation_samples,
    )


def fit(options, loss, prune=True):
    pl.seed_everything(options.seed, verbose=False)
    settings = {"k": options.k, "temperature": options.temperature}
    if loss != "lm" and options.teacher:
        settings["name"] = options.teacher
    if loss != "lm":
        settings["lm_weight"] = options.lm_weight
    module = RecoveryModule(
        NAME,
        dtype="float32",
        lora=LoRA(dropout=0.0),
        learning_rate=options.learning_rate,
        warmup_steps=2,
        loss=loss,
        distillation=Distillation(**settings),
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=options.steps,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[ShortGPT(num_layers=options.num_layers)] if prune else [],
        default_root_dir=options.root if prune else f"{options.root}/teacher",
    )
    data = data_of(options)
    if options.train_samples:
        data._examples["train"] = data.examples("train")[: options.train_samples]
    trainer.fit(module, data)
    stages = " -> ".join(f"{stage.perplexity:.2f}" for stage in module.record.stages)
    (cost,) = (cost for cost in module.record.costs if cost.name == "recover")
    tokens = module.record.recovery["tokens_seen"]
    print(
        f"{loss if prune else 'teacher'}: perplexity {stages} after {tokens} tokens; "
        f"{cost.seconds:.0f} s, peak {cost.peak_bytes / 1e6:.0f} MB",
        flush=True,
    )
    for source in options.evaluation:
        found = prunelight.perplexity(module.model, data_of(options, source).validation_windows())
        print(f"{loss}: recovered perplexity {found:.2f} on {source}", flush=True)


def quality(options):
    for loss in options.losses:  # what is beside the loss is the same: the pruned base is reused
        subprocess.run([sys.executable, __file__, "fit", *sys.argv[2:], "--loss", loss], check=True)


def cpu_seconds(call):
    start = time.process_time()
    call()
    return time.process_time() - start


def cache(options):
    model, _ = prunelight.load(NAME, dtype="float32")
    data = data_of(options)
    windows = torch.stack(
        [ids for ids, _ in data.examples("train")[: options.train_samples]]
    ).long()

    def forward():
        with evaluating(model):
            for batch in micro_batches(model, windows):
                model(**batch)

    def write():
        with tempfile.TemporaryDirectory() as directory:
            cache = TeacherCache(
                None,
                Path(directory),
                lambda places: data.batch("train", places),
                len(windows),
                teacher={},
                k=options.k,
                temperature=1.0,
                vocabulary=model.config.vocab_size,
            )
            cache.open()
            cache.write(model, cache.missing(), progress=False)

    forward()  # warm-up
    ratios = []
    for _ in range(options.rounds):
        unit = cpu_seconds(forward)
        ratios.append(cpu_seconds(write) / unit)
    print(f"cache of {windows.numel()} tokens: {[round(r, 2) for r in ratios]} F (goal 1.2)")
    with evaluating(model):
        logits = model(windows[:1]).logits[0]
    ids, exact = top_k(logits, options.k, 1.0)
    rounded = exact.half()
    error = (exact - rounded.float()).abs()
    loss = top_k_loss(ids, rounded, 1.0)(logits, slice(0, len(logits)))[0] / len(logits)
    print(
        f"float16: log-probabilities are off by {error.max():.2g} at most, {error.mean():.2g} in "
        f"the mean; the teacher's own loss is {loss:.2g} nats a token instead of 0"
    )
    mass = exact[:, : options.k].exp().sum(-1)
    print(f"k={options.k} holds {mass.mean():.4f} of the probability in the mean", flush=True)


def chunks(options):
    model, _ = prunelight.load(NAME, dtype="float32")
    model.requires_grad_(False)
    model.model.layers[-1].requires_grad_(True)
    batch = next(iter(data_of(options).train_dataloader()))
    for chunked in (False, True) * options.rounds:
        objective = Objective("lm", Distillation(), chunked=chunked)
        objective.start(model)
        with measuring(CPU) as idle:
            pass
        with measuring(CPU) as phase:
            start = time.process_time()
            loss = objective(model, batch)
            loss.backward()
            seconds = time.process_time() - start
        above = phase.peak_bytes - idle.peak_bytes
        print(
            f"chunked={chunked}: loss {loss:.6f}, {seconds:.2f} s of CPU time, {above / 1e6:.0f} "
            f"MB above the model for {batch['input_ids'].numel()} tokens",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("quality", "fit", "teacher", "cache", "chunks"))
    parser.add_argument("--train", default="sample:train")
    parser.add_argument("--validation", default="sample:validation")
    parser.add_argument("--evaluation", nargs="*", default=[], help="further texts")
    parser.add_argument("--losses", nargs="*", default=["lm", "kd_topk", "kd"])
    parser.add_argument("--loss", default="lm", help="of fit")
    parser.add_argument("--num-layers", type=int, default=6, help="that are removed")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--train-samples", type=int, help="only the first windows")
    parser.add_argument("--validation-samples", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument(
        "--lm-weight", type=float, default=Distillation.lm_weight, help="of kd and kd_topk"
    )
    parser.add_argument("--teacher", help="of kd and kd_topk: ROOT/teacher/final, for example")
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of adapters and order")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--root", default="/tmp/prunelight-benchmark/distillation")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    {
        "quality": quality,
        "fit": lambda options: fit(options, options.loss),
        "teacher": lambda options: fit(options, "lm", prune=False),
        "cache": cache,
        "chunks": chunks,
    }[options.what](options)


if __name__ == "__main__":
    main()
