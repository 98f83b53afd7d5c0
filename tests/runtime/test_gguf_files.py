"""GGUF files as models: every type of blocks kept as it is, the file's own tokenizer, memory, and damaged files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguf_models
import llama_ext
from gguf_models import BLOCKS, TYPES
from llama_ext import _core
from llama_ext.errors import FormatError, LimitError, OptionError, UnsupportedError
from llama_ext.io.gguf_file import GgufFile
from llama_ext.io.gguf_types import BY_NAME
from llama_ext.io.gguf_writer import TensorToWrite, write_gguf
from shared_data import SHARED, requires_shared
from small_config import LLAMA3

Model = llama_ext.LlamaForCausalLM
IDS = np.random.default_rng(1).integers(0, 96, (2, 40))
# Float32 against float64 over two layers: 1.0e-6 to 2.1e-6 on each ISA, and the same bits with the weights widened beforehand.
FLOAT32 = 4e-6

MIXED: dict[str, dict[str, str]] = {
    "as Q4_K_M": {"": "Q4_K", ".v": "Q6_K", "down": "Q6_K", "head": "Q6_K"},
    "q, k and v of three types": {"": "Q4_0", ".k": "Q5_1", ".v": "Q8_0"},
    "gate and up of two types": {"": "Q5_K", "gate": "Q8_0"},
    "blocks and floats": {"": "Q4_1", ".q": "F16", "up": "BF16", "o": "F32", "embedding": "F16"},
}


def relative_rms(found: Any, expected: Any) -> float:
    expected = np.asarray(expected, dtype=np.float64)
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


@pytest.mark.parametrize("kind", [*TYPES, *MIXED])
def test_logits_are_those_of_the_dequantised_weights(kind: str, tmp_path: Path) -> None:
    path, config = tmp_path / "x.gguf", gguf_models.config()
    gguf_models.write(path, config, MIXED.get(kind, kind))
    expected = gguf_models.as_floats(path, config)(IDS)
    exact = Model.from_pretrained(path, compute="exact")
    assert relative_rms(exact(IDS), expected) < FLOAT32
    assert relative_rms(Model.from_pretrained(path, compute="exact", dtype="float32")(IDS), expected) < FLOAT32
    # The fastest arithmetic rounds activations to 8 bits where weights are quantised.
    assert relative_rms(Model.from_pretrained(path)(IDS), expected) < 3e-2


@pytest.mark.parametrize("kind", MIXED)
def test_each_matrix_is_kept_in_its_own_type(kind: str, tmp_path: Path) -> None:
    path, config = tmp_path / "x.gguf", gguf_models.config()
    gguf_models.write(path, config, MIXED[kind])
    model = Model.from_pretrained(path)
    types = model._core.types()
    words = {"F32": ("float32", 0), "F16": ("float16", 0), "BF16": ("bfloat16", 0)}
    for slot, shape, is_matrix in model._core.slots():
        part = next((part for part in MIXED[kind] if part and slot.endswith(part)), "")
        name = MIXED[kind][part]
        assert not is_matrix or types[slot] == (words.get(name) or _core.type_of_blocks(name)), (slot, shape)


@pytest.mark.parametrize("kind", BLOCKS)
def test_memory_is_that_of_the_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    gguf_models.write(path, gguf_models.config(hidden_size=1024, intermediate_size=2048, vocab_size=2048), kind)
    assert Model.from_pretrained(path).nbytes < 1.1 * path.stat().st_size


MEASURE = """
import sys
import llama_ext
from llama_ext.runtime import model

def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024

before = peak()
loaded = llama_ext.LlamaForCausalLM.from_pretrained(sys.argv[1])
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "F16"])
def test_loading_never_holds_the_file_twice(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    config = gguf_models.config(hidden_size=1024, intermediate_size=2816, vocab_size=8192, num_hidden_layers=6)
    gguf_models.write(path, config, kind)
    command = [sys.executable, "-c", MEASURE, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    # Beside the weights, the largest tensor of the file, which is a tenth of this one.
    assert float(result.stdout) < 1.2 * path.stat().st_size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "int4"])
def test_a_dtype_by_name_converts(dtype: str, tmp_path: Path) -> None:
    path, config = tmp_path / "x.gguf", gguf_models.config()
    gguf_models.write(path, config, MIXED["as Q4_K_M"])
    model = Model.from_pretrained(path, dtype=dtype)
    assert model.dtype == dtype
    most = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 3e-2, "int8": 5e-2, "int4": 0.5}[dtype]
    assert relative_rms(model(IDS), gguf_models.as_floats(path, config)(IDS)) < most
    with pytest.raises(OptionError, match="group_size belongs to"):
        Model.from_pretrained(path, group_size=32)


