"""DLP: zeros in the weights of decoder layers, more where a layer matters less (arXiv:2505.23807).

Allocation (DLP, OWL, uniform) says how many zeros each layer gets, a solver (magnitude, Wanda,
SparseGPT) which weights: any combination, unstructured or N:M. At fit start, or along a schedule
while the model trains. The released code takes the mean where the paper takes the median, ignores
the allocation for N:M, and does not renormalise what it clips.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from peft import PeftModel
from transformers import PreTrainedModel

from prunelight.calibration.windows import Windows, check_windows
from prunelight.callbacks.base import PruningCallback
from prunelight.models.families.layers import decoder_layers, layers_path, matrices
from prunelight.planning.plan import Plan, planned_sparsity
from prunelight.planning.sparsity_shares import (
    clipping_excess,
    dlp,
    fit_to_target,
    owl,
    round_to_patterns,
    uniform,
    weighted_mean,
)
from prunelight.planning.steps import Sparsify
from prunelight.pruning.sparsity.masks import Pattern
from prunelight.pruning.sparsity.sparsegpt import SparseGPT
from prunelight.pruning.sparsity.sparsify import SOLVERS, amount_of, check_step
from prunelight.recovery.zeros.gradual_zeros import Gradual, Schedule, weights_with_adapters
from prunelight.run.method import PruningMethod
from prunelight.run.run_state import Run
from prunelight.run.strategies import group_of_run
from prunelight.runtime.arguments import check_choice
from prunelight.scoring.weight_scores import WeightScore, weight_scores
from prunelight.training.recovery_module import RecoveryModule

log = logging.getLogger(__name__)

ALLOCATIONS: dict[str, WeightScore | None] = {
    "dlp": "median",
    "dlp_mean": "mean",
    "owl": "outlier_ratio",
    "uniform": None,
}

ALPHAS = {"dlp": 0.15, "dlp_mean": 0.15, "owl": 0.08, "uniform": 0.0}

GRANULARITIES = ("layer", "linear")

GRADUAL_SOLVERS = ("wanda", "magnitude")


class DLP(PruningCallback):
    """Sparsify the decoder layers: an allocation of zeros to layers, and a solver.

    Args:
        sparsity: share of the weights of decoder linears that become zero, in [0, 1). The paper
            takes 0.7. Embeddings and head are untouched; the report gives the share of all.
        pattern: "N:M" keeps N of M consecutive inputs (2:4), instead of `sparsity`. Allocations
            other than uniform then choose an N for each layer, N:M on average; hardware that
            computes 2:4 needs allocation="uniform".
        allocation: "dlp" (median, the paper), "dlp_mean" (the released code), "owl", "uniform".
        alpha: half the spread of the shares; 0.15 for DLP, 0.08 for OWL (their papers).
        outlier_factor: OWL's M: what exceeds M times the mean is an outlier.
        granularity: one share a decoder "layer" (the papers), or one a "linear".
        solver: "wanda", "wanda_variant" (shares differ by row), "sparsegpt" or "magnitude".
        sparsegpt: settings of SparseGPT.
        schedule: prune gradually while the model trains, by "wanda" or "magnitude"; None prunes at
            fit start.
        strict: refuse an alpha that pushes a layer out of [0, 1), instead of clipping it.
        offload_activations: keep the calibration states on the CPU.

    Raises:
        ValueError: if an argument is out of its range or has no effect.
    """

    follows_slicing = True
    puts_zeros = True

    def __init__(
        self,
        sparsity: float | None = None,
        pattern: str | int | None = None,
        allocation: Literal["dlp", "dlp_mean", "owl", "uniform"] = "dlp",
        alpha: float | None = None,
        outlier_factor: float = 5.0,
        granularity: Literal["layer", "linear"] = "layer",
        solver: Literal["wanda", "wanda_variant", "sparsegpt", "magnitude"] = "wanda",
        sparsegpt: SparseGPT = SparseGPT(),  # noqa: B008 (frozen)
        schedule: Schedule | None = None,
        strict: bool = False,
        offload_activations: bool = False,
    ) -> None:
        if isinstance(pattern, int):  # YAML 1.1 counts in sixties
            raise ValueError(f'pattern={pattern} is what YAML makes of N:M; quote it: "2:4"')
        self.pattern = None if pattern is None else Pattern.parse(pattern)
        self.target = _target(sparsity, self.pattern)
        check_choice("allocation", allocation, ALLOCATIONS)
        check_choice("granularity", granularity, GRANULARITIES)
        check_choice("solver", solver, SOLVERS)
        if alpha is not None and not alpha >= 0:
            raise ValueError(f"alpha={alpha} must be at least 0")
        if alpha and allocation == "uniform":
            raise ValueError(f"alpha={alpha} has no effect with allocation='uniform'")
        if not outlier_factor > 0:
            raise ValueError(f"outlier_factor={outlier_factor} must be above 0")
        if outlier_factor != 5 and allocation != "owl":
            raise ValueError(f"{outlier_factor=} has no effect with {allocation=}")
        if solver != "sparsegpt" and sparsegpt != SparseGPT():
            raise ValueError(f"{sparsegpt} has no effect with solver={solver!r}")
        if self.pattern is not None and solver == "wanda_variant":
            raise ValueError(f"solver='wanda_variant' chooses by rows and knows no {pattern=}")
        self.sparsity = sparsity
        if schedule is not None and solver not in GRADUAL_SOLVERS:
            raise ValueError(
                f"solver={solver!r} has no gradual form; with a schedule take one of "
                f"{', '.join(GRADUAL_SOLVERS)}"
            )
        self.allocation = allocation
        self.alpha = ALPHAS[allocation] if alpha is None else alpha
        self.outlier_factor = outlier_factor
        self.granularity = granularity
        self.solver = solver
        self.sparsegpt = sparsegpt
        self.schedule = schedule
        self.gradual = schedule is not None
        self._training: Gradual | None = None
        self._watch = ExitStack()
        self._norms: dict[str, Any] = {}  # of the checkpoint that the run goes on from
        self._done = 0  # optimizer steps after which zeros were last added
        self.strict = strict
        self.offload_activations = offload_activations

    def arguments(self) -> dict[str, Any]:
        """Return the arguments that decide the result, as JSON values."""
        return {
            **super().arguments(),
            "pattern": None if self.pattern is None else str(self.pattern),
            "sparsegpt": asdict(self.sparsegpt),
            "schedule": None if self.schedule is None else asdict(self.schedule),
        }

    def check(self, model: PreTrainedModel) -> None:
        """Check that the model has matrices to sparsify, and that the pattern fits their widths.

        Raises:
            ValueError: if the pattern divides a width not; names the matrix.
            TypeError: if the weights are quantized or nothing can be sparsified.
        """
        found = matrices(model)
        if not found:
            raise TypeError(f"{model.config.model_type} has no linear layers in its decoder layers")
        check_step(model, self._step(dict.fromkeys(found, self.target)))

    def check_run(self, run: Run, methods: Sequence[PruningMethod]) -> None:
        """Check that a schedule fits the training.

        Raises:
            ValueError: if nothing is trained, zeros are not kept, weights are quantized, or the
                training ends before it.
        """
        if self.schedule is None:
            return
        if run.place.stage != "fit":
            raise ValueError(f"{self.schedule} prunes while the model trains; use fit, not prune")
        settings = run.settings
        if settings.quantization != "none":
            raise ValueError(
                f"a schedule puts zeros into weights, quantization={settings.quantization} packs "
                "them; prune at fit start (schedule=null), or set quantization=none"
            )
        if settings.recovery == "none" or not settings.keep_zeros:
            raise ValueError(
                f"a schedule prunes while the model trains and keeps the zeros: recovery="
                f"{settings.recovery!r} must be lora or full, keep_zeros={settings.keep_zeros} True"
            )
        if settings.compile_backend is not None:
            raise ValueError(
                f"a schedule watches inputs inside the decoder layers, which compile_backend="
                f"{settings.compile_backend!r} does not show; set it to None"
            )
        steps = run.place.optimizer_steps()
        if self.schedule.end_step > steps:
            raise ValueError(
                f"schedule.end_step={self.schedule.end_step} must not come after the end of "
                f"training, {steps:.0f} optimizer steps; raise trainer.max_steps or lower it"
            )

    @torch.no_grad()
    def plan(self, model: PreTrainedModel, windows: Windows) -> Plan:
        """Decide how many zeros each matrix gets; the model is unchanged.

        Args:
            model: the dense model.
            windows: calibration windows, token ids (N, T), or a mapping with attention_mask.

        Raises:
            ValueError: if arguments or windows do not fit the model, activations are NaN or Inf,
                or a layer would be clipped and `strict` is set.
        """
        self.check(model)
        check_windows(model, windows)
        found = matrices(model)
        sizes = {name: matrix.parameter.numel() for name, matrix in found.items()}
        layers = _by_layer(model, list(found))
        by_layer = self.granularity == "layer"
        units = [layer for layer in layers if layer] if by_layer else [[name] for name in found]
        scores = self._scores(model, windows)
        shares = self._allocate(
            [scores[unit[0]] for unit in units] if scores else [],
            [sum(sizes[name] for name in unit) for unit in units],
        )
        sparsity = {n: share for unit, share in zip(units, shares, strict=True) for n in unit}
        return self.make_plan(
            model,
            windows,
            self._step({name: sparsity[name] for name in found}),
            scores=self._told(layers_path(model), layers, scores, sparsity, sizes),
        )

    def _step(self, sparsity: dict[str, float]) -> Sparsify:
        options = asdict(self.sparsegpt) if self.solver == "sparsegpt" else {}
        pattern = None if self.pattern is None else str(self.pattern)
        return Sparsify(sparsity, self.solver, pattern, options)

    def _scores(self, model: PreTrainedModel, windows: Windows) -> dict[str, float]:
        kind = ALLOCATIONS[self.allocation]
        if kind is None or self.alpha == 0:
            return {}
        return weight_scores(
            model,
            windows,
            kind,
            outlier_factor=self.outlier_factor,
            by_matrix=self.granularity == "linear",
            device=self.device,
            offload=self.offload_activations,
        )

    def _allocate(self, scores: list[float], sizes: list[int]) -> list[float]:
        if not scores:
            return uniform(sizes, self.target)
        spread = owl if self.allocation == "owl" else dlp
        shares = spread(scores, sizes, self.target, self.alpha)
        excess = clipping_excess(shares, self.target)
        if excess > 0:
            text = (
                f"alpha={self.alpha} pushes shares of zeros to [{min(shares):.3f}, "
                f"{max(shares):.3f}], {excess:.3f} out of [0, 1)"
            )
            if self.strict:
                raise ValueError(f"{text}; take a smaller alpha, or strict=False to clip")
            log.warning("%s: clipped, and the others adjusted to sparsity=%s", text, self.target)
        shares = fit_to_target(shares, sizes, self.target)
        if self.pattern is None:
            return shares
        if self.pattern.kept == 1:
            log.warning("pattern=%s is uniform: no layer can keep fewer than 1", self.pattern)
        kept = round_to_patterns(shares, sizes, (self.pattern.kept, self.pattern.of))
        return [1 - n / self.pattern.of for n in kept]

    def _told(
        self,
        path: str,
        layers: list[list[str]],
        scores: dict[str, float],
        sparsity: dict[str, float],
        sizes: dict[str, int],
    ) -> dict[str, list[float]]:
        """Return the plan's scores: one number a decoder layer (and projection, by linear)."""
        told: dict[str, list[float]] = {}
        kind = str(ALLOCATIONS[self.allocation])
        for layer in layers if scores else []:
            for name in layer if self.granularity == "linear" else layer[:1]:
                rest = name.removeprefix(f"{path}.").partition(".")[2]
                suffix = f"_{rest}" if self.granularity == "linear" else ""
                told.setdefault(kind + suffix, []).append(scores[name])
        told["sparsity"] = [
            weighted_mean([sparsity[n] for n in layer], [sizes[n] for n in layer]) if layer else 0.0
            for layer in layers
        ]
        return told

    # --- gradual -----------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the matrices that zeros will be put into."""
        if self.schedule is None:
            return
        assert isinstance(pl_module, RecoveryModule)
        assert pl_module.masks is not None
        assert pl_module.record is not None
        model = pl_module.model
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        plans = [Plan.from_dict(plan) for plan in pl_module.record.plans]
        found = pl_module.masks.matrices
        step = self._step(planned_sparsity(plans, layers_path(base)))
        self._training = Gradual(
            {name: (matrix, amount_of(step, name)) for name, matrix in found.items()},
            self.schedule,
            self.solver,
            group_of_run(trainer),
        )
        self._training.load_state_dict(self._norms)
        self._norms = {}
        self._done = trainer.global_step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch what the matrices get to see, as long as zeros are still to come."""
        if self._training is not None and trainer.global_step < self._training.schedule.end_step:
            mask = batch.get("attention_mask")
            self._watch.enter_context(
                self._training.watching(None if mask is None else mask.bool())
            )

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        """Watch no longer: gradient checkpointing runs the layers again in the backward."""
        self._watch.close()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add zeros after the optimizer steps at which they are due."""
        self._watch.close()
        step, training = trainer.global_step, self._training
        if training is None or step == self._done or not training.schedule.due(step):
            return
        self._done = step
        assert isinstance(pl_module, RecoveryModule)
        masks = pl_module.masks
        assert masks is not None
        weight = weights_with_adapters(pl_module)
        for name, mask in training.masks(step, lambda name: ~masks.pruned(name), weight):
            masks.update(name, mask)
        for optimizer in trainer.optimizers:
            masks.apply(optimizer)
        share = masks.share()
        pl_module.log("prune/sparsity", share)
        log.info("step %d: %.1f %% of the decoder linears are zero", step, 100 * share)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if training ended before the schedule."""
        if self.schedule is not None and self._done < self.schedule.end_step:
            log.warning(
                "training ended after step %d, before schedule.end_step=%d: the planned zeros are "
                "not all there",
                trainer.global_step,
                self.schedule.end_step,
            )

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave no hooks behind."""
        self._watch.close()

    @property
    def state_key(self) -> str:
        """Return a key of its own for each set of arguments: a run may hold several DLPs."""
        return self._generate_state_key(**self.arguments())

    def state_dict(self) -> dict[str, Any]:
        """Return the running norms, for a checkpoint."""
        return {} if self._training is None else self._training.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the running norms of a checkpoint."""
        self._norms = dict(state_dict)


def _by_layer(model: PreTrainedModel, names: list[str]) -> list[list[str]]:
    prefixes = [f"{layers_path(model)}.{i}." for i in range(len(decoder_layers(model)))]
    return [[name for name in names if name.startswith(prefix)] for prefix in prefixes]


def _target(sparsity: float | None, pattern: Pattern | None) -> float:
    """Return the share of zeros that the arguments ask for.

    Raises:
        ValueError: unless it is given once, and lies in [0, 1).
    """
    if (sparsity is None) == (pattern is None):
        raise ValueError(
            f"sparsity={sparsity} and pattern={pattern}: give exactly one of the two (a pattern "
            "N:M says its sparsity, 1 - N / M)"
        )
    target = pattern.sparsity if pattern is not None else sparsity
    assert target is not None
    if not 0 <= target < 1:
        raise ValueError(f"sparsity={sparsity} must lie in [0, 1); 0.7 makes 70 % of them zero")
    return target
