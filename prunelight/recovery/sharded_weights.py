"""Weights that FSDP2 holds in shards: sharding by decoder layer, and what a rank has of a tensor.

Each decoder layer is a group of its own, gathered while it runs; embeddings, last norm and head
are those of the root. Without sharding the functions on tensors return what they are given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from torch.distributed import all_reduce
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from prunelight.models.families.layers import decoder_layers


def shard(model: PreTrainedModel | PeftModel, mesh: DeviceMesh, same: Callable[[Any], Any]) -> None:
    """Shard a model over a mesh of one dimension, in place, layer by layer.

    Args:
        model: the same on all ranks but for the adapters, which start from random numbers.
        mesh: of the ranks that train.
        same: returns on all ranks what rank 0 gives it.
    """
    plain: Any = model
    if isinstance(model, PeftModel):
        plain = model.get_base_model()
        trained = trained_parameters(model)
        first = same({name: p.detach().cpu() for name, p in trained.items()})
        for name, parameter in trained.items():
            parameter.data.copy_(first[name])
    for layer in decoder_layers(plain):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def gather_trained(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole trained parameters on the CPU: of a sharded model on rank 0 only."""
    trained = trained_parameters(model)
    if not any(isinstance(parameter, DTensor) for parameter in trained.values()):
        return {name: parameter.detach().cpu() for name, parameter in trained.items()}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    found: dict[str, Any] = get_model_state_dict(model, options=options)
    return {name: value for name, value in found.items() if name in trained}


def local_shard(tensor: Tensor) -> Tensor:
    """Return what this rank has of a tensor; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def sum_over_shards(value: Tensor, like: Tensor) -> Tensor:
    """Add up what each rank computed from its part of `like`, in place; a whole one has one part.

    All ranks that share `like` must call it.
    """
    if isinstance(like, DTensor):
        all_reduce(value, group=like.device_mesh.get_group())
    return value


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return the whole tensor; all ranks must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(values: Tensor, like: Tensor) -> Tensor:
    """Return of a whole tensor the part that this rank has of `like`, which has the same shape."""
    if not isinstance(like, DTensor):
        return values
    placed = distribute_tensor(
        values.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )
    return placed.to_local()
