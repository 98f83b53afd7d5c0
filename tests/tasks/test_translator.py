"""A translator learns pairs, scores itself by sacreBLEU, and keeps its prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_ext
from grammars import example
from llama_ext import LoRA, Translator
from llama_ext.errors import ContextLengthError, DTypeError, FormatError, OptionError, ShapeError
from llama_ext.tasks.translation_report import TranslationReport

GRAMMARS, SMALL = example("template_grammars"), example("small_model")
PAIRS: list[tuple[str, str]] = GRAMMARS.number_pairs(range(40))
SHORT = "{source}: {text}\n{target}:"


def base(**options: Any) -> llama_ext.LlamaForCausalLM:
    texts = [*(text for pair in PAIRS for text in pair), "Translate this from English to Chinese:\n"]
    model: llama_ext.LlamaForCausalLM = SMALL.small_model(texts, **{"width": 64, **options})
    return model


def test_the_prompt_is_as_documented() -> None:
    translator = Translator(base(), "English", "Chinese")
    assert translator.prompt_for("two  hundred\nand") == (
        "Translate this from English to Chinese:\nEnglish: two hundred and\nChinese:"
    )
    assert Translator(base(), "English", "Chinese", prompt=SHORT).prompt_for("a {target} b") == (
        "English: a {target} b\nChinese:"
    )


def test_only_the_translation_and_its_end_are_learned() -> None:
    translator = Translator(base(), "English", "Chinese", prompt=SHORT)
    tokenizer = translator.model.tokenizer
    assert tokenizer is not None
    (found,) = translator._examples("pairs", [("ten", "十")])
    learned = found.labels[found.labels != -100]
    assert tokenizer.decode(learned.tolist()).strip() == "十"
    assert learned[-1] == tokenizer.eos_token_id
    whole = tokenizer.encode("English: ten\nChinese: 十")
    assert [*found.tokens.tolist(), learned[-1]] == [*whole, tokenizer.eos_token_id], "encoded as one text"


def test_it_learns_pairs_by_heart_and_keeps_them(tmp_path: Path) -> None:
    model = base()
    translator = Translator(model, "English", "Chinese", prompt=SHORT)
    history = translator.fit(PAIRS, epochs=40, lr=5e-3, batch_size=8, seed=1, verbose=0)
    assert history.steps[-1].loss < 0.1
    report = translator.evaluate(PAIRS, num_beams=1)
    assert report.exact >= 0.95
    assert report.chrf >= 90, "BLEU wants four characters at a stretch, and these have one or two"
    texts = [text for text, _ in PAIRS[:12]]
    greedy = translator.translate(texts, num_beams=1)
    assert translator.translate(texts[0]) == translator.translate(texts[:1])[0]
    translator.save(tmp_path)
    again = Translator.load(tmp_path)
    assert (again.source, again.target, again.prompt) == ("English", "Chinese", SHORT)
    assert again.translate(texts, num_beams=1) == greedy


def test_an_adapter_translates_beside_the_base(tmp_path: Path) -> None:
    model = base()
    before = model(np.array([[4, 5, 6]]))
    translator = Translator(model, "English", "Chinese", prompt=SHORT)
    translator.fit(PAIRS[:8], adapter=LoRA(r=8), epochs=3, lr=1e-2, seed=1, verbose=0)
    assert np.array_equal(model(np.array([[4, 5, 6]]), adapter=[None]), before)
    found = translator.translate([text for text, _ in PAIRS[:4]], num_beams=2, max_new_tokens=8)
    translator.save(tmp_path)
    other = Translator.load(tmp_path, base=base())
    assert other.translate([text for text, _ in PAIRS[:4]], num_beams=2, max_new_tokens=8) == found
    # Another direction on the same base, in its own adapter.
    back = Translator(model, "Chinese", "English", prompt=SHORT)
    back.fit([(chinese, english) for english, chinese in PAIRS[:8]], adapter=LoRA(r=4), epochs=1, seed=1, verbose=0)
    assert list(model.adapters) == ["English-Chinese", "Chinese-English"]
    assert translator.translate([text for text, _ in PAIRS[:4]], num_beams=2, max_new_tokens=8) == found


def test_a_base_that_is_gone_is_told_with_the_file_that_names_it(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    translator = Translator(tmp_path / "base", "English", "Chinese", prompt=SHORT)
    translator.fit(PAIRS[:4], adapter=LoRA(r=2), epochs=1, verbose=0)
    translator.save(tmp_path / "adapter")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(FormatError, match=r"there is no such directory.*adapter_config\.json; base= \(--base"):
        Translator.load(tmp_path / "adapter")
    assert Translator.load(tmp_path / "adapter", base=tmp_path / "moved").prompt == SHORT


def test_scores_are_sacrebleu_s() -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    found = ["二百零五", "三月五日", "我不知道"]
    right = ["二百零五", "三月六日", "你知道吗"]
    report = TranslationReport.from_texts(found, right, "Chinese")
    assert report.bleu == pytest.approx(sacrebleu.corpus_bleu(found, [right], tokenize="zh").score)
    assert report.chrf == pytest.approx(sacrebleu.corpus_chrf(found, [right]).score)
    assert report.exact == pytest.approx(1 / 3)
    assert "tok:zh" in report.bleu_signature
    assert "version:" in report.chrf_signature
    assert json.loads(report.to_json())["count"] == 3
    assert "tok:13a" in TranslationReport.from_texts(["a b"], ["a b"], "English").bleu_signature
    with pytest.raises(ShapeError):
        TranslationReport.from_texts(["a"], [], "English")
    with pytest.raises(OptionError, match="nothing to evaluate"):
        TranslationReport.from_texts([], [], "English")


def test_arguments_are_checked(tmp_path: Path) -> None:
    translator = Translator(base(), "English", "Chinese", prompt=SHORT)
    for pairs in ([("a",)], [("a", 3)], ["ab"], "ab"):
        with pytest.raises(DTypeError):
            translator.fit(pairs)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="nothing to learn"):
        translator.fit([])
    with pytest.raises(ContextLengthError):
        translator.fit([("ten " * 30, "十")])
    with pytest.raises(DTypeError):
        translator.translate([3])  # type: ignore[list-item]
    for arguments in ({"source": ""}, {"target": 3}, {"prompt": "no text"}, {"prompt": "{text}{text}"}):
        with pytest.raises(OptionError):
            Translator(**{"base": base(), "source": "a", "target": "b", **arguments})  # type: ignore[arg-type]
    no_end = llama_ext.LlamaForCausalLM.from_pretrained("demo")
    with pytest.raises(OptionError, match="EOS"):
        Translator(no_end, "English", "Chinese")
    with pytest.raises(FormatError):
        Translator.load(tmp_path)
    (tmp_path / "translator.json").write_text('{"source": 3}')
    with pytest.raises(FormatError, match="source must be a string"):
        Translator.load(tmp_path)
