"""SliceGPT: keep the first principal components of the hidden states (arXiv:2401.15024).

As many in every layer; DynamicSlicing gives each layer its own number. What the released code gets
wrong, and where the embeddings of tied models go, is in prunelight/slicing.py and README.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch import Trainer
from transformers import PreTrainedModel

from prunelight.allocation import uniform_width
from prunelight.calibration import Windows
from prunelight.callbacks.base import PruningCallback, pruning_callbacks
from prunelight.choices import check_choice
from prunelight.handover import plan_files
from prunelight.metrics import parameter_count
from prunelight.module import RecoveryModule
from prunelight.plan import Plan
from prunelight.rotation import allowed_widths, check_shareable, shared_parameters
from prunelight.slicing import check_sliceable, check_tokens, sliced_parameters
from prunelight.steps import SLICE_OPTIONS, SliceHidden, Sparsify

log = logging.getLogger(__name__)

EMBEDDINGS = ("auto", "full", "sliced")


class SlicingCallback(PruningCallback):
    """What SliceGPT and DynamicSlicing share: what may come before them, and what after."""

    slices = True
    rotation: str = "per_layer"
    round_to: int

    def widths(self, model: PreTrainedModel) -> dict[str, int]:
        """Return what all widths are multiples of."""
        return {"round_to": self.round_to}

    def check_run(self, trainer: Trainer, module: RecoveryModule) -> None:
        """Check that no pruning comes before a slicing, or after it, that does not work there.

        Raises:
            ValueError: if zeros or dropped sublayers come before, or what cannot prune a sliced
                model after; names it.
        """
        callbacks, own = pruning_callbacks(trainer), type(self).__name__
        at = callbacks.index(self)
        for other in callbacks[:at]:
            name = type(other).__name__
            if hasattr(other, "sparsity"):
                raise ValueError(
                    f"{name} comes before {own}, whose rotations fill its zeros; slice first"
                )
            if getattr(other, "granularity", "layer") in ("attention", "mlp", "sublayer"):
                raise ValueError(
                    f"{name} drops sublayers before {own}, which cannot slice what is left; drop "
                    "whole layers (granularity='layer')"
                )
        for other in callbacks[at + 1 :] if self.rotation == "per_layer" else ():
            if not other.follows_slicing:
                raise ValueError(
                    f"{type(other).__name__} comes after {own}, and cannot prune a sliced model; "
                    "put it before"
                )
        for file in plan_files(Path(module.name).expanduser()):
            if any(isinstance(step, Sparsify) for step in Plan.load(file).steps):
                raise ValueError(
                    f"{file} put zeros into {module.name}, which the rotations of {own} would "
                    "fill; slice the dense model first"
                )


class SliceGPT(SlicingCallback):
    """Slice the hidden states of every decoder layer to the same width.

    Args:
        slice_ratio: share of the hidden width to remove, in [0, 1). Shortcuts add parameters, so
            that small ratios make a model larger; the report gives the true change.
        parameter_ratio: share of all parameters to remove, instead; the widest that does it.
        round_to: what the width must be a multiple of: 8 for fast kernels, 64 for 4 bits.
        embedding: "full" leaves the embeddings as they are, "sliced" cuts them, which unties the
            head (SliceGPT); "auto" is full for tied models, sliced for others.
        signal: components of the "residual" (released code) or of the "normalized" one (Eq. 8);
            "auto" is the better one measured: normalized for a shared rotation, else residual.
        orientation: "pca", or "random", which spreads the energy for quantization.
        rotation: "per_layer", or "shared": one for the whole model, which leaves a stock class for
            other tools to load; embeddings and head are sliced and untied then.
        seed: of the random orientation.
        export_remote_code: put the code of the sliced class beside the result, which then loads
            without prunelight under trust_remote_code.
        offload_activations: keep the calibration states on the CPU.

    Raises:
        ValueError: if an argument is out of its range or has no effect.
    """

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

    def check(self, model: PreTrainedModel) -> None:
        """Check that the model can be sliced so far.

        Raises:
            ValueError: if nothing would be left, or the parameters cannot be met.
            TypeError: if the family cannot be sliced, or weights are quantized.
        """
        (check_shareable if self.rotation == "shared" else check_sliceable)(model)
        self._width(model)

    def widths(self, model: PreTrainedModel) -> dict[str, int]:
        """Return the widths that are left."""
        dims = self._dims(model, self._width(model))
        return {f"residual_dims[{i}]": width for i, width in enumerate(dims)}

    def check_calibration(self, model: PreTrainedModel, windows: Windows) -> None:
        """Check the windows.

        Raises:
            ValueError: if the model cannot read them, or they hold too few tokens.
        """
        super().check_calibration(model, windows)
        whole = self.rotation == "shared"
        check_tokens(model, windows, None if whole else self._dims(model, self._width(model))[0])

    @torch.no_grad()
    def plan(self, model: PreTrainedModel, windows: Windows) -> Plan:
        """Choose the widths; the model is unchanged, and its rotations are found when applied.

        Raises:
            ValueError: if the arguments or the windows do not fit the model.
            TypeError: if the family cannot be sliced.
        """
        self.check(model)
        self.check_calibration(model, windows)
        width = self._width(model)
        dims = self._dims(model, width)
        better = "normalized" if self.rotation == "shared" else "residual"
        signal = better if self.signal == "auto" else self.signal
        step = SliceHidden(dims, signal, self.orientation, self.rotation, self.seed)
        ratio, asked = 1 - width / model.config.hidden_size, self.slice_ratio
        if asked is not None and abs(ratio - asked) > self.round_to / model.config.hidden_size:
            log.warning(
                "slice_ratio=%s became %.4g: %s accepts hidden_size=%d, not what is between",
                *(asked, ratio, type(model.config).__name__, width),
            )
        found = {
            "slice_ratio": ratio,
            **told_parameters(model, self._parameters(model, width), asked),
        }
        return self.decided(model, windows, step, scores={}, found=found)

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
        """Return the width that is left.

        Raises:
            ValueError: if nothing would be left, or the parameters cannot be met.
        """
        hidden = model.config.hidden_size
        if self.slice_ratio is not None:
            width = uniform_width(self.slice_ratio, hidden, self.round_to)
            if self.rotation == "per_layer":
                return width
            known = [w for w in allowed_widths(model, self.round_to) if w <= width]
            if not known:
                raise ValueError(
                    f"slice_ratio={self.slice_ratio} with round_to={self.round_to}: "
                    f"{type(model.config).__name__} accepts no hidden_size of at most {width}; "
                    "lower one of them"
                )
            return known[-1]
        if self.rotation == "shared":
            widths = allowed_widths(model, self.round_to)[::-1]
        else:
            widths = [w for w in range(hidden, 0, -1) if w % self.round_to == 0]
        return meet_parameters(
            model, self.parameter_ratio, widths, lambda width: self._parameters(model, width)
        )


def check_slice_target(
    slice_ratio: float | None, parameter_ratio: float | None, round_to: int
) -> None:
    """Check how much shall be sliced, before any model is at hand.

    Raises:
        ValueError: unless exactly one ratio in [0, 1) is given.
    """
    if (slice_ratio is None) == (parameter_ratio is None):
        raise ValueError(
            f"slice_ratio={slice_ratio} and parameter_ratio={parameter_ratio}: give exactly one "
            "(share of the hidden width, or of all parameters)"
        )
    for name, ratio in (("slice_ratio", slice_ratio), ("parameter_ratio", parameter_ratio)):
        if ratio is not None and not 0 <= ratio < 1:
            raise ValueError(f"{name}={ratio} must lie in [0, 1); 0.25 removes a quarter")
    if round_to < 1:
        raise ValueError(f"round_to={round_to} must be at least 1")


def check_slice_options(**options: str) -> None:
    """Check options by name.

    Raises:
        ValueError: if one has an unknown value.
    """
    for name, value in options.items():
        check_choice(name, value, {"embedding": EMBEDDINGS, **SLICE_OPTIONS}[name])


def residual_dims(model: PreTrainedModel, widths: Sequence[int], embedding: str) -> tuple[int, ...]:
    """Return the 2 L + 1 widths: each layer's own before attention and MLP, the last site whole."""
    full = model.config.tie_word_embeddings if embedding == "auto" else embedding == "full"
    hidden = model.config.hidden_size
    dims = [width for width in widths for _ in range(2)] + [hidden]
    return (hidden if full else dims[0], *dims[1:])


