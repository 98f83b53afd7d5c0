"""What a pass is seen to compute is what it computes: against float64, and without changing a bit of the result."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

import letter_models
import llama_ext
from devices import CUDA, each_isa, requires_cuda
from llama_ext import _core, interpret
from llama_ext.onnx.reference import Reference, weights_of_core
from random_models import CONFIG, build, tokens
from seen import KINDS, SITES, observed_logits, with_adapter

# What the probe of the reference calls the values that it has as well.
REFERENCE = {
    "hook_embed": "embedding",
    "attn.hook_q": "q",
    "attn.hook_k": "k",
    "attn.hook_v": "v",
    "attn.hook_rot_q": "q_rope",
    "attn.hook_rot_k": "k_rope",
    "attn.hook_z": "attention",
    "hook_attn_out": "o",
    "hook_resid_mid": "attention_residual",
    "mlp.hook_pre": "gate",
    "mlp.hook_pre_linear": "up",
    "mlp.hook_post": "swiglu",
    "hook_mlp_out": "down",
    "hook_resid_post": "feed_forward_residual",
}
TEXT = "the quick brown fox"


@functools.cache
def model() -> letter_models.Model:
    return letter_models.make(attention_bias=True, mlp_bias=True, tied=False)


def probed(of: letter_models.Model, ids: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def probe(name: str, _: int, value: Any) -> None:
        found[name] = np.array(value)

    Reference(of.config, weights_of_core(of._core)).logits([np.asarray(ids)], probe=probe)
    return found


def close(value: Any, expected: Any, name: str) -> None:
    # Float32 all the way: sums of at most 50 terms, two layers deep.
    scale = np.abs(expected[np.isfinite(expected)]).max()
    np.testing.assert_allclose(value, expected, rtol=0, atol=4e-6 * scale, err_msg=name)


def test_values_are_those_of_the_float64_reference() -> None:
    logits, cache = model().run_with_cache(TEXT)
    theirs = probed(model(), cache.token_ids)
    assert list(cache) == interpret.hook_names(model().config)
    assert logits is cache.logits
    close(logits, theirs["logits"], "logits")
    close(cache["hook_embed"], theirs["embedding"], "hook_embed")
    for layer in range(2):
        for ours, reference in REFERENCE.items():
            if ours != "hook_embed":
                name = f"blocks.{layer}.{ours}"
                close(cache[name], theirs[f"layers.{layer}.{reference}"].reshape(cache[name].shape), name)


def test_norms_scores_and_patterns_are_those_of_a_plain_computation() -> None:
    _, cache = model().run_with_cache(TEXT)
    theirs = probed(model(), cache.token_ids)
    config, count = model().config, len(cache.tokens)
    residual = theirs["embedding"]
    for layer in range(2):
        for norm, x in (("ln1", residual), ("ln2", theirs[f"layers.{layer}.attention_residual"])):
            scale = np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps)
            close(cache[f"blocks.{layer}.{norm}.hook_scale"], scale, norm)
            close(cache[f"blocks.{layer}.{norm}.hook_normalized"], x / scale, norm)
        q, k = theirs[f"layers.{layer}.q_rope"], np.repeat(theirs[f"layers.{layer}.k_rope"], 2, axis=1)
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(config.head_dim)
        scores[:, np.triu(np.ones((count, count), bool), 1)] = -np.inf
        close(cache["attn_scores", layer], scores, "scores")
        powers = np.exp(scores - scores.max(-1, keepdims=True))
        close(cache["pattern", layer], powers / powers.sum(-1, keepdims=True), "pattern")
        residual = theirs[f"layers.{layer}.feed_forward_residual"]
    scale = np.sqrt((residual * residual).mean(-1, keepdims=True) + config.rms_norm_eps)
    close(cache["ln_final.hook_scale"], scale, "ln_final")
    close(cache["ln_final.hook_normalized"] * np.array(model()._core.read("final_norm")), theirs["final_norm"], "final")


@pytest.mark.parametrize("kept", [[1], [1, 2, 3], list(range(40)) + [0] * 8], ids=["one", "three", "the whole context"])
def test_a_pattern_is_causal_and_its_rows_sum_to_one(kept: list[int]) -> None:
    ids = [each % model().config.vocab_size for each in kept]
    _, cache = model().run_with_cache(ids, "*hook_pattern")
    assert list(cache) == ["blocks.0.attn.hook_pattern", "blocks.1.attn.hook_pattern"]
    for pattern in cache.values():
        assert pattern.shape == (4, len(ids), len(ids))
        np.testing.assert_allclose(pattern.sum(-1), 1, atol=1e-6)
        assert not np.triu(pattern, 1).any()


@pytest.mark.parametrize(("dtype", "group", "compute", "changes"), KINDS, ids=lambda value: str(value))
@each_isa
def test_logits_of_a_pass_that_is_looked_at_have_the_same_bits(
    isa: str, dtype: str, group: int, compute: str, changes: dict[str, Any]
) -> None:
    core, apart, adapter = with_adapter(build(_core.Backend("cpu", 2, isa), dtype, compute, group, **changes))
    of_layers = [(site, layer) for site in SITES[1:-1] for layer in range(CONFIG["layers"])]
    places = [("embedding", 0), *of_layers, ("final_norm", 0)]
    for length in (1, 70):
        for case, chosen in ((core, None), (apart, None), (apart, adapter)):
            expected = case.logits([tokens(length)], [chosen] if chosen else [])[0].tobytes()
            assert expected == observed_logits(case, tokens(length), [], lambda *_: None, chosen).tobytes()
            seen: list[tuple[str, int]] = []

            def look(site: str, layer: int, _: Any, seen: list[tuple[str, int]] = seen) -> None:
                seen.append((site, layer))

            assert expected == observed_logits(case, tokens(length), places, look, chosen).tobytes()
            assert sorted(seen) == sorted(places)
            # Where a layer has nothing to show, or half of it, the rest is done as if nobody looked.
            for place in places:
                assert expected == observed_logits(case, tokens(length), [place], lambda *_: None, chosen).tobytes()


def test_a_place_that_there_is_not_is_refused() -> None:
    core = build(_core.Backend("cpu", 1), "float32", "auto", 0)
    for place in (("q", CONFIG["layers"]), ("q", -1), ("embedding", 1), ("final_norm", 1)):
        with pytest.raises(llama_ext.OptionError, match=f"{place[0]} is shown of layers 0 to"):
            observed_logits(core, tokens(3), [place], lambda *_: None)


@pytest.mark.gpu
@requires_cuda
@pytest.mark.parametrize("adapted", [False, True], ids=["joined gate and up", "an adapter"])
def test_values_of_a_gpu_are_those_of_the_cpu(adapted: bool) -> None:
    cpu, gpu = (
        letter_models.make(attention_bias=True, mlp_bias=True, tied=False, device=name) for name in ("cpu", "cuda")
    )
    if adapted:
        for each in (cpu, gpu):
            adapt(each)
    logits, ours = gpu.run_with_cache(TEXT)
    _, theirs = cpu.run_with_cache(TEXT)
    for name, value in theirs.items():
        close(ours[name], value, name)
    close(logits, theirs.logits, "logits")
    close(logits, gpu(theirs.token_ids[None])[0], "logits of a pass that nobody looks at")

    def ablate(value: Any, _: str) -> None:
        value[:, 1] = 0

    hooks = {"blocks.0.attn.hook_z": ablate, "blocks.1.attn.hook_q": ablate, "blocks.1.hook_mlp_out": ablate}
    hooks["blocks.1.attn.hook_pattern"] = hooks["blocks.0.ln2.hook_scale"] = lambda value, _: value * np.float32(2)
    changed = interpret.run_with_hooks(gpu, TEXT, hooks)
    close(changed, interpret.run_with_hooks(cpu, TEXT, hooks), "logits")
    assert np.abs(changed - logits).max() > 1e-3
    lens = interpret.logit_lens(gpu, TEXT)
    close(lens.logits(-1), logits, "the last layer")
    assert CUDA.backend.device == gpu.device


def adapt(of: letter_models.Model) -> None:
    """Gives a model an adapter that changes what it computes."""
    of.add_adapter("a", llama_ext.LoRA(r=2))
    core = of._adapters["a"].core
    for slot, _, _ in core.slots():
        core.write(slot, "B", np.full(core.read(slot, "B").shape, 0.1, np.float32))


def test_the_active_adapter_applies() -> None:
    adapted = letter_models.make()
    before, _ = adapted.run_with_cache(TEXT)
    adapt(adapted)
    logits, cache = adapted.run_with_cache(TEXT)
    assert logits.tobytes() == adapted(cache.token_ids[None])[0].tobytes() != before.tobytes()


def test_a_cache_is_a_mapping_with_short_names() -> None:
    _, cache = model().run_with_cache(TEXT)
    assert cache["z", 0] is cache["blocks.0.attn.hook_z"]
    assert cache["resid_post", -1] is cache["blocks.1.hook_resid_post"]
    assert cache["ln1.hook_scale", 1] is cache["blocks.1.ln1.hook_scale"]
    assert cache["pre", 1] is cache["blocks.1.mlp.hook_pre"]
    assert cache.stack("pattern").shape == (2, 4, 19, 19)
    assert "".join(cache.tokens) == TEXT
    assert len(cache) == len(list(cache)) == 2 * 20 + 3
    for wrong, why in ((("scale", 0), "two norms"), (("z", 7), "not kept"), (("zz", 0), "not kept")):
        with pytest.raises(KeyError, match=why):
            _ = cache[wrong]
    with pytest.raises(KeyError, match=r"'blocks.0.hook_z' was not kept; near: .*blocks.0.attn.hook_z"):
        _ = cache["blocks.0.hook_z"]
    assert ("z", 0) in cache
    assert "blocks.0.hook_z" not in cache
    assert cache.get("zz") is None
    assert "19 tokens, 43 values" in repr(cache)
    assert "hook_embed  19x24" in repr(cache)
    assert "more" in repr(cache)


def test_a_part_of_the_layer_may_be_named_as_in_transformer_lens() -> None:
    _, cache = model().run_with_cache(TEXT)
    assert cache["z", 0, "attn"] is cache["blocks.0.attn.hook_z"]
    assert cache["scale", -1, "ln2"] is cache["blocks.1.ln2.hook_scale"]
    assert cache["z", np.int64(1)] is cache["z", 1]
    with pytest.raises(KeyError, match="was not kept"):
        _ = cache["z", 0, "mlp"]


@pytest.mark.parametrize(
    "wrong", [("z", "0"), ("z",), (), (0, "z"), ("z", True), ("z", 0, 1), ("z", 0, "attn", 1), 5, None, ["z"]]
)
def test_what_is_no_name_is_a_key_error(wrong: Any) -> None:
    _, cache = model().run_with_cache(TEXT)
    with pytest.raises(KeyError, match="expected"):
        _ = cache[wrong]
    assert wrong not in cache


def test_caches_and_stacks_are_equal_where_they_are_the_same() -> None:
    _, cache = model().run_with_cache(TEXT)
    _, other = model().run_with_cache(TEXT)
    stack, again = cache.residual_stack(), cache.residual_stack()
    assert cache == cache and cache != other  # noqa: PT018
    assert stack == stack and stack != again  # noqa: PT018
    assert len({cache, other}) == len({stack, again}) == 2


def test_the_residual_stream_is_stacked() -> None:
    _, cache = model().run_with_cache(TEXT, "blocks.*.hook_resid_*")
    values, labels = cache.residual_stack()
    assert labels[0] == "blocks.0.hook_resid_pre"
    assert labels[-1] == "blocks.1.hook_resid_post"
    assert values.shape == (5, 19, 24)
    assert values[2].tobytes() == cache["blocks.1.hook_resid_pre"].tobytes()
    assert cache.residual_stack(middle=False).values.shape == (3, 19, 24)
    _, less = model().run_with_cache(TEXT, "blocks.*.hook_resid_pre")
    with pytest.raises(llama_ext.OptionError, match=r"'blocks\.0\.hook_resid_mid' was not kept"):
        less.residual_stack()


def test_a_cache_that_memory_does_not_hold_is_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "available_memory", lambda: 1000)
    with pytest.raises(
        llama_ext.OutOfMemoryError, match=r"43 values of 19 tokens take \d+ bytes, and 1000 are available"
    ):
        model().run_with_cache(TEXT)


@pytest.mark.parametrize(
    ("text", "error", "why"),
    [
        ("", llama_ext.OptionError, "empty"),
        ([], llama_ext.ShapeError, None),
        (["a", "b"], llama_ext.ShapeError, "one text"),
        ([[1], [2]], llama_ext.ShapeError, "one text"),
        ([1] * 49, llama_ext.ContextLengthError, "49 tokens, the model's context is 48"),
        ([1, 999], llama_ext.TokenIdError, None),
        (3.5, llama_ext.DTypeError, None),
    ],
)
def test_a_text_that_cannot_be_run_is_refused(text: Any, error: type[Exception], why: str | None) -> None:
    with pytest.raises(error, match=why):
        model().run_with_cache(text)


def test_a_classifier_is_refused() -> None:
    classifier = llama_ext.LlamaForSequenceClassification.from_base(letter_models.make(), ["a", "b"])
    with pytest.raises(llama_ext.UnsupportedError, match="LlamaForSequenceClassification"):
        interpret.run_with_hooks(classifier, TEXT, {"hook_embed": lambda value, name: None})  # type: ignore[arg-type]
