"""What a chat template may use up: time, sizes of values and output, and the checks made before a step.

The rule and its reasons are in `template_sandbox.py`, which calls this from every step of a render.
"""

from __future__ import annotations

import contextlib
import re
import string
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from contextvars import ContextVar
from typing import Any

from llama_ext.errors import LimitError

__all__ = [
    "FILTER_CHECKS",
    "Meter",
    "check_count",
    "check_percent",
    "check_power",
    "check_string_method",
    "current",
    "metered",
]

# What one element of a container counts for, in characters: about its cost when it is printed, compared or copied.
_ELEMENT = 16
_MAX_DEPTH = 100
_MAX_INTEGER_BITS = 4096
_MAX_COUNT = 100_000  # jinja's own limit on range()
_MAX_WIDTH = 10_000


class Meter:
    """What one render has used up, and what it may use.

    Args:
        characters: The largest string, container (16 characters an element) or output.
        work: The sum of the sizes of all values made; bounds the memory held by many large values.
        seconds: The time, counted in CPU seconds of this thread so that a busy machine refuses nothing.
    """

    def __init__(self, characters: int, work: int, seconds: float) -> None:
        self.characters = characters
        self._work_left = work
        self._work = work
        self._output = 0
        self._seconds = seconds
        self._cpu_start = time.thread_time()
        self._deadline = time.monotonic() + seconds
        # Size and depth of containers by identity; the reference keeps an id from being reused while it is in here.
        self._sizes: dict[int, tuple[object, int, int]] = {}
        self._cached = 0

    def tick(self) -> None:
        """Refuse to go on when the time is up."""
        if time.monotonic() > self._deadline:
            # The wall clock is cheap to read, the CPU clock is the fair one.
            left = self._seconds - (time.thread_time() - self._cpu_start)
            if left <= 0:
                raise LimitError(
                    f"chat template: still running after {self._seconds:g} s of CPU time. Is the template malicious?"
                    " If not, pass a larger TemplateLimits.seconds"
                )
            self._deadline = time.monotonic() + left

    def size(self, characters: int, what: str) -> None:
        """Refuse a value of this many characters, before it is made."""
        if characters > self.characters:
            raise LimitError(
                f"chat template: {what} would need {characters} characters, the limit is {self.characters}"
                " (TemplateLimits.characters)"
            )

    def emit(self, characters: int) -> None:
        """Count text that goes to the output, to a macro's result or to a block assignment."""
        self.tick()
        self._output += characters
        self.size(self._output, "the output")

    def check(self, value: Any) -> Any:
        """Size a value that a step has just made, and give it back."""
        if value is None or value is True or value is False:
            return value
        if isinstance(value, str):
            made = len(value)
            self.size(made, "a string")
        elif isinstance(value, int):
            if value.bit_length() > _MAX_INTEGER_BITS:
                raise LimitError(f"chat template: an integer has more than {_MAX_INTEGER_BITS} bits")
            return value
        elif isinstance(value, (list, tuple, dict, set, frozenset)):
            made = _ELEMENT * (1 + len(value))
            self.weight(value)
        else:
            return value
        self._work_left -= made
        if self._work_left < 0:
            raise LimitError(f"chat template: it built more than {self._work} characters of values")
        return value

    def weight(self, value: Any) -> int:
        """The size of a value as it would print, in characters: shared parts count every time they appear."""
        return _ELEMENT + len(value) if isinstance(value, str) else self._measure(value, 0)[0]

    def _measure(self, value: Any, depth: int) -> tuple[int, int]:
        """The size of a value, and how deep it is nested."""
        if isinstance(value, str):
            return _ELEMENT + len(value), 0
        if not isinstance(value, (list, tuple, dict, set, frozenset, ItemsView, KeysView, ValuesView)):
            return _ELEMENT, 0
        known = self._sizes.get(id(value))
        if known is not None:
            return known[1], known[2]
        total, deepest = _ELEMENT, 0
        parts: Iterable[Any] = value
        if isinstance(value, dict):
            parts = (part for item in value.items() for part in item)
        for part in parts:
            size, levels = self._measure(part, depth + 1)
            total += size
            deepest = max(deepest, levels)
            if depth + deepest >= _MAX_DEPTH:
                raise LimitError(f"chat template: a value is nested deeper than {_MAX_DEPTH} levels")
            if total > self.characters:
                self.size(total, "a list or dictionary")
        if self._cached > self.characters:
            self._sizes.clear()
            self._cached = 0
        self._sizes[id(value)] = (value, total, deepest + 1)
        self._cached += _ELEMENT * (1 + len(value))
        return total, deepest + 1

    def text(self, value: Any) -> str:
        """`str(value)` of a value whose printed size is within the limit."""
        if type(value) is str:
            return value
        self.size(self.weight(value), "a printed value")
        return str(value)

    def iterate(self, items: Iterable[Any]) -> Iterator[Any]:
        """Pass items on, looking at the clock before each: whatever consumes a lazy filter is interruptible."""
        iterator = iter(items)
        while True:
            self.tick()
            try:
                item = next(iterator)
            except StopIteration:
                return
            yield item

    def join(self, separator: str, items: Iterable[Any]) -> str:
        """`separator.join(items)`, sized as it grows."""
        total, parts = 0, []
        for item in self.iterate(items):
            parts.append(self.text(item))
            total += len(parts[-1]) + len(separator)
            self.size(total, "a join")
        return separator.join(parts)


