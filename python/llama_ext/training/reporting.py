"""How a run is followed: a progress bar on a terminal, and a file with one JSON object a line."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from llama_ext.training.history import StepRecord, Validation

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["Log", "TrainingBar"]

# Seconds between two drawings; the first one comes after as many.
_INTERVAL = 0.5


class Log:
    """Appends one JSON object a line to a file; does nothing without one.

    Args:
        path: The file, or None. Lines that are there stay.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self._file: IO[str] | None = None if path is None else open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, event: str, **values: Any) -> None:
        """Writes an event; numbers that are not finite become null, which is JSON."""
        if self._file is None:
            return
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        self._file.write(json.dumps({"event": event, **finite}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


class TrainingBar:
    """Steps, loss, tokens a second, share of the machine's peak and the time left, on stderr if that is a terminal.

    Args:
        total: Steps of the run.
        done: Of them, those of an earlier run.
        flops_per_token: Of forward and backward, or None.
        peak_flops: Floating-point operations a second that the machine can do, or None.
        shown: False shows nothing.
    """

    def __init__(
        self, total: int, done: int, flops_per_token: float | None, peak_flops: float | None, *, shown: bool
    ) -> None:
        self._total = total
        self._done = done
        self._flops_per_token = flops_per_token
        self._peak = peak_flops
        self._wanted = shown and sys.stderr is not None and sys.stderr.isatty()
        self._drawn = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._validation = ""

    def __enter__(self) -> TrainingBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def share_of_peak(self, tokens_per_second: float) -> float | None:
        """In [0, 1], or None where it is not known."""
        if self._peak is None or self._flops_per_token is None:
            return None
        return tokens_per_second * self._flops_per_token / self._peak

    def validated(self, validation: Validation) -> None:
        """Shows a validation loss from now on."""
        self._validation = f"  val {validation.loss:.4f}"

    def update(self, record: StepRecord, loss: float) -> None:
        """Shows a step.

        Args:
            record: The step.
            loss: Smoothed.
        """
        if not self._wanted or time.monotonic() - self._drawn < _INTERVAL:
            return
        self._drawn = time.monotonic()
        if self._bar is None:
            self._bar, self._task = self._open()
        share = self.share_of_peak(record.tokens_per_second)
        peak = "" if share is None else f"  {share:.0%} of peak"
        text = f"loss {loss:.4f}{self._validation}  {record.tokens_per_second:,.0f} tok/s{peak}"
        if self._task is not None:
            self._bar.update(self._task, completed=record.step, numbers=text)

    def _open(self) -> tuple[Progress, TaskID]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        bar = Progress(
            TextColumn("Training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        task = bar.add_task("Training", total=self._total, completed=self._done, numbers="")
        bar.start()
        return bar, task
