"""Tasks that one base model learns: text classification and translation."""

from __future__ import annotations

from llama_ext.tasks.classification_report import ClassificationReport
from llama_ext.tasks.text_classifier import TextClassifier
from llama_ext.tasks.translation_report import TranslationReport
from llama_ext.tasks.translator import Translator

__all__ = ["ClassificationReport", "TextClassifier", "TranslationReport", "Translator"]
