"""`python -m llama_ext` is `llama-ext`."""

from __future__ import annotations

import sys

from llama_ext.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
