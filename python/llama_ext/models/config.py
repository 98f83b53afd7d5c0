"""`LlamaConfig`: the numbers that define a Llama, as Hugging Face's config.json has them, every one checked."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_ext._options import shown
from llama_ext.errors import FormatError, OptionError
from llama_ext.io.atomic import atomic_write, made_folder
from llama_ext.io.hub import resolve_small_files
from llama_ext.io.json_file import read_json_object
from llama_ext.limits import DEFAULT_LIMITS, Limits
from llama_ext.models.fields import LEAST_EPS, FieldReader
from llama_ext.models.rope_parameters import RopeParameters, read_rope
from llama_ext.models.unsupported_keys import refuse_unimplemented

__all__ = ["LlamaConfig", "RopeParameters"]

_ACTIVATIONS = ("silu", "swish")

# What the architectures of a classifier say; anything else is a language model.
_CLASSIFIER = "LlamaForSequenceClassification"

# Top-level keys that are read into `rope_parameters` and written back from it.
_ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings")


@dataclasses.dataclass(frozen=True, init=False, repr=True)
class LlamaConfig:
    """The shape of a Llama and the facts that travel with it, under Hugging Face's names and defaults.

    A config does not change after it was made; `dataclasses.replace(config, ...)` makes another one, checked again.

    Args:
        vocab_size: V.
        hidden_size: C.
        intermediate_size: F.
        num_hidden_layers: Blocks.
        num_attention_heads: H.
        num_key_value_heads: K, divides H. None: H.
        head_dim: D, even. None: hidden_size / num_attention_heads.
        hidden_act: silu | swish, two names of one function.
        max_position_embeddings: Positions the model was made for.
        initializer_range: Standard deviation of random weights.
        rms_norm_eps: Added to the mean square, > 0.
        bos_token_id: The id that begins a text, or None.
        eos_token_id: The id or ids that end one, or None.
        pad_token_id: The id that fills up a batch, or None.
        tie_word_embeddings: Whether the embedding table is also the output head.
        attention_bias: Whether the projections q, k, v, o have biases.
        mlp_bias: Whether gate, up, down have biases.
        rope_parameters: A `RopeParameters` or transformers 5's dictionary. None: unscaled, base 10,000.
        rope_theta: transformers 4's spelling of the base.
        rope_scaling: transformers 4's spelling of the scaling.
        dtype: float32 | bfloat16 | float16 | ...: what the weights were saved as, a hint. None: unknown.
        torch_dtype: transformers 4's spelling of `dtype`.
        architectures: Names of transformers' classes.
        model_type: A key of `llama_ext.models.ARCHITECTURES`.
        extra: Other keys of config.json (id2label, attention_dropout, ...), kept and written back.
        limits: The bounds.

    Raises:
        OptionError: A value is of the wrong type, out of range, or contradicts another one.
        LimitError: A value is beyond the limits.
        UnsupportedError: A model_type, hidden_act, rope_type or key that is not supported.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    max_position_embeddings: int
    initializer_range: float
    rms_norm_eps: float
    bos_token_id: int | None
    eos_token_id: int | list[int] | None = dataclasses.field(hash=False)
    pad_token_id: int | None
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    rope_parameters: RopeParameters
    dtype: str | None
    architectures: list[str] = dataclasses.field(hash=False)
    model_type: str
    extra: dict[str, Any] = dataclasses.field(hash=False)

    def __init__(
        self,
        *,
        vocab_size: int = 32000,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        pad_token_id: int | None = None,
        tie_word_embeddings: bool = False,
        attention_bias: bool = False,
        mlp_bias: bool = False,
        rope_parameters: RopeParameters | Mapping[str, Any] | None = None,
        rope_theta: float | None = None,
        rope_scaling: Mapping[str, Any] | None = None,
        dtype: str | None = None,
        torch_dtype: str | None = None,
        architectures: list[str] | None = None,
        model_type: str = "llama",
        extra: Mapping[str, Any] | None = None,
        limits: Limits = DEFAULT_LIMITS,
        **unknown: Any,
    ) -> None:
        given = dict(locals())
        for name in ("self", "extra", "limits", "unknown"):
            del given[name]
        for name in unknown:
            near = difflib.get_close_matches(name, list(given), n=1)
            advice = f"Did you mean {near[0]}?" if near else "Pass it in extra={...} if it only has to be kept."
            raise OptionError(f"LlamaConfig has no argument {name!r}. {advice}")
        for name in extra or {}:
            if name in given:
                raise OptionError(f"LlamaConfig: {name!r} is an argument of its own, not a key of extra.")
        self._assign(FieldReader({**(extra or {}), **given}, from_file=False, limits=limits))

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], *, path: str | None = None, limits: Limits = DEFAULT_LIMITS
    ) -> LlamaConfig:
        """Makes a config of what config.json holds, in the spelling of transformers 4 or 5.

        Args:
            values: The object in config.json.
            path: The file, for messages.
            limits: The bounds.

        Returns:
            The config; keys that it has no field for are in `extra`.

        Raises:
            FormatError: A value is of the wrong type, out of range, or contradicts another one.
            LimitError: A value is beyond the limits.
            UnsupportedError: A model_type, hidden_act, rope_type or key that is not supported.
        """
        config = cls.__new__(cls)
        config._assign(FieldReader(values, path=path, limits=limits))
        return config

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], *, revision: str | None = None, limits: Limits = DEFAULT_LIMITS
    ) -> LlamaConfig:
        """Reads config.json.

        Args:
            path: A checkpoint's directory, or the file itself; "demo" or a Hub id, as for `LlamaForCausalLM`.
            revision: Of the Hub: a branch, tag or commit.
            limits: The bounds.

        Returns:
            The config.

        Raises:
            FormatError: The file is missing or malformed, or as for `from_dict`.
            LimitError: The file is too large, or as for `from_dict`.
            OptionError: A revision of something that is not on the Hub.
            UnsupportedError: A Hub id, and huggingface_hub is not installed; or as for `from_dict`.
        """
        if not os.fspath(path):
            raise FormatError("the path of a model's config.json is empty. Expected its directory, or the file.")
        file = resolve_small_files(path, revision)
        if os.path.isdir(file):
            file = file / "config.json"
        return cls.from_dict(
            read_json_object(file, what="a model's config.json", limits=limits), path=str(file), limits=limits
        )

    def to_dict(self) -> dict[str, Any]:
        """The object for config.json, which transformers 4 and 5 read alike.

        The rotation is written in both spellings, `rope_theta` with `rope_scaling` (4) and `rope_parameters` (5), and
        so is the dtype: each version ignores or agrees with the other's. Scalings younger than a release are, in any
        spelling, refused by it: llama3 needs 4.43.

        Returns:
            JSON values, not shared with this config.
        """
        result = copy.deepcopy(self.extra)
        for field in dataclasses.fields(self):
            if field.name not in ("extra", "rope_parameters", "dtype"):
                result[field.name] = copy.deepcopy(getattr(self, field.name))
        if self.dtype is not None:
            result["dtype"] = result["torch_dtype"] = self.dtype
        result["rope_theta"] = self.rope_parameters.rope_theta
        result["rope_scaling"] = self.rope_parameters.to_rope_scaling()
        result["rope_parameters"] = self.rope_parameters.to_dict()
        return result

    def to_json(self) -> str:
        """The text of config.json.

        Returns:
            `to_dict` with its keys in order, indented.

        Raises:
            OptionError: `extra` holds something that JSON cannot.
        """
        try:
            return json.dumps(self.to_dict(), indent=2, sort_keys=True, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise OptionError(f"LlamaConfig.extra cannot be written as JSON: {error}.") from error

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Writes config.json, whole or not at all.

        Args:
            directory: Created when it does not exist.

        Returns:
            The path of the file.

        Raises:
            OptionError: `extra` holds something that JSON cannot.
            OSError: The directory cannot be written.
        """
        text = self.to_json()
        path = made_folder(directory) / "config.json"
        with atomic_write(path) as file:
            file.write(text.encode("utf-8"))
        return path

    @property
    def rope_theta(self) -> float:
        """The base of the rotation."""
        return self.rope_parameters.rope_theta

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a text, none, one or several."""
        ids = self.eos_token_id
        return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)

    @property
    def labels(self) -> list[str] | None:
        """A classifier's labels by index, from `id2label`; None when the config has none.

        Raises:
            FormatError: `id2label` does not name each of 0 .. n-1 once.
        """
        names = self.extra.get("id2label")
        if names is None:
            return None
        # JSON has text keys only; a config made in Python may have integers.
        by_id = {str(key): value for key, value in names.items()} if isinstance(names, Mapping) else {}
        result = [by_id.get(str(index)) for index in range(len(by_id))]
        if not result or not all(isinstance(name, str) for name in result):
            expected = "an object that names each label's index, 0 to n-1"
            message = f"id2label must be {expected}, got {shown(names)}."
            raise FormatError(message, field="id2label", expected=expected, got=shown(names))
        return [str(name) for name in result]

    @property
    def is_classifier(self) -> bool:
        """Whether it is a LlamaForSequenceClassification."""
        return self.architectures[:1] == [_CLASSIFIER]

    @property
    def num_labels(self) -> int:
        """How many labels a classifier has; transformers leaves them out of config.json when there are two without names.

        Raises:
            FormatError: As `labels`.
        """
        labels = self.labels
        return 2 if labels is None else len(labels)

    def as_classifier(self, labels: list[str]) -> LlamaConfig:
        """The config of a classifier on this model.

        Args:
            labels: The names of its labels, by index.

        Returns:
            A config with `architectures`, `id2label` and `label2id` of these.
        """
        extra = {name: value for name, value in self.extra.items() if name not in ("num_labels", "problem_type")}
        extra["id2label"] = {str(index): label for index, label in enumerate(labels)}
        extra["label2id"] = {label: index for index, label in enumerate(labels)}
        # A copy that is not checked again: it may have been read with larger limits than the default ones.
        config = copy.copy(self)
        object.__setattr__(config, "extra", extra)
        object.__setattr__(config, "architectures", [_CLASSIFIER])
        return config

    def _assign(self, reader: FieldReader) -> None:
        for name, value in _checked(reader).items():
            object.__setattr__(self, name, value)


