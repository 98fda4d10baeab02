"""Weight pruning: zeros in the decoder layers, by an allocation and a solver.

An allocation says how many zeros each layer gets: uniform, OWL (arXiv:2310.05175), DLP
(arXiv:2505.23807), LAMP (arXiv:2010.07611) or a ramp over depth (arXiv:2502.14770). A solver says
which weights become zero: magnitude, Wanda (arXiv:2306.11695), SparseGPT (arXiv:2301.00774) or ALPS
(arXiv:2406.07831). Any pair works, unstructured or N:M, at fit start; Wanda and magnitude also
along a schedule. The released codes ignore the allocation for N:M and do not make up for what they
clip.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from prunelight.calibration.windows import Windows
from prunelight.callbacks.base import Healing
from prunelight.callbacks.recovery.gradual_zeros import GradualZeros
from prunelight.models.families.config_fields import check_reloadable
from prunelight.models.families.layers import decoder_layers, layers_path
from prunelight.models.families.matrices import dense_places, matrices, share_of_matrices
from prunelight.planning.plan import Plan
from prunelight.planning.sparsity_shares import (
    clipping_excess,
    dlp,
    fit_to_target,
    owl,
    round_to_patterns,
    uniform,
    weighted_mean,
)
from prunelight.planning.steps import Sparsify
from prunelight.pruning.sparsity.alps import ALPS
from prunelight.pruning.sparsity.lamp import lamp_shares
from prunelight.pruning.sparsity.masks import Pattern
from prunelight.pruning.sparsity.sparsegpt import SparseGPT
from prunelight.pruning.sparsity.sparsify import check_step, check_swaps
from prunelight.pruning.sparsity.trial import held_out_windows, sparse_perplexity
from prunelight.recovery.zeros.gradual_zeros import Schedule
from prunelight.runtime.arguments import above, at_least, checked, checked_value, within
from prunelight.runtime.finite import check_weights
from prunelight.scoring.weight_scores import Statistic, WeightScore, weight_scores

log = logging.getLogger(__name__)

_LEAST_SHARE = 0.5  # of the decoder's weights, below which zeros are refused

# The score that each allocation reads.
ALLOCATIONS: dict[str, WeightScore | None] = {
    "uniform": None,
    "owl": "outlier_ratio",
    "dlp": "median",
    "dlp_mean": "mean",
    "lamp": None,  # reads weights alone
    "ramp": None,  # reads the place of a layer alone
}

ALPHAS: dict[str, float | Literal["auto"]] = {  # of the papers
    "uniform": 0.0,
    "owl": 0.08,
    "dlp": 0.15,
    "dlp_mean": 0.15,
    "lamp": 0.0,
    "ramp": "auto",
}

ALPHA_GRID = (0.0, 0.05, 0.1, 0.15, 0.2)  # what alpha="auto" tries; 0 is uniform

_REFUSED = "{}; take a smaller alpha (LAMP: fewer zeros), or strict=False to clip"

GRANULARITIES = ("layer", "linear")


@dataclass(frozen=True)
class _Units:
    """Groups of matrices; all matrices of a group get the same share of zeros.

    Attributes:
        names: of the matrices of each group.
        matrix_sizes: name of a matrix -> number of its weights.
    """

    names: list[list[str]]
    matrix_sizes: dict[str, int]

    @property
    def sizes(self) -> list[int]:
        """Return the number of weights of each group."""
        return [sum(self.matrix_sizes[name] for name in names) for names in self.names]


class WeightPruning(GradualZeros):
    """Put zeros into the weights of decoder linears: Wanda, SparseGPT, ALPS, magnitude; also N:M.

    Args:
        sparsity: share of the weights of decoder linears that become zero, in [0, 1). The papers
            take 0.5 to 0.7. Embeddings and head stay as they are.
        pattern: "N:M" keeps N of M consecutive inputs (2:4), instead of `sparsity`. With an
            allocation other than uniform each layer gets an N of its own, N:M on average; hardware
            that computes 2:4 needs allocation="uniform".
        solver: "wanda", "sparsegpt", "magnitude", "wanda_variant" (shares differ by row), or "alps"
            (the smallest error of the outputs, the longest time).
        allocation: "uniform", "owl", "dlp" (the median, its paper), "dlp_mean" (DLP's released
            code), "ramp" (shares rise by equal steps from the first layer to the last), or "lamp",
            which ranks the weights of all layers by themselves and has no alpha.
        alpha: half the spread of the shares; None takes the paper's, 0.08 for OWL, 0.15 for DLP and
            "auto" for the ramp.
            Of a list, the value with the lowest perplexity on a quarter of the calibration windows
            is taken; each value costs one pruning. "auto" tries 0 (uniform), 0.05, 0.1, 0.15, 0.2.
        outlier_factor: OWL's M: a score above M times the mean is an outlier.
        granularity: one share a decoder "layer" (the papers), or one a "linear" (LAMP's paper).
        sparsegpt: settings of SparseGPT.
        schedule: prune gradually while the model trains, by "wanda" or "magnitude"; None prunes at
            fit start.
        strict: refuse an alpha that pushes a layer out of [0, 1), instead of clipping its share;
            "auto" leaves it out.
        offload_activations: keep the calibration states on the CPU.
        statistic: of |W| * ||X|| in a layer, the score of allocation="dlp".
        heal: "linear" then fits weights anew, in closed form, to the dense model's hidden states;
            "layer" trains whole layers to them too, one at a time. See docs/healing.md. Both need 2
            calibration windows or more.
        alps: settings of ALPS.
        swaps: rounds in which zeros of a row change places with weights that stay, where that
            lowers the error of the outputs (SparseSwaps); for "wanda", "wanda_variant" and "alps".

    Raises:
        ValueError: if an argument is out of its range or has no effect.
    """

    follows_slicing = True

    @checked(sparsity=within(0, 1), outlier_factor=above(0))
    def __init__(
        self,
        sparsity: float | None = None,
        pattern: str | int | None = None,
        solver: Literal["wanda", "sparsegpt", "magnitude", "wanda_variant", "alps"] = "wanda",
        allocation: Literal["uniform", "owl", "dlp", "dlp_mean", "lamp", "ramp"] = "uniform",
        alpha: float | list[float] | Literal["auto"] | None = None,
        outlier_factor: float = 5.0,
        granularity: Literal["layer", "linear"] = "layer",
        sparsegpt: SparseGPT = SparseGPT(),  # noqa: B008 (frozen)
        schedule: Schedule | None = None,
        strict: bool = False,
        offload_activations: bool = False,
        statistic: Statistic = "median",
        heal: Healing = "none",
        alps: ALPS = ALPS(),  # noqa: B008 (frozen)
        swaps: int = 0,
    ) -> None:
        if isinstance(pattern, int):  # YAML 1.1 counts in sixties
            raise ValueError(f'pattern={pattern} is what YAML makes of N:M; quote it: "2:4"')
        self.pattern = None if pattern is None else Pattern.parse(pattern)
        self.target = _target(sparsity, self.pattern)
        self.alpha = ALPHAS[allocation] if alpha is None else alpha
        self.alphas = _alphas(self.alpha)
        if any(self.alphas) and allocation in ("uniform", "lamp"):
            raise ValueError(f"{alpha=} has no effect with {allocation=}")
        if outlier_factor != 5 and allocation != "owl":
            raise ValueError(f"{outlier_factor=} has no effect with {allocation=}")
        if statistic != "median" and allocation != "dlp":
            raise ValueError(f"{statistic=} has no effect with {allocation=}; set allocation='dlp'")
        if solver != "sparsegpt" and sparsegpt != SparseGPT():
            raise ValueError(f"{sparsegpt} has no effect with solver={solver!r}")
        if solver != "alps" and alps != ALPS():
            raise ValueError(f"{alps} has no effect with solver={solver!r}")
        check_swaps(swaps, solver)
        if swaps and schedule is not None:
            raise ValueError(f"{swaps=} has no effect with a schedule; leave one of them out")
        if self.pattern is not None and solver == "wanda_variant":
            raise ValueError(f"solver='wanda_variant' chooses by rows and knows no {pattern=}")
        if heal != "none" and schedule is not None:
            raise ValueError(
                f"{heal=} has no effect with a schedule, whose zeros come while the model trains; "
                "leave one of them out"
            )
        super().__init__(solver, schedule)
        self.sparsity = sparsity
        self.allocation = allocation
        self.outlier_factor = outlier_factor
        self.granularity = granularity
        self.sparsegpt, self.alps = sparsegpt, alps
        self.strict = strict
        self.offload_activations = offload_activations
        self.statistic, self.heal, self.swaps = statistic, heal, swaps

    @property
    def score(self) -> WeightScore | None:
        """Return the score of weights and inputs that the allocation reads, None without one."""
        return self.statistic if self.allocation == "dlp" else ALLOCATIONS[self.allocation]

    @property
    def spreads(self) -> bool:
        """Return whether layers can get different shares."""
        return any(self.alphas) or self.allocation == "lamp"

    def arguments(self) -> dict[str, Any]:
        """Return the arguments that decide the result, as JSON values."""
        return {
            **super().arguments(),
            "pattern": None if self.pattern is None else str(self.pattern),
            "sparsegpt": asdict(self.sparsegpt),
            "alps": asdict(self.alps),
            "schedule": None if self.schedule is None else asdict(self.schedule),
        }

    def check(self, model: PreTrainedModel) -> None:
        """Check that the model has matrices to sparsify, and that the pattern fits their widths.

        Raises:
            ValueError: if the pattern does not divide a width; names the matrix.
            TypeError: if the weights are quantized or nothing can be sparsified.
        """
        check_reloadable(model)
        names = matrices(model)
        share = share_of_matrices(model)
        if share < _LEAST_SHARE:
            dense = next(iter(dense_places(model).values()), ["anything"])[0]
            raise TypeError(
                f"only {100 * share:.0f} % of the weights in the decoder layers of "
                f"{model.config.model_type} can be sparsified; not {dense}, for instance"
            )
        check_step(model, self.sparsify_step(dict.fromkeys(names, self.target)))

    def check_calibration(self, model: PreTrainedModel, windows: Windows) -> None:
        """Check the windows.

        Raises:
            ValueError: if the model cannot read the windows, or they are too few to hold some out
                where there are several alphas to choose from.
        """
        super().check_calibration(model, windows)
        if len(self.alphas) > 1:
            try:
                held_out_windows(windows)
            except ValueError as error:
                raise ValueError(
                    f"alpha={self.alpha!r} holds windows out; {error}, or one alpha"
                ) from error

    @torch.no_grad()
    def plan(self, model: PreTrainedModel, windows: Windows) -> Plan:
        """Decide how many zeros each matrix gets; the model is unchanged.

        Args:
            model: the dense model.
            windows: calibration windows, token ids (N, T), or a mapping with attention_mask.

        Raises:
            ValueError: if arguments or windows do not fit the model, activations are NaN or Inf,
                or a layer would be clipped and `strict` is set.
        """
        check_weights(model)
        self.check(model)
        self.check_calibration(model, windows)
        sizes = {name: matrix.parameter.numel() for name, matrix in matrices(model).items()}
        dense, share = dense_places(model), share_of_matrices(model)
        for reason, places in dense.items():
            log.info("%s: %s stay dense", reason, ", ".join(places))
        layers = _names_by_layer(model, list(sizes))
        by_layer = self.granularity == "layer"
        names = [layer for layer in layers if layer] if by_layer else [[name] for name in sizes]
        units = _Units(names, sizes)
        scores = self._scores(model, windows)
        alpha, found = self._choose_alpha(model, windows, units)
        self._check_clipping(self._spread(units, scores, alpha), alpha)
        step = self._step(units, scores, alpha)
        if dense:
            found |= {"stays_dense": dense, "share_of_decoder_weights": share}
        return self.make_plan(
            model,
            windows,
            step,
            scores=self._scores_by_layer(layers_path(model), layers, scores, step.sparsity, sizes),
            found=found,
        )

    def sparsify_step(self, sparsity: dict[str, float]) -> Sparsify:
        """Return the plan's step for these shares of zeros, {name of a matrix: share}."""
        settings: dict[str, SparseGPT | ALPS] = {"sparsegpt": self.sparsegpt, "alps": self.alps}
        options = asdict(settings[self.solver]) if self.solver in settings else {}
        if self.swaps:
            options["swaps"] = self.swaps
        pattern = None if self.pattern is None else str(self.pattern)
        return Sparsify(sparsity, self.solver, pattern, options)

    def _scores(self, model: PreTrainedModel, windows: Windows) -> dict[str, float]:
        """Return the scores that the allocation reads, {name of a matrix: score}; {} if none."""
        by_matrix = self.granularity == "linear"
        if self.allocation == "lamp":
            return lamp_shares(model, self.target, by_matrix=by_matrix, device=self.device)
        if self.allocation == "ramp" and self.spreads:
            layers = _names_by_layer(model, [*matrices(model)])
            return {name: float(i) for i, names in enumerate(layers) for name in names}
        kind = self.score
        if kind is None or not self.spreads:
            return {}
        return weight_scores(
            model,
            windows,
            kind,
            outlier_factor=self.outlier_factor,
            by_matrix=by_matrix,
            device=self.device,
            offload=self.offload_activations,
        )

    def _spread(self, units: _Units, scores: dict[str, float], alpha: float) -> list[float]:
        """Return the share of zeros of each unit before clipping: its score decides."""
        if not scores:
            return uniform(units.sizes, self.target)
        unit_scores = [scores[names[0]] for names in units.names]
        if self.allocation == "lamp":
            return unit_scores
        spread = owl if self.allocation == "owl" else dlp
        return spread(unit_scores, units.sizes, self.target, alpha)

    def _step(self, units: _Units, scores: dict[str, float], alpha: float) -> Sparsify:
        """Return the step of an alpha: shares of zeros that are clipped and meet the target."""
        shares = self._spread(units, scores, alpha)
        if scores:
            shares = fit_to_target(shares, units.sizes, self.target)
        if scores and self.pattern is not None:
            kept = round_to_patterns(shares, units.sizes, (self.pattern.kept, self.pattern.of))
            shares = [1 - number / self.pattern.of for number in kept]
        share_of = {n: x for names, x in zip(units.names, shares, strict=True) for n in names}
        return self.sparsify_step({name: share_of[name] for name in units.matrix_sizes})

    def _clipping(self, shares: list[float], alpha: float) -> str:
        """Return what clipping does to the shares of an alpha, "" if it does nothing."""
        excess = clipping_excess(shares, self.target)
        if excess == 0:
            return ""
        cause = "allocation='lamp'" if self.allocation == "lamp" else f"alpha={alpha}"
        return (
            f"{cause} pushes shares of zeros to [{min(shares):.3f}, {max(shares):.3f}], "
            f"{excess:.3f} out of [0, 1)"
        )

    def _check_clipping(self, shares: list[float], alpha: float) -> None:
        """Warn of shares that are clipped, or too few inputs of a pattern to differ.

        Raises:
            ValueError: if shares are clipped and `strict` is set.
        """
        text = self._clipping(shares, alpha)
        if text and self.strict:
            raise ValueError(_REFUSED.format(text))
        if text:
            log.warning("%s: clipped, and the others adjusted to sparsity=%s", text, self.target)
        if self.pattern is not None and self.pattern.kept == 1 and self.spreads:
            log.warning("pattern=%s is uniform: no layer can keep fewer than 1", self.pattern)

    def _choose_alpha(
        self, model: PreTrainedModel, windows: Windows, units: _Units
    ) -> tuple[float, dict[str, Any]]:
        """Return the alpha with the lowest perplexity on held-out windows, and facts for the plan.

        Neither the scores nor the solver of a trial see the windows that judge it.
        """
        if len(self.alphas) == 1:
            return self.alphas[0], {}
        seen, held_out = held_out_windows(windows)
        scores = self._scores(model, seen)
        candidates: dict[float, Sparsify] = {}
        for alpha in self.alphas:
            text = self._clipping(self._spread(units, scores, alpha), alpha)
            if text and self.strict and self.alpha != "auto":
                raise ValueError(_REFUSED.format(text))
            if text and self.strict:
                log.info("%s: left out", text)
                continue
            step = self._step(units, scores, alpha)
            if step not in candidates.values():  # two alphas may round to the same patterns
                candidates[alpha] = step
        perplexities = {
            alpha: sparse_perplexity(
                model, seen, held_out, step, device=self.device, offload=self.offload_activations
            )
            for alpha, step in (candidates.items() if len(candidates) > 1 else ())
        }
        best = min(candidates, key=lambda alpha: (perplexities.get(alpha, 0.0), alpha))
        log.info("alpha=%.4g has the lowest perplexity of %s", best, perplexities)
        tried = {f"{alpha:.4g}": value for alpha, value in perplexities.items()}
        return best, {"alpha": best, "perplexity_of_alpha": tried}

    def _scores_by_layer(
        self,
        path: str,
        layers: list[list[str]],
        scores: dict[str, float],
        share_of: dict[str, float],
        sizes: dict[str, int],
    ) -> dict[str, list[float | None]]:
        """Return the plan's scores: lists of one number a decoder layer, None without matrices.

        With granularity "linear" each projection has a list of its own.
        """
        lists: dict[str, list[float | None]] = {}
        kind = {"lamp": "lamp_share", "ramp": "depth"}.get(self.allocation, str(self.score))
        for layer in layers if scores else []:
            if not layer and self.granularity == "layer":
                lists.setdefault(kind, []).append(None)
            for name in layer if self.granularity == "linear" else layer[:1]:
                projection = name.removeprefix(f"{path}.").partition(".")[2]
                suffix = f"_{projection}" if self.granularity == "linear" else ""
                lists.setdefault(kind + suffix, []).append(scores[name])
        lists["sparsity"] = [
            weighted_mean([share_of[n] for n in layer], [sizes[n] for n in layer]) if layer else 0.0
            for layer in layers
        ]
        return lists


def _names_by_layer(model: PreTrainedModel, names: list[str]) -> list[list[str]]:
    prefixes = [f"{layers_path(model)}.{i}." for i in range(len(decoder_layers(model)))]
    return [[name for name in names if name.startswith(prefix)] for prefix in prefixes]


def _alphas(alpha: float | list[float] | str) -> tuple[float, ...]:
    """Return the alphas to try, in ascending order.

    Raises:
        ValueError: if a list is empty, or an alpha is below 0.
    """
    if alpha == "auto":
        return ALPHA_GRID
    given = alpha if isinstance(alpha, list) else [alpha]
    if not given:
        raise ValueError("alpha=[] names no value to try; give some, or leave it out")
    return tuple(sorted({checked_value("alpha", value, float, at_least(0)) for value in given}))


def _target(sparsity: float | None, pattern: Pattern | None) -> float:
    """Return the share of zeros that the arguments ask for.

    Raises:
        ValueError: unless exactly one of the two is given, the share lies in [0, 1), and the
            pattern makes zeros.
    """
    if (sparsity is None) == (pattern is None):
        raise ValueError(
            f"sparsity={sparsity} and pattern={pattern}: give exactly one of the two (a pattern "
            "N:M says its sparsity, 1 - N / M)"
        )
    if pattern is not None and pattern.kept == pattern.of:
        raise ValueError(
            f"pattern={pattern} keeps all weights: N:M keeps N of M, such as 2:4; lower N"
        )
    target = pattern.sparsity if pattern is not None else sparsity
    assert target is not None
    if not 0 <= target < 1:
        raise ValueError(f"sparsity={sparsity} must lie in [0, 1); 0.7 makes 70 % of them zero")
    return target
