"""How the tests run the command `llama-ext`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import llama_ext

DEMO = Path(llama_ext.__file__).parent / "data" / "demo"


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
