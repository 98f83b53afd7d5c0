"""Rounding with feedback: each column as the best least squares would have it, codes kept as they are, smaller errors of outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import gguf_models
import llama_ext
from llama_ext import _core
from llama_ext.errors import CheckpointError, DTypeError, NumericError, OptionError, ShapeError
from llama_ext.runtime.feedback import Feedback, round_with_feedback
from quantized import dequantize
from tolerances import relative_rms

Array = npt.NDArray[Any]
ENCODINGS = ("int8", "int8_min", "int4", "int4_min")

each_encoding = pytest.mark.parametrize("encoding", ENCODINGS)


def inputs(tokens: int, columns: int, seed: int = 0) -> Array:
    """Columns that go together, as activations do."""
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((tokens, max(1, columns // 8))) @ rng.standard_normal((max(1, columns // 8), columns))
    return (shared + 0.5 * rng.standard_normal((tokens, columns))).astype(np.float32)


def damped(x: Array) -> Array:
    products = x.T.astype(np.float64) @ x / len(x)
    products[np.diag_indices_from(products)] += 0.01 * np.diagonal(products).mean()
    return products


@pytest.mark.parametrize("columns", [1, 2, 31, 256, 257, 600])
def test_the_triangle_is_that_of_the_inverse(columns: int) -> None:
    x = inputs(2 * columns + 5, columns)
    upper = Feedback(x).upper.astype(np.float64)
    assert (np.tril(upper, -1) == 0).all()
    assert relative_rms(upper.T @ upper @ damped(x), np.eye(columns)) < 2e-3
    assert relative_rms(upper, np.linalg.cholesky(np.linalg.inv(damped(x))).T) < 1e-4


def by_least_squares(weight: Array, x: Array, encoding: str) -> Array:
    """One group, one column after another; what is not rounded yet is solved for anew each time, in float64."""
    _, scales, minima = _core.quantize(weight, encoding, 128, np.diagonal(x.T @ x / len(x)).astype(np.float32))
    products = damped(x)
    low = 0 if encoding.endswith("_min") else (-128 if encoding == "int8" else -8)
    high = low + (255 if encoding.startswith("int8") else 15)
    codes = np.zeros(weight.shape, np.int64)
    for row, values in enumerate(weight.astype(np.float64)):
        scale = float(scales[row, 0])
        minimum = 0.0 if minima is None else float(minima[row, 0])
        rest, rounded = values.copy(), values.copy()
        for column in range(len(values)):
            codes[row, column] = np.clip(np.rint((rest[column] - minimum) / scale), low, high)
            rounded[column] = codes[row, column] * scale + minimum
            done, left = slice(None, column + 1), slice(column + 1, None)
            error = values[done] - rounded[done]
            rest[left] = values[left] + np.linalg.solve(products[left, left], products[left, done] @ error)
    return codes


@each_encoding
def test_each_column_is_what_least_squares_would_have(encoding: str) -> None:
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((6, 24)).astype(np.float32)
    x = inputs(200, 24)
    codes, _, _ = round_with_feedback(weight, Feedback(x), encoding, 128)
    assert (codes == by_least_squares(weight, x, encoding)).mean() > 0.99  # ties, and float32


@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (40, 128), (17, 300)])
@pytest.mark.parametrize("group", [32, 64, 128])
@each_encoding
def test_outputs_are_nearer_than_by_rounding_alone(encoding: str, group: int, shape: tuple[int, int]) -> None:
    weight = np.random.default_rng(4).standard_normal(shape).astype(np.float32)
    x, unseen = np.split(inputs(3000, shape[1], seed=5), 2)
    found = round_with_feedback(weight, Feedback(x), encoding, group)
    plain = _core.quantize(weight, encoding, group)
    assert [each is None or (each.shape, each.dtype) for each in found] == [
        each is None or (each.shape, each.dtype) for each in plain
    ]
    errors = [relative_rms(unseen @ dequantize(*codes, group).T, unseen @ weight.T) for codes in (found, plain)]
    assert errors[0] <= errors[1] * (0.7 if shape[1] > 100 else 1.05)


@each_encoding
def test_inputs_that_are_zero_or_few_change_nothing_much(encoding: str) -> None:
    weight = np.random.default_rng(6).standard_normal((5, 70)).astype(np.float32)
    plain = dequantize(*_core.quantize(weight, encoding, 32), 32)
    for x in (np.zeros((4, 70), np.float32), inputs(1, 70), inputs(3, 70)):
        found = dequantize(*round_with_feedback(weight, Feedback(x), encoding, 32), 32)
        assert np.isfinite(found).all()
        assert relative_rms(found, weight) < 3 * relative_rms(plain, weight) + 1e-6


@pytest.mark.parametrize("device", ["cpu", "reference"])
@each_encoding
def test_codes_are_kept_as_they_are_given(encoding: str, device: str) -> None:
    config = gguf_models.config(num_hidden_layers=1)
    core = llama_ext.LlamaForCausalLM(config, device=device)._core
    made = _core.Model(core.backend, llama_ext.runtime.loading.core_config(config), {"": (encoding, 64)})
    rng = np.random.default_rng(7)
    low, high = (0, 255) if encoding == "int8_min" else (-128, 127) if encoding == "int8" else (-8, 7)
    low, high = (0, 15) if encoding == "int4_min" else (low, high)
    for slot in ("layers.0.k", "layers.0.up", "embedding"):
        shape = next(shape for name, shape, _ in made.slots() if name == slot)
        codes = rng.integers(low, high + 1, shape).astype(np.uint8 if low == 0 else np.int8)
        scales = rng.standard_normal((shape[0], shape[1] // 64)).astype(np.float16)
        minima = rng.standard_normal(scales.shape).astype(np.float16) if low == 0 else None
        made.load_codes(slot, codes, scales, minima)
        expected = dequantize(codes, scales, minima, 64)
        np.testing.assert_array_equal(made.read(slot), expected.astype(np.float32))
        if encoding.startswith("int4"):
            codes[0, 1] = 16 if low == 0 else 8
            with pytest.raises(NumericError, match=r"int4.* has 16 codes"):
                made.load_codes(slot, codes, scales, minima)


def test_codes_that_do_not_fit_are_refused() -> None:
    config = gguf_models.config(num_hidden_layers=1)
    backend = _core.Backend("cpu", 2)
    types = {"": ("int4", 64), "layers.0.up": ("float32", 0), "layers.0.v": ("int4_min", 64)}
    core = _core.Model(backend, llama_ext.runtime.loading.core_config(config), types)
    codes, scales = np.zeros((256, 256), np.int8), np.ones((256, 4), np.float16)
    core.load_codes("layers.0.q", codes, scales)
    with pytest.raises(CheckpointError, match="no slot"):
        core.load_codes("layers.1.q", codes, scales)
    for slot in ("layers.0.up", "final_norm"):
        with pytest.raises(DTypeError, match="not kept as codes"):
            core.load_codes(slot, codes, scales)
    with pytest.raises(DTypeError, match="int8"):
        core.load_codes("layers.0.q", codes.view(np.uint8), scales)
    with pytest.raises(DTypeError, match="contiguous array of int8"):
        core.load_codes("layers.0.q", codes[:, ::2], scales)
    for shape in ((255, 256), (256, 255), (256,)):
        with pytest.raises(ShapeError, match="must have shape"):
            core.load_codes("layers.0.q", np.zeros(shape, np.int8), scales)
    for shape in ((256, 3), (255, 4), (256, 5)):
        with pytest.raises(ShapeError):
            core.load_codes("layers.0.q", codes, np.ones(shape, np.float16))
    with pytest.raises(OptionError, match="no minima"):
        core.load_codes("layers.0.q", codes, scales, scales)
    with pytest.raises(OptionError, match="has minima"):
        core.load_codes("layers.0.v", np.zeros((64, 256), np.uint8), scales[:64])
    for value in (np.inf, -np.inf, np.nan):
        bad = scales.copy()
        bad[255, 3] = value
        with pytest.raises(NumericError, match="scale of group 3 of row 255"):
            core.load_codes("layers.0.q", codes, bad)
        with pytest.raises(NumericError, match="minimum of group 3 of row 63"):
            core.load_codes("layers.0.v", np.zeros((64, 256), np.uint8), scales[:64], bad[192:])
