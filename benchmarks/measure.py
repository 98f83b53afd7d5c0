"""What every runner does alike, in whatever interpreter: one prompt, timed prefill and decode, one line of JSON.

Only NumPy and the standard library, because peers run in environments of their own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks import limits

__all__ = ["RESULT", "Engine", "peak_memory_bytes", "prompt_ids", "run"]

# Marks the line of the result: libraries print what they like.
RESULT = "RESULT "
_WARM_UP_TOKENS = 2


class Engine(Protocol):
    """A loaded model and one sequence."""

    def reset(self) -> None:
        """Starts an empty sequence. Not timed."""

    def prefill(self, ids: list[int]) -> None:
        """Runs the prompt and makes the logits of its last token."""

    def decode(self, tokens: int) -> int:
        """Runs tokens one by one, each the most likely after the one before, and says how many."""

    def facts(self) -> dict[str, Any]:
        """Versions and settings; `decode_bytes` when the weights are stored in a format of the engine's own."""


def prompt_ids(tokens: int, vocabulary: int) -> list[int]:
    """The same ids for every engine, none of them special."""
    first = min(3, vocabulary - 1)
    return [int(token) for token in np.random.default_rng(0).integers(first, vocabulary, tokens)]


def time_engine(
    engine: Engine, ids: list[int], tokens: int, repeats: int, read_rate: Callable[[], float] | None = None
) -> dict[str, list[float]]:
    """One unmeasured prefill, then the repeats.

    Args:
        engine: Loaded.
        ids: The prompt.
        tokens: To decode after it.
        repeats: How often.
        read_rate: How fast memory is read at the moment.

    Returns:
        Of every repeat the tokens per second of both; and "read_beside" each decode, the mean of what was read before and after.
    """
    engine.reset()
    engine.prefill(ids)
    engine.decode(_WARM_UP_TOKENS)
    rates: dict[str, list[float]] = {"prefill": [], "decode": [], "read_beside": []}
    for _ in range(repeats):
        engine.reset()
        before = read_rate() if read_rate else 0.0
        start = time.perf_counter()
        engine.prefill(ids)
        middle = time.perf_counter()
        done = engine.decode(tokens)
        end = time.perf_counter()
        rates["prefill"].append(len(ids) / (middle - start))
        if done:
            rates["decode"].append(done / (end - middle))
            if read_rate:
                rates["read_beside"].append((before + read_rate()) / 2)
    return rates


def peak_memory_bytes() -> int:
    """What this process has had resident at most. Not getrusage's number, which begins with that of the process that started this one."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status: expected a line VmHWM, found none")


def run(add_options: Callable[[argparse.ArgumentParser], None], load: Callable[[argparse.Namespace], Engine]) -> None:
    """The body of a runner: options, loading, timing, and the line with the result or what went wrong.

    Args:
        add_options: Adds what this engine needs to the common options.
        load: Imports the engine, so that a missing one is reported, and loads the model.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prompt", type=int, required=True, help="tokens")
    parser.add_argument("--tokens", type=int, required=True, help="to decode after the prompt")
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--vocabulary", type=int, required=True)
    parser.add_argument("--limits", type=Path, help="the compiled limits.cpp, to probe reading beside each decode")
    add_options(parser)
    options = parser.parse_args()
    read_rate = None if options.limits is None else lambda: limits.read_rate(options.limits, options.threads)
    result: dict[str, Any] = {}
    try:
        start = time.perf_counter()
        engine = load(options)
        result["load_seconds"] = time.perf_counter() - start
        ids = prompt_ids(options.prompt, options.vocabulary)
        result.update(time_engine(engine, ids, options.tokens, options.repeats, read_rate))
        result.update(engine.facts())
        result["peak_memory_bytes"] = peak_memory_bytes()
    except ModuleNotFoundError as error:
        result = {"error": f"not installed: {error.name}"}
    except Exception as error:  # an engine's failure is a result: the others still run
        traceback.print_exc(file=sys.stderr)
        result = {"error": f"failed: {type(error).__name__}: {str(error)[:200]}"}
    print(RESULT + json.dumps(result), flush=True)
