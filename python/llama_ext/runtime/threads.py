"""How many threads the CPU backend uses when nobody says otherwise."""

from __future__ import annotations

from llama_ext import _core
from llama_ext._arrays import as_whole
from llama_ext.errors import OptionError

__all__ = ["get_num_threads", "set_num_threads"]

# The core's bound. It is checked here, where 0 is not yet the word for "the default".
_MOST_THREADS = 256


def get_num_threads() -> int:
    """The number of threads that a model or an operation gets when it is not given one.

    Returns:
        A number >= 1. Before `set_num_threads`: what the environment variable LLAMA_EXT_NUM_THREADS says, or else the physical cores
        that the affinity mask and the cgroup quota allow.

    Raises:
        OptionError: LLAMA_EXT_NUM_THREADS is no number in [1, 256].
    """
    return _core.default_threads()[0]


def set_num_threads(threads: int) -> None:
    """Sets what `get_num_threads` returns, for models and operations from now on; a loaded model keeps its own number.

    Results do not depend on it: they are bit-identical for every number of threads.

    Args:
        threads: A number in [1, 256].

    Raises:
        OptionError: `threads` is no such number.
    """
    number = checked_threads(threads)
    if number == 0:
        raise OptionError(
            f"threads must be a whole number in [1, {_MOST_THREADS}], got None. "
            "To go back to another number, set what get_num_threads() returned before"
        )
    _core.set_default_threads(number)


def checked_threads(threads: object) -> int:
    """The number for the core: 0 stands for None, "the default".

    Raises:
        OptionError: `threads` is neither None nor an integer in [1, 256].
    """
    if threads is None:
        return 0
    number = as_whole(threads)
    if number is None or not 1 <= number <= _MOST_THREADS:
        raise OptionError(
            f"threads must be a whole number in [1, {_MOST_THREADS}], got {threads!r}. Leave it out for the default"
        )
    return number