def test_the_scaling_of_llama3_and_biases_and_a_tied_head_come_through(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    config = gguf_models.config(rope_scaling=LLAMA3, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    gguf_models.write(path, config, "Q5_0")
    model = Model.from_pretrained(path, compute="exact")
    assert model.config.rope_parameters == config.rope_parameters
    assert model.config.tie_word_embeddings
    assert relative_rms(model(IDS), gguf_models.as_floats(path, config)(IDS)) < FLOAT32


def test_a_directory_with_one_file_is_that_file(tmp_path: Path) -> None:
    gguf_models.write(tmp_path / "x.gguf", gguf_models.config(), "Q8_0")
    model = Model.from_pretrained(tmp_path)
    np.testing.assert_array_equal(model(IDS), Model.from_pretrained(tmp_path / "x.gguf")(IDS))
    (tmp_path / "x.gguf").rename(tmp_path / "named otherwise")
    np.testing.assert_array_equal(model(IDS), Model.from_pretrained(tmp_path / "named otherwise")(IDS))
    gguf_models.write(tmp_path / "x.gguf", gguf_models.config(), "Q8_0")
    gguf_models.write(tmp_path / "y.gguf", gguf_models.config(), "Q8_0")
    with pytest.raises(FormatError, match=r"2 GGUF files here: x\.gguf, y\.gguf\. Name the one"):
        Model.from_pretrained(tmp_path)


@requires_shared
def test_tokenizer_template_and_ends_are_the_files_own(tmp_path: Path) -> None:
    source = Model.from_pretrained(SHARED / "stories260K")
    assert source.tokenizer is not None
    source.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    source.save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    llama_ext.convert(tmp_path / "source", tmp_path / "x.gguf")
    model = Model.from_pretrained(tmp_path / "x.gguf")
    assert model.eos_token_ids == (2, 7)
    for tokenizer in (model.tokenizer, llama_ext.Tokenizer.from_pretrained(tmp_path / "x.gguf")):
        assert tokenizer is not None
        assert tokenizer.encode("Once upon a time") == source.tokenizer.encode("Once upon a time")
        assert tokenizer.chat_template == source.tokenizer.chat_template


@requires_shared
def test_a_truncated_file_is_a_typed_error(tmp_path: Path) -> None:
    whole, cut = tmp_path / "x.gguf", tmp_path / "cut.gguf"
    llama_ext.convert(SHARED / "stories260K", whole, dtype="q8_0")
    data = whole.read_bytes()
    points = {*range(64), *np.linspace(64, len(data) - 33, 60).astype(int).tolist()}
    for point in sorted(points):
        cut.write_bytes(data[:point])
        with pytest.raises((FormatError, UnsupportedError, LimitError)):
            Model.from_pretrained(cut)


def test_a_file_that_shrinks_and_weights_that_are_no_numbers(tmp_path: Path) -> None:
    path, config = tmp_path / "x.gguf", gguf_models.config()
    gguf_models.write(path, config, "Q8_0")
    with GgufFile(path) as file:
        at = file.tensors["blk.0.attn_v.weight"].offset
    data = bytearray(path.read_bytes())
    data[at : at + 2] = b"\x00\x7c"  # infinity
    path.write_bytes(data)
    with pytest.raises(llama_ext.CheckpointError, match=r"x\.gguf") as caught:
        Model.from_pretrained(path)
    assert caught.value.path == str(path)


def test_what_is_not_supported_is_named(tmp_path: Path) -> None:
    path, config = tmp_path / "x.gguf", gguf_models.config()
    gguf_models.write(path, config, "F32", **{"general.architecture": "mamba"})
    with pytest.raises(UnsupportedError, match="mamba"):
        Model.from_pretrained(path)
    write_gguf(path, {}, [TensorToWrite("x", BY_NAME["F32"], (4, 4), lambda: [np.zeros((4, 4), np.float32)])])
    path.write_bytes(
        path.read_bytes().replace(b"\0\0\0\x04\0\0\0\0\0\0\0\0\0\0\0", b"\0\0\0\x04\0\0\0\0\0\0\0\x10\0\0\0", 1)
    )
    with pytest.raises(UnsupportedError, match="IQ2_XXS"):
        Model.from_pretrained(path)
