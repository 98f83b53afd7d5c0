"""`Translator`: pairs of texts in, a translator out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_ext._arrays import IntArray
from llama_ext._options import shown
from llama_ext.errors import DTypeError, FormatError, OptionError
from llama_ext.io.json_file import read_json_object
from llama_ext.models.lora import LoRA
from llama_ext.runtime.generation import plan_for, read_for
from llama_ext.runtime.model import LlamaForCausalLM
from llama_ext.tasks.fitting import fit_task
from llama_ext.tasks.progress import progress
from llama_ext.tasks.task_files import (
    TRANSLATOR_FILE,
    base_of,
    refuse_another_task,
    refuse_loading,
    save_task,
    saying_who_named,
)
from llama_ext.tasks.translation_report import TranslationReport

if TYPE_CHECKING:
    from llama_ext.training.batches import Example
    from llama_ext.training.history import History

__all__ = ["PROMPT", "Translator"]

PROMPT = "Translate this from {source} to {target}:\n{source}: {text}\n{target}:"

_NEW_TOKENS = 128
# Texts between two signs of progress: several times the rows that run at once, as the next begins where one ends.
_AT_ONCE = 64
_MOST_CHARACTERS = 2_000

# A text and its translation.
Pair = tuple[str, str]


class Translator:
    """Learns to translate from pairs of texts.

    Args:
        base: A language model with a tokenizer that has an end token, its path or its Hub id.
        source: The language of the texts, as it stands in the prompt: "English".
        target: The language of the translations.
        prompt: What is put before a translation; {source}, {target} and {text} are filled in, {text} exactly once.
        dtype: How a base that is loaded here is kept, as in `from_pretrained`. Training all weights wants "float32" where it is
            quantised; an adapter takes it as it is.
        device, compute, threads: Of a base that is loaded here, as in `from_pretrained`: where and how it computes, and is trained.
            A base that is loaded already has its own.

    Attributes:
        model: The language model.
        adapter: The name of the adapter that `fit` trains when it is asked to.

    Raises:
        OptionError: A language is no name, the prompt lacks {text}, the model has no tokenizer or no end token, or it is loaded
            already, in another way than is asked for.
        FormatError and others: As `LlamaForCausalLM.from_pretrained`.
    """

    def __init__(
        self,
        base: LlamaForCausalLM | str | os.PathLike[str],
        source: str,
        target: str,
        *,
        prompt: str = PROMPT,
        dtype: str = "auto",
        device: str = "cpu",
        compute: str = "auto",
        threads: int | None = None,
    ) -> None:
        _check_texts(source, target, prompt)
        self._base = base if isinstance(base, (str, os.PathLike)) else None
        loading: dict[str, Any] = {"dtype": dtype, "device": device, "compute": compute, "threads": threads}
        if isinstance(base, LlamaForCausalLM):
            refuse_loading(base, **loading)
            self.model = base
        else:
            self.model = LlamaForCausalLM.from_pretrained(base, **loading)
        self.source, self.target, self.prompt = source, target, prompt
        tokenizer = self.model.tokenizer
        if tokenizer is None or tokenizer.eos_token_id is None:
            raise OptionError("a translator needs a tokenizer with an EOS token, which ends a translation")
        self.adapter = f"{source}-{target}"

    def __repr__(self) -> str:
        model = self.model
        adapter = f", adapter {self.adapter!r}" if self.adapter in model.adapters else ""
        return (
            f"<Translator {self.source} to {self.target}; {model.num_parameters():,} parameters, {model.dtype}{adapter}; "
            f"{model.device} {model.isa}>"
        )

    def prompt_for(self, text: str) -> str:
        """What the model sees of a text before it translates.

        Args:
            text: In the source language. A line break becomes a space, as the prompt is made of lines.

        Raises:
            DTypeError: It is no text.
        """
        if not isinstance(text, str):
            raise DTypeError(f"a text to translate must be a str, got {type(text).__name__}")
        # One by one: a text may hold "{target}".
        before, after = self.prompt.split("{text}")
        return self._filled(before) + " ".join(text.split()) + self._filled(after)

    def _filled(self, part: str) -> str:
        return part.replace("{source}", self.source).replace("{target}", self.target)

    def fit(
        self,
        pairs: Sequence[Pair],
        *,
        adapter: LoRA | None = None,
        epochs: int | None = None,
        lr: float | None = None,
        batch_size: int = 16,
        validation_data: Sequence[Pair] | None = None,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> History:
        """Learns from pairs. The loss is that of the translation and its end, not of the prompt.

        Args:
            pairs: (text, translation).
            adapter: Train this adapter (the base stays as it is), instead of all weights. After the first call the adapter is
                there, and None goes on with it.
            epochs: How often the data is seen. None: 3 times, or as `max_steps` says.
            lr: The highest learning rate, reached after a tenth of the steps; from there it falls as a cosine. None:
                `llama_ext.training.usual_lr`, which is 1e-3 for small models and adapters, and less for wide models.
            batch_size: Pairs of a step.
            validation_data: Pairs that are scored after each epoch.
            seed: Of the order, of dropout and of the adapter, in [0, 2^64).
            options: Further ones of `LlamaForCausalLM.compile`.
            **settings: Further ones of `LlamaForCausalLM.fit`: checkpoint_dir, resume, callbacks, verbose, max_steps, ...

        Returns:
            What happened, step by step.

        Raises:
            DTypeError: A pair is not two texts.
            OptionError: There is no pair, an option is out of range or contradicts another one, or an adapter would be lost. Nothing
                is changed then.
            ContextLengthError: A pair is longer than the model's context: nothing is cut.
            UnsupportedError: All weights are to be trained and they are quantised: train an adapter.
            NumericError: The loss is not finite.
        """
        examples = self._examples("pairs", pairs)
        if not examples:
            raise OptionError("there is nothing to learn: no pair was given")
        validation = None if validation_data is None else self._examples("validation_data", validation_data)
        return fit_task(
            self.model,
            self.adapter,
            adapter,
            examples,
            validation,
            epochs=epochs,
            lr=lr,
            batch_size=batch_size,
            seed=seed,
            options=options,
            settings=settings,
        )

    def _examples(self, what: str, pairs: Sequence[Pair]) -> list[Example]:
        from llama_ext.training.data import Reading, pair_example

        model = self.model
        reading = Reading(
            model.tokenizer, model.bos_token_id, model.config.vocab_size, model.config.max_position_embeddings
        )
        examples = []
        for index, (text, translation) in enumerate(_checked(what, pairs)):
            answer = " " + " ".join(translation.split())
            examples.append(pair_example(self.prompt_for(text), answer, reading, what=f"{what}[{index}]"))
        return examples

    def translate(
        self,
        texts: str | Sequence[str],
        *,
        num_beams: int = 4,
        length_penalty: float = 1.0,
        max_new_tokens: int | None = None,
        verbose: int = 1,
    ) -> Any:
        """Translates.

        Args:
            texts: A text or texts in the source language.
            num_beams: Translations that are followed at a time; 1 takes the most likely token each time.
            length_penalty: Of beams: score = sum of log probabilities / tokens ** length_penalty.
            max_new_tokens: Of a translation, at most; None: 128, or what the context has room for.
            verbose: 0 shows no progress bar on a terminal.

        Returns:
            A translation, or a list of them.

        Raises:
            DTypeError: Not a text, or not a list of texts.
            OptionError: A number is out of range.
            ContextLengthError: A text is longer than the model's context.
        """
        single = isinstance(texts, str)
        rows = [texts] if isinstance(texts, str) else _listed(texts)
        options: dict[str, Any] = {"do_sample": False, "num_beams": num_beams, "repetition_penalty": 1.0}
        if num_beams != 1:
            options["length_penalty"] = length_penalty
        limits = {"max_new_tokens": _NEW_TOKENS} if max_new_tokens is None else {}
        if max_new_tokens is not None:
            options["max_new_tokens"] = max_new_tokens
        options["generation_config"] = limits
        end = self.model.tokenizer.eos_token_id if self.model.tokenizer is not None else None
        options["eos_token_id"] = [*dict.fromkeys([*self.model.eos_token_ids, *([] if end is None else [end])])]
        prompts = self._prompts(rows, options, single=single)
        adapter = self.adapter if self.adapter in self.model.adapters else None
        # Beam search takes one text after the other anyway.
        at_once = _AT_ONCE if num_beams == 1 else 1
        found = []
        with progress("Translating", len(rows), shown=bool(verbose)) as advance:
            for first in range(0, len(prompts), at_once):
                part = prompts[first : first + at_once]
                outputs = self.model.generate(part, return_details=True, adapter=[adapter] * len(part), **options)
                found += [(output.text or "").strip() for output in outputs]
                advance(len(part))
        return found[0] if single else found

    def _prompts(self, texts: Sequence[str], options: Mapping[str, Any], *, single: bool) -> list[IntArray]:
        """The tokens that the model goes on with; of all texts, before any is translated: what is too long is told at once."""
        plan = plan_for(self.model, options)
        prompts = read_for(self.model, [self.prompt_for(text) for text in texts], None).rows
        for index, row in enumerate(prompts):
            what = f"{'the text' if single else f'texts[{index}]'} in its prompt"
            plan.new_tokens(row.size, self.model.config.max_position_embeddings, what)
        return prompts

    def evaluate(self, pairs: Sequence[Pair], **options: Any) -> TranslationReport:
        """How good it is on pairs.

        Args:
            pairs: (text, translation).
            **options: Of `translate`.

        Returns:
            BLEU and chrF by sacreBLEU with their signatures, and the share that is exactly right.

        Raises:
            UnsupportedError: sacrebleu is not installed (extra `translate`).
            DTypeError, OptionError, ContextLengthError: As `translate`.
        """
        checked = _checked("pairs", pairs)
        if not checked:
            raise OptionError("there is nothing to evaluate: no pair was given")
        found = self.translate([text for text, _ in checked], **options)
        return TranslationReport.from_texts(found, [" ".join(right.split()) for _, right in checked], self.target)

    def save(self, directory: str | os.PathLike[str], *, merge: bool = False) -> None:
        """Writes the translator: a model, or an adapter in PEFT's format; and its prompt in translator.json.

        Args:
            directory: Created if it does not exist. What a translator or a classifier has saved there is replaced.
            merge: Make the adapter a part of the weights first, of this translator as well.

        Raises:
            UnsupportedError: An adapter is to be merged into quantised weights.
            OptionError: Another adapter is active.
            OSError: It cannot be written.
        """
        if merge and self.adapter in self.model.adapters:
            self.model.merge_adapter(self.adapter)
        values = {"source": self.source, "target": self.target, "prompt": self.prompt}
        save_task(self.model, self.adapter, directory, base=self._base, file=TRANSLATOR_FILE, values=values)

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        base: LlamaForCausalLM | str | os.PathLike[str] | None = None,
        *,
        dtype: str = "auto",
        device: str = "cpu",
        compute: str = "auto",
        threads: int | None = None,
    ) -> Translator:
        """Reads what `save` wrote.

        Args:
            directory: A model, or an adapter.
            base: The base of an adapter; None: what its adapter_config.json names.
            dtype, device, compute, threads: See the class.

        Returns:
            The translator.

        Raises:
            OptionError: An adapter that names no base, and none is given; a classifier; or as the class.
            FormatError, CheckpointError, UnsupportedError, LimitError: A file is malformed or does not fit.
        """
        folder = Path(directory)
        loading: dict[str, Any] = {"dtype": dtype, "device": device, "compute": compute, "threads": threads}
        refuse_another_task(folder, TRANSLATOR_FILE)
        values = read_json_object(folder / TRANSLATOR_FILE, what="a translator's translator.json")
        found = base_of(folder, base)
        texts = {name: values.get(name) for name in ("source", "target", "prompt")}
        for name, value in texts.items():
            if not isinstance(value, str):
                path = str(folder / TRANSLATOR_FILE)
                raise FormatError(f"{name} must be a string, got {shown(value)}.", path=path, field=name)
        source, target, prompt = (str(value) for value in texts.values())
        with saying_who_named(folder, base):
            result = cls(folder if found is None else found, source, target, prompt=prompt, **loading)
        if found is not None:
            result.model.load_adapter(folder, result.adapter)
        return result


def _check_texts(source: object, target: object, prompt: object) -> None:
    for name, value in (("source", source), ("target", target)):
        if not isinstance(value, str) or not value.strip() or len(value) > 100:
            raise OptionError(f"{name} must be the name of a language, got {shown(value)}")
    if not isinstance(prompt, str) or prompt.count("{text}") != 1 or len(prompt) > _MOST_CHARACTERS:
        raise OptionError(
            f"prompt must hold {{text}} once, in at most {_MOST_CHARACTERS} characters, got {shown(prompt)}"
        )


def _listed(texts: object) -> list[Any]:
    if isinstance(texts, (bytes, Mapping)) or not isinstance(texts, Iterable):
        raise DTypeError(f"texts must be a text or a list of texts, got {type(texts).__name__}")
    return list(texts)


def _checked(what: str, pairs: object) -> list[Pair]:
    if isinstance(pairs, (str, bytes)) or not isinstance(pairs, Sequence):
        raise DTypeError(f"{what} must be a list of (text, translation), got {type(pairs).__name__}")
    result: list[Pair] = []
    for index, pair in enumerate(pairs):
        texts = [text for text in pair if isinstance(text, str)] if isinstance(pair, (tuple, list)) else []
        if len(texts) != 2 or len(pair) != 2:
            raise DTypeError(f"{what}[{index}] must be two texts, got {shown(pair)}")
        result.append((texts[0], texts[1]))
    return result
