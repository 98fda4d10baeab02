"""Quantizes a model by GPTQ, layer by layer, each on the output of the quantized layers before it.

What is left in full precision: embeddings, head, norms, routers, and weights that the code around
their module reads itself. Models whose matrices are no modules of their own are refused: the packed
form has no place for them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelight.calibration.layer_inputs.input_statistics import InputStatistics
from prunelight.calibration.layer_walk import LayerWalk
from prunelight.calibration.statistics import Hessian
from prunelight.calibration.windows import Windows
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.matrices import Matrix, layer_matrices, matrices, naming_matrices
from prunelight.models.packed.grids import (
    PER_ROW,
    WeightGrid,
    check_package,
    describe_grids,
    set_grid,
)
from prunelight.models.sizes import is_quantized
from prunelight.pruning.rounding.gptq import GPTQ, each_input, gptq, grid_scale, nearest_on_grid
from prunelight.runtime.processes import Job

log = logging.getLogger(__name__)

GROUP_SIZES = (128, 64, 32)  # that the kernels of vLLM have


@dataclass
class Quantized:
    """What a quantization did.

    Attributes:
        bits: of a weight.
        group_size: inputs that share a scale; -1 for one scale a row.
        share: of all parameters that has few bits now.
        zeros: weights of these matrices that were zero before, and are zero still.
        notes: warnings of the run.
    """

    bits: int
    group_size: int
    share: float = 0.0
    zeros: int = 0
    notes: list[str] = field(default_factory=list)


def check_quantizable(model: PreTrainedModel, settings: GPTQ) -> GPTQ:
    """Check that a model can be quantized; return the settings with their group size.

    Raises:
        TypeError: if the model is quantized already, or a matrix is no linear module.
        ValueError: if groups do not divide the inputs of a matrix; names it.
    """
    if is_quantized(model):
        raise TypeError(
            f"model {model.config._name_or_path!r} is quantized already; give the one in full "
            "precision"
        )
    known = [matrix for matrix in matrices(model).values() if not matrix.read_directly]
    if getattr(model.config, "rescale_every", 0):
        raise TypeError(
            f"{model.config.model_type} divides its weights itself (rescale_every="
            f"{model.config.rescale_every}), which packed weights do not allow; set "
            "rescale_every=0, or quantize by another program, such as --to gguf"
        )
    for matrix in known:
        owner: Any = type(matrix.owner)
        if matrix.fused or owner.forward is not nn.Linear.forward:
            what = "experts in one tensor" if matrix.fused else owner.__name__
            raise TypeError(
                f"{matrix.name} of {model.config.model_type} is {what}, and GPTQ stores linear "
                "modules only; quantize this family by another program, such as --to gguf"
            )
    if not known:
        raise TypeError(f"{model.config.model_type} has no linear module that GPTQ could quantize")
    return replace(settings, group_size=_group_size(known, settings.group_size))


def _group_size(known: Sequence[Matrix], asked: int | None) -> int:
    widths = {matrix.name: matrix.in_features for matrix in known}
    fitting = [size for size in GROUP_SIZES if not any(w % size for w in widths.values())]
    size = (fitting or [PER_ROW])[0] if asked is None else asked
    odd = [name for name, width in widths.items() if size != PER_ROW and width % size]
    if odd:
        remedy = f"group_size={fitting[0]}" if fitting else f"group_size={PER_ROW}, a scale a row"
        raise ValueError(
            f"group_size={size} must divide the {widths[odd[0]]} inputs of {odd[0]} "
            f"({len(odd)} such matrices); give {remedy}"
        )
    return size


@torch.no_grad()
def quantize_gptq(
    model: PreTrainedModel,
    windows: Windows,
    settings: GPTQ = GPTQ(),  # noqa: B008 (frozen)
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    offload: bool = False,
) -> Quantized:
    """Quantize the decoder layers of a model, in place; `prunelight.save` then packs them.

    Args:
        model: in full precision, dense or pruned; its zeros stay zeros.
        windows: calibration windows.
        settings: see `GPTQ`.
        dtype: in which scales will be stored; None takes the model's.
        device: where the layers compute; None takes the model's own.
        offload: keep the calibration states on the CPU.

    Raises:
        ImportError: if compressed-tensors is missing.
        TypeError, ValueError: see `check_quantizable`; nothing has changed then. Also if
            activations are NaN or Inf; names the matrix.
    """
    check_package("GPTQ")
    settings = check_quantizable(model, settings)
    assert settings.group_size is not None
    grid = WeightGrid(settings.bits, settings.group_size)
    done = Quantized(settings.bits, settings.group_size)
    total = sum(parameter.numel() for parameter in model.parameters())
    with LayerWalk(
        model, windows, device=device, offload=offload, label=f"GPTQ, {settings.bits} bits"
    ) as walk:
        for index, _ in walk.layers():
            chosen = [m for m in layer_matrices(model, index) if not m.read_directly]
            inputs = InputStatistics(chosen, Hessian)
            for batch in range(len(walk.states)):
                with inputs.watching(walk.masks[batch]):
                    walk.forward(batch)
            inputs.pool(walk.group)
            done.zeros += sum(int((matrix.parameter == 0).sum()) for matrix in chosen)
            for matrix in inputs.idle():
                _note(done, f"{matrix.name} was not used by any text: rounded to the nearest")
                _round([matrix], _on_grid([matrix], grid, dtype or model.dtype), None, settings)
            jobs = []
            for group in inputs.groups():
                scale = _on_grid(group, grid, dtype or model.dtype)
                (statistic,), views = inputs.of(group[0]), [matrix.views()[0] for matrix in group]
                with naming_matrices(*group):
                    statistic.norms()  # raises if an input was NaN or Inf, on all ranks alike
                cost = len(scale) * group[0].in_features ** 2
                jobs.append(
                    Job(float(cost), views, partial(_round, group, scale, statistic, settings))
                )
            walk.group.do_shared(jobs)
            done.share += sum(matrix.parameter.numel() for matrix in chosen) / total
            if index + 1 < len(decoder_layers(model)):
                walk.advance()
    model.config.quantization_config = describe_grids(model)
    log.info(
        "quantized %.1f%% of the parameters to %d bits in groups of %s",
        *(100 * done.share, done.bits, "a row" if grid.group_size == PER_ROW else grid.group_size),
    )
    return done


def _on_grid(group: Sequence[Matrix], grid: WeightGrid, dtype: torch.dtype) -> Tensor:
    """Note the grids that matrices will lie on; return their scales, (all O, G)."""
    scales = [grid_scale(matrix.views()[0], grid, dtype) for matrix in group]
    for matrix, scale in zip(group, scales, strict=True):
        assert isinstance(matrix.owner, nn.Linear)
        set_grid(matrix.owner, grid, scale)
    return torch.cat(scales)


@torch.no_grad()
def _round(
    group: Sequence[Matrix], scale: Tensor, statistic: Hessian | None, settings: GPTQ
) -> None:
    """Round matrices that share an input, in place; without a statistic to the nearest value.

    Args:
        group: the matrices.
        scale: of `_on_grid`.
        statistic: of their input.
        settings: see `GPTQ`.

    Raises:
        ValueError: if a weight or an input is NaN or Inf; names the matrices.
    """
    views = [matrix.views()[0] for matrix in group]
    weight = torch.cat(views)
    with naming_matrices(*group):
        if statistic is None:
            steps = each_input(scale, weight.shape[1])
            rounded = nearest_on_grid(weight.float(), steps, settings.bits)
        else:
            rounded = gptq(weight, statistic.result().to(weight.device), scale, settings)
    for view, part in zip(views, rounded.split([len(view) for view in views]), strict=True):
        view.copy_(part)


def _note(done: Quantized, text: str) -> None:
    log.warning(text)
    done.notes.append(text)
