"""linear: y = x w^T + bias, for weights of floats and, in each profile's form, for quantised ones.

Quantised weights are w = scale (code - zero) + middle by groups of g columns. The scales go where the profile has a place for them:

    portable  int8: Cast, Mul by the scales, MatMul, which a runtime computes once (opset 17 knows no groups); int4 graphs:
              DequantizeLinear as in `standard`
    standard  DequantizeLinear of (K, N) along axis 0 in blocks of g, then MatMul: the one form that onnxruntime joins with the
              product, and computes on the codes
    ort       MatMulNBits, which rounds activations to int8 (accuracy_level 4)

No form has a place for what a group's minimum adds. Its share of the product is (sum of the group's x) @ middles^T, a small
product that is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_ext.onnx.graph import MICROSOFT, Graph, Value
from llama_ext.onnx.weights import Codes, FloatMatrix, Matrix, QuantizedMatrix, Weights, narrowed, transpose

__all__ = ["Stored", "linear", "packed_linear", "store_columns", "vector"]

# 4: activations are rounded to int8, as the core does.
_ACCURACY_LEVEL = 4


def linear(g: Graph, x: Value, weights: Weights, slot: str, *, output: Value | None = None) -> Value:
    """A projection of the model.

    Args:
        g: The graph.
        x: (B, S, K).
        weights: Of the model.
        slot: Of the matrix; its bias, if there is one, is slot.bias.
        output: The name of the result.

    Returns:
        (B, S, N).
    """
    bias = slot + ".bias" if weights.has(slot + ".bias") else None
    with g.scope(slot.rsplit(".", 1)[-1]):
        y = _product(g, x, weights.matrix(slot), weights.name(slot), None if bias else output)
        return g.op("Add", y, vector(g, weights, bias), output=output) if bias else y


def packed_linear(g: Graph, x: Value, weights: Weights, slots: Sequence[str]) -> tuple[Value, Value, Value]:
    """Q, K and V, by one product with the rows of all three, or three where their weights are of different types.

    Args:
        g: The graph.
        x: (B, S, K).
        weights: Of the model.
        slots: Of the three matrices.

    Returns:
        (B, S, N) each.
    """
    matrices = [weights.matrix(slot) for slot in slots]
    joined = _joined(matrices)
    if joined is None:
        q, k, v = (linear(g, x, weights, slot) for slot in slots)
        return q, k, v
    name = weights.name(slots[0]).replace("q_proj", "qkv_proj")
    with g.scope("qkv"):
        y = _product(g, x, joined, name, None)
        if weights.has(slots[0] + ".bias"):
            biases = np.concatenate([weights.vector(slot + ".bias") for slot in slots])
            bias = name.replace(".weight", ".bias")
            y = g.op("Add", y, g.weight(bias, g.dtype, biases.shape, lambda: [narrowed(biases, g.dtype)]))
        sizes = g.constant([matrix.shape[0] for matrix in matrices])
        q, k, v = g.ops("Split", y, sizes, outputs=(None, None, None), axis=-1)
    return q, k, v


def vector(g: Graph, weights: Weights, slot: str) -> Value:
    """A norm's weight or a bias, in the dtype of the activations."""
    shape = weights.vector(slot).shape
    return g.weight(weights.name(slot), g.dtype, shape, lambda: [narrowed(weights.vector(slot), g.dtype)])


def _joined(matrices: Sequence[Matrix]) -> Matrix | None:
    """Matrices below each other, if they are of one type."""
    first = matrices[0]
    shape = (sum(matrix.shape[0] for matrix in matrices), first.shape[1])
    floats = [matrix for matrix in matrices if isinstance(matrix, FloatMatrix)]
    if len(floats) == len(matrices):

        def read() -> tuple[npt.NDArray[Any], str]:
            parts = [matrix.read() for matrix in floats]
            if len({dtype for _, dtype in parts}) == 1:
                return np.concatenate([values for values, _ in parts]), parts[0][1]
            return np.concatenate([part for matrix in floats for part in matrix.rows("float32")]), "float32"

        def release() -> None:
            for matrix in floats:
                matrix.release()

        return FloatMatrix(shape, read, release)
    codes = [matrix for matrix in matrices if isinstance(matrix, QuantizedMatrix)]
    kinds = {(matrix.bits, matrix.has_middle, matrix.group) for matrix in codes}
    if len(codes) < len(matrices) or len(kinds) > 1:
        return None

    def read_codes() -> Codes:
        parts = [matrix.read() for matrix in codes]
        middles = [part.middles for part in parts if part.middles is not None]
        return Codes(
            np.concatenate([part.codes for part in parts]),
            np.concatenate([part.scales for part in parts]),
            np.concatenate(middles) if middles else None,
        )

    return QuantizedMatrix(shape, *next(iter(kinds)), read_codes)


