"""Adapters: what they change, their gradients, and training them on frozen weights of any type."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from devices import ISAS, each_isa, requires_cuda
from llama_ext import _core
from llama_ext.errors import (
    OptionError,
    ShapeError,
)
from tolerances import assert_same_bits, relative_rms
from trainers import ADAMW, batch, build, each_backend, run

TARGETS = {f"layers.{i}.{name}": (4, 0.5) for i in range(2) for name in ("q", "k", "v", "o", "gate", "up", "down")}


def adapter_of(model: _core.Model, seed: int, b_is_zero: bool = False) -> _core.Adapter:
    adapter = _core.Adapter(model, TARGETS)
    rng = np.random.default_rng(seed)
    for slot, _, _ in adapter.slots():
        for which in ("A",) if b_is_zero else ("A", "B"):
            shape = adapter.read(slot, which).shape
            adapter.write(slot, which, rng.standard_normal(shape, np.float32) * np.float32(0.1))
    return adapter


@each_backend
def test_an_adapter_whose_b_is_zero_changes_no_bit(isa: str) -> None:
    model = build(isa)
    tokens = batch([20])[0]
    plain = model.logits([tokens])[0]
    adapted = model.logits([tokens], [adapter_of(model, 0, b_is_zero=True)])[0]
    np.testing.assert_allclose(adapted, plain, rtol=0, atol=0 if isa else 1e-5)


@each_isa
def test_rows_of_a_batch_have_adapters_of_their_own(isa: str) -> None:
    model = build(isa)
    one, two = adapter_of(model, 1), adapter_of(model, 2)
    sequences = [batch([length], seed=length)[0] for length in (12, 7, 30, 12)]
    adapters = [one, None, two, one]
    together = model.logits(sequences, adapters)
    for found, tokens, adapter in zip(together, sequences, adapters, strict=True):
        alone = model.logits([tokens], [adapter])[0]
        assert relative_rms(found, alone) < 2e-6
    assert relative_rms(together[0], model.logits([sequences[0]])[0]) > 1e-3


def merged_with(adapter: _core.Adapter, isa: str) -> _core.Model:
    """The base with the adapter's part added to its weights."""
    merged = build(isa)
    for slot, _, scale in adapter.slots():
        addition = scale * adapter.read(slot, "B").astype(np.float64) @ adapter.read(slot, "A")
        merged.load(slot, (merged.read(slot) + addition).astype(np.float32), "float32")
    return merged


@each_isa
def test_adapted_logits_are_those_of_merged_weights(isa: str) -> None:
    model = build(isa)
    adapter = adapter_of(model, 3)
    merged = merged_with(adapter, isa)
    tokens = batch([40])[0]
    assert relative_rms(model.logits([tokens], [adapter])[0], merged.logits([tokens])[0]) < 1e-5


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@each_isa
def test_adapter_gradients_match_the_reference(isa: str, dropout: float) -> None:
    data = batch([37, 5])

    def of(name: str) -> dict[str, npt.NDArray[np.float32]]:
        model = build(name)
        adapter = adapter_of(model, 4)
        trainer = _core.Trainer(model, optimizer=ADAMW, adapter=adapter, adapter_dropout=dropout, dropout=dropout)
        assert {slot for slot, _ in trainer.parameters()} == {f"{s}.lora_{m}" for s in TARGETS for m in "AB"}
        return run(trainer, data, scale=0.1, seed=2)

    expected = of("")
    for name, found in of(isa).items():
        assert relative_rms(found, expected[name]) < 2e-5, name


