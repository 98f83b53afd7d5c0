"""Rounding a matrix column by column, so that later columns make up for the errors of earlier ones on a text's inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from llama_ext import _core
from llama_ext._arrays import FloatArray

__all__ = ["Codes", "Feedback", "round_with_feedback"]

# Added to the diagonal of the inputs' products, as a share of its mean: few tokens must not decide all.
_DAMPING = 0.01
# Triangles up to this size are inverted at once.
_SMALL = 256

# What `_core.quantize` gives: codes (N, K), scales (N, groups) and, where there are some, minima.
Codes = tuple[npt.NDArray[Any], npt.NDArray[np.float16], npt.NDArray[np.float16] | None]


class Feedback:
    """How an error in one column of a matrix is best made up for in those after it.

    Args:
        x: (tokens, K) inputs of the matrix, float32.

    Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022.
    """

    def __init__(self, x: FloatArray) -> None:
        products = np.asarray(x.T @ x, dtype=np.float64) / len(x)
        diagonal = np.diagonal(products).copy()
        self.importance: FloatArray = diagonal.astype(np.float32)
        mean = float(diagonal.mean())
        products[np.diag_indices_from(products)] += _DAMPING * mean if mean > 0 else 1.0
        # inverse(products) = U'U with U upper triangular. Of the reversed matrix, L L' reversed is R R' with R upper: U = inverse(R).
        reversed_lower = np.asarray(np.linalg.cholesky(products[::-1, ::-1]), dtype=np.float64)
        self.upper: FloatArray = np.ascontiguousarray(_inverse(reversed_lower)[::-1, ::-1], dtype=np.float32)


def _inverse(lower: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Of a lower triangle, by halves: nearly all of it is products of matrices."""
    size = len(lower)
    if size <= _SMALL:
        return np.tril(np.linalg.inv(lower))
    half = size // 2
    first, last = _inverse(lower[:half, :half]), _inverse(lower[half:, half:])
    result = np.zeros_like(lower)
    result[:half, :half], result[half:, half:] = first, last
    result[half:, :half] = -last @ (lower[half:, :half] @ first)
    return result


def round_with_feedback(values: FloatArray, feedback: Feedback, encoding: str, group: int) -> Codes:
    """Rounds a matrix so that its products with the inputs change little.

    Args:
        values: (N, K) float32.
        feedback: Of its inputs.
        encoding: "int8", "int4", "int8_min", ...
        group: Columns that share a scale.

    Returns:
        As `_core.quantize`: scales and minima are those that it fits to a group when its turn comes, errors weighed by the mean
        square of the inputs.

    Raises:
        NumericError: A weight that no scale can express.
    """
    levels = 1 << int(encoding[len("int")])
    low = 0 if encoding.endswith("_min") else -levels // 2
    rows, columns = values.shape
    # By columns: each is worked on by itself.
    rest = np.ascontiguousarray(values.T)
    codes = np.empty((columns, rows), np.uint8 if low == 0 else np.int8)
    all_scales, all_minima = [], []
    for begin in range(0, columns, group):
        end = min(begin + group, columns)
        block = rest[begin:end]
        upper = feedback.upper[begin:end]
        _, scales, minima = _core.quantize(
            np.ascontiguousarray(block.T), encoding, group, feedback.importance[begin:end]
        )
        all_scales.append(scales)
        scale = scales[:, 0].astype(np.float32)
        minimum: FloatArray = np.zeros_like(scale) if minima is None else minima[:, 0].astype(np.float32)
        if minima is not None:
            all_minima.append(minima)
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
        errors = np.empty_like(block)
        for index in range(end - begin):
            code = np.clip(np.rint((block[index] - minimum) * inverse), low, low + levels - 1)
            codes[begin + index] = code
            error = (block[index] - (code * scale + minimum)) / upper[index, begin + index]
            errors[index] = error
            block[index + 1 :] -= upper[index, begin + index + 1 : end, None] * error
        rest[end:] -= upper[:, end:].T @ errors
    return (
        np.ascontiguousarray(codes.T),
        np.concatenate(all_scales, axis=1),
        np.concatenate(all_minima, axis=1) if all_minima else None,
    )
