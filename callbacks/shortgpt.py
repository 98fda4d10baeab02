"""ShortGPT: remove the decoder layers that change the hidden states least (arXiv:2403.03853).

Every layer is scored once, and the layers with the lowest scores are removed. `score="angular"` is
the variant of Gromov et al. (arXiv:2403.17887), which removes one contiguous window of layers. The
other scores are those that the paper compares with Block Influence (Section 4.3 and Figure 5). The
released codes score the last layer after the final norm, count padding, and rank sums in float16;
prunelight/scoring/block_influence.py says what is done here instead.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from transformers import PreTrainedModel

from prunelight.calibration.windows import Windows, check_ignored
from prunelight.callbacks.base import (
    OWN_CLASS_HEALING,
    DepthHealing,
    PruningCallback,
    check_depth_healing,
)
from prunelight.models.engines import check_engines, engine_patterns, known_engines
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.own_classes.dropped_sublayers import SUBLAYERS
from prunelight.models.families.removable import removable_layers
from prunelight.models.sizes import depth_unit_sizes, parameter_count
from prunelight.planning.layer_choice import (
    DATA_FREE_SCORES,
    check_one_target,
    data_free_scores,
    layers_by_hand,
    layers_for_parameters,
    layers_left,
    layers_to_remove,
    lowest_scores,
    resolve_indices,
)
from prunelight.planning.plan import Plan
from prunelight.planning.steps import DropSublayers, RemoveLayers, Step
from prunelight.pruning.drop_sublayers import check_droppable, fixed_sublayers
from prunelight.runtime.arguments import at_least, checked, within
from prunelight.runtime.finite import check_weights
from prunelight.scoring.angular_distance import angular_distances
from prunelight.scoring.block_influence import (
    block_influences,
    relative_magnitudes,
    sublayer_influences,
)

log = logging.getLogger(__name__)

SCORES = ("block_influence", "angular", "relative_magnitude", *DATA_FREE_SCORES)

GRANULARITIES = ("layer", "attention", "mlp", "sublayer")


class ShortGPT(PruningCallback):
    """Remove whole decoder layers by Block Influence, or a window of them by angular distance.

    Args:
        ratio: share of the decoder layers to remove, in [0, 1), rounded to whole layers. The share
            of all parameters is smaller (embeddings stay); the report gives both.
        num_layers: how many layers (or sublayers) to remove. Give exactly one of ratio, num_layers,
            layers and parameter_ratio.
        score: "block_influence" removes the layers with the lowest scores, "angular" the contiguous
            window whose input and output differ least at the last token, "relative_magnitude" the
            layers that add least beside what passes through. "sequential" (the shallowest go
            first), "reverse" (the deepest go first) and "random" need no data.
        ignore_first_tokens: tokens at the start of each window that do not count, for models with
            attention sinks there; block_influence and relative_magnitude only. The paper counts
            all (0).
        protected: layers never to touch; negative indices count from the end.
        granularity: "layer" removes whole layers. "attention" and "mlp" remove these sublayers
            instead, "sublayer" ranks both together; ratio is then the share of these sublayers.
            Such a model needs prunelight to load. The first attention always stays: the cache
            counts tokens there.
        export_remote_code: put the code of the class of a model without some sublayers beside it,
            which then loads without prunelight under trust_remote_code.
        loads_in: programs that must read the result as transformers does: "transformers 4.57",
            "vLLM", "llama.cpp" or "CTranslate2". Where one derives the kind of a layer from its
            place, only layers go whose removal keeps that pattern.
        layers: the layers to remove, by hand; negative indices count from the end. With granularity
            "attention" or "mlp", the layers that lose this sublayer. Nothing is scored.
        parameter_ratio: share of all parameters to remove, embeddings included, in [0, 1): the
            nearest whole number of layers or sublayers.
        seed: of score="random"; needed there.
        heal: "linear" then fits weights anew, in closed form, to the dense model's hidden states;
            "operator" puts a matrix before each gap as well; "layer" trains whole layers instead,
            one at a time. "mlp" lets one MLP stand in for each run of layers and trains that. What
            "operator" and "mlp" leave needs prunelight to load. See docs/healing.md. All need 2
            calibration windows or more.

    Raises:
        ValueError: if an argument is out of its range or has no effect.
    """

    @checked(
        ratio=within(0, 1),
        num_layers=at_least(0),
        ignore_first_tokens=at_least(0),
        parameter_ratio=within(0, 1),
        seed=at_least(0),
    )
    def __init__(
        self,
        ratio: float | None = None,
        num_layers: int | None = None,
        score: Literal[
            "block_influence", "angular", "relative_magnitude", "sequential", "reverse", "random"
        ] = "block_influence",
        ignore_first_tokens: int = 0,
        protected: list[int] | None = None,
        granularity: Literal["layer", "attention", "mlp", "sublayer"] = "layer",
        export_remote_code: bool = False,
        loads_in: list[str] | None = None,
        layers: list[int] | None = None,
        parameter_ratio: float | None = None,
        seed: int | None = None,
        heal: DepthHealing = "none",
    ) -> None:
        targets = {"ratio": ratio, "num_layers": num_layers}
        check_one_target({**targets, "layers": layers, "parameter_ratio": parameter_ratio})
        _check_choices(score, granularity, ignore_first_tokens, layers, seed)
        check_depth_healing(heal, granularity, parameter_ratio, loads_in)
        if export_remote_code and granularity == "layer" and heal not in OWN_CLASS_HEALING:
            raise ValueError(
                "export_remote_code=True has no effect with granularity='layer', which leaves a "
                "stock class; leave it out"
            )
        self.ratio, self.num_layers, self.score = ratio, num_layers, score
        self.ignore_first_tokens, self.granularity = ignore_first_tokens, granularity
        self.drops_sublayers = granularity != "layer" or heal in OWN_CLASS_HEALING
        self.export_remote_code = export_remote_code
        self.protected = list(protected or [])
        self.loads_in = known_engines(loads_in)
        self.layers = None if layers is None else list(layers)
        self.parameter_ratio, self.seed = parameter_ratio, seed
        self.heal = heal

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError if too few layers may be removed, TypeError if the family forbids it."""
        total, count = len(decoder_layers(model)), self._count(model)
        if self.granularity != "layer":
            check_droppable(model)
        for name in ("ratio", "parameter_ratio"):
            if count == 0 and (given := getattr(self, name)):
                log.warning("%s=%s removes none of %d decoder layers", name, given, total)
        length = total - count + 1 if self.score == "angular" else total
        self._step(model, dict.fromkeys(("layer", *SUBLAYERS), [0.0] * length))

    def layers_left(self, total: int) -> int:
        """Return how many decoder layers stay; raise ValueError if too few may be removed."""
        if self.granularity != "layer" or self.parameter_ratio is not None:
            return total  # the share of parameters is known once the model is
        if self.layers is not None:
            return total - len(layers_by_hand(self.layers, total, self.protected))
        return layers_left(total, self.ratio, self.num_layers, self.protected)

    def check_calibration(self, model: PreTrainedModel, windows: Windows) -> None:
        """Raise ValueError if the model cannot read the windows, or no token of them counts."""
        super().check_calibration(model, windows)
        check_ignored(windows, self.ignore_first_tokens)

    @torch.no_grad()
    def plan(self, model: PreTrainedModel, windows: Windows) -> Plan:
        """Score the decoder layers and choose which to remove; the model is unchanged.

        Raises:
            ValueError: if the arguments or the windows do not fit the model, or a hidden state is
                NaN or Inf.
        """
        check_weights(model)
        self.check(model)
        self.check_calibration(model, windows)
        ignored = self.ignore_first_tokens
        needs_data = self.layers is None and self.score not in DATA_FREE_SCORES
        if self.layers is not None:
            ranking, scores = {}, {}
        elif self.granularity != "layer":
            sublayers = sublayer_influences(model, windows, ignore_first_tokens=ignored)
            ranking = {name: influence.mean for name, influence in sublayers.items()}
            scores = {f"{name}_influence": means for name, means in ranking.items()}
        elif self.score == "angular":
            ranking = {"layer": angular_distances(model, windows, self._count(model))}
            scores = {"angular_distance": ranking["layer"]}
        elif not needs_data:
            total = len(decoder_layers(model))
            ranking = {"layer": data_free_scores(self.score, total, self.seed)}
            scores = {self.score: ranking["layer"]}
        elif self.score == "relative_magnitude":
            means, first = relative_magnitudes(model, windows, ignore_first_tokens=ignored)
            ranking = {"layer": means}
            scores = {self.score: means, f"{self.score}_first_token": first}
        else:
            influence = block_influences(model, windows, ignore_first_tokens=ignored)
            ranking, first = {"layer": influence.mean}, influence.first_token
            scores = {"block_influence": influence.mean, "block_influence_first_token": first}
        step = self._step(model, ranking)
        facts = {} if needs_data or self.heal != "none" else {"calibration_used": False}
        return self.make_plan(model, windows, step, scores=scores, found=facts)

    def _count(self, model: PreTrainedModel) -> int:
        """Return how many layers, or sublayers, to remove."""
        if self.layers is not None:
            return len(layers_by_hand(self.layers, len(decoder_layers(model)), self.protected))
        if self.parameter_ratio is not None:
            sizes = depth_unit_sizes(model, self.granularity)
            return layers_for_parameters(self.parameter_ratio, sizes, parameter_count(model))
        kinds = 2 if self.granularity == "sublayer" else 1
        return layers_to_remove(self.ratio, self.num_layers, kinds * len(decoder_layers(model)))

    def _step(self, model: PreTrainedModel, scores: Mapping[str, Sequence[float]]) -> Step:
        """Choose the layers or sublayers with the lowest scores among those that may be removed."""
        count, total = self._count(model), len(decoder_layers(model))
        if self.layers is not None:
            return self._step_by_hand(model, layers_by_hand(self.layers, total, self.protected))
        if self.granularity == "layer":
            removable = removable_layers(model)
            if self.score == "angular":
                layers = removable.choose_window(scores["layer"], count, self.protected)
            else:
                patterns = engine_patterns(model.config, self.loads_in)
                layers = removable.choose(scores["layer"], count, self.protected, patterns)
            check_engines(removable.models.config_without(layers), self.loads_in)
            return RemoveLayers(tuple(layers))
        names = SUBLAYERS if self.granularity == "sublayer" else (self.granularity,)
        protected = resolve_indices(self.protected, total)
        # One list holds all sublayers, kind after kind: layer i of kind k is at k * total + i.
        fixed = {
            kind * total + i
            for kind, name in enumerate(names)
            for i in protected | fixed_sublayers(model, name)
        }
        ranking = [score for name in names for score in scores[name]]
        chosen = [divmod(i, total) for i in lowest_scores(ranking, count, fixed)]
        dropped = {n: tuple(i for kind, i in chosen if names[kind] == n) for n in names}
        return DropSublayers(**dropped)

    def _step_by_hand(self, model: PreTrainedModel, layers: Sequence[int]) -> Step:
        """Return the step for layers that were named by hand, if the family and engines allow it.

        Raises:
            ValueError: if these layers, or their sublayers, cannot go; says which can.
        """
        if self.granularity == "layer":
            removable = removable_layers(model)
            removable.check(layers)
            check_engines(removable.models.config_without(layers), self.loads_in)
            return RemoveLayers(tuple(layers))
        if fixed := sorted(fixed_sublayers(model, self.granularity) & {*layers}):
            raise ValueError(
                f"layers={self.layers}: the {self.granularity} of layers {fixed} cannot go: it is "
                "gone already, or the cache counts tokens there; name others"
            )
        return DropSublayers(**{self.granularity: tuple(layers)})


