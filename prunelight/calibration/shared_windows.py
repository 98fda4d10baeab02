"""Calibration windows shared by processes: each rank feeds its rows, sums cover all ranks.

    torch.distributed.init_process_group()  # under torchrun; every rank holds model and windows
    windows = prunelight.share_windows(windows)
    plan = ShortGPT(0.2).plan(model, windows)  # the same call on every rank, and the same plan
    model = prunelight.apply(model, plan, windows)

Every function that takes windows takes shared windows. Checks of shape and vocabulary and the
fingerprint look at the windows of all ranks. All ranks must make the same calls.

A rank's rows form the same micro-batches that one process alone would feed, and sums keep their
dtype. So all statistics equal those of one process, up to the order of additions. Micro-batches are
split only where there are fewer of them than ranks. That changes CKA, whose kernels take their
tokens from one micro-batch, into another sample of the same estimate.

Every rank gets the bytes of rank 0's sums and of its plan, so that no rounding lets ranks diverge.
Solves that take long (SparseGPT, ALPS, swaps, GPTQ) are shared out by matrix, and all get the bytes
of the rank that solved. Other work on weights (masks, rotations) is done by every rank on its own
copy of the model, which gives equal bytes on equal hardware. In a fit all ranks load the model that
rank 0 saved.
"""

# N windows, T tokens

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from prunelight.moved import warn_of_old_name
from prunelight.runtime.processes import ProcessGroup

MICRO_BATCH_TOKENS = 2048


class SharedWindows(Mapping[str, Tensor]):
    """A mapping of the windows of all ranks, with the rows that this rank feeds.

    Its keys are "input_ids" (N, T) and the other keys of the given windows.

    Attributes:
        group: the processes that share the windows.
        rows: the windows that this rank feeds.

    Raises:
        ValueError: if there are fewer windows than ranks.
    """

    def __init__(self, windows: Tensor | Mapping[str, Tensor], group: ProcessGroup) -> None:
        self._all = {"input_ids": windows} if isinstance(windows, Tensor) else dict(windows)
        count, seq_len = len(self._all["input_ids"]), self._all["input_ids"].shape[-1]
        if count < group.size:
            raise ValueError(
                f"{count} windows cannot be shared by {group.size} ranks, each needs one; give "
                "more windows (data.num_calibration, data.num_validation) or start fewer processes"
            )
        self.group = group
        self.rows = group.rows(count, max(1, MICRO_BATCH_TOKENS // max(1, seq_len)))

    def __getitem__(self, name: str) -> Tensor:
        return self._all[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    @property
    def ranks(self) -> ProcessGroup:
        """Old name of `group`, which goes with the next release."""
        warn_of_old_name("SharedWindows.ranks", "SharedWindows.group")
        return self.group


def share_windows(
    windows: Tensor | Mapping[str, Tensor],
    group: ProcessGroup | None = None,
    *,
    ranks: ProcessGroup | None = None,
) -> Tensor | Mapping[str, Tensor]:
    """Share windows between the ranks of the default process group; see the module's docstring.

    A rank that fails raises its own error; the other ranks wait until torchrun ends them. Run all
    code that uses the windows inside `group.failing_together()` to raise that error on all ranks.

    Args:
        windows: token ids (N, T), or a mapping of these and an attention_mask; the same windows on
            every rank.
        group: result of `ProcessGroup.of_default_group()`; give it to share several sets of
            windows. None makes a new one.
        ranks: old name of `group`, which goes with the next release.

    Returns:
        `SharedWindows`; for a process alone the windows themselves.

    Raises:
        ValueError: if there are fewer windows than ranks, or both `group` and `ranks` are given.
    """
    if ranks is not None:
        if group is not None:
            raise ValueError("group and ranks are two names of one argument; give group alone")
        warn_of_old_name("share_windows(ranks=...)", "share_windows(group=...)")
        group = ranks
    group = ProcessGroup.of_default_group() if group is None else group
    return windows if group.size == 1 else SharedWindows(windows, group)


def group_of(windows: Tensor | Mapping[str, Tensor]) -> ProcessGroup:
    """Return the processes that share windows; a group of this process alone if none do."""
    return windows.group if isinstance(windows, SharedWindows) else ProcessGroup()


def own_windows(windows: Tensor | Mapping[str, Tensor]) -> Tensor | Mapping[str, Tensor]:
    """Return the windows that this rank feeds: its rows of shared windows, else all windows."""
    if not isinstance(windows, SharedWindows):
        return windows
    return {name: value[windows.rows] for name, value in windows.items()}


def first_own_window(windows: Tensor | Mapping[str, Tensor]) -> int:
    """Return the index, among the windows of all ranks, of the first that this rank feeds."""
    return windows.rows.start if isinstance(windows, SharedWindows) else 0
