"""`llama_ext.ops`: the kernels on NumPy arrays, against NumPy; what they refuse, and why."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import llama_ext
from devices import HAS_CUDA
from llama_ext import ops

# float32 sums of a few hundred terms of size 1.
CLOSE: dict[str, float] = {"rtol": 1e-5, "atol": 1e-5}
DEVICES = ["cpu", "reference", *(["cuda"] if HAS_CUDA else [])]


@pytest.fixture
def normal(rng: np.random.Generator) -> Any:
    return lambda *shape: rng.standard_normal(shape, dtype=np.float32)


def bfloat16_bits(values: Any) -> Any:
    """The bits of numbers that bfloat16 holds exactly."""
    bits = values.view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)


def truncated(values: Any) -> Any:
    return (values.view(np.uint32) & 0xFFFF0000).view(np.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lead", [(), (1,), (7,), (2, 3), (2, 1, 3), (0,)])
def test_matmul_takes_any_leading_dimensions(lead: tuple[int, ...], device: str, normal: Any) -> None:
    x, weight, bias, residual = normal(*lead, 33), normal(19, 33), normal(19), normal(*lead, 19)
    expected = x.astype(np.float64) @ weight.T.astype(np.float64)
    np.testing.assert_allclose(ops.matmul(x, weight, device=device), expected, **CLOSE)
    np.testing.assert_allclose(ops.matmul(x, weight, bias, device=device), expected + bias, **CLOSE)
    found = ops.matmul(x, weight, bias, residual=residual, device=device)
    np.testing.assert_allclose(found, expected + bias + residual, **CLOSE)


def test_matmul_with_a_packed_matrix_is_the_same(normal: Any) -> None:
    x, weight = normal(5, 40), normal(24, 40)
    matrix = ops.pack(weight)
    np.testing.assert_array_equal(ops.matmul(x, matrix), ops.matmul(x, weight))
    np.testing.assert_array_equal(matrix.to_array(), weight)
    assert (matrix.shape, matrix.dtype, matrix.device) == ((24, 40), "float32", "cpu")
    assert matrix.nbytes >= 24 * 40 * 4


def test_out_may_be_an_input_a_slice_or_the_residual(normal: Any) -> None:
    x, weight = normal(6, 32), normal(32, 32)
    expected = ops.matmul(x, weight)
    wide = np.full((6, 64), np.nan, dtype=np.float32)
    assert np.shares_memory(ops.matmul(x, weight, out=wide[:, ::2]), wide)
    np.testing.assert_array_equal(wide[:, ::2], expected)
    assert np.isnan(wide[:, 1::2]).all()
    residual = normal(6, 32)
    both = ops.matmul(x, weight, residual=residual)
    assert ops.matmul(x, weight, residual=residual, out=residual) is residual
    np.testing.assert_array_equal(residual, both)
    assert ops.matmul(x, weight, out=x) is x
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("compute", ["auto", "exact"])
def test_bfloat16_weights_are_taken_as_bits_or_rounded(compute: str, normal: Any) -> None:
    x, weight = normal(4, 64), normal(16, 64)
    exact = truncated(weight)
    by_bits = ops.pack(bfloat16_bits(exact), "bfloat16")
    assert by_bits.dtype == "bfloat16"
    np.testing.assert_array_equal(by_bits.to_array(), exact)
    np.testing.assert_allclose(ops.pack(weight, "bfloat16").to_array(), weight, rtol=2.0**-8)
    expected = x.astype(np.float64) @ exact.T
    found = ops.matmul(x, by_bits, compute=compute)
    tolerance = 1e-5 if compute == "exact" else 0.1  # activations may be rounded to 8 bits
    np.testing.assert_allclose(found, expected, atol=tolerance)
    np.testing.assert_array_equal(found, ops.matmul(x, weight=bfloat16_bits(exact), dtype="bfloat16", compute=compute))


@pytest.mark.parametrize("device", DEVICES)
def test_rms_norm(device: str, normal: Any) -> None:
    x, weight = normal(3, 5, 48), normal(48)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(ops.rms_norm(x, weight, 1e-5, device=device), expected, **CLOSE)
    np.testing.assert_allclose(ops.rms_norm(x, weight, 1e-5, device=device, out=x), expected, **CLOSE)
    with pytest.raises(llama_ext.OptionError, match="eps"):
        ops.rms_norm(x, weight, 0.0)


@pytest.mark.parametrize("device", DEVICES)
def test_rope_rotates_pairs_by_the_angle_of_their_position(device: str, normal: Any) -> None:
    x = normal(2, 7, 3, 10)
    positions = np.arange(100, 107)
    cos, sin = ops.rope_angles(positions, 10, theta=500.0)
    angles = positions[:, None] * 500.0 ** (-np.arange(5) / 5)
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-6)
    turned = (x[..., :5] + 1j * x[..., 5:]) * np.exp(1j * angles)[:, None, :]
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(ops.rope(x, cos, sin, device=device), expected, **CLOSE)
    # One position for each token of each row.
    assert ops.rope(x, cos, sin, out=x, device=device) is x
    np.testing.assert_allclose(x, expected, **CLOSE)


def test_rope_angles_speak_the_language_of_a_config() -> None:
    plain, _ = ops.rope_angles([0, 1, 2, 3], 8)
    scaled, _ = ops.rope_angles([0, 2, 4, 6], 8, parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    np.testing.assert_allclose(plain, scaled, atol=1e-7)
    with pytest.raises(llama_ext.UnsupportedError, match="rope_type"):
        ops.rope_angles([0], 8, parameters={"rope_type": "dynamic"})
    with pytest.raises(llama_ext.DTypeError, match="integers"):
        ops.rope_angles(np.zeros(3), 8)
    with pytest.raises(llama_ext.OptionError, match="head_dim"):
        ops.rope_angles([0], 7)


def attention_in_numpy(q: Any, k: Any, v: Any, start: int, length: int) -> Any:
    """One row, in float64, q the last T of S places; queries outside the row's keys give zeros."""
    tokens, heads, head_dim = q.shape
    places, kv_heads, _ = k.shape
    out = np.zeros(q.shape)
    for t in range(tokens):
        place = places - tokens + t
        if not start <= place < start + length:
            continue
        for h in range(heads):
            keys = k[start : place + 1, h // (heads // kv_heads)].astype(np.float64)
            scores = keys @ q[t, h] / np.sqrt(head_dim)
            weights = np.exp(scores - scores.max())
            out[t, h] = weights @ v[start : place + 1, h // (heads // kv_heads)] / weights.sum()
    return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("tokens", "places"), [(1, 1), (1, 70), (9, 9), (5, 37)])
def test_attention_is_causal_and_grouped(tokens: int, places: int, device: str, normal: Any) -> None:
    q, k, v = normal(2, tokens, 6, 8), normal(2, places, 2, 8), normal(2, places, 2, 8)
    expected = [attention_in_numpy(q[b], k[b], v[b], 0, places) for b in range(2)]
    np.testing.assert_allclose(ops.attention(q, k, v, device=device), expected, **CLOSE)
    np.testing.assert_allclose(ops.attention(q[0], k[0], v[0], device=device), expected[0], **CLOSE)


@pytest.mark.parametrize("device", DEVICES)
def test_attention_leaves_padding_out(device: str, normal: Any) -> None:
    q, k, v = normal(3, 6, 4, 8), normal(3, 9, 4, 8), normal(3, 9, 4, 8)
    starts, lengths = np.array([0, 4, 0]), np.array([9, 5, 7])
    expected = [attention_in_numpy(q[b], k[b], v[b], starts[b], lengths[b]) for b in range(3)]
    np.testing.assert_allclose(ops.attention(q, k, v, starts=starts, lengths=lengths, device=device), expected, **CLOSE)


@pytest.mark.parametrize("device", DEVICES)
def test_feed_forward_is_swiglu(device: str, normal: Any) -> None:
    x, gate, up, down = normal(2, 3, 20), normal(37, 20), normal(37, 20), normal(20, 37)
    gate_bias, up_bias, down_bias = normal(37), normal(37), normal(20)

    def swiglu(gate_bias: Any = 0.0, up_bias: Any = 0.0, down_bias: Any = 0.0) -> Any:
        z = x.astype(np.float64) @ gate.T + gate_bias
        return (z / (1 + np.exp(-z)) * (x @ up.T + up_bias)) @ down.T + down_bias

    close = {"rtol": 1e-4, "atol": 1e-4}  # three products in a row
    np.testing.assert_allclose(ops.feed_forward(x, (gate, up), down, device=device), swiglu(), **close)
    biases = {"gate_bias": gate_bias, "up_bias": up_bias, "down_bias": down_bias}
    pair, packed = ops.pack_gate_up(gate, up, device=device), ops.pack(down, device=device)
    found = ops.feed_forward(x, pair, packed, residual=x, **biases)
    np.testing.assert_allclose(found, swiglu(**biases) + x, **close)
    np.testing.assert_array_equal(ops.feed_forward(x, pair, down, residual=x, out=x, **biases), found)


@pytest.mark.parametrize("device", DEVICES)
def test_softmax_and_cross_entropy(device: str, normal: Any) -> None:
    x = normal(2, 5, 31) * 5
    wide = np.exp(x.astype(np.float64) - x.max(axis=-1, keepdims=True))
    expected = wide / wide.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(ops.softmax(x, device=device), expected, **CLOSE)
    labels = np.array([[0, 30, -100, 7, 8], [1, 2, 3, -100, -100]])
    losses = ops.cross_entropy(x, labels, device=device)
    counted = labels != -100
    chosen = np.take_along_axis(expected, np.where(counted, labels, 0)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(losses, np.where(counted, -np.log(chosen), 0.0), **CLOSE)
    with pytest.raises(llama_ext.TokenIdError, match=r"labels\[0, 0\] is 31"):
        ops.cross_entropy(x[:1], labels[:1] + np.array([31, 0, 0, 0, 0]))


@pytest.mark.parametrize("device", DEVICES)
def test_embedding_takes_ids_of_any_shape(device: str, normal: Any) -> None:
    table = normal(11, 6)
    for ids in (np.array([[1, 10], [0, 1]]), np.array(5), np.zeros(0, dtype=np.uint8)):
        np.testing.assert_array_equal(ops.embedding(ids, table, device=device), table[ids])
    with pytest.raises(llama_ext.TokenIdError, match=r"ids\[1\] is 11"):
        ops.embedding(np.array([0, 11]), table)


def test_sample_is_greedy_unless_it_is_told(normal: Any) -> None:
    logits = normal(50)
    token, logprob = ops.sample(logits)
    assert token == int(logits.argmax())
    assert logprob == pytest.approx(float(np.log(ops.softmax(logits)[token])), abs=1e-5)
    drawn = {ops.sample(logits, temperature=2.0, seed=1, counter=counter)[0] for counter in range(50)}
    assert len(drawn) > 5
    assert ops.sample(logits, temperature=2.0, seed=9) == ops.sample(logits, temperature=2.0, seed=9)
    assert ops.sample(logits, logit_bias={token: -np.inf})[0] != token
    with pytest.raises(llama_ext.NumericError):
        ops.sample(np.full(4, np.nan, dtype=np.float32))


# What is refused.


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32, bool])
def test_nothing_is_cast_silently(dtype: Any, normal: Any) -> None:
    x, weight = normal(2, 8), normal(4, 8)
    with pytest.raises(llama_ext.DTypeError, match=r"x must be float32.*astype\(numpy.float32\)"):
        ops.matmul(x.astype(dtype), weight)
    with pytest.raises(llama_ext.DTypeError, match="residual"):
        ops.matmul(x, weight, residual=normal(2, 4).astype(dtype))
    with pytest.raises(llama_ext.DTypeError, match="out"):
        ops.matmul(x, weight, out=np.zeros((2, 4), dtype=dtype))
    if dtype is not np.float16:  # every float16 is a float32
        with pytest.raises(llama_ext.DTypeError, match=r"weight must be.*astype"):
            ops.matmul(x, weight.astype(dtype))


