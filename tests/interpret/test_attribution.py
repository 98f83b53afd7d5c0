"""Attributions add up, agree where the model is linear, and find a token that is known to decide."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import llama_ext
import planted
from devices import requires_cuda
from letter_models import make
from llama_ext import LoRA, _core
from llama_ext.errors import (
    ContextLengthError,
    DTypeError,
    NumericError,
    OptionError,
    ShapeError,
    TokenIdError,
)
from llama_ext.interpret import attribute, methods

METHODS = ("integrated_gradients", "gradient_x_input", "occlusion")
each_method = pytest.mark.parametrize("method", METHODS)
TEXTS = [
    "Once upon a time, there was a little girl named",
    "The dog and the cat were",
    "First Citizen:\nBefore we proceed any further, hear me",
    "To be or not to be, that is the",
]


@pytest.fixture(scope="module")
def demo() -> llama_ext.LlamaForCausalLM:
    return llama_ext.LlamaForCausalLM.from_pretrained("demo", threads=2)


@pytest.fixture(scope="module")
def letters() -> llama_ext.LlamaForCausalLM:
    return make()


# What scores are worth.


@pytest.mark.parametrize("output", ["logprob", "logit"])
@pytest.mark.parametrize("text", TEXTS)
def test_fifty_steps_of_a_trained_model_add_up_to_a_hundredth(
    demo: llama_ext.LlamaForCausalLM, text: str, output: str
) -> None:
    found = attribute(demo, text, output=output, max_steps=50)
    assert found.steps == 50
    assert found.convergence_delta is not None
    assert found.convergence_delta <= 0.01
    assert found.warning is None
    assert found.scores.sum() == pytest.approx(found.value - found.baseline_value, rel=0.01)
    assert abs(found.value - found.baseline_value) > 0.1


def test_the_path_is_halved_until_scores_add_up(demo: llama_ext.LlamaForCausalLM) -> None:
    # From zeros, everything happens within a thousandth of the path: the norms divide by what is next to nothing.
    coarse = attribute(demo, TEXTS[1], baseline="zeros", max_steps=50)
    assert coarse.convergence_delta is not None
    assert coarse.convergence_delta > 0.1
    assert coarse.warning is not None
    assert "instead of" in coarse.warning
    assert "warning: the scores add up to" in str(coarse)
    fine = attribute(demo, TEXTS[1], baseline="zeros", max_steps=4000)
    assert fine.convergence_delta is not None
    assert fine.convergence_delta <= 0.01
    assert fine.warning is None
    assert 50 < fine.steps <= 4000
    between = attribute(demo, TEXTS[1], baseline="zeros", max_steps=100)
    assert 50 < between.steps <= 100
    assert attribute(demo, TEXTS[1], baseline="zeros").warning is None


@pytest.mark.parametrize("text", ["KING RICHARD I", *TEXTS[1:]])
def test_no_unwarned_scores_are_far_from_converged_ones(demo: llama_ext.LlamaForCausalLM, text: str) -> None:
    exact = attribute(demo, text, baseline="zeros", max_steps=8000, steps=100)
    assert exact.warning is None
    for steps, most in [(1, 1), (10, 10), (50, 50), (50, 150), (50, 200), (50, 500), (77, 101), (150, 150), (2, 2000)]:
        found = attribute(demo, text, baseline="zeros", steps=steps, max_steps=most)
        error = np.abs(found.scores - exact.scores).sum() / np.abs(exact.scores).sum()
        assert found.warning is not None or error < 0.05, (steps, most)
        assert found.convergence_delta is not None
        assert found.convergence_delta > 0.01 or found.warning is None or "half of the steps" in found.warning


class Made:
    """Two tokens whose gradients along the path are given, and add up to `slope` everywhere."""

    tokens = 2
    embeddings = np.eye(2)

    def __init__(
        self, first: Callable[[float], float], slope: Callable[[float], float], value: Callable[[float], float]
    ):
        self.first, self.slope, self.of = first, slope, value

    def gradients(self, count: int, prompts: Any, advance: Any) -> Any:
        for index in range(count):
            place = prompts(index)[0, 0]
            yield index, np.diag([self.first(place), self.slope(place) - self.first(place)])

    def value(self, prompt: Any) -> float:
        return self.of(prompt[0, 0])


def integrated(question: Any, steps: int, most: int) -> methods.Integral:
    ends = question.of(1.0), question.of(0.0)
    return methods.integrated_gradients(
        question, np.zeros((2, 2)), *ends, steps=steps, max_steps=most, tolerance=0.01, shows=False
    )


def test_one_part_that_adds_up_by_chance_is_not_trusted() -> None:
    # As from zeros, all happens at the beginning; what one token is off by the other is, too, and the sum is right.
    def steep(place: float) -> float:
        return 3e-2 / (place + 1e-4) ** 1.5

    made = Made(steep, lambda place: 2.0, lambda place: 2 * place)
    exact = 6e-2 * (1e-4**-0.5 - 1.0001**-0.5)
    for most in (50, 73):
        alone = integrated(made, 50, most)
        assert alone.steps == 50
        assert alone.delta < 1e-9
        assert alone.adds_up(2.0, 0.0, 0.01)
        assert not alone.agrees(2.0, 0.0)
        assert abs(alone.scores[0] - exact) > 0.1 * exact
    found = integrated(made, 50, 2000)
    assert 50 < found.steps < 500
    assert found.agrees(2.0, 0.0)
    assert found.scores == pytest.approx([exact, 2 - exact], rel=0.02)
    smooth = integrated(Made(lambda place: 3 * place**2, lambda place: 2.0, lambda place: 2 * place), 50, 500)
    assert smooth.steps == 50
    assert smooth.agrees(2.0, 0.0)
    assert smooth.scores == pytest.approx([1, 1])


def test_errors_of_parts_do_not_make_good_for_each_other() -> None:
    # A step up in one half and down in the other: what both are off by is as much, with two signs.
    def slope(place: float) -> float:
        return 2.0 + 9 * (0.2 < place < 0.7)

    made = Made(slope, slope, lambda place: 2 * place + 9 * min(max(place - 0.2, 0), 0.5))
    found = integrated(made, 2, 26)
    assert found.steps == 26
    assert abs(found.scores.sum() - made.of(1.0)) < 1e-9
    assert found.delta > 0.2
    assert not found.adds_up(made.of(1.0), 0.0, 0.01)


def test_one_line_says_what_it_is(demo: llama_ext.LlamaForCausalLM) -> None:
    found = attribute(demo, TEXTS[1], method="occlusion")
    assert repr(found) == (
        f"Attribution of {TEXTS[1]!r}: occlusion for the {found.target}, {len(found.tokens)} tokens, value {found.value:.4g}"
    )


def linear_model() -> llama_ext.LlamaForCausalLM:
    """Logits that are sums over tokens: attention that looks everywhere alike, no feed-forward, and norms whose epsilon is so
    large beside what they read that they divide by a constant.
    """
    model = make(rms_norm_eps=1.0, num_hidden_layers=1, tied=False)
    rng = np.random.default_rng(0)
    sizes = {"embedding": 1e-3, "head": 200, "layers.0.q": 0, "layers.0.k": 0, "layers.0.down": 0}
    for slot, shape, is_matrix in model._core.slots():
        if is_matrix:
            values = sizes.get(slot, 0.2) * rng.standard_normal(shape)
            model._core.load(slot, values.astype(np.float32), "float32")
    return model


def test_all_methods_agree_and_add_up_where_logits_are_linear() -> None:
    model = linear_model()
    ids = model.tokenizer.encode("the lazy dog")
    found = {each: attribute(model, ids, 3, each, output="logit", baseline="zeros") for each in METHODS}
    exact = found["gradient_x_input"]
    value = float(model(np.array([ids]))[0, -1, 3])
    assert exact.value == pytest.approx(value, abs=1e-4)
    assert exact.baseline_value == pytest.approx(0, abs=1e-5)
    assert exact.scores.sum() == pytest.approx(value, abs=1e-4)
    assert np.abs(exact.scores).min() > 1e-3
    for other in ("integrated_gradients", "occlusion"):
        assert found[other].scores == pytest.approx(exact.scores, abs=1e-4)


def test_gradient_x_input_is_blind_to_what_a_norm_alone_reads() -> None:
    # A norm's output does not change with the length of its input, so its gradient has no part along it. With one layer that is all
    # of every token but the last.
    model = make(rms_norm_eps=1e-12, num_hidden_layers=1, initializer_range=0.5)
    blind = attribute(model, "the lazy dog", method="gradient_x_input", output="logit")
    seen = attribute(model, "the lazy dog", method="occlusion", output="logit")
    assert np.abs(blind.scores[:-1]).max() < 1e-4
    assert np.abs(seen.scores[:-1]).max() > 1e-2


@pytest.mark.parametrize("method", ["integrated_gradients", "occlusion"])
@pytest.mark.parametrize("kind", ["classifier", "language model"])
def test_a_planted_token_is_found_in_held_out_texts(method: str, kind: str) -> None:
    hits = 0
    for each in planted.HELD_OUT:
        if kind == "classifier":
            found = attribute(planted.classifier(), each.text, (each.label, "plain"), method)
        else:
            found = attribute(planted.language_model(), planted.prompt(each), (f" {each.label}", " plain"), method)
        assert found.convergence_delta is None or found.convergence_delta <= 0.01
        hits += found.tokens[int(found.scores.argmax())].strip() == each.key
    assert hits >= 0.95 * len(planted.HELD_OUT)


# How scores are computed.


def test_occlusion_is_what_separate_passes_give(demo: llama_ext.LlamaForCausalLM) -> None:
    # The same text with another token in the place of one is the same embeddings.
    exact = llama_ext.LlamaForCausalLM.from_pretrained("demo", dtype="float32")
    ids = exact.tokenizer.encode(TEXTS[1])
    other = exact.tokenizer.encode(" ")[0]
    found = attribute(exact, ids, 44, "occlusion", output="logit", baseline=other)

    def logit(tokens: list[int]) -> float:
        return float(exact(np.array([tokens]))[0, -1, 44])

    assert found.value == pytest.approx(logit(ids), abs=1e-4)
    assert found.baseline_value == pytest.approx(logit([other] * len(ids)), abs=1e-4)
    for place, score in enumerate(found.scores.tolist()):
        assert score == pytest.approx(logit(ids) - logit([*ids[:place], other, *ids[place + 1 :]]), abs=1e-4)
    pairs = attribute(exact, ids, 44, "occlusion", output="logit", baseline=other, window=2)
    falls = [logit(ids) - logit([*ids[:place], other, other, *ids[place + 2 :]]) for place in range(len(ids) - 1)]
    assert pairs.scores[0] == pytest.approx(falls[0], abs=1e-4)
    assert pairs.scores[3] == pytest.approx((falls[2] + falls[3]) / 2, abs=1e-4)
    assert pairs.scores[-1] == pytest.approx(falls[-1], abs=1e-4)
    whole = attribute(exact, ids, 44, "occlusion", output="logit", baseline=other, window=len(ids))
    assert whole.scores == pytest.approx(np.full(len(ids), whole.value - whole.baseline_value), abs=1e-6)


@each_method
def test_batch_size_and_threads_change_no_bit(method: str) -> None:
    expected = attribute(make(threads=1), "the lazy dog", 5, method)
    for threads, batch_size in [(1, 1), (2, 7), (3, None), (2, 64)]:
        found = attribute(make(threads=threads), "the lazy dog", 5, method, batch_size=batch_size)
        assert found.scores.tobytes() == expected.scores.tobytes()
        assert (found.value, found.baseline_value) == (expected.value, expected.baseline_value)


@pytest.mark.parametrize("output", ["logprob", "logit"])
def test_values_are_those_of_the_model(letters: llama_ext.LlamaForCausalLM, output: str) -> None:
    ids = letters.tokenizer.encode("the lazy d")
    logits = letters(np.array([ids]))[0, -1].astype(np.float64)
    values = logits if output == "logit" else logits - np.log(np.exp(logits).sum())
    found = attribute(letters, ids, 3, output=output)
    assert found.value == pytest.approx(values[3], abs=1e-5)
    assert str(found.target).startswith("logit of" if output == "logit" else "log probability of")
    likely = attribute(letters, ids, output=output)
    assert likely.target.ids == (int(logits.argmax()),)
    contrast = attribute(letters, ids, (3, 7), output=output)
    assert contrast.value == pytest.approx(logits[3] - logits[7], abs=1e-5)
    assert contrast.target.against == 7
    assert "rather than" in contrast.target.text


def test_a_continuation_is_the_sum_of_its_log_probabilities(letters: llama_ext.LlamaForCausalLM) -> None:
    found = attribute(letters, "the lazy", " dog")
    assert found.tokens == list("the lazy")
    assert found.value == pytest.approx(letters.loglikelihood("the lazy", " dog").logprob, abs=1e-4)
    assert found.target.text == "' dog'"
    ids = letters.tokenizer.encode("the lazy")
    following = letters.tokenizer.encode(" dog")
    for again in (attribute(letters, ids, following), attribute(letters, np.array(ids), " dog")):
        assert again.scores.tobytes() == found.scores.tobytes()
    assert found.convergence_delta is not None
    assert found.convergence_delta <= 0.01


def test_labels_may_be_names_or_indices() -> None:
    classifier, text = planted.classifier(), planted.HELD_OUT[0].text
    scores = classifier.model.scores([text])[0].astype(np.float64)
    by_name = attribute(classifier, text, "warm", output="logit")
    assert by_name.value == pytest.approx(scores[1], abs=1e-4)
    assert attribute(classifier.model, text, 1, output="logit").scores.tobytes() == by_name.scores.tobytes()
    assert attribute(classifier, text).target.text == repr(classifier.predict([text])[0])
    ids = classifier.model.encode([text])[0]
    assert attribute(classifier, ids, np.int64(1), output="logit").scores.tobytes() == by_name.scores.tobytes()
    logp = scores - np.log(np.exp(scores).sum())
    assert attribute(classifier, text, "cold").value == pytest.approx(logp[2], abs=1e-4)


# Baselines.


def test_baselines_may_be_tokens_ids_and_arrays(letters: llama_ext.LlamaForCausalLM) -> None:
    table = letters._core.read("embedding")
    token = letters.tokenizer.encode("x")[0]
    found = {
        "token": attribute(letters, "the dog", 3, baseline="x"),
        "id": attribute(letters, "the dog", 3, baseline=token),
        "array": attribute(letters, "the dog", 3, baseline=table[token]),
        "list": attribute(letters, "the dog", 3, baseline=table[token].tolist()),
        "arrays": attribute(letters, "the dog", 3, baseline=np.tile(table[token].astype(np.float64), (7, 1))),
    }
    for each in found.values():
        assert each.scores.tobytes() == found["id"].scores.tobytes()
    ids = letters.tokenizer.encode("xxxxxxx")
    assert found["id"].baseline_value == pytest.approx(attribute(letters, ids, 3).value, abs=1e-5)
    mean = attribute(letters, "the dog", 3)
    assert mean.baseline == pytest.approx(np.tile(table.astype(np.float64).mean(axis=0), (7, 1)), abs=1e-7)
    assert not attribute(letters, "the dog", 3, "gradient_x_input").baseline.any()
    special = attribute(letters, "the dog", 3, baseline="</s>")
    assert np.array_equal(special.baseline[0], table[letters.tokenizer.eos_token_id].astype(np.float64))


def test_a_token_that_is_its_own_baseline_counts_nothing(letters: llama_ext.LlamaForCausalLM) -> None:
    for method in METHODS:
        found = attribute(letters, "the dog", 3, method, baseline="h")
        assert found.scores[1] == pytest.approx(0, abs=1e-12)
        assert np.abs(found.scores).max() > 1e-4


# Weights and adapters.


@pytest.mark.parametrize(("dtype", "options"), [("int8", {}), ("int4", {"group_size": 32}), ("bfloat16", {})])
def test_weights_of_fewer_bits_are_attributed_as_they_are(dtype: str, options: dict[str, Any]) -> None:
    model = llama_ext.LlamaForCausalLM.from_pretrained("demo", dtype=dtype, **options)
    before = model.generate("The", max_new_tokens=8, do_sample=False)
    session = model.session()
    found = attribute(model, TEXTS[1])
    assert found.convergence_delta is not None
    assert found.convergence_delta <= 0.01
    wide = llama_ext.LlamaForCausalLM.from_pretrained("demo", dtype=dtype, compute="exact", **options)
    ids = wide.tokenizer.encode(TEXTS[1])
    logits = wide(np.array([ids]))[0, -1].astype(np.float64)
    assert found.value == pytest.approx((logits - np.log(np.exp(logits).sum()))[found.target.ids[0]], abs=1e-3)
    # Neither the model nor what was made of it before is another one now.
    assert model.dtype == dtype
    assert model.generate("The", max_new_tokens=8, do_sample=False) == before
    assert np.array_equal(session.append(ids), model.session().append(ids))


def test_the_active_adapter_counts_and_the_base_can_be_asked_for() -> None:
    model = make()
    base = attribute(model, "the lazy dog", 3)
    model.add_adapter("x", LoRA(r=4))
    rng = np.random.default_rng(0)
    adapter = model._loaded("x").core
    for slot, _, _ in adapter.slots():
        adapter.write(slot, "B", rng.standard_normal(adapter.read(slot, "B").shape).astype(np.float32) / 3)
    active = attribute(model, "the lazy dog", 3)
    assert active.adapter == "x"
    assert np.abs(active.scores - base.scores).max() > 1e-3
    for choice, expected in [([None], base), ("x", active), (["x"], active)]:
        assert attribute(model, "the lazy dog", 3, adapter=choice).scores.tobytes() == expected.scores.tobytes()
    model.merge_adapter("x")
    assert attribute(model, "the lazy dog", 3).scores == pytest.approx(active.scores, abs=1e-3)
    with pytest.raises(OptionError, match="there is no adapter 'y'"):
        attribute(model, "the lazy dog", 3, adapter="y")


def test_an_adapters_own_head_is_used_and_put_back() -> None:
    classifier = llama_ext.TextClassifier(planted.base(), planted.LABELS)
    texts = [each.text for each in planted.TRAIN[:60]]
    classifier.fit(texts, [each.label for each in planted.TRAIN[:60]], adapter=LoRA(r=4), epochs=2, verbose=0)
    head = classifier.model._core.read("head").copy()
    scores = classifier.model.scores(texts[:1])[0]
    assert attribute(classifier, texts[0], 2, output="logit").value == pytest.approx(float(scores[2]), abs=1e-4)
    assert np.array_equal(classifier.model._core.read("head"), head)
    with pytest.raises(OptionError, match="is no label"):
        attribute(classifier, texts[0], 3)
    assert np.array_equal(classifier.model._core.read("head"), head)


def test_a_callback_of_training_may_ask() -> None:
    model = make()
    seen = []

    class Ask(llama_ext.training.Callback):
        def on_step_end(self, run: Any, record: Any) -> None:
            seen.append(attribute(model, "the dog", 3, "gradient_x_input").value)

    plain = make()
    for each, callbacks in ((plain, []), (model, [Ask()])):
        each.compile(lr=1e-2)
        each.fit(["the lazy dog", "the quick fox"], epochs=3, batch_size=2, verbose=0, callbacks=callbacks)
    assert len(set(seen)) == 3
    assert np.array_equal(model._core.read("embedding"), plain._core.read("embedding"))


def test_ctrl_c_ends_it() -> None:
    model = llama_ext.LlamaForCausalLM.from_pretrained("demo")
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    timer.start()

    def go_on() -> None:
        for _ in range(100):
            attribute(model, TEXTS[2] * 6, steps=200)

    with pytest.raises(KeyboardInterrupt):
        go_on()
    timer.join()


@pytest.mark.gpu
@requires_cuda
@each_method
def test_a_gpu_gives_the_scores_of_the_cpu(method: str) -> None:
    cpu = make()
    gpu = llama_ext.LlamaForCausalLM(cpu.config, cpu.tokenizer, seed=0, device="cuda")
    for target in (3, (3, 7), " dog"):
        expected = attribute(cpu, "the lazy", target, method)
        found = attribute(gpu, "the lazy", target, method)
        assert found.scores == pytest.approx(expected.scores, abs=1e-4)
        assert found.value == pytest.approx(expected.value, abs=1e-4)
    bits = llama_ext.LlamaForCausalLM(cpu.config, cpu.tokenizer, seed=0, device="cuda", dtype="bfloat16")
    assert attribute(bits, "the lazy", 3, method).scores == pytest.approx(
        attribute(
            llama_ext.LlamaForCausalLM(cpu.config, cpu.tokenizer, dtype="bfloat16"), "the lazy", 3, method
        ).scores,
        abs=1e-4,
    )


# What cannot be asked.


def test_what_cannot_be_asked_of_a_language_model_is_told(letters: llama_ext.LlamaForCausalLM) -> None:
    size = letters.config.vocab_size
    for arguments, options, kind, message in [
        (("",), {}, OptionError, "the text is empty: give at least one character"),
        (([],), {}, ShapeError, "the text has no tokens: give at least one, for example the BOS token"),
        (("the", (5, 5)), {}, OptionError, r"a contrast is of two that differ, and \(5, 5\) names one twice"),
        (("the", ("d", "d")), {}, OptionError, "names one twice"),
        (([size],), {}, TokenIdError, rf"the text\[0\] is {size}"),
        ((3.5,), {}, DTypeError, "the text must be a sequence of integers, got float"),
        (("the", size), {}, TokenIdError, f"target {size} is no token id"),
        (("the", -1), {}, TokenIdError, "target -1 is no token id"),
        (("the", "§"), {}, OptionError, "knows .* characters, and not '§'"),
        (("the", ""), {}, OptionError, "target is an empty text"),
        (("the", []), {}, OptionError, "target has no token"),
        (("the", 1.5), {}, DTypeError, "target must be .* got float"),
        (("the", True), {}, DTypeError, "target must be .* got bool"),
        (("the", (1, 2, 3)), {}, OptionError, "must have 2 members, got 3"),
        (("the", (" d", " c")), {}, OptionError, "a contrast is of two tokens"),
        (("the", " dog"), {"output": "logit"}, OptionError, "has a log probability and no logit"),
        (("the", 1), {"output": "loss"}, OptionError, "output must be one of logprob, logit, got 'loss'"),
        (("the", 1, "shap"), {}, OptionError, "method must be one of integrated_gradients, .* got 'shap'"),
        (("the" * 20, 1), {}, ContextLengthError, "60 tokens, the model's context is 48"),
        (("the" * 20,), {}, ContextLengthError, "60 tokens, the model's context is 48"),
        (("the" * 15, "dogdog"), {}, ContextLengthError, "45 tokens and the target 6, the model's context is 48"),
        (("the", 1), {"steps": 0}, OptionError, r"steps must be a whole number in \[1, "),
        (("the", 1), {"steps": 1.5}, OptionError, r"steps must be a whole number in \[1, "),
        (("the", 1, "occlusion"), {"window": 4}, OptionError, r"window must be a whole number in \[1, 3\]"),
        (("the", 1), {"batch_size": 0}, OptionError, "batch_size must be a whole number >= 1, got 0"),
        (("the", 1), {"baseline": "<unk>"}, OptionError, "baseline must be 'mean', 'zeros', a token .* got '<unk>'"),
        (("the", 1), {"baseline": size}, TokenIdError, f"baseline {size} is no token id"),
        (("the", 1), {"baseline": np.zeros(23)}, ShapeError, r"baseline must have shape \(24,\), .* got \(23,\)"),
        (("the", 1), {"baseline": np.zeros((2, 24))}, ShapeError, r"or \(3, 24\), one for each token, got \(2, 24\)"),
        (("the", 1), {"baseline": [0.5] * 23}, ShapeError, r"baseline must have shape \(24,\), .* got \(23,\)"),
        (("the", 1), {"baseline": [1, 2]}, DTypeError, "baseline must be an array of floats, got int64"),
        (("the", 1), {"baseline": [[0.5], [0.5, 1.0]]}, ShapeError, "parts are of different lengths"),
        (("the", 1), {"baseline": np.zeros(24, int)}, DTypeError, "baseline must be an array of floats, got int64"),
        (("the", 1), {"baseline": np.full(24, np.nan)}, OptionError, "a number that is not finite"),
        (("the", 1), {"baseline": np.full(24, 1e300)}, NumericError, "is (nan|-?inf)"),
    ]:
        with pytest.raises(kind, match=message), np.errstate(over="ignore"):
            attribute(letters, *arguments, **options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"model must be a LlamaForCausalLM, .* got str"):
        attribute("demo", "the")
    bare = llama_ext.LlamaForCausalLM(letters.config)
    with pytest.raises(OptionError, match="this model has no tokenizer"):
        attribute(bare, "the")
    with pytest.raises(OptionError, match="target is a text, and this model has no tokenizer"):
        attribute(bare, [1, 2], "the")
    assert attribute(bare, [1, 2], 3).tokens == ["1", "2"]


def test_what_cannot_be_asked_of_a_classifier_is_told() -> None:
    classifier = planted.classifier()
    for target in ("hot", 3, -1, 1.5, ["warm"], True):
        with pytest.raises(OptionError, match="is no label"):
            attribute(classifier, "the warm", target)
    with pytest.raises(OptionError, match="must have 2 members, got 1"):
        attribute(classifier, "the warm", ("warm",))
    with pytest.raises(OptionError, match="names one twice"):
        attribute(classifier, "the warm", ("warm", 1))
    with pytest.raises(OptionError, match="the text is empty"):
        attribute(classifier, "")
    with pytest.raises(ContextLengthError, match="tokens, the model's context is 96"):
        attribute(classifier, "the " * 200)


def test_a_fused_model_is_given_two_matrices_once() -> None:
    model = make()
    assert not model._core.separate_gate_up
    attribute(model, "the", 1, "gradient_x_input")
    core = model._core
    assert core.separate_gate_up
    attribute(model, "the", 1, "gradient_x_input")
    assert model._core is core
    assert isinstance(core, _core.Model)
