"""DynamicSlicing: slice each decoder layer by its redundancy, with SliceGPT's rotations.

Layer Redundancy v is 1 - Block Influence, rescaled to [0, 1]. A layer loses the share
v (mean - base) / mean(v) + base of its width (arXiv:2411.03513). The released code scores the last
layer after the final norm, neither clips nor rounds, and picks the base on the evaluation data.
Here calibration windows that the rotations did not see pick the base. Layers may also be scored on
a text of their own, by cutting each of them alone, or be given their shares by hand.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any, Literal, TypeVar

import torch
from transformers import PreTrainedModel

from prunelight.calibration.shared_windows import group_of, share_windows
from prunelight.calibration.windows import Windows, check_windows, first_windows, split_windows
from prunelight.callbacks.base import Healing
from prunelight.callbacks.slicegpt import SlicingCallback
from prunelight.models.families.layers import decoder_layers
from prunelight.planning.fingerprints import describe_windows
from prunelight.planning.plan import Plan
from prunelight.planning.slice_widths import (
    redundancies,
    slicing_ratios,
    slicing_widths,
    uniform_width,
)
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
from prunelight.runtime.arguments import NOT_EMPTY, SEED, at_least, check_choice, checked, within
from prunelight.runtime.finite import check_weights
from prunelight.scoring.block_influence import block_influences
from prunelight.training.score_text import file_digests, windows_of_text

log = logging.getLogger(__name__)

Key = TypeVar("Key")

SCORES = ("block_influence", "single_cut")

FRACTIONS = (1.0, 0.75, 0.5, 0.25, 0.0)  # bases that a sweep tries, as parts of the mean ratio

_HELD_OUT = 4  # a sweep compares bases on one window in four, and single cuts too


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
        seed: of the random orientation, and of the windows of redundancy_text.
        export_remote_code: put the code of the sliced class beside the result, which then loads
            without prunelight under trust_remote_code.
        offload_activations: keep the calibration states on the CPU.
        slice_ratios: share of the hidden width that each layer loses, by hand: one in [0, 1) for
            each layer, instead of slice_ratio (the cut vector of the released code). A width is
            rounded down to a multiple of round_to, as in SliceGPT. Nothing is scored.
        redundancy_text: text on which layers are scored, apart from that of the rotations: a
            source or sources as in `data.calibration`, such as alpaca. As many windows, as long as
            those of the calibration, are drawn from it. None scores on the calibration windows.
        score: what makes a layer redundant: a low "block_influence" (the paper), or "single_cut":
            a low perplexity where this layer alone is cut, by slice_ratio or parameter_ratio of
            its width. The latter is the paper's experiment with single layers; it costs one slicing
            for each layer, and a quarter of the calibration windows judges.
        heal: "linear" then fits weights anew, in closed form, to the dense model's hidden states;
            "layer" trains whole layers to them too, one at a time. See docs/healing.md. Both need 2
            calibration windows or more.

    Raises:
        ValueError: if an argument is out of its range or has no effect.
    """

    @checked(
        slice_ratio=within(0, 1),
        parameter_ratio=within(0, 1),
        round_to=at_least(1),
        seed=SEED,
        slice_ratios=NOT_EMPTY,
        redundancy_text=NOT_EMPTY,
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
        slice_ratios: list[float] | None = None,
        redundancy_text: str | list[str] | None = None,
        score: Literal["block_influence", "single_cut"] = "block_influence",
        heal: Healing = "none",
    ) -> None:
        if slice_ratios is None:
            check_slice_target(slice_ratio, parameter_ratio, round_to)
        else:
            others = {
                "slice_ratio": slice_ratio,
                "parameter_ratio": parameter_ratio,
                "base_ratio": base_ratio,
                "redundancy_text": redundancy_text,
                "score": None if score == "block_influence" else score,
            }
            _check_by_hand(slice_ratios, others)
        check_choice("score", score, SCORES)
        if score == "single_cut" and redundancy_text is not None:
            raise ValueError(
                f"redundancy_text={redundancy_text!r} has no effect with score='single_cut', which "
                "judges on calibration windows; leave one of them out"
            )
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
        self.slice_ratios = None if slice_ratios is None else list(slice_ratios)
        self.redundancy_text, self.score, self.heal = redundancy_text, score, heal
        self._text_windows: dict[str, Windows] = {}  # what was read of redundancy_text

    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments that matter, and what local files they name hold."""
        digests = file_digests(self.redundancy_text)
        return super().arguments() | ({"redundancy_files": digests} if digests else {})

    def check(self, model: PreTrainedModel) -> None:
        """Check that the model can be sliced to the widths that the arguments ask for.

        Raises:
            ValueError: if nothing would be left, or the parameters cannot be met.
            TypeError: if the family cannot be sliced, or weights are quantized.
        """
        check_sliceable(model)
        if self.slice_ratios is not None:
            self._widths_by_hand(model)
            return
        even = [1.0] * model.config.num_hidden_layers
        self._dims(model, even, 1.0)

    def layers_left(self, total: int) -> int:
        """Return `total`; raise ValueError if slice_ratios names another number of layers."""
        if self.slice_ratios is not None and len(self.slice_ratios) != total:
            raise ValueError(
                f"slice_ratios holds {len(self.slice_ratios)} shares for {total} decoder layers; "
                "give one for each layer, 0 for a layer that keeps its width"
            )
        return total

    def check_calibration(self, model: PreTrainedModel, windows: Windows) -> None:
        """Check the windows, and read those of redundancy_text.

        Raises:
            ValueError: if the model cannot read the windows, or they hold too few tokens without
                those that are held out to choose among several bases.
            OSError: if redundancy_text cannot be read.
        """
        super().check_calibration(model, windows)
        if self.redundancy_text is not None:
            self._windows_to_score(model, windows)
        held_out, total = self._num_held_out(windows), len(split_windows(windows)[0])
        try:
            check_tokens(model, first_windows(windows, total - held_out))
        except ValueError as error:
            if not held_out:
                raise
            raise ValueError(f"{error}; {held_out} of {total} windows choose the base") from error

    @torch.no_grad()
    def plan(
        self,
        model: PreTrainedModel,
        windows: Windows,
        *,
        redundancy_windows: Windows | None = None,
    ) -> Plan:
        """Score the layers and choose their widths; the model is unchanged.

        Args:
            model: to be sliced.
            windows: calibration windows (N, T), or with an attention_mask.
            redundancy_windows: windows on which layers are scored, where that text is another; None
                takes redundancy_text, or else `windows`.

        Raises:
            ValueError: if the arguments or the windows do not fit the model, a base lies above the
                ratio that the parameters need, or states are NaN or Inf.
            TypeError: if the family cannot be sliced.
            OSError: if redundancy_text cannot be read.
        """
        self._check_redundancy_windows(redundancy_windows)
        check_weights(model)
        self.check(model)
        self.layers_left(len(decoder_layers(model)))
        if redundancy_windows is not None:
            check_windows(model, redundancy_windows)
        self.check_calibration(model, windows)
        if self.slice_ratios is not None:
            return self._plan_by_hand(model, windows)
        to_score = windows if redundancy_windows is None else redundancy_windows
        if self.redundancy_text is not None:
            to_score = self._windows_to_score(model, windows)
        redundancy, scores = self._redundancies(model, windows, to_score)
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
            perplexities = self._try_all(model, windows, candidates)
            best = min(perplexities, key=lambda base: (perplexities[base], -base))
            log.info("base_ratio=%.4g has the lowest of %s", best, perplexities)
        dims = candidates[best].residual_dims
        facts: dict[str, Any] = {"slice_ratio": mean_ratio(model, dims), "base_ratio": best}
        if to_score is not windows:
            facts["redundancy_windows"] = describe_windows(*split_windows(to_score))
        if perplexities:
            facts["perplexity_of_base_ratio"] = {f"{b:.4g}": x for b, x in perplexities.items()}
        facts |= report_parameters(model, sliced_parameters(model, dims), self.slice_ratio)
        return self.make_plan(model, windows, candidates[best], scores=scores, found=facts)

    def _check_redundancy_windows(self, given: Windows | None) -> None:
        """Check that windows to score on have an effect; raise ValueError if not."""
        for name, value, default in (
            ("slice_ratios", self.slice_ratios, None),
            ("redundancy_text", self.redundancy_text, None),
            ("score", self.score, "block_influence"),
        ):
            if given is not None and value != default:
                raise ValueError(
                    f"redundancy_windows has no effect with {name}={value!r}; leave one of them out"
                )

    def _windows_to_score(self, model: PreTrainedModel, windows: Windows) -> Windows:
        """Return windows of redundancy_text, as many and as long as the calibration windows."""
        count, seq_len = split_windows(windows)[0].shape
        key = f"{model.config._name_or_path} {count} {seq_len}"
        if key not in self._text_windows:
            read = windows_of_text(
                model, self.redundancy_text or [], count, seq_len, self.seed, "redundancy_text"
            )
            self._text_windows = {key: read}
        return share_windows(self._text_windows[key], group_of(windows))

    def _redundancies(
        self, model: PreTrainedModel, windows: Windows, to_score: Windows
    ) -> tuple[list[float], Mapping[str, list[float]]]:
        """Return the redundancy of each layer, and the scores that a plan keeps."""
        if self.score == "single_cut":
            perplexities = self._single_cuts(model, windows)
            redundancy = redundancies([math.log(x) for x in perplexities])
            return redundancy, {"layer_redundancy": redundancy, "single_cut": perplexities}
        influence = block_influences(model, to_score).mean
        redundancy = redundancies(influence)
        return redundancy, {"layer_redundancy": redundancy, "block_influence": influence}

    def _single_cuts(self, model: PreTrainedModel, windows: Windows) -> list[float]:
        """Return the perplexity of the model where one layer alone is cut, layer after layer."""
        hidden, layers = model.config.hidden_size, model.config.num_hidden_layers
        ratio = self.slice_ratio if self.slice_ratio is not None else self.parameter_ratio or 0.0
        width = uniform_width(ratio, hidden, self.round_to)
        cuts = {}
        for layer in range(layers):
            widths = [width if i == layer else hidden for i in range(layers)]
            dims = residual_dims(model, widths, self.embedding)
            cuts[layer] = SliceHidden(dims, self.signal, self.orientation, seed=self.seed)
        return [*self._try_all(model, windows, cuts).values()]

    def _plan_by_hand(self, model: PreTrainedModel, windows: Windows) -> Plan:
        """Return the plan of the shares that were given by hand."""
        dims = residual_dims(model, self._widths_by_hand(model), self.embedding)
        check_tokens(model, windows, dims[0])
        step = SliceHidden(dims, self.signal, self.orientation, seed=self.seed)
        ratio = mean_ratio(model, dims)
        facts: dict[str, Any] = {"slice_ratio": ratio}
        facts |= report_parameters(model, sliced_parameters(model, dims), ratio)
        return self.make_plan(model, windows, step, scores={}, found=facts)

    def _widths_by_hand(self, model: PreTrainedModel) -> list[int]:
        """Return the widths for slice_ratios; raise ValueError if a layer would have none."""
        hidden = model.config.hidden_size
        return [uniform_width(ratio, hidden, self.round_to) for ratio in self.slice_ratios or ()]

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
        if self.slice_ratios is not None:
            return 0
        if self.score == "single_cut" and total < 2:
            raise ValueError(
                f"{total} calibration window cannot score layers by score='single_cut', which "
                "takes two or more; give more windows"
            )
        if bases == 1 and self.score != "single_cut":
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

    def _try_all(
        self, model: PreTrainedModel, windows: Windows, steps: Mapping[Key, SliceHidden]
    ) -> dict[Key, float]:
        """Return name of a step -> perplexity on windows that the rotations do not see."""
        perplexity = partial(
            sliced_perplexity,
            model,
            windows,
            held_out=self._num_held_out(windows),
            device=self.device,
            offload=self.offload_activations,
        )
        return {name: perplexity(step) for name, step in steps.items()}


def _check_by_hand(slice_ratios: Sequence[float], others: Mapping[str, Any]) -> None:
    """Check shares that are given by hand; `others` are the arguments that then have no effect.

    Raises:
        ValueError: if one of the others is given, or a share lies outside [0, 1).
    """
    for name, value in others.items():
        if value is not None:
            raise ValueError(
                f"{name}={value!r} has no effect with slice_ratios, which says by hand what each "
                "layer loses; leave one of them out"
            )
    for layer, ratio in enumerate(slice_ratios):
        if not 0 <= ratio < 1:
            raise ValueError(
                f"slice_ratios[{layer}]={ratio} must lie in [0, 1); 0.25 removes a quarter of the "
                "width"
            )


def mean_ratio(model: PreTrainedModel, dims: Sequence[int]) -> float:
    """Return the mean share of the width that layers lose, measured at the input of each MLP."""
    return 1 - fmean(dims[1::2]) / model.config.hidden_size
