"""Rounding weights to whole numbers: every code the nearest one, scales finite, and columns that matter rounded better."""

from __future__ import annotations

from typing import Any

import hypothesis.extra.numpy as arrays
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices import Device, all_devices
from guarded import guarded
from llama_ext import CheckpointError, DTypeError, NumericError, OptionError, ShapeError, _core
from llama_ext.io import gguf_types
from quantized import ENCODINGS, GROUPS, Kept, blocks, dequantize
from subprocesses import run_script
from tolerances import relative_rms

Array = npt.NDArray[Any]
BITS = {"int8": 8, "int5": 5, "int4": 4}

each_encoding = pytest.mark.parametrize("encoding", ENCODINGS)
each_group = pytest.mark.parametrize("group", GROUPS)


def code_range(encoding: str) -> tuple[int, int]:
    levels = 1 << BITS[encoding.removesuffix("_min")]
    return (0, levels - 1) if encoding.endswith("_min") else (-levels // 2, levels // 2 - 1)


def check_rounding(weight: Array, encoding: str, group: int) -> None:
    """Codes in range, and none of them with a nearer neighbour, given the scale and the minimum."""
    codes, scales, minima = _core.quantize(weight, encoding, group)
    low, high = code_range(encoding)
    assert codes.shape == weight.shape
    assert scales.shape == (len(weight), -(-weight.shape[1] // group))
    assert np.isfinite(scales).all()
    assert minima is None or (minima.shape == scales.shape and np.isfinite(minima).all())
    if codes.size == 0:
        return
    wide = codes.astype(np.int64)
    assert wide.min() >= low
    assert wide.max() <= high
    exact = dequantize(codes, scales, minima, group)
    error = np.abs(exact - weight)
    step = np.abs(np.repeat(scales.astype(np.float64), group, axis=1)[:, : weight.shape[1]])
    # Ties, and what float32 arithmetic takes for one.
    slack = step * 1e-4 + np.abs(weight.astype(np.float64)) * 2.0**-22
    for change in (-1, 1):
        moved = dequantize(wide + change, scales, minima, group)
        allowed = (wide + change >= low) & (wide + change <= high)
        assert (~allowed | (np.abs(moved - weight) >= error - slack)).all(), change


@each_group
@each_encoding
def test_every_code_is_the_nearest_one(encoding: str, group: int) -> None:
    rng = np.random.default_rng(1)
    for shape in [(0, 5), (3, 0), (1, 1), (5, 31), (4, 32), (3, 33), (2, 127), (7, 300), (2, 1025)]:
        weight = rng.standard_normal(shape).astype(np.float32)
        check_rounding(weight, encoding, group)
        check_rounding(weight * np.float32(1e-3) + np.float32(0.7), encoding, group)
        check_rounding(np.float32(0.02) * weight**5, encoding, group)


def test_codes_that_do_not_fit_into_memory_are_a_typed_error() -> None:
    # Pages of zeros that nothing touches take none themselves.
    script = """
        import pathlib, re, resource
        import numpy as np
        import llama_ext
        from llama_ext import _core

        weight = np.zeros((1 << 22, 64), np.float32)
        blocks = np.zeros((1 << 22, 2 * 34), np.uint8)
        used = int(re.search(r"VmSize:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) << 10
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
        for call in (
            lambda: _core.quantize(weight, "int8", 32),
            lambda: _core.quantize(weight, "int4_min", 32),
            lambda: _core.decode_blocks(blocks, "Q8_0", 64),
        ):
            try:
                call()
            except llama_ext.OutOfMemoryError as error:
                print(error)
    """
    expected = [f"{what}: {1 << 28} bytes cannot be allocated" for what in ("quantize", "quantize", "codes")]
    assert run_script(script).splitlines() == expected


@settings(max_examples=60, deadline=None)
@given(
    weight=arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 2), st.integers(1, 140)),
        elements=st.one_of(
            st.floats(-3e4, 3e4, width=32),
            st.floats(-1, 1, width=32),
            st.sampled_from([0.0, 1.0, -1.0, 0.5, 1e-9, 6e-8, 1e-38, -0.0]),
        ),
    ),
    encoding=st.sampled_from(ENCODINGS),
    group=st.sampled_from(GROUPS),
)
def test_every_code_is_the_nearest_one_whatever_the_weights(weight: Array, encoding: str, group: int) -> None:
    check_rounding(weight, encoding, group)


