"""What an attribution looks like: HTML that is well formed and escaped, figures, and text."""

from __future__ import annotations

import builtins
import dataclasses
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_ext
from llama_ext.errors import UnsupportedError
from llama_ext.interpret import Attribution, Target, attribute
from llama_ext.interpret.token_texts import pieces

TOKENIZER = llama_ext.Tokenizer.train("<script>alert('&\"$')</script>\n\x07 the cat " * 9, 300)


def made(text: str, scores: list[float] | None = None, **changes: Any) -> Attribution:
    ids = TOKENIZER.encode(text)
    values = np.linspace(-1, 2, len(ids)) if scores is None else np.array(scores)
    fields: dict[str, Any] = {
        "scores": values,
        "tokens": pieces(TOKENIZER, ids),
        "token_ids": ids,
        "target": Target("'<b>'", (3,), None, "logprob"),
        "value": -0.25,
        "baseline_value": -3.5,
        "convergence_delta": 0.002,
        "method": "integrated_gradients",
        "steps": 50,
        "baseline": np.zeros((len(ids), 4)),
        "_tokenizer": TOKENIZER,
    }
    return Attribution(**{**fields, **changes})


class Page(HTMLParser):
    """Elements that are open must be closed in order; collects the spans of the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.classes: list[str | None] = []
        self.names: list[str] = []
        self.spans: list[tuple[str, str]] = []  # title, text

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        title = dict(attrs).get("title")
        if title is not None:
            self.spans.append((title, ""))
        if tag != "meta":
            self.open.append(tag)
            self.classes.append(dict(attrs).get("class"))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.classes.pop()

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["span"] and self.spans and "text" in self.classes:
            self.spans[-1] = (self.spans[-1][0], self.spans[-1][1] + data)


def read(path: Path) -> tuple[str, Page]:
    text = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    return text, page


def test_html_is_one_well_formed_file_with_everything_escaped(tmp_path: Path) -> None:
    source = "<script>alert('&\"$')</script>\n\x07the 猫"
    attribution = made(source)
    attribution.to_html(tmp_path / "a.html")
    text, page = read(tmp_path / "a.html")
    assert text.startswith("<!doctype html>")
    assert "script" not in page.names
    assert not re.search(r"(src|href)=|url\(|@import", text), "it must need no other file"
    assert "color-scheme: light dark" in text
    assert "for the log probability of &#x27;&lt;b&gt;&#x27;" in text
    shown = "".join(seen for _, seen in page.spans)
    assert shown == source.replace("\n", "\u23ce\n").replace("\x07", "\\x07")
    # A character of several tokens is one span with their sum.
    title, _ = next(span for span in page.spans if span[1] == "猫")
    ids = attribution.token_ids[-3:]
    assert title == f"{attribution.scores[-3:].sum():+.4g} (tokens {', '.join(map(str, ids))})"
    assert re.sub("<div><b>.*?</b></div>", "", attribution._repr_html_(), count=1) in text  # where the page has a title


def test_text_has_the_colour_and_the_width_of_the_page() -> None:
    # A paragraph of a page is faint and narrow, and a notebook has no colour by that name.
    seen = made("the cat")._repr_html_()
    assert "<p" not in seen
    assert re.search(r'<div class="text" style="[^"]*color:var\(--ink,inherit\)', seen)


def test_every_character_that_is_not_printable_is_an_escape(tmp_path: Path) -> None:
    attribution = dataclasses.replace(made("the\tcat\r\n\u200b"), tokens=["the\t", "\r\n", "\u200b"])
    attribution = dataclasses.replace(attribution, scores=np.ones(3), _tokenizer=None, token_ids=[1, 2, 3])
    assert [line.split("  ")[-1] for line in str(attribution).splitlines()[3:]] == [
        r"'the\t'",
        "'\\r\u23ce'",
        r"'\u200b'",
    ]
    made("the\tcat\r\n\u200b").to_html(tmp_path / "a.html")
    assert "".join(seen for _, seen in read(tmp_path / "a.html")[1].spans) == "the\\tcat\\r\u23ce\n\\u200b"


def test_a_tab_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made("the\tcat").plot().savefig(tmp_path / "a.png")


def test_a_link_that_the_user_named_survives(tmp_path: Path) -> None:
    (tmp_path / "link.html").symlink_to("real.html")
    made("the").to_html(tmp_path / "link.html")
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "real.html").stat().st_size > 0


def test_colours_are_by_sign_and_size(tmp_path: Path) -> None:
    ids = len(TOKENIZER.encode("the"))
    attribution = made("the", [1.0] * ids)
    strong = re.findall(r"title=[^>]*background:rgba\((\d+),\d+,\d+,([\d.]+)\)", attribution._repr_html_())
    assert {alpha for _, alpha in strong} == {"0.600"}
    against = made("the", [-1.0] * ids)._repr_html_()
    assert {red for red, _ in strong} != set(re.findall(r"title=[^>]*background:rgba\((\d+)", against))
    nothing = made("the", [0.0] * ids)._repr_html_()
    assert set(re.findall(r"title=[^>]*rgba\(\d+,\d+,\d+,([\d.]+)\)", nothing)) == {"0.000"}


def test_a_warning_is_seen_wherever_the_scores_are() -> None:
    attribution = made("the cat", warning="the scores add up to <nothing>")
    assert "warning: the scores add up to <nothing>" in str(attribution)
    assert "warning: the scores add up to &lt;nothing&gt;" in attribution._repr_html_()


def test_text_shows_those_that_count_most_in_their_order() -> None:
    lines = str(made("the\x07cat\n")).splitlines()
    assert lines[0] == "integrated_gradients for the log probability of '<b>'"
    assert lines[1] == "value -0.2500, with the baseline alone -3.5000"
    assert "off by 0.20%, 50 steps" in lines[2]
    assert lines[3].split() == ["0", "-1.0000", "'the'"]
    assert "'\\x07'" in lines[4]
    assert lines[-1].split() == [str(len(lines) - 4), "+2.0000", "'\u23ce'"]
    long = made("the cat " * 60)
    count = len(long.scores)
    lines = str(long).splitlines()
    assert lines[-1] == f"and {count - 40} tokens that count less"
    listed = [int(line.split()[0]) for line in lines[3:-1]]
    assert listed == sorted(listed)
    assert set(listed) == set(np.argsort(-np.abs(long.scores))[:40].tolist())


def test_a_figure_has_a_bar_for_each_token(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    attribution = made("<the $cat$\n")
    figure = attribution.plot()
    figure.savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == attribution.scores.tolist()
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        f"'{token}'".replace("\n", "\u23ce").replace("$", r"\$") for token in attribution.tokens
    ]
    assert len({bar.get_facecolor() for bar in axes.patches}) == 2
    many = made("the cat " * 200).plot()
    assert len(many.axes[0].patches) == 80
    assert "the 80 of" in many.axes[0].get_title()


def test_drawing_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError("no matplotlib")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UnsupportedError, match=r"Attribution.plot needs .* pip install 'llama_ext\[plot\]'"):
        made("the cat").plot()


def test_a_real_one_is_shown(tmp_path: Path) -> None:
    model = llama_ext.LlamaForCausalLM.from_pretrained("demo")
    attribution = attribute(model, "<i>The dog & the 猫</i>")
    attribution.to_html(tmp_path / "a.html")
    _, page = read(tmp_path / "a.html")
    assert "".join(seen for _, seen in page.spans) == "<i>The dog & the 猫</i>"
    assert "i" not in page.names
