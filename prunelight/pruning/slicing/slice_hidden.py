"""Slicing: rotate the hidden states to their principal components and keep the first ones.

SliceGPT (arXiv:2401.15024). A norm without weight commutes with rotations. So the weights of the
norms go into the projections behind them, and each site of the residual stream has a rotation Q of
its own. Shortcuts Q_before^T Q_after carry the residual from one site to the next. Layers are
sliced in order: each PCA reads the output of the sliced layers before it. Decompositions and
products of rotations are computed in float64 and cast once.

Three differences from the released code: the last site keeps the dense basis, since nothing is
sliced there; embeddings lose their mean only before LayerNorms; a layer runs once.
"""

# B sequences, T tokens, D hidden, d sliced, O out_features, I in_features

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelight.calibration.layer_walk import LayerWalk
from prunelight.calibration.statistics import Gram
from prunelight.calibration.windows import Windows, split_windows
from prunelight.models.families.config_fields import head_dim
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.matrices import layer_matrices
from prunelight.models.families.own_classes.layer_widths import PREFIX as WIDTHS_PREFIX
from prunelight.models.families.own_classes.registration import take_class
from prunelight.models.families.own_classes.sliced import (
    CLASSES,
    FAMILIES,
    LAYERS,
    PREFIX,
    Shortcut,
    embeddings_of,
    last_norm,
    stack_of,
    strip_last_norm,
    strip_norms,
)
from prunelight.planning.steps import SliceHidden
from prunelight.pruning.slicing.basis import (
    principal_components,
    random_rotation,
    read_basis,
    signal_of,
    write_basis,
)
from prunelight.runtime.devices import float64_device


@dataclass
class SliceOutcome:
    """What a slice step did.

    Attributes:
        explained_variance: share of the signal's energy in the components that are kept, at each
            of the 2 L + 1 sites (a shared rotation has one value).
    """

    explained_variance: list[float] = field(default_factory=list)


def check_sliceable(model: PreTrainedModel) -> None:
    """Check that the hidden states of the model can be sliced.

    Raises:
        TypeError: if its family has no sliced class, a norm follows its sublayers, or weights are
            quantized.
    """
    config: Any = model.config
    if config.model_type not in FAMILIES:
        why = "is sliced already" if config.model_type.startswith(PREFIX) else "has no sliced class"
        if config.model_type.startswith(WIDTHS_PREFIX):
            why = "has layers of different widths, which cannot be sliced"
        if config.model_type in ("gemma2", "gemma3_text", "olmo2"):
            why = "has norms after its sublayers, which do not commute with rotations"
        raise TypeError(f"{config.model_type} {why}; families that can be sliced: {FAMILIES}")
    if config.model_type == "opt" and not (
        config.do_layer_norm_before
        and not config._remove_final_layer_norm
        and config.word_embed_proj_dim == config.hidden_size
        and (config.enable_bias or not config.layer_norm_elementwise_affine)
    ):
        raise TypeError(
            "this OPT has norms after its sublayers, projected embeddings (as opt-350m) or no "
            "biases for those of its norms; it cannot be sliced"
        )
    layer_matrices(model, 0)  # refuses quantized weights
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise TypeError(
            "accelerate placed this model (device_map); load it without, onto the CPU: slicing "
            "takes one layer at a time to `device`"
        )


def check_slice(model: PreTrainedModel, step: SliceHidden, windows: Windows | None) -> None:
    """Check a slice step against a model.

    Raises:
        ValueError: if a width is above the model's, the last one below it, or windows are missing
            or hold too few tokens.
        TypeError: see `check_sliceable`.
    """
    check_sliceable(model)
    hidden, dims = model.config.hidden_size, step.residual_dims
    if (widest := max(dims)) > hidden:
        site = dims.index(widest)
        raise ValueError(f"residual_dims[{site}]={widest} must be at most hidden_size={hidden}")
    if step.rotation == "per_layer" and dims[-1] != hidden:
        raise ValueError(
            f"residual_dims[{len(dims) - 1}]={dims[-1]} must be hidden_size={hidden}, which the "
            "head reads; rotation='shared' can cut it too"
        )
    if windows is None:
        raise ValueError("slicing needs calibration windows; pass them to apply")
    check_tokens(model, windows, dims[0] if step.rotation == "per_layer" else None)


