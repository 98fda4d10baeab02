"""Costs of ShortGPT and of recovery on SmolLM2-135M, as ratios taken in one run.

    python tests/benchmarks/shortgpt.py

Each ratio is the median over rounds of the two sides in turn, so a machine whose speed drifts does
not favour either. F is one forward of the calibration windows through the whole dense model.
"""

import argparse
import copy
import statistics
import tempfile
import time

import lightning.pytorch as pl
import torch
from common import measuring
from peft import LoraConfig, get_peft_model
from torch import nn

import prunelight
from prunelight.calibration.windows import micro_batches
from prunelight.callbacks import ShortGPT
from prunelight.evaluation.speed import measure_speed
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.matrices import lora_targets
from prunelight.models.forward import evaluating
from prunelight.models.sizes import parameter_bytes
from prunelight.recovery.lora import LoRA
from prunelight.training.recovery_module import RecoveryModule
from prunelight.training.text_datamodule import TextDataModule

CPU = torch.device("cpu")


def forward(model, windows):
    with evaluating(model):
        for batch in micro_batches(model, windows):
            model(**batch)


def without_head(model, windows):
    with evaluating(model):
        for batch in micro_batches(model, windows):
            model.base_model(**batch)


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def activation_bytes(model, windows):
    """Bytes of all leaf outputs inside one decoder layer for one micro-batch."""
    sizes = []

    def add(module, args, output):
        if isinstance(output, torch.Tensor):
            sizes.append(output.numel() * output.element_size())

    layer = decoder_layers(model)[0]
    leaves = [m for m in layer.modules() if not any(True for _ in m.children())]
    handles = [m.register_forward_hook(add) for m in leaves if not isinstance(m, nn.Identity)]
    with evaluating(model):
        model.base_model(**next(iter(micro_batches(model, windows))))
    for handle in handles:
        handle.remove()
    return sum(sizes)


def benchmark_scoring(model, windows, rounds):
    method = ShortGPT(ratio=0.2)
    forward(model, windows[:4])
    ratios = []
    for _ in range(rounds):
        unit = seconds(lambda: forward(model, windows))
        ratios.append(seconds(lambda: method.plan(model, windows)) / unit)
    print(f"score and plan: {statistics.median(ratios):.3f} F (goal: at most 1.15)", ratios)
    peaks = []
    for call in (without_head, lambda m, w: method.plan(m, w)):
        with measuring(CPU) as phase:
            call(model, windows)
        peaks.append(phase.peak_bytes)
    unit, checkpoint = activation_bytes(model, windows), parameter_bytes(model)
    print(
        f"memory of scoring above the same forward without hooks: "
        f"{(peaks[1] - peaks[0]) / unit:.2f} activations of one layer ({unit / 1e6:.1f} MB; goal: "
        f"at most 1); the whole process peaks at {peaks[1] / checkpoint:.2f} checkpoints"
    )


class Timed(RecoveryModule):
    """A module whose fit ends with training."""

    def on_fit_end(self):
        pass


class Clock(pl.Callback):
    def __init__(self):
        self.marks = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.marks.append(time.perf_counter())


def lightning_step_seconds(directory, data, steps, lora):
    module, clock = Timed(directory, lora=lora, warmup_steps=0), Clock()
    loader = TextDataModule(directory, **data).train_dataloader()  # no data module, no report
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tempfile.mkdtemp(),
        callbacks=[clock],
    )
    trainer.fit(module, loader)
    return (clock.marks[-1] - clock.marks[0]) / (steps - 1)


def bare_step_seconds(directory, data, steps, lora):
    model, _ = prunelight.load(directory)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora_targets(model)[0],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    data_module = TextDataModule(directory, **data)
    marks = []
    for batch, _ in zip(data_module.train_dataloader(), range(steps), strict=False):
        loss = model(**batch).loss
        loss.item()  # a loop that logs, as Lightning's progress bar does
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        marks.append(time.perf_counter())
    return (marks[-1] - marks[0]) / (steps - 1)


def benchmark_training(model, tokenizer, rounds, steps):
    directory = tempfile.mkdtemp()
    prunelight.save(model, tokenizer, directory)
    data = {"seq_len": 512, "batch_size": 2}
    for lora in (LoRA(), LoRA(dropout=0.0)):
        ratios = []
        for _ in range(rounds):
            ours = lightning_step_seconds(directory, data, steps, lora)
            ratios.append(bare_step_seconds(directory, data, steps, lora) / ours)
        print(
            f"recovery throughput over a bare transformers + peft loop, dropout {lora.dropout}: "
            f"{statistics.median(ratios):.2f} (goal: at least 1.0)",
            ratios,
        )


def benchmark_speed(dense, pruned, rounds):
    pairs = [(measure_speed(dense), measure_speed(pruned)) for _ in range(rounds)]
    for phase in ("prefill", "decode"):
        ratios = [getattr(after, phase) / getattr(before, phase) for before, after in pairs]
        few, many = len(decoder_layers(pruned)), len(decoder_layers(dense))
        print(f"{phase} of {few} layers over {many}: {statistics.median(ratios):.2f}", ratios)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    model, tokenizer = prunelight.load(arguments.model, dtype="bfloat16")
    windows = TextDataModule(tokenizer, num_calibration=16).calibration_windows()
    benchmark_scoring(model, windows, arguments.rounds)
    plan = ShortGPT(ratio=0.2).plan(model, windows)
    dense, model = model, prunelight.apply(copy.deepcopy(model), plan)
    benchmark_speed(dense, model, arguments.rounds)
    benchmark_training(model, tokenizer, arguments.rounds, arguments.steps)


if __name__ == "__main__":
    main()
