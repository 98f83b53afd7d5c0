"""Scripts in a fresh interpreter that sees the package and the helpers of the tests."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from llama_ext import _core

_PATHS = [str(Path(__file__).parent), str(Path(_core.__file__).parents[1])]


def run_script(script: str, *arguments: str, timeout: float = 60, **environment: str) -> str:
    """What the script prints. It must end well, within `timeout` seconds."""
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join(_PATHS), "OPENBLAS_NUM_THREADS": "1", **environment}
    if "LLAMA_EXT_ISA" not in environment:
        settings.pop("LLAMA_EXT_ISA", None)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        env=settings,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
