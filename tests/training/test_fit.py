"""`compile`, `fit`, `evaluate`, `train_step`, `loss_and_gradients` and `lr_find` of a real model."""

from __future__ import annotations

import gc
import json
import math
import signal
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import llama_ext
from letter_models import TEXT, Model, documents, make, same, weights
from llama_ext.training import Callback, TokenFile, write_token_file
from shared_data import SHARED, requires_shared
from stop_at import StopAt

GOLDEN = SHARED / "golden" / "train-gqa-tied"


@requires_shared
def test_gradients_and_ten_steps_are_those_of_torch_in_float64() -> None:
    golden = load_file(GOLDEN / "golden.safetensors")
    said = json.loads((GOLDEN / "golden.json").read_text())
    model = Model.from_pretrained(GOLDEN, dtype="float32")
    loss, gradients = model.loss_and_gradients(golden["batches"][0], golden["labels"][0])
    assert loss == pytest.approx(golden["losses"][0], abs=1e-5)
    expected = {name.removeprefix("grad."): array for name, array in golden.items() if name.startswith("grad.")}
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, expected[name], atol=2e-6, err_msg=name)
    assert said["weight_decay_on"] == "every parameter"
    model.compile(
        lr=said["lr"],
        betas=tuple(said["betas"]),
        eps=said["eps"],
        weight_decay=said["weight_decay"],
        decay="all",
        clip_norm=said["clip_grad_norm"],
    )
    for step in range(said["steps"]):
        result = model.train_step(golden["batches"][step], golden["labels"][step])
        assert result.loss == pytest.approx(golden["losses"][step], abs=1e-5)
        assert result.grad_norm == pytest.approx(golden["grad_norms"][step], rel=1e-5)
    names = {spec.slot: spec.name for spec in _specs(model)}
    for slot, values in weights(model).items():
        np.testing.assert_allclose(values, golden[f"final.{names[slot]}"], atol=1e-4, err_msg=slot)


@requires_shared
def test_fit_is_the_same_ten_steps() -> None:
    golden = load_file(GOLDEN / "golden.safetensors")
    model = Model.from_pretrained(GOLDEN, dtype="float32")
    model.compile(lr=1e-3, weight_decay=0.1, decay="all", schedule="constant")
    x = golden["batches"].reshape(-1, golden["batches"].shape[-1])
    history = model.fit(x, golden["labels"].reshape(x.shape), batch_size=4, shuffle=False)
    np.testing.assert_allclose(history.loss, golden["losses"], atol=1e-5)


def _specs(model: Model) -> Any:
    from llama_ext.models import ARCHITECTURES

    return list(ARCHITECTURES["llama"].tensor_specs(model.config))


# -- the same bits ----------------------------------------------------------------------------------------------------

OPTIMIZERS: list[dict[str, Any]] = [
    {"optimizer": "adamw"},
    {"optimizer": "adam", "weight_decay": 0.01},
    {"optimizer": "sgd", "lr": 0.1},
    {"optimizer": "sgd", "lr": 0.1, "momentum": 0.0},
    {"optimizer": "muon", "lr": 0.02},
]


