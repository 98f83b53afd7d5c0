"""What holds for every test."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator

import pytest

# A shell that starts a job in the background lets it ignore Ctrl-C, and children inherit that: tests that interrupt would wait
# for ever. A handler of Python's own, unlike an ignored signal, is not inherited.
if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def uncovered() -> Iterator[None]:
    """No lines are measured meanwhile: an exception that comes at any moment would leave coverage's own lock locked."""
    measured = None
    if (coverage := sys.modules.get("coverage")) is not None:
        measured = coverage.Coverage.current()
    if measured is None:
        yield
        return
    measured.stop()
    try:
        yield
    finally:
        measured.start()
