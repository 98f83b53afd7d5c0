"""Products of one row with codes, matmul_one_row.cu: the bits are those of few rows on tensor cores, whatever the shape."""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import llama_ext
from devices import IS_EMULATED, only_emulated, only_hopper, requires_cuda
from guarded import guarded, guarded_empty
from llama_ext import OptionError, _core
from quantized import Kept, Weights, weights
from tolerances import assert_same_bits

Array = npt.NDArray[Any]
pytestmark = [requires_cuda, pytest.mark.gpu]

SETTING = "LLAMA_EXT_CUDA_ONE_ROW"
# Threads of a block, of this kernel and of the other.
THREADS = {True: 384, False: 512}
KEPT = [Kept("int8", 64), Kept("int8", 128), Kept("int8_min", 128), Kept("int4", 128), Kept("int4_min", 128)]
each_kept = pytest.mark.parametrize("kept", KEPT, ids=str)


@functools.cache
def backend(streams: bool | None) -> _core.Backend:
    """streams: all products of one row or none; None: as it is where nothing is set."""
    with pytest.MonkeyPatch.context() as patch:
        if streams is None:
            patch.delenv(SETTING, raising=False)
        else:
            patch.setenv(SETTING, str(int(streams)))
        return _core.Backend("cuda:0")


def assert_used(streams: bool) -> None:
    """The last kernel was this one, or the other one."""
    if IS_EMULATED:
        library = ctypes.CDLL(os.environ["LLAMA_EXT_CUDA_LIBRARY"])
        assert library.cuda_emulation_threads() == THREADS[streams]


def multiply(made: Weights, x: Array, streams: bool, *, is_taken: bool = True, **options: Any) -> Array:
    out = guarded(options.pop("y")) if "y" in options else guarded_empty((len(x), made.exact.shape[0]))
    bias = options.pop("bias", None)
    accumulate = options.pop("accumulate", False)
    on = backend(streams)
    on.matmul(guarded(x), made.on(on), bias, out, accumulate, "auto", **options)
    assert_used(streams and is_taken)
    return out


