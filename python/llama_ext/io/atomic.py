"""Saves that are whole or absent: a crash, a full disk or a kill leaves the old file untouched."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = ["atomic_write", "remove", "sync_folder"]


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make the renames in a folder durable.

    Args:
        folder: An existing directory. Where a system cannot open or sync a directory (Windows), nothing happens.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        # Some network file systems refuse fsync on a directory; the rename itself is still atomic there.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: str | os.PathLike[str]) -> None:
    """Remove a file, if it is there, for good: what is done next outlives a crash only together with this.

    Args:
        path: The file, or a link, which goes instead of what it names.

    Raises:
        OSError: It cannot be removed.
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
        sync_folder(Path(path).parent)


@contextlib.contextmanager
def atomic_write(
    path: str | os.PathLike[str],
    *,
    follow_links: bool = False,
    replacing: Callable[[], None] | None = None,
    sync: bool = True,
) -> Iterator[BinaryIO]:
    """Write a file so that other readers, and a crash, see the old content or the new one, never a part.

    The bytes go to a temporary file in the same folder; when the block ends it is synced, renamed over `path`, and
    the folder is synced. If the block raises, the temporary file is removed and `path` is untouched. A memory map
    or an open handle of the old file stays valid.

    Args:
        path: The file to create or replace; its folder must exist. The permissions of a replaced file are kept.
        follow_links: Whether a symbolic link at `path` survives and the file that it names is replaced: for a path that
            the user named. Otherwise the link is replaced: what lies in a folder to be saved into, such as a snapshot
            of the Hub's cache, may be a link to a file that others share.
        replacing: Called when the new content is whole and synced, right before it replaces the old one.
        sync: Whether to wait for the disk. Without, a kill still leaves the old content or the new one, but a power cut may
            leave a part: for large files that can be made again.

    Yields:
        A binary file open for writing and seeking.

    Raises:
        OSError: When the folder does not exist or cannot be written, or the disk is full.
    """
    target = Path(os.path.realpath(path) if follow_links else path)
    mode = None
    with contextlib.suppress(OSError):
        found = os.lstat(target).st_mode
        mode = None if stat.S_ISLNK(found) else stat.S_IMODE(found)
    # O_EXCL and an unguessable name: nobody can place a link there beforehand. 0o666 is cut by the umask, as in open().
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(8)}.tmp")
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            if mode is not None:
                # Before the rename, and not worth failing a save for.
                with contextlib.suppress(OSError):
                    os.chmod(temporary, mode)
            if sync:
                os.fsync(file.fileno())
        if replacing is not None:
            replacing()
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if sync:
        sync_folder(target.parent)
