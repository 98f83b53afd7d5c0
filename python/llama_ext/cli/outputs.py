"""Where a command writes: whether it may is told before any work begins, by one rule for all commands."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from llama_ext.errors import OptionError

__all__ = ["add_overwrite_option", "check_directory", "check_file", "check_plot", "replaced_checkpoints"]

# As `fit` names them.
_CHECKPOINT = re.compile(r"(step|best)-\d{8,}")


def add_overwrite_option(parser: argparse.ArgumentParser) -> None:
    """Adds --overwrite."""
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def check_directory(
    path: str | os.PathLike[str], overwrite: bool, *, besides: Collection[str] = (), advice: str = "say --overwrite"
) -> None:
    """Checks a directory that is to be written.

    Args:
        path: It, or where it will be.
        overwrite: Whether files in it may be replaced.
        besides: Names that may be in it.
        advice: What to do instead of naming another directory.

    Raises:
        OptionError: It is not empty, a file, or cannot be made or written into.
    """
    from llama_ext.io import atomic

    target = Path(path)
    with _as_option_error():
        atomic.check_folder(target)
    if overwrite or not target.is_dir():
        return
    if any(entry.name not in besides for entry in target.iterdir()):
        raise OptionError(f"{os.fspath(path)} exists and is not empty: name another directory, or {advice}")


def check_file(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Checks a file that is to be written.

    Args:
        path: It, or where it will be.
        overwrite: Whether it may be replaced.

    Raises:
        OptionError: It is there and not empty, it is a directory, or it cannot be made.
    """
    from llama_ext.io import atomic

    target = Path(path)
    if target.exists() and not target.is_file() and not target.is_dir():
        return  # a pipe or a device: nothing that could be lost, nor made beforehand
    with _as_option_error():
        atomic.check_file(target)
    if not overwrite and target.is_file() and target.stat().st_size > 0:
        raise OptionError(f"{os.fspath(path)} exists: name another file, or say --overwrite")


def check_plot(path: str) -> None:
    """Checks a picture that is to be drawn after the work; an earlier one is drawn anew.

    Raises:
        UnsupportedError: matplotlib is not installed.
        OptionError: Its directory does not exist, or matplotlib does not write such files.
    """
    from llama_ext.training import History

    check_file(path, overwrite=True)
    canvas = History().plot().canvas
    known = sorted(canvas.get_supported_filetypes())
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix and suffix not in known:
        raise OptionError(
            f"--plot {path}: matplotlib does not write .{suffix} files, expected one of {', '.join(known)}"
        )


@contextlib.contextmanager
def _as_option_error() -> Iterator[None]:
    """A path that cannot be written to is wrong usage, as it was named on the command line."""
    try:
        yield
    except OSError as error:
        raise OptionError(f"{error.filename}: {error.strerror}") from error


@contextlib.contextmanager
def replaced_checkpoints(folder: Path, overwrite: bool) -> Iterator[None]:
    """A block of code that trains, for which an earlier run's checkpoints are out of the way.

    They go for good when the block has left checkpoints of its own, and come back when it has not: a mistake in an option
    costs nothing.

    Args:
        folder: Where checkpoints are.
        overwrite: False: nothing happens.
    """
    old = _checkpoints(folder) if overwrite else []
    if not old:
        yield
        return
    aside = Path(tempfile.mkdtemp(prefix="replaced-", dir=folder))
    for each in old:
        each.rename(aside / each.name)
    try:
        yield
    finally:
        if _checkpoints(folder):
            shutil.rmtree(aside, ignore_errors=True)
        else:
            for each in old:
                (aside / each.name).rename(each)
            aside.rmdir()


def _checkpoints(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [each for each in folder.iterdir() if _CHECKPOINT.fullmatch(each.name) and each.is_dir()]
