"""What a user sees of long work: a bar on a terminal, lines in a file, never a long silence.

Work inside `Bar` shows its name, how far it is and the time left. On a terminal that is a bar whose
clock runs. Elsewhere the log gets a line at least every 30 seconds, and one at the end of work that
took longer than 5. Bars may nest: lines tell of the innermost.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ClassVar, TypeVar

from tqdm import tqdm

log = logging.getLogger(__name__)

LINE_SECONDS = 25.0  # between two lines in a file; a busy machine may take 5 more
TOLD_SECONDS = 5.0  # work that took longer says so at its end

Item = TypeVar("Item")


@contextmanager
def logging_from(name: str, level: int) -> Iterator[None]:
    """Let a logger and those below it tell only what has this level or a higher one; undo it."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


class Bar:
    """Shows work of one process while it runs; a context manager.

    Args:
        label: name of the work.
        total: number of its parts; None if it has none that can be counted.
        unit: name of a part, in the plural.
        quiet: show nothing, as on all processes but the first.
        started: parts that were done before, by an earlier start of the same work.
    """

    # Bars share one terminal, and so the thread that keeps their clocks running.
    _open: ClassVar[list[Bar]] = []
    _ticker: ClassVar[Ticker | None] = None

    def __init__(
        self,
        label: str,
        total: int | None = None,
        *,
        unit: str = "steps",
        quiet: bool = False,
        started: int = 0,
    ) -> None:
        self.label, self.total, self.unit, self.quiet = label, total, unit, quiet
        self.done = self.started = started
        self.note = ""  # what stands behind the numbers
        self.began = self.told = time.monotonic()
        self._drawn: Any = None

    def __enter__(self) -> Bar:
        """Show the bar."""
        self.began = self.told = time.monotonic()
        if self.quiet:
            return self
        if sys.stderr is not None and sys.stderr.isatty():
            counted = {"total": self.total, "initial": self.started, "unit": f" {self.unit}"}
            form = {} if self.total is not None else {"bar_format": "{desc}: {elapsed}{postfix}"}
            # delay: work that is over at once shows nothing
            self._drawn = tqdm(
                desc=self.label, **counted, **form, leave=False, dynamic_ncols=True, delay=0.3
            )
        Bar._open.append(self)
        if Bar._ticker is None:
            Bar._ticker = Ticker()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the bar away; where there is none, say how long the work took."""
        if self.quiet or self not in Bar._open:
            return
        Bar._open.remove(self)
        if not Bar._open and Bar._ticker is not None:
            Bar._ticker.stop()
            Bar._ticker = None
        seconds = time.monotonic() - self.began
        if self._drawn is not None:
            self._drawn.close()
        elif kind is None and seconds > TOLD_SECONDS:
            log.info("%s: done in %s", self.label, clock(seconds))
            self._tell_enclosing()

    def update(self, parts: int = 1, note: str = "") -> None:
        """Count parts that are done."""
        self.done += parts
        self.note = note or self.note
        if self._drawn is not None:
            self._drawn.set_postfix_str(self.note, refresh=False)
            self._drawn.update(parts)

    def describe(self) -> str:
        """Return the work in one line: its name, how far it is, and about how long it still takes.

        A rate needs a part that this start has done.
        """
        seconds = time.monotonic() - self.began
        if self.total is None:
            return f"{self.label}: {clock(seconds)}{self._behind()}"
        line = f"{self.label}: {self.done} of {self.total} {self.unit}, {clock(seconds)}"
        if self.done > self.started:
            rate = seconds / (self.done - self.started)
            line += f", about {clock(rate * (self.total - self.done))} left"
        return line + self._behind()

    def _behind(self) -> str:
        return f", {self.note}" if self.note else ""

    def _tell_enclosing(self) -> None:
        """The line just written counts for the bars around this one."""
        for bar in Bar._open:
            bar.told = time.monotonic()

    def tick(self) -> None:
        """Let the clock on the terminal run on; in a file, write a line if one is due."""
        if self._drawn is not None:
            self._drawn.refresh()
        elif time.monotonic() - self.told >= LINE_SECONDS and self is Bar._open[-1]:
            log.info("%s", self.describe())
            self._tell_enclosing()


class Ticker(threading.Thread):
    """Ticks all bars once a second, also while one part takes minutes."""

    def __init__(self) -> None:
        super().__init__(name="prunelight progress", daemon=True)
        self._stopped = threading.Event()
        self.start()

    def run(self) -> None:
        """Tick until stopped."""
        while not self._stopped.wait(1.0):
            for bar in [*Bar._open]:
                bar.tick()

    def stop(self) -> None:
        """Tick no more."""
        self._stopped.set()


def show_progress(
    items: Iterable[Item],
    label: str,
    *,
    total: int | None = None,
    unit: str = "steps",
    quiet: bool = False,
) -> Iterator[Item]:
    """Yield items and show how many are done."""
    total = len(items) if total is None and isinstance(items, Sized) else total
    with Bar(label, total, unit=unit, quiet=quiet) as bar:
        for item in items:
            yield item
            bar.update()


def clock(seconds: float) -> str:
    """Return a time as a clock shows it: 0:07, 12:30 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class BesideBars(logging.StreamHandler[Any]):
    """Writes log lines to stderr, above the bars that a terminal shows."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        if not self.stream.isatty():
            super().emit(record)  # at once: other processes may write to the same file
            return
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:  # as logging.Handler.emit does
            self.handleError(record)
