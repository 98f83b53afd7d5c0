"""An export holds one matrix at a time, whatever the size of the model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import llama_ext
from llama_ext.io.checkpoint import write_safetensors
from llama_ext.models.llama import tensor_specs
from shared_data import LETTERS

pytest.importorskip("onnx", reason="needs the extra 'onnx'")

MEASURE = """
import sys
from llama_ext.onnx import export

def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024

export(sys.argv[5], sys.argv[2] + "/first", profile=sys.argv[3], dtype=sys.argv[4], verify=False)  # everything is imported
before = peak()
result = export(sys.argv[1], sys.argv[2] + "/out", profile=sys.argv[3], dtype=sys.argv[4], verify=False)
print(peak() - before, result.nbytes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("profile", "dtype", "times"), [("standard", "float32", 2.0), ("portable", "float16", 2.0), ("ort", "int4", 4.0)]
)
def test_the_peak_of_memory_is_a_matrix_or_two(profile: str, dtype: str, times: float, tmp_path: Path) -> None:
    """Failure elsewhere: out of memory while exporting. Mapped pages count here: they are given back matrix by matrix."""
    config = llama_ext.LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    config.save_pretrained(tmp_path)
    tensors = [
        (spec.name, "bfloat16", spec.shape, lambda shape=spec.shape: [np.full(shape, 0x3C00, dtype=np.uint16)])
        for spec in tensor_specs(config)
    ]
    write_safetensors(tmp_path / "model.safetensors", tensors)
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(tmp_path / "out"), profile, dtype, str(LETTERS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    growth, nbytes = (int(word) for word in done.stdout.split())
    largest = 8192 * 1024 * 2  # the head, as it is stored
    assert nbytes > 3 * largest
    assert growth < times * largest
