"""The logit lens against plain arithmetic; its last layer is the model, bit for bit."""

from __future__ import annotations

import functools
import html
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import letter_models
import llama_ext
from llama_ext.interpret import lens as lens_module
from llama_ext.interpret import logit_lens
from llama_ext.onnx.reference import weights_of_core
from self_contained import Page

TEXT = "jumps over the lazy"


@functools.cache
def model() -> letter_models.Model:
    return letter_models.make(tied=False, num_hidden_layers=3)


@functools.cache
def lens() -> llama_ext.interpret.LogitLens:
    return logit_lens(model(), TEXT)


def plain() -> Any:
    """Logits (L, T, V) in float64, of the states of the pass."""
    states = model().run_with_cache(TEXT)[1].stack("resid_post").astype(np.float64)
    weights = weights_of_core(model()._core)
    normed = states / np.sqrt((states**2).mean(-1, keepdims=True) + model().config.rms_norm_eps)
    return normed * weights("final_norm") @ weights("head").T


@pytest.mark.parametrize("length", [1, 2, 48])
@pytest.mark.parametrize(("tied", "dtype"), [(True, "float32"), (False, "bfloat16"), (True, "int8")])
def test_the_last_layer_says_what_the_model_says_bit_for_bit(length: int, tied: bool, dtype: str) -> None:
    small = letter_models.make(tied=tied, hidden_size=32, intermediate_size=64)
    own = llama_ext.LlamaForCausalLM(small.config, small.tokenizer, seed=1, dtype=dtype)
    ids = (np.arange(length) * 7 % own.config.vocab_size).tolist()
    found = logit_lens(own, ids)
    logits = own([ids])[0]
    assert found.logits(-1).tobytes() == found.logits(1).tobytes() == logits.tobytes()
    assert found.final.tolist() == logits.argmax(-1).tolist() == found.top_ids[-1, :, 0].tolist()
    assert not found.rank[-1].any()
    assert not found.kl[-1].any()


def test_figures_are_those_of_plain_arithmetic() -> None:
    logits = plain()
    logs = logits - logits.max(-1, keepdims=True)
    logs -= np.log(np.exp(logs).sum(-1, keepdims=True))
    shares = np.exp(logs)
    for layer in range(3):
        np.testing.assert_allclose(lens().logits(layer), logits[layer], atol=1e-5)
    np.testing.assert_allclose(lens().entropy, -(shares * logs).sum(-1), atol=1e-5)
    np.testing.assert_allclose(lens().kl, (shares[-1] * (logs[-1] - logs)).sum(-1), atol=1e-5)
    final = logits[-1].argmax(-1)
    assert lens().final.tolist() == final.tolist()
    own = np.take_along_axis(logits, np.broadcast_to(final[None, :, None], (3, len(final), 1)), 2)
    assert lens().rank.tolist() == (logits > own).sum(-1).tolist()
    assert lens().rank.max() > 0
    np.testing.assert_allclose(lens().top_probabilities, np.sort(shares, -1)[..., ::-1][..., :10], atol=1e-6)
    assert lens().top_ids.tolist() == np.argsort(-logits, axis=-1)[..., :10].tolist()


def test_rows_run_in_pieces_without_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lens_module, "_ROWS", 4)
    again = logit_lens(model(), TEXT)
    for name in ("rank", "entropy", "kl", "top_ids", "top_probabilities"):
        assert getattr(again, name).tobytes() == getattr(lens(), name).tobytes(), name


def test_among_equals_the_lowest_id_is_first() -> None:
    logits = np.array([[0, 2, 1, 2, 2, 1, 0], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 5]], np.float32)
    assert lens_module._largest(logits, 1)[:, 0].tolist() == [1, 0, 6]
    assert lens_module._largest(logits, 3)[0].tolist() == [1, 3, 4]
    assert lens_module._largest(logits, 7).tolist()[0] == [1, 3, 4, 2, 5, 0, 6]


