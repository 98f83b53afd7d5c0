"""`LlamaForCausalLM`: a Llama with its weights in memory, and everything one does with it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn, overload

import numpy as np
import numpy.typing as npt

from llama_ext import _core
from llama_ext._arrays import FloatArray, IntArray, SupportsArray
from llama_ext._options import keyword_options, refuse_unknown, whole_seed
from llama_ext.errors import OptionError, UnsupportedError
from llama_ext.limits import DEFAULT_LIMITS, Limits
from llama_ext.models import ARCHITECTURES
from llama_ext.models.config import LlamaConfig
from llama_ext.models.generation_config import GenerationDefaults
from llama_ext.runtime import generation, loading, logits, scoring
from llama_ext.runtime.adapted import AdapterChoice
from llama_ext.runtime.generation import Generated, GenerationOutput, Piece
from llama_ext.runtime.loaded_model import LoadedModel
from llama_ext.runtime.options import GenerateOptions, OneSequenceOptions
from llama_ext.runtime.scoring import LogLikelihood, Perplexity
from llama_ext.runtime.session import Session, load_session, new_session
from llama_ext.runtime.tokenizer import Tokenizer
from llama_ext.runtime.trainable import Trainable
from llama_ext.runtime.weight_types import choose_types

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from llama_ext.interpret.cache import ActivationCache
    from llama_ext.interpret.names import Names

__all__ = ["LlamaForCausalLM"]

# Names for annotations in the class, where `_core` is an attribute.
TokenLoop = _core.Generation
CoreModel = _core.Model

Ids = Sequence[int] | IntArray
Rows = Sequence[Sequence[int]] | Sequence[SupportsArray]
Prompts = str | Sequence[str] | Sequence[int] | Rows | SupportsArray


class LlamaForCausalLM(LoadedModel, Trainable):
    """A Llama language model.

    Unless it is trained its weights do not change, so any number of threads may use one model at once; what belongs to one sequence
    is in a `Session`. On a CPU results do not depend on the number of threads or on what else is in a batch: they are bit-identical.
    On a GPU the last bits depend on how many rows run together (docs/gpu.md).

    Args:
        config: The shape of the model.
        tokenizer: For texts; without one the model takes and gives token ids. Where the config's eos_token_id is a token of
            it that is not special, such as a character, it does not end a generation of this model: the config's default
            knows nothing of the tokenizer. `eos_token_id` of `generate` says otherwise. A config without that id
            (eos_token_id=None) keeps it so when the model is saved and loaded.
        seed: Of the random weights, in [0, 2^64): normal with the config's initializer_range, norms 1, biases 0. Each tensor
            has a random stream of its own, so a tensor depends on the seed, its name and shape, and nothing else.
        dtype: How matrices are kept: "float32" ("auto"), "bfloat16", "float16", or quantised: "int8" or "int4", the embedding and
            the head of int4 models as int8. Norms and biases are float32.
        group_size: Of quantised weights: how many of a row share a scale, 128, 64 or 32. None: the largest that divides.
        symmetric: Of quantised weights: whether a group has a scale alone (None, True) or also a minimum (False).
        device: "cpu"; "cuda", the first NVIDIA GPU, or "cuda:1" and so on; or "reference" for the float64 loops that the fast kernels are
            tested against.
        compute: "auto": the fastest arithmetic for these weights, which for bfloat16 ones may round activations to bfloat16, and
            for quantised ones to int8, or on a GPU to 16-bit integers (few rows) or bfloat16, with more than 32 rows the weights as well
            (docs/gpu.md). "exact": float32 products of the stored weights.
        threads: None: the physical cores that affinity and cgroup quota allow, or what `set_num_threads` said.
        kv_dtype: How generations and sessions keep keys and values: "float32", "bfloat16" or "int8". "auto" is bfloat16 for bfloat16
            and quantised weights unless compute is "exact", else float32. Logits of whole sequences and scores always use float32.

    Raises:
        OptionError: An option is unknown or out of range, or an argument is of another type.
        UnsupportedError: A dtype that this version does not have.
        DeviceError: There is no such device here.
        OutOfMemoryError: The weights do not fit into memory.
    """

    # None where the checkpoint has none. Any stands for that None, as in typeshed: most models have a tokenizer, and a user's
    # script should not have to prove it before each `model.tokenizer.encode`.
    tokenizer: Tokenizer | Any

    def __init__(
        self,
        config: LlamaConfig,
        tokenizer: Tokenizer | None = None,
        seed: int = 0,
        *,
        dtype: str = "auto",
        group_size: int | None = None,
        symmetric: bool | None = None,
        device: str = "cpu",
        compute: str = "auto",
        threads: int | None = None,
        kv_dtype: str = "auto",
    ) -> None:
        _check_config(config)
        if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
            raise OptionError(
                f"tokenizer must be a Tokenizer or None, got {type(tokenizer).__name__}: Tokenizer.from_pretrained reads one"
            )
        number = whole_seed(seed)
        self._prepare(
            config,
            tokenizer,
            GenerationDefaults(),
            types=choose_types(
                dtype,
                None,
                ARCHITECTURES[config.model_type].tensor_specs(config),
                group_size=group_size,
                symmetric=symmetric,
            ),
            device=device,
            compute=compute,
            threads=threads,
            kv_dtype=kv_dtype,
        )
        if tokenizer is not None:
            self._config_ends = tuple(token for token in self._config_ends if not _is_plain(tokenizer, token))
        loading.load_random(self._core, config, number)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike[str],
        *,
        dtype: str = "auto",
        group_size: int | None = None,
        symmetric: bool | None = None,
        device: str = "cpu",
        compute: str = "auto",
        threads: int | None = None,
        kv_dtype: str = "auto",
        revision: str | None = None,
        limits: Limits = DEFAULT_LIMITS,
        **unknown: NoReturn,
    ) -> LlamaForCausalLM:
        """Loads a checkpoint, tensor by tensor, so that memory never holds it twice.

        Args:
            path_or_hub_id: A directory with config.json and *.safetensors, sharded or not, and the tokenizer's files if there
                are any, or one that `save_pretrained` wrote of quantised weights, whose file is mapped and used as it lies; a
                GGUF file, or a directory with one; or the id of a model on the Hugging Face Hub.
            dtype: "auto" keeps a bfloat16 or float16 checkpoint as it is, any other one of floats as float32, and quantised
                weights in the blocks and groups they come in, each matrix in its own type. Any other dtype converts.
            group_size, symmetric, device, compute, threads, kv_dtype: See the class.
            revision: Of the Hub: a branch, tag or commit.
            limits: What a file may ask for.

        Returns:
            The model, with its tokenizer, or None there when the checkpoint has none.

        Warns:
            UserWarning: generation_config.json asks for something that this version does not do.

        Raises:
            FormatError: A file is missing, truncated or malformed.
            CheckpointError: A tensor is missing, unexpected or wrongly shaped.
            UnsupportedError: A model or a dtype that this version does not have.
            LimitError: A number in a file is beyond `limits`.
            NumericError: A weight is beyond the range of float16, where that is the dtype.
            OptionError, DeviceError, OutOfMemoryError: See the class.
        """
        refuse_unknown(unknown, keyword_options(cls.from_pretrained))
        if not isinstance(path_or_hub_id, (str, os.PathLike)):
            raise OptionError(
                f"from_pretrained takes a path or a Hub id, got {type(path_or_hub_id).__name__}. "
                "For random weights: LlamaForCausalLM(config), with LlamaConfig.from_dict if the config is a dictionary"
            )
        with loading.open_model(path_or_hub_id, revision=revision, limits=limits) as files:
            if files.config.is_classifier:
                raise UnsupportedError(
                    f"{files.path}: this is a classifier: load it with LlamaForSequenceClassification.from_pretrained"
                )
            files.warn_of_ignored()
            model = cls.__new__(cls)
            with files.named_in_errors():
                model._prepare(
                    files.config,
                    files.tokenizer,
                    files.generation_defaults,
                    types=files.types(dtype, group_size, symmetric),
                    files=files,
                    device=device,
                    compute=compute,
                    threads=threads,
                    kv_dtype=kv_dtype,
                )
            files.load_into(model._core)
        return model

    def __call__(
        self,
        input_ids: SupportsArray | Sequence[Sequence[int]],
        attention_mask: object = None,
        adapter: AdapterChoice = None,
    ) -> FloatArray:
        """The logits of every position.

        Args:
            input_ids: (B, T) integers of any type, each in [0, V) where the mask is 1.
            attention_mask: (B, T), 1 for a token and 0 for padding, on the left or the right; each row one run of ones.
            adapter: The name of an adapter, or a list with a name or None (the base) for each row; None: the active one.

        Returns:
            (B, T, V) float32; zeros where the mask is 0. The rows of a batch do not influence each other.

        Raises:
            ShapeError: `input_ids` does not have two dimensions, or the mask another shape.
            DTypeError: The ids are not integers.
            OptionError: A row of the mask is not one run of ones, or there is no such adapter.
            TokenIdError: An id outside the vocabulary.
            ContextLengthError: A row is longer than the model's context.
            NumericError: A logit is not finite.
            OutOfMemoryError: The logits do not fit into memory.
        """
        return logits.batch_logits(self, input_ids, attention_mask, adapter)

    # A str is a sequence of str as well, and is meant as one text: what mypy is told to ignore.
    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompts: str, *, return_details: Literal[False] = False, **options: Unpack[OneSequenceOptions]
    ) -> str: ...
    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompts: str, *, return_details: Literal[False] = False, **options: Unpack[GenerateOptions]
    ) -> str | list[str]: ...
    @overload
    def generate(
        self, prompts: Sequence[str], *, return_details: Literal[False] = False, **options: Unpack[GenerateOptions]
    ) -> list[str]: ...
    @overload
    def generate(
        self, prompts: Sequence[int], *, return_details: Literal[False] = False, **options: Unpack[OneSequenceOptions]
    ) -> list[int]: ...
    @overload
    def generate(
        self, prompts: Sequence[int], *, return_details: Literal[False] = False, **options: Unpack[GenerateOptions]
    ) -> list[int] | list[list[int]]: ...
    @overload
    def generate(
        self, prompts: Rows, *, return_details: Literal[False] = False, **options: Unpack[GenerateOptions]
    ) -> list[list[int]]: ...
    @overload
    def generate(
        self,
        prompts: SupportsArray,
        *,
        attention_mask: object = None,
        return_details: Literal[False] = False,
        **options: Unpack[GenerateOptions],
    ) -> npt.NDArray[np.int64]: ...
    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompts: str | Sequence[int], *, return_details: Literal[True], **options: Unpack[OneSequenceOptions]
    ) -> GenerationOutput: ...
    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompts: str | Sequence[int], *, return_details: Literal[True], **options: Unpack[GenerateOptions]
    ) -> GenerationOutput | list[GenerationOutput]: ...
    @overload
    def generate(
        self, prompts: Sequence[str] | Rows, *, return_details: Literal[True], **options: Unpack[GenerateOptions]
    ) -> list[GenerationOutput]: ...
    @overload
    def generate(
        self,
        prompts: Prompts,
        *,
        attention_mask: object = None,
        return_details: bool,
        **options: Unpack[GenerateOptions],
    ) -> Generated | GenerationOutput | list[GenerationOutput]: ...
    # Options are described here once, for all that generate.
    def generate(
        self,
        prompts: Prompts,
        *,
        attention_mask: object = None,
        return_details: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> Generated | GenerationOutput | list[GenerationOutput]:
        """Goes on with texts or token ids.

        Texts in give texts out, ids in give ids out; the prompt is included. An option that is not given, or None, is what
        the checkpoint's generation_config.json says, else the default below.

        Args:
            prompts: A text or a list of texts; token ids as a list, a list of lists of any lengths, or an array (T) or (B, T), of NumPy
                or of a library whose arrays NumPy reads.
            attention_mask: For an array (B, T) that is padded on the left: 1 for a token, 0 for padding.
            return_details: Return `GenerationOutput` records: continuation, tokens, log probabilities, finish reason.
            max_new_tokens: Tokens to generate at most; default 256, cut to what the context has room for. A number that is
                given must fit.
            max_length: The same with the prompt's tokens counted; not together with max_new_tokens.
            do_sample: True draws from the distribution, False takes the most likely token. Default: whether one of
                temperature > 0, top_k, top_p or min_p is given, else False.
            temperature: >= 0, divides the logits; 0 takes the most likely token. Default 1 when sampling.
            top_k: Keep the k most likely tokens; 0 keeps all (default).
            top_p: Probability, 0 < p <= 1: keep the fewest most likely tokens whose probability reaches it. Default 1.
            min_p: 0 <= p < 1: keep tokens at least this share as likely as the most likely. Default 0.
            repetition_penalty: > 0, on tokens of prompt and output: a positive logit is divided by it, a negative one
                multiplied. Default 1.
            presence_penalty: Subtracted from the logit of each token of the output. Default 0.
            frequency_penalty: Subtracted as often as the token is in the output. Default 0.
            logit_bias: {token id: number} added to logits; -inf forbids a token.
            stop: A string or strings that end a row; they are not part of the returned text. One that is a special token
                ends it like eos_token_id.
            num_beams: In [1, 1024], > 1: beam search; without sampling, penalties, logit_bias or stop strings. Default 1.
            length_penalty: Of beam search: score = sum of log probabilities / tokens ** length_penalty. Default 1.
            early_stopping: Of beam search: end as soon as num_beams sequences are complete. Default False.
            num_return_sequences: Sequences per prompt, of sampling or of beam search. Default 1.
            seed: In [0, 2^64): the same seed gives the same result. Default: a new one each call.
            eos_token_id: Token id or ids that end a row, instead of the checkpoint's; [] for none.
            max_batch_size: Sequences that run at once, >= 1; where one ends the next begins. Fewer when memory does not hold
                their KV caches. Beginnings that prompts share are computed once. Default 16.
            prompt_lookup_num_tokens: In [0, 64]: guess so many tokens at most from what followed the same words earlier in
                the text, and check them in one pass. Faster where texts repeat themselves; on a CPU results stay the same, bit for
                bit. Default 0.
            draft_model: A smaller model with the same vocabulary that guesses tokens, with the same promise.
            num_assistant_tokens: In [1, 64]: guesses of the draft model in one pass, at most; fewer after wrong ones.
                Default 8.
            generation_config: A mapping to use in place of the checkpoint's generation_config.json.
            adapter: The name of an adapter, or a list with a name or None (the base) for each prompt, in one batch. Default: the
                active one.

        Returns:
            For one prompt a text, a list of ids, or an int64 array (T'); for several a list of them, or an int64 array (B, T'):
            the block as it was given, the new tokens, and padding on the right: the first pad token that is named by the
            generation config, the config or the tokenizer, else the first end token of this call, else 0. With
            num_return_sequences > 1 always several: those of the first prompt first. With return_details
            `GenerationOutput`s in the same arrangement.

        Raises:
            OptionError: An option is unknown, out of range or contradicts another; a text without a tokenizer.
            ContextLengthError: A prompt, or a prompt with the tokens asked for, is longer than the context.
            TokenIdError: An id outside the vocabulary.
            ShapeError, DTypeError: `prompts` is none of the above.
            UnsupportedError: Beam search together with penalties, logit_bias, stop strings, speculation or max_batch_size.
            NumericError: A logit is not finite.
            OutOfMemoryError: The KV caches do not fit into memory.
        """
        return generation.generate(self, prompts, attention_mask, options, return_details=return_details)

    def stream_generate(
        self, prompts: Prompts, *, attention_mask: object = None, **options: Unpack[GenerateOptions]
    ) -> Iterator[Piece]:
        """Generates piece by piece: each piece is a token and the text it adds.

        Args:
            prompts: As `generate`; of several, the pieces come interleaved and `piece.row` tells them apart. Beyond
                max_batch_size rows begin as others end.
            attention_mask: As `generate`.
            **options: As `generate`, without beam search.

        Returns:
            An iterator of `Piece`. The texts of a row, concatenated, are what `generate` returns after the prompt.

        Raises:
            UnsupportedError: Beam search.
            OptionError and others: As `generate`, and before the first piece is asked for.
        """
        return generation.stream(self, prompts, attention_mask, options)

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: Literal[False] = False,
        chat_template: str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> str: ...
    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: Literal[True],
        chat_template: str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Iterator[Piece]: ...
    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: bool,
        chat_template: str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> str | Iterator[Piece]: ...
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: bool = False,
        chat_template: str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> str | Iterator[Piece]:
        """Answers a conversation, written down as the tokenizer's chat template says.

        The tokenizer's EOS ends the answer as well as the model's: it is what chat formats end a turn with. `eos_token_id`
        stands instead of both.

        Args:
            messages: {"role": "system" | "user" | "assistant", "content": text} in order.
            stream: Return an iterator of `Piece` instead of the text.
            chat_template: A Jinja template, or the name of one of the tokenizer's; None is the tokenizer's own.
            **options: As `generate`, for one sequence.

        Returns:
            The assistant's answer.

        Raises:
            OptionError: There is no tokenizer or no chat template, more than one sequence is asked for, or as `generate`.
            ContextLengthError and others: As `generate`.
        """
        return generation.chat(self, messages, options, streamed=stream, chat_template=chat_template)

    def session(
        self,
        max_length: int | None = None,
        *,
        kv_dtype: Literal["float32", "bfloat16", "int8"] | None = None,
        adapter: str | None = None,
    ) -> Session:
        """A KV cache for one sequence that is built up step by step.

        Args:
            max_length: Tokens it has room for; None is the model's context. Memory is used as tokens come.
            kv_dtype: None is the model's.
            adapter: The name of one, which the session keeps; None: the active one.

        Returns:
            An empty session.

        Raises:
            ContextLengthError: `max_length` is beyond the model's context.
            OutOfMemoryError: It does not fit into memory.
        """
        return new_session(self, max_length, kv_dtype, adapter)

    def load_session(self, path: str | os.PathLike[str], max_length: int | None = None) -> Session:
        """Reads what `Session.save` wrote, bit for bit.

        Args:
            path: The file, of a session with the adapter that is active now.
            max_length: Tokens the session has room for; None is as when it was saved.

        Returns:
            A session that goes on where the saved one was.

        Raises:
            FormatError: The file is malformed, or was written by another model or with other weights.
            ContextLengthError: `max_length` has no room for the saved tokens.
            OutOfMemoryError: It does not fit into memory.
        """
        return load_session(self, path, max_length)

    def loglikelihood(self, context: str | Ids, continuation: str | Ids) -> LogLikelihood:
        """How likely the model goes on like this, computed from float32 logits.

        Both texts are encoded as one. Spaces at the end of the context count to the continuation, as tokenizers put them
        in front of a word, unless the context is nothing but spaces. If a token crosses the border, scoring begins with it.

        Args:
            context: A text, may be empty if there is a BOS token; or at least one token id.
            continuation: A text or token ids, as `context`.

        Returns:
            The sum of log p of the continuation's tokens in nats, and whether it is the greedy continuation.

        Raises:
            DTypeError: One is a text and the other ids.
            ContextLengthError: Both together are longer than the model's context: nothing is cut.
            OptionError: An empty context and no BOS token; a text without a tokenizer.
            TokenIdError: An id outside the vocabulary.
        """
        return scoring.loglikelihood(self, context, continuation)

    def perplexity(
        self,
        texts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | IntArray,
        stride: int | None = None,
        context: int | None = None,
    ) -> Perplexity:
        """How well the model predicts texts; each token is scored exactly once.

        Every text is encoded by itself, with the BOS token if the tokenizer adds one; its first token (BOS, or else the
        first of the text) has nothing before it and is not scored. Window k begins at token k * stride, has `context` tokens
        and scores those that no window before it has reached, so each scored token but those of the first window sees at
        least `context - stride` tokens before it. A progress bar shows on a terminal if it takes longer than a second.

        Args:
            texts: A text, texts, token ids or lists of token ids.
            stride: In [1, context). None is context - 1: windows that share no scored token and overlap by the one token
                that the first prediction needs. A smaller stride gives each token more to look back at and takes longer.
            context: Tokens of a window, in [2, the model's context]. None is the model's context.

        Returns:
            Perplexity, loss in nats per token, bits per byte, and the counts.

        Raises:
            OptionError: A number is out of range, there is nothing to score, or a text without a tokenizer.
            TokenIdError: An id outside the vocabulary.
        """
        return scoring.perplexity(self, texts, stride, context)

    def run_with_cache(
        self, text: str | Ids | SupportsArray, names: Names = None
    ) -> tuple[FloatArray, ActivationCache]:
        """Runs one text and keeps what the model computes on the way, by TransformerLens' names; see `llama_ext.interpret`.

        Args:
            text: A text, a list of token ids or an array (T) of them. The active adapter applies.
            names: What to keep: a name, a pattern such as "blocks.*.attn.hook_pattern", a function of a name, or a list; None: all.

        Returns:
            Logits (T, V) float32, the bits of an ordinary pass; and what was kept, float32 arrays by name.

        Raises:
            OptionError: A name that the model does not have, a pattern that fits none; or as `generate` for texts.
            ShapeError: No tokens, or several texts.
            ContextLengthError: The text is longer than the model's context.
            TokenIdError: An id outside the vocabulary.
            NumericError: A logit is not finite.
            OutOfMemoryError: What is to be kept is more than the machine can give.
        """
        from llama_ext.interpret.cache import run_with_cache

        return run_with_cache(self, text, names)

    def _new_generation(
        self,
        prompts: Sequence[IntArray],
        *,
        draft: LlamaForCausalLM | None,
        weights: CoreModel | None = None,
        **options: Any,
    ) -> TokenLoop:
        """The token loop of `generate`; options: those of `_core.Generation`. weights: those of a session, where they are others."""
        return _core.Generation(
            self._core if weights is None else weights,
            prompts,
            kv_dtype=self.kv_dtype,
            draft_model=None if draft is None else draft._core,
            draft_kv_dtype=self.kv_dtype if draft is None else draft.kv_dtype,
            **options,
        )

    def __repr__(self) -> str:
        config = self.config
        return (
            f"<LlamaForCausalLM {config.num_hidden_layers} layers, width {config.hidden_size}, "
            f"vocabulary {config.vocab_size}, context {config.max_position_embeddings}; "
            f"{self.num_parameters():,} parameters, {self.dtype}, {self.nbytes / 2**20:.1f} MiB; "
            f"{self.device} {self.isa}, {self.threads} thread{'' if self.threads == 1 else 's'}>"
        )


def _check_config(config: object) -> None:
    if isinstance(config, LlamaConfig):
        return
    advice = "Make one with LlamaConfig.from_dict(...)"
    if isinstance(config, (str, os.PathLike)):
        advice = "LlamaForCausalLM.from_pretrained loads a checkpoint"
    raise OptionError(f"config must be a LlamaConfig, got {type(config).__name__}. {advice}")


def _is_plain(tokenizer: Tokenizer, token: int) -> bool:
    """Whether it is a token of the tokenizer like any other."""
    known = tokenizer.has_id(token) and tokenizer.id_to_token(token) is not None
    return known and token not in tokenizer.special_ids and token != tokenizer.eos_token_id
