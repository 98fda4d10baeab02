"""Calibration windows shared out over processes: each rank feeds its rows, sums are those of all.

    torch.distributed.init_process_group()  # under torchrun; every rank holds model and windows
    windows = prunelight.share_windows(windows)
    plan = ShortGPT(0.2).plan(model, windows)  # the same call on every rank, and the same plan
    model = prunelight.apply(model, plan, windows)

Whatever takes windows takes these; what is no sum over windows (shape, fingerprint, vocabulary) is
that of all. All ranks must make the same calls. A share consists of micro-batches that one process
would feed, and sums keep their dtype, so that all statistics are those of one process up to the
order of additions. With fewer micro-batches than ranks they are split: that changes CKA, whose
kernels are made of tokens of one micro-batch, into another sample of the same estimate. Every rank
gets rank 0's bytes of a sum, and its plan: no rounding can part their ways. Work on weights (masks,
rotations) every rank does for its own copy, which gives equal bytes on equal hardware; in a fit all
load what rank 0 saved.
"""

# N windows, T tokens

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from prunelight.runtime.processes import ProcessGroup

MICRO_BATCH_TOKENS = 2048


class SharedWindows(Mapping[str, Tensor]):
    """Windows of which each rank feeds its rows.

    A mapping of what all ranks hold: input_ids (N, T), and what else was given.

    Attributes:
        group: that share them.
        rows: of this rank.

    Raises:
        ValueError: if there are fewer windows than ranks.
    """

    def __init__(self, windows: Tensor | Mapping[str, Tensor], group: ProcessGroup) -> None:
        given = {"input_ids": windows} if isinstance(windows, Tensor) else dict(windows)
        count, seq_len = len(given["input_ids"]), given["input_ids"].shape[-1]
        if count < group.size:
            raise ValueError(
                f"{count} windows cannot be shared by {group.size} ranks, each needs one; give "
                "more windows (data.num_calibration, data.num_validation) or start fewer processes"
            )
        self.group = group
        self.rows = group.rows(count, max(1, MICRO_BATCH_TOKENS // max(1, seq_len)))
        self._all = given

    def __getitem__(self, name: str) -> Tensor:
        return self._all[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)


def share_windows(
    windows: Tensor | Mapping[str, Tensor], group: ProcessGroup | None = None
) -> Tensor | Mapping[str, Tensor]:
    """Share windows out over the ranks of the default process group; see the module's docstring.

    A rank that fails raises its own error and leaves the others waiting, which torchrun ends; to
    end them with that error, run all that uses the windows inside `group.together()`.

    Args:
        windows: token ids (N, T), or a mapping with an attention_mask; the same on every rank.
        group: of `ProcessGroup.of_default_group()`, to share several windows; None makes one.

    Returns:
        `SharedWindows`; for one rank alone the windows themselves.

    Raises:
        ValueError: if there are fewer windows than ranks.
    """
    group = ProcessGroup.of_default_group() if group is None else group
    return windows if group.size == 1 else SharedWindows(windows, group)


def group_of(windows: Tensor | Mapping[str, Tensor]) -> ProcessGroup:
    """Return the ranks that share windows: one alone for windows that are not shared."""
    return windows.group if isinstance(windows, SharedWindows) else ProcessGroup()


def own_windows(windows: Tensor | Mapping[str, Tensor]) -> Tensor | Mapping[str, Tensor]:
    """Return the rows of shared windows that this rank feeds; others as they are."""
    if not isinstance(windows, SharedWindows):
        return windows
    return {name: value[windows.rows] for name, value in windows.items()}


def first_own_window(windows: Tensor | Mapping[str, Tensor]) -> int:
    """Return which of all windows is the first of `own_windows`."""
    return windows.rows.start if isinstance(windows, SharedWindows) else 0
