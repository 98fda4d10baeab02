"""One process, two of DDP and two of FSDP2 end with the same best weights, dtypes and zeros.

    python tests/reliability/strategies.py

Each case is fitted once in one process and once in two under either strategy, with the same batches
in all. Written down: the final perplexity, the step whose weights are final, the dtypes of what is
trained while it is, and the share of zeros. Two processes round sums differently: in float32 the
perplexities may differ by 1e-3 of them, with bfloat16 by 0.05 of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]

from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from rows import Row, run
from runs import make_data, make_module, make_trainer, measure_speed_briefly, write_model

from prunelight.callbacks import DLP, ShortGPT
from prunelight.recovery.distillation.objective import Distillation
from prunelight.recovery.sharded_weights import is_sharded, trained_parameters
from prunelight.recovery.zeros.gradual_zeros import Schedule
from prunelight.training.resuming.checkpoint_io import BackgroundCheckpointIO

STRATEGIES = {"one": 1, "ddp": 2, "fsdp2": 2}
STEPS = 8


@dataclass(frozen=True)
class Case:
    """One kind of run, and what of it must agree."""

    precision: str = "32-true"
    recovery: str = "lora"
    best: bool | None = None  # keep the best weights: alone, or with the optimizer (False)
    gradual: bool = False
    by_thread: bool = False  # checkpoints are written by a thread
    fails: bool = False  # the last process' loss turns NaN
    distills: bool = False  # from the dense model, of which a layer is removed
    probes: bool = False  # probes, samples and divergence from the dense model in the report

    @property
    def tolerance(self) -> float:
        """By how much perplexities may differ, as a share."""
        return 1e-3 if self.precision == "32-true" else 0.05


CASES = {
    "best weights alone, by a thread, full": Case(recovery="full", best=True, by_thread=True),
    "best weights alone, LoRA": Case(best=True),
    "best weights with optimizer, full": Case(recovery="full", best=False),
    "best weights with optimizer, LoRA": Case(best=False),
    "LoRA, bf16-true": Case("bf16-true"),
    "LoRA, bf16-mixed": Case("bf16-mixed"),
    "full, bf16-true": Case("bf16-true", "full"),
    "full, bf16-mixed": Case("bf16-mixed", "full"),
    "best weights alone, LoRA, bf16-true": Case("bf16-true", best=True),
    "best weights alone, full, bf16-mixed": Case("bf16-mixed", "full", best=True),
    "gradual zeros, full": Case(recovery="full", gradual=True),
    "gradual zeros, LoRA": Case(gradual=True),
    "gradual zeros, LoRA, bf16-true": Case("bf16-true", gradual=True),
    "gradual zeros, full, bf16-mixed": Case("bf16-mixed", "full", gradual=True),
    "probes and divergence, full": Case(recovery="full", probes=True),
    "probes and divergence, LoRA": Case(probes=True),
    "distillation, full": Case(recovery="full", distills=True),
    "distillation, LoRA": Case(distills=True),
    "distillation, LoRA, bf16-mixed": Case("bf16-mixed", distills=True),
    "NaN in one process, full": Case(recovery="full", fails=True),
    "NaN in one process, LoRA": Case(fails=True),
}
FAST = (  # one of each kind; the others are a sweep
    "NaN in one process, LoRA",
    "probes and divergence, LoRA",
    "best weights alone, by a thread, full",
    "gradual zeros, LoRA",
    "distillation, full",
)


class Dtypes(Callback):
    """The dtypes of what is trained, of its optimizer state and of the frozen rest; the teacher."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        trained = trained_parameters(pl_module.model)
        states = [
            value.dtype
            for optimizer in trainer.optimizers
            for state in optimizer.state.values()
            for name, value in state.items()
            if name.startswith("exp_avg")
        ]
        self.trained = sorted({str(p.dtype) for p in trained.values()})
        self.states = sorted({str(dtype) for dtype in states})
        frozen = [p for p in pl_module.model.parameters() if not p.requires_grad]
        files = trainer.strategy.checkpoint_io
        self.by_thread = isinstance(files, BackgroundCheckpointIO)
        self.frozen = sorted({str(p.dtype) for p in frozen})
        teacher = pl_module.objective.teacher
        self.teacher_is_cut = teacher is not None and is_sharded(teacher.model)


