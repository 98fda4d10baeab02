"""What the sweep knows about a model by watching its forward, without any rule of the package.

The decoder layers are the modules of a ModuleList that a forward of text runs. Whether a parameter
multiplies hidden states, and whether what it gives picks experts, is seen in the operations that
the forward dispatches.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from generation import generate
from tiny_families import NUM_EXPERTS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COPIES = ("clone", "copy", "_to_copy", "_unsafe_view", "index", "contiguous")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "linear", "matmul", "mv", "addmv")


@torch.no_grad()
def logits(model: nn.Module, windows: Tensor) -> Tensor:
    """The logits without a cache, (windows, tokens, vocabulary)."""
    model.eval()
    return model(input_ids=windows, use_cache=False).logits


def difference(x: Tensor, y: Tensor) -> float:
    """The largest difference as a share of the largest value; infinite if the shapes differ."""
    if x.shape != y.shape:
        return float("inf")
    return float((x - y).abs().max() / y.abs().max())


@torch.no_grad()
def lists_that_run(model: nn.Module, windows: Tensor) -> dict[str, nn.ModuleList]:
    """The outermost ModuleLists of which a forward of text runs a member."""
    ran: set[nn.Module] = set()
    handles = [
        module.register_forward_pre_hook(lambda module, _: ran.add(module))
        for module in model.modules()
    ]
    logits(model, windows)
    for handle in handles:
        handle.remove()
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(member in ran for member in module)
    }
    return {
        name: module
        for name, module in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
    }


def decoder_list(model: nn.Module, windows: Tensor) -> tuple[str, nn.ModuleList]:
    """The largest of the lists that run: its path and the decoder layers."""
    outermost = lists_that_run(model, windows)
    size = {n: sum(p.numel() for p in x.parameters()) for n, x in outermost.items()}
    name = max(size, key=lambda name: size[name])
    return name, outermost[name]


def skip_by_hand(model: nn.Module, windows: Tensor, removed: Sequence[int]) -> nn.Module:
    """A copy whose given decoder layers hand on the hidden states, with their other outputs."""
    model = copy.deepcopy(model)
    _, layers = decoder_list(model, windows)
    for index in removed:
        layer = layers[index]

        def forward(*args, layer=layer, dense_forward=layer.forward, **kwargs):
            outputs = dense_forward(*args, **kwargs)
            hidden_states = args[0] if args else kwargs["hidden_states"]
            if hasattr(layer, "pre_ln"):  # an RWKV's first block also holds the embeddings' norm
                hidden_states = layer.pre_ln(hidden_states)
            if hasattr(outputs, "_fields"):  # Reformer has two streams of hidden states
                return outputs._replace(
                    hidden_states=hidden_states, attn_output=kwargs["prev_attn_output"]
                )
            if isinstance(outputs, list):
                return [hidden_states, *outputs[1:]]
            if isinstance(outputs, tuple):
                return type(outputs)((hidden_states, *outputs[1:]))
            return hidden_states

        layer.forward = forward
    return model


def cache_agrees(model: Any, windows: Tensor) -> bool:
    """Whether cached and uncached generation of a model give the same."""
    model.eval()
    tokens, found = generate(model, windows, use_cache=True)
    expected_tokens, expected = generate(model, windows, use_cache=False)
    return torch.equal(tokens, expected_tokens) and difference(found, expected) < 1e-3


class Watch(TorchDispatchMode):
    """Records which parameters are a factor of a matrix product, and what becomes of the products.

    `factors` are the parameters that multiply activations; `routers` those whose product picks:
    what they give reaches a topk through element-wise operations, which does not pick positions.
    `picks_positions` says that another topk does, as in sparse attention.
    """

    def __init__(self, model: nn.Module, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.owners = {p.untyped_storage().data_ptr(): n for n, p in model.named_parameters()}
        self.factors: set[str] = set()
        self.routers: set[str] = set()
        self.picks_positions = False
        self._came_from: dict[int, str] = {}  # storage of a product -> its parameter
        self._alive: list[Tensor] = []  # a freed storage's address would be used again

    def _owner(self, tensor: Tensor) -> str | None:
        return self.owners.get(tensor.untyped_storage().data_ptr())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run the operation and note what it read."""
        result = function(*args, **(kwargs or {}))
        operation = function.overloadpacket.__name__
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self._alive += outputs
        owners = [o for o in map(self._owner, inputs) if o is not None]
        if operation in PRODUCTS:
            multiplied = inputs[1:] if operation in ("addmm", "baddbmm", "addmv") else inputs
            named = [o for x in multiplied if x.ndim >= 2 for o in [self._owner(x)] if o]
            self.factors.update(named)
            for output in outputs:
                for owner in named:
                    self._came_from[output.untyped_storage().data_ptr()] = owner
            return result
        if "conv" in operation:
            return result
        sources = [
            (self._came_from[x.untyped_storage().data_ptr()], x.numel())
            for x in inputs
            if x.untyped_storage().data_ptr() in self._came_from
        ]
        if len(inputs) == 1 and owners and operation in COPIES:
            for output in outputs:
                self.owners[output.untyped_storage().data_ptr()] = owners[0]
        if operation in ("topk", "argmax"):
            if inputs[0].shape[-1] == self.tokens:
                self.picks_positions = True
            else:
                self.routers.update(owner for owner, _ in sources)
        for output in outputs:
            for owner, values in sources:
                if output.numel() == values:
                    key = output.untyped_storage().data_ptr()
                    self._came_from.setdefault(key, owner)
        return result


@torch.no_grad()
def watch(model: nn.Module, windows: Tensor) -> Watch:
    """Run one forward of text and say what each parameter did."""
    with Watch(model, windows.shape[1]) as seen:
        logits(model, windows)
    return seen


def matrices_of_layers(model: nn.Module, windows: Tensor) -> dict[str, Tensor]:
    """Every parameter of the decoder layers with two dimensions or more."""
    name, _ = decoder_list(model, windows)
    return {n: p for n, p in model.named_parameters() if n.startswith(f"{name}.") and p.ndim >= 2}


def gates(model: nn.Module, windows: Tensor) -> set[str]:
    """The matrices of the decoder layers that pick experts, or give one number to a token.

    A product picks if a topk follows, or if it has as many columns as there are experts.
    """
    matrices = matrices_of_layers(model, windows)
    seen = watch(model, windows)
    factors = {n: p for n, p in matrices.items() if n in seen.factors}
    few = {n for n, p in factors.items() if p.ndim == 2 and p.shape[0] in (1, NUM_EXPERTS)}
    return {n for n in matrices if n in seen.routers} | few