def check_tokens(model: PreTrainedModel, windows: Windows, entry: int | None = None) -> None:
    """Check that the windows hold enough tokens for as many components as the model is wide.

    Args:
        model: to be sliced.
        windows: calibration windows (N, T), or with an attention_mask.
        entry: width of the embeddings afterwards, if known. Sliced embeddings need as many
            different tokens, unless positions are added to them.

    Raises:
        ValueError: if the windows hold fewer.
    """
    ids, mask = split_windows(windows)
    counted, needed = ids if mask is None else ids[mask.bool()], model.config.hidden_size
    if counted.numel() < needed:
        raise ValueError(
            f"{counted.numel()} calibration tokens are too few for the {needed} principal "
            f"components of hidden_size={needed}; give at least {needed} tokens, better ten times "
            "as many"
        )
    different = counted.unique().numel()
    if len(embeddings_of(model)) == 1 and different < (entry or 0) < needed:
        raise ValueError(
            f"{different} different calibration tokens are too few for embeddings of width "
            f"{entry}; give text with at least {entry}, or embedding='full'"
        )


@torch.no_grad()
def slice_hidden(
    model: PreTrainedModel,
    step: SliceHidden,
    windows: Windows,
    *,
    device: torch.device | None = None,
    offload: bool = False,
) -> SliceOutcome:
    """Carry out a slice step that `check_slice` passed, in place, with a rotation a site.

    Model and config take the sliced class of the family.

    Args:
        model: the dense model.
        step: with rotation "per_layer".
        windows: calibration windows (N, T), or with an attention_mask.
        device: where the layers compute, one at a time.
        offload: keep the calibration states on the CPU.

    Raises:
        ValueError: if states are NaN or Inf, or have fewer components than are kept (named).
            Earlier layers are sliced by then.
    """
    config: Any = model.config
    family, training = config.model_type, model.training
    with LayerWalk(model, windows, device=device, offload=offload, label="slice") as walk:
        slicer = Slicer(walk, step)
        layers = decoder_layers(model)
        for index, layer in slicer.layers():
            layers[index] = layer.to(walk.home)
    if config.tie_word_embeddings and step.residual_dims[0] < config.hidden_size:
        untie(model)
    if not config.tie_word_embeddings:
        for embedding in embeddings_of(model):
            read_basis(embedding, None, slicer.entry)
        norm = getattr(stack_of(model), last_norm(model))
        strip_last_norm(model)
        dense = slicer.dense_basis() if slicer.centered else None
        read_basis(model.lm_head, norm, dense, offset=LAYERS[family].norm_offset)
    config.head_dim = head_dim(config)  # explicit, for readers that divide widths
    config.residual_dims = list(step.residual_dims)
    take_class(model, CLASSES[family])
    model._no_split_modules = {LAYERS[family].__name__}
    model.train(training)
    return SliceOutcome(slicer.explained)


def untie(model: PreTrainedModel) -> None:
    """Give the head weights of its own, in place."""
    head: Any = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
    model.config.tie_word_embeddings = False
    untyped: Any = model
    untyped.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


