"""Engines that train in turns: what a turn gives, what a failure leaves, and the ratio of turns that follow each other."""

import argparse
import sys
from pathlib import Path

import pytest

from benchmarks.training import Trained, peak_of, ratio_of, take_turns

OPTIONS = argparse.Namespace(peer_python=Path(sys.executable), threads=1, rounds=2, seconds=0.0)


def test_a_turn_is_at_least_one_step_and_tells_rates_and_memory() -> None:
    run = Trained("llama_ext", "float32", "4x128")
    probes = take_turns([run], OPTIONS)
    assert run.error() is None
    assert "isa" in run.facts
    assert [len(turn["rates"]) for turn in run.results] == [1, 1]
    assert min(run.rates()) > 0
    assert [turn["peak"] for turn in run.results] == [peak_of(probe, 1) for probe in probes]
    assert all(turn["grown_memory_bytes"] > 0 for turn in run.results)


def test_an_engine_that_fails_says_why_and_leaves_the_others_their_turns() -> None:
    bad = Trained("llama_ext", "float16", "4x128")  # a dtype that the runner refuses
    good = Trained("llama_ext", "float32", "4x128")
    take_turns([bad, good], OPTIONS)
    assert not bad.results
    assert "float16" in (bad.error() or "")
    assert len(good.results) == 2
    assert good.error() is None


def test_the_ratio_is_of_pairs_not_of_all_rates() -> None:
    # The machine is ten times slower in the second and third turn: each pair still says 2.
    first = Trained(
        "a", "float32", "4x128", results=[{"rates": [20.0, 20.0, 90.0]}, {"rates": [2.0]}, {"rates": [2.0]}]
    )
    second = Trained("b", "float32", "4x128", results=[{"rates": [10.0]}, {"rates": [1.0]}, {"rates": [1.0, 1.0]}])
    assert ratio_of(first, second) == pytest.approx([2.0, 2.0, 2.0])
    second.results[1] = {"error": "out of memory"}
    assert ratio_of(first, second) == pytest.approx([2.0, 2.0, 2.0])
    assert ratio_of(first, Trained("b", "float32", "4x128")) is None
