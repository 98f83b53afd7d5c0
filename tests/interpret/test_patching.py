"""Patching: everything brings everything back, nothing nothing, and a patch is what a hook of the same kind does."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import letter_models
import llama_ext
from devices import requires_cuda
from llama_ext.interpret import hook_names, patch, patching, run_with_hooks
from llama_ext.interpret.observed import ObservedText

CLEAN, CORRUPTED = "the quick fox", "the brown dog"
COUNT = len(CLEAN)


@functools.cache
def model() -> letter_models.Model:
    return letter_models.make(tied=False, attention_bias=True)


NAMES = hook_names(letter_models.make().config)
ANSWERS = ("a", "b")


@functools.cache
def clean() -> Any:
    return model().run_with_cache(CLEAN)[1]


def difference(logits: Any) -> float:
    right, wrong = (model().tokenizer.encode(answer)[0] for answer in ANSWERS)
    return float(logits[-1, right]) - float(logits[-1, wrong])


def recovery(logits: Any) -> float:
    best = difference(clean().logits)
    worst = difference(model().run_with_cache(CORRUPTED, "hook_embed")[0])
    return (difference(logits) - worst) / (best - worst)


def test_all_that_a_layer_reads_brings_back_everything() -> None:
    found = patch(model(), CLEAN, CORRUPTED, answers=ANSWERS)
    assert found.names == ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"]
    assert found.recovery.tolist() == [1.0, 1.0]
    assert found.clean == difference(clean().logits)
    later = patch(
        model(), CLEAN, CORRUPTED, ["hook_embed", "*hook_resid_post", "ln_final.hook_normalized"], answers=ANSWERS
    )
    assert later.recovery[:3].tolist() == [1.0, 1.0, 1.0]
    np.testing.assert_allclose(later.recovery[3], 1, atol=1e-5)  # times the weight, which the kernel does in one go


def test_positions_are_patched_one_by_one() -> None:
    found = patch(model(), CLEAN, CORRUPTED, "*hook_resid_*", positions=True, answers=ANSWERS)
    assert found.recovery.shape == (6, COUNT)
    # Where both have the same token, and nothing else before it, there is nothing to bring back.
    assert found.recovery[0].astype(bool).tolist() == [a != b for a, b in zip(CLEAN, CORRUPTED, strict=True)]
    assert not found.recovery[:, :4].any()
    # After the last layer only the last position counts.
    assert found.recovery[5].tolist() == [0.0] * (COUNT - 1) + [1.0]


def of_all_rows(logits: Any) -> float:
    """A metric that hangs on every row, and on which one it is."""
    return float((np.sin(3 * logits) * (1 + np.arange(len(logits)))[:, None]).sum())


@given(st.sampled_from(NAMES), st.booleans(), st.booleans(), st.booleans(), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_a_patch_is_a_hook(name: str, positions: bool, heads: bool, rows: bool, random: Any) -> None:
    value = clean()[name]
    square = name.endswith(("attn_scores", "hook_pattern"))
    heads = heads and value.ndim == 3
    measure: Any = of_all_rows if rows else difference
    options: Any = {"metric": of_all_rows} if rows else {"answers": ANSWERS}
    found = patch(model(), CLEAN, CORRUPTED, name, positions=positions, heads=heads, **options)
    count = value.shape[0 if square else 1] if heads else 1
    assert found.recovery.shape == (1, *((COUNT,) if positions else ()), *((count,) if heads else ()))
    best = measure(clean().logits)
    worst = measure(model().run_with_cache(CORRUPTED, "hook_embed")[0])
    for _ in range(4):
        token, head = random.randrange(COUNT), random.randrange(count)
        tokens: Any = token if positions else slice(None)
        which: Any = head if heads else slice(None)
        place = (which, tokens) if square else (tokens, which) if heads else (tokens,)

        def put(mine: Any, of: str, place: Any = place) -> None:
            mine[place] = value[place]

        expected = (measure(run_with_hooks(model(), CORRUPTED, {name: put})) - worst) / (best - worst)
        at = (0, *((token,) if positions else ()), *((head,) if heads else ()))
        assert found.recovery[at] == expected


class Runs:
    """Sees what is run again: the layer's name, and the copies' first tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refuses: Any = None, error: Any = None) -> None:
        self.seen: list[tuple[str, list[int]]] = []
        run_from = ObservedText.run_from

        def spy(text: Any, name: str, begins: Any, see: Any, *, last: bool = False) -> Any:
            self.seen.append((name, list(begins)))
            if refuses is not None and refuses(begins):
                raise error or llama_ext.OutOfMemoryError("no room")
            return run_from(text, name, begins, see, last=last)

        monkeypatch.setattr(ObservedText, "run_from", spy)


