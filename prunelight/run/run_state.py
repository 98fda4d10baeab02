"""The state of one run: its directory, and the plans before it."""

from __future__ import annotations

from pathlib import Path

from prunelight.models.saving import MARKER, check_replaceable
from prunelight.runtime.atomic_files import check_writable

FINAL, ADAPTER = "final", "adapter"  # directories of a run


def plan_files(directory: Path) -> list[Path]:
    """Return the plans beside a model that prunelight saved, in the order they were carried out."""
    if not (directory / MARKER).is_file():
        return []
    # plan.json, plan-2.json, ..., plan-10.json
    return sorted(directory.glob("plan*.json"), key=lambda file: (len(file.name), file.name))


def check_output(root: Path) -> None:
    """Check that a run may write its result and report.

    Raises:
        FileExistsError: if there is a final/, adapter/ or report.md that prunelight did not write.
        OSError: if nothing can be written there.
    """
    check_writable(root)
    check_replaceable(root / FINAL)
    check_replaceable(root / ADAPTER)
    report = root / "report.md"
    if report.exists() and not report.with_name("report.json").exists():
        raise FileExistsError(
            f"{report} exists and has no report.json of prunelight beside it; set "
            "trainer.default_root_dir to a directory of its own"
        )
