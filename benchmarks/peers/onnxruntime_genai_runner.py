"""onnxruntime-genai on the CPU. Its exported graph computes the head for every token of the prompt."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measure

_PRODUCTS = ("MatMul", "MatMulNBits", "Gemm")


class OnnxRuntimeGenai:
    """See measure.Engine."""

    def __init__(self, options: argparse.Namespace) -> None:
        import onnxruntime_genai

        self._library = onnxruntime_genai
        config = onnxruntime_genai.Config(str(options.genai))
        session_options = {"intra_op_num_threads": options.threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session_options}}}))
        self._model = onnxruntime_genai.Model(config)
        self._most = options.prompt + options.tokens + 8
        self._decode_bytes = _decode_bytes(options.genai)
        self._ids: list[int] = []

    def reset(self) -> None:
        parameters = self._library.GeneratorParams(self._model)
        parameters.set_search_options(max_length=self._most, min_length=self._most, do_sample=False)
        self._generator = self._library.Generator(self._model, parameters)

    def prefill(self, ids: list[int]) -> None:
        self._generator.append_tokens(np.array(ids, dtype=np.int32))
        self._generator.generate_next_token()  # only chooses: the logits are there

    def decode(self, tokens: int) -> int:
        for done in range(tokens):
            if self._generator.is_done():
                return done
            self._generator.generate_next_token()
        return tokens

    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"version": self._library.__version__}
        if self._decode_bytes is not None:
            facts["decode_bytes"] = self._decode_bytes
        return facts


def _decode_bytes(directory: Path) -> int | None:
    """The constant inputs of products, as stored; None when the package onnx is not there to read them."""
    try:
        import onnx
    except ModuleNotFoundError:
        return None
    graph = onnx.load(str(directory / "model.onnx"), load_external_data=False).graph
    used = {name for node in graph.node if node.op_type in _PRODUCTS for name in node.input}
    total = 0
    for tensor in graph.initializer:
        if tensor.name in used:
            total += int(np.prod(tensor.dims)) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return total


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--genai", type=Path, required=True)


if __name__ == "__main__":
    measure.run(_add_options, OnnxRuntimeGenai)
