"""A progress bar for what takes longer than a second, on a terminal only."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["ProgressBar"]

# Seconds of silence: a bar that flashes by tells nobody anything.
_DELAY = 1.0


class ProgressBar:
    """Shows a bar on stderr once a second has passed, if stderr is a terminal; otherwise nothing at all.

    Args:
        label: What is going on, for example "Loading weights".
        total: How much there is to do, in `unit`.
        unit: "bytes" shows sizes and speed; any other word is shown after the count.
    """

    def __init__(self, label: str, total: int, unit: str) -> None:
        self._label = label
        self._total = total
        self._unit = unit
        self._done = 0
        self._started = time.monotonic()
        self._wanted = sys.stderr is not None and sys.stderr.isatty()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, amount: int) -> None:
        """Says that `amount` more is done."""
        self._done += amount
        if not self._wanted:
            return
        if self._bar is None:
            if time.monotonic() - self._started < _DELAY:
                return
            self._bar, self._task = self._open()
        if self._task is not None:
            self._bar.update(self._task, completed=self._done)

    def _open(self) -> tuple[Progress, TaskID]:
        # Imported here: rich takes longer to import than a small model to load.
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        amount = DownloadColumn() if self._unit == "bytes" else MofNCompleteColumn()
        unit = TextColumn("" if self._unit == "bytes" else self._unit)
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            amount,
            unit,
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        task = bar.add_task(self._label, total=self._total)
        bar.start()
        return bar, task
