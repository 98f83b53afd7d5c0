"""How good translations are: BLEU and chrF by sacreBLEU, and how many are exactly right."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from llama_ext.errors import OptionError, ShapeError, UnsupportedError

__all__ = ["TranslationReport"]


@dataclasses.dataclass(frozen=True)
class TranslationReport:
    """Scores of a set of translations; `str()` is a few lines with the signatures that make them comparable.

    Attributes:
        bleu: BLEU of the whole set, in [0, 100].
        bleu_signature: How sacreBLEU computed it: tokenisation, smoothing, version.
        chrf: chrF of the whole set, in [0, 100].
        chrf_signature: How sacreBLEU computed it.
        exact: The share of translations that are the reference, spaces at both ends apart.
        count: How many there are.
    """

    bleu: float
    bleu_signature: str
    chrf: float
    chrf_signature: str
    exact: float
    count: int

    @classmethod
    def from_texts(cls, translations: Sequence[str], references: Sequence[str], target: str) -> TranslationReport:
        """Scores translations.

        Args:
            translations: What is to be scored.
            references: The right translation of each.
            target: The language: BLEU splits Chinese into characters ("zh") and Japanese and Korean as well ("char"), other
                languages into words ("13a").

        Raises:
            ShapeError: There are not as many references as translations.
            OptionError: There is none.
            UnsupportedError: sacrebleu is not installed.
        """
        if len(translations) != len(references):
            raise ShapeError(f"there are {len(references)} references for {len(translations)} translations")
        if not translations:
            raise OptionError("there is nothing to evaluate: no pair was given")
        try:
            from sacrebleu.metrics.bleu import BLEU
            from sacrebleu.metrics.chrf import CHRF
        except ImportError as error:
            raise UnsupportedError("scores of translations need sacrebleu: pip install llama_ext[translate]") from error
        bleu = BLEU(tokenize=_tokenizer(target))
        chrf = CHRF()
        hypotheses, wanted = list(translations), [list(references)]
        exact = sum(a.strip() == b.strip() for a, b in zip(translations, references, strict=True))
        return cls(
            bleu=float(bleu.corpus_score(hypotheses, wanted).score),
            bleu_signature=str(bleu.get_signature()),
            chrf=float(chrf.corpus_score(hypotheses, wanted).score),
            chrf_signature=str(chrf.get_signature()),
            exact=exact / len(hypotheses),
            count=len(hypotheses),
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """The report as one line of JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)

    def __str__(self) -> str:
        return (
            f"BLEU   {self.bleu:6.2f}  {self.bleu_signature}\n"
            f"chrF   {self.chrf:6.2f}  {self.chrf_signature}\n"
            f"exact  {100 * self.exact:6.2f}  of {self.count} translations"
        )


def _tokenizer(target: str) -> str:
    word = target.strip().lower()
    if word in ("chinese", "zh", "中文", "汉语", "mandarin") or word.startswith(("zh-", "zh_", "chinese ")):
        return "zh"
    return "char" if word in ("japanese", "ja", "日本語", "korean", "ko") else "13a"