@pytest.mark.parametrize(
    ("encoding", "largest"),
    # A normal row's error in groups of 128, as a share of the row.
    [
        ("int8", 0.0065),
        ("int8_min", 0.0062),
        ("int5", 0.055),
        ("int5_min", 0.052),
        ("int4", 0.111),
        ("int4_min", 0.108),
    ],
)
def test_the_error_of_normal_weights_is_as_small_as_it_should_be(encoding: str, largest: float) -> None:
    weight = np.random.default_rng(2).standard_normal((200, 1024)).astype(np.float32)
    errors = [relative_rms(dequantize(*_core.quantize(weight, encoding, group), group), weight) for group in GROUPS]
    assert errors[2] < largest
    assert errors[0] < errors[1] < errors[2]


@each_group
@each_encoding
def test_weights_that_the_encoding_holds_come_back(encoding: str, group: int) -> None:
    rng = np.random.default_rng(3)
    low, high = code_range(encoding)
    codes = rng.integers(low, high + 1, (5, 2 * group + 7))
    codes[:, ::group] = low if encoding != "int8" else -high
    codes[:, 1::group] = high
    weight = (codes * np.float32(0.125) + (3 if low == 0 else 0)).astype(np.float32)
    if encoding == "int8":
        weight = np.clip(weight, -127 * 0.125, None)
    found, scales, minima = _core.quantize(weight, encoding, group)
    # The last group is short, and its weights may not span the codes.
    whole = 2 * group
    np.testing.assert_allclose(
        dequantize(found, scales, minima, group)[:, :whole], weight[:, :whole], rtol=0, atol=1e-6
    )


