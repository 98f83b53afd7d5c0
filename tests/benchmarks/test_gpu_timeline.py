"""What a profiler saw of a token is read rightly. Nothing is timed here."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from benchmarks import gpu_peers, gpu_timeline
from benchmarks.gpu_shapes import SHAPES
from devices import requires_cuda

TOKEN = ["embedding_of_live_kernel", *["matmul_kernel", "attention_kernel", *["matmul_kernel"] * 3] * 2]
TOKEN += ["matmul_kernel", gpu_timeline.LAST]
SHAPE = dataclasses.replace(SHAPES["tiny"], layers=2)


def event(name: str, end: float, dur: float) -> dict[str, Any]:
    spelled = f"void llama_ext::cuda::(anonymous namespace)::{name}<(Kind)4, false>(llama_ext::cuda::View)"
    return {"cat": "kernel", "name": spelled, "ts": end - dur, "dur": dur}


def trace(tokens: int) -> list[dict[str, Any]]:
    """Each kernel ends 2 us after the one before it, and began 3 us before: they overlap. Something else lies between."""
    names = [gpu_timeline.LAST, *TOKEN * tokens]
    events = [event(name, 2.0 * i, 3.0) for i, name in enumerate(names)]
    return [{"cat": "gpu_memcpy", "name": "Memcpy", "ts": 1.0, "dur": 1.0}, *reversed(events)]


def test_kernels_are_named_without_their_templates_and_come_by_their_ends() -> None:
    kernels = gpu_timeline.kernels_of(trace(1))
    assert [kernel.name for kernel in kernels] == [gpu_timeline.LAST, *TOKEN]
    assert kernels[1] == gpu_timeline.Kernel("embedding_of_live_kernel", -1.0, 2.0)


def test_a_token_costs_what_lies_between_ends() -> None:
    tokens = gpu_timeline.tokens_of(gpu_timeline.kernels_of(trace(3)))
    assert [len(token) for token in tokens] == [1 + len(TOKEN)] * 3
    assert gpu_timeline.times_of(tokens) == [(name, 2.0, 3.0) for name in TOKEN]


def test_tokens_of_other_kernels_are_left_out_and_none_are_none() -> None:
    kernels = gpu_timeline.kernels_of(trace(3))
    odd = dataclasses.replace(kernels[-1], end=kernels[-1].end + 1)
    assert len(gpu_timeline.tokens_of([*kernels, odd])) == 3
    assert gpu_timeline.tokens_of(kernels[:1]) == []


def test_a_layers_kernels_are_one_row_each_beside_what_their_weights_take() -> None:
    times = gpu_timeline.times_of(gpu_timeline.tokens_of(gpu_timeline.kernels_of(trace(2))))
    rows = gpu_timeline.rows_of(times, SHAPE, ("int4", 32), 1e9)
    assert [row[0] for row in rows] == [
        "embedding", "qkv", "attention", "o", "gate, up", "down", "head", "largest logit", "a layer",
    ]  # fmt: skip
    assert rows[-1][2] == "10.00"
    # 64 x 160 numbers of 4 bits, and a float16 for each 32 of them; an int4 model's head is int8.
    assert rows[5][4] == f"{64 * 160 * 4.5 / 8 / 1e9 * 1e6:.2f}"
    assert rows[6][4] == f"{512 * 64 * 8.5 / 8 / 1e9 * 1e6:.2f}"
    assert rows[2][4] == ""


def test_kernels_in_unknown_places_are_listed_as_they_are() -> None:
    times = gpu_timeline.times_of(gpu_timeline.tokens_of(gpu_timeline.kernels_of(trace(2))))
    other = dataclasses.replace(SHAPE, layers=3)
    assert [row[0] for row in gpu_timeline.rows_of(times, other, ("int4", 32), 1e9)] == TOKEN


@requires_cuda
@pytest.mark.gpu
def test_without_a_torch_that_sees_the_gpu_it_says_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_peers, "torch_for", lambda device: None)
    assert gpu_timeline.main(["--shape", "tiny"]) == 1
    assert "its profiler is needed" in capsys.readouterr().err


def test_weights_that_a_shape_has_not_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_timeline.main(["--shape", "8b", "--weights", "int8"])
    assert "8b has no weights int8: bfloat16, int4" in capsys.readouterr().err
