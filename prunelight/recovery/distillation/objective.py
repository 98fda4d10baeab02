"""The loss of a recovery: cross-entropy of the next tokens, or distillation from the dense model.

The dense model is a good teacher for its own pruned copy (Minitron, arXiv:2407.14679). The teacher
can stay in memory beside the student, in full precision or in 4 or 8 bits. Or it runs once before
the training, and its probabilities are cached (teacher_cache.py). The teacher belongs to no state
dict and no optimizer; its weights are cut up where the student's are (run/teacher.py).
"""

# B sequences, T tokens, D hidden size, V vocabulary

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunelight.losses import (
    TokenLoss,
    distillation_loss,
    language_loss,
    logits_loss,
    mixed_loss,
    top_k_loss,
)
from prunelight.models.families.architectures import is_sliced
from prunelight.models.families.config_fields import vocabulary_size
from prunelight.models.forward import watching_layers
from prunelight.planning.plan import Plan
from prunelight.recovery.distillation.batch_facts import BatchFacts, facts_of
from prunelight.recovery.distillation.language_head import LanguageHead, without_adapters
from prunelight.recovery.distillation.teacher_cache import TeacherCache
from prunelight.recovery.packed_rows import model_inputs
from prunelight.runtime.arguments import (
    NOT_EMPTY,
    above,
    at_least,
    between,
    check_choice,
    check_fields,
)

log = logging.getLogger(__name__)

LOSSES = ("lm", "kd", "kd_topk")

TEACHERS = ("memory", "nf4", "fp4", "int8")

# Settings that have an effect with one loss only.
_ONLY_FOR = {"k": "kd_topk", "cache": "kd_topk", "hidden_weight": "kd"}


@dataclass(frozen=True)
class Distillation:
    """Settings of the losses "kd" and "kd_topk".

    Attributes:
        temperature: of both distributions; the loss is multiplied by its square.
        lm_weight: share of the plain loss on the next tokens, in [0, 1]; docs/results/recovery.md
            compares the default with 1, the plain loss alone.
        k: for kd_topk: how many of the teacher's most likely tokens are kept.
        hidden_weight: for kd: weight of an added loss, the relative squared error of the kept
            layers' outputs; 0 leaves it out.
        teacher: how the teacher is held in memory: "memory" in the run's dtype, or "nf4", "fp4" or
            "int8" of bitsandbytes.
        name: the teacher, a name that `prunelight.load` takes, such as the dense model after a
            recovery on this text ("teacher correction", arXiv:2408.11796); None: the dense model.
        cache: for kd_topk: directory of the teacher's probabilities, read if it exists, else
            written; None: teacher-<fingerprint> in the run's directory.

    Raises:
        ValueError: if a value is out of range.
    """

    temperature: float = 1.0
    lm_weight: float = 0.8
    k: int = 64
    hidden_weight: float = 0.0
    teacher: Literal["memory", "nf4", "fp4", "int8"] = "memory"
    name: str | None = None
    cache: str | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        check_fields(
            self,
            "distillation.",
            temperature=above(0),
            lm_weight=between(0, 1),
            k=at_least(1),
            hidden_weight=at_least(0),
            name=NOT_EMPTY,
            cache=NOT_EMPTY,
        )


