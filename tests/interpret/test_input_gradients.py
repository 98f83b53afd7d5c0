"""Gradients of outputs with respect to embeddings: those of float64, of the trainer, and the same bits however they are asked for."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import finite_differences
import numpy_llama
import random_models
from devices import ISAS, each_isa
from llama_ext import LlamaConfig, _core
from llama_ext.errors import (
    ContextLengthError,
    DTypeError,
    NumericError,
    OptionError,
    ShapeError,
    TokenIdError,
    UnsupportedError,
)
from llama_ext.models import llama
from tolerances import assert_same_bits, relative_rms
from trainers import ADAMW, backend, build, each_backend, gradients

F64 = npt.NDArray[np.float64]

CONFIG = LlamaConfig(
    vocab_size=23,
    hidden_size=20,
    intermediate_size=30,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=16,
    rms_norm_eps=1e-5,
    attention_bias=True,
    tie_word_embeddings=False,
)


@functools.cache
def small(isa: str) -> tuple[_core.Model, dict[str, F64]]:
    """A model, and its weights by their Hugging Face names."""
    rng = np.random.default_rng(3)
    model = _core.Model(backend(isa), llama.core_config(CONFIG), {"": ("float32", 0)})
    weights = {}
    for spec in llama.tensor_specs(CONFIG):
        values = rng.standard_normal(spec.shape).astype(np.float32)
        values = 1 + values / 10 if spec.slot.endswith("norm") else values * np.float32(0.4)
        model.load(spec.slot, values, "float32")
        weights[spec.name] = values.astype(np.float64)
    return model.converted({"": ("float32", 0)}, True), weights


def ask(
    model: _core.Model,
    embeddings: npt.NDArray[np.float32],
    lengths: Sequence[int],
    terms: Sequence[tuple[int, int, float]],
    **options: Any,
) -> tuple[F64, Any]:
    """Terms: (row, output, weight)."""
    rows, outputs, weights = ([each[part] for each in terms] for part in range(3))
    return _core.input_gradients(
        model,
        embeddings,
        np.array(lengths, np.int64),
        np.array(rows, np.int64),
        np.array(outputs, np.int32),
        np.array(weights, np.float64),
        **options,
    )


def in_float64(
    weights: dict[str, F64], embeddings: F64, terms: Sequence[tuple[int, int, float]], logprobs: bool
) -> float:
    """The same sum, of one sequence."""
    config = {**CONFIG.to_dict(), "rope_theta": 10000.0}
    named = {**weights, "model.embed_tokens.weight": embeddings}
    logits = numpy_llama.logits(named, config, np.arange(len(embeddings)))
    if logprobs:
        logits = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return float(sum(weight * logits[row, output] for row, output, weight in terms))


TERMS = [(2, 5, 1.0), (6, 4, -0.5), (6, 21, 2.0), (7, 0, 1.5)]


@pytest.mark.parametrize("logprobs", [False, True], ids=["logit", "logprob"])
def test_gradients_are_those_of_finite_differences_in_float64(logprobs: bool) -> None:
    model, weights = small("")
    embeddings = np.random.default_rng(0).standard_normal((8, 20)).astype(np.float32)
    values, found = ask(model, embeddings, [8], TERMS, logprobs=logprobs)
    expected = finite_differences.gradient(
        lambda x: np.array([in_float64(weights, x, TERMS, logprobs)]), embeddings, np.ones(1)
    )
    assert relative_rms(found, expected) <= 1e-6
    total = float(values @ [weight for *_, weight in TERMS])
    assert total == pytest.approx(in_float64(weights, embeddings.astype(np.float64), TERMS, logprobs), rel=1e-6)


@pytest.mark.parametrize("logprobs", [False, True], ids=["logit", "logprob"])
@each_backend
def test_each_backend_gives_the_gradients_of_the_reference(isa: str, logprobs: bool) -> None:
    embeddings = np.random.default_rng(0).standard_normal((8, 20)).astype(np.float32)
    expected_values, expected = ask(small("")[0], embeddings, [8], TERMS, logprobs=logprobs)
    values, found = ask(small(isa)[0], embeddings, [8], TERMS, logprobs=logprobs)
    assert relative_rms(found, expected) <= 5e-6
    assert values == pytest.approx(expected_values, rel=1e-5)


@each_backend
def test_the_gradient_of_distinct_tokens_is_their_row_of_the_trainer(isa: str) -> None:
    model = build(isa)
    rng = np.random.default_rng(1)
    ids = rng.permutation(501)[:40].astype(np.int32)
    labels = rng.integers(0, 501, 40).astype(np.int32)
    labels[::3] = -100
    lengths = np.array([13, 27], np.int64)
    trainer = _core.Trainer(model, optimizer=ADAMW)
    loss, _ = trainer.accumulate(ids, labels, lengths, scale=1.0)
    terms = [(row, int(labels[row]), -1.0) for row in np.flatnonzero(labels != -100).tolist()]
    values, found = ask(model, _core.embed_tokens(model, ids), [13, 27], terms, logprobs=True)
    assert relative_rms(found, gradients(trainer)["embedding"][ids]) <= 1e-6
    assert -values.sum() == pytest.approx(loss, rel=1e-6)


def test_gradients_are_those_of_torch() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed, nor needed otherwise")
    model, weights = small("")
    # The model once more, by its formulas: autograd does the rest.
    x = torch.tensor(np.random.default_rng(0).standard_normal((6, 20)), dtype=torch.float64, requires_grad=True)
    w = {name: torch.tensor(each) for name, each in weights.items()}

    def norm(y: Any, name: str) -> Any:
        return y / torch.sqrt((y * y).mean(-1, keepdim=True) + CONFIG.rms_norm_eps) * w[name]

    def linear(y: Any, name: str) -> Any:
        bias = w.get(f"{name}.bias")
        return torch.nn.functional.linear(y, w[f"{name}.weight"], bias)

    angle = torch.arange(6, dtype=torch.float64)[:, None] / 10000.0 ** (torch.arange(0, 6, 2, dtype=torch.float64) / 6)
    cos, sin = (torch.cat([each, each], -1)[:, None] for each in (angle.cos(), angle.sin()))

    def rotate(y: Any) -> Any:
        return y * cos + torch.cat([-y[..., 3:], y[..., :3]], -1) * sin

    h = x
    for index in range(2):
        layer = f"model.layers.{index}"
        normed = norm(h, f"{layer}.input_layernorm.weight")
        q = rotate(linear(normed, f"{layer}.self_attn.q_proj").reshape(6, 4, 6))
        k = rotate(linear(normed, f"{layer}.self_attn.k_proj").reshape(6, 2, 6)).repeat_interleave(2, 1)
        v = linear(normed, f"{layer}.self_attn.v_proj").reshape(6, 2, 6).repeat_interleave(2, 1)
        mixed = torch.nn.functional.scaled_dot_product_attention(
            *(each.transpose(0, 1) for each in (q, k, v)), is_causal=True
        )
        h = h + linear(mixed.transpose(0, 1).reshape(6, 24), f"{layer}.self_attn.o_proj")
        normed = norm(h, f"{layer}.post_attention_layernorm.weight")
        gate, up = (linear(normed, f"{layer}.mlp.{name}_proj") for name in ("gate", "up"))
        h = h + linear(torch.nn.functional.silu(gate) * up, f"{layer}.mlp.down_proj")
    logprobs = torch.log_softmax(linear(norm(h, "model.norm.weight"), "lm_head"), -1)
    (logprobs[5, 7] - 2 * logprobs[1, 3]).backward()
    embeddings = x.detach().numpy().astype(np.float32)
    _, found = ask(model, embeddings, [6], [(1, 3, -2.0), (5, 7, 1.0)], logprobs=True)
    assert relative_rms(found, x.grad.numpy()) <= 1e-6


@each_isa
def test_batches_and_threads_change_no_bit(isa: str) -> None:
    lengths = [13, 1, 64, 5, 200]
    embeddings = np.random.default_rng(0).standard_normal((sum(lengths), 100)).astype(np.float32)
    terms: list[tuple[int, int, float]] = []
    ends = np.cumsum(lengths).tolist()
    for end in ends:
        terms += [(end - 1, 7, 1.0), (end - 1, 300, -0.25)]
    values, expected = ask(build(isa, 2), embeddings, lengths, terms, logprobs=True)
    for threads in (1, 3):
        again, found = ask(build(isa, threads), embeddings, lengths, terms, logprobs=True)
        assert_same_bits(found, expected)
        assert np.array_equal(again, values)
    for index, (length, end) in enumerate(zip(lengths, ends, strict=True)):
        own = [(length - 1, 7, 1.0), (length - 1, 300, -0.25)]
        alone, found = ask(build(isa, 2), embeddings[end - length : end].copy(), [length], own, logprobs=True)
        assert_same_bits(found, expected[end - length : end])
        assert np.array_equal(alone, values[2 * index : 2 * index + 2])


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_a_long_batch_is_cut_at_the_ends_of_sequences(data: st.DataObject) -> None:
    model, _ = small(ISAS[-1])
    lengths = data.draw(st.lists(st.integers(1, 16), min_size=200, max_size=300))
    asked = data.draw(st.sets(st.integers(0, len(lengths) - 1), min_size=1, max_size=6))
    embeddings = np.random.default_rng(0).standard_normal((sum(lengths), 20)).astype(np.float32)
    begins = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    terms = [(begins[index + 1] - 1, 3, 1.0) for index in sorted(asked)]
    values, found = ask(model, embeddings, lengths, terms)
    for place, index in enumerate(sorted(asked)):
        own = slice(begins[index], begins[index + 1])
        alone, expected = ask(model, embeddings[own].copy(), [lengths[index]], [(lengths[index] - 1, 3, 1.0)])
        assert values[place] == alone[0]
        assert_same_bits(found[own], expected)
        found[own] = 0
    assert not found.any(), "what no term asks for has a gradient"


def test_values_are_the_same_without_gradients() -> None:
    model, _ = small(ISAS[-1])
    embeddings = np.random.default_rng(0).standard_normal((8, 20)).astype(np.float32)
    for logprobs in (False, True):
        values, _ = ask(model, embeddings, [8], TERMS, logprobs=logprobs)
        alone, none = ask(model, embeddings, [8], TERMS, logprobs=logprobs, differentiate=False)
        assert none is None
        assert np.array_equal(alone, values)


@each_isa
def test_values_are_those_of_the_model(isa: str) -> None:
    model = build(isa)
    ids = random_models.tokens(20)
    logits = model.logits([ids])[0].astype(np.float64)
    values, _ = ask(model, _core.embed_tokens(model, ids), [20], [(4, 9, 1.0), (19, 500, 1.0)])
    assert values == pytest.approx([logits[4, 9], logits[19, 500]], abs=1e-5)


def test_adapters_count_and_stay_what_they_are() -> None:
    model = build(ISAS[-1])
    adapter = _core.Adapter(model, {"layers.0.q": (4, 2.0), "layers.1.down": (3, 0.5), "layers.1.gate": (2, 1.0)})
    rng = np.random.default_rng(0)
    for slot, _, _ in adapter.slots():
        for which in ("A", "B"):
            adapter.write(slot, which, rng.standard_normal(adapter.read(slot, which).shape).astype(np.float32) / 10)
    kept = {(slot, which): adapter.read(slot, which) for slot, _, _ in adapter.slots() for which in "AB"}
    merged = model.converted(model.types(), True)
    for slot, _, scale in adapter.slots():
        merged.load(slot, merged.read(slot) + np.float32(scale) * kept[slot, "B"] @ kept[slot, "A"], "float32")
    embeddings = _core.embed_tokens(model, random_models.tokens(12))
    terms = [(11, 5, 1.0)]
    values, found = ask(model, embeddings, [12], terms, adapter=adapter)
    expected_values, expected = ask(merged, embeddings, [12], terms)
    assert relative_rms(found, expected) <= 1e-5
    assert values == pytest.approx(expected_values, abs=1e-4)
    assert relative_rms(ask(model, embeddings, [12], terms)[1], expected) > 1e-3
    assert all(np.array_equal(adapter.read(*place), each) for place, each in kept.items())


@pytest.mark.parametrize(("dtype", "group"), [("int8", 32), ("int4", 32), ("bfloat16", 0), ("float16", 0)])
def test_weights_of_fewer_bits_count_as_the_numbers_they_are(dtype: str, group: int) -> None:
    model = random_models.build(backend(ISAS[-1]), dtype, group=group, layers=2).converted({"": (dtype, group)}, True)
    wide = model.converted({"": ("float32", 0)}, True)
    embeddings = _core.embed_tokens(model, random_models.tokens(12))
    assert_same_bits(embeddings, _core.embed_tokens(wide, random_models.tokens(12)))
    for logprobs in (False, True):
        values, found = ask(model, embeddings, [12], [(3, 8, -1.0), (11, 5, 1.0)], logprobs=logprobs)
        expected_values, expected = ask(wide, embeddings, [12], [(3, 8, -1.0), (11, 5, 1.0)], logprobs=logprobs)
        assert relative_rms(found, expected) <= 2e-5
        assert values == pytest.approx(expected_values, abs=1e-4)


def test_threads_share_a_model() -> None:
    model = build(ISAS[-1])
    embeddings = _core.embed_tokens(model, random_models.tokens(100))
    expected = ask(model, embeddings, [100], [(99, 5, 1.0)])[1]
    found: list[Any] = []

    def work() -> None:
        found.extend(ask(model, embeddings, [100], [(99, 5, 1.0)])[1] for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    assert all(np.array_equal(each, expected) for each in found)


def test_what_cannot_be_asked_is_told() -> None:
    model, _ = small(ISAS[-1])
    embeddings = np.zeros((8, 20), np.float32)
    for lengths, terms, kind, message in [
        ([7], [(0, 0, 1.0)], ShapeError, r"embeddings must have shape \(7, 20\)"),
        ([8, 0], [(0, 0, 1.0)], ShapeError, "sequence 1 must have at least 1 token, got 0"),
        ([17], [(0, 0, 1.0)], ContextLengthError, "17 tokens, the model's context is 16"),
        ([8], [(8, 0, 1.0)], ShapeError, "row 8 at index 0"),
        ([8], [(4, 0, 1.0), (3, 0, 1.0)], ShapeError, "row 3 at index 1"),
        ([8], [(-1, 0, 1.0)], ShapeError, "row -1 at index 0"),
        ([8], [(0, 23, 1.0)], TokenIdError, r"output 23 at index 0 must be in \[0, 23\)"),
        ([8], [(0, 0, float("inf"))], OptionError, "weights must be finite, and within float32, got inf"),
        ([8], [(0, 0, 1e300)], OptionError, "weights must be finite, and within float32, got 1e"),
    ]:
        with pytest.raises(kind, match=message):
            ask(model, embeddings, lengths, terms)  # type: ignore[arg-type]
    with pytest.raises(DTypeError, match="embeddings must be float32, got float64"):
        ask(model, embeddings.astype(np.float64), [8], [(0, 0, 1.0)])  # type: ignore[arg-type]
    with pytest.raises(NumericError, match="the output 0 of row 7 is nan"):
        ask(model, embeddings + np.float32(np.nan), [8], [(7, 0, 1.0)])
    fused = random_models.build(backend(ISAS[-1]))
    with pytest.raises(UnsupportedError, match="gate and up must be separate"):
        ask(fused, np.zeros((1, 100), np.float32), [1], [(0, 0, 1.0)])
    with pytest.raises(TokenIdError, match="token id 23"):
        _core.embed_tokens(model, np.array([23], np.int32))


def test_an_empty_question_has_an_empty_answer() -> None:
    model, _ = small(ISAS[-1])
    values, found = ask(model, np.zeros((0, 20), np.float32), [], [])
    assert values.shape == (0,)
    assert found.shape == (0, 20)
