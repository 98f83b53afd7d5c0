"""Exported directories in onnxruntime, by its own interface alone: feeds and loops are written out here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs the extra 'onnx'")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")

PROFILES = ("portable", "standard", "ort")
DTYPES = ("float32", "float16", "int8", "int4")
# What runs on a CPU.
COMBINATIONS = [(profile, dtype) for profile in PROFILES for dtype in DTYPES if (profile, dtype) != ("ort", "float16")]
GOLDEN = ("mha-untied", "gqa-tied-llama3rope", "wide-head-dim", "linear-rope", "biases")

each_profile = pytest.mark.parametrize("profile", PROFILES)
each_combination = pytest.mark.parametrize(("profile", "dtype"), COMBINATIONS, ids=lambda value: value)


class Run:
    """A graph of a directory.

    Args:
        graph: The .onnx file.
        exact: Whether products of quantised weights keep float32 activations, where onnxruntime has the choice.
    """

    def __init__(self, graph: Path, *, exact: bool = True) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        if exact:
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        self.session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self.past = [each for each in self.session.get_inputs() if each.name.startswith("past")]

    def empty(self, batch: int = 1) -> list[Any]:
        dtype = np.float16 if self.past and self.past[0].type == "tensor(float16)" else np.float32
        return [np.zeros((batch, each.shape[1], 0, each.shape[3]), dtype) for each in self.past]

    def __call__(self, ids: Any, mask: Any = None, past: list[Any] | None = None) -> tuple[Any, list[Any]]:
        """Logits and the cache after it. mask: (B, T), those of the cache first."""
        ids = np.asarray(ids, np.int64)
        past = self.empty(len(ids)) if past is None else past
        before = past[0].shape[2] if past else 0
        mask = np.ones((len(ids), before + ids.shape[1]), np.int64) if mask is None else np.asarray(mask, np.int64)
        feeds = {"input_ids": ids, "attention_mask": mask}
        if self.past:
            feeds["position_ids"] = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, before:]
        feeds.update({each.name: values for each, values in zip(self.past, past, strict=True)})
        logits, *present = self.session.run(None, feeds)
        return logits, present

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        ids, past, step = list(prompt), None, prompt
        for _ in range(count):
            logits, past = self([step], past=past)
            step = [int(logits[0, -1].argmax())]
            ids += step
        return ids


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
