"""The token loop over onnxruntime, in the shape of the core's own: `step` gives a token of every row that runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_ext import _core
from llama_ext._arrays import IntArray
from llama_ext.onnx.ort_model_session import Cache, OrtSession

__all__ = ["OrtGeneration"]

FloatArray = npt.NDArray[np.float32]
# (row, token, log probability, finish), as of _core.Generation.
Event = tuple[int, int, float, str]

# Bytes of logits that one pass over a prompt may give: a graph computes them for every token.
_LOGITS_BYTES = 256 << 20


@dataclasses.dataclass
class _Row:
    """One sequence.

    Attributes:
        index: Its number, which is its random stream.
        prompt: Its first tokens.
        limit: How many tokens to generate.
        output: Those there are.
        length: Positions in the cache.
        shared: Tokens of the prompt that were copied from another row.
    """

    index: int
    prompt: IntArray
    limit: int
    output: list[int] = dataclasses.field(default_factory=list)
    length: int = 0
    shared: int = 0
    ended: bool = False


class OrtGeneration:
    """A generation in progress, with the methods of `_core.Generation` and its random numbers: equal logits give equal tokens.

    A prompt runs by itself, in pieces if its logits would take much memory; then its row joins those that are decoded
    together. At most `max_batch_size` rows do so at once, and where one ends the next begins.

    Args:
        session: The graph.
        prompts: Token ids, at least one each.
        sampling: The core's SamplingOptions by name.
        max_new_tokens: For each row.
        eos: Tokens that end a row.
        seed: Of the random numbers.
        copies: Rows for each prompt.
        max_batch_size: Rows that run at once.
    """

    def __init__(
        self,
        session: OrtSession,
        prompts: Sequence[IntArray],
        *,
        sampling: dict[str, Any],
        max_new_tokens: Sequence[int],
        eos: Sequence[int],
        seed: int,
        copies: int = 1,
        max_batch_size: int = 16,
    ) -> None:
        self._session = session
        self._sampling = sampling
        self._looks_back = any(
            sampling.get(name, neutral) != neutral
            for name, neutral in (("repetition_penalty", 1.0), ("presence_penalty", 0.0), ("frequency_penalty", 0.0))
        )
        self._eos = frozenset(eos)
        self._seed = seed
        self._most = max_batch_size
        self._rows = [_Row(i, prompts[i // copies], limit) for i, limit in enumerate(max_new_tokens)]
        self._waiting = [row for row in self._rows if row.limit > 0]
        self._without_tokens = [row for row in self._rows if row.limit == 0]
        self._running: list[_Row] = []
        self._cache: Cache = []
        # The prompt that ran last, its logits and its cache: copies of a row begin with them.
        self._latest: tuple[IntArray, FloatArray, Cache] | None = None
        self._sampler = _core.Backend("cpu", 1)

    @property
    def done(self) -> bool:
        """Whether every row has ended."""
        return all(row.ended for row in self._rows)

    @property
    def rows(self) -> int:
        """How many sequences there are."""
        return len(self._rows)

    def row_counts(self, row: int) -> dict[str, int]:
        """What one row has cost."""
        return {"prompt_shared": self._rows[row].shared, "drafted": 0, "accepted": 0}

    def stop(self, row: int) -> None:
        """Ends a row from outside."""
        self._rows[row].ended = True

    def run(self, steps: int) -> list[Event]:
        """Up to `steps` steps."""
        events: list[Event] = []
        while steps > 0 and not self.done:
            events += self.step()
            steps -= 1
        return events

    def step(self) -> list[Event]:
        """A token of every row that runs, and of those that begin; when it raises, no row has advanced."""
        self._forget_ended()
        events: list[Event] = []
        running, cache = self._running, self._cache
        drawn: list[tuple[_Row, int, float]] = []
        if running:
            logits, cache = self._decode()
            drawn += [(row, *self._draw(row, line)) for row, line in zip(running, logits, strict=True)]
        begun: list[tuple[_Row, Cache, int]] = []
        while self._waiting[len(begun) :] and len(running) + len(begun) < self._most:
            row = self._waiting[len(begun)]
            line, own, shared = self._prefill(row.prompt)
            begun.append((row, own, shared))
            drawn.append((row, *self._draw(row, line)))
        lengths = {row.index: row.length + 1 for row in running}
        lengths.update({row.index: len(row.prompt) for row, _, _ in begun})
        rows = [*running, *(row for row, _, _ in begun)]
        if begun:
            cache = self._joined(running, cache, begun, lengths)
        # Nothing below can fail.
        for row, _, shared in begun:
            row.shared = shared
        self._running, self._cache = rows, cache
        del self._waiting[: len(begun)]
        if not self._waiting:
            self._latest = None
        for row in self._without_tokens:
            if not row.ended:
                row.ended = True
                events.append((row.index, -1, 0.0, "length"))
        for row, token, logprob in drawn:
            row.length = lengths[row.index]
            row.output.append(token)
            finish = "eos" if token in self._eos else "length" if len(row.output) == row.limit else ""
            row.ended = bool(finish)
            events.append((row.index, token, logprob, finish))
        return events

    def _draw(self, row: _Row, logits: FloatArray) -> tuple[int, float]:
        prompt, output = (row.prompt.tolist(), row.output) if self._looks_back else ([], [])
        return self._sampler.sample(
            np.ascontiguousarray(logits), self._sampling, prompt, output, self._seed, row.index, len(row.output)
        )

    # -- passes -----------------------------------------------------------------------------------------------------------

    def _prefill(self, prompt: IntArray) -> tuple[FloatArray, Cache, int]:
        """Runs a prompt by itself: the logits of its last token, its cache, and how many tokens were there already."""
        if self._latest is not None and np.array_equal(self._latest[0], prompt):
            return self._latest[1], self._latest[2], len(prompt)
        self._latest = None
        most = max(_LOGITS_BYTES // (4 * self._session.config.vocab_size), 1)
        cache = self._session.empty_cache()
        logits = np.empty((1, 1, 0), np.float32)
        for begin in range(0, len(prompt), most):
            end = min(begin + most, len(prompt))
            logits, cache = self._session.run(
                prompt[None, begin:end], np.ones((1, end), np.int64), np.arange(begin, end)[None], cache
            )
        self._latest = (prompt, logits[0, -1].copy(), cache)
        return self._latest[1], cache, 0

    def _decode(self) -> tuple[FloatArray, Cache]:
        """Runs the newest token of every row: (B, V), and the cache that is longer by one."""
        lengths = np.array([row.length for row in self._running])
        longest = int(lengths.max())
        ids = np.array([[row.output[-1]] for row in self._running])
        # Every row ends where the cache does.
        mask = np.arange(longest + 1)[None, :] >= (longest - lengths)[:, None]
        logits, cache = self._session.run(ids, mask, lengths[:, None], self._cache)
        return logits[:, 0], cache

    def _joined(
        self, running: Sequence[_Row], cache: Cache, begun: Sequence[tuple[_Row, Cache, int]], lengths: dict[int, int]
    ) -> Cache:
        """The cache of rows that run, with those that begin."""
        if not running and len(begun) == 1:
            return begun[0][1]
        longest = max((lengths[row.index] for row in running), default=0)
        parts = []
        for at, row in enumerate(running):
            parts.append((cache, at, longest - lengths[row.index], longest))
        parts += [(own, 0, 0, len(row.prompt)) for row, own, _ in begun]
        return self._session.arrange(parts, max(lengths.values()))

    def _forget_ended(self) -> None:
        """Takes rows that have ended out of the batch."""
        self._waiting = [row for row in self._waiting if not row.ended]
        left = [(at, row) for at, row in enumerate(self._running) if not row.ended]
        if len(left) == len(self._running):
            return
        longest = max((row.length for row in self._running), default=0)
        if left:
            parts = [(self._cache, at, longest - row.length, longest) for at, row in left]
            self._cache = self._session.arrange(parts, max(row.length for _, row in left))
        else:
            self._cache = []
        self._running = [row for _, row in left]
