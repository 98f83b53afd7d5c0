"""For engines that generate in one call: a callback for each token tells prefill and decode apart."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

__all__ = ["TokenStream"]


class TokenStream:
    """A generation in a thread of its own.

    It does not wait for whoever counts its tokens, so what is timed is its own pace.

    Args:
        generate: Runs the whole generation. It calls its argument after each token, and ends when that returns False.
    """

    def __init__(self, generate: Callable[[Callable[[], bool]], object]) -> None:
        self._events: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._ended: BaseException | None = None
        self._is_wanted = True
        self._has_ended = False
        self._thread = threading.Thread(target=self._run, args=(generate,), daemon=True)
        self._thread.start()

    def _run(self, generate: Callable[[Callable[[], bool]], object]) -> None:
        try:
            generate(self._tell)
            self._events.put(StopIteration())
        except BaseException as error:  # it is raised where the tokens are waited for
            self._events.put(error)

    def _tell(self) -> bool:
        self._events.put(None)
        return self._is_wanted

    def wait(self, tokens: int) -> int:
        """Waits for so many tokens more.

        Args:
            tokens: How many.

        Returns:
            How many came; fewer when the generation ended before.

        Raises:
            Exception: What the generation raised.
        """
        for came in range(tokens):
            if self._has_ended:
                return came
            event = self._events.get()
            if event is not None:
                self._has_ended = True
                if not isinstance(event, StopIteration):
                    raise event
                return came
        return tokens

    def close(self) -> None:
        """Ends the generation after its next token, and waits for that."""
        self._is_wanted = False
        self._thread.join()
