"""The operations of training in `llama_ext.ops`: shapes, what comes back, and what they refuse; the numbers are tested in tests/ops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import finite_differences
import numpy_ops
import numpy_training
from llama_ext import DeviceError, DTypeError, OptionError, ShapeError, TokenIdError, ops
from tolerances import relative_rms

DEVICES = ["cpu", "reference"]
each_device = pytest.mark.parametrize("device", DEVICES)

# float32 of a few dozen terms of size 1.
NEAR = 2e-6


@pytest.fixture
def normal(rng: np.random.Generator) -> Any:
    return lambda *shape: rng.standard_normal(shape, dtype=np.float32)


@each_device
@pytest.mark.parametrize("lead", [(), (1,), (7,), (2, 3), (0,)])
def test_matmul_backward_takes_any_leading_dimensions(lead: tuple[int, ...], device: str, normal: Any) -> None:
    d_y, weight, x = normal(*lead, 19), normal(19, 33), normal(*lead, 33)
    d_x, d_weight, d_bias = ops.matmul_backward(d_y, weight, x, device=device)
    assert d_x is not None
    assert d_weight is not None
    assert (d_x.shape, d_weight.shape, d_bias.shape) == (x.shape, weight.shape, (19,))
    rows, inputs = d_y.reshape(-1, 19).astype(np.float64), x.reshape(-1, 33).astype(np.float64)
    np.testing.assert_allclose(d_x.reshape(-1, 33), rows @ weight, atol=1e-4)
    np.testing.assert_allclose(d_weight, rows.T @ inputs, atol=1e-4)
    np.testing.assert_allclose(d_bias, rows.sum(axis=0), atol=1e-4)


@each_device
def test_matmul_backward_computes_what_it_can(device: str, normal: Any) -> None:
    d_y, weight, x = normal(5, 19), normal(19, 33), normal(5, 33)
    d_x, d_weight, d_bias = ops.matmul_backward(d_y, device=device)
    assert d_x is None
    assert d_weight is None
    d_x, d_weight, again = ops.matmul_backward(d_y, weight, device=device)
    assert d_x is not None
    assert d_weight is None
    np.testing.assert_array_equal(again, d_bias)
    without, d_weight, _ = ops.matmul_backward(d_y, x=x, device=device)
    assert without is None
    assert d_weight is not None
    both = ops.matmul_backward(d_y, weight, x, device=device)
    np.testing.assert_array_equal(d_x, both[0])
    np.testing.assert_array_equal(d_weight, both[1])
    packed = ops.matmul_backward(d_y, ops.pack(weight, device=device), x)
    np.testing.assert_array_equal(packed[0], both[0])
    np.testing.assert_array_equal(packed[1], both[1])


@each_device
@pytest.mark.parametrize("dtype", ["int8", "int4", "bfloat16"])
def test_a_gradient_passes_through_weights_that_are_kept_in_few_bits(dtype: str, device: str, normal: Any) -> None:
    d_y, weight = normal(5, 19), normal(19, 64)
    matrix = ops.pack(weight, dtype, device=device)
    d_x, _, _ = ops.matmul_backward(d_y, matrix)
    assert d_x is not None
    assert relative_rms(d_x, d_y.astype(np.float64) @ matrix.to_array()) < NEAR


@each_device
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,)])
def test_rms_norm_and_swiglu_backward_take_any_leading_dimensions(
    lead: tuple[int, ...], device: str, normal: Any
) -> None:
    d_y, x, up, weight = normal(*lead, 9), normal(*lead, 9), normal(*lead, 9), normal(9)
    d_x, d_weight = ops.rms_norm_backward(d_y, x, weight, 1e-5, device=device)
    assert (d_x.shape, d_weight.shape) == (x.shape, (9,))
    y = ops.swiglu(x, up, device=device)
    d_gate, d_up = ops.swiglu_backward(d_y, x, up, device=device)
    assert y.shape == d_gate.shape == d_up.shape == x.shape
    if not x.size:
        assert (d_weight == 0).all()
        return
    rows = [each.reshape(-1, 9).astype(np.float64) for each in (d_y, x, up)]

    def norm(at: Any) -> Any:
        return numpy_ops.rms_norm(at, weight, 1e-5)[0]

    assert relative_rms(d_x.reshape(-1, 9), finite_differences.gradient(norm, rows[1], rows[0])) < NEAR
    slope = finite_differences.gradient(lambda w: numpy_ops.rms_norm(rows[1], w, 1e-5)[0], weight, rows[0])
    assert relative_rms(d_weight, slope) < NEAR
    slope = finite_differences.gradient(lambda gate: numpy_training.swiglu(gate, rows[2]), rows[1], rows[0])
    assert relative_rms(d_gate.reshape(-1, 9), slope) < NEAR
    assert relative_rms(y.reshape(-1, 9), numpy_training.swiglu(rows[1], rows[2])) < NEAR
    same = x.copy()
    assert ops.swiglu(same, up, out=same, device=device) is same
    np.testing.assert_array_equal(same, y)


@each_device
def test_rope_backward_is_rope_by_the_opposite_angle(device: str, normal: Any) -> None:
    x = normal(2, 5, 3, 8)
    cos, sin = ops.rope_angles(range(5), 8)
    turned = ops.rope(x, cos, sin, device=device)
    back = ops.rope(turned, cos, sin, inverse=True, device=device)
    np.testing.assert_allclose(back, x, atol=1e-6)
    assert relative_rms(turned, x.astype(np.float64)) > 0.1


@each_device
@pytest.mark.parametrize("sequences", [None, [(0, 11)], [(0, 4), (5, 6)], [(5, 0)], []])
def test_causal_attention_of_sequences(sequences: Any, device: str, normal: Any) -> None:
    q, k, v, d_y = normal(11, 4, 8), normal(11, 2, 8), normal(11, 2, 8), normal(11, 4, 8)
    options: dict[str, Any] = {"sequences": sequences, "dropout": 0.25, "seed": 2**64 - 1, "device": device}
    y, log_sums = ops.causal_attention(q, k, v, **options)
    d_q, d_k, d_v = ops.causal_attention_backward(d_y, q, k, v, y, log_sums, **options)
    ranges = [(0, 11)] if sequences is None else sequences
    expected = numpy_training.causal_attention(q, k, v, ranges, 8**-0.5, 0.25, 2**64 - 1)
    np.testing.assert_allclose(y, expected.y, atol=1e-5)
    np.testing.assert_allclose(log_sums, expected.log_sums, atol=1e-5)

    def forward(at: Any) -> Any:
        return numpy_training.causal_attention(q, at, v, ranges, 8**-0.5, 0.25, 2**64 - 1).y

    np.testing.assert_allclose(d_k, finite_differences.gradient(forward, k, d_y), atol=1e-5)
    assert (d_q.shape, d_v.shape) == (q.shape, v.shape)
    outside = np.ones(11, bool)
    for begin, count in ranges:
        outside[begin : begin + count] = False
    for each in (y, log_sums, d_q, d_k, d_v):
        assert (each[outside] == 0).all()


@each_device
def test_causal_attention_is_attention(device: str, normal: Any) -> None:
    q, k, v = normal(40, 4, 8), normal(40, 2, 8), normal(40, 2, 8)
    y, _ = ops.causal_attention(q, k, v, scale=0.4, device=device)
    np.testing.assert_allclose(y, ops.attention(q, k, v, scale=0.4, device=device), atol=1e-5)


@each_device
@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (0,)])
def test_cross_entropy_backward_gives_losses_and_gradient(lead: tuple[int, ...], device: str, normal: Any) -> None:
    logits = normal(*lead, 7)
    labels = (np.arange(int(np.prod(lead))) % 7).reshape(lead)
    kept = logits.copy()
    losses, d_logits = ops.cross_entropy_backward(logits, labels, 0.5, device=device)
    np.testing.assert_array_equal(logits, kept)
    np.testing.assert_array_equal(losses, ops.cross_entropy(logits, labels, device=device))
    onehot = np.eye(7)[labels]
    np.testing.assert_allclose(d_logits, 0.5 * (numpy_ops.softmax(logits) - onehot), atol=1e-6)
    _, in_place = ops.cross_entropy_backward(logits, labels, 0.5, out=logits, device=device)
    assert in_place is logits
    np.testing.assert_array_equal(logits, d_logits)


@each_device
def test_embedding_backward_takes_ids_of_any_shape(device: str, normal: Any) -> None:
    ids = np.array([[0, 4, 4], [1, 4, 0]])
    d_y = normal(2, 3, 5)
    expected = np.zeros((6, 5))
    np.add.at(expected, ids, d_y)
    np.testing.assert_allclose(ops.embedding_backward(d_y, ids, 6, device=device), expected, atol=1e-6)
    assert ops.embedding_backward(normal(0, 5), np.zeros(0, np.int64), 6, device=device).shape == (6, 5)


@each_device
def test_dropout_numbers_elements_along_the_flattened_array(device: str, normal: Any) -> None:
    x = normal(2, 3, 50)
    y = ops.dropout(x, 0.3, 7, device=device)
    np.testing.assert_allclose(y, numpy_training.dropout(x, 0.3, 7), atol=1e-6)
    np.testing.assert_array_equal(ops.dropout(x.reshape(6, 50), 0.3, 7, device=device).reshape(x.shape), y)
    scaled = ops.dropout(x, 0.3, 7, scale=-2.5, device=device)
    np.testing.assert_allclose(scaled, -2.5 * numpy_training.dropout(x, 0.3, 7), atol=2e-6)
    assert ops.dropout(x, 0.3, 7, out=x, device=device) is x
    np.testing.assert_array_equal(x, y)


@each_device
def test_optimisers_step_in_place(device: str, normal: Any) -> None:
    parameter, gradient = normal(3, 4), normal(3, 4)
    first, second = np.zeros_like(parameter), np.zeros_like(parameter)
    exact = parameter.astype(np.float64)
    expected, *_ = numpy_training.adam_step(
        exact, gradient.astype(np.float64), 0 * exact, 0 * exact, step=1, lr=0.1, betas=(0.8, 0.9), weight_decay=0.5
    )
    options: dict[str, Any] = {"step": 1, "lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.5, "device": device}
    ops.adam(parameter, gradient, first, second, **options)
    np.testing.assert_allclose(parameter, expected, atol=1e-6)
    np.testing.assert_allclose(first, 0.2 * gradient, rtol=1e-6)
    before, velocity = parameter.astype(np.float64), np.zeros_like(parameter)
    ops.sgd(parameter, gradient, velocity, lr=0.1, momentum=0.9, nesterov=True, device=device)
    np.testing.assert_allclose(parameter, before - 0.1 * 1.9 * gradient, atol=1e-6)
    ops.sgd(parameter, gradient, lr=0.1, gradient_scale=0.0, device=device)
    np.testing.assert_allclose(parameter, before - 0.1 * 1.9 * gradient, atol=1e-6)


ONE = np.ones((2, 3), np.float32)
HEADS = np.ones((4, 2, 6), np.float32)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda d: ops.matmul_backward(ONE, np.ones((2, 3), np.float32), device=d), ShapeError),
        (lambda d: ops.matmul_backward(ONE, x=np.ones((3, 3), np.float32), device=d), ShapeError),
        (lambda d: ops.matmul_backward(ONE, np.ones((3, 4), np.float32), ONE, device=d), ShapeError),
        (lambda d: ops.matmul_backward(ONE.astype(np.float64), device=d), DTypeError),
        (lambda d: ops.matmul_backward(np.float32(1), device=d), DTypeError),
        (lambda d: ops.matmul_backward(ONE, np.ones((3, 3), np.float32), compute="half", device=d), OptionError),
        (lambda d: ops.rms_norm_backward(ONE, ONE, np.ones(2, np.float32), device=d), ShapeError),
        (lambda d: ops.rms_norm_backward(ONE[:1], ONE, np.ones(3, np.float32), device=d), ShapeError),
        (lambda d: ops.rms_norm_backward(ONE, ONE, np.ones(3, np.float32), 0.0, device=d), OptionError),
        (lambda d: ops.swiglu(ONE, ONE[:1], device=d), ShapeError),
        (lambda d: ops.swiglu(ONE, ONE.astype(np.float16), device=d), DTypeError),
        (lambda d: ops.swiglu_backward(ONE, ONE, ONE[:1], device=d), ShapeError),
        (lambda d: ops.causal_attention(ONE, ONE, ONE, device=d), ShapeError),
        (lambda d: ops.causal_attention(HEADS, HEADS[:, :0], HEADS[:, :0], device=d), ShapeError),
        (lambda d: ops.causal_attention(HEADS, HEADS, HEADS, sequences=[(0, 5)], device=d), ShapeError),
        (lambda d: ops.causal_attention(HEADS, HEADS, HEADS, sequences=[(0, 3), (2, 1)], device=d), ShapeError),
        (lambda d: ops.causal_attention(HEADS, HEADS, HEADS, sequences=[(0, 1.5)], device=d), DTypeError),  # type: ignore[list-item]
        (lambda d: ops.causal_attention(HEADS, HEADS, HEADS, sequences=[4], device=d), DTypeError),  # type: ignore[list-item]
        (lambda d: ops.causal_attention(HEADS, HEADS, HEADS, dropout=1.0, device=d), OptionError),
        (lambda d: ops.causal_attention(HEADS, HEADS, HEADS, seed=-1, device=d), OptionError),
        (lambda d: ops.causal_attention(HEADS, HEADS, HEADS, seed=2**64, device=d), OptionError),
        (lambda d: ops.causal_attention(HEADS, HEADS, HEADS, compute="half", device=d), OptionError),
        (lambda d: ops.cross_entropy_backward(ONE, np.array([0, 3]), device=d), TokenIdError),
        (lambda d: ops.cross_entropy_backward(ONE, np.array([0, 1, 2]), device=d), ShapeError),
        (lambda d: ops.cross_entropy_backward(ONE, np.array([0, 1]), float("nan"), device=d), OptionError),
        (lambda d: ops.embedding_backward(ONE, np.array([0, 3]), 3, device=d), TokenIdError),
        (lambda d: ops.embedding_backward(ONE, np.array([0]), 3, device=d), ShapeError),
        (lambda d: ops.embedding_backward(ONE, np.array([0.0, 1.0]), 3, device=d), DTypeError),  # type: ignore[arg-type]
        (lambda d: ops.embedding_backward(ONE, np.array([0, 1]), -1, device=d), OptionError),
        (lambda d: ops.dropout(ONE, 1.0, 0, device=d), OptionError),
        (lambda d: ops.dropout(ONE, 0.5, 1.5, device=d), OptionError),  # type: ignore[arg-type]
        (lambda d: ops.dropout(ONE, 0.5, 1, scale=float("nan"), device=d), OptionError),
        (lambda d: ops.dropout(np.zeros(3), 0.5, 0, device=d), DTypeError),  # type: ignore[arg-type]
        (lambda d: ops.swiglu(ONE, ONE, device="gpu"), DeviceError),
    ],
)
@each_device
def test_what_does_not_fit_is_an_error_of_its_kind(device: str, call: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        call(device)


@each_device
def test_optimisers_refuse_what_they_could_not_update(device: str) -> None:
    def fresh() -> list[Any]:
        return [np.zeros((2, 3), np.float32) for _ in range(4)]

    wide, frozen = np.zeros((2, 6), np.float32)[:, ::2], np.zeros((2, 3), np.float32)
    frozen.flags.writeable = False
    for place in (0, 2, 3):
        arrays = fresh()
        arrays[place] = wide
        with pytest.raises(ShapeError, match="contiguous"):
            ops.adam(*arrays, step=1, lr=0.1, device=device)
        for bad in (frozen, np.zeros((2, 3)), [0.0]):
            arrays[place] = bad  # type: ignore[call-overload]
            with pytest.raises(DTypeError, match="writable float32"):
                ops.adam(*arrays, step=1, lr=0.1, device=device)
    parameter, gradient, first, second = fresh()
    ops.adam(parameter, wide, first, second, step=1, lr=0.1, device=device)  # a gradient may be strided
    with pytest.raises(ShapeError, match="gradient"):
        ops.adam(parameter, gradient[:1], first, second, step=1, lr=0.1, device=device)
    with pytest.raises(ShapeError, match="first must not overlap second"):
        ops.adam(parameter, gradient, first, first, step=1, lr=0.1, device=device)
    with pytest.raises(ShapeError, match="overlap gradient"):
        ops.sgd(parameter, parameter, lr=0.1, device=device)
    with pytest.raises(OptionError, match="velocity"):
        ops.sgd(parameter, gradient, lr=0.1, momentum=0.9, device=device)
    for step in (0, -1, 1.5, True):
        with pytest.raises(OptionError, match="step"):
            ops.adam(parameter, gradient, first, second, step=step, lr=0.1, device=device)  # type: ignore[arg-type]
