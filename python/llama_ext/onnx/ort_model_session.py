"""One exported graph in onnxruntime: its file, its inputs and outputs checked, and a pass over tokens with their KV cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_ext import _core
from llama_ext.errors import FormatError, LlamaExtError, OptionError, OutOfMemoryError, UnsupportedError
from llama_ext.models.config import LlamaConfig
from llama_ext.onnx.requirements import require

__all__ = ["GRAPH_FOLDER", "Cache", "OrtSession", "find_graph"]

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]
# Keys and values, in turn for each layer, (B, K, S, D), in onnxruntime's memory.
Cache = list[Any]

GRAPH_FOLDER = "onnx"

_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def find_graph(directory: str | os.PathLike[str], variant: str | None = None) -> Path:
    """The file of an exported graph.

    Args:
        directory: An export's directory, with onnx/model.onnx or another variant of it.
        variant: "model", "model_q4", ..., or without "model_": "q4". None: the only one, or model.onnx among several.

    Returns:
        The file.

    Raises:
        FormatError: There is no such directory, or no graph in it.
        OptionError: No such variant, or several and none of them is model.onnx.
    """
    folder = Path(directory) / GRAPH_FOLDER
    if not os.path.isdir(directory):
        raise FormatError(
            "expected the directory of an exported model, found no such directory.", path=os.fspath(directory)
        )
    names = sorted(path.stem for path in folder.glob("*.onnx")) if folder.is_dir() else []
    if not names:
        raise FormatError(
            f"expected {GRAPH_FOLDER}/model.onnx or a variant of it, found none. `llama-ext export-onnx` writes one.",
            path=os.fspath(directory),
        )
    if variant is None:
        if len(names) > 1 and "model" not in names:
            raise OptionError(f"{os.fspath(directory)} has {', '.join(names)}: say which with variant=")
        return folder / f"{'model' if 'model' in names else names[0]}.onnx"
    if not isinstance(variant, str):
        raise OptionError(f"variant must be a text or None, got {variant!r}")
    for name in (variant, f"model_{variant}"):
        if name in names:
            return folder / f"{name}.onnx"
    raise OptionError(f"{os.fspath(directory)} has no variant {variant!r}; it has {', '.join(names)}")


class OrtSession:
    """A graph, loaded on the CPU.

    Args:
        path: The .onnx file.
        config: Of the model that it has to be.
        threads: Of one operation; None: as many as a native model gets.
        copy: A copy of the graph that is loaded in its place; its data files are those beside `path`.
        float32: Whether onnxruntime keeps activations in float32 where it joins a product with the dequantisation of its weights.

    Attributes:
        path: The file.
        metadata: What the exporter wrote into it.
        threads: How many threads compute.
        has_cache: Whether it generates; a classifier does not.

    Raises:
        FormatError: onnxruntime does not load it, or its inputs and outputs are not those of such a model.
        UnsupportedError: onnxruntime is not installed, or has no kernels on the CPU for what the graph holds.
    """

    def __init__(
        self,
        path: Path,
        config: LlamaConfig,
        threads: int | None = None,
        *,
        copy: bytes | None = None,
        float32: bool = False,
    ) -> None:
        runtime = require("onnxruntime")
        self.path = path
        self.config = config
        self.threads = _core.default_threads()[0] if threads is None else threads
        options = runtime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what goes wrong is raised as well
        if float32:
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if copy is not None:
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", os.fspath(path.parent)
            )
        graph = os.fspath(path) if copy is None else copy
        try:
            self._session = runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the package's exceptions have no common base but this
            raise _not_loaded(path, error, runtime.__version__) from error
        self._version = str(runtime.__version__)
        self._make = runtime.OrtValue.ortvalue_from_numpy
        inputs = {each.name: each for each in self._session.get_inputs()}
        outputs = [each.name for each in self._session.get_outputs()]
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        self.has_cache = any(name.startswith("past_key_values.") for name in inputs)
        layers = range(config.num_hidden_layers if self.has_cache else 0)
        self._past = [f"past_key_values.{layer}.{kind}" for layer in layers for kind in ("key", "value")]
        self._present = [f"present.{layer}.{kind}" for layer in layers for kind in ("key", "value")]
        self._check(list(inputs), outputs, extra=copy is not None)
        kind = inputs[self._past[0]].type if self.has_cache else "tensor(float)"
        if kind not in _NUMPY_TYPES:
            raise UnsupportedError(f"{path}: a KV cache of {kind} is not run on the CPU in this version")
        self._kv_dtype = np.dtype(_NUMPY_TYPES[kind])

    def _check(self, inputs: Sequence[str], outputs: Sequence[str], *, extra: bool) -> None:
        """Nothing is missing, and nothing is there that nobody would feed; a copy may show more."""
        wanted = ["input_ids", "attention_mask", *(["position_ids"] if self.has_cache else []), *self._past]
        for what, found, expected, more in (
            ("inputs", set(inputs), set(wanted), False),
            ("outputs", set(outputs), {"logits", *self._present}, extra),
        ):
            missing, stray = sorted(expected - found), [] if more else sorted(found - expected)
            if missing or stray:
                parts = [f"{len(missing)} missing: {', '.join(missing[:3])}"] if missing else []
                parts += [f"{len(stray)} unexpected: {', '.join(stray[:3])}"] if stray else []
                raise FormatError(
                    f"the {what} of the graph are not those of the model in config.json: {'; '.join(parts)}.",
                    path=os.fspath(self.path),
                    field=(missing or stray)[0],
                )

    @property
    def profile(self) -> str | None:
        """What the graph is made of, by its own words; None when it has none."""
        return self.metadata.get("llama_ext.profile")

    @property
    def dtype(self) -> str | None:
        """How its weights are kept, by its own words; None when it has none."""
        return self.metadata.get("llama_ext.dtype")

    @property
    def kv_dtype(self) -> str:
        """How keys and values are kept: "float32" or "float16"."""
        return str(self._kv_dtype)

    def empty_cache(self, batch: int = 1) -> Cache:
        """The cache of sequences that have no tokens yet."""
        shape = (batch, self.config.num_key_value_heads, 0, self.config.head_dim)
        return [self._make(np.zeros(shape, self._kv_dtype)) for _ in self._past]

    def arrange(self, parts: Sequence[tuple[Cache, int, int, int]], length: int) -> Cache:
        """A cache made of rows of others, padded on the left.

        Args:
            parts: For each row of the new cache: a cache, a row of it, and where its positions begin and end there.
            length: Positions of the new cache, at least those of every row.

        Returns:
            The cache of len(parts) rows.

        Raises:
            OutOfMemoryError: The memory does not suffice.
        """
        heads, size = self.config.num_key_value_heads, self.config.head_dim
        result: Cache = []
        for index in range(len(self._past)):
            try:
                made = np.zeros((len(parts), heads, length, size), self._kv_dtype)
            except MemoryError as error:
                raise OutOfMemoryError(f"the KV caches of {len(parts)} sequences: {error}") from error
            sources: dict[int, Array] = {}
            for row, (cache, source, begin, end) in enumerate(parts):
                if id(cache) not in sources:
                    sources[id(cache)] = cache[index].numpy()
                array = sources[id(cache)]
                made[row, :, length - (end - begin) :] = array[source, :, begin:end]
            result.append(self._make(made))
        return result

    def run(
        self, ids: Array, mask: Array, positions: Array, past: Cache | None = None, *, cache: bool = True
    ) -> tuple[FloatArray, Cache]:
        """One pass.

        Args:
            ids: (B, T) int64.
            mask: (B, S + T) int64, 1 for what may be attended to.
            positions: (B, T) int64.
            past: Of S positions; None: no past.
            cache: Whether the new keys and values are wanted.

        Returns:
            Logits (B, T, V) float32; the cache of S + T positions, or [].

        Raises:
            LlamaExtError: onnxruntime refuses.
            OutOfMemoryError: The memory does not suffice.
        """
        names = ["logits", *(self._present if cache else [])]
        results = self._run(names, ids, mask, positions, past)
        logits = results[0].numpy().astype(np.float32, copy=False)
        return logits, list(results[1:])

    def values(
        self, names: Sequence[str], ids: Array, mask: Array, positions: Array, past: Cache | None = None
    ) -> list[Array]:
        """Some outputs of a pass.

        Args:
            names: Of outputs of the graph.
            ids, mask, positions, past: As `run`.

        Returns:
            Their values.

        Raises:
            LlamaExtError, OutOfMemoryError: As `run`.
        """
        return [each.numpy() for each in self._run(names, ids, mask, positions, past)]

    def _run(self, names: Sequence[str], ids: Array, mask: Array, positions: Array, past: Cache | None) -> list[Any]:
        feeds = {"input_ids": ids, "attention_mask": mask}
        if self.has_cache:
            feeds["position_ids"] = positions
        values = {name: self._make(np.ascontiguousarray(each, np.int64)) for name, each in feeds.items()}
        if self.has_cache:
            values.update(zip(self._past, self.empty_cache(len(ids)) if past is None else past, strict=True))
        try:
            results: list[Any] = self._session.run_with_ort_values(list(names), values)
        except MemoryError as error:
            raise OutOfMemoryError(f"onnxruntime: {error}") from error
        except Exception as error:  # the package's exceptions have no common base but this
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            if "bad_alloc" in reason or "Failed to allocate memory" in reason:
                raise OutOfMemoryError(f"onnxruntime: {reason}") from error
            raise LlamaExtError(f"{self.path}: onnxruntime {self._version}: {reason}") from error
        return results


def _not_loaded(path: Path, error: Exception, version: str) -> LlamaExtError:
    """What onnxruntime says of a graph that it does not load, with what to do."""
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    where = os.fspath(path)
    if "NOT_IMPLEMENTED" in reason or "Could not find an implementation" in reason:
        return UnsupportedError(
            f"{where}: onnxruntime {version} has no kernel on the CPU for what the graph holds: {reason}. bfloat16 graphs "
            "are for GPUs; a graph of profile 'ort' holds operations that need a recent onnxruntime."
        )
    if "opset" in reason or "ir_version" in reason or "IR version" in reason:
        return UnsupportedError(
            f"{where}: onnxruntime {version} is too old for this graph: {reason}. Update it, or export profile 'portable'."
        )
    return FormatError(f"onnxruntime {version} does not load it: {reason}", path=where)
