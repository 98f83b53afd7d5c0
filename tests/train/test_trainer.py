"""The trainer of the core: gradients of whole models, and steps, on the reference and on every instruction set."""

from __future__ import annotations

import functools
import signal
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

import random_models
from devices import ISAS, REFERENCE, Device, each_isa, requires_cuda
from llama_ext import _core
from llama_ext.errors import (
    ContextLengthError,
    DTypeError,
    LlamaExtError,
    OptionError,
    ShapeError,
    TokenIdError,
    UnsupportedError,
)
from llama_ext.models import llama
from llama_ext.models.config import LlamaConfig
from shared_data import SHARED, requires_shared
from tolerances import assert_same_bits, relative_rms

Batch = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int64]]

ADAMW: dict[str, Any] = {"kind": "adamw", "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
on_cuda = pytest.param("cuda", marks=[pytest.mark.gpu, requires_cuda])
each_backend = pytest.mark.parametrize("isa", ["", *ISAS, on_cuda], ids=lambda isa: isa or "reference")


def backend(isa: str, threads: int = 2) -> _core.Backend:
    return (Device(isa, threads) if isa else REFERENCE).backend


def build(isa: str, threads: int = 2, **changes: Any) -> _core.Model:
    """A random model of awkward sizes, as training wants it."""
    model = random_models.build(backend(isa, threads), **{"layers": 2, "heads": 6, **changes})
    return model.converted({"": ("float32", 0)}, True)


def batch(lengths: list[int], seed: int = 0, vocabulary: int = 501) -> Batch:
    """Random sequences; about a third of the labels is ignored."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocabulary, sum(lengths)).astype(np.int32)
    labels = rng.integers(0, vocabulary, sum(lengths)).astype(np.int32)
    labels[rng.random(len(labels)) < 0.3] = -100
    return tokens, labels, np.array(lengths, np.int64)


def gradients(trainer: _core.Trainer) -> dict[str, npt.NDArray[np.float32]]:
    return {name: trainer.gradient(name) for name, _ in trainer.parameters()}


def run(trainer: _core.Trainer, data: Batch, scale: float = 1.0, seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    trainer.zero_gradients()
    trainer.accumulate(*data, scale=scale, seed=seed)
    return gradients(trainer)


# -- transformers and torch, in float64 ------------------------------------------------------------------------------


@functools.cache
def golden() -> dict[str, Any]:
    return load_file(SHARED / "golden" / "train-gqa-tied" / "golden.safetensors")


def golden_model(isa: str, threads: int = 2) -> tuple[_core.Model, dict[str, str]]:
    folder = SHARED / "golden" / "train-gqa-tied"
    config = LlamaConfig.from_pretrained(folder)
    model = _core.Model(backend(isa, threads), llama.core_config(config), {"": ("float32", 0)})
    weights = load_file(folder / "model.safetensors")
    names = {spec.slot: spec.name for spec in llama.tensor_specs(config)}
    for slot, name in names.items():
        model.load(slot, weights[name], "float32")
    return model.converted({"": ("float32", 0)}, True), names


def golden_batch(step: int) -> Batch:
    """Labels of transformers are those of the same position; the model predicts the next one's."""
    tokens = golden()["batches"][step][:, :-1]
    labels = golden()["labels"][step][:, 1:]
    lengths = np.full(len(tokens), tokens.shape[1], np.int64)
    return tokens.astype(np.int32).ravel(), labels.astype(np.int32).ravel(), lengths


@requires_shared
@each_backend
def test_loss_and_gradients_are_those_of_torch(isa: str) -> None:
    model, names = golden_model(isa)
    trainer = _core.Trainer(model, optimizer=ADAMW)
    tokens, labels, lengths = golden_batch(0)
    counted = int((labels != -100).sum())
    loss, found = trainer.accumulate(tokens, labels, lengths, scale=1 / counted)
    assert found == counted
    assert abs(loss / counted - golden()["losses"][0]) < 1e-6
    assert abs(trainer.gradient_norm() / golden()["grad_norms"][0] - 1) < 1e-5
    for slot, name in names.items():
        assert relative_rms(trainer.gradient(slot), golden()[f"grad.{name}"]) < 5e-6, name


@requires_shared
@each_backend
def test_ten_steps_of_adamw_are_those_of_torch(isa: str) -> None:
    model, names = golden_model(isa)
    trainer = _core.Trainer(model, optimizer={**ADAMW, "weight_decay": 0.1, "decay": "all"})
    for step in range(10):
        tokens, labels, lengths = golden_batch(step)
        counted = int((labels != -100).sum())
        loss, _ = trainer.accumulate(tokens, labels, lengths, scale=1 / counted)
        assert abs(loss / counted - golden()["losses"][step]) < 1e-5
        norm = trainer.gradient_norm()
        assert abs(norm / golden()["grad_norms"][step] - 1) < 1e-4
        trainer.step(lr=1e-3, gradient_scale=min(1.0, 1.0 / (norm + 1e-6)))
    assert trainer.steps == 10
    for slot, name in names.items():
        assert relative_rms(model.read(slot), golden()[f"final.{name}"]) < 1e-4, name


# -- the reference is the oracle for awkward sizes -------------------------------------------------------------------


@functools.cache
def reference_gradients(**options: Any) -> dict[str, npt.NDArray[np.float32]]:
    trainer = _core.Trainer(build("", kv_heads=2), optimizer=ADAMW, **options)
    return run(trainer, batch([37, 1, 64, 5]), scale=0.01, seed=3)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@each_isa
def test_gradients_match_the_reference(isa: str, dropout: float) -> None:
    options = {"dropout": dropout, "attention_dropout": dropout}
    trainer = _core.Trainer(build(isa, kv_heads=2), optimizer=ADAMW, **options)
    found = run(trainer, batch([37, 1, 64, 5]), scale=0.01, seed=3)
    for name, expected in reference_gradients(**options).items():
        if expected.any():
            assert relative_rms(found[name], expected) < 2e-5, name
        else:
            assert not found[name].any()


@pytest.mark.parametrize("threads", [1, 3])
@each_isa
def test_threads_change_no_bit(isa: str, threads: int) -> None:
    data = batch([300, 1, 64, 5, 200])
    expected = run(_core.Trainer(build(isa, 2), optimizer=ADAMW, dropout=0.1, attention_dropout=0.1), data, seed=1)
    found = run(_core.Trainer(build(isa, threads), optimizer=ADAMW, dropout=0.1, attention_dropout=0.1), data, seed=1)
    for name in expected:
        assert_same_bits(found[name], expected[name])


@each_isa
def test_twice_is_the_same_bits(isa: str) -> None:
    trainer = _core.Trainer(build(isa), optimizer=ADAMW, dropout=0.1)
    data = batch([50, 20])
    first = run(trainer, data, seed=7)
    for name, again in run(trainer, data, seed=7).items():
        assert_same_bits(again, first[name])
    other = run(trainer, data, seed=8)
    assert any(not np.array_equal(other[name], first[name]) for name in first)


@each_isa
def test_activations_computed_once_more_are_the_same_bits(isa: str) -> None:
    data = batch([80, 3, 40])
    options: dict[str, Any] = {"optimizer": ADAMW, "dropout": 0.1, "attention_dropout": 0.1}
    kept = _core.Trainer(build(isa), **options)
    recomputed = _core.Trainer(build(isa), checkpoint_activations=True, **options)
    expected = run(kept, data, seed=5)
    for name, found in run(recomputed, data, seed=5).items():
        assert_same_bits(found, expected[name])
    assert recomputed.nbytes < kept.nbytes


@each_isa
def test_its_memory_is_not_counted_while_a_pass_changes_it(isa: str) -> None:
    # Small enough to go in parts, which keep more between passes.
    trainer = _core.Trainer(build(isa), optimizer=ADAMW)
    data = batch([64] * 8)
    trained = threading.Event()

    def train() -> None:
        for _ in range(6):
            run(trainer, data)
        trained.set()

    thread = threading.Thread(target=train)
    thread.start()

    def is_refused() -> bool:
        try:
            return trainer.nbytes == 0
        except LlamaExtError:
            return True

    refused = 0
    while not trained.is_set():
        refused += is_refused()
    thread.join()
    assert refused > 0
    assert trainer.nbytes > 0


@each_backend
def test_evaluate_counts_the_labels_that_are_most_likely(isa: str) -> None:
    model = build(isa)
    tokens, _, lengths = batch([40, 23])
    logits = np.concatenate(model.logits(np.split(tokens, [40]), rows="all"))
    labels = logits.argmax(axis=1).astype(np.int32)
    labels[1::3] = (labels[1::3] + 1) % 501
    labels[2::6] = -100
    trainer = _core.Trainer(model, optimizer=ADAMW)
    trainer.accumulate(tokens, labels, lengths, scale=1.0)  # whose memory evaluate uses again
    loss, counted, correct = trainer.evaluate(tokens, labels, lengths)
    chosen = labels != -100
    assert counted == chosen.sum()
    assert correct == (logits.argmax(axis=1) == labels).sum()
    wide = logits[chosen].astype(np.float64)
    losses = np.log(np.exp(wide).sum(axis=1)) - wide[np.arange(len(wide)), labels[chosen]]
    assert loss == pytest.approx(losses.sum(), rel=1e-5)


@each_backend
def test_sequences_of_a_batch_do_not_see_each_other(isa: str) -> None:
    trainer = _core.Trainer(build(isa), optimizer=ADAMW)
    lengths = [9, 1, 33, 20]
    tokens, labels, _ = batch(lengths)
    together = run(trainer, (tokens, labels, np.array(lengths, np.int64)))
    trainer.zero_gradients()
    total = 0.0
    for begin, length in zip(np.cumsum([0, *lengths[:-1]]), lengths, strict=True):
        part = slice(begin, begin + length)
        total += trainer.accumulate(tokens[part], labels[part], np.array([length], np.int64), scale=1.0)[0]
    for name, found in gradients(trainer).items():
        if together[name].any():
            assert relative_rms(found, together[name]) < 1e-6, name
    assert total == pytest.approx(trainer.evaluate(tokens, labels, np.array(lengths, np.int64))[0], rel=1e-6)


# Enough sequences for parts that go through the layers by themselves: some of several sequences, one longer than the others.
PARTS = [64, 40, 30, 1, 70, 64, 64, 130, 5, 64, 64, 90, 63, 64, 2]


@each_backend
def test_a_pass_in_parts_is_the_sum_of_its_sequences(isa: str) -> None:
    trainer = _core.Trainer(build(isa, kv_heads=2), optimizer=ADAMW)
    tokens, labels, lengths = batch(PARTS)
    together = run(trainer, (tokens, labels, lengths))
    ends = np.cumsum(lengths)
    trainer.zero_gradients()
    total = 0.0
    for end, length in zip(ends, lengths, strict=True):
        part = slice(end - length, end)
        total += trainer.accumulate(tokens[part], labels[part], np.array([length]), scale=1.0)[0]
    for name, found in gradients(trainer).items():
        if together[name].any():
            assert relative_rms(found, together[name]) < 1e-6, name
    assert total == pytest.approx(trainer.evaluate(tokens, labels, lengths)[0], rel=1e-6)


@pytest.mark.parametrize("threads", [1, 3, 40])
@each_isa
def test_threads_change_no_bit_of_a_pass_in_parts(isa: str, threads: int) -> None:
    data = batch(PARTS)
    expected = run(_core.Trainer(build(isa, 2), optimizer=ADAMW), data)
    found = run(_core.Trainer(build(isa, threads), optimizer=ADAMW), data)
    for name in expected:
        assert_same_bits(found[name], expected[name])


@each_isa
def test_more_tokens_than_a_pass_takes_are_the_sum_of_its_passes(isa: str) -> None:
    trainer = _core.Trainer(build(isa), optimizer=ADAMW)
    lengths = [400, 17, 450, 450, 450, 450, 300, 61]
    tokens, labels, sizes = batch(lengths)
    whole = run(trainer, (tokens, labels, sizes))
    half = sum(lengths[:4])
    trainer.zero_gradients()
    trainer.accumulate(tokens[:half], labels[:half], sizes[:4], scale=1.0)
    trainer.accumulate(tokens[half:], labels[half:], sizes[4:], scale=1.0)
    for name, found in gradients(trainer).items():
        if whole[name].any():
            assert relative_rms(found, whole[name]) < 1e-6, name


@each_isa
def test_the_gradient_points_downhill_by_its_length(isa: str) -> None:
    """A difference quotient of the loss along the gradient, with dropout: the forward and the backward use the same masks."""
    model = build(isa, layers=1)
    trainer = _core.Trainer(model, optimizer={"kind": "sgd"}, dropout=0.2, attention_dropout=0.2)
    tokens, labels, lengths = batch([60, 40])
    trainer.zero_gradients()
    trainer.accumulate(tokens, labels, lengths, scale=1.0, seed=9)
    norm = trainer.gradient_norm()
    step = 1e-2 / norm**2  # changes the loss by about 0.01
    losses = []
    for lr in (step, -2 * step):  # down, then up on the other side
        trainer.zero_gradients()
        trainer.accumulate(tokens, labels, lengths, scale=1.0, seed=9)
        trainer.step(lr=lr)
        losses.append(trainer.accumulate(tokens, labels, lengths, scale=1.0, seed=9)[0])
    assert (losses[1] - losses[0]) / (2 * step * norm**2) == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("isa", [*ISAS, on_cuda])
def test_bfloat16_products_are_close(isa: str) -> None:
    data = batch([37, 1, 64, 5])
    exact = run(_core.Trainer(build(isa), optimizer=ADAMW), data)
    found = run(_core.Trainer(build(isa), optimizer=ADAMW, compute="bfloat16"), data)
    for name in exact:
        if exact[name].any():
            assert 1e-5 < relative_rms(found[name], exact[name]) < 3e-2, name


# -- what is trained -------------------------------------------------------------------------------------------------


@each_isa
def test_only_what_is_named_is_trained(isa: str) -> None:
    model = build(isa)
    whole = run(_core.Trainer(model, optimizer=ADAMW), batch([30]))
    names = ["layers.1.down", "final_norm", "layers.0.q", "layers.0.k", "layers.0.v"]
    trainer = _core.Trainer(model, optimizer=ADAMW, trainable=names)
    assert {name for name, _ in trainer.parameters()} == set(names)
    found = run(trainer, batch([30]))
    for name in names:
        assert_same_bits(found[name], whole[name])
    before = {name: model.read(name) for name, _, _ in model.slots()}
    trainer.step(lr=0.1)
    for name, _, _ in model.slots():
        assert np.array_equal(model.read(name), before[name]) == (name not in names), name


def test_weights_that_are_not_float32_are_refused() -> None:
    model = random_models.build(backend(ISAS[-1])).converted({"": ("bfloat16", 0)}, True)
    with pytest.raises(DTypeError, match=r"'embedding' is kept as bfloat16, and only float32 weights can be trained"):
        _core.Trainer(model, optimizer=ADAMW)


def test_a_model_whose_gate_and_up_are_one_matrix_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="gate and up must be separate matrices"):
        _core.Trainer(random_models.build(backend(ISAS[-1])), optimizer=ADAMW)


