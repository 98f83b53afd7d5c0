"""`verify`: proves that an exported graph computes the same model as the native one, or says where it does not.

Three parties take part: the native model, onnxruntime, and float64 arithmetic on the same stored weights, which the other two
are compared with. What storing the weights in fewer bits changes is a comparison of its own, of float64 with float64: so a loss
by quantisation never hides a mistake, nor a mistake a loss.
"""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_ext import _core
from llama_ext._arrays import token_ids
from llama_ext._options import whole
from llama_ext._version import __version__
from llama_ext.errors import ContextLengthError, OptionError
from llama_ext.io.json_file import read_json_object
from llama_ext.limits import DEFAULT_LIMITS, Limits, check_limits
from llama_ext.onnx import metadata
from llama_ext.onnx.ort_model_session import find_graph
from llama_ext.onnx.parity_report import Check, Fault, NotRun, ParityReport
from llama_ext.onnx.requirements import require
from llama_ext.onnx.verification_graphs import GraphFile
from llama_ext.onnx.verification_others import checked_runtimes
from llama_ext.onnx.verification_runs import Verification
from llama_ext.onnx.verification_source import Source, open_source
from llama_ext.onnx.verification_work import Workload
from llama_ext.runtime.progress import ProgressBar
from llama_ext.runtime.threads import checked_threads

if TYPE_CHECKING:
    from llama_ext.runtime.loaded_model import LoadedModel
    from llama_ext.runtime.tokenizer import Tokenizer

__all__ = ["Check", "Fault", "NotRun", "ParityReport", "verify"]

# Short, and of several kinds: prose, code, another script.
_TEXTS = (
    "Once upon a time, there was a little girl who lived in a small house by the sea.",
    "def greatest(numbers):\n    return max(numbers) if numbers else None\n",
    "Le 14 juillet 1789, à Paris; 今天天气很好。",
)
# Tokens of each of them, at most.
_TEXT_TOKENS = 48
# Lengths of the pseudo-random texts of a model that has no tokenizer, or one without some character of these.
_RANDOM_LENGTHS = (48, 33, 17)


