"""Claims about how long something takes, which a busy machine must not refute."""

import contextlib
import time
from collections.abc import Iterator

# Other work on the core, a slow core, and the measuring of which lines run have cost up to six times.
SLACK = 10


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """The block takes at most this processor time on an idle core: what hangs or is quadratic takes hundreds of times as long."""
    start = time.process_time()
    yield
    took = time.process_time() - start
    assert took < SLACK * seconds, f"took {took:.1f} s of processor time, on an idle core {seconds} s are enough"
