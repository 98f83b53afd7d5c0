"""Saves that are whole or absent: a crash, a full disk or a kill leaves the old file untouched."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from llama_ext.errors import OptionError

__all__ = [
    "atomic_write",
    "check_file",
    "check_folder",
    "exchange",
    "folder_for",
    "made_folder",
    "named",
    "path_text",
    "remove",
    "remove_empty",
    "sync_folder",
]

# What writing bytes may raise.
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
# What exchanging names raises where the kernel or the file system cannot.
_NOT_OFFERED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)
# From linux/fcntl.h and linux/fs.h.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# O_EXCL and an unguessable name: nobody can place a link there beforehand.
_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)


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


def path_text(path: object, what: str) -> str:
    """A path as text.

    Args:
        path: What a caller gives for one.
        what: What it is, in the user's words, for the message.

    Returns:
        Its text.

    Raises:
        OptionError: It is no path; bytes are none either.
    """
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else path
    if not isinstance(text, str):
        raise OptionError(f"{what} must be a str or an os.PathLike, got {type(text).__name__}")
    return text


def _to_save_into(path: object) -> str:
    """A path that a system may have, as text: what else is passed to it comes back as a TypeError or ValueError.

    Raises:
        OptionError: It is no path, or has a character that no name of a file may have.
    """
    text = path_text(path, "the path to save into")
    try:
        wrong = "a NUL character" if "\0" in text else ""
        os.fsencode(text)
    except UnicodeEncodeError as error:
        wrong = f"{text[error.start]!a}, which this system cannot write in a name"
    if wrong:
        raise OptionError(f"the path to save into has {wrong}: {ascii(text)[:200]}. Name another one")
    return text


def named(path: str | os.PathLike[str]) -> Path:
    """The path that a caller names to save into; an empty one, such as that of an unset variable, would be the current directory.

    Raises:
        OptionError: It is empty, is no path, or has a character that no name of a file may have.
    """
    text = _to_save_into(path)
    if not text:
        raise OptionError("the path to save into is empty: name one, or '.' for this directory")
    return Path(text)


def made_folder(path: str | os.PathLike[str]) -> Path:
    """Makes a directory that is to be saved into, with those above it.

    Args:
        path: It may be there.

    Returns:
        It.

    Raises:
        OptionError: As `named`.
        OSError: It cannot be made.
    """
    folder = named(path)
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            if not os.path.lexists(error.filename or folder):
                continue  # a directory that another save has just removed
            raise NotADirectoryError(
                errno.ENOTDIR, "this is a file, and a directory is to be written", str(folder)
            ) from error
        return folder


@contextlib.contextmanager
def folder_for(path: str | os.PathLike[str]) -> Iterator[None]:
    """A block of code that writes into a directory, which is made for it, and goes again where nothing was written.

    Raises:
        OptionError, OSError: As `made_folder`.
    """
    missing = [each for each in (Path(path), *Path(path).parents) if not each.exists()]
    made_folder(path)
    try:
        yield
    finally:
        remove_empty(missing)


def remove_empty(folders: Iterable[Path]) -> None:
    """Removes directories, in this order, as far as they are there and empty."""
    for each in folders:
        with contextlib.suppress(OSError):
            each.rmdir()


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


def exchange(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> bool:
    """Let two paths of one file system name each what the other named, in one step: the way to replace a directory.

    Args:
        first: A file or directory.
        second: Another.

    Returns:
        Whether it was done. Linux alone has such a step (renameat2), and not on every file system (NFS).

    Raises:
        OSError: A path does not exist, or may not be renamed.
    """
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:  # a C library from before 2018
        return False
    names = (os.fsencode(first), os.fsencode(second))
    if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_OFFERED:
        return False
    raise OSError(code, os.strerror(code), os.fspath(first), None, os.fspath(second))


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Refuses a directory that cannot be created or written into, before the work whose result it is to hold.

    It is tried: what is missing is created and removed again, as permissions alone do not tell.

    Args:
        folder: The directory, there or not.

    Raises:
        OSError: It cannot be written into; `filename` is `folder`.
    """
    if not os.fspath(folder):
        raise FileNotFoundError(errno.ENOENT, "the path of a directory is empty: name one, or '.' for this one", "")
    path = Path(folder)
    missing = [each for each in (path, *path.parents) if not os.path.lexists(each)]
    made: list[Path] = []
    try:
        there = next(each for each in (path, *path.parents) if each not in missing)
        if there.exists() and not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{there} is a file")
        for each in reversed(missing):
            # Another process may be as far.
            with contextlib.suppress(FileExistsError):
                each.mkdir()
                made.append(each)
        _try_to_create(path / "x")
    except OSError as error:
        reason = f"no files can be written into this directory: {error.strerror}"
        raise OSError(error.errno, reason, os.fspath(folder)) from error
    finally:
        for each in reversed(made):
            with contextlib.suppress(OSError):
                each.rmdir()


