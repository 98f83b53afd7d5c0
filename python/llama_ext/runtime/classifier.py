"""`LlamaForSequenceClassification`: a Llama that scores each text for each of its labels."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from llama_ext import _core
from llama_ext._arrays import Array, FloatArray, IntArray, check_token_range
from llama_ext._options import keyword_options, refuse_unknown, shown, whole_seed
from llama_ext.errors import ContextLengthError, DTypeError, OptionError
from llama_ext.limits import DEFAULT_LIMITS, Limits
from llama_ext.models.config import LlamaConfig
from llama_ext.models.llama import CLASSIFIER_HEAD
from llama_ext.runtime import loading
from llama_ext.runtime.adapted import AdapterChoice, LoadedAdapter
from llama_ext.runtime.loaded_model import LoadedModel
from llama_ext.runtime.logits import id_block
from llama_ext.runtime.model_files import ModelFiles
from llama_ext.runtime.packed_files import PackedFiles
from llama_ext.runtime.prompts import encode_text, read_mask
from llama_ext.runtime.weight_types import WeightType

if TYPE_CHECKING:
    from llama_ext.runtime.model import LlamaForCausalLM

__all__ = ["LlamaForSequenceClassification", "checked_labels"]

# Sequences that run at once in `predict`.
_BATCH = 32
# How a head is kept: it is trained together with adapters, whatever the base's weights are.
_HEAD: WeightType = ("float32", 0)


class LlamaForSequenceClassification(LoadedModel):
    """A Llama with a score for each label, at the last token of a text; transformers' class of the same name.

    Made by `from_pretrained` or `from_base`. Results do not depend on what else is in a batch. The head is float32. An adapter
    brings its own, which takes the place of the base's while its rows run: one call at a time computes, others wait.
    """

    _base_head: FloatArray | None  # while the core has an adapter's; else None
    _one_at_a_time: threading.RLock
    _random_head: FloatArray | None  # the base's as it was drawn; None: it was read from a file
    _trained: str | None  # the adapter whose head in the core is being trained

    def _prepare(self, *args: Any, **options: Any) -> None:
        super()._prepare(*args, **options)
        self._base_head = None
        self._random_head = None
        self._one_at_a_time = threading.RLock()
        self._trained = None

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike[str],
        *,
        labels: Sequence[str] | None = None,
        seed: int = 0,
        dtype: str = "auto",
        group_size: int | None = None,
        symmetric: bool | None = None,
        device: str = "cpu",
        compute: str = "auto",
        threads: int | None = None,
        revision: str | None = None,
        limits: Limits = DEFAULT_LIMITS,
        **unknown: NoReturn,
    ) -> LlamaForSequenceClassification:
        """Loads a classifier, or a language model that is to become one.

        Args:
            path_or_hub_id: As `LlamaForCausalLM.from_pretrained`.
            labels: The names of the labels by index, for a language model, whose head then is random; a classifier has its own.
            seed: Of the random head, in [0, 2^64).
            dtype, group_size, symmetric, device, compute, threads, revision, limits: As `LlamaForCausalLM.from_pretrained`. The head
                stays float32.

        Returns:
            The classifier.

        Raises:
            OptionError: A language model without labels, other labels than a classifier's, or as `LlamaForCausalLM`.
            FormatError, CheckpointError, UnsupportedError, LimitError, NumericError, DeviceError, OutOfMemoryError: As
                `LlamaForCausalLM`.
        """
        refuse_unknown(unknown, keyword_options(cls.from_pretrained))
        if not isinstance(path_or_hub_id, (str, os.PathLike)):
            raise OptionError(f"from_pretrained takes a path or a Hub id, got {type(path_or_hub_id).__name__}")
        options: dict[str, Any] = {"device": device, "compute": compute, "threads": threads, "kv_dtype": "auto"}
        with loading.open_model(path_or_hub_id, revision=revision, limits=limits) as files:
            model = cls.__new__(cls)
            is_classifier = files.config.is_classifier
            config = _config(files, None if labels is None else checked_labels(labels))
            types = files.types(dtype, group_size, symmetric)
            if isinstance(files, PackedFiles) and not is_classifier and types == files.stored_types():
                # Codes stay what they are when they are copied as codes.
                from llama_ext.runtime.model import LlamaForCausalLM

                base = LlamaForCausalLM.from_pretrained(
                    files.path, device=device, compute=compute, threads=threads, limits=limits
                )
                return cls.from_base(base, config.labels or [], seed=seed)
            types = {**types, "head": types.get("head", _HEAD) if is_classifier else _HEAD}
            with files.named_in_errors():
                # Packed matrices are used where they lie, all of them or none: a new head is not among them.
                model._prepare(
                    config,
                    files.tokenizer,
                    files.generation_defaults,
                    types=types,
                    files=files if is_classifier else None,
                    **options,
                )
                if not is_classifier:
                    model._random_head = _load_head(model._core, config, seed)
                    files.tensors = [tensor for tensor in files.tensors if tensor.slot != "head"]
            files.load_into(model._core)
        return model

    @classmethod
    def from_base(
        cls, base: LlamaForCausalLM, labels: Sequence[str], *, seed: int = 0
    ) -> LlamaForSequenceClassification:
        """A classifier with the weights of a language model, and a random head.

        Args:
            base: The language model; its weights are copied.
            labels: The names of the labels, by index.
            seed: Of the head, in [0, 2^64): normal with the config's initializer_range.

        Returns:
            The classifier, of the same dtype.

        Raises:
            OptionError: Labels are no names, fewer than two, or given twice; or an adapter of the base is active.
            OutOfMemoryError: They do not fit into memory.
        """
        base._refuse_active("a classifier is made of the base alone", "delete_adapter forgets it")
        config = base.config.as_classifier(checked_labels(labels))
        source, types = base._core, dict(base._core.types())
        types["head"] = _HEAD
        model = cls.__new__(cls)
        options: dict[str, Any] = {
            "device": base.device,
            "compute": base.compute,
            "threads": base.threads,
            "kv_dtype": "auto",
        }
        model._prepare(config, base.tokenizer, base.generation_defaults, types=types, **options)
        model._random_head = _load_head(model._core, config, seed)
        missing = set(model._core.missing())
        for slot, _, _ in source.slots():
            if slot in missing:
                model._core.copy_from(source, slot)
        return model

    @property
    def labels(self) -> list[str]:
        """The names of the labels, by index."""
        return self.config.labels or [f"LABEL_{index}" for index in range(self.config.num_labels)]

    @property
    def num_labels(self) -> int:
        """How many labels there are."""
        return self.config.num_labels

    def __call__(
        self,
        input_ids: npt.NDArray[np.integer[Any]] | Sequence[Sequence[int]],
        attention_mask: object = None,
        adapter: AdapterChoice = None,
    ) -> FloatArray:
        """The scores of each row.

        A row's last token is, as in transformers, the rightmost one that is not the config's `pad_token_id`, whatever the mask
        is; where the config has none, it is the last one of the mask. What comes after it does not count.

        Args:
            input_ids: (B, T) integers, each in [0, V) where the mask is 1.
            attention_mask: (B, T), 1 for a token and 0 for padding, on the left or the right; each row one run of ones.
            adapter: The name of an adapter, or a list with a name or None (the base) for each row; None: the active one.

        Returns:
            (B, labels) float32, not normalised.

        Raises:
            ShapeError: `input_ids` does not have two dimensions, or the mask another shape.
            DTypeError: The ids are not integers.
            OptionError: A row of the mask is not one run of ones, a row has no token, or there is no such adapter.
            TokenIdError: An id outside the vocabulary.
            ContextLengthError: A row is longer than the model's context.
            NumericError: A score is not finite.
        """
        ids = id_block(input_ids)
        if ids.size == 0:
            if len(ids):
                raise OptionError(f"input_ids[0] has no token, got shape {ids.shape}")
            return np.zeros((0, self.num_labels), dtype=np.float32)
        ones = read_mask(attention_mask, ids.shape)
        check_token_range("input_ids", ids, self.config.vocab_size, ones)
        return self._scores(self._pooled(ids, ones), adapter)

    def scores(self, texts: Sequence[str] | Sequence[Sequence[int]], adapter: AdapterChoice = None) -> FloatArray:
        """The scores of texts, at the last token of each.

        Args:
            texts: Texts, or lists of token ids of any lengths.
            adapter: As `__call__`.

        Returns:
            (B, labels) float32, not normalised.

        Raises:
            OptionError: A text without a tokenizer, an empty one without a BOS token, or there is no such adapter.
            DTypeError, TokenIdError, ContextLengthError, NumericError: As `__call__`.
        """
        return self._scores(self.encode(texts), adapter)

    def predict(self, texts: Sequence[str] | Sequence[Sequence[int]], adapter: AdapterChoice = None) -> list[str]:
        """The most likely label of each text. Arguments and errors: as `scores`."""
        names = self.labels
        return [names[int(index)] for index in self.scores(texts, adapter).argmax(axis=1)]

    def encode(self, texts: Sequence[str] | Sequence[Sequence[int]]) -> list[IntArray]:
        """Texts as rows of token ids.

        Raises:
            DTypeError, OptionError, TokenIdError: As `scores`.
            ContextLengthError: A text is longer than the model's context: nothing is cut.
        """
        if isinstance(texts, (str, bytes)) or not isinstance(texts, (Sequence, np.ndarray)):
            raise DTypeError(f"texts must be a list of texts, got {type(texts).__name__}")
        rows = []
        for index, text in enumerate(texts):
            what = f"texts[{index}]"
            if isinstance(text, str):
                row = encode_text(text, self.tokenizer, self.bos_token_id, self.config.vocab_size, what=what)
            else:
                row = _ids(what, text, self.config.vocab_size)
            self._check_length(what, row.size)
            rows.append(row)
        return rows

    def _scores(self, rows: Sequence[IntArray], adapter: AdapterChoice) -> FloatArray:
        result = np.zeros((len(rows), self.num_labels), dtype=np.float32)
        with self._one_at_a_time:
            # A callback of a run of training asks, too: the head that is trained is in the core, and goes back there.
            trained = self._keep_trained_head()
            adapters = self._chosen(adapter, len(rows))
            # Rows by head: few of a batch have different ones.
            groups: dict[int, tuple[FloatArray | None, list[int]]] = {}
            for index, each in enumerate(adapters):
                head = None if each is None else each.head
                groups.setdefault(id(head), (head, []))[1].append(index)
            try:
                for head, indices in groups.values():
                    self._use_head(head)
                    self._run(rows, adapters, indices, result)
            finally:
                self._use_head(trained)
        return result

    def _run(
        self,
        rows: Sequence[IntArray],
        adapters: Sequence[LoadedAdapter | None],
        indices: Sequence[int],
        result: FloatArray,
    ) -> None:
        for first in range(0, len(indices), _BATCH):
            part = indices[first : first + _BATCH]
            chosen = [adapters[index] for index in part]
            cores = [None if each is None else each.core for each in chosen] if any(chosen) else []
            found = self._core.logits([rows[index] for index in part], cores, "last")
            result[part] = np.concatenate([each.reshape(1, -1) for each in found])

    def _is_untrained(self) -> bool:
        """Whether the head of the active adapter, or the base's, is still as it was drawn.

        Told by its values: training, merging an adapter and forgetting one change the head in use, each in its own way.
        """
        if self._random_head is None:
            return False
        with self._one_at_a_time:
            adapter = None if self.active_adapter is None else self._loaded(self.active_adapter)
            if adapter is not None and adapter.head is not None:
                head = adapter.head
            else:
                head = self._core.read("head") if self._base_head is None else self._base_head
            return np.array_equal(head, self._random_head)

    @contextlib.contextmanager
    def _training_head_of(self, name: str) -> Iterator[None]:
        """Has the head of an adapter in the core while it is trained there; the base's comes back afterwards."""
        with self._one_at_a_time:
            head = self._loaded(name).head
            self._use_head(np.array(self._core.read("head"), dtype=np.float32) if head is None else head)
            self._trained = name
            try:
                yield
            finally:
                self._keep_trained_head()
                self._trained = None
                self._use_head(None)

    def _keep_trained_head(self) -> FloatArray | None:
        """Keeps the head as it is now with the adapter that is being trained, if one is."""
        if self._trained is None:
            return None
        head = np.array(self._core.read("head"), dtype=np.float32)
        self._adapters[self._trained] = self._adapters[self._trained]._replace(head=head)
        return head

    def _use_head(self, head: FloatArray | None) -> None:
        """Puts an adapter's head into the core, or, for None, the base's back."""
        if head is None:
            if self._base_head is not None:
                self._core.load("head", self._base_head, "float32")
                self._base_head = None
            return
        if self._base_head is None:
            self._base_head = np.array(self._core.read("head"), dtype=np.float32)
        self._core.load("head", head, "float32")

    def _pooled(self, ids: Array, ones: npt.NDArray[np.bool_]) -> list[IntArray]:
        pad = self.config.pad_token_id
        rows = []
        for index, (row, keep) in enumerate(zip(ids, ones, strict=True)):
            places = np.flatnonzero(keep)
            end = int(places[-1]) + 1
            if pad is not None:
                real = np.flatnonzero(row != pad)
                # transformers takes position 0 of a row of nothing but padding.
                end = int(real[-1]) + 1 if real.size else 1
            begin = int(places[0])
            if end <= begin or end > int(places[-1]) + 1:
                raise OptionError(
                    f"input_ids[{index}]: the last token that is not pad_token_id={pad} is outside the attention_mask"
                )
            self._check_length(f"input_ids[{index}]", end - begin)
            rows.append(np.ascontiguousarray(row[begin:end], dtype=np.int32))
        return rows

    def _check_length(self, what: str, tokens: int) -> None:
        context = self.config.max_position_embeddings
        if tokens > context:
            raise ContextLengthError(f"{what} has {tokens} tokens, the model's context is {context}: nothing is cut")

    def __repr__(self) -> str:
        config = self.config
        return (
            f"<LlamaForSequenceClassification {config.num_labels} labels, {config.num_hidden_layers} layers, width "
            f"{config.hidden_size}; {self.num_parameters():,} parameters, {self.dtype}, {self.nbytes / 2**20:.1f} MiB; "
            f"{self.device} {self.isa}>"
        )


