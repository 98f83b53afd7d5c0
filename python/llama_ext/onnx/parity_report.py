"""`ParityReport`: what was compared, how far apart it was, what was not run, and the verdict on each runtime."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Mapping
from typing import Any

__all__ = ["Check", "Fault", "NotRun", "ParityReport"]

Number = float | int | None

# In the order of the table's columns: the key of a figure, and its heading.
_COLUMNS = (
    ("relative_rms", "relative rms"),
    ("worst_position", "worst position"),
    ("max_abs", "max abs"),
    ("kl_mean", "KL mean"),
    ("kl_max", "KL max"),
    ("top1", "top-1"),
    ("top10", "top-10"),
)
_SHARES = ("top1", "top10")


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison of one runtime with the reference.

    Attributes:
        runtime: "native", "onnxruntime", ...
        name: What was compared.
        passed: Whether all its gates held.
        gates: By figure, the most it may be.
        figures: By name.
        note: In words, what the figures do not say.
    """

    runtime: str
    name: str
    passed: bool
    gates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    figures: Mapping[str, Number] = dataclasses.field(default_factory=dict)
    note: str = ""


@dataclasses.dataclass(frozen=True)
class NotRun:
    """A comparison that was not made, and why."""

    runtime: str
    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Fault:
    """Where a runtime first differs from the reference.

    Attributes:
        runtime: Which one.
        layer: The layer, counted from 0; None outside the layers: the embedding, the last norm, the head.
        op: The operation, in the project's name for it: "rope", "rms_norm", "attention", "matmul", ...
        node: The node of the graph.
        relative_rms: Of its output, against the reference's.
        worst_position: The largest share of a token.
        gate: The most that may be.
    """

    runtime: str
    layer: int | None
    op: str
    node: str
    relative_rms: float
    worst_position: float
    gate: float

    def __str__(self) -> str:
        where = "outside the layers" if self.layer is None else f"layer {self.layer}"
        return (
            f"{self.runtime} first differs in {where}, {self.op} ({self.node}): relative rms {self.relative_rms:.1e}, "
            f"of the worst token {self.worst_position:.1e}, where {self.gate:.0e} may be"
        )


