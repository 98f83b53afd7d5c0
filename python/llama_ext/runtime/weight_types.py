"""How the matrices of a model are kept: which encoding each one gets, from what the caller asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from llama_ext._arrays import is_whole
from llama_ext.errors import OptionError
from llama_ext.models.llama import CLASSIFIER_HEAD, TensorSpec

__all__ = ["DTYPES", "GROUP_SIZES", "WeightType", "WeightTypes", "choose_types", "float_types", "group_for"]

DTYPES = ("auto", "float32", "bfloat16", "float16", "int8", "int4")
GROUP_SIZES = (128, 64, 32)

# The core's encoding (csrc/quant/weight_type.h) and how many k share a scale, 0 for floating point.
WeightType = tuple[str, int]
# By slot; "" stands for the matrices that are not named.
WeightTypes = dict[str, WeightType]

# Rounding the tables to int4 costs the most and saves the least: a token reads one row of the embedding.
_KEPT_AT_INT8 = ("embedding", "head")


def float_types(dtype: str) -> WeightTypes:
    """All matrices as one floating-point dtype."""
    return {"": (dtype, 0)}


def choose_types(
    requested: str,
    stored: str | None,
    specs: Iterable[TensorSpec],
    *,
    group_size: int | None = None,
    symmetric: bool | None = None,
) -> WeightTypes:
    """How to keep each matrix.

    Args:
        requested: What the caller asks for.
        stored: The dtype of the checkpoint, or None for random weights.
        specs: The model's tensors.
        group_size: How many weights of a row share a scale, for int8 and int4. None: 128, or the largest of 64 and 32 that
            divides the rows, and 32 when none does.
        symmetric: Whether a group has a scale alone, or also a minimum. None: a scale alone.

    Returns:
        The types.

    Raises:
        OptionError: Not a dtype, or an option that it does not have.
    """
    if requested not in DTYPES:
        raise OptionError(f"dtype must be one of {', '.join(DTYPES)}, got {requested!r}")
    if group_size is not None and (not is_whole(group_size) or group_size not in GROUP_SIZES):
        raise OptionError(f"group_size must be one of {', '.join(map(str, GROUP_SIZES))}, got {group_size!r}")
    if requested not in ("int8", "int4"):
        if group_size is not None or symmetric is not None:
            name = "group_size" if group_size is not None else "symmetric"
            raise OptionError(f"{name} belongs to dtype='int8' or 'int4', got dtype={requested!r}")
        if requested == "auto":
            requested = stored if stored in ("bfloat16", "float16") else "float32"
        return float_types(requested)
    suffix = "" if symmetric in (None, True) else "_min"
    types: WeightTypes = {}
    for spec in specs:
        if len(spec.shape) == 2:
            if spec.name == CLASSIFIER_HEAD:  # a few rows, which are trained
                types[spec.slot] = ("float32", 0)
                continue
            kept = "int8" if spec.slot in _KEPT_AT_INT8 else requested
            types[spec.slot] = (kept + suffix, group_size or group_for(spec.shape[1]))
    types[""] = (requested + suffix, group_size or GROUP_SIZES[0])
    return types


def group_for(columns: int) -> int:
    """The default group of a matrix: the largest size that divides its rows, or the smallest."""
    return next((size for size in GROUP_SIZES if columns % size == 0), GROUP_SIZES[-1])


def is_quantized(types: Mapping[str, WeightType]) -> bool:
    """Whether any matrix is kept as whole numbers with scales."""
    return any(group for _, group in types.values())