def _product(g: Graph, x: Value, matrix: Matrix, name: str, output: Value | None) -> Value:
    """x w^T."""
    if isinstance(matrix, FloatMatrix):
        rows, columns = matrix.shape
        return g.op(
            "MatMul", x, g.weight(name, g.dtype, (columns, rows), lambda: matrix.columns(g.dtype)), output=output
        )
    last = None if matrix.has_middle else output
    if g.profile.contrib:
        stored = store_blocks(g, matrix, name)
        y = g.op(
            "MatMulNBits",
            *(x, stored.codes, stored.scales),
            output=last,
            domain=MICROSOFT,
            K=matrix.shape[1],
            N=matrix.shape[0],
            bits=stored.bits,
            block_size=matrix.group,
            accuracy_level=_ACCURACY_LEVEL,
        )
        g.declare(y, "float32", ["batch_size", "sequence_length", matrix.shape[0]])
    else:
        stored = store_columns(g, matrix, name)
        y = g.op("MatMul", _padded(g, x, matrix), _dequantized(g, stored, matrix), output=last)
    if not matrix.has_middle:
        return y
    with g.scope("middles"):
        sums = g.once(("group sums", x, matrix.group), lambda: _group_sums(g, x, matrix))
        middles = stored.middles if stored.by_column else g.op("Transpose", stored.middles, perm=[1, 0])
        share = g.op("MatMul", sums, middles)
    return g.op("Add", y, share, output=output)


def _padded(g: Graph, x: Value, matrix: QuantizedMatrix) -> Value:
    """x with zeros up to whole groups, where the last group of the weights is smaller: runtimes differ in whether they allow that."""
    padding = matrix.groups * matrix.group - matrix.shape[1]
    if not padding:
        return x
    return g.once(("padded", x, padding), lambda: g.op("Pad", x, g.constant([0, 0, 0, 0, 0, padding])))


def _group_sums(g: Graph, x: Value, matrix: QuantizedMatrix) -> Value:
    """(B, S, K) -> (B, S, groups)."""
    return g.reduce(
        "ReduceSum", g.reshape(_padded(g, x, matrix), [0, 0, matrix.groups, matrix.group]), 3, keepdims=False
    )


# -- how codes are stored ---------------------------------------------------------------------------------------------


class Stored:
    """The tensors of a quantised matrix in the data file. Codes come first, and what goes with them is kept until its turn.

    Args:
        matrix: The matrix.

    Attributes:
        codes, scales, middles: Their names; "" for what there is not.
        bits: Of a stored code.
        by_column: Whether they lie as (K, N) and (groups, N), or as (N, ...).
        padded: Columns that are stored: whole groups, the last one filled up with zeros.
    """

    def __init__(self, matrix: QuantizedMatrix) -> None:
        self.matrix = matrix
        self.codes = self.scales = self.middles = ""
        self.bits = 8
        self.by_column = False
        self.padded = matrix.shape[1]
        self._left: dict[str, npt.NDArray[np.float32] | None] = {}

    def take_codes(self) -> npt.NDArray[np.uint8]:
        """(N, K); the rest stays for `take_scales` and `take_middles`."""
        read = self.matrix.read()
        self._left = {"scales": read.scales, "middles": read.middles}
        return read.codes

    def take_scales(self) -> npt.NDArray[np.float32]:
        """(N, groups), once, after the codes."""
        return self._take("scales")

    def take_middles(self) -> npt.NDArray[np.float32]:
        """(N, groups), once, after the codes."""
        return self._take("middles")

    def _take(self, what: str) -> npt.NDArray[np.float32]:
        values = self._left.pop(what)
        # Never: there is a place for them only where there are some.
        return np.empty((0, 0), np.float32) if values is None else values


