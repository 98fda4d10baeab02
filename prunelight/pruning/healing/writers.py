"""Finds the matrix through which a decoder layer can be healed: its writer.

The writer is the last matrix of a layer whose outputs, times a fixed number, are added to the
states that the layer hands on. That is asked of the layer itself: a random matrix is put beside
each candidate, and what the layer then hands on must change by its product with the inputs. Layers
that norm what their MLP gives, or whose last matrices are experts, have no writer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from prunelight.calibration.layer_walk import LayerWalk
from prunelight.calibration.windows import Windows, split_windows
from prunelight.models.families.layers import decoder_layers, layers_path
from prunelight.models.families.matrices import Matrix, layer_matrices
from prunelight.models.families.own_classes.dropped_sublayers import gap_layers
from prunelight.pruning.healing.error_sums import token_weights
from prunelight.pruning.healing.held_out import is_held_out
from prunelight.scoring.remembered import remembered

# Share of a change that may be left unexplained: float32 has some 1e-6, bfloat16 some 1e-2.
_ROUNDING = 0.05
# Sizes of the products of the matrix beside, in units of the states. A norm adds larger products by
# a smaller number.
_SIZES = (0.3, 10.0)
_PROBE_TOKENS = 8
_ZEROS = 0.01  # a share of zeros from which on they are taken for an earlier run's, and kept


@dataclass(frozen=True, eq=False)
class Writer:
    """The last matrix of a layer that adds to the hidden states.

    Attributes:
        matrix: its place; the weight is (hidden_size, in_features) as viewed.
        scale: number that its outputs are multiplied by before they are added.
    """

    matrix: Matrix
    scale: float

    @property
    def weight(self) -> Tensor:
        """Return a view of the weight, (O, I)."""
        return self.matrix.views()[0]

    @contextmanager
    def watching(self) -> Iterator[list[Tensor]]:
        """Yield a list that gets the inputs of the matrix in each forward inside."""
        inputs: list[Tensor] = []

        def keep(module: nn.Module, args: Any) -> None:
            inputs.append(args[0].detach())

        handle = self.matrix.owner.register_forward_pre_hook(keep)
        try:
            yield inputs
        finally:
            handle.remove()

    def observe(
        self, forward: Callable[[], Tensor], target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what a fit of the matrix needs to know of some tokens.

        Args:
            forward: runs the writer's layer and returns its output, (B, T, D).
            target: states that the layer should hand on, (B, T, D).

        Returns:
            Inputs of the matrix (B, T, I); what is missing of its outputs (B, T, O); weights of the
            tokens (B, T), one over the norm of the target.
        """
        with self.watching() as inputs:
            output = forward()
        target = target.to(output.device).float()
        missing = (target - output.float()) / self.scale
        return inputs[0].reshape(*output.shape[:-1], -1), missing, token_weights(target)

    @torch.no_grad()
    def put(self, weight: Tensor) -> None:
        """Replace the weight (O, I) by another tensor; what shares its memory keeps the old one."""
        parameter: Any = self.matrix.parameter
        stored = weight.T if self.matrix.transposed else weight
        parameter.data = stored.to(parameter.device, parameter.dtype).contiguous()


def kept_zeros(weight: Tensor, sparse: bool = False) -> Tensor | None:
    """Return where a weight may change, bool of its shape, or None for everywhere.

    A few zeros by chance, such as those of rounding, do not make the fit a slow one.

    Args:
        weight: of a matrix.
        sparse: a plan put zeros into the model, so that each zero stays.
    """
    mask = weight != 0
    zeros = 1 - float(mask.float().mean())
    return mask if zeros > (0 if sparse else _ZEROS) else None


def writer_of(walk: LayerWalk, index: int) -> Writer | None:
    """Return the writer of the walk's current layer; None if the layer has none.

    Args:
        walk: at the layer, inside `walk.layers()`.
        index: of the layer.
    """
    matrix = _last_called(walk, layer_matrices(walk.model, index))
    scale = None if matrix is None or matrix.fused else _scale(walk, matrix)
    return None if matrix is None or scale is None else Writer(matrix, scale)


