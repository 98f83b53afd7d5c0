"""What goes into each linear layer of a model on a text, computed layer by layer with the original weights.

Only one layer's weights are in memory at a time, so a model that does not fit as floats can be calibrated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_ext import ops
from llama_ext._arrays import FloatArray
from llama_ext.errors import OptionError
from llama_ext.models.config import LlamaConfig
from llama_ext.runtime.tokenizer import Tokenizer

__all__ = ["FEWEST_TOKENS", "MOST_TOKENS", "Activations", "calibration_ids"]

# Half of fewer are no evidence of which columns matter, and the other half none of what that gained.
FEWEST_TOKENS = 16
# More tell hardly more about the mean square of a column, and each costs a forward pass.
MOST_TOKENS = 4096
_WINDOW = 512

# A layer's tensors by the last part of their slots: "q", "q.bias", "attention_norm", ...
Layer = Mapping[str, FloatArray]


def calibration_ids(
    tokenizer: Tokenizer | None, text: str | Sequence[str], config: LlamaConfig
) -> npt.NDArray[np.integer[Any]]:
    """A text as windows of one length.

    Args:
        tokenizer: The model's.
        text: A text or texts, of which the first `MOST_TOKENS` tokens are taken.
        config: The model.

    Returns:
        (windows, T) token ids.

    Raises:
        OptionError: There is no tokenizer, the text is blank, or it has fewer than `FEWEST_TOKENS` tokens.
    """
    try:
        texts = [text] if isinstance(text, str) else list(text)
    except TypeError:
        raise OptionError(f"calibration must be a text or a list of texts, got {type(text).__name__}") from None
    if not all(isinstance(each, str) for each in texts):
        raise OptionError("calibration must be a text or a list of texts, got a list of something else")
    if not any(each.strip() for each in texts):
        # Before a BOS token makes it look like a text of one token.
        raise OptionError(
            f"the calibration text is empty: it needs {FEWEST_TOKENS} tokens at least, better some thousand, of text like "
            "that the model is for"
        )
    if tokenizer is None:
        raise OptionError("this model has no tokenizer, so it cannot read a calibration text")
    ids = np.array([index for each in texts for index in tokenizer.encode(each)][:MOST_TOKENS], dtype=np.int32)
    length = min(_WINDOW, config.max_position_embeddings, ids.size)
    if ids.size < FEWEST_TOKENS:
        raise OptionError(
            f"the calibration text has {ids.size} tokens: it needs {FEWEST_TOKENS} at least, better some thousand, of text like "
            "that the model is for"
        )
    return ids[: ids.size // length * length].reshape(-1, length)


class Activations:
    """The residual stream of a text, on its way through the layers.

    Args:
        config: The model.
        ids: (windows, T) token ids.
        embedding: (V, C).
    """

    def __init__(self, config: LlamaConfig, ids: npt.NDArray[np.integer[Any]], embedding: FloatArray) -> None:
        self._config = config
        self._x = ops.embedding(ids, embedding)
        self._angles = ops.rope_angles(np.arange(ids.shape[1]), config.head_dim, parameters=config.rope_parameters)

    def layer(self, weights: Layer) -> dict[str, FloatArray]:
        """Runs the next layer.

        Args:
            weights: Its tensors in float32.

        Returns:
            What went into each of its matrices, (tokens, columns), by the names of `weights`.
        """
        config = self._config
        batch, length, _ = self._x.shape
        normed = self._normed(weights["attention_norm"])

        def projected(name: str, heads: int) -> FloatArray:
            made = ops.matmul(normed, weights[name], weights.get(f"{name}.bias"))
            return made.reshape(batch, length, heads, config.head_dim)

        q = projected("q", config.num_attention_heads)
        k, v = projected("k", config.num_key_value_heads), projected("v", config.num_key_value_heads)
        q, k = ops.rope(q, *self._angles), ops.rope(k, *self._angles)
        attended = ops.attention(q, k, v).reshape(batch, length, -1)
        self._x = ops.matmul(attended, weights["o"], weights.get("o.bias"), residual=self._x)
        middle = self._normed(weights["feed_forward_norm"])
        inner = ops.matmul(middle, weights["gate"], weights.get("gate.bias"))
        with np.errstate(over="ignore"):  # exp(-x) of a large -x: the result is 0, as it should be
            inner *= ops.matmul(middle, weights["up"], weights.get("up.bias")) / (1 + np.exp(-inner))
        self._x = ops.matmul(inner, weights["down"], weights.get("down.bias"), residual=self._x)
        inputs = {"q": normed, "k": normed, "v": normed, "o": attended, "gate": middle, "up": middle, "down": inner}
        return {name: _rows(x) for name, x in inputs.items()}

    def head(self, final_norm: FloatArray) -> FloatArray:
        """What goes into the head, after the last layer: (tokens, C)."""
        return _rows(self._normed(final_norm))

    def _normed(self, weight: FloatArray) -> FloatArray:
        return ops.rms_norm(self._x, weight, self._config.rms_norm_eps)


def _rows(x: FloatArray) -> FloatArray:
    return x.reshape(-1, x.shape[-1])
