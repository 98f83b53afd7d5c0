"""Training speed beside transformers on torch, as a share of the float32 peak probed in the same run; and a loss to compare.

Example:
    python -m benchmarks.training --peer-python /path/to/peers/bin/python
    python -m benchmarks.training --loss tinyshakespeare.txt --seeds 3 --rounds 0 --dtypes float32 --save

Engines take turns of a second or so, in processes that wait for each other: what disturbs a machine for longer disturbs both, and the ratio
of two turns that follow each other says more than two rates.

Shares count 6 operations a token for each weight of a product; attention's products and everything else are not counted. With --loss the
small setting is trained to its end by each engine, and scored on the whole validation split; --rounds 0 does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import hardware, limits, report, training_losses
from benchmarks.measure import RESULT
from benchmarks.training_runner import SETTINGS, matmul_parameters

__all__ = ["Trained", "main", "ratio_of", "row_of"]

_FOLDER = Path(__file__).parents[1]
# Seconds between turns, in which threads that wait by spinning go to sleep.
_PAUSE = 0.3
# Seconds for each limit that is probed after a round.
_PROBE = 0.05


@dataclasses.dataclass
class Trained:
    """An engine in one setting.

    Attributes:
        engine: llama_ext or torch.
        dtype: Of the products.
        setting: A key of SETTINGS.
        facts: Versions and settings, or what went wrong.
        results: One for each turn.
    """

    engine: str
    dtype: str
    setting: str
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    results: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def rates(self) -> list[float]:
        """Tokens per second of every step of all rounds."""
        return [rate for result in self.results for rate in result.get("rates", [])]

    def error(self) -> str | None:
        """What ended it, if something did."""
        error: str | None = (self.results[-1] if self.results else self.facts).get("error")
        return error


class Runner:
    """A process that trains when it is told to.

    Args:
        run: What it does, and where its results go.
        options: The command's.
    """

    def __init__(self, run: Trained, options: argparse.Namespace) -> None:
        self.run = run
        self._process = subprocess.Popen(
            [*_command("benchmarks.training_runner", run.engine, run.dtype, options), "--setting", run.setting],
            cwd=_FOLDER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        run.facts = self._answer()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # which ends its input

    def turn(self, seconds: float) -> None:
        """Trains for so long, one step at least; not once it has failed."""
        if self.run.error():
            return
        assert self._process.stdin
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        self.run.results.append(self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        others = ""
        for line in self._process.stdout:
            if line.startswith(RESULT):
                answer: dict[str, Any] = json.loads(line.removeprefix(RESULT))
                return answer
            others += line
        return {"error": f"failed ({self._process.wait()}): {others[-500:]}"}


def peak_of(limit: limits.Limits, threads: int) -> float:
    """GFLOP/s in float32."""
    return limit.best_peak("f32", threads)[1]


def take_turns(runs: Sequence[Trained], options: argparse.Namespace) -> list[limits.Limits]:
    """All rounds of the engines of one setting and dtype. Who goes first changes from round to round.

    Returns:
        What the machine allowed after each round. Turns have its float32 peak as `peak`.
    """
    probes = []
    with contextlib.ExitStack() as stack:
        runners = [stack.enter_context(Runner(run, options)) for run in runs]
        for number in range(options.rounds):
            for runner in runners if number % 2 == 0 else reversed(runners):
                time.sleep(_PAUSE)
                runner.turn(options.seconds)
            probes.append(limits.probe([options.threads], seconds=_PROBE))
            for run in runs:
                if not run.error():
                    run.results[-1]["peak"] = peak_of(probes[-1], options.threads)
    return probes


def train_to_the_end(engine: str, dtype: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One process: the small setting's loss after all its steps."""
    command = _command("benchmarks.training_losses", engine, dtype, options)
    command += [str(options.loss.resolve()), "--seed", str(seed)]
    found = subprocess.run(command, cwd=_FOLDER, capture_output=True, text=True, check=False)
    lines = [line for line in found.stdout.splitlines() if line.startswith(RESULT)]
    if lines:
        result = json.loads(lines[-1].removeprefix(RESULT))
    else:
        result = {"error": f"failed ({found.returncode}): {found.stderr[-500:]}"}
    return {"engine": engine, "dtype": dtype, "seed": seed, **result}


def _command(module: str, engine: str, dtype: str, options: argparse.Namespace) -> list[str]:
    python = sys.executable if engine == "llama_ext" else str(options.peer_python or sys.executable)
    return [python, "-m", module, "--engine", engine, "--dtype", dtype, "--threads", str(options.threads)]


def ratio_of(first: Trained, second: Trained) -> list[float] | None:
    """Tokens per second of one engine over another's, of the medians of turns that follow each other.

    Returns:
        The lower quartile, the median and the upper quartile of all pairs; None where there are not two.
    """
    pairs = [
        statistics.median(a["rates"]) / statistics.median(b["rates"])
        for a, b in zip(first.results, second.results, strict=False)
        if "rates" in a and "rates" in b
    ]
    return statistics.quantiles(pairs, n=4, method="inclusive") if len(pairs) > 1 else None


