"""The files of a model, whatever their kind: checked when they are opened, and read tensor by tensor, so that memory never
holds a checkpoint twice."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy.typing as npt

from llama_ext import _core
from llama_ext._options import shown
from llama_ext.errors import CheckpointError, UnsupportedError
from llama_ext.models import ARCHITECTURES
from llama_ext.models.config import LlamaConfig
from llama_ext.models.generation_config import GenerationDefaults
from llama_ext.runtime.progress import ProgressBar
from llama_ext.runtime.tokenizer import Tokenizer
from llama_ext.runtime.weight_types import WeightType, WeightTypes, choose_types

__all__ = ["GENERATION_FILE", "ModelFiles", "StoredTensor"]

GENERATION_FILE = "generation_config.json"

Array = npt.NDArray[Any]
Self = TypeVar("Self", bound="ModelFiles")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a model's files, and the place of it in the core.

    Args:
        name: The file's name of it.
        slot: The core's, csrc/model/weights.h.
        shape: Its shape.
        type: The file's word for the format of its numbers: BF16, Q4_K, int4, ...
        nbytes: Its size in the file.
    """

    name: str
    slot: str
    shape: tuple[int, ...]
    type: str
    nbytes: int


class ModelFiles(abc.ABC):
    """The files of a model, opened and checked against its config before any weight is read; a context manager.

    Attributes:
        path: What was opened, for messages.
        format: What kind of files they are, in a few words.
        nbytes: Of all tensors, as they lie in the files.
        config: The model.
        tokenizer: None when there is none.
        generation_defaults: What the files suggest for `generate`.
        tensors: What is to be loaded, in the order of the files.
    """

    format: str
    path: Path
    nbytes: int
    config: LlamaConfig
    tokenizer: Tokenizer | None
    generation_defaults: GenerationDefaults
    tensors: Sequence[StoredTensor]

    # -- what a kind of files has to say -------------------------------------------------------------------------------

    @abc.abstractmethod
    def stored_types(self) -> WeightTypes:
        """How to keep each matrix so that nothing is lost."""

    @abc.abstractmethod
    def read(self, tensor: StoredTensor) -> tuple[Array, str]:
        """A tensor's values in Hugging Face's order of rows.

        Args:
            tensor: One of `tensors`.

        Returns:
            An array of its shape, and the core's word for its dtype: floating-point ones as they are stored, where bfloat16
            is uint16 bits; others as float32.

        Raises:
            FormatError: The file has been cut short since it was opened.
        """

    def read_codes(self, tensor: StoredTensor) -> tuple[Array, Array, Array | None]:
        """A quantised matrix as its codes, in Hugging Face's order of rows: w = scale (code - zero) + min.

        Args:
            tensor: One of `tensors`, of a type with groups in `stored_types`.

        Returns:
            Codes (N, K) uint8, scales (N, groups) float32, and minima of that shape or None.

        Raises:
            UnsupportedError: These files hold floats only.
            CheckpointError: A scale is not finite.
        """
        raise UnsupportedError(f"{self.path}: {tensor.name} is not quantised, and has no codes.")

    @abc.abstractmethod
    def release(self, tensor: StoredTensor) -> None:
        """Gives the memory of a tensor's pages back to the system."""

    @abc.abstractmethod
    def close(self) -> None:
        """Closes the files."""

    def packed(self, layout: str, types: Mapping[str, WeightType]) -> dict[str, Array]:
        """The matrices that can be used as they lie in the file.

        Args:
            layout: What the backend calls its layout.
            types: How matrices will be kept.

        Returns:
            By the core's names of matrices, their bytes: all of them or none.

        Raises:
            UnsupportedError: They lie in another layout.
        """
        return {}

    def check(self) -> None:
        """Checks what opening the files has left to loading them: of packed matrices, whether they are there and as large as the
        config says.

        Raises:
            FormatError, CheckpointError, UnsupportedError: Loading them would fail.
        """
        return

    def _load(self, core: _core.Model, tensor: StoredTensor, kept: WeightType | None) -> None:
        """Fills the slot of a tensor, whose matrix is kept as `kept`; None for a norm or a bias."""
        values, dtype = self.read(tensor)
        core.load(tensor.slot, values, dtype)

    # -- what is the same for all --------------------------------------------------------------------------------------

    @property
    def stored_dtype(self) -> str:
        """What most of the weights are stored as, in the words of the file."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors:
            sizes[tensor.type] = sizes.get(tensor.type, 0) + math.prod(tensor.shape)
        return max(sizes, key=sizes.__getitem__)

    def types(self, requested: str, group_size: int | None, symmetric: bool | None) -> WeightTypes:
        """How to keep each matrix: "auto" is as it is stored, anything else converts; see `choose_types`."""
        if requested == "auto" and group_size is None and symmetric is None:
            return self.stored_types()
        specs = ARCHITECTURES[self.config.model_type].tensor_specs(self.config)
        return choose_types(requested, None, specs, group_size=group_size, symmetric=symmetric)

    def load_into(self, core: _core.Model) -> None:
        """Fills what is not in the core yet.

        Raises:
            FormatError: A file has been cut short since it was opened.
            CheckpointError: A slot without a tensor, or weights that contradict each other.
        """
        missing, types = set(core.missing()), core.types()
        tensors = [tensor for tensor in self.tensors if tensor.slot in missing]
        total = sum(tensor.nbytes for tensor in tensors)
        # The largest first: while a tensor is copied it is there twice, which costs least when little else is there.
        order = sorted(tensors, key=lambda tensor: -tensor.nbytes if tensor.nbytes > total // 16 else 0)
        with self.named_in_errors(), ProgressBar("Loading weights", total, "bytes") as bar:
            for tensor in order:
                self._load(core, tensor, types.get(tensor.slot))
                self.release(tensor)
                bar.advance(tensor.nbytes)
        left = core.missing()
        if left:
            raise CheckpointError(f"the checkpoint has nothing for {', '.join(left[:8])}", path=str(self.path))

    def warn_of_ignored(self) -> None:
        """Tells the caller of this method's caller what generation_config.json asks for in vain."""
        ignored = self.generation_defaults.ignored
        if ignored:
            names = ", ".join(f"{name}={shown(value)}" for name, value in ignored.items())
            file = (self.path.parent if self.path.is_file() else self.path) / GENERATION_FILE
            warnings.warn(f"{file} asks for {names}, which this version does not do", UserWarning, stacklevel=3)

    @contextlib.contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Adds the path to what the core says about weights: it knows no files."""
        try:
            yield
        except CheckpointError as error:
            if getattr(error, "path", None) is not None:
                raise
            raise CheckpointError(str(error), path=str(self.path)) from error

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
