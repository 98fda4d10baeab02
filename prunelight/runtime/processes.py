"""The processes that share the work of a run, and how they talk: sums, meetings, errors.

Processes meet on the CPU before every collective. A rank that failed can then tell the others why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

# How long ranks wait for each other: longer than any evaluation or save of one rank alone takes.
WAIT = timedelta(hours=6)

Result = TypeVar("Result")


class ProcessGroup:
    """The processes that share windows; by default one alone, which needs no group.

    Ranks meet on the CPU before every collective, with a long timeout of their own. So those of the
    default group (NCCL's is 10 minutes) start together, and a rank that failed can say so.

    Attributes:
        rank: of this process.
        size: how many there are.
    """

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self._waiting: Any = None  # a group that only meets
        self._failed = False

    @classmethod
    def of_default_group(cls) -> ProcessGroup:
        """Return the ranks of the default process group, or one alone if there is none.

        To be called on all of them.
        """
        group = cls()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            group.rank, group.size = dist.get_rank(), dist.get_world_size()
            group._waiting = _meeting_group(dist.group.WORLD)
        return group

    def rows(self, count: int, unit: int = 1) -> slice:
        """Return which of `count` windows are this rank's: neighbours, whole units if they suffice.

        As many units as another rank's, or one more or less.
        """
        unit = unit if count > unit * (self.size - 1) else 1
        units = math.ceil(count / unit)
        start, stop = (units * rank // self.size for rank in (self.rank, self.rank + 1))
        return slice(start * unit, min(stop * unit, count))

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over ranks, with its dtype and device; alone itself.

        Raises:
            RuntimeError: if another rank failed.
        """
        if self.size == 1:
            return values
        self.meet()
        # NCCL takes only what is on a GPU, gloo reduces only what is on the CPU.
        kind = {"nccl": "cuda", "gloo": "cpu"}.get(dist.get_backend(), values.device.type)
        total = values.detach().clone(memory_format=torch.contiguous_format)
        total = total if total.device.type == kind else total.to(kind)
        # Not all_reduce, which does not promise the same last bit everywhere.
        dist.reduce(total, 0)
        dist.broadcast(total, 0)
        return total.to(values.device)

    def totals(self, *numbers: float) -> list[float]:
        """Return the sums of numbers over ranks, added in float64; alone themselves."""
        if self.size == 1:
            return [*numbers]
        return self.sum(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def on_zero(self, call: Callable[[], Result]) -> Result:
        """Run `call` on rank 0 while the others wait, and return its result on all of them.

        Raises:
            RuntimeError: on the other ranks, if rank 0 failed; there its own error.
        """
        told: list[Any] = [None]
        if self.rank == 0:
            try:
                told = [call()]
            except Exception as error:
                self.meet(error)
                raise
        if self.size > 1:
            self.meet()
            dist.broadcast_object_list(told, 0, group=self._waiting)
        result: Result = told[0]
        return result

    def any(self, flag: bool) -> bool:
        """Return whether a flag is set on any rank; they wait for each other on the CPU."""
        if self.size == 1:
            return flag
        told = torch.tensor(int(flag))
        dist.all_reduce(told, group=self._waiting)
        return bool(told)

    def gather(self, value: Result) -> list[Result]:
        """Return the values of all ranks, in their order.

        Raises:
            RuntimeError: if another rank failed.
        """
        if self.size == 1:
            return [value]
        self.meet()
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._waiting)
        return values

    def check_same(self, what: str, value: str) -> None:
        """Check that a value is the same on all ranks.

        Raises:
            ValueError: on all ranks, if it is not; names both.
        """
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise ValueError(
                    f"{what} is {values[0]} on rank 0 and {other} on rank {rank}; give all ranks "
                    "the same model and data"
                )

    @contextmanager
    def together(self) -> Iterator[None]:
        """End the work inside on all ranks if it fails on one, and wait for all at its end.

        Raises:
            RuntimeError: on the other ranks, naming the first that failed; there its own error.
        """
        try:
            yield
        except Exception as error:
            self.meet(error)
            raise
        self.meet()

    def meet(self, error: Exception | None = None) -> None:
        """Wait for all ranks; with an error, tell them why this one goes no further.

        Raises:
            RuntimeError: if another rank failed and this one did not.
        """
        if self.size == 1 or self._failed:  # those who know of a failure meet no more
            return
        if not self.any(error is not None):
            return
        self._failed = True
        reasons: list[Any] = [None] * self.size
        own = None if error is None else str(error) or type(error).__name__
        dist.all_gather_object(reasons, own, group=self._waiting)
        if error is None:
            first = next(rank for rank, reason in enumerate(reasons) if reason is not None)
            raise RuntimeError(f"rank {first} failed: {reasons[first]}")


@lru_cache(maxsize=1)
def _meeting_group(default_group: object) -> Any:
    """Return the group in which the ranks of a default group meet, made once."""
    return dist.new_group(backend="gloo", timeout=WAIT)
