"""PEFT's files of a LoRA adapter, both ways: adapter_config.json and adapter_model.safetensors.

What a file asks for and is not done here is refused: an adapter that is applied in part gives wrong results without a word.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from llama_ext._options import shown
from llama_ext.errors import CheckpointError, FormatError, LimitError, OptionError, UnsupportedError
from llama_ext.io.atomic import atomic_write, named, remove
from llama_ext.io.checkpoint import TensorSource, write_safetensors
from llama_ext.io.folder_lock import saving_into
from llama_ext.io.json_file import read_json_object
from llama_ext.io.safetensors_file import SafetensorsFile, TensorInfo
from llama_ext.limits import DEFAULT_LIMITS, Limits
from llama_ext.models.config import LlamaConfig
from llama_ext.models.fields import FieldReader
from llama_ext.models.llama import CLASSIFIER_HEAD, adaptable_modules, tensor_specs
from llama_ext.models.lora import ALL_LINEAR, LoRA

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "AdapterFiles", "read_adapter_base", "read_adapter_config", "write_adapter"]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

Floats = npt.NDArray[np.float32]

_PREFIX = "base_model.model."
# What PEFT keeps of a classifier beside the layers: it names what a head may be called, and saves what there is.
_CLASSIFIER_MODULES = ("classifier", "score")

# Keys that change nothing of what an adapter computes once its matrices are there, or that are read below.
_READ = {
    "peft_type",
    "task_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "bias",
    "init_lora_weights",
}
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",  # of modules_to_save that are not accepted
    "fan_in_fan_out",  # PEFT corrects it for linear layers
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",  # of use_qalora
    "revision",
}
# Initialisations that leave the base as it is; others, such as "pissa", move a part of it into the adapter.
_HARMLESS_INIT = (True, False, None, "gaussian", "orthogonal", "eva")
_MEANINGS = {
    "use_dora": "weight-decomposed adaptation (DoRA)",
    "lora_bias": "a bias of B",
    "use_qalora": "pooled inputs (QA-LoRA)",
    "alora_invocation_tokens": "adapters that some token switches on (aLoRA)",
    "trainable_token_indices": "changed rows of the embedding",
    "target_parameters": "adapters of parameters that are no linear layer's",
    "layer_replication": "repeated layers",
}


def _is_off(value: object) -> bool:
    return value is None or value is False or (isinstance(value, (dict, list, str)) and not value)


def read_adapter_config(
    directory: str | os.PathLike[str], *, limits: Limits = DEFAULT_LIMITS
) -> tuple[LoRA, dict[str, Any]]:
    """Reads adapter_config.json.

    Args:
        directory: The adapter's.
        limits: The bounds.

    Returns:
        The adapter, and the whole object.

    Raises:
        FormatError: The file is missing or malformed, or a value is of the wrong type or out of range.
        UnsupportedError: It is no LoRA adapter, or asks for something that is not done here.
        LimitError: A number is beyond the limits.
    """
    path = Path(directory) / CONFIG_FILE
    values = read_json_object(path, what="an adapter's adapter_config.json", limits=limits)
    reader = FieldReader(values, path=str(path), limits=limits)
    _refuse_others(reader)
    targets = _names(reader, "target_modules")
    if targets is None:
        reader.fail("target_modules", "a list of names or a regular expression", None)
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        targets = ALL_LINEAR
    fields: dict[str, Any] = {
        "r": reader.integer("r", 8, limit="width"),
        "alpha": reader.number("lora_alpha", 8),
        "targets": targets,
        "rslora": reader.boolean("use_rslora", False),
        "dropout": reader.number("lora_dropout", 0.0, minimum=0.0, maximum=1.0),
        "rank_pattern": _pattern(reader, "rank_pattern"),
        "alpha_pattern": _pattern(reader, "alpha_pattern"),
        "exclude": _names(reader, "exclude_modules") or None,
        "layers": _layers(reader, targets),
    }
    try:
        return LoRA(**fields), values
    except OptionError as error:  # what the checks above leave: a dropout of 1, an empty list
        raise FormatError(str(error).removeprefix("LoRA: "), path=str(path)) from error


def read_adapter_base(directory: str | os.PathLike[str], *, limits: Limits = DEFAULT_LIMITS) -> str | None:
    """What an adapter's config names as its base: a path or a Hub id; None when it names none. Raises as `read_adapter_config`."""
    base = read_adapter_config(directory, limits=limits)[1].get("base_model_name_or_path")
    return base if isinstance(base, str) and base else None


