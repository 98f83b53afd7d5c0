"""A damaged GGUF file as a model: whatever is wrong with it, a typed error within two seconds, or a model that runs."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gguf_models
import llama_ext
from gguf_models import BLOCKS
from llama_ext import _core
from llama_ext.errors import CheckpointError, LlamaExtError, NumericError
from llama_ext.io.gguf_file import GgufFile
from llama_ext.io.gguf_types import BY_NAME
from subprocesses import run_script
from timing import within

Model = llama_ext.LlamaForCausalLM
IDS = np.arange(12)[None]
BOUNDARIES = [0, 1, 2, 3, 31, 32, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]
FLOATS = [0.0, -0.0, 1e-45, 1e-38, 1e38, -1.0, float("inf"), float("-inf"), float("nan")]


def small(**changes: Any) -> Any:
    return gguf_models.config(
        **{"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, **changes}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


@pytest.fixture(scope="module")
def whole(folder: Path) -> bytes:
    gguf_models.write(folder / "whole.gguf", small(), {"": "Q8_0", "down": "Q4_1", "head": "F16"})
    Model.from_pretrained(folder / "whole.gguf")
    return (folder / "whole.gguf").read_bytes()


def header_length(path: Path) -> int:
    with GgufFile(path) as file:
        return min(tensor.offset for tensor in file.tensors.values())


def judge(path: Path, data: bytes) -> LlamaExtError | None:
    """The error of loading and running the file; None for a model that runs."""
    path.write_bytes(data)
    refusal = None
    with within(0.2):
        try:
            Model.from_pretrained(path)(IDS)
        except LlamaExtError as error:
            refusal = error
    assert refusal is None or len(str(refusal)) < 2000
    return refusal


def test_every_truncation_is_a_typed_error(folder: Path, whole: bytes) -> None:
    header = header_length(folder / "whole.gguf")
    for length in [*range(header + 1), *range(header, len(whole), 97), len(whole) - 33]:
        assert judge(folder / "x.gguf", whole[:length]) is not None, length


def test_a_bit_flip_in_every_byte_of_the_header_is_judged(folder: Path, whole: bytes) -> None:
    data = bytearray(whole)
    refused = 0
    for position in range(header_length(folder / "whole.gguf")):
        bit = 1 << (position * 5 + 3) % 8
        data[position] ^= bit
        refused += judge(folder / "x.gguf", bytes(data)) is not None
        data[position] ^= bit
    assert refused > 500


def entries(path: Path) -> Iterator[tuple[str, Any]]:
    """The numbers among the file's entries."""
    with GgufFile(path) as file:
        for key, value in file.metadata.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                yield key, value


def test_every_number_of_the_model_at_its_boundaries(folder: Path, whole: bytes) -> None:
    tried = 0
    for key, value in entries(folder / "whole.gguf"):
        at = whole.index(key.encode()) + len(key)
        kind = struct.unpack_from("<I", whole, at)[0]
        code = {4: "I", 5: "i", 6: "f", 10: "Q", 12: "d"}[kind]
        assert struct.unpack_from("<" + code, whole, at + 4)[0] == pytest.approx(value)
        for other in FLOATS if code in "fd" else [*BOUNDARIES, (1 << 63) - 1, (1 << 64) - 1]:
            if code in "Ii":
                assert isinstance(other, int)
                other %= 1 << 32
            data = bytearray(whole)
            struct.pack_into("<" + code.upper() if code == "i" else "<" + code, data, at + 4, other)
            error = judge(folder / "x.gguf", bytes(data))
            tried += 1
            shape = ("embedding_length", "block_count", "feed_forward_length", "head_count", "head_count_kv")
            if key.endswith(shape) and other != value:  # the tensors would not fit
                assert error is not None, (key, other)
    assert tried > 80


