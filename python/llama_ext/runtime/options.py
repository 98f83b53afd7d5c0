"""The options of a generation: what may be given, what contradicts what, and what holds when nothing is said."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from llama_ext._arrays import as_whole
from llama_ext._options import meant, refuse_unknown, shown, whole_seed
from llama_ext.errors import ContextLengthError, OptionError, TokenIdError, UnsupportedError
from llama_ext.runtime.speculation import (
    DEFAULT_DRAFT_TOKENS,
    MOST_DRAFT_TOKENS,
    NO_SPECULATION,
    Speculation,
    read_speculation,
)
from llama_ext.runtime.tokenizer_backend import check_utf8

if TYPE_CHECKING:
    from llama_ext.models.generation_config import GenerationDefaults
    from llama_ext.runtime.adapted import AdapterChoice
    from llama_ext.runtime.model import LlamaForCausalLM

__all__ = [
    "DEFAULT_BATCH_SIZE",
    "DEFAULT_NEW_TOKENS",
    "GenerateOptions",
    "GenerationPlan",
    "OneSequenceOptions",
    "plan_generation",
]

# Tokens that are generated when neither the caller nor the checkpoint says how many.
DEFAULT_NEW_TOKENS = 256
# Sequences that run at once: with more, a step takes longer than the reading of the weights that they share.
DEFAULT_BATCH_SIZE = 16
# kMaxBeams of the core.
_MOST_BEAMS = 1024


class OneSequenceOptions(TypedDict, total=False):
    """The options of `LlamaForCausalLM.generate` that give one sequence for a prompt: all but one."""

    max_new_tokens: int | None
    max_length: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    stop: str | Sequence[str] | None
    num_beams: int | None
    length_penalty: float | None
    early_stopping: bool | None
    seed: int | None
    eos_token_id: int | Sequence[int] | None
    max_batch_size: int | None
    prompt_lookup_num_tokens: int | None
    draft_model: LlamaForCausalLM | None
    num_assistant_tokens: int | None
    generation_config: GenerationDefaults | Mapping[str, object] | None
    adapter: AdapterChoice


class GenerateOptions(OneSequenceOptions, total=False):
    """The options of `LlamaForCausalLM.generate`, where they are described; None is "not given" for all of them."""

    num_return_sequences: int | None


@dataclass(frozen=True)
class GenerationPlan:
    """Options that were checked against each other and completed with the defaults.

    Attributes:
        max_new_tokens: What the caller asked for, or None.
        max_length: What the caller asked for, or None; prompt included.
        default_new_tokens: How many when the caller asked for neither, or None.
        default_length: The checkpoint's total length for that case, or None.
        sampling: The core's SamplingOptions by name; temperature 0 is greedy.
        stop: Strings that end a row.
        num_beams: 1 is no beam search.
        length_penalty: Of beam search.
        early_stopping: Of beam search.
        num_return_sequences: Per prompt.
        seed: In [0, 2^64).
        eos: Token ids that end a row.
        pad: The token that fills up a batch, where the checkpoint's or the caller's generation config names one.
        max_batch_size: Sequences that run at once.
        speculation: How to guess tokens ahead.
        adapter: The adapter of each prompt; None: the active one.
    """

    max_new_tokens: int | None
    max_length: int | None
    default_new_tokens: int | None
    default_length: int | None
    sampling: dict[str, object]
    stop: tuple[str, ...]
    num_beams: int
    length_penalty: float
    early_stopping: bool
    num_return_sequences: int
    seed: int
    eos: tuple[int, ...]
    pad: int | None
    max_batch_size: int = DEFAULT_BATCH_SIZE
    speculation: Speculation = NO_SPECULATION
    adapter: AdapterChoice = None

    def new_tokens(self, prompt: int, context: int, what: str = "the prompt") -> int:
        """How many tokens to generate after a prompt of `prompt` tokens.

        Args:
            prompt: Tokens of the prompt.
            context: Positions that there are.
            what: The prompt's name in messages.

        Raises:
            ContextLengthError: The prompt, or the prompt and what was asked for, does not fit into `context`.
            OptionError: The prompt is longer than `max_length`.
        """
        room = context - prompt
        if room < 0:
            raise ContextLengthError(
                f"{what} has {prompt} tokens, but there is only room for {context}. Shorten it: nothing is cut silently"
            )
        if self.max_new_tokens is not None:
            if self.max_new_tokens > room:
                raise ContextLengthError(
                    f"{what} has {prompt} tokens; with max_new_tokens={self.max_new_tokens} that is "
                    f"{prompt + self.max_new_tokens}, but there is only room for {context}. "
                    f"Ask for at most {room} new tokens"
                )
            return self.max_new_tokens
        if self.max_length is not None:
            if self.max_length > context:
                raise ContextLengthError(f"max_length={self.max_length}, but there is only room for {context} tokens")
            if prompt > self.max_length:
                raise OptionError(
                    f"{what} has {prompt} tokens already, more than max_length={self.max_length}, which counts the "
                    "prompt. Raise it, or use max_new_tokens"
                )
            return self.max_length - prompt
        if self.default_new_tokens is not None:
            return min(self.default_new_tokens, room)
        length = self.default_length if self.default_length is not None else context
        if prompt > length:
            raise OptionError(
                f"{what} has {prompt} tokens already, more than the max_length={length} of the checkpoint's "
                "generation_config.json. Pass max_new_tokens"
            )
        return min(length - prompt, room)


def plan_generation(
    given: Mapping[str, object], defaults: GenerationDefaults, *, eos: Sequence[int], vocabulary: int
) -> GenerationPlan:
    """Checks the options a caller gave, and completes them.

    Args:
        given: Options by the names of `GenerateOptions`.
        defaults: What the checkpoint says.
        eos: The token ids that end a row unless `eos_token_id` is given, by itself or in `generation_config`.
        vocabulary: How many tokens there are.

    Raises:
        OptionError: An option is unknown, of the wrong type, out of range, or contradicts another one.
        TokenIdError: An id in `eos_token_id` or `logit_bias` is outside the vocabulary.
        UnsupportedError: Beam search together with something that it does not do.
    """
    refuse_unknown(given, GenerateOptions.__annotations__)
    options = {name: value for name, value in given.items() if value is not None}
    replaced = options.pop("generation_config", None)
    origin = "the checkpoint's generation_config.json"
    if replaced is not None:
        defaults = _as_defaults(replaced)
        origin = "generation_config"
        if defaults.eos_token_id is not None:
            options.setdefault("eos_token_id", defaults.eos_token_id)
    if "max_length" in options and "max_new_tokens" in options:
        raise OptionError(
            "both max_length (prompt included) and max_new_tokens (without the prompt) were given: give one of them"
        )
    asked_beams = _whole(options, "num_beams", 1, at_least=1)
    sampling = _sampling(options, defaults, vocabulary, asked_beams)
    sampled = sampling["temperature"] != 0.0
    beams = asked_beams if "num_beams" in options else 1 if sampled else (defaults.num_beams or 1)
    stop = _stop_strings(options.get("stop"))
    returned = _whole(options, "num_return_sequences", 1, at_least=1)
    hint = ""
    if beams > 1:
        # What nobody wrote into the call has to be told with where it is from and how to do without it.
        hint = "" if "num_beams" in options else f" (num_beams={beams} is from {origin}; pass num_beams=1)"
        if "repetition_penalty" not in options and sampling["repetition_penalty"] != 1.0:
            value = sampling["repetition_penalty"]
            hint += f" (repetition_penalty={value} is from {origin}; pass repetition_penalty=1.0)"
        _check_beams(beams, returned, sampling, stop, hint)
        if "max_batch_size" in options:
            raise UnsupportedError(f"max_batch_size is not supported with beam search in this version{hint}")
    else:
        for name in ("length_penalty", "early_stopping"):
            if name in options:
                raise OptionError(f"{name} is an option of beam search: give num_beams > 1 too")
        if returned > 1 and not sampled:
            raise OptionError(
                f"num_return_sequences={returned} under greedy search would give equal sequences: "
                "sample (temperature > 0) or give num_beams"
            )
    no_limit_given = "max_length" not in options and "max_new_tokens" not in options
    default_new = defaults.max_new_tokens
    if default_new is None and defaults.max_length is None:
        default_new = DEFAULT_NEW_TOKENS
    return GenerationPlan(
        max_new_tokens=_whole(options, "max_new_tokens", 0, at_least=0) if "max_new_tokens" in options else None,
        max_length=_whole(options, "max_length", 1, at_least=1) if "max_length" in options else None,
        default_new_tokens=default_new if no_limit_given else None,
        default_length=defaults.max_length if no_limit_given and default_new is None else None,
        sampling=sampling,
        stop=stop,
        num_beams=beams,
        length_penalty=_number(options, "length_penalty", _or(defaults.length_penalty, 1.0)),
        early_stopping=bool(_flag(options, "early_stopping", defaults.early_stopping)),
        num_return_sequences=returned,
        seed=_seed(options),
        eos=_eos(options.get("eos_token_id"), eos, vocabulary),
        pad=defaults.pad_token_id,
        max_batch_size=_whole(options, "max_batch_size", DEFAULT_BATCH_SIZE, at_least=1),
        speculation=read_speculation(
            options,
            _whole(
                options,
                "prompt_lookup_num_tokens",
                min(_or(defaults.prompt_lookup_num_tokens, 0), MOST_DRAFT_TOKENS),
                at_least=0,
            ),
            _whole(options, "num_assistant_tokens", DEFAULT_DRAFT_TOKENS, at_least=1),
            vocabulary=vocabulary,
            beam_search=hint if beams > 1 else None,
        ),
        adapter=_adapter(options.get("adapter")),
    )


def _as_defaults(config: object) -> GenerationDefaults:
    from llama_ext.models.generation_config import GenerationDefaults

    fields = [field.name for field in dataclasses.fields(GenerationDefaults) if field.name != "ignored"]
    if isinstance(config, GenerationDefaults):
        # What its file asked for in vain was told when the file was read.
        config = {name: getattr(config, name) for name in fields}
    if not isinstance(config, Mapping):
        raise OptionError(f"generation_config must be a mapping or GenerationDefaults, got {type(config).__name__}")
    for name in config:
        if not isinstance(name, str):
            raise OptionError(f"generation_config: its keys must be names, got {shown(name)}")
    result = GenerationDefaults.from_dict(config, from_file=False)
    for name, value in result.ignored.items():
        if name in fields:
            raise OptionError(f"generation_config: {name}={shown(value)} is not supported by this version")
        raise OptionError(f"generation_config: this version has no {name!r}; {meant(name, fields)}")
    return result


def _sampling(
    options: Mapping[str, object], defaults: GenerationDefaults, vocabulary: int, beams: int
) -> dict[str, object]:
    """The core's SamplingOptions; decides between sampling and taking the most likely token."""
    temperature = _number(options, "temperature", _or(defaults.temperature, 1.0), at_least=0.0)
    top_k = _whole(options, "top_k", _or(defaults.top_k, 0), at_least=0)
    top_p = _number(options, "top_p", _or(defaults.top_p, 1.0), above=0.0, at_most=1.0)
    min_p = _number(options, "min_p", _or(defaults.min_p, 0.0), at_least=0.0, below=1.0)
    do_sample = _flag(options, "do_sample", None)
    # What only makes sense for sampling, and was said by the caller: neutral values say nothing.
    neutral: dict[str, object] = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    asks = [name for name, value in neutral.items() if name in options and options[name] != value]
    if do_sample is False and asks:
        raise OptionError(f"do_sample=False contradicts {asks[0]}={options[asks[0]]!r}: leave out one of them")
    if do_sample is True and options.get("temperature") == 0:
        raise OptionError("do_sample=True contradicts temperature=0, which takes the most likely token: leave out one")
    if do_sample is None:
        if options.get("temperature") == 0:
            do_sample = False
        elif asks:
            do_sample = True
        else:
            do_sample = beams == 1 and bool(defaults.do_sample) and temperature > 0.0
    if do_sample and beams > 1:
        cause = f"{asks[0]}={options[asks[0]]!r}" if asks else "do_sample=True"
        raise OptionError(f"num_beams={beams} contradicts {cause}: beam search does not sample. Leave out one of them")
    if do_sample and temperature == 0.0:  # the checkpoint's own temperature
        temperature = 1.0
    result: dict[str, object] = {
        "temperature": temperature if do_sample else 0.0,
        "top_k": min(top_k, vocabulary) if do_sample else 0,
        "top_p": top_p if do_sample else 1.0,
        "min_p": min_p if do_sample else 0.0,
        "repetition_penalty": _number(options, "repetition_penalty", _or(defaults.repetition_penalty, 1.0), above=0.0),
        "presence_penalty": _number(options, "presence_penalty", 0.0),
        "frequency_penalty": _number(options, "frequency_penalty", 0.0),
        "logit_bias": _logit_bias(options.get("logit_bias"), vocabulary),
    }
    return result


