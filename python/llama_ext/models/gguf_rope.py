"""The rotation in a GGUF file: its keys, and llama3's scaling as one divisor for each frequency.

A divisor is 1 for a short wavelength, `factor` for a long one, and for those between 1 / ((1 - s) / factor + s) with
s = (original / wavelength - low) / (high - low). The four parameters follow from the divisors, up to a common multiple
of original, low and high, which changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_ext._options import shown
from llama_ext.errors import FormatError, UnsupportedError
from llama_ext.io.gguf_file import GgufTensor
from llama_ext.models.config import LlamaConfig
from llama_ext.models.fields import FieldReader
from llama_ext.models.rope_parameters import DEFAULT_ROPE_THETA

__all__ = ["ROPE_FACTORS", "llama3_factors", "read_gguf_rope", "rope_metadata"]

ROPE_FACTORS = "rope_freqs.weight"
_LONG_ROPE = ("rope_factors_long.weight", "rope_factors_short.weight")
# Of one frequency, against what the file says in float32.
_TOLERANCE = 1e-5

Doubles = npt.NDArray[np.float64]


def llama3_factors(head_dim: int, theta: float, factor: float, low: float, high: float, original: float) -> Doubles:
    """What each frequency of llama3's scaling is divided by.

    Args:
        head_dim: D.
        theta: The base.
        factor: The divisor of long wavelengths.
        low: low_freq_factor.
        high: high_freq_factor.
        original: original_max_position_embeddings.

    Returns:
        (D / 2,) divisors, each in [1, factor].
    """
    rotations = original * _frequencies(head_dim, theta)
    smooth = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    factors: Doubles = 1.0 / ((1.0 - smooth) / factor + smooth)
    return factors


def _frequencies(head_dim: int, theta: float) -> Doubles:
    """Rotations per position: one over the wavelength."""
    frequencies: Doubles = theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    return frequencies


def read_gguf_rope(
    reader: FieldReader, tensors: Mapping[str, GgufTensor], head_dim: int, context: int, *, path: str | None
) -> dict[str, Any]:
    """The rotation that a file asks for.

    Args:
        reader: The file's keys, without "llama.".
        tensors: Its tensors.
        head_dim: D.
        context: Positions of the context.
        path: The file, for messages.

    Returns:
        `rope_parameters` of a config.json.

    Raises:
        FormatError: A value is missing or out of range, or the factors are not D / 2 positive numbers.
        UnsupportedError: A rotation that is not supported.
    """
    theta = reader.number("rope.freq_base", DEFAULT_ROPE_THETA, above=0.0)
    kind = reader.optional_text("rope.scaling.type") or "none"
    factor = reader.optional_number("rope.scaling.factor", minimum=0.0)
    linear = reader.optional_number("rope.scale_linear", minimum=0.0)
    if kind == "none" and "rope.scaling.type" not in reader.values and (factor or linear or 1.0) != 1.0:
        kind = "linear"  # as written before there were types
    factor = factor or linear or 1.0  # 0 is how "not scaled" is written as well
    if kind not in ("none", "linear", "yarn") or any(name in tensors for name in _LONG_ROPE):
        named = "longrope" if kind in ("none", "linear", "yarn") else kind
        reader.refuse(
            f"{reader.prefix}rope.scaling.type {shown(named)} is not supported. Supported: none, linear, yarn."
        )
    if ROPE_FACTORS in tensors:
        if kind != "none" and factor != 1.0:
            reader.refuse(f"{reader.prefix}rope.scaling.type {kind!r} together with {ROPE_FACTORS} is not supported.")
        return _from_factors(_read_factors(tensors[ROPE_FACTORS], head_dim, path), head_dim, theta, reader)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return {"rope_type": "default", "rope_theta": theta}
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": _at_least_one(reader, factor)}
    return _yarn(reader, theta, _at_least_one(reader, factor), context)


def _at_least_one(reader: FieldReader, factor: float) -> float:
    if factor < 1.0:
        reader.fail("rope.scaling.factor", "a number >= 1", factor)
    return factor


def _yarn(reader: FieldReader, theta: float, factor: float, context: int) -> dict[str, Any]:
    for name, usual in (
        ("yarn_ext_factor", (-1.0, 1.0)),
        ("yarn_log_multiplier", (0.0,)),
        ("yarn_attn_factor", (1.0,)),
    ):
        value = reader.optional_number(f"rope.scaling.{name}")
        if value is not None and value not in usual:
            reader.refuse(f"{reader.prefix}rope.scaling.{name} = {value:g} is not supported.")
    # In the file relative to the usual one.
    attention = reader.optional_number("rope.scaling.attn_factor", above=0.0)
    usual_attention = 1.0 + 0.1 * math.log(factor)
    original = reader.integer("rope.scaling.original_context_length", 0, minimum=0, limit="positions")
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": original or context,
        "attention_factor": None if attention in (None, 1.0) else attention * usual_attention,
        "beta_fast": reader.optional_number("rope.scaling.yarn_beta_fast", minimum=0.0),
        "beta_slow": reader.optional_number("rope.scaling.yarn_beta_slow", minimum=0.0),
    }


def _read_factors(tensor: GgufTensor, head_dim: int, path: str | None) -> Doubles:
    if tensor.shape != (head_dim // 2,):
        raise FormatError(
            f"tensor {tensor.name} must have shape ({head_dim // 2},), half a head, got {tensor.shape}.",
            path=path,
            field=tensor.name,
            expected=(head_dim // 2,),
            got=tensor.shape,
        )
    factors = tensor.dequantize().astype(np.float64)
    if not np.isfinite(factors).all() or (factors <= 0).any():
        raise FormatError(f"tensor {tensor.name} must hold positive numbers.", path=path, field=tensor.name)
    return factors


def _from_factors(factors: Doubles, head_dim: int, theta: float, reader: FieldReader) -> dict[str, Any]:
    if np.all(factors == 1.0):
        return {"rope_type": "default", "rope_theta": theta}
    factor = float(str(np.float32(factors.max())))
    if factor > 1.0:
        hint = reader.optional_integer("rope.scaling.original_context_length", minimum=0, limit="positions")
        for low, high, original in _candidates(factors, factor, _frequencies(head_dim, theta), hint):
            found = llama3_factors(head_dim, theta, factor, low, high, original)
            if np.allclose(found, factors, rtol=_TOLERANCE, atol=0.0):
                return {
                    "rope_type": "llama3",
                    "rope_theta": theta,
                    "factor": factor,
                    "low_freq_factor": low,
                    "high_freq_factor": high,
                    "original_max_position_embeddings": original,
                }
    where = f"{reader.path}: " if reader.path else ""
    raise UnsupportedError(f"{where}{ROPE_FACTORS} = {shown(factors.tolist())} is not supported: not llama3's scaling.")


def _candidates(
    factors: Doubles, factor: float, frequencies: Doubles, hint: int | None
) -> Iterator[tuple[float, float, int]]:
    """(low, high, original) that may give these factors: the published ones, and those that a fit gives."""
    if hint:
        yield 1.0, 4.0, hint
    yield 1.0, 4.0, 8192
    for power in range(4, 21):
        yield 1.0, 4.0, 1 << power
    smooth = (1.0 / factors - 1.0 / factor) / (1.0 - 1.0 / factor)
    rounding = 2e-7 / (1.0 - 1.0 / factor)  # of float32 factors
    is_between = (smooth > rounding) & (smooth < 1.0 - rounding)
    original = 8192
    turns = frequencies * original
    between, parts = turns[is_between], smooth[is_between]
    if len(between) >= 2:
        slope, intercept = np.polyfit(between, parts, 1)
        if slope > 0 > intercept:
            yield float(-intercept / slope), float((1.0 - intercept) / slope), original
        return
    # Not enough for two numbers: any will do that divide the other frequencies alike.
    least = float(turns[smooth <= rounding].max(initial=0.0))
    most = float(turns[smooth >= 1.0 - rounding].min(initial=4.0 * float(turns.max())))
    if len(between) == 0:
        yield least + (most - least) / 3.0, most - (most - least) / 3.0, original
        return
    turn, part = float(between[0]), float(parts[0])
    low = turn / (3.0 * part + 1.0)
    yield low, 4.0 * low, original  # the published ratio
    for halvings in range(16):
        low = turn - (turn - least) * 0.5**halvings
        yield low, low + (turn - low) / part, original


def rope_metadata(config: LlamaConfig) -> tuple[dict[str, Any], npt.NDArray[np.float32] | None]:
    """The rotation's keys for a GGUF file.

    Args:
        config: The model.

    Returns:
        The entries, and the factors (D / 2) of llama3's scaling.

    Raises:
        UnsupportedError: yarn whose ramp is not rounded: GGUF has no word for it.
    """
    rope = config.rope_parameters
    entries: dict[str, Any] = {
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": rope.rope_theta,
    }
    if rope.rope_type == "llama3":
        numbers = (rope.factor, rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position_embeddings)
        factor, low, high, original = (float(number or 0) for number in numbers)
        factors = llama3_factors(config.head_dim, rope.rope_theta, factor, low, high, original)
        # Of no effect without a type; where several numbers mean the same rotation, it says which one it was.
        entries["llama.rope.scaling.original_context_length"] = rope.original_max_position_embeddings
        return entries, factors.astype(np.float32)
    if rope.rope_type in ("linear", "yarn"):
        entries["llama.rope.scaling.type"] = rope.rope_type
        entries["llama.rope.scaling.factor"] = rope.factor
    if rope.rope_type == "yarn":
        if rope.truncate is False:
            raise UnsupportedError("rope_parameters.truncate = false cannot be written to a GGUF file.")
        entries["llama.rope.scaling.original_context_length"] = rope.original_max_position_embeddings
        entries["llama.rope.scaling.yarn_beta_fast"] = rope.beta_fast
        entries["llama.rope.scaling.yarn_beta_slow"] = rope.beta_slow
        usual = 1.0 + 0.1 * math.log(rope.factor or 1.0)
        if not math.isclose(rope.effective_attention_factor, usual, rel_tol=1e-7):
            entries["llama.rope.scaling.attn_factor"] = rope.effective_attention_factor / usual
    return entries, None
