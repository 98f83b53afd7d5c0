"""One forward pass, seen from inside: the core shows what it computes, and what it never makes is computed here from that.

The core has no attention scores: its kernels merge tiles of them. They are products of the rotated queries and keys, in float64 and
rounded to float32. Where nobody changes them, the kernels' own result stands, row by row. A
norm's `hook_normalized` is x / scale, before the weight, as TransformerLens' RMSNorm has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llama_ext import _core
from llama_ext._arrays import FloatArray, IntArray
from llama_ext.errors import ContextLengthError, ShapeError, UnsupportedError
from llama_ext.interpret.names import attention_of, layer_of, norm_of, shape_of, site_of
from llama_ext.interpret.token_texts import pieces
from llama_ext.runtime.prompts import read_prompts

if TYPE_CHECKING:
    from llama_ext.runtime.model import LlamaForCausalLM

__all__ = ["ObservedText", "Text", "observe", "read_text"]

_F64 = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
# Is given a name and its value, which it may keep and does not write to, and returns what takes its place, or None.
See = Callable[[str, FloatArray], FloatArray | None]


class Text(NamedTuple):
    """A text as a model reads it.

    Attributes:
        ids: (T) int32, at least one.
        tokens: Each by itself, as `token_texts.pieces` writes it.
    """

    ids: IntArray
    tokens: list[str]


def read_text(model: LlamaForCausalLM, text: object, what: str = "the text") -> Text:
    """Reads one text, or its token ids.

    Args:
        model: Whose tokenizer and context it is for.
        text: A text, a list of ids or an array (T) or (1, T).
        what: Its name in messages.

    Raises:
        UnsupportedError: The model is no LlamaForCausalLM.
        ShapeError: No token, or several texts.
        ContextLengthError: It is longer than the model's context.
        DTypeError, OptionError, TokenIdError: As `LlamaForCausalLM.generate`.
    """
    from llama_ext.runtime.model import LlamaForCausalLM

    if not isinstance(model, LlamaForCausalLM):
        raise UnsupportedError(
            f"llama_ext.interpret looks into a LlamaForCausalLM, got {type(model).__name__}: "
            "a classifier's base is one, before it becomes a classifier"
        )
    prompts = read_prompts(
        text, None, tokenizer=model.tokenizer, bos=model.bos_token_id, vocabulary=model.config.vocab_size
    )
    if len(prompts.rows) != 1:
        raise ShapeError(
            f"{what} must be one text or the ids of one, got {len(prompts.rows)} of them: call once for each"
        )
    ids = prompts.rows[0]
    context = model.config.max_position_embeddings
    if ids.size > context:
        raise ContextLengthError(f"{what} has {ids.size} tokens, the model's context is {context}: nothing is cut")
    return Text(ids, pieces(model.tokenizer, ids.tolist()))


def observe(model: LlamaForCausalLM, ids: IntArray, names: Collection[str], see: See) -> FloatArray:
    """Runs the model on one sequence, with its active adapter.

    Args:
        model: Which one.
        ids: (T) int32, at least one and at most the context.
        names: The values that `see` is to be given, in the order of computation.
        see: What it returns, float32 and of the same shape, takes the place of the value, and whatever is computed from that follows.

    Returns:
        Logits (T, V), with the bits of `model(ids)` where nothing was changed.

    Raises:
        NumericError: A logit is not finite.
        OutOfMemoryError: There is not enough memory.
        Whatever `see` raises.
    """
    return ObservedText(model, ids).run(names, see)


class ObservedText:
    """A sequence that is run whole, and then again from where something in it is changed, with the model's active adapter.

    On a CPU a row has the same bits in every run; on a GPU in runs of one copy from token 0 on.
    """

    def __init__(self, model: LlamaForCausalLM, ids: IntArray, names: Collection[str] = ()) -> None:
        """ids: (T) int32, at least one. names: what later runs are to change."""
        self._model = model
        self._count = ids.size
        adapter = next(iter(model._core_adapters(None, 1)), None)
        layers = sorted({_first_layer(model, name) for name in names})
        self._sequence = _core.ObservedSequence(model._core, ids, layers, adapter)

    @property
    def copy_nbytes(self) -> int:
        """Bytes of the keys and values of a copy."""
        return self._sequence.copy_nbytes

    def run(self, names: Collection[str], see: See) -> FloatArray:
        """As `observe`."""
        observed = _Observed(self._model, self._count, names, see)
        return self._sequence.run(observed.places(), observed.show)

    def run_from(self, name: str, begins: Sequence[int], see: See, *, last: bool = False) -> FloatArray:
        """Runs copies side by side, after `run`, each from its own token on; no layer before the value's is computed again.

        Args:
            name: One of those that this was made with.
            begins: The copies' first tokens. One copy from token 0 on for scores and patterns.
            see: Is given the copies' rows, one copy after the other, T - begin of each.
            last: Whether to give the last row of logits of each alone; not where a value of the last norm is changed.

        Returns:
            Logits (rows, V) of the copies, one copy after the other.

        Raises:
            As `observe`.
        """
        rows = sum(self._count - begin for begin in begins)
        observed = _Observed(self._model, rows, [name], see)
        which = "last" if last else "all"
        return self._sequence.run_from(_first_layer(self._model, name), begins, observed.places(), observed.show, which)


def _first_layer(model: LlamaForCausalLM, name: str) -> int:
    """The layer where a pass has to begin that changes a value."""
    return model.config.num_hidden_layers - 1 if name.startswith("ln_final.") else layer_of(name)[0]


class _Observed:
    """What is kept of a pass while it runs, for what comes later in it."""

    def __init__(self, model: LlamaForCausalLM, tokens: int, names: Collection[str], see: See) -> None:
        self._core = model._core
        self._config = model.config
        self._tokens = tokens
        self._names = frozenset(names)
        self._see = see
        self._norms = {norm for name in names if (norm := norm_of(name)) is not None}
        self._layers = {layer for name in names if (layer := attention_of(name)) is not None}
        self._kept: dict[tuple[str, int], FloatArray] = {}
        self._by_place = {place: name for name in names if (place := site_of(name)) is not None}
        # What has to be kept for values that are computed here.
        self._keep = {place for norm in self._norms for place in _norm_places(model.config.num_hidden_layers, norm)[:1]}
        self._keep |= {(site, layer) for layer in self._layers for site in ("rotated_q", "rotated_k", "v")}
        self._norm_at = {_norm_places(model.config.num_hidden_layers, norm)[1]: norm for norm in self._norms}

    def places(self) -> list[tuple[str, int]]:
        """Where the core has to stop."""
        attended = {("attended", layer) for layer in self._layers}
        return sorted({*self._by_place, *self._keep, *self._norm_at, *attended})

    def show(self, site: str, layer: int, values: FloatArray) -> FloatArray | None:
        """What the core calls: values (T, width)."""
        place = site, layer
        if place in self._norm_at:
            return self._norm(self._norm_at[place], layer, values)
        replaced = self._attention(layer, values) if site == "attended" and layer in self._layers else None
        name = self._by_place.get(place)
        if name is not None:
            shown = values if replaced is None else replaced
            changed = self._see(name, shown.reshape(shape_of(self._config, name, self._tokens)))
            if changed is not None:
                replaced = changed
        result = None if replaced is None else np.ascontiguousarray(replaced.reshape(values.shape))
        if place in self._keep:
            self._kept[place] = values if result is None else result
        return result

    def _ask(self, name: str, value: FloatArray) -> tuple[FloatArray, bool]:
        """The value, or what takes its place, and whether something did."""
        if name not in self._names:
            return value, False
        changed = self._see(name, value)
        return (value, False) if changed is None else (changed, True)

    def _norm(self, norm: str, layer: int, normed: FloatArray) -> FloatArray | None:
        """The rows after a norm, where somebody changed its scale or what it divides."""
        layers = self._config.num_hidden_layers
        x = self._kept.pop(_norm_places(layers, norm)[0])
        mean = np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True)
        made = np.sqrt(mean + self._config.rms_norm_eps).astype(np.float32)
        scale, is_scaled = self._ask(f"{norm}.hook_scale", made)
        divided = x / scale
        normalized, is_changed = self._ask(f"{norm}.hook_normalized", divided)
        if not (is_scaled or is_changed):
            return None
        weight = {"ln1": f"layers.{layer}.attention_norm", "ln2": f"layers.{layer}.feed_forward_norm"}
        replaced = normalized * self._core.read(weight.get(norm.rpartition(".")[2], "final_norm"))
        return np.where(_differs(scale, made) | _differs(normalized, divided), replaced, normed)

    def _attention(self, layer: int, z: FloatArray) -> FloatArray | None:
        """What the heads read, (T, H, D), where somebody changed the scores or the pattern."""
        q, k, v = (self._heads(site, layer) for site in ("rotated_q", "rotated_k", "v"))
        shared = q.shape[0] // k.shape[0]
        name = f"blocks.{layer}.attn."
        future = np.triu(np.ones((self._tokens, self._tokens), dtype=np.bool_), 1)
        made = np.empty((q.shape[0], self._tokens, self._tokens), dtype=np.float32)
        for head, queries in enumerate(q):
            made[head] = _product(queries, k[head // shared].T) / math.sqrt(self._config.head_dim)
        made[:, future] = -np.inf
        scores, is_scored = self._ask(name + "hook_attn_scores", made)
        powers = _softmax(scores)
        pattern, is_changed = self._ask(name + "hook_pattern", powers)
        if not (is_scored or is_changed):
            return None
        differs = (_differs(scores, made) | _differs(pattern, powers))[..., 0]  # (H, T)
        result = z.reshape(self._tokens, -1, self._config.head_dim).copy()
        for head, rows in enumerate(differs):
            result[rows, head] = _product(pattern[head, rows].astype(np.float64), v[head // shared])
        return result

    def _heads(self, site: str, layer: int) -> np.ndarray[tuple[int, int, int], np.dtype[np.float64]]:
        """(heads, T, D) in float64."""
        rows = self._kept.pop((site, layer)).reshape(self._tokens, -1, self._config.head_dim)
        heads: np.ndarray[tuple[int, int, int], np.dtype[np.float64]] = rows.transpose(1, 0, 2).astype(np.float64)
        return heads


# Multiplications of a product that every BLAS leaves to the calling thread: its own threads and the core's, one waiting while the other
# works, took ten times as long.
_OF_ONE_THREAD = 1 << 17
_EDGE = 256


def _product(a: _F64, b: _F64) -> _F64:
    """a b, in pieces."""
    product = np.zeros((a.shape[0], b.shape[1]))
    depth, width = min(a.shape[1], _EDGE), min(b.shape[1], _EDGE)
    rows = max(2, _OF_ONE_THREAD // max(1, depth * width))  # of one row, others count
    for row in range(0, a.shape[0], rows):
        for column in range(0, b.shape[1], _EDGE):
            for k in range(0, a.shape[1], _EDGE):
                some = slice(row, row + rows), slice(column, column + _EDGE)
                product[some] += a[some[0], k : k + _EDGE] @ b[k : k + _EDGE, some[1]]
    return product


def _norm_places(layers: int, norm: str) -> tuple[tuple[str, int], tuple[str, int]]:
    """Where the core shows what a norm reads, and what it gives."""
    layer, rest = layer_of(norm)
    if rest == "ln1":
        return ("residual_before", layer), ("attention_norm", layer)
    if rest == "ln2":
        return ("residual_middle", layer), ("feed_forward_norm", layer)
    return ("residual_after", layers - 1), ("final_norm", 0)


def _differs(first: FloatArray, second: FloatArray) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Whether a row, along the last axis, has other bits: (..., 1)."""
    different: np.ndarray[tuple[int, ...], np.dtype[np.bool_]] = (
        np.ascontiguousarray(first).view(np.uint32) != np.ascontiguousarray(second).view(np.uint32)
    ).any(axis=-1, keepdims=True)
    return different


def _softmax(scores: FloatArray) -> FloatArray:
    """Over the last axis; a row of -inf alone, which attends to nothing, is zeros, as in TransformerLens."""
    pattern = np.empty_like(scores)
    for head, rows in enumerate(scores):
        largest = rows.max(axis=-1, keepdims=True).astype(np.float64)
        powers = np.exp(rows - np.where(np.isfinite(largest), largest, 0.0))
        sums = powers.sum(axis=-1, keepdims=True)
        pattern[head] = powers / np.where(sums > 0, sums, 1.0)
    return pattern
