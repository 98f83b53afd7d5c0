"""A `Tokenizer` as the metadata of a GGUF file, in the kinds "llama" (SentencePiece's BPE) and "gpt2" (byte-level BPE).

SentencePiece's kind has scores where `tokenizers` has ranked merges. A piece's score is minus the rank of the first
merge that makes it, and it is checked that the merges follow from these scores again; so the file splits text as the
tokenizer does, or is not written. One difference remains: transformers 5 leaves a text that begins with a space alone,
where SentencePiece puts one more space in front, and a file of this kind means SentencePiece's way.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from llama_ext._options import shown
from llama_ext.errors import CheckpointError, UnsupportedError
from llama_ext.runtime import sentencepiece_model as spm
from llama_ext.runtime.gguf_pre_tokenizers import GPT2_PATTERN, find_pre_tokenizer
from llama_ext.runtime.gguf_tokenizer import BYTE_PIECE, KEY, TEMPLATE_KEY

if TYPE_CHECKING:
    from llama_ext.runtime.tokenizer import Tokenizer

__all__ = ["tokenizer_to_gguf"]


def tokenizer_to_gguf(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """The entries of a GGUF file that describe a tokenizer.

    Args:
        tokenizer: The tokenizer.
        vocab_size: V of the model; ids that the tokenizer leaves out become unused tokens "[PAD<id>]".

    Returns:
        The entries, for `write_gguf`.

    Raises:
        CheckpointError: The tokenizer has ids that the model has not.
        UnsupportedError: A tokenizer that GGUF has no kind for; the message names the part.
    """
    parts = json.loads(tokenizer.backend.to_str())
    model = parts["model"]
    if model.get("type") != "BPE":
        _refuse(f"a model of type {model.get('type')}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            _refuse(f"BPE with {name}")
    tokens, types = _vocabulary(tokenizer, vocab_size)
    merges = [(str(left), str(right)) for left, right in map(_pair, model["merges"])]
    if model.get("byte_fallback"):
        entries = _sentencepiece(tokenizer, parts, tokens, types, merges)
    else:
        entries = _byte_level(parts, tokens, types, merges)
    return {**entries, **_special(tokenizer), **_templates(tokenizer)}


def _refuse(what: str) -> NoReturn:
    raise UnsupportedError(
        f"this tokenizer cannot be written to a GGUF file: {what}. GGUF has SentencePiece's BPE and byte-level BPE."
    )


def _pair(merge: Any) -> Any:
    """Older files write "a b"."""
    return merge.split(" ", 1) if isinstance(merge, str) else merge


def _vocabulary(tokenizer: Tokenizer, vocab_size: int) -> tuple[list[str], list[int]]:
    by_id = {index: token for token, index in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    if max(by_id, default=-1) >= vocab_size:
        raise CheckpointError(
            f"the tokenizer has the id {max(by_id)}, the model has {vocab_size} tokens. Is it another model's?"
        )
    added = tokenizer.backend.get_added_tokens_decoder()
    tokens, types = [], []
    for index in range(vocab_size):
        token = by_id.get(index)
        tokens.append(f"[PAD{index}]" if token is None else token)
        if token is None:
            types.append(spm.UNUSED)
        elif index in added:
            for flag in ("lstrip", "rstrip", "single_word"):
                if getattr(added[index], flag):
                    _refuse(f"the added token {shown(token)} with {flag}")
            types.append(spm.CONTROL if added[index].special else spm.USER_DEFINED)
        else:
            types.append(spm.NORMAL)
    return tokens, types


def _sentencepiece(
    tokenizer: Tokenizer, parts: dict[str, Any], tokens: list[str], types: list[int], merges: list[tuple[str, str]]
) -> dict[str, Any]:
    unknown = parts["model"].get("unk_token") or tokenizer.unk_token or "<unk>"
    if unknown not in tokens:
        _refuse("there is no unknown token")
    types[tokens.index(unknown)] = spm.UNKNOWN
    for index, token in enumerate(tokens):
        if types[index] == spm.NORMAL and BYTE_PIECE.fullmatch(token):
            types[index] = spm.BYTE
    ranks = _ranks(merges)
    scores = np.array([-ranks.get(token, len(merges) + index) for index, token in enumerate(tokens)], np.float32)
    scores[[kind != spm.NORMAL for kind in types]] = 0.0
    model = spm.SentencePieceModel(pieces=tokens, scores=scores.tolist(), types=types, model_type=spm.BPE)
    again = spm.merges_of(model)
    # Among the merges that make one piece, the order is SentencePiece's own: from left to right in the text.
    same_order = [left + right for left, right in again] == [left + right for left, right in merges]
    if not same_order or set(again) != set(merges):
        _refuse("its merges are not those of a SentencePiece model")
    return {
        KEY + "model": "llama",
        KEY + "pre": "default",
        KEY + "tokens": tokens,
        KEY + "scores": scores,
        KEY + "token_type": np.array(types, np.int32),
        KEY + "add_space_prefix": _adds_space(parts),
    }


def _ranks(merges: list[tuple[str, str]]) -> dict[str, int]:
    """A rank for each piece that merges make. Pieces whose merges lie between each other's have the same one."""
    last = {left + right: rank for rank, (left, right) in enumerate(merges)}
    ranks: dict[str, int] = {}
    start = end = -1
    for rank, (left, right) in enumerate(merges):
        if rank > end:
            start = rank
        end = max(end, last[left + right])
        ranks[left + right] = start
    return ranks


