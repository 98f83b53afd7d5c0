"""Ctrl-C in a long run: the first one ends it in good order, the second one at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Abandoned", "Interrupts"]


class Abandoned(Exception):  # noqa: N818 - not an error: a piece of work was given up
    """Work inside `Interrupts.abandonable` was interrupted."""


class Interrupts:
    """Takes over SIGINT while it is open, when it is Python's own to take: in the main thread, with the default handler.

    The first Ctrl-C stops what is inside `abandonable` at once, and everything else not at all: `pending` says so at the next
    opportunity. Any later one raises KeyboardInterrupt wherever it arrives.
    """

    def __init__(self) -> None:
        self.pending = False
        self._inside = False
        self._again = False
        self._previous: Any = None

    def __enter__(self) -> Interrupts:
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.pending:
            self._again = True
            raise KeyboardInterrupt
        self.pending = True
        if self._inside:
            raise KeyboardInterrupt

    def is_first(self) -> bool:
        """Whether a KeyboardInterrupt that was caught came of the first Ctrl-C. From then on nothing is abandoned."""
        self._inside = False
        return self.pending and not self._again

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """Work whose results do not matter when it is interrupted.

        Raises:
            Abandoned: It was.
        """
        if self.pending:
            raise Abandoned
        try:
            self._inside = True
            yield
            self._inside = False
        except KeyboardInterrupt:
            self._inside = False
            self.pending = True
            if self._again:
                raise
            raise Abandoned from None
        finally:
            self._inside = False