class Slicer:
    """Slices one decoder layer after another of a walk; the model itself does not change.

    Attributes:
        entry: basis of the embeddings, (D, d) float64.
        explained: share of the energy that is kept, one number for each site so far.

    Args:
        walk: at the entrance of the first layer.
        step: how wide each site becomes.
        counted: tokens whose states give the components, bool (B, T) for each micro-batch; None
            takes all but padding.
    """

    def __init__(
        self, walk: LayerWalk, step: SliceHidden, counted: Sequence[Tensor] | None = None
    ) -> None:
        self.walk, self.step, self.config = walk, step, walk.model.config
        self.counted = walk.positions() if counted is None else counted
        self.place = float64_device(walk.device)
        self.centered = isinstance(
            getattr(stack_of(walk.model), last_norm(walk.model)), nn.LayerNorm
        )
        self.explained: list[float] = []
        self._generator = torch.Generator().manual_seed(step.seed)
        whole_embeddings = step.residual_dims[0] == self.config.hidden_size
        self._tied = whole_embeddings and self.config.tie_word_embeddings
        if whole_embeddings:
            self.entry = self.dense_basis()
            self.explained.append(1.0)
        else:
            self.entry = self._principal()
        if not self._tied:
            self._map_states(lambda batch, state: self._rotate(state, self.entry))

    def dense_basis(self) -> Tensor:
        """Return the basis of the dense model, (D, D): the identity, less the mean for LayerNorms.

        LayerNorms subtract the mean of a state, so the basis leaves it out.
        """
        return self._without_mean(
            torch.eye(self.config.hidden_size, dtype=torch.float64, device=self.place)
        )

    def layers(self) -> Iterator[tuple[int, nn.Module]]:
        """Yield each decoder layer, sliced, on the compute device; the walk's states follow.

        Raises:
            ValueError: if states are NaN or Inf, or have fewer components than are kept.
        """
        basis = self.entry
        for index, dense in self.walk.layers():
            layer: Any = copy.deepcopy(dense, {id(self.config): self.config})
            norms = LAYERS[self.config.model_type]
            attention_norm = getattr(layer, norms.attention_norm)
            mlp_norm = getattr(layer, norms.mlp_norm)
            strip_norms(layer, self.config, whole=self._tied and index == 0)

            for name in layer.attention_inputs:
                linear = layer.get_submodule(name)
                read_basis(linear, attention_norm, basis, offset=norms.norm_offset)
            layer.attn_shortcut = self._shortcut(dense, basis, None)
            self._map_states(partial(self.walk.call, layer.attend, index))
            inside = self._next_basis()
            write_basis(layer.get_submodule(layer.attention_output), inside)
            layer.attn_shortcut = self._shortcut(dense, basis, inside)

            for name in layer.mlp_inputs:
                linear = layer.get_submodule(name)
                read_basis(linear, mlp_norm, inside, offset=norms.norm_offset)
            layer.mlp_shortcut = self._shortcut(dense, inside, None)
            self._map_states(partial(self._feed, layer))
            basis = self._next_basis()
            write_basis(layer.get_submodule(layer.mlp_output), basis)
            layer.mlp_shortcut = self._shortcut(dense, inside, basis)
            yield index, layer.train(dense.training)

    def _next_basis(self) -> Tensor:
        """Return the basis of the next site and rotate the states, which have the dense basis."""
        last = len(self.explained) == len(self.step.residual_dims) - 1
        basis = self.dense_basis() if last else self._principal()
        if last:
            self.explained.append(1.0)
        if not last or self.centered:
            self._map_states(lambda batch, state: self._rotate(state, basis))
        return basis

    def _principal(self) -> Tensor:
        """Return the first principal components of the states at the next site, (D, d)."""
        site = len(self.explained)
        gram = Gram(self.config.hidden_size)
        for state, counted in zip(self.walk.states, self.counted, strict=True):
            states = state.to(counted.device)[counted].to(self.place)
            gram.update(signal_of(states, self.step.signal, centered=self.centered))
        gram.pool(self.walk.group)
        width = self.step.residual_dims[site]
        try:
            basis, explained = principal_components(gram.result(), width)
        except ValueError as error:
            raise ValueError(f"residual_dims[{site}]={width}: {error}") from error
        self.explained.append(explained)
        if self.step.orientation == "random":
            basis = basis @ random_rotation(width, self._generator).to(basis)
        return self._without_mean(basis)

    def _without_mean(self, basis: Tensor) -> Tensor:
        return basis - basis.mean(0) if self.centered else basis

    def _feed(self, layer: Any, batch: int, state: Tensor) -> Tensor:
        """Return the states after the MLP of a layer."""
        output: Tensor = layer.feed(state.to(self.walk.device))
        return output

    def _rotate(self, state: Tensor, basis: Tensor) -> Tensor:
        state = state.to(self.walk.device)
        return (state.float() @ basis.to(state.device, torch.float32)).to(state.dtype)

    def _map_states(self, call: Callable[[int, Tensor], Tensor]) -> None:
        """Replace the states of each micro-batch by call(number of the micro-batch, states)."""
        for batch, state in enumerate(self.walk.states):
            self.walk.states[batch] = call(batch, state).to(self.walk.store)

    def _shortcut(self, dense: nn.Module, before: Tensor, after: Tensor | None) -> Shortcut:
        """Return the shortcut from one basis to another; None is the dense basis."""
        like = next(dense.parameters())
        weight = before if after is None else after.T @ before  # (out, in)
        out_features, in_features = weight.shape
        shortcut = Shortcut(in_features, out_features, bias=False, device="meta")
        shortcut.weight = nn.Parameter(weight.to(like))
        return shortcut
