"""What is asked of a model: a prompt, a target, and the target's value for any embeddings in the prompt's place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from llama_ext import _core
from llama_ext._arrays import FloatArray, IntArray, as_whole, token_ids
from llama_ext._options import shown, whole
from llama_ext.errors import ContextLengthError, DTypeError, OptionError, ShapeError, TokenIdError
from llama_ext.runtime.adapted import AdapterChoice
from llama_ext.runtime.classifier import LlamaForSequenceClassification
from llama_ext.runtime.model import LlamaForCausalLM
from llama_ext.runtime.progress import ProgressBar
from llama_ext.runtime.prompts import encode_text
from llama_ext.runtime.scoring import encode_pair

__all__ = ["Advance", "Loaded", "Output", "Question", "Target", "ask", "bar", "loaded"]

F64 = npt.NDArray[np.float64]
Loaded = LlamaForCausalLM | LlamaForSequenceClassification
Output = Literal["logprob", "logit"]
# Gives the embeddings (T, C) of one prompt, by its number.
Prompts = Callable[[int], FloatArray | F64]
Advance = Callable[[int], None]

# Rows that run together where no batch size is given: a pass of the core.
_ROWS = 2048
_OUTPUTS = ("logprob", "logit")


@dataclass(frozen=True)
class Target:
    """What of a model's output is explained.

    Attributes:
        text: How it reads.
        ids: The token, the tokens of a continuation, or the label.
        against: The token or label that it is compared with, or None.
        output: "logprob" or "logit"; of a contrast the difference, which is the same for both.
    """

    text: str
    ids: tuple[int, ...]
    against: int | None
    output: Output

    def __str__(self) -> str:
        return f"{'logit' if self.output == 'logit' else 'log probability'} of {self.text}"


def loaded(model: object) -> Loaded:
    """The model itself, or that of a `TextClassifier`.

    Raises:
        OptionError: It is another thing.
    """
    # By its attribute: tasks are above this package.
    inner = model if isinstance(model, (LlamaForCausalLM, LlamaForSequenceClassification)) else None
    found = getattr(model, "model", None) if inner is None else inner
    if not isinstance(found, (LlamaForCausalLM, LlamaForSequenceClassification)):
        raise OptionError(
            "model must be a LlamaForCausalLM, a LlamaForSequenceClassification or a TextClassifier, got "
            f"{type(model).__name__}"
        )
    return found


@contextlib.contextmanager
def bar(label: str, total: int, unit: str, *, shown: bool) -> Iterator[Advance]:
    """A progress bar on a terminal; gives what is called with how many more are done."""
    if not shown:
        yield lambda amount: None
        return
    with ProgressBar(label, total, unit) as progress:
        yield progress.advance


class Question:
    """A target's value, and its gradient, for any embeddings in a prompt's place; one thread at a time.

    Args:
        core: With separate gate and up.
        adapter: Of all rows, or None.
        ids: (T,) of the prompt.
        tail: Tokens after the prompt, which stay what they are: a continuation without its last one.
        target: What is asked.
        logprobs: Whether values are log probabilities; of a contrast they never are.
        batch_size: Sequences that run together, or None: what fills a pass. On a CPU it changes no bit.
    """

    def __init__(
        self,
        core: _core.Model,
        adapter: _core.Adapter | None,
        ids: IntArray,
        tail: IntArray,
        target: Target,
        *,
        logprobs: bool,
        batch_size: int | None,
    ) -> None:
        self._core = core
        self._adapter = adapter
        self.ids = ids
        self.target = target
        self.tokens = int(ids.size)
        self.embeddings: F64 = _core.embed_tokens(core, ids).astype(np.float64)
        self._tail = (
            _core.embed_tokens(core, tail) if tail.size else np.zeros((0, self.embeddings.shape[1]), np.float32)
        )
        self._length = self.tokens + len(self._tail)
        self._logprobs = logprobs and target.against is None
        last = self.tokens - 1
        if target.against is None:
            self._terms = [(last + place, output, 1.0) for place, output in enumerate(target.ids)]
        else:
            self._terms = [(last, target.ids[0], 1.0), (last, target.against, -1.0)]
        self._batch = max(1, _ROWS // self._length) if batch_size is None else batch_size

    def values(self, count: int, prompts: Prompts, advance: Advance = lambda amount: None) -> F64:
        """The target's values (count,) for the prompts of numbers 0 .. count - 1."""
        found = [self._run(first, last, prompts, differentiate=False)[0] for first, last in self._parts(count, advance)]
        return np.concatenate(found) if found else np.zeros(0)

    def gradients(
        self, count: int, prompts: Prompts, advance: Advance = lambda amount: None
    ) -> Iterator[tuple[int, F64]]:
        """The gradient (T, C) of each prompt, with its number, in order."""
        for first, last in self._parts(count, advance):
            gradients = self._run(first, last, prompts, differentiate=True)[1]
            for index in range(first, last):
                yield index, gradients[index - first, : self.tokens].astype(np.float64)

    def value(self, prompt: FloatArray | F64) -> float:
        """The target's value for one prompt (T, C)."""
        return float(self.values(1, lambda index: prompt)[0])

    def _parts(self, count: int, advance: Advance) -> Iterator[tuple[int, int]]:
        for first in range(0, count, self._batch):
            last = min(first + self._batch, count)
            yield first, last
            advance(last - first)

    def _run(self, first: int, last: int, prompts: Prompts, *, differentiate: bool) -> tuple[F64, FloatArray]:
        count, length = last - first, self._length
        rows = np.empty((count, length, self.embeddings.shape[1]), np.float32)
        for index in range(count):
            rows[index, : self.tokens] = prompts(first + index)
            rows[index, self.tokens :] = self._tail
        places, outputs, weights = (list(each) for each in zip(*self._terms, strict=True))
        values, gradients = _core.input_gradients(
            self._core,
            rows.reshape(count * length, -1),
            np.full(count, length, np.int64),
            (np.array(places, np.int64) + length * np.arange(count)[:, None]).reshape(-1),
            np.tile(np.array(outputs, np.int32), count),
            np.tile(np.array(weights, np.float64), count),
            logprobs=self._logprobs,
            adapter=self._adapter,
            differentiate=differentiate,
        )
        sums: F64 = (values.reshape(count, -1) * np.array(weights)).sum(axis=1)
        return sums, rows[:0] if gradients is None else gradients.reshape(rows.shape)


