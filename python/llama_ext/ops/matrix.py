"""A weight matrix in the layout of a backend."""

from __future__ import annotations

from typing import NoReturn

from llama_ext import _core
from llama_ext._arrays import FloatArray
from llama_ext.errors import UnsupportedError

__all__ = ["Matrix"]

WITH_MINIMA = "_min"  # of the core's names for weights that have them


class Matrix:
    """A weight matrix in the layout that its backend likes best: made once by `pack`, used any number of times.

    It belongs to the device, threads and instruction set it was packed for. Immutable, so threads may share it, and its copy is itself.
    """

    def __init__(
        self, backend: _core.Backend, handle: _core.Matrix, shape: tuple[int, int], *, gate_up: bool = False
    ) -> None:
        self.backend = backend
        self.handle = handle
        self._shape = shape
        self.gate_up = gate_up

    def __copy__(self) -> Matrix:
        return self

    def __deepcopy__(self, memo: object) -> Matrix:
        return self

    def __reduce__(self) -> NoReturn:
        # What pickle calls.
        raise UnsupportedError(
            "a Matrix cannot be pickled: its layout is for the device and the instruction set of this process. Send the arrays that it "
            "was packed from, and pack them where they arrive"
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(output features, input features); of a gate-up pair, (F, C)."""
        return self._shape

    @property
    def dtype(self) -> str:
        """How the weights are kept: as in `pack`; of GGUF's K-quants "q4_k", "q5_k" or "q6_k"."""
        return self.handle.dtype.removesuffix(WITH_MINIMA)

    @property
    def group_size(self) -> int | None:
        """How many weights of a row share a scale; None for floating-point weights."""
        return self.handle.group or None

    @property
    def symmetric(self) -> bool:
        """Whether a weight is scale times code, without a minimum: so of floating-point weights, too."""
        return not self.handle.dtype.endswith(WITH_MINIMA) and self.handle.dtype not in ("q4_k", "q5_k")

    @property
    def nbytes(self) -> int:
        """The memory it occupies, padding included."""
        return self.handle.nbytes

    @property
    def device(self) -> str:
        """The device it was packed for."""
        return self.backend.device

    def to_array(self) -> FloatArray:
        """The weights as float32, (rows, columns); of a gate-up pair, the interleaved rows.

        Returns:
            A new array; floating-point and symmetric weights widen exactly, others are rounded once.
        """
        return self.handle.to_array()

    def __repr__(self) -> str:
        kind = "gate-up Matrix" if self.gate_up else "Matrix"
        groups = f" in groups of {self.group_size}" if self.group_size else ""
        return (
            f"<{kind} {self._shape[0]} x {self._shape[1]} {self.handle.dtype}{groups} "
            f"on {self.device} ({self.backend.isa})>"
        )