def _last_called(walk: LayerWalk, matrices: Sequence[Matrix]) -> Matrix | None:
    """Return the matrix whose module the walk's current layer calls last."""
    called: list[nn.Module] = []

    def note(module: nn.Module, args: Any) -> None:
        called.append(module)

    handles = [matrix.owner.register_forward_pre_hook(note) for matrix in matrices]
    try:
        walk.forward(0)
    finally:
        for handle in handles:
            handle.remove()
    last = called[-1] if called else None
    return next((matrix for matrix in matrices if matrix.owner is last), None)


def check_healable(model: PreTrainedModel, windows: Windows, mode: str) -> None:
    """Check that windows can be held out, and on a few tokens that layers can be healed.

    Mode "linear" needs layers that have writers, other modes none.

    Raises:
        ValueError: if there are too few windows to hold one out, or those hold no token.
        TypeError: if the first layer has no writer, or weights are quantized.
    """
    ids, mask = split_windows(windows)
    num_windows = len(ids)
    if num_windows < 2:
        raise ValueError(
            f"heal={mode!r} holds windows out to judge what it fits, and {num_windows} window is "
            "given; calibrate on 2 windows or more, better on 16"
        )
    held_out = is_held_out(torch.arange(num_windows), num_windows)
    if mask is not None and not bool(mask.cpu()[held_out].any()):
        raise ValueError(
            f"heal={mode!r} holds every fourth window out to judge what it fits, and these hold "
            "padding alone; leave windows without text out"
        )
    if first_writer(model, windows) is None and mode == "linear":
        raise TypeError(
            f"layers of {model.config.model_type} cannot be healed in closed form: no matrix of "
            "theirs adds to the hidden states as it is (a norm or experts stand behind the last); "
            "train the layers by heal='layer', or leave heal out"
        )


@torch.no_grad()
@remembered
def first_writer(model: PreTrainedModel, windows: Windows) -> str | None:
    """Return where the first layer without a matrix behind it has its writer; None: it has none.

    That is the path of the matrix within the layer, such as "mlp.down_proj". It is found on a few
    tokens of the first window.

    Raises:
        TypeError: if layers cannot be run one by one, or weights are quantized.
    """
    few = split_windows(windows)[0][:1, :_PROBE_TOKENS].clone()
    writer, at_gaps, path = None, gap_layers(model.config), layers_path(model)
    with LayerWalk(model, few) as walk:
        for index, _ in walk.layers():
            if index not in at_gaps:
                writer = writer_of(walk, index)
                break
            if index + 1 < len(decoder_layers(model)):
                walk.advance()
    return None if writer is None else writer.matrix.name.removeprefix(f"{path}.{index}.")


def _scale(walk: LayerWalk, matrix: Matrix) -> float | None:
    """Return by which number the outputs of a matrix enter what the layer hands on, or None."""
    weight = matrix.views()[0]
    with Writer(matrix, 1.0).watching() as inputs:
        plain = walk.forward(0).float()
    if len(weight) != plain.shape[-1]:
        return None
    drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).to(weight)
    norms = [plain.norm(), linear(inputs[0], drawn).float().norm()]
    state, product = (norm.item() for norm in walk.group.sum(torch.stack(norms)))
    if not 0 < product < math.inf:
        return None
    drawn *= state / product
    scales = [_scale_beside(walk, matrix, plain, size * drawn) for size in _SIZES]
    small, large = scales
    if small is None or large is None or not math.isclose(small, large, rel_tol=_ROUNDING):
        return None
    return large


def _scale_beside(walk: LayerWalk, matrix: Matrix, plain: Tensor, beside: Tensor) -> float | None:
    """Return by which number the products of a matrix that is put beside another one are added.

    Args:
        walk: at the layer.
        matrix: the other one.
        plain: what the layer hands on without it, float32 (B, T, D).
        beside: the matrix that is put beside, (O, I).

    Returns:
        None if what is added is no multiple of the products.
    """
    products: list[Tensor] = []

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        products.append(linear(args[0], beside))
        return output + products[-1]

    handle = matrix.owner.register_forward_hook(add)
    try:
        difference = (walk.forward(0).float() - plain).flatten()
    finally:
        handle.remove()
    if len(products) != 1 or products[0].numel() != len(difference):
        return None
    product = products[0].float().flatten()
    sums = torch.stack([difference @ product, product @ product, difference @ difference])
    shared, own, total = walk.group.sum(sums).tolist()
    if not (0 < own < math.inf and 0 < total < math.inf):
        return None
    unexplained = max(0.0, total - shared * shared / own)
    return shared / own if unexplained <= _ROUNDING**2 * total else None