def _checked(reader: FieldReader) -> dict[str, Any]:
    """The attributes of LlamaConfig from the fields of config.json."""
    result: dict[str, Any] = {"model_type": _model_type(reader)}
    _shape(reader, result)
    refuse_unimplemented(reader, result["head_dim"])
    result["rope_parameters"] = read_rope(reader, result["max_position_embeddings"])
    result["initializer_range"] = reader.number("initializer_range", 0.02, minimum=0.0, maximum=1.0)
    result["rms_norm_eps"] = reader.number("rms_norm_eps", 1e-6, above=LEAST_EPS, maximum=1.0)
    result["bos_token_id"] = reader.token_id("bos_token_id", 1)
    result["eos_token_id"] = reader.token_ids("eos_token_id", 2)
    result["pad_token_id"] = reader.token_id("pad_token_id", None)
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        result[name] = reader.boolean(name, False)

    activation = reader.optional_text("hidden_act") or "silu"
    if activation not in _ACTIVATIONS:
        reader.refuse(f"hidden_act {shown(activation)} is not supported. Supported: {', '.join(_ACTIVATIONS)}.")
    result["hidden_act"] = activation

    dtype = reader.optional_text("dtype") or reader.optional_text("torch_dtype")
    result["dtype"] = None if dtype is None else dtype.removeprefix("torch.")
    names = reader.values.get("architectures")
    if names is not None and not (isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)):
        reader.fail("architectures", "a list of names", names)
    result["architectures"] = ["LlamaForCausalLM"] if names is None else list(names)

    known = {*result, *_ROPE_KEYS, "torch_dtype"}
    result["extra"] = {name: copy.deepcopy(value) for name, value in reader.values.items() if name not in known}
    return result


