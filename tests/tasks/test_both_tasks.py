"""What holds for a classifier and a translator alike: where they compute, what is refused, and what they say of themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_ext
from devices import requires_cuda
from grammars import example
from llama_ext import LoRA, TextClassifier, Translator
from llama_ext.errors import CheckpointError, ContextLengthError, DeviceError, DTypeError, LlamaExtError, OptionError
from llama_ext.runtime import progress
from llama_ext.training import Callback

SMALL = example("small_model")
PAIRS = [("one", "一"), ("two", "二"), ("three", "三"), ("ten", "十")]
TEXTS = [text for text, _ in PAIRS]
LABELS = ["odd", "even", "odd", "even"]

Task = TextClassifier | Translator
Base = llama_ext.LlamaForCausalLM | Path


def model() -> llama_ext.LlamaForCausalLM:
    letters = [*(text for pair in PAIRS for text in pair), "Translate this from English to Chinese:\n"]
    made: llama_ext.LlamaForCausalLM = SMALL.small_model(letters, width=16)
    return made


def classifier(base: Base, **options: Any) -> TextClassifier:
    return TextClassifier(base, ["odd", "even"], **options)


def translator(base: Base, **options: Any) -> Translator:
    return Translator(base, "English", "Chinese", **options)


def learn(task: Task, **options: Any) -> Any:
    settings = {"epochs": 1, "seed": 1, "verbose": 0, **options}
    settings = {name: value for name, value in settings.items() if value is not None}
    if isinstance(task, TextClassifier):
        return task.fit(TEXTS, LABELS, **settings)
    return task.fit(PAIRS, **settings)


def answers(task: Task) -> Any:
    if isinstance(task, TextClassifier):
        return task.predict_proba(TEXTS)
    return task.translate(TEXTS[:2], num_beams=2, max_new_tokens=3)


MAKERS: list[Callable[..., Task]] = [classifier, translator]
each_task = pytest.mark.parametrize("make", MAKERS, ids=["classifier", "translator"])


# Where it computes.


@each_task
@pytest.mark.parametrize("device", ["cpu", "reference", pytest.param("cuda", marks=[pytest.mark.gpu, requires_cuda])])
def test_it_learns_and_answers_where_it_is_told_to(make: Callable[..., Task], device: str, tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "base")
    for adapter in (None, LoRA(r=2)):
        options: dict[str, Any] = {"device": device, "compute": "exact", "threads": 1}
        task = make(tmp_path / "base", **options)
        assert task.model.device.startswith(device)
        assert (task.model.compute, task.model.threads) == ("exact", 1)
        learn(task, adapter=adapter, epochs=2)
        task.save(tmp_path / f"saved-{adapter is None}")
        again = type(task).load(tmp_path / f"saved-{adapter is None}", **options)
        assert (again.model.device, again.model.compute) == (task.model.device, "exact")
        # The reference has another order of its sums, and a translation is either the same or another.
        if isinstance(task, TextClassifier):
            assert np.abs(answers(task) - answers(type(task).load(tmp_path / f"saved-{adapter is None}"))).max() < 1e-3
        assert np.array_equal(answers(again), answers(task))


@each_task
def test_a_base_that_is_loaded_keeps_its_device(make: Callable[..., Task], tmp_path: Path) -> None:
    base = model()
    base.save_pretrained(tmp_path)
    on_reference = llama_ext.LlamaForCausalLM.from_pretrained(tmp_path, device="reference", compute="exact")
    assert make(on_reference).model.device == "reference"
    assert make(on_reference, device="reference", compute="exact", dtype="float32").model.device == "reference"
    for name, value, found in (
        ("device", "reference", "'cpu'"),
        ("compute", "exact", "'auto'"),
        ("dtype", "int8", "'float32'"),
        ("threads", base.threads + 1, base.threads),
    ):
        words = f"{name}={value!r} is how a base is loaded, and this one is loaded already, with {name}={found}"
        with pytest.raises(OptionError, match=words):
            make(base, **{name: value})
    with pytest.raises(DeviceError, match="unknown device 'abacus'"):
        make(tmp_path, device="abacus")
    with pytest.raises(OptionError, match="threads must be"):
        make(tmp_path, threads=0)


# What is refused.


class Fails(Callback):
    def on_start(self, *_: Any) -> None:
        raise RuntimeError("refused at the last moment")


def state(task: Task) -> Any:
    core = task.model._core
    weights = {slot: core.read(slot).tobytes() for slot, _, _ in core.slots()}
    return dict(task.model.adapters), task.model.active_adapter, weights


@each_task
@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({}, OptionError, "training all weights changes what the adapter 'other' was made for: pass adapter="),
        ({"adapter": 3}, OptionError, "adapter must be a llama_ext.LoRA or None, got int"),
        ({"adapter": LoRA(r=2), "batch_size": 0}, OptionError, "batch_size must be"),
        ({"adapter": LoRA(r=2, targets=["no_proj"])}, OptionError, "no_proj"),
        ({"adapter": LoRA(r=2), "callbacks": [Fails()]}, RuntimeError, "at the last moment"),
        ({"adapter": LoRA(r=2), "epochs": 2, "max_steps": 2}, OptionError, "epochs=2 and max_steps=2 both say how"),
        ({"adapter": LoRA(r=2), "resume": "nowhere"}, LlamaExtError, "nowhere"),
    ],
    ids=lambda value: "-".join(value) or "whole" if isinstance(value, dict) else "",
)
def test_a_fit_that_is_refused_changes_nothing(
    make: Callable[..., Task], options: dict[str, Any], kind: type[Exception], words: str
) -> None:
    task = make(model())
    task.model.add_adapter("other", LoRA(r=1))
    before = state(task)
    assert before[1] == "other"
    with pytest.raises(kind, match=words):
        learn(task, **options)
    assert state(task) == before


@each_task
def test_a_whole_fit_that_is_refused_leaves_the_weights_as_they_are_kept(
    make: Callable[..., Task], tmp_path: Path
) -> None:
    model().save_pretrained(tmp_path / "base")
    learn(make(tmp_path / "base", dtype="bfloat16"), seed=2, checkpoint_dir=tmp_path / "other")
    task = make(tmp_path / "base", dtype="bfloat16")
    core = task.model._core
    nothing: Any = ([], []) if make is classifier else []
    for options, kind, words in (
        ({"validation_data": nothing}, OptionError, "validation_data is empty: give something to score, or None"),
        ({"checkpoint_dir": tmp_path / "other"}, OptionError, "has checkpoints already"),
        ({"checkpoint_dir": tmp_path / "other", "resume": True}, CheckpointError, r"fit\.seed was 2 and is 1"),
        ({"callbacks": [Fails()]}, RuntimeError, "at the last moment"),
    ):
        with pytest.raises(kind, match=words):
            learn(task, **options)
        assert task.model._core is core
        assert task.model.dtype == "bfloat16"
    learn(task)
    assert task.model.dtype == "float32"


@each_task
def test_options_that_are_none_or_contradict_an_argument_are_refused(make: Callable[..., Task]) -> None:
    task = make(model())
    for given in (5, ["lr"], "lr"):
        with pytest.raises(OptionError, match=r"options must be a mapping of options of compile, as .*, got"):
            learn(task, options=given)
    with pytest.raises(
        OptionError, match=r"lr=0\.1 and options=\{'lr': 0\.2\} both say the learning rate: give one of them"
    ):
        learn(task, lr=0.1, options={"lr": 0.2})
    assert max(learn(task, options={"lr": 0.25, "warmup": 0}).lr) == 0.25


@each_task
def test_an_adapter_with_other_settings_is_refused_with_the_way_out(make: Callable[..., Task]) -> None:
    task = make(model())
    learn(task, adapter=LoRA(r=2))
    learn(task, adapter=LoRA(r=2))  # the same is gone on with
    before = state(task)
    words = (
        rf"there is an adapter '{task.adapter}' with other settings already: leave adapter out to go on with it, or forget it "
        rf"first with model\.delete_adapter\('{task.adapter}'\)"
    )
    with pytest.raises(OptionError, match=words):
        learn(task, adapter=LoRA(r=3))
    assert state(task) == before
    task.model.delete_adapter(task.adapter)
    learn(task, adapter=LoRA(r=3))
    assert task.model.adapters[task.adapter].r == 3


@each_task
def test_how_long_a_run_is_is_said_once(make: Callable[..., Task]) -> None:
    # A batch has all examples, so a step is an epoch.
    assert len(learn(make(model()), epochs=None).steps) == 3
    assert len(learn(make(model()), epochs=2).steps) == 2
    assert len(learn(make(model()), epochs=None, max_steps=5).steps) == 5
    with pytest.raises(OptionError, match="epochs=2 and max_steps=5 both say how long the run is: give one of them"):
        learn(make(model()), epochs=2, max_steps=5)
    with pytest.raises(OptionError, match="epochs=2 and max_steps=5"):
        model().fit(PAIRS, epochs=2, max_steps=5)


def test_what_are_no_texts_is_told_by_the_name_of_the_argument() -> None:
    one, other = classifier(model()), translator(model())
    wrong: list[tuple[Callable[..., Any], tuple[Any, ...], str]] = [
        (one.fit, (None, None), "texts must be a list of texts, got NoneType"),
        (one.fit, ("one", ["odd"]), "texts must be a list of texts, got str"),
        (one.evaluate, (None, None), "texts must be a list of texts, got NoneType"),
        (one.predict, (None,), "texts must be a list of texts, got NoneType"),
        (one.predict_proba, (3,), "texts must be a list of texts, got int"),
        (other.fit, (None,), r"pairs must be a list of \(text, translation\), got NoneType"),
        (other.evaluate, (None,), r"pairs must be a list of \(text, translation\), got NoneType"),
        (other.translate, (None,), "texts must be a text or a list of texts, got NoneType"),
        (other.translate, (b"one",), "texts must be a text or a list of texts, got bytes"),
        (other.translate, ([None],), "a text to translate must be a str, got NoneType"),
    ]
    for call, given, words in wrong:
        with pytest.raises(DTypeError, match=words):
            call(*given)
    for data, words in (
        (3, r"validation_data must be \(texts, labels\), got int"),
        ((TEXTS,), r"validation_data must be \(texts, labels\), got tuple"),
        ((None, None), "validation_data's texts must be a list of texts, got NoneType"),
    ):
        with pytest.raises(DTypeError, match=words):
            one.fit(TEXTS, LABELS, validation_data=data)  # type: ignore[arg-type]


@pytest.mark.parametrize(("labels", "found"), [([1, 2], r"1 \(int\)"), (["a", None], r"null|None \(NoneType\)")])
def test_labels_that_are_no_strings_are_told(labels: Any, found: str) -> None:
    with pytest.raises(OptionError, match=rf"labels must be strings, got {found}"):
        TextClassifier(model(), labels=labels)


@each_task
def test_the_folder_of_the_other_task_is_told(make: Callable[..., Task], tmp_path: Path) -> None:
    for adapter in (None, LoRA(r=2)):
        folder = tmp_path / f"{adapter is None}"
        model().save_pretrained(tmp_path / "base")
        task = make(tmp_path / "base")
        learn(task, adapter=adapter)
        task.save(folder)
        type(task).load(folder)
        if make is classifier:
            with pytest.raises(OptionError, match=r"is a classifier, no translator: TextClassifier\.load reads it"):
                Translator.load(folder)
        else:
            with pytest.raises(OptionError, match=r"is a translator, no classifier: Translator\.load reads it"):
                TextClassifier.load(folder)
    with pytest.raises(
        OptionError, match=r"is a language model, no classifier: TextClassifier\(path, labels=\[\.\.\.\]\)"
    ):
        TextClassifier.load(tmp_path / "base")


def test_an_adapter_without_labels_names_itself_and_not_its_base(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "base")
    task = classifier(tmp_path / "base")
    learn(task, adapter=LoRA(r=2))
    task.save(tmp_path / "adapter")
    (tmp_path / "adapter" / "classifier.json").unlink()
    for base in (None, tmp_path / "base", model()):
        with pytest.raises(OptionError, match="adapter does not name its labels: make a TextClassifier of the base"):
            TextClassifier.load(tmp_path / "adapter", base=base)


# What a save leaves of others.


@each_task
def test_a_whole_model_takes_the_place_of_an_adapter(make: Callable[..., Task], tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "base")
    task = make(tmp_path / "base")
    learn(task, adapter=LoRA(r=4))
    task.save(tmp_path / "out")
    learn(task, epochs=20, lr=0.05)
    task.save(tmp_path / "out", merge=True)
    again = type(task).load(tmp_path / "out")
    assert not again.model.adapters
    assert np.array_equal(answers(again), answers(task))
    # And the other way round.
    adapted = make(tmp_path / "base")
    learn(adapted, adapter=LoRA(r=2), seed=5)
    adapted.save(tmp_path / "out")
    again = type(task).load(tmp_path / "out")
    assert again.model.adapters[again.adapter].r == 2
    assert np.array_equal(answers(again), answers(adapted))
    # Failure seen: what takes a directory for a model, such as an export, got the one from before.
    assert not (tmp_path / "out" / "config.json").exists()
    assert not list((tmp_path / "out").glob("model*.safetensors*"))


@each_task
def test_a_model_that_may_be_the_base_stays_beside_its_adapter(make: Callable[..., Task], tmp_path: Path) -> None:
    first = make(model())
    learn(first)
    first.save(tmp_path / "own")
    model().save_pretrained(tmp_path / "base")
    model().save_pretrained(tmp_path / "plain")
    for base, folder in (("own", "own"), ("base", "base"), ("base", "plain"), (None, "own")):
        task = make(model() if base is None else tmp_path / base)
        learn(task, adapter=LoRA(r=2))
        task.save(tmp_path / folder)
        assert (tmp_path / folder / "config.json").is_file(), (base, folder)
        assert (tmp_path / folder / "model.safetensors").is_file(), (base, folder)


@each_task
def test_a_save_that_is_refused_or_cut_short_leaves_the_adapter_that_was_there(
    make: Callable[..., Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model().save_pretrained(tmp_path / "base")
    task = make(tmp_path / "base")
    learn(task, adapter=LoRA(r=2))
    task.save(tmp_path / "out")
    expected = answers(task)
    other = make(tmp_path / "base")
    other.model.add_adapter("other", LoRA(r=1))
    with pytest.raises(OptionError, match="save_pretrained writes the base alone"):
        other.save(tmp_path / "out")
    assert np.array_equal(answers(type(task).load(tmp_path / "out")), expected)

    def full(*_: Any, **__: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("llama_ext.runtime.saving.write_sharded", full)
    other.model.delete_adapter("other")
    with pytest.raises(OSError, match="the disk is full"):
        other.save(tmp_path / "out")
    assert np.array_equal(answers(type(task).load(tmp_path / "out")), expected)


def test_labels_of_an_earlier_adapter_are_never_taken_for_a_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model().save_pretrained(tmp_path / "base")
    for labels in (["odd", "even"], ["even", "odd"]):
        task = TextClassifier(tmp_path / "base", labels)
        learn(task, adapter=LoRA(r=2))
        if labels == ["odd", "even"]:
            task.save(tmp_path / "out")

    def full(*_: Any, **__: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("llama_ext.tasks.task_files._write_about", full)
    with pytest.raises(OSError, match="the disk is full"):
        task.save(tmp_path / "out")
    with pytest.raises(OptionError, match="does not name its labels"):
        TextClassifier.load(tmp_path / "out")


def test_a_prompt_of_an_earlier_translator_is_never_taken_for_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    translator(model()).save(tmp_path / "out")

    def full(*_: Any, **__: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("llama_ext.tasks.task_files._write_about", full)
    with pytest.raises(OSError, match="the disk is full"):
        Translator(model(), source="Chinese", target="English").save(tmp_path / "out")
    with pytest.raises(LlamaExtError):
        Translator.load(tmp_path / "out")


@each_task
@pytest.mark.parametrize("lora", [None, LoRA(r=2)], ids=["whole", "adapter"])
@pytest.mark.parametrize("earlier", [None, LoRA(r=2)], ids=["over-whole", "over-adapter"])
def test_a_task_takes_the_place_of_the_other_one(
    make: Callable[..., Task], lora: Any, earlier: Any, tmp_path: Path
) -> None:
    model().save_pretrained(tmp_path / "base")
    first = (translator if make is classifier else classifier)(tmp_path / "base")
    learn(first, adapter=earlier)
    first.save(tmp_path / "out")
    second = make(tmp_path / "base")
    learn(second, adapter=lora)
    second.save(tmp_path / "out")
    assert np.array_equal(answers(type(second).load(tmp_path / "out")), answers(second))
    with pytest.raises(OptionError, match="is a translator, no" if make is translator else "is a classifier, no"):
        type(first).load(tmp_path / "out")
    assert not (tmp_path / "out" / ("translator.json" if make is classifier else "classifier.json")).exists()


# What it says of itself.


def test_they_are_told_in_a_line() -> None:
    one, other = classifier(model()), translator(model())
    count = f"{one.model.num_parameters():,} parameters, float32"
    where = f"; cpu {one.model.isa}>"
    assert repr(one) == f"<TextClassifier odd, even; {count}{where}"
    learn(one, adapter=LoRA(r=2))
    assert repr(one) == f"<TextClassifier odd, even; {count}, adapter 'classifier'{where}"
    assert repr(other) == f"<Translator English to Chinese; {other.model.num_parameters():,} parameters, float32{where}"
    many = TextClassifier(model(), [f"label{index}" for index in range(40)])
    assert repr(many).startswith("<TextClassifier label0, label1, ")
    assert "label7, ...; " in repr(many)


@pytest.mark.parametrize("verbose", [0, 1])
def test_progress_shows_how_many_texts_are_done(verbose: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, int]] = []

    class Bar(progress.ProgressBar):
        def __init__(self, label: str, total: int, unit: str) -> None:
            super().__init__(label, total, unit)
            self._of = (label, total)

        def advance(self, amount: int) -> None:
            seen.append((*self._of, amount))

    monkeypatch.setattr("llama_ext.tasks.progress.ProgressBar", Bar)
    one, other = classifier(model()), translator(model())
    texts = TEXTS * 20
    one.evaluate(texts, LABELS * 20, verbose=verbose)
    assert seen == [("Classifying", 80, amount) for amount in (32, 32, 16)] * verbose
    seen.clear()
    other.translate(texts, num_beams=1, max_new_tokens=2, verbose=verbose)
    assert seen == [("Translating", 80, amount) for amount in (64, 16)] * verbose
    seen.clear()
    other.translate(TEXTS, num_beams=2, max_new_tokens=2, verbose=verbose)
    assert seen == [("Translating", 4, 1)] * 4 * verbose


def test_many_texts_get_what_each_gets_alone() -> None:
    one, other = classifier(model()), translator(model())
    learn(one)
    texts = [f"{first} {second}" for first in TEXTS for second in TEXTS] * 5
    together = one.predict_proba(texts)
    assert np.array_equal(together, np.concatenate([one.predict_proba([text]) for text in texts]))
    for beams in (1, 2):
        found = other.translate(texts, num_beams=beams, max_new_tokens=4)
        assert found == [other.translate(text, num_beams=beams, max_new_tokens=4) for text in texts]


def test_a_text_that_is_too_long_is_named_before_anything_is_translated(monkeypatch: pytest.MonkeyPatch) -> None:
    other = translator(model())
    monkeypatch.setattr(other.model, "generate", lambda *_, **options: pytest.fail("it translates"))
    with pytest.raises(ContextLengthError, match=r"^texts\[70\] in its prompt has \d+ tokens"):
        other.translate(["one"] * 70 + ["one " * 90])
    with pytest.raises(ContextLengthError, match=r"^the text in its prompt has \d+ tokens"):
        other.translate("one " * 90)
