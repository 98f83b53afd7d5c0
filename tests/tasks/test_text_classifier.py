"""A text classifier learns a grammar, says so in its report, and goes into files and back."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import llama_ext
from grammars import example
from llama_ext import LoRA, TextClassifier
from llama_ext.errors import ContextLengthError, DTypeError, FormatError, OptionError, ShapeError, UnsupportedError

GRAMMARS, SMALL = example("template_grammars"), example("small_model")
TRAIN, TEST = GRAMMARS.sentiment("English")
LABELS = ["positive", "negative"]


def unzipped(pairs: list[tuple[str, str]]) -> tuple[list[str], list[str]]:
    return [text for text, _ in pairs], [label for _, label in pairs]


def base(**options: Any) -> llama_ext.LlamaForCausalLM:
    model: llama_ext.LlamaForCausalLM = SMALL.small_model(
        (text for text, _ in TRAIN + TEST), **{"width": 48, **options}
    )
    return model


def test_all_weights_learn_held_out_combinations(tmp_path: Path) -> None:
    classifier = TextClassifier(base(), LABELS)
    before = classifier.evaluate(*unzipped(TEST))
    history = classifier.fit(*unzipped(TRAIN), epochs=10, lr=3e-3, seed=1, validation_data=unzipped(TEST), verbose=0)
    report = classifier.evaluate(*unzipped(TEST))
    assert before.accuracy < 0.8
    assert report.accuracy >= 0.98
    assert report.loss is not None
    assert report.loss < 0.1
    assert history.validations[-1].accuracy == pytest.approx(report.accuracy)
    texts = unzipped(TEST)[0]
    probabilities = classifier.predict_proba(texts)
    assert np.abs(probabilities.sum(axis=1) - 1).max() <= 1e-6
    assert [LABELS[index] for index in probabilities.argmax(axis=1)] == classifier.predict(texts)
    classifier.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]
    again = TextClassifier.load(tmp_path)
    assert again.labels == LABELS
    assert np.array_equal(again.predict_proba(texts), probabilities)


def test_an_adapter_learns_and_leaves_the_base(tmp_path: Path) -> None:
    model = base()
    texts, labels = unzipped(TRAIN)
    model.compile(lr=2e-3, warmup=20)
    model.fit(texts, epochs=8, batch_size=16, verbose=0)
    classifier = TextClassifier(model, LABELS)
    kept = {slot: classifier.model._core.read(slot).copy() for slot, _, _ in classifier.model._core.slots()}
    classifier.fit(texts, labels, adapter=LoRA(r=16, alpha=32), epochs=15, lr=5e-3, seed=1, verbose=0)
    for slot, values in kept.items():
        assert np.array_equal(classifier.model._core.read(slot), values), slot
    report = classifier.evaluate(*unzipped(TEST))
    assert report.accuracy >= 0.95
    expected = classifier.predict_proba(texts[:20])
    classifier.save(tmp_path / "adapter")
    assert "base_model.model.score.weight" in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    again = TextClassifier.load(tmp_path / "adapter", base=model)
    assert again.labels == LABELS
    assert np.array_equal(again.predict_proba(texts[:20]), expected)
    with pytest.raises(OptionError, match="pass base="):
        TextClassifier.load(tmp_path / "adapter")
    classifier.save(tmp_path / "whole", merge=True)
    assert np.abs(TextClassifier.load(tmp_path / "whole").predict_proba(texts[:20]) - expected).max() <= 1e-4


def test_a_base_that_is_gone_is_told_with_the_file_that_names_it(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    classifier = TextClassifier(tmp_path / "base", LABELS)
    classifier.fit(*unzipped(TRAIN[:16]), adapter=LoRA(r=2), epochs=1, verbose=0)
    classifier.save(tmp_path / "adapter")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(FormatError) as caught:
        TextClassifier.load(tmp_path / "adapter")
    told = str(caught.value)
    assert told.startswith(f"{tmp_path / 'base'}: there is no such directory"), told
    assert f"named by {tmp_path / 'adapter' / 'adapter_config.json'}; base=" in told
    assert TextClassifier.load(tmp_path / "adapter", base=tmp_path / "moved").labels == LABELS
    with pytest.raises(FormatError) as caught:
        TextClassifier.load(tmp_path / "adapter", base=tmp_path / "base")
    assert "named by" not in str(caught.value), "the one who asks knows what was asked for"


def test_an_adapter_learns_on_a_quantised_base(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path)
    model = llama_ext.LlamaForCausalLM.from_pretrained(tmp_path, dtype="int8")
    classifier = TextClassifier(model, LABELS)
    texts, labels = unzipped(TRAIN)
    history = classifier.fit(texts, labels, adapter=LoRA(), epochs=3, lr=1e-2, seed=1, verbose=0)
    assert history.steps[-1].loss < 0.8 * history.steps[0].loss
    with pytest.raises(UnsupportedError, match="not merged into int8"):
        classifier.save(tmp_path / "out", merge=True)
    with pytest.raises(UnsupportedError, match="cannot be trained"):
        TextClassifier(model, LABELS).fit(texts, labels, verbose=0)


def test_the_same_seed_gives_the_same_classifier() -> None:
    def scores(seed: int) -> Any:
        classifier = TextClassifier(base(), LABELS)
        classifier.fit(*unzipped(TRAIN[:32]), epochs=1, seed=seed, verbose=0)
        return classifier.predict_proba(["the film was great"])

    assert np.array_equal(scores(1), scores(1))
    assert not np.array_equal(scores(1), scores(2))


@pytest.mark.parametrize(("adapter", "lr"), [(None, 5e-4), (LoRA(r=2), 1e-3)])
def test_a_wide_model_begins_with_a_lower_learning_rate_but_for_an_adapter(adapter: LoRA | None, lr: float) -> None:
    wide = base(width=384, layers=1)
    history = TextClassifier(wide, LABELS).fit(*unzipped(TRAIN[:32]), adapter=adapter, epochs=1, verbose=0)
    assert max(history.lr) == lr
    history = TextClassifier(wide, LABELS).fit(*unzipped(TRAIN[:32]), adapter=adapter, lr=2e-3, epochs=1, verbose=0)
    assert max(history.lr) == 2e-3


def test_an_untrained_head_is_told_once_and_a_trained_one_is_not(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    model = base()
    words = r"head \(labels positive, negative\) is still random, so its predictions mean nothing: train it with fit"
    for given in (model, tmp_path / "base"):
        classifier = TextClassifier(given, LABELS)
        classifier.evaluate(["great"], [0])  # of chance, without a word
        with pytest.warns(UserWarning, match=words) as caught:
            classifier.predict(["great"])
        assert [warning.filename for warning in caught] == [__file__]
        classifier.predict(["great"])  # warnings are errors here
        classifier.predict_proba(["great"])
    with pytest.warns(UserWarning, match=words):
        TextClassifier(model, LABELS).predict_proba(["great"])
    with pytest.warns(UserWarning, match=words):
        TextClassifier(llama_ext.LlamaForSequenceClassification.from_base(model, LABELS)).predict(["great"])

    whole = TextClassifier(model, LABELS)

    class Asks(llama_ext.training.Callback):
        def on_step_end(self, *_: Any) -> None:
            whole.predict(["great"])

    whole.fit(*unzipped(TRAIN[:16]), epochs=1, verbose=0, callbacks=[Asks()])
    whole.predict(["great"])
    whole.save(tmp_path / "whole")
    TextClassifier.load(tmp_path / "whole").predict(["great"])

    adapted = TextClassifier(model, LABELS)
    adapted.fit(*unzipped(TRAIN[:16]), adapter=LoRA(r=2), epochs=1, verbose=0)
    adapted.predict(["great"])
    adapted.save(tmp_path / "adapter")
    TextClassifier.load(tmp_path / "adapter", base=model).predict(["great"])
    adapted.save(tmp_path / "merged", merge=True)
    adapted.predict(["great"])


def test_two_classifiers_of_one_model_answer_with_their_own_adapters(tmp_path: Path) -> None:
    texts, labels = unzipped(TRAIN[:16])
    model = llama_ext.LlamaForSequenceClassification.from_base(base(), LABELS)
    first, second = TextClassifier(model), TextClassifier(model)
    first.adapter, second.adapter = "A", "B"
    first.fit(texts, labels, adapter=LoRA(r=4), epochs=1, lr=1e-2, verbose=0)
    expected, report = first.predict_proba(texts), first.evaluate(texts, labels)
    second.fit(texts, labels[::-1], adapter=LoRA(r=4), epochs=3, lr=1e-2, verbose=0)
    assert model.active_adapter == "B"
    assert np.array_equal(first.predict_proba(texts), expected)
    assert first.evaluate(texts, labels).loss == report.loss
    assert first.predict(texts) == [LABELS[index] for index in expected.argmax(axis=1)]
    assert not np.array_equal(second.predict_proba(texts), expected)
    # What is saved is what answers.
    first.save(tmp_path / "first")
    again = TextClassifier.load(tmp_path / "first", base=model)
    assert np.array_equal(again.predict_proba(texts), expected)
    # Another adapter that was never trained says nothing of this one's head.
    model.add_adapter("new", LoRA(r=1))
    fresh = TextClassifier(model)
    fresh.adapter = "A"
    fresh.predict(texts)


def test_an_adapter_of_another_name_answers_where_it_is_the_active_one() -> None:
    classifier = TextClassifier(base(), LABELS)
    classifier.adapter = "mine"
    classifier.fit(*unzipped(TRAIN[:16]), adapter=LoRA(r=2), epochs=1, lr=1e-2, verbose=0)
    other = TextClassifier(classifier.model)
    assert np.array_equal(other.predict_proba(["great"]), classifier.predict_proba(["great"]))


def test_a_forgotten_adapter_leaves_a_random_head() -> None:
    classifier = TextClassifier(base(), LABELS)
    classifier.fit(*unzipped(TRAIN[:16]), adapter=LoRA(r=2), epochs=1, verbose=0)
    classifier.model.delete_adapter(classifier.adapter)
    with pytest.warns(UserWarning, match="still random"):
        classifier.predict(["great"])


def test_a_fit_that_is_refused_leaves_the_classifier_as_it_was() -> None:
    classifier = TextClassifier(base(), LABELS)
    data = unzipped(TRAIN[:16])
    for settings, words in (
        ({"batch_size": 0}, "batch_size"),
        ({"seed": 1.5}, "seed"),
        ({"validate_every": 2}, "validation_data"),
        ({"context": 20}, "fit of a task has no 'context'"),
        ({"options": {"learning_rate": 1}}, "options: compile has no 'learning_rate', only attention_dropout, betas"),
    ):
        with pytest.raises(OptionError, match=words):
            classifier.fit(*data, adapter=LoRA(r=2), verbose=0, **settings)  # type: ignore[arg-type]
        with pytest.raises(OptionError, match=words):
            classifier.fit(*data, verbose=0, **settings)  # type: ignore[arg-type]
        assert not classifier.model.adapters
    classifier.fit(*data, adapter=LoRA(r=4), epochs=1, verbose=0)


def test_an_adapter_whose_training_failed_at_once_leaves_a_random_head() -> None:
    class Fails(llama_ext.training.Callback):
        def on_start(self, *_: Any) -> None:
            raise ValueError("no")

    classifier = TextClassifier(base(), LABELS)
    with pytest.raises(ValueError, match="no"):
        classifier.fit(*unzipped(TRAIN[:16]), adapter=LoRA(r=2), verbose=0, callbacks=[Fails()])
    with pytest.warns(UserWarning, match="still random"):
        classifier.predict(["great"])


def test_rare_labels_are_repeated() -> None:
    from llama_ext.tasks.labelled_texts import repeats

    classifier = TextClassifier(base(), LABELS)
    indices = [0] * 30 + [1] * 4
    balanced = Counter(indices[place] for place in repeats(indices, classifier._weights("balanced", indices), 0))
    assert balanced[0] == 30
    assert abs(balanced[1] - 30) <= 3
    weighted = Counter(indices[place] for place in repeats(indices, classifier._weights({"negative": 3}, indices), 0))
    assert weighted == {0: 30, 1: 12}
    halves = Counter(repeats([0] * 1000, classifier._weights({0: 0.5}, [0]), 0))
    assert 400 < len(halves) < 600
    assert repeats(indices, classifier._weights(None, indices), 0) == list(range(34))


def test_labels_may_be_names_or_indices() -> None:
    classifier = TextClassifier(base(), LABELS)
    assert classifier.evaluate(["great"], [0]).confusion.sum(axis=1).tolist() == [1, 0]
    assert classifier.evaluate(["great"], ["negative"]).confusion.sum(axis=1).tolist() == [0, 1]
    assert classifier.evaluate(["great"], np.array([1])).confusion.sum(axis=1).tolist() == [0, 1]


def test_arguments_are_checked(tmp_path: Path) -> None:
    classifier = TextClassifier(base(), LABELS)
    with pytest.raises(ShapeError, match="1 for 2 texts"):
        classifier.fit(["a", "b"], ["positive"])
    with pytest.raises(OptionError, match="'happy', which is no label"):
        classifier.fit(["a"], ["happy"])
    with pytest.raises(OptionError, match=r"labels\[0\] is 2"):
        classifier.evaluate(["a"], [2])
    with pytest.raises(OptionError, match=r"labels\[0\] is True"):
        classifier.evaluate(["a"], [True])
    with pytest.raises(OptionError, match="nothing to learn"):
        classifier.fit([], [])
    with pytest.raises(OptionError, match="nothing to evaluate"):
        classifier.evaluate([], [])
    with pytest.raises(ContextLengthError):
        classifier.fit(["great " * 40], [0])
    with pytest.raises(DTypeError):
        classifier.predict("great")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="balanced"):
        classifier.fit(["great"], [0], class_weights="even")
    with pytest.raises(OptionError, match="class_weights"):
        classifier.fit(["great"], [0], class_weights={"positive": 0})
    for weight in (None, [1], 1 + 2j, np.array([1.0, 2.0]), "2", True, 1001, float("nan")):
        with pytest.raises(OptionError, match=r"class_weights\['positive'\] must be a number > 0 and <= 1000, got "):
            classifier.fit(["great"], [0], class_weights={"positive": weight})  # type: ignore[dict-item]
    with pytest.raises(OptionError, match="class_weights: 'positive' and 0 are the same label: give it one weight"):
        classifier.fit(["great"], [0], class_weights={"positive": 2, 0: 3})
    with pytest.raises(OptionError, match=r"labels=\[\.\.\.\] are needed"):
        TextClassifier(base())
    with pytest.raises(OptionError, match="lr must be"):
        classifier.fit(["great"], [0], lr=-1)
    base().save_pretrained(tmp_path)
    with pytest.raises(OptionError, match=r"pass labels"):
        TextClassifier(tmp_path)
    with pytest.raises(FormatError):
        TextClassifier.load(tmp_path / "nowhere")
