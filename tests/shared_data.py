"""Where the tests find data that is too large, or not ours, to be in the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

# A trained Llama of 800,128 bfloat16 weights that writes tiny Shakespeare letter by letter; it was made with PyTorch.
LETTERS: Path = Path(__file__).resolve().parent / "data" / "letters"

SHARED: Path = Path(__file__).resolve().parents[1].parent / "shared" / "data"

requires_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"needs the shared test data (checkpoints and tokenizers) in {SHARED}"
)
