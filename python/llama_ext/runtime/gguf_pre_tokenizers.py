"""The ways of cutting text into words before byte-level BPE, by the names that GGUF files give them.

Each is a list of regular expressions, applied one after the other: what one matches, and what lies between its matches,
are pieces for the next one.

Source: the `tokenizer.json` of each model; llama.cpp, `llama-vocab.cpp`, for "default", which is its own.
"""

from __future__ import annotations

import dataclasses

__all__ = ["GPT2_PATTERN", "PRE_TOKENIZERS", "PreTokenizer", "find_pre_tokenizer"]


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """One way of cutting text.

    Args:
        name: Its name in new files.
        patterns: Regular expressions in the syntax of Oniguruma.
        ignore_merges: Whether a word that is in the vocabulary is a token whatever the merges say.
        adds_bos: Whether BOS is added when the file does not say.
        nfc: Whether text is brought to Unicode's form NFC first.
    """

    name: str
    patterns: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False
    nfc: bool = False


GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = (r"\p{N}", GPT2_PATTERN)

_ALL = (
    PreTokenizer("llama-bpe", (_LLAMA3,), ignore_merges=True, adds_bos=True),
    PreTokenizer("smaug-bpe", (_LLAMA3,)),
    PreTokenizer("gpt-2", (GPT2_PATTERN,)),
    PreTokenizer("smollm", _DIGITS),
    PreTokenizer("qwen2", (_QWEN2,), nfc=True),
    PreTokenizer("tekken", (_TEKKEN,), ignore_merges=True),
    PreTokenizer("deepseek-coder", (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
    PreTokenizer("default", (r"[\p{P}\$\+<=>\^~\|]+", GPT2_PATTERN, r"\p{N}+", r"[0-9][0-9][0-9]")),
)
_ALIASES = {
    "llama-v3": "llama-bpe",
    "llama3": "llama-bpe",
    "dbrx": "smaug-bpe",
    "starcoder": "smollm",
    "refact": "smollm",
    "command-r": "smollm",
    "deepseek-r1-qwen": "qwen2",
}
PRE_TOKENIZERS: dict[str, PreTokenizer] = {pre.name: pre for pre in _ALL}
PRE_TOKENIZERS.update({alias: PRE_TOKENIZERS[name] for alias, name in _ALIASES.items()})


def find_pre_tokenizer(patterns: tuple[str, ...], *, ignore_merges: bool, nfc: bool) -> PreTokenizer | None:
    """The way of cutting with these settings, to name it in a file; None when it has no name here.

    Args:
        patterns: As in `PreTokenizer`.
        ignore_merges: As in `PreTokenizer`.
        nfc: As in `PreTokenizer`.

    Returns:
        The first of the table that has them.
    """
    wanted = (patterns, ignore_merges, nfc)
    return next((pre for pre in _ALL if (pre.patterns, pre.ignore_merges, pre.nfc) == wanted), None)
