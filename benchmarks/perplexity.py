"""What rounding the weights costs: the perplexity of a model on a text, for each way to keep its weights.

Example:
    python -m benchmarks.perplexity demo shakespeare.txt
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report

__all__ = ["main", "ways"]

_FLOATS = ("float32", "bfloat16", "float16")


def ways() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each way to keep weights: its name, and the options of `from_pretrained`. The first is the one others are compared with."""
    for dtype in _FLOATS:
        yield dtype, {"dtype": dtype}
    for dtype, group_size, symmetric in itertools.product(("int8", "int4"), (128, 64, 32), (True, False)):
        name = f"{dtype}, groups of {group_size}" + ("" if symmetric else ", with minima")
        yield name, {"dtype": dtype, "group_size": group_size, "symmetric": symmetric}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.perplexity", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("model", help="a directory, a Hub id, or demo")
    parser.add_argument("text", type=Path)
    parser.add_argument("--first", type=int, default=0, help="skip so many characters (0)")
    parser.add_argument("--characters", type=int, default=30_000, help="score so many (30,000)")
    parser.add_argument("--compute", choices=("auto", "exact"), default="auto")
    options = parser.parse_args(arguments)
    from llama_ext import LlamaForCausalLM

    text = options.text.read_text(encoding="utf-8")[options.first :][: options.characters]
    table = report.Table(f"{options.model}, {options.compute}", ["weights", "perplexity", "rise", "MB"], left=1)
    base = 0.0
    for name, how in ways():
        model = LlamaForCausalLM.from_pretrained(options.model, compute=options.compute, **how)
        found = model.perplexity(text).perplexity
        base = base or found
        megabytes = model._core.nbytes / 1e6
        table.rows.append([name, f"{found:.4f}", f"{100 * (found / base - 1):+.2f}%", f"{megabytes:.2f}"])
    report.print_tables([table])


if __name__ == "__main__":
    main()
