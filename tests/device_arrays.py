"""Arrays of a library of the tests' own, on the CPU and on a GPU, by DLPack."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dlpack_capsules import Producer, address_of
from llama_ext import ops

GPU = "cuda:0"
ON_GPU = (2, 0)

Floats = npt.NDArray[np.float32]


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def of_cpu(array: npt.NDArray[Any], **options: Any) -> Producer:
    """A library's array over the memory of a NumPy array."""
    kinds = {"f": 2, "i": 0, "u": 1}
    described = {
        "address": array.ctypes.data,
        "shape": array.shape,
        "strides": tuple(stride // array.itemsize for stride in array.strides),
        "dtype": (kinds[array.dtype.kind], 8 * array.itemsize, 1),
        "keep": array,
    }
    return Producer(**{**described, **options})


def of_gpu(array: npt.NDArray[Any], **options: Any) -> Producer:
    """A library's array on the GPU: memory that we allocated, which it knows by its address alone."""
    there = ops.to_device(array)
    described = {"address": address_of(there), "shape": array.shape, "device": ON_GPU, "keep": there}
    return Producer(**{**described, **options})


def host(array: object) -> npt.NDArray[Any]:
    return array if isinstance(array, np.ndarray) else array.numpy()  # type: ignore[attr-defined]