_METER: ContextVar[Meter] = ContextVar("chat_template_meter")


def current() -> Meter:
    """The meter of the render that this thread or task is in."""
    return _METER.get()


@contextlib.contextmanager
def metered(meter: Meter) -> Iterator[Meter]:
    """Make a meter the current one for a `with` block: templates of many threads share one environment."""
    token = _METER.set(meter)
    try:
        yield meter
    finally:
        _METER.reset(token)


# -- checks before a step -------------------------------------------------------------------------------------------


def check_count(value: Any, limit: int, what: str) -> None:
    if isinstance(value, int) and abs(value) > limit:
        raise LimitError(f"chat template: {what} is {value}, at most {limit}")


def check_percent(meter: Meter, template: str, arguments: Any) -> None:
    """`'%5d' % x`: widths come from the template's text, and each conversion may print the largest argument."""
    for width, precision in re.findall(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d*)(?:\.(\*|\d*))?", template):
        for number in (width, precision):
            if number == "*" or (number and (len(number) > 9 or int(number) > _MAX_WIDTH)):
                raise LimitError(f"chat template: a % format has the width {number[:20]}, at most {_MAX_WIDTH}")
    meter.size(len(template) + template.count("%") * (meter.weight(arguments) + _MAX_WIDTH), "a formatted string")


def _check_format(meter: Meter, template: str, arguments: Any) -> None:
    fields = 0
    try:
        for _, name, spec, _ in string.Formatter().parse(template):
            fields += name is not None
            if spec and ("{" in spec or any(int(n[:10]) > _MAX_WIDTH for n in re.findall(r"\d+", spec))):
                raise LimitError(f"chat template: str.format has the width {spec[:20]!r}, at most {_MAX_WIDTH}")
    except LimitError:
        raise
    except ValueError:
        return  # malformed: str.format says so itself
    meter.size(len(template) + fields * (meter.weight(arguments) + _MAX_WIDTH), "a formatted string")


def _check_replace(meter: Meter, text: str, old: Any, new: Any, *_: Any, **__: Any) -> None:
    text, old, new = str(text), str(old), str(new)
    found = text.count(old)
    meter.size(len(text) + found * max(0, len(new) - len(old)), "a replacement")


def check_string_method(meter: Meter, name: str, text: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The methods of str whose result can be longer than their inputs."""
    if name in ("ljust", "rjust", "center", "zfill") and args and isinstance(args[0], int):
        meter.size(args[0], f"str.{name}")
    elif name == "expandtabs":
        size = args[0] if args else kwargs.get("tabsize", 8)
        if isinstance(size, int):
            meter.size(len(text) + text.count("\t") * max(0, size), "str.expandtabs")
    elif name == "replace" and len(args) >= 2:
        _check_replace(meter, text, args[0], args[1])
    elif name == "translate" and args and isinstance(args[0], Mapping):
        longest = max((len(v) for v in args[0].values() if isinstance(v, str)), default=1)
        meter.size(len(text) * longest, "str.translate")
    elif name in ("format", "format_map"):
        _check_format(meter, text, [args, kwargs])


def _check_batch(meter: Meter, value: Any, count: Any = 1, *_: Any, **kwargs: Any) -> None:
    for number in (count, kwargs.get("linecount"), kwargs.get("slices")):
        check_count(number, _MAX_COUNT, "the count of a batch or slice")


def _check_indent(meter: Meter, text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    step = len(width) if isinstance(width, str) else width
    if isinstance(step, int):
        text = str(text)
        # str.splitlines knows more line ends than "\n"; a line is at least one character either way.
        lines = text.count("\n") + 1 if text.isascii() else len(text) + 1
        meter.size(len(text) + lines * max(0, step), "an indented text")


def _check_wordwrap(
    meter: Meter, text: Any, width: Any = 79, _long: Any = True, wrapstring: Any = None, *_: Any, **__: Any
) -> None:
    meter.size(len(str(text)) * (1 + len(str(wrapstring or "\n"))), "a wrapped text")


def check_power(left: Any, right: Any) -> None:
    """`left ** right`: refuse an integer that would be too long to make."""
    if not (isinstance(left, int) and isinstance(right, int)) or abs(left) < 2:
        return
    if left.bit_length() * max(0, right) > _MAX_INTEGER_BITS:
        raise LimitError(f"chat template: a power has more than {_MAX_INTEGER_BITS} bits")


def _check_int(meter: Meter, value: Any, *_: Any, **__: Any) -> None:
    if isinstance(value, str) and len(value) > 4096:
        raise LimitError("chat template: a number has more than 4096 digits")


FILTER_CHECKS: dict[str, Callable[..., None]] = {
    "batch": _check_batch,
    "slice": _check_batch,
    "center": lambda meter, value, width=80: meter.size(width if isinstance(width, int) else 0, "a centred text"),
    "format": lambda meter, value, *args, **kwargs: check_percent(meter, str(value), kwargs or args),
    "indent": _check_indent,
    "int": _check_int,
    "replace": _check_replace,
    "round": lambda meter, value, precision=0, method="common": check_count(precision, 100, "a precision"),
    "wordwrap": _check_wordwrap,
}
