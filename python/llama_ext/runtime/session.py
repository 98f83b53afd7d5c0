"""A sequence in progress: its tokens and their KV cache, to go on with, go back in, copy, save and load."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NoReturn

import numpy as np

from llama_ext import _core
from llama_ext._arrays import FloatArray, IntArray, as_whole, token_ids
from llama_ext._options import whole
from llama_ext.errors import ContextLengthError, OptionError, UnsupportedError
from llama_ext.runtime.generation import Piece, generate_in_session
from llama_ext.runtime.options import GenerateOptions
from llama_ext.runtime.session_file import read_session, write_session

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from llama_ext.runtime.model import LlamaForCausalLM

__all__ = ["Session", "load_session", "new_session"]


class Session:
    """The KV cache of one sequence, from `LlamaForCausalLM.session`.

    One thread at a time may use it; any number of sessions share a model.
    """

    def __init__(
        self, model: LlamaForCausalLM, core: _core.Session, weights: _core.Model, adapter: _core.Adapter | None
    ) -> None:
        self._model = model
        self._core = core
        # Those it was opened with: a model gets others when an adapter is added or merged, or when it is trained.
        self._weights = weights
        self._adapter = adapter
        # Counts what is done to it, so that a stream knows whether it was alone.
        self._changes = 0

    def __reduce__(self) -> NoReturn:
        # What pickle, copy.copy and copy.deepcopy call. A copy of the attributes would be another name of the same cache.
        raise UnsupportedError(
            "a Session cannot be pickled or copied: fork() makes an independent copy; for another process save(path) it, "
            "and let the model there load_session(path)"
        )

    @property
    def length(self) -> int:
        """How many tokens the session holds."""
        return self._core.length

    @property
    def max_length(self) -> int:
        """How many tokens it has room for."""
        return self._core.capacity

    @property
    def tokens(self) -> list[int]:
        """The ids of the tokens it holds."""
        return self._core.tokens

    @property
    def kv_dtype(self) -> str:
        """How keys and values are kept: "float32", "bfloat16" or "int8"."""
        return self._core.kv_dtype

    @property
    def nbytes(self) -> int:
        """Memory of the KV cache at its full length."""
        return self._core.nbytes

    def append(self, ids: Sequence[int] | IntArray, *, logits: Literal["last", "all", "none"] = "last") -> FloatArray:
        """Runs tokens after those the session holds. When it raises, the session is as it was.

        On a CPU the logits do not depend on how a text is cut into appends: they are bit-identical.

        Args:
            ids: At least one token id.
            logits: Of which of the new tokens to return the logits.

        Returns:
            float32: (V) of the last token; (T, V) for "all"; (0, V) for "none".

        Raises:
            OptionError: No ids, or another word for `logits`.
            DTypeError: The ids are not integers.
            ShapeError: An array that is not one-dimensional.
            TokenIdError: An id outside the vocabulary.
            ContextLengthError: There is no room for them.
            NumericError: A logit is not finite.
        """
        if logits not in ("last", "all", "none"):
            raise OptionError(f"logits must be 'last', 'all' or 'none', got {logits!r}")
        vocabulary = self._model.config.vocab_size
        array = token_ids("ids", ids, vocabulary)
        if array.size == 0:
            raise OptionError("append needs at least one token id")
        if self.length + array.size > self.max_length:
            raise ContextLengthError(
                f"the session holds {self.length} tokens and has room for {self.max_length}: {array.size} more do not fit"
            )
        self._changes += 1
        result = self._core.append(array, logits)
        return result.reshape(vocabulary) if logits == "last" else result.reshape(-1, vocabulary)

    def rewind(self, length: int) -> None:
        """Forgets everything from position `length` on; going on from there costs nothing extra.

        Args:
            length: In [0, self.length].

        Raises:
            OptionError: Outside that range.
        """
        position = as_whole(length)
        if position is None or not 0 <= position <= self.length:
            raise OptionError(f"rewind: length must be in [0, {self.length}], got {length!r}")
        self._changes += 1
        self._core.rewind(position)

    def fork(self, max_length: int | None = None) -> Session:
        """An independent copy.

        Args:
            max_length: Its room, in [length, the model's context]; None is the room of this one.

        Returns:
            A session that holds the same tokens.

        Raises:
            ContextLengthError: `max_length` is too small for the tokens or beyond the model's context.
            OutOfMemoryError: The KV cache does not fit into memory.
        """
        capacity = _capacity(self._model, max_length, self.max_length)
        if capacity < self.length:
            raise ContextLengthError(f"fork: max_length={capacity} has no room for the {self.length} tokens held")
        return Session(self._model, self._core.fork(capacity), self._weights, self._adapter)

    def generate(self, prompt: str | Sequence[int] | IntArray, **options: Unpack[GenerateOptions]) -> str:
        """Goes on with the session after a prompt, and keeps both.

        Args:
            prompt: A text, encoded without the BOS token unless the session is empty, or ids.
            **options: As `LlamaForCausalLM.generate`; lengths are bounded by the session's room.

        Returns:
            The text generated, without the prompt.

        Raises:
            OptionError: More than one prompt or sequence, no tokenizer, or as `LlamaForCausalLM.generate`.
            UnsupportedError: Beam search.
        """
        if self._model.tokenizer is None:
            raise OptionError("Session.generate gives text and this model has no tokenizer: use stream_generate")
        return "".join(piece.text for piece in self.stream_generate(prompt, **options))

    def stream_generate(
        self, prompt: str | Sequence[int] | IntArray, **options: Unpack[GenerateOptions]
    ) -> Iterator[Piece]:
        """Goes on with the session after a prompt, piece by piece.

        It ends where `LlamaForCausalLM.generate` does, whatever the session holds. For turns of a conversation pass
        eos_token_id=[*model.eos_token_ids, model.tokenizer.eos_token_id]: `LlamaForCausalLM.chat` ends at all of these.

        Args:
            prompt: A text, encoded without the BOS token unless the session is empty, or ids.
            **options: As `LlamaForCausalLM.generate`.

        Returns:
            An iterator. Once it has ended or been closed, the session holds the prompt and the tokens of its pieces.

        Raises:
            OptionError: More than one prompt or sequence, or as `LlamaForCausalLM.generate`.
            UnsupportedError: Beam search.
        """
        return self._keeping_the_last(generate_in_session(self._model, self._core, self._weights, prompt, options))

    def _keeping_the_last(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        last = None
        length = changes = -1
        try:
            for piece in pieces:
                last = piece.token_id
                self._changes += 1
                length, changes = self.length, self._changes
                yield piece
        finally:
            # The core has drawn the last token but not run it, as nothing was to follow; unless Ctrl-C came after the
            # step that did and before its piece, or others have changed the session since.
            if last is not None and self._changes == changes and self.length == length < self.max_length:
                self._core.append(np.array([last], dtype=np.int32), "none")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the tokens and their keys and values to a safetensors file, whole or not at all, with a checksum of them.

        Args:
            path: The file; an existing one is replaced.

        Raises:
            OSError: It cannot be written: its directory has to exist. `filename` is `path`.
        """
        write_session(path, self._model, self._core, self._adapter)

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        return f"<Session {self.length} of {self.max_length} tokens, {self.kv_dtype} KV cache, {self.nbytes} bytes>"


def new_session(model: LlamaForCausalLM, max_length: int | None, kv_dtype: str | None, adapter: str | None) -> Session:
    """The body of `LlamaForCausalLM.session`."""
    capacity = _capacity(model, max_length, model.config.max_position_embeddings)
    if adapter is not None and not isinstance(adapter, str):
        raise OptionError(f"adapter must be the name of one, got {adapter!r}: a session is one sequence")
    chosen = next(iter(model._core_adapters(adapter, 1)), None)
    weights = model._core
    return Session(model, _core.Session(weights, capacity, kv_dtype or model.kv_dtype, chosen), weights, chosen)


def load_session(model: LlamaForCausalLM, path: str | os.PathLike[str], max_length: int | None) -> Session:
    """The body of `LlamaForCausalLM.load_session`."""
    weights, adapter = model._core, next(iter(model._core_adapters(None, 1)), None)
    with read_session(path, model, adapter) as saved:
        capacity = _capacity(model, max_length, min(saved.capacity, model.config.max_position_embeddings))
        if capacity < saved.tokens.size:
            raise ContextLengthError(
                f"{os.fspath(path)} holds {saved.tokens.size} tokens, max_length={capacity} has no room for them"
            )
        core = _core.Session(weights, capacity, saved.kv_dtype, adapter)
        core.restore(saved.tokens, saved.layer)
    return Session(model, core, weights, adapter)


def _capacity(model: LlamaForCausalLM, max_length: int | None, default: int) -> int:
    if max_length is None:
        return default
    capacity = whole("max_length", max_length, 1)
    context = model.config.max_position_embeddings
    if capacity > context:
        raise ContextLengthError(f"max_length={capacity} is beyond the model's context of {context}")
    return capacity
