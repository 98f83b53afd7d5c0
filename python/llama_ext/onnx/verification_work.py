"""What every party is asked to do, and what the reference says to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from llama_ext._arrays import IntArray
from llama_ext.models.config import LlamaConfig
from llama_ext.onnx.reference import F64, Reference
from llama_ext.onnx.verification_parties import Pass

__all__ = ["Expectations", "Workload"]

Positions = npt.NDArray[np.int64]

# Tokens that a generation begins with.
_PROMPT = 16
# Chunks of a text, repeated; one of them is a single token.
_CHUNKS = (5, 1, 11)
# A context up to this is run to its end; a longer one is only entered near it.
_RUN_TO_THE_END = 1024
# Positions at the end of the context whose logits are compared, and the size of the pieces before them.
_LAST = 8
_PIECE = 64


@dataclasses.dataclass(frozen=True)
class Workload:
    """What every party does.

    Attributes:
        texts: Token ids.
        prompt: Of the greedy generation.
        steps: Of it.
        batch: Two rows of different lengths; () when the texts have none.
        end: A sequence as long as the context; None when that is long.
        last: Tokens at its end whose logits are compared.
        near_end: A short sequence, and positions up to the last one of the context.
    """

    texts: tuple[IntArray, ...]
    prompt: IntArray
    steps: int
    batch: tuple[IntArray, ...]
    end: IntArray | None
    last: int
    near_end: Pass

    @classmethod
    def of(cls, texts: Sequence[IntArray], steps: int, config: LlamaConfig) -> Workload:
        """Chooses it.

        Args:
            texts: At least one, of at least one token.
            steps: Tokens to generate, at most; 0 for a classifier.
            config: The model.
        """
        context = config.max_position_embeddings
        pad = config.pad_token_id if config.is_classifier else None
        texts = [_without_padding(ids, pad) for ids in texts]
        first = texts[0]
        prompt = first[: max(min(_PROMPT, context - 1), 1)]
        other = texts[1] if len(texts) > 1 else first
        if len(other) == len(first):
            other = _without_padding(other[: len(other) * 2 // 3], pad)
        together = np.concatenate(list(texts))
        short = first[: min(len(first), _PROMPT, context)]
        return cls(
            texts=tuple(texts),
            prompt=prompt,
            steps=max(min(steps, context - len(prompt)), 0),
            batch=(first, other) if len(other) else (),
            end=np.resize(together, context).astype(np.int32) if context <= _RUN_TO_THE_END else None,
            last=min(_LAST, context),
            near_end=Pass((short,), positions=(np.arange(context - len(short), context),)),
        )

    def sequence(self, tokens: IntArray) -> IntArray:
        """What ran through a model that generated these: the prompt and all of them but the last."""
        return np.concatenate([self.prompt, tokens[:-1]]).astype(np.int32)

    @property
    def chunks(self) -> list[int]:
        """Sizes of the pieces of the first text."""
        return _cut(len(self.texts[0]), _CHUNKS)

    @property
    def end_pieces(self) -> list[int]:
        """Sizes of the pieces of the sequence that is as long as the context."""
        length = 0 if self.end is None else len(self.end)
        return [*_cut(length - self.last, (_PIECE,)), self.last]


def _without_padding(tokens: IntArray, pad: int | None) -> IntArray:
    """Tokens up to the one whose scores a classifier gives: a tokenizer may end a text with what the config calls padding."""
    real = np.flatnonzero(tokens != pad) if pad is not None else np.arange(len(tokens))
    return tokens[: int(real[-1]) + 1] if real.size else tokens[:1]


def _cut(length: int, sizes: Sequence[int]) -> list[int]:
    """Repeats sizes until they fill a length."""
    result: list[int] = []
    while length > 0:
        size = min(sizes[len(result) % len(sizes)], length)
        result.append(size)
        length -= size
    return result


class Expectations:
    """Sequences whose logits the reference has to give, each once: one pass over the weights serves all.

    Args:
        scores: Whether it is a classifier: a sequence has the scores of its last token, and nothing else.
    """

    def __init__(self, *, scores: bool) -> None:
        self._scores = scores
        self._index: dict[bytes, int] = {}
        self._sequences: list[IntArray] = []
        self._positions: list[Positions] = []
        self._last: list[int] = []
        self._logits: list[F64] = []

    def add(self, tokens: IntArray, positions: Positions | None = None, last: int | None = None) -> int:
        """The number of a sequence; `last` of its rows, or all, will be there."""
        places = np.arange(len(tokens)) if positions is None else positions
        key = tokens.astype(np.int64).tobytes() + b"/" + places.astype(np.int64).tobytes()
        if key not in self._index:
            self._index[key] = len(self._sequences)
            self._sequences.append(tokens)
            self._positions.append(places)
            self._last.append(0)
        index = self._index[key]
        self._last[index] = max(self._last[index], len(tokens) if last is None else last)
        return index

    def compute(self, reference: Reference) -> None:
        """Fills in the logits."""
        head = reference.head()
        count = [1] * len(self._last) if self._scores else self._last
        self._logits = reference.logits(
            self._sequences, positions=self._positions, final=lambda index, x: x[-count[index] :] @ head.T
        )

    def last(self, tokens: IntArray, positions: Positions | None = None, count: int | None = None) -> F64:
        """The logits of the last rows of a sequence, or of all."""
        index = self.add(tokens, positions, count)
        if self._scores:
            return self._logits[index]
        return self._logits[index][-(len(tokens) if count is None else count) :]