@each_isa
def test_the_adapters_gradient_is_that_of_the_weight_it_adds_to(isa: str) -> None:
    """d_B = scale d_W A^T and d_A = scale B^T d_W, with d_W the gradient of the merged weights."""
    model = build(isa)
    adapter = adapter_of(model, 5)
    merged = merged_with(adapter, isa)
    data = batch([50, 20])
    found = run(_core.Trainer(model, optimizer=ADAMW, adapter=adapter), data)
    whole = run(_core.Trainer(merged, optimizer=ADAMW), data)
    for slot, _, scale in adapter.slots():
        d_weight = whole[slot].astype(np.float64)
        assert relative_rms(found[f"{slot}.lora_B"], scale * d_weight @ adapter.read(slot, "A").T) < 1e-4
        assert relative_rms(found[f"{slot}.lora_A"], scale * adapter.read(slot, "B").T @ d_weight) < 1e-4


@pytest.mark.parametrize(
    "types", [{"": ("int8", 32)}, {"": ("int4", 32), "embedding": ("int8", 32)}, {"": ("bfloat16", 0)}]
)
@each_isa
def test_adapters_are_trained_on_frozen_weights_of_any_type(isa: str, types: dict[str, tuple[str, int]]) -> None:
    """The gradient is that of the numbers which the codes stand for."""
    frozen = build(isa, attention_bias=False, ffn_bias=False).converted(types, True)
    widened = frozen.converted({"": ("float32", 0)}, True)
    data = batch([30, 9])
    found = run(_core.Trainer(frozen, optimizer=ADAMW, adapter=adapter_of(frozen, 6)), data)
    expected = run(_core.Trainer(widened, optimizer=ADAMW, adapter=adapter_of(widened, 6)), data)
    for name in expected:
        assert relative_rms(found[name], expected[name]) < 2e-5, name


@pytest.mark.gpu
@requires_cuda
@pytest.mark.parametrize("types", [{"": ("int8", 32)}, {"": ("int4", 64)}, {"": ("int4_min", 32)}], ids=str)
@pytest.mark.parametrize(("compute", "limit"), [("float32", 2e-5), ("bfloat16", 3e-2)])
def test_a_gpu_trains_adapters_on_frozen_codes(types: dict[str, tuple[str, int]], compute: str, limit: float) -> None:
    """In float32 the gradient is that of the numbers which the codes stand for; with bfloat16 products as near as with float weights."""
    frozen = build("cuda", attention_bias=False, ffn_bias=False).converted(types, True)
    widened = frozen.converted({"": ("float32", 0)}, True)
    data = batch([70, 9])  # more rows than meet codes as they are
    trainer = _core.Trainer(frozen, optimizer=ADAMW, adapter=adapter_of(frozen, 6), compute=compute)
    found = run(trainer, data)
    expected = run(_core.Trainer(widened, optimizer=ADAMW, adapter=adapter_of(widened, 6)), data)
    for name in expected:
        assert relative_rms(found[name], expected[name]) < limit, name
    for name, again in run(trainer, data).items():
        assert_same_bits(again, found[name], name)


@each_isa
def test_bfloat16_training_on_frozen_codes_multiplies_them_in_float32_on_a_cpu(isa: str) -> None:
    """Attention and an adapter's own products are float32 there in either mode."""
    frozen = build(isa, attention_bias=False, ffn_bias=False).converted({"": ("int8", 32)}, True)
    data = batch([30, 9])
    found, expected = (
        run(_core.Trainer(frozen, optimizer=ADAMW, adapter=adapter_of(frozen, 6), compute=compute), data)
        for compute in ("bfloat16", "float32")
    )
    for name in expected:
        assert_same_bits(found[name], expected[name], name)


def test_an_adapter_of_another_model_is_refused() -> None:
    model = build(ISAS[-1])
    other = build(ISAS[-1], ffn_width=64)
    with pytest.raises(ShapeError, match="a model of other shapes"):
        model.logits([batch([3])[0]], [adapter_of(other, 0)])
    with pytest.raises(OptionError, match=r"'layers\.0\.norm' is no matrix of a block"):
        _core.Adapter(model, {"layers.0.norm": (4, 1.0)})
    with pytest.raises(OptionError, match=r"the rank of 'layers\.0\.q' must be in"):
        _core.Adapter(model, {"layers.0.q": (0, 1.0)})
