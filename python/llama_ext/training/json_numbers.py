"""Floats that JSON has no word for, in what a checkpoint remembers."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["packed", "unpacked"]

# An object with this one key, and the number's name.
_NOT_FINITE = "llama_ext.float"
_NAMES = ("inf", "-inf", "nan")


def packed(value: Any) -> Any:
    """Values for JSON, with an object in place of every float that is not finite.

    Raises:
        TypeError: A key is no text: JSON would make it one.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return {_NOT_FINITE: str(float(value))}
    if isinstance(value, dict):
        for name in value:
            if not isinstance(name, str):
                raise TypeError(f"the key {name!r} is no str")
        return {name: packed(each) for name, each in value.items()}
    return [packed(each) for each in value] if isinstance(value, (list, tuple)) else value


def unpacked(value: Any) -> Any:
    """What `packed` was given; tuples have become lists."""
    if isinstance(value, dict):
        if value.keys() == {_NOT_FINITE} and value[_NOT_FINITE] in _NAMES:
            return float(value[_NOT_FINITE])
        return {name: unpacked(each) for name, each in value.items()}
    return [unpacked(each) for each in value] if isinstance(value, list) else value
