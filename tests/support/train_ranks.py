"""Run by torchrun in each of two processes: fits of the method table, one after another.

    torchrun --nproc-per-node 2 tests/support/train_ranks.py NAME ROOT STRATEGY:RECOVERY:METHODS ...

METHODS are numbers of the table, with commas between, or nothing for all. Each fit leaves its run
in ROOT/<strategy>-<recovery>-<number> with digests.json: what each rank's pruned weights were.
Fits named with a trailing "r" start again from the checkpoint of the first epoch.
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from methods_table import METHODS
from runs import TEXT, VARIED_TEXT, make_data, make_module, make_trainer, measure_speed_briefly

from prunelight.models.families.matrices import matrices


class Digest(pl.Callback):
    """The decoder layers' matrices of this rank before training, as one number."""

    def setup(self, trainer, pl_module, stage):
        digest = hashlib.sha256()
        for matrix in matrices(pl_module.model).values():
            digest.update(matrix.parameter.detach().numpy().tobytes())
        self.digest = digest.hexdigest()


def texts_of(root):
    """Write two validation texts; return a mapping of their names to their files."""
    root.mkdir(parents=True, exist_ok=True)
    named = {"mill": TEXT, "symbols": VARIED_TEXT}
    for label, text in named.items():
        (root / f"{label}.txt").write_text(text, encoding="utf-8")
    return {label: str(root / f"{label}.txt") for label in named}


def fit(name, root, strategy, recovery, method, *, resume):
    root.mkdir(parents=True, exist_ok=True)
    pl.seed_everything(0, verbose=False)
    settings, data = {"recovery": recovery}, {"batch_size": 1}
    if recovery == "int8":  # LoRA over 8 bits, from a teacher's cache of two files
        settings, data = {"quantization": "int8", "loss": "kd_topk"}, {"seq_len": 8}
    if recovery == "texts":
        settings, data = {}, {"batch_size": 1, "validation": texts_of(root)}
    module, data = make_module(name, **settings), make_data(name, root, **data)
    look, tokenised, build = Digest(), [], data._build

    def recorded(role):
        tokenised.append(role)
        return build(role)

    data._build = recorded
    trainer = make_trainer(root, method.make(), look, devices=2, strategy=strategy)
    checkpoint = root / "checkpoints" / "epoch=0.ckpt" if resume else None
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    validated = trainer.validate(module, data, verbose=False)
    further = {"further": validated[1]["val/perplexity/symbols"]} if recovery == "texts" else {}
    digests = [None, None]
    torch.distributed.all_gather_object(digests, look.digest)
    roles = [None, None]
    torch.distributed.all_gather_object(roles, sorted(tokenised))
    if trainer.is_global_zero:
        told = {"digests": digests, "validated": validated[0]["val/perplexity"], **further}
        told |= {"tokenised": roles, "files": [*map(str, root.glob("tokens*"))]}
        (root / "digests.json").write_text(json.dumps(told))


def main():
    measure_speed_briefly()
    name, root, *runs = sys.argv[1:]
    methods = list(METHODS.values())
    for run in runs:
        strategy, recovery, chosen = run.split(":")
        for number in chosen.split(",") if chosen else map(str, range(len(methods))):
            method = methods[int(number.rstrip("r"))]
            place = Path(root) / f"{strategy}-{recovery}-{number.rstrip('r')}"
            resume = number.endswith("r")
            if resume and int(os.environ["RANK"]) == 0:
                shutil.copytree(place / "final", place / "final-first")
            fit(name, place, strategy, recovery, method, resume=resume)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
