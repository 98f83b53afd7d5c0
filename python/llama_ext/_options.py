"""Checks of options that every part of the package has, and how their errors show a value."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Collection
from typing import Any

from llama_ext._arrays import as_whole
from llama_ext.errors import OptionError

__all__ = ["keyword_options", "meant", "number", "refuse_unknown", "shown", "whole", "whole_seed"]

# What transformers and llama.cpp call what has another name here.
_ELSEWHERE = {
    "assistant_model": "draft_model",
    "device_map": "device",
    "load_in_4bit": "dtype='int4'",
    "load_in_8bit": "dtype='int8'",
    "max_tokens": "max_new_tokens",
    "n_ctx": "the max_length of a session",
    "n_gpu_layers": "device='cuda'",
    "n_predict": "max_new_tokens",
    "n_threads": "threads",
    "past_key_values": "model.session()",
    "repeat_penalty": "repetition_penalty",
    "stop_strings": "stop",
    "streamer": "model.stream_generate(...)",
    "torch_dtype": "dtype",
    "use_cache": "model.session()",
}


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
    if "\n" in text:  # of an array, not of a text
        text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 3] + "..."


def meant(name: str, known: Collection[str]) -> str:
    """What may have been meant by a name that is not known, for a message: the close ones, or all that there are."""
    close = [_ELSEWHERE[name]] if name in _ELSEWHERE else difflib.get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(sorted(known))}"


def keyword_options(function: Callable[..., Any]) -> list[str]:
    """The names that a function takes as keywords alone."""
    parameters = inspect.signature(function).parameters.values()
    return [each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]


def refuse_unknown(given: Collection[str], known: Collection[str]) -> None:
    """Refuses options that there are not.

    Raises:
        OptionError: For the first one, with what may have been meant.
    """
    for name in given:
        if name not in known:
            raise OptionError(f"unknown option {name!r}; {meant(name, known)}")


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
