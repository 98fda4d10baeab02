"""Bringing teacher and run together: before the training, on all ranks.

The teacher of "kd" is loaded beside the student. That of "kd_topk" writes what the cache lacks and
is dropped before the student is loaded again; a whole cache needs no teacher at all.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from prunelight.evaluation.report.record import Cost
from prunelight.models.families.config_fields import vocabulary_size
from prunelight.models.loading import find_source, load, load_config, load_tokenizer, reach
from prunelight.models.placement import to_device
from prunelight.planning.fingerprints import model_fingerprint
from prunelight.planning.plan import Plan
from prunelight.recovery.distillation.objective import Objective, kept_layers
from prunelight.recovery.distillation.teacher_cache import TeacherCache
from prunelight.recovery.quantization import BitsAndBytes, quantize
from prunelight.run.run_state import plan_files
from prunelight.runtime.measuring import measuring
from prunelight.runtime.processes import ProcessGroup

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TeacherSource:
    """Where a teacher comes from, and how it is held; see `Distillation`."""

    name: str
    dtype: str
    held: str
    trust_remote_code: bool

    def load(self, device: torch.device) -> PreTrainedModel:
        """Return the teacher on a device, in eval mode and without gradients."""
        model, _ = load(self.name, dtype=self.dtype, trust_remote_code=self.trust_remote_code)
        log.info("teacher %s: %d layers, %s", self.name, model.config.num_hidden_layers, self.held)
        model.requires_grad_(False)
        if self.held != "memory":
            quantize(model, self.held, BitsAndBytes(), device)
        return to_device(model, device).eval()


def check_teacher(module: Any, model: PreTrainedModel, *, sliced: bool = False) -> None:
    """Check what the run is to learn from, before anything is computed.

    Args:
        module: the RecoveryModule.
        model: dense or pruned.
        sliced: it will be sliced.

    Raises:
        ValueError: if the settings do not fit the model, the teacher has another vocabulary, or it
            exists only in memory.
        ImportError: if the teacher is to be quantized and bitsandbytes is missing.
    """
    objective: Objective = module.objective
    objective.check(model, sliced=sliced)
    name = objective.settings.name
    if objective.kind == "lm":
        return
    if name is None:
        if not module._source:
            raise ValueError(
                f"loss={objective.kind} reads the dense model again as the teacher, and this one "
                "exists only in memory; save it (prunelight.save) and give its directory as name, "
                "or as distillation.name"
            )
        return
    config: Any = load_config(reach(find_source(name)), trust_remote_code=module.trust_remote_code)
    rows, ours = config.get_text_config().vocab_size, vocabulary_size(model)
    tokenizer = load_tokenizer(name, trust_remote_code=module.trust_remote_code)
    if rows != ours or tokenizer.get_vocab() != module.checked_tokenizer().get_vocab():
        raise ValueError(
            f"distillation.name={name!r} has another vocabulary ({rows} ids) than {module.name!r} "
            f"({ours}): a teacher must have the student's own; take the dense model it came from"
        )


def prepare_teacher(module: Any) -> None:
    """Load the teacher of a run, or make sure that its cache is whole.

    Args:
        module: the RecoveryModule, attached to its trainer.

    Raises:
        ValueError: as `check_teacher`; if there is no data to cache or a cache does not fit.
    """
    objective: Objective = module.objective
    if objective.kind == "lm":
        return
    check_teacher(module, module.load_model())
    settings = objective.settings
    if settings.name is None and module.base is None:
        log.warning("distillation.name=None: the teacher is %s as it is", module.name)
    name = settings.name or module.name
    source = TeacherSource(name, module.dtype_name, settings.teacher, module.trust_remote_code)
    if objective.kind == "kd":
        teacher = source.load(module.trainer.strategy.root_device)
        kept = _kept_layers(module, teacher, name) if settings.hidden_weight else []
        objective.use_teacher(teacher, kept)
    else:
        objective.cache = _whole_cache(module, source)


def _kept_layers(module: Any, teacher: PreTrainedModel, name: str) -> list[int]:
    """Return which of the teacher's layers the student's stand for.

    Raises:
        ValueError: if the plans beside the student do not tell.
    """
    before = plan_files(Path(name).expanduser())
    files = plan_files(module.base or Path(module.name).expanduser())
    plans = [Plan.load(file) for file in files[len(before) :]]
    kept = kept_layers(plans, teacher.config.num_hidden_layers)
    found = module.load_model().config.num_hidden_layers
    if len(kept) != found:
        raise ValueError(
            f"distillation.hidden_weight needs to know which layers the student's {found} stand "
            f"for; the plans beside it lead from the teacher's to {len(kept)}. Set it to 0"
        )
    return kept


def _whole_cache(module: Any, source: TeacherSource) -> TeacherCache:
    """Return the cache of the training set, after what it lacks was written."""
    trainer, settings = module.trainer, module.objective.settings
    data: Any = getattr(trainer, "datamodule", None)
    if not (hasattr(data, "examples") and hasattr(data, "batch")):
        raise ValueError(
            "loss=kd_topk asks the teacher once for each training example: give the Trainer a "
            "TextDataModule, or set loss=kd"
        )
    vocabulary = vocabulary_size(module.load_model())
    facts, teacher = _dense_facts(module), None
    if facts is None:
        _release(module)
        teacher = source.load(trainer.strategy.root_device)
        dtype = str(teacher.dtype).removeprefix("torch.")  # as a RunRecord has it
        facts = {"fingerprint": model_fingerprint(teacher), "dtype": dtype}
    cache = TeacherCache(
        settings.cache,
        Path(trainer.default_root_dir),
        lambda places: data.batch("train", places),
        len(data.examples("train")),
        teacher={**facts, "held": source.held, "precision": str(trainer.precision)},
        k=settings.k,
        temperature=settings.temperature,
        vocabulary=vocabulary,
    )
    group = ProcessGroup.of_default_group()
    with group.together():
        group.on_zero(cache.open)
        if blocks := [block for block in cache.missing() if block % group.size == group.rank]:
            _release(module)
            teacher = teacher or source.load(trainer.strategy.root_device)
            with trainer.precision_plugin.forward_context(), measuring(teacher.device) as phase:
                cache.write(teacher, blocks, progress=group.rank == 0)
            if (record := module.record) is not None:
                told = phase.seconds, phase.seconds / record.forward_seconds, phase.peak_bytes
                record.costs.append(Cost("ask the teacher", *told))
    del teacher
    if module.model is None:
        module.read_base()
    return cache


def _dense_facts(module: Any) -> dict[str, str] | None:
    """Return what identifies the model that was pruned in this run; None if it was another."""
    record = module.record
    if module.objective.settings.name or module.base is None or not (record and record.plans):
        return None
    return {"fingerprint": record.plans[0]["model"]["fingerprint"], "dtype": record.dtype}


def _release(module: Any) -> None:
    """Drop the student, if it is what can be read again: not one in memory, nor a trained one."""
    if module._source and module._adapted is None:
        module.forget_model()
