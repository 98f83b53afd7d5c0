"""A progress bar: only on a terminal, and only for what takes longer than a second."""

from __future__ import annotations

import io
import sys

import pytest

from llama_ext.runtime import progress
from llama_ext.runtime.progress import ProgressBar


class Terminal(io.StringIO):
    """A stderr that says it is a terminal, or that it is none."""

    def __init__(self, tty: bool) -> None:
        super().__init__()
        self._tty = tty

    def isatty(self) -> bool:
        return self._tty


def shown(monkeypatch: pytest.MonkeyPatch, *, tty: bool, delay: float) -> str:
    stderr = Terminal(tty)
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(progress, "_DELAY", delay)
    with ProgressBar("Doing things", 10, "things") as bar:
        for _ in range(10):
            bar.advance(1)
    return stderr.getvalue()


def test_what_takes_long_shows_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert "Doing things" in shown(monkeypatch, tty=True, delay=0.0)


def test_what_is_quick_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, tty=True, delay=60.0) == ""


def test_a_file_or_pipe_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, tty=False, delay=0.0) == ""


def test_a_process_without_stderr_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with ProgressBar("Doing things", 1, "things") as bar:
        bar.advance(1)
