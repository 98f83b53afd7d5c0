"""Every error the package raises, in one tree under `LlamaExtError`.

A message names the thing in the user's words, says what was expected and what was found, and what to do about it.
The compiled core raises these same classes: it looks them up in this module by name.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ContextLengthError",
    "DTypeError",
    "DeviceError",
    "FormatError",
    "LimitError",
    "LlamaExtError",
    "NumericError",
    "OptionError",
    "OutOfMemoryError",
    "ShapeError",
    "TokenIdError",
    "UnsupportedError",
]


class LlamaExtError(Exception):
    """The root of the tree: catching it catches everything this package raises on purpose."""


class FormatError(LlamaExtError, ValueError):
    """A file that is not what it claims to be: truncated, malformed or inconsistent with another file.

    Args:
        message: What was expected, what was found, what to do.
        path: The file.
        offset: Where in the file, in bytes, when that is known.
        field: The name of the field or tensor, when there is one.
        expected: What the field had to be.
        got: What it was.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        offset: int | None = None,
        field: str | None = None,
        expected: object = None,
        got: object = None,
    ) -> None:
        where = "" if path is None else path if offset is None else f"{path} @0x{offset:x}"
        super().__init__(f"{where}: {message}" if where else message)
        self.message = message
        self.path = path
        self.offset = offset
        self.field = field
        self.expected = expected
        self.got = got

    def __reduce__(self) -> tuple[object, ...]:
        return (
            _rebuild_format_error,
            (type(self), self.message, self.path, self.offset, self.field, self.expected, self.got),
        )


def _rebuild_format_error(
    kind: type[FormatError],
    message: str,
    path: str | None,
    offset: int | None,
    field: str | None,
    expected: object,
    got: object,
) -> FormatError:
    return kind(message, path=path, offset=offset, field=field, expected=expected, got=got)


class CheckpointError(FormatError):
    """A checkpoint whose parts do not fit together: a missing, unexpected or wrongly shaped tensor."""


class LimitError(LlamaExtError, ValueError):
    """A number in a file or request is beyond the configured `llama_ext.Limits`."""


class UnsupportedError(LlamaExtError, ValueError):
    """A valid file or option that this version does not implement; the message names it."""


class OptionError(LlamaExtError, ValueError):
    """An option that is unknown, out of range, or in conflict with another one."""


class ContextLengthError(LlamaExtError, ValueError):
    """A prompt or a generation does not fit into the model's context or the session's capacity."""


class TokenIdError(LlamaExtError, ValueError):
    """A token id outside [0, vocabulary)."""


class ShapeError(LlamaExtError, ValueError):
    """An array has the wrong shape."""


class DTypeError(LlamaExtError, TypeError):
    """An array has the wrong element type."""


class NumericError(LlamaExtError, ArithmeticError):
    """A computation gave a NaN or an infinity where none may be."""


class OutOfMemoryError(LlamaExtError, MemoryError):
    """An allocation was refused, by us beforehand or by the system."""


class DeviceError(LlamaExtError, RuntimeError):
    """A device or instruction set that was asked for by name is not there."""