def store_columns(g: Graph, matrix: QuantizedMatrix, name: str, *, wide: bool = False) -> Stored:
    """Codes as (K, N), the rest as (groups, N).

    Args:
        g: The graph.
        matrix: The matrix.
        name: Of the codes.
        wide: Keep 4-bit codes in bytes: for a table that is also looked up in, as Gather takes no 4-bit tensors.
    """
    return g.once(("stored", name), lambda: _store_columns(g, matrix, name, wide))


def _store_columns(g: Graph, matrix: QuantizedMatrix, name: str, wide: bool) -> Stored:
    stored = Stored(matrix)
    stored.by_column = True
    stored.bits = 4 if matrix.bits == 4 and not wide and g.opset >= 21 else 8
    rows, columns = matrix.shape
    stored.padded = matrix.groups * matrix.group

    def codes() -> Iterator[Any]:
        values = _signed(stored.take_codes(), matrix)
        padded = np.zeros((stored.padded, rows), np.uint8)
        transpose(values, padded[:columns])
        del values
        yield _nibbles(padded) if stored.bits == 4 else padded

    stored.codes = g.weight(f"{name}.codes", f"int{stored.bits}", (stored.padded, rows), codes)
    transposed: Callable[[npt.NDArray[Any]], npt.NDArray[Any]] = lambda values: np.ascontiguousarray(values.T)  # noqa: E731
    shape = (matrix.groups, rows)
    stored.scales = g.weight(f"{name}.scales", "float32", shape, lambda: [transposed(stored.take_scales())])
    if matrix.has_middle:
        stored.middles = g.weight(f"{name}.mins", "float32", shape, lambda: [transposed(stored.take_middles())])
    return stored


def store_blocks(g: Graph, matrix: QuantizedMatrix, name: str) -> Stored:
    """Codes as (N, groups, bytes of a group), the rest as (N, groups): what MatMulNBits takes."""
    return g.once(("stored", name), lambda: _store_blocks(g, matrix, name))


def _store_blocks(g: Graph, matrix: QuantizedMatrix, name: str) -> Stored:
    stored = Stored(matrix)
    stored.bits = 4 if matrix.bits == 4 else 8
    rows, columns = matrix.shape
    stored.padded = matrix.groups * matrix.group
    # What the operator subtracts when it is told nothing.
    zero = 1 << (stored.bits - 1)

    def codes() -> Iterator[Any]:
        padded = np.full((rows, stored.padded), zero, np.uint8)
        np.add(stored.take_codes(), np.uint8(zero - matrix.zero), out=padded[:, :columns])
        yield _nibbles(padded) if stored.bits == 4 else padded

    blob = matrix.group * stored.bits // 8
    shape = (rows, matrix.groups)
    stored.codes = g.weight(f"{name}.codes", "uint8", (rows, matrix.groups, blob), codes)
    stored.scales = g.weight(f"{name}.scales", "float32", shape, lambda: [stored.take_scales()])
    if matrix.has_middle:
        stored.middles = g.weight(f"{name}.mins", "float32", shape, lambda: [stored.take_middles()])
    return stored


def _signed(codes: npt.NDArray[np.uint8], matrix: QuantizedMatrix) -> npt.NDArray[np.uint8]:
    """code - zero, as the bits of int8; a nibble's are the low four of them."""
    return codes - np.uint8(matrix.zero)


def _nibbles(values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Low four bits of each, two in a byte, the first one low."""
    flat = values.reshape(-1)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return (flat[0::2] & np.uint8(15)) | (flat[1::2] << np.uint8(4))


def _dequantized(g: Graph, stored: Stored, matrix: QuantizedMatrix) -> Value:
    """scale (code - zero), (K in whole groups, N)."""
    if g.opset >= 21:
        return g.op("DequantizeLinear", stored.codes, stored.scales, axis=0, block_size=matrix.group)
    rows = matrix.shape[0]
    groups = g.reshape(g.cast(stored.codes, "float32"), [matrix.groups, matrix.group, rows])
    values = g.op("Mul", groups, g.op("Unsqueeze", stored.scales, g.constant([1])))
    return g.reshape(values, [stored.padded, rows])
