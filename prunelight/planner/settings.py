"""The calibration windows of a plan that is made, or carried out, without a run.

Names and defaults are those of `data` in a fit, so that both give the same windows.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunelight.calibration.self_written import is_self_written
from prunelight.calibration.windows import Windows, check_windows
from prunelight.comparison.settings import check_sources
from prunelight.data.token_windows import Bos
from prunelight.models.placement import move_if_it_fits
from prunelight.runtime.arguments import NOT_EMPTY, SEED, at_least, check_fields
from prunelight.training.text_datamodule import TextDataModule


@dataclass(frozen=True)
class CalibrationSettings:
    """What methods look at.

    Attributes:
        calibration: source or sources of the windows that pruning looks at, or self, as of
            `prunelight.training.text_datamodule.TextDataModule`.
        seq_len: tokens of a window.
        num_calibration: windows drawn, by the seed.
        text_field: the field of a row that holds its text.
        bos: auto, always or never: whether each window starts with the BOS token.
        seed: draws the windows.
    """

    calibration: str | list[str] = "sample:calibration"
    seq_len: int = 512
    num_calibration: int = 32
    text_field: str = "text"
    bos: Bos = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(
            self,
            "data.",
            calibration=NOT_EMPTY,
            seq_len=at_least(2),
            num_calibration=at_least(1),
            text_field=NOT_EMPTY,
            seed=SEED,
        )
        check_sources(self.calibration)

    @property
    def self_written(self) -> bool:
        """Whether the dense model writes the windows."""
        return is_self_written(self.calibration)

    def windows(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        place: torch.device,
        *,
        offload: bool = False,
    ) -> Windows:
        """Return the windows, as a fit draws them.

        Args:
            model: the dense model. If it writes the windows, it is moved where it computes.
            tokenizer: of the model.
            place: where the model will compute.
            offload: with one layer there at a time.

        Raises:
            ValueError: if there is too little text, the model cannot read the windows, or it is to
                write them with one layer on the device at a time.
        """
        module = TextDataModule(tokenizer, **asdict(self))
        writer = move_if_it_fits(model, place, offload=offload) if self.self_written else None
        windows = module.calibration_windows(writer)
        check_windows(model, windows)
        return windows
