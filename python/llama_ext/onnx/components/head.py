"""head: the logits of each token, or the scores of a classifier's labels at each row's last token."""

from __future__ import annotations

from llama_ext.onnx.components.linear import linear
from llama_ext.onnx.graph import Graph, Value
from llama_ext.onnx.weights import FloatMatrix, Weights

__all__ = ["head", "score"]

LOGITS = "logits"


def head(g: Graph, x: Value, weights: Weights) -> Value:
    """The output head.

    Args:
        g: The graph.
        x: (B, S, C), normalised.
        weights: Of the model.

    Returns:
        (B, S, V) float32, named "logits".
    """
    matrix = weights.matrix("head")
    narrow = g.dtype != "float32"
    output = None if narrow else LOGITS
    if weights.config.tie_word_embeddings and isinstance(matrix, FloatMatrix):
        with g.scope("head"):
            # The table of the embedding, stored once: a runtime transposes it when it loads.
            table = g.op("Transpose", weights.name("embedding"), perm=[1, 0])
            logits = g.op("MatMul", x, table, output=output)
    else:
        logits = linear(g, x, weights, "head", output=output)
    if not narrow:
        return logits
    with g.scope("head"):
        return g.op("Cast", logits, output=LOGITS, to=g.element("float32"))


def score(g: Graph, x: Value, input_ids: Value, mask: Value, weights: Weights) -> Value:
    """The head of a classifier, at the last token of each row that is not padding.

    Which token that is, is decided as in transformers: by the ids, where the config has a padding token, whatever the mask is;
    without one by the mask, where transformers takes no batches.

    Args:
        g: The graph.
        x: (B, S, C), normalised.
        input_ids: (B, S).
        mask: (B, S).
        weights: Of the model.

    Returns:
        (B, labels) float32, named "logits".
    """
    pad = weights.config.pad_token_id
    with g.scope("last_token"):
        real = g.cast(mask, "bool") if pad is None else g.op("Not", g.op("Equal", input_ids, g.constant(pad)))
        count = g.op("Gather", g.op("Shape", input_ids), g.constant(1), axis=0)
        slots = g.op("Mul", g.cast(real, "int64"), g.op("Range", g.constant(0), count, g.constant(1)))
        last = g.op("ArgMax", slots, axis=1, keepdims=1)
        x = g.op("GatherND", x, last, batch_dims=1)
    narrow = g.dtype != "float32"
    scores = linear(g, x, weights, "head", output=None if narrow else LOGITS)
    return g.op("Cast", scores, output=LOGITS, to=g.element("float32")) if narrow else scores