@pytest.mark.parametrize("metric", [None, of_all_rows], ids=["answers", "a metric"])
def test_a_run_begins_where_it_is_patched_beside_others(monkeypatch: pytest.MonkeyPatch, metric: Any) -> None:
    runs = Runs(monkeypatch)
    names = ["hook_embed", "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_z"]
    options: Any = {"answers": ANSWERS} if metric is None else {"metric": metric}
    first = next(i for i, (a, b) in enumerate(zip(CLEAN, CORRUPTED, strict=True)) if a != b)
    patch(model(), CLEAN, CORRUPTED, names, positions=True, **options)
    side_by_side = list(range(first, COUNT))
    apart = [(names[1], [0])] * len(side_by_side)
    assert runs.seen == [(names[0], side_by_side), *apart, (names[2], side_by_side)]
    runs.seen.clear()
    patch(model(), CLEAN, CORRUPTED, names[2], heads=True, **options)
    assert runs.seen == [(names[2], [first] * 4)]


@pytest.mark.parametrize("bound", ["_ROWS", "_KEPT_BYTES"])
def test_copies_are_bounded(monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    expected = patch(model(), CLEAN, CORRUPTED, "*hook_z", positions=True, heads=True, answers=ANSWERS)
    runs = Runs(monkeypatch)
    copy_nbytes = ObservedText(model(), np.array(model().tokenizer.encode(CLEAN), np.int32)).copy_nbytes
    monkeypatch.setattr(patching, bound, {"_ROWS": 2 * COUNT, "_KEPT_BYTES": 3 * copy_nbytes}[bound])
    found = patch(model(), CLEAN, CORRUPTED, "*hook_z", positions=True, heads=True, answers=ANSWERS)
    np.testing.assert_array_equal(found.recovery, expected.recovery)
    if bound == "_ROWS":
        assert max(sum(COUNT - begin for begin in begins) for _, begins in runs.seen) <= 2 * COUNT
    else:
        assert max(len(begins) for _, begins in runs.seen) == 3
    # A single one may be beyond every bound.
    runs.seen.clear()
    monkeypatch.setattr(patching, bound, 1)
    found = patch(model(), CLEAN, CORRUPTED, "*hook_z", positions=[5, 6], heads=True, answers=ANSWERS)
    np.testing.assert_array_equal(found.recovery, expected.recovery[:, [5, 6]])
    assert [len(begins) for _, begins in runs.seen] == [1] * 16


def test_where_memory_is_short_fewer_copies_run(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = patch(model(), CLEAN, CORRUPTED, positions=True, answers=ANSWERS)
    with monkeypatch.context() as patched:
        runs = Runs(patched, lambda begins: len(begins) > 2)
        found = patch(model(), CLEAN, CORRUPTED, positions=True, answers=ANSWERS)
        np.testing.assert_array_equal(found.recovery, expected.recovery)
        assert {len(begins) for _, begins in runs.seen} >= {1, 2, 9}
    with monkeypatch.context() as patched:
        Runs(patched, lambda begins: 6 in begins)
        with pytest.raises(llama_ext.OutOfMemoryError, match="no room"):
            patch(model(), CLEAN, CORRUPTED, positions=True, answers=ANSWERS)


def test_a_patch_whose_logits_are_not_finite_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    Runs(
        monkeypatch,
        lambda begins: 6 in begins,
        llama_ext.NumericError("forward: sequence 0, position 6: logit 3 is inf"),
    )
    for options, named in (({"positions": True}, "token 6"), ({"positions": [8, 6], "heads": True}, "token 6, head 0")):
        with pytest.raises(
            llama_ext.NumericError, match=rf"patch of blocks\.0\.attn\.hook_z, {named}: forward: .* logit 3"
        ):
            patch(model(), CLEAN, CORRUPTED, "*hook_z", answers=ANSWERS, **options)


def test_a_metric_may_write_to_what_it_is_given() -> None:
    def softmax(logits: Any) -> float:
        np.exp(logits, out=logits)
        logits /= logits.sum(-1, keepdims=True)
        return float((logits[:, 3] * (1 + np.arange(len(logits)))).sum())

    found = patch(model(), CLEAN, CORRUPTED, "*hook_z", positions=True, metric=softmax)
    expected = patch(model(), CLEAN, CORRUPTED, "*hook_z", positions=True, metric=lambda each: softmax(each.copy()))
    np.testing.assert_array_equal(found.recovery, expected.recovery)
    assert found.corrupted == expected.corrupted


@pytest.mark.gpu
@requires_cuda
@pytest.mark.parametrize(
    "name", ["hook_embed", "blocks.1.hook_resid_pre", "blocks.1.attn.hook_pattern", "ln_final.hook_scale"]
)
def test_a_patch_is_a_hook_on_a_gpu(name: str) -> None:
    gpu = letter_models.make(tied=False, attention_bias=True, device="cuda")
    value = gpu.run_with_cache(CLEAN, name)[1][name]
    found = patch(gpu, CLEAN, CORRUPTED, name, positions=True, answers=ANSWERS)

    def put(mine: Any, of: str) -> None:
        where = (slice(None), 7) if name.endswith("pattern") else (7,)
        mine[where] = value[where]

    logits = run_with_hooks(gpu, CORRUPTED, {name: put})
    expected = (difference(logits) - found.corrupted) / (found.clean - found.corrupted)
    assert found.recovery[0, 7] == expected
    assert not found.recovery[0, :4].any()


def test_scores_that_look_elsewhere_matter() -> None:
    """A pattern of another text changes what is read: patterns are not left as they are."""
    found = patch(model(), CLEAN, CORRUPTED, "*hook_pattern", heads=True, positions=True, answers=ANSWERS)
    assert found.recovery.shape == (2, COUNT, 4)
    assert not found.recovery[:, :4].any()
    assert found.recovery[0, 5:].all()
    assert found.recovery[1, -1].all()


def test_a_metric_of_ones_own_is_used() -> None:
    seen: list[tuple[int, ...]] = []

    def last_entropy(logits: Any) -> float:
        seen.append(logits.shape)
        logs = logits[-1] - np.log(np.exp(logits[-1]).sum())
        return float(-(np.exp(logs) * logs).sum())

    found = patch(model(), CLEAN, CORRUPTED, "blocks.1.hook_resid_pre", metric=last_entropy)
    assert found.recovery.tolist() == [1.0]
    assert seen == [(COUNT, model().config.vocab_size)] * 3


def test_answers_are_texts_or_ids_or_what_the_model_says() -> None:
    ids = tuple(int(model().tokenizer.encode(answer)[0]) for answer in ANSWERS)
    by_id = patch(model(), CLEAN, CORRUPTED, positions=True, answers=ids)  # type: ignore[arg-type]
    assert (
        by_id.recovery.tobytes() == patch(model(), CLEAN, CORRUPTED, positions=True, answers=ANSWERS).recovery.tobytes()
    )
    both = [int(model().run_with_cache(text, "hook_embed")[0][-1].argmax()) for text in (CLEAN, CORRUPTED)]
    assert both[0] != both[1]
    said = patch(model(), CLEAN, CORRUPTED)
    assert said.clean > 0 > said.corrupted


@pytest.mark.parametrize(
    ("changes", "error", "why"),
    [
        ({"corrupted": "the brown"}, "ShapeError", "got 13 clean .* and 9 corrupted"),
        ({"corrupted": CLEAN}, "OptionError", "after both texts"),
        ({"corrupted": CLEAN, "answers": ANSWERS}, "OptionError", "nothing to recover"),
        ({"answers": ("ab", "b")}, "OptionError", "'ab' is 2 tokens"),
        ({"answers": ("a", "a")}, "OptionError", "two different tokens"),
        ({"answers": ("a",)}, "OptionError", "must be two"),
        ({"answers": "ab"}, "OptionError", "must be two"),
        ({"answers": (1, 999)}, "TokenIdError", None),
        ({"answers": ANSWERS, "metric": difference}, "OptionError", "not both"),
        ({"metric": lambda logits: float("nan")}, "NumericError", "the metric gave nan"),
        ({"names": "blocks.7.*"}, "OptionError", "fits no name"),
        ({"heads": True}, "OptionError", "blocks.0.hook_resid_pre has none"),
        ({"names": ["*hook_q", "*hook_k"], "heads": True}, "OptionError", "hook_k has 2 heads and .*hook_q has 4"),
        ({"clean": ""}, "OptionError", "empty"),
        ({"heads": 3, "names": "*hook_z"}, "OptionError", "heads must be True or False, got 3"),
        ({"heads": "no", "names": "*hook_z"}, "OptionError", "heads must be True or False, got 'no'"),
        ({"positions": "no"}, "OptionError", "positions must be True, False or a list of positions, got 'no'"),
        ({"positions": 2}, "OptionError", "positions must be True, False or a list of positions, got 2"),
        ({"positions": []}, "OptionError", r"positions must be True, False or a list of positions, got \[\]"),
        ({"positions": [1, COUNT]}, "OptionError", r"positions\[1\] must be a whole number in \[-13, 12\], got 13"),
        ({"positions": [1.5]}, "OptionError", r"positions\[0\] must be a whole number in"),
        ({"positions": [1, 1 - COUNT]}, "OptionError", "must be different ones"),
        ({"metric": 3}, "OptionError", r"metric must be a function of logits \(T, V\), got 3"),
        ({"metric": lambda logits: None}, "DTypeError", "the metric must give a number, got None"),
        ({"metric": lambda logits: "1"}, "DTypeError", "the metric must give a number, got '1'"),
        ({"metric": lambda logits: logits[-1]}, "DTypeError", "the metric must give a number, got array"),
        ({"answers": np.array([1, 2, 3])}, "OptionError", "must be two"),
        ({"answers": np.array([[1], [2]])}, "DTypeError", "answers"),
    ],
)
def test_what_cannot_be_patched_is_an_error_that_says_why(changes: dict[str, Any], error: str, why: str | None) -> None:
    with pytest.raises(getattr(llama_ext, error), match=why):
        patch(model(), **{"clean": CLEAN, "corrupted": CORRUPTED, **changes})


@pytest.mark.parametrize("positions", [[6, 4, -1], (6, 4, 12), np.array([6, 4, 12])])
def test_some_positions_are_those_of_the_whole_table(positions: Any) -> None:
    names = ["blocks.0.hook_resid_pre", "blocks.1.attn.hook_pattern"]
    whole = patch(model(), CLEAN, CORRUPTED, names, positions=True, answers=ANSWERS)
    some = patch(model(), CLEAN, CORRUPTED, names, positions=positions, answers=ANSWERS)
    assert whole.positions == list(range(COUNT))
    assert some.positions == [6, 4, 12]
    np.testing.assert_array_equal(some.recovery, whole.recovery[:, [6, 4, 12]])
    best = some.positions[int(some.recovery[0].argmax())]
    assert f"token {best} {CORRUPTED[best]!r}" in str(some)
    assert patch(model(), CLEAN, CORRUPTED, answers=ANSWERS).positions == []


@pytest.mark.parametrize("kind", [list, np.array])
def test_answers_may_be_any_two(kind: Any) -> None:
    ids = [int(model().tokenizer.encode(answer)[0]) for answer in ANSWERS]
    found = patch(model(), CLEAN, CORRUPTED, positions=[-1], answers=kind(ids))
    assert found.clean == difference(clean().logits)


def test_colours_reach_as_far_as_the_table() -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    found = patch(model(), CLEAN, CORRUPTED, positions=True, answers=ANSWERS)
    for factor in (0.01, 3.0, 0.0):
        small = dataclasses.replace(found, recovery=found.recovery * factor)
        largest = float(np.abs(small.recovery).max()) or 1.0
        drawing = small.plot()
        assert drawing.axes[0].images[0].get_clim() == (-largest, largest)
        scale = drawing.axes[1]
        assert [label.get_text() for label in scale.get_yticklabels()][::4] == [f"{-largest:+.2g}", f"{largest:+.2g}"]
        assert scale.get_ylabel() == "recovery (1: clean)"


def test_it_is_read_as_a_list_of_the_best() -> None:
    found = patch(model(), CLEAN, CORRUPTED, "*hook_z", positions=True, heads=True, answers=ANSWERS)
    lines = str(found).splitlines()
    assert lines[0].startswith("Patching of 'the brown dog' with 'the quick fox': recovery of shape (2, 13, 4)")
    shown = [float(line.split()[0]) for line in lines[1:]]
    assert shown == sorted(shown, reverse=True)
    assert shown[0] == round(float(found.recovery.max()), 3)
    name, token, head = np.unravel_index(found.recovery.argmax(), found.recovery.shape)
    assert f"blocks.{name}.attn.hook_z, token {token} " in lines[1]
    assert lines[1].endswith(f"head {head}")


def test_pictures_are_of_the_table() -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    flat = patch(model(), CLEAN, CORRUPTED, positions=True, answers=ANSWERS)
    np.testing.assert_array_equal(flat.plot().axes[0].images[0].get_array(), flat.recovery)
    by_head = patch(model(), CLEAN, CORRUPTED, "*hook_z", heads=True, answers=ANSWERS)
    assert by_head.plot().axes[0].get_xlabel() == "head"
    patch(model(), CLEAN, CORRUPTED, answers=ANSWERS).plot().canvas.draw()
    deep = patch(model(), CLEAN, CORRUPTED, "*hook_z", positions=True, heads=True, answers=ANSWERS)
    picture = deep.plot("blocks.1.attn.hook_z").axes[0]
    np.testing.assert_array_equal(picture.images[0].get_array(), deep.recovery[1].T)
    assert [label.get_text() for label in picture.get_yticklabels()] == ["head 0", "head 1", "head 2", "head 3"]
    for table, name in ((deep, None), (flat, "blocks.0.hook_resid_pre"), (deep, "hook_embed")):
        with pytest.raises(llama_ext.OptionError, match="plot: "):
            table.plot(name)


def test_a_long_run_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_ext.interpret import questions

    told: list[tuple[str, int, str]] = []

    class Bar:
        def __init__(self, label: str, total: int, unit: str) -> None:
            told.append((label, total, unit))

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            told.append(("end", 0, ""))

        def advance(self, amount: int) -> None:
            told.append(("one", amount, ""))

    monkeypatch.setattr(questions, "ProgressBar", Bar)
    patch(model(), CLEAN, CORRUPTED, positions=True, answers=ANSWERS)
    assert (told[0], told[-1]) == (("Patching", 26, "runs"), ("end", 0, ""))
    assert sum(amount for _, amount, _ in told[1:-1]) == 26
    told.clear()
    patch(model(), CLEAN, CORRUPTED, positions=True, answers=ANSWERS, verbose=0)
    assert not told
