"""Pages of HTML that are one file each, need no network, and can be read on dark and on light."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Sequence

from llama_ext.interpret.token_texts import characters
from llama_ext.io.atomic import atomic_write
from llama_ext.runtime.tokenizer import Tokenizer

__all__ = ["as_json", "in_notebook", "label", "page", "shown_text", "visible", "whole_text", "write_page"]

# A notebook that holds more than this is slow to open; and the height that fits most screens.
_NOTEBOOK_BYTES = 16 << 20
_NOTEBOOK_HEIGHT = 640

_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #16181d; --faint: #646b78; --line: #d5d9e0; --accent: #3b7de0; --mark: #b3541e; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14161a; --ink: #e9ebef; --faint: #9aa2b1; --line: #363b45; --accent: #3f86f0; --mark: #f0a36b; }
}
* { box-sizing: border-box; }
body { margin: 0; padding: 1rem 1.25rem 2rem; background: var(--ground); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.15rem; margin: 0 0 .25rem; }
p { margin: .25rem 0 .75rem; color: var(--faint); max-width: 70rem; }
code, .token { font-family: ui-monospace, monospace; white-space: pre; }
"""


def page(title: str, body: str, style: str = "", script: str = "") -> str:
    """A whole page.

    Args:
        title: Plain text.
        body: HTML.
        style, script: CSS and JavaScript of the page; nothing is loaded from elsewhere.
    """
    code = f"<script>\n{script}</script>\n" if script else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n"
        f"<body>\n<h1>{html.escape(title)}</h1>\n{body}\n{code}</body>\n</html>\n"
    )


def as_json(value: object) -> str:
    """JSON that may stand inside a script element, whatever texts are in it."""
    text = json.dumps(value, ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def visible(text: str) -> str:
    """A text on one line: characters that a browser would swallow or act on, white space but for the space among them, as escapes."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def shown_text(token: str) -> str:
    """A token as one line, with the spaces at its ends as dots: ' I' is another token than 'I'."""
    text = visible(token)
    inner = text.strip(" ")
    before = len(text) - len(text.lstrip(" "))
    return "\u00b7" * before + inner + "\u00b7" * (len(text) - before - len(inner))


def whole_text(tokenizer: Tokenizer | None, ids: Sequence[int]) -> str:
    """What the tokens say together: bytes of a character may be in several. Without a tokenizer, the ids."""
    return ("" if tokenizer else " ").join(text for text, _, _ in characters(tokenizer, ids))


def label(text: str | Sequence[str]) -> str:
    """The text of a page's title: the beginning of what was run.

    Args:
        text: As `whole_text` has it, or its parts.
    """
    line = " ".join("".join(text).split())
    return visible(line if len(line) <= 60 else line[:59] + "\u2026")


def write_page(path: str | os.PathLike[str], text: str) -> None:
    """Writes a page, whole or not at all.

    Raises:
        OSError: It cannot be written.
    """
    with atomic_write(path, follow_links=True) as file:
        file.write(text.encode("utf-8"))


def in_notebook(text: str) -> str:
    """A page inside another, which it cannot disturb."""
    if len(text) > _NOTEBOOK_BYTES:
        return (
            f"<p>{len(text) >> 20} MiB are too much for a notebook: write a file with to_html(path), and open that.</p>"
        )
    return (
        f'<iframe srcdoc="{html.escape(text, quote=True)}" sandbox="allow-scripts" title="llama_ext" '
        f'style="width: 100%; height: {_NOTEBOOK_HEIGHT}px; border: 0"></iframe>'
    )
