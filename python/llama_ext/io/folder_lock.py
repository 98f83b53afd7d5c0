"""One save into a directory at a time, so that its files are all of one of them."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

from llama_ext.io.atomic import folder_for, named

if sys.platform != "win32":
    import fcntl

__all__ = ["LOCK_FILE", "saving_into"]

# There while a save lasts; after a kill until the next one. A lock of the directory itself is a training's, for as long as that runs.
LOCK_FILE = ".llama_ext-save.lock"


class _Held(threading.local):
    """The directories into which a thread is saving."""

    def __init__(self) -> None:
        self.folders: set[str] = set()


_held = _Held()


@contextlib.contextmanager
def saving_into(directory: str | os.PathLike[str]) -> Iterator[None]:
    """A block of code that writes the files of a save; the same of other threads and processes waits for its end.

    Blocks of one thread may be nested. A kill ends one. Where the system or the file system has no locks (Windows, some
    network file systems), nothing waits.

    Args:
        directory: Made if it is not there, and removed again if nothing is saved.

    Raises:
        OptionError, OSError: As `made_folder`.
    """
    folder = os.path.realpath(named(directory))
    if folder in _held.folders:
        yield
        return
    with folder_for(directory):
        _held.folders.add(folder)
        try:
            with _locked(os.path.join(folder, LOCK_FILE)):
                yield
        finally:
            _held.folders.discard(folder)


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    descriptor = _lock(path)
    try:
        yield
    finally:
        if descriptor is not None:
            # Whoever waits for this file finds that it is gone, and makes the next one.
            with contextlib.suppress(OSError):
                os.unlink(path)
            # Not by closing alone: a process that was forked meanwhile has it open, too.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _lock(path: str) -> int | None:
    """An open file that is locked and has this name, or None where there is none to be had: what is wrong, the save will say."""
    if sys.platform == "win32":
        return None
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                    return descriptor
        except OSError:
            os.close(descriptor)
            return None
        except BaseException:  # Ctrl-C while it waited
            os.close(descriptor)
            raise
        os.close(descriptor)