def _check_beams(beams: int, returned: int, sampling: Mapping[str, object], stop: tuple[str, ...], hint: str) -> None:
    if beams > _MOST_BEAMS:
        raise OptionError(f"num_beams must be at most {_MOST_BEAMS}, got {beams}{hint}")
    if returned > beams:
        raise OptionError(f"num_return_sequences={returned} is more than num_beams={beams}{hint}")
    if stop:
        raise UnsupportedError(f"stop strings are not supported with beam search in this version{hint}")
    neutral = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": {}}
    for name, value in neutral.items():
        if sampling[name] != value:
            raise UnsupportedError(f"{name} is not supported with beam search in this version{hint}")


def _adapter(value: object) -> AdapterChoice:
    """Only whether it can be one; which adapters there are, the model knows."""
    if value is None or isinstance(value, str):
        return value
    given = list(value) if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)) else [value, 0]
    names = [name for name in given if name is None or isinstance(name, str)]
    if len(names) != len(given):
        raise OptionError(f"adapter must be a name, or a list with a name or None for each prompt, got {shown(value)}")
    return names


def _stop_strings(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, Sequence) or not all(isinstance(item, str) for item in strings):
        raise OptionError(f"stop must be a string or a list of strings, got {shown(value)}")
    if "" in strings:
        raise OptionError("stop must not contain the empty string, which is everywhere")
    for string in strings:
        check_utf8(string, f"the stop string {string!a:.80}")
    return tuple(dict.fromkeys(strings))


