"""What a graph may be made of, for which runtimes, and what the files of a dtype are called."""

from __future__ import annotations

import dataclasses

from llama_ext.errors import OptionError

__all__ = ["DTYPES", "FILE_STEMS", "PROFILES", "QUANTIZED", "Profile", "checked_profile"]

DTYPES = ("float32", "float16", "bfloat16", "int8", "int4")
QUANTIZED = ("int8", "int4")

# Names that transformers.js and optimum look for, in the folder onnx/.
FILE_STEMS = {
    "float32": "model",
    "float16": "model_fp16",
    "bfloat16": "model_bf16",
    "int8": "model_quantized",
    "int4": "model_q4",
}


@dataclasses.dataclass(frozen=True)
class Profile:
    """The operators of a graph.

    Args:
        name: portable | standard | ort.
        opset: Of the ONNX operators, by dtype where int4 needs a newer one.
        ir_version: Of the file; a runtime refuses one that is younger than itself.
        dtypes: What weights may be.
        fused: Whether attention and its normalisation and rotation are operators of ONNX, or made of smaller ones.
        contrib: Whether operators of com.microsoft are used, which onnxruntime alone has.
    """

    name: str
    opset: int
    ir_version: int
    dtypes: tuple[str, ...]
    fused: bool
    contrib: bool

    def versions(self, dtype: str) -> tuple[int, int]:
        """The opset and the IR version for a dtype: 4-bit tensors and groups came with opset 21."""
        return (max(self.opset, 21), max(self.ir_version, 10)) if dtype == "int4" else (self.opset, self.ir_version)


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("portable", 17, 8, ("float32", "float16", "int8", "int4"), fused=False, contrib=False),
        Profile("standard", 23, 11, DTYPES, fused=True, contrib=False),
        Profile("ort", 23, 11, ("float32", "int8", "int4"), fused=True, contrib=True),
    )
}


def checked_profile(name: str, dtype: str | None) -> Profile:
    """The profile of a name, if it has the dtype.

    Args:
        name: portable | standard | ort.
        dtype: Of the weights; None: not decided yet.

    Returns:
        The profile.

    Raises:
        OptionError: There is no such profile or dtype, or the profile lacks the dtype.
    """
    if name not in PROFILES:
        raise OptionError(f"profile must be one of {', '.join(PROFILES)}, got {name!r}")
    profile = PROFILES[name]
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if dtype is not None and dtype not in profile.dtypes:
        others = ", ".join(each.name for each in PROFILES.values() if dtype in each.dtypes)
        raise OptionError(
            f"profile {name!r} has the dtypes {', '.join(profile.dtypes)}, got {dtype!r}; profiles with that dtype: {others}"
        )
    return profile