def test_tensors_of_one_matrix_are_trained_together() -> None:
    with pytest.raises(OptionError, match=r"'layers.0.q' shares its memory"):
        _core.Trainer(build(ISAS[-1]), optimizer=ADAMW, trainable=["layers.0.q"])
    with pytest.raises(OptionError, match="there is no slot 'nonsense'"):
        _core.Trainer(build(ISAS[-1]), optimizer=ADAMW, trainable=["nonsense"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": [1, 2, 501]}, TokenIdError, "501"),
        ({"labels": [1, 2, 501]}, TokenIdError, r"label 501 at index 2 must be in \[0, 501\)"),
        ({"labels": [1, 2, -1]}, TokenIdError, "label -1"),
        ({"lengths": [2]}, ShapeError, "the lengths sum to 2"),
        ({"lengths": [3, 0]}, ShapeError, "sequence 1 must have at least 1 token"),
        ({"tokens": [0] * 451, "labels": [0] * 451, "lengths": [451]}, ContextLengthError, "451"),
    ],
)
def test_bad_batches_are_typed_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"tokens": [1, 2, 3], "labels": [1, 2, 3], "lengths": [3], **change}
    trainer = _core.Trainer(build(ISAS[-1]), optimizer=ADAMW)
    with pytest.raises(error, match=message):
        trainer.accumulate(
            np.array(arguments["tokens"], np.int32),
            np.array(arguments["labels"], np.int32),
            np.array(arguments["lengths"], np.int64),
            scale=1.0,
        )