def _logit_bias(value: object, vocabulary: int) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise OptionError(f"logit_bias must map token ids to numbers, got {type(value).__name__}")
    result = {}
    for token, bias in value.items():
        number = _token("logit_bias", token, vocabulary, "each key of logit_bias must be a token id, a whole number")
        try:
            value_of_it = math.nan if isinstance(bias, (bool, str)) else float(bias)
        except (TypeError, ValueError, OverflowError):
            value_of_it = math.nan
        # As float32, which logits are: what lies below its range forbids a token as -inf does.
        if math.isnan(value_of_it) or ctypes.c_float(value_of_it).value == math.inf:
            raise OptionError(
                f"logit_bias[{number}] must be a number that is finite as float32 or -inf, got {shown(bias)}"
            )
        result[number] = value_of_it
    return result


def _eos(value: object, eos: Sequence[int], vocabulary: int) -> tuple[int, ...]:
    if value is None:
        # A checkpoint may name an id that its vocabulary lacks; it can never be generated.
        return tuple(token for token in dict.fromkeys(eos) if 0 <= token < vocabulary)
    tokens = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return tuple(dict.fromkeys(_token("eos_token_id", token, vocabulary) for token in tokens))


def _token(name: str, value: object, vocabulary: int, expected: str = "") -> int:
    number = _as_whole(name, value, expected)
    if not 0 <= number < vocabulary:
        raise TokenIdError(f"{name}: token id {shown(number)} is outside the vocabulary, [0, {vocabulary})")
    return number


