"""A loader that starts in mid-epoch."""

import pytest
import torch
from torch.utils.data import DistributedSampler

from prunelight.training.resuming.resumable_loader import ResumableLoader


def make_loader(position, workers=0):
    sampler = DistributedSampler(range(11), num_replicas=1, rank=0, seed=4)
    return ResumableLoader(
        list(range(11)), position=position, batch_size=2, sampler=sampler, num_workers=workers
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("epoch", [0, 3])
def test_a_resumed_epoch_is_the_tail_of_the_whole_one(workers, epoch):
    whole, done = make_loader(lambda: 0), 4
    whole.sampler.set_epoch(epoch)
    loader = make_loader(lambda: done, workers)
    iterator = iter(loader)
    loader.sampler.set_epoch(epoch)  # Lightning tells the epoch after it took the iterator
    rest = list(iterator)
    assert all(torch.equal(a, b) for a, b in zip(rest, list(whole)[4:], strict=True))
    assert len(loader) == 6
    done = 6
    assert list(loader) == []
