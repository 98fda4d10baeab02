"""How wide a sliced model becomes: options, the widths of all sites, and the parameters left."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from prunelight.models.families.config_fields import config_accepts, head_dim
from prunelight.models.families.own_classes.sliced import LAYERS, embeddings_of, last_norm, stack_of
from prunelight.models.sizes import parameter_count
from prunelight.planning.steps import SLICE_OPTIONS
from prunelight.runtime.arguments import check_choice

log = logging.getLogger(__name__)


def sliced_parameters(model: PreTrainedModel, residual_dims: Sequence[int]) -> int:
    """Return how many parameters the model will have with these widths and a rotation a site.

    Shortcuts count. The head counts too where the embeddings are sliced, since both are untied.
    """
    config: Any = model.config
    hidden, stack = config.hidden_size, stack_of(model)
    names = LAYERS[config.model_type]
    total = parameter_count(model)
    for index, layer in enumerate(stack.layers):
        before, inside, after = residual_dims[2 * index : 2 * index + 3]
        for norm in (names.attention_norm, names.mlp_norm):
            total -= parameter_count(getattr(layer, norm))
        for inputs, width in ((names.attention_inputs, before), (names.mlp_inputs, inside)):
            outputs = sum(len(layer.get_submodule(name).weight) for name in inputs)
            total -= (hidden - width) * outputs
        for output, width in ((names.attention_output, inside), (names.mlp_output, after)):
            linear = layer.get_submodule(output)
            total -= (hidden - width) * (linear.in_features + (linear.bias is not None))
        total += before * inside + inside * after
    rows = [len(embedding.weight) for embedding in embeddings_of(model)]
    total -= (hidden - residual_dims[0]) * sum(rows)
    tied = config.tie_word_embeddings
    if tied and residual_dims[0] == hidden:
        return total
    norm = getattr(stack, last_norm(model))
    total -= parameter_count(norm)
    return total + rows[0] * (tied * hidden + isinstance(norm, nn.LayerNorm))


def allowed_widths(model: PreTrainedModel, multiple: int) -> list[int]:
    """Return the multiples of a number that the config class accepts as hidden_size, ascending.

    A Llama's hidden_size must be a multiple of its number of query heads.
    """
    config, accepted = model.config, []
    for width in range(multiple, config.hidden_size + 1, multiple):
        if config_accepts(config, hidden_size=width, head_dim=head_dim(config)):
            accepted.append(width)
    return accepted


EMBEDDINGS = ("auto", "full", "sliced")


def check_slice_target(
    slice_ratio: float | None, parameter_ratio: float | None, round_to: int
) -> None:
    """Check how much shall be sliced; no model is needed.

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
    """Return the 2 L + 1 widths: a layer's own before its attention and MLP, whole at the end."""
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


def report_parameters(
    model: PreTrainedModel, parameters: int, slice_ratio: float | None
) -> dict[str, Any]:
    """Return the parameters before and after a slicing; warn if slicing adds parameters."""
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
