"""Carrying out a plan: `apply(model, plan, windows)`.

Removing layers changes more than a list: every layer keeps its own index for the cache, configs
hold one entry a layer or count layers, and an RWKV's first block has a norm that no other has. All
of it follows here, so that the result is a stock model that its own config describes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from prunelight.architecture import (
    INDEX_ATTRIBUTES,
    decoder_layers,
    is_sliced,
    layers_path,
    restore_rwkv_scale,
)
from prunelight.calibration import Windows
from prunelight.merging import OTHER_LISTS, check_mergeable, merged_layer
from prunelight.metrics import parameter_count
from prunelight.plan import Plan
from prunelight.rotation import check_shared, share_rotation
from prunelight.slicing import check_slice, slice_hidden
from prunelight.sparsify import check_data, check_step, sparsify
from prunelight.steps import (
    DropSublayers,
    MergeLayers,
    PruneWidth,
    RemoveLayers,
    SliceHidden,
    Sparsify,
    Step,
    renumber,
    renumbered,
)
from prunelight.sublayers import check_droppable, check_leading, drop_sublayers
from prunelight.width import check_width, prune_width

log = logging.getLogger(__name__)

# Config fields that say from which layer on something starts, or how many layers it covers.
COUNTING_FIELDS = ("max_window_layers", "first_k_dense_replace", "num_dense_layers")
# Config fields that make layers depend on each other or on their index: removal is refused.
REFUSED_FIELDS = ("num_kv_shared_layers", "scale_attn_by_inverse_layer_idx")


def apply(
    model: PreTrainedModel,
    plan: Plan,
    windows: Windows | None = None,
    *,
    strict: bool = True,
    device: torch.device | None = None,
    offload: bool = False,
    outcomes: list[dict[str, Any]] | None = None,
) -> PreTrainedModel:
    """Carry out a plan, in place where the class stays, and return the pruned model.

    Args:
        model: the model that the plan was made for.
        plan: from a callback's `plan`, or `Plan.load`.
        windows: calibration windows, for steps that need data (slice; sparsify, unless by
            magnitude).
        strict: require the very weights that the plan was made for, see `Plan.check`.
        device: where the layers compute, one at a time, for a model that is elsewhere.
        offload: keep the calibration states on the CPU.
        outcomes: gets what each sparsify or slice step did, see `sparsify.Outcome` and
            `slicing.SliceOutcome`.

    Raises:
        ValueError: if the plan does not fit the model; the model is then unchanged.
        TypeError: if the decoder layers cannot be found.
    """
    plan.check(model, strict=strict)
    _check_steps(model, plan.steps, windows)
    before = parameter_count(model) / 1e6
    removed: set[int] = set()  # the plan counts the layers of the dense model

    def left(layers: Iterable[int]) -> list[int]:
        return [renumber(layer, removed) for layer in layers]

    outcomes = [] if outcomes is None else outcomes
    places: dict[str, Any] = {"device": device, "offload": offload}
    for step in plan.steps:
        if isinstance(step, RemoveLayers):
            remove_layers(model, left(step.layers))
        elif isinstance(step, MergeLayers):
            merge_layers(model, [*map(left, step.groups)], step.merge)
        elif isinstance(step, DropSublayers):
            drop_sublayers(model, left(step.attention), left(step.mlp))
        elif isinstance(step, PruneWidth):
            prune_width(model, step, windows, removed=removed, **places)
        elif isinstance(step, SliceHidden):
            assert windows is not None  # check_slice
            carry_out = share_rotation if step.rotation == "shared" else slice_hidden
            outcomes.append(asdict(carry_out(model, step, windows, **places)))
        elif isinstance(step, Sparsify):
            step = replace(step, sparsity=renumbered(step.sparsity, layers_path(model), removed))
            outcomes.append(asdict(sparsify(model, step, windows, **places)))
        else:
            raise TypeError(f"no surgery is known for the step {step!r}")
        removed |= set(step.removed)
    after = parameter_count(model) / 1e6
    change = 100 * (after / before - 1)
    log.info("parameters %.1fM -> %.1fM (%+.1f %%)", before, after, change)
    return model


def _check_steps(model: PreTrainedModel, steps: Sequence[Step], windows: Windows | None) -> None:
    """Check all steps against the model, before the first is carried out."""
    gone: tuple[int, ...] = ()
    headless: tuple[int, ...] = ()  # layers without attention
    kinds: list[type[Step]] = []
    for step in steps:
        gone += step.removed
        if step.removed:
            check_removable(model)
        if SliceHidden in kinds and not isinstance(step, Sparsify | PruneWidth):
            raise ValueError(
                f"{step.kind} must not come after slice_hidden in a plan; remove, merge or drop in "
                "a plan before it"
            )
        if isinstance(step, Sparsify):
            check_step(model, step)
            check_data(step, windows)
        elif isinstance(step, MergeLayers):
            check_mergeable(model, step.merge, step.groups)
        elif isinstance(step, DropSublayers):
            check_droppable(model)
            headless += step.attention
        elif isinstance(step, PruneWidth):
            if {DropSublayers, PruneWidth} & {*kinds}:
                raise ValueError("prune width once, and before sublayers are dropped")
            check_width(model, step, windows, gone)
        elif isinstance(step, SliceHidden):
            if kinds:
                raise ValueError(
                    f"slice_hidden must be the first step of its plan, not after {kinds[-1].kind}; "
                    "apply the steps before it as a plan of their own"
                )
            check_slice(model, step, windows)
            if step.rotation == "shared":
                check_shared(model, step)
        check_leading(model, gone, headless)
        kinds.append(type(step))


@torch.no_grad()
def remove_layers(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Remove decoder layers in place, renumber the others and cut the config accordingly.

    Raises:
        ValueError: if an index does not exist or is repeated, no layer would be left, the model's
            config ties layers to their index or to each other, or the attention that would lead
            the cache was dropped.
        TypeError: if the decoder layers cannot be found.
    """
    old = decoder_layers(model)
    RemoveLayers(tuple(layers)).check(len(old))
    if not layers:
        return
    check_removable(model)
    check_leading(model, layers)
    restore_rwkv_scale(model)
    kept = [i for i in range(len(old)) if i not in set(layers)]
    first: Any = old[kept[0]]
    if hasattr(old[0], "pre_ln") and not hasattr(first, "pre_ln"):  # only of an RWKV's first block
        first.pre_ln = old[0].pre_ln
    parent, _, name = layers_path(model).rpartition(".")
    left = nn.ModuleList(old[i] for i in kept)
    setattr(model.get_submodule(parent), name, left)
    for index, layer in enumerate(left):
        for module in layer.modules():
            for attribute in INDEX_ATTRIBUTES:
                if isinstance(getattr(module, attribute, None), int):
                    setattr(module, attribute, index)
    cut_config(model.config, kept, len(old))


