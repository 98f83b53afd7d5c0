"""What stands for a token that is not there."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from llama_ext import _core
from llama_ext._arrays import array_by_protocol, as_whole
from llama_ext._options import shown
from llama_ext.errors import DTypeError, OptionError, ShapeError, TokenIdError
from llama_ext.interpret.questions import Loaded, Question

__all__ = ["embedding_of"]

F64 = npt.NDArray[np.float64]
# Rows of the table that are read at once for its mean.
_AT_ONCE = 8192


def embedding_of(baseline: object, model: Loaded, question: Question, what: str) -> F64:
    """The baseline (T, C) of a prompt.

    Args:
        baseline: "mean", "zeros", a token or its id, or an array or lists (C,) or (T, C).
        model: Whose embeddings they are.
        question: The prompt.
        what: Who asks, for messages.

    Raises:
        OptionError, TokenIdError: No such token.
        ShapeError, DTypeError: An array of another shape, or not of floats.
    """
    shape = question.embeddings.shape
    array = array_by_protocol(f"{what}: baseline", baseline)
    if isinstance(baseline, Sequence) and not isinstance(baseline, (str, bytes)):
        try:
            array = np.asarray(baseline)
        except ValueError as error:
            raise ShapeError(
                f"{what}: baseline is a list whose parts are of different lengths, {shown(baseline)}"
            ) from error
    if array is not None and array.ndim > 0:
        if array.dtype.kind != "f":
            raise DTypeError(f"{what}: baseline must be an array of floats, got {array.dtype}")
        if array.shape not in (shape[1:], shape):
            raise ShapeError(
                f"{what}: baseline must have shape {shape[1:]}, an embedding, or {shape}, one for each token, got {array.shape}"
            )
        if not np.isfinite(array).all():
            raise OptionError(f"{what}: baseline has a number that is not finite")
        return np.array(np.broadcast_to(array, shape), np.float64)
    if baseline == "zeros":
        return np.zeros(shape)
    row = _mean(model) if baseline == "mean" else _of_token(baseline, model, what)
    return np.array(np.broadcast_to(row, shape), np.float64)


def _mean(model: Loaded) -> F64:
    """Of all embeddings there are."""
    size = model.config.vocab_size
    total = np.zeros(model.config.hidden_size)
    for first in range(0, size, _AT_ONCE):
        ids = np.arange(first, min(first + _AT_ONCE, size), dtype=np.int32)
        total += _core.embed_tokens(model._core, ids).sum(axis=0, dtype=np.float64)
    return total / size


def _of_token(token: object, model: Loaded, what: str) -> F64:
    number = as_whole(token)
    if isinstance(token, str):
        tokenizer = model.tokenizer
        number = None if tokenizer is None else tokenizer.token_to_id(token)
        if number is None and tokenizer is not None:
            # One that cannot even be encoded is no token either.
            with contextlib.suppress(OptionError):
                ids = tokenizer.encode(token, add_special_tokens=False)
                number = ids[0] if len(ids) == 1 else None
    if number is None:
        raise OptionError(
            f"{what}: baseline must be 'mean', 'zeros', a token of the vocabulary, an id or an array, got {shown(token)}"
        )
    if not 0 <= number < model.config.vocab_size:
        raise TokenIdError(
            f"{what}: baseline {shown(number)} is no token id: those are in [0, {model.config.vocab_size})"
        )
    row: F64 = _core.embed_tokens(model._core, np.array([number], np.int32))[0].astype(np.float64)
    return row
