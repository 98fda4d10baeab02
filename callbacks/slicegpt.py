"""SliceGPT: keep the first principal components of the hidden states (arXiv:2401.15024).

Every layer keeps the same number of components; DynamicSlicing gives each layer its own number.
prunelight/pruning/slicing/slice_hidden.py says where we differ from the released code.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from prunelight.calibration.windows import Windows
from prunelight.callbacks.base import Healing, PruningCallback
from prunelight.planning.plan import Plan
from prunelight.planning.slice_widths import uniform_width
from prunelight.planning.steps import SliceHidden, Sparsify
from prunelight.pruning.slicing.shared_rotation import check_shareable, shared_parameters
from prunelight.pruning.slicing.slice_hidden import check_sliceable, check_tokens
from prunelight.pruning.slicing.targets import (
    allowed_widths,
    check_slice_options,
    check_slice_target,
    meet_parameters,
    report_parameters,
    residual_dims,
    sliced_parameters,
)
from prunelight.recovery.zeros.planned_zeros import PlannedZeros
from prunelight.run.method import PruningMethod
from prunelight.run.run_state import Run, plans_beside
from prunelight.runtime.arguments import SEED, at_least, checked, within
from prunelight.runtime.finite import check_weights

log = logging.getLogger(__name__)


class SlicingCallback(PruningCallback):
    """Base of SliceGPT and DynamicSlicing: checks which methods may come before and after them."""

    slices = True
    rotation: str = "per_layer"
    round_to: int

    def widths(self, model: PreTrainedModel) -> dict[str, int]:
        """Return the number that all widths are multiples of."""
        return {"round_to": self.round_to}

    def check_run(self, run: Run, methods: Sequence[PruningMethod]) -> None:
        """Check that the methods before and after this slicing can be combined with it.

        Raises:
            ValueError: if an earlier method puts zeros or drops sublayers, a later method cannot
                prune a sliced model, or the model has planned zeros; names the method or file.
        """
        position, slicing = methods.index(self), type(self).__name__
        for other in methods[:position]:
            name = type(other).__name__
            if other.puts_zeros:
                raise ValueError(
                    f"{name} comes before {slicing}, whose rotations fill its zeros; slice first"
                )
            if other.drops_sublayers:
                raise ValueError(
                    f"{name} drops sublayers, or puts matrices at gaps, before {slicing}, which "
                    "cannot slice what is left; drop whole layers (granularity='layer'), and heal "
                    "by 'linear'"
                )
        for other in methods[position + 1 :] if self.rotation == "per_layer" else ():
            if not other.follows_slicing:
                raise ValueError(
                    f"{type(other).__name__} comes after {slicing}, and cannot prune a sliced "
                    "model; put it before"
                )
        for plan in plans_beside(Path(run.name).expanduser()):
            if any(isinstance(step, Sparsify) for step in plan.steps):
                raise ValueError(
                    f"{plan.method} put zeros into {run.name}, which the rotations of {slicing} "
                    "would fill; slice the dense model first"
                )


class SliceGPT(SlicingCallback):
    """Slice the hidden states of every decoder layer to the same width.

    Args:
        slice_ratio: share of the hidden width to remove, in [0, 1). Shortcuts add parameters, so
            that small ratios make a model larger; the report gives the true change.
        parameter_ratio: share of all parameters to remove, instead of slice_ratio; the largest
            width that removes so much is taken.
        round_to: what the width must be a multiple of: 8 for fast kernels, 64 for 4 bits.
        embedding: "full" leaves the embeddings as they are, "sliced" slices them, which unties the
            head (SliceGPT); "auto" is full for tied models, sliced for others.
        signal: signal whose components are kept: the "residual" (released code), or the
            "normalized" signal (Eq. 8); "auto" takes the one that measured better: normalized for
            a shared rotation, else residual.
        orientation: "pca", or "random", which spreads the energy for quantization.
        rotation: "per_layer", or "shared" for one rotation of the whole model. A shared rotation
            leaves a stock class for other tools to load; embeddings and head are sliced and untied.
        seed: of the random orientation.
        export_remote_code: put the code of the sliced class beside the result, which then loads
            without prunelight under trust_remote_code.
        offload_activations: keep the calibration states on the CPU.
        heal: "linear" then fits weights anew, in closed form, to the dense model's hidden states;
            "layer" trains whole layers to them too, one at a time. See docs/healing.md. Both need 2
            calibration windows or more.

    Raises:
        ValueError: if an argument is out of its range or has no effect.
    """

    @checked(
        slice_ratio=within(0, 1), parameter_ratio=within(0, 1), round_to=at_least(1), seed=SEED
    )
    def __init__(
        self,
        slice_ratio: float | None = None,
        parameter_ratio: float | None = None,
        round_to: int = 8,
        embedding: Literal["auto", "full", "sliced"] = "auto",
        signal: Literal["auto", "residual", "normalized"] = "auto",
        orientation: Literal["pca", "random"] = "pca",
        rotation: Literal["per_layer", "shared"] = "per_layer",
        seed: int = 0,
        export_remote_code: bool = False,
        offload_activations: bool = False,
        heal: Healing = "none",
    ) -> None:
        check_slice_target(slice_ratio, parameter_ratio, round_to)
        if signal != "auto":
            check_slice_options(signal=signal)
        check_slice_options(embedding=embedding, orientation=orientation, rotation=rotation)
        if rotation == "shared" and embedding == "full":
            raise ValueError(
                "embedding='full' has no effect with rotation='shared', which slices the "
                "embeddings too; leave one of them out"
            )
        if rotation == "shared" and export_remote_code:
            raise ValueError(
                "export_remote_code=True has no effect with rotation='shared', which leaves a "
                "stock class; leave it out"
            )
        self.slice_ratio, self.parameter_ratio = slice_ratio, parameter_ratio
        self.round_to = round_to
        self.embedding, self.signal, self.orientation = embedding, signal, orientation
        self.rotation, self.seed = rotation, seed
        self.export_remote_code, self.offload_activations = export_remote_code, offload_activations
        self.heal = heal

    def check(self, model: PreTrainedModel) -> None:
        """Check that the model can be sliced to the width that the arguments ask for.

        Raises:
            ValueError: if nothing would be left, or the parameters cannot be met.
            TypeError: if the family cannot be sliced, or weights are quantized.
        """
        (check_shareable if self.rotation == "shared" else check_sliceable)(model)
        self._width(model)
        if PlannedZeros.find(model, ()).planned:
            log.warning(
                "%s fills the zeros of the model's matrices; slice the dense model first",
                type(self).__name__,
            )

    def widths(self, model: PreTrainedModel) -> dict[str, int]:
        """Return the widths after slicing."""
        dims = self._dims(model, self._width(model))
        return {f"residual_dims[{i}]": width for i, width in enumerate(dims)}

    def check_calibration(self, model: PreTrainedModel, windows: Windows) -> None:
        """Check the windows.

        Raises:
            ValueError: if the model cannot read them, or they hold too few tokens.
        """
        super().check_calibration(model, windows)
        shared = self.rotation == "shared"
        check_tokens(model, windows, None if shared else self._dims(model, self._width(model))[0])

    @torch.no_grad()
    def plan(self, model: PreTrainedModel, windows: Windows) -> Plan:
        """Choose the widths; the model is unchanged, and `apply` computes the rotations.

        Raises:
            ValueError: if the arguments or the windows do not fit the model.
            TypeError: if the family cannot be sliced.
        """
        check_weights(model)
        self.check(model)
        self.check_calibration(model, windows)
        width = self._width(model)
        dims = self._dims(model, width)
        default_signal = "normalized" if self.rotation == "shared" else "residual"
        signal = default_signal if self.signal == "auto" else self.signal
        step = SliceHidden(dims, signal, self.orientation, self.rotation, self.seed)
        ratio, asked = 1 - width / model.config.hidden_size, self.slice_ratio
        if asked is not None and abs(ratio - asked) > self.round_to / model.config.hidden_size:
            log.warning(
                "slice_ratio=%s became %.4g: %s accepts hidden_size=%d, not what is between",
                *(asked, ratio, type(model.config).__name__, width),
            )
        parameters = report_parameters(model, self._parameters(model, width), asked)
        facts = {"slice_ratio": ratio, **parameters}
        return self.make_plan(model, windows, step, scores={}, found=facts)

    def _dims(self, model: PreTrainedModel, width: int) -> tuple[int, ...]:
        layers = model.config.num_hidden_layers
        if self.rotation == "shared":
            return (width,) * (2 * layers + 1)
        return residual_dims(model, [width] * layers, self.embedding)

    def _parameters(self, model: PreTrainedModel, width: int) -> int:
        if self.rotation == "shared":
            return shared_parameters(model, width)
        return sliced_parameters(model, self._dims(model, width))

    def _width(self, model: PreTrainedModel) -> int:
        """Return the width after slicing.

        Raises:
            ValueError: if nothing would be left, or the parameters cannot be met.
        """
        hidden = model.config.hidden_size
        if self.slice_ratio is not None:
            width = uniform_width(self.slice_ratio, hidden, self.round_to)
            if self.rotation == "per_layer":
                return width
            allowed = [w for w in allowed_widths(model, self.round_to) if w <= width]
            if not allowed:
                raise ValueError(
                    f"slice_ratio={self.slice_ratio} with round_to={self.round_to}: "
                    f"{type(model.config).__name__} accepts no hidden_size of at most {width}; "
                    "lower one of them"
                )
            return allowed[-1]
        if self.rotation == "shared":
            widths = allowed_widths(model, self.round_to)[::-1]
        else:
            widths = [w for w in range(hidden, 0, -1) if w % self.round_to == 0]
        return meet_parameters(
            model, self.parameter_ratio, widths, lambda width: self._parameters(model, width)
        )
