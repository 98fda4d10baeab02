"""What the benchmarks share: their texts, recovery by LoRA, and how figures are told."""

import argparse
import time
from contextlib import contextmanager

import lightning.pytorch as pl

import prunelight
from prunelight.data.sources import read_documents
from prunelight.data.token_windows import calibration_windows
from prunelight.models.sizes import parameter_count
from prunelight.recovery.lora import LoRA
from prunelight.runtime.measuring import (
    Measurement,
    peak_memory,
    release_freed_memory,
    reset_peak,
)
from prunelight.training.recovery_module import RecoveryModule
from prunelight.training.text_datamodule import TextDataModule


def parser(description, what, *, samples, seq_len):
    """What both can be asked for; the ratios or counts, and what is special, are added by each."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("what", choices=what)
    made.add_argument("--model", default="smollm2-135m")
    made.add_argument("--calibration", default="sample:calibration")
    made.add_argument("--evaluation", default="sample:validation")
    made.add_argument("--samples", type=int, default=samples)
    made.add_argument("--seq-len", type=int, default=seq_len)
    made.add_argument("--validation-samples", type=int, default=16)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--steps", type=int, default=60)
    made.add_argument("--dtype", default="bfloat16")
    return made


@contextmanager
def measuring(device):
    """Yield a Measurement, which has the seconds and the peak of memory inside once it ends."""
    release_freed_memory(device)
    reset_peak(device)
    measured, start = Measurement(), time.perf_counter()
    yield measured
    measured.seconds = time.perf_counter() - start
    measured.peak_bytes = peak_memory(device)


def data_of(tokenizer, options):
    """The windows to calibrate on, and those of each text to evaluate on.

    Calibration takes the first half of its documents, the second is the second text.
    """
    texts = documents(options.calibration)
    half = len(texts) // 2 or len(texts)
    windows = calibration_windows(
        tokenizer, texts[:half], options.samples, options.seq_len, seed=options.seed
    )
    held_out = [documents(options.evaluation), *([texts[half:]] if len(texts) > 1 else [])]
    evaluated = [
        calibration_windows(tokenizer, text, options.validation_samples, 512) for text in held_out
    ]
    return [windows, *evaluated]


def perplexities(model, data):
    """Those on each text to evaluate on, as they are told."""
    return told(prunelight.perplexity(model, windows) for windows in data[1:])


def lora(make, tokenizer, data, steps, name):
    """The perplexities before and after LoRA on the bundled text, the same for each method."""
    pl.seed_everything(0, verbose=False)
    module = RecoveryModule("in memory", lora=LoRA(dropout=0.0), learning_rate=1e-3, warmup_steps=5)
    module.model, module.tokenizer = make(), tokenizer
    before = perplexities(module.model, data)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=f"/tmp/prunelight-benchmark/{name}",
    )
    trainer.fit(module, TextDataModule(tokenizer, batch_size=2).train_dataloader())
    return f"{before} -> {perplexities(module.model, data)}"


def size(model, dense):
    """The parameters, and by how much they differ from those of the dense model."""
    count = parameter_count(model)
    return f"{count / 1e6:.1f}M ({100 * (count / dense - 1):+.1f} %)"


def told(values):
    return ", ".join(f"{value:.2f}" for value in values)


def documents(path):
    return [row["text"] for row in read_documents(path)]
