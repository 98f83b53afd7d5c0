"""Prefill and decode of a whole model as shares of what the machine allows, beside other engines, in one run.

Example:
    python -m benchmarks.model --save
    python -m benchmarks.model --peer-python ../peers/bin/python --gguf model-q4_0.gguf --genai genai-int4
    python -m benchmarks.model --peer-python ../peers/bin/python --prepared
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import hardware, limits, measure, report
from benchmarks.accounting import TINYLLAMA_1_1B, ModelShape
from benchmarks.limits import Limits
from benchmarks.prepare_peers import prepared
from benchmarks.random_model import ensure_model

__all__ = ["EngineRun", "main", "parse_arguments", "planned_engines", "row_of"]

ROOT = Path(__file__).resolve().parents[1]
_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}
_KIND = {"float32": "f32", "float16": "f32", "bfloat16": "bf16", "int8": "int8", "int4": "int8"}
# Engines with files of their own: a name for people, the runner, and the option of it and of this command.
_PEERS = (
    ("llama.cpp", "llama_cpp_runner", "gguf"),
    ("OpenVINO GenAI", "openvino_genai_runner", "openvino"),
    ("onnxruntime-genai", "onnxruntime_genai_runner", "genai"),
    ("CTranslate2", "ctranslate2_runner", "ctranslate2"),
)


@dataclasses.dataclass
class EngineRun:
    """One engine with one kind of weights, and what it has shown.

    Attributes:
        engine, weights: Names for people.
        kind: "f32", "bf16" or "int8": the arithmetic that prefill is compared with.
        bytes_per_weight: Of stored weights; None when the runner says what it reads for a token.
        command: The interpreter, module and options, without those that all runners have.
        results: What each round's process printed.
        probes: Indices of the probes of the limits before each round; the next one was made after it.
    """

    engine: str
    weights: str
    kind: str
    bytes_per_weight: float | None
    command: list[str]
    results: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    probes: list[int] = dataclasses.field(default_factory=list)

    @property
    def error(self) -> str | None:
        """Why there is nothing to show, or None."""
        return next((str(result["error"]) for result in self.results if "error" in result), None)

    def rates(self, what: str) -> list[float]:
        """All rounds' samples of "prefill" or "decode", tok/s."""
        return [rate for result in self.results for rate in result.get(what, [])]

    def decode_bytes(self, shape: ModelShape) -> int | None:
        """The weights read for one token."""
        if self.bytes_per_weight is not None:
            return shape.decode_bytes(self.bytes_per_weight)
        said = self.results[-1].get("decode_bytes") if self.results else None
        return int(said) if said else None


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a checkpoint; without it one of random weights is generated")
    parser.add_argument("--layers", type=int, help="of the generated model (22); fewer make a quick trial")
    parser.add_argument("--cache", type=Path, default=limits.default_cache(), help="for what is generated or compiled")
    parser.add_argument("--prompt", type=_positive, default=512, help="tokens of the prompt (512)")
    parser.add_argument("--tokens", type=_positive, default=32, help="tokens decoded after it (32)")
    parser.add_argument("--threads", type=_positive, default=2)
    parser.add_argument("--rounds", type=_positive, default=2, help="times that each engine is started, in turn (2)")
    parser.add_argument("--repeats", type=_positive, default=3, help="measurements in each round (3)")
    parser.add_argument("--isa", help="instruction set of llama_ext; without it the best")
    parser.add_argument("--only", default="", help="engines, by words of their names, with commas: llama_ext,llama.cpp")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has the other engines")
    parser.add_argument("--gguf", type=Path, action="append", default=[], help="a file for llama.cpp, may be repeated")
    parser.add_argument("--openvino", type=Path, action="append", default=[], help="a directory for OpenVINO GenAI")
    parser.add_argument("--genai", type=Path, action="append", default=[], help="a directory for onnxruntime-genai")
    parser.add_argument("--ctranslate2", type=Path, action="append", default=[], help="a directory for CTranslate2")
    parser.add_argument("--onnx", type=Path, action="append", default=[], help="an .onnx file of llama-ext export-onnx")
    parser.add_argument("--prepared", action="store_true", help="also whatever benchmarks.prepare_peers has made")
    parser.add_argument("--save", action="store_true", help="write JSON and Markdown to benchmarks/results")
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="another directory for --save")
    options = parser.parse_args(arguments)
    if options.model is not None and options.layers is not None:
        parser.error("--layers is of the generated model; it does not go with --model")
    if options.model is not None and options.prepared:
        parser.error("--prepared files are of the generated model; they do not go with --model")
    return options


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def planned_engines(options: argparse.Namespace, model: Path) -> list[EngineRun]:
    """What to run, in order."""
    runs = []
    for weights, dtype, more in (
        ("float32", "float32", ()),
        ("float16", "float16", ()),
        ("bfloat16", "bfloat16", ()),
        ("bfloat16 exact", "bfloat16", ("--compute", "exact")),
        ("int8", "int8", ()),
        ("int4", "int4", ()),
        ("int4 g32", "int4", ("--group-size", "32")),
    ):
        kind = "f32" if "exact" in more else _KIND[dtype]
        runs.append(EngineRun("llama_ext", weights, kind, _BYTES.get(dtype), _ours(model, dtype, *more)))
    for path in options.gguf:
        # Others of these files hold the same floating-point weights as the checkpoint.
        if _kind_of_name(_stem(path)) == "int8":
            command = _ours(path.resolve(), "auto")
            runs.append(EngineRun("llama_ext", f"{_stem(path)} (GGUF)", "int8", None, command))
    for graph in options.onnx:
        directory = graph.resolve().parent.parent
        command = [sys.executable, "-m", "benchmarks.engines.ort_model_runner", "--onnx", str(directory)]
        kind = "int8" if graph.stem in ("model_quantized", "model_q4") else "f32"
        command += ["--variant", graph.stem]
        runs.append(EngineRun("onnxruntime", f"{directory.name}/{graph.stem}", kind, None, command))
    for dtype in ("float32", "bfloat16"):
        command = [options.peer_python, "-m", "benchmarks.peers.transformers_runner", "--model", str(model)]
        runs.append(EngineRun("transformers", dtype, _KIND[dtype], _BYTES[dtype], [*command, "--dtype", dtype]))
    for name, module, option in _PEERS:
        for path in getattr(options, option):
            command = [options.peer_python, "-m", f"benchmarks.peers.{module}", f"--{option}", str(path.resolve())]
            runs.append(EngineRun(name, _stem(path), _kind_of_name(_stem(path)), None, command))
        if not getattr(options, option):
            note = EngineRun(name, "", "f32", None, [])
            note.results.append({"error": f"not run: no --{option} given"})
            runs.append(note)
    wanted = [word.strip() for word in options.only.split(",") if word.strip()]
    return [run for run in runs if not wanted or any(word in f"{run.engine} {run.weights}" for word in wanted)]