def check_file(path: str | os.PathLike[str]) -> None:
    """Refuses a file that `atomic_write` could not write, before the work whose result it is to hold.

    Args:
        path: The file, there or not; a link is followed.

    Raises:
        OSError: It cannot be written; `filename` is `path`.
    """
    if not os.fspath(path):
        raise FileNotFoundError(errno.ENOENT, "the path of a file is empty", "")
    target = Path(os.path.realpath(path))
    try:
        _refuse_folder(target)
        _try_to_create(target)
    except OSError as error:
        raise _named(error, path, target) from error


def _try_to_create(target: Path) -> None:
    temporary = _temporary(target)
    os.close(os.open(temporary, _NEW_FILE, 0o600))
    os.unlink(temporary)


def _temporary(target: Path) -> Path:
    # A name has at most 255 bytes, which are fewer characters. A character that the cut divides goes, as some systems refuse its half.
    name = os.fsencode(target.name)[:200].decode(sys.getfilesystemencoding(), "ignore")
    return target.with_name(f".{name}.{secrets.token_hex(8)}.tmp")


def _is_special(path: Path) -> bool:
    """Whether a device, a pipe or a socket is there: something that must not give way to a file."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode))


def _refuse_folder(target: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        raise IsADirectoryError(errno.EISDIR, "this is a directory: name a file", os.fspath(target))


def _named(error: OSError, path: str | os.PathLike[str], target: Path) -> OSError:
    """The same error of the file that was to be written: the temporary one is nothing that the user knows."""
    reason = error.strerror
    if isinstance(error, FileNotFoundError) and not target.parent.is_dir():
        reason = f"the directory {target.parent} does not exist: create it first"
    elif isinstance(error, NotADirectoryError):
        reason = f"{target.parent} is not a directory"
    return OSError(error.errno, reason, os.fspath(path))


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
    or an open handle of the old file stays valid. A device or a pipe at `path` is written to as it is.

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
        OptionError: `path` is no path, or has a character that no name of a file may have.
        OSError: When the folder does not exist or cannot be written, or the disk is full; `filename` is `path`.
    """
    _to_save_into(path)
    target = Path(os.path.realpath(path) if follow_links else path)
    if _is_special(target):
        try:
            with open(target, "wb") as file:
                yield file
        except OSError as error:
            raise _named(error, path, target) from error
        if replacing is not None:
            replacing()
        return
    mode = None
    with contextlib.suppress(OSError):
        found = os.lstat(target).st_mode
        mode = None if stat.S_ISLNK(found) else stat.S_IMODE(found)
    try:
        _refuse_folder(target)
        temporary = _temporary(target)
        # 0o666 is cut by the umask, as in open().
        descriptor = os.open(temporary, _NEW_FILE, 0o666)
    except OSError as error:
        raise _named(error, path, target) from error
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
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        # A full disk names no file at all. Others that the block works with keep their names.
        if isinstance(error, OSError) and (
            error.filename == os.fspath(temporary) or (error.filename is None and error.errno in _OF_THE_DISK)
        ):
            raise _named(error, path, target) from error
        raise
    if sync:
        sync_folder(target.parent)
