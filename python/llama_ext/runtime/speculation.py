"""Speculation: guessing tokens that the model then checks together. It never changes what is generated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llama_ext.errors import OptionError, UnsupportedError

if TYPE_CHECKING:
    from llama_ext.runtime.model import LlamaForCausalLM

__all__ = [
    "DEFAULT_DRAFT_TOKENS",
    "MOST_DRAFT_TOKENS",
    "NO_SPECULATION",
    "Speculation",
    "check_draft_tokenizer",
    "read_speculation",
]

# Guesses of a draft model in one step, at most: they are made one by one, so many of them cost much when they are wrong.
DEFAULT_DRAFT_TOKENS = 8
# kMostDrafted of the core.
MOST_DRAFT_TOKENS = 64


@dataclass(frozen=True)
class Speculation:
    """How to guess.

    Attributes:
        tokens: Guesses a step, at most; 0 is no speculation.
        model: The model that guesses; None: what followed the same words earlier in the text.
    """

    tokens: int = 0
    model: LlamaForCausalLM | None = None


NO_SPECULATION = Speculation()


def read_speculation(
    options: Mapping[str, object], lookup: int, assistant: int, *, vocabulary: int, beam_search: str | None
) -> Speculation:
    """Checks the options of speculation against each other.

    Args:
        options: What the caller gave.
        lookup: `prompt_lookup_num_tokens`, the caller's or the checkpoint's.
        assistant: `num_assistant_tokens`, the caller's or the default.
        vocabulary: The model's.
        beam_search: None, or a hint to where beam search comes from that nobody asked for.

    Raises:
        OptionError: An option is out of range or contradicts another, or a draft model with another vocabulary.
        UnsupportedError: Together with beam search.
    """
    draft = options.get("draft_model")
    asked = [name for name in ("prompt_lookup_num_tokens", "draft_model") if options.get(name)]
    for name, value in (("prompt_lookup_num_tokens", lookup), ("num_assistant_tokens", assistant)):
        if value > MOST_DRAFT_TOKENS:
            raise OptionError(f"{name} must be at most {MOST_DRAFT_TOKENS}, got {value}")
    if len(asked) > 1:
        raise OptionError(f"both {asked[0]} and {asked[1]} were given: guess with one of them")
    if draft is None and "num_assistant_tokens" in options:
        raise OptionError("num_assistant_tokens is an option of speculation with a draft_model: give one")
    if draft is not None:
        _check_draft_model(draft, vocabulary)
    if beam_search is not None:
        if asked:
            raise UnsupportedError(f"{asked[0]} is not supported with beam search in this version{beam_search}")
        return NO_SPECULATION
    if draft is not None:
        return Speculation(assistant, draft)  # type: ignore[arg-type]
    return Speculation(lookup)


def check_draft_tokenizer(model: LlamaForCausalLM, draft: LlamaForCausalLM) -> None:
    """Refuses a draft model whose tokens mean something else: it would only ever guess wrong.

    Raises:
        OptionError: The tokenizers differ.
    """
    if model.tokenizer is None or draft.tokenizer is None or model.tokenizer is draft.tokenizer:
        return
    count = len(model.tokenizer)
    # Ids from all over the vocabulary: comparing every one would take longer than a short generation.
    ids = {*range(min(count, 64)), *range(0, count, max(count // 256, 1))}
    if len(draft.tokenizer) != count or any(
        model.tokenizer.id_to_token(index) != draft.tokenizer.id_to_token(index) for index in ids
    ):
        raise OptionError("draft_model has another tokenizer than the model: their token ids must mean the same")


def _check_draft_model(draft: object, vocabulary: int) -> None:
    from llama_ext.runtime.model import LlamaForCausalLM

    if not isinstance(draft, LlamaForCausalLM):
        raise OptionError(
            f"draft_model must be a LlamaForCausalLM, got {type(draft).__name__}: LlamaForCausalLM.from_pretrained loads one"
        )
    if draft.config.vocab_size != vocabulary:
        raise OptionError(
            f"draft_model has a vocabulary of {draft.config.vocab_size} tokens and the model one of {vocabulary}: "
            "it must be the same vocabulary"
        )
