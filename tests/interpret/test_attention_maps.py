"""Patterns of attention, and the page and pictures of them."""

from __future__ import annotations

import base64
import functools
import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import letter_models
import llama_ext
from llama_ext.interpret import attention_maps
from self_contained import Page

TEXT = "the lazy dog. "
NASTY = ['</script><script>alert("1")</script>', "<b>&amp;", "\n", " ", "\u2028$x$", "\u4f60"]


@functools.cache
def model() -> letter_models.Model:
    return letter_models.make(tied=False)


@functools.cache
def maps() -> llama_ext.interpret.AttentionMaps:
    return llama_ext.interpret.attention(model(), TEXT)


def nasty() -> llama_ext.interpret.AttentionMaps:
    """Tokens that would end the script, or be markup."""
    patterns = np.tril(np.ones((1, 2, 6, 6), np.float32)) / np.arange(1, 7, dtype=np.float32)[:, None]
    return llama_ext.interpret.AttentionMaps(patterns, NASTY, np.arange(6, dtype=np.int32), [3])


def data_of(text: str) -> dict[str, Any]:
    found = re.search(r"const data = (\{.*?\});\n", text)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_patterns_are_those_of_the_pass() -> None:
    _, cache = model().run_with_cache(TEXT)
    assert maps().patterns.shape == (2, 4, 14, 14)
    assert maps().patterns.tobytes() == cache.stack("pattern").tobytes()
    assert "".join(maps().tokens) == TEXT
    np.testing.assert_allclose(maps().patterns.sum(-1), 1, atol=1e-6)
    assert repr(maps()) == "AttentionMaps of 14 tokens ('the lazy dog.'), 2 layers, 4 heads"


def test_layers_are_chosen_by_number() -> None:
    last = llama_ext.interpret.attention(model(), TEXT, layers=[1])
    assert last.layers == [1]
    assert last.patterns.tobytes() == maps().patterns[1:].tobytes()
    for wrong in ([], [2], [-1], [0, 0], [0.5]):
        with pytest.raises(llama_ext.OptionError, match="different numbers from 0 to 1"):
            llama_ext.interpret.attention(model(), TEXT, layers=wrong)


def test_the_page_holds_every_weight_and_loads_nothing(tmp_path: Path) -> None:
    maps().to_html(tmp_path / "map.html")
    text = (tmp_path / "map.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.count["canvas"] == 1
    assert page.texts["title"] == ["Attention: the lazy dog."]
    assert "prefers-color-scheme: dark" in text
    data = data_of(text)
    assert (data["layers"], data["heads"]) == ([0, 1], 4)
    shares = np.frombuffer(base64.b64decode(data["weights"]), "<u2").reshape(2, 4, -1) / 65535
    rows, columns = np.tril_indices(14)
    np.testing.assert_allclose(shares, maps().patterns[:, :, rows, columns], atol=0.5001 / 65535)


def test_tokens_cannot_leave_the_page() -> None:
    text = nasty()._page()
    page = Page(text)
    assert page.count["script"] == 1
    assert data_of(text)["tokens"] == [
        '</script><script>alert("1")</script>',
        "<b>&amp;",
        "\\n",
        "\u00b7",
        "\u2028$x$",
        "\u4f60",
    ]
    frame = nasty()._repr_html_()
    assert frame.startswith("<iframe srcdoc=")
    inner = re.search(r'srcdoc="([^"]*)"', frame)
    assert inner is not None
    assert html.unescape(inner[1]) == text


def test_a_page_that_no_browser_opens_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(attention_maps, "_PAGE_BYTES", 1 << 10)
    with pytest.raises(llama_ext.LimitError, match="choose layers"):
        maps().to_html(tmp_path / "map.html")
    assert not list(tmp_path.iterdir())


def test_pictures_show_what_was_asked_for() -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    whole = maps().plot()
    assert [axes.get_title() for axes in whole.axes] == [f"{layer}.{head}" for layer in (0, 1) for head in range(4)]
    assert [axes.get_title() for axes in maps().plot(layer=1).axes] == ["1.0", "1.1", "1.2", "1.3"]
    assert [axes.get_title() for axes in maps().plot(head=2).axes] == ["0.2", "1.2"]
    one = maps().plot(1, 3)
    np.testing.assert_array_equal(one.axes[0].images[0].get_array(), maps().patterns[1, 3])
    assert [label.get_text() for label in one.axes[0].get_xticklabels()][:4] == ["t", "h", "e", "\u00b7"]
    one.canvas.draw()  # no warning: warnings are errors here
    for wrong in ({"layer": 2}, {"head": 4}, {"head": -1}, {"layer": "0"}):
        with pytest.raises(llama_ext.OptionError, match="must be one of 0 to"):
            maps().plot(**wrong)  # type: ignore[arg-type]


def test_one_token_looks_at_itself() -> None:
    one = llama_ext.interpret.attention(model(), [3])
    assert (one.patterns == 1).all()
    Page(one._page())