@pytest.mark.parametrize("kind", BLOCKS)
def test_scales_that_are_no_numbers_are_refused_and_extreme_ones_run_or_overflow(kind: str, folder: Path) -> None:
    path = folder / "x.gguf"
    gguf_models.write(path, gguf_models.config(num_hidden_layers=1), kind)
    with GgufFile(path) as file:
        places = {name: tensor.offset for name, tensor in file.tensors.items() if tensor.type.name == kind}
    good = path.read_bytes()
    halves = [208] if kind == "Q6_K" else [0, 2] if kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else [0]
    for name, offset in places.items():
        for half in halves:
            for bits in (0x7C00, 0xFC00, 0x7C01, 0xFE00, 0x7BFF, 0xFBFF, 0x0001, 0x8000):
                data = bytearray(good)
                struct.pack_into("<H", data, offset + half, bits)
                error = judge(path, bytes(data))
                if bits & 0x7C00 == 0x7C00:
                    assert isinstance(error, CheckpointError), (name, half, bits)
                    assert str(path) in str(error)
                else:
                    assert error is None, (name, half, bits)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(BLOCKS),
    seed=st.integers(0, 2**32 - 1),
    fill=st.sampled_from([None, 0x00, 0x3F, 0x7B, 0x80, 0xC0, 0xFB, 0xFF]),
)
def test_blocks_of_any_bytes_are_refused_or_run(kind: str, seed: int, fill: int | None) -> None:
    rng = np.random.default_rng(seed)
    block = BY_NAME[kind]
    shape = (33, 2 * block.block)
    data = rng.integers(0, 256, (shape[0], 2 * block.block_bytes), dtype=np.uint8)
    if fill is not None:
        data[:] = fill
    backend = _core.Backend("cpu", 2)
    try:
        matrix = backend.block_matrix(data, kind, shape[1])
    except CheckpointError:
        assert fill in (None, 0xFF)
        return
    assert np.isfinite(matrix.to_array()).all()
    out = np.full((3, shape[0]), np.nan, np.float32)
    backend.matmul(np.ones((3, shape[1]), np.float32), matrix, None, out)
    assert np.isfinite(out).all()


def test_weights_at_the_end_of_float16_give_a_numeric_error_or_logits(folder: Path) -> None:
    path = folder / "x.gguf"
    gguf_models.write(path, gguf_models.config(num_hidden_layers=1), "Q6_K")
    with GgufFile(path) as file:
        matrices = [(t.offset, t.nbytes) for t in file.tensors.values() if t.type.name == "Q6_K"]
    data = bytearray(path.read_bytes())
    for offset, nbytes in matrices:
        for block in range(offset, offset + nbytes, 210):
            data[block + 192 : block + 208] = bytes([0x80] * 16)  # every sub-scale -128
            struct.pack_into("<H", data, block + 208, 0x7BFF)
    error = judge(path, bytes(data))
    assert error is None or isinstance(error, NumericError)


def test_memory_is_bounded_by_the_file(folder: Path, whole: bytes) -> None:
    """Numbers that ask for much: none of them gets it before the file is seen not to have it."""
    (folder / "whole.gguf").write_bytes(whole)
    script = """
        import struct, sys
        import numpy as np
        import llama_ext
        from llama_ext.io.gguf_file import GgufFile

        def peak():
            for line in open("/proc/self/status"):
                if line.startswith("VmHWM"):
                    return int(line.split()[1]) * 1024

        path, other = sys.argv[1], sys.argv[1] + ".other"
        good = open(path, "rb").read()
        llama_ext.LlamaForCausalLM.from_pretrained(path)(np.arange(12)[None])
        before, tried = peak(), 0
        with GgufFile(path) as file:
            places = [good.index(key.encode()) + len(key) for key in file.metadata]
            places += [good.index(name.encode()) + len(name) for name in file.tensors]
        for place in places:
            for at in range(place, place + 24, 4):
                for value in (0, 1 << 16, 1 << 20, 1 << 28, (1 << 32) - 1):
                    data = bytearray(good)
                    struct.pack_into("<I", data, at, value)
                    open(other, "wb").write(data)
                    tried += 1
                    try:
                        llama_ext.LlamaForCausalLM.from_pretrained(other)
                    except llama_ext.LlamaExtError:
                        pass
        print(tried, peak() - before)
    """
    tried, grown = map(int, run_script(script, str(folder / "whole.gguf"), timeout=300).split())
    assert tried > 500
    # A sanitizer keeps what is freed for a while.
    assert grown < (64 << 20 if _core.build_info()["sanitizers"] == "OFF" else 1 << 30)
