"""Every way to keep weights in few bits: how a backend makes a matrix of it, and what its numbers are, read in NumPy.

The numbers of our own encodings are put together here from codes and scales, those of GGUF's blocks by `io.gguf_types`: neither
asks the core what it stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import numpy_ops
from guarded import guarded
from llama_ext import _core
from llama_ext.io import gguf_types
from tolerances import U_BF16

Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]

BLOCK = 128  # activations that share a scale when they are rounded to int8

# Where the float16 numbers of a block lie: scales, then minima (of K-quants: of the minima).
_HALVES = {
    "Q8_0": (0, None),
    "Q4_0": (0, None),
    "Q4_1": (0, 2),
    "Q5_0": (0, None),
    "Q5_1": (0, 2),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208, None),
}


@dataclass(frozen=True)
class Kept:
    """A way to keep weights: `name` is an encoding of ours, or with group 0 a block format of GGUF or float16."""

    name: str
    group: int = 0

    def __str__(self) -> str:
        return f"{self.name}-g{self.group}" if self.group else self.name

    @property
    def is_gguf(self) -> bool:
        return self.name in _HALVES

    @property
    def unit(self) -> int:
        """What the columns have to be a multiple of."""
        return gguf_types.BY_NAME[self.name].block if self.is_gguf else 1

    def columns(self, wanted: int) -> int:
        return -(-wanted // self.unit) * self.unit

    def rounds_activations(self, isa: str, compute: str) -> bool:
        """Whether a product first rounds its activations to int8: not on the oldest tier, nor in the reference ("").

        A GPU rounds to bfloat16, or for float16 weights to float16, when there are rows enough for its tensor cores
        (`gpu_rounding_bound`).
        """
        if isa == "cuda":
            return compute == "auto"
        return compute == "auto" and isa not in ("", "x86-64-v2") and self.name != "float16"


GROUPS = (32, 64, 128)
ENCODINGS = ("int8", "int8_min", "int5", "int5_min", "int4", "int4_min")
OURS = [Kept("float16"), *[Kept(name, group) for name in ENCODINGS for group in GROUPS]]
GGUF = [Kept(name) for name in _HALVES]
ALL = OURS + GGUF
# Each layout of panels once.
LAYOUTS = [Kept("float16"), *[Kept(name, 64) for name in ENCODINGS], Kept("Q4_K"), Kept("Q5_K"), Kept("Q6_K")]

each_kept = pytest.mark.parametrize("kept", ALL, ids=str)
each_layout = pytest.mark.parametrize("kept", LAYOUTS, ids=str)


@dataclass(frozen=True)
class Weights:
    """A matrix before it is packed, and the numbers it has afterwards."""

    kept: Kept
    source: Array  # float32 (N, K), or the blocks: uint8 (N, bytes)
    exact: F64

    def on(self, backend: _core.Backend, **options: Any) -> _core.Matrix:
        if self.kept.is_gguf:
            return backend.block_matrix(guarded(self.source), self.kept.name, self.exact.shape[1])
        return backend.matrix(guarded(self.source), self.kept.name, self.kept.group, **options)

    def unpacked(self) -> F64:
        """The numbers as a GPU multiplies them with many rows: rounded to float32, and then to bfloat16."""
        return numpy_ops.as_kept(self.exact.astype(np.float32), "bfloat16")

    def factored_magnitude(self) -> F64:
        """|scale| |code| + |minimum|: what rounds where codes are summed before they are scaled, and a minimum takes most of a sum away."""
        if self.kept.is_gguf or self.kept.name == "float16":
            return np.abs(self.exact)
        codes, scales, minima = _core.quantize(self.source, self.kept.name, self.kept.group)
        return dequantize(np.abs(codes), np.abs(scales), None if minima is None else np.abs(minima), self.kept.group)

    def rows(self, begin: int, end: int) -> Weights:
        return Weights(self.kept, self.source[begin:end], self.exact[begin:end])


def weights(kept: Kept, rng: np.random.Generator, rows: int, columns: int, size: float = 1.0) -> Weights:
    """Random ones; `columns` a multiple of `kept.unit`."""
    if kept.is_gguf:
        source = blocks(kept.name, rng, rows, columns, size)
        return Weights(kept, source, gguf_types.dequantize(source, gguf_types.BY_NAME[kept.name]).astype(np.float64))
    source = (rng.standard_normal((rows, columns)) * size).astype(np.float32)
    if kept.name.endswith("_min"):
        source += np.float32(size / 2)
    return Weights(kept, source, exact(kept, source))


def exact(kept: Kept, source: Array) -> F64:
    """What is left of float32 weights, in float64."""
    if kept.name == "float16":
        return source.astype(np.float16).astype(np.float64)
    return dequantize(*_core.quantize(source, kept.name, kept.group), kept.group)


def dequantize(codes: Array, scales: Array, minima: Array | None, group: int) -> F64:
    """scale x code, plus the minimum where there is one."""
    spread = np.repeat(scales.astype(np.float64), group, axis=1)[:, : codes.shape[1]]
    values: F64 = spread * codes.astype(np.float64)
    if minima is not None:
        values = values + np.repeat(minima.astype(np.float64), group, axis=1)[:, : codes.shape[1]]
    return values


def blocks(name: str, rng: np.random.Generator, rows: int, columns: int, size: float = 1.0) -> Array:
    """Blocks with any codes and sub-scales at all, and scales that give weights of about `size`."""
    kind = gguf_types.BY_NAME[name]
    count = rows * columns // kind.block
    made = rng.integers(0, 256, (count, kind.block_bytes), dtype=np.uint8)
    scale_at, minimum_at = _HALVES[name]
    largest = {"Q8_0": 128, "Q6_K": 32 * 128, "Q4_K": 8 * 32, "Q5_K": 16 * 32}.get(name, 8)
    for at in (scale_at, minimum_at):
        if at is not None:
            halves = rng.uniform(0.5, 1.5, count) * rng.choice([-1.0, 1.0], count) * size / largest
            made[:, at : at + 2] = halves.astype("<f2")[:, None].view(np.uint8)
    return made.reshape(rows, columns // kind.block * kind.block_bytes)


def largest(kept: Kept, rows: int, columns: int) -> Weights:
    """Weights whose codes are nearly all the largest there is: what sums of products could overflow with."""
    if kept.is_gguf:
        kind = gguf_types.BY_NAME[kept.name]
        made = np.full((rows * columns // kind.block, kind.block_bytes), 0xFF, np.uint8)
        for at in _HALVES[kept.name]:
            if at is not None:
                made[:, at : at + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        source = made.reshape(rows, columns // kind.block * kind.block_bytes)
        return Weights(kept, source, gguf_types.dequantize(source, kind).astype(np.float64))
    source = np.ones((rows, columns), np.float32)
    source[:, :: kept.group or columns] = -1.0  # a minimum for those that have one
    return Weights(kept, source, exact(kept, source))


# The most rows that a GPU multiplies with codes as they are: with more, it rounds the weights to bfloat16, too.
MOST_ROWS_OF_CODES = 32


def gpu_rounding_bound(kept: Kept, x: Array, exact_weights: F64) -> F64:
    """How far a GPU's roundings can move a product of these (M, K) activations with (N, K) weights: to bfloat16 half a unit of
    8 bits of each factor that is rounded, to float16 half a unit of 11 bits and 2^-25 of a row's largest at the end of the range."""
    size = np.abs(x.astype(np.float64))
    magnitude = np.abs(exact_weights)
    scale = size @ magnitude.T
    if kept.name == "float16":
        largest = size.max(axis=1, keepdims=True, initial=0.0) * magnitude.sum(axis=1)
        bound: F64 = 2.0**-11 * scale + 2.0**-25 * largest
        return bound
    factors = 2 if len(x) > MOST_ROWS_OF_CODES else 1
    return ((1 + U_BF16) ** factors - 1) * (1 + 2.0**-15) * scale


def rounding_bound(x: Array, exact_weights: F64) -> F64:
    """How far rounding (M, K) activations to int8 can move a product with (N, K) weights: half a step of each block of 128,
    or all of a block whose numbers are below 1e-30."""
    size = x.shape[1]
    bound = np.zeros((len(x), len(exact_weights)))
    for begin in range(0, size, BLOCK):
        top = np.abs(x[:, begin : begin + BLOCK].astype(np.float64)).max(axis=1, initial=0.0)
        step = np.where(top < 1e-30, top, top / 127 * 0.5 * 1.0001)
        bound += step[:, None] * np.abs(exact_weights[:, begin : begin + BLOCK]).sum(axis=1)
    return bound
