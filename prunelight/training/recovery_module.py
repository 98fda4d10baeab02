"""RecoveryModule: the LightningModule that brings a pruned model back and hands it over.

Pruning callbacks give it the pruned base in `setup`; without any it recovers the model that `name`
stands for. It trains by LoRA, fully, or not at all, validates with exact token-weighted metrics,
and at fit end saves a verified directory and the report. Zeros that a plan put into the weights
stay zero (`recovery/zeros`). Checkpoints hold what is trained and name the base; they contain
primitives and tensors only and load with `weights_only=True`.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunelight.calibration.windows import check_length
from prunelight.evaluation.metrics import TokenAccuracy, TokenPerplexity
from prunelight.evaluation.report.record import RunRecord
from prunelight.evaluation.speed import LatencyProtocol
from prunelight.losses import next_token_sums
from prunelight.models.loading import load, resolve_dtype
from prunelight.planning.plan import Plan
from prunelight.recovery.compiled_layers import check_backend
from prunelight.recovery.distillation.objective import Distillation, Objective
from prunelight.recovery.lora import LoRA
from prunelight.recovery.packed_rows import model_inputs
from prunelight.recovery.prepared_model import PreparedModel, RecoverySettings
from prunelight.recovery.quantization import BitsAndBytes, check_kind, check_quantizable
from prunelight.recovery.schedules import check_settings, make_schedule
from prunelight.recovery.sharded_weights import shard, trained_parameters
from prunelight.recovery.zeros.weight_masks import WeightMasks
from prunelight.run.checkpoints import (
    FORMAT,
    KEY,
    check_same_parameters,
    check_same_run,
    read_metadata,
)
from prunelight.run.finish import end_fit
from prunelight.run.measurements import add_quantized, measure_run_stage, start_record
from prunelight.run.run_state import check_output, plan_files
from prunelight.run.strategies import check_strategy, on_rank_zero, share_of_tokens
from prunelight.run.teacher import prepare_teacher
from prunelight.training.exact_resume import ExactResume
from prunelight.training.recovery_watch import WatchedModule

log = logging.getLogger(__name__)


class RecoveryModule(WatchedModule):
    """Recover a causal language model after pruning.

    Args:
        name: what `prunelight.load` takes: hub id, directory, .gguf file or bundled alias.
        dtype: of the weights: auto, float32, bfloat16 or float16.
        recovery: "lora" trains adapters and merges them at the end, "full" all weights, "none"
            nothing (prune, evaluate and save only).
        lora: settings of LoRA.
        learning_rate: peak learning rate.
        warmup_steps: optimizer steps over which it rises linearly from 0.
        lr_scheduler: what follows: a schedule of transformers.get_scheduler.
        lr_scheduler_kwargs: its own arguments; warmup_stable_decay decays over the last tenth.
        optimizer: called with the trainable parameters; brings its own learning rate. None takes
            AdamW with `learning_rate`.
        gradient_checkpointing: compute activations again in the backward, for memory.
        compile_backend: of torch.compile, such as "inductor", for each decoder layer; None: eager.
        restore_best: end with the best weights if a ModelCheckpoint monitors a metric `val/...`.
        keep_zeros: keep the zeros of sparsified weights: full training holds them at exactly zero,
            LoRA trains W + m * (B A), so that merging keeps every zero and N:M group. False leaves
            the adapters dense and unmerged ones in adapter/; merging fills the zeros.
        loss: "lm" learns the next tokens, "kd" the dense model's distribution of them, which then
            is in memory too, "kd_topk" its most likely tokens, which it is asked for once, before.
        distillation: settings of the last two.
        chunked_loss: never hold all logits at once; where a model's logits are not those of its
            head up to a scale or cap that is known, they are, with a warning.
        quantization: hold the base in 4 bits ("nf4", "fp4") or 8 ("int8") as adapters train, which
            are merged onto the base in full precision.
        bitsandbytes: settings of 4 bits.
        latency: also time generation by this protocol for each column of the report.
        trust_remote_code: run Python code that comes with the model.

    The defaults are those with which the depth-pruning papers recover. To recover a model that is
    already in memory, set `module.model` and `module.tokenizer` before the fit. Zeros count as
    planned if the plans of the pruning callbacks name them, or those in the directory `name`.

    Attributes:
        gradual: set before `configure_model` by a callback that prunes during training:
            `masks` then exist in every recovery, and start by keeping all weights.

    Raises:
        ValueError: if an argument is out of its range.
    """

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
        gradient_checkpointing: bool = False,
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
    ) -> None:
        super().__init__()
        check_settings(
            recovery,
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            lr_scheduler=lr_scheduler,
            lr_scheduler_kwargs=lr_scheduler_kwargs,
        )
        check_kind(quantization, bitsandbytes, recovery)
        resolve_dtype(dtype)
        check_backend(compile_backend, watched=distillation.hidden_weight > 0)
        self.name = name
        self.dtype_name = dtype
        self.recovery = recovery
        self.lora = lora
        self.learning_rate, self.warmup_steps = learning_rate, warmup_steps
        self.lr_scheduler_name, self.lr_scheduler_kwargs = lr_scheduler, lr_scheduler_kwargs or {}
        self.optimizer = optimizer
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_backend, self.restore_best = compile_backend, restore_best
        self.keep_zeros = keep_zeros
        self.objective = Objective(loss, distillation, chunked=chunked_loss, recovery=recovery)
        self.quantization, self.bitsandbytes = quantization, bitsandbytes
        self.latency = latency
        self.trust_remote_code = trust_remote_code
        self.model: PreTrainedModel | PeftModel | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.base: Path | None = None  # the pruned base on disk
        self.record: RunRecord | None = None
        self.gradual = False
        self.val_perplexity = TokenPerplexity()
        self.val_accuracy = TokenAccuracy()
        self.strict_loading = False  # checkpoints hold what is trained, `on_load_checkpoint` checks
        self._adapted: PreparedModel | None = None
        self._source: str | Path = ""  # from where `model` can be read again
        self.resuming = ExactResume(self.describe_recovery, self._make_optimizer)

    # --- which model -------------------------------------------------------------------------

    def load_model(self) -> PreTrainedModel:
        """Return the model, loading it by name if there is none yet; not for adapted models."""
        if self.model is None:
            self._read(self.name)
        assert isinstance(self.model, PreTrainedModel)
        return self.model

    def _read(self, source: str | Path) -> PreTrainedModel:
        self._source, code = source, self.trust_remote_code
        self.model, self.tokenizer = load(source, dtype=self.dtype_name, trust_remote_code=code)
        return self.model

    def forget_model(self) -> None:
        """Drop the model, so that its memory is free for the next one."""
        self.model = self._adapted = None

    @property
    def _in_training(self) -> bool:
        """Return whether the model is made ready for training, and not merged yet."""
        return self._adapted is not None and self._adapted.in_training

    @property
    def masks(self) -> WeightMasks | None:
        """Return the masks of sparsified weights; None if there is nothing that needs them."""
        return self._adapted.zeros.masks if self._adapted is not None else None

    def use_base(self, directory: Path, record: RunRecord | None) -> None:
        """Load the pruned base that the callbacks saved; later loads and checkpoints name it."""
        self.use_result(directory)
        self.base, self.record = directory, record

    def use_result(self, directory: Path) -> None:
        """Load the merged result of the run; the base stays what training began with."""
        self.forget_model()
        self._read(directory)

    def setup(self, stage: str) -> None:
        """Check strategy and output; load the model if no callback did. Lightning calls it."""
        check_strategy(self.trainer, self.quantization, self.recovery)
        if self._in_training:
            return
        if stage == "fit":
            prepare_teacher(self)
        model = self.load_model()
        check_quantizable(model, self.quantization, self._source)
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        check_length(model, getattr(datamodule, "seq_len", 0))
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not self._source:
            raise ValueError(
                "a model in memory cannot be sharded and merged again; save it (prunelight.save) "
                "and give its directory as name"
            )
        if stage != "fit":
            return
        self.check_output()
        if self.record is None and hasattr(datamodule, "validation_windows"):
            self.record = on_rank_zero(self.trainer, partial(start_record, self, model))
        if self.recovery == "none":
            self.trainer.limit_train_batches = 0

    def check_output(self) -> None:
        """Check on rank 0, which writes them, that the run may write its result and report."""
        root = Path(self.trainer.default_root_dir)
        on_rank_zero(self.trainer, partial(check_output, root))

    def configure_model(self) -> None:
        """Make the model trainable, before the optimizer exists. Lightning calls it."""
        if self._trainer is None or self._in_training:  # the first in load_from_checkpoint
            return
        if self.trainer.state.fn == "fit":
            self._adapt()
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            assert self.device_mesh is not None
            mesh, same = self.device_mesh["data_parallel"], self.trainer.strategy.broadcast
            if self._adapted is not None:
                self._adapted.shard(mesh, same)
            else:
                shard(self.load_model(), mesh, same)

    def _adapt(self) -> None:
        measure = partial(measure_run_stage, self, "quantized")
        device = self.trainer.strategy.root_device if self._trainer else self.device
        seen = partial(add_quantized, self.record, measure, device=device)
        self._adapted = PreparedModel(
            self.load_model(), self.plans(), self._settings(), seen, device
        )
        self.model = self._adapted.model

    def _settings(self) -> RecoverySettings:
        return RecoverySettings(
            recovery=self.recovery,
            lora=self.lora,
            keep_zeros=self.keep_zeros,
            gradient_checkpointing=self.gradient_checkpointing,
            growing=self.gradual,
            quantization=self.quantization,
            bitsandbytes=self.bitsandbytes,
            seed=self.resuming.seed,
            compile_backend=self.compile_backend,
        )

    def warn(self, text: str) -> None:
        """Warn now and in the report."""
        log.warning(text)
        if self.record is not None:
            self.record.warnings.append(text)

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
        mask = batch.get("attention_mask")
        loss = self.objective(self.model, batch)
        tokens = batch["input_ids"].numel() if mask is None else int(mask.sum())
        self.tokens_seen += tokens * self.trainer.world_size
        self.log("train/loss", loss, prog_bar=True)
        return loss * share_of_tokens(self.trainer, batch["labels"])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch to perplexity and next-token accuracy."""
        logits = self(batch["input_ids"], batch.get("attention_mask"))
        nll, correct, tokens = next_token_sums(logits, batch["labels"])
        self.val_perplexity.update(nll, tokens)
        self.val_accuracy.update(correct, tokens)
        prefix = "test" if self.trainer.testing else "val"
        self.log(f"{prefix}/perplexity", self.val_perplexity, prog_bar=True, on_epoch=True)
        self.log(f"{prefix}/accuracy", self.val_accuracy, prog_bar=True, on_epoch=True)

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
        return (self.optimizer or partial(AdamW, lr=self.learning_rate))(parameters)

    def configure_callbacks(self) -> list[Callback]:
        """Let Lightning call what watches the recovery, and what makes a resume exact."""
        return [*super().configure_callbacks(), self.resuming]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Keep gradients of pruned weights out of clipping, where no hook can."""
        if self.masks is not None:
            self.masks.mask_gradients()

    def on_train_start(self) -> None:
        """See how the loss can be taken."""
        self.objective.start(self.model)

    def on_train_end(self) -> None:
        """Let go of the teacher."""
        self.objective.finish()

    # --- checkpoints -------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained, and say on which base.

        Raises:
            RuntimeError: if a weight that must be zero is not.
        """
        assert self._adapted is not None
        self._adapted.zeros.check()
        trained, state = trained_parameters(self), checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: state[name] for name in state if name in trained}
        checkpoint[KEY] = {
            "format": FORMAT,
            **self._describe_training(),
            "config": self._adapted.config,
            "tokens_seen": self.tokens_seen,
            "masks": self.masks and self.masks.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits the model; load its base first where there is none.

        Raises:
            ValueError: if it was trained on another base or in another way; names both.
        """
        saved = read_metadata(checkpoint)
        if not self._in_training:
            self._rebuild(saved)
        if "state_dict" in checkpoint:  # else the strategy has loaded it, after it was checked
            self.check_checkpoint(checkpoint)
        if self.masks is not None:
            self.masks.load_state_dict(saved["masks"])
        self.tokens_seen = saved["tokens_seen"]

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits the model in training.

        Raises:
            ValueError: if it was trained on another base or in another way; names both.
        """
        check_same_run(read_metadata(checkpoint), self._describe_training())
        check_same_parameters(checkpoint["state_dict"], trained_parameters(self))

    def _describe_training(self) -> dict[str, str]:
        assert self._adapted is not None
        return {
            "base": str(self.base.resolve() if self.base else self.name),
            "fingerprint": self._adapted.fingerprint,
            "recovery": self.recovery,
            "zeros": self._adapted.zeros.state,
            "quantization": self._settings().base_precision,
        }

    def _rebuild(self, saved: dict[str, Any]) -> None:
        """Load the base that a checkpoint names and prepare it as in training."""
        if self._trainer and isinstance(self.trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                "ckpt_path of a recovery loads under one device or ddp; evaluate final/ instead, "
                "or set trainer.strategy=auto"
            )
        if (Path(saved["base"]) / "config.json").is_file():
            self.use_base(Path(saved["base"]), self.record)
        else:
            self.forget_model()
        self.gradual = saved["zeros"] == "growing"
        self._adapt()

    # --- the end -----------------------------------------------------------------------------

    def on_fit_end(self) -> None:
        """Merge adapters, save a verified directory, evaluate, and write the report.

        Raises:
            RuntimeError: if a weight that must be zero is not.
        """
        assert self._adapted is not None
        end_fit(self, self._adapted)

    def read_base(self) -> PreTrainedModel:
        """Read the model that training began with again; afterwards `model` is that."""
        return self._read(self._source)

    def checked_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer of the loaded model.

        Raises:
            ValueError: if a model was given without one.
        """
        if self.tokenizer is None:
            raise ValueError("module.tokenizer=None: set it together with module.model")
        return self.tokenizer

    def plan_files(self) -> list[Path]:
        """Return the plans that led to the base, or to the directory that is recovered."""
        return plan_files(self.base or Path(self.name).expanduser())

    def plans(self) -> list[Plan]:
        """Return the plans of `plan_files`."""
        return [Plan.load(file) for file in self.plan_files()]

    def describe_recovery(self) -> dict[str, Any]:
        """Return the settings of the recovery and how far it is, for report and checkpoints."""
        lora = asdict(self.lora) if self.recovery == "lora" else {}
        return {
            "mode": self.recovery,
            **lora,
            **self.objective.describe(),
            "quantization": self._settings().base_precision,
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup_steps,
            "lr_scheduler": self.lr_scheduler_name,
            **self.lr_scheduler_kwargs,
            "optimizer_steps": self.trainer.global_step,
            "weights_of_step": self.restored_step or self.trainer.global_step,
            "tokens_seen": self.tokens_seen,
            "precision": str(self.trainer.precision),
        }
