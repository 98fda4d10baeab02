"""What a token gets from each of its experts: gates, and outputs before the gate.

transformers runs all experts of a layer as one module: experts(hidden states, indices, weights)
returns the sum over a token's experts of weight x output. The module itself, called with one expert
a token and weight 1, gives the output of that expert. So activations, clamps and biases of a family
are its own code's, whatever kernel runs them.
"""

# T tokens, K experts of a token, D hidden

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelight.models.families.experts.layout import Experts
from prunelight.models.families.layers import decoder_layers

# Called as visit(layer, indices (T, K), gates (T, K), norms of the experts' outputs (T, K)).
VisitRouted: TypeAlias = Callable[[int, Tensor, Tensor, Tensor], None]

_ARGUMENTS = 3  # hidden states, indices, weights


def check_scorable(model: PreTrainedModel, experts: Experts) -> None:
    """Check that the experts of a model are called in the way that transformers defines.

    Raises:
        TypeError: if they are not, so that gates and outputs cannot be told apart.
    """
    for layer, path in experts.holders.items():
        module = decoder_layers(model)[layer].get_submodule(path)
        # transformers marks modules that its kernels can run: sums of weight x output.
        marked = isinstance(getattr(module, "is_transposed", None), bool)
        if not marked or len(_names(module)) != _ARGUMENTS:
            raise TypeError(
                f"the experts of {experts.name} cannot be scored: {type(module).__name__} is not "
                "called as experts(hidden states, indices, weights), as transformers defines it"
            )


@contextmanager
def watching_experts(
    model: PreTrainedModel,
    experts: Experts,
    visit: VisitRouted,
    *,
    norms: bool = True,
    layer: int | None = None,
) -> Iterator[None]:
    """Call `visit` with what tokens get from their experts in each layer of each forward.

    Args:
        model: in eval mode.
        experts: of the model.
        visit: see `VisitRouted`; tokens are in the order of the batch.
        norms: compute the outputs of single experts, which costs their forward once more; else
            norms are ones.
        layer: watch this one alone; None watches all.
    """
    with ExitStack() as hooks:
        for index, path in experts.holders.items():
            if layer not in (None, index):
                continue
            module = decoder_layers(model)[index].get_submodule(path)
            hook = _hook(index, module, visit, norms)
            hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield


def _names(module: nn.Module) -> list[str]:
    return [*inspect.signature(module.forward).parameters]


def _hook(layer: int, module: nn.Module, visit: VisitRouted, norms: bool) -> Callable[..., None]:
    names = _names(module)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        hidden, indices, gates = (given[name] for name in names)
        if indices.shape != gates.shape:
            raise TypeError(
                f"gates {tuple(gates.shape)} of {type(module).__name__} must have the shape of "
                f"its indices {tuple(indices.shape)}; its experts cannot be scored"
            )
        ones = torch.ones_like(gates)
        output_norms = _output_norms(module, hidden, indices, gates) if norms else ones
        visit(layer, indices, gates, output_norms)

    return hook


@torch.no_grad()
def _output_norms(module: nn.Module, hidden: Tensor, indices: Tensor, gates: Tensor) -> Tensor:
    """Return ||f_j(x)||_2 of each expert j of each token x, (T, K), float32."""
    one = torch.ones_like(gates[:, :1])
    norms = [
        # Not module(...), which would call the hook again.
        module.forward(hidden, indices[:, slot : slot + 1].contiguous(), one).float().norm(dim=-1)
        for slot in range(indices.shape[1])
    ]
    return torch.stack(norms, dim=1)
