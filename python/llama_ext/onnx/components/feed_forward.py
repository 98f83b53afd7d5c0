"""feed_forward: down(silu(gate(x)) * up(x)), the SwiGLU of Llama."""

from __future__ import annotations

from llama_ext.onnx.components.linear import linear
from llama_ext.onnx.graph import Graph, Value
from llama_ext.onnx.weights import Weights

__all__ = ["feed_forward"]


def feed_forward(g: Graph, x: Value, weights: Weights, prefix: str) -> Value:
    """The feed-forward layer of a block.

    Args:
        g: The graph.
        x: (B, S, C), normalised.
        weights: Of the model.
        prefix: Of the layer's slots: "layers.3.".

    Returns:
        (B, S, C).
    """
    with g.scope("feed_forward"):
        gate = linear(g, x, weights, prefix + "gate")
        up = linear(g, x, weights, prefix + "up")
        with g.scope("swiglu"):
            # Sigmoid and Mul: Swish is an operator of its own from opset 24 on, which no kernel of onnxruntime implements.
            hidden = g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)
        return linear(g, hidden, weights, prefix + "down")
