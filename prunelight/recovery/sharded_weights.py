"""Weights in shards of FSDP2: sharding by decoder layer, and the shard that a process holds.

FSDP2 gathers the weights of one decoder layer while that layer runs. Embeddings, last norm and head
form the root group, gathered for the whole forward. The functions on tensors return unsharded
tensors unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from torch.distributed import all_reduce
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from prunelight.models.families.layers import decoder_layers


def shard(
    model: PreTrainedModel | PeftModel,
    mesh: DeviceMesh,
    same: Callable[[Any], Any],
    policy: MixedPrecisionPolicy | None = None,
) -> None:
    """Shard a model over a mesh of one dimension, in place, layer by layer.

    Args:
        model: has the same weights on all processes, except adapters, which start at random.
        mesh: device mesh of the processes that train.
        same: returns rank 0's argument on all processes.
        policy: types in which weights are gathered and gradients summed; None: as they are.
    """
    policy = policy or MixedPrecisionPolicy()
    plain: Any = model
    if isinstance(model, PeftModel):
        plain = model.get_base_model()
        trained = trained_parameters(model)
        rank_zero = same({name: p.detach().cpu() for name, p in trained.items()})
        for name, parameter in trained.items():
            parameter.data.copy_(rank_zero[name])
    for layer in decoder_layers(plain):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def load_trained(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load whole trained parameters into a sharded model, in place; all processes must call it."""
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, dict(weights), options=options)


def is_sharded(model: nn.Module) -> bool:
    """Return whether parameters of a model are cut into shards."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def gather_trained(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters on the CPU, unsharded; of a sharded model on rank 0 only."""
    trained = trained_parameters(model)
    if not any(isinstance(parameter, DTensor) for parameter in trained.values()):
        return {name: parameter.detach().cpu() for name, parameter in trained.items()}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    return {name: value for name, value in state.items() if name in trained}


def local_shard(tensor: Tensor) -> Tensor:
    """Return this process' shard of a tensor, which shares the tensor's memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def sum_over_shards(value: Tensor, like: Tensor) -> Tensor:
    """Sum a value over the processes that share `like`, in place; they all must call this.

    Each process computed `value` from its shard of `like`. If `like` is not sharded, the value
    stays the same.
    """
    if isinstance(like, DTensor):
        all_reduce(value, group=like.device_mesh.get_group())
    return value


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return the unsharded tensor; all processes that share the tensor must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(values: Tensor, like: Tensor) -> Tensor:
    """Return the part of unsharded `values` that matches this process' shard of `like`."""
    if not isinstance(like, DTensor):
        return values
    placed = distribute_tensor(
        values.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )
    return placed.to_local()