def row_of(run: Trained, peak: float) -> tuple[list[str], dict[str, Any]]:
    """One row of the table, and the same for JSON. peak: GFLOP/s in float32."""
    rates = run.rates()
    flop = 6 * matmul_parameters(SETTINGS[run.setting])
    best, median = max(rates), statistics.median(rates)
    turns = [turn for turn in run.results if "rates" in turn]
    beside = statistics.median(statistics.median(turn["rates"]) * flop / (turn["peak"] * 1e9) for turn in turns)
    memory = max(turn["grown_memory_bytes"] for turn in turns)
    record = {
        **dataclasses.asdict(run),
        "best": best,
        "median": median,
        "share_of_float32_peak": best * flop / (peak * 1e9),
        "share_of_peak_beside_it": beside,
    }
    cells = [run.setting, run.engine, run.dtype, f"{best:,.0f}", f"{median:,.0f}"]
    cells += [report.percent(best * flop / (peak * 1e9)), report.percent(beside)]
    return [*cells, f"{memory / 2**20:,.0f}"], record


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer-python", type=Path, help="an interpreter that has torch and transformers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=16, help="turns of each engine; 0: none")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn, one step at least")
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--only", choices=("llama_ext", "torch"))
    parser.add_argument(
        "--loss", type=Path, metavar="TEXT", help="also train the small setting to its end on this text"
    )
    parser.add_argument("--seeds", type=int, default=1, help="of those trainings")
    parser.add_argument("--save", action="store_true", help="write the result to --results")
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = parse_arguments(arguments)
    machine = hardware.describe()
    engines = [options.only] if options.only else ["llama_ext", "torch"]
    runs = [
        Trained(engine, dtype, setting)
        for setting in options.settings.split(",")
        for dtype in options.dtypes.split(",")
        for engine in engines
    ]
    probes = [limits.probe([options.threads], seconds=0.2)]
    contests = [list(group) for _, group in itertools.groupby(runs, key=lambda run: (run.setting, run.dtype))]
    for contest in contests if options.rounds else []:
        probes += take_turns(contest, options)
        for run in contest:
            shown = run.error() or f"{statistics.median(run.rates()):,.0f} tok/s"
            print(f"{run.setting} {run.engine} {run.dtype}: {shown}", file=sys.stderr)

    best = limits.best_of(probes)
    peak = peak_of(best, options.threads)
    columns = ["setting", "engine", "products", "tok/s", "median", "of f32 peak", "beside it", "memory MiB"]
    table = report.Table(f"Training, {options.threads} threads", columns, left=3)
    records = []
    missing = []
    for run in runs:
        if run.error():
            missing.append(f"{run.setting} {run.engine} {run.dtype}: {run.error()}")
        if not run.rates():
            continue
        cells, record = row_of(run, peak)
        table.rows.append(cells)
        records.append(record)
    losses = []
    if options.loss:
        kinds = itertools.product(options.dtypes.split(","), range(options.seeds), engines)
        for dtype, seed, engine in kinds:
            losses.append(train_to_the_end(engine, dtype, seed, options))
            print(losses[-1], file=sys.stderr)
    notes = []
    if options.rounds:
        weights = [f"{matmul_parameters(SETTINGS[name]):,} weights of products ({name})" for name in SETTINGS]
        notes = [
            f"Shares are of {peak:,.0f} GFLOP/s, the best float32 probe of the run, counting 6 operations a token for each of "
            + ", ".join(weights)
            + "; beside it: the median of turns, each of the peak probed after its round.",
            f"{options.rounds} turns of {options.seconds} s each, one step at least. Memory: what the process grew by, imports included.",
        ]
    ratios = []
    for contest in contests:
        quartiles = ratio_of(contest[0], contest[1]) if len(contest) == 2 else None
        if quartiles is None:
            continue
        first, second = contest
        ratios.append({"setting": first.setting, "dtype": first.dtype, "quartiles": quartiles})
        low, middle, high = (f"{each:.2f}" for each in quartiles)
        notes.append(
            f"{first.setting} {first.dtype}: {first.engine} trains {middle} x as fast as {second.engine}, the median of turns that follow each "
            f"other (quartiles {low} and {high})."
        )
    notes += [*missing, *training_losses.summary(losses)]
    tables = [report.limits_table(best, probes), *([table] if table.rows else [])]
    tables += [training_losses.table(losses)] if losses else []
    print(report.machine_line(machine))
    report.print_tables(tables)
    print("\n".join(notes))
    if options.save:
        data = {
            "machine": machine,
            "probes": [probe.to_dict() for probe in probes],
            "engines": records,
            "ratios": ratios,
            "losses": losses,
            "missing": missing,
        }
        for file in report.save("Training", notes, tables, data, options.results, suffix="training"):
            print(f"wrote {file}")


if __name__ == "__main__":
    main()
