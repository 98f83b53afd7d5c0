"""Gradients from nothing but a function's values: central differences in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

# The error of a central difference is step^2 f''' / 6, about 1e-9 for functions of size 1, and 1e-16 / step for the rounding of f.
STEP = 1e-4


def gradient(function: Callable[[F64], Any], at: npt.NDArray[Any], d_result: npt.NDArray[Any]) -> F64:
    """The gradient of sum(function(x) * d_result) at x = `at`, element by element."""
    x = np.array(at, dtype=np.float64)
    weights = d_result.astype(np.float64)
    found = np.empty_like(x)
    for index in np.ndindex(x.shape):
        kept = x[index]
        x[index] = kept + STEP
        above = function(x)
        x[index] = kept - STEP
        below = function(x)
        x[index] = kept
        found[index] = np.sum((above - below) * weights) / (2 * STEP)
    return found


def derivative(function: Callable[[float], float], step: float = STEP) -> float:
    """function'(0), with an error of step^4."""
    near = function(step) - function(-step)
    far = function(2 * step) - function(-2 * step)
    return (8 * near - far) / (12 * step)
