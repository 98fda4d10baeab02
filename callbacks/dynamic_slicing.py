"""DynamicSlicing: slice each decoder layer by its redundancy, with SliceGPT's rotations.

Layer Redundancy v is 1 - Block Influence, rescaled to [0, 1]. A layer loses the share
v (mean - base) / mean(v) + base of its width (arXiv:2411.03513). The released code scores the last
layer after the final norm, neither clips nor rounds, and picks the base on the evaluation data.
Here calibration windows that the rotations did not see pick the base.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from prunelight.calibration.windows import Windows, first_windows, split_windows
from prunelight.callbacks.slicegpt import SlicingCallback
from prunelight.planning.plan import Plan
from prunelight.planning.slice_widths import redundancies, slicing_ratios, slicing_widths
from prunelight.planning.sparsity_shares import clipping_excess
from prunelight.planning.steps import SliceHidden
from prunelight.pruning.slicing.slice_hidden import check_sliceable, check_tokens
from prunelight.pruning.slicing.targets import (
    check_slice_options,
    check_slice_target,
    meet_parameters,
    report_parameters,
    residual_dims,
    sliced_parameters,
)
from prunelight.pruning.slicing.trial import sliced_perplexity
from prunelight.runtime.arguments import SEED, at_least, checked, within
from prunelight.runtime.finite import check_weights
from prunelight.scoring.block_influence import block_influences

log = logging.getLogger(__name__)

FRACTIONS = (1.0, 0.75, 0.5, 0.25, 0.0)  # bases that a sweep tries, as parts of the mean ratio

_HELD_OUT = 4  # a sweep compares bases on one window in four


class DynamicSlicing(SlicingCallback):
    """Slice the hidden states of each decoder layer to a width of its own.

    Args:
        slice_ratio: share of the hidden width to remove, mean over the layers, in [0, 1).
        base_ratio: share that a layer without redundancy loses, in [0, slice_ratio]; base_ratio
            equal to slice_ratio is SliceGPT. Of a list, the value with the lowest perplexity on a
            quarter of the calibration windows is taken; each value costs one slicing. None tries
            1, 3/4, 1/2, 1/4 and 0 times slice_ratio.
        parameter_ratio: share of all parameters to remove, instead of `slice_ratio`.
        round_to: what widths must be multiples of: 8 for fast kernels, 64 for 4 bits.
        embedding: "full", "sliced" or "auto", as in SliceGPT.
        signal: signal whose components are kept, "residual" or "normalized", as in SliceGPT.
        orientation: "pca" or "random", as in SliceGPT.
        seed: of the random orientation.
        export_remote_code: put the code of the sliced class beside the result, which then loads
            without prunelight under trust_remote_code.
        offload_activations: keep the calibration states on the CPU.

    Raises:
        ValueError: if an argument is out of its range.
    """

    @checked(
        slice_ratio=within(0, 1), parameter_ratio=within(0, 1), round_to=at_least(1), seed=SEED
    )
    def __init__(
        self,
        slice_ratio: float | None = None,
        base_ratio: float | list[float] | None = None,
        parameter_ratio: float | None = None,
        round_to: int = 8,
        embedding: Literal["auto", "full", "sliced"] = "auto",
        signal: Literal["residual", "normalized"] = "residual",
        orientation: Literal["pca", "random"] = "pca",
        seed: int = 0,
        export_remote_code: bool = False,
        offload_activations: bool = False,
    ) -> None:
        check_slice_target(slice_ratio, parameter_ratio, round_to)
        check_slice_options(embedding=embedding, signal=signal, orientation=orientation)
        bases = base_ratio if isinstance(base_ratio, list) else [base_ratio]
        if not bases:
            raise ValueError("base_ratio=[] names no ratio to try; give some, or leave it out")
        for base in bases:
            if base is None or 0 <= base <= (1 if slice_ratio is None else slice_ratio):
                continue
            rule = "[0, 1]" if slice_ratio is None else f"[0, slice_ratio={slice_ratio}]"
            raise ValueError(
                f"base_ratio={base} must lie in {rule}: no layer loses less than the base, so that "
                "their mean cannot lie below it"
            )
        self.slice_ratio, self.base_ratio = slice_ratio, base_ratio
        self.parameter_ratio, self.round_to = parameter_ratio, round_to
        self.embedding, self.signal, self.orientation = embedding, signal, orientation
        self.seed = seed
        self.export_remote_code, self.offload_activations = export_remote_code, offload_activations

    def check(self, model: PreTrainedModel) -> None:
        """Check that the model can be sliced to the widths that the arguments ask for.

        Raises:
            ValueError: if nothing would be left, or the parameters cannot be met.
            TypeError: if the family cannot be sliced, or weights are quantized.
        """
        check_sliceable(model)
        even = [1.0] * model.config.num_hidden_layers
        self._dims(model, even, 1.0)

    def check_calibration(self, model: PreTrainedModel, windows: Windows) -> None:
        """Check the windows.

        Raises:
            ValueError: if the model cannot read the windows, or they hold too few tokens without
                those that are held out to choose among several bases.
        """
        super().check_calibration(model, windows)
        held_out, total = self._num_held_out(windows), len(split_windows(windows)[0])
        try:
            check_tokens(model, first_windows(windows, total - held_out))
        except ValueError as error:
            if not held_out:
                raise
            raise ValueError(f"{error}; {held_out} of {total} windows choose the base") from error

    @torch.no_grad()
    def plan(self, model: PreTrainedModel, windows: Windows) -> Plan:
        """Score the layers and choose their widths; the model is unchanged.

        Raises:
            ValueError: if the arguments or the windows do not fit the model, a base lies above the
                ratio that the parameters need, or states are NaN or Inf.
            TypeError: if the family cannot be sliced.
        """
        check_weights(model)
        self.check(model)
        self.check_calibration(model, windows)
        influence = block_influences(model, windows).mean
        redundancy = redundancies(influence)
        candidates: dict[float, SliceHidden] = {}  # base -> step
        for fraction_or_base in self._bases():
            dims, base = self._dims(model, redundancy, *fraction_or_base)
            self._warn_if_clipped(redundancy, mean_ratio(model, dims), base)
            check_tokens(model, windows, dims[0])
            step = SliceHidden(dims, self.signal, self.orientation, seed=self.seed)
            if step not in candidates.values():  # two bases may lead to the same widths
                candidates[base] = step
        best, perplexities = next(iter(candidates)), {}
        if len(candidates) > 1:
            perplexities = self._sweep(model, windows, candidates)
            best = min(perplexities, key=lambda base: (perplexities[base], -base))
            log.info("base_ratio=%.4g has the lowest of %s", best, perplexities)
        dims = candidates[best].residual_dims
        facts: dict[str, Any] = {"slice_ratio": mean_ratio(model, dims), "base_ratio": best}
        if perplexities:
            facts["perplexity_of_base_ratio"] = {f"{b:.4g}": x for b, x in perplexities.items()}
        facts |= report_parameters(model, sliced_parameters(model, dims), self.slice_ratio)
        scores = {"layer_redundancy": redundancy, "block_influence": influence}
        return self.make_plan(model, windows, candidates[best], scores=scores, found=facts)

    def _bases(self) -> list[tuple[float | None, float | None]]:
        """Return the bases to try: (fraction of the mean ratio, None) or (None, base)."""
        if self.base_ratio is None:
            return [(fraction, None) for fraction in FRACTIONS]
        bases = self.base_ratio if isinstance(self.base_ratio, list) else [self.base_ratio]
        return [(None, base) for base in bases]

    def _num_held_out(self, windows: Windows) -> int:
        """Return how many windows choose the base.

        Raises:
            ValueError: if there are several bases, but only one window.
        """
        bases, total = len(self._bases()), len(split_windows(windows)[0])
        if bases == 1:
            return 0
        if total < 2:
            raise ValueError(
                f"{total} calibration window cannot choose among {bases} bases, which takes two or "
                "more; give base_ratio, or more windows"
            )
        return max(1, total // _HELD_OUT)

    def _dims(
        self,
        model: PreTrainedModel,
        redundancy: list[float],
        fraction: float | None,
        base: float | None = None,
    ) -> tuple[tuple[int, ...], float]:
        """Return the widths for a base, or for a fraction of the mean ratio, and the base itself.

        Raises:
            ValueError: if nothing would be left, or the parameters cannot be met.
        """
        hidden, layers = model.config.hidden_size, len(redundancy)

        def widths(mean: float) -> tuple[tuple[int, ...], float]:
            used_base = min(mean, mean * fraction if fraction is not None else base or 0.0)
            ratios = slicing_ratios(redundancy, mean, used_base)
            layer_widths = slicing_widths(ratios, hidden, self.round_to)
            return residual_dims(model, layer_widths, self.embedding), used_base

        if self.slice_ratio is not None:
            return widths(self.slice_ratio)
        unit = self.round_to / (hidden * layers)
        mean = meet_parameters(
            model,
            self.parameter_ratio,
            [n * unit for n in range(hidden * layers // self.round_to - layers + 1)],
            lambda mean: sliced_parameters(model, widths(mean)[0]),
        )
        if base is not None and base > mean:
            raise ValueError(
                f"base_ratio={base} must be at most {mean:.4g}, the mean ratio that "
                f"parameter_ratio={self.parameter_ratio} needs; lower it, or leave it out"
            )
        return widths(mean)

    def _warn_if_clipped(self, redundancy: list[float], mean: float, base: float) -> None:
        """Warn if the most redundant layer would lose more than its whole width."""
        most = max(redundancy) * (mean - base) / fmean(redundancy) + base
        if clipping_excess([most], mean):
            log.warning(
                "base_ratio=%.4g lets a layer lose %.3g of its width at a mean of %.4g: clipped, "
                "and the others lose more",
                *(base, most, mean),
            )

    def _sweep(
        self, model: PreTrainedModel, windows: Windows, candidates: dict[float, SliceHidden]
    ) -> dict[float, float]:
        """Return base -> perplexity on windows that the rotations do not see."""
        perplexity = partial(
            sliced_perplexity,
            model,
            windows,
            held_out=self._num_held_out(windows),
            device=self.device,
            offload=self.offload_activations,
        )
        return {base: perplexity(step) for base, step in candidates.items()}


def mean_ratio(model: PreTrainedModel, dims: Sequence[int]) -> float:
    """Return the mean share of the width that layers lose, measured at the input of each MLP."""
    return 1 - fmean(dims[1::2]) / model.config.hidden_size
