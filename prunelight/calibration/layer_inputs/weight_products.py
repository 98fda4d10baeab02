"""Sees the inputs that weights are multiplied with, wherever in a model's code that happens.

Some weights have no module whose forward gets their input: stacks of experts, and projections that
a mixer reads itself. While the mode is active, each product of torch is compared with the places of
those weights in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from prunelight.models.families.matrices import Matrix

# Called as see(matrix, expert or None for all of them, inputs (..., in_features)).
See = Callable[[Matrix, "int | None", Tensor], None]

# Function -> positions of its two factors.
_PRODUCTS: dict[Any, tuple[int, int]] = {
    linear: (0, 1),
    torch.matmul: (0, 1),
    torch.mm: (0, 1),
    torch.bmm: (0, 1),
    torch.addmm: (1, 2),
    torch.baddbmm: (1, 2),
    Tensor.matmul: (0, 1),
    Tensor.__matmul__: (0, 1),
    Tensor.mm: (0, 1),
    Tensor.bmm: (0, 1),
    Tensor.addmm: (1, 2),
    Tensor.baddbmm: (1, 2),
}


class WeightProducts(TorchFunctionMode):
    """Calls `see` for each product of one of the matrices; a context manager.

    Args:
        matrices: whose products are seen.
        see: called before the product.
    """

    def __init__(self, matrices: Sequence[Matrix], see: See) -> None:
        super().__init__()
        self._matrices, self._see = matrices, see

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function of torch, and look at its factors first if it is a product."""
        places = _PRODUCTS.get(func)
        if places is not None and len(args) > places[1]:
            left, right = args[places[0]], args[places[1]]
            if isinstance(left, Tensor) and isinstance(right, Tensor):
                self._look(left, right)
        return func(*args, **(kwargs or {}))

    @torch.no_grad()
    def _look(self, left: Tensor, right: Tensor) -> None:
        for weight, inputs in ((right, left), (left, right)):
            for matrix in self._matrices:
                start, expert_bytes = matrix.parameter.data_ptr(), _bytes_of_part(matrix)
                offset = weight.data_ptr() - start
                if not 0 <= offset < matrix.parameter.numel() * matrix.parameter.element_size():
                    continue
                x = inputs if weight is right else inputs.transpose(-1, -2)
                whole = weight.numel() == matrix.parameter.numel()
                expert = None if whole and matrix.fused else offset // expert_bytes
                self._see(matrix, expert, x)
                return


def _bytes_of_part(matrix: Matrix) -> int:
    parameter = matrix.parameter
    return parameter.numel() // (matrix.experts or 1) * parameter.element_size()