def _model_type(reader: FieldReader) -> str:
    from llama_ext.models import ARCHITECTURES  # here, because the architectures import this module

    supported = ", ".join(sorted(ARCHITECTURES))
    kind = reader.optional_text("model_type")
    if kind is None:
        names = reader.values.get("architectures")
        if isinstance(names, list) and names and not any(str(name).startswith("Llama") for name in names):
            reader.refuse(f"architecture {shown(names[0])} is not supported. Supported model types: {supported}.")
        return "llama"
    if kind not in ARCHITECTURES:
        reader.refuse(f"model_type {shown(kind)} is not supported. Supported: {supported}.")
    return kind


def _shape(reader: FieldReader, result: dict[str, Any]) -> None:
    result["vocab_size"] = reader.integer("vocab_size", 32000, limit="vocabulary")
    result["hidden_size"] = width = reader.integer("hidden_size", 4096, limit="width")
    result["intermediate_size"] = reader.integer("intermediate_size", 11008, limit="width")
    result["num_hidden_layers"] = reader.integer("num_hidden_layers", 32, limit="layers")
    result["num_attention_heads"] = heads = reader.integer("num_attention_heads", 32, limit="width")
    result["max_position_embeddings"] = reader.integer("max_position_embeddings", 2048, limit="positions")

    kv_heads = reader.integer("num_key_value_heads", heads, maximum=heads)
    if heads % kv_heads:
        reader.fail("num_key_value_heads", f"a divisor of num_attention_heads, {heads}", kv_heads)
    result["num_key_value_heads"] = kv_heads

    head_dim = reader.optional_integer("head_dim", minimum=2, limit="width")
    if head_dim is None:
        if width % heads:
            reader.fail("hidden_size", f"a multiple of num_attention_heads, {heads}", width, "Or give head_dim.")
        head_dim = width // heads
    if head_dim % 2:
        reader.fail("head_dim", "even, because RoPE rotates pairs", head_dim)
    reader.check_limit("num_attention_heads * head_dim", heads * head_dim, "width")
    result["head_dim"] = head_dim
