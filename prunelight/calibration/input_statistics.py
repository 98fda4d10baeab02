"""What the matrices of one decoder layer get to see, as statistics of their inputs."""

# B sequences, T tokens, I in_features

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from prunelight.calibration.statistics import InputNorm
from prunelight.models.families.layers import Matrix
from prunelight.runtime.processes import ProcessGroup

Statistic = TypeVar("Statistic", bound=InputNorm)


class InputStatistics(Generic[Statistic]):
    """Statistics of what the matrices of one decoder layer get to see; one for each shared input.

    Q, k and v see the same tensor, and so do gate and up: they share a statistic. Each expert of a
    fused stack has its own.

    Args:
        matrices: of the layer.
        make: called with the width of an input.
    """

    def __init__(self, matrices: Sequence[Matrix], make: Callable[[int], Statistic]) -> None:
        self.matrices, self.make = matrices, make
        self._leader: dict[str, str] = {}
        self._found: dict[str, list[Statistic]] = {}
        self._inputs: list[tuple[Tensor, str]] = []  # of the forward at hand

    @contextmanager
    def watching(self, mask: Tensor | None = None) -> Iterator[None]:
        """Add the inputs of the forwards inside; `mask` (B, T) says which tokens are real."""
        handles = [
            owner.register_forward_pre_hook(partial(self._see, found, mask), with_kwargs=True)
            for owner, found in self._by_owner().items()
        ]
        try:
            yield
        finally:
            self._inputs.clear()
            for handle in handles:
                handle.remove()

    def of(self, matrix: Matrix) -> list[Statistic]:
        """Return a matrix' statistics, one for each of its views.

        Raises:
            ValueError: if its module was never called.
        """
        leader = self._leader.get(matrix.name)
        if leader is None:
            raise ValueError(
                f"{matrix.name} was never called in a forward, so nothing is known of its inputs; "
                "leave it out, or turn off the fused kernel that reads its weight"
            )
        return self._found[leader]

    def groups(self) -> list[list[Matrix]]:
        """Return the matrices that share an input, together."""
        groups: dict[str, list[Matrix]] = {}
        for matrix in self.matrices:
            self.of(matrix)
            groups.setdefault(self._leader[matrix.name], []).append(matrix)
        return list(groups.values())

    def reduce(self, call: Callable[[Tensor], Tensor]) -> None:
        """Replace the sums of squares by what `call` makes of them, over processes say."""
        for found in self._found.values():
            for one in found:
                one.squares = call(one.squares)

    def pool(self, group: ProcessGroup) -> None:
        """Add up the sums of all ranks, in place; some experts only others' tokens may reach."""
        for leaders in group.gather(self._leader):
            self._leader = {**leaders, **self._leader}
        for matrix in self.matrices:
            if self._leader.get(matrix.name) == matrix.name:
                made = [self.make(matrix.in_features) for _ in matrix.views()]
                for one in self._found.setdefault(matrix.name, made):
                    one.pool(group)

    def state_dict(self) -> dict[str, Any]:
        """Return all sums, for a checkpoint."""
        sums = {
            name: [(one.tokens, one.squares) for one in found]
            for name, found in self._found.items()
        }
        return {"leader": dict(self._leader), "sums": sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the sums of a checkpoint."""
        self._leader = dict(state["leader"])
        for name, sums in state["sums"].items():
            self._found[name] = [self.make(len(squares)) for _, squares in sums]
            for one, (tokens, squares) in zip(self._found[name], sums, strict=True):
                one.tokens, one.squares = tokens, squares

    def _by_owner(self) -> dict[nn.Module, list[Matrix]]:
        owners: dict[nn.Module, list[Matrix]] = {}
        for matrix in self.matrices:
            owners.setdefault(matrix.owner, []).append(matrix)
        return owners

    @torch.no_grad()
    def _see(
        self,
        matrices: list[Matrix],
        mask: Tensor | None,
        owner: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        if matrices[0].fused:
            self._see_experts(matrices, mask, owner, *args, **kwargs)
            return
        x = args[0] if args else next(iter(kwargs.values()))
        name = matrices[0].name
        if name not in self._leader:
            twin = next((other for seen, other in self._inputs if seen is x), name)
            self._leader[name] = twin
            self._inputs.append((x, name))
            if twin == name:
                self._found[name] = [self.make(x.shape[-1])]
        if self._leader[name] == name:
            self._found[name][0].update(_tokens(x, mask))

    def _see_experts(
        self,
        matrices: list[Matrix],
        mask: Tensor | None,
        owner: Any,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> None:
        """Add the inputs of each expert's first and second weight: the second is computed here."""
        for matrix in matrices:
            self._leader[matrix.name] = matrix.name
            if matrix.name not in self._found:
                made = [self.make(matrix.in_features) for _ in matrix.views()]
                self._found[matrix.name] = made
        chosen = top_k_index if mask is None else top_k_index.masked_fill(~mask.view(-1, 1), -1)
        for expert, weight in enumerate(owner.gate_up_proj):
            x = hidden_states[(chosen == expert).any(-1)]
            if len(x):
                gate, up = linear(x, weight).chunk(2, dim=-1)
                inputs = {"gate_up_proj": x, "down_proj": owner.act_fn(gate) * up}
                for matrix in matrices:
                    self._found[matrix.name][expert].update(inputs[matrix.parameter_name])


def _tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the inputs of the tokens that count, (B, T, I) or (B * T, I) -> (tokens, I)."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if mask is None else flat[mask.flatten()]
