"""Measures of faithfulness are what their formulas say, and tell a right attribution from a random one."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import planted
from letter_models import make
from llama_ext.errors import OptionError, TokenIdError
from llama_ext.interpret import Attribution, attribute, faithfulness
from llama_ext.interpret.measures import Measure


def test_measures_are_what_separate_passes_give() -> None:
    model = make()
    other = model.tokenizer.encode("x")[0]
    ids = model.tokenizer.encode("the lazy dog")
    attribution = attribute(model, ids, 3, "occlusion")
    found = faithfulness(model, attribution, baseline="x", fractions=[0.1, 0.25], permutations=2, seed=5)

    def probability(kept: list[int]) -> float:
        tokens = [token if index in kept else other for index, token in enumerate(ids)]
        logits = model(np.array([tokens]))[0, -1].astype(np.float64)
        return float(np.exp(logits[3]) / np.exp(logits).sum())

    order = np.argsort(-attribution.scores).tolist()
    whole = probability(order)
    assert found.probability == pytest.approx(whole, abs=1e-6)
    for share, count in [(0.1, 2), (0.25, 3)]:  # of 12 tokens, rounded up
        comprehensive, sufficient = found.by_fraction[share]
        assert comprehensive.value == pytest.approx(whole - probability(order[count:]), abs=1e-6)
        assert sufficient.value == pytest.approx(whole - probability(order[:count]), abs=1e-6)
    values = [each.value for each, _ in found.by_fraction.values()]
    assert found.comprehensiveness.value == pytest.approx(np.mean(values))
    deletion = [probability(order[count:]) for count in range(13)]
    insertion = [probability(order[:count]) for count in range(13)]
    assert found.deletion == pytest.approx(deletion, abs=1e-6)
    assert found.insertion == pytest.approx(insertion, abs=1e-6)
    trapezoids = [sum(curve) / 12 - (curve[0] + curve[-1]) / 24 for curve in (deletion, insertion)]
    assert (found.deletion_auc.value, found.insertion_auc.value) == pytest.approx(trapezoids, abs=1e-6)
    # The random orders are those of the seed, and nothing is added to them.
    rng = np.random.Generator(np.random.Philox(key=5))
    falls = []
    for _ in range(2):
        shuffled = rng.permutation(12).tolist()
        falls.append(np.mean([whole - probability(shuffled[count:]) for count in (2, 3)]))
    assert found.comprehensiveness.random == pytest.approx(np.mean(falls), abs=1e-6)
    assert found.comprehensiveness.random_error == pytest.approx(abs(falls[0] - falls[1]) / 2, abs=1e-6)


@pytest.mark.parametrize("method", ["integrated_gradients", "occlusion"])
def test_a_right_attribution_beats_random_orders_and_a_wrong_one_does_not(method: str) -> None:
    classifier = planted.classifier()
    wins = dict.fromkeys(["comprehensiveness", "sufficiency", "deletion_auc", "insertion_auc"], 0)
    losses = dict(wins)
    texts = planted.HELD_OUT[:15]
    for each in texts:
        right = attribute(classifier, each.text, each.label, method)
        found = faithfulness(classifier, right, permutations=8)
        # The last shall be the first.
        wrong = faithfulness(classifier, dataclasses.replace(right, scores=-right.scores), permutations=8)
        for name in wins:
            wins[name] += getattr(found, name).beats_random
            losses[name] += getattr(wrong, name).beats_random
    assert min(wins.values()) >= 0.9 * len(texts), wins
    assert max(losses.values()) <= 0.1 * len(texts), losses


def test_contrasts_and_continuations_are_probabilities_too() -> None:
    model = make()
    ids = model.tokenizer.encode("the lazy dog")
    logits = model(np.array([ids]))[0, -1].astype(np.float64)
    contrast = faithfulness(model, attribute(model, ids, (3, 7), "occlusion"), permutations=2)
    assert contrast.probability == pytest.approx(1 / (1 + math.exp(logits[7] - logits[3])), abs=1e-6)
    continued = faithfulness(model, attribute(model, "the lazy", " dog", "occlusion"), permutations=2)
    assert continued.probability == pytest.approx(
        math.exp(model.loglikelihood("the lazy", " dog").logprob / 4), abs=1e-6
    )
    assert continued.tokens == 8
    for found in (contrast, continued):
        for curve in (found.deletion, found.insertion, found.random_deletion, found.random_insertion):
            assert 0 <= curve.min() <= curve.max() <= 1


def test_it_does_not_depend_on_batches_or_on_what_was_explained() -> None:
    model = make()
    attribution = attribute(model, "the lazy dog", 3, "occlusion", output="logit")
    found = faithfulness(model, attribution, seed=1)
    again = faithfulness(model, attribution, seed=1, batch_size=3)
    assert str(again) == str(found)
    assert again.random_deletion.tobytes() == found.random_deletion.tobytes()
    # Of the probability, whether logits or their logarithms were attributed.
    other = dataclasses.replace(attribute(model, "the lazy dog", 3, "occlusion"), scores=attribution.scores)
    assert faithfulness(model, other, seed=1).deletion.tobytes() == found.deletion.tobytes()
    assert faithfulness(model, attribution, seed=2).random_deletion.tobytes() != found.random_deletion.tobytes()


def test_the_adapter_of_the_attribution_is_used() -> None:
    from llama_ext import LoRA

    model = make()
    base = attribute(model, "the dog", 3, "occlusion")
    expected = faithfulness(model, base, permutations=2).probability
    model.add_adapter("x", LoRA(r=4))
    core = model._loaded("x").core
    for slot, _, _ in core.slots():
        core.write(slot, "B", np.full(core.read(slot, "B").shape, 0.1, np.float32))
    adapted = attribute(model, "the dog", 3, "occlusion")
    assert faithfulness(model, base, permutations=2).probability == expected
    model.set_adapter(None)
    assert faithfulness(model, adapted, permutations=2).probability == pytest.approx(math.exp(adapted.value), abs=1e-6)
    assert abs(math.exp(adapted.value) - expected) > 1e-4


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 48),
    fractions=st.lists(st.floats(0.001, 1), min_size=1, max_size=4, unique=True),
    permutations=st.integers(2, 3),
)
def test_any_length_and_any_fractions_give_whole_curves(tokens: int, fractions: list[float], permutations: int) -> None:
    model = make()
    ids = np.random.default_rng(tokens).integers(0, 29, tokens)
    found = faithfulness(
        model, attribute(model, ids, 3, "gradient_x_input"), fractions=fractions, permutations=permutations
    )
    assert found.removed[0] == 0
    assert found.removed[-1] == 1
    assert (np.diff(found.removed) > 0).all()
    assert list(found.by_fraction) == sorted(fractions)
    # With nothing gone, and with everything there, it is the text itself; and the other way round its baseline.
    assert found.deletion[0] == found.insertion[-1] == found.probability
    assert found.deletion[-1] == found.insertion[0]
    assert found.random_deletion[[0, -1]] == pytest.approx(found.deletion[[0, -1]])
    assert found.random_insertion[[0, -1]] == pytest.approx(found.insertion[[0, -1]])
    assert len(str(found).splitlines()) == 2 + 2 * len(fractions) + 4


def test_the_table_says_what_is_better() -> None:
    model = make()
    text = str(faithfulness(model, attribute(model, "the dog", 3)))
    assert "integrated_gradients for 'e': probability" in text.replace(repr(model.tokenizer.decode([3])), "'e'")
    for name in ("comprehensiveness 1%", "sufficiency 50%", "comprehensiveness, mean", "deletion AUC", "insertion AUC"):
        assert name in text
    assert text.count("higher") == 7
    assert text.count("lower") == 7
    assert Measure(0.5, 0.3, 0.05, "higher").beats_random
    assert not Measure(0.5, 0.3, 0.05, "lower").beats_random
    assert not Measure(0.39, 0.3, 0.05, "higher").beats_random
    assert Measure(0.1, 0.3, 0.05, "lower").beats_random


@pytest.mark.parametrize("target", [3, (3, 7), " dog"])
def test_an_attribution_of_another_model_or_another_time_is_refused(target: Any) -> None:
    model = make()
    for output in ("logprob", "logit") if target != " dog" else ("logprob",):
        attribution = attribute(model, "the lazy", target, "occlusion", output=output)
        faithfulness(make(threads=2), attribution, permutations=2)
        with pytest.raises(
            OptionError, match=r"in this model, and was .* it is another model, or has been changed since"
        ):
            faithfulness(make(seed=1), attribution)
        trained = make()
        trained.compile(lr=1e-3)
        trained.fit(["the lazy dog"], epochs=3, batch_size=1, verbose=0)
        with pytest.raises(OptionError, match="has been changed since"):
            faithfulness(trained, attribution)


def test_what_cannot_be_measured_is_told() -> None:
    model = make()
    attribution = attribute(model, "the dog", 3)
    options: list[tuple[dict[str, Any], str]] = [
        ({"fractions": []}, "fractions must be numbers in"),
        ({"fractions": [0.0]}, "fractions must be numbers in"),
        ({"fractions": [1.5]}, "fractions must be numbers in"),
        ({"fractions": "all"}, "fractions must be numbers in"),
        ({"permutations": 1}, r"permutations must be a whole number in \[2, "),
        ({"seed": -1}, "seed must be a whole number in"),
        ({"baseline": "<unk>"}, "baseline must be"),
        ({"batch_size": 0}, "batch_size must be"),
    ]
    for each, message in options:
        with pytest.raises(OptionError, match=message):
            faithfulness(model, attribution, **each)
    with pytest.raises(OptionError, match="attribution must be what `attribute` gave, got str"):
        faithfulness(model, "the dog")  # type: ignore[arg-type]
    with pytest.raises(TokenIdError, match=r"the text\[0\] is 29"):
        faithfulness(model, dataclasses.replace(attribution, token_ids=[29]))
    assert isinstance(attribution, Attribution)
