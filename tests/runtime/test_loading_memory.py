"""Loading holds the weights once: the checkpoint is read tensor by tensor and its pages are given back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import llama_ext
from llama_ext.io.checkpoint import write_safetensors
from llama_ext.models.llama import tensor_specs

MEASURE = """
import sys
import llama_ext
from llama_ext.runtime import model

def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024

before = peak()
loaded = llama_ext.LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=sys.argv[2])
print((peak() - before) / loaded.nbytes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("stored", "dtype"), [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_the_peak_of_memory_is_the_weights_and_little_more(stored: str, dtype: str, tmp_path: Path) -> None:
    config = llama_ext.LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    config.save_pretrained(tmp_path)
    kind = np.uint16 if stored == "bfloat16" else np.float32
    tensors = [
        (spec.name, stored, spec.shape, lambda shape=spec.shape: [np.full(shape, 1, dtype=kind)])
        for spec in tensor_specs(config)
    ]
    write_safetensors(tmp_path / "model.safetensors", tensors)
    command = [sys.executable, "-c", MEASURE, str(tmp_path), dtype]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert float(result.stdout) < 1.15