def _seed(options: Mapping[str, object]) -> int:
    if "seed" not in options:
        return int.from_bytes(os.urandom(8), "little")
    return whole_seed(options["seed"])


def _or(value: float | int | None, fallback: float) -> float:
    return fallback if value is None else value


def _as_whole(name: str, value: object, expected: str = "") -> int:
    number = as_whole(value)
    if number is None:
        raise OptionError(f"{expected or f'{name} must be a whole number'}, got {shown(value)}")
    return number


def _whole(options: Mapping[str, object], name: str, fallback: float, *, at_least: int) -> int:
    value = _as_whole(name, options.get(name, int(fallback)))
    if value < at_least:
        raise OptionError(f"{name} must be at least {at_least}, got {shown(value)}")
    # Beyond any model; keeps every later sum inside 64 bits.
    if value > 2**31 - 1:
        raise OptionError(f"{name} must be below 2^31, got {shown(value)}")
    return value


def _number(
    options: Mapping[str, object],
    name: str,
    fallback: float,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> float:
    value = options.get(name, fallback)
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise OptionError(f"{name} must be a finite number, got {shown(value)}")
    for limit, ok, words in (
        (at_least, at_least is None or number >= at_least, "at least"),
        (above, above is None or number > above, "more than"),
        (at_most, at_most is None or number <= at_most, "at most"),
        (below, below is None or number < below, "less than"),
    ):
        if not ok:
            raise OptionError(f"{name} must be {words} {limit:g}, got {number:g}")
    return number


def _flag(options: Mapping[str, object], name: str, fallback: bool | None) -> bool | None:
    value = options.get(name, fallback)
    if value is not None and not isinstance(value, bool):
        raise OptionError(f"{name} must be True or False, got {shown(value)}")
    return value
