"""What the benchmarks of a GPU share: models of random weights, their parameters, how calls are timed, and a table."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import llama_ext
from llama_ext import _core
from llama_ext.runtime.loading import core_config


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model's shape, and in which ways its weights are kept here."""

    width: int
    ffn_width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    kinds: tuple[tuple[str, int], ...]

    def config(self, context: int) -> llama_ext.LlamaConfig:
        return llama_ext.LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.ffn_width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=context,
            tie_word_embeddings=self.tied,
        )


SHAPES = {
    "tiny": Shape(64, 160, 2, 4, 2, 16, 512, True, (("float32", 0), ("bfloat16", 0), ("int8", 32), ("int4", 32))),
    "1b": Shape(2048, 8192, 16, 32, 8, 64, 128256, True, (("bfloat16", 0), ("int8", 128), ("int4", 128))),
    "8b": Shape(4096, 14336, 32, 32, 8, 128, 128256, False, (("bfloat16", 0), ("int4", 128))),
}


# Of a number.
BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}


def random_model(device: str, shape: Shape, kind: tuple[str, int], context: int) -> _core.Model:
    """A model whose weights are kept in one way, (encoding, group), as the package keeps them."""
    encoding, group = kind
    types = {"": (encoding, group)}
    if encoding == "int4":
        types |= dict.fromkeys(["embedding", *([] if shape.tied else ["head"])], ("int8", group))
    model = _core.Model(_core.Backend(device), core_config(shape.config(context)), types)
    fill(model)
    return model


def fill(model: _core.Model) -> None:
    """Random weights from one pool, the same for all matrices of a shape: making each for itself would take longer than
    everything else."""
    rng = np.random.default_rng(0)
    pool = (rng.standard_normal(1 << 22) * 0.02).astype(np.float32)
    bits = (pool.view(np.uint32) >> 16).astype(np.uint16)
    codes = rng.integers(0, 256, 1 << 22, dtype=np.uint8)
    types = model.types()

    @functools.cache
    def numbers(rows: int, columns: int) -> np.ndarray[Any, Any]:
        return np.resize(bits, (rows, columns))

    @functools.cache
    def packed(rows: int, columns: int, encoding: str, group: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        some = (codes & 15).astype(np.int8) - np.int8(8) if encoding == "int4" else codes.view(np.int8)
        scales = np.full((rows, -(-columns // group)), 0.02 / (4 if encoding == "int4" else 64), np.float16)
        return np.resize(some, (rows, columns)), scales

    for slot, extents, is_matrix in model.slots():
        if not is_matrix:
            model.load(slot, np.ones(extents, np.float32), "float32")
            continue
        encoding, group = types[slot]
        if group == 0:
            model.load(slot, numbers(*extents), "bfloat16")
        else:
            model.load_codes(slot, *packed(*extents, encoding, group))


def seconds(call: Callable[[], Any], rounds: int) -> float:
    """The median of some calls, after one that does not count."""
    call()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def blocks(shape: Shape) -> int:
    """Parameters that every token of a prompt meets: those of the blocks."""
    attention = shape.width * shape.head_dim * 2 * (shape.heads + shape.kv_heads)
    return shape.layers * (attention + 3 * shape.width * shape.ffn_width)


def parameters(shape: Shape) -> int:
    """Of all matrices, an untied head among them."""
    return blocks(shape) + shape.vocabulary * shape.width * (1 if shape.tied else 2)


def products(shape: Shape) -> dict[str, tuple[int, int]]:
    """The matrices (N, K) of a block that a token meets, as they are multiplied."""
    heads = shape.heads * shape.head_dim
    return {
        "qkv": (heads + 2 * shape.kv_heads * shape.head_dim, shape.width),
        "o": (shape.width, heads),
        "gate, up": (2 * shape.ffn_width, shape.width),
        "down": (shape.width, shape.ffn_width),
    }


def bytes_read(model: _core.Model, shape: Shape) -> float:
    """Of weights, for each token that is decoded: all but an embedding that is only looked up."""
    if shape.tied:
        return model.nbytes
    encoding, group = model.types()["embedding"]
    bits = BITS[encoding] + (16 / group if group else 0)  # a float16 scale for each group
    return model.nbytes - shape.vocabulary * shape.width * bits / 8


def print_table(header: list[str], rows: list[list[object]]) -> None:
    """Columns are as wide as their widest cell."""
    cells = [header, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
