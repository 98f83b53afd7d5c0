"""`export`: a model into a directory that the ONNX runtimes open."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx import helper

from llama_ext._options import whole
from llama_ext._version import __version__
from llama_ext.errors import LlamaExtError, NumericError, OptionError
from llama_ext.io.atomic import named, remove
from llama_ext.io.folder_lock import saving_into
from llama_ext.limits import DEFAULT_LIMITS, Limits, check_limits
from llama_ext.models.config import LlamaConfig
from llama_ext.onnx.components.attention import is_grouped
from llama_ext.onnx.directory import GRAPH_FOLDER, write_small_files
from llama_ext.onnx.external_data import ExternalTensor, Placement, place, reference, write
from llama_ext.onnx.graph import MICROSOFT, Graph
from llama_ext.onnx.metadata import set_metadata, write_model
from llama_ext.onnx.profiles import FILE_STEMS, QUANTIZED, Profile, checked_profile
from llama_ext.onnx.transformer import transformer
from llama_ext.onnx.weights import CoreWeights, FileWeights, Weights
from llama_ext.runtime.loaded_model import LoadedModel
from llama_ext.runtime.loading import open_model
from llama_ext.runtime.progress import ProgressBar

if TYPE_CHECKING:
    from llama_ext.onnx.verification import ParityReport

__all__ = ["ExportResult", "export"]

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """What `export` wrote.

    Args:
        directory: The directory.
        graph: The .onnx file in it.
        data: The files with the weights.
        profile: Of the graph.
        dtype: Of the weights.
        nbytes: Of the graph and its weights.
        report: Of the verification; None when there was none.
        not_verified: Why not; None when there was one.
    """

    directory: Path
    graph: Path
    data: tuple[Path, ...]
    profile: str
    dtype: str
    nbytes: int
    report: ParityReport | None
    not_verified: str | None


def export(
    model_or_path: LoadedModel | str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    profile: str = "standard",
    dtype: str | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    max_file_bytes: int | None = None,
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> ExportResult:
    """Writes a model as an ONNX graph with everything its runtimes need, and proves that it computes the same.

    Weights are written one after the other as they are read, so memory holds one matrix at a time, and the model's files are not
    loaded. The same model gives the same bytes.

    Args:
        model_or_path: A loaded LlamaForCausalLM or LlamaForSequenceClassification, no adapter of which is active; or a directory, a
            GGUF file or a Hub id, of a language model or, as safetensors, of a classifier.
        out_dir: Created if it does not exist. Exports of one model with several dtypes may share it: each has a name of its own
            in onnx/, and genai_config.json names the last one.
        profile: "portable": operators of opset 17, for OpenVINO, TensorRT and old versions of onnxruntime. "standard": those of
            opset 23, for onnxruntime 1.23 and later, genai, optimum and transformers.js. "ort": onnxruntime's own, the fastest
            there, and on genai.
        dtype: "float32", "float16", "bfloat16" (for GPUs), or "int8" or "int4", the tables of int4 models as int8. A model that
            is quantised keeps its own codes and scales. None: as the model is quantised, else float32.
        group_size: Of weights that are quantised here: how many of a row share a scale, 128, 64 or 32. None: the largest that
            divides.
        symmetric: Of weights that are quantised here: whether a group has a scale alone (None, True) or also a minimum (False).
        max_file_bytes: Bytes of a data file at most: browsers need less than 2 GB. None: one file.
        overwrite: Whether an earlier export of this dtype, or one of another model, may be replaced.
        verify: Whether to compare the result with the model and with float64 arithmetic; see `llama_ext.onnx.verify`.
        progress: Called with the bytes written and their total. None: a bar on a terminal.
        limits: What a file may ask for.

    Returns:
        What was written, and the report.

    Warns:
        UserWarning: A runtime will misread the model's config.

    Raises:
        OptionError: An option is unknown, out of range, or contradicts the model or `out_dir`; or an adapter is active, which the
            graph would lack.
        FormatError, CheckpointError, UnsupportedError, LimitError: The model cannot be read.
        NumericError: A weight is beyond the range of the dtype; or the result differs from the model by more than rounding
            explains.
        OSError: `out_dir` cannot be written.
    """
    chosen = checked_profile(profile, dtype)
    if max_file_bytes is not None:
        max_file_bytes = whole("max_file_bytes", max_file_bytes, 1)
    folder = named(out_dir)
    check_limits(limits)
    with contextlib.ExitStack() as saving:
        with _weights(model_or_path, dtype, group_size, symmetric, limits) as weights:
            checked_profile(profile, weights.dtype)  # what the model decided
            _check_folder(folder, model_or_path, weights, overwrite)  # before anything is made
            saving.enter_context(saving_into(folder))
            # A save that this one waited for may have changed it.
            replaces = _check_folder(folder, model_or_path, weights, overwrite)
            stems = tuple(FILE_STEMS.values()) if replaces else (FILE_STEMS[weights.dtype],)
            result = _write(folder, weights, chosen, max_file_bytes, stems, progress)
        return _verified(model_or_path, result, limits) if verify else result


@contextlib.contextmanager
def _weights(
    model_or_path: LoadedModel | str | os.PathLike[str],
    dtype: str | None,
    group_size: int | None,
    symmetric: bool | None,
    limits: Limits,
) -> Iterator[Weights]:
    if isinstance(model_or_path, LoadedModel):
        model = model_or_path
        model._refuse_active("export writes the base alone", "save_adapter writes the adapter")
        yield CoreWeights(
            model._core, model.config, model.tokenizer, model.generation_defaults, dtype, group_size, symmetric
        )
        return
    if not isinstance(model_or_path, (str, os.PathLike)):
        raise OptionError(
            "export takes a LlamaForCausalLM, a LlamaForSequenceClassification or a path, "
            f"got {type(model_or_path).__name__}"
        )
    with open_model(model_or_path, limits=limits) as files, files.named_in_errors():
        yield FileWeights(files, dtype, group_size, symmetric)


def _check_folder(folder: Path, source: Any, weights: Weights, overwrite: bool) -> bool:
    """Refuses to mix two models, and to write over the one that is being read; says whether another model's is replaced."""
    if isinstance(source, (str, os.PathLike)) and folder.exists():
        path = Path(source)
        inside = path.parent if path.is_file() else path
        if inside.exists() and folder.resolve() == inside.resolve():
            raise OptionError(f"out_dir {os.fspath(folder)} is the directory of the model itself: name another one")
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"out_dir {os.fspath(folder)} is a file, not a directory")
    weights.config.to_json()  # what cannot be written is refused here
    config = folder / "config.json"
    replaces = config.exists() and not _same_model(config, weights.config)
    if replaces and not overwrite:
        raise OptionError(f"{config} is of another model: name another directory, or say overwrite=True")
    graph = folder / GRAPH_FOLDER / f"{FILE_STEMS[weights.dtype]}.onnx"
    if graph.exists() and not overwrite:
        raise OptionError(f"{graph} exists: name another directory, or say overwrite=True")
    return replaces


