"""`OrtModel`: an exported model in onnxruntime, behind the methods of a native one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from llama_ext._arrays import FloatArray, IntArray, check_token_range
from llama_ext.errors import ContextLengthError, FormatError, UnsupportedError
from llama_ext.limits import DEFAULT_LIMITS, Limits
from llama_ext.models.config import LlamaConfig
from llama_ext.models.generation_config import GenerationDefaults
from llama_ext.onnx.ort_model_generation import OrtGeneration
from llama_ext.onnx.ort_model_session import OrtSession, find_graph
from llama_ext.runtime import generation
from llama_ext.runtime.generation import Piece
from llama_ext.runtime.logits import id_block
from llama_ext.runtime.options import GenerateOptions
from llama_ext.runtime.prompts import begin_token, read_mask
from llama_ext.runtime.threads import checked_threads
from llama_ext.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from llama_ext.runtime.model import LlamaForCausalLM, Prompts

__all__ = ["OrtModel"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


class OrtModel:
    """An exported model in onnxruntime, on the CPU, that generates as `LlamaForCausalLM` does.

    Options, defaults, texts, stop strings and random numbers are the native model's: equal logits give equal texts, whatever
    the seed. What onnxruntime computes may depend on the batch in the last bits, which the native model's logits do not.

    Args:
        directory: What `llama_ext.onnx.export` wrote: config.json and the tokenizer's files, and the graph in onnx/.
        variant: Which graph, if there are several: "model", "fp16", "quantized", "q4". None: the only one, or model.onnx.
        threads: Of one operation. None: as many as a native model gets.
        limits: What a file may ask for.

    Attributes:
        config: The shape of the model.
        tokenizer: None when the directory has none.
        generation_defaults: What generation_config.json says.

    Raises:
        FormatError: A file is missing or malformed, or the graph is not of the model in config.json.
        UnsupportedError: onnxruntime is not installed, too old, or lacks an operation of the graph on the CPU.
        OptionError: `variant` or `threads` is wrong.
        LimitError: A number in a file is beyond `limits`.
    """

    config: LlamaConfig
    tokenizer: Tokenizer | None
    generation_defaults: GenerationDefaults

    def __init__(
        self,
        directory: str | os.PathLike[str],
        variant: str | None = None,
        threads: int | None = None,
        *,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        number = checked_threads(threads)
        graph = find_graph(directory, variant)
        folder = Path(directory)
        self.config = LlamaConfig.from_pretrained(folder, limits=limits)
        self.generation_defaults = GenerationDefaults.from_pretrained(folder, limits=limits)
        self.tokenizer = None
        if any((folder / name).exists() for name in _TOKENIZER_FILES):
            self.tokenizer = Tokenizer.from_pretrained(folder, limits=limits)
        self._session = OrtSession(graph, self.config, number or None)
        if not self._session.has_cache:
            raise FormatError(
                "this graph has no KV cache: it classifies, and does not generate.", path=os.fspath(graph)
            )

    @property
    def path(self) -> Path:
        """The file of the graph."""
        return self._session.path

    @property
    def profile(self) -> str | None:
        """What the graph is made of: "portable", "standard" or "ort"; None when its file does not say."""
        return self._session.profile

    @property
    def dtype(self) -> str | None:
        """How weights are kept in the file: "float32", "float16", "int8" or "int4"; None when it does not say."""
        return self._session.dtype

    @property
    def kv_dtype(self) -> str:
        """How keys and values are kept: "float32" or "float16"."""
        return self._session.kv_dtype

    @property
    def threads(self) -> int:
        """How many threads compute."""
        return self._session.threads

    @property
    def device(self) -> str:
        """Where it runs: "cpu"."""
        return "cpu"

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text; see `LlamaForCausalLM.bos_token_id`."""
        return begin_token(self.config.bos_token_id, self.tokenizer)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a generation: those of generation_config.json, else the config's."""
        return tuple(self.generation_defaults.eos_token_id or self.config.eos_token_ids)

    def __call__(
        self, input_ids: npt.NDArray[np.integer[Any]] | Sequence[Sequence[int]], attention_mask: object = None
    ) -> FloatArray:
        """The logits of every position.

        Args:
            input_ids: (B, T) integers of any type, each in [0, V) where the mask is 1.
            attention_mask: (B, T), 1 for a token and 0 for padding, on the left or the right; each row one run of ones.

        Returns:
            (B, T, V) float32; zeros where the mask is 0.

        Raises:
            ShapeError, DTypeError, OptionError, TokenIdError, ContextLengthError: As `LlamaForCausalLM.__call__`.
            LlamaExtError: onnxruntime refuses.
        """
        ids = id_block(input_ids)
        if ids.size == 0:
            return np.zeros((*ids.shape, self.config.vocab_size), np.float32)
        ones = read_mask(attention_mask, ids.shape)
        check_token_range("input_ids", ids, self.config.vocab_size, ones)
        lengths = ones.sum(axis=1)
        longest = int(lengths.max())
        if longest > self.config.max_position_embeddings:
            raise ContextLengthError(
                f"input_ids has a row of {longest} tokens, the model's context is {self.config.max_position_embeddings}"
            )
        # Rows are moved to the left: what follows a token cannot reach it, so the padding that is left needs no care.
        first = ones.argmax(axis=1)
        block = np.zeros((len(ids), longest), np.int64)
        for row, (begin, length) in enumerate(zip(first, lengths, strict=True)):
            block[row, :length] = ids[row, begin : begin + length]
        positions = np.broadcast_to(np.arange(longest), block.shape)
        # All ones, as every row has `longest` tokens for a graph that only counts them.
        logits, _ = self._session.run(block, np.ones_like(block), positions, cache=False)
        if longest == ids.shape[1] and ones.all():
            return logits
        result = np.zeros((*ids.shape, logits.shape[-1]), np.float32)
        for row, (begin, length) in enumerate(zip(first, lengths, strict=True)):
            result[row, begin : begin + length] = logits[row, :length]
        return result

    def generate(
        self,
        prompts: Prompts,
        *,
        attention_mask: object = None,
        return_details: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> Any:
        """Goes on with texts or token ids, as `LlamaForCausalLM.generate`.

        Args:
            prompts, attention_mask, return_details: As there.
            **options: As there, without beam search and speculation.

        Returns:
            As there.

        Raises:
            UnsupportedError: num_beams > 1, prompt_lookup_num_tokens or draft_model.
            OptionError and others: As there.
        """
        self._refuse(options)
        return generation.generate(self._as_native(), prompts, attention_mask, options, return_details=return_details)

    def stream_generate(
        self, prompts: Prompts, *, attention_mask: object = None, **options: Unpack[GenerateOptions]
    ) -> Iterator[Piece]:
        """Generates piece by piece, as `LlamaForCausalLM.stream_generate`.

        Args:
            prompts, attention_mask: As there.
            **options: As `generate`.

        Returns:
            An iterator of `Piece`.

        Raises:
            UnsupportedError, OptionError and others: As `generate`, and before the first piece is asked for.
        """
        self._refuse(options)
        return generation.stream(self._as_native(), prompts, attention_mask, options)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: bool = False,
        chat_template: str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> str | Iterator[Piece]:
        """Answers a conversation, as `LlamaForCausalLM.chat`.

        Args:
            messages, stream, chat_template: As there.
            **options: As `generate`, for one sequence.

        Returns:
            The assistant's answer, or with `stream` an iterator of `Piece`.

        Raises:
            OptionError, UnsupportedError and others: As there.
        """
        self._refuse(options)
        return generation.chat(self._as_native(), messages, options, streamed=stream, chat_template=chat_template)

    def _refuse(self, options: Mapping[str, Any]) -> None:
        """Says what a native model does and this one does not."""
        plan = generation.plan_for(self._as_native(), options)
        if plan.num_beams > 1:
            hint = (
                "" if "num_beams" in options else f" (num_beams={plan.num_beams} is of the defaults; pass num_beams=1)"
            )
            raise UnsupportedError(
                f"beam search is not done in onnxruntime by this version{hint}: use the native model"
            )
        for name in ("prompt_lookup_num_tokens", "draft_model"):
            if options.get(name):
                raise UnsupportedError(f"{name}: speculation is not done in onnxruntime by this version: leave it out")

    def begin(self, prompts: Sequence[IntArray], **options: Any) -> OrtGeneration:
        """The token loop of `generate` by itself, to be stepped through: for those who measure it.

        Args:
            prompts: Token ids, at least one each.
            **options: See `OrtGeneration`.

        Returns:
            A generation that has not begun.
        """
        return OrtGeneration(self._session, prompts, **options)

    def _new_generation(
        self,
        prompts: Sequence[IntArray],
        *,
        session: object,
        draft: object,
        draft_tokens: int,
        adapters: object,
        weights: object,
        **options: Any,
    ) -> OrtGeneration:
        """What `generate` asks for. Guesses that only the defaults ask for would change nothing but the speed."""
        del session, weights, draft, draft_tokens  # sessions are the native model's
        del adapters  # there are none
        return self.begin(prompts, **options)

    def _core_adapters(self, choice: object, sequences: int) -> list[None]:
        """None: a graph has the weights that it was exported with."""
        del sequences
        if choice is not None:
            raise UnsupportedError(
                "an exported model has no adapters: merge_adapter makes one a part of the weights, and export the result"
            )
        return []

    def _as_native(self) -> LlamaForCausalLM:
        """This model for functions that need no more of a native one than both have."""
        return cast("LlamaForCausalLM", self)

    def __repr__(self) -> str:
        config = self.config
        return (
            f"<OrtModel {config.num_hidden_layers} layers, width {config.hidden_size}, vocabulary {config.vocab_size}, "
            f"context {config.max_position_embeddings}; {self.path.name}, profile {self.profile}, {self.dtype}; "
            f"{self.threads} thread{'' if self.threads == 1 else 's'}>"
        )