@dataclasses.dataclass(frozen=True)
class ParityReport:
    """The result of `llama_ext.onnx.verify`; `str()` of it is a table for people.

    Attributes:
        profile, dtype: Of the graph.
        files: By name, relative to the directory, the sha256 of what was verified. That of the graph is taken without the
            entry that records this report.
        versions: Of the packages and of Python.
        machine: The CPU, its instruction sets, the threads.
        texts: How many there were, their tokens, and the sha256 of these.
        steps: Tokens that were generated greedily; 0 of a classifier.
        checks: What was compared.
        loss: What storing the weights in `dtype` changed, apart from any runtime: the reference with the weights as they
            are stored, against the reference with the original ones. Empty when they are the same numbers.
        loss_note: About `loss`, in words.
        not_run: What was not compared, and why.
        fault: Where a runtime first differs, when a check has failed.
        required: The runtimes without which nothing has passed: the native model, onnxruntime, and those that were asked for by
            name.
        seconds: How long it took; no part of the hash.
    """

    profile: str
    dtype: str
    files: Mapping[str, str]
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    texts: Mapping[str, Any]
    steps: int
    checks: tuple[Check, ...]
    loss: Mapping[str, Number]
    loss_note: str
    not_run: tuple[NotRun, ...]
    fault: Fault | None
    required: tuple[str, ...]
    seconds: float = dataclasses.field(default=0.0, compare=False)

    @property
    def passed(self) -> bool:
        """Whether every runtime that ran passed, those that had to run did, and one at least ran."""
        verdicts = self.verdicts
        return not self.differs and "passed" in verdicts.values() and not self._missing

    @property
    def differs(self) -> bool:
        """Whether a runtime that ran has failed: a report may also not have passed because one did not run."""
        return "failed" in self.verdicts.values()

    @property
    def _missing(self) -> list[str]:
        """The runtimes that had to run and did not."""
        verdicts = self.verdicts
        return [runtime for runtime in self.required if verdicts.get(runtime, "not run") == "not run"]

    @property
    def verdicts(self) -> dict[str, str]:
        """By runtime: "passed", "failed" or "not run"."""
        result: dict[str, str] = {}
        for check in self.checks:
            so_far = result.get(check.runtime, "passed")
            result[check.runtime] = so_far if check.passed else "failed"
        for skipped in self.not_run:
            result.setdefault(skipped.runtime, "not run")
        return result

    @property
    def hash(self) -> str:
        """The sha256 of everything but the time it took, in hexadecimal: equal reports have equal hashes."""
        record = self._record()
        text = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode("utf-8")).hexdigest()

    def to_json(self) -> str:
        """Everything as one JSON object; a figure that is not finite is null."""
        record = {**self._record(), "hash": self.hash, "seconds": round(self.seconds, 3)}
        return json.dumps(record, indent=2, sort_keys=True, allow_nan=False) + "\n"

    def _record(self) -> dict[str, Any]:
        record = dataclasses.asdict(self)
        del record["seconds"]
        record["passed"], record["verdicts"] = self.passed, self.verdicts
        finite: dict[str, Any] = _finite(record)
        return finite

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        # No figure is cut off, however narrow the terminal is.
        written = io.StringIO()
        console = Console(file=written, width=170, no_color=True, highlight=False)
        tokens = self.texts.get("tokens", 0)
        greedy = f", {self.steps} greedy steps" if self.steps else ""
        table = Table(
            title=f"{self.dtype} weights, profile {self.profile}: {tokens} tokens of text{greedy}",
            title_justify="left",
            caption="Each against the float64 reference on the same stored weights.",
            caption_justify="left",
        )
        table.add_column("runtime")
        table.add_column("comparison")
        for _, heading in _COLUMNS:
            table.add_column(heading, justify="right")
        table.add_column("")
        for check in self.checks:
            cells = [_cell(check, key) for key, _ in _COLUMNS]
            table.add_row(check.runtime, check.name, *cells, "passed" if check.passed else "FAILED")
        console.print(table)
        for (runtime, note), names in self._notes().items():
            console.print(f"{runtime}, {', '.join(names)}: {note}", markup=False)
        console.print(f"weights: {self._loss_in_words()}", markup=False)
        for skipped in self.not_run:
            console.print(f"not run: {skipped.runtime}, {skipped.name}: {skipped.reason}", markup=False)
        if self.fault is not None:
            console.print(str(self.fault), markup=False)
        verdicts = ", ".join(
            f"{runtime} {verdict}{' (it had to run)' * (runtime in self._missing)}"
            for runtime, verdict in {**dict.fromkeys(self._missing, "not run"), **self.verdicts}.items()
        )
        console.print(f"{'PASSED' if self.passed else 'FAILED'}: {verdicts}", markup=False)
        console.print(f"report {self.hash}", markup=False)
        return "\n".join(line.rstrip() for line in written.getvalue().splitlines())

    def _notes(self) -> dict[tuple[str, str], list[str]]:
        """What each runtime has to be said of, with the comparisons that it is said of."""
        result: dict[tuple[str, str], list[str]] = {}
        for check in self.checks:
            if check.note:
                result.setdefault((check.runtime, check.note), []).append(check.name)
        return result

    def _loss_in_words(self) -> str:
        if not self.loss:
            return self.loss_note
        figures = self.loss
        words = [f"relative rms of logits {_shown(figures['relative_rms'])}"]
        if "kl_mean" in figures:  # scores of labels have no such figures
            words += [
                f"KL mean {_shown(figures['kl_mean'])}, p99 {_shown(figures['kl_p99'])}, max {_shown(figures['kl_max'])}",
                f"top-1 {figures['top1']:.1%}, top-10 {figures['top10']:.1%}",
            ]
        if figures.get("perplexity_difference") is not None:
            words.append(f"perplexity {figures['perplexity_difference']:+.2%}")
        return f"{self.loss_note}: {'; '.join(words)}"


def _cell(check: Check, key: str) -> str:
    value = check.figures.get(key)
    if value is None:
        return ""
    if key in _SHARES:
        return f"{value:.1%}"
    gate = check.gates.get(key)
    return (
        _shown(value)
        if gate is None
        else f"{_shown(value)} <= {gate:.0e}"
        if value <= gate
        else f"{_shown(value)} > {gate:.0e}"
    )


def _shown(value: Number) -> str:
    return "" if value is None else f"{value:.1e}"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
