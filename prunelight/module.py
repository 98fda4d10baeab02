"""RecoveryModule: the LightningModule that brings a pruned model back and hands it over.

Pruning callbacks give it the pruned base in `setup`; without any it recovers the model that `name`
stands for. It trains by LoRA, fully, or not at all, validates with exact token-weighted metrics,
and at fit end saves a verified directory and the report. Checkpoints hold what is trained and name
the base; they contain primitives only and load with `weights_only=True`.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from peft import PeftModel
from torch import Tensor
from torch.optim import AdamW
from transformers import PreTrainedModel, PreTrainedTokenizerBase, SchedulerType, get_scheduler

from prunelight.architecture import restore_rwkv_scale
from prunelight.calibration import Windows, check_length, split_windows
from prunelight.distributed import check_strategy, on_rank_zero
from prunelight.evaluation import (
    Measurement,
    measure_stage,
    measuring,
    new_record,
    to_device,
)
from prunelight.metrics import (
    TokenAccuracy,
    TokenPerplexity,
    next_token_loss,
    next_token_sums,
    parameter_count,
)
from prunelight.models import load, resolve_dtype
from prunelight.plan import describe_windows, model_fingerprint
from prunelight.recovery import LoRA, attach_lora, freeze, merge_lora, train_all
from prunelight.report import Cost, RunRecord, write_report
from prunelight.saving import check_replaceable, save

log = logging.getLogger(__name__)

RECOVERIES = ("none", "lora", "full")


class RecoveryModule(LightningModule):
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
        optimizer: called with the trainable parameters; brings its own learning rate. None takes
            AdamW with `learning_rate`.
        gradient_checkpointing: compute activations again in the backward, for memory.
        trust_remote_code: run Python code that comes with the model.

    The defaults are those with which the depth-pruning papers recover. To recover a model that is
    already in memory, set `module.model` and `module.tokenizer` before the fit.

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
        optimizer: OptimizerCallable | None = None,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if recovery not in RECOVERIES:
            raise ValueError(f"recovery={recovery!r} must be one of {', '.join(RECOVERIES)}")
        if learning_rate <= 0 or warmup_steps < 0:
            raise ValueError(
                f"learning_rate={learning_rate} must be above 0 and warmup_steps={warmup_steps} "
                "at least 0"
            )
        if lr_scheduler not in {kind.value for kind in SchedulerType}:
            raise ValueError(
                f"lr_scheduler={lr_scheduler!r} must be one of "
                f"{', '.join(kind.value for kind in SchedulerType)}"
            )
        resolve_dtype(dtype)
        self.name = name
        self.dtype_name = dtype
        self.recovery = recovery
        self.lora = lora
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.lr_scheduler_name = lr_scheduler
        self.optimizer = optimizer
        self.gradient_checkpointing = gradient_checkpointing
        self.trust_remote_code = trust_remote_code
        self.model: PreTrainedModel | PeftModel | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.base: Path | None = None  # the pruned base on disk
        self.record: RunRecord | None = None
        self.val_perplexity = TokenPerplexity()
        self.val_accuracy = TokenAccuracy()
        self.strict_loading = False  # checkpoints hold what is trained, `on_load_checkpoint` checks
        self._adapted = False  # prepared for training, and not merged yet
        self._base_config: dict[str, Any] = {}
        self._fingerprint = ""
        self._tokens_seen = 0
        self._training: Any = None
        self._measurement: Measurement | None = None

    # --- which model -------------------------------------------------------------------------

    def load_model(self) -> PreTrainedModel:
        """Return the model, loading it by name if there is none yet; not for adapted models."""
        if self.model is None:
            self.model, self.tokenizer = load(
                self.name, dtype=self.dtype_name, trust_remote_code=self.trust_remote_code
            )
        assert isinstance(self.model, PreTrainedModel)
        return self.model

    def forget_model(self) -> None:
        """Drop the model, so that its memory is free for the next one."""
        self.model = None

    def use_base(self, directory: Path, record: RunRecord | None) -> None:
        """Load the pruned base that the callbacks saved; later loads and checkpoints name it."""
        self.forget_model()
        self.model, self.tokenizer = load(
            directory, dtype=self.dtype_name, trust_remote_code=self.trust_remote_code
        )
        self.base, self.record = directory, record
        self._adapted = False

    def setup(self, stage: str) -> None:
        """Check strategy and output; load the model if no callback did. Lightning calls it."""
        check_strategy(self.trainer)
        if self._adapted:
            return
        model = self.load_model()
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        check_length(model, getattr(datamodule, "seq_len", 0))
        if stage != "fit":
            return
        self.check_output()
        if self.record is None and hasattr(datamodule, "validation_windows"):
            on_rank_zero(self.trainer, lambda: self._measure_dense(model))
        if self.recovery == "none":
            self.trainer.limit_train_batches = 0

    def _measure_dense(self, model: PreTrainedModel) -> None:
        described = self.describe_evaluation(self.trainer)
        self.record = new_record(self.name, model, model_fingerprint(model), described)
        model = to_device(model, self.trainer.strategy.root_device)
        windows = self.evaluation_windows(self.trainer)
        self.record.stages.append(measure_stage("dense", model, windows))

    def check_output(self) -> None:
        """Check that the run may write its result and report.

        Raises:
            FileExistsError: if there is a final/ or a report.md that prunelight did not write.
        """
        check_replaceable(self._final_directory())
        report = self._root() / "report.md"
        if report.exists() and not report.with_name("report.json").exists():
            raise FileExistsError(
                f"{report} exists and has no report.json of prunelight beside it; set "
                "trainer.default_root_dir to a directory of its own"
            )

    def configure_model(self) -> None:
        """Make the model trainable, before the optimizer exists. Lightning calls it."""
        attached = self._trainer is not None  # not in load_from_checkpoint
        if attached and self.trainer.state.fn == "fit" and not self._adapted:
            self._adapt()

    def _adapt(self) -> None:
        model = self.load_model()
        restore_rwkv_scale(model)
        self._fingerprint = model_fingerprint(model)
        self._base_config = json.loads(model.config.to_json_string(use_diff=False))
        # RWKV halves its weights in eval mode: not while they are trained and checkpointed.
        if hasattr(model.config, "rescale_every"):
            model.config.rescale_every = 0
        if self.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if self.recovery == "lora":
            self.model = attach_lora(model, self.lora)
        elif self.recovery == "full":
            if model.dtype != torch.float32:
                self._warn(
                    f"recovery=full trains {model.dtype} weights, in which small updates are lost; "
                    "set model.dtype=float32 and trainer.precision=bf16-mixed"
                )
            train_all(model)
        else:
            freeze(model)
        self._adapted = True
        assert self.model is not None
        self.model.train()  # from_pretrained leaves eval mode, and Lightning leaves that alone
        log.info(
            "%s recovery: %.2fM of %.1fM parameters are trained",
            self.recovery,
            parameter_count(self.model, trainable=True) / 1e6,
            parameter_count(self.model) / 1e6,
        )

    def _warn(self, text: str) -> None:
        """Warn now and in the report."""
        log.warning(text)
        if self.record is not None:
            self.record.warnings.append(text)

    # --- training ----------------------------------------------------------------------------

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return logits (B, T, V) for token ids (B, T)."""
        assert self.model is not None
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None  # lets attention take its causal fast path
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy over the tokens whose label counts."""
        logits = self(batch["input_ids"], batch["attention_mask"])
        loss = next_token_loss(logits, batch["labels"])
        self._tokens_seen += int(batch["attention_mask"].sum()) * self.trainer.world_size
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch to perplexity and next-token accuracy."""
        logits = self(batch["input_ids"], batch["attention_mask"])
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
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError(
                "max_steps=-1 without max_epochs leaves the end of the learning-rate schedule "
                "open; set trainer.max_steps or trainer.max_epochs"
            )
        if self.warmup_steps >= steps:
            log.warning("warmup_steps=%d reaches past the %d steps", self.warmup_steps, steps)
        make = self.optimizer or partial(AdamW, lr=self.learning_rate)
        optimizer = make(parameters)
        scheduler = get_scheduler(self.lr_scheduler_name, optimizer, self.warmup_steps, int(steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_train_start(self) -> None:
        """Start to measure the recovery."""
        self._training = measuring(self.device)
        self._measurement = self._training.__enter__()

    def on_train_end(self) -> None:
        """Stop to measure the recovery."""
        self._training.__exit__(None, None, None)

    # --- checkpoints -------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained, and say on which base."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: state[name] for name in state if name in trained}
        checkpoint["prunelight"] = {
            "base": str(self.base.resolve() if self.base else self.name),
            "fingerprint": self._fingerprint,
            "config": self._base_config,
            "recovery": self.recovery,
            "tokens_seen": self._tokens_seen,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits the model; load its base first where there is none.

        Raises:
            ValueError: if it was trained on another base or in another way; names both.
        """
        saved = checkpoint.get("prunelight")
        if saved is None:
            raise ValueError("the checkpoint has no key 'prunelight': it is not from this module")
        if not self._adapted:
            self._rebuild(saved)
        if (saved["fingerprint"], saved["recovery"]) != (self._fingerprint, self.recovery):
            raise ValueError(
                f"the checkpoint was trained by {saved['recovery']} on base {saved['fingerprint']} "
                f"({saved['base']}), this run trains by {self.recovery} on base "
                f"{self._fingerprint} ({self.base or self.name}); use the arguments of that run, "
                "or start without ckpt_path"
            )
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        odd = trained ^ set(checkpoint["state_dict"])
        if odd:
            raise ValueError(
                f"{len(odd)} trained parameters are only on one side, e.g. {min(odd)}; the LoRA "
                "settings must be those of the run that wrote the checkpoint"
            )
        self._tokens_seen = saved["tokens_seen"]

    def _rebuild(self, saved: dict[str, Any]) -> None:
        """Load the base that a checkpoint names and prepare it as in training."""
        if (Path(saved["base"]) / "config.json").is_file():
            self.use_base(Path(saved["base"]), self.record)
        else:
            self.forget_model()
        self._adapt()

    # --- the end -----------------------------------------------------------------------------

    def on_fit_end(self) -> None:
        """Merge adapters, save a verified directory, evaluate, and write the report."""
        model = self._merged()  # on every rank: a validation may follow
        on_rank_zero(self.trainer, lambda: self._finish(model))

    def _finish(self, model: PreTrainedModel) -> None:
        model = to_device(model, self.trainer.strategy.root_device)
        final = self._final_directory()
        with measuring(model.device) as phase:
            saved = save(
                model,
                self.checked_tokenizer(),
                final,
                extra_files=self._plans(),
                trust_remote_code=self.trust_remote_code,
            )
        record = self.record
        if record is None:
            return
        self._add_cost("recover", self._measurement)
        self._add_cost("save and verify final", phase)
        record.verification[final.name] = saved.verification
        record.recovery = self._describe_recovery()
        if self.recovery != "none":
            windows = self.evaluation_windows(self.trainer)
            stage = measure_stage("recovered", model, windows)
            record.stages.append(replace(stage, size_bytes=saved.size_bytes))
        for file in write_report(self._root(), record):
            log.info("wrote %s", file)

    def _merged(self) -> PreTrainedModel:
        """Return the trained model as a plain transformers model, in eval mode."""
        model = self.model
        if isinstance(model, PeftModel):
            model = merge_lora(model)
        assert isinstance(model, PreTrainedModel)
        restore_rwkv_scale(model)
        if "rescale_every" in self._base_config:
            model.config.rescale_every = self._base_config["rescale_every"]
        if self.gradient_checkpointing:
            model.activation_checkpointing_disable()
        self.model, self._adapted = model, False
        return model.eval()

    def checked_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer of the loaded model.

        Raises:
            ValueError: if a model was given without one.
        """
        if self.tokenizer is None:
            raise ValueError("module.tokenizer=None: set it together with module.model")
        return self.tokenizer

    def _plans(self) -> dict[str, str]:
        """Return the plans that led to the base, as files to keep beside the result."""
        files = sorted(self.base.glob("plan*.json")) if self.base else []
        return {file.name: file.read_text(encoding="utf-8") for file in files}

    def _add_cost(self, name: str, phase: Measurement | None) -> None:
        if self.record is not None and phase is not None:
            forwards = phase.seconds / self.record.forward_seconds
            self.record.costs.append(Cost(name, phase.seconds, forwards, phase.peak_bytes))

    def _describe_recovery(self) -> dict[str, Any]:
        lora = asdict(self.lora) if self.recovery == "lora" else {}
        return {
            "mode": self.recovery,
            **lora,
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup_steps,
            "lr_scheduler": self.lr_scheduler_name,
            "optimizer_steps": self.trainer.global_step,
            "tokens_seen": self._tokens_seen,
            "precision": str(self.trainer.precision),
        }

    def _root(self) -> Path:
        return Path(self.trainer.default_root_dir)

    def _final_directory(self) -> Path:
        return self._root() / "final"

    # --- the record of the run ---------------------------------------------------------------

    def evaluation_windows(self, trainer: Trainer) -> Windows:
        """Return the held-out windows on which dense, pruned and recovered model are compared."""
        return trainer.datamodule.validation_windows()  # type: ignore[attr-defined]

    def describe_evaluation(self, trainer: Trainer) -> dict[str, Any]:
        """Return facts about the evaluation windows: source, numbers and fingerprint."""
        data: Any = getattr(trainer, "datamodule", None)
        source = getattr(data, "sources", {}).get("validation", type(data).__name__)
        windows = self.evaluation_windows(trainer)
        return {"source": str(source), **describe_windows(*split_windows(windows))}
