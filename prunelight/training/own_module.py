"""Runs of a LightningModule of the user's own, whose `model` is a transformers model after setup.

Pruning replaces `module.model` by the pruned model, after the module's own `setup` and before
`configure_model` and `configure_optimizers`. The module trains in its own way. Planned zeros are
kept meanwhile, and at the end the model is saved as final/ with a report, as a RecoveryModule does.
Not done for such modules: gradual schedules, 4 bits, FSDP2 and bit-exact resume.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from peft import PeftModel
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunelight.recovery.lora import merge_lora
from prunelight.recovery.prepared_model import RecoverySettings
from prunelight.recovery.zeros.planned_zeros import PlannedZeros
from prunelight.run.finish import save_and_report
from prunelight.run.measurements import TRAINING
from prunelight.run.method import PruningMethod
from prunelight.run.run_state import Run
from prunelight.run.start import start
from prunelight.run.strategies import Place
from prunelight.training.curves import TrainingCurves
from prunelight.training.finite_training import FiniteTraining, check_saved
from prunelight.training.resuming.checkpoint_io import end_writing
from prunelight.training.resuming.kept_checkpoints import settle

log = logging.getLogger(__name__)

RUN = "prunelight_run"  # attribute of the module that keeps its run


def prune_after_setup(
    trainer: Trainer, module: LightningModule, methods: list[PruningMethod]
) -> None:
    """Prune `module.model` as soon as the module's own `setup` has returned.

    Lightning calls the callbacks' `setup` first, when a module may not have its model yet.
    """
    settle(trainer)
    vars(module).pop("setup", None)  # of a start that failed before this was called
    own_setup = module.setup

    def setup(stage: str) -> None:
        del module.setup  # from now on the module's own again
        own_setup(stage=stage)
        run = run_of(module, trainer)
        if run.base is None:  # a second fit goes on with the pruned model
            start(run, methods)
            run.load_model().train()  # from_pretrained leaves eval mode, and so does Lightning
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        recoveries = [kept for kept in callbacks if isinstance(kept, OwnModuleRecovery)]
        for other in recoveries:
            if other.run is not run:  # of another module, which this Trainer trained before
                callbacks.remove(other)
        callbacks[:] = [
            callback
            for callback in callbacks
            if not isinstance(callback, TrainingCurves) or callback.run is run
        ]
        if not any(isinstance(callback, FiniteTraining) for callback in callbacks):
            callbacks.insert(0, FiniteTraining())  # before what keeps the best weights
        if not any(other.run is run for other in recoveries):
            callbacks += [TrainingCurves(run), OwnModuleRecovery(run)]

    module.setup = setup  # type: ignore[method-assign]


def run_of(module: LightningModule, trainer: Trainer) -> Run:
    """Return the run of a module, made at its first fit.

    Raises:
        TypeError: if `module.model` is no transformers model without adapters.
        ValueError: if there is no tokenizer, or the strategy shards weights.
    """
    place, name = Place(trainer), type(module).__name__
    if place.shards_weights:
        raise ValueError(
            f"strategy=fsdp2 shards a prunelight RecoveryModule only, not a {name}; use ddp or one "
            "device"
        )
    run = getattr(module, RUN, None)
    if run is None:
        model = _checked_model(module)
        run = Run(
            module,
            model.config._name_or_path or name,
            trust_remote_code=getattr(module, "trust_remote_code", False),
            settings=RecoverySettings(recovery="own"),
        )
        setattr(module, RUN, run)
    if run.tokenizer is None:
        run.tokenizer = getattr(module, "tokenizer", None) or getattr(place.data, "tokenizer", None)
    if run.tokenizer is not None and not isinstance(run.tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"the tokenizer of {name} or its data is {type(run.tokenizer).__name__}; it must be a "
            "tokenizer of transformers (AutoTokenizer.from_pretrained)"
        )
    if run.tokenizer is None:
        raise ValueError(
            f"neither {name} nor its data has a `tokenizer`, which is saved beside the pruned "
            "weights; set one of the two"
        )
    run.attach(place)
    return run


def _checked_model(module: LightningModule) -> PreTrainedModel:
    """Return the model of a module, if it can be pruned."""
    model: Any = getattr(module, "model", None)
    name = type(module).__name__
    if isinstance(model, PeftModel):
        raise TypeError(
            f"{name}.model has adapters before it is pruned; attach them in configure_model, which "
            "Lightning calls after the pruning"
        )
    if not isinstance(model, PreTrainedModel):
        kind = "missing" if model is None else type(model).__name__
        raise TypeError(
            f"{name}.model is {kind}; a module that is pruned must have a transformers "
            "PreTrainedModel as `model` after setup (or be a prunelight RecoveryModule)"
        )
    if model.get_output_embeddings() is None or model.config.is_encoder_decoder:
        raise TypeError(
            f"{name}.model is {type(model).__name__}, which predicts no next tokens; load it by "
            "AutoModelForCausalLM"
        )
    if frozen := sum(not parameter.requires_grad for parameter in model.parameters()):
        log.warning(
            "%s.model has %d frozen parameters, which the pruned model has not: freeze them in "
            "configure_model, which Lightning calls after the pruning",
            name,
            frozen,
        )
    return model


def _check_trains_pruned(
    module: LightningModule, pruned: PreTrainedModel, optimizers: Sequence[Optimizer]
) -> None:
    """Check that a module of the user's own trains the pruned model, not the one before it.

    Raises:
        ValueError: if `model` is another one, or the optimizers hold none of its parameters.
    """
    model: Any = module.model
    name = type(module).__name__
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if inner is not pruned:
        raise ValueError(
            f"{name}.model is no longer the pruned model: a hook after setup, such as "
            "configure_model, put another one there; make the model in setup or __init__"
        )
    held = {id(p) for optimizer in optimizers for g in optimizer.param_groups for p in g["params"]}
    if held and not any(id(parameter) in held for parameter in model.parameters()):
        raise ValueError(
            f"the optimizers of {name} hold no parameter of the pruned model; take the parameters "
            "from self.parameters() in configure_optimizers, which Lightning calls after the "
            "pruning"
        )


class OwnModuleRecovery(Callback):
    """Keeps planned zeros while a module of the user's own trains, and saves its result.

    Args:
        run: whose model is pruned, and has no adapters yet.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._pruned = run.load_model()
        self._zeros = PlannedZeros.find(self._pruned, run.plans())
        self._phase: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the zeros that plans put into the model; warn of lost precision.

        Raises:
            ValueError: if the module trains another model than the pruned one.
        """
        _check_trains_pruned(pl_module, self._pruned, trainer.optimizers)
        for loss in self.run.precision_losses:
            self.run.warn(loss)
        model = self.run.model
        assert model is not None
        if self._zeros.warning:
            self.run.warn(self._zeros.warning)
        if self._zeros.planned:
            self._zeros.keep(model, gradual=False)
        if self._zeros.masks is not None:
            for optimizer in trainer.optimizers:
                self._zeros.masks.watch(optimizer)
        self._phase = self.run.phases.phase(TRAINING, shown=False)
        self._phase.__enter__()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let no checkpoint with NaN replace a good one."""
        check_saved(trainer, checkpoint)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop to measure the training."""
        self._phase.__exit__(None, None, None)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge adapters of peft, save a verified directory, evaluate, and write the report.

        Raises:
            RuntimeError: if a weight that must be zero is not.
        """
        model: Any = self.run.model
        if isinstance(model, PeftModel):
            model = merge_lora(model)
        self._zeros.check()
        if self._zeros.masks is not None:
            self._zeros.masks.unwatch()
        self.run.holder.model = model.eval()
        if self.run.record is not None:
            self.run.record.recovery = {
                "mode": type(pl_module).__name__,
                "optimizer_steps": trainer.global_step,
                "precision": self.run.place.precision,
            }
        self.run.place.group.run_on_rank_zero(partial(save_and_report, self.run, model))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop to measure the run, and let other runs write into the directory."""
        self.run.phases.stop()
        self.run.release_directory()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Let other runs write into the directory, when all checkpoints are there."""
        end_writing(trainer)
        self.run.phases.stop()
        self.run.release_directory()
