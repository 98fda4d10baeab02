"""DLP: dynamic layerwise pruning, more zeros where a layer matters less (arXiv:2505.23807).

The paper allocates by the median of |W| * ||X|| in each decoder layer; its released code takes the
mean ("dlp_mean"). Solvers, N:M patterns, schedules and all else are those of `WeightPruning`.
"""

from __future__ import annotations

from inspect import signature
from typing import Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_deprecation

from prunelight.callbacks.base import Healing
from prunelight.callbacks.weight_pruning import WeightPruning
from prunelight.pruning.sparsity.alps import ALPS
from prunelight.pruning.sparsity.sparsegpt import SparseGPT
from prunelight.recovery.zeros.gradual_zeros import Schedule
from prunelight.runtime.arguments import above, checked, within
from prunelight.scoring.weight_scores import Statistic


class DLP(WeightPruning):
    """Sparsify the decoder layers by DLP's allocation and a solver.

    Args:
        sparsity: share of the weights of decoder linears that become zero, in [0, 1). The paper
            takes 0.7. Embeddings and head stay as they are.
        pattern: "N:M" keeps N of M consecutive inputs (2:4), instead of `sparsity`. Each layer gets
            an N of its own, N:M on average.
        allocation: "dlp" (the median, the paper) or "dlp_mean" (the released code). "owl" and
            "uniform" are deprecated here: write `WeightPruning`.
        alpha: half the spread of the shares; None takes the paper's 0.15. Of a list, the value with
            the lowest perplexity on a quarter of the calibration windows is taken; each value costs
            one pruning. "auto" tries 0 (uniform), 0.05, 0.1, 0.15 and 0.2.
        outlier_factor: deprecated here, OWL's M: write `WeightPruning`.
        granularity: one share a decoder "layer" (the paper), or one a "linear".
        solver: "wanda", "wanda_variant" (shares differ by row), "sparsegpt", "magnitude" or "alps".
        sparsegpt: settings of SparseGPT.
        schedule: prune gradually while the model trains, by "wanda" or "magnitude"; None prunes at
            fit start.
        strict: refuse an alpha that pushes a layer out of [0, 1), instead of clipping its share;
            "auto" leaves it out.
        offload_activations: keep the calibration states on the CPU.
        statistic: of |W| * ||X|| in a layer, its score: "median" (the paper), "mean" (the same as
            allocation="dlp_mean"), "sum", "max", "std" or "var".
        heal: "linear" then fits weights anew, in closed form, to the dense model's hidden states;
            "layer" trains whole layers to them too, one at a time. See docs/healing.md. Both need 2
            calibration windows or more.
        alps: settings of ALPS.
        swaps: rounds in which zeros of a row change places with weights that stay, where that
            lowers the error of the outputs (SparseSwaps); for "wanda", "wanda_variant" and "alps".

    Raises:
        ValueError: if an argument is out of its range or has no effect.
    """

    # Order and names of the arguments stay: they are part of the fingerprint of older bases.
    @checked(sparsity=within(0, 1), outlier_factor=above(0))
    def __init__(
        self,
        sparsity: float | None = None,
        pattern: str | int | None = None,
        allocation: Literal["dlp", "dlp_mean", "owl", "uniform"] = "dlp",
        alpha: float | list[float] | Literal["auto"] | None = None,
        outlier_factor: float = 5.0,
        granularity: Literal["layer", "linear"] = "layer",
        solver: Literal["wanda", "wanda_variant", "sparsegpt", "magnitude", "alps"] = "wanda",
        sparsegpt: SparseGPT = SparseGPT(),  # noqa: B008 (frozen)
        schedule: Schedule | None = None,
        strict: bool = False,
        offload_activations: bool = False,
        statistic: Statistic = "median",
        heal: Healing = "none",
        alps: ALPS = ALPS(),  # noqa: B008 (frozen)
        swaps: int = 0,
    ) -> None:
        arguments: dict[str, Any] = {
            "sparsity": sparsity,
            "pattern": pattern,
            "solver": solver,
            "allocation": allocation,
            "alpha": alpha,
            "outlier_factor": outlier_factor,
            "granularity": granularity,
            "sparsegpt": sparsegpt,
            "schedule": schedule,
            "strict": strict,
            "offload_activations": offload_activations,
            "statistic": statistic,
            "heal": heal,
            "alps": alps,
            "swaps": swaps,
        }
        super().__init__(**arguments)
        if allocation in ("owl", "uniform"):
            defaults = signature(WeightPruning).parameters
            written = [f"{n}={x!r}" for n, x in arguments.items() if x != defaults[n].default]
            rank_zero_deprecation(
                f"DLP(allocation={allocation!r}) is deprecated: that allocation is not DLP's; "
                f"write prunelight.callbacks.WeightPruning({', '.join(written)}), which puts the "
                "same zeros; let a run that DLP began end with DLP",
                stacklevel=7,
            )