def test_no_labels_are_no_loss() -> None:
    trainer = _core.Trainer(build(ISAS[-1]), optimizer=ADAMW)
    tokens, _, lengths = batch([10, 3])
    assert trainer.accumulate(tokens, np.full(13, -100, np.int32), lengths, scale=1.0) == (0.0, 0)
    assert trainer.gradient_norm() == 0.0


# -- optimisers ------------------------------------------------------------------------------------------------------


def test_moments_can_be_moved_to_another_trainer() -> None:
    data = batch([30, 12])
    whole, part = build(ISAS[-1]), build(ISAS[-1])
    one = _core.Trainer(whole, optimizer={**ADAMW, "weight_decay": 0.1})
    for seed in range(4):
        run(one, data, seed=seed)
        one.step(lr=1e-2)
    two = _core.Trainer(part, optimizer={**ADAMW, "weight_decay": 0.1})
    for seed in range(2):
        run(two, data, seed=seed)
        two.step(lr=1e-2)
    model = build(ISAS[-1])
    three = _core.Trainer(model, optimizer={**ADAMW, "weight_decay": 0.1})
    for name, _ in two.parameters():
        model.load(name, part.read(name), "float32")
        for moment in two.moments():
            three.write_moment(moment, name, two.read_moment(moment, name))
    three.steps = two.steps
    for seed in range(2, 4):
        run(three, data, seed=seed)
        three.step(lr=1e-2)
    for name, _, _ in whole.slots():
        assert_same_bits(model.read(name), whole.read(name))


