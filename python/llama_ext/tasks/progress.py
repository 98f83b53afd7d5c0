"""What a task shows of its progress."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from llama_ext.runtime.progress import ProgressBar

__all__ = ["progress"]


@contextlib.contextmanager
def progress(label: str, total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar of texts, on a terminal; gives what is called with how many more are done.

    Args:
        label: What is going on: "Translating".
        total: How many texts there are.
        shown: False shows nothing on a terminal either.
    """
    if not shown:
        yield lambda amount: None
        return
    with ProgressBar(label, total, "texts") as bar:
        yield bar.advance
