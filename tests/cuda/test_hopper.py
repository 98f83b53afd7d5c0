"""Kernels of Hopper's own instructions beside those of every other GPU: the same bits, whatever tiles a product is cut into."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import llama_ext
from devices import only_emulated, only_hopper
from guarded import guarded, guarded_empty, guarded_rows, guarded_rows_empty
from llama_ext import _core
from llama_ext.runtime.loading import core_config
from quantized import Kept, weights
from subprocesses import run_script
from tolerances import assert_same_bits, relative_rms

Array = npt.NDArray[Any]
pytestmark = [only_emulated, only_hopper, pytest.mark.gpu]


@functools.cache
def backend_of(capability: int) -> _core.Backend:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_EXT_CUDA_EMULATION_CAPABILITY", str(capability))
        return _core.Backend("cuda")


HOPPER, AMPERE = 90, 80

# On the emulator's 4 multiprocessors these take each of the five shapes of tiles (wgmma_tiles.h), whole ones and the last of a row or
# column; k that ends within a step of 64, and k of more steps than the copy engine may be ahead.
ROWS = (65, 130, 300)
COLUMNS = (64, 192, 200, 320, 384, 512, 576)
each_order = pytest.mark.parametrize("order", ["forward", "backward", "shuffled"])


def multiply(capability: int, shape: tuple[int, int, int], gap: int, accumulate: bool) -> Array:
    rows, columns, depth = shape
    rng = np.random.default_rng(shape)
    x, weight, bias = (
        rng.standard_normal(size).astype(np.float32) for size in ((rows, depth), (columns, depth), (columns,))
    )
    backend = backend_of(capability)
    y, gaps = guarded_rows_empty((rows, columns), gap)
    if accumulate:
        y[...] = rng.standard_normal(y.shape)
    with_bias = guarded(bias) if columns % 128 == 0 else None
    backend.matmul(guarded_rows(x, gap), backend.matrix(guarded(weight), "bfloat16"), with_bias, y, accumulate, "auto")
    assert np.isnan(gaps).all(), "wrote between the rows"
    return np.ascontiguousarray(y)


@pytest.mark.parametrize("accumulate", [False, True], ids=["stored", "added"])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", ROWS)
def test_products_have_the_bits_of_other_gpus_in_every_shape_of_tiles(
    rows: int, columns: int, accumulate: bool
) -> None:
    for depth, gap in ((100, 4), (70, 3)):
        shape = (rows, columns, depth)
        expected = multiply(AMPERE, shape, gap, accumulate)
        assert_same_bits(multiply(HOPPER, shape, gap, accumulate), expected, f"{depth} k, rows {gap} numbers apart")


@each_order
@pytest.mark.parametrize("shape", [(130, 256, 700), (300, 192, 700), (65, 320, 700), (9, 64, 1000)], ids=str)
def test_products_wait_for_what_the_copy_engine_brings(
    order: str, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = multiply(AMPERE, shape, 4, False)
    monkeypatch.setenv("LLAMA_EXT_CUDA_EMULATION_ORDER", order)
    assert_same_bits(multiply(HOPPER, shape, 4, False), expected)


@pytest.mark.parametrize("kept", [Kept("int8", 32), Kept("int4", 32)], ids=str)
def test_unpacked_strips_have_the_bits_of_other_gpus(kept: Kept) -> None:
    results = []
    for capability in (AMPERE, HOPPER):
        rng = np.random.default_rng(5)
        matrix = weights(kept, rng, 700, kept.columns(100)).on(backend_of(capability))
        x = rng.standard_normal((130, matrix.shape[1])).astype(np.float32)
        y, gaps = guarded_rows_empty((130, 700), 4)
        backend_of(capability).matmul(guarded(x), matrix, None, y, False, "auto")
        assert np.isnan(gaps).all(), "wrote between the rows"
        results.append(np.ascontiguousarray(y))
    assert_same_bits(*results)


@each_order
@pytest.mark.parametrize("width", [40, 96, 300])
def test_the_gate_meets_the_up_in_registers(order: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(capability: int) -> Array:
        rng = np.random.default_rng(width)
        backend = backend_of(capability)
        x = rng.standard_normal((140, 72)).astype(np.float32)
        gate, up, down = (
            rng.standard_normal(size).astype(np.float32) for size in ((width, 72), (width, 72), (72, width))
        )
        pair = backend.gate_up_matrix(guarded(gate), guarded(up), "bfloat16")
        out = guarded_empty((140, 72))
        backend.feed_forward(guarded(x), pair, None, None, backend.matrix(guarded(down), "bfloat16"), None, out)
        return out

    expected = run(AMPERE)
    monkeypatch.setenv("LLAMA_EXT_CUDA_EMULATION_ORDER", order)
    # A quotient that is not rounded correctly: now and then a hidden number's rounding to bfloat16 differs.
    assert relative_rms(run(HOPPER), expected) < 1e-5


@each_order
@pytest.mark.parametrize(
    "case", [(64, 64, 8, 2, 64), (200, 270, 4, 2, 128), (70, 700, 8, 1, 40), (150, 150, 8, 8, 100)], ids=str
)
def test_attention_has_the_bits_of_other_gpus(
    order: str, case: tuple[int, int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, keys, heads, kv_heads, dim = case

    def run(capability: int) -> Array:
        rng = np.random.default_rng(case)
        q = rng.standard_normal((1, tokens, heads, dim)).astype(np.float32)
        k, v = (rng.standard_normal((1, keys, kv_heads, dim)).astype(np.float32) for _ in range(2))
        starts, lengths = np.zeros(1, np.int32), np.array([keys], np.int32)
        out = guarded_empty(q.shape)
        backend_of(capability).attention(
            guarded(q), guarded(k), guarded(v), starts, lengths, dim**-0.5, "bfloat16", out, "auto"
        )
        return out

    expected = run(AMPERE)
    monkeypatch.setenv("LLAMA_EXT_CUDA_EMULATION_ORDER", order)
    assert_same_bits(run(HOPPER), expected)


@pytest.mark.parametrize("head_dim", [32, 128])
@pytest.mark.parametrize("cached", [0, 20])
def test_what_attention_rounds_for_the_next_product_has_the_bits_of_other_gpus(cached: int, head_dim: int) -> None:
    """A long chunk leaves its rows as bfloat16; on other GPUs, and of a short one, the product rounds them itself."""
    config = llama_ext.LlamaConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=256,
    )
    ids = np.random.default_rng(head_dim).integers(0, 40, 150).astype(np.int32)
    found = []
    for capability in (HOPPER, AMPERE):
        model = _core.Model(backend_of(capability), core_config(config), {"": ("bfloat16", 0)})
        of_weights = np.random.default_rng(3)
        for slot, extents, is_matrix in model.slots():
            values = of_weights.standard_normal(extents) * 0.2 if is_matrix else np.ones(extents)
            model.load(slot, values.astype(np.float32), "float32")
        session = _core.Session(model, 256, "bfloat16")
        session.append(ids[:cached], "none")
        found.append(session.append(ids[cached:], "all"))
    assert_same_bits(*found)


def test_code_for_other_gpus_runs_on_hopper_without_its_instructions() -> None:
    """As where CUDA_FORCE_PTX_JIT=1 is set: Hopper's kernels are empty there, and none waits for the one before it."""
    script = """
    import numpy as np
    import llama_ext

    model = llama_ext.LlamaForCausalLM.from_pretrained("demo", device="cuda", dtype="bfloat16")
    long = model(np.arange(140).reshape(1, -1) % 50)  # products and attention of Hopper's instructions, if there are any
    tokens = model.generate("ROMEO:", max_new_tokens=12, do_sample=False, return_details=True).token_ids
    print(np.asarray(long).tobytes().hex(), tokens)
    """
    found = run_script(script, timeout=240, LLAMA_EXT_CUDA_EMULATION_CODE="80")
    assert found == run_script(script, timeout=240, LLAMA_EXT_CUDA_EMULATION_CAPABILITY="80")
