"""Checks of options that every part of the package has, and how their errors show a value."""

from __future__ import annotations

import math

from llama_ext._arrays import as_whole
from llama_ext.errors import OptionError

__all__ = ["number", "shown", "whole", "whole_seed"]


def shown(value: object, length: int = 80) -> str:
    """A value for a message: its repr, cut, whatever the value is.

    Args:
        value: Anything, possibly hostile.
        length: Most characters.

    Returns:
        At most `length` characters.
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of more digits than Python converts; a list that holds itself
        return f"<{type(value).__name__}>"
    return text if len(text) <= length else text[: length - 3] + "..."


def whole(name: str, value: object, minimum: int, maximum: int | None = None) -> int:
    """A whole number in a range.

    Raises:
        OptionError: It is not one.
    """
    found = as_whole(value)
    if found is None or found < minimum or (maximum is not None and found > maximum):
        wanted = f">= {minimum}" if maximum is None else f"in [{minimum}, {maximum}]"
        raise OptionError(f"{name} must be a whole number {wanted}, got {shown(value)}")
    return found


def whole_seed(value: object, op: str = "") -> int:
    """A seed as the core takes it. op: What asked for it, where that is not plain.

    Raises:
        OptionError: It is not a whole number in [0, 2^64).
    """
    found = as_whole(value)
    if found is None or not 0 <= found < 2**64:
        raise OptionError(f"{op}{': ' if op else ''}seed must be a whole number in [0, 2^64), got {shown(value)}")
    return found


def number(
    name: str,
    value: object,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    advice: str | None = None,
) -> float:
    """A finite number in a range.

    Raises:
        OptionError: It is not one.
    """
    bounds = [(">=", minimum), (">", above), ("<=", maximum), ("<", below)]
    wanted = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)
    try:
        found = math.nan if isinstance(value, (bool, str)) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    good = (
        math.isfinite(found)
        and (minimum is None or found >= minimum)
        and (above is None or found > above)
        and (maximum is None or found <= maximum)
        and (below is None or found < below)
    )
    if not good:
        raise OptionError(
            f"{name} must be a number {wanted}, got {shown(value)}{'' if advice is None else f': {advice}'}"
        )
    return found
