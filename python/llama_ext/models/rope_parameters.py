"""The rotary position embedding's settings, in both spellings of Hugging Face's configs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from llama_ext._options import shown
from llama_ext.models.fields import FieldReader

__all__ = ["DEFAULT_ROPE_THETA", "ROPE_TYPES", "RopeParameters", "read_rope"]

DEFAULT_ROPE_THETA = 10000.0

# The fields that mean something for each type, beside rope_type and rope_theta. As in transformers, a field that
# belongs to another type is ignored.
_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
ROPE_TYPES = tuple(_FIELDS)

# Keys that belong to rotations we do not have: their presence says that the type alone is not the whole story.
_REFUSED = (
    "alpha",
    "llama_4_scaling_beta",
    "long_factor",
    "long_mscale",
    "mrope_interleaved",
    "mrope_section",
    "short_factor",
    "short_mscale",
)


@dataclasses.dataclass(frozen=True)
class RopeParameters:
    """Frequencies of the rotary position embedding. Fields that the type does not use are None.

    Args:
        rope_type: default | linear | llama3 | yarn.
        rope_theta: The base, > 0; > 1 for yarn.
        factor: How many times longer the context became, >= 1. linear, llama3, yarn: required.
        low_freq_factor: llama3, required: wavelengths above original / low_freq_factor are scaled. > 0.
        high_freq_factor: llama3, required: wavelengths below original / high_freq_factor are kept. > low_freq_factor.
        original_max_position_embeddings: llama3, yarn: positions before the extension. None: the config's
            max_position_embeddings, which `LlamaConfig` fills in.
        attention_factor: yarn: scales cos and sin, > 0. None: from factor, mscale and mscale_all_dim.
        beta_fast: yarn: rotations above which a dimension is kept, default 32.
        beta_slow: yarn: rotations below which a dimension is scaled, default 1, at most beta_fast.
        mscale: yarn: numerator's weight of log(factor) in the attention factor; only together with mscale_all_dim.
        mscale_all_dim: yarn: the denominator's.
        truncate: yarn: whether the ramp's ends are rounded to whole dimensions, default True.
        extra: Keys that change nothing and are kept for writing ("finetuned").

    Raises:
        OptionError: A field is missing or out of range.
        UnsupportedError: Another rope_type, or a key of a rotation that is not supported.

    Source: transformers' modeling_rope_utils, versions 4.57 and 5.23.
    """

    rope_type: str = "default"
    rope_theta: float = DEFAULT_ROPE_THETA
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, hash=False)

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        given.update(given.pop("extra"))
        for name, value in _checked(FieldReader(given, from_file=False, prefix="rope_parameters.")).items():
            object.__setattr__(self, name, value)

    @property
    def effective_attention_factor(self) -> float:
        """What cos and sin are multiplied by: 1 for every type but yarn."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        factor = 1.0 if self.factor is None else self.factor
        if self.mscale and self.mscale_all_dim:
            return _mscale(factor, self.mscale) / _mscale(factor, self.mscale_all_dim)
        return _mscale(factor, 1.0)

    def to_dict(self) -> dict[str, Any]:
        """The spelling of transformers 5: `rope_parameters`.

        Returns:
            rope_type, rope_theta and the fields of this type.
        """
        return {**self.extra, "rope_type": self.rope_type, "rope_theta": self.rope_theta, **self._scaling()}

    def to_rope_scaling(self) -> dict[str, Any] | None:
        """The spelling of transformers 4: `rope_scaling`, beside a top-level `rope_theta`.

        Returns:
            None for unscaled frequencies. A linear scaling has exactly the two fields, `type` and `factor`, that
            releases before 4.43 insist on; later ones, and 5, read `type` as well.
        """
        if self.rope_type == "default" or (self.rope_type == "linear" and self.factor == 1.0):
            return None
        key = "type" if self.rope_type == "linear" else "rope_type"
        return {key: self.rope_type, **self._scaling()}

    def _scaling(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in _FIELDS[self.rope_type]}
        return {
            name: value for name, value in fields.items() if value is not None and (name, value) != ("truncate", True)
        }


def _mscale(scale: float, weight: float) -> float:
    return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0


def _checked(reader: FieldReader) -> dict[str, Any]:
    """The attributes of RopeParameters from its fields; raises for what is missing, wrong or not supported."""
    values = reader.values
    kind = values.get("rope_type", values.get("type"))
    if kind is None:
        scaled = sorted(
            set(values) & {name for names in _FIELDS.values() for name in names if values.get(name) is not None}
        )
        if scaled:
            reader.fail(
                "rope_type", f"one of {', '.join(ROPE_TYPES)}", None, f"There is a {scaled[0]}, but of which type?"
            )
        kind = "default"
    if not isinstance(kind, str):
        reader.fail("rope_type", f"one of {', '.join(ROPE_TYPES)}", kind)
    if "rope_type" in values and values.get("type", kind) != kind:
        reader.fail("type", f"the same as rope_type, {kind!r}", values["type"])
    for name, value in values.items():
        if isinstance(value, Mapping):
            reader.refuse(f"{reader.prefix}{name}: another rotation for some layers is not supported.")
    if kind not in _FIELDS:
        reader.refuse(
            f"{reader.prefix}rope_type {shown(kind)} is not supported. Supported: {', '.join(ROPE_TYPES)}. "
            "Its frequencies would be wrong, so the model is not loaded."
        )
    for name in _REFUSED:
        if values.get(name) is not None:
            reader.refuse(f"{reader.prefix}{name} is not supported: it changes the rotation.")
    if reader.optional_number("partial_rotary_factor") not in (None, 1.0):
        reader.refuse(
            f"{reader.prefix}partial_rotary_factor other than 1 is not supported, got {values['partial_rotary_factor']}."
        )

    result: dict[str, Any] = {field.name: None for field in dataclasses.fields(RopeParameters)}
    result["rope_type"] = kind
    result["rope_theta"] = reader.number("rope_theta", DEFAULT_ROPE_THETA, above=1.0 if kind == "yarn" else 0.0)
    known = set(result) - {"extra"} | {"type", "partial_rotary_factor"}
    result["extra"] = {name: value for name, value in values.items() if name not in known}
    for name in _FIELDS[kind]:
        if name == "original_max_position_embeddings":
            result[name] = reader.optional_integer(name, limit="positions")
        elif name == "truncate":
            result[name] = reader.boolean(name, True)
        elif name == "factor":
            result[name] = reader.optional_number(name, minimum=1.0)
        elif name in ("low_freq_factor", "high_freq_factor", "attention_factor"):
            result[name] = reader.optional_number(name, above=0.0)
        else:
            result[name] = reader.optional_number(name, minimum=0.0)
    _check_together(reader, kind, result)
    return result


