"""Quantising a checkpoint: original weights in, tensor by tensor, a packed directory out, and how far each is off."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Sequence

import numpy as np

from llama_ext import _core
from llama_ext._arrays import FloatArray
from llama_ext.errors import NumericError, OptionError
from llama_ext.io.atomic import check_folder, named
from llama_ext.limits import DEFAULT_LIMITS, Limits
from llama_ext.runtime.calibration import Activations, calibration_ids
from llama_ext.runtime.feedback import Feedback, round_with_feedback
from llama_ext.runtime.loading import core_config, open_model
from llama_ext.runtime.model_files import ModelFiles, StoredTensor
from llama_ext.runtime.progress import ProgressBar
from llama_ext.runtime.saving import save_core
from llama_ext.runtime.threads import checked_threads

__all__ = ["QuantizationReport", "QuantizedTensor", "quantize"]

# Tokens of a calibration that the errors of outputs are measured on, and nothing else: a product of each matrix is enough.
_MEASURED_ROWS = 256


@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """One matrix and how far it is off. Every error is a relative root mean square.

    Args:
        name: The slot of it: "layers.0.q".
        encoding: What it is kept as: "int8", "int4_min", ...
        group: Weights that share a scale.
        shape: (rows, columns).
        error: Of the weights, against the original ones.
        output_error: Of its products with its inputs on tokens of the calibration text that were kept out of the calibration;
            None without one.
        output_error_before: The same without calibration.
    """

    name: str
    encoding: str
    group: int
    shape: tuple[int, ...]
    error: float
    output_error: float | None = None
    output_error_before: float | None = None


@dataclasses.dataclass(frozen=True)
class QuantizationReport:
    """What `quantize` did.

    Args:
        tensors: The matrices, in the order of the model.
        nbytes: Memory of the quantised weights.
        original_nbytes: Of the original ones.
        calibration_tokens: How many tokens were used, 0 without a text.
    """

    tensors: tuple[QuantizedTensor, ...]
    nbytes: int
    original_nbytes: int
    calibration_tokens: int = 0

    @property
    def improvement(self) -> float | None:
        """By which share calibration lowered the errors of the outputs, on average over matrices; None without one.

        It is measured on tokens of the calibration text itself that were kept out of the calibration.
        """
        ratios = [
            math.log(tensor.output_error / tensor.output_error_before)
            for tensor in self.tensors
            if tensor.output_error and tensor.output_error_before
        ]
        return 1 - math.exp(sum(ratios) / len(ratios)) if ratios else None

    def to_json(self) -> str:
        """Everything as one JSON object."""
        record = dataclasses.asdict(self)
        record["improvement"] = self.improvement
        return json.dumps(record, allow_nan=False)

    def __str__(self) -> str:
        calibrated = self.calibration_tokens > 0
        heading = ["tensor", "kept as", "error", *(["outputs before", "outputs", "lower by"] if calibrated else [])]
        rows = [heading]
        for tensor in self.tensors:
            row = [tensor.name, f"{tensor.encoding} x {tensor.group}", f"{tensor.error:.3%}"]
            if tensor.output_error is not None and tensor.output_error_before:
                fell = 1 - tensor.output_error / tensor.output_error_before
                row += [f"{tensor.output_error_before:.3%}", f"{tensor.output_error:.3%}", f"{fell:.1%}"]
            rows.append(row + [""] * (len(heading) - len(row)))
        widths = [max(len(row[column]) for row in rows) for column in range(len(heading))]
        lines = [
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        lines.append(f"{self.original_nbytes / 2**20:,.1f} MiB -> {self.nbytes / 2**20:,.1f} MiB")
        if self.improvement is not None:
            lines.append(
                f"calibrated on {self.calibration_tokens:,} tokens: the errors of the outputs are {self.improvement:.1%} lower, "
                "measured on tokens of the calibration text itself that were kept out; other text may gain less"
            )
        return "\n".join(lines)


def quantize(
    path_or_hub_id: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    dtype: str = "int8",
    *,
    group_size: int | None = None,
    symmetric: bool | None = None,
    calibration: str | Sequence[str] | None = None,
    threads: int | None = None,
    revision: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> QuantizationReport:
    """Writes a model with quantised weights: a directory that is mapped and used as it lies, and loads at once.

    Args:
        path_or_hub_id: As `LlamaForCausalLM.from_pretrained`.
        directory: Created if it does not exist; files of the same names are replaced.
        dtype: "int8", or "int4" with the embedding and the head as int8.
        group_size: Weights of a row that share a scale, 128, 64 or 32. None: the largest that divides.
        symmetric: Whether a group has a scale alone (None, True) or also a minimum (False).
        calibration: A text like those the model is for, of some thousand tokens, 16 at least. Weights are then rounded column by column, and
            later columns make up for the errors of earlier ones on the text. A matrix whose outputs gain nothing by that, on
            tokens that were kept out of it, is quantised without.
        threads: None: as `LlamaForCausalLM`.
        revision: Of the Hub: a branch, tag or commit.
        limits: What a file may ask for.

    Returns:
        How far each matrix is off.

    Raises:
        OptionError: An option is unknown or out of range, `path_or_hub_id` is no path, the calibration text is empty or has fewer
            than 16 tokens, or the model has no tokenizer to read it.
        NumericError: A weight that no scale can express, or activations on the text that are not finite.
        FormatError, CheckpointError, UnsupportedError, LimitError: The model cannot be read.
        OutOfMemoryError: The quantised weights do not fit into memory.
        OSError: The directory cannot be written, which is found out before the work.

    Source: of the calibration, Frantar et al., "GPTQ", 2022; of weighing errors by the inputs when scales are chosen, llama.cpp's
    importance matrix.
    """
    if dtype not in ("int8", "int4"):
        raise OptionError(f"dtype must be int8 or int4, got {dtype!r}. `convert` writes the others")
    if not isinstance(path_or_hub_id, (str, os.PathLike)):
        raise OptionError(
            f"quantize reads the files of a model: path_or_hub_id must be a path or a Hub id, got {type(path_or_hub_id).__name__}. "
            "Save a loaded model first: model.save_pretrained(directory), then quantize(directory, ...)"
        )
    with open_model(path_or_hub_id, revision=revision, limits=limits) as files:
        config = files.config
        ids = None if calibration is None else calibration_ids(files.tokenizer, calibration, config)
        # Through the base class: the types of a packed model are to be made anew.
        types = ModelFiles.types(files, dtype, group_size, symmetric)
        check_folder(named(directory))
        core = _core.Model(_core.Backend("cpu", checked_threads(threads)), core_config(config), types)
        tensors = {tensor.slot: tensor for tensor in files.tensors}
        found: list[QuantizedTensor] = []
        total = sum(math.prod(tensor.shape) for tensor in files.tensors)
        with files.named_in_errors(), ProgressBar("Quantising", total, "weights") as bar:
            activations: Activations | None = None
            if ids is not None:
                activations = Activations(config, ids, _float32(files, tensors["embedding"]))
            for slots in _stages(files):
                weights = {slot: _float32(files, tensors[slot]) for slot in slots}
                inputs = _inputs(activations, weights)
                # Q, K and V share one, gate and up as well.
                shared = {id(x): _Inputs(x, slot) for slot, x in inputs.items()}
                for slot in slots:
                    if weights[slot].ndim == 1:
                        core.load(slot, weights[slot], "float32")
                    else:
                        found.append(_quantize_one(core, slot, weights[slot], shared.get(id(inputs.get(slot)))))
                    bar.advance(math.prod(tensors[slot].shape))
                    files.release(tensors[slot])
        save_core(directory, core, config, files.tokenizer, files.generation_defaults)
        order = {slot: index for index, slot in enumerate(tensors)}
        found.sort(key=lambda tensor: order[tensor.name])
        return QuantizationReport(tuple(found), core.nbytes, files.nbytes, 0 if ids is None else ids.size)


def _stages(files: ModelFiles) -> Iterator[list[str]]:
    """Slots that are handled together, in the order that a text takes through them."""
    config = files.config
    slots = [tensor.slot for tensor in files.tensors]
    if not config.tie_word_embeddings:
        yield ["embedding"]
    by_layer: dict[str, list[str]] = {}
    for slot in slots:
        if slot.startswith("layers."):
            by_layer.setdefault(slot.split(".")[1], []).append(slot)
    for layer in range(config.num_hidden_layers):
        yield by_layer[str(layer)]
    # A tied table is the head as well: what goes into it is known at the end.
    yield ["final_norm", "embedding" if config.tie_word_embeddings else "head"]


def _inputs(activations: Activations | None, weights: dict[str, FloatArray]) -> dict[str, FloatArray]:
    """What the text puts into each matrix of a stage."""
    if activations is None:
        return {}
    if "final_norm" in weights:
        x = activations.head(weights["final_norm"])
        return {slot: x for slot, values in weights.items() if values.ndim == 2}
    first = next(iter(weights))
    if not first.startswith("layers."):
        return {}
    prefix = ".".join(first.split(".")[:2]) + "."
    found = activations.layer({slot.removeprefix(prefix): values for slot, values in weights.items()})
    return {prefix + name: x for name, x in found.items()}


def _float32(files: ModelFiles, tensor: StoredTensor) -> FloatArray:
    values, dtype = files.read(tensor)
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.ascontiguousarray(values, dtype=np.float32)


class _Inputs:
    """What goes into a matrix: some tokens to measure on, the others to calibrate with."""

    def __init__(self, x: FloatArray, slot: str) -> None:
        if not np.isfinite(x).all():
            raise NumericError(
                f"the calibration text gives '{slot}' inputs that are not finite. Are the weights corrupt?"
            )
        measured = np.zeros(len(x), dtype=np.bool_)
        measured[:: max(2, len(x) // _MEASURED_ROWS)] = True
        self.measured = x[measured]
        self.feedback = Feedback(x[~measured] if len(x) > 1 else x)


def _quantize_one(core: _core.Model, slot: str, values: FloatArray, inputs: _Inputs | None) -> QuantizedTensor:
    encoding, group = core.types()[slot]
    core.load(slot, values, "float32")
    off = _difference(core, slot, values)
    error = _ratio(off, values)
    if inputs is None:
        return QuantizedTensor(slot, encoding, group, values.shape, error)
    exact = inputs.measured @ values.T
    before = _ratio(inputs.measured @ off.T, exact)
    core.load_codes(slot, *round_with_feedback(values, inputs.feedback, encoding, group))
    off = _difference(core, slot, values)
    after = _ratio(inputs.measured @ off.T, exact)
    if after >= before:
        core.load(slot, values, "float32")
        after = before
    else:
        error = _ratio(off, values)
    return QuantizedTensor(slot, encoding, group, values.shape, error, after, before)


def _difference(core: _core.Model, slot: str, values: FloatArray) -> FloatArray:
    kept: FloatArray = core.read(slot)
    kept -= values
    return kept


def _ratio(part: FloatArray, whole: FloatArray) -> float:
    """Root mean squares, the one over the other."""
    size = float(np.linalg.norm(whole))
    return float(np.linalg.norm(part)) / size if size > 0 else 0.0