class Objective:
    """The loss of a recovery; called with model and batch.

    Attributes:
        kind: "lm", "kd" or "kd_topk".
        settings: settings of distillation.
        chunked: never hold all logits, where the model's head is separable (see language_head.py).
        teacher: for kd, set before the training.
        cache: for kd_topk, set before the training.
        teacher_layers: for hidden states: the teacher's layer that matches each student's layer.

    Raises:
        ValueError: if loss, settings and recovery contradict each other.
    """

    def __init__(
        self, kind: str, settings: Distillation, *, chunked: bool = True, recovery: str = "lora"
    ) -> None:
        check_objective(kind, settings, recovery)
        self.kind, self.settings, self.chunked = kind, settings, chunked
        self.teacher: LanguageHead | None = None
        self.cache: TeacherCache | None = None
        self.teacher_layers: list[int] = []
        self._teacher_is_separable = self._is_separable = False
        self._head: LanguageHead | None = None

    def check(self, model: PreTrainedModel, *, sliced: bool = False) -> None:
        """Check the settings against the model, before anything is computed.

        Args:
            model: the dense or the pruned model.
            sliced: the model will be sliced.

        Raises:
            ValueError: if k is larger than the vocabulary, or the hidden states of teacher and
                student cannot be compared.
        """
        if self.kind == "kd_topk" and self.settings.k > vocabulary_size(model):
            raise ValueError(
                f"distillation.k={self.settings.k} must be at most {vocabulary_size(model)}, the "
                "model's vocabulary"
            )
        if self.settings.hidden_weight > 0 and (sliced or is_sliced(model)):
            raise ValueError(
                f"distillation.hidden_weight={self.settings.hidden_weight} compares hidden states, "
                "but slicing rotates and narrows them; set it to 0"
            )

    def use_teacher(self, model: PreTrainedModel, layers: Sequence[int]) -> None:
        """Learn from a model in memory; `layers` of it match the student's layers, in order."""
        self.teacher, self.teacher_layers = LanguageHead(model), list(layers)
        self._teacher_is_separable = self.teacher.is_separable()

    def start(self, model: Any) -> None:
        """Find out whether this model's loss can be computed in chunks, on all processes."""
        self._head = LanguageHead(model)
        self._is_separable = self.chunked and self._head.is_separable()
        if self.chunked and not self._is_separable:
            log.warning(
                "chunked_loss=True has no effect: the logits of %s are not those of its head up to "
                "a scale or cap that is known; all are held at once",
                without_adapters(model).config.model_type,
            )

    def separable_head(self, model: Any) -> LanguageHead | None:
        """Return the head of a model if its loss can be computed in chunks; all must call this."""
        if self._head is not None:  # in a training, of the same model
            return self._head if self._is_separable else None
        head = LanguageHead(model)
        return head if self.chunked and head.is_separable() else None

    def finish(self) -> None:
        """Drop the teacher from memory."""
        self.teacher = self._head = None

    def facts(self, batch: Mapping[str, Tensor]) -> BatchFacts:
        """Return what the loss of a training batch must know; see batch_facts.py."""
        return facts_of(batch, None if self.cache is None else self.cache.targets(batch))

    def __call__(
        self, model: Any, batch: Mapping[str, Tensor], facts: BatchFacts | None = None
    ) -> Tensor:
        """Return the mean loss over the tokens whose label counts, a scalar in float32.

        Args:
            model: the student.
            batch: input_ids and labels, (B, T), and what else the model's forward takes.
            facts: what `facts` said of the batch before it was on its device; None asks now.
        """
        facts = self.facts(batch) if facts is None else facts
        inputs, tokens = model_inputs(batch, padded=facts.padded), facts.positions
        teacher_outputs: list[Tensor] = []
        with _collecting_outputs(
            self.teacher and self.teacher.model, self.teacher_layers, teacher_outputs
        ):
            loss = self._token_loss(inputs, facts)
        outputs: list[Tensor] = []
        layers = range(len(self.teacher_layers))
        with _collecting_outputs(without_adapters(model), layers, outputs):
            if self._is_separable and self._head is not None:
                total = self._head.loss(inputs, loss, tokens)
            else:
                total = logits_loss(model(**inputs).logits.flatten(0, 1), loss, tokens)
        if not self.teacher_layers:
            return total
        mask = batch.get("attention_mask") if facts.padded else None
        hidden = hidden_state_loss(outputs, teacher_outputs, mask)
        return total + self.settings.hidden_weight * hidden

    def _token_loss(self, inputs: dict[str, Any], facts: BatchFacts) -> TokenLoss:
        plain_loss, settings = language_loss(facts.targets), self.settings
        if self.kind == "lm":
            return plain_loss
        if self.kind == "kd":
            teacher_logits = self._run_teacher(inputs, facts.positions)
            loss = distillation_loss(teacher_logits, settings.temperature)
        else:
            assert facts.teacher is not None
            loss = top_k_loss(*facts.teacher, settings.temperature)
        return mixed_loss(loss, plain_loss, settings.lm_weight) if settings.lm_weight else loss

    @torch.no_grad()
    def _run_teacher(self, inputs: dict[str, Any], tokens: Tensor) -> Callable[[slice], Tensor]:
        """Run the teacher, and return a function: slice of `tokens` -> the teacher's logits."""
        teacher = self.teacher
        assert teacher is not None
        if not self._teacher_is_separable:
            logits = teacher.model(**inputs).logits.flatten(0, 1)
            return lambda rows: logits[tokens[rows]]
        states = teacher.hidden_states(inputs).flatten(0, 1)
        return torch.no_grad()(lambda rows: teacher.logits(states[tokens[rows]]))

    def describe(self) -> dict[str, Any]:
        """Return the loss and the settings that have an effect, for the report."""
        facts: dict[str, Any] = {"loss": self.kind}
        if self.kind != "lm":
            unused = {name for name, kind in _ONLY_FOR.items() if kind != self.kind}
            settings = {n: v for n, v in asdict(self.settings).items() if n not in unused}
            facts |= {f"distillation.{n}": v for n, v in settings.items() if v is not None}
        return facts


