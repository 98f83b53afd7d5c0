"""The guards guard: one element too far, and the process is gone."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from guarded import guarded, guarded_empty, guarded_rows, guarded_rows_empty

READ = """
import ctypes, sys
import numpy as np
from guarded import guarded
side, element = sys.argv[1], int(sys.argv[2])
array = guarded(np.ones({count}, np.float32), side)
ctypes.c_float.from_address(array.ctypes.data + 4 * element).value
"""


@pytest.mark.parametrize("count", [1, 1023, 1024, 1025])
@pytest.mark.parametrize("side", ["end", "start"])
def test_an_element_beyond_a_guarded_array_is_a_segmentation_fault(side: str, count: int) -> None:
    inside, outside = (count - 1, count) if side == "end" else (0, -1)
    for element, status in ((inside, 0), (outside, -signal.SIGSEGV)):
        done = subprocess.run(
            [sys.executable, "-c", READ.format(count=count), side, str(element)],
            env={"PYTHONPATH": str(Path(__file__).parent)},
            check=False,
            timeout=60,
            capture_output=True,
        )
        assert done.returncode == status, done.stderr


@pytest.mark.parametrize("shape", [(0,), (3, 0), (5,), (3, 4), (2, 3, 5)])
def test_guarded_arrays_hold_what_they_are_given(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    np.testing.assert_array_equal(guarded(values), values)
    np.testing.assert_array_equal(guarded(values, "start"), values)
    np.testing.assert_array_equal(guarded_rows(values, 3), values)
    assert np.isnan(guarded_empty(shape)).all()
    rows, gaps = guarded_rows_empty(shape, 2)
    rows[...] = values
    assert np.isnan(gaps).all()
    assert gaps.shape == (max(shape[0] - 1, 0), 2)
