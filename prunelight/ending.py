"""The end of a fit: what was trained is merged, saved as a verified directory, and reported."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from prunelight.adaptation import Adapted
from prunelight.distributed import on_rank_zero
from prunelight.evaluation import where_it_fits
from prunelight.handover import FINAL, hand_over, save_adapter
from prunelight.recording import stage_of_run
from prunelight.sharded import gather_trained


def end_fit(module: Any, adapted: Adapted) -> None:
    """Merge, save, evaluate and report; afterwards every rank holds the result.

    Args:
        module: the RecoveryModule.
        adapted: its model in training.

    Raises:
        RuntimeError: if a weight that must be zero is not.
    """
    if adapted.sharded or adapted.quantized:
        _merge_anew(module, adapted)
        return
    on_rank_zero(module.trainer, partial(_save_adapter, module, adapted))
    module.model = adapted.merged()
    on_rank_zero(module.trainer, partial(_finish, module, module.model, adapted))


def _merge_anew(module: Any, adapted: Adapted) -> None:
    """Merge what was trained onto the base, which rank 0 reads again."""
    trained = gather_trained(adapted.model)
    module.model = None

    def merge() -> None:
        other = adapted.onto(module.read_base(), module.plans(), trained)
        _save_adapter(module, other)
        _finish(module, other.merged(), other)

    on_rank_zero(module.trainer, merge)
    module.use_result(_root(module) / FINAL)


def _root(module: Any) -> Path:
    return Path(module.trainer.default_root_dir)


def _save_adapter(module: Any, adapted: Adapted) -> None:
    """Keep the adapters unmerged too, if merging fills zeros."""
    if adapted.fills_zeros and isinstance(adapted.model, PeftModel):
        save_adapter(adapted.model, _root(module))


def _finish(module: Any, model: PreTrainedModel, adapted: Adapted) -> None:
    if adapted.fills_zeros:
        kept = "; adapter/ holds the adapters unmerged" if module.recovery == "lora" else ""
        module.warn(adapted.zeros.describe_loss(model) + kept)
    if module.record is not None:
        told = {"keep_zeros": module.keep_zeros} if adapted.zeros.planned else {}
        module.record.recovery = {**module.describe_recovery(), **told}
    trained = module.recovery != "none"
    hand_over(
        _root(module),
        module.record,
        where_it_fits(model, module.trainer.strategy.root_device),
        module.checked_tokenizer(),
        plans=module.plan_files(),
        trust_remote_code=module.trust_remote_code,
        training=module.resuming.measurement,
        measure=partial(stage_of_run, module, "recovered") if trained else None,
    )
