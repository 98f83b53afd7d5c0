"""How the tests run the command `llama-ext`."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Result(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]


def command(*arguments: object) -> list[str]:
    """The command for a process of its own."""
    return [sys.executable, "-m", "llama_ext", *map(str, arguments)]


def run_process(*arguments: object, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    """Runs the command in a process of its own."""
    given: dict[str, Any] = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
    return subprocess.run(command(*arguments), capture_output=True, timeout=60, check=False, **given)


# A child that makes the terminal at its standard input its own, so that what is typed there can interrupt it.
_LAUNCHER = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "llama_ext", *sys.argv[1:]])
"""


class Terminal:
    """The command on a pseudo-terminal of its own; a context manager.

    Args:
        arguments: Of the command.
        kind: What TERM says; nothing is animated on a "dumb" one.
    """

    def __init__(self, *arguments: object, kind: str = "dumb") -> None:
        self._master, slave = os.openpty()
        environment = {**os.environ, "TERM": kind, "COLUMNS": "200"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCHER, *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
        )
        os.close(slave)
        self._unread = ""
        self._last_typed = b""

    def type(self, text: str) -> None:
        """Types a text; "\\x03" is Ctrl-C, "\\x04" is Ctrl-D."""
        self._last_typed = text.encode()
        os.write(self._master, self._last_typed)

    def read_until(self, text: str, seconds: float = 30.0) -> str:
        """What is shown up to a text, which is included."""
        deadline = time.monotonic() + seconds
        while text not in self._unread:
            ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"waited {seconds} s for {text!r}, got {self._unread[-2000:]!r}"
            more = self._read()
            assert more, f"it ended before {text!r}, with {self._unread[-2000:]!r}"
        end = self._unread.index(text) + len(text)
        shown, self._unread = self._unread[:end], self._unread[end:]
        return shown

    def read_to_end(self) -> tuple[str, int]:
        """What is left to be shown, and the exit code."""
        for patience in (10.0, 30.0):
            while select.select([self._master], [], [], patience)[0]:
                if not self._read():
                    shown, self._unread = self._unread, ""
                    return shown, self.process.wait(timeout=30)
            # What is typed while the program changes the terminal's mode can be lost, as with a person: once more.
            os.write(self._master, self._last_typed)
        raise AssertionError(f"it does not end, with {self._unread[-2000:]!r}")

    def _read(self) -> str:
        try:
            data = os.read(self._master, 65536)
        except OSError:  # how Linux says that nobody has the other end any more
            return ""
        text = data.decode("utf-8", "replace").replace("\r\n", "\n")
        self._unread += text
        return text

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(timeout=30)
        os.close(self._master)