def newton_schulz(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    if x.shape[0] > x.shape[1]:
        return newton_schulz(x.T).T
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_steps_are_those_of_numpy(nesterov: bool) -> None:
    model = build(ISAS[-1])
    trainer = _core.Trainer(model, optimizer={"kind": "muon", "nesterov": nesterov, "weight_decay": 0.1})
    velocity: dict[str, npt.NDArray[np.float64]] = {}
    for step in range(3):
        before = {name: model.read(name).astype(np.float64) for name, _, _ in model.slots()}
        found = run(trainer, batch([40], seed=step))
        trainer.step(lr=0.02, gradient_scale=0.5)
        for name, shape in trainer.parameters():
            if not name.startswith("layers.") or len(shape) != 2:
                continue
            gradient = 0.5 * found[name].astype(np.float64)
            velocity[name] = 0.95 * velocity.get(name, 0.0) + gradient
            direction = gradient + 0.95 * velocity[name] if nesterov else velocity[name]
            update = 0.2 * max(shape) ** 0.5 * newton_schulz(direction)
            expected = (1 - 0.02 * 0.1) * before[name] - 0.02 * update
            assert relative_rms(model.read(name) - before[name], expected - before[name]) < 2e-3, name


def test_unknown_optimisers_and_options_are_refused() -> None:
    model = build(ISAS[-1])
    with pytest.raises(OptionError, match="kind must be adamw, adam, sgd or muon, got 'lion'"):
        _core.Trainer(model, optimizer={"kind": "lion"})
    with pytest.raises(OptionError, match="beta3"):
        _core.Trainer(model, optimizer={"kind": "adam", "beta3": 1})
    with pytest.raises(OptionError, match="dropout must be in"):
        _core.Trainer(model, optimizer=ADAMW, dropout=1.0)


# -- adapters --------------------------------------------------------------------------------------------------------

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


@each_isa
def test_adapted_logits_are_those_of_merged_weights(isa: str) -> None:
    model = build(isa)
    adapter = adapter_of(model, 3)
    merged = build(isa)
    for slot, _, scale in adapter.slots():
        addition = scale * adapter.read(slot, "B").astype(np.float64) @ adapter.read(slot, "A")
        merged.load(slot, (merged.read(slot) + addition).astype(np.float32), "float32")
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
    merged = build(isa)
    for slot, _, scale in adapter.slots():
        addition = scale * adapter.read(slot, "B").astype(np.float64) @ adapter.read(slot, "A")
        merged.load(slot, (merged.read(slot) + addition).astype(np.float32), "float32")
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


# -- classifiers -----------------------------------------------------------------------------------------------------


@each_isa
def test_a_classifier_learns_from_the_last_token_of_each_sequence(isa: str) -> None:
    model = build(isa, labels=3)
    trainer = _core.Trainer(model, optimizer=ADAMW)
    tokens, _, lengths = batch([5, 9, 1])
    labels = np.full(15, -100, np.int32)
    labels[[4, 13, 14]] = [2, 0, 1]
    for _ in range(30):
        trainer.zero_gradients()
        trainer.accumulate(tokens, labels, lengths, scale=1 / 3)
        trainer.step(lr=1e-2)
    loss, counted, correct = trainer.evaluate(tokens, labels, lengths)
    assert (counted, correct) == (3, 3)
    assert loss < 0.1
    pooled = model.logits(np.split(tokens, [5, 14]), rows="last")
    assert [int(row[0].argmax()) for row in pooled] == [2, 0, 1]
    with pytest.raises(TokenIdError, match=r"label 3 .* must be in \[0, 3\)"):
        trainer.evaluate(tokens[:1], np.array([3], np.int32), np.array([1], np.int64))


def test_a_classifier_does_not_generate() -> None:
    model = build(ISAS[-1], labels=3)
    with pytest.raises(UnsupportedError, match="a classifier of 3 labels"):
        model.score(batch([4])[0], 1)


# -- Ctrl-C ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("uncovered")
def test_ctrl_c_stops_at_once_and_the_next_result_is_unharmed() -> None:
    trainer = _core.Trainer(build(ISAS[-1], layers=8), optimizer=ADAMW)
    data = batch([400] * 12)
    small = batch([50])
    expected = run(trainer, small)
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    timer.start()

    def go_on() -> None:
        for _ in range(100):
            trainer.accumulate(*data, scale=1.0)

    with pytest.raises(KeyboardInterrupt):
        go_on()
    timer.join()
    for name, found in run(trainer, small).items():
        assert_same_bits(found, expected[name])