def test_bits_of_bfloat16_need_to_be_called_that(normal: Any) -> None:
    bits = np.zeros((4, 8), dtype=np.uint16)
    with pytest.raises(llama_ext.DTypeError, match="dtype='bfloat16'"):
        ops.pack(bits)
    with pytest.raises(llama_ext.DTypeError, match="int4"):
        ops.pack(normal(4, 8), "int3")
    with pytest.raises(llama_ext.DTypeError, match="list"):
        ops.softmax([1.0, 2.0])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: ops.matmul(x, w[:, :7]),
        lambda x, w: ops.matmul(x, w[0]),
        lambda x, w: ops.matmul(x, w, x[0]),
        lambda x, w: ops.matmul(x, w, residual=x),
        lambda x, w: ops.matmul(x, w, out=x),
        lambda x, w: ops.rms_norm(x, x[0, :5]),
        lambda x, w: ops.rope(x, x, x),
        lambda x, w: ops.attention(x, x, x),
        lambda x, w: ops.attention(w[:, None], w[:1, None], w[:1, None]),
        lambda x, w: ops.softmax(np.ones((), np.float32)),
        lambda x, w: ops.cross_entropy(x, np.zeros(3, dtype=int)),
        lambda x, w: ops.sample(x),
        lambda x, w: ops.pack_gate_up(w, x),
        lambda x, w: ops.feed_forward(x, (w, w), w),
    ],
)
def test_shapes_that_do_not_fit_are_a_shape_error(call: Any, normal: Any) -> None:
    with pytest.raises(llama_ext.ShapeError):
        call(normal(2, 8), normal(4, 8))


