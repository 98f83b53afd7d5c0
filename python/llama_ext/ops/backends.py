"""The backends that the operations share."""

from __future__ import annotations

import functools
import os
import threading

from llama_ext import _core
from llama_ext.ops.arguments import word
from llama_ext.runtime.threads import checked_threads, get_num_threads

__all__ = ["backend_for"]

_CREATING = threading.Lock()


def backend_for(device: str, threads: int | None, isa: str | None) -> _core.Backend:
    """The backend that operations with these options share; its threads start once.

    Raises:
        DeviceError: There is no such device or instruction set here.
        OptionError: `threads` is out of range.
    """
    # A backend takes its default threads and LLAMA_EXT_ISA when it is made, so both belong to the key, but of the CPU alone: matrices
    # that were packed for one device must share one backend, whatever is said about the CPU in between.
    count = checked_threads(threads)
    device, isa = word(device), "" if isa is None else word(isa)
    # The lock, because two threads that come first at once would each get a backend of their own.
    with _CREATING:
        if device == "reference":
            return _cached_backend(device, 0, "", "")
        if device != "cpu":
            return _cached_backend("cuda:0" if device == "cuda" else device, 0, isa, "")
        forced = "" if isa else os.environ.get("LLAMA_EXT_ISA", "")
        return _cached_backend(device, count or get_num_threads(), isa, forced)


@functools.lru_cache(maxsize=16)
def _cached_backend(device: str, threads: int, isa: str, forced: str) -> _core.Backend:
    """`forced` only tells backends apart: the core reads the environment itself, and names it in its errors."""
    return _core.Backend(device, threads, isa)
