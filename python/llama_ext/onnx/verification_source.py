"""The model that an exported graph has to be: its weights as they were, and as the graph stores them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator

from llama_ext import _core
from llama_ext.errors import FormatError, OptionError
from llama_ext.limits import DEFAULT_LIMITS, Limits
from llama_ext.models.config import LlamaConfig
from llama_ext.onnx.profiles import DTYPES, QUANTIZED
from llama_ext.onnx.reference import Weights, weights_of_core, weights_of_files
from llama_ext.onnx.verification_graphs import GraphFile
from llama_ext.onnx.weights import CoreWeights, FileWeights, narrowed
from llama_ext.onnx.weights import Weights as GraphWeights
from llama_ext.runtime.loaded_model import LoadedModel
from llama_ext.runtime.loading import core_config, open_model
from llama_ext.runtime.tokenizer import Tokenizer
from llama_ext.runtime.weight_types import GROUP_SIZES, WeightTypes, is_quantized

__all__ = ["Source", "open_source"]

# Formats that each float dtype holds without rounding.
_EXACT = {
    "float32": ("float32", "float16", "bfloat16"),
    "float16": ("float16",),
    "bfloat16": ("bfloat16",),
}

# What every graph of one model has in common, however it was written and stored.
_SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)

Options = tuple[int | None, bool | None]


@dataclasses.dataclass(frozen=True)
class Source:
    """A model, and its weights in the form of a graph.

    Attributes:
        config, tokenizer: The model's.
        labels: Of a classifier: how many; else None.
        types: How the graph stores each matrix, by slot.
        original: The weights as the model has them, for the reference.
        is_exact: Whether the graph stores the same numbers.
        native: Makes a native model of the weights as the graph stores them, given how it computes: "exact" or "auto".
    """

    config: LlamaConfig
    tokenizer: Tokenizer | None
    labels: int | None
    types: WeightTypes
    original: Weights
    is_exact: bool
    native: Callable[[str], _core.Model]


@contextlib.contextmanager
def open_source(
    model_or_path: LoadedModel | str | os.PathLike[str],
    graph: GraphFile,
    dtype: str,
    threads: int,
    limits: Limits = DEFAULT_LIMITS,
) -> Iterator[Source]:
    """Opens the model that was exported.

    Args:
        model_or_path: As for `export`.
        graph: What it gave.
        dtype: Of the graph, as its metadata has it.
        threads: Of the native model; 0: the default.
        limits: What a file may ask for.

    Yields:
        The source, which reads from the open files.

    Raises:
        OptionError: `model_or_path` is neither a model nor a path, an adapter of it is active, or the graph's weights are not made
            from it.
        FormatError and others: The files cannot be read.
    """
    if dtype not in DTYPES:
        raise FormatError(f"the graph's dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.", path=str(graph.path))
    if isinstance(model_or_path, LoadedModel):
        model_or_path._refuse_active("verify compares the base alone", "No graph has an adapter")
        _check_shape(graph, model_or_path.config)
        yield _of_model(model_or_path, graph, dtype, threads)
        return
    if not isinstance(model_or_path, (str, os.PathLike)):
        raise OptionError(
            "verify takes a LlamaForCausalLM, a LlamaForSequenceClassification or a path, "
            f"got {type(model_or_path).__name__}"
        )
    with open_model(model_or_path, limits=limits) as files, files.named_in_errors():
        _check_shape(graph, files.config)
        weights = _as_in(graph, dtype, lambda group, symmetric: FileWeights(files, dtype, group, symmetric))
        stored = files.stored_types()
        types = weights.types

        def native(compute: str) -> _core.Model:
            backend = _core.Backend("cpu", threads)
            same = _keeps(stored, types)
            wanted = dict(stored) if same else _complete(types, stored)
            packed = files.packed(backend.matrix_layout, wanted) if same else {}
            core = _core.Model(backend, core_config(files.config), wanted, packed, compute=compute)
            files.load_into(core)
            return _with_narrow_vectors(core, dtype)

        yield Source(
            config=files.config,
            tokenizer=files.tokenizer,
            labels=weights.labels,
            types=types,
            original=weights_of_files(files),
            is_exact=_is_exact({tensor.slot: tensor.type for tensor in files.tensors}, stored, types, dtype),
            native=native,
        )


def _check_shape(graph: GraphFile, config: LlamaConfig) -> None:
    """Refuses a graph of another model, before its weights are looked at and quantisation is blamed."""
    path = graph.path.parent.parent / "config.json"
    if not path.is_file():  # the graph alone still says much
        return
    exported = LlamaConfig.from_pretrained(path)
    for name in _SHAPE:
        found, expected = getattr(exported, name), getattr(config, name)
        if found != expected:
            raise OptionError(
                f"{graph.path} was exported from another model: {path.name} beside it has {name} {found}, this model has "
                f"{expected}. Name the model that it was exported from, or export this one"
            )


def _of_model(model: LoadedModel, graph: GraphFile, dtype: str, threads: int) -> Source:
    core = model._core
    stored = core.types()

    def make(group: int | None, symmetric: bool | None) -> GraphWeights:
        return CoreWeights(core, model.config, model.tokenizer, model.generation_defaults, dtype, group, symmetric)

    weights = _as_in(graph, dtype, make)
    types = weights.types
    slots = {name: stored.get(name, stored[""])[0] if is_matrix else "float32" for name, _, is_matrix in core.slots()}

    def native(compute: str) -> _core.Model:
        backend = _core.Backend("cpu", threads)
        config = core_config(model.config)
        if _keeps(stored, types) and is_quantized(stored):
            # Rounding what codes stand for once more would not give these codes.
            packed = {name: core.packed(name) for name in core.matrices()}
            made = _core.Model(backend, config, dict(stored), packed, compute=compute)
        else:
            made = _core.Model(backend, config, _complete(types, stored), {}, compute=compute)
        missing = set(made.missing())
        for name, _, is_matrix in core.slots():
            if name not in missing:
                continue
            kept, group = stored.get(name, stored[""]) if is_matrix else ("float32", 0)
            made.load(name, core.read(name), "float32" if group else kept)
        return _with_narrow_vectors(made, dtype)

    return Source(
        config=model.config,
        tokenizer=model.tokenizer,
        labels=weights.labels,
        types=types,
        original=weights_of_core(core),
        is_exact=_is_exact(slots, stored, types, dtype),
        native=native,
    )


def _as_in(graph: GraphFile, dtype: str, make: Callable[[int | None, bool | None], GraphWeights]) -> GraphWeights:
    """The weights with the options of quantisation that give the groups which the graph has."""
    try:
        first = make(None, None)
    except OptionError as error:  # this model's codes are of another kind, and an export keeps them
        raise OptionError(
            f"{graph.path} has {dtype} weights, which no export of this model has, as it is quantised otherwise: was it exported "
            "from another model?"
        ) from error
    if dtype not in QUANTIZED or _fits(graph, first):
        return first
    options: list[Options] = [(group, symmetric) for symmetric in (True, False) for group in (None, *GROUP_SIZES)]
    for group, symmetric in options:
        try:
            weights = make(group, symmetric)
        except OptionError:  # the model is quantised already: it has no such options
            break
        if _fits(graph, weights):
            return weights
    raise OptionError(
        f"{graph.path} does not store its weights in groups that this model's could have: was it exported from another model?"
    )


def _fits(graph: GraphFile, weights: GraphWeights) -> bool:
    """Whether the scales and minima in a graph have the shapes of these weights."""
    for slot, (encoding, group) in weights.types.items():
        if not group:
            continue
        rows, columns = weights.matrix(slot).shape
        name = weights.name(slot)
        shape = graph.shape(f"{name}.scales")
        if shape is None:  # Q, K and V that lie in one matrix
            name = name.replace("q_proj", "qkv_proj").replace("k_proj", "qkv_proj").replace("v_proj", "qkv_proj")
            shape = graph.shape(f"{name}.scales")
            rows = -1
        if shape is None:
            continue  # a table that is only looked up may be stored widened
        groups = -(-columns // group)
        if groups not in shape or (rows >= 0 and rows not in shape):
            return False
        if (graph.shape(f"{name}.mins") is not None) != (encoding.endswith("_min") or encoding in ("q4_k", "q5_k")):
            return False
    return True


def _keeps(stored: WeightTypes, types: WeightTypes) -> bool:
    """Whether every matrix is to be kept as it is stored."""
    return all(stored.get(slot, stored[""]) == kept for slot, kept in types.items())


def _complete(types: WeightTypes, stored: WeightTypes) -> WeightTypes:
    """With what stands for slots that are not named, of which there are none."""
    return {**types, "": next(iter(types.values()), stored[""])}


def _is_exact(slots: dict[str, str], stored: WeightTypes, types: WeightTypes, dtype: str) -> bool:
    """Whether storing the weights changes no number of them."""
    if dtype in QUANTIZED:
        return _keeps(stored, types)
    return all(word in _EXACT[dtype] or (dtype == "float32" and word != "float64") for word in slots.values())


def _with_narrow_vectors(core: _core.Model, dtype: str) -> _core.Model:
    """Rounds norms and biases as a graph of float16 or bfloat16 stores them; a native model keeps them in float32."""
    if dtype in ("float16", "bfloat16"):
        for name, _, is_matrix in core.slots():
            if not is_matrix:
                core.load(name, narrowed(core.read(name), dtype), dtype)
    return core
