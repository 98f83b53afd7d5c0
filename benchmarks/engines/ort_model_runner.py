"""llama_ext.onnx.OrtModel: an exported directory in onnxruntime, by the same loop that `OrtModel.generate` runs.

Exported graphs give logits for every token of a prompt, so the head is computed for all of them in prefill.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measure


class OrtModelEngine:
    """See measure.Engine."""

    def __init__(self, options: argparse.Namespace) -> None:
        import onnxruntime

        import llama_ext
        from llama_ext.onnx.ort_model import OrtModel

        self._versions = {"version": onnxruntime.__version__, "llama_ext": llama_ext.__version__}
        self._model = OrtModel(options.onnx, variant=options.variant, threads=options.threads)
        self.reset()

    def reset(self) -> None:
        self._generation: Any = None

    def prefill(self, ids: list[int]) -> None:
        # The first token that is drawn comes with the prompt's pass: it is what prefill gives.
        prompt = np.array(ids, dtype=np.int32)
        room = self._model.config.max_position_embeddings - len(ids)
        self._generation = self._model.begin([prompt], sampling={}, max_new_tokens=[room], eos=[], seed=0)
        self._generation.step()

    def decode(self, tokens: int) -> int:
        return len(self._generation.run(tokens))

    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            **self._versions,
            "profile": self._model.profile,
            "dtype": self._model.dtype,
            "kv_dtype": self._model.kv_dtype,
        }
        decode_bytes = _decode_bytes(self._model.path)
        if decode_bytes is not None:
            facts["decode_bytes"] = decode_bytes
        return facts


def _decode_bytes(graph: Path) -> int | None:
    """What is stored for products, read once a token; None when the package onnx is not there to read it."""
    try:
        import onnx
    except ModuleNotFoundError:
        return None
    model = onnx.load(str(graph), load_external_data=False).graph
    made_from = {output: list(node.input) for node in model.node for output in node.output}
    weights = {tensor.name: tensor for tensor in model.initializer}
    used: set[str] = set()
    # A product's weight may be made of stored tensors on the way: transposed, dequantised, cast, joined.
    waiting = [
        name for node in model.node if node.op_type in ("MatMul", "MatMulNBits", "Gemm") for name in node.input[1:]
    ]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in weights:
            used.add(name)
        elif _is_of_weights(name, made_from, weights):
            waiting += made_from[name]
    total = 0
    for name in used:
        tensor = weights[name]
        length = next((int(entry.value) for entry in tensor.external_data if entry.key == "length"), 0)
        total += length
    return total


def _is_of_weights(name: str, made_from: dict[str, list[str]], weights: dict[str, Any]) -> bool:
    """Whether a value follows from stored tensors alone, and not from what is computed for a token."""
    waiting = [name]
    seen: set[str] = set()
    while waiting:
        value = waiting.pop()
        if value in seen or value in weights or not value:
            continue
        seen.add(value)
        if value not in made_from:  # an input of the graph
            return False
        waiting += made_from[value]
    return True


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--onnx", type=Path, required=True, help="what llama-ext export-onnx wrote")
    parser.add_argument("--variant", help="which graph of several: q4, quantized")


if __name__ == "__main__":
    measure.run(_add_options, OrtModelEngine)
