"""What is shown of a run: a bar on a terminal, with what the run is at, and plain lines elsewhere."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bigram_runs import MakeRun, documents
from llama_ext.training import Callback, reporting
from llama_ext.training.batches import Stream
from llama_ext.training.reporting import Log
from stop_at import StopAt


class Terminal(io.StringIO):
    """A stderr that says whether it is a terminal."""

    def __init__(self, tty: bool) -> None:
        super().__init__()
        self._tty = tty

    def isatty(self) -> bool:
        return self._tty


def shown(
    monkeypatch: pytest.MonkeyPatch,
    make_run: MakeRun,
    *,
    tty: bool = True,
    verbose: int = 1,
    epochs: int = 2,
    metrics: Sequence[str] = ("accuracy",),
) -> str:
    stderr = Terminal(tty)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(reporting, "_INTERVAL", 0.0)
    settings: dict[str, Any] = {"epochs": epochs, "verbose": verbose, "peak_flops": 1e9}
    make_run(None, documents(), {"metrics": metrics}, **settings).run.go()
    return stderr.getvalue()


def test_a_terminal_shows_steps_losses_speed_and_share_of_peak(
    monkeypatch: pytest.MonkeyPatch, make_run: MakeRun
) -> None:
    text = shown(monkeypatch, make_run)
    for words in ("Training", "/12", "loss 2.", "val 2.", "tok/s", "% of peak"):
        assert words in text, words


def lines(text: str) -> list[str]:
    """Plain lines without their speeds, which differ from run to run."""
    return re.sub(r"[\d,]+ tok/s, \d+% of peak", "SPEED", text).splitlines()


def test_a_file_gets_a_line_for_each_epoch_and_validation(monkeypatch: pytest.MonkeyPatch, make_run: MakeRun) -> None:
    found = lines(shown(monkeypatch, make_run, tty=False, metrics=["accuracy", "perplexity"]))
    number = r"\d\.\d{4}"
    expected = [
        rf"Training: step 6 of 12 \(epoch 1 of 2\): loss {number}, SPEED",
        rf"Training: step 6 of 12 \(epoch 1 of 2\): validation loss {number}, accuracy {number}, perplexity {number}",
        rf"Training: step 12 of 12 \(epoch 2 of 2\): loss {number}, SPEED",
        rf"Training: step 12 of 12 \(epoch 2 of 2\): validation loss {number}, accuracy {number}, perplexity {number}",
    ]
    assert len(found) == len(expected)
    for line, pattern in zip(found, expected, strict=True):
        assert re.fullmatch(pattern, line), line


def steps_of(text: str) -> list[int]:
    return [int(found) for found in re.findall(r"step (\d+) of \d+[^:]*: loss", text)]


def test_short_epochs_do_not_fill_a_file(monkeypatch: pytest.MonkeyPatch, make_run: MakeRun) -> None:
    # 600 steps, and 100 epochs with a validation each: a line of each kind for 5% of the steps.
    text = shown(monkeypatch, make_run, tty=False, epochs=100)
    assert steps_of(text) == list(range(30, 601, 30))
    assert text.count("validation loss") == 20


class Clock:
    """Time that passes by so many seconds a step."""

    def __init__(self, seconds: float) -> None:
        self.now, self._seconds = 0.0, seconds

    def monotonic(self) -> float:
        return self.now

    def tick(self) -> None:
        self.now += self._seconds


def test_a_long_epoch_writes_a_line_every_ten_seconds_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, make_run: MakeRun, stream: Stream
) -> None:
    clock, stderr = Clock(3.0), Terminal(False)
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(reporting, "time", clock)

    class Tick(Callback):
        def on_step_end(self, *_: Any) -> None:
            clock.tick()

    made = make_run(stream, max_steps=22, verbose=1, callbacks=[Tick()], batch_size=1)
    assert made.run.history.steps_per_epoch > 22
    made.run.go()
    # Time is looked at before it passes: after 4 steps, 12 seconds are over for the fifth.
    assert steps_of(stderr.getvalue()) == [5, 9, 13, 17, 21, 22]
    found = stderr.getvalue().splitlines()
    assert found[0].startswith("Training: step 5 of 22: loss ")
    assert found[0].endswith("tok/s, 41 s left")
    assert found[-1].endswith("tok/s")


@pytest.mark.parametrize(("seconds", "text"), [(41.2, "41 s"), (150, "2 min"), (5300, "88 min"), (9000, "2.5 h")])
def test_the_time_left_has_a_unit_that_fits(seconds: float, text: str) -> None:
    assert reporting._shown_time(seconds) == text


def test_a_run_that_is_stopped_says_where(monkeypatch: pytest.MonkeyPatch, make_run: MakeRun, stream: Stream) -> None:
    stderr = Terminal(False)
    monkeypatch.setattr(sys, "stderr", stderr)
    made = make_run(stream, max_steps=20, verbose=1, callbacks=[StopAt(3)], batch_size=1)
    made.run.go()
    assert steps_of(stderr.getvalue()) == [3]


def test_a_silent_run_shows_nothing(monkeypatch: pytest.MonkeyPatch, make_run: MakeRun) -> None:
    assert shown(monkeypatch, make_run, verbose=0) == ""
    assert shown(monkeypatch, make_run, tty=False, verbose=0) == ""


def test_a_reader_who_is_gone_does_not_end_a_run(monkeypatch: pytest.MonkeyPatch, make_run: MakeRun) -> None:
    class Gone(Terminal):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone(False))
    assert len(make_run(max_steps=2, verbose=1).run.go().steps) == 2


def test_what_is_quick_shows_nothing(monkeypatch: pytest.MonkeyPatch, make_run: MakeRun) -> None:
    stderr = Terminal(True)
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(reporting, "_INTERVAL", 60.0)
    make_run(max_steps=2, verbose=1).run.go()
    assert stderr.getvalue() == ""


def test_a_process_without_stderr_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch, make_run: MakeRun) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert len(make_run(max_steps=2, verbose=1).run.go().steps) == 2


def test_a_log_is_json_whatever_the_numbers_are(tmp_path: Path) -> None:
    log = Log(tmp_path / "log")
    log.write("step", loss=float("nan"), lr=float("inf"), step=1)
    log.close()
    assert (tmp_path / "log").read_text() == '{"event": "step", "loss": null, "lr": null, "step": 1}\n'