def test_the_most_likely_tokens_come_with_their_texts() -> None:
    best = lens().top(3)
    assert (len(best), len(best[0]), len(best[0][0])) == (3, 19, 3)
    token, share = best[2][5][0]
    assert token == model().tokenizer.decode([int(lens().final[5])])
    assert share == lens().top_probabilities[2, 5, 0]
    for wrong in (0, 11, 1.5):
        with pytest.raises(llama_ext.OptionError, match=r"k must be a whole number in \[1, 10\]"):
            lens().top(wrong)  # type: ignore[arg-type]
    for wrong in (0, 1000):
        with pytest.raises(llama_ext.OptionError, match="k must be"):
            logit_lens(model(), TEXT, k=wrong)
    for layer in (3, -4, "0"):
        with pytest.raises(llama_ext.OptionError, match="layer must be"):
            lens().logits(layer)  # type: ignore[arg-type]


@pytest.mark.parametrize(("vocabulary", "kept"), [(1, 1), (2, 2), (9, 9), (10, 10), (12, 10)])
def test_a_small_vocabulary_is_kept_as_a_whole(vocabulary: int, kept: int) -> None:
    small = letter_models.make(hidden_size=16, vocab_size=vocabulary, eos_token_id=None)
    own = llama_ext.LlamaForCausalLM(small.config, small.tokenizer, seed=1)
    found = logit_lens(own, [0, 0, 0])
    assert found.top_ids.shape == (2, 3, kept)
    np.testing.assert_allclose(found.top_probabilities.sum(-1), 1, atol=1e-12 if kept == vocabulary else 1)
    assert len(found.top()[0][0]) == min(kept, 5)
    with pytest.raises(llama_ext.OptionError, match=rf"k must be a whole number in \[1, {vocabulary}\], got 20"):
        logit_lens(own, [0], k=20)


def test_it_is_read_as_a_table() -> None:
    lines = str(lens()).splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("Logit lens of 19 tokens, 3 layers")
    assert lines[0].endswith("at the last 6 positions")
    assert lines[1].split() == ["layer", "e", "\u00b7", "l", "a", "z", "y"]
    assert [line.split()[0] for line in lines[2:]] == ["0", "1", "2"]
    assert repr(lens()) == "LogitLens of 19 tokens ('jumps over the lazy'), 3 layers"
    assert "at the last" not in str(logit_lens(model(), [1, 2]))


def test_the_page_has_a_cell_for_each_layer_and_token(tmp_path: Path) -> None:
    lens().to_html(tmp_path / "lens.html")
    page = Page((tmp_path / "lens.html").read_text(encoding="utf-8"))
    assert page.count["td"] == 4 * 19
    assert page.texts["th"] == ["layer 2", "layer 1", "layer 0", "text"]
    assert len(page.titles) == 3 * 19
    assert f"KL from the last layer {lens().kl[0, 18]:.3f} nats" in page.titles[-1]
    assert html.escape("<iframe srcdoc=") not in lens()._repr_html_()
    assert lens()._repr_html_().startswith("<iframe srcdoc=")


def test_the_picture_has_every_layer() -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    figure = lens().plot()
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), lens().top_probabilities[:, :, 0])
    assert len(figure.axes[0].texts) == 3 * 19
    figure.canvas.draw()


def test_it_is_pickled_without_the_model() -> None:
    again = pickle.loads(pickle.dumps(lens()))
    assert again.kl.tobytes() == lens().kl.tobytes()
    assert str(again) == str(lens())
    assert again.top(2) == lens().top(2)
    assert again._page() == lens()._page()
    with pytest.raises(llama_ext.OptionError, match="needs the model"):
        again.logits(0)
    assert again != lens()
    assert lens() == lens()


def test_probabilities_are_taken_once_for_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    exp = np.exp
    monkeypatch.setattr(np, "exp", lambda values, *rest: (taken.append(values.size), exp(values, *rest))[1])
    logit_lens(model(), TEXT)
    assert sum(taken) == 3 * 19 * model().config.vocab_size
