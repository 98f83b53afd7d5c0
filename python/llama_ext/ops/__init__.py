"""The kernels by themselves: the operations a Llama is made of, on NumPy arrays.

Every operation computes in float32 and accepts float32 only: nothing is cast silently. Leading dimensions are free
where that is natural: `(..., K)`. On one instruction set, results are bit-identical for every number of threads and rows.

Options that all operations share:
    out: A float32 array of the result's shape to write to. It may be one of the inputs.
    threads: A whole number >= 1; None is the default, `llama_ext.get_num_threads()`.
    isa: An instruction set from `llama_ext.info().available_isas`; None is the best, or what LLAMA_EXT_ISA says.
    device: "cpu", or "reference" for the float64 loops that the fast kernels are tested against.
"""

from __future__ import annotations

from llama_ext.ops.dense import feed_forward, matmul, rms_norm
from llama_ext.ops.packing import Matrix, pack, pack_blocks, pack_gate_up, quantize
from llama_ext.ops.sequence import attention, rope, rope_angles
from llama_ext.ops.vocabulary import cross_entropy, embedding, sample, softmax

__all__ = [
    "Matrix",
    "attention",
    "cross_entropy",
    "embedding",
    "feed_forward",
    "matmul",
    "pack",
    "pack_blocks",
    "pack_gate_up",
    "quantize",
    "rms_norm",
    "rope",
    "rope_angles",
    "sample",
    "softmax",
]