def _ours(model: Path, dtype: str, *more: str) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.engines.llama_ext_runner", "--model", str(model), "--dtype", dtype]
    return [*command, *more]


def _stem(path: Path) -> str:
    """What people call it: the file without .gguf, the directory whole."""
    return path.stem if path.suffix == ".gguf" else path.name


def _kind_of_name(name: str) -> str:
    """The arithmetic of a file, by its name: quantised weights meet int8 activations."""
    words = name.lower().replace("_", "-").replace(".", "-").split("-")
    if {"f32", "fp32", "float32"} & set(words):
        return "f32"
    if {"bf16", "f16", "fp16", "bfloat16", "float16"} & set(words):
        return "bf16"
    return "int8"


def run_once(run: EngineRun, options: argparse.Namespace, shape: ModelShape) -> dict[str, Any]:
    """One round of one engine, in a process of its own, so that its memory is returned."""
    command = [*run.command, "--vocabulary", str(shape.vocabulary)]
    for name in ("threads", "prompt", "tokens", "repeats"):
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--limits", str(limits.build(options.cache))]
    environment = dict(os.environ, OMP_NUM_THREADS=str(options.threads), TOKENIZERS_PARALLELISM="false")
    if run.engine == "llama_ext" and options.isa:
        environment["LLAMA_EXT_ISA"] = options.isa
    try:
        process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    except OSError as error:
        return {"error": f"failed: {error.strerror}"}
    for line in reversed(process.stdout.splitlines()):
        if line.startswith(measure.RESULT):
            result: dict[str, Any] = json.loads(line.removeprefix(measure.RESULT))
            if str(result.get("error", "")).startswith("failed"):
                sys.stderr.write(process.stderr[-2000:])
            return result
    sys.stderr.write(process.stderr[-2000:])
    code = process.returncode
    return {"error": f"crashed: {signal.Signals(-code).name}" if code < 0 else f"failed: exit {code}"}


