"""The progress bar of a run: on a terminal only, with what the run is at."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from bigram_runs import MakeRun, documents
from llama_ext.training import reporting
from llama_ext.training.reporting import Log


class Terminal(io.StringIO):
    """A stderr that says whether it is a terminal."""

    def __init__(self, tty: bool) -> None:
        super().__init__()
        self._tty = tty

    def isatty(self) -> bool:
        return self._tty


def shown(monkeypatch: pytest.MonkeyPatch, make_run: MakeRun, *, tty: bool = True, verbose: int = 1) -> str:
    stderr = Terminal(tty)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(reporting, "_INTERVAL", 0.0)
    make_run(None, documents(), epochs=2, verbose=verbose, peak_flops=1e9).run.go()
    return stderr.getvalue()


def test_a_terminal_shows_steps_losses_speed_and_share_of_peak(
    monkeypatch: pytest.MonkeyPatch, make_run: MakeRun
) -> None:
    text = shown(monkeypatch, make_run)
    for words in ("Training", "/12", "loss 2.", "val 2.", "tok/s", "% of peak"):
        assert words in text, words


def test_a_pipe_and_a_silent_run_show_nothing(monkeypatch: pytest.MonkeyPatch, make_run: MakeRun) -> None:
    assert shown(monkeypatch, make_run, tty=False) == ""
    assert shown(monkeypatch, make_run, verbose=0) == ""


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
