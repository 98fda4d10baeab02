"""Counts the operations after which a host waits for its accelerator, seen from the CPU alone."""

from collections import Counter

import lightning.pytorch as pl
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose result has a size or a value that the host must know before it goes on.
_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_consecutive"}
_WAITING |= {"_unique2", "bincount", "nonzero_numpy"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class HostSyncs(TorchDispatchMode):
    """Counts them by name while it is entered; indexing by a boolean mask is "boolean index"."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in _WAITING:
            self.counts[name] += 1
        if name in _INDEXING and any(t is not None and t.dtype == torch.bool for t in args[1]):
            self.counts["boolean index"] += 1
        return func(*args, **kwargs or {})


class CountSyncs(pl.Callback):
    """Counts the syncs of each micro-batch, from its arrival on the device to the next one's start.

    Attributes:
        batches: counts of each training batch.
    """

    def __init__(self):
        self.batches = []
        self._mode = None

    def on_train_batch_start(self, trainer, pl_module, *_):
        self._mode = HostSyncs()
        self._mode.__enter__()

    def on_train_batch_end(self, trainer, pl_module, *_):
        self._mode.__exit__(None, None, None)
        self.batches.append(dict(self._mode.counts))
