"""Numbers, words and lists that `llama_ext.ops` takes beside arrays: what is none of them is an error of the package that names it."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from llama_ext import DeviceError, DTypeError, OptionError, ShapeError, TokenIdError, UnsupportedError, ops

ONE = np.ones((2, 8), np.float32)
ROW = np.ones(8, np.float32)
W = np.ones((4, 8), np.float32)
DOWN = np.ones((8, 4), np.float32)
HEADS = np.ones((4, 2, 6), np.float32)
SUMS = np.ones((4, 2), np.float32)
LABELS = np.array([0, 1])
BLOCK = np.zeros(34, np.uint8)
HUGE = 10**5000  # more digits than Python writes out


def fresh(count: int = 4) -> list[Any]:
    return [np.ones(3, np.float32) for _ in range(count)]


def causal(**options: Any) -> Any:
    return ops.causal_attention(HEADS, HEADS, HEADS, **options)


def causal_backward(**options: Any) -> Any:
    return ops.causal_attention_backward(HEADS, HEADS, HEADS, HEADS, HEADS, SUMS, **options)


def adam(**options: Any) -> Any:
    return ops.adam(*fresh(), **{"step": 1, "lr": 0.1, **options})


def sgd(**options: Any) -> Any:
    return ops.sgd(*fresh(3), **{"lr": 0.1, **options})


# By the name in messages: an operation that takes one number, and nothing else of interest.
NUMBERS: dict[str, Any] = {
    "rms_norm: eps": lambda value: ops.rms_norm(ONE, ROW, value),
    "rms_norm_backward: eps": lambda value: ops.rms_norm_backward(ONE, ONE, ROW, value),
    "attention: scale": lambda value: ops.attention(HEADS, HEADS, HEADS, scale=value),
    "causal_attention: scale": lambda value: causal(scale=value),
    "causal_attention: dropout": lambda value: causal(dropout=value),
    "causal_attention_backward: scale": lambda value: causal_backward(scale=value),
    "causal_attention_backward: dropout": lambda value: causal_backward(dropout=value),
    "cross_entropy_backward: scale": lambda value: ops.cross_entropy_backward(ONE, LABELS, value),
    "dropout: p": lambda value: ops.dropout(ONE, value, 1),
    "dropout: scale": lambda value: ops.dropout(ONE, 0.5, 1, scale=value),
    "adam: lr": lambda value: adam(lr=value),
    "adam: eps": lambda value: adam(eps=value),
    "adam: weight_decay": lambda value: adam(weight_decay=value),
    "adam: gradient_scale": lambda value: adam(gradient_scale=value),
    r"adam: betas\[0\]": lambda value: adam(betas=(value, 0.9)),
    r"adam: betas\[1\]": lambda value: adam(betas=(0.9, value)),
    "sgd: lr": lambda value: sgd(lr=value),
    "sgd: momentum": lambda value: sgd(momentum=value),
    "sgd: weight_decay": lambda value: sgd(weight_decay=value),
    "sgd: gradient_scale": lambda value: sgd(gradient_scale=value),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_is_an_option_error_that_names_it(name: str) -> None:
    # None is the default of an attention's scale.
    for value in ("1", b"1", [0.5], np.ones(2), 1j, HUGE, *(() if name.endswith("attention: scale") else ({},))):
        with pytest.raises(OptionError, match=f"^{name} must be a number, got "):
            NUMBERS[name](value)
    for value in (np.float32(0.5), np.float64(0.5), np.array(0.5)):
        NUMBERS[name](value)


@pytest.mark.parametrize("name", [name for name in NUMBERS if not re.search(r"dropout$|: p$|betas|momentum", name)])
def test_a_number_beyond_float32_is_an_option_error(name: str) -> None:
    with pytest.raises(OptionError, match=f"^{name.replace('weight_', '')} must be .* float32"):
        NUMBERS[name](1e39)


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_numbers_that_leave_float32_give_no_nan(device: str) -> None:
    zeros = np.zeros_like(ONE)
    for call in (
        lambda: ops.rms_norm(zeros, ROW, 1e-60, device=device),
        lambda: ops.dropout(zeros, 0.5, 1, scale=1e39, device=device),
        lambda: adam(lr=1e300, device=device),
        lambda: sgd(lr=1e300, device=device),
    ):
        with pytest.raises(OptionError, match="float32"):
            call()


@pytest.mark.parametrize("betas", [(), (0.9,), (0.9, 0.99, 0.999), 5, None, "0.9"], ids=str)
def test_adam_takes_two_betas(betas: Any) -> None:
    arrays = fresh()
    with pytest.raises(OptionError, match=r"adam: betas must be two numbers in \[0, 1\), got "):
        ops.adam(*arrays, step=1, lr=0.1, betas=betas)
    for array in arrays:
        np.testing.assert_array_equal(array, 1)


def test_adam_takes_betas_of_any_sequence_of_two() -> None:
    expected = fresh()
    ops.adam(*expected, step=1, lr=0.1, betas=(0.5, 0.75))
    for betas in ([0.5, 0.75], np.array([0.5, 0.75])):
        found = fresh()
        ops.adam(*found, step=1, lr=0.1, betas=betas)  # type: ignore[arg-type]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("value", ["no", None, 2, 0.5, np.ones(2)], ids=str)
def test_what_is_neither_true_nor_false_is_an_option_error(value: Any) -> None:
    for call in (
        lambda: adam(decoupled=value),
        lambda: sgd(nesterov=value),
        lambda: ops.rope(HEADS, np.ones((4, 3), np.float32), np.ones((4, 3), np.float32), inverse=value),
    ):
        with pytest.raises(OptionError, match="must be True or False, got"):
            call()


@pytest.mark.parametrize("value", [3, None, [1], ("auto",), "\ud800", HUGE], ids=lambda value: type(value).__name__)
def test_what_is_no_word_is_refused_as_an_unknown_one_is(value: Any) -> None:
    for call in (
        lambda: ops.matmul(ONE, W, compute=value),
        lambda: ops.matmul_backward(ONE[:, :4], W, compute=value),
        lambda: ops.feed_forward(ONE, (W, W), DOWN, compute=value),
        lambda: ops.attention(HEADS, HEADS, HEADS, compute=value),
        lambda: causal(compute=value),
        lambda: causal_backward(compute=value),
    ):
        with pytest.raises(OptionError, match="compute must be 'auto', 'exact' or 'bfloat16', got"):
            call()
    with pytest.raises(DTypeError, match="KV cache: dtype must be float32, bfloat16 or int8, got"):
        ops.attention(HEADS, HEADS, HEADS, kv_dtype=value)
    with pytest.raises(DTypeError, match="supported: Q8_0"):
        ops.pack_blocks(BLOCK, value, 32)
    for call in (
        lambda: ops.softmax(ONE, device=value),
        lambda: ops.matmul(ONE, W, device=value),
        lambda: ops.to_device(ONE, value),
    ):
        with pytest.raises(DeviceError, match=r"unknown device '.*; known: cpu, cuda"):
            call()
    if value is not None:
        with pytest.raises(DeviceError, match=r"isa: .* is not available"):
            ops.softmax(ONE, isa=value)


def test_a_device_that_is_no_word_contradicts_a_packed_matrix() -> None:
    with pytest.raises(OptionError, match=r"device=\[\], but the matrix was packed with"):
        ops.matmul(ONE, ops.pack(W), device=[])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [np.dtype("float32"), np.float32, 3, None])
def test_a_dtype_of_numpy_is_no_name_of_a_way_to_keep_weights(dtype: Any) -> None:
    with pytest.raises(DTypeError, match="pack: dtype must be one of float32"):
        ops.pack(W, dtype)
    with pytest.raises(DTypeError, match="quantize: dtype must be one of int8"):
        ops.quantize(np.ones((2, 32), np.float32), np.dtype("int8"))  # type: ignore[arg-type]


def test_extents_beyond_64_bits_are_typed_errors() -> None:
    for columns in (2**63, 2**70, HUGE, 0, -32):
        with pytest.raises(ShapeError, match="pack_blocks: columns must be in"):
            ops.pack_blocks(BLOCK, "Q8_0", columns)
    for vocabulary in (2**63, HUGE):
        with pytest.raises(OptionError, match="embedding_backward: vocabulary must be"):
            ops.embedding_backward(ONE, LABELS, vocabulary)
    for pair in ((0, 2**70), (2**70, 1), (0, 2**63), (-(2**63) - 1, 1), (HUGE, 1)):
        for call in (causal, causal_backward):
            with pytest.raises(ShapeError, match=r"sequences\[1\] must be a range within 4 rows"):
                call(sequences=[(0, 1), pair])
    with pytest.raises(DTypeError, match=r"sequences must be pairs .* or None, got int"):
        causal(sequences=5)
    with pytest.raises(OptionError, match="step counts from 1"):
        adam(step=HUGE)


@pytest.mark.parametrize("gate_up", [(W,), (W, W, W), (), None, 5], ids=lambda value: type(value).__name__)
def test_a_feed_forward_takes_a_pair(gate_up: Any) -> None:
    with pytest.raises(DTypeError, match=r"feed_forward: gate_up must come from pack_gate_up, or be two matrices"):
        ops.feed_forward(ONE, gate_up, DOWN)


def test_a_feed_forward_drops_none_of_the_arrays_of_other_libraries() -> None:
    class Foreign:
        def __dlpack_device__(self) -> tuple[int, int]:
            return W.__dlpack_device__()

        def __dlpack__(self, **options: Any) -> object:
            return W.__dlpack__(**options)

    ops.feed_forward(ONE, (Foreign(), Foreign()), DOWN)  # type: ignore[arg-type]
    with pytest.raises(DTypeError, match="two matrices"):
        ops.feed_forward(ONE, (Foreign(), Foreign(), Foreign()), DOWN)  # type: ignore[arg-type]


# rope_angles.


def test_positions_are_within_int64() -> None:
    for position in (2**63, 2**63 + 5, 2**64 - 1):
        with pytest.raises(OptionError, match=rf"positions must be below 2\^63, got {position}"):
            ops.rope_angles(np.array([0, position], np.uint64), 4)
    for expected, positions in ((7, np.array([7], np.uint64)), (2**63 - 1, np.array([2**63 - 1], np.uint64))):
        found = ops.rope_angles(positions, 4)
        np.testing.assert_array_equal(found, ops.rope_angles(np.array([expected], np.int64), 4))


@pytest.mark.parametrize("positions", [[], (), range(0), np.zeros(0, np.uint8), np.zeros(0, np.uint64)], ids=repr)
def test_no_positions_have_no_angles(positions: Any) -> None:
    cos, sin = ops.rope_angles(positions, 4)
    assert (cos.shape, sin.shape, cos.dtype, sin.dtype) == ((0, 2), (0, 2), np.float32, np.float32)


@pytest.mark.parametrize("positions", [[[1], [1, 2]], [2**70], None, "12", [0.5], [True], np.zeros(0)], ids=repr)
def test_positions_that_are_no_integers_are_a_dtype_error(positions: Any) -> None:
    with pytest.raises(DTypeError, match="rope_angles: positions must be integers, got"):
        ops.rope_angles(positions, 4)


@pytest.mark.parametrize("positions", [[[]], [[1, 2]], 5], ids=repr)
def test_positions_of_another_shape_are_a_shape_error(positions: Any) -> None:
    with pytest.raises(ShapeError, match=r"positions must have shape \(T,\)"):
        ops.rope_angles(positions, 4)


def test_positions_that_numpy_cannot_read_are_a_dtype_error() -> None:
    class OnAGpu:
        def __array__(self, *arguments: Any, **options: Any) -> Any:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")

    with pytest.raises(DTypeError, match="Copy it to the CPU first"):
        ops.rope_angles(OnAGpu(), 4)  # type: ignore[arg-type]


# sample.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seed": -1}, OptionError, r"sample: seed must be a whole number in \[0, 2\^64\), got -1"),
        ({"seed": 1.5}, OptionError, "sample: seed"),
        ({"seed": "1"}, OptionError, "sample: seed"),
        ({"stream": -1}, OptionError, "sample: stream"),
        ({"counter": 2**64}, OptionError, "sample: counter"),
        ({"prompt": "abc"}, DTypeError, "sample: prompt must be a sequence of integers, got str"),
        ({"prompt": 5}, DTypeError, "sample: prompt"),
        ({"prompt": np.ones((2, 2), int)}, ShapeError, "sample: prompt"),
        ({"prompt": np.ones(2)}, DTypeError, "sample: prompt must be integers, got float64"),
        ({"output": [1, "2"]}, DTypeError, r"sample: output\[1\] must be an integer, got str"),
        ({"output": [2**40]}, TokenIdError, r"sample: output\[0\] is 1099511627776"),
        ({"output": [9], "presence_penalty": 1.0}, TokenIdError, "9"),
        ({"logit_bias": [1]}, OptionError, r"sample: logit_bias must map token ids to numbers, got \[1\]"),
        ({"logit_bias": np.ones(8)}, OptionError, "sample: logit_bias"),
        ({"logit_bias": {"a": 1}}, OptionError, "logit_bias"),
        ({"temperature": "hot"}, OptionError, "temperature"),
    ],
    ids=repr,
)
def test_sample_names_what_it_cannot_take(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.sample(ROW, **options)


def test_sample_takes_ids_of_any_kind() -> None:
    expected = ops.sample(ROW, prompt=[0, 1], output=[2], repetition_penalty=2.0, logit_bias={3: 0.5}, seed=5)
    for prompt in ((0, 1), range(2), np.arange(2), np.arange(2, dtype=np.uint8), [np.int64(0), np.int32(1)]):
        found = ops.sample(
            ROW,
            prompt=prompt,  # type: ignore[arg-type]
            output=np.array([2]),  # type: ignore[arg-type]
            repetition_penalty=2.0,
            logit_bias={np.int64(3): np.float32(0.5)},  # type: ignore[dict-item]
            seed=np.uint64(5),  # type: ignore[arg-type]
        )
        assert found == expected
    ops.sample(ROW, prompt=[1000])  # no penalty reads it


def test_a_tensor_of_torch_without_memory_is_not_handed_out() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed, nor needed otherwise")
    for call in (ops.softmax, ops.from_dlpack, ops.to_device):
        with pytest.raises(UnsupportedError, match="a Tensor, is not handed out by its library"):
            call(torch.empty(2, 2, device="meta"))
