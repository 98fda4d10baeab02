"""Prune in a Trainer of your own: your LightningModule, your LightningDataModule, one callback.

    python examples/own_trainer.py
    python examples/own_trainer.py --model ./my-model

The module needs a transformers model as `model` after `setup`, and a `tokenizer`. The data module
needs dataloaders whose batches hold `input_ids`. Nothing else in the two knows of pruning. The
callback prunes `module.model` after `setup` and before `configure_optimizers`; at the end it writes
final/ and report.md. Here the second fit goes on from a checkpoint of the first one.
"""

import argparse

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

import prunelight
from prunelight.callbacks import ShortGPT

ROOT = "runs/own_trainer"


class MyModule(pl.LightningModule):
    """Trains all weights of a causal language model."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.model = name, None

    def setup(self, stage: str) -> None:
        """Load the model once; transformers' own `from_pretrained` serves as well."""
        if self.model is None:
            self.model, self.tokenizer = prunelight.load(self.name)

    def training_step(self, batch, batch_idx):
        """Return the loss of transformers."""
        return self.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss

    def validation_step(self, batch, batch_idx):
        """Log the same loss on held-out text."""
        self.log("val_loss", self.training_step(batch, batch_idx), prog_bar=True)

    def configure_optimizers(self):
        """Return a plain optimizer: its parameters are those of the pruned model."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class MyData(pl.LightningDataModule):
    """Has dataloaders only; the first `num_calibration` rows of training calibrate the pruning."""

    num_calibration = 8

    def __init__(self, name: str) -> None:
        super().__init__()
        self.tokenizer = prunelight.load_tokenizer(name)

    def train_dataloader(self) -> DataLoader:
        """Return 8 batches of 2 windows."""
        return self._loader("sample:train", 16)

    def val_dataloader(self) -> DataLoader:
        """Return 4 batches of 2 windows."""
        return self._loader("sample:validation", 8)

    def _loader(self, source: str, num_rows: int) -> DataLoader:
        text = prunelight.read_documents(source)[0]["text"]
        ids = self.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
        rows = ids[: num_rows * 128].view(num_rows, 128)
        return DataLoader([{"input_ids": row} for row in rows], batch_size=2)


def make_trainer(max_epochs: int) -> pl.Trainer:
    """Return a plain Trainer that prunes, and keeps a checkpoint of its last epoch."""
    return pl.Trainer(
        max_epochs=max_epochs,
        default_root_dir=ROOT,
        callbacks=[ShortGPT(ratio=0.2), ModelCheckpoint(dirpath=f"{ROOT}/checkpoints")],
        devices=1,
        logger=False,
    )


def main() -> None:
    """Prune and train one epoch; go on from its checkpoint for a second one."""
    parser = argparse.ArgumentParser(description="Prune in a Trainer of your own.")
    parser.add_argument("--model", default="smollm2-135m", help="directory, hub id, .gguf, alias")
    name = parser.parse_args().model

    first = make_trainer(max_epochs=1)
    first.fit(MyModule(name), MyData(name))

    # A new process would do the same: the pruned base on disk is used again, without scoring.
    second, module = make_trainer(max_epochs=2), MyModule(name)
    second.fit(module, MyData(name), ckpt_path=first.checkpoint_callback.best_model_path)

    print("layers:", module.model.config.num_hidden_layers, "epochs:", second.current_epoch)
    print(f"saved: {ROOT}/final, report: {ROOT}/report.md")


if __name__ == "__main__":
    main()
