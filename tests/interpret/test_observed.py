"""A text that runs again from inside gives the bits of one that ran whole, wherever it begins and beside whatever else."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

import llama_ext
from devices import each_isa
from llama_ext import _core
from random_models import CONFIG, build, tokens
from seen import KINDS, SITES, observed_logits, with_adapter

COUNT, LAYERS = 70, CONFIG["layers"]
BEGINS = [0, 69, 5, 33, 5]


def added(values: Any, rows: list[int]) -> Any:
    changed = values.copy()
    changed[rows, ::2] += np.float32(0.5)
    return changed


@pytest.mark.parametrize(("dtype", "group", "compute", "changes"), KINDS, ids=lambda value: str(value))
@each_isa
def test_copies_have_the_bits_of_a_whole_pass(
    isa: str, dtype: str, group: int, compute: str, changes: dict[str, Any]
) -> None:
    core, apart, adapter = with_adapter(build(_core.Backend("cpu", 2, isa), dtype, compute, group, **changes))
    ids = tokens(COUNT)
    starts = np.cumsum([0] + [COUNT - begin for begin in BEGINS[:-1]]).tolist()
    for case, chosen in ((core, None), (apart, adapter)):
        sequence = _core.ObservedSequence(case, ids, range(LAYERS), chosen)
        whole = sequence.run([], None)
        for site in SITES:
            layer = LAYERS - 1 if site == "final_norm" else 0 if site == "embedding" else 1
            place = (site, 0 if site in ("embedding", "final_norm") else layer)
            copies = sequence.run_from(layer, BEGINS, [place], lambda *seen: added(seen[2], starts))
            for begin in BEGINS:
                alone = observed_logits(case, ids, [place], lambda *seen, at=begin: added(seen[2], [at]), chosen)
                np.testing.assert_array_equal(copies[: COUNT - begin], alone[begin:], site)
                # The first token attends to itself alone, whatever it asks.
                assert not np.array_equal(alone[begin], whole[begin]) or (begin == 0 and site.endswith(("q", "k")))
                copies = copies[COUNT - begin :]
            assert not len(copies)
        # What copies changed is theirs alone, and a row's logits do not hang on which were asked for.
        again = sequence.run_from(LAYERS - 1, BEGINS, [], None, "last")
        np.testing.assert_array_equal(again, whole[[-1] * len(BEGINS)])


@functools.cache
def core() -> _core.Model:
    return build(_core.Backend("cpu", 1), "float32", "auto", 0)


def test_what_a_first_run_leaves_is_what_later_ones_begin_with() -> None:
    ids = tokens(9)
    sequence = _core.ObservedSequence(core(), ids, [1])
    first = sequence.run([("embedding", 0)], lambda *seen: added(seen[2], [3]))
    np.testing.assert_array_equal(sequence.run_from(1, [4], [], None), first[4:])
    second = sequence.run([], None, "last")
    np.testing.assert_array_equal(sequence.run_from(1, [4], [], None)[-1:], second)
    assert not np.array_equal(first[-1:], second)


def test_only_the_rows_that_are_asked_for_reach_the_last_norm() -> None:
    sequence = _core.ObservedSequence(core(), tokens(9), [0])
    shapes: list[tuple[int, ...]] = []
    for which in ("all", "last"):
        sequence.run([("final_norm", 0)], lambda *seen: shapes.append(seen[2].shape), which)
        sequence.run_from(0, [2, 8], [("final_norm", 0)], lambda *seen: shapes.append(seen[2].shape), which)
    assert [shape[0] for shape in shapes] == [9, 8, 1, 2]


def test_copies_that_there_cannot_be_are_refused() -> None:
    sequence = _core.ObservedSequence(core(), tokens(9), [1])
    with pytest.raises(llama_ext.OptionError, match="run the whole text first"):
        sequence.run_from(1, [0], [], None)
    sequence.run([], None)
    for layer in (-1, 0, 2, LAYERS):
        with pytest.raises(llama_ext.OptionError, match=f"what layer {layer} reads was not kept"):
            sequence.run_from(layer, [0], [], None)
    for begin in (-1, 9):
        with pytest.raises(llama_ext.OptionError, match=f"a copy begins at token 0 to 8, not at {begin}"):
            sequence.run_from(1, [0, begin], [], None)
    assert sequence.run_from(1, [], [], None).shape == (0, CONFIG["vocabulary"])
    with pytest.raises(llama_ext.OptionError, match="rows must be 'all' or 'last', got 'none'"):
        sequence.run_from(1, [0], [], None, "none")
    for place in (("q", 0), ("embedding", 0)):
        with pytest.raises(llama_ext.OptionError, match=f"begins at layer 1 does not come by {place[0]} of layer 0"):
            sequence.run_from(1, [0], [place], None)
    for layer in (-1, LAYERS):
        with pytest.raises(llama_ext.OptionError, match=f"runs begin at layers 0 to {LAYERS - 1}, not at {layer}"):
            _core.ObservedSequence(core(), tokens(9), [layer])


def test_a_run_that_ends_amid_leaves_no_half_for_later_ones() -> None:
    sequence = _core.ObservedSequence(core(), tokens(9), [1])

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    expected = sequence.run([], None)
    with pytest.raises(KeyboardInterrupt):
        sequence.run_from(1, [3], [("v", 1)], stop)
    np.testing.assert_array_equal(sequence.run_from(1, [3], [], None), expected[3:])
    with pytest.raises(KeyboardInterrupt):
        sequence.run([("v", 1)], stop)
    with pytest.raises(llama_ext.OptionError, match="run the whole text first"):
        sequence.run_from(1, [3], [], None)


def test_a_sequence_is_of_a_model() -> None:
    for make in (lambda: _core.ObservedSequence(None, tokens(3)), lambda: _core.Session(None, 4, "float32")):  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            make()


def test_a_run_within_a_run_is_refused() -> None:
    sequence = _core.ObservedSequence(core(), tokens(9), [1])
    with pytest.raises(llama_ext.LlamaExtError, match="this ObservedSequence is in use by another call"):
        sequence.run([("q", 0)], lambda *_: sequence.run([], None))
