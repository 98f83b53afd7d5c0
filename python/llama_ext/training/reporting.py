"""How a run is followed: a progress bar on a terminal, elsewhere plain lines, and a file with one JSON object a line."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from llama_ext.training.history import StepRecord, Validation

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["Log", "TrainingBar"]

# Seconds between two drawings; the first one comes after as many.
_INTERVAL = 0.5
# Seconds between two plain lines, but for ends of epochs and validations. These wait for no time, but for a share of the run's
# steps: short epochs would fill a log.
_LINE_INTERVAL = 10.0
_LINE_SHARE = 0.05


class Log:
    """Appends one JSON object a line to a file; does nothing without one.

    Args:
        path: The file, or None. Lines that are there stay.

    Raises:
        OSError: The file cannot be opened, or written to: of `write` and `close` as well. It names the file.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self._path = path
        self._file: IO[str] | None = None if path is None else open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, event: str, **values: Any) -> None:
        """Writes an event; numbers that are not finite become null, which is JSON."""
        if self._file is None:
            return
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        with self._named():
            self._file.write(json.dumps({"event": event, **finite}) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            with self._named():
                self._file.close()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """A full disk names no file."""
        try:
            yield
        except OSError as error:
            if error.filename is None and self._path is not None:
                raise OSError(error.errno, error.strerror, os.fspath(self._path)) from error
            raise


class _Lines:
    """What stderr gets where it is no terminal: a file of nohup, a log of a cluster, a notebook.

    Args:
        total: Steps of the run.
        done: Of them, those of an earlier run.
        steps_per_epoch: Steps of an epoch.
    """

    def __init__(self, total: int, done: int, steps_per_epoch: int) -> None:
        self._total = total
        self._done = done
        self._per_epoch = steps_per_epoch
        self._started = time.monotonic()
        # When the last line of a kind was written, and after which step.
        self._written = dict.fromkeys(("step", "validation"), (self._started, done))
        self._last: tuple[StepRecord, str] | None = None

    def step(self, record: StepRecord, numbers: str) -> None:
        """Writes a step, if it is time to."""
        self._last = record, numbers
        ends_epoch = record.step % self._per_epoch == 0
        if self._is_late("step") or (ends_epoch and self._is_due("step", record.step)) or record.step == self._total:
            self._write_step()

    def validation(self, found: Validation) -> None:
        """Writes a score of the validation data, if it is time to."""
        if not (self._is_late("validation") or self._is_due("validation", found.step) or found.step == self._total):
            return
        scores = {"accuracy": found.accuracy, "perplexity": found.perplexity}
        known = "".join(f", {name} {value:.4f}" for name, value in scores.items() if value is not None)
        self._write("validation", found.step, f"validation loss {found.loss:.4f}{known}")

    def end(self) -> None:
        """Writes where the run ended, if that is not written yet: a callback or Ctrl-C may have ended it."""
        if self._last is not None and self._last[0].step > self._written["step"][1]:
            self._write_step()

    def _is_late(self, kind: str) -> bool:
        return time.monotonic() - self._written[kind][0] >= _LINE_INTERVAL

    def _is_due(self, kind: str, step: int) -> bool:
        return step - self._written[kind][1] >= _LINE_SHARE * self._total

    def _write_step(self) -> None:
        if self._last is None:
            return
        record, numbers = self._last
        left = ""
        if record.step < self._total:
            seconds = (time.monotonic() - self._started) * (self._total - record.step) / (record.step - self._done)
            left = f", {_shown_time(seconds)} left" if seconds >= 1 else ""
        self._write("step", record.step, f"{numbers}{left}")

    def _write(self, kind: str, step: int, text: str) -> None:
        self._written[kind] = time.monotonic(), step
        epochs = -(-self._total // self._per_epoch)
        epoch = f" (epoch {-(-step // self._per_epoch)} of {epochs})" if epochs > 1 else ""
        # Whoever read it may have gone: no reason to end a run.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(f"Training: step {step:,} of {self._total:,}{epoch}: {text}\n")
            sys.stderr.flush()


def _shown_time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class TrainingBar:
    """Steps, loss, tokens a second, share of the machine's peak and the time left, on stderr: a bar where that is a terminal, and
    else a line now and then.

    Args:
        total: Steps of the run.
        done: Of them, those of an earlier run.
        flops_per_token: Of forward and backward, or None.
        peak_flops: Floating-point operations a second that the machine can do, or None.
        steps_per_epoch: Steps of an epoch.
        shown: False shows nothing.
    """

    def __init__(
        self,
        total: int,
        done: int,
        flops_per_token: float | None,
        peak_flops: float | None,
        *,
        steps_per_epoch: int,
        shown: bool,
    ) -> None:
        self._total = total
        self._done = done
        self._flops_per_token = flops_per_token
        self._peak = peak_flops
        is_shown = shown and sys.stderr is not None
        self._wanted = is_shown and sys.stderr.isatty()
        self._lines = _Lines(total, done, steps_per_epoch) if is_shown and not self._wanted else None
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
        if self._lines is not None:
            self._lines.end()

    def share_of_peak(self, tokens_per_second: float) -> float | None:
        """In [0, 1], or None where it is not known."""
        if self._peak is None or self._flops_per_token is None:
            return None
        return tokens_per_second * self._flops_per_token / self._peak

    def validated(self, validation: Validation) -> None:
        """Shows a validation loss from now on."""
        self._validation = f"  val {validation.loss:.4f}"
        if self._lines is not None:
            self._lines.validation(validation)

    def update(self, record: StepRecord, loss: float) -> None:
        """Shows a step.

        Args:
            record: The step.
            loss: Smoothed.
        """
        if self._lines is not None:
            self._lines.step(record, f"loss {loss:.4f}, {self._speed(record, ', ')}")
        if not self._wanted or time.monotonic() - self._drawn < _INTERVAL:
            return
        self._drawn = time.monotonic()
        if self._bar is None:
            self._bar, self._task = self._open()
        if self._task is not None:
            text = f"loss {loss:.4f}{self._validation}  {self._speed(record, '  ')}"
            self._bar.update(self._task, completed=record.step, numbers=text)

    def _speed(self, record: StepRecord, separator: str) -> str:
        share = self.share_of_peak(record.tokens_per_second)
        peak = "" if share is None else f"{separator}{share:.0%} of peak"
        return f"{record.tokens_per_second:,.0f} tok/s{peak}"

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