def test_a_matrix_belongs_to_what_it_was_packed_for(normal: Any) -> None:
    x, matrix = normal(2, 8), ops.pack(normal(4, 8), threads=1)
    for wrong in ({"threads": 2}, {"dtype": "bfloat16"}, {"isa": "x"}, {"device": "reference"}):
        with pytest.raises(llama_ext.OptionError, match=f"{next(iter(wrong))}=.*packed with"):
            ops.matmul(x, matrix, **wrong)  # type: ignore[arg-type]
    with pytest.raises(llama_ext.OptionError, match="pack_gate_up"):
        ops.feed_forward(x, matrix, matrix)
    pair = ops.pack_gate_up(normal(4, 8), normal(4, 8), threads=1)
    with pytest.raises(llama_ext.OptionError, match="from pack"):
        ops.matmul(x, pair)
    with pytest.raises(llama_ext.OptionError, match="different backends"):
        ops.feed_forward(x, pair, ops.pack(normal(8, 4), threads=2))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"device": "cuda:99"}, llama_ext.DeviceError),
        ({"isa": "sse9"}, llama_ext.DeviceError),
        ({"threads": 0}, llama_ext.OptionError),
        ({"compute": "fast"}, llama_ext.OptionError),
        ({"dtype": "float64"}, llama_ext.DTypeError),
    ],
)
def test_a_wrong_option_is_an_error(options: dict[str, Any], error: type[Exception], normal: Any) -> None:
    with pytest.raises(error):
        ops.matmul(normal(2, 8), normal(4, 8), **options)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_do_not_depend_on_the_number_of_threads(threads: int, normal: Any) -> None:
    x, weight = normal(17, 100), normal(90, 100)
    np.testing.assert_array_equal(ops.matmul(x, weight, threads=threads), ops.matmul(x, weight))
    q, k = normal(1, 30, 4, 16), normal(1, 300, 2, 16)
    np.testing.assert_array_equal(ops.attention(q, k, k, threads=threads), ops.attention(q, k, k))


@pytest.mark.parametrize("isa", llama_ext.info().available_isas)
def test_every_instruction_set_can_be_asked_for(isa: str, normal: Any) -> None:
    x, weight = normal(5, 50), normal(20, 50)
    matrix = ops.pack(weight, isa=isa)
    assert isa in repr(matrix)
    np.testing.assert_allclose(ops.matmul(x, matrix), x.astype(np.float64) @ weight.T, **CLOSE)
