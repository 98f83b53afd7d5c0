"""Where a command writes: whether it may is told before any work begins, by one rule for all commands."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from llama_ext.errors import OptionError

__all__ = [
    "add_overwrite_option",
    "check_directory",
    "check_file",
    "check_log",
    "check_plot",
    "has_replaced",
    "replaced_checkpoints",
    "settle_replaced",
]

# As `fit` names them: to go on from, and the weights alone.
_CHECKPOINT = re.compile(r"(step|best)-\d{8,}")
# Where an earlier run's are meanwhile; the second name while they are being moved there or back.
_ASIDE = re.compile(r"replaced-[0-9a-f]{16}(\.part)?")
_PART = ".part"


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
        atomic.check_folder(path)
    if overwrite or not target.is_dir():
        return
    if any(entry.name not in besides for entry in target.iterdir()):
        raise OptionError(f"{os.fspath(path)} exists and is not empty: name another directory, or {advice}")


def check_file(path: str | os.PathLike[str], overwrite: bool, *, made: str | os.PathLike[str] | None = None) -> None:
    """Checks a file that is to be written.

    Args:
        path: It, or where it will be.
        overwrite: Whether it may be replaced.
        made: A directory that there will be by then, with those above it.

    Raises:
        OptionError: It is there and not empty, it is a directory, or it cannot be made.
    """
    from llama_ext.io import atomic

    target = Path(path)
    if target.exists() and not target.is_file() and not target.is_dir():
        return  # a pipe or a device: nothing that could be lost, nor made beforehand
    if made is not None:
        place = Path(os.path.realpath(path))
        directories = [Path(os.path.realpath(made)), *Path(os.path.realpath(made)).parents]
        if place in directories:
            raise OptionError(f"{os.fspath(path)}: this is a directory: name a file")
        if place.parent in directories and not place.parent.exists():
            return
    with _as_option_error():
        atomic.check_file(path)
    if not overwrite and target.is_file() and target.stat().st_size > 0:
        raise OptionError(f"{os.fspath(path)} exists: name another file, or say --overwrite")


def check_log(path: str, made: str) -> None:
    """Checks a file to which lines are to be added.

    Args:
        path: It, or where it will be.
        made: As for `check_file`.

    Raises:
        OptionError: It is a directory, or it cannot be made or added to.
    """
    if not Path(path).is_file():
        check_file(path, overwrite=True, made=made)
        return
    # Unlike a file that is replaced, it needs nothing of its directory.
    with _as_option_error(), open(path, "ab"):
        pass


def check_plot(path: str, made: str) -> None:
    """Checks a picture that is to be drawn after the work; an earlier one is drawn anew.

    Args:
        path: It, or where it will be.
        made: As for `check_file`.

    Raises:
        UnsupportedError: matplotlib is not installed.
        OptionError: Its directory does not exist, or matplotlib does not write such files.
    """
    from llama_ext.training import History

    check_file(path, overwrite=True, made=made)
    canvas = History().plot().canvas
    known = sorted(canvas.get_supported_filetypes())
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix not in known:
        kind = f"matplotlib does not write .{suffix} files" if suffix else "the name does not say what kind of picture"
        raise OptionError(f"--plot {path}: {kind}, expected one of {', '.join(known)}")


@contextlib.contextmanager
def _as_option_error() -> Iterator[None]:
    """A path that cannot be written to is wrong usage, as it was named on the command line."""
    try:
        yield
    except OSError as error:
        raise OptionError(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)) from error


# -- an earlier run's checkpoints -------------------------------------------------------------------------------------


@contextlib.contextmanager
def replaced_checkpoints(folder: Path, overwrite: bool) -> Iterator[None]:
    """A block of code that trains, for which an earlier run's checkpoints are out of the way.

    They go for good when the block has left a checkpoint to go on from, and come back when it has not: a mistake in an
    option costs nothing. Where a kill prevents both, `settle_replaced` makes up for it.

    Args:
        folder: Where checkpoints are.
        overwrite: False: nothing happens.

    Raises:
        OSError: They cannot be moved.
    """
    old = _checkpoints(folder) if overwrite else []
    if not old:
        yield
        return
    import secrets

    aside = folder / f"replaced-{secrets.token_hex(8)}"
    part = aside.with_suffix(_PART)
    try:
        part.mkdir()
        for each in old:
            each.rename(part / each.name)
        # From here on, what is outside is the new run's.
        part.rename(aside)
        yield
    finally:
        settle_replaced(folder)


def has_replaced(folder: Path) -> bool:
    """Whether a run that replaces an earlier one is at work in a folder, or was killed."""
    return bool(_asides(folder))


def settle_replaced(folder: Path) -> bool:
    """Ends what `replaced_checkpoints` has begun, in this process or in one that was killed.

    Args:
        folder: Where checkpoints are. It need not exist.

    Returns:
        Whether an earlier run's came back.

    Raises:
        OptionError: Something else has their name by now.
        OSError: They cannot be moved.
    """
    import shutil

    from llama_ext.training.checkpoints import has_checkpoints

    begun = has_checkpoints(folder)
    came_back = False
    for each in _asides(folder):
        aside = each
        if aside.suffix != _PART:
            if begun:
                shutil.rmtree(aside, ignore_errors=True)
                continue
            # Nobody can go on from the new run's best weights, and they would pass for the earlier run's.
            for best in _checkpoints(folder):
                shutil.rmtree(best, ignore_errors=True)
            aside = aside.rename(aside.with_suffix(_PART))
        for path in _checkpoints(aside):
            if (folder / path.name).exists():
                raise OptionError(f"{path} and {folder / path.name} are of different runs: move one of them away")
            path.rename(folder / path.name)
            came_back = True
        aside.rmdir()
    return came_back


def _checkpoints(folder: Path) -> list[Path]:
    return _directories(folder, _CHECKPOINT)


def _asides(folder: Path) -> list[Path]:
    return _directories(folder, _ASIDE)


def _directories(folder: Path, name: re.Pattern[str]) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(each for each in folder.iterdir() if name.fullmatch(each.name) and each.is_dir())
