"""What holds for every test."""

from __future__ import annotations

import signal

# A shell that starts a job in the background lets it ignore Ctrl-C, and children inherit that: tests that interrupt would wait
# for ever. A handler of Python's own, unlike an ignored signal, is not inherited.
if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.default_int_handler)