def verify(
    model_or_path: LoadedModel | str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    texts: str | Sequence[str] | Sequence[Sequence[int]] | None = None,
    steps: int = 64,
    variant: str | None = None,
    threads: int | None = None,
    runtimes: Sequence[str] = (),
    record: bool = True,
    progress: Callable[[str], object] | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> ParityReport:
    """Compares an exported graph in onnxruntime, the native model, and float64 arithmetic on the same stored weights.

    Compared are the logits of whole texts; greedy generation through the KV cache, where another token than the reference's
    counts only when the reference's gap is over twice the measured error; the same text in chunks and token by token; a batch of
    two that is padded on the left and on the right; a single token; the last positions of the context. When a comparison with
    onnxruntime fails, the report names the first layer and operation that differ. Of a classifier the scores of whole texts, of
    padded batches and of a single token are compared; it generates nothing.

    Args:
        model_or_path: What was exported: a loaded model, no adapter of which is active, a directory, a GGUF file or a Hub id.
        out_dir: What `export` wrote.
        texts: A text, texts, or lists of token ids, none of them empty. None: three short texts; pseudo-random ids
                for a model without a tokenizer, or with one that lacks a character of these texts.
        steps: Tokens to generate, >= 1; fewer where the context has no room for them, and none of a classifier.
        variant: Which graph, as for `OrtModel`. None: the one that genai_config.json names, which is the one exported last.
        threads: Of the native model and of onnxruntime. None: as many as a native model gets.
        runtimes: Others to compare, of "onnxruntime-genai" (its tokens) and "openvino". One that is not installed, or cannot run
            this graph, is not run, and the report has not passed.
        record: Whether to write the report's hash into the graph's metadata when it has passed, and to remove an older one when
            a runtime has failed.
        progress: Told what begins. None: a bar on a terminal.
        limits: What a file may ask for.

    Returns:
        The report; `report.passed` says whether everything was within its gates.

    Raises:
        FormatError: A file is missing or malformed, or the graph is not of such a model.
        OptionError: An option is out of range, a text is empty, the graph was made from another model, or an adapter is active,
            which no graph has.
        ContextLengthError: A text is longer than the context.
        TokenIdError: A token id outside the vocabulary.
        UnsupportedError: onnxruntime or onnx is not installed, or too old for the graph.
        OSError: The hash cannot be written.
    """
    started = time.perf_counter()
    count = whole("steps", steps, 1)
    check_limits(limits)
    number = checked_threads(threads)
    others = checked_runtimes(runtimes)
    _refuse_blank(texts)
    folder = Path(out_dir)
    path = _graph(folder, variant)
    graph = GraphFile(path)
    said = graph.metadata
    profile, dtype = said.get(metadata.PROFILE_KEY, ""), said.get(metadata.DTYPE_KEY, "")
    with open_source(model_or_path, graph, dtype, number, limits) as source:
        sequences = _sequences(texts, source)
        work = Workload.of(sequences, 0 if source.config.is_classifier else count, source.config)
        verification = Verification(graph, source, work, profile, dtype, number or None, others)
        with ProgressBar("Verifying", verification.stages, "of the stages") as bar:
            for stage in verification.run():
                bar.advance(1)
                if progress is not None:
                    progress(stage)
    report = ParityReport(
        profile=profile,
        dtype=dtype,
        files=_files(folder, graph),
        versions=_versions(verification.versions),
        machine=_machine(number),
        texts=_texts_record(sequences, texts is None),
        steps=work.steps,
        checks=tuple(verification.checks),
        loss=verification.loss,
        loss_note=verification.loss_note,
        not_run=tuple(verification.not_run),
        fault=verification.fault,
        required=verification.required,
        seconds=time.perf_counter() - started,
    )
    if record:
        _record(graph, report)
    return report


def _graph(folder: Path, variant: str | None) -> Path:
    if variant is None:
        config = folder / "genai_config.json"
        if config.is_file():
            decoder: Any = read_json_object(config, what="onnxruntime-genai's configuration")
            for key in ("model", "decoder", "filename"):
                decoder = decoder.get(key) if isinstance(decoder, dict) else None
            if isinstance(decoder, str):
                name = Path(decoder).name
                if (folder / "onnx" / name).is_file():
                    return folder / "onnx" / name
    return find_graph(folder, variant)


def _record(graph: GraphFile, report: ParityReport) -> None:
    """The hash of a report that has passed goes into the graph; one from before does not outlive a difference.

    A runtime that did not run says nothing of the graph.
    """
    there = graph.metadata.get(metadata.REPORT_KEY)
    if report.passed and there != report.hash:
        metadata.set_report_hash(graph.path, report.hash)
    elif report.differs and there:
        metadata.set_report_hash(graph.path, "")


# -- texts ------------------------------------------------------------------------------------------------------------------


def _refuse_blank(texts: object) -> None:
    """An empty text is no evidence, even where a tokenizer makes a BOS token of it."""
    several = [texts] if isinstance(texts, str) else texts if isinstance(texts, (list, tuple)) else []
    for index, text in enumerate(several):
        if isinstance(text, str) and not text.strip():
            raise OptionError(
                f"texts[{index}] is empty: nothing can be compared on it. Leave texts out for three short ones"
            )


def _sequences(texts: object, source: Source) -> list[np.ndarray[Any, np.dtype[np.int32]]]:
    """Token ids of the texts, at least one each."""
    config, tokenizer = source.config, source.tokenizer
    context = config.max_position_embeddings
    if texts is None:
        return _built_in(source)
    if isinstance(texts, str):
        texts = [texts]
    if not isinstance(texts, (list, tuple)) or not texts:
        raise OptionError("texts must be a text, or a list of texts or of lists of token ids")
    sequences = []
    for index, text in enumerate(texts):
        if isinstance(text, str):
            if tokenizer is None:
                raise OptionError("this model has no tokenizer: give texts as lists of token ids")
            ids = _encoded(tokenizer, text, config.vocab_size)
        else:
            ids = token_ids(f"texts[{index}]", text, config.vocab_size)
        if ids.size == 0:
            raise OptionError(f"texts[{index}] has no tokens")
        if ids.size > context:
            raise ContextLengthError(
                f"texts[{index}] has {ids.size} tokens, the model's context is {context}: nothing is cut silently"
            )
        sequences.append(ids)
    return sequences


def _built_in(source: Source) -> list[np.ndarray[Any, np.dtype[np.int32]]]:
    """Three short texts; pseudo-random ids where there is no tokenizer, or one that lacks a character of them."""
    config, tokenizer = source.config, source.tokenizer
    context = config.max_position_embeddings
    if tokenizer is not None:
        most = min(_TEXT_TOKENS, context)
        try:
            found = [_encoded(tokenizer, text, config.vocab_size)[:most] for text in _TEXTS]
        except OptionError:  # characters that it does not know
            found = []
        if found and all(ids.size for ids in found):
            return found
    rng = np.random.default_rng(20)
    lengths = [min(length, context) for length in _RANDOM_LENGTHS]
    found = [rng.integers(0, config.vocab_size, length).astype(np.int32) for length in lengths]
    # A classifier takes a padding token for padding wherever it is.
    pad = config.pad_token_id
    return found if pad is None else [np.where(ids == pad, (pad + 1) % config.vocab_size, ids) for ids in found]


def _encoded(tokenizer: Tokenizer, text: str, vocabulary: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return token_ids("the tokenizer's ids", tokenizer.encode(text), vocabulary)


# -- what the report says beside figures ------------------------------------------------------------------------------------


def _texts_record(sequences: Sequence[np.ndarray[Any, Any]], built_in: bool) -> dict[str, Any]:
    digest = hashlib.sha256()
    for ids in sequences:
        digest.update(len(ids).to_bytes(8, "little") + ids.astype("<i4").tobytes())
    return {
        "count": len(sequences),
        "tokens": int(sum(map(len, sequences))),
        "sha256": digest.hexdigest(),
        "built_in": built_in,
    }


def _files(folder: Path, graph: GraphFile) -> dict[str, str]:
    """sha256 of everything in the directory that belongs to this graph, by relative name."""
    relative = graph.path.relative_to(folder).as_posix()
    result = {relative: graph.hash(without=[metadata.REPORT_KEY])}
    small = [path for path in folder.iterdir() if path.is_file() and path.suffix in (".json", ".jinja", ".model")]
    data = [graph.path.parent / name for name in graph.data_files]
    for path in [*small, *data]:
        if path.is_file():
            with open(path, "rb") as file:
                digest = hashlib.sha256()
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
            result[path.relative_to(folder).as_posix()] = digest.hexdigest()
    return dict(sorted(result.items()))


def _versions(others: dict[str, str]) -> dict[str, str]:
    return {
        "llama_ext": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnx": str(require("onnx").__version__),
        "onnxruntime": str(require("onnxruntime").__version__),
        **others,
    }


def _machine(threads: int) -> dict[str, Any]:
    backend = _core.Backend("cpu", threads)
    return {
        "cpu": _core.cpu_name(),
        "cpu_features": list(_core.cpu_features()),
        "isa": backend.isa,
        "threads": backend.threads,
    }
