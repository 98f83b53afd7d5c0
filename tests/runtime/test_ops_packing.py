"""`llama_ext.ops.pack` and its like: weights in few bits through the public functions, and what is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

import llama_ext
from devices import HAS_CUDA, requires_cuda
from llama_ext import ops
from llama_ext.io import gguf_types
from quantized import blocks, dequantize
from tolerances import relative_rms

DEVICES = ["cpu", "reference", *(["cuda"] if HAS_CUDA else [])]


@pytest.fixture
def normal(rng: np.random.Generator) -> Any:
    return lambda *shape: rng.standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("symmetric", [None, True, False])
@pytest.mark.parametrize("group_size", [None, 32, 64, 128])
@pytest.mark.parametrize("dtype", ["int8", "int5", "int4"])
def test_a_packed_matrix_is_what_quantize_says(
    dtype: str, group_size: int | None, symmetric: bool | None, device: str, normal: Any
) -> None:
    x, weight = normal(3, 192), normal(40, 192)
    codes, scales, minima = ops.quantize(weight, dtype, group_size=group_size, symmetric=symmetric)
    group = group_size or 64  # the largest that divides 192
    assert (codes.dtype, scales.dtype) == (np.uint8 if symmetric is False else np.int8, np.float16)
    assert (minima is None) == (symmetric is not False)
    exact = dequantize(codes, scales, minima, group)
    matrix = ops.pack(weight, dtype, group_size=group_size, symmetric=symmetric, device=device)
    assert (matrix.dtype, matrix.group_size, matrix.symmetric) == (dtype, group, symmetric is not False)
    assert f"in groups of {group}" in repr(matrix)
    np.testing.assert_array_equal(matrix.to_array(), exact.astype(np.float32))
    assert relative_rms(ops.matmul(x, matrix, compute="exact"), x @ exact.T) < 2e-6
    assert relative_rms(ops.matmul(x, matrix), x @ exact.T) < 2e-2
    np.testing.assert_array_equal(ops.embedding(np.array([[39, 0]]), matrix), exact[[[39, 0]]].astype(np.float32))
    if group_size is None and symmetric is None:
        np.testing.assert_array_equal(ops.matmul(x, weight, dtype=dtype, device=device), ops.matmul(x, matrix))


@pytest.mark.parametrize(("columns", "group"), [(128, 128), (192, 64), (96, 32), (100, 32), (1, 32), (0, 128)])
def test_the_default_group_divides_the_columns(columns: int, group: int, normal: Any) -> None:
    assert ops.pack(normal(2, columns), "int8").group_size == group


def test_float16_weights_are_rounded_to_nearest(normal: Any) -> None:
    weight = normal(20, 33)
    matrix = ops.pack(weight, "float16")
    assert (matrix.dtype, matrix.group_size, matrix.symmetric) == ("float16", None, True)
    np.testing.assert_array_equal(matrix.to_array(), weight.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("device", DEVICES)
def test_feed_forward_takes_packed_weights_in_every_form(device: str, normal: Any) -> None:
    x, gate, up, down = normal(2, 3, 64), normal(96, 64) / 8, normal(96, 64) / 8, normal(64, 96) / 8
    pair = ops.pack_gate_up(gate, up, "int8", device=device)
    assert pair.shape == (96, 64)
    together = ops.feed_forward(x, pair, ops.pack(down, "int4", device=device), compute="exact")
    apart = ops.feed_forward(
        x,
        (ops.pack(gate, "int8", device=device), ops.pack(up, "int8", device=device)),
        ops.pack(down, "int4", device=device),
        compute="exact",
    )
    assert relative_rms(apart, together) < 1e-6
    mixed = (ops.pack(gate, "int8", device=device), ops.pack(up, "int4", device=device))
    found = ops.feed_forward(x, mixed, down, compute="exact")
    wide = [matrix.to_array().astype(np.float64) for matrix in (*mixed, ops.pack(down, "int8"))]
    z = x @ wide[0].T
    assert relative_rms(found, z / (1 + np.exp(-z)) * (x @ wide[1].T) @ wide[2].T) < 3e-6
    np.testing.assert_array_equal(
        ops.feed_forward(x, (gate, up), down, dtype="int8", device=device),
        ops.feed_forward(x, pair, ops.pack(down, "int8", device=device)),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"])
def test_blocks_of_gguf_are_packed_as_they_are(name: str, device: str, rng: np.random.Generator, normal: Any) -> None:
    made = blocks(name, rng, 40, 512)
    exact = gguf_types.dequantize(made, gguf_types.BY_NAME[name])
    matrix = ops.pack_blocks(made, name, 512, device=device)
    assert matrix.shape == (40, 512)
    assert matrix.group_size == (16 if name == "Q6_K" else 32)
    assert matrix.symmetric == name.endswith(("_0", "6_K"))
    np.testing.assert_array_equal(matrix.to_array(), exact)
    x = normal(3, 512)
    assert relative_rms(ops.matmul(x, matrix, compute="exact"), x.astype(np.float64) @ exact.T) < 2e-6


def test_importance_reaches_both_halves(rng: np.random.Generator, normal: Any) -> None:
    weight = normal(40, 128)
    importance = np.exp(2 * rng.standard_normal(128)).astype(np.float32)
    alone = ops.pack(weight, "int4", importance=importance).to_array()
    pair = ops.pack_gate_up(weight, weight, "int4", importance=importance).to_array()
    np.testing.assert_array_equal(pair.reshape(-1, 2, 16, 128)[:, 0].reshape(-1, 128)[:40], alone)
    np.testing.assert_array_equal(pair.reshape(-1, 2, 16, 128)[:, 1].reshape(-1, 128)[:40], alone)
    assert (alone != ops.pack(weight, "int4").to_array()).any()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"dtype": "int3"}, llama_ext.DTypeError, "int3"),
        ({"dtype": "q4_k"}, llama_ext.DTypeError, "q4_k"),
        ({"dtype": "int4", "group_size": 48}, llama_ext.OptionError, "128, 64, 32"),
        ({"dtype": "int4", "group_size": True}, llama_ext.OptionError, "group_size"),
        ({"dtype": "float16", "group_size": 32}, llama_ext.OptionError, "group_size belongs to"),
        ({"dtype": "float32", "symmetric": True}, llama_ext.OptionError, "symmetric belongs to"),
        ({"importance": np.ones(64, np.float32)}, llama_ext.OptionError, "importance belongs to"),
        ({"dtype": "int8", "importance": np.ones(63, np.float32)}, llama_ext.ShapeError, "importance"),
        ({"dtype": "int8", "importance": np.ones(64)}, llama_ext.DTypeError, "importance"),
        ({"dtype": "int8", "importance": -np.ones(64, np.float32)}, llama_ext.NumericError, "importance 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: dict[str, Any], error: type[Exception], text: str, normal: Any
) -> None:
    weight = normal(4, 64)
    with pytest.raises(error, match=text):
        ops.pack(weight, **options)
    with pytest.raises(error, match=text):
        ops.pack_gate_up(weight, weight, **options)


def test_what_cannot_be_quantised_is_refused(normal: Any) -> None:
    weight = normal(4, 64)
    weight[2, 3] = np.nan
    for call in (ops.pack, ops.quantize):
        with pytest.raises(llama_ext.NumericError, match="weight 3 of a row is nan"):
            call(weight, "int8")
    with pytest.raises(llama_ext.DTypeError, match="int8, int5, int4"):
        ops.quantize(weight, "float16")
    with pytest.raises(llama_ext.DTypeError, match="uint8"):
        ops.pack_blocks(weight, "Q8_0", 64)  # type: ignore[arg-type]
    with pytest.raises(llama_ext.DTypeError, match="whole number"):
        ops.pack_blocks(np.zeros(68, np.uint8), "Q8_0", 64.0)  # type: ignore[arg-type]
    with pytest.raises(llama_ext.ShapeError):
        ops.pack_blocks(np.zeros(67, np.uint8), "Q8_0", 64)
    with pytest.raises(llama_ext.DTypeError, match="Q2_K"):
        ops.pack_blocks(np.zeros(68, np.uint8), "Q2_K", 256)


@pytest.mark.parametrize("device", DEVICES[1:])
def test_off_the_cpu_the_number_of_threads_tells_no_matrices_apart(
    device: str, normal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = normal(2, 64), normal(64, 64)
    before = llama_ext.get_num_threads()
    try:
        pair = ops.pack_gate_up(weight, weight, device=device)
        llama_ext.set_num_threads(before % 256 + 1)
        monkeypatch.setenv("LLAMA_EXT_ISA", llama_ext.info().available_isas[0])
        down = ops.pack(weight, device=device, threads=2)
        assert ops.feed_forward(x, pair, down).shape == (2, 64)
    finally:
        llama_ext.set_num_threads(before)


@pytest.mark.gpu
@requires_cuda
def test_the_first_gpu_has_one_backend_by_either_name(normal: Any) -> None:
    x, weight = normal(2, 64), normal(64, 64)
    pair = ops.pack_gate_up(weight, weight, device="cuda")
    assert ops.feed_forward(x, pair, ops.pack(weight, device="cuda:0")).shape == (2, 64)


def test_gate_and_up_are_packed_alike(normal: Any) -> None:
    x, weight, down = normal(2, 64), normal(32, 64), ops.pack(normal(64, 32), "int8", threads=1)
    gate = ops.pack(weight, "int8", threads=1)
    with pytest.raises(llama_ext.OptionError, match="both be packed"):
        ops.feed_forward(x, (gate, weight), down)
    with pytest.raises(llama_ext.OptionError, match="different backends"):
        ops.feed_forward(x, (gate, ops.pack(weight, "int4", threads=2)), down)
    with pytest.raises(llama_ext.ShapeError, match="one shape"):
        ops.feed_forward(x, (gate, ops.pack(weight[:30], "int4", threads=1)), down)
    with pytest.raises(llama_ext.OptionError, match="from pack"):
        ops.feed_forward(x, (ops.pack_gate_up(weight, weight, threads=1), gate), down)


def test_a_matrix_is_its_own_copy_and_says_what_to_pickle_instead(normal: Any) -> None:
    matrix = ops.pack(normal(4, 8))
    assert copy.copy(matrix) is matrix
    assert copy.deepcopy({"weight": matrix})["weight"] is matrix
    with pytest.raises(llama_ext.UnsupportedError, match=r"a Matrix cannot be pickled: .*Send the arrays"):
        pickle.dumps(matrix)
