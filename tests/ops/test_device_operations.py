"""Every operation on arrays of a GPU: the bits that NumPy arrays give, left where they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from device_arrays import GPU, Floats, host, normal, of_gpu
from devices import requires_cuda
from llama_ext import ShapeError, ops

M, C, V, H, K, D = 6, 32, 12, 4, 2, 8


def _calls() -> dict[str, tuple[str, dict[str, Any]]]:
    """Every operation on arrays: its name, and arguments that are NumPy arrays."""
    x, d_y, weight = normal(M, C), normal(M, V, seed=1), normal(V, C, seed=2)
    q, k, v = normal(M, H, D, seed=3), normal(M, K, D, seed=4), normal(M, K, D, seed=5)
    ids, labels = np.array([1, 0, 11, 3, 3, 7]), np.array([1, -100, 0, 11, 2, 2])
    cos, sin = ops.rope_angles(np.arange(3), D)
    y, log_sums = ops.causal_attention(q, k, v)
    gate, up, down = normal(48, C, seed=6), normal(48, C, seed=7), normal(C, 48, seed=8)
    biases = {"gate_bias": normal(48, seed=9), "up_bias": normal(48, seed=10), "down_bias": normal(C, seed=11)}
    logits = normal(M, V, seed=12)
    return {
        "matmul": ("matmul", {"x": x, "weight": weight, "bias": normal(V), "residual": d_y}),
        "matmul-3d": ("matmul", {"x": x.reshape(2, 3, C), "weight": weight}),
        "matmul-no-rows": ("matmul", {"x": x[:0], "weight": weight}),
        "matmul_backward": ("matmul_backward", {"d_y": d_y, "weight": weight, "x": x}),
        "matmul_backward-odd": (
            "matmul_backward",
            {"d_y": d_y, "weight": weight[:, :19].copy(), "x": x[:, :19].copy()},
        ),
        "rms_norm": ("rms_norm", {"x": x, "weight": normal(C)}),
        "rms_norm_backward": ("rms_norm_backward", {"d_y": normal(M, C, seed=1), "x": x, "weight": normal(C)}),
        "swiglu": ("swiglu", {"gate": x, "up": normal(M, C, seed=1)}),
        "swiglu_backward": ("swiglu_backward", {"d_y": x, "gate": normal(M, C, seed=1), "up": normal(M, C, seed=2)}),
        "feed_forward": ("feed_forward", {"x": x, "gate_up": (gate, up), "down": down, "residual": x, **biases}),
        "softmax": ("softmax", {"x": x}),
        "embedding": ("embedding", {"ids": ids, "table": weight}),
        "embedding_backward": ("embedding_backward", {"d_y": x, "ids": ids, "vocabulary": V}),
        "cross_entropy": ("cross_entropy", {"logits": logits, "labels": labels}),
        "cross_entropy_backward": ("cross_entropy_backward", {"logits": logits, "labels": labels, "scale": 0.5}),
        "rope": ("rope", {"x": q[:3], "cos": cos, "sin": sin}),
        "rope-batch": ("rope", {"x": q.reshape(2, 3, H, D), "cos": cos, "sin": sin, "inverse": True}),
        "attention": ("attention", {"q": q[3:], "k": k, "v": v}),
        "attention-padded": (
            "attention",
            {
                "q": q.reshape(2, 3, H, D),
                "k": k.reshape(2, 3, K, D),
                "v": v.reshape(2, 3, K, D),
                "starts": np.array([0, 1]),
                "lengths": np.array([3, 2]),
            },
        ),
        "causal_attention": ("causal_attention", {"q": q, "k": k, "v": v, "sequences": [(0, 2), (2, 4)]}),
        "causal_attention_backward": (
            "causal_attention_backward",
            {"d_y": normal(M, H, D, seed=6), "q": q, "k": k, "v": v, "y": y, "log_sums": log_sums},
        ),
        "dropout": ("dropout", {"x": x, "p": 0.25, "seed": 3}),
    }


def _moved(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return ops.to_device(value)
    return tuple(map(_moved, value)) if isinstance(value, tuple) else value


def _results(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


CALLS = _calls()


def test_every_operation_with_an_array_is_among_the_calls() -> None:
    # Packing has a test of its own, steps of optimisers and sample as well; angles are made of numbers.
    others = {"DeviceArray", "Matrix", "adam", "sgd", "sample", "rope_angles", "from_dlpack", "to_device", "quantize"}
    others |= {"pack", "pack_gate_up", "pack_blocks"}
    assert {name for name, _ in CALLS.values()} | others == set(ops.__all__)


@pytest.mark.gpu
@requires_cuda
@pytest.mark.parametrize("call", CALLS)
def test_an_operation_on_arrays_of_a_gpu_gives_what_it_gives_for_numpy_arrays_and_leaves_it_there(call: str) -> None:
    name, arguments = CALLS[call]
    operation = getattr(ops, name)
    expected = _results(operation(**arguments, device="cuda"))
    near = _results(operation(**arguments, device="reference"))
    found = _results(operation(**{key: _moved(value) for key, value in arguments.items()}))
    assert len(found) == len(expected)
    for its, same, exact in zip(found, expected, near, strict=True):
        assert isinstance(its, ops.DeviceArray)
        assert its.device == GPU
        assert its.shape == same.shape
        np.testing.assert_array_equal(its.numpy(), same)
        np.testing.assert_allclose(its.numpy(), exact, atol=2e-4)


@pytest.mark.gpu
@requires_cuda
def test_steps_of_optimisers_change_arrays_of_a_gpu_in_place() -> None:
    def states() -> list[Floats]:
        return [normal(5, 7), normal(5, 7, seed=1), np.zeros((5, 7), np.float32), np.zeros((5, 7), np.float32)]

    here, there = states(), [ops.to_device(each) for each in states()]
    ops.adam(*here, step=1, lr=0.1, device="cuda")
    ops.adam(*there, step=1, lr=0.1)  # type: ignore[arg-type]
    for its, same in zip(there, here, strict=True):
        np.testing.assert_array_equal(host(its), same)
    ops.sgd(*here[:3], lr=0.1, momentum=0.9, device="cuda")
    theirs = [of_gpu(each) for each in here[:3]]
    here, before = states(), [host(ops.from_dlpack(each)).copy() for each in theirs]
    ops.sgd(*before, lr=0.1, momentum=0.9, device="cuda")
    ops.sgd(*theirs, lr=0.1, momentum=0.9)  # type: ignore[arg-type]
    for its, same in zip(theirs, before, strict=True):
        np.testing.assert_array_equal(host(ops.from_dlpack(its)), same)
    with pytest.raises(ShapeError, match="parameter must not overlap gradient"):
        ops.sgd(there[0], there[0], lr=0.1)  # type: ignore[arg-type]


@pytest.mark.gpu
@requires_cuda
def test_the_cpu_draws_from_logits_of_a_gpu_and_reads_ids_that_are_there() -> None:
    logits = normal(50)
    assert ops.sample(ops.to_device(logits), temperature=0.8, seed=5) == ops.sample(  # type: ignore[arg-type]
        logits, temperature=0.8, seed=5, device="cuda"
    )
    table, ids = normal(9, 16), np.array([[8, 0], [3, 3]])
    packed = ops.pack(table, device="cuda")
    y = ops.embedding(ops.to_device(ids), packed)  # type: ignore[arg-type]
    assert isinstance(y, ops.DeviceArray)
    np.testing.assert_array_equal(y.numpy(), table[ids])
    assert isinstance(ops.embedding(ids, packed), np.ndarray), "nothing of the call was an array on a GPU"
    np.testing.assert_array_equal(host(ops.embedding(ids, ops.to_device(table))), table[ids])  # type: ignore[arg-type]