def check_objective(kind: str, settings: Distillation, recovery: str) -> None:
    """Check that loss, settings and recovery go together; warns of settings without effect.

    Raises:
        ValueError: if they contradict each other.
    """
    check_choice("loss", kind, LOSSES)
    if kind != "lm" and recovery == "none":
        raise ValueError(f"loss={kind} needs training, recovery=none has none; set lora or full")
    if kind == "kd_topk" and settings.hidden_weight > 0:
        raise ValueError(
            f"distillation.hidden_weight={settings.hidden_weight} needs the teacher's hidden "
            "states, which the cache of kd_topk does not hold; set loss=kd, or leave it out"
        )
    for field in fields(settings):
        needed = "kd or kd_topk" if kind == "lm" else _ONLY_FOR.get(field.name, kind)
        if needed != kind and getattr(settings, field.name) != field.default:
            log.warning("distillation.%s has no effect: it needs loss=%s", field.name, needed)


def hidden_state_loss(
    student_outputs: Sequence[Tensor], teacher_outputs: Sequence[Tensor], mask: Tensor | None
) -> Tensor:
    """Return the squared error relative to the teacher's squared norm, mean over layers and tokens.

    The error is relative, because the norm of hidden states grows by orders of magnitude over the
    layers.

    Args:
        student_outputs: outputs (B, T, D) of the student's layers.
        teacher_outputs: outputs of the matching layers of the teacher, same shapes.
        mask: (B, T), 0 on padding; None where there is no padding.

    Returns:
        Scalar in [0, inf), dimensionless, in float32.
    """
    errors = []
    for student, teacher in zip(student_outputs, teacher_outputs, strict=True):
        target = teacher.float()
        error = (student.float() - target).square().sum(-1) / target.square().sum(-1)
        errors.append(error.mean() if mask is None else _masked_mean(error, mask))
    return torch.stack(errors).mean()


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the values (B, T) where the mask is not 0; no host waits for it."""
    counted = mask.bool()
    return torch.where(counted, values, 0.0).sum() / counted.sum()


def kept_layers(plans: Sequence[Plan], num_layers: int) -> list[int]:
    """Return the dense model's layer that matches each layer of the pruned model, in order.

    A merged layer matches the highest layer of its window, whose output it replaces.

    Args:
        plans: plans that led from the dense model to the pruned one, in order.
        num_layers: number of layers of the dense model.
    """
    layers = list(range(num_layers))
    for plan in plans:
        removed = {index for step in plan.steps for index in step.removed}
        layers = [layer for index, layer in enumerate(layers) if index not in removed]
    return layers


@contextmanager
def _collecting_outputs(model: Any, layers: Sequence[int], outputs: list[Tensor]) -> Iterator[None]:
    """Append the outputs of some decoder layers to `outputs`, in the order of the layers."""
    if not layers:
        yield
        return

    def visit(index: int, _: Tensor, output: Tensor) -> None:
        if index in layers:
            outputs.append(output)

    with watching_layers(model, visit):
        yield