def _refuse_others(reader: FieldReader) -> None:
    kind = reader.optional_text("peft_type")
    if kind != "LORA":
        reader.refuse(f"peft_type {shown(kind)} is not supported. Supported: LORA.")
    bias = reader.values.get("bias")
    if bias not in (None, "none"):
        reader.refuse(f"bias = {shown(bias)} is not supported: an adapter that changes biases. Supported: none.")
    task = reader.optional_text("task_type")
    if task not in (None, "CAUSAL_LM", "SEQ_CLS"):
        reader.refuse(f"task_type {shown(task)} is not supported. Supported: CAUSAL_LM, SEQ_CLS.")
    init = reader.values.get("init_lora_weights")
    if not any(init is known or (isinstance(init, str) and init == known) for known in _HARMLESS_INIT):
        reader.refuse(
            f"init_lora_weights = {shown(init)} is not supported: it changes the base. Convert it to plain LoRA with peft."
        )
    for name, value in reader.values.items():
        if name not in _READ and name not in _WITHOUT_EFFECT and not _is_off(value):
            meaning = _MEANINGS.get(name, "an option that this version does not know")
            reader.refuse(f"{name[:80]} = {shown(value)} is not supported: {meaning}. The result would be wrong.")


def _names(reader: FieldReader, field: str) -> str | list[str] | None:
    value = reader.values.get(field)
    if value is not None and not isinstance(value, str):
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            reader.fail(field, "a list of names or a regular expression", value)
        _within(reader, field, len(value))
    return value


def _layers(reader: FieldReader, targets: str | list[str]) -> list[int] | None:
    value = reader.values.get("layers_to_transform")
    if value is None or value == []:
        return None
    if isinstance(targets, str):
        reader.fail("layers_to_transform", "absent where target_modules is a regular expression", value)
    pattern = reader.values.get("layers_pattern")
    if not _is_off(pattern) and pattern not in ("layers", ["layers"]):
        reader.refuse(f"layers_pattern = {shown(pattern)} is not supported. Supported: layers.")
    layers = value if isinstance(value, list) else [value]
    if not all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in layers):
        reader.fail("layers_to_transform", "indices of layers", value)
    _within(reader, "layers_to_transform", len(layers))
    return layers


def _pattern(reader: FieldReader, field: str) -> dict[str, Any]:
    values = reader.optional_mapping(field) or {}
    _within(reader, field, len(values))
    inner = reader.nested(values, f"{field}.")
    if field == "rank_pattern":
        return {name: inner.integer(name, 1, limit="width") for name in values}
    return {name: inner.number(name, 1.0) for name in values}


def _within(reader: FieldReader, field: str, count: int) -> None:
    most = 16 * reader.limits.layers
    if count > most:
        raise LimitError(
            f"{reader.path}: {field} has {count} entries, at most {most} are accepted (16 x Limits.layers)."
        )


