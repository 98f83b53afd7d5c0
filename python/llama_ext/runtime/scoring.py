"""How likely a model finds a text: log-likelihood of a continuation, perplexity of documents."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llama_ext import _core
from llama_ext._arrays import IntArray, array_by_protocol, token_ids
from llama_ext._options import whole
from llama_ext.errors import ContextLengthError, DTypeError, OptionError
from llama_ext.runtime.progress import ProgressBar
from llama_ext.runtime.prompts import encode_text
from llama_ext.runtime.text_stream import token_bytes
from llama_ext.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llama_ext.runtime.model import LlamaForCausalLM

__all__ = ["LogLikelihood", "Perplexity", "encode_pair", "loglikelihood", "perplexity", "windows"]


class LogLikelihood(NamedTuple):
    """The score of a continuation.

    Attributes:
        logprob: Sum of the log probabilities of its tokens, in nats.
        is_greedy: Whether each token is the most likely one, so that greedy search would have written the continuation.
    """

    logprob: float
    is_greedy: bool


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts texts.

    Attributes:
        perplexity: exp(loss).
        loss: Mean negative log-likelihood of the scored tokens, in nats per token.
        bits_per_byte: The same in bits per byte of UTF-8, which compares models with different tokenizers; None when the
            texts were given as ids.
        tokens: How many tokens were scored.
        bytes: How many bytes of text they stand for; None when the texts were given as ids.
    """

    perplexity: float
    loss: float
    bits_per_byte: float | None
    tokens: int
    bytes: int | None

    def __str__(self) -> str:
        per_byte = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits per byte"
        return f"perplexity {self.perplexity:.4f} (loss {self.loss:.4f} nats over {self.tokens} tokens{per_byte})"


def loglikelihood(
    model: LlamaForCausalLM, context: str | Sequence[int] | IntArray, continuation: str | Sequence[int] | IntArray
) -> LogLikelihood:
    """The body of `LlamaForCausalLM.loglikelihood`."""
    vocabulary = model.config.vocab_size
    if isinstance(context, str) != isinstance(continuation, str):
        raise DTypeError("loglikelihood: context and continuation must both be texts or both be token ids")
    if isinstance(context, str) and isinstance(continuation, str):
        tokens, first = encode_pair(
            model.tokenizer, model.bos_token_id, vocabulary, context, continuation, what="loglikelihood"
        )
    else:
        before = token_ids("context", context, vocabulary)
        after = token_ids("continuation", continuation, vocabulary)
        if before.size == 0:
            raise OptionError("loglikelihood: the context needs at least one token, for example the BOS token")
        tokens, first = np.concatenate([before, after]), before.size
    if first == tokens.size:
        return LogLikelihood(0.0, True)
    limit = model.config.max_position_embeddings
    if tokens.size > limit:
        raise ContextLengthError(
            f"loglikelihood: context and continuation have {tokens.size} tokens, the model's context is {limit}. "
            "Shorten the context: nothing is cut silently"
        )
    scores, greedy = model._core.score(tokens, first, adapter=_active(model))
    return LogLikelihood(math.fsum(scores.tolist()), bool(greedy.all()))


def perplexity(
    model: LlamaForCausalLM,
    texts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | IntArray,
    stride: int | None,
    context: int | None,
) -> Perplexity:
    """The body of `LlamaForCausalLM.perplexity`."""
    length = _in_range(
        "context", context, model.config.max_position_embeddings, 2, model.config.max_position_embeddings
    )
    step = _in_range("stride", stride, length - 1, 1, length - 1)
    documents, nbytes = _documents(model, texts)
    planned = [(document, window) for document in documents for window in windows(document.size, length, step)]
    total = sum(end - first for _, (_, first, end) in planned)
    if total == 0:
        raise OptionError("perplexity: there is nothing to score: each text needs at least two tokens, BOS included")
    sums = []
    adapter = _active(model)
    with ProgressBar("Scoring", total, "tokens") as bar:
        for document, (begin, first, end) in planned:
            scores, _ = model._core.score(document[begin:end], first - begin, bar.advance, adapter)
            sums.append(math.fsum(scores.tolist()))
    nats = -math.fsum(sums)
    loss = nats / total
    return Perplexity(
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        loss=loss,
        bits_per_byte=nats / math.log(2) / nbytes if nbytes else None,
        tokens=total,
        bytes=nbytes,
    )


