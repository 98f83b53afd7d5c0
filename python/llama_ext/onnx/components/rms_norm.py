"""rms_norm: y = x * rsqrt(mean(x^2, last axis) + eps) * weight; the mean is float32."""

from __future__ import annotations

from llama_ext.onnx.graph import MICROSOFT, Graph, Value

__all__ = ["add_rms_norm", "rms_norm"]


def rms_norm(g: Graph, x: Value, weight: Value, eps: float) -> Value:
    """Normalises.

    Args:
        g: The graph.
        x: (B, S, C).
        weight: (C,).
        eps: Added to the mean square.

    Returns:
        (B, S, C).
    """
    if g.profile.fused:
        return g.op("RMSNormalization", x, weight, axis=-1, epsilon=eps, stash_type=1)
    narrow = g.dtype != "float32"
    wide = g.cast(x, "float32") if narrow else x
    mean = g.reduce("ReduceMean", g.op("Mul", wide, wide), -1, keepdims=True)
    root = g.op("Sqrt", g.op("Add", mean, g.constant(eps, "float32")))
    y = g.op("Div", wide, root)
    return g.op("Mul", g.cast(y, g.dtype) if narrow else y, weight)


def add_rms_norm(g: Graph, x: Value, delta: Value, weight: Value, eps: float) -> tuple[Value, Value]:
    """A residual connection and the norm behind it.

    Args:
        g: The graph.
        x: (B, S, C), the residual stream.
        delta: (B, S, C), what is added to it.
        weight: (C,).
        eps: Added to the mean square.

    Returns:
        The sum, and it normalised.
    """
    if g.profile.contrib:
        normed, _, _, total = g.ops(
            "SkipSimplifiedLayerNormalization",
            x,
            delta,
            weight,
            outputs=(None, "", "", None),
            domain=MICROSOFT,
            epsilon=eps,
        )
        return total, normed
    total = g.op("Add", x, delta)
    return total, rms_norm(g, total, weight, eps)
