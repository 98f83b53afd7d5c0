"""JSON files of a checkpoint, read under limits: a hostile one is a typed error, never a crash or a wrong reading."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from typing import Any, BinaryIO, NoReturn

from llama_ext.errors import FormatError, LimitError
from llama_ext.limits import DEFAULT_LIMITS, Limits, check_limits

__all__ = ["open_regular", "parse_json_object", "read_json_object"]

# For a text without escapes. A string that never closes is matched up to the end, which keeps the scan linear; and no
# group is repeated, because the regex engine keeps a record of every repetition.
_STRING_OR_BRACKET = re.compile(r'"[^"]*(?:"|\Z)|[\[{]|[\]}]')

# Python refuses to convert more digits than this (CVE-2020-10735); older 3.10 releases take quadratic time instead.
_MAX_DIGITS = 4_300


def open_regular(path: str | os.PathLike[str], *, what: str) -> BinaryIO:
    """Opens a regular file for reading; anything else, a pipe for example, could block or never end.

    Args:
        path: The file.
        what: What the file is, in the user's words, for the message.

    Returns:
        The open file, unbuffered.

    Raises:
        FormatError: There is no such file, it is not a regular file, or it cannot be read.
    """
    shown = os.fspath(path)
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "a special file"
            raise FormatError(f"expected {what}, found {kind}.", path=shown, expected="a regular file", got=kind)
        return open(path, "rb", buffering=0)
    except FileNotFoundError as error:
        raise FormatError(f"expected {what}, found no such file.", path=shown) from error
    except FormatError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise FormatError(f"{what} cannot be read: {reason}.", path=shown) from error


def read_json_object(
    path: str | os.PathLike[str], *, what: str, limit: str = "config_json_bytes", limits: Limits = DEFAULT_LIMITS
) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Args:
        path: The file.
        what: What the file is, in the user's words.
        limit: The field of `Limits` that bounds the file's size.
        limits: The bounds.

    Returns:
        The object. Its numbers are finite.

    Raises:
        OptionError: `limits` is no `Limits`.
        FormatError: The file is missing, or not UTF-8, not JSON, not an object, or has a duplicate key, NaN or Infinity.
        LimitError: The file is larger or nested deeper than the limits allow.
    """
    check_limits(limits)
    shown = os.fspath(path)
    most: int = getattr(limits, limit)
    with open_regular(path, what=what) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise LimitError(
                f"{shown}: {what} has {size} bytes, the limit is {most} (Limits.{limit}). "
                "Pass a larger Limits if you trust the file."
            )
        data = _read_exactly(file, size, shown)
    return parse_json_object(data, path=shown, what=what, limits=limits)


def _read_exactly(file: BinaryIO, size: int, path: str) -> bytes:
    parts: list[bytes] = []
    left = size
    while left > 0:
        part = file.read(left)
        if not part:
            raise FormatError(f"the file shrank from {size} bytes while it was read.", path=path)
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def parse_json_object(data: bytes, *, path: str, what: str, limits: Limits = DEFAULT_LIMITS) -> dict[str, Any]:
    """Parses one JSON object, stricter than `json`: parsers disagree about what is refused here.

    Args:
        data: UTF-8 text.
        path: The file it is from, for messages.
        what: What the file is, in the user's words.
        limits: `json_depth` bounds the nesting.

    Returns:
        The object.

    Raises:
        FormatError: Not UTF-8, not JSON, not an object, a duplicate key, or a number that is not finite.
        LimitError: Nested deeper than `limits.json_depth`.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{what} is not valid UTF-8: {error.reason}.", path=path, offset=error.start) from error
    _check_depth(text, path, what, limits)
    try:
        value = json.loads(
            text,
            object_pairs_hook=lambda pairs: _unique(pairs, path),
            parse_int=lambda digits: _integer(digits, path),
            parse_float=lambda digits: _finite(digits, path),
            parse_constant=lambda word: _refuse_constant(word, path),
        )
    except json.JSONDecodeError as error:
        offset = len(text[: error.pos].encode("utf-8", "surrogatepass"))
        hint = " Truncated download?" if error.pos >= len(text.rstrip()) else ""
        raise FormatError(f"{what} is not valid JSON: {error.msg}.{hint}", path=path, offset=offset) from error
    except RecursionError as error:  # an override of json_depth beyond what the interpreter can nest
        raise LimitError(f"{path}: {what} is nested too deeply to be parsed.") from error
    if not isinstance(value, dict):
        got = type(value).__name__
        raise FormatError(f"{what} must be a JSON object, got {got}.", path=path, expected="an object", got=got)
    return value


def _check_depth(text: str, path: str, what: str, limits: Limits) -> None:
    """Measured before parsing: the parser recurses on the C stack."""
    depth = 0
    plain = text.replace("\\\\", "..").replace('\\"', "..")  # as long as before, for the position
    for match in _STRING_OR_BRACKET.finditer(plain):
        bracket = match.group()
        if bracket in ("[", "{"):
            depth += 1
            if depth > limits.json_depth:
                raise LimitError(
                    f"{path}: {what} is nested deeper than {limits.json_depth} (Limits.json_depth) "
                    f"at character {match.start()}. Pass a larger Limits if you trust the file."
                )
        elif bracket in ("]", "}"):
            depth -= 1


def _unique(pairs: list[tuple[str, Any]], path: str) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise FormatError(f"the key {name[:80]!r} appears twice in one object.", path=path, field=name[:80])
            seen.add(name)
    return result


def _integer(digits: str, path: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise FormatError(f"a number has {len(digits)} digits, at most {_MAX_DIGITS} are accepted.", path=path)
    return int(digits)


def _finite(digits: str, path: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise FormatError(f"the number {digits[:40]} is too large for a float64.", path=path)
    return value


def _refuse_constant(word: str, path: str) -> NoReturn:
    raise FormatError(f"{word} is not JSON; numbers must be finite.", path=path, got=word)
