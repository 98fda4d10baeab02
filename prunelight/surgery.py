"""Carrying out a plan: `apply(model, plan, windows)`.

Removing layers changes more than a list: every layer keeps its own index for the cache, configs
hold one entry a layer or count layers, and an RWKV's first block has a norm that no other has. All
of it follows here, so that the result is a stock model that its own config describes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
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
# Config fields that list layer indices.
LISTING_FIELDS = ("mlp_only_layers",)
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
    before = parameter_count(model)
    removed: set[int] = set()  # the plan counts the layers of the dense model
    for step in plan.steps:
        if isinstance(step, RemoveLayers):
            remove_layers(model, [renumber(i, removed) for i in step.layers])
        elif isinstance(step, MergeLayers):
            groups = [[renumber(i, removed) for i in group] for group in step.groups]
            merge_layers(model, groups, step.merge)
        elif isinstance(step, DropSublayers):
            attention, mlp = ([renumber(i, removed) for i in x] for x in (step.attention, step.mlp))
            drop_sublayers(model, attention, mlp)
        elif isinstance(step, PruneWidth):
            prune_width(model, step, windows, removed=removed, device=device, offload=offload)
        elif isinstance(step, SliceHidden):
            assert windows is not None  # check_slice
            carry_out = share_rotation if step.rotation == "shared" else slice_hidden
            sliced = carry_out(model, step, windows, device=device, offload=offload)
            if outcomes is not None:
                outcomes.append(asdict(sliced))
        elif isinstance(step, Sparsify):
            names = renumbered(step.sparsity, layers_path(model), removed)
            left = {new: step.sparsity[old] for old, new in names.items()}
            step = replace(step, sparsity=left)
            outcome = sparsify(model, step, windows, device=device, offload=offload)
            if outcomes is not None:
                outcomes.append(asdict(outcome))
        else:
            raise TypeError(f"no surgery is known for the step {step!r}")
        removed |= set(step.removed)
    after = parameter_count(model)
    log.info(
        "parameters %.1fM -> %.1fM (%+.1f %%)",
        before / 1e6,
        after / 1e6,
        100 * (after / before - 1),
    )
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

    Args:
        model: any causal language model whose decoder layers can be found.
        layers: indices to remove; none is allowed and changes nothing.

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
    _move_first_norm(old[0], old[kept[0]])
    parent, _, name = layers_path(model).rpartition(".")
    left = nn.ModuleList(old[i] for i in kept)
    setattr(model.get_submodule(parent), name, left)
    _renumber(left)
    cut_config(model.config, kept, len(old))


@torch.no_grad()
def merge_layers(
    model: PreTrainedModel, groups: Sequence[Sequence[int]], merge: str = "top"
) -> None:
    """Merge windows of decoder layers in place, each into its highest layer; see `merging.py`.

    Raises:
        ValueError: as `remove_layers`.
        TypeError: if the layers of a window cannot be mixed, or weights are quantized.
    """
    check_mergeable(model, merge, groups)
    check_removable(model)
    layers = decoder_layers(model)
    for group in groups:
        layers[group[-1]] = merged_layer(model, group, merge)
    remove_layers(model, [index for group in groups for index in group[:-1]])


def check_removable(model: PreTrainedModel) -> None:
    """Check that decoder layers can be removed without changing what the others compute.

    Raises:
        ValueError: if the model's config ties layers to their index or to each other.
    """
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


def _move_first_norm(first: nn.Module, new_first: nn.Module) -> None:
    """Give the norm that only an RWKV's first block has to the block that is first from now on."""
    if first is not new_first and hasattr(first, "pre_ln") and not hasattr(new_first, "pre_ln"):
        new_first.pre_ln = first.pre_ln


def _renumber(layers: nn.ModuleList) -> None:
    for index, layer in enumerate(layers):
        for module in layer.modules():
            for attribute in INDEX_ATTRIBUTES:
                if isinstance(getattr(module, attribute, None), int):
                    setattr(module, attribute, index)


def cut_config(config: PretrainedConfig, kept: Sequence[int], total: int) -> None:
    """Cut every per-layer field of a config in place to the kept layers.

    Lists of length `total` keep the entries of the kept layers; fields that count layers from the
    start, or list indices, are translated; regular spacing of mixture-of-experts layers, which
    removal breaks, is written out as a list.
    """
    values = config.to_dict()
    settable = {
        name for name in values if not isinstance(getattr(type(config), name, None), property)
    }
    lists = {
        name: [value[i] for i in kept]
        for name, value in values.items()
        if name in settable and isinstance(value, (list, tuple)) and len(value) == total
        if name not in (*LISTING_FIELDS, *OTHER_LISTS)
    }
    counts = {
        name: sum(i < values[name] for i in kept)
        for name in COUNTING_FIELDS
        if isinstance(values.get(name), int)
    }
    dense = _dense_layers(values, total)
    config.num_hidden_layers = len(kept)
    for name, value in {**lists, **counts}.items():
        setattr(config, name, value)
    if "attention_types" in values:  # GPT-Neo derives attention_layers, cut above, from this
        config.attention_types = [[[kind], 1] for kind in config.attention_layers]
    if dense is not None:
        config.decoder_sparse_step = 1
        config.mlp_only_layers = [new for new, i in enumerate(kept) if i in dense]


def _dense_layers(values: dict[str, object], total: int) -> set[int] | None:
    """Return which layers of a mixture-of-experts model are dense; None for other models."""
    step, listed = values.get("decoder_sparse_step"), values.get("mlp_only_layers")
    if not isinstance(step, int) or not isinstance(listed, list):
        return None
    return {i for i in range(total) if i in listed or (i + 1) % step != 0}
