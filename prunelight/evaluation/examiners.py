"""What measures one more thing of each stage of a run: tasks, probes, divergence, serving cost.

A report asks each examiner once a stage, and keeps its answer under `Stage.examined[name]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunelight.evaluation.report.plan_facts import Json
from prunelight.evaluation.report.record import Stage
from prunelight.runtime.processes import ProcessGroup


@runtime_checkable
class Examiner(Protocol):
    """Measures one thing of a model, for the columns of a report.

    Attributes:
        examines: name under which a stage keeps the answer, such as "tasks".
    """

    examines: str

    def check_examination(self, name: str, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Check the settings before anything is computed.

        Args:
            name: of the dense model, what `prunelight.load` takes.
            tokenizer: of the model, where it is loaded already.
        """

    def describe_examination(self) -> Json:
        """Return the settings that the answer depends on; a change of them measures again."""

    def examine(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        earlier: Sequence[Stage],
        group: ProcessGroup,
    ) -> Any:
        """Return what is found of a model, as JSON values.

        Args:
            model: in the state that is measured.
            tokenizer: of the model.
            earlier: stages measured before; the first is the dense model. Empty for the dense one.
            group: the processes that measure together; of one where rank 0 measures alone.
        """


def examiners_among(callbacks: Sequence[Any]) -> list[Examiner]:
    """Return the callbacks that are examiners, in their order."""
    return [callback for callback in callbacks if isinstance(callback, Examiner)]
