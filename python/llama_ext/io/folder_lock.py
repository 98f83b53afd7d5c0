"""One save into a directory at a time, so that its files are all of one of them."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from llama_ext.io.atomic import made_folder, named, remove_empty

if sys.platform != "win32":
    import fcntl

__all__ = ["held_by_this_process", "saving_into"]

# A directory may go while somebody waits for it, as whoever made it for a save that failed takes it away again.
_TRIES = 1000

_Identity = tuple[int, int]


class _Saving(threading.local):
    """The directories into which a thread is saving."""

    def __init__(self) -> None:
        self.folders: set[_Identity] = set()


_saving = _Saving()
# Directories that this process has locked for longer than a save.
_kept: set[_Identity] = set()


@contextlib.contextmanager
def saving_into(directory: str | os.PathLike[str]) -> Iterator[None]:
    """A block of code that writes the files of a save; the same of other threads and processes waits for its end.

    Blocks of one thread may be nested. A kill ends one, unless a process that was forked in it lives on. Where the system or the file
    system has no locks (Windows, some network file systems), nothing waits.

    Args:
        directory: Made if it is not there, and removed again if nothing is saved.

    Raises:
        OptionError, OSError: As `made_folder`.
    """
    folder = named(directory)
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    descriptor = -1
    identity: _Identity | None = None
    try:
        for _ in range(_TRIES):
            _make(folder)
            with contextlib.suppress(OSError):
                descriptor = os.open(folder, os.O_RDONLY)
            if descriptor < 0:
                break  # what is wrong, the save will say
            found = _identity(os.fstat(descriptor))
            if found in _saving.folders or found in _kept or not _lock(descriptor):
                break
            if _is_at(folder, found):
                identity = found
                _saving.folders.add(found)
                break
            # Another directory has its name by now, or none.
            _unlock(descriptor)
            descriptor = -1
        yield
    finally:
        try:
            # Before others go on: they find out that it is gone.
            if identity is None or _is_at(folder, identity):
                remove_empty(missing)
        finally:
            if identity is not None:
                _saving.folders.discard(identity)
            if descriptor >= 0:
                _unlock(descriptor)


@contextlib.contextmanager
def held_by_this_process(descriptor: int) -> Iterator[None]:
    """A block of code in which saves of this process do not wait for the lock that `descriptor`, of a directory, has.

    It is for who has it for long: a callback of a training may save where the checkpoints are.
    """
    identity = _identity(os.fstat(descriptor))
    _kept.add(identity)
    try:
        yield
    finally:
        _kept.discard(identity)


def _identity(stat: os.stat_result) -> _Identity:
    return stat.st_dev, stat.st_ino


def _is_at(folder: Path, identity: _Identity) -> bool:
    try:
        return _identity(os.stat(folder)) == identity
    except OSError:
        return False


def _make(folder: Path) -> None:
    for _ in range(_TRIES):
        with contextlib.suppress(FileNotFoundError):  # another save has just removed one of its parents
            made_folder(folder)
            return
    made_folder(folder)


def _lock(descriptor: int) -> bool:
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _unlock(descriptor: int) -> None:
    """Not by closing alone: a process that was forked meanwhile has it open, too."""
    try:
        if sys.platform != "win32":
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)
