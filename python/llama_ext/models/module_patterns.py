"""Regular expressions of a file on the names of modules: exactly the names that `re` would match, in time that no pattern can blow up.

An adapter's config may choose modules by patterns, and it is not to be trusted: `re` goes back and tries again, which takes
`(a+)+b` for ever. Here a pattern is parsed by `re` and followed to all places that it may get to, from each place once; for
whether a name matches, and nothing else is asked, that is the same.
"""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from llama_ext.errors import FormatError, LimitError, UnsupportedError

__all__ = ["MOST_CHARACTERS", "NamePatterns"]

# Of a pattern; those that people write have a few dozen.
MOST_CHARACTERS = 1_000
_MOST_NESTED = 50
# Steps of one `NamePatterns` over all names; a pattern of thirty characters takes a hundred or two for a name.
_MOST_STEPS = 2_000_000

# A name of a module, or the end of one: a dot matches itself, and any other character.
_PLAIN = re.compile(r"[A-Za-z0-9_.]*")

# `re`'s own parser moved when 3.11 made it private. Its tree is (operation, argument) pairs.
_PARSER = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

_Places = frozenset[int]
_NOWHERE: _Places = frozenset()


class NamePatterns:
    """Regular expressions, each tried in turn.

    Args:
        patterns: In the syntax of `re`, without flags, references to groups, conditions and atomic groups.
        path: The file they are from, for messages.
        field: The field they are from.

    Raises:
        FormatError: One is no regular expression.
        LimitError: One is longer or nested deeper than any that is needed.
        UnsupportedError: One uses what names of modules need no pattern for.
    """

    def __init__(self, patterns: Iterable[str], *, path: str | None = None, field: str = "a pattern") -> None:
        self._where = f"{path}: " if path else ""
        self._field = field
        self._steps = 0
        self._patterns: list[tuple[str, _Node | None]] = []
        for pattern in patterns:
            plain = _PLAIN.fullmatch(pattern) is not None
            self._patterns.append((pattern, None if plain else self._parsed(pattern, path)))

    def fullmatch(self, name: str) -> str | None:
        """The first pattern that matches the whole name, as `re.fullmatch` does; None: none does."""
        return self._first(name, [0])

    def match_end(self, name: str) -> str | None:
        """The first pattern that matches the whole name or all that follows one of its dots; None: none does."""
        return self._first(name, [0, *(place + 1 for place, letter in enumerate(name) if letter == ".")])

    def _first(self, name: str, starts: Sequence[int]) -> str | None:
        for pattern, node in self._patterns:
            self._steps += 1
            if node is None:
                start = len(name) - len(pattern)
                if start in starts and all(a == b or b == "." for a, b in zip(name[start:], pattern, strict=True)):
                    return pattern
                continue
            run = _Run(name, _MOST_STEPS - self._steps)
            try:
                found = any(len(name) in run.ends(node, start) for start in starts)
            except _OutOfSteps:
                raise LimitError(f"{self._where}{self._field} {pattern[:80]!r} takes too long to match.") from None
            self._steps = _MOST_STEPS - run.left
            if found:
                return pattern
        return None

    def _parsed(self, pattern: str, path: str | None) -> _Node:
        shown = f"{self._where}{self._field} {pattern[:80]!r}"
        if len(pattern) > MOST_CHARACTERS:
            raise LimitError(f"{shown} has {len(pattern)} characters, at most {MOST_CHARACTERS} are accepted.")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what a later Python will read in another way
                tree = _PARSER.parse(pattern)
        except (re.error, OverflowError) as error:
            message = f"{self._field} must be a regular expression, got {pattern[:80]!r}: {error}."
            raise FormatError(message, path=path, field=self._field) from error
        except RecursionError as error:
            raise LimitError(f"{shown} is nested too deeply.") from error
        if tree.state.flags & ~re.UNICODE:
            raise UnsupportedError(f"{shown} sets a flag, which is not supported.")
        try:
            return _sequence(tree, 0)
        except _NotFollowed as error:
            raise UnsupportedError(f"{shown} has {error}, which is not supported.") from None


class _NotFollowed(Exception):  # noqa: N818
    """What a pattern has that is not followed here."""


class _OutOfSteps(Exception):  # noqa: N818
    """A pattern that is made to take long."""


class _Run:
    """One name, and where each part of a pattern may end that begins at a place of it."""

    def __init__(self, text: str, steps: int) -> None:
        self.text = text
        self.left = steps
        self._known: dict[tuple[int, int], _Places] = {}

    def ends(self, node: _Node, place: int) -> _Places:
        key = (id(node), place)
        found = self._known.get(key)
        if found is None:
            self.left -= 1
            if self.left < 0:
                raise _OutOfSteps
            found = self._known[key] = node(self, place)
        return found

    def all_ends(self, node: _Node, places: _Places) -> _Places:
        self.left -= len(places)
        return _NOWHERE.union(*(self.ends(node, place) for place in places))