def _same_model(path: Path, config: LlamaConfig) -> bool:
    try:
        found = LlamaConfig.from_pretrained(path)
    except LlamaExtError:
        return False
    fields = [field.name for field in dataclasses.fields(LlamaConfig) if field.name not in ("dtype", "extra")]
    return all(getattr(found, name) == getattr(config, name) for name in fields)


def _write(
    folder: Path,
    weights: Weights,
    profile: Profile,
    max_file_bytes: int | None,
    stems: Sequence[str],
    progress: Progress | None,
) -> ExportResult:
    """Writes everything; `stems` are the graphs that give way."""
    opset, ir_version = profile.versions(weights.dtype)
    activations = "float32" if weights.dtype in QUANTIZED else weights.dtype
    g = Graph(profile, opset, activations)
    transformer(g, weights)
    stem = FILE_STEMS[weights.dtype]
    placements = place(g.weights, f"{stem}.onnx_data", max_file_bytes)
    references = [reference(*pair) for pair in zip(g.weights, placements, strict=True)]
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid(MICROSOFT, 1)] if profile.contrib else [])]
    model = helper.make_model(
        g.model("llama", references),
        opset_imports=opsets,
        ir_version=ir_version,
        producer_name="llama_ext",
        producer_version=__version__,
    )
    set_metadata(model, profile.name, weights.dtype)

    graphs = folder / GRAPH_FOLDER
    graphs.mkdir(parents=True, exist_ok=True)
    graph = graphs / f"{stem}.onnx"
    # Nothing opens without its graph: it goes before the first weight is replaced, and comes last.
    for replaced in stems:
        for old in (graphs / f"{replaced}.onnx", *_data_files(graphs, replaced)):
            remove(old)
    data = _write_data(graphs, g.weights, placements, progress)
    external = {**_external(graphs), graph.name: len(data)}
    write_small_files(
        folder,
        weights,
        graph=graph.name,
        dtype=activations,
        external=external,
        shares_cache=is_grouped(profile, weights.config),
    )
    write_model(graph, model)
    nbytes = sum(path.stat().st_size for path in (graph, *data))
    return ExportResult(folder, graph, tuple(data), profile.name, weights.dtype, nbytes, None, "it was not asked for")


def _write_data(
    folder: Path, tensors: Sequence[ExternalTensor], placements: Sequence[Placement], progress: Progress | None
) -> list[Path]:
    total = sum(tensor.nbytes for tensor in tensors)
    done = 0
    with ProgressBar("Writing ONNX", total, "bytes") as bar:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if progress is None:
                bar.advance(count)
            else:
                progress(done, total)

        return write(folder, tensors, placements, advance)


def _data_files(folder: Path, stem: str) -> list[Path]:
    pattern = re.compile(re.escape(f"{stem}.onnx_data") + r"(_\d+)?")
    return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))


def _external(folder: Path) -> dict[str, int]:
    """By graph of a folder, how many data files it has."""
    return {path.name: len(_data_files(folder, path.stem)) for path in folder.glob("*.onnx")}


def _verified(source: Any, result: ExportResult, limits: Limits) -> ExportResult:
    if result.dtype == "bfloat16":
        reason = "onnxruntime has no bfloat16 kernels for CPUs"
        return dataclasses.replace(result, not_verified=reason)
    from llama_ext.onnx.verification import verify

    report = verify(source, result.directory, variant=result.graph.stem, limits=limits)
    if not report.passed:
        failed = [runtime for runtime, verdict in report.verdicts.items() if verdict == "failed"]
        raise NumericError(
            f"{result.graph}: {' and '.join(failed) or 'a runtime that has to run'} did not pass: its arithmetic differs from float64's on the "
            "stored weights by more than rounding explains, or it did not run. The files are left for a look at them; do not use "
            f"them.\n{report}"
        )
    return dataclasses.replace(result, report=report, not_verified=None)
