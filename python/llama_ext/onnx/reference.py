"""A Llama in float64, in NumPy, written from the papers: what the runtimes are compared with, whole or operation by operation.

It takes its weights from a checkpoint, or from a quantised model as the numbers that its codes stand for, and never from an
exported graph, so that a mistake of the exporter cannot be in both. Weights are read layer by layer: memory holds one layer in
float64, whatever the size of the model, beside the activations of the sequences.

Source: Touvron et al., "LLaMA", 2023; Su et al., "RoFormer", 2021; Shazeer, "GLU Variants Improve Transformer", 2020;
Ainslie et al., "GQA", 2023; Peng et al., "YaRN", 2023; transformers' modeling_rope_utils for the scalings of frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_ext import _core
from llama_ext._arrays import widen_bfloat16
from llama_ext.models.config import LlamaConfig
from llama_ext.models.rope_parameters import RopeParameters
from llama_ext.onnx.weights import narrowed
from llama_ext.runtime.model_files import ModelFiles

__all__ = ["F64", "Probe", "Reference", "Weights", "rope_frequencies", "rounded", "weights_of_core", "weights_of_files"]

F64 = npt.NDArray[np.float64]
Ids = npt.NDArray[np.integer[Any]]
# A slot of csrc/model/weights.h -> its numbers.
Weights = Callable[[str], F64]
# (operation, index of the sequence, value): what the forward pass computes, as it does so.
Probe = Callable[[str, int, F64], None]

# Rows of queries whose scores are in memory at once.
_QUERY_BLOCK = 256


class Reference:
    """A model in float64.

    Every value has a name, which a probe is told: "embedding"; for layer N "layers.N." and, in the order of computation,
    attention_norm, q, k, v, q_rope, k_rope, attention, o, attention_residual, feed_forward_norm, gate, up, swiglu, down,
    feed_forward_residual; "final_norm"; "logits". Shapes: (T, heads, D) for q, k, v, their rotations and attention; (T, width)
    for the others.

    Args:
        config: The model.
        weights: Gives the numbers of a slot.
        constants: What cosines and sines of angles are rounded to, as in a graph that stores them so; None: not at all.
        rounds_scale: Whether 1 / sqrt(D) is rounded as well.
    """

    def __init__(
        self, config: LlamaConfig, weights: Weights, constants: str | None = None, *, rounds_scale: bool = False
    ) -> None:
        self.config = config
        self.constants = constants
        self._scale = 1.0 / math.sqrt(config.head_dim)
        if rounds_scale and constants is not None:
            self._scale = float(rounded(np.array([self._scale]), constants)[0])
        self.weights = weights
        self._frequencies = rope_frequencies(config.rope_parameters, config.head_dim)
        self._amplitude = config.rope_parameters.effective_attention_factor

    def logits(
        self,
        sequences: Sequence[Ids],
        *,
        positions: Sequence[Ids] | None = None,
        probe: Probe | None = None,
        final: Callable[[int, F64], F64] | None = None,
    ) -> list[F64]:
        """The logits of every token of every sequence.

        Args:
            sequences: Token ids, (T) each.
            positions: The position of each token; None: 0, 1, ...
            probe: Is told every value.
            final: Turns the last normed states (T, C) of a sequence into its logits, in place of the head.

        Returns:
            (T, V) for each sequence.
        """
        if not sequences:
            return []

        def tell(name: str, index: int, value: F64) -> F64:
            if probe is not None:
                probe(name, index, value)
            return value

        table = self.weights("embedding")
        states = [tell("embedding", index, table[ids]) for index, ids in enumerate(sequences)]
        del table  # a head that is tied to it is read again: both at once, in float64, may be much memory
        if positions is None:
            positions = [np.arange(len(ids)) for ids in sequences]
        turns = [self._turns(np.asarray(places, np.float64)) for places in positions]
        for layer in range(self.config.num_hidden_layers):
            self._layer(f"layers.{layer}.", states, turns, tell)
        norm = self.weights("final_norm")
        states = [tell("final_norm", index, self._rms_norm(x, norm)) for index, x in enumerate(states)]
        if final is not None:
            return [tell("logits", index, final(index, x)) for index, x in enumerate(states)]
        head = self.head()
        return [tell("logits", index, x @ head.T) for index, x in enumerate(states)]

    def _turns(self, positions: F64) -> tuple[F64, F64]:
        """Cosines and sines, (T, D/2) each."""
        angles = positions[:, None] * self._frequencies
        turns = np.cos(angles) * self._amplitude, np.sin(angles) * self._amplitude
        if self.constants is None:
            return turns
        return rounded(turns[0], self.constants), rounded(turns[1], self.constants)

    def head(self) -> F64:
        """The matrix from states to logits, (V, C)."""
        return self.weights(
            "embedding" if self.config.tie_word_embeddings and not self.config.is_classifier else "head"
        )

    def _layer(
        self,
        layer: str,
        states: list[F64],
        turns: list[tuple[F64, F64]],
        tell: Callable[[str, int, F64], F64],
    ) -> None:
        """One block, in place."""
        config = self.config
        heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        weight = {name: self.weights(layer + name) for name in ("attention_norm", "q", "k", "v", "o")}
        bias = self._biases(layer, config.attention_bias, ("q", "k", "v", "o"))
        for index, x in enumerate(states):
            normed = tell(layer + "attention_norm", index, self._rms_norm(x, weight["attention_norm"]))
            q, k, v = (
                tell(layer + name, index, (normed @ weight[name].T + bias[name]).reshape(len(x), count, size))
                for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
            )
            q = tell(layer + "q_rope", index, _rope(q, *turns[index]))
            k = tell(layer + "k_rope", index, _rope(k, *turns[index]))
            mixed = tell(layer + "attention", index, _attention(q, k, v, self._scale))
            added = tell(layer + "o", index, mixed.reshape(len(x), heads * size) @ weight["o"].T + bias["o"])
            states[index] = tell(layer + "attention_residual", index, x + added)
        weight = {name: self.weights(layer + name) for name in ("feed_forward_norm", "gate", "up", "down")}
        bias = self._biases(layer, config.mlp_bias, ("gate", "up", "down"))
        for index, x in enumerate(states):
            normed = tell(layer + "feed_forward_norm", index, self._rms_norm(x, weight["feed_forward_norm"]))
            gate = tell(layer + "gate", index, normed @ weight["gate"].T + bias["gate"])
            up = tell(layer + "up", index, normed @ weight["up"].T + bias["up"])
            hidden = tell(layer + "swiglu", index, _silu(gate) * up)
            added = tell(layer + "down", index, hidden @ weight["down"].T + bias["down"])
            states[index] = tell(layer + "feed_forward_residual", index, x + added)

    def _biases(self, layer: str, there: bool, names: Sequence[str]) -> dict[str, F64]:
        return {name: self.weights(f"{layer}{name}.bias") if there else np.zeros(1) for name in names}

    def _rms_norm(self, x: F64, weight: F64) -> F64:
        scaled: F64 = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.config.rms_norm_eps) * weight
        return scaled


def _rope(x: F64, cos: F64, sin: F64) -> F64:
    """Rotates (T, heads, D) by (T, D/2) angles, pair i with pair i + D/2."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    cos, sin = cos[:, None, :], sin[:, None, :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _attention(q: F64, k: F64, v: F64, scale: float) -> F64:
    """Causal attention: q (T, H, D), k and v (T, K, D); each key's head serves H/K query heads."""
    tokens, heads, _ = q.shape
    shared = heads // k.shape[1]
    result = np.empty_like(q)
    for head in range(heads):
        keys, values = k[:, head // shared], v[:, head // shared]
        for begin in range(0, tokens, _QUERY_BLOCK):
            end = min(begin + _QUERY_BLOCK, tokens)
            scores = q[begin:end, head] @ keys[:end].T * scale
            scores[np.arange(end)[None, :] > np.arange(begin, end)[:, None]] = -np.inf
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            result[begin:end, head] = weights @ values[:end]
    return result


def _silu(z: F64) -> F64:
    with np.errstate(over="ignore"):  # exp(-z) = inf is silu = -0, as it should be
        scaled: F64 = z / (1.0 + np.exp(-z))
    return scaled


def rope_frequencies(rope: RopeParameters, head_dim: int) -> F64:
    """The angle per position of each pair of a head.

    Args:
        rope: The settings.
        head_dim: D.

    Returns:
        (D/2).
    """
    base: F64 = rope.rope_theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.rope_type == "default":
        return base
    factor = 1.0 if rope.factor is None else rope.factor
    if rope.rope_type == "linear":
        return base / factor
    context = float(rope.original_max_position_embeddings or 0)
    if rope.rope_type == "llama3":
        low, high = rope.low_freq_factor or 1.0, rope.high_freq_factor or 4.0
        turns = context * base / (2.0 * math.pi)  # whole rotations within the original context
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return base * (kept + (1.0 - kept) / factor)
    beta_fast = 32.0 if rope.beta_fast is None else rope.beta_fast
    beta_slow = 1.0 if rope.beta_slow is None else rope.beta_slow

    def pair_of(rotations: float) -> float:
        return head_dim * math.log(context / (rotations * 2.0 * math.pi)) / (2.0 * math.log(rope.rope_theta))

    first, last = pair_of(beta_fast), pair_of(beta_slow)
    if rope.truncate is None or rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    # The upper bound is D - 1, though there are D/2 pairs: models were trained with it.
    first, last = max(first, 0.0), min(last, head_dim - 1.0)
    if first == last:
        last += 0.001
    scaled = np.clip((np.arange(head_dim // 2, dtype=np.float64) - first) / (last - first), 0.0, 1.0)
    return base * (1.0 - scaled) + base / factor * scaled


def weights_of_files(files: ModelFiles) -> Weights:
    """The weights of a checkpoint as they are stored there.

    Args:
        files: The open files, which have to stay open.

    Returns:
        What reads a slot; the pages of a tensor are given back at once.
    """
    tensors = {tensor.slot: tensor for tensor in files.tensors}

    def read(slot: str) -> F64:
        tensor = tensors[slot]
        values, dtype = files.read(tensor)
        result = _widened(values, dtype)
        files.release(tensor)
        return result

    return read


def weights_of_core(core: _core.Model) -> Weights:
    """The weights of a native model as it keeps them: what quantised ones stand for, exactly.

    A code times its float16 scale has at most 19 significant bits, so that the float32 number the core gives is exact; a group
    with a minimum as well is rounded once, to float32.

    Args:
        core: The model.

    Returns:
        What reads a slot.
    """

    def read(slot: str) -> F64:
        values = core.read(slot)
        return _widened(values, "bfloat16" if values.dtype == np.uint16 else str(values.dtype))

    return read


def _widened(values: npt.NDArray[Any], dtype: str) -> F64:
    if dtype == "bfloat16":
        values = widen_bfloat16(values)
    return values.astype(np.float64)


def rounded(values: F64, dtype: str) -> F64:
    """Rounded to float32 and then to `dtype`, as an exporter does."""
    return _widened(narrowed(values.astype(np.float32), dtype), dtype)
