"""Generation of several sequences and with guesses: batches, prompts that share a beginning, speculation.

The model is random in the shape of TinyLlama-1.1B with fewer layers, changed so that each token is followed by a certain other one
and the text repeats itself: what it costs is what any text costs, and prompt lookup finds what it is made for.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import hardware, report
from benchmarks.accounting import TINYLLAMA_1_1B, ModelShape
from llama_ext import _core

__all__ = ["Case", "cases", "main", "repeating_model"]

_PERIOD = 48


@dataclasses.dataclass
class Case:
    """What is generated, and how.

    Attributes:
        group: The work; the first case of a group is what the others are compared with.
        name: How this one does it.
        make: Begins a generation.
    """

    group: str
    name: str
    make: Callable[[], Any]


def repeating_model(backend: _core.Backend, shape: ModelShape, dtype: str) -> _core.Model:
    """A model whose texts have a period of 48 tokens: layers add little, and the head answers with the next token."""
    config: dict[str, Any] = {**dataclasses.asdict(shape), "context": 2048, "rope": {}}
    model = _core.Model(backend, config, {"": (dtype, 0)})
    rng = np.random.default_rng(0)
    embedding = rng.standard_normal((shape.vocabulary, shape.width), np.float32)
    token = np.arange(shape.vocabulary)
    head = np.zeros_like(embedding)
    first = token // _PERIOD * _PERIOD
    head[first + (token - first + 1) % np.minimum(_PERIOD, shape.vocabulary - first)] = embedding
    for slot, dimensions, is_matrix in model.slots():
        values = np.ones(dimensions, np.float32)
        if is_matrix:
            values = {"embedding": embedding, "head": head}.get(slot, values)
        if values.ndim == 2 and slot not in ("embedding", "head"):
            values = rng.standard_normal(dimensions, np.float32) * np.float32(0.005)
        model.load(slot, values, "float32")
    return model


def cases(model: _core.Model, draft: _core.Model, vocabulary: int, new: int) -> list[Case]:
    """All cases; `new` tokens a sequence."""
    rng = np.random.default_rng(1)

    def prompt(tokens: int) -> npt.NDArray[np.int32]:
        return rng.integers(0, vocabulary, tokens).astype(np.int32)

    def start(prompts: Sequence[Any], lengths: int | list[int], **options: Any) -> Callable[[], Any]:
        counts = [lengths] * len(prompts) if isinstance(lengths, int) else lengths
        return lambda: _core.Generation(
            model, prompts, sampling={}, max_new_tokens=counts, eos=[], seed=0, kv_dtype="float32", **options
        )

    once_around = (np.arange(_PERIOD) % _PERIOD).astype(np.int32)
    system = prompt(256)
    alike = [np.concatenate([system, prompt(16)]) for _ in range(16)]
    several = [prompt(16) for _ in range(16)]
    uneven = [int(length) for length in rng.integers(new // 8 + 1, 2 * new, 32)]
    queue = [prompt(16) for _ in uneven]
    text, batch = "a text that repeats itself", "16 sequences"
    shared, order = "16 prompts, 256 of 272 tokens alike", "32 sequences of uneven length, 8 at a time"
    return [
        Case(text, "plain", start([once_around], 2 * new)),
        *(Case(text, f"prompt lookup, {k}", start([once_around], 2 * new, draft_tokens=k)) for k in (4, 10)),
        Case(text, "draft model", start([once_around], 2 * new, draft_tokens=8, draft_model=draft)),
        Case(batch, "one by one", start(several, new, max_batch_size=1)),
        *(Case(batch, f"{size} at a time", start(several, new, max_batch_size=size)) for size in (4, 8, 16)),
        # A prompt that begins with another token shares nothing.
        Case(
            shared,
            "beginnings made different",
            start([np.append([i], p[1:]).astype(np.int32) for i, p in enumerate(alike)], 2),
        ),
        Case(shared, "computed once", start(alike, 2)),
        Case(order, "the next ones wait for the slowest", _in_turns(start, queue, uneven)),
        Case(order, "the next one as one ends", start(queue, uneven, max_batch_size=8)),
    ]


class _InTurns:
    """Batches of 8, one after the other, as one generation."""

    def __init__(self, parts: list[Any]) -> None:
        self._parts = parts

    @property
    def counts(self) -> dict[str, int]:
        return {key: sum(part.counts[key] for part in self._parts) for key in self._parts[0].counts}

    def run(self, steps: int) -> list[Any]:
        return [event for part in self._parts for event in part.run(steps)]


def _in_turns(start: Callable[..., Any], prompts: list[Any], lengths: list[int]) -> Callable[[], Any]:
    makes = [start(prompts[at : at + 8], lengths[at : at + 8]) for at in range(0, len(prompts), 8)]
    return lambda: _InTurns([make() for make in makes])


def main(arguments: Sequence[str] | None = None) -> None:
    """Times every case in interleaved rounds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation", description=__doc__)
    parser.add_argument("--layers", type=int, default=6, help="of the model; the draft model has one")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--tokens", type=int, default=64, help="a sequence")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=_core.default_threads()[0])
    parser.add_argument("--isa", default="")
    parser.add_argument("--save", action="store_true", help="write the result to --results")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)

    machine = hardware.describe()
    backend = _core.Backend("cpu", options.threads, options.isa)
    shape = dataclasses.replace(TINYLLAMA_1_1B, layers=options.layers)
    model = repeating_model(backend, shape, options.dtype)
    draft = repeating_model(backend, dataclasses.replace(shape, layers=1), options.dtype)
    all_cases = cases(model, draft, shape.vocabulary, options.tokens)
    records: list[dict[str, Any]] = [{"group": case.group, "case": case.name, "seconds": []} for case in all_cases]
    for number in range(options.rounds):
        for case, record in zip(all_cases, records, strict=True):
            print(f"round {number + 1}: {case.group}, {case.name}", file=sys.stderr)
            generation = case.make()
            started = time.perf_counter()
            record["tokens"] = len(generation.run(1 << 20))
            record["seconds"].append(time.perf_counter() - started)
            record.update(generation.counts)
    columns = ["what", "how", "tokens/s", "median", "passes", "tokens run", "against the first"]
    title = f"{options.dtype}, {options.layers} layers, {backend.isa}, {options.threads} threads"
    table = report.Table(title, columns, left=2)
    first: dict[str, float] = {}
    for record in records:
        seconds = min(record["seconds"])
        gain = first.setdefault(record["group"], seconds) / seconds
        record["against_first"] = gain
        cells = [f"{record['tokens'] / time_:,.1f}" for time_ in (seconds, statistics.median(record["seconds"]))]
        table.rows.append(
            [
                record["group"],
                record["case"],
                *cells,
                f"{record['passes']:,}",
                f"{record['tokens_run']:,}",
                f"{gain:.2f} x",
            ]
        )
    print(report.machine_line(machine))
    report.print_tables([table])
    if options.save:
        notes = [__doc__.strip(), "Tokens/s count prompts into the time; the best of the rounds, and the median."]
        data = {"machine": machine, "isa": backend.isa, "threads": options.threads, "cases": records}
        for file in report.save("Generation", notes, [table], data, options.results, "generation"):
            print(f"wrote {file}")


if __name__ == "__main__":
    main()