class AdapterFiles:
    """An adapter's files, checked against the model that it is for before any matrix is read; a context manager.

    Args:
        directory: With adapter_config.json and adapter_model.safetensors.
        config: The model.
        limits: The bounds.

    Attributes:
        lora: What the config says.
        slots: By the core's slot: rank and scale.
        has_head: Whether there is a classifier's head.
        base: What the config calls the base, or None.

    Raises:
        FormatError: A file is missing or malformed.
        CheckpointError: A tensor is missing, unexpected or of another shape.
        UnsupportedError: The adapter does something that is not done here.
        LimitError: A number is beyond the limits.
    """

    def __init__(
        self, directory: str | os.PathLike[str], config: LlamaConfig, *, limits: Limits = DEFAULT_LIMITS
    ) -> None:
        folder = Path(directory)
        if not folder.is_dir():
            raise FormatError("expected an adapter's directory, found no such directory.", path=str(folder))
        path = str(folder / CONFIG_FILE)
        self.lora, values = read_adapter_config(folder, limits=limits)
        base = values.get("base_model_name_or_path")
        self.base = base if isinstance(base, str) and base else None
        self.has_head = _has_head(values, config, path)
        self.slots = self.lora.resolve(config, path=path)
        if not (folder / WEIGHTS_FILE).exists() and (folder / "adapter_model.bin").exists():
            raise FormatError(
                f"expected {WEIGHTS_FILE}, found adapter_model.bin. Pickled weights are never read, because loading them can run "
                "code: save the adapter with a recent peft.",
                path=str(folder),
            )
        self._file = SafetensorsFile(folder / WEIGHTS_FILE, limits)
        try:
            self._names = self._matched(config)
        except BaseException:
            self._file.close()
            raise

    def read(self, slot: str, which: str) -> Floats:
        """A matrix of the adapter.

        Args:
            slot: The core's, one of `slots`.
            which: "A", (r, in), or "B", (out, r).

        Returns:
            float32.

        Raises:
            FormatError: The file has been cut short since it was opened.
            CheckpointError: A number is not finite.
        """
        return self._floats(self._names[slot, which])

    def read_head(self) -> Floats | None:
        """The classifier's head (labels, C), or None. Raises as `read`."""
        return self._floats(_PREFIX + CLASSIFIER_HEAD) if self.has_head else None

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> AdapterFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _floats(self, name: str) -> Floats:
        values = self._file.read(name)
        if self._file.tensors[name].core_dtype == "bfloat16":
            result = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
        else:
            with np.errstate(over="ignore"):
                result = np.array(values, dtype=np.float32)
        if not np.isfinite(result).all():
            raise CheckpointError(
                f"tensor {name} holds a number that is not finite in float32.", path=self._file.path, field=name
            )
        return result

    def _matched(self, config: LlamaConfig) -> dict[tuple[str, str], str]:
        names, shapes = _tensors(self.slots, config)
        if self.has_head:
            shapes[_PREFIX + CLASSIFIER_HEAD] = (config.num_labels, config.hidden_size)
        found = self._file.tensors
        for name, shape in shapes.items():
            if name not in found:
                self._refuse(name, "is missing", "its adapter_config.json asks for it.", shape, None)
        for name, info in found.items():
            if name not in shapes:
                self._refuse(name, "is unexpected", _advice(name, config), None, info.shape)
            self._check(info, shapes[name])
        return names

    def _check(self, info: TensorInfo, shape: tuple[int, ...]) -> None:
        if info.shape != shape:
            advice = "Is the adapter of another model, or adapter_config.json of another adapter?"
            self._refuse(info.name, f"must have shape {shape}, got {info.shape}", advice, shape, info.shape)
        info.core_dtype  # noqa: B018  (raises UnsupportedError for others than floats)

    def _refuse(self, name: str, what: str, advice: str, expected: object, got: object) -> NoReturn:
        raise CheckpointError(
            f"tensor {name[:160]} {what}: {advice}"
            if not what.startswith("must")
            else f"tensor {name[:160]} {what}. {advice}",
            path=self._file.path,
            field=name,
            expected=expected,
            got=got,
        )


def _advice(name: str, config: LlamaConfig) -> str:
    if name.endswith(".lora_magnitude_vector") or ".lora_magnitude_vector." in name:
        return "it is of DoRA, which is not supported."
    if name.endswith(".bias"):
        return "an adapter that changes biases is not supported."
    if CLASSIFIER_HEAD in name and not config.is_classifier:
        return "this is an adapter of a classifier: load it into LlamaForSequenceClassification."
    if not name.startswith(_PREFIX + "model."):
        return f"names of an adapter of {config.architectures[0] if config.architectures else 'a Llama'} begin with {_PREFIX}model."
    return "adapter_config.json does not ask for it, or it is of another model."


