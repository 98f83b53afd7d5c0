"""A change of a value does what the formulas say, and one that changes no bit does nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import letter_models
import llama_ext
from llama_ext.interpret import hook_names, run_with_hooks
from llama_ext.onnx.reference import weights_of_core

TEXT = "the lazy dog"
TOKENS = len(TEXT)
NAMES = hook_names(letter_models.make().config)


@functools.cache
def model() -> letter_models.Model:
    return letter_models.make(attention_bias=True, mlp_bias=True, tied=False)


@functools.cache
def untouched() -> Any:
    return model().run_with_cache(TEXT)[1]


def seen_after(hooks: Any, name: str) -> Any:
    """What a value is, with these hooks before it."""
    found: dict[str, Any] = {}

    def look(value: Any, of: str) -> None:
        found[of] = value

    run_with_hooks(model(), TEXT, {**hooks, (name,): look})
    return found[name]


def weight(slot: str) -> Any:
    return weights_of_core(model()._core)(slot)


def close(value: Any, expected: Any) -> None:
    np.testing.assert_allclose(value, expected, rtol=0, atol=4e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    "hook",
    [
        lambda value, name: None,
        lambda value, name: value,
        lambda value, name: value.copy(order="F"),
        lambda value, name: value.__imul__(np.float32(1)),
    ],
    ids=["none", "the same", "a copy", "times one"],
)
def test_hooks_that_change_no_bit_leave_the_logits_as_they_are(hook: Callable[..., Any]) -> None:
    logits = run_with_hooks(model(), TEXT, {lambda name: True: hook})
    assert logits.tobytes() == model()(untouched().token_ids[None])[0].tobytes()


@given(st.sampled_from(NAMES), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_a_change_shows_downstream_and_nowhere_upstream(name: str, seed: int) -> None:
    """Every value after the changed one follows; every one before it keeps its bits; and so do tokens before a changed one."""
    token = seed % TOKENS
    after: dict[str, Any] = {}

    def change(value: Any, of: str) -> None:
        if of.endswith(("attn_scores", "hook_pattern")):
            value[:, token, 0] += np.float32(0.5)
        else:
            value[token] += np.float32(0.5)

    def look(value: Any, of: str) -> None:
        after[of] = value

    logits = run_with_hooks(model(), TEXT, {name: change, lambda each: True: look})
    for each in NAMES[: NAMES.index(name)]:
        assert after[each].tobytes() == untouched()[each].tobytes(), each
    assert after[name].tobytes() != untouched()[name].tobytes()
    assert logits[:token].tobytes() == untouched().logits[:token].tobytes()
    if not (token == 0 and name.endswith(("attn_scores", "hook_q", "rot_q"))):  # which has one key to look at
        assert np.abs(logits[token:] - untouched().logits[token:]).max() > 0


def test_no_head_is_no_column_of_o() -> None:
    """Zeroes in z of a head, and zeroes in the columns of the o matrix that read it, are one and the same."""

    def ablate(value: Any, name: str) -> None:
        value[:, 2] = 0

    ablated = run_with_hooks(model(), TEXT, {"blocks.1.attn.hook_z": ablate})
    other = letter_models.make(attention_bias=True, mlp_bias=True, tied=False)
    o = np.array(other._core.read("layers.1.o"))
    o[:, 2 * 6 : 3 * 6] = 0
    other._core.load("layers.1.o", o, "float32")
    assert ablated.tobytes() == other([untouched().token_ids.tolist()])[0].tobytes()
    assert ablated.tobytes() != untouched().logits.tobytes()


@pytest.mark.parametrize("of", ["attn_scores", "pattern"])
def test_z_follows_scores_and_patterns_that_are_changed(of: str) -> None:
    rng = np.random.default_rng(4)
    noise = rng.standard_normal((4, TOKENS, TOKENS), np.float32)

    def change(value: Any, name: str) -> Any:
        return value + noise

    z = seen_after({f"blocks.1.attn.hook_{of}": change}, "blocks.1.attn.hook_z")
    value = (untouched()[of, 1] + noise).astype(np.float64)
    if of == "attn_scores":
        value = np.exp(value - value.max(-1, keepdims=True))
        value /= value.sum(-1, keepdims=True)
    v = np.repeat(untouched()["v", 1].astype(np.float64), 2, axis=1)
    close(z, np.einsum("hij,jhd->ihd", value, v))


def test_a_token_that_nobody_may_look_at_has_no_influence() -> None:
    def hide(value: Any, name: str) -> None:
        value[:, 4:, 3] = -np.inf

    hidden = {"blocks.*.attn.hook_attn_scores": hide}
    other = untouched().token_ids.copy()
    other[3] = (other[3] + 1) % model().config.vocab_size
    first = run_with_hooks(model(), TEXT, hidden)
    second = run_with_hooks(model(), other, hidden)
    assert first[4:].tobytes() == second[4:].tobytes()
    assert first[3].tobytes() != second[3].tobytes()


def test_a_row_of_scores_that_is_all_hidden_attends_to_nothing() -> None:
    def hide(value: Any, name: str) -> None:
        value[0, 5] = -np.inf

    hooks = {"blocks.0.attn.hook_attn_scores": hide}
    assert not seen_after(hooks, "blocks.0.attn.hook_pattern")[0, 5].any()
    assert not seen_after(hooks, "blocks.0.attn.hook_z")[5, 0].any()


@pytest.mark.parametrize(
    ("norm", "slot", "read"),
    [
        ("blocks.1.ln1", "layers.1.attention_norm", "q"),
        ("blocks.1.ln2", "layers.1.feed_forward_norm", "gate"),
        ("ln_final", "final_norm", "head"),
    ],
)
@pytest.mark.parametrize("of", ["hook_scale", "hook_normalized"])
def test_a_norm_that_is_changed_feeds_what_comes_next(norm: str, slot: str, read: str, of: str) -> None:
    def double(value: Any, name: str) -> Any:
        return value * np.float32(2)

    hooks = {f"{norm}.{of}": double}
    normed = (
        untouched()[f"{norm}.hook_normalized"].astype(np.float64) * (0.5 if of == "hook_scale" else 2) * weight(slot)
    )
    if read == "head":
        close(run_with_hooks(model(), TEXT, hooks), normed @ weight("head").T)
    elif read == "q":
        expected = normed @ weight("layers.1.q").T + weight("layers.1.q.bias")
        close(seen_after(hooks, "blocks.1.attn.hook_q").reshape(TOKENS, -1), expected)
    else:
        expected = normed @ weight("layers.1.gate").T + weight("layers.1.gate.bias")
        close(seen_after(hooks, "blocks.1.mlp.hook_pre"), expected)


@pytest.mark.parametrize(("out", "before", "after"), [("attn_out", "pre", "mid"), ("mlp_out", "mid", "post")])
def test_what_a_half_of_a_layer_adds_can_be_taken_away(out: str, before: str, after: str) -> None:
    hooks = {f"blocks.0.hook_{out}": lambda value, name: np.zeros_like(value)}
    kept = untouched()[f"blocks.0.hook_resid_{before}"]
    assert seen_after(hooks, f"blocks.0.hook_resid_{after}").tobytes() == kept.tobytes()


@pytest.mark.parametrize("name", ["blocks.0.hook_attn_out", "blocks.1.hook_mlp_out", "blocks.0.ln2.hook_normalized"])
def test_rows_that_a_hook_leaves_keep_their_bits_under_an_adapter(name: str) -> None:
    adapted = letter_models.make()
    adapted.add_adapter("a", llama_ext.LoRA(r=2))
    core = adapted._adapters["a"].core
    rng = np.random.default_rng(0)
    for slot, _, _ in core.slots():
        core.write(slot, "B", rng.standard_normal(core.read(slot, "B").shape, np.float32))

    def change(value: Any, of: str) -> None:
        value[7] += 1

    before, _ = adapted.run_with_cache(TEXT, "hook_embed")
    after = run_with_hooks(adapted, TEXT, {name: change})
    assert after[:7].tobytes() == before[:7].tobytes()
    assert np.abs(after[7:] - before[7:]).max() > 0


def test_hooks_of_one_name_are_called_in_order_each_with_what_the_last_one_left() -> None:
    calls: list[float] = []

    def first(value: Any, name: str) -> None:
        value[...] = 1

    def second(value: Any, name: str) -> Any:
        calls.append(float(value.min()))
        return value + np.float32(1)

    found = seen_after({"hook_embed": first, "hook_e*": second}, "blocks.0.hook_resid_pre")
    assert calls == [1.0]
    assert (found == 2).all()


def test_an_array_that_a_hook_keeps_stays_as_it_left_it() -> None:
    kept: list[Any] = []
    run_with_hooks(
        model(), TEXT, {"hook_embed": lambda value, name: kept.append(value), "hook_*": lambda value, name: value * 0}
    )
    assert kept[0].tobytes() == untouched()["hook_embed"].tobytes()


def _nan(value: Any, name: str) -> None:
    value[1, 2] = np.nan


def _huge(value: Any, name: str) -> None:
    value[1] = 1e25


def _infinite(value: Any, name: str) -> None:
    value[0, 0] = np.inf


@pytest.mark.parametrize(
    ("name", "hook", "error", "why"),
    [
        (
            "blocks.0.hook_resid_mid",
            lambda v, n: v[1:],
            "ShapeError",
            r"blocks.0.hook_resid_mid must return shape \(12, 24\)",
        ),
        ("blocks.0.attn.hook_z", lambda v, n: v.reshape(12, 24), "ShapeError", r"shape \(12, 4, 6\), got \(12, 24\)"),
        (
            "hook_embed",
            lambda v, n: v.astype(np.float64),
            "DTypeError",
            "hook of hook_embed must return float32, got float64",
        ),
        ("hook_embed", lambda v, n: 3.0, "DTypeError", "got float"),
        ("blocks.1.mlp.hook_post", _nan, "NumericError", r"blocks.1.mlp.hook_post left nan at \[1, 2\]"),
        ("blocks.1.hook_resid_pre", _huge, "NumericError", "so must the squares of what a norm reads"),
        ("blocks.1.attn.hook_attn_scores", _infinite, "NumericError", r"left inf at \[0, 0, 0\]"),
        ("blocks.1.attn.hook_pattern", lambda v, n: v - np.float32(np.inf), "NumericError", "left -inf"),
        ("blocks.9.hook_resid_mid", lambda v, n: None, "OptionError", "no such name"),
        ("hook_embed", "ablate", "OptionError", "must be a function"),
    ],
)
def test_what_a_hook_may_not_do_is_an_error_that_names_it(name: str, hook: Any, error: str, why: str) -> None:
    with pytest.raises(getattr(llama_ext, error), match=why):
        run_with_hooks(model(), TEXT, {name: hook})


def test_hooks_are_a_mapping() -> None:
    with pytest.raises(llama_ext.OptionError, match="mapping"):
        run_with_hooks(model(), TEXT, [("hook_embed", lambda value, name: None)])  # type: ignore[arg-type]


def test_an_error_of_a_hook_comes_out_as_it_is_and_the_model_goes_on() -> None:
    mine = RuntimeError("mine")

    def fail(value: Any, name: str) -> None:
        raise mine

    with pytest.raises(RuntimeError, match="mine") as caught:
        run_with_hooks(model(), TEXT, {"blocks.1.mlp.hook_post": fail})
    assert caught.value is mine
    assert (
        run_with_hooks(model(), TEXT, {"hook_embed": lambda value, name: None}).tobytes()
        == untouched().logits.tobytes()
    )


def test_ctrl_c_ends_a_pass() -> None:
    import signal

    def press(value: Any, name: str) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_with_hooks(model(), TEXT, {"blocks.0.hook_resid_mid": press})


def test_a_hook_may_run_the_model_itself() -> None:
    inner: list[Any] = []

    def run(value: Any, name: str) -> None:
        inner.append(model()([[1, 2, 3]]))

    logits = run_with_hooks(model(), TEXT, {"blocks.1.attn.hook_v": run})
    assert logits.tobytes() == untouched().logits.tobytes()
    assert inner[0].tobytes() == model()([[1, 2, 3]]).tobytes()