# Where a part of a pattern may end that begins at a place.
_Node = Callable[[_Run, int], _Places]


def _sequence(tree: Iterable[tuple[Any, Any]], depth: int) -> _Node:
    if depth > _MOST_NESTED:
        raise _NotFollowed("groups nested deeper than any name is")
    nodes = [_node(str(operation), argument, depth + 1) for operation, argument in tree]

    def ends(run: _Run, place: int) -> _Places:
        places = frozenset((place,))
        for node in nodes:
            if not places:
                break
            places = run.all_ends(node, places)
        return places

    return ends


def _node(operation: str, argument: Any, depth: int) -> _Node:
    if operation in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
        return _character(_accepts(operation, argument))
    if operation == "SUBPATTERN":
        _, added, removed, inner = argument
        if added or removed:
            raise _NotFollowed("a flag")
        return _sequence(inner, depth)
    if operation == "BRANCH":
        branches = [_sequence(branch, depth) for branch in argument[1]]
        return lambda run, place: _NOWHERE.union(*(run.ends(branch, place) for branch in branches))
    if operation in ("MAX_REPEAT", "MIN_REPEAT"):
        least, most, inner = argument
        return _repeated(_sequence(inner, depth), int(least), int(most))
    if operation in ("ASSERT", "ASSERT_NOT"):
        direction, inner = argument
        if direction < 0:
            raise _NotFollowed("a look behind")
        ahead, wanted = _sequence(inner, depth), operation == "ASSERT"
        return lambda run, place: frozenset((place,)) if bool(run.ends(ahead, place)) is wanted else _NOWHERE
    if operation == "AT":
        return _anchor(str(argument))
    raise _NotFollowed(operation.lower().replace("_", " "))


def _repeated(inner: _Node, least: int, most: int) -> _Node:
    def ends(run: _Run, place: int) -> _Places:
        places = frozenset((place,))
        for _ in range(least):
            after = run.all_ends(inner, places)
            if after == places:  # nothing changes any more, however often
                break
            places = after
        reached, new, left = places, places, most - least
        while new and left > 0:
            new = run.all_ends(inner, new) - reached
            reached |= new
            left -= 1
        return reached

    return ends


def _character(accepts: Callable[[str], bool]) -> _Node:
    def ends(run: _Run, place: int) -> _Places:
        return frozenset((place + 1,)) if place < len(run.text) and accepts(run.text[place]) else _NOWHERE

    return ends


def _accepts(operation: str, argument: Any) -> Callable[[str], bool]:
    if operation == "LITERAL":
        return lambda letter: ord(letter) == argument
    if operation == "NOT_LITERAL":
        return lambda letter: ord(letter) != argument
    if operation == "ANY":
        return lambda letter: letter != "\n"
    items = [(str(kind), value) for kind, value in argument]
    negated = items[0][0] == "NEGATE"
    tests = [_member(kind, value) for kind, value in items[negated:]]
    return lambda letter: any(test(letter) for test in tests) is not negated


def _member(kind: str, value: Any) -> Callable[[str], bool]:
    if kind == "LITERAL":
        return lambda letter: ord(letter) == value
    if kind == "RANGE":
        low, high = value
        return lambda letter: low <= ord(letter) <= high
    category = str(value)
    escape = _CATEGORIES.get(category)
    if kind != "CATEGORY" or escape is None:
        raise _NotFollowed(f"{kind.lower()} in a set")
    compiled = re.compile(escape)
    return lambda letter: compiled.fullmatch(letter) is not None


_CATEGORIES = {
    "CATEGORY_DIGIT": r"\d",
    "CATEGORY_NOT_DIGIT": r"\D",
    "CATEGORY_SPACE": r"\s",
    "CATEGORY_NOT_SPACE": r"\S",
    "CATEGORY_WORD": r"\w",
    "CATEGORY_NOT_WORD": r"\W",
}


def _anchor(name: str) -> _Node:
    escape = _ANCHORS.get(name)
    if escape is None:
        raise _NotFollowed(name.lower().replace("_", " "))
    compiled = re.compile(escape)
    return lambda run, place: frozenset((place,)) if compiled.match(run.text, place) else _NOWHERE


_ANCHORS = {
    "AT_BEGINNING": r"^",
    "AT_BEGINNING_STRING": r"\A",
    "AT_END": r"$",
    "AT_END_STRING": r"\Z",
    "AT_BOUNDARY": r"\b",
    "AT_NON_BOUNDARY": r"\B",
}
