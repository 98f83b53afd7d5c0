"""Runtimes that may be compared as well where they are installed: onnxruntime-genai, by its tokens, and OpenVINO."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_ext.errors import LlamaExtError, OptionError
from llama_ext.models.config import LlamaConfig

__all__ = [
    "GENAI",
    "OPENVINO",
    "OTHERS",
    "OpenVinoSession",
    "checked_runtimes",
    "genai_tokens",
    "installed",
    "version_of",
]

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]
Cache = list[Any]

GENAI, OPENVINO = "onnxruntime-genai", "openvino"
# The name of each, and of its module.
OTHERS = {GENAI: "onnxruntime_genai", OPENVINO: "openvino"}


def checked_runtimes(names: object) -> tuple[str, ...]:
    """The runtimes that a caller asks for.

    Raises:
        OptionError: One of them is not known.
    """
    if not isinstance(names, (list, tuple)) or any(name not in OTHERS for name in names):
        raise OptionError(f"runtimes must be a list of {' and '.join(OTHERS)}, got {names!r}")
    return tuple(dict.fromkeys(names))


def installed(name: str) -> Any:
    """The module of a runtime, or None when it is not installed."""
    try:
        return importlib.import_module(OTHERS[name])
    except ImportError:
        return None


def genai_tokens(
    library: Any, graph: Path, prompt: npt.NDArray[np.int32], steps: int, threads: int
) -> npt.NDArray[np.int32]:
    """What onnxruntime-genai generates greedily; it ends early at an end token.

    Args:
        library: The module.
        graph: The .onnx file, which genai_config.json has to name.
        prompt: Token ids.
        steps: Tokens to generate.
        threads: Of one operation.

    Returns:
        The tokens after the prompt, at least one.

    Raises:
        LlamaExtError: genai_config.json is of another graph, or the runtime refuses.
    """
    folder = graph.parent.parent
    try:
        decoder = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
        named = Path(decoder["filename"]).name
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LlamaExtError(f"{folder}: genai_config.json does not say which graph to run: {error}") from error
    if named != graph.name:
        raise LlamaExtError(f"{folder}: genai_config.json names {named}, not {graph.name}: export that one last")
    try:
        config = library.Config(str(folder))
        options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
        config.overlay(json.dumps(options))
        model = library.Model(config)
        parameters = library.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + steps, do_sample=False)
        generator = library.Generator(model, parameters)
        generator.append_tokens(prompt.astype(np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        tokens = np.array(generator.get_sequence(0), dtype=np.int32)[len(prompt) :]
    except Exception as error:  # the package has no base class of its own
        raise LlamaExtError(f"{graph}: onnxruntime-genai: {_first_line(error)}") from error
    return tokens


class OpenVinoSession:
    """A graph in OpenVINO, on the CPU and in float32, with what `OrtSession` has for a comparison.

    Args:
        library: The module.
        path: The .onnx file.
        config: The model.
        threads: How many.

    Raises:
        LlamaExtError: OpenVINO does not read it.
    """

    has_cache = True

    def __init__(self, library: Any, path: Path, config: LlamaConfig, threads: int) -> None:
        self.path = path
        self.config = config
        self.threads = threads
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
            # Activations stay as they are.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
            "KV_CACHE_PRECISION": "f32",
        }
        try:
            core = library.Core()
            self._model = core.compile_model(core.read_model(str(path)), "CPU", settings)
            self._request = self._model.create_infer_request()
        except Exception as error:  # as above
            raise LlamaExtError(f"{path}: OpenVINO does not read it: {_first_line(error)}") from error
        layers = range(config.num_hidden_layers)
        self._past = [f"past_key_values.{layer}.{kind}" for layer in layers for kind in ("key", "value")]
        self._present = [f"present.{layer}.{kind}" for layer in layers for kind in ("key", "value")]
        half = any(
            "f16" in str(each.get_element_type()) for each in self._model.inputs if each.get_any_name() in self._past
        )
        self._kv_dtype = np.float16 if half else np.float32

    def run(
        self, ids: Array, mask: Array, positions: Array, past: Cache | None = None, *, cache: bool = True
    ) -> tuple[FloatArray, Cache]:
        """As `OrtSession.run`."""
        logits, *present = self.values(["logits", *(self._present if cache else [])], ids, mask, positions, past)
        return logits.astype(np.float32, copy=False), present

    def values(
        self, names: Sequence[str], ids: Array, mask: Array, positions: Array, past: Cache | None = None
    ) -> list[Array]:
        """As `OrtSession.values`."""
        if past is None:
            shape = (len(ids), self.config.num_key_value_heads, 0, self.config.head_dim)
            past = [np.zeros(shape, self._kv_dtype) for _ in self._past]
        feeds = {
            "input_ids": np.ascontiguousarray(ids, np.int64),
            "attention_mask": np.ascontiguousarray(mask, np.int64),
            "position_ids": np.ascontiguousarray(positions, np.int64),
            **dict(zip(self._past, past, strict=True)),
        }
        there = {each.get_any_name() for each in self._model.inputs}
        try:
            self._request.infer({name: value for name, value in feeds.items() if name in there})
            return [np.array(self._request.get_tensor(name).data) for name in names]
        except Exception as error:  # as above
            raise LlamaExtError(f"{self.path}: OpenVINO: {_first_line(error)}") from error


def version_of(library: Any) -> str:
    """What a runtime calls its version."""
    with contextlib.suppress(Exception):
        return str(library.__version__)
    return "unknown"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
