"""Count what a forward does: multiply-adds, and the weights that it reads.

Every operation that torch runs is seen, so nothing is known of a family: sliced and narrow layers,
experts that a token skips and tables of which it reads a row count as what they compute. Products
count, with torch's own formulas of `torch.utils.flop_counter`. Element-wise work does not, such as
the scan of Mamba and RWKV.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count
from transformers import PreTrainedModel

from prunelight.models.families.layers import decoder_layers

_ATEN: Any = torch.ops.aten

# Operations that read only the rows that they give back.
_GATHERS = (_ATEN.embedding, _ATEN.index, _ATEN.index_select, _ATEN.gather)

# Fields in which the output of a model holds what the next token needs.
_CACHES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")


@dataclass(frozen=True)
class Work:
    """What one forward did.

    Attributes:
        multiply_adds: of all products.
        decoder_multiply_adds: of those inside the decoder layers; all, where these are not found.
        weights_read: elements of parameters and buffers, once for each time that they are read.
        weight_bytes_read: their bytes.
        cache_bytes: of the keys, values and states that the forward left for the next token.
    """

    multiply_adds: int
    decoder_multiply_adds: int
    weights_read: int
    weight_bytes_read: int
    cache_bytes: int


@contextmanager
def counting_work(model: PreTrainedModel) -> Iterator[list[Work]]:
    """Yield a list that grows by the work of each forward of the model."""
    found: list[Work] = []
    count = _Count(model)
    in_layers, starts = [0], [0]

    def enter(module: nn.Module, args: Any) -> None:
        starts.append(count.multiply_adds)

    def leave_layer(module: nn.Module, args: Any, output: Any) -> None:
        in_layers[0] += count.multiply_adds - starts.pop()

    def leave_packed(module: nn.Module, args: Any, output: Any) -> None:
        # Code that unpacks weights computes in ways of its own; the product is what counts.
        count.multiply_adds = starts.pop() + output.numel() * module.in_features

    def begin(module: nn.Module, args: Any) -> None:
        count.start()
        in_layers[0] = 0

    def end(module: nn.Module, args: Any, output: Any) -> None:
        layers = in_layers[0] if stack else count.multiply_adds
        caches = [output.get(name) for name in _CACHES] if hasattr(output, "get") else []
        work = (count.multiply_adds, layers, count.elements, count.bytes)
        found.append(Work(*work, sum(_tensor_bytes(caches).values())))

    stack = _layers(model)
    packed = [module for module in model.modules() if _is_packed(module)]
    with ExitStack() as undo:
        for module, before, after in (
            *((layer, enter, leave_layer) for layer in stack),
            *((linear, enter, leave_packed) for linear in packed),
            (model, begin, end),
        ):
            undo.callback(module.register_forward_pre_hook(before).remove)
            undo.callback(module.register_forward_hook(after).remove)
        undo.enter_context(count)
        yield found


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    try:
        return [*decoder_layers(model)]
    except TypeError:
        return []


def _is_packed(module: nn.Module) -> bool:
    """Return whether a module is a linear of 4 or 8 bits."""
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) and weight is not None and not weight.is_floating_point()


class _Count(TorchDispatchMode):
    """Adds up the multiply-adds of every operation, and the weights that it reads."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.start()

    def start(self) -> None:
        """Count anew; a first forward may move weights, as that of bitsandbytes on a CPU does."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        self.weights = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.multiply_adds = self.elements = self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        packet = func._overloadpacket
        formula = _FORMULAS.get(packet) or flop_registry.get(packet)
        if formula is not None:
            self.multiply_adds += formula(*args, **kwargs, out_val=output) // 2
        results = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if func.is_view or not results:
            return output
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() in self.weights:
                elements = _elements_read(packet, tensor, results[0], args, kwargs)
                self.elements += elements
                self.bytes += elements * tensor.element_size()
        return output


def _elements_read(
    packet: Any, weight: Tensor, output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> int:
    """Return how many elements of a weight an operation reads."""
    if packet in _GATHERS:
        return min(output.numel(), weight.numel())
    if packet is _ATEN._grouped_mm and weight.ndim == 3:  # a stack of experts
        ends = _ends(*args, **kwargs)
        groups = int((ends.diff(prepend=ends.new_zeros(1)) > 0).sum())
        return groups * weight[0].numel()
    shape = zip(weight.shape, weight.stride(), strict=True)
    return int(torch.Size(size for size, stride in shape if stride).numel())  # not repeats


def _ends(rows: Tensor, weights: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """Return where the rows of each group end."""
    assert offs is not None  # a product of 2-D and 3-D tensors has groups
    return offs


def _grouped_flops(*args: Any, out_val: Any, **kwargs: Any) -> int:
    """Return the FLOPs of a grouped product (T, K) x (G, K, N); rows after the last group idle."""
    rows, weights = args[:2]
    if rows.ndim == 2 and weights.ndim == 3:
        return 2 * int(_ends(*args, **kwargs)[-1]) * weights.shape[1] * weights.shape[2]
    return 2 * out_val.numel() * int(rows.shape[-1])


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Return the FLOPs of attention over all pairs of positions, also those that a mask hides."""
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


# Operations for which torch has no formula: (arguments, out_val) -> FLOPs.
_FORMULAS = {
    _ATEN._grouped_mm: _grouped_flops,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
}


def cache_bytes_in(value: Any) -> int:
    """Return the bytes of the keys, values and states in the arguments of a layer or model."""
    caches = [x for x in tree_leaves(value) if not isinstance(x, Tensor)]
    return sum(_tensor_bytes(caches).values())


def _tensor_bytes(value: Any, seen: dict[int, int] | None = None) -> dict[int, int]:
    """Return the bytes of each tensor inside a cache, by its id; counters of tokens are none."""
    seen = {} if seen is None else seen
    if id(value) in seen or isinstance(value, (str, bytes, type, nn.Module)):
        return seen
    if isinstance(value, Tensor):
        seen[id(value)] = value.nbytes if value.numel() > 1 else 0
        return seen
    seen[id(value)] = 0
    inner = value.values() if isinstance(value, dict) else getattr(value, "__dict__", {}).values()
    for part in value if isinstance(value, (list, tuple)) else inner:
        _tensor_bytes(part, seen)
    return seen
