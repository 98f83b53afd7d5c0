"""Generation of several sequences and with guesses: batches, prompts that share a beginning, speculation.

Example:
    python -m benchmarks.generation
    python -m benchmarks.generation --only rows --dtype int4,int8 --layers 22 --threads 2

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
from llama_ext.runtime.weight_types import group_for

__all__ = ["GROUPS", "Case", "cases", "main", "repeating_model", "time_case"]

_PERIOD = 48
_DTYPES = ("float32", "bfloat16", "int8", "int4")
_ROWS = (1, 4, 8, 16)
# By a word for --only.
GROUPS = {
    "text": "a text that repeats itself",
    "rows": "tokens one by one after the prompts",
    "sequences": "16 sequences",
    "shared": "16 prompts, 256 of 272 tokens alike",
    "order": "32 sequences of uneven length, 8 at a time",
}


@dataclasses.dataclass
class Case:
    """What is generated, and how.

    Attributes:
        group: The work; the first case of a group is what the others are compared with.
        name: How this one does it.
        make: Begins a generation.
        rows: How many sequences must have begun before the clock does; 0 times the prompts, too.
    """

    group: str
    name: str
    make: Callable[[], Any]
    rows: int = 0


def repeating_model(backend: _core.Backend, shape: ModelShape, dtype: str) -> _core.Model:
    """A model whose texts have a period of 48 tokens: layers add little, and the head answers with the next token.

    int8 and int4 are kept as `from_pretrained` keeps them: groups of 128, or less where the rows are shorter, and int8 for
    embedding and head.
    """
    config: dict[str, Any] = {**dataclasses.asdict(shape), "context": 2048, "rope": {}}
    model = _core.Model(backend, config, _types(shape, dtype))
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


def _types(shape: ModelShape, dtype: str) -> dict[str, tuple[str, int]]:
    if dtype not in ("int8", "int4"):
        return {"": (dtype, 0)}
    types = {slot: ("int8", group_for(shape.width)) for slot in ("embedding", "head")}
    for layer in range(shape.layers):
        types[f"layers.{layer}.o"] = (dtype, group_for(shape.heads * shape.head_dim))
        types[f"layers.{layer}.down"] = (dtype, group_for(shape.ffn_width))
    return {"": (dtype, group_for(shape.width)), **types}


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
    text, rows, batch, shared, order = GROUPS.values()
    return [
        Case(text, "plain", start([once_around], 2 * new)),
        *(Case(text, f"prompt lookup, {k}", start([once_around], 2 * new, draft_tokens=k)) for k in (4, 10)),
        Case(text, "draft model", start([once_around], 2 * new, draft_tokens=8, draft_model=draft)),
        *(Case(rows, f"{size} row{'s' if size > 1 else ''}", start(several[:size], new), size) for size in _ROWS),
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


def time_case(case: Case) -> dict[str, Any]:
    """Runs a case once.

    Args:
        case: Which.

    Returns:
        "seconds", "tokens" (those that came in them), and what the generation counts, all since the clock began.
    """
    generation = case.make()
    begun: set[int] = set()
    while len(begun) < case.rows:
        begun.update(row for row, *_ in generation.run(1))
    before = generation.counts
    started = time.perf_counter()
    tokens = len(generation.run(1 << 20))
    seconds = time.perf_counter() - started
    counts = {key: count - before[key] for key, count in generation.counts.items()}
    return {"seconds": seconds, "tokens": tokens, **counts}


def _words(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        words = [word.strip() for word in text.split(",")]
        unknown = [word for word in words if word not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
        return words

    return parse


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generation", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--layers", type=int, default=6, help="of the model (6); the draft model has one")
    parser.add_argument("--dtype", type=_words(_DTYPES), default=["bfloat16"], help=f"of {','.join(_DTYPES)}")
    parser.add_argument("--only", type=_words(list(GROUPS)), default=list(GROUPS), help=f"of {','.join(GROUPS)}")
    parser.add_argument("--tokens", type=int, default=64, help="a sequence")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=_core.default_threads()[0])
    parser.add_argument("--isa", default="")
    parser.add_argument("--save", action="store_true", help="write the result to --results")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args(arguments)


def _run_dtype(backend: _core.Backend, dtype: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Times every case with weights of one type, in interleaved rounds."""
    shape = dataclasses.replace(TINYLLAMA_1_1B, layers=options.layers)
    model = repeating_model(backend, shape, dtype)
    draft = repeating_model(backend, dataclasses.replace(shape, layers=1), dtype)
    wanted = {GROUPS[word] for word in options.only}
    all_cases = [case for case in cases(model, draft, shape.vocabulary, options.tokens) if case.group in wanted]
    records: list[dict[str, Any]] = [
        {"dtype": dtype, "group": case.group, "case": case.name, "seconds": []} for case in all_cases
    ]
    for number in range(options.rounds):
        for case, record in zip(all_cases, records, strict=True):
            print(f"round {number + 1}: {dtype}, {case.group}, {case.name}", file=sys.stderr)
            timed = time_case(case)
            record["seconds"].append(timed.pop("seconds"))
            record.update(timed)
    first: dict[str, float] = {}
    for record in records:
        record["tokens_per_second"] = [record["tokens"] / seconds for seconds in record["seconds"]]
        best = max(record["tokens_per_second"])
        record["against_first"] = best / first.setdefault(record["group"], best)
    return records


def _table(title: str, records: Sequence[dict[str, Any]]) -> report.Table:
    columns = ["what", "how", "tokens/s", "median", "passes", "tokens run", "against the first"]
    table = report.Table(title, columns, left=2)
    for record in records:
        rates = record["tokens_per_second"]
        cells = [f"{rate:,.1f}" for rate in (max(rates), statistics.median(rates))]
        cells += [f"{record['passes']:,}", f"{record['tokens_run']:,}", f"{record['against_first']:.2f} x"]
        table.rows.append([record["group"], record["case"], *cells])
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = parse_arguments(arguments)
    machine = hardware.describe()
    backend = _core.Backend("cpu", options.threads, options.isa)
    records: list[dict[str, Any]] = []
    tables = []
    for dtype in options.dtype:
        of_dtype = _run_dtype(backend, dtype, options)
        records += of_dtype
        tables.append(_table(f"{dtype}, {options.layers} layers, {backend.isa}, {options.threads} threads", of_dtype))
    print(report.machine_line(machine))
    report.print_tables(tables)
    if options.save:
        notes = [
            (__doc__ or "").split("Example:")[0].strip(),
            (__doc__ or "").strip().split("\n\n")[-1],
            "Tokens/s count prompts into the time, except one by one after them; the best of the rounds, and the median.",
        ]
        data = {"machine": machine, "isa": backend.isa, "threads": options.threads, "cases": records}
        for file in report.save("Generation", notes, tables, data, options.results, "generation"):
            print(f"wrote {file}")


if __name__ == "__main__":
    main()