@contextlib.contextmanager
def ask(
    model: Loaded,
    text: object,
    target: object,
    *,
    output: object,
    adapter: AdapterChoice,
    batch_size: object,
    what: str,
) -> Iterator[Question]:
    """A question to a model, whose weights stay what they are meanwhile.

    Args:
        model: Becomes one with separate gate and up, as for an adapter.
        text: A text or token ids.
        target: See `attribute`.
        output: "logprob" or "logit".
        adapter: As `generate`.
        batch_size: See `Question`.
        what: Who asks, for messages.

    Raises:
        OptionError, DTypeError, TokenIdError, ContextLengthError, OutOfMemoryError: See `attribute`.
    """
    if output not in _OUTPUTS:
        raise OptionError(f"{what}: output must be one of {', '.join(_OUTPUTS)}, got {shown(output)}")
    kind: Output = "logit" if output == "logit" else "logprob"
    size = None if batch_size is None else whole(f"{what}: batch_size", batch_size, 1)
    chosen = model._chosen(adapter, 1)[0]
    _separate(model)
    with contextlib.ExitStack() as stack:
        if isinstance(model, LlamaForSequenceClassification):
            stack.enter_context(_with_head(model, None if chosen is None else chosen.head))
            ids, found = _of_classifier(model, text, target, kind, None if chosen is None else chosen.core, what)
        else:
            ids, found = _of_language_model(model, text, target, kind, None if chosen is None else chosen.core, what)
        tail = np.array(found.ids[:-1], np.int32)
        context = model.config.max_position_embeddings
        if ids.size + tail.size > context:
            raise ContextLengthError(
                f"{what}: the text has {ids.size} tokens{f' and the target {tail.size + 1}' if tail.size else ''}, the "
                f"model's context is {context}. Give a shorter text: nothing is cut"
            )
        if kind == "logit" and tail.size:
            raise OptionError(
                f"{what}: a continuation of {tail.size + 1} tokens has a log probability and no logit: leave output at 'logprob'"
            )
        yield Question(
            model._core,
            None if chosen is None else chosen.core,
            ids,
            tail,
            found,
            logprobs=kind == "logprob",
            batch_size=size,
        )


def _separate(model: Loaded) -> None:
    """Gives a model gate and up as matrices of their own, as training and adapters need them. Sessions keep what they have."""
    if model._core.separate_gate_up:
        return
    # Held by itself: a training run takes this one first and a classifier's own lock second.
    with model._training_turn:
        if not model._core.separate_gate_up:
            model._core = model._core.converted(model._core.types(), True)


@contextlib.contextmanager
def _with_head(model: LlamaForSequenceClassification, head: FloatArray | None) -> Iterator[None]:
    """Has an adapter's head in the core; others wait."""
    with model._one_at_a_time:
        trained = model._keep_trained_head()
        try:
            model._use_head(head)
            yield
        finally:
            model._use_head(trained)


def _prompt_ids(model: Loaded, text: object, what: str) -> IntArray:
    if isinstance(text, str):
        if not text:
            raise OptionError(f"{what}: the text is empty: give at least one character")
        ids = encode_text(text, model.tokenizer, model.bos_token_id, model.config.vocab_size, what=f"{what}: the text")
    else:
        ids = token_ids(f"{what}: the text", text, model.config.vocab_size)
    if ids.size == 0:
        raise ShapeError(f"{what}: the text has no tokens: give at least one, for example the BOS token")
    return ids