class Destroy(Callback):
    """Lets the last steps destroy what was learned: the best weights are then not the last."""

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step >= STEPS:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = 1.0


class TurnNaN(Callback):
    """Lets the states before the head of the last process be NaN at the third step."""

    def on_train_batch_start(self, trainer, pl_module, *_):
        if trainer.global_step == 2 and trainer.global_rank == trainer.world_size - 1:
            (norm,) = (m for n, m in pl_module.named_modules() if n.endswith("model.norm"))
            self.hook = norm.register_forward_hook(lambda *call: call[-1] * float("nan"))

    def on_train_batch_end(self, trainer, pl_module, *_):
        if hasattr(self, "hook"):
            self.hook.remove()


def fit(name: str, root: Path, strategy: str, case: Case) -> None:
    """Fit a case in this process, one of those of the strategy; rank 0 writes what came out."""
    root.mkdir(parents=True, exist_ok=True)
    seed_everything(0, verbose=False)
    dtypes = Dtypes()
    callbacks: list[Any] = [dtypes, *([TurnNaN()] if case.fails else [])]
    if case.gradual:
        callbacks.append(DLP(0.5, schedule=Schedule(1, STEPS - 1, every=2)))
    if case.best is not None:
        kept = {"monitor": "val/perplexity", "save_weights_only": case.best}
        callbacks.append(ModelCheckpoint(root / "best", filename="best", **kept))
        callbacks.append(Destroy())
    settings: dict[str, Any] = {"learning_rate": 3e-2, "lr_scheduler": "constant"}
    if case.distills:
        callbacks.append(ShortGPT(num_layers=1))
        settings |= {"loss": "kd", "distillation": Distillation(hidden_weight=0.5)}
    module = make_module(name, recovery=case.recovery, probes=case.probes, **settings)
    size = 1 if STRATEGIES[strategy] == 2 else 2
    trainer = make_trainer(
        root,
        *callbacks,
        devices=STRATEGIES[strategy],
        strategy="auto" if strategy == "one" else strategy,
        precision=case.precision,
        max_epochs=-1,
        max_steps=STEPS if case.best is None else 2 * STEPS,
        limit_train_batches=1.0,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        log_every_n_steps=2,
        plugins=[AsyncCheckpointIO()] if case.by_thread else None,
    )
    trainer.fit(module, make_data(name, root, batch_size=size))
    if trainer.is_global_zero:
        record = module.record
        told = {
            "perplexity": record.stages[-1].perplexity,
            "sparsity": record.stages[-1].linear_sparsity,
            "step": record.recovery["weights_of_step"],
            "tokens_seen": record.recovery["tokens_seen"],
            "trained": dtypes.trained,
            "states": dtypes.states,
            "frozen": dtypes.frozen,
            "by_thread": dtypes.by_thread,
            "teacher_is_cut": dtypes.teacher_is_cut,
            "kl": [divergence(stage) for stage in record.stages[1:] if case.probes],
            "answers": [sorted(stage.examined) for stage in record.stages],
        }
        (root / "told.json").write_text(json.dumps(told))


def divergence(stage: Any) -> float:
    """Return the mean KL of a stage from the dense model."""
    return float(stage.examined["divergence"]["kl"]["value"])


