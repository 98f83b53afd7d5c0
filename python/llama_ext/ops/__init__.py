"""The kernels by themselves: the operations a Llama is made of, on NumPy arrays, and on those of any library that has DLPack.

Every operation computes in float32 and accepts float32 only: nothing is cast silently. Numbers (an eps, a scale, a rate) are rounded to
float32, too: one that is too large for it is an OptionError, and so is an eps that becomes 0. Leading dimensions are free
where that is natural: `(..., K)`. On a CPU, on one instruction set, results are bit-identical for every number of threads and rows.

Gradients are operations, too: `x_backward` takes the gradient of what `x` gave, `d_y`, and gives the gradients of what it took.
Only `cross_entropy_backward` needs no `d_y`, as the losses are the end; those of `rope` and `dropout` are `rope` and `dropout`.

Arrays of other libraries (torch, CuPy, JAX) are taken over the same memory, by `__dlpack__`. On the CPU they count as NumPy arrays.
Where one lies on an NVIDIA GPU, the operation runs there, its other arrays must be there, and its results are `DeviceArray`s: they have
`shape`, `dtype`, `device`, `numpy()` and `__dlpack__`, so that `torch.from_dlpack(y)` copies nothing. Nothing passes through host memory but
what the CPU reads or lays out: token ids and labels (which may stay on the CPU), weights that are packed, the biases of a packed pair, the
logits of `sample`. An operation is done when it returns. An array on a GPU may have rows with a stride of their own; other strides
are a ShapeError, and arrays on different devices a DeviceError. `to_device` and `from_dlpack` make DeviceArrays.

Options that mean the same wherever a signature has them:
    out: A float32 array of the result's shape to write to, of any such library. It may be one of the inputs. Operations that give
        several arrays, none, or a Matrix have no `out`, and gradients have none, but for `cross_entropy_backward`.
    threads: Of the CPU: a whole number in [1, 256]; None is the default, `llama_ext.get_num_threads()`. Other devices ignore it.
    isa: Of the CPU: an instruction set from `llama_ext.info().available_isas`; None is the best, or what LLAMA_EXT_ISA says. A GPU
        has none to choose.
    device: "cpu"; "cuda", the first NVIDIA GPU, or "cuda:1" and so on; or "reference" for the float64 loops that the fast kernels are
        tested against. Arrays on a GPU say it themselves. `quantize` and `rope_angles` run on the CPU, and have
        none of the last three.
"""

from __future__ import annotations

from llama_ext.ops.dense import (
    feed_forward,
    matmul,
    matmul_backward,
    rms_norm,
    rms_norm_backward,
    swiglu,
    swiglu_backward,
)
from llama_ext.ops.device import DeviceArray, from_dlpack, to_device
from llama_ext.ops.matrix import Matrix
from llama_ext.ops.packing import pack, pack_blocks, pack_gate_up, quantize
from llama_ext.ops.sequence import attention, causal_attention, causal_attention_backward, rope, rope_angles
from llama_ext.ops.training import adam, dropout, sgd
from llama_ext.ops.vocabulary import (
    cross_entropy,
    cross_entropy_backward,
    embedding,
    embedding_backward,
    sample,
    softmax,
)

__all__ = [
    "DeviceArray",
    "Matrix",
    "adam",
    "attention",
    "causal_attention",
    "causal_attention_backward",
    "cross_entropy",
    "cross_entropy_backward",
    "dropout",
    "embedding",
    "embedding_backward",
    "feed_forward",
    "from_dlpack",
    "matmul",
    "matmul_backward",
    "pack",
    "pack_blocks",
    "pack_gate_up",
    "quantize",
    "rms_norm",
    "rms_norm_backward",
    "rope",
    "rope_angles",
    "sample",
    "sgd",
    "softmax",
    "swiglu",
    "swiglu_backward",
    "to_device",
]
