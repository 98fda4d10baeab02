"""Quality of each stage of a run on held-out texts beside the first, which the run watches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunelight.calibration.shared_windows import share_windows
from prunelight.calibration.windows import Windows, split_windows
from prunelight.evaluation.perplexity import evaluate
from prunelight.evaluation.report.plan_facts import Json
from prunelight.evaluation.report.record import Stage
from prunelight.planning.fingerprints import describe_windows
from prunelight.runtime.processes import ProcessGroup


class TextsExaminer:
    """Measures perplexity and next-token accuracy of each stage on further texts.

    Args:
        windows: returns the windows of each text by its name.
        protocols: returns how the windows of a text were made, by its name, where that is known.

    Attributes:
        examines: the name of the answer in a stage.
    """

    examines = "texts"

    def __init__(
        self,
        windows: Callable[[], Mapping[str, Windows]],
        protocols: Callable[[], Mapping[str, str]],
    ) -> None:
        self.windows, self.protocols = windows, protocols

    def check_examination(self, name: str, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Check nothing: the windows are checked with those of the first text."""

    def describe_examination(self) -> Json:
        """Return the windows of each text, and how they were made."""
        protocols = self.protocols()
        return {
            name: describe_windows(*split_windows(windows)) | {"protocol": protocols.get(name, "")}
            for name, windows in self.windows().items()
        }

    def examine(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        earlier: Sequence[Stage],
        group: ProcessGroup,
    ) -> Json:
        """Return perplexity, accuracy, predicted tokens and protocol of each text, by its name."""
        protocols = self.protocols()
        return {
            name: asdict(evaluate(model, share_windows(windows, group)))
            | {"protocol": protocols.get(name, "")}
            for name, windows in self.windows().items()
        }
