"""Patterns of attention, and the page and pictures of them."""

from __future__ import annotations

import base64
import functools
import html
import json
import re
import shutil
import subprocess
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import letter_models
import llama_ext
from llama_ext.interpret import attention_maps, pages
from llama_ext.interpret.attention_page import attention_page
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
    for wrong in ([], [2], [-1], [0, 0], [0.5], 0, "01", np.array(0)):
        with pytest.raises(llama_ext.OptionError, match="different numbers from 0 to 1"):
            llama_ext.interpret.attention(model(), TEXT, layers=wrong)  # type: ignore[arg-type]


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
        "\\u2028$x$",
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


def test_a_model_of_another_kind_is_refused() -> None:
    classifier = llama_ext.TextClassifier(letter_models.make(), ["a", "b"])
    for look in (llama_ext.interpret.attention, llama_ext.interpret.logit_lens):
        with pytest.raises(llama_ext.UnsupportedError, match="got TextClassifier"):
            look(classifier, TEXT)  # type: ignore[operator]


def test_a_picture_names_the_layers_that_there_are() -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    patterns = np.ones((2, 1, 1, 1), np.float32)
    some = llama_ext.interpret.AttentionMaps(patterns, ["a"], np.zeros(1, np.int32), [1, 3])
    with pytest.raises(llama_ext.OptionError, match="layer must be one of 1, 3, got 2"):
        some.plot(2)


def test_maps_are_equal_where_they_are_the_same() -> None:
    assert maps() == maps()
    assert nasty() != nasty()


def test_patterns_are_in_memory_once() -> None:
    small = letter_models.make(num_hidden_layers=16, max_position_embeddings=256)
    ids = np.zeros(256, np.int32)
    llama_ext.interpret.attention(small, ids[:2])
    tracemalloc.start()
    try:
        found = llama_ext.interpret.attention(small, ids)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.6 * found.patterns.nbytes  # and what one layer needs while it is computed


def test_what_cannot_be_printed_is_an_escape() -> None:
    text = "caf\u202e\u2066\x07\u200b"
    odd = llama_ext.interpret.AttentionMaps(np.ones((1, 1, 1, 1), np.float32), [text], np.zeros(1, np.int32), [0])
    page = Page(odd._page())
    escaped = "caf\\u202e\\u2066\\x07\\u200b"
    assert page.texts["title"] == page.texts["h1"] == [f"Attention: {escaped}"]
    assert data_of(odd._page())["tokens"] == [escaped]
    assert pages.visible("a\tb\n") == "a\\tb\\n"


@pytest.mark.parametrize(
    ("token", "seen"), [("I", "I"), (" I", "\u00b7I"), ("a b ", "a b\u00b7"), ("  ", "\u00b7\u00b7")]
)
def test_spaces_at_the_ends_of_a_token_are_seen(token: str, seen: str) -> None:
    assert pages.shown_text(token) == seen


def test_a_title_is_the_text_though_tokens_cut_its_characters() -> None:
    tokenizer = llama_ext.Tokenizer.train("abc" * 20, kind="bpe", vocab_size=260)
    ids = tokenizer.encode("caf\u00e9")
    assert pages.whole_text(tokenizer, ids).endswith("caf\u00e9")
    assert pages.label(pages.whole_text(None, [3, 14])) == "3 14"


# A browser's objects as far as the page asks for them; at the end, what was drawn.
BROWSER = """
const canvases = [], all = {};
let rectangles = 0;
function element(tag) {
  const made = { tag, style: {}, children: [], classList: { toggle() {} }, value: "0", setAttribute() {}, add() {},
    append(child) { made.children.push(child); }, replaceChildren() { made.children = []; },
    getContext: () => new Proxy({}, { get: (_, name) => (name === "fillRect" ? () => rectangles++ : () => {}), set: () => true }) };
  if (tag === "canvas") canvases.push(made);
  return made;
}
globalThis.document = { documentElement: {}, createElement: element, addEventListener() {},
  getElementById: (id) => (all[id] ||= element(id === "map" ? "canvas" : "div")) };
globalThis.window = { devicePixelRatio: DENSE };
globalThis.getComputedStyle = () => ({ getPropertyValue: () => "#123456" });
globalThis.matchMedia = () => ({ addEventListener() {} });
globalThis.Option = function () {};
globalThis.ImageData = class { constructor(w, h) { this.data = new Uint8ClampedArray(4 * w * h); } };
"""


@pytest.mark.parametrize(("count", "dense", "step"), [(5, 1, 1), (3000, 1, 1), (3000, 2, 1), (5000, 1.5, 2)])
def test_a_long_text_has_a_map_that_browsers_draw(tmp_path: Path, count: int, dense: float, step: int) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node, to run the page's script")
    patterns = np.broadcast_to(np.float32(0.5), (1, 1, count, count))
    text = attention_page(patterns, [0], ["a"] * count)
    script = text.split("<script>")[1].split("</script>")[0]
    says = "\nconsole.log(JSON.stringify([rectangles, Math.max(...canvases.map((c) => c.width)), all.blocks.textContent]));"
    (tmp_path / "page.js").write_text(BROWSER.replace("DENSE", str(dense)) + f"(() => {{{script}}})();" + says)
    run = subprocess.run([node, tmp_path / "page.js"], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    rectangles, widest, said = json.loads(run.stdout)
    assert rectangles == 0
    assert widest <= 4096
    assert said == ("" if step == 1 else f" Here a pixel of the large map is {step} by {step} cells.")


def test_a_text_of_the_page_has_several_lines() -> None:
    rule = re.search(r"#text \{([^}]*)\}", maps()._page())
    assert rule is not None
    assert "white-space: pre-wrap" in rule[1]
    assert "overflow-wrap: anywhere" in rule[1]
