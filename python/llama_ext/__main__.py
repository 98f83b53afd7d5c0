"""`python -m llama_ext` is `llama-ext`."""

from __future__ import annotations

import sys

from llama_ext.cli.main import main

if __name__ == "__main__":
    code = main()
    # CPython notes an interrupt that leaves code made of a string, as a dataclass is, and `python -m` would die of it at
    # its end although it was caught. Running such code again clears the note.
    exec("")  # noqa: S102
    sys.exit(code)
