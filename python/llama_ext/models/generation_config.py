"""generation_config.json: how a checkpoint's authors want it to be sampled."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_ext.io.json_file import read_json_object
from llama_ext.limits import DEFAULT_LIMITS, Limits
from llama_ext.models.fields import FieldReader

__all__ = ["GenerationDefaults"]

# Keys that ask for what happens anyway; any other value of them is worth telling.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "diversity_penalty": (0, 0.0),
    "encoder_repetition_penalty": (1, 1.0),
    "epsilon_cutoff": (0, 0.0),
    "eta_cutoff": (0, 0.0),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_logits": (False,),
    "output_scores": (False,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "return_dict_in_generate": (False,),
    "typical_p": (1, 1.0),
    "use_cache": (True, False),  # the result is the same
}
_MOST_TOKENS = (1 << 31) - 1


@dataclass(frozen=True)
class GenerationDefaults:
    """Options of `generate` that a checkpoint suggests; None: it does not say.

    Args:
        do_sample: Whether tokens are drawn; false means greedy, whatever the temperature is.
        temperature: Divides the logits, >= 0.
        top_k: Only the k most likely tokens; 0 means all.
        top_p: Probability, 0 < p <= 1.
        min_p: Probability relative to the most likely token's, 0 <= p < 1.
        repetition_penalty: > 0, 1 is none.
        max_new_tokens: Tokens after the prompt.
        max_length: Tokens, prompt included.
        num_beams: Beams, 1 is none. Those of a file that says do_sample are in `ignored`, too: beams are not drawn.
        length_penalty: Exponent of the length in a beam's score.
        early_stopping: Whether beam search ends with the first finished beams. transformers' "never" is in `ignored`.
        prompt_lookup_num_tokens: Tokens to guess at a time from what followed earlier in the text; 0 is none.
        bos_token_id: The id that begins a text.
        eos_token_id: The ids that end one.
        pad_token_id: The id that fills up a batch.
        ignored: What the file asks for and this package does not do, by name.
    """

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | None = None
    prompt_lookup_num_tokens: int | None = None
    bos_token_id: int | None = None
    eos_token_id: list[int] | None = field(default=None, hash=False)
    pad_token_id: int | None = None
    ignored: dict[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def from_dict(
        cls,
        values: Mapping[str, Any],
        *,
        path: str | None = None,
        limits: Limits = DEFAULT_LIMITS,
        from_file: bool = True,
    ) -> GenerationDefaults:
        """Reads what generation_config.json holds.

        Args:
            values: The object in the file.
            path: The file, for messages.
            limits: The bounds.
            from_file: Whether mistakes are a file's or an argument's.

        Returns:
            The defaults.

        Raises:
            FormatError: A value is of the wrong type or out of range; OptionError for an argument.
            LimitError: A token id is beyond the limits.
        """
        reader = FieldReader(values, path=path, from_file=from_file, limits=limits)
        eos = reader.token_ids("eos_token_id", None)
        never = values.get("early_stopping") == "never"
        known: dict[str, Any] = {
            "do_sample": reader.optional_boolean("do_sample"),
            "temperature": reader.optional_number("temperature", minimum=0.0),
            "top_k": reader.optional_integer("top_k", minimum=0),
            "top_p": reader.optional_number("top_p", above=0.0, maximum=1.0),
            "min_p": reader.optional_number("min_p", minimum=0.0, maximum=1.0),
            "repetition_penalty": reader.optional_number("repetition_penalty", above=0.0),
            "max_new_tokens": reader.optional_integer("max_new_tokens", maximum=_MOST_TOKENS),
            "max_length": reader.optional_integer("max_length", maximum=_MOST_TOKENS),
            "num_beams": reader.optional_integer("num_beams", maximum=_MOST_TOKENS),
            "length_penalty": reader.optional_number("length_penalty"),
            "early_stopping": None if never else reader.optional_boolean("early_stopping"),
            "prompt_lookup_num_tokens": reader.optional_integer(
                "prompt_lookup_num_tokens", minimum=0, maximum=_MOST_TOKENS
            ),
            "bos_token_id": reader.token_id("bos_token_id", None),
            "eos_token_id": [eos] if isinstance(eos, int) else eos,
            "pad_token_id": reader.token_id("pad_token_id", None),
        }
        if known["min_p"] == 1.0:
            reader.fail("min_p", "at least 0 and below 1", 1.0)
        ignored = {
            name: value
            for name, value in values.items()
            if name not in known
            and not name.startswith("_")
            and name != "transformers_version"
            and value is not None
            and value not in _NEUTRAL.get(name, ())
        }
        if never:
            ignored["early_stopping"] = "never"
        if from_file and known["do_sample"] and known["temperature"] != 0 and (known["num_beams"] or 1) > 1:
            # Beams that are drawn: where a call says do_sample=False they are followed.
            ignored["num_beams"] = known["num_beams"]
        return cls(**known, ignored=ignored)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *, limits: Limits = DEFAULT_LIMITS) -> GenerationDefaults:
        """Reads generation_config.json; a checkpoint without one suggests nothing.

        Args:
            path: A checkpoint's directory, or the file itself.
            limits: The bounds.

        Returns:
            The defaults.

        Raises:
            FormatError: The file is malformed, or as for `from_dict`.
            LimitError: The file is too large, or as for `from_dict`.
        """
        file = Path(path)
        if os.path.isdir(file):
            file = file / "generation_config.json"
            if not os.path.lexists(file):
                return cls()
        values = read_json_object(file, what="a model's generation_config.json", limits=limits)
        return cls.from_dict(values, path=str(file), limits=limits)
