"""What callers pass as prompts, turned into rows of token ids; and results turned back into the same kind of thing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from llama_ext._arrays import Array, IntArray, array_by_protocol, check_token_range, token_ids
from llama_ext.errors import DTypeError, OptionError, ShapeError
from llama_ext.runtime.tokenizer import Tokenizer

__all__ = ["Prompts", "begin_token", "encode_text", "read_mask", "read_prompts"]


@dataclass(frozen=True)
class Prompts:
    """Prompts as token ids, and how they were given.

    Attributes:
        rows: The token ids of each, at least one.
        texts: The prompts as they were given, when they were texts.
        kind: "text", "list" (of ids) or "array".
        single: One prompt that was not inside a list or a two-dimensional array.
        block: The two-dimensional array that was given, padding included.
    """

    rows: list[IntArray]
    texts: list[str] | None
    kind: Literal["text", "list", "array"]
    single: bool
    block: Array | None = None


def begin_token(config_bos: int | None, tokenizer: Tokenizer | None) -> int | None:
    """The token that begins a text: the tokenizer's, else the config's unless it is no special token of the tokenizer.

    Args:
        config_bos: What the model's config says.
        tokenizer: The model's, or None.

    Returns:
        The id, or None.
    """
    if tokenizer is None:
        return config_bos
    if tokenizer.bos_token_id is not None:
        return tokenizer.bos_token_id
    return config_bos if config_bos in tokenizer.special_ids else None


def read_prompts(
    prompts: object,
    attention_mask: object,
    *,
    tokenizer: Tokenizer | None,
    bos: int | None,
    vocabulary: int,
    add_special_tokens: bool = True,
) -> Prompts:
    """Reads a text, texts, ids, a list of ids (their lengths may differ) or a one- or two-dimensional array of any library.

    Args:
        prompts: What the caller passed.
        attention_mask: For a two-dimensional array: 1 where there is a token, left padding only.
        tokenizer: For texts.
        bos: What an empty text becomes, or None.
        vocabulary: How many tokens there are.
        add_special_tokens: Whether to encode texts with the special tokens that the tokenizer adds.

    Raises:
        DTypeError: None of these.
        ShapeError: A prompt without tokens, an array of another rank, a mask of another shape.
        OptionError: Texts without a tokenizer, an empty text without a BOS, a mask for anything but a 2-D array, a mask
            that is not left padding.
        TokenIdError: An id outside the vocabulary.
    """
    array = array_by_protocol("prompts", prompts)
    if array is not None and array.ndim == 2:
        return _read_block(array, attention_mask, vocabulary)
    if attention_mask is not None:
        raise OptionError("attention_mask goes with a two-dimensional array of ids; a list of rows needs none")
    if isinstance(prompts, str):
        row = encode_text(prompts, tokenizer, bos, vocabulary, add_special_tokens=add_special_tokens)
        return Prompts([row], [prompts], "text", single=True)
    if array is not None:
        if array.ndim != 1:
            raise ShapeError(f"prompts must be an array of shape (T,) or (B, T), got {array.shape}")
        return Prompts([_row("input_ids", array, vocabulary)], None, "array", single=True)
    if isinstance(prompts, (bytes, bytearray)) or not isinstance(prompts, Sequence):
        raise DTypeError(f"prompts must be a text, token ids, or a list or array of them, got {type(prompts).__name__}")
    if not prompts:
        return Prompts([], None, "list", single=False)
    first = prompts[0]
    if isinstance(first, str):
        texts = []
        for index, text in enumerate(prompts):
            if not isinstance(text, str):
                raise DTypeError(f"prompts[{index}] must be a text like prompts[0], got {type(text).__name__}")
            texts.append(text)
        rows = [encode_text(text, tokenizer, bos, vocabulary, add_special_tokens=add_special_tokens) for text in texts]
        return Prompts(rows, texts, "text", single=False)
    # A scalar array of another library is a token id, as every number is.
    row_of_ids = array_by_protocol("prompts[0]", first)
    if isinstance(first, Sequence) or (row_of_ids is not None and row_of_ids.ndim > 0):
        rows = [_row(f"prompts[{index}]", row, vocabulary) for index, row in enumerate(prompts)]
        return Prompts(rows, None, "list", single=False)
    return Prompts([_row("input_ids", prompts, vocabulary)], None, "list", single=True)


def encode_text(
    text: str,
    tokenizer: Tokenizer | None,
    bos: int | None,
    vocabulary: int,
    *,
    what: str = "the prompt",
    add_special_tokens: bool = True,
) -> IntArray:
    """The ids of a text; an empty one is the BOS token, where special tokens are added.

    Args:
        text: The text.
        tokenizer: The model's.
        bos: What an empty text becomes, or None.
        vocabulary: How many tokens there are.
        what: The name of the text in messages.
        add_special_tokens: Whether to encode it with the special tokens that the tokenizer adds.

    Raises:
        OptionError: There is no tokenizer, or nothing to stand for an empty text.
        TokenIdError: The tokenizer gives an id that the model does not have.
    """
    if tokenizer is None:
        raise OptionError("this model has no tokenizer: pass token ids, or set `model.tokenizer`")
    ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    if not ids:
        if not add_special_tokens:
            raise OptionError(
                f"{what} is empty, and in the middle of a text no BOS token stands for it: give at least one character"
            )
        if bos is None:
            raise OptionError(f"{what} is empty and the tokenizer has no BOS token: give at least one character")
        ids = [bos]
    return token_ids("the tokenizer's ids", ids, vocabulary)


def read_mask(mask: object, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """An attention mask as booleans.

    Args:
        mask: (B, T) of zeros and ones, integers, booleans or floats; or None for all ones.
        shape: (B, T).

    Raises:
        ShapeError: Another shape.
        OptionError: Other values, or a row that is not one contiguous run of ones.
    """
    if mask is None:
        return np.ones(shape, dtype=np.bool_)
    array = np.asarray(mask)
    if array.shape != shape:
        raise ShapeError(f"attention_mask must have the shape of input_ids, {shape}, got {array.shape}")
    if array.dtype.kind not in "biuf" or not np.isin(array, (0, 1)).all():
        raise OptionError("attention_mask must hold zeros and ones")
    ones = array.astype(np.bool_)
    # A run of ones begins wherever a one has no one before it.
    runs = np.count_nonzero(ones[:, 1:] & ~ones[:, :-1], axis=1) + (ones[:, 0] if shape[1] else 0)
    wrong = np.flatnonzero(runs != 1)
    if wrong.size:
        found = "no token" if runs[wrong[0]] == 0 else "gaps"
        raise OptionError(
            f"attention_mask[{wrong[0]}] has {found}: each row must be one run of ones, padded on one side"
        )
    return ones


def _read_block(ids: Array, mask: object, vocabulary: int) -> Prompts:
    if ids.dtype.kind not in "iu":
        raise DTypeError(f"input_ids must be integers, got {ids.dtype}")
    if ids.shape[0] == 0:
        return Prompts([], None, "array", single=False, block=ids)
    if ids.shape[1] == 0:
        raise ShapeError(f"input_ids must have at least one token in each row, got shape {ids.shape}")
    ones = read_mask(mask, ids.shape)
    if not ones[:, -1].all():
        raise OptionError(
            f"attention_mask[{int(np.flatnonzero(~ones[:, -1])[0])}] pads on the right, where the row is to go on: "
            "pad on the left, or pass a list of rows of different lengths"
        )
    check_token_range("input_ids", ids, vocabulary, ones)
    rows = [np.ascontiguousarray(row[keep], dtype=np.int32) for row, keep in zip(ids, ones, strict=True)]
    return Prompts(rows, None, "array", single=False, block=ids)


def _row(what: str, values: Any, vocabulary: int) -> IntArray:
    row = token_ids(what, values, vocabulary)
    if row.size == 0:
        raise ShapeError(f"{what} has no tokens: a prompt needs at least one, for example the BOS token")
    return row
