"""Training speed beside transformers on torch, as a share of the float32 peak probed in the same run; and a loss to compare.

Example:
    python -m benchmarks.training --peer-python /path/to/peers/bin/python
    python -m benchmarks.training --loss tinyshakespeare.txt --seeds 3 --rounds 0 --dtypes float32 --save

Shares count 6 operations a token for each weight of a product; attention's products and everything else are not counted. With --loss the
small setting is trained to its end by each engine, and scored on the whole validation split; --rounds 0 does nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import hardware, limits, report, training_losses
from benchmarks.training_runner import RESULT, SETTINGS, matmul_parameters

__all__ = ["Trained", "main", "row_of"]


@dataclasses.dataclass
class Trained:
    """An engine in one setting.

    Attributes:
        engine: llama_ext or torch.
        dtype: Of the products.
        setting: A key of SETTINGS.
        results: One for each round.
    """

    engine: str
    dtype: str
    setting: str
    results: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def rates(self) -> list[float]:
        """Tokens per second of every step of all rounds."""
        return [rate for result in self.results for rate in result.get("rates", [])]


def run_once(run: Trained, options: argparse.Namespace) -> dict[str, Any]:
    """One process, timed."""
    arguments = ["--setting", run.setting, "--seconds", str(options.seconds)]
    return _process("benchmarks.training_runner", run.engine, run.dtype, arguments, options)


def train_to_the_end(engine: str, dtype: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One process: the small setting's loss after all its steps."""
    arguments = [str(options.loss.resolve()), "--seed", str(seed)]
    result = _process("benchmarks.training_losses", engine, dtype, arguments, options)
    return {"engine": engine, "dtype": dtype, "seed": seed, **result}


def _process(
    module: str, engine: str, dtype: str, arguments: Sequence[str], options: argparse.Namespace
) -> dict[str, Any]:
    python = sys.executable if engine == "llama_ext" else str(options.peer_python or sys.executable)
    command = [python, "-m", module, "--engine", engine, "--dtype", dtype, "--threads", str(options.threads)]
    folder = Path(__file__).parents[1]
    found = subprocess.run([*command, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    lines = [line for line in found.stdout.splitlines() if line.startswith(RESULT)]
    if not lines:
        return {"error": f"failed ({found.returncode}): {found.stderr[-500:]}"}
    result: dict[str, Any] = json.loads(lines[-1].removeprefix(RESULT))
    return result


def row_of(run: Trained, peak: float) -> tuple[list[str], dict[str, Any]]:
    """One row of the table, and the same for JSON. peak: GFLOP/s in float32."""
    rates = run.rates()
    flop = 6 * matmul_parameters(SETTINGS[run.setting])
    best, median = max(rates), statistics.median(rates)
    memory = min(result["grown_memory_bytes"] for result in run.results if "rates" in result)
    record = {
        **dataclasses.asdict(run),
        "best": best,
        "median": median,
        "share_of_float32_peak": best * flop / (peak * 1e9),
    }
    cells = [run.setting, run.engine, run.dtype, f"{best:,.0f}", f"{median:,.0f}"]
    cells += [report.percent(best * flop / (peak * 1e9)), report.percent(median * flop / (peak * 1e9))]
    return [*cells, f"{memory / 2**20:,.0f}"], record


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer-python", type=Path, help="an interpreter that has torch and transformers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="of timed steps; 0: none")
    parser.add_argument("--seconds", type=float, default=8.0, help="for each engine in a round")
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
    for number in range(options.rounds):
        for run in runs:
            result = run_once(run, options)
            run.results.append(result)
            probes.append(limits.probe([options.threads], seconds=0.1))
            shown = result.get("error") or f"{max(result['rates']):,.0f} tok/s"
            print(f"round {number + 1}: {run.setting} {run.engine} {run.dtype}: {shown}", file=sys.stderr)

    best = limits.best_of(probes)
    peak = max(rates[options.threads] for name, rates in best.peak.items() if name.startswith("f32_fma"))
    columns = ["setting", "engine", "products", "tok/s", "median", "of f32 peak", "median", "memory MiB"]
    table = report.Table(f"Training, {options.threads} threads", columns, left=3)
    records = []
    missing = []
    for run in runs:
        if not run.results:
            continue
        if not run.rates():
            missing.append(f"{run.setting} {run.engine} {run.dtype}: {run.results[0].get('error')}")
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
            + ".",
            f"{options.rounds} interleaved rounds of {options.seconds} s. Memory: what the process grew by, imports included.",
        ]
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
            "losses": losses,
            "missing": missing,
        }
        for file in report.save("Training", notes, tables, data, options.results, suffix="training"):
            print(f"wrote {file}")


if __name__ == "__main__":
    main()