def _active(model: LlamaForCausalLM) -> _core.Adapter | None:
    return next(iter(model._core_adapters(None, 1)), None)


def windows(tokens: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """The windows that score each token but the first exactly once.

    Window k begins at token k * stride and has `context` tokens, fewer at the end of the text. It scores the tokens that the
    windows before it did not reach: all but its first `context - stride`, which are there to be looked back at.

    Args:
        tokens: Of the text.
        context: Tokens of a window, >= 2.
        stride: In [1, context).

    Yields:
        (begin, first, end): the window is [begin, end), it scores [first, end).
    """
    scored = 1
    begin = 0
    while scored < tokens:
        end = min(begin + context, tokens)
        yield begin, scored, end
        scored = end
        begin += stride


def _in_range(name: str, value: int | None, default: int, low: int, high: int) -> int:
    if value is None:
        return default
    return whole(f"perplexity: {name}", value, low, high)


def _documents(model: LlamaForCausalLM, texts: object) -> tuple[list[IntArray], int | None]:
    """The token ids of each text, and the bytes that the scored tokens stand for."""
    vocabulary = model.config.vocab_size
    array = array_by_protocol("texts", texts)
    if array is not None:
        texts = array
    if isinstance(texts, np.ndarray) or (isinstance(texts, Sequence) and not isinstance(texts, str)):
        rows = list(texts)
        if not rows or not isinstance(rows[0], str):
            if rows and not isinstance(rows[0], (Sequence, np.ndarray)):
                rows = [texts]
            return [token_ids(f"texts[{index}]", row, vocabulary) for index, row in enumerate(rows)], None
    else:
        rows = [texts]
    documents = []
    nbytes = 0
    for index, text in enumerate(rows):
        if not isinstance(text, str):
            raise DTypeError(f"perplexity: texts[{index}] must be a text or token ids, got {type(text).__name__}")
        what = "perplexity: the text" if isinstance(texts, str) else f"perplexity: texts[{index}]"
        ids = encode_text(text, model.tokenizer, model.bos_token_id, vocabulary, what=what)
        documents.append(ids)
        nbytes += len(text.encode("utf-8"))
        if model.tokenizer is not None and ids[0] != model.bos_token_id:
            # Nothing comes before the first token, so it is not scored: its bytes do not count either.
            nbytes -= _first_bytes(model.tokenizer, int(ids[0]))
    return documents, nbytes


def _first_bytes(tokenizer: Tokenizer, token: int) -> int:
    """How many bytes of a text its first token stands for, which may be part of a character."""
    text = tokenizer.decode([token])
    return len(token_bytes(tokenizer, token) if "\ufffd" in text else text.encode("utf-8"))


def encode_pair(
    tokenizer: Tokenizer | None, bos: int | None, vocabulary: int, context: str, continuation: str, *, what: str
) -> tuple[IntArray, int]:
    """The tokens of two texts, and where the second one begins.

    Both are encoded as one text, because that is what the model has been trained on. Spaces at the end of the context go to
    the continuation, as tokenizers put a space in front of a word, unless the context is nothing else. Where a token crosses
    the border, the continuation begins with it.

    Args:
        tokenizer: The model's.
        bos: What an empty text becomes, or None.
        vocabulary: How many tokens there are.
        context, continuation: The texts.
        what: Who asks, for messages.

    Returns:
        The ids, and the index of the continuation's first, at least 1.

    Raises:
        OptionError: There is no tokenizer, or nothing comes before the continuation.
        TokenIdError: The tokenizer gives an id that the model does not have.
    """
    stripped = context.rstrip(" ") or context
    continuation = context[len(stripped) :] + continuation
    before = encode_text(stripped, tokenizer, bos, vocabulary, what=f"{what}: the context")
    whole = encode_text(stripped + continuation, tokenizer, bos, vocabulary)
    shared = min(before.size, whole.size)
    different = np.flatnonzero(before[:shared] != whole[:shared])
    first = int(different[0]) if different.size else shared
    if first == 0:
        if bos is None:
            raise OptionError(
                f"{what}: the first token of both texts is part of the continuation, and there is no BOS token to "
                "come before it. Give a longer context"
            )
        return np.concatenate([np.array([bos], dtype=np.int32), whole]), 1
    return whole, first
