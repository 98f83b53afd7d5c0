"""Tables of results: for the terminal, as Markdown, and the files of benchmarks/results."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from benchmarks import hardware
from benchmarks.limits import Limits

__all__ = ["Table", "limits_table", "machine_line", "percent", "print_tables", "save"]

RESULTS = Path(__file__).with_name("results")


@dataclasses.dataclass
class Table:
    """Cells of text; the first `left` columns are words, the others numbers."""

    title: str
    columns: Sequence[str]
    rows: list[list[str]] = dataclasses.field(default_factory=list)
    left: int = 1

    def to_rich(self) -> RichTable:
        """For the terminal."""
        table = RichTable(title=self.title, title_justify="left")
        for index, name in enumerate(self.columns):
            table.add_column(name, justify="left" if index < self.left else "right", no_wrap=index < self.left)
        for row in self.rows:
            table.add_row(*row)
        return table

    def to_markdown(self) -> str:
        """A heading and a GitHub table."""
        rules = ["---" if index < self.left else "---:" for index in range(len(self.columns))]
        lines = [_line(self.columns), _line(rules)]
        lines += [_line(row) for row in self.rows]
        return f"## {self.title}\n\n" + "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def percent(share: float | None) -> str:
    """A share of a limit, or a dash when there is none to compare with."""
    return "-" if share is None else f"{100 * share:.{0 if share >= 0.0995 else 1}f}%"


def limits_table(best: Limits, probes: Sequence[Limits]) -> Table:
    """The best of all probes, with the worst beside it where several looked: the difference is the neighbours'."""
    counts = sorted(best.read)
    columns = ["limit", *(f"{threads} thread{'s' if threads > 1 else ''}" for threads in counts)]
    table = Table(f"What the machine allows (best of {len(probes)} probes; in brackets the worst)", columns)

    def cells(name: str, unit: str) -> list[str]:
        row = [f"{name}, {unit}"]
        for threads in counts:
            rates = [_rate(probe, name, threads) for probe in probes]
            seen = [rate for rate in rates if rate is not None]
            spread = f" ({min(seen):,.0f})" if len(seen) > 1 else ""
            row.append(f"{max(seen):,.0f}{spread}" if seen else "-")
        return row

    table.rows.append(cells("read", "GB/s"))
    for name in best.peak:
        table.rows.append(cells(name, "GOP/s" if name.startswith("int8") else "GFLOP/s"))
    return table


def _rate(probe: Limits, name: str, threads: int) -> float | None:
    rates = probe.read if name == "read" else probe.peak.get(name, {})
    return rates.get(threads)


def machine_line(machine: dict[str, Any]) -> str:
    """One line that names the hardware."""
    memory = machine["memory_bytes"]
    return (
        f"{machine['cpu']} (family/model/stepping {machine['family_model_stepping']}"
        f"{', virtual' if machine['hypervisor'] else ''}), {machine['usable_cpus']} of {machine['logical_cpus']} CPUs, "
        f"last-level cache {machine['last_level_cache_bytes'] >> 20} MiB, "
        f"memory {memory / 2**30:.0f} GiB, Linux {machine['kernel']}, Python {machine['python']}, "
        f"source {machine['source']}"
    )


def print_tables(tables: Sequence[Table]) -> None:
    """To standard output, as wide as the tables need when that is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    for table in tables:
        console.print(table.to_rich())


def save(
    title: str, notes: Sequence[str], tables: Sequence[Table], data: dict[str, Any], directory: Path, suffix: str = ""
) -> list[Path]:
    """Writes <date>-<cpu>[-suffix].json and .md, with a number when there are such files already.

    Args:
        title: The heading of the Markdown file.
        notes: Its paragraphs before the tables.
        tables: What was printed.
        data: Everything that was measured; `data["machine"]` is `hardware.describe()`.
        directory: Created when it does not exist.
        suffix: Of another benchmark than the model's.

    Returns:
        The two files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    stem = hardware.result_stem(data["machine"]) + (f"-{suffix}" if suffix else "")
    number = 1
    while (directory / f"{_numbered(stem, number)}.json").exists():
        number += 1
    stem = _numbered(stem, number)
    paragraphs = [f"# {title}", machine_line(data["machine"]), "Flags: " + " ".join(data["machine"]["flags"]), *notes]
    text = "\n\n".join([*paragraphs, *(table.to_markdown() for table in tables)])
    json_file, markdown_file = directory / f"{stem}.json", directory / f"{stem}.md"
    json_file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    markdown_file.write_text(text.rstrip() + "\n", encoding="utf-8")
    return [json_file, markdown_file]


def _numbered(stem: str, number: int) -> str:
    return stem if number == 1 else f"{stem}-{number}"
