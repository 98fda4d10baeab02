"""A pruning method of your own, whole, and what it can do at once: plan, apply, and run in a fit.

    python examples/new_method.py
    python examples/new_method.py --model ./my-model

The method removes the decoder layers that add least to the hidden states: the mean of
|output - input| / |input| over all tokens, padding included. docs/add-a-method.md tells the rest.
"""

import argparse

import torch
from lightning.pytorch import Trainer
from transformers import PreTrainedModel

import prunelight
from prunelight import Plan, RecoveryModule, RemoveLayers, TextDataModule
from prunelight.calibration.shared_windows import group_of
from prunelight.calibration.statistics import check_finite
from prunelight.calibration.windows import Windows, check_windows, micro_batches, split_windows
from prunelight.callbacks import PruningCallback
from prunelight.models.families.layers import decoder_layers
from prunelight.models.forward import evaluating, forward_without_head, watching_layers
from prunelight.planning.layer_choice import layers_to_remove, lowest_scores
from prunelight.pruning.remove_layers import check_removable

ROOT = "runs/new_method"


class SmallestUpdate(PruningCallback):
    """Remove the `num_layers` decoder layers that add least to the hidden states."""

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError if no layer would be left, or the family cannot lose any."""
        layers_to_remove(None, self.num_layers, len(decoder_layers(model)))
        check_removable(model)

    @torch.no_grad()
    def plan(self, model: PreTrainedModel, windows: Windows) -> Plan:
        """Score all layers in one forward, and choose the lowest."""
        self.check(model)
        check_windows(model, windows)
        sums = torch.zeros(len(decoder_layers(model)), dtype=torch.float64)

        def add(index: int, x: torch.Tensor, y: torch.Tensor) -> None:
            sums[index] += ((y - x).float().norm(dim=-1) / x.float().norm(dim=-1)).sum().cpu()
            check_finite(index, sums[index], y)

        with evaluating(model), watching_layers(model, add):
            for batch in micro_batches(model, windows):
                forward_without_head(model, batch)
        scores = (group_of(windows).sum(sums) / split_windows(windows)[0].numel()).tolist()
        step = RemoveLayers(tuple(lowest_scores(scores, self.num_layers)))
        return self.make_plan(model, windows, step, scores={"update": scores})


def main() -> None:
    """Plan and apply the method to a model in memory; then prune and recover in a fit."""
    parser = argparse.ArgumentParser(description="Prune by a method of your own.")
    parser.add_argument("--model", default="smollm2-135m", help="directory, hub id, .gguf, alias")
    name = parser.parse_args().model

    sizes = {"seq_len": 128, "batch_size": 2, "num_calibration": 8, "num_validation": 8}
    data = TextDataModule(name, **sizes)
    model, _ = prunelight.load(name)
    windows = data.calibration_windows()
    plan = SmallestUpdate(num_layers=2).plan(model, windows)
    model = prunelight.apply(model, plan, windows)
    perplexity = prunelight.perplexity(model, data.validation_windows())
    print("removed layers:", *plan.steps[0].layers, f"perplexity without them: {perplexity:.2f}")

    trainer = Trainer(
        max_steps=4,
        default_root_dir=ROOT,
        callbacks=[SmallestUpdate(num_layers=2)],
        devices=1,
        logger=False,
    )
    trainer.fit(RecoveryModule(name, warmup_steps=0), data)
    print(f"saved: {ROOT}/final, report: {ROOT}/report.md")


if __name__ == "__main__":
    main()