@each_encoding
def test_groups_of_one_number_and_of_zeros_are_kept(encoding: str) -> None:
    for value in (0.0, 0.375, -0.375, 1e-3, -65000.0 if not encoding.endswith("_min") else -32000.0):
        weight = np.full((2, 70), value, np.float32)
        exact = dequantize(*_core.quantize(weight, encoding, 64), 64)
        np.testing.assert_allclose(exact, weight, rtol=2.0**-10, atol=0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
@each_encoding
@all_devices
def test_a_weight_that_cannot_be_kept_is_an_error(device: Device, encoding: str, bad: float) -> None:
    weight = np.zeros((40, 70), np.float32)
    weight[33, 69] = bad
    with pytest.raises(NumericError, match="weight 69 of a row"):
        device.backend.matrix(guarded(weight), encoding, 32)
    with pytest.raises(NumericError, match="weight 69 of a row"):
        device.backend.gate_up_matrix(weight, np.zeros_like(weight), encoding, 32)


@each_encoding
def test_importance_lowers_the_error_that_it_weights(encoding: str) -> None:
    rng = np.random.default_rng(4)
    weight = rng.standard_normal((100, 512)).astype(np.float32)
    importance = np.exp(2 * rng.standard_normal(512)).astype(np.float32)

    def weighted(weights: Array | None) -> float:
        exact = dequantize(*_core.quantize(weight, encoding, 128, weights), 128)
        return float(np.sum(importance * (exact - weight) ** 2))

    plain = weighted(None)
    if encoding.startswith("int8"):  # 256 codes need no search: the scale that spans the group is taken
        assert weighted(importance) == plain
    else:
        assert weighted(importance) < 0.95 * plain
    same = _core.quantize(weight, encoding, 128, np.full(512, 0.25, np.float32))
    for one, other in zip(same, _core.quantize(weight, encoding, 128), strict=True):
        np.testing.assert_array_equal(one, other)


@each_encoding
@all_devices
def test_every_backend_rounds_alike(device: Device, encoding: str) -> None:
    rng = np.random.default_rng(5)
    weight = rng.standard_normal((70, 200)).astype(np.float32)
    importance = rng.uniform(0.1, 3.0, 200).astype(np.float32)
    kept = device.backend.matrix(guarded(weight), encoding, 64, guarded(importance)).to_array()
    exact = dequantize(*_core.quantize(weight, encoding, 64, importance), 64)
    np.testing.assert_array_equal(kept, exact.astype(np.float32))


@pytest.mark.parametrize("source", ["float16", "float64", "bfloat16"])
@each_encoding
@all_devices
def test_any_source_is_rounded_from_float32(device: Device, encoding: str, source: str) -> None:
    weight = np.random.default_rng(6).standard_normal((9, 70))
    values: Array = (weight.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    wide = (values.astype(np.uint32) << 16).view(np.float32)
    if source != "bfloat16":
        values = weight.astype(source)
        wide = values.astype(np.float32)
    exact = dequantize(*_core.quantize(wide, encoding, 32), 32)
    kept = device.backend.matrix(guarded(values), encoding, 32).to_array()
    np.testing.assert_array_equal(kept, exact.astype(np.float32))


@all_devices
def test_importance_has_to_fit(device: Device) -> None:
    weight = np.ones((3, 64), np.float32)
    for wrong, error in (
        (np.ones(63, np.float32), ShapeError),
        (np.ones(65, np.float32), ShapeError),
        (np.full(64, np.nan, np.float32), NumericError),
        (np.full(64, -1, np.float32), NumericError),
        (np.full(64, np.inf, np.float32), NumericError),
    ):
        with pytest.raises(error, match="importance"):
            device.backend.matrix(weight, "int4", 32, wrong)
        with pytest.raises(error, match="importance"):
            device.backend.gate_up_matrix(weight, weight, "int4", 32, wrong)
    # What overflows when it is squared or summed must not cost the weights.
    huge = np.full(64, 3e38, np.float32)
    assert np.abs(device.backend.matrix(weight * 100, "int4", 32, huge).to_array() - 100).max() < 1
    nothing = np.zeros(64, np.float32)
    assert np.abs(device.backend.matrix(weight * 100, "int4_min", 32, nothing).to_array() - 100).max() < 1


@all_devices
def test_encodings_and_groups_that_there_are_not_are_refused(device: Device) -> None:
    weight = np.ones((3, 64), np.float32)
    for group in (0, 1, 16, 48, 96, 256, -32):
        with pytest.raises(OptionError, match="32, 64 or 128"):
            device.backend.matrix(weight, "int4", group)
    with pytest.raises(OptionError, match="no groups"):
        device.backend.matrix(weight, "float16", 32)
    with pytest.raises(DTypeError, match="int3"):
        device.backend.matrix(weight, "int3", 32)
    with pytest.raises(DTypeError, match="q4_k"):
        device.backend.matrix(np.ones((3, 256), np.float32), "q4_k")


@pytest.mark.parametrize("kept", [Kept("Q8_0"), Kept("Q4_1"), Kept("Q4_K"), Kept("Q6_K")], ids=str)
@all_devices
def test_blocks_that_are_damaged_or_do_not_fit_are_refused(device: Device, kept: Kept) -> None:
    made = blocks(kept.name, np.random.default_rng(7), 5, 512)
    backend = device.backend
    assert backend.block_matrix(made, kept.name, 512).shape == (5, 512)
    with pytest.raises(ShapeError):
        backend.block_matrix(made.reshape(-1)[:-1].copy(), kept.name, 512)
    with pytest.raises(ShapeError, match="blocks of"):
        backend.block_matrix(made, kept.name, 500)
    with pytest.raises(ShapeError, match="positive"):
        backend.block_matrix(made, kept.name, 0)
    with pytest.raises(DTypeError, match="Q3_K"):
        backend.block_matrix(made, "Q3_K", 512)
    with pytest.raises(DTypeError):
        backend.block_matrix(made.astype(np.int8), kept.name, 512)
    at = 208 if kept.name == "Q6_K" else 0
    for bits in (0x7C00, 0xFC00, 0x7E00):
        marred = made.copy()
        marred.reshape(-1, gguf_types.BY_NAME[kept.name].block_bytes)[-1, at : at + 2] = (bits & 255, bits >> 8)
        with pytest.raises(CheckpointError, match="finite"):
            backend.block_matrix(marred, kept.name, 512)