def run_all(runs: Sequence[EngineRun], options: argparse.Namespace, shape: ModelShape) -> list[Limits]:
    """Rounds over all engines, with a probe of the limits before each and after the last.

    Returns:
        The probes; the first has every number of threads, the others that of the engines.
    """
    probes = [limits.probe(limits.default_thread_counts(options.threads), cache=options.cache)]
    for number in range(options.rounds):
        for run in runs:
            if run.error:
                continue
            print(f"round {number + 1}: {run.engine} {run.weights} ...", end=" ", file=sys.stderr, flush=True)
            result = run_once(run, options, shape)
            run.results.append(result)
            if "error" in result:
                print(result["error"], file=sys.stderr)
                continue
            run.probes.append(len(probes) - 1)
            probes.append(limits.probe([options.threads], cache=options.cache, seconds=0.1))
            best = {what: max(result[what], default=0.0) for what in ("prefill", "decode")}
            print(f"prefill {best['prefill']:.1f}, decode {best['decode']:.2f} tok/s", file=sys.stderr)
    return probes


def row_of(
    run: EngineRun, shape: ModelShape, probes: Sequence[Limits], threads: int, prompt: int
) -> tuple[list[str], dict[str, Any]]:
    """One row of the table, and the same for JSON. Shares are of the best probe of the run.

    Args:
        run: With its results, none of them an error.
        shape: Of the model.
        probes: As `run_all` returns them.
        threads: Of the engines.
        prompt: Tokens of the prompt.

    Returns:
        The cells and the record.
    """
    best = _best_with(probes, threads)
    instruction, peak = best.best_peak(run.kind, threads)
    record: dict[str, Any] = {"engine": run.engine, "weights": run.weights, "instruction": instruction}
    decode_bytes = run.decode_bytes(shape)
    shares = {
        "prefill": shape.prefill_flop(prompt) / prompt / (peak * 1e9),
        "decode": decode_bytes / (best.read[threads] * 1e9) if decode_bytes else None,
    }
    cells = [run.engine, run.weights]
    for what, share_of_one in shares.items():
        rates = run.rates(what)
        if not rates:
            cells += ["-"] * 3
            continue
        top, middle = max(rates), statistics.median(rates)
        share = None if share_of_one is None else top * share_of_one
        record[what] = {"best": top, "median": middle, "share_of_limit": share, "samples": rates}
        digits = 1 if what == "prefill" else 2
        cells += [f"{top:.{digits}f}", f"{middle:.{digits}f}", report.percent(share)]
    beside = run.rates("read_beside")
    if decode_bytes and beside:
        shares_beside = [
            rate * decode_bytes / (read * 1e9) for rate, read in zip(run.rates("decode"), beside, strict=True)
        ]
        record["decode"]["share_of_reading_beside_it"] = statistics.median(shares_beside)
        cells.append(report.percent(record["decode"]["share_of_reading_beside_it"]))
    else:
        cells.append("-")
    record["decode_bytes"] = decode_bytes
    record["rounds"] = run.results
    record["probes_before_rounds"] = run.probes
    cells += [_quiet(run, probes, threads, best, instruction), instruction]
    return cells, record


