"""embedding: the row of a table for each token."""

from __future__ import annotations

from llama_ext.onnx.components.linear import store_blocks, store_columns
from llama_ext.onnx.graph import MICROSOFT, Graph, Value
from llama_ext.onnx.weights import FloatMatrix, QuantizedMatrix, Weights

__all__ = ["embedding"]


def embedding(g: Graph, input_ids: Value, weights: Weights) -> Value:
    """Looks up.

    A quantised table is one with the head of a tied model, in the head's form: what is looked up are codes.

    Args:
        g: The graph.
        input_ids: (B, S) int64.
        weights: Of the model.

    Returns:
        (B, S, C).
    """
    matrix, name = weights.matrix("embedding"), weights.name("embedding")
    with g.scope("embedding"):
        if isinstance(matrix, FloatMatrix):
            table = g.weight(name, g.dtype, matrix.shape, lambda: matrix.rows(g.dtype))
            return g.op("Gather", table, input_ids, axis=0)
        return (
            _from_blocks(g, input_ids, matrix, name) if g.profile.contrib else _from_columns(g, input_ids, matrix, name)
        )


def _from_columns(g: Graph, input_ids: Value, matrix: QuantizedMatrix, name: str) -> Value:
    stored = store_columns(g, matrix, name, wide=True)

    def rows(table: Value, shape: list[int]) -> Value:
        # (K, B, S) -> (B, S, K)
        found = g.op("Transpose", g.op("Gather", table, input_ids, axis=1), perm=[1, 2, 0])
        return g.reshape(found, shape)

    codes = g.cast(rows(stored.codes, [0, 0, matrix.groups, matrix.group]), "float32")
    values = g.op("Mul", codes, rows(stored.scales, [0, 0, matrix.groups, 1]))
    if stored.middles:
        values = g.op("Add", values, rows(stored.middles, [0, 0, matrix.groups, 1]))
    return _cut(g, g.reshape(values, [0, 0, stored.padded]), stored.padded, matrix.shape[1])


def _from_blocks(g: Graph, input_ids: Value, matrix: QuantizedMatrix, name: str) -> Value:
    stored = store_blocks(g, matrix, name)
    # The head's form has an axis for groups; without it, it is a table of rows.
    table = g.reshape(stored.codes, [0, -1])
    values = g.op(
        "GatherBlockQuantized",
        *(table, input_ids, stored.scales),
        domain=MICROSOFT,
        bits=stored.bits,
        block_size=matrix.group,
        gather_axis=0,
        quantize_axis=1,
    )
    g.declare(values, "float32", ["batch_size", "sequence_length", stored.padded])
    if stored.middles:
        middles = g.op("Unsqueeze", g.op("Gather", stored.middles, input_ids, axis=0), g.constant([3]))
        groups = g.reshape(values, [0, 0, matrix.groups, matrix.group])
        values = g.reshape(g.op("Add", groups, middles), [0, 0, stored.padded])
    return _cut(g, values, stored.padded, matrix.shape[1])


def _cut(g: Graph, values: Value, padded: int, width: int) -> Value:
    if padded == width:
        return values
    return g.op("Slice", values, g.constant([0]), g.constant([width]), g.constant([2]))
