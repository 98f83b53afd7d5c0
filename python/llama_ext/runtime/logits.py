"""Logits of a whole padded batch: what `model(input_ids, attention_mask)` gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llama_ext._arrays import Array, FloatArray, allocate, check_token_range
from llama_ext.errors import ContextLengthError, DTypeError, ShapeError
from llama_ext.runtime.prompts import read_mask

if TYPE_CHECKING:
    from llama_ext.runtime.adapted import AdapterChoice
    from llama_ext.runtime.model import LlamaForCausalLM

__all__ = ["batch_logits", "id_block"]


def batch_logits(
    model: LlamaForCausalLM, input_ids: object, attention_mask: object, adapter: AdapterChoice
) -> FloatArray:
    """The body of `LlamaForCausalLM.__call__`: rows run ragged, so padding is never computed."""
    ids = id_block(input_ids)
    vocabulary = model.config.vocab_size
    adapters = model._core_adapters(adapter, len(ids))
    if ids.size == 0:
        return np.zeros((*ids.shape, vocabulary), dtype=np.float32)
    ones = read_mask(attention_mask, ids.shape)
    check_token_range("input_ids", ids, vocabulary, ones)
    longest = int(ones.sum(axis=1).max())
    if longest > model.config.max_position_embeddings:
        raise ContextLengthError(
            f"input_ids has a row of {longest} tokens, the model's context is {model.config.max_position_embeddings}"
        )
    rows = [np.ascontiguousarray(row[keep], dtype=np.int32) for row, keep in zip(ids, ones, strict=True)]
    rows_of_logits = model._core.logits(rows, adapters)
    if ones.all():
        # The core's rows are slices of one array, which without padding is the result.
        together = rows_of_logits[0].base
        if together is not None and together.shape == (ids.size, vocabulary):
            return together.reshape(*ids.shape, vocabulary)
    result = allocate("the logits", (*ids.shape, vocabulary))
    result[~ones] = 0.0
    for index, keep in enumerate(ones):
        result[index, keep] = rows_of_logits[index]
    return result


def id_block(input_ids: object) -> Array:
    """Ids as a two-dimensional array of integers.

    Raises:
        DTypeError, ShapeError: They are not.
    """
    if isinstance(input_ids, str):
        raise DTypeError("input_ids must be integers, got a text: encode it first, or use generate")
    try:
        ids = np.asarray(input_ids)
    except (ValueError, OverflowError) as error:
        raise ShapeError("input_ids must be a (B, T) array of token ids; pad rows of different lengths") from error
    if ids.ndim != 2:
        hint = ". For one sequence: input_ids[None]" if ids.ndim == 1 else ""
        raise ShapeError(f"input_ids must have shape (B, T), got {ids.shape}{hint}")
    if ids.dtype.kind not in "iu" and ids.size:
        raise DTypeError(f"input_ids must be integers, got {ids.dtype}")
    return ids
