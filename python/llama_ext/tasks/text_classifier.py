"""`TextClassifier`: texts and labels in, a classifier out."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llama_ext._arrays import FloatArray, as_whole
from llama_ext._options import number, shown
from llama_ext.errors import OptionError, ShapeError
from llama_ext.io.hub import resolve
from llama_ext.models.lora import LoRA
from llama_ext.runtime.classifier import LlamaForSequenceClassification, checked_labels
from llama_ext.runtime.loading import read_configs
from llama_ext.runtime.model import LlamaForCausalLM
from llama_ext.tasks.classification_report import ClassificationReport
from llama_ext.tasks.fitting import fit_task
from llama_ext.tasks.labelled_texts import (
    MOST_REPEATS,
    check_label_names,
    count_of,
    listed,
    read_labels,
    repeats,
    texts_and_labels,
)
from llama_ext.tasks.progress import progress
from llama_ext.tasks.task_files import (
    CLASSIFIER_FILE,
    base_of,
    refuse_another_task,
    refuse_loading,
    save_task,
    saying_who_named,
)

if TYPE_CHECKING:
    from llama_ext.training.batches import Example
    from llama_ext.training.history import History

__all__ = ["TextClassifier"]

_IGNORED = -100
# Texts between two signs of progress: what runs at once.
_AT_ONCE = 32

# A label: its name, or its index.
Label = str | int


class TextClassifier:
    """Learns to give texts their labels.

    Args:
        base: A language model, its path or Hub id; or a `LlamaForSequenceClassification`, or the path of one, to go on with.
        labels: The names of the labels; None: those of a classifier.
        seed: Of the head of a new classifier, in [0, 2^64).
        dtype: How a base that is loaded here is kept, as in `from_pretrained`. Training all weights wants "float32" where it is
            quantised; an adapter takes it as it is.
        device, compute, threads: Of a base that is loaded here, as in `from_pretrained`: where and how it computes, and is trained.
            A base that is loaded already has its own.

    Attributes:
        model: The classifier.
        adapter: The name of the adapter that `fit` trains when it is asked to. Where it is loaded it gives the answers, whichever
            adapter of the model is active; before that the active one does.

    Raises:
        OptionError: Labels are no strings, fewer than two, or given twice; a language model without labels; or a base that is
            loaded already, in another way than is asked for.
        FormatError and others: As `LlamaForSequenceClassification.from_pretrained`.
    """

    adapter = "classifier"

    def __init__(
        self,
        base: LlamaForCausalLM | LlamaForSequenceClassification | str | os.PathLike[str],
        labels: Sequence[str] | None = None,
        *,
        seed: int = 0,
        dtype: str = "auto",
        device: str = "cpu",
        compute: str = "auto",
        threads: int | None = None,
    ) -> None:
        self._base = base if isinstance(base, (str, os.PathLike)) else None
        self._has_warned = False
        check_label_names(labels)
        loading: dict[str, Any] = {"dtype": dtype, "device": device, "compute": compute, "threads": threads}
        if isinstance(base, (LlamaForSequenceClassification, LlamaForCausalLM)):
            refuse_loading(base, **loading)
        if isinstance(base, LlamaForSequenceClassification):
            if labels is not None and checked_labels(labels) != base.labels:
                raise OptionError(f"the classifier has the labels {shown(base.labels)}, not {shown(labels)}")
            self.model = base
        elif isinstance(base, LlamaForCausalLM):
            if labels is None:
                raise OptionError("labels=[...] are needed to make a classifier of a language model")
            self.model = LlamaForSequenceClassification.from_base(base, labels, seed=seed)
        else:
            self.model = LlamaForSequenceClassification.from_pretrained(base, labels=labels, seed=seed, **loading)

    @property
    def labels(self) -> list[str]:
        """The names of the labels, by index."""
        return self.model.labels

    def __repr__(self) -> str:
        model = self.model
        adapter = f", adapter {self.adapter!r}" if self.adapter in model.adapters else ""
        return (
            f"<TextClassifier {listed(self.labels)}; {model.num_parameters():,} parameters, {model.dtype}{adapter}; "
            f"{model.device} {model.isa}>"
        )

    def fit(
        self,
        texts: Sequence[str],
        labels: Sequence[Label],
        *,
        adapter: LoRA | None = None,
        epochs: int | None = None,
        lr: float | None = None,
        batch_size: int = 16,
        validation_data: tuple[Sequence[str], Sequence[Label]] | None = None,
        class_weights: Mapping[Label, float] | str | None = None,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> History:
        """Learns from texts and their labels.

        Args:
            texts: The texts.
            labels: A name or an index for each.
            adapter: Train this adapter and the head (the base stays as it is), instead of all weights. After the first call the
                adapter is there, and None goes on with it.
            epochs: How often the data is seen. None: 3 times, or as `max_steps` says.
            lr: The highest learning rate, reached after a tenth of the steps; from there it falls as a cosine. None:
                `llama_ext.training.usual_lr`, which is 1e-3 for small models and adapters, and less for wide models.
            batch_size: Texts of a step.
            validation_data: Texts and labels that are scored after each epoch.
            class_weights: How often a text of each label is seen in an epoch, relative to the others: {label: weight > 0}, where
                labels that are not named have 1; or "balanced": labels with few texts are repeated until all are seen alike.
                Texts are repeated whole times, and the rest is drawn by `seed`.
            seed: Of the order, of dropout and of the adapter, in [0, 2^64).
            options: Further ones of `LlamaForCausalLM.compile`.
            **settings: Further ones of `LlamaForCausalLM.fit`: checkpoint_dir, resume, callbacks, verbose, max_steps, ...

        Returns:
            What happened, step by step.

        Raises:
            DTypeError: The texts are no list of texts.
            ShapeError: There are not as many labels as texts.
            OptionError: A label is unknown, there is no text, an option is out of range or contradicts another one, or an adapter
                would be lost. Nothing is changed then.
            ContextLengthError: A text is longer than the model's context: nothing is cut.
            UnsupportedError: All weights are to be trained and they are quantised: train an adapter.
            NumericError: The loss is not finite.
        """
        indices = self._indices("labels", labels, count_of("texts", texts))
        examples = self._examples(texts, indices)
        if not examples:
            raise OptionError("there is nothing to learn: no text was given")
        order = repeats(indices, self._weights(class_weights, indices), seed)
        validation = None
        if validation_data is not None:
            held_out, answers = texts_and_labels(validation_data)
            count = count_of("validation_data's texts", held_out)
            right = self._indices("validation_data's labels", answers, count)
            validation = self._examples(held_out, right)
        return fit_task(
            self.model,
            self.adapter,
            adapter,
            [examples[index] for index in order],
            validation,
            epochs=epochs,
            lr=lr,
            batch_size=batch_size,
            seed=seed,
            options=options,
            settings=settings,
        )

    def predict(self, texts: Sequence[str], *, verbose: int = 1) -> list[str]:
        """The most likely label of each text.

        Args:
            texts: The texts.
            verbose: 0 shows no progress bar on a terminal.

        Returns:
            Names.

        Warns:
            UserWarning: Once: the head is still random, since nothing was learned or loaded.

        Raises:
            DTypeError, OptionError, ContextLengthError: As `LlamaForSequenceClassification.scores`.
        """
        scores = self._scores(texts, verbose)
        self._warn_if_untrained()
        return [self.labels[int(index)] for index in scores.argmax(axis=1)]

    def predict_proba(self, texts: Sequence[str], *, verbose: int = 1) -> FloatArray:
        """The probability of each label.

        Args:
            texts: The texts.
            verbose: As `predict`.

        Returns:
            (texts, labels) float32, each row sums to 1.

        Warns:
            UserWarning: As `predict`.

        Raises:
            DTypeError, OptionError, ContextLengthError: As `predict`.
        """
        scores = self._scores(texts, verbose)
        self._warn_if_untrained()
        return np.exp(_log_softmax(scores)).astype(np.float32)

    def evaluate(self, texts: Sequence[str], labels: Sequence[Label], *, verbose: int = 1) -> ClassificationReport:
        """How good it is on texts whose labels are known.

        Args:
            texts: The texts.
            labels: A name or an index for each.
            verbose: As `predict`.

        Returns:
            Accuracy, loss, precision, recall and F1 by label and on average, and the confusion matrix.

        Raises:
            ShapeError: There are not as many labels as texts.
            OptionError: A label is unknown, or there is no text.
            DTypeError, ContextLengthError: As `predict`.
        """
        indices = self._indices("labels", labels, count_of("texts", texts))
        if not indices:
            raise OptionError("there is nothing to evaluate: no text was given")
        logp = _log_softmax(self._scores(texts, verbose))
        loss = -math.fsum(logp[range(len(indices)), indices].tolist()) / len(indices)
        return ClassificationReport.from_indices(self.labels, indices, logp.argmax(axis=1).tolist(), loss)

    def save(self, directory: str | os.PathLike[str], *, merge: bool = False) -> None:
        """Writes the classifier.

        Trained whole, or with `merge`, it is a directory that transformers' AutoModelForSequenceClassification loads. Trained as
        an adapter, it is the adapter with its head in PEFT's format, and the labels in classifier.json: small, and to be loaded
        together with its base.

        Args:
            directory: Created if it does not exist. What a classifier or a translator has saved there is replaced.
            merge: Make the adapter a part of the weights first, of this classifier as well.

        Raises:
            UnsupportedError: An adapter is to be merged into quantised weights.
            OptionError: The whole classifier is to be written, and another adapter is active.
            OSError: It cannot be written.
        """
        if merge and self.adapter in self.model.adapters:
            self.model.merge_adapter(self.adapter)
        # A whole model has its labels in its config.
        values = {"labels": self.labels} if self.adapter in self.model.adapters else None
        save_task(self.model, self.adapter, directory, base=self._base, file=CLASSIFIER_FILE, values=values)

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        base: LlamaForCausalLM | LlamaForSequenceClassification | str | os.PathLike[str] | None = None,
        *,
        dtype: str = "auto",
        device: str = "cpu",
        compute: str = "auto",
        threads: int | None = None,
    ) -> TextClassifier:
        """Reads what `save` wrote.

        Args:
            directory: A classifier, or an adapter.
            base: The base of an adapter; None: what its adapter_config.json names.
            dtype, device, compute, threads: See the class.

        Returns:
            The classifier.

        Raises:
            OptionError: An adapter that names no base, and none is given; a language model or a translator; or as the class.
            FormatError, CheckpointError, UnsupportedError, LimitError: A file is malformed or does not fit.
        """
        folder = Path(directory)
        loading: dict[str, Any] = {"dtype": dtype, "device": device, "compute": compute, "threads": threads}
        refuse_another_task(folder, CLASSIFIER_FILE)
        found = base_of(folder, base)
        if found is None:
            if _is_language_model(folder):
                raise OptionError(
                    f"{folder} is a language model, no classifier: TextClassifier(path, labels=[...]).fit makes one of it"
                )
            return cls(folder, **loading)
        labels = read_labels(folder / CLASSIFIER_FILE) if (folder / CLASSIFIER_FILE).exists() else None
        with saying_who_named(folder, base):
            if labels is None and _is_language_model(found):
                raise OptionError(
                    f"{folder} does not name its labels: make a TextClassifier of the base with labels=[...] first"
                )
            result = cls(found, labels, **loading)
        result.model.load_adapter(folder, cls.adapter)
        return result

    def _scores(self, texts: Sequence[str], verbose: int) -> FloatArray:
        # All before any is scored: a text that is too long is told at once.
        rows = self.model.encode(texts)
        adapter = self._own_adapter()
        result = np.zeros((len(rows), len(self.labels)), dtype=np.float32)
        with progress("Classifying", len(rows), shown=bool(verbose)) as advance:
            for first in range(0, len(rows), _AT_ONCE):
                part = rows[first : first + _AT_ONCE]
                result[first : first + len(part)] = self.model._scores(part, adapter)
                advance(len(part))
        return result

    def _own_adapter(self) -> str | None:
        return self.adapter if self.adapter in self.model.adapters else None

    def _warn_if_untrained(self) -> None:
        # Not of `evaluate`: how good chance is, is a fair question.
        if self._has_warned or not self._is_untrained():
            return
        self._has_warned = True
        warnings.warn(
            f"the classifier's head (labels {listed(self.labels)}) is still random, so its predictions mean nothing: train it with "
            "fit, or read a trained one with TextClassifier.load",
            UserWarning,
            stacklevel=3,
        )

    def _is_untrained(self) -> bool:
        name = self._own_adapter()
        head = None if name is None else self.model._loaded(name).head
        if head is None:
            return self.model._is_untrained()
        # Not what the model says, which is about the adapter that is active.
        return self.model._random_head is not None and np.array_equal(head, self.model._random_head)

    # -- labels --------------------------------------------------------------------------------------------------------

    def _examples(self, texts: Sequence[str], indices: Sequence[int]) -> list[Example]:
        """The tokens of each text; the last one's label is the text's."""
        from llama_ext.training.batches import Example

        examples = []
        for row, index in zip(self.model.encode(texts), indices, strict=True):
            labels = np.full(row.size, _IGNORED, dtype=np.int32)
            labels[-1] = index
            examples.append(Example(row, labels))
        return examples

    def _indices(self, what: str, labels: Sequence[Label], texts: int) -> list[int]:
        if isinstance(labels, (str, bytes)) or not isinstance(labels, (Sequence, np.ndarray)):
            raise OptionError(f"{what} must be a list of names or indices, got {type(labels).__name__}")
        if len(labels) != texts:
            raise ShapeError(f"{what}: there are {len(labels)} for {texts} texts, one for each is needed")
        known = {name: index for index, name in enumerate(self.labels)}
        return [self._index(f"{what}[{place}]", label, known) for place, label in enumerate(labels)]

    def _index(self, what: str, label: object, known: Mapping[str, int]) -> int:
        index = known.get(label) if isinstance(label, str) else as_whole(label)
        if index is None or not 0 <= index < len(known):
            names = listed([repr(name) for name in self.labels])
            raise OptionError(f"{what} is {shown(label)}, which is no label: {names}, or an index in [0, {len(known)})")
        return index

    def _weights(self, weights: Mapping[Label, float] | str | None, indices: Sequence[int]) -> npt.NDArray[np.float64]:
        count = np.bincount(indices, minlength=len(self.labels))
        result = np.ones(len(self.labels))
        if weights is None:
            return result
        if isinstance(weights, str):
            if weights != "balanced":
                raise OptionError(f"class_weights must be a mapping or 'balanced', got {shown(weights)}")
            return np.where(count > 0, count.max() / np.maximum(count, 1), 1.0)
        if not isinstance(weights, Mapping):
            raise OptionError(f"class_weights must be a mapping or 'balanced', got {type(weights).__name__}")
        known = {name: index for index, name in enumerate(self.labels)}
        named: dict[int, Label] = {}
        for label, weight in weights.items():
            index = self._index("class_weights: a key", label, known)
            if index in named:
                raise OptionError(
                    f"class_weights: {shown(named[index])} and {shown(label)} are the same label: give it one weight"
                )
            named[index] = label
            result[index] = number(f"class_weights[{shown(label)}]", weight, above=0.0, maximum=MOST_REPEATS)
        return result


def _is_language_model(base: object) -> bool:
    """Whether a base, or the one that a path or Hub id names, has no head of a classifier."""
    if isinstance(base, (str, os.PathLike)):
        return not read_configs(resolve(base))[0].is_classifier
    return isinstance(base, LlamaForCausalLM)


def _log_softmax(scores: FloatArray) -> npt.NDArray[np.float64]:
    wide = scores.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True, initial=-np.inf)
    result: npt.NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return result
