"""The runtimes that are compared, each doing the same work: whole texts, pieces, padded batches, greedy generation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llama_ext import _core
from llama_ext.onnx.ort_model_session import OrtSession
from llama_ext.onnx.parity import Gates
from llama_ext.onnx.verification_others import OpenVinoSession

__all__ = ["Greedy", "NativeParty", "OrtParty", "Party", "Pass"]

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class Pass:
    """One pass of a graph over sequences: whole, padded, or after a past.

    Attributes:
        sequences: The tokens of each row, those of the past included.
        side: "left" or "right": where shorter rows are padded.
        past: Tokens, the same number for each row, that have run before.
        padding: The token that fills up a row.
        positions: Of each token of each row, past included; None: 0, 1, ...
    """

    sequences: tuple[IntArray, ...]
    side: str = "right"
    past: int = 0
    padding: int = 0
    positions: tuple[npt.NDArray[np.int64], ...] | None = None

    @property
    def width(self) -> int:
        """Positions of the longest row, past included."""
        return max(map(len, self.sequences))

    def row(self, row: int) -> tuple[IntArray, npt.NDArray[np.int64] | None]:
        """A row's tokens and positions."""
        return self.sequences[row], None if self.positions is None else self.positions[row]

    def columns(self, row: int, *, past: bool) -> tuple[int, int]:
        """Where a row's tokens lie in what the pass gives: the new ones, or with those of the past before them."""
        length = len(self.sequences[row])
        begin = self.width - length if self.side == "left" else 0
        if past:
            return begin, begin + length
        return max(begin - self.past, 0), begin + length - self.past

    def inputs(self) -> tuple[Array, Array, Array]:
        """ids, mask and positions, (B, width) each, past included."""
        shape = (len(self.sequences), self.width)
        ids = np.full(shape, self.padding, np.int64)
        mask, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for row, tokens in enumerate(self.sequences):
            begin, end = self.columns(row, past=True)
            ids[row, begin:end] = tokens
            mask[row, begin:end] = 1
            positions[row, begin:end] = np.arange(len(tokens)) if self.positions is None else self.positions[row]
        return ids, mask, positions


@dataclasses.dataclass(frozen=True)
class Greedy:
    """A greedy generation.

    Attributes:
        prompt: Its first tokens.
        tokens: Those generated.
        logits: (steps, V): what each was chosen from.
    """

    prompt: IntArray
    tokens: IntArray
    logits: FloatArray

    @property
    def sequence(self) -> IntArray:
        """All tokens that ran through the model: the last one did not."""
        return np.concatenate([self.prompt, self.tokens[:-1]]).astype(np.int32)


class Party(Protocol):
    """A runtime with a model in it."""

    name: str
    gates: Gates

    def logits(self, work: Pass) -> list[FloatArray]:
        """The logits of each row's new tokens, (T, V); of a classifier the scores of each row, (1, labels)."""
        ...

    def pieces(self, tokens: IntArray, sizes: Sequence[int], last: int) -> FloatArray:
        """Runs a sequence in pieces through the KV cache: the logits of its last tokens, (last, V)."""
        ...

    def greedy(self, prompt: IntArray, steps: int) -> Greedy:
        """Takes the most likely token, `steps` times, through the KV cache."""
        ...


class NativeParty:
    """The native model.

    Args:
        name: For the report.
        gates: For its arithmetic.
        core: Its weights.
        scores: Whether it is a classifier, which gives each row the scores of its last token.
    """

    def __init__(self, name: str, gates: Gates, core: _core.Model, *, scores: bool = False) -> None:
        self.name = name
        self.gates = gates
        self._core = core
        self._scores = scores

    def logits(self, work: Pass) -> list[FloatArray]:
        """Rows run ragged: the native model knows no padding."""
        if self._scores:
            return self._core.logits(list(work.sequences), rows="last")
        return [row[work.past :] for row in self._core.logits(list(work.sequences))]

    def pieces(self, tokens: IntArray, sizes: Sequence[int], last: int) -> FloatArray:
        session = _core.Session(self._core, len(tokens), "float32")
        kept: list[FloatArray] = []
        begin = 0
        for size in sizes:
            end = begin + size
            wanted = end > len(tokens) - last
            logits = session.append(tokens[begin:end], "all" if wanted else "none")
            if wanted:
                kept.append(logits)
            begin = end
        return np.concatenate(kept)[-last:]

    def greedy(self, prompt: IntArray, steps: int) -> Greedy:
        session = _core.Session(self._core, len(prompt) + steps, "float32")
        rows, tokens = [], []
        piece = prompt
        for _ in range(steps):
            logits = session.append(piece, "last").reshape(-1)
            rows.append(logits.copy())
            tokens.append(int(logits.argmax()))
            piece = np.array(tokens[-1:], np.int32)
        return Greedy(prompt, np.array(tokens, np.int32), np.stack(rows))


class OrtParty:
    """A graph in onnxruntime, or in what has the same way to run it.

    Args:
        name: For the report.
        gates: For its arithmetic.
        session: The graph.
        float32: Whether activations are float32 throughout.
    """

    def __init__(
        self, name: str, gates: Gates, session: OrtSession | OpenVinoSession, *, float32: bool = False
    ) -> None:
        self.name = name
        self.gates = gates
        self._session = session
        self.float32 = float32

    @property
    def has_cache(self) -> bool:
        """Whether it generates; else it gives each row one set of scores."""
        return self._session.has_cache

    @property
    def path(self) -> Path:
        """The file of the graph."""
        return self._session.path

    def copy(self, graph: bytes) -> OrtParty:
        """The same runtime with a copy of the graph."""
        session = OrtSession(self.path, self._session.config, self._session.threads, copy=graph, float32=self.float32)
        return OrtParty(self.name, self.gates, session, float32=self.float32)

    def values(self, work: Pass, names: Sequence[str]) -> list[Array]:
        """Some values of a pass, (B, ...) each."""
        ids, mask, positions = work.inputs()
        past = None
        if work.past:
            before = slice(0, work.past)
            _, past = self._session.run(ids[:, before], mask[:, before], positions[:, before])
        return self._session.values(names, ids[:, work.past :], mask, positions[:, work.past :], past)

    def logits(self, work: Pass) -> list[FloatArray]:
        block = self.values(work, ["logits"])[0].astype(np.float32, copy=False)
        if not self.has_cache:
            return [row[None] for row in block]
        return [block[row, slice(*work.columns(row, past=False))] for row in range(len(block))]

    def pieces(self, tokens: IntArray, sizes: Sequence[int], last: int) -> FloatArray:
        kept: list[FloatArray] = []
        cache, begin = None, 0
        for size in sizes:
            end = begin + size
            logits, cache = self._session.run(
                tokens[None, begin:end], np.ones((1, end), np.int64), np.arange(begin, end)[None], cache
            )
            if end > len(tokens) - last:
                kept.append(logits[0])
            begin = end
        return np.concatenate(kept)[-last:]

    def greedy(self, prompt: IntArray, steps: int) -> Greedy:
        rows, tokens = [], []
        piece, cache, begin = prompt, None, 0
        for _ in range(steps):
            end = begin + len(piece)
            logits, cache = self._session.run(
                piece[None], np.ones((1, end), np.int64), np.arange(begin, end)[None], cache
            )
            rows.append(logits[0, -1].copy())
            tokens.append(int(rows[-1].argmax()))
            piece, begin = np.array(tokens[-1:], np.int32), end
        return Greedy(prompt, np.array(tokens, np.int32), np.stack(rows))