@torch.no_grad()
def merge_layers(
    model: PreTrainedModel, groups: Sequence[Sequence[int]], merge: str = "top"
) -> None:
    """Merge windows of decoder layers in place, each into its highest layer; see `merging.py`.

    Raises what `check_mergeable` and `remove_layers` do.
    """
    check_mergeable(model, merge, groups)
    check_removable(model)
    layers = decoder_layers(model)
    for group in groups:
        layers[group[-1]] = merged_layer(model, group, merge)
    remove_layers(model, [index for group in groups for index in group[:-1]])


def check_removable(model: PreTrainedModel) -> None:
    """Raise ValueError if the model ties decoder layers to their index or to each other."""
    if is_sliced(model):
        raise ValueError(
            "this model is sliced: each decoder layer hands on a width and a basis of its own; "
            "remove or merge layers first, then slice"
        )
    for name in REFUSED_FIELDS:
        if getattr(model.config, name, None):
            raise ValueError(
                f"{name}={getattr(model.config, name)} of {model.config.model_type} makes layers "
                "depend on each other or on their index; removing layers would change the others"
            )


def cut_config(config: PretrainedConfig, kept: Sequence[int], total: int) -> None:
    """Cut every per-layer field of a config in place to the kept layers.

    Lists of length `total` keep the entries of the kept layers; fields that count layers from the
    start, or list indices, are translated; regular spacing of mixture-of-experts layers, which
    removal breaks, is written out as a list.
    """
    values = config.to_dict()
    lists = {
        name: [value[i] for i in kept]
        for name, value in values.items()
        if isinstance(value, (list, tuple)) and len(value) == total
        if name not in (*OTHER_LISTS, "mlp_only_layers")  # indices
        if not isinstance(getattr(type(config), name, None), property)
    }
    counts = {
        name: sum(i < values[name] for i in kept)
        for name in COUNTING_FIELDS
        if isinstance(values.get(name), int)
    }
    config.num_hidden_layers = len(kept)
    for name, value in {**lists, **counts}.items():
        setattr(config, name, value)
    if "attention_types" in values:  # GPT-Neo derives attention_layers, cut above, from this
        config.attention_types = [[[kind], 1] for kind in config.attention_layers]
    step, dense = values.get("decoder_sparse_step"), values.get("mlp_only_layers")
    if isinstance(step, int) and isinstance(dense, list):  # some layers have no experts
        config.decoder_sparse_step = 1
        config.mlp_only_layers = [
            new for new, i in enumerate(kept) if i in dense or (i + 1) % step != 0
        ]
