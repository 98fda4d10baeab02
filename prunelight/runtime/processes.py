"""The processes that share the work of a run, and how they exchange sums, results and errors.

All ranks wait for each other on the CPU before every collective. A rank that failed can then tell
the other ranks why.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

# How long ranks wait for each other; no evaluation or save on rank 0 alone takes longer.
WAIT = timedelta(hours=6)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """Work that one rank can do for all.

    Attributes:
        cost: how long it takes, in a unit that all jobs share; the same on all ranks.
        results: tensors that the work writes over, in place.
        work: does it.
    """

    cost: float
    results: Sequence[Tensor]
    work: Callable[[], None]


class ProcessGroup:
    """The processes that share windows; by default this process alone, without torch.distributed.

    Before every collective all ranks wait for each other on the CPU, up to `WAIT`. All ranks then
    enter the collective at once, within NCCL's timeout of 10 minutes; a failed rank can say why.

    Attributes:
        rank: rank of this process.
        size: number of processes.
    """

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self._cpu_group: Any = None  # gloo group of the same ranks, for barriers and objects
        self._failed = False

    @classmethod
    def of_default_group(cls) -> ProcessGroup:
        """Return the ranks of torch's default process group, or this process alone without one.

        Every rank must call it.
        """
        group = cls()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            group.rank, group.size = dist.get_rank(), dist.get_world_size()
            group._cpu_group = _gloo_group(dist.group.WORLD)
        return group

    def rows(self, count: int, unit: int = 1) -> slice:
        """Return which of `count` windows this rank feeds: consecutive ones, in whole units.

        A unit holds `unit` windows, or one window where whole units would leave a rank without any.
        The ranks' numbers of units differ by at most one.
        """
        unit = unit if count > unit * (self.size - 1) else 1
        num_units = math.ceil(count / unit)
        start, stop = (num_units * rank // self.size for rank in (self.rank, self.rank + 1))
        return slice(start * unit, min(stop * unit, count))

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks, with the tensor's dtype and device.

        Raises:
            RuntimeError: if another rank failed.
        """
        if self.size == 1:
            return values
        self.barrier()
        total = _sendable(values)
        # Not all_reduce, which does not promise the same last bit on every rank.
        dist.reduce(total, 0)
        dist.broadcast(total, 0)
        return total.to(values.device)

    def do_shared(self, jobs: Sequence[Job]) -> None:
        """Do each job on one rank, and give its results to all; every rank calls it with all jobs.

        Raises:
            RuntimeError: if a job failed on another rank.
        """
        doers = self._doers([job.cost for job in jobs])
        for job, doer in zip(jobs, doers, strict=True):
            if doer == self.rank:
                job.work()
        if self.size == 1:
            return
        self.barrier()
        for job, doer in zip(jobs, doers, strict=True):
            for result in job.results:
                sent = _sendable(result)
                dist.broadcast(sent, doer)
                if doer != self.rank:
                    result.copy_(sent)

    def _doers(self, costs: Sequence[float]) -> list[int]:
        """Return the rank that does each job: the costliest first, to whom has least to do."""
        loads, doers = [0.0] * self.size, [0] * len(costs)
        for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
            doers[index] = loads.index(min(loads))
            loads[doers[index]] += costs[index]
        return doers

    def totals(self, *numbers: float) -> list[float]:
        """Return the sum of each number over all ranks, added in float64."""
        if self.size == 1:
            return [*numbers]
        return self.sum(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def run_on_rank_zero(self, call: Callable[[], Result]) -> Result:
        """Run `call` on rank 0 while the other ranks wait; return its result on all ranks.

        Raises:
            RuntimeError: on the other ranks, if `call` failed. Rank 0 raises the error of `call`.
        """
        results: list[Any] = [None]
        if self.rank == 0:
            try:
                results = [call()]
            except Exception as error:
                self.barrier(error)
                raise
        if self.size > 1:
            self.barrier()
            dist.broadcast_object_list(results, 0, group=self._cpu_group)
        result: Result = results[0]
        return result

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is set on any rank; the ranks wait for each other on the CPU."""
        if self.size == 1:
            return flag
        num_flags = torch.tensor(int(flag))
        dist.all_reduce(num_flags, group=self._cpu_group)
        return bool(num_flags)

    def gather(self, value: Result) -> list[Result]:
        """Return the values of all ranks, ordered by rank.

        Raises:
            RuntimeError: if another rank failed.
        """
        if self.size == 1:
            return [value]
        self.barrier()
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._cpu_group)
        return values

    def check_same(self, what: str, value: str) -> None:
        """Check that `value` is the same on all ranks.

        Raises:
            ValueError: on all ranks, if a rank's value differs from rank 0's; names both values.
        """
        values = self.gather(value)
        for rank, rank_value in enumerate(values):
            if rank_value != values[0]:
                raise ValueError(
                    f"{what} is {values[0]} on rank 0 and {rank_value} on rank {rank}; give all "
                    "ranks the same model and data"
                )

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Let the work inside fail on all ranks if it fails on one; wait for all ranks at its end.

        Raises:
            RuntimeError: on the ranks that did not fail; it names the first rank that failed. A
                failed rank raises its own error.
        """
        try:
            yield
        except Exception as error:
            self.barrier(error)
            raise
        self.barrier()

    def barrier(self, error: Exception | None = None) -> None:
        """Wait for all ranks; an `error` tells the other ranks why this rank stops.

        Raises:
            RuntimeError: if another rank failed and this rank did not.
        """
        if self.size == 1 or self._failed:  # after a failure that all know, no rank waits again
            return
        if not self.any(error is not None):
            return
        self._failed = True
        reasons: list[Any] = [None] * self.size
        reason = None if error is None else str(error) or type(error).__name__
        dist.all_gather_object(reasons, reason, group=self._cpu_group)
        if error is None:
            first = next(rank for rank, reason in enumerate(reasons) if reason is not None)
            raise RuntimeError(f"rank {first} failed: {reasons[first]}")

    # --- old names, which go with the next release -------------------------------------------

    def together(self) -> AbstractContextManager[None]:
        """Return `failing_together()`, with a warning."""
        _warn_of_old_name("together", "failing_together")
        return self.failing_together()

    def meet(self, error: Exception | None = None) -> None:
        """Call `barrier`, with a warning."""
        _warn_of_old_name("meet", "barrier")
        self.barrier(error)

    def on_zero(self, call: Callable[[], Result]) -> Result:
        """Return the result of `run_on_rank_zero`, with a warning."""
        _warn_of_old_name("on_zero", "run_on_rank_zero")
        return self.run_on_rank_zero(call)


def _warn_of_old_name(old: str, new: str) -> None:
    warnings.warn(
        f"ProcessGroup.{old} is now ProcessGroup.{new}; the old path goes with the next release",
        DeprecationWarning,
        stacklevel=3,  # who calls the old method
    )


def _sendable(values: Tensor) -> Tensor:
    """Return a copy of a tensor where the backend takes it: NCCL on a GPU, gloo on the CPU."""
    kind = {"nccl": "cuda", "gloo": "cpu"}.get(dist.get_backend(), values.device.type)
    copied = values.detach().clone(memory_format=torch.contiguous_format)
    return copied if copied.device.type == kind else copied.to(kind)


@lru_cache(maxsize=1)
def _gloo_group(default_group: object) -> Any:
    """Return a gloo group of the ranks of a default group; it is made once."""
    return dist.new_group(backend="gloo", timeout=WAIT)