# Rows of W and columns: fewer batches than blocks and more; rows that end within a unit of 512 bytes and with one, of one unit and of more
# than there are warps; steps and shares that some warps have not, or all twice.
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(4, 256), (8, 130), (60, 512), (200, 1100), (28, 2560), (132, 4096), (36, 7000), (12, 14336), (4, 28672)],
)
@each_kept
def test_one_row_has_the_bits_of_few_rows_on_tensor_cores(kept: Kept, rows: int, columns: int) -> None:
    rng = np.random.default_rng(rows)
    if -(-columns // kept.group) % 2 == 1:
        columns += kept.group
    made = weights(kept, rng, rows, columns)
    x = rng.standard_normal((1, columns)).astype(np.float32)
    assert_same_bits(multiply(made, x, True), multiply(made, x, False), kept.name)


@each_kept
def test_its_norm_bias_and_residual_have_the_same_bits(kept: Kept) -> None:
    rng = np.random.default_rng(3)
    made = weights(kept, rng, 412, 1280)
    x = (rng.standard_normal((1, 1280)) * np.exp2(rng.integers(-9, 9, (1, 1280)))).astype(np.float32)
    bias = rng.standard_normal(412).astype(np.float32)
    y = rng.standard_normal((1, 412)).astype(np.float32)
    norm = rng.standard_normal(1280).astype(np.float32)
    for options in (
        {"bias": guarded(bias)},
        {"y": y, "accumulate": True},
        {"norm_weight": guarded(norm), "norm_eps": 1e-5},
        {"bias": guarded(bias), "y": y, "accumulate": True, "norm_weight": guarded(norm)},
    ):
        found, expected = (multiply(made, x, streams, **dict(options)) for streams in (True, False))
        assert_same_bits(found, expected, " ".join(options))


@pytest.mark.parametrize("columns", [1536, 3072, 4608, 6144])
def test_its_norm_has_the_same_bits_whatever_of_the_row_a_thread_holds(columns: int) -> None:
    rng = np.random.default_rng(columns)
    made = weights(Kept("int4", 128), rng, 20, columns)
    x = rng.standard_normal((1, columns)).astype(np.float32)
    options = {"norm_weight": guarded(rng.standard_normal(columns).astype(np.float32)), "norm_eps": 1e-5}
    found, expected = (multiply(made, x, streams, **options) for streams in (True, False))
    assert_same_bits(found, expected, f"{columns} columns")


def test_a_block_that_has_more_sums_than_memory_makes_them_in_passes() -> None:
    """With the four multiprocessors of the emulator: a GPU has rows enough for one pass, with sums alike."""
    rng = np.random.default_rng(4)
    made = weights(Kept("int8", 128), rng, 1400, 8192)
    x = rng.standard_normal((1, 8192)).astype(np.float32)
    y = rng.standard_normal((1, 1400)).astype(np.float32)
    found, expected = (multiply(made, x, streams, y=y, accumulate=True) for streams in (True, False))
    assert_same_bits(found, expected, "passes")


def test_a_head_of_32_mib_is_made_by_it_unless_that_is_refused() -> None:
    rng = np.random.default_rng(7)
    kept, rows, columns = Kept("int8", 128), 16384, 2048
    made = weights(kept, rng, rows, columns)
    x = rng.standard_normal((1, columns)).astype(np.float32)
    on = backend(None)
    found, one_less = guarded_empty((1, rows)), guarded_empty((1, rows - 4))
    on.matmul(guarded(x), made.on(on), None, found, False, "auto")
    assert_used(True)
    assert_same_bits(found, multiply(made, x, False), "a head")
    on.matmul(guarded(x), weights(kept, rng, rows - 4, columns).on(on), None, one_less, False, "auto")
    assert_used(False)
    y = guarded(np.zeros((1, rows), np.float32))
    on.matmul(guarded(x), made.on(on), None, y, True, "auto")
    assert_used(False)
    assert_same_bits(y, found, "added to something, as in a layer")
    norm = guarded(np.ones(columns, np.float32))
    on.matmul(guarded(x), made.on(on), None, y, False, "auto", norm, 1e-5)
    assert_used(True)
    assert_same_bits(y, multiply(made, x, False, norm_weight=norm, norm_eps=1e-5), "a head with the last norm")
    wide = guarded_empty((1, 8192))
    on.matmul(guarded(np.tile(x, 2)), weights(kept, rng, 8192, 2 * columns).on(on), None, wide, False, "auto")
    assert_used(False)


@pytest.mark.parametrize("width", [16, 20, 300, 1000])
@each_kept
def test_gates_and_ups_have_the_same_bits(kept: Kept, width: int) -> None:
    """Surplus gates of the last group are not written."""
    rng = np.random.default_rng(5)
    gate, up, down = weights(kept, rng, width, 512), weights(kept, rng, width, 512), weights(kept, rng, 512, width)
    x = rng.standard_normal((1, 512)).astype(np.float32)
    gate_bias, up_bias = (rng.standard_normal(width).astype(np.float32) for _ in range(2))
    norm = rng.standard_normal(512).astype(np.float32)
    found = []
    for streams in (True, False):
        on = backend(streams)
        out = guarded_empty((1, 512))
        gate_up = on.gate_up_matrix(guarded(gate.source), guarded(up.source), kept.name, kept.group)
        on.feed_forward(
            guarded(x),
            gate_up,
            guarded(gate_bias),
            guarded(up_bias),
            down.on(on),
            None,
            out,
            False,
            "auto",
            norm_weight=guarded(norm),
        )
        found.append(out)
    assert_same_bits(found[0], found[1], f"{width} gates")


def test_what_it_does_not_take_others_do() -> None:
    """Rows that are no whole batches, an odd number of groups, several rows of x, weights that are no codes."""
    rng = np.random.default_rng(6)
    for kept, rows, columns, count in (
        (Kept("int4", 128), 42, 512, 1),
        (Kept("int4", 128), 40, 384, 1),
        (Kept("int8", 64), 40, 512, 2),
    ):
        made = weights(kept, rng, rows, columns)
        x = rng.standard_normal((count, columns)).astype(np.float32)
        found, expected = (multiply(made, x, streams, is_taken=False) for streams in (True, False))
        assert_same_bits(found, expected, f"{rows} x {columns}, {count} rows")


def test_a_row_alone_has_the_bits_that_it_has_among_eight() -> None:
    rng = np.random.default_rng(7)
    made = weights(Kept("int4", 128), rng, 64, 512)
    x = rng.standard_normal((8, 512)).astype(np.float32)
    whole = multiply(made, x, True, is_taken=False)
    for row in range(8):
        assert_same_bits(multiply(made, x[row : row + 1], True), whole[row : row + 1], f"row {row}")


@only_hopper
def test_a_row_that_is_left_over_is_made_by_it() -> None:
    """Of four so long that three fit a block of the others' kernel."""
    rng = np.random.default_rng(10)
    made = weights(Kept("int4", 128), rng, 8, 28672)
    x = rng.standard_normal((4, 28672)).astype(np.float32)
    found = multiply(made, x, True)
    expected = np.concatenate([multiply(made, x[row : row + 1], False) for row in range(4)])
    assert_same_bits(found, expected, "3 + 1 rows")


def test_a_setting_that_is_neither_on_nor_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for said in ("true", "2", "off"):
        monkeypatch.setenv(SETTING, said)
        with pytest.raises(OptionError, match=f"{SETTING} must be 0 or 1, got '{said}'"):
            _core.Backend("cuda:0")
    monkeypatch.setenv(SETTING, "")
    _core.Backend("cuda:0")


def test_what_is_no_number_makes_no_number() -> None:
    rng = np.random.default_rng(8)
    made = weights(Kept("int4", 128), rng, 8, 512)
    for bad in (np.nan, np.inf, -np.inf):
        x = rng.standard_normal((1, 512)).astype(np.float32)
        x[0, 200] = bad
        assert np.isnan(multiply(made, x, True)).all()


@only_emulated
@pytest.mark.parametrize("order", ["forward", "backward", "shuffled"])
def test_it_waits_for_what_it_needs_in_any_order_of_turns(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With copies that arrive as late as they may."""
    monkeypatch.setenv("LLAMA_EXT_CUDA_EMULATION_ORDER", order)
    rng = np.random.default_rng(9)
    for kept in KEPT:
        made = weights(kept, rng, 52, 1536)
        x = rng.standard_normal((1, 1536)).astype(np.float32)
        assert_same_bits(multiply(made, x, True), multiply(made, x, False), f"{kept}, {order}")


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_model_generates_the_same_tokens_with_the_same_probabilities(dtype: str) -> None:
    """Recorded, where kernels start early: biases, gates of a width that is no multiple of 16, an int8 head."""
    config = llama_ext.LlamaConfig(
        vocab_size=68,
        hidden_size=256,
        intermediate_size=500,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        attention_bias=True,
        mlp_bias=True,
    )
    found = []
    for streams in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(SETTING, str(int(streams)))
            model = llama_ext.LlamaForCausalLM(config, seed=11, device="cuda", dtype=dtype, group_size=128)
        generation = _core.Generation(
            model._core,
            [np.arange(130, dtype=np.int32) % 68],
            sampling={"temperature": 1.0},
            max_new_tokens=[12],
            eos=[],
            seed=5,
            kv_dtype="bfloat16",
        )
        events = []
        while not generation.done:
            events.append(generation.step())
        found.append(events)
    assert found[0] == found[1]
