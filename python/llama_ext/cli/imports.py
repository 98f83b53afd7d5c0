"""Importing what computes, safe from Ctrl-C."""

from __future__ import annotations

import importlib
import signal
import threading
from types import FrameType

__all__ = ["import_runtime"]

_MODULES = ("numpy", "tokenizers", "llama_ext.runtime.model", "llama_ext.system_info")


def import_runtime() -> None:
    """Imports what all commands need, and puts Ctrl-C off until that is done, a fraction of a second.

    In the middle of an import it would come out as NumPy's ImportError, or in a few places not at all.

    Raises:
        KeyboardInterrupt: Ctrl-C came.
    """
    before = signal.getsignal(signal.SIGINT)
    # Without a handler of Python's there is nothing to put off; in another thread there is no way to.
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        _import()
        return
    came = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True

    signal.signal(signal.SIGINT, note)
    try:
        _import()
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def _import() -> None:
    for name in _MODULES:
        importlib.import_module(name)