@pytest.mark.parametrize("options", OPTIMIZERS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("kind", ["documents", "stream"])
def test_ten_and_ten_steps_are_twenty(tmp_path: Path, options: dict[str, Any], kind: str) -> None:
    x: Any = documents() if kind == "documents" else TEXT * 20
    settings: dict[str, Any] = {"batch_size": 5, "max_steps": 20, "seed": 3, "context": 20}

    def run(**more: Any) -> Model:
        model = make()
        model.compile(**{"lr": 3e-3, "warmup": 3, "dropout": 0.1, "attention_dropout": 0.1, **options})
        model.fit(x, **settings, **more)
        return model

    whole = run(callbacks=[StopAt()])
    begun = run(callbacks=[StopAt(10)], checkpoint_dir=tmp_path)
    same(begun, Model.from_pretrained(tmp_path / "step-00000010"))
    same(whole, run(callbacks=[StopAt()], checkpoint_dir=tmp_path, resume=True))
    assert not np.array_equal(weights(whole)["embedding"], weights(begun)["embedding"])


def test_threads_change_no_bit() -> None:
    models = []
    for threads in (1, 2, 3):
        model = make(threads=threads)
        model.compile(lr=3e-3, dropout=0.1)
        model.fit(documents(), batch_size=6, epochs=3)
        models.append(model)
    same(models[0], models[1])
    same(models[0], models[2])


def test_activations_computed_once_more_change_no_bit() -> None:
    models = []
    for again in (False, True):
        model = make()
        model.compile(lr=3e-3, dropout=0.1, checkpoint_activations=again)
        model.fit(documents(), batch_size=6)
        models.append(model)
    same(*models)


# -- the same numbers -------------------------------------------------------------------------------------------------


def _one_step(x: Any, **settings: Any) -> tuple[float, float, dict[str, Any]]:
    model = make()
    # The step of plain SGD is the gradient.
    model.compile("sgd", lr=1.0, momentum=0.0, weight_decay=0.0, schedule="constant", clip_norm=None)
    before = weights(model)
    history = model.fit(x, max_steps=1, **settings)
    after = weights(model)
    return history.loss[0], history.grad_norm[0], {slot: after[slot] - before[slot] for slot in after}


def _close(first: Any, second: Any) -> None:
    assert first[0] == pytest.approx(second[0], abs=1e-6)
    assert first[1] == pytest.approx(second[1], rel=1e-6)
    for slot, change in first[2].items():
        np.testing.assert_allclose(change, second[2][slot], atol=1e-6, err_msg=slot)


def test_packed_documents_learn_what_unpacked_ones_do() -> None:
    unpacked = _one_step(documents(), batch_size=24)
    _close(unpacked, _one_step(documents(), batch_size=24, pack=True, context=40))


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_a_ragged_batch_in_parts_is_one_batch(parts: int) -> None:
    _close(
        _one_step(documents()[:8], batch_size=8), _one_step(documents()[:8], batch_size=8 // parts, grad_accum=parts)
    )


def test_padding_is_nothing() -> None:
    model = make()
    ids = [model.tokenizer.encode(text) for text in documents()[:5]]  # type: ignore[union-attr]
    block = np.zeros((5, 30), np.int64)
    labels = np.full((5, 30), -100)
    for index, row in enumerate(ids):
        block[index, : len(row)] = labels[index, : len(row)] = row
    loss, gradients = model.loss_and_gradients(block, labels)
    counted = sum(len(row) - 1 for row in ids)
    alone = [model.loss_and_gradients(np.array([row])) for row in ids]
    shares = [(len(row) - 1) / counted for row in ids]
    assert loss == pytest.approx(sum(share * each[0] for share, each in zip(shares, alone, strict=True)), abs=1e-6)
    for name, gradient in gradients.items():
        total = sum(share * each[1][name] for share, each in zip(shares, alone, strict=True))
        np.testing.assert_allclose(gradient, total, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_have_the_names_of_a_checkpoint_and_change_nothing(tied: bool, tmp_path: Path) -> None:
    model = make(tied=tied)
    model.save_pretrained(tmp_path)
    core = model._core
    _, gradients = model.loss_and_gradients(np.array([[1, 2, 3, 4]]))
    assert model._core is core
    stored = load_file(tmp_path / "model.safetensors")
    assert {name: each.shape for name, each in gradients.items()} == {name: each.shape for name, each in stored.items()}


# -- learning ---------------------------------------------------------------------------------------------------------


def test_a_batch_is_learned_by_heart_and_written() -> None:
    model = make()
    model.compile(lr=1e-2, weight_decay=0.0, schedule="constant")
    history = model.fit([TEXT], max_steps=150, overfit_batch=True)
    assert history.loss[-1] < 0.05
    assert model.generate(TEXT[:9], do_sample=False) == TEXT


def test_answers_alone_are_learned() -> None:
    model = make()
    model.compile(lr=1e-2, weight_decay=0.0)
    pairs = [("the quick", " brown fox"), ("the lazy", " dog.")]
    history = model.fit(pairs * 2, epochs=60, batch_size=4)
    assert history.loss[-1] < 0.05
    assert model.generate("the lazy", do_sample=False) == "the lazy dog."
    assert model.generate("the quick", do_sample=False) == "the quick brown fox"
    # Of prompts nothing was learned: that costs what it did, or more.
    assert model.evaluate(["the"]).loss > 1.0
    assert model.evaluate(pairs).accuracy == 1.0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_validation_in_fit_is_evaluate_and_evaluate_is_perplexity(precision: str) -> None:
    model = make()
    model.compile(lr=3e-3, precision=precision, metrics=["accuracy", "perplexity"])
    history = model.fit(TEXT * 8, max_steps=10, batch_size=4, context=16, validation_data=TEXT * 2)
    found = model.evaluate(TEXT * 2, context=16)
    tolerance = 1e-6 if precision == "float32" else 2e-2
    assert history.val_loss[-1] == pytest.approx(found.loss, rel=tolerance)
    assert found.tokens == 2 * len(TEXT) - 1
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    scored = model.perplexity(TEXT * 2, context=17, stride=16)
    assert found.loss == pytest.approx(scored.loss, rel=1e-6)
    assert found.tokens == scored.tokens


def test_evaluate_takes_quantised_models_and_fit_does_not(tmp_path: Path) -> None:
    make(hidden_size=32).save_pretrained(tmp_path)
    model = Model.from_pretrained(tmp_path, dtype="int8")
    plain = Model.from_pretrained(tmp_path)
    assert model.evaluate(documents()).loss == pytest.approx(plain.evaluate(documents()).loss, rel=0.02)
    for call in (model.fit, model.loss_and_gradients, model.lr_find, model.train_step):
        with pytest.raises(llama_ext.UnsupportedError, match="float32"):
            call(np.array([[1, 2, 3]]))  # type: ignore[operator]
    assert model.dtype == "int8"


def test_training_makes_bfloat16_weights_float32_and_old_sessions_keep_theirs(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    model = Model.from_pretrained(tmp_path, dtype="bfloat16")
    ids = [1, 2, 3]
    before = model([ids])[0, -1]
    session = model.session(max_length=8)
    session.append(ids[:2])
    model.compile(lr=1e-2)
    model.fit(documents(), epochs=1)
    assert model.dtype == "float32"
    np.testing.assert_allclose(session.append(ids[2:]), before, atol=2e-2)
    assert np.abs(model([ids])[0, -1] - before).max() > 0.1
    model.save_pretrained(tmp_path / "trained")
    same(model, Model.from_pretrained(tmp_path / "trained"))


def test_a_token_file_is_trained_on_like_the_text(tmp_path: Path) -> None:
    first, second = make(), make()
    assert first.tokenizer is not None
    ids = first.tokenizer.encode(TEXT * 20)
    write_token_file(tmp_path / "t", [ids], vocabulary=len(first.tokenizer), tokenizer=first.tokenizer)
    losses = []
    with TokenFile(tmp_path / "t") as file:
        for model, data in ((first, file), (second, TEXT * 20)):
            model.compile(lr=3e-3)
            losses.append(model.fit(data, max_steps=5, batch_size=3, context=20).loss)
    assert losses[0] == losses[1]
    same(first, second)


def test_the_best_learning_rate_is_sought_on_a_copy() -> None:
    model = make()
    before = weights(model)
    found = model.lr_find(documents(), batch_size=8, start=1e-5, end=10.0, steps=60)
    for slot, values in weights(model).items():
        assert np.array_equal(values, before[slot])
    assert found.lr[0] == 1e-5
    assert found.lr == sorted(found.lr)
    assert 1e-4 < found.suggestion < 0.3
    assert min(found.loss) < found.loss[0]


def test_a_learning_rate_that_made_the_loss_explode_is_not_the_one_before_which_it_was_lowest() -> None:
    found = make().lr_find(documents(), batch_size=8, start=1e-3, end=1e3, steps=4)
    # The loss that is seen with a rate is of the weights that the rate before it made.
    lowest = int(np.argmin(found.loss))
    assert lowest > 0
    assert found.suggestion == found.lr[lowest - 1] / 10


def test_a_step_with_labels_that_do_not_count_is_refused_and_train_step_keeps_its_moments() -> None:
    model, other = make(), make()
    x = np.arange(8).reshape(1, 8)
    with pytest.raises(llama_ext.OptionError, match="no label counts"):
        model.train_step(x, np.full((1, 8), -100))
    for each in (model, other):
        each.compile(lr=1e-2, warmup=2)
        each.train_step(x)
    other.compile(lr=1e-2, warmup=2)  # begins anew
    first, second = model.train_step(x), other.train_step(x)
    assert first == second
    assert not np.array_equal(weights(model)["embedding"], weights(other)["embedding"])


class FailsOnce:
    """A trainer whose step of the optimiser fails the first time, before it has changed anything."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._failed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)

    def step(self, **options: Any) -> None:
        if not self._failed:
            self._failed = True
            raise KeyboardInterrupt
        self._trainer.step(**options)


def test_a_step_that_failed_leaves_nothing_to_the_next_train_step() -> None:
    model, other = make(), make()
    x = np.arange(8).reshape(1, 8)
    for each in (model, other):
        each.compile(lr=1e-2)
        each.train_step(x)
    training: Any = model._training
    training.trainer = FailsOnce(training.trainer)
    with pytest.raises(KeyboardInterrupt):
        model.train_step(x[:, ::-1])
    assert training.trainer.gradient_norm() == 0.0
    assert model.train_step(x) == other.train_step(x)
    same(model, other)


def test_another_thread_may_ask_a_model_that_is_trained_but_not_train_it() -> None:
    model, alone = make(), make()

    class Asks(Callback):
        def on_step_end(self, run: Any, record: Any) -> None:
            for each in (lambda: model.fit(documents()), lambda: model.train_step([[1, 2, 3]])):
                with (
                    ThreadPoolExecutor(1) as pool,
                    pytest.raises(llama_ext.LlamaExtError, match="trained by another call"),
                ):
                    pool.submit(each).result()
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(model.evaluate, documents()).result().loss > 0

    assert model.fit(documents(), callbacks=[Asks()]).loss == alone.fit(documents()).loss
    same(model, alone)
    model.train_step([[1, 2, 3]])


def test_fit_without_compile_has_the_defaults_of_compile() -> None:
    one, two = make(), make()
    two.compile()
    assert one.fit(documents()).loss == two.fit(documents()).loss
    same(one, two)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"context": 49}, llama_ext.ContextLengthError, "the model's context is 48"),
        ({"context": 0}, llama_ext.OptionError, "context"),
        ({"pack": 1}, llama_ext.OptionError, "pack"),
        ({"batch_size": 0}, llama_ext.OptionError, "batch_size"),
        ({"validation_data": []}, llama_ext.OptionError, "validation_data is empty"),
        ({"validation_data": (("ab", "c"), ("ab", "c"))}, llama_ext.OptionError, "two pairs in a tuple"),
        ({"validate_every": 3}, llama_ext.OptionError, "need validation_data"),
        ({"log_file": "nowhere/log"}, FileNotFoundError, "nowhere/log"),
    ],
)
def test_bad_settings_leave_the_model_alone(
    settings: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    # Which a run would make float32.
    make().save_pretrained(tmp_path)
    model = Model.from_pretrained(tmp_path, dtype="bfloat16")
    core = model._core
    with pytest.raises(error, match=words):
        model.fit(documents(), **settings)
    assert model._core is core


def test_a_fit_that_its_folder_refuses_leaves_the_model_alone(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_start(self, *_: Any) -> None:
            raise RuntimeError("no")

    make().save_pretrained(tmp_path / "model")
    make().fit(documents(), seed=1, checkpoint_dir=tmp_path / "other")
    model = Model.from_pretrained(tmp_path / "model", dtype="bfloat16")
    core = model._core
    settings: dict[str, Any]
    for settings, error in (
        ({"checkpoint_dir": tmp_path / "other"}, llama_ext.OptionError),
        ({"checkpoint_dir": tmp_path / "other", "resume": True}, llama_ext.CheckpointError),
        ({"resume": tmp_path / "nowhere"}, llama_ext.CheckpointError),
        ({"callbacks": [Fails()]}, RuntimeError),
    ):
        with pytest.raises(error):
            model.fit(documents(), **settings)
        assert model._core is core
        assert model.dtype == "bfloat16"
    model.fit(documents())
    assert model.dtype == "float32"


def test_a_run_that_its_callback_refuses_stands_at_the_checkpoint_that_it_read(tmp_path: Path) -> None:
    class Refuses(Callback):
        is_armed = False

        def on_start(self, run: Any, resumed: bool) -> None:
            if self.is_armed:
                raise RuntimeError

    make().save_pretrained(tmp_path / "base")
    callback = Refuses()
    trained = make()
    trained.fit(documents(), checkpoint_dir=tmp_path / "run", callbacks=[callback])
    callback.is_armed = True
    for dtype in ("float32", "bfloat16"):
        model = Model.from_pretrained(tmp_path / "base", dtype=dtype)
        with pytest.raises(RuntimeError):
            model.fit(documents(), resume=tmp_path / "run", callbacks=[callback])
        same(model, trained)


def test_the_weights_before_a_fit_are_not_kept_in_memory_while_it_runs(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    model = Model.from_pretrained(tmp_path, dtype="bfloat16")
    model.compile(lr=1e-2)
    before = [weakref.ref(model._core), weakref.ref(model._training)]  # type: ignore[arg-type]
    seen: list[Any] = []

    class Looks(Callback):
        def on_step_end(self, run: Any, record: Any) -> None:
            gc.collect()
            seen.extend(each() for each in before)

    model.fit(documents(), max_steps=1, callbacks=[Looks()])
    assert seen == [None, None]


def test_a_batch_beyond_any_machine_is_a_typed_error() -> None:
    model = make()
    for size in (2**40, 2**70, 10**5000):
        with pytest.raises(
            llama_ext.OptionError, match="of 20 tokens is too large: at most 107374182 rows are accepted"
        ):
            model.fit(TEXT * 20, batch_size=size, context=20, max_steps=1)
    with pytest.raises(llama_ext.OptionError, match="Lower batch_size or grad_accum"):
        model.lr_find(TEXT * 20, batch_size=2**40)
    # Examples are what there is of them.
    model.fit(documents(), batch_size=2**40, max_steps=1)
    model.fit(TEXT * 20, batch_size=2**40, context=20, max_steps=1, shuffle=False)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    model = make()
    model.fit(documents(), checkpoint_dir=tmp_path)
    other = make(intermediate_size=52)
    before = weights(other)
    with pytest.raises(llama_ext.CheckpointError, match=r"model\.config\.intermediate_size was 50 and is 52"):
        other.fit(documents(), resume=tmp_path)
    for slot, values in weights(other).items():
        assert np.array_equal(values, before[slot])


@pytest.mark.usefixtures("uncovered")
def test_ctrl_c_saves_and_the_run_goes_on(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"batch_size": 4, "epochs": 40}
    whole = make()
    whole.compile(lr=3e-3)
    steps = len(whole.fit(documents(), **settings).steps)
    model = make()
    model.compile(lr=3e-3)
    timer = threading.Timer(0.005, signal.raise_signal, [signal.SIGINT])

    class Start(Callback):
        def on_step_end(self, run: Any, record: Any) -> None:
            if record.step == 3:
                timer.start()

    history = model.fit(documents(), **settings, checkpoint_dir=tmp_path, save_every=1000, callbacks=[Start()])
    timer.join()
    assert history.stopped == "interrupted"
    assert 3 <= len(history.steps) < steps
    ended = make()
    ended.compile(lr=3e-3)

    class Start2(Callback):
        pass

    Start2.__name__ = "Start"
    assert (
        len(ended.fit(documents(), **settings, checkpoint_dir=tmp_path, resume=True, callbacks=[Start2()]).steps)
        == steps
    )
    same(whole, ended)