def _steps(part: Any, name: str) -> list[dict[str, Any]]:
    """A normaliser or pre-tokenizer as a list of the plain ones in it."""
    if part is None:
        return []
    return [step for inner in part[name] for step in _steps(inner, name)] if part["type"] == "Sequence" else [part]


def _adds_space(parts: dict[str, Any]) -> bool:
    """Whether a text is given a space in front."""
    steps = _steps(parts["normalizer"], "normalizers")
    prefix = escaped = False
    for step in steps:
        if step == {"type": "Prepend", "prepend": spm.SPACE}:
            prefix = True
        elif step == {"type": "Replace", "pattern": {"String": " "}, "content": spm.SPACE}:
            escaped = True
        else:
            _refuse(f"a normaliser of type {step['type']}")
    for step in _steps(parts["pre_tokenizer"], "pretokenizers"):
        if step["type"] != "Metaspace" or step.get("split") is not False or step.get("replacement") != spm.SPACE:
            _refuse(f"a pre-tokenizer of type {step['type']} with SentencePiece's pieces")
        escaped, prefix = True, prefix or step.get("prepend_scheme") in ("first", "always")
    if not escaped:
        _refuse("byte fallback without SentencePiece's spaces")
    return prefix


def _byte_level(
    parts: dict[str, Any], tokens: list[str], types: list[int], merges: list[tuple[str, str]]
) -> dict[str, Any]:
    nfc = False
    for step in _steps(parts["normalizer"], "normalizers"):
        if step["type"] != "NFC":
            _refuse(f"a normaliser of type {step['type']}")
        nfc = True
    patterns = _patterns(_steps(parts["pre_tokenizer"], "pretokenizers"))
    pre = find_pre_tokenizer(patterns, ignore_merges=bool(parts["model"].get("ignore_merges")), nfc=nfc)
    if pre is None:
        _refuse("its way of cutting text into words has no name in GGUF")
    for pair in merges:
        if any(" " in token for token in pair):
            _refuse("a merge of tokens with spaces")
    return {
        KEY + "model": "gpt2",
        KEY + "pre": pre.name,
        KEY + "tokens": tokens,
        KEY + "token_type": np.array(types, np.int32),
        KEY + "merges": [f"{left} {right}" for left, right in merges],
    }


def _patterns(steps: list[dict[str, Any]]) -> tuple[str, ...]:
    patterns: list[str] = []
    bytes_last = False
    for step in steps:
        bytes_last = step["type"] == "ByteLevel"
        if (
            step["type"] == "Split"
            and step["behavior"] == "Isolated"
            and not step["invert"]
            and "Regex" in step["pattern"]
        ):
            patterns.append(step["pattern"]["Regex"])
        elif step["type"] == "Digits" and step["individual_digits"]:
            patterns.append(r"\p{N}")
        elif bytes_last and not step["add_prefix_space"]:
            patterns += [GPT2_PATTERN] if step.get("use_regex", True) else []
        else:
            _refuse(f"a pre-tokenizer of type {step['type']} with these settings")
    if not bytes_last:
        _refuse("tokens that are neither SentencePiece's pieces nor made of bytes")
    return tuple(patterns)


def _special(tokenizer: Tokenizer) -> dict[str, Any]:
    """The ids of named tokens, and which of them `encode` adds."""
    named = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    entries: dict[str, Any] = {f"{KEY}{name}_token_id": index for name, index in named.items() if index is not None}
    plain = tokenizer.encode("x", add_special_tokens=False)
    whole = tokenizer.encode("x")
    for bos in (False, True):
        for eos in (False, True):
            before = [tokenizer.bos_token_id] if bos else []
            after = [tokenizer.eos_token_id] if eos else []
            if whole == [*before, *plain, *after]:
                return {**entries, KEY + "add_bos_token": bos, KEY + "add_eos_token": eos}
    _refuse("it adds other tokens than BOS and EOS")


def _templates(tokenizer: Tokenizer) -> dict[str, Any]:
    templates = tokenizer.chat_template
    if templates is None or isinstance(templates, str):
        return {} if templates is None else {TEMPLATE_KEY: templates}
    entries: dict[str, Any] = {TEMPLATE_KEY: templates["default"]} if "default" in templates else {}
    others = {name: template for name, template in templates.items() if name != "default"}
    if others:
        entries[TEMPLATE_KEY + "s"] = list(others)
    return {**entries, **{f"{TEMPLATE_KEY}.{name}": template for name, template in others.items()}}
