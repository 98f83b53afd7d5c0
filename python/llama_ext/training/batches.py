"""Rows of a ragged batch, and where they come from: examples in a new order each epoch, or crops of a long stream."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from llama_ext._arrays import IntArray
from llama_ext._options import shown
from llama_ext.errors import OptionError, OutOfMemoryError
from llama_ext.training.driver import LengthArray

__all__ = ["IGNORED", "Batch", "Example", "Examples", "Row", "Source", "Stream", "TokenReader", "collate", "stream_of"]

# A label that does not count, as in transformers.
IGNORED = -100


class Example(NamedTuple):
    """One sequence: tokens (t,), and labels (t,): what each position is to predict, or -100."""

    tokens: IntArray
    labels: IntArray


# Tokens of a step, in random crops: what is beyond this fits into no machine, and is told before it is tried.
_MOST_TOKENS = 2**31 - 1

# What counts as one of `batch_size`: a sequence, or several that were packed together and do not see each other.
Row = tuple[Example, ...]


@dataclass(frozen=True)
class Batch:
    """A ragged batch as `Trainer.accumulate` takes it: tokens and labels (n,), lengths (sequences,)."""

    tokens: IntArray
    labels: IntArray
    lengths: LengthArray

    @property
    def counted(self) -> int:
        """How many labels count."""
        return int(np.count_nonzero(self.labels != IGNORED))


def collate(rows: Sequence[Row]) -> Batch:
    """Rows one after the other, without padding."""
    sequences = [sequence for row in rows for sequence in row]
    return Batch(
        np.concatenate([sequence.tokens for sequence in sequences]),
        np.concatenate([sequence.labels for sequence in sequences]),
        np.array([sequence.tokens.size for sequence in sequences], dtype=np.int64),
    )


def stream_of(seed: int, purpose: str, index: int) -> np.random.Generator:
    """A stream of random numbers that depends on nothing but its arguments: there is no other random state in training.

    Args:
        seed: Of the run.
        purpose: What it is for, so that two uses do not share numbers.
        index: The epoch or step.

    Returns:
        The generator.
    """
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


class Source(Protocol):
    """Data for a run. What a step sees is a function of the step and the seed, so a run goes on exactly where it was."""

    @property
    def fingerprint(self) -> str:
        """A hash of the contents."""
        ...

    @property
    def context(self) -> int:
        """Tokens of the longest sequence."""
        ...

    def steps_per_epoch(self, rows: int) -> int:
        """Steps of an epoch with so many rows each.

        Raises:
            OptionError: A step cannot have so many.
        """
        ...

    def rows(self, step: int, rows: int, seed: int) -> list[Row]:
        """The rows of a step, which counts from 0; the last step of an epoch may have fewer.

        Raises:
            OptionError: A step cannot have so many.
            OutOfMemoryError: They do not fit into memory.
        """
        ...

    def all_rows(self) -> Iterator[Row]:
        """Everything once, in order: for validation."""
        ...


class Examples:
    """Sequences that are seen once an epoch, in an order that the seed and the epoch decide.

    Args:
        rows: At least one, each with at least one label that counts.
        shuffle: Whether the order changes.
    """

    def __init__(self, rows: Sequence[Row], *, shuffle: bool = True) -> None:
        if not rows:
            raise OptionError("there is nothing to train on: no example has a label that counts")
        self._rows = list(rows)
        self._shuffle = shuffle
        self._order: tuple[tuple[int, int], npt.NDArray[np.intp]] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"examples/{self._shuffle}".encode())
        for row in self._rows:
            digest.update(len(row).to_bytes(8, "little"))
            for sequence in row:
                digest.update(sequence.tokens.size.to_bytes(8, "little"))
                digest.update(sequence.tokens.tobytes())
                digest.update(sequence.labels.tobytes())
        return digest.hexdigest()

    @property
    def context(self) -> int:
        return max(sequence.tokens.size for row in self._rows for sequence in row)

    def steps_per_epoch(self, rows: int) -> int:
        return -(-len(self._rows) // rows)

    def rows(self, step: int, rows: int, seed: int) -> list[Row]:
        epoch, position = divmod(step, self.steps_per_epoch(rows))
        order = self._order_of(epoch, seed)
        return [self._rows[index] for index in order[position * rows : (position + 1) * rows]]

    def all_rows(self) -> Iterator[Row]:
        return iter(self._rows)

    def _order_of(self, epoch: int, seed: int) -> npt.NDArray[np.intp]:
        if not self._shuffle:
            return np.arange(len(self._rows))
        if self._order is None or self._order[0] != (epoch, seed):
            self._order = (epoch, seed), stream_of(seed, "order", epoch).permutation(len(self._rows))
        return self._order[1]


class TokenReader(Protocol):
    """A long run of tokens: an array, or a file."""

    @property
    def fingerprint(self) -> str:
        """A hash of the contents."""
        ...

    def __len__(self) -> int: ...

    def read(self, begin: int, end: int) -> IntArray:
        """Tokens [begin, end)."""
        ...


class Stream:
    """Crops of a long run of tokens, each of `context` tokens that predict the next one, at random places.

    An epoch has so many crops as fit into the run side by side. For validation the windows lie one after the other, and each token but the
    first is predicted once.

    Args:
        tokens: At least two.
        context: Tokens of a crop.
        shuffle: False: crops one after the other in training as well.
    """

    def __init__(self, tokens: TokenReader, context: int, *, shuffle: bool = True) -> None:
        if len(tokens) < 2:
            raise OptionError(f"a stream needs at least two tokens, one to predict the other, got {len(tokens)}")
        self._tokens = tokens
        self._context = min(context, len(tokens) - 1)
        self._shuffle = shuffle

    @property
    def fingerprint(self) -> str:
        return f"stream/{self._context}/{self._shuffle}/{self._tokens.fingerprint}"

    @property
    def context(self) -> int:
        return self._context

    @property
    def _windows(self) -> int:
        return -(-(len(self._tokens) - 1) // self._context)

    def steps_per_epoch(self, rows: int) -> int:
        if self._shuffle:
            self._refuse_too_many(rows)
            return max(1, (len(self._tokens) - 1) // (self._context * rows))
        return -(-self._windows // rows)

    def rows(self, step: int, rows: int, seed: int) -> list[Row]:
        if not self._shuffle:
            first = step % self.steps_per_epoch(rows) * rows
            return [self._window(index) for index in range(first, min(first + rows, self._windows))]
        self._refuse_too_many(rows)
        try:
            starts = stream_of(seed, "crops", step).integers(0, len(self._tokens) - self._context, rows)
            return [self._crop(int(start), self._context) for start in starts]
        except MemoryError as error:
            raise OutOfMemoryError(
                f"{rows} rows of {self._context} tokens do not fit into memory: lower batch_size or grad_accum"
            ) from error

    def all_rows(self) -> Iterator[Row]:
        return (self._window(index) for index in range(self._windows))

    def _refuse_too_many(self, rows: int) -> None:
        if rows * self._context > _MOST_TOKENS:
            raise OptionError(
                f"a step of {shown(rows)} rows of {self._context} tokens is too large: at most {_MOST_TOKENS // self._context} rows "
                "are accepted. Lower batch_size or grad_accum"
            )

    def _window(self, index: int) -> Row:
        begin = index * self._context
        return self._crop(begin, min(self._context, len(self._tokens) - 1 - begin))

    def _crop(self, begin: int, length: int) -> Row:
        piece = self._tokens.read(begin, begin + length + 1)
        return (Example(piece[:-1], piece[1:]),)