def launch(directory: Path, titles: list[str], limit: int = 600) -> dict[str, dict[str, Any]]:
    """Fit cases under every strategy; return title -> strategy -> what came out, or the error."""
    name = write_model(directory / "model")
    for strategy, processes in STRATEGIES.items():
        own = [__file__, "work", name, str(directory), strategy, *titles]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [sys.executable, *(torchrun if processes == 2 else []), *own]
        paths = os.pathsep.join([os.getcwd(), *sys.path])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=environment, timeout=limit, capture_output=True, check=False)
    results: dict[str, dict[str, Any]] = {}
    for title in titles:
        results[title] = {}
        for strategy in STRATEGIES:
            place = directory / strategy / str([*CASES].index(title))
            file = next(
                (place / n for n in ("told.json", "error.txt") if (place / n).exists()), None
            )
            text = file.read_text() if file else '"no result"'
            results[title][strategy] = json.loads(text) if file and file.suffix == ".json" else text
    return results


def fault(title: str, results: dict[str, Any]) -> str:
    """Return how the strategies differ in a case; "" if they agree."""
    case = CASES[title]
    if case.fails:
        message = "RuntimeError: the training loss is nan at optimizer step 3, the run ends at step"
        good = [str(told).startswith(message) for told in results.values()]
        return "" if all(good) else f"{title}: {results}"
    if failed := {s: told for s, told in results.items() if not isinstance(told, dict)}:
        return f"{title}: {failed}"
    one = results["one"]
    for strategy, told in results.items():
        exact = ("step", "tokens_seen", "trained", "states", "frozen", "answers")
        if odd := {n: (one[n], told[n]) for n in exact if one[n] != told[n]}:
            return f"{title}: {strategy} differs from one process in {odd}"
        if told["by_thread"] != case.by_thread:
            return f"{title}: {strategy} writes {'' if told['by_thread'] else 'not '}by a thread"
        if told["teacher_is_cut"] != (case.distills and strategy == "fsdp2"):
            return f"{title}: the teacher is {'' if told['teacher_is_cut'] else 'not '}cut up"
        # Merging in bfloat16 rounds a few weights to zero, others in each.
        limits = {"perplexity": case.tolerance * one["perplexity"], "sparsity": 1e-3}
        for number, allowed in limits.items():
            if abs(told[number] - one[number]) > allowed:
                return f"{title}: {number} {told[number]} under {strategy}, {one[number]} alone"
        if [*map(lambda x: round(x, 2), told["kl"])] != [*map(lambda x: round(x, 2), one["kl"])]:
            return f"{title}: KL {told['kl']} under {strategy}, {one['kl']} alone"
    if case.recovery == "lora" and one["trained"] != ["torch.float32"]:
        return f"{title}: adapters train in {one['trained']}"
    if case.best is not None and one["step"] >= 2 * STEPS:
        return f"{title}: the last weights are the best, so nothing was tried"
    return ""


def measure(options: argparse.Namespace) -> list[Row]:
    """Fit all cases, or the first `--cases` of them."""
    titles = [*CASES][: options.cases]
    with tempfile.TemporaryDirectory() as directory:
        results = launch(Path(directory), titles, limit=3600)
    faults = [text for title in titles if (text := fault(title, results[title]))]
    for text in faults:
        print(text)
    return [
        Row(
            "kinds of run where one process, DDP-2 and FSDP2-2 agree",
            len(titles),
            len(titles) - len(faults),
            "best weights, bf16-true and -mixed, gradual zeros, NaN in one process; full, LoRA",
        )
    ]


def work(name: str, directory: str, strategy: str, *titles: str) -> None:
    """Fit cases, one after another, as one of the processes of a strategy."""
    measure_speed_briefly()
    for title in titles:
        place = Path(directory) / strategy / str([*CASES].index(title))
        try:
            fit(name, place, strategy, CASES[title])
        except Exception as error:
            place.mkdir(parents=True, exist_ok=True)
            (place / "error.txt").write_text(f"{type(error).__name__}: {error}"[:2000])
            if not CASES[title].fails:
                raise
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(*sys.argv[2:])
    else:
        run("strategies", measure, cases=len(CASES))