def _has_head(values: Mapping[str, Any], config: LlamaConfig, path: str) -> bool:
    modules = values.get("modules_to_save")
    if modules is None or modules == []:
        return False
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        raise FormatError(
            f"modules_to_save must be a list of names, got {shown(modules)}.", path=path, field="modules_to_save"
        )
    others = [name for name in modules if name not in _CLASSIFIER_MODULES]
    if others:
        raise UnsupportedError(
            f"{path}: modules_to_save = {shown(modules)} is not supported: a changed copy of {others[0][:80]}. "
            "Supported: a classifier's score."
        )
    if not config.is_classifier:
        raise UnsupportedError(
            f"{path}: modules_to_save = {shown(modules)}: this is an adapter of a classifier, and the model is a language model. "
            "Load it into LlamaForSequenceClassification."
        )
    return "score" in modules


def _tensors(
    slots: Mapping[str, tuple[int, float]], config: LlamaConfig
) -> tuple[dict[tuple[str, str], str], dict[str, tuple[int, ...]]]:
    """The names of an adapter's tensors by slot and letter, and their shapes."""
    modules = {slot: module for module, (slot, _) in adaptable_modules(config).items()}
    bases = {spec.slot: spec.shape for spec in tensor_specs(config, with_head=False)}
    names: dict[tuple[str, str], str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for slot, (rank, _) in slots.items():
        rows, columns = bases[slot]
        for which, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            name = names[slot, which] = f"{_PREFIX}{modules[slot]}.lora_{which}.weight"
            shapes[name] = shape
    return names, shapes


def write_adapter(
    directory: str | os.PathLike[str],
    lora: LoRA,
    config: LlamaConfig,
    read: Callable[[str, str], Floats],
    *,
    head: Floats | None = None,
    base: str | None = None,
) -> None:
    """Writes an adapter as PEFT does; PEFT and `AdapterFiles` read it.

    The config goes first when an older adapter is replaced and comes last, so that a save that is cut short leaves none.

    Args:
        directory: Created when it does not exist.
        lora: The adapter.
        config: Its model.
        read: Gives the matrix of a slot, "A" or "B".
        head: A classifier's head (labels, C), when it belongs to the adapter.
        base: What to name as the base: a path or a Hub id.

    Raises:
        OSError: It cannot be written.
    """
    names, shapes = _tensors(lora.resolve(config), config)

    def source(slot: str, which: str) -> Callable[[], Iterable[Floats]]:
        return lambda: [np.ascontiguousarray(read(slot, which))]

    tensors: list[TensorSource] = [
        (name, "float32", shapes[name], source(slot, which)) for (slot, which), name in names.items()
    ]
    if head is not None:
        tensors.append((_PREFIX + CLASSIFIER_HEAD, "float32", head.shape, lambda: [np.ascontiguousarray(head)]))
    folder = named(directory)
    # Patterns are in their order: the first one that matches counts.
    text = json.dumps(_config_of(lora, config, head is not None, base), indent=2, allow_nan=False)
    with saving_into(folder):
        remove(folder / CONFIG_FILE)
        write_safetensors(folder / WEIGHTS_FILE, tensors)
        with atomic_write(folder / CONFIG_FILE) as file:
            file.write((text + "\n").encode("utf-8"))


def _config_of(lora: LoRA, config: LlamaConfig, with_head: bool, base: str | None) -> dict[str, Any]:
    def listed(value: Any) -> Any:
        return value if value is None or isinstance(value, str) else list(value)

    targets = listed(lora.targets)
    if targets == ALL_LINEAR:
        targets = sorted({module.rpartition(".")[2] for module in adaptable_modules(config)})
    return {
        "alpha_pattern": dict(lora.alpha_pattern),
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": "none",
        "exclude_modules": listed(lora.exclude),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": listed(lora.layers),
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": list(_CLASSIFIER_MODULES) if with_head else None,
        "peft_type": "LORA",
        "r": lora.r,
        "rank_pattern": dict(lora.rank_pattern),
        "revision": None,
        "target_modules": targets,
        "task_type": "SEQ_CLS" if config.is_classifier else "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": lora.rslora,
    }