def _check_choices(
    score: str,
    granularity: str,
    ignore_first_tokens: int,
    layers: Sequence[int] | None,
    seed: int | None,
) -> None:
    """Check that the arguments of `ShortGPT` that choose how to choose have an effect together.

    Raises:
        ValueError: if one of them has none, or is missing.
    """
    if granularity != "layer" and score != "block_influence":
        raise ValueError(
            f"score={score!r} compares whole layers, not granularity={granularity!r}; take "
            "score='block_influence' or granularity='layer'"
        )
    if (score == "random") != (seed is not None):
        raise ValueError(
            f"seed={seed} with score={score!r}: score='random' needs a seed, such as seed=0, and "
            "no other score takes one"
        )
    if layers is not None and score != "block_influence":
        raise ValueError(
            f"score={score!r} has no effect with layers={[*layers]}, which says by hand what goes; "
            "leave one of them out"
        )
    if layers is not None and granularity == "sublayer":
        raise ValueError(
            f"layers={[*layers]} with granularity='sublayer' does not say which sublayer goes; "
            "take granularity='attention' or 'mlp'"
        )
    reason = ""
    if score == "angular":
        reason = "score='angular', which looks at the last token only"
    elif score in DATA_FREE_SCORES or layers is not None:
        reason = f"{f'score={score!r}' if layers is None else f'layers={[*layers]}'}, without data"
    if ignore_first_tokens and reason:
        raise ValueError(
            f"ignore_first_tokens={ignore_first_tokens} has no effect with {reason}; leave it out"
        )