Candidate = TypeVar("Candidate")


def meet_parameters(
    model: PreTrainedModel,
    ratio: float | None,
    candidates: Sequence[Candidate],
    count: Callable[[Candidate], int],
) -> Candidate:
    """Return the first candidate that removes a share of all parameters, by bisection.

    Args:
        model: the dense one.
        ratio: the share.
        candidates: from the widest to the narrowest, with ever fewer parameters.
        count: how many parameters a candidate has.

    Raises:
        ValueError: if none does.
    """
    assert ratio is not None
    dense, goal = parameter_count(model), (1 - ratio) * parameter_count(model)
    first = bisect_left(candidates, True, key=lambda candidate: count(candidate) <= goal)
    if first < len(candidates):
        return candidates[first]
    least = count(candidates[-1]) if candidates else dense
    raise ValueError(
        f"parameter_ratio={ratio} cannot be met by slicing: embeddings and shortcuts leave at "
        f"least {least / 1e6:.1f}M of {dense / 1e6:.1f}M parameters; lower it"
    )


def told_parameters(
    model: PreTrainedModel, parameters: int, slice_ratio: float | None
) -> dict[str, Any]:
    """Return the true parameters, shortcuts and head included; warn if they became more."""
    dense = parameter_count(model)
    if slice_ratio and parameters >= dense:
        log.warning(
            "slice_ratio=%s makes the model larger (%.1fM -> %.1fM parameters): shortcuts and an "
            "untied head add more than it removes; raise it, or ask by parameter_ratio",
            slice_ratio,
            dense / 1e6,
            parameters / 1e6,
        )
    return {"parameters": parameters, "parameters_before": dense}
