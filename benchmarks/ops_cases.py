"""The operations that `benchmarks.ops` times: their work, and a function that does it once."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from benchmarks.accounting import ModelShape
from llama_ext import _core

__all__ = ["Case", "attention_cases", "feed_forward_cases", "matrix_cases", "small_cases"]

FloatArray = npt.NDArray[np.float32]

# Bytes of a number, in a cache and as weights; those of whole numbers with their scales, in groups of 128.
_GROUP = 128
_ITEM = {"float32": 4, "bfloat16": 2, "int8": 1 + 2 / _GROUP, "int4": 0.5 + 2 / _GROUP}
_KINDS = {"float32": "f32", "bfloat16": "bf16", "int8": "int8", "int4": "int8"}


@dataclasses.dataclass
class Case:
    """One operation on one size.

    Attributes:
        op: Its name, as in llama_ext.ops.
        size: What of it, for people.
        variant: "float32", "bfloat16", "int8", "int4", and of the last three also "bfloat16 exact" and so on: weights or cache,
            and arithmetic.
        kind: "f32", "bf16" or "int8": the peak it is compared with; None compares with nothing, as for work in a cache.
        flop: Operations of one run; a multiply-add is two.
        bytes: What one run has to read and write when nothing is cached.
        run: Does it once.
    """

    op: str
    size: str
    variant: str
    kind: str | None
    flop: int
    bytes: int
    run: Callable[[], object]


def matrix_cases(
    backend: _core.Backend, shape: ModelShape, variants: Sequence[str], rows: Sequence[int], rotate_bytes: int
) -> Iterator[Case]:
    """matmul in the shapes of a block and of the head.

    Weights are there in as many copies as fill `rotate_bytes`, used in turn: in a model no matrix is in a cache when
    its turn comes. The copies of one case go before those of the next come.
    """
    generator = np.random.default_rng(0)
    matrices = {**shape.layer_matrices, "head": (shape.vocabulary, shape.width)}
    for name, (outputs, inputs) in matrices.items():
        source = _weights(generator, outputs, inputs)
        for dtype in _ITEM:
            wanted = [variant for variant in variants if variant.split()[0] == dtype]
            if not wanted:
                continue
            nbytes = int(outputs * inputs * _ITEM[dtype])
            copies = [backend.matrix(source, dtype, _group(dtype)) for _ in range(max(2, -(-rotate_bytes // nbytes)))]
            for variant in wanted:
                for count in rows:
                    x = generator.standard_normal((count, inputs), dtype=np.float32)
                    out = np.empty((count, outputs), dtype=np.float32)
                    yield Case(
                        "matmul",
                        f"{name} {count} x {inputs} -> {outputs}",
                        variant,
                        _kind(variant),
                        2 * count * outputs * inputs,
                        nbytes + x.nbytes + out.nbytes,
                        _matmul(backend, copies, x, out, variant),
                    )
            del copies


def feed_forward_cases(
    backend: _core.Backend, shape: ModelShape, variants: Sequence[str], rows: Sequence[int], rotate_bytes: int
) -> Iterator[Case]:
    """feed_forward: both products and SwiGLU, weights rotated as in `matrix_cases`."""
    generator = np.random.default_rng(0)
    gate, up, down = (
        _weights(generator, *size)
        for size in ((shape.ffn_width, shape.width), (shape.ffn_width, shape.width), (shape.width, shape.ffn_width))
    )
    weights = 3 * shape.ffn_width * shape.width
    for dtype in _ITEM:
        wanted = [variant for variant in variants if variant.split()[0] == dtype]
        if not wanted:
            continue
        nbytes, group = int(weights * _ITEM[dtype]), _group(dtype)
        count = max(2, -(-rotate_bytes // nbytes))
        pairs = [
            (backend.gate_up_matrix(gate, up, dtype, group), backend.matrix(down, dtype, group)) for _ in range(count)
        ]
        for variant in wanted:
            for tokens in rows:
                x = generator.standard_normal((tokens, shape.width), dtype=np.float32)
                out = np.empty_like(x)
                yield Case(
                    "feed_forward",
                    f"{tokens} x {shape.width}, F {shape.ffn_width}",
                    variant,
                    _kind(variant),
                    2 * tokens * weights,
                    nbytes + x.nbytes + out.nbytes,
                    _feed_forward(backend, pairs, x, out, variant),
                )
        del pairs


def attention_cases(
    backend: _core.Backend, shape: ModelShape, cache_dtypes: Sequence[str], lengths: Sequence[int]
) -> Iterator[Case]:
    """attention of one block: all of a prompt (prefill), and one token after it (decode).

    As an operation on arrays it also writes keys and values to a new cache, which is in the bytes: they are read,
    written and read again. In a model that happens once per token, so decode is cheaper there.
    """
    generator = np.random.default_rng(0)
    one = dataclasses.replace(shape, layers=1)
    for cache, length, prefill in itertools.product(cache_dtypes, lengths, (True, False)):
        tokens = length if prefill else 1
        q = generator.standard_normal((1, tokens, shape.heads, shape.head_dim), dtype=np.float32)
        k = generator.standard_normal((1, length, shape.kv_heads, shape.head_dim), dtype=np.float32)
        v = generator.standard_normal(k.shape, dtype=np.float32)
        yield Case(
            "attention",
            f"{'prefill' if prefill else 'decode'} {length}",
            f"cache {cache}",
            "f32" if prefill else None,
            one.attention_flop(tokens, length - tokens),
            2 * q.nbytes + (k.nbytes + v.nbytes) + int(2 * (k.size + v.size) * _ITEM[cache]),
            _attention(backend, q, k, v, cache),
        )


def small_cases(backend: _core.Backend, shape: ModelShape) -> Iterator[Case]:
    """What is neither a product nor attention; compared with no limit, since it stays in the caches."""
    generator = np.random.default_rng(0)
    weight = np.ones(shape.width, dtype=np.float32)
    for tokens in (1, 512):
        x = generator.standard_normal((tokens, shape.width), dtype=np.float32)
        out = np.empty_like(x)
        size = f"{tokens} x {shape.width}"
        yield _small("rms_norm", size, 4 * x.size, 2 * x.nbytes, _bind(backend.rms_norm, x, weight, 1e-6, out))

        heads = generator.standard_normal((tokens, shape.heads, shape.head_dim), dtype=np.float32)
        half = (tokens, shape.head_dim // 2)
        angles = generator.uniform(0, 3, half).astype(np.float32)
        size = f"{tokens} x {shape.heads} x {shape.head_dim}"
        rotate = _bind(backend.rope, heads, np.cos(angles), np.sin(angles))
        yield _small("rope", size, 3 * heads.size, 2 * heads.nbytes, rotate)

    table = backend.matrix(_weights(generator, shape.vocabulary, shape.width), "float32")
    ids = generator.integers(0, shape.vocabulary, 512).astype(np.int32)
    gathered = np.empty((512, shape.width), dtype=np.float32)
    size = f"512 of {shape.vocabulary} x {shape.width}"
    yield _small("embedding", size, 0, 2 * gathered.nbytes, _bind(backend.embedding, ids, table, gathered))

    for rows, columns in ((1, shape.vocabulary), (512, 2048)):
        x = generator.standard_normal((rows, columns), dtype=np.float32)
        run = _bind(backend.softmax, x, np.empty_like(x))
        yield _small("softmax", f"{rows} x {columns}", 4 * x.size, 2 * x.nbytes, run)

    logits = generator.standard_normal((64, shape.vocabulary), dtype=np.float32)
    labels = generator.integers(0, shape.vocabulary, 64).astype(np.int32)
    losses = np.empty(64, dtype=np.float32)
    run = _bind(backend.cross_entropy, logits, labels, losses)
    yield _small("cross_entropy", f"64 x {shape.vocabulary}", 3 * logits.size, logits.nbytes, run)

    for name, options in (("greedy", {}), ("top-k 40, top-p 0.9", {"temperature": 0.8, "top_k": 40, "top_p": 0.9})):
        run = _bind(backend.sample, logits[0], options, [], [], 0, 0, 0)
        yield _small("sample", f"{shape.vocabulary}, {name}", logits.shape[1], logits[0].nbytes, run)


def _weights(generator: np.random.Generator, rows: int, columns: int) -> FloatArray:
    values = generator.standard_normal((rows, columns), dtype=np.float32)
    values *= np.float32(0.02)
    return values


def _group(dtype: str) -> int:
    return _GROUP if dtype in ("int8", "int4") else 0


def _kind(variant: str) -> str:
    return _KINDS.get(variant, "f32")


def _compute(variant: str) -> str:
    return "exact" if variant.endswith("exact") else "auto"


def _small(op: str, size: str, flop: int, nbytes: int, run: Callable[[], object]) -> Case:
    return Case(op, size, "float32", None, flop, nbytes, run)


def _bind(function: Callable[..., object], *arguments: object) -> Callable[[], object]:
    return lambda: function(*arguments)


def _matmul(
    backend: _core.Backend, matrices: Sequence[_core.Matrix], x: FloatArray, out: FloatArray, variant: str
) -> Callable[[], object]:
    turn = itertools.cycle(matrices)
    compute = _compute(variant)
    return lambda: backend.matmul(x, next(turn), None, out, False, compute)


def _feed_forward(
    backend: _core.Backend,
    pairs: Sequence[tuple[_core.Matrix, _core.Matrix]],
    x: FloatArray,
    out: FloatArray,
    variant: str,
) -> Callable[[], object]:
    turn = itertools.cycle(pairs)
    compute = _compute(variant)

    def run() -> None:
        gate_up, down = next(turn)
        backend.feed_forward(x, gate_up, None, None, down, None, out, False, compute)

    return run


def _attention(backend: _core.Backend, q: FloatArray, k: FloatArray, v: FloatArray, cache: str) -> Callable[[], object]:
    starts = np.zeros(1, dtype=np.int32)
    lengths = np.full(1, k.shape[1], dtype=np.int32)
    scale = q.shape[-1] ** -0.5
    out = np.empty_like(q)
    return lambda: backend.attention(q, k, v, starts, lengths, scale, cache, out)
