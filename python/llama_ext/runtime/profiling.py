"""Ranges that a profiler of NVIDIA's shows: passes, layers and operations of a model on a GPU."""

from __future__ import annotations

from llama_ext import _core
from llama_ext.errors import DeviceError

__all__ = ["nvtx_state", "set_nvtx_ranges"]


def set_nvtx_ranges(enabled: bool) -> None:
    """Switches NVTX ranges on or off, for the whole process; LLAMA_EXT_NVTX=1 in the environment has them on from the start.

    Every pass, layer and operation on a GPU is then a range in the domain "llama_ext": "prefill 512 rows" or "decode 1 row", in it
    "layer 3", in it "matmul", "attend" and so on. Ranges are of the CPU's calls; a profiler shows beside them when the kernels that were
    started in them ran. Tokens that are decoded by a recorded CUDA graph are "replay decode 1 row" each, without ranges inside: the
    calls were made once, in "record decode 1 row".

    Args:
        enabled: Whether operations from now on have ranges. Off, they cost a branch.

    Raises:
        DeviceError: This build has no CUDA backend, or it cannot be opened.
        UnsupportedError: The CUDA backend was built without NVTX's header.
    """
    _core.show_nvtx_ranges(bool(enabled))


def nvtx_state() -> str:
    """Whether ranges are "on" or "off", or why there are none."""
    try:
        if not _core.has_nvtx_ranges():
            return "not built: nvtx3/nvToolsExt.h was not found"
        return "on" if _core.nvtx_ranges_are_on() else "off"
    except DeviceError:
        return "not built: there is no CUDA backend"
