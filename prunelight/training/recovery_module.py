"""RecoveryModule: the LightningModule that brings a pruned model back and hands it over.

Pruning callbacks give it the pruned base in `setup`; without any it recovers the model that `name`
stands for. It trains by LoRA, fully, or not at all, validates with exact token-weighted metrics,
and at fit end saves a verified directory and the report. Zeros that a plan put into the weights
stay zero (`recovery/zeros`). Checkpoints hold what is trained and name the base; they contain
primitives and tensors only and load with `weights_only=True`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, Self

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import OptimizerCallable
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunelight.calibration.data_windows import check_batch, named_loaders
from prunelight.calibration.windows import check_readable
from prunelight.evaluation.metrics import TokenAccuracy, TokenPerplexity
from prunelight.evaluation.report.record import RunRecord
from prunelight.evaluation.speed import LatencyProtocol
from prunelight.losses import next_token_sums
from prunelight.models.loading import check_attention, resolve_dtype
from prunelight.moved import (
    ATTRIBUTES,
    REPLACED_ATTRIBUTES,
    moved_attribute,
    set_moved_attribute,
)
from prunelight.recovery.compiled_layers import check_backend
from prunelight.recovery.distillation.batch_facts import BatchFacts
from prunelight.recovery.distillation.language_head import LanguageHead
from prunelight.recovery.distillation.objective import Distillation, Objective
from prunelight.recovery.lora import LoRA
from prunelight.recovery.packed_rows import model_inputs
from prunelight.recovery.precision import sharded_policy, weights_type
from prunelight.recovery.prepared_model import RecoverySettings
from prunelight.recovery.quantization import BitsAndBytes, check_installed, check_kind
from prunelight.recovery.schedules import check_settings, make_schedule
from prunelight.recovery.sharded_weights import shard, trained_parameters
from prunelight.recovery.zeros.weight_masks import WeightMasks
from prunelight.run.checkpoints import (
    FORMAT,
    KEY,
    check_base,
    check_same_parameters,
    check_same_run,
    quantization_keys,
    read_metadata,
)
from prunelight.run.finish import finish
from prunelight.run.preflight import DATA, preflight
from prunelight.run.run_state import MEASURED, Run
from prunelight.run.start import prepare, start_recovery, tell_slow_precision
from prunelight.run.strategies import ChangedSettings, Place, loss_weight
from prunelight.runtime.arguments import NOT_EMPTY, above, at_least, checked
from prunelight.runtime.files.checkpoint_files import read_checkpoint
from prunelight.training.finite_training import check_loaded, check_saved
from prunelight.training.optimizers import adamw
from prunelight.training.recovery_watch import WatchedModule
from prunelight.training.resuming.exact_resume import ExactResume


class RecoveryModule(WatchedModule):
    """Recover a causal language model after pruning.

    Args:
        name: what `prunelight.load` takes: hub id, directory, .gguf file or bundled alias.
        dtype: of the weights: auto, float32, bfloat16 or float16.
        recovery: "lora" trains adapters and merges them at the end, "full" all weights, "none"
            nothing (prune, evaluate and save only).
        lora: Settings of LoRA.
        learning_rate: peak learning rate.
        warmup_steps: optimizer steps over which it rises linearly from 0.
        lr_scheduler: what follows: a schedule of transformers.get_scheduler.
        lr_scheduler_kwargs: its own arguments; warmup_stable_decay decays over the last tenth.
        optimizer: called with the trainable parameters; brings its own learning rate. None takes
            AdamW with `learning_rate`, fused where all that is trained is on CUDA.
        gradient_checkpointing: compute activations again in the backward, for memory. None does so
            where the device has too little memory free without it, see `prunelight estimate`.
        compile_backend: of torch.compile, such as "inductor", for each decoder layer; None: eager.
        restore_best: end with the best weights if a ModelCheckpoint monitors a metric `val/...`.
        keep_zeros: keep the zeros of sparsified weights: full training holds them at exactly zero,
            LoRA trains W + m * (B A), so that merging keeps every zero and N:M group. False leaves
            the adapters dense and unmerged ones in adapter/; merging fills the zeros.
        loss: "lm" learns the next tokens, "kd" the dense model's distribution of them, which then
            is in memory too, "kd_topk" its most likely tokens, which it is asked for once, before.
        distillation: Settings of distillation (loss kd or kd_topk).
        chunked_loss: never hold all logits at once; where a model's logits are not those of its
            head up to a scale or cap that is known, they are, with a warning.
        quantization: hold the base in 4 bits ("nf4", "fp4") or 8 ("int8") as adapters train, which
            are merged onto the base in full precision.
        bitsandbytes: Settings of 4 bits.
        latency: also time generation by this protocol for each column of the report.
        trust_remote_code: run Python code that comes with the model.
        probes: show at each stage of the report what perplexity hides: collapse probes, samples of
            text, and the divergence from the dense model. False leaves them out.
        attn_implementation: transformers' name of the attention that models compute with, such as
            "sdpa", "eager" or "flash_attention_2"; None leaves the choice to transformers.

    The defaults are those with which the depth-pruning papers recover. To recover a model that is
    already in memory, set `module.model` and `module.tokenizer` before the fit. Zeros count as
    planned if the plans of the pruning callbacks name them, or those in the directory `name`.

    Attributes:
        run: the state of the run: source, base, tokenizer, record, and the model in training.

    Raises:
        ValueError: if an argument is out of its range.
    """

    @checked(
        name=NOT_EMPTY,
        learning_rate=above(0),
        warmup_steps=at_least(0),
        compile_backend=NOT_EMPTY,
    )
    def __init__(
        self,
        name: str,
        dtype: str = "auto",
        recovery: Literal["none", "lora", "full"] = "lora",
        lora: LoRA = LoRA(),  # noqa: B008 (frozen)
        learning_rate: float = 1e-4,
        warmup_steps: int = 100,
        lr_scheduler: str = "linear",
        lr_scheduler_kwargs: dict[str, Any] | None = None,
        optimizer: OptimizerCallable | None = None,
        gradient_checkpointing: bool | None = None,
        compile_backend: str | None = None,
        restore_best: bool = True,
        keep_zeros: bool = True,
        loss: Literal["lm", "kd", "kd_topk"] = "lm",
        distillation: Distillation = Distillation(),  # noqa: B008 (frozen)
        chunked_loss: bool = True,
        quantization: Literal["none", "nf4", "fp4", "int8"] = "none",
        bitsandbytes: BitsAndBytes = BitsAndBytes(),  # noqa: B008 (frozen)
        latency: LatencyProtocol | None = None,
        trust_remote_code: bool = False,
        probes: bool = True,
        attn_implementation: str | None = None,
    ) -> None:
        arguments = {key: value for key, value in locals().items() if key in _ARGUMENTS}
        super().__init__()
        self._arguments = arguments
        check_settings(
            recovery,
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            lr_scheduler=lr_scheduler,
            lr_scheduler_kwargs=lr_scheduler_kwargs,
        )
        check_kind(quantization, bitsandbytes, recovery)
        if loss != "lm" and distillation.teacher != "memory":
            check_installed(f"distillation.teacher={distillation.teacher!r}")
        resolve_dtype(dtype)
        check_attention(attn_implementation, trust_remote_code=trust_remote_code)
        check_backend(compile_backend, watched=distillation.hidden_weight > 0)
        self.learning_rate, self.warmup_steps = learning_rate, warmup_steps
        self.lr_scheduler_name, self.lr_scheduler_kwargs = lr_scheduler, lr_scheduler_kwargs or {}
        self.optimizer = optimizer
        self.restore_best = restore_best
        self.objective = Objective(loss, distillation, chunked=chunked_loss, recovery=recovery)
        self.model: PreTrainedModel | PeftModel | None = None
        self.run = Run(
            self,
            name,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            settings=RecoverySettings(
                recovery=recovery,
                lora=lora,
                keep_zeros=keep_zeros,
                gradient_checkpointing=gradient_checkpointing,
                quantization=quantization,
                bitsandbytes=bitsandbytes,
                compile_backend=compile_backend,
            ),
            objective=self.objective,
            latency=latency,
            probes=probes,
            describe_recovery=self.describe_recovery,
        )
        self.val_perplexity = TokenPerplexity()
        self.val_accuracy = TokenAccuracy()
        self.further_metrics = nn.ModuleList()  # two a validation text behind the first
        self._further_names: list[str] = []
        self.strict_loading = False  # checkpoints hold what is trained, `on_load_checkpoint` checks
        self.resuming = ExactResume(self.run, self._make_optimizer, self.given_arguments)
        self.changed = ChangedSettings()
        self._own_tokens = 0  # of this process, that `tokens_seen` does not hold yet
        # Of the training batch that came last: its labels on the device, how often these were
        # changed in place, and what was seen of the batch.
        self._facts: tuple[Tensor | None, int, BatchFacts | None] = None, 0, None
        self._evaluation_head: LanguageHead | None = None

    def sibling(self, **changes: Any) -> RecoveryModule:
        """Return a new RecoveryModule with the same arguments, but for these.

        What may be set on a module before a fit, such as `learning_rate`, is as it is now.
        """
        return RecoveryModule(**{**self._current_arguments(), **changes})

    def given_arguments(self) -> dict[str, Any]:
        """Return the arguments that differ from their defaults, as they are now."""
        parameters = inspect.signature(RecoveryModule.__init__).parameters
        return {
            name: value
            for name, value in self._current_arguments().items()
            if value != parameters[name].default
        }

    def _current_arguments(self) -> dict[str, Any]:
        settable = {
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup_steps,
            "lr_scheduler": self.lr_scheduler_name,
            "lr_scheduler_kwargs": self.lr_scheduler_kwargs,
            "optimizer": self.optimizer,
            "restore_best": self.restore_best,
        }
        return {**self._arguments, **settable}

    # --- the state of the run ----------------------------------------------------------------

    @property
    def name(self) -> str:
        """Name of the dense model, what `prunelight.load` takes."""
        return self.run.name

    @property
    def recovery(self) -> str:
        """How the model is recovered: "none", "lora" or "full"."""
        return self.run.settings.recovery

    @property
    def base(self) -> Path | None:
        """Directory of the pruned base; None before the pruning."""
        return self.run.base

    @property
    def record(self) -> RunRecord | None:
        """Record of the run so far; None where nothing is measured."""
        return self.run.record

    @property
    def final(self) -> Path | None:
        """Directory of the result after `trainer.fit`; None before. Any program may load it."""
        return self.run.final

    def summary(self) -> str:
        """Return figures, costs and directories of the run as text, after `trainer.fit`.

        Raises:
            ValueError: before the first measurement.
        """
        return self.run.summary()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Tokenizer of the model; set it together with `model`."""
        return self.run.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.run.tokenizer = tokenizer

    @property
    def masks(self) -> WeightMasks | None:
        """Masks of sparsified weights; None if there is nothing that needs them."""
        return self.run.masks

    def __getattr__(self, name: str) -> Any:
        """Return a parameter or module, or an attribute that is the run's now."""
        if name in ATTRIBUTES or name in REPLACED_ATTRIBUTES:
            return moved_attribute(self, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; one that is the run's now is set there."""
        if name in ATTRIBUTES:
            set_moved_attribute(self, name, value)
        else:
            super().__setattr__(name, value)

    # --- the start ---------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check the run, and load the model if no callback did. Lightning calls it."""
        self.run.attach(Place(self.trainer))
        if stage == "fit":
            self.tokens_seen = self._own_tokens = 0  # a checkpoint brings its own
        if self.run.in_training or stage != "fit":
            preflight(self.run)
        else:
            start_recovery(self.run)
            if self.recovery == "none":
                self.changed.change(self.trainer, "limit_train_batches", 0)

    def configure_model(self) -> None:
        """Make the model trainable, before the optimizer exists. Lightning calls it."""
        if self._trainer is None or self.run.in_training:  # the first in load_from_checkpoint
            return
        if self.trainer.state.fn == "fit":
            prepare(self.run)
        if self.run.place.shards_weights:
            assert self.device_mesh is not None
            mesh, same = self.device_mesh["data_parallel"], self.trainer.strategy.broadcast
            precision = self.run.place.precision
            if (cast := weights_type(precision)) is not None:
                self.to(dtype=cast)  # before the shards, which are of one type for good
            if self.run.prepared is not None:
                self.run.prepared.shard(mesh, same, precision)
            else:
                shard(self.run.load_model(), mesh, same, sharded_policy(precision))

    # --- training ----------------------------------------------------------------------------

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return logits (B, T, V) for token ids (B, T)."""
        assert self.model is not None
        batch = {"input_ids": input_ids}
        if attention_mask is not None:
            batch["attention_mask"] = attention_mask
        return self.model(**model_inputs(batch)).logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss over the tokens whose label counts."""
        facts = self._facts_of(batch)
        loss = self.objective(self.model, batch, facts)
        self._own_tokens += facts.num_tokens
        self.log("train/loss", loss, prog_bar=True)
        return loss * loss_weight(self.trainer, batch["labels"])

    def _facts_of(self, batch: Mapping[str, Tensor]) -> BatchFacts:
        """Return what was seen of a batch before it came to the device; else look at it now."""
        seen, version, facts = self._facts
        labels = batch["labels"]
        if facts is None or labels is not seen or labels._version != version:
            return self.objective.facts(batch)  # it came another way, or was changed since
        return facts

    def count_tokens(self) -> None:
        """Add what all processes have trained on to `tokens_seen`; all must call this."""
        (total,) = self.run.place.group.totals(self._own_tokens)
        self.tokens_seen += int(total)
        self._own_tokens = 0

    def on_validation_epoch_start(self) -> None:
        """See how the loss can be taken without all logits, and how many texts there are."""
        trainer = self.trainer
        loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        self._further_names = [*named_loaders(loaders)][1:]
        for kind in (TokenPerplexity, TokenAccuracy) * len(self._further_names):
            self.further_metrics.append(kind())
        del self.further_metrics[2 * len(self._further_names) :]
        self.further_metrics.to(self.device)
        self._evaluation_head = self.objective.separable_head(self.model)

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        """Let go of the head."""
        self._evaluation_head = None

    on_test_epoch_end = on_validation_epoch_end

    def validation_step(
        self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add a batch to perplexity and next-token accuracy.

        Those of the first text are `val/perplexity` and `val/accuracy`, those of another one
        `val/perplexity/NAME` and `val/accuracy/NAME`.
        """
        if self._evaluation_head is not None:
            inputs: dict[str, Tensor] = {
                n: batch[n] for n in ("input_ids", "attention_mask") if n in batch
            }
            sums = self._evaluation_head.next_token_sums(model_inputs(inputs), batch["labels"])
        else:
            logits = self(batch["input_ids"], batch.get("attention_mask"))
            sums = next_token_sums(logits, batch["labels"])
        nll, correct, tokens = sums
        prefix, place = "test" if self.trainer.testing else "val", 2 * (dataloader_idx - 1)
        metrics: Any = [self.val_perplexity, self.val_accuracy]
        names, suffix = ["val_perplexity", "val_accuracy"], ""
        if dataloader_idx:
            metrics = self.further_metrics[place : place + 2]
            names = [f"further_metrics.{place}", f"further_metrics.{place + 1}"]
            suffix = f"/{self._further_names[dataloader_idx - 1]}"
        for label, metric, name, amount in zip(
            ("perplexity", "accuracy"), metrics, names, (nll, correct), strict=True
        ):
            metric.update(amount, tokens)
            self.log(
                f"{prefix}/{label}{suffix}",
                metric,
                prog_bar=not suffix,
                on_epoch=True,
                add_dataloader_idx=False,
                metric_attribute=name,
            )

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        """Return the optimizer over what is trained, and its schedule by step."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        if not parameters:
            return None
        optimizer = self._make_optimizer(parameters)
        steps = self.trainer.estimated_stepping_batches
        scheduler = make_schedule(
            self.lr_scheduler_name, optimizer, self.warmup_steps, steps, self.lr_scheduler_kwargs
        )
        if self.masks is not None:
            self.masks.watch(optimizer)
        by_step = {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": by_step}

    def _make_optimizer(self, parameters: list[nn.Parameter]) -> Optimizer:
        if self.optimizer is not None:
            return self.optimizer(parameters)
        return adamw(parameters, self.learning_rate)

    def _check_optimizer(self) -> None:
        """Check that the optimizer takes a step, before anything is pruned.

        On one weight, where the run computes: some optimizers know one kind of device only.

        Raises:
            ValueError: if its arguments or its kind do not suit the training.
        """
        probe = nn.Parameter(torch.zeros(1, 1, device=self.run.device))
        probe.grad = torch.zeros_like(probe)
        try:
            self._make_optimizer([probe]).step(lambda: 0.0)
        except Exception as error:  # of any class that the user names
            reason = " ".join(str(error).split())
            raise ValueError(
                f"the optimizer cannot take a step: {reason}; change model.optimizer"
            ) from error

    def configure_callbacks(self) -> list[Callback]:
        """Let Lightning call what watches the recovery, and what makes a resume exact."""
        if self._trainer is not None and self.trainer.state.fn == "fit":
            # Lightning asks for callbacks first of all, then for the data.
            self.run.start_clock(DATA)
            self.run.attach(Place(self.trainer))
            self._check_optimizer()
            self.run.is_same_training = partial(self.resuming.is_same_training, self.trainer)
            tell_slow_precision(self.run)
        return [*super().configure_callbacks(), self.resuming, self.changed]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Check, while a batch is on the CPU, that the model can read it.

        Raises:
            ValueError: if it is longer than learned positions, or a token id has no embedding.
        """
        if self.trainer.training:
            check_batch(batch)  # the first one was checked before, others may be of another kind
        if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor):
            model: Any = self.model  # peft's wrapper has the config and the embeddings too
            check_readable(model, batch)
        self._facts = None, 0, self.objective.facts(batch) if self.trainer.training else None
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Bring what was seen of a training batch to its device; Lightning calls it."""
        *_, facts = self._facts
        if facts is not None:
            labels = batch["labels"]
            self._facts = labels, labels._version, facts.to(labels.device)
        return batch

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Keep gradients of pruned weights out of clipping, where no hook can."""
        if self.masks is not None:
            self.masks.mask_gradients()

    def on_train_start(self) -> None:
        """See how the loss can be taken."""
        self.objective.start(self.model)

    def on_train_end(self) -> None:
        """Count the last tokens, and let go of the teacher."""
        self.count_tokens()
        self.objective.finish()

    # --- checkpoints -------------------------------------------------------------------------

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # Lightning's own unpickles a URL
        cls, checkpoint_path: str | Path | IO[bytes], map_location: Any = "cpu", **arguments: Any
    ) -> Self:
        """Return a module in the state of a checkpoint, which is read without running code.

        Args:
            checkpoint_path: file on this machine, URL, or an open file.
            map_location: see torch.load.
            arguments: of the module, those of the run that wrote the checkpoint. What a class of
                your own saved by `save_hyperparameters` need not be given, but for
                `trust_remote_code`: no file may switch that on.

        Raises:
            ValueError: if the checkpoint is damaged, holds other objects than tensors and plain
                data, or was trained on another base or in another way.
        """
        arguments.pop("weights_only", None)  # it is always True
        checkpoint = read_checkpoint(checkpoint_path, map_location)
        names = set(inspect.signature(cls.__init__).parameters) - {"self", "trust_remote_code"}
        saved = checkpoint.get("hyper_parameters") or {}
        module = cls(**{name: saved[name] for name in saved if name in names} | arguments)
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"], strict=False)
        return module

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained, and say on which base.

        Raises:
            RuntimeError: if a weight that must be zero is not.
            ValueError: if a number is NaN or infinite; the checkpoint before stays.
        """
        prepared = self.run.prepared
        assert prepared is not None
        self.count_tokens()
        prepared.zeros.check()
        trained, state = trained_parameters(self), checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: state[name] for name in state if name in trained}
        check_saved(self.trainer, checkpoint)
        checkpoint[KEY] = {
            "format": FORMAT,
            "identity": self.resuming.identity(self.trainer),
            **self._describe_training(),
            "config": prepared.config,
            "tokens_seen": self.tokens_seen,
            "masks": self.masks and self.masks.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits the model; load its base first where there is none.

        Raises:
            ValueError: if it was trained on another base or in another way; names both. Or if a
                fit cannot go on from it.
        """
        saved = read_metadata(checkpoint)
        if self._trainer is not None:
            self.resuming.check_resumable(self.trainer, checkpoint)
        if not self.run.in_training:
            self._rebuild(saved)
        self.load_trained(checkpoint)

    def load_trained(self, checkpoint: dict[str, Any]) -> None:
        """Take over what a checkpoint says of the training, beside its weights, in place.

        Raises:
            ValueError: if it was trained on another base or in another way; names both.
        """
        saved = read_metadata(checkpoint)
        if "state_dict" in checkpoint:  # else the strategy has loaded it, after it was checked
            self.check_checkpoint(checkpoint)
        if self.masks is not None:
            self.masks.load_state_dict(saved["masks"])
        self.tokens_seen, self._own_tokens = saved["tokens_seen"], 0

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits the model in training.

        Raises:
            ValueError: if it was trained on another base or in another way; names both. Also if a
                number in it is NaN or infinite.
        """
        check_same_run(read_metadata(checkpoint), self._describe_training())
        check_same_parameters(checkpoint["state_dict"], trained_parameters(self))
        check_loaded(checkpoint, self.trainer.ckpt_path if self._trainer else None)

    def _describe_training(self) -> dict[str, Any]:
        """Return what a checkpoint says of the training, by stable keys."""
        prepared, settings = self.run.prepared, self.run.settings
        assert prepared is not None
        return {
            "base": str(self.base.resolve() if self.base else self.name),
            "fingerprint": prepared.fingerprint,
            "recovery": self.recovery,
            "zeros": prepared.zeros.state,
            "quantization": quantization_keys(settings.quantization, settings.bitsandbytes),
        }

    def _rebuild(self, saved: dict[str, Any]) -> None:
        """Load the base that a checkpoint names and prepare it as in training."""
        if (Path(saved["base"]) / "config.json").is_file():
            if (Path(saved["base"]) / MEASURED).is_file():  # a pruned base
                check_base(Path(saved["base"]))
            self.run.use_base(Path(saved["base"]), self.record)
        else:
            self.run.forget_model()
        self.run.gradual = saved["zeros"] == "gradual"
        prepare(self.run)

    # --- the end -----------------------------------------------------------------------------

    def on_fit_end(self) -> None:
        """Merge adapters, save a verified directory, evaluate, and write the report.

        Raises:
            RuntimeError: if a weight that must be zero is not.
        """
        finish(self.run)

    def describe_recovery(self) -> dict[str, Any]:
        """Return the settings of the recovery and how far it is, for report and checkpoints."""
        settings = self.run.settings
        lora = asdict(settings.lora) if self.recovery == "lora" else {}
        return {
            "mode": self.recovery,
            **lora,
            **self.objective.describe(),
            "quantization": settings.base_precision,
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup_steps,
            "lr_scheduler": self.lr_scheduler_name,
            **self.lr_scheduler_kwargs,
            "optimizer_steps": self.trainer.global_step,
            "weights_of_step": self.restored_step or self.trainer.global_step,
            "tokens_seen": self.tokens_seen,
            "precision": str(self.trainer.precision),
        }


_ARGUMENTS = frozenset(inspect.signature(RecoveryModule.__init__).parameters) - {"self"}