def _most_likely(model: Loaded, ids: IntArray, adapter: _core.Adapter | None, what: str) -> int:
    context = model.config.max_position_embeddings
    if ids.size > context:
        raise ContextLengthError(
            f"{what}: the text has {ids.size} tokens, the model's context is {context}. Give a shorter text: nothing is cut"
        )
    return int(model._core.logits([ids], [] if adapter is None else [adapter], "last")[0].argmax())


def _of_classifier(
    model: LlamaForSequenceClassification,
    text: object,
    target: object,
    output: Output,
    adapter: _core.Adapter | None,
    what: str,
) -> tuple[IntArray, Target]:
    ids = _prompt_ids(model, text, what)
    labels = model.labels

    def index(label: object) -> int:
        number = labels.index(label) if isinstance(label, str) and label in labels else as_whole(label)
        if number is None or not 0 <= number < len(labels):
            names = shown(labels)
            raise OptionError(f"{what}: target {shown(label)} is no label: {names}, or an index in [0, {len(labels)})")
        return number

    if target is None:
        target = _most_likely(model, ids, adapter, what)
    if isinstance(target, tuple):
        first, second = (index(each) for each in _pair(target, what))
        _require_contrast(first, second, target, what)
        return ids, Target(f"{labels[first]!r} rather than {labels[second]!r}", (first,), second, output)
    number = index(target)
    return ids, Target(repr(labels[number]), (number,), None, output)


def _pair(target: tuple[object, ...], what: str) -> tuple[object, object]:
    if len(target) != 2:
        raise OptionError(
            f"{what}: a tuple is a contrast, (this, rather than that), and must have 2 members, got {len(target)}; "
            "a continuation is a list"
        )
    return target[0], target[1]


def _require_contrast(first: int, second: int, target: tuple[object, ...], what: str) -> None:
    if first == second:
        raise OptionError(
            f"{what}: a contrast is of two that differ, and {shown(target)} names one twice: nothing speaks for it rather than for itself"
        )


def _of_language_model(
    model: LlamaForCausalLM, text: object, target: object, output: Output, adapter: _core.Adapter | None, what: str
) -> tuple[IntArray, Target]:
    vocabulary = model.config.vocab_size

    def reading(wanted: object) -> tuple[IntArray, IntArray]:
        """The prompt and what follows it."""
        if isinstance(wanted, str):
            if not wanted:
                raise OptionError(f"{what}: target is an empty text, and must have at least one token")
            if isinstance(text, str):
                _prompt_ids(model, text, what)
                tokens, first = encode_pair(model.tokenizer, model.bos_token_id, vocabulary, text, wanted, what=what)
                return tokens[:first], tokens[first:]
            if model.tokenizer is None:
                raise OptionError(f"{what}: target is a text, and this model has no tokenizer: give token ids")
            following = model.tokenizer.encode(wanted, add_special_tokens=False)
            return _prompt_ids(model, text, what), token_ids(f"{what}: target", following, vocabulary)
        number = as_whole(wanted)
        if number is not None:
            if not 0 <= number < vocabulary:
                raise TokenIdError(f"{what}: target {shown(number)} is no token id: those are in [0, {vocabulary})")
            return _prompt_ids(model, text, what), np.array([number], np.int32)
        if isinstance(wanted, (bool, bytes)) or not isinstance(wanted, (Sequence, np.ndarray)):
            raise DTypeError(
                f"{what}: target must be a text, a token id, a list of ids, a tuple of two, or None, got {type(wanted).__name__}"
            )
        return _prompt_ids(model, text, what), token_ids(f"{what}: target", wanted, vocabulary)

    def name(ids: IntArray) -> str:
        if model.tokenizer is None:
            return f"token {int(ids[0])}" if ids.size == 1 else f"tokens {ids.tolist()}"
        return repr(model.tokenizer.decode(ids, skip_special_tokens=False))

    if target is None:
        ids = _prompt_ids(model, text, what)
        found = np.array([_most_likely(model, ids, adapter, what)], np.int32)
        return ids, Target(name(found), (int(found[0]),), None, output)
    if isinstance(target, tuple):
        (ids, first), (other_ids, second) = (reading(each) for each in _pair(target, what))
        if first.size != 1 or second.size != 1 or not np.array_equal(ids, other_ids):
            raise OptionError(
                f"{what}: a contrast is of two tokens that may come next, and {shown(target)} are {first.size} and "
                f"{second.size} tokens after this text. Give the ids of tokens"
            )
        _require_contrast(int(first[0]), int(second[0]), target, what)
        return ids, Target(f"{name(first)} rather than {name(second)}", (int(first[0]),), int(second[0]), output)
    ids, following = reading(target)
    if following.size == 0:
        raise OptionError(f"{what}: target has no token")
    return ids, Target(name(following), tuple(following.tolist()), None, output)
