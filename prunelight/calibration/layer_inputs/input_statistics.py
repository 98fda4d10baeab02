"""Statistics of the inputs of a decoder layer's weight matrices."""

# B sequences, T tokens, I in_features

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from prunelight.calibration.layer_inputs.weight_products import WeightProducts
from prunelight.calibration.statistics import InputNorm
from prunelight.models.families.matrices import Matrix
from prunelight.runtime.processes import ProcessGroup

_NO_PADDING = "the experts of {} hide which tokens are padding; take windows without padding"

Statistic = TypeVar("Statistic", bound=InputNorm)


class InputStatistics(Generic[Statistic]):
    """Statistics of the inputs of weight matrices, one statistic for each different input.

    The projections q, k and v have the same input tensor, and so have gate and up: they share a
    statistic. Each expert of a fused stack has a statistic of its own.

    Args:
        matrices: the weight matrices, such as those of one decoder layer.
        make: returns a new statistic; called with the number of input features.
    """

    def __init__(self, matrices: Sequence[Matrix], make: Callable[[int], Statistic]) -> None:
        self.matrices, self.make = matrices, make
        # Name of each matrix -> name of the first matrix with the same input, its leader.
        self._leader: dict[str, str] = {}
        self._statistics: dict[str, list[Statistic]] = {}  # by leader, one for each of its views
        # Of this forward, each with a matrix' name; held weakly, or those of all layers would live.
        self._inputs: list[tuple[weakref.ref[Tensor], str]] = []
        self._called: set[str] = set()  # matrices whose module has been called

    @contextmanager
    def watching(self, mask: Tensor | None = None) -> Iterator[None]:
        """Add the inputs of all forwards inside; `mask`, bool (B, T), is False on padding."""
        handles = [
            owner.register_forward_pre_hook(partial(self._add, members, mask), with_kwargs=True)
            for owner, members in self._by_owner().items()
            if not members[0].fused or _runs_experts(owner)
        ]
        # Whose inputs no module's forward gets.
        unseen = [
            matrix
            for matrix in self.matrices
            if (not _runs_experts(matrix.owner) if matrix.fused else matrix.read_directly)
        ]
        products = WeightProducts(unseen, partial(self._add_product, mask))
        try:
            # It would look at every product of the forwards, for nothing.
            with products if unseen else nullcontext():
                yield
        finally:
            self._inputs.clear()
            for handle in handles:
                handle.remove()

    def of(self, matrix: Matrix) -> list[Statistic]:
        """Return the statistics of a matrix, one for each of its views.

        Raises:
            ValueError: if the module of the matrix was never called.
        """
        leader = self._leader.get(matrix.name)
        if leader is None:
            raise ValueError(
                f"{matrix.name} was never called in a forward, so nothing is known of its inputs; "
                "leave it out, or turn off the fused kernel that reads its weight"
            )
        return self._statistics[leader]

    def idle(self) -> list[Matrix]:
        """Return the matrices that no forward has used while others of their list were used.

        Such are the adapters of a shared block that belong to other layers.
        """
        unused = [matrix for matrix in self.matrices if matrix.name not in self._leader]
        return [m for m in unused if _lists(m.name) & {x for n in self._leader for x in _lists(n)}]

    def groups(self) -> list[list[Matrix]]:
        """Return the matrices in groups that share an input; idle ones are in none."""
        groups: dict[str, list[Matrix]] = {}
        idle = self.idle()
        for matrix in [matrix for matrix in self.matrices if matrix not in idle]:
            self.of(matrix)
            groups.setdefault(self._leader[matrix.name], []).append(matrix)
        return list(groups.values())

    def reduce(self, call: Callable[[Tensor], Tensor]) -> None:
        """Replace each sum of squares by the result of `call`, such as a sum over processes."""
        for statistics in self._statistics.values():
            for statistic in statistics:
                statistic.squares = call(statistic.squares)

    def pool(self, group: ProcessGroup) -> None:
        """Add up the sums of all ranks, in place."""
        # A module may have been called on another rank alone, with an expert's tokens say.
        for leaders in group.gather(self._leader):
            self._leader = {**leaders, **self._leader}
        for matrix in self.matrices:
            if self._leader.get(matrix.name) == matrix.name:
                for statistic in self._statistics.setdefault(matrix.name, self._empty(matrix)):
                    statistic.pool(group)

    def state_dict(self) -> dict[str, Any]:
        """Return all sums, for a checkpoint."""
        sums = {
            name: [(statistic.tokens, statistic.squares) for statistic in statistics]
            for name, statistics in self._statistics.items()
        }
        return {"leader": dict(self._leader), "sums": sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace all sums by those of a checkpoint."""
        self._leader = dict(state["leader"])
        for name, sums in state["sums"].items():
            self._statistics[name] = [self.make(len(squares)) for _, squares in sums]
            for statistic, (tokens, squares) in zip(self._statistics[name], sums, strict=True):
                statistic.tokens, statistic.squares = tokens, squares

    def _empty(self, matrix: Matrix) -> list[Statistic]:
        return [self.make(matrix.in_features) for _ in matrix.views()]

    def _by_owner(self) -> dict[nn.Module, list[Matrix]]:
        owners: dict[nn.Module, list[Matrix]] = {}
        for matrix in self.matrices:
            owners.setdefault(matrix.owner, []).append(matrix)
        return owners

    @torch.no_grad()
    def _add(
        self,
        matrices: list[Matrix],
        mask: Tensor | None,
        owner: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        if matrices[0].fused:
            self._add_experts(matrices, mask, owner, args, kwargs)
            return
        self._called.add(matrices[0].name)
        x = args[0] if args else next(iter(kwargs.values()))
        name = matrices[0].name
        if name not in self._leader:
            leader = next((first for known, first in self._inputs if known() is x), name)
            self._leader[name] = leader
            self._inputs.append((weakref.ref(x), name))
            if leader == name:
                self._statistics[name] = [self.make(x.shape[-1])]
        if self._leader[name] == name:
            self._statistics[name][0].update(_tokens(x, mask))

    def _add_experts(
        self,
        matrices: list[Matrix],
        mask: Tensor | None,
        owner: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Add the inputs of each expert, from the plain forward of the module over real tokens."""
        plain = type(owner).forward.__wrapped__  # type: ignore[attr-defined]
        given = inspect.signature(plain).bind(owner, *args, **kwargs)
        _, hidden_states, *choices = given.args
        if mask is not None:
            rows = mask.flatten()
            if len(rows) != len(hidden_states):
                raise ValueError(_NO_PADDING.format(matrices[0].name))
            hidden_states, *choices = (value[rows] for value in (hidden_states, *choices))
        with WeightProducts(matrices, partial(self._add_product, None)):
            plain(owner, hidden_states, *choices)

    def _add_product(
        self, mask: Tensor | None, matrix: Matrix, expert: int | None, x: Tensor
    ) -> None:
        """Add an input of a matrix that was seen in a product; None stands for all experts."""
        if matrix.name in self._called or x.shape[-1] != matrix.in_features:
            return
        self._leader[matrix.name] = matrix.name
        statistics = self._statistics.setdefault(matrix.name, self._empty(matrix))
        if not matrix.fused:
            statistics[0].update(_tokens(x, mask))
            return
        if mask is not None:
            raise ValueError(_NO_PADDING.format(matrix.name))
        for index, inputs in enumerate(x) if expert is None else [(expert, x)]:
            tokens = inputs.reshape(-1, inputs.shape[-1])
            tokens = tokens[tokens.any(-1)]  # a token that is not routed to an expert is zero
            if len(tokens):
                statistics[index].update(tokens)


def _lists(name: str) -> set[str]:
    """Return the paths of the lists inside a decoder layer that a matrix is a member of."""
    parts = name.split(".")
    places = [i for i, part in enumerate(parts) if part.isdigit()]
    return {".".join(parts[:place]) for place in places[1:]}  # the first is the layer's own


def _runs_experts(owner: nn.Module) -> bool:
    """Return whether a module has a plain forward over all experts, as transformers marks it."""
    return hasattr(type(owner).forward, "__wrapped__")


def _tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the inputs of tokens that are no padding, (B, T, I) or (B * T, I) -> (tokens, I)."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if mask is None else flat[mask.flatten()]
