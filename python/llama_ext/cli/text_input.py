"""Texts in: files, and standard input as a whole or line by line as it comes."""

from __future__ import annotations

import os
import select
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from llama_ext.cli.common import report
from llama_ext.errors import FormatError

__all__ = ["has_known_end", "read_stdin", "read_text", "stdin_lines"]

# What some editors begin a file with; it is no part of the text.
_BYTE_ORDER_MARK = "\ufeff"
_BLOCK = 1 << 16


def read_text(path: str) -> str:
    """A file as text, exactly as it is but for a byte order mark at its beginning; "-" is standard input.

    Raises:
        FormatError: It cannot be read, or is not UTF-8.
    """
    if path == "-":
        return read_stdin("the text")
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", path=path) from error
    return _decoded(data, path)


def read_stdin(what: str) -> str:
    """Standard input up to its end, as text, without a byte order mark at its beginning.

    Raises:
        FormatError: It is not UTF-8.
    """
    if sys.stdin is None:
        return ""
    buffer = getattr(sys.stdin, "buffer", None)
    if buffer is None:  # replaced by something that only gives text
        return sys.stdin.read().removeprefix(_BYTE_ORDER_MARK)
    _note_waiting(what)
    return _decoded(buffer.read(), "standard input")


def _note_waiting(what: str) -> None:
    if sys.stdin.isatty():
        report(f"note: type {what}, and Ctrl-D after it")
    elif not _is_ready():
        report(f"note: waiting for {what} on standard input")


def _is_ready() -> bool:
    """Whether there is something to read, or the end of it, within a second."""
    try:
        return bool(select.select([sys.stdin], [], [], 1.0)[0])
    except (OSError, ValueError):  # not something that can be waited for
        return True


def _decoded(data: bytes, path: str, begin: int = 0) -> str:
    """What begins at a byte of a file, as text; without a byte order mark at its very beginning."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"this is not UTF-8 text: {error.reason}", path=path, offset=begin + error.start) from error
    return text if begin else text.removeprefix(_BYTE_ORDER_MARK)


def has_known_end() -> bool:
    """Whether standard input is a file: what is in it is there already."""
    try:
        return stat.S_ISREG(os.fstat(sys.stdin.fileno()).st_mode)
    except (AttributeError, OSError, ValueError):  # none, or nothing of the system's
        return False


def stdin_lines(what: str) -> Iterator[list[str]]:
    """The lines of standard input, as many at a time as are there, so that none has to wait for the next.

    A line ends at a newline alone, as a text may have other separators in it, like U+2028; a carriage return before it is no part of
    the line. What follows the last newline is a line unless it is empty.

    Args:
        what: They are, for a note to who is waited for: "texts, one a line".

    Raises:
        FormatError: It is not UTF-8.
    """
    if sys.stdin is None:
        return
    buffer = getattr(sys.stdin, "buffer", None)
    if buffer is None or has_known_end():
        lines = read_stdin(what).split("\n")
        yield [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]
        return
    _note_waiting(what)
    unfinished: list[bytes] = []
    begin = 0
    while block := buffer.read1(_BLOCK):
        whole, newline, rest = block.rpartition(b"\n")
        if not newline:
            unfinished.append(rest)
            continue
        data = b"".join([*unfinished, whole])
        yield from _decoded_lines(data, begin)
        begin += len(data) + 1
        unfinished = [rest]
    if data := b"".join(unfinished):
        yield from _decoded_lines(data, begin)


def _decoded_lines(data: bytes, begin: int) -> Iterator[list[str]]:
    """The lines in what begins at a byte of standard input; those before one that is no text, and then its error."""
    lines: list[str] = []
    for line in data.split(b"\n"):
        try:
            lines.append(_decoded(line, "standard input", begin).removesuffix("\r"))
        except FormatError:
            if lines:
                yield lines
            raise
        begin += len(line) + 1
    yield lines
