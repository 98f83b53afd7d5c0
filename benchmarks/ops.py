"""Every operation by itself, in the sizes of a real model, as shares of what the machine allows.

Example:
    python -m benchmarks.ops --only matmul --isa avx2
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import hardware, limits, report
from benchmarks.accounting import TINYLLAMA_1_1B
from benchmarks.limits import Limits

__all__ = ["main", "parse_arguments", "share_of_limit"]

_OPS = ("matmul", "feed_forward", "attention", "small")
_VARIANTS = ("float32", "bfloat16", "bfloat16 exact", "int8", "int8 exact", "int4", "int4 exact")
_DEFAULT_ROWS = "1,2,4,8,16,64,512"
_DEFAULT_LENGTHS = "128,512,2048"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", type=_words(_OPS), default=list(_OPS), help=f"of {','.join(_OPS)}")
    parser.add_argument("--variants", type=_words(_VARIANTS), default=list(_VARIANTS), help=f"of {','.join(_VARIANTS)}")
    parser.add_argument("--rows", type=_numbers, default=_numbers(_DEFAULT_ROWS), help=f"of x ({_DEFAULT_ROWS})")
    parser.add_argument("--lengths", type=_numbers, default=_numbers(_DEFAULT_LENGTHS), help="of sequences")
    parser.add_argument("--isa", default="", help="instruction set; without it the best")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each case (0.5); each runs five times at least")
    parser.add_argument("--rotate-mib", type=int, help="copies of the weights in all (twice the last-level cache)")
    parser.add_argument("--cache", type=Path, default=limits.default_cache(), help="for the compiled probe")
    parser.add_argument("--save", action="store_true", help="write JSON and Markdown to benchmarks/results")
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="another directory for --save")
    return parser.parse_args(arguments)


def _words(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        words = [word.strip() for word in text.split(",")]
        unknown = [word for word in words if word not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
        return words

    return parse


def _numbers(text: str) -> list[int]:
    numbers = [int(word) for word in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {min(numbers)}")
    return numbers


def share_of_limit(flop: int, nbytes: int, seconds: float, peak: float, read: float) -> tuple[float, str]:
    """How near to the limit something came: the least time that arithmetic and reading allow, over the time it took.

    Args:
        flop, nbytes: The work.
        seconds: The time.
        peak: GFLOP/s.
        read: GB/s.

    Returns:
        The share, and which of "compute" and "read" is the limit.
    """
    by_compute, by_read = flop / (peak * 1e9), nbytes / (read * 1e9)
    return max(by_compute, by_read) / seconds, "compute" if by_compute >= by_read else "read"


def time_runs(run: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each run, after one that warms up."""
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def _rotate_bytes(megabytes: int | None) -> int:
    """Twice the cache, so that nothing is left of a copy when its turn comes again; but not most of the memory."""
    if megabytes is not None:
        return megabytes << 20
    return min(2 * hardware.last_level_cache_bytes(), hardware.available_memory_bytes() // 4)


def _cases(options: argparse.Namespace, backend: Any) -> Iterator[Any]:
    from benchmarks import ops_cases

    shape = TINYLLAMA_1_1B
    rotate = _rotate_bytes(options.rotate_mib)
    caches = [dtype for dtype in ("float32", "bfloat16") if dtype in options.variants]
    if "matmul" in options.only:
        yield from ops_cases.matrix_cases(backend, shape, options.variants, options.rows, rotate)
    if "feed_forward" in options.only:
        yield from ops_cases.feed_forward_cases(backend, shape, options.variants, options.rows, rotate)
    if "attention" in options.only:
        yield from ops_cases.attention_cases(backend, shape, caches, options.lengths)
    if "small" in options.only:
        yield from ops_cases.small_cases(backend, shape)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = parse_arguments(arguments)
    from llama_ext import _core

    machine = hardware.describe()
    probes = [limits.probe([options.threads], cache=options.cache)]
    backend = _core.Backend("cpu", options.threads, options.isa)
    records: list[dict[str, Any]] = []
    for case in _cases(options, backend):
        print(f"{case.op} {case.size} {case.variant}", file=sys.stderr)
        times = time_runs(case.run, options.seconds)
        record = {field.name: getattr(case, field.name) for field in dataclasses.fields(case) if field.name != "run"}
        records.append({**record, "best_seconds": min(times), "median_seconds": statistics.median(times)})
    probes.append(limits.probe([options.threads], cache=options.cache))
    best = limits.best_of(probes)

    columns = ["op", "size", "weights", "best", "median", "GFLOP/s", "GB/s", "of limit", "limit"]
    table = report.Table(f"Operations, {backend.isa}, {options.threads} threads", columns, left=3)
    table.rows = [_row(record, best, options.threads, backend.isa) for record in records]
    tables = [report.limits_table(best, probes), table]
    print(report.machine_line(machine))
    report.print_tables(tables)
    if options.save:
        data = {
            "machine": machine,
            "isa": backend.isa,
            "threads": options.threads,
            "build": _core.build_info(),
            "probes": [probe.to_dict() for probe in probes],
            "operations": records,
        }
        notes = ["What the columns mean is in benchmarks/README.md."]
        suffix = f"ops-{backend.isa}"
        for file in report.save("Operations", notes, tables, data, options.results, suffix):
            print(f"wrote {file}")


def _row(record: dict[str, Any], best: Limits, threads: int, isa: str) -> list[str]:
    """The cells of one case; adds its share to the record."""
    seconds = record["best_seconds"]
    cells = [record["op"], record["size"], record["variant"], _time(seconds), _time(record["median_seconds"])]
    cells += [f"{record['flop'] / seconds / 1e9:,.1f}", f"{record['bytes'] / seconds / 1e9:,.1f}"]
    if record["kind"] is None:
        return [*cells, "-", ""]
    instruction, peak = best.best_peak(record["kind"], threads, isa)
    share, bound = share_of_limit(record["flop"], record["bytes"], seconds, peak, best.read[threads])
    record["share_of_limit"], record["limit"] = share, instruction if bound == "compute" else "read"
    return [*cells, report.percent(share), record["limit"]]


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


if __name__ == "__main__":
    main()
