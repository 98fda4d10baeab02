"""The teacher of a run: loaded, or asked once, before the training, on all processes.

The teacher of "kd" is loaded beside the student, and cut up where the student's weights are. That
of "kd_topk" writes what the cache lacks and is dropped before the student is loaded again; a whole
cache needs no teacher at all.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from prunelight.models.families.config_fields import vocabulary_size
from prunelight.models.families.layers import decoder_layers
from prunelight.models.loading import check_hub, find_source, load, load_config, load_tokenizer
from prunelight.models.placement import to_device
from prunelight.planning.fingerprints import model_fingerprint, stand_for
from prunelight.recovery.distillation.objective import Objective, kept_layers
from prunelight.recovery.distillation.teacher_cache import TeacherCache
from prunelight.recovery.quantization import BitsAndBytes, quantize
from prunelight.run.run_state import Run, plans_beside

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TeacherSource:
    """Where a teacher comes from, and how it is held; see `Distillation`."""

    name: str
    dtype: str
    held: str
    trust_remote_code: bool
    attn_implementation: str | None = None

    def load(self, device: torch.device) -> PreTrainedModel:
        """Return the teacher on a device, in eval mode and without gradients."""
        model, _ = load(
            self.name,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
            attn_implementation=self.attn_implementation,
        )
        log.info("teacher %s: %d layers, %s", self.name, model.config.num_hidden_layers, self.held)
        model.requires_grad_(False)
        if self.held != "memory":
            quantize(model, self.held, BitsAndBytes(), device)
        return to_device(model, device).eval()


def check_teacher(run: Run, model: PreTrainedModel, *, sliced: bool = False) -> None:
    """Check what the run is to learn from, before anything is computed.

    Args:
        run: whose objective names the teacher.
        model: dense or pruned.
        sliced: the model will be sliced.

    Raises:
        ValueError: if the settings do not fit the model, the teacher has another vocabulary, or
            the teacher exists only in memory.
        ImportError: if the teacher is to be quantized and bitsandbytes is missing.
    """
    objective = run.objective
    if objective is None:
        return
    objective.check(model, sliced=sliced)
    name = objective.settings.name
    if objective.kind == "lm":
        return
    if name is None:
        if not run.source:
            raise ValueError(
                f"loss={objective.kind} reads the dense model again as the teacher, and this one "
                "exists only in memory; save it (prunelight.save) and give its directory as name, "
                "or as distillation.name"
            )
        return
    config: Any = load_config(check_hub(find_source(name)), trust_remote_code=run.trust_remote_code)
    rows, student_rows = config.get_text_config().vocab_size, vocabulary_size(model)
    tokenizer = load_tokenizer(name, trust_remote_code=run.trust_remote_code)
    same = tokenizer.get_vocab() == run.checked_tokenizer().get_vocab()
    if rows != student_rows or not same:
        raise ValueError(
            f"distillation.name={name!r} has another vocabulary ({rows} ids) than {run.name!r} "
            f"({student_rows}): a teacher must have the student's own; take the dense model it "
            "came from"
        )


def prepare_teacher(run: Run) -> None:
    """Load the teacher of a run, or make sure that its cache is whole.

    Raises:
        ValueError: if there is no data to cache, or a cache does not fit.
    """
    objective = run.objective
    if objective is None or objective.kind == "lm":
        return
    settings = objective.settings
    if settings.name is None and run.base is None:
        log.warning("distillation.name=None: the teacher is %s as it is", run.name)
    name = settings.name or run.name
    source = TeacherSource(
        name, run.dtype, settings.teacher, run.trust_remote_code, run.attn_implementation
    )
    if objective.kind == "kd":
        with run.phases.phase("load the teacher"):
            teacher = _beside_student(run, source)
        kept = _kept_layers(run, teacher, name) if settings.hidden_weight else []
        objective.use_teacher(teacher, kept)
    else:
        objective.cache = _whole_cache(run, objective, source)


def _beside_student(run: Run, source: TeacherSource) -> PreTrainedModel:
    """Return the teacher on this process' device: cut up where the student's weights are."""
    place = run.place
    if not place.shards_weights:
        return source.load(place.device)
    if source.held != "memory":
        log.warning(
            "distillation.teacher=%s: each process holds the whole teacher, since weights in bits "
            "cannot be cut up; with teacher='memory' it is cut up as the student is",
            source.held,
        )
        return source.load(place.device)
    teacher = source.load(torch.device("cpu"))
    stand_for(teacher, model_fingerprint(teacher), source.name)  # whole weights tell it, not parts
    place.shard(teacher)
    return teacher


def _kept_layers(run: Run, teacher: PreTrainedModel, name: str) -> list[int]:
    """Return which of the teacher's layers the student's stand for.

    Raises:
        ValueError: if the plans beside the student do not tell.
    """
    before = plans_beside(Path(name).expanduser())
    plans = run.plans()[len(before) :]
    kept = kept_layers(plans, len(decoder_layers(teacher)))
    num_layers = len(decoder_layers(run.load_model()))
    if len(kept) != num_layers:
        raise ValueError(
            f"distillation.hidden_weight needs to know which layers the student's {num_layers} "
            f"stand for; the plans beside it lead from the teacher's to {len(kept)}. Set it to 0"
        )
    return kept


def _whole_cache(run: Run, objective: Objective, source: TeacherSource) -> TeacherCache:
    """Return the cache of the training set, after the teacher has written what it lacks."""
    place, settings, data = run.place, objective.settings, run.place.data
    if not (hasattr(data, "examples") and hasattr(data, "batch")):
        raise ValueError(
            "loss=kd_topk asks the teacher once for each training example: give the Trainer a "
            "TextDataModule, or set loss=kd"
        )
    vocabulary = vocabulary_size(run.load_model())
    facts, teacher = _dense_facts(run, settings.name), None
    if facts is None:
        _release(run)
        with run.phases.phase("load the teacher"):
            teacher = source.load(place.device)
        dtype = str(teacher.dtype).removeprefix("torch.")  # as a RunRecord has it
        facts = {"fingerprint": model_fingerprint(teacher), "dtype": dtype}
    cache = TeacherCache(
        settings.cache,
        place.root,
        lambda places: data.batch("train", places),
        len(data.examples("train")),
        teacher={**facts, "held": source.held, "precision": place.precision},
        k=settings.k,
        temperature=settings.temperature,
        vocabulary=vocabulary,
    )
    group = place.group
    with group.failing_together():
        group.run_on_rank_zero(cache.open)
        if blocks := [block for block in cache.missing() if block % group.size == group.rank]:
            _release(run)
            with run.phases.phase("load the teacher"):
                teacher = teacher or source.load(place.device)
            with place.in_precision(), run.phases.phase("ask the teacher"):
                cache.write(teacher, blocks, progress=group.rank == 0)
    del teacher
    if run.model is None:
        run.read_again()
    return cache


def _dense_facts(run: Run, teacher: str | None) -> dict[str, str] | None:
    """Return what identifies the model that was pruned in this run; None for another teacher."""
    record = run.record
    if teacher or run.base is None or not (record and record.plans):
        return None
    return {"fingerprint": record.plans[0]["model"]["fingerprint"], "dtype": record.dtype}


def _release(run: Run) -> None:
    """Drop the student if it can be read again: not one in memory only, nor a trained one."""
    if run.source and run.prepared is None:
        run.forget_model()