def checked_labels(labels: object) -> list[str]:
    """Names of labels: at least two, none of them twice.

    Raises:
        OptionError: They are not.
    """
    names = list(labels) if isinstance(labels, Sequence) and not isinstance(labels, (str, bytes)) else []
    if len(names) < 2 or not all(isinstance(name, str) and name for name in names):
        raise OptionError(f"labels must be a list of at least two names, got {shown(labels)}")
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise OptionError(f"labels must differ: {twice!r} is there twice")
    return names


def _config(files: ModelFiles, labels: list[str] | None) -> LlamaConfig:
    """The classifier's, of a classifier's files or of a language model's."""
    if not files.config.is_classifier:
        if labels is None:
            raise OptionError(f"{files.path} is a language model: pass labels=[...] to make a classifier of it")
        return files.config.as_classifier(labels)
    own = files.config.labels
    if labels is None:
        return files.config
    if own is not None and own != labels and own != [f"LABEL_{index}" for index in range(len(labels))]:
        raise OptionError(f"{files.path} has the labels {shown(own)}, not {shown(labels)}: leave labels out")
    if files.config.num_labels != len(labels):
        raise OptionError(f"{files.path} has {files.config.num_labels} labels, got {len(labels)}")
    return files.config.as_classifier(labels)


def _load_head(core: _core.Model, config: LlamaConfig, seed: int) -> FloatArray:
    number = whole_seed(seed)
    # As `loading.load_random`: a stream for each tensor.
    key = int.from_bytes(hashlib.sha256(f"{number}/{CLASSIFIER_HEAD}".encode()).digest()[:16], "little")
    values = np.random.Generator(np.random.Philox(key=key)).standard_normal(
        (config.num_labels, config.hidden_size), dtype=np.float32
    )
    head: FloatArray = values * np.float32(config.initializer_range)
    core.load("head", head, "float32")
    return head


def _ids(what: str, values: object, vocabulary: int) -> IntArray:
    from llama_ext._arrays import token_ids

    row = token_ids(what, values, vocabulary)
    if row.size == 0:
        raise OptionError(f"{what} has no token")
    return row
