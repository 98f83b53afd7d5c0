"""One line out for each text in, as soon as it is known: how `classify predict` and `translate run` answer."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from llama_ext.cli.common import Spinner
from llama_ext.cli.text_input import has_known_end, stdin_lines
from llama_ext.errors import ContextLengthError, OptionError, TokenIdError

if TYPE_CHECKING:
    from llama_ext.runtime.progress import ProgressBar

__all__ = ["answer_texts", "in_one_field", "in_one_line"]

Answer = TypeVar("Answer")

# What may be wrong with a text, and not with all of them.
_OF_A_TEXT = (ContextLengthError, OptionError, TokenIdError)
_LINE_BREAKS = re.compile(r"\s*\n\s*")


def in_one_line(text: str) -> str:
    """A text with spaces in place of its line breaks."""
    return _LINE_BREAKS.sub(" ", text)


def in_one_field(text: str) -> str:
    """The same with spaces in place of tabs as well: what stands before a tab."""
    return in_one_line(text).replace("\t", " ")


def answer_texts(
    args: argparse.Namespace,
    label: str,
    ask: Callable[[list[str]], Iterable[Answer]],
    line: Callable[[str, Answer | None], str],
    at_once: int,
) -> None:
    """Answers the texts of the command, or the lines of standard input as they come: the n-th line out is about the n-th text.

    Args:
        args: With the texts, as `add_text_arguments` has them.
        label: What goes on: "Classifying".
        ask: Gives the answers to some texts; to none as well, to tell what is wrong with the options.
        line: What is written of a text and its answer; None: there is nothing in the text to be asked about.
        at_once: How many texts are asked about together, at most.

    Raises:
        OptionError: There is no text.
        OptionError, ContextLengthError, TokenIdError: Of one of the texts, which is named. Those before it have been answered.
        FormatError: Standard input is not UTF-8.
    """
    list(ask([]))
    batches: Iterator[list[str]] = iter([args.texts]) if args.texts else stdin_lines("texts, one a line")
    known = None
    if args.texts or has_known_end():
        texts = [text for batch in batches for text in batch]
        batches, known = iter([texts]), len(texts)
    named, number = ("text {}" if args.texts else "line {} of standard input"), 0
    # Kept: while rich draws on stderr, it has what is printed drawn there as well.
    out = sys.stdout
    with _Progress(label, known) as progress:
        for batch in batches:
            for first in range(0, len(batch), at_once):
                part = batch[first : first + at_once]
                for text, answer in _asked(ask, part, number, progress, named):
                    if out is not None:
                        out.write(line(text, answer) + "\n")
                        out.flush()
                    number += 1
                progress.advance(len(part))
    if not number:
        raise OptionError("there is no text: name texts, or give them on standard input, one a line")


def _asked(
    ask: Callable[[list[str]], Iterable[Answer]], texts: Sequence[str], before: int, progress: _Progress, named: str
) -> Iterator[tuple[str, Answer | None]]:
    """Some texts with their answers; where one is wrong those before it, and then its error."""
    try:
        with progress.waiting():
            answers = _answers(ask, texts)
    except _OF_A_TEXT as error:
        if len(texts) == 1:
            told = re.sub(r"^texts\[0\]", "this text", str(error))
            raise type(error)(f"{named.format(before + 1)}: {told}") from error
        for index, text in enumerate(texts):
            yield from _asked(ask, [text], before + index, progress, named)
        return
    yield from zip(texts, answers, strict=True)


def _answers(ask: Callable[[list[str]], Iterable[Answer]], texts: Sequence[str]) -> list[Answer | None]:
    found = iter(ask([text for text in texts if text.strip()]))
    return [next(found) if text.strip() else None for text in texts]


class _Progress:
    """On a terminal's stderr: where the answers go elsewhere, how many there are; else, that the next ones take their time.

    Args:
        label: What goes on.
        total: How many texts there are, or None.
    """

    def __init__(self, label: str, total: int | None) -> None:
        self._label = label
        self._total = total
        self._done = 0
        self._among_answers = sys.stdout is not None and sys.stdout.isatty()
        self._bar: ProgressBar | None = None
        self._spinner: Spinner | None = None

    def __enter__(self) -> _Progress:
        from llama_ext.runtime.progress import ProgressBar

        if not self._among_answers and self._total is not None:
            self._bar = ProgressBar(self._label, self._total, "texts").__enter__()
        elif not self._among_answers:
            self._spinner = Spinner(self._label).__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for shown in (self._bar, self._spinner):
            if shown is not None:
                shown.__exit__(kind, value, traceback)

    def waiting(self) -> Spinner | contextlib.AbstractContextManager[None]:
        """Around what takes its time."""
        return Spinner(self._label) if self._among_answers else contextlib.nullcontext()

    def advance(self, amount: int) -> None:
        """Says that so many more texts are answered."""
        self._done += amount
        if self._bar is not None:
            self._bar.advance(amount)
        if self._spinner is not None:
            self._spinner.say(f"{self._label}: {self._done:,} texts")