def _best_with(probes: Sequence[Limits], threads: int) -> Limits:
    """The best of all probes at one number of threads."""
    narrow = [
        dataclasses.replace(
            probe,
            read={threads: probe.read[threads]},
            peak={name: {threads: rates[threads]} for name, rates in probe.peak.items()},
        )
        for probe in probes
    ]
    return limits.best_of(narrow)


def _quiet(run: EngineRun, probes: Sequence[Limits], threads: int, best: Limits, instruction: str) -> str:
    """What was left of the limits beside this engine's rounds: arithmetic and reading, the worst probe's share."""
    near = [probes[index] for before in run.probes for index in (before, before + 1)]
    arithmetic = min(probe.peak[instruction][threads] for probe in near) / best.peak[instruction][threads]
    reading = min(probe.read[threads] for probe in near) / best.read[threads]
    return f"{report.percent(arithmetic)} / {report.percent(reading)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = parse_arguments(arguments)
    shape = dataclasses.replace(TINYLLAMA_1_1B, layers=options.layers or TINYLLAMA_1_1B.layers)
    model = options.model.resolve() if options.model else ensure_model(options.cache, shape).resolve()
    shape = ModelShape.from_directory(model)
    if options.prepared:
        for option, paths in prepared(options.cache, shape).items():
            getattr(options, option).extend(paths)
    machine = hardware.describe()
    runs = planned_engines(options, model)
    probes = run_all(runs, options, shape)

    columns = ["engine", "weights", "prefill tok/s", "median", "of peak", "decode tok/s", "median", "of read"]
    columns += ["beside it", "quiet", "peak of"]
    title = f"{options.threads} threads, prompt of {options.prompt}, then {options.tokens} tokens one by one"
    table = report.Table(title, columns, left=2)
    records = []
    missing = []
    for run in runs:
        if run.error:
            missing.append(f"{run.engine} {run.weights}".strip() + f": {run.error}")
            continue
        cells, record = row_of(run, shape, probes, options.threads, options.prompt)
        table.rows.append(cells)
        records.append(record)
    tables = [report.limits_table(probes[0], probes), table]
    weights = shape.block_parameters + shape.head_parameters
    notes = [
        f"A Llama of {weights / 1e6:,.0f} million weights in products: {shape}.",
        f"Prefill is {shape.prefill_flop(options.prompt) / 1e9:,.0f} GFLOP.",
        f"{options.rounds} interleaved rounds of {options.repeats} repeats. Columns: benchmarks/README.md.",
        *_versions(records),
        *missing,
    ]
    print(report.machine_line(machine))
    report.print_tables(tables)
    print("\n".join(notes))
    if options.save:
        data = {
            "machine": machine,
            "options": {name: getattr(options, name) for name in ("threads", "prompt", "tokens", "rounds", "repeats")},
            "shape": dataclasses.asdict(shape),
            "probes": [probe.to_dict() for probe in probes],
            "engines": records,
            "missing": missing,
        }
        for file in report.save("Whole model", notes, tables, data, options.results):
            print(f"wrote {file}")


def _versions(records: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each engine that ran: its version and settings."""
    lines = {}
    for record in records:
        for result in record.get("rounds", [])[:1]:
            kept = ("version", "torch", "isa", "compute_type", "system", "build")
            lines[record["engine"]] = ", ".join(f"{key} {result[key]}" for key in kept if key in result)
    return [f"{engine}: {line}" for engine, line in lines.items()]


if __name__ == "__main__":
    main()
