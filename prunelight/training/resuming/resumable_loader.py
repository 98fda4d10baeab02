"""A DataLoader that goes on in the middle of an epoch, without loading what was trained on before.

The position is asked for at the first batch and not kept here: the training loop's own count of
batches is the one truth. Batches that workers have fetched in advance, or an epoch that ends before
the data does, thus need no care. The order must depend on nothing but the sampler's seed and epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader


class ResumableLoader(DataLoader):
    """A DataLoader whose next iteration starts after the batches that `position` counts.

    Everything is put off until the first batch is asked for: by then a Trainer has told the sampler
    its epoch and restored its counts, neither of which holds when it asks for the iterator.

    Args:
        dataset: as for a DataLoader.
        position: batches of this epoch that were trained on before.
        **arguments: as for a DataLoader.
    """

    def __init__(self, dataset: Any, *, position: Callable[[], int], **arguments: Any) -> None:
        super().__init__(dataset, **arguments)
        self.position = position

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches that are left of the epoch."""
        done = self.position()
        yield from super().__iter__() if done == 0 else self._rest(done)

    def _rest(self, done: int) -> DataLoader:
        assert self.batch_sampler is not None
        return DataLoader(
            self.dataset,
            batch_sampler=list(islice(self.batch_sampler, done, None)),
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
            pin_memory=self.pin_memory,
            worker_init_fn=self.worker_init_fn,
        )

    def state_dict(self) -> dict[str, int]:
        """Return the position, for whoever reads the checkpoint; it also lets Lightning resume."""
        return {"batches": self.position()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Do nothing: the position is restored where it is counted."""
