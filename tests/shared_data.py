"""Where the test data that is not in the repository lies, beside the checkout."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED: Path = Path(__file__).resolve().parents[2] / "shared" / "data"

requires_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared test data beside the checkout")
