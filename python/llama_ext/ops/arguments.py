"""Numbers and words of operations as the core takes them. Their ranges and meanings are the core's to check: here is only what it would not
take as a number or a text at all."""

from __future__ import annotations

import numpy as np

from llama_ext._options import shown
from llama_ext.errors import OptionError

__all__ = ["flag", "real", "word"]


def real(op: str, name: str, value: object) -> float:
    """A number of any type, as Python's.

    Raises:
        OptionError: It is not one.
    """
    if type(value) is float:  # nearly always, so that a call costs nothing
        return value
    try:
        # float() would read a text.
        if not isinstance(value, (str, bytes, bytearray)):
            return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        pass
    raise OptionError(f"{op}: {name} must be a number, got {shown(value)}")


def flag(op: str, name: str, value: object) -> bool:
    """True or False, of Python or of NumPy, or 1 or 0.

    Raises:
        OptionError: It is neither.
    """
    if isinstance(value, (int, np.bool_)) and value in (0, 1):
        return bool(value)
    raise OptionError(f"{op}: {name} must be True or False, got {shown(value)}")


def word(value: object) -> str:
    """A word of an option. What is no text becomes one that the core does not know either, so that its error names it beside the words
    that there are."""
    return value if isinstance(value, str) and value.isascii() else shown(value)
