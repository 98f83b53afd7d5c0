"""How far a result may be from float64, per operation, each with its reason; and the one comparison that uses it.

A bound is a number of unit roundoffs (2^-24 of float32) times the magnitudes that went into the element: `numpy_ops` gives
those. Values were measured on every instruction set and then given about twice the room, or more where few cases were near.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

U32 = 2.0**-24
U_BF16 = 2.0**-8

# Below this, float32 numbers are denormal: bfloat16 instructions and our exponential flush them to zero.
TINY = 2.0**-126


@dataclass(frozen=True)
class Tolerance:
    units: float  # of float32's unit roundoff
    reason: str


TOLERANCES: dict[str, Tolerance] = {
    "embedding": Tolerance(0, "a copy; bfloat16 widens exactly"),
    "matmul": Tolerance(
        8, "one chain of fused additions over k: a random walk of roundings, measured below 5 for signed data, any K"
    ),
    "matmul-positive": Tolerance(
        1, "times sqrt(K) + 4: with one sign the partial sums grow with k, and so does each rounding"
    ),
    "sum-in-lanes": Tolerance(
        1, "times sqrt(width / 4): positive numbers summed in float32, in four lanes or more, as in matmul-positive"
    ),
    "rms_norm": Tolerance(8, "beside the sum: a mean of float32 squares, a square root, a division and two products"),
    "rope": Tolerance(3, "two products and a sum"),
    "attention": Tolerance(
        5, "scores as in matmul, an exponential of 1 ulp, weighted values as in matmul, a merge per 128 keys"
    ),
    "feed_forward": Tolerance(2, "two products and SiLU between them; first-order propagation of their bounds"),
    "softmax": Tolerance(
        4, "times 1 + (max - x) / 4, beside the sum: rounding max - x moves its exponential by as much; and a division"
    ),
    "cross_entropy": Tolerance(
        4, "of |loss| + |largest logit| + 1: exponentials in float32, sums of 1,024 and all else in float64"
    ),
    # Training.
    "matmul_backward": Tolerance(
        8, "as matmul: one chain of fused additions over the rows of d_y, or over its columns"
    ),
    "rms_norm_backward": Tolerance(
        12,
        "beside the sums: as rms_norm, and d_x is the difference of two such products, measured against their magnitudes",
    ),
    "swiglu": Tolerance(8, "an exponential of 1 to 2 ulp, a sum, a division and two products"),
    "swiglu_backward": Tolerance(
        12, "as swiglu, two sums and two products more, measured against 1 + |gate| times 1 - s and its rounding"
    ),
    "causal_attention": Tolerance(
        8, "as attention, in tiles of other sizes; log_sums: of |log sum| + the scores' magnitudes"
    ),
    "causal_attention_backward": Tolerance(
        16, "p from float32 log_sums, two products in front of it and one behind; bounds propagated to first order"
    ),
    "cross_entropy_backward": Tolerance(
        6, "times 1 + (max - x) / 4, as softmax, beside its sum; and the difference to the label's 1"
    ),
    "dropout": Tolerance(3, "a product with 1 / (1 - p), rounded before; and a sum when it accumulates"),
    "optimizer": Tolerance(
        12, "of the terms' magnitudes: products, a sum, a square root and a division; constants are rounded to float32"
    ),
    "rope_angles": Tolerance(1, "float64, rounded once"),
    "sample": Tolerance(1, "float64, rounded once"),
    # Relative root mean square.
    "logits": Tolerance(2e-6 / U32, "other engines' float32 is 1e-6 from the same files, and so are we"),
    "gradients": Tolerance(1e-6 / U32, "float64 rounded once to float32, and central differences of about 1e-9"),
    "bfloat16-products": Tolerance(
        2 * U_BF16 / U32, "both factors of each product rounded to bfloat16, of the sum of magnitudes"
    ),
    "logits-bfloat16": Tolerance(2e-2 / U32, "8 bits of mantissa in weights, activations, keys and values"),
}


def units(op: str) -> float:
    """The bound of an operation as a factor: units x 2^-24."""
    return TOLERANCES[op].units * U32


def sum_in_lanes(width: int) -> float:
    """The bound of a float32 sum of `width` positive numbers, as a factor."""
    return units("sum-in-lanes") * (width / 4) ** 0.5


def assert_within(
    actual: npt.NDArray[Any], expected: npt.NDArray[Any], bound: npt.NDArray[Any] | float, what: object = ""
) -> None:
    """Every element within its bound and, where it is not, where the worst is and how bad.

    A NaN in `actual` fails unless `expected` has one there too; infinities have to be equal.
    """
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    if actual.size == 0:
        return
    limit = np.broadcast_to(np.asarray(bound, dtype=np.float64), expected.shape)
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(actual.astype(np.float64) - expected)
        same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
        good = same | (error <= limit)
        if good.all():
            return
        excess = np.where(good, 0.0, np.where(np.isfinite(error), error / np.maximum(limit, 1e-300), np.inf))
    worst = np.unravel_index(int(np.argmax(excess)), excess.shape)
    raise AssertionError(
        f"{what}: {np.count_nonzero(~good)} of {good.size} elements are off; worst at {tuple(map(int, worst))}: "
        f"got {actual[worst]!r}, expected {expected[worst]!r} +- {limit[worst]:.3g}"
    )


def relative_rms(actual: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """The root mean square of the difference as a share of the expected one's."""
    difference = actual.astype(np.float64) - expected
    return float(np.sqrt(np.mean(difference**2) / np.mean(expected.astype(np.float64) ** 2)))


def assert_same_bits(actual: npt.NDArray[Any], expected: npt.NDArray[Any], what: object = "") -> None:
    """The same float32 numbers, bit for bit (so that -0 is not 0, and a NaN is itself)."""
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    assert actual.dtype == expected.dtype == np.float32
    ours, theirs = (np.ascontiguousarray(each).view(np.uint32) for each in (actual, expected))
    if np.array_equal(ours, theirs):
        return
    different = np.argwhere(ours != theirs)
    place = tuple(int(i) for i in different[0])
    raise AssertionError(
        f"{what}: {len(different)} of {ours.size} elements differ; first at {place}: {actual[place]!r}, "
        f"expected {expected[place]!r}"
    )