def _check_together(reader: FieldReader, kind: str, result: dict[str, Any]) -> None:
    required = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ("factor",)}
    for name in required.get(kind, ()):
        if result[name] is None:
            reader.fail(name, f"a number for rope_type {kind!r}", None)
    if kind == "llama3" and result["high_freq_factor"] <= result["low_freq_factor"]:
        reader.fail(
            "high_freq_factor",
            f"larger than low_freq_factor, {result['low_freq_factor']:g}",
            result["high_freq_factor"],
        )
    if kind == "yarn":
        # `or`, not `is None`: in transformers a zero is the default as well.
        result["beta_fast"] = result["beta_fast"] or 32.0
        result["beta_slow"] = result["beta_slow"] or 1.0
        if result["beta_fast"] < result["beta_slow"]:
            reader.fail("beta_fast", f"at least beta_slow, {result['beta_slow']:g}", result["beta_fast"])


def read_rope(reader: FieldReader, max_position_embeddings: int) -> RopeParameters:
    """The rotation that a config asks for, whichever of the spellings it uses.

    transformers 4 reads `rope_theta` and `rope_scaling`, 5 reads these and `rope_parameters`. A file may have both,
    and has to mean the same by them: otherwise it is a different model in each version, and nobody can tell which one
    was trained.

    Args:
        reader: The whole config.
        max_position_embeddings: The context; what original_max_position_embeddings is when nothing says.

    Returns:
        The settings, with original_max_position_embeddings filled in where the type uses it.

    Raises:
        FormatError: Missing, out of range or contradictory; OptionError for arguments.
        UnsupportedError: A rotation that is not supported.
    """
    theta = reader.optional_number("rope_theta", above=0.0)
    original = reader.optional_integer("original_max_position_embeddings", limit="positions")
    found: dict[str, RopeParameters] = {}
    # rope_scaling goes last: it is the one that transformers 5 prefers; they are equal but for the ignored keys.
    for name in ("rope_parameters", "rope_scaling"):
        given = reader.values.get(name)
        values = given.to_dict() if isinstance(given, RopeParameters) else reader.optional_mapping(name)
        if values is not None:
            found[name] = _resolved(reader, name, values, theta, original, max_position_embeddings)
    if len(found) == 2 and found["rope_parameters"] != found["rope_scaling"]:
        reader.fail(
            "rope_scaling",
            f"the same as rope_parameters, {shown(found['rope_parameters'].to_dict(), 400)}",
            found["rope_scaling"].to_dict(),
            "transformers 4 reads the one and 5 the other: delete the wrong one.",
        )
    if found:
        return found.get("rope_parameters") or found["rope_scaling"]
    return RopeParameters(rope_theta=DEFAULT_ROPE_THETA if theta is None else theta)


def _resolved(
    outer: FieldReader,
    name: str,
    values: Mapping[str, Any],
    theta: float | None,
    original: int | None,
    max_position_embeddings: int,
) -> RopeParameters:
    # null is absent here, so that what the config says outside can stand in for it.
    is_not_truncated = "truncate" in values and values["truncate"] is None
    values = {key: value for key, value in values.items() if value is not None or key == "factor"}
    if is_not_truncated:
        values["truncate"] = False  # as transformers takes it: null is no default there
    kind = values.get("rope_type", values.get("type"))
    outside: dict[str, float | None] = {"rope_theta": theta}
    if kind in ("llama3", "yarn"):
        outside["original_max_position_embeddings"] = original
    for key, value in outside.items():
        if value is not None and values.setdefault(key, value) != value:
            advice = "Versions of transformers differ in which of the two they read: delete the wrong one."
            outer.fail(f"{name}.{key}", f"the same as the config's own {key}, {value}", values[key], advice)
    if kind == "yarn" and "factor" in values and values["factor"] is None:
        # DeepSeek's spelling: null stands for the ratio of the context lengths.
        before = values.get("original_max_position_embeddings")
        if isinstance(before, int) and not isinstance(before, bool) and before > 0:
            values["factor"] = max_position_embeddings / before
    result = _checked(outer.nested(values, f"{name}."))
    if "original_max_position_embeddings" in _FIELDS[result["rope_type"]]:
        result["original_max_position_embeddings"] = (
            result["original_max_position_embeddings"] or max_position_embeddings
        )
    return RopeParameters(**result)
