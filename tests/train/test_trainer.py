"""The trainer of the core: gradients of whole models, and steps, on the reference and on every instruction set."""

from __future__ import annotations

import functools
import signal
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import random_models
from devices import ISAS, each_isa
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
from tolerances import assert_same_bits, relative_rms
from trainers import ADAMW, backend, batch, build, each_backend, gradients, on_cuda, run


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
        for moment in two.moments(name):
            three.write_moment(moment, name, two.read_moment(moment, name))
    three.steps = two.steps
    for seed in range(2, 4):
        run(three, data, seed=seed)
        three.step(lr=1e-2)
    for name, _, _ in whole.slots():
        assert_same_bits(model.read(name), whole.read(name))


def test_unknown_optimisers_and_options_are_refused() -> None:
    model = build(ISAS[-1])
    with pytest.raises(OptionError, match="kind must be adamw, adam, sgd or muon, got 'lion'"):
        _core.Trainer(model, optimizer={"kind": "lion"})
    with pytest.raises(OptionError, match="beta3"):
        _core.Trainer(model, optimizer={"kind": "adam", "beta3": 1})
    with pytest.raises(OptionError, match="dropout must be in"):
        _core.Trainer(model, optimizer=ADAMW, dropout=1.0)


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
