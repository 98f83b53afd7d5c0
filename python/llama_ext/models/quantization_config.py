"""`quantization_config` of a directory with packed weights, as config.json has it.

    {"quant_method": "llama_ext", "layout": "panels-32-v1", "types": {"": ["int4", 128], "embedding": ["int8", 128], ...}}

`layout` names how a matrix lies in memory, and so in the file. `types` has the encoding of each slot's matrix and how many
weights share a scale, 0 for floating point; "" stands for the model as a whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from llama_ext._options import shown
from llama_ext.errors import CheckpointError, FormatError

__all__ = ["KEY", "METHOD", "QuantizationConfig", "is_ours"]

KEY = "quantization_config"
METHOD = "llama_ext"


def is_ours(value: object) -> bool:
    """Whether it is the `quantization_config` of weights that this package packed."""
    return isinstance(value, Mapping) and value.get("quant_method") == METHOD


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """How the matrices of a directory are packed.

    Args:
        layout: `matrix_layout` of the backend that packed them.
        types: By slot, the encoding and the group; "" is that of the model.
    """

    layout: str
    types: dict[str, tuple[str, int]]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], slots: Iterable[str], *, path: str | None) -> QuantizationConfig:
        """Reads what `to_dict` wrote.

        Args:
            values: The object in config.json; `is_ours`.
            slots: The slots of the model's matrices, each of which must have a type.
            path: The file, for messages.

        Returns:
            The checked config; whether there is such an encoding is not known here.

        Raises:
            FormatError: A value is of the wrong type.
            CheckpointError: A slot has no type, or there is a type for a slot that the model lacks.
        """
        layout, given = values.get("layout"), values.get("types")
        if not isinstance(layout, str):
            _fail("layout", "a name", layout, path)
        if not isinstance(given, Mapping):
            _fail("types", "an object of slots and types", given, path)
        types: dict[str, tuple[str, int]] = {}
        for slot, value in given.items():
            sound = isinstance(value, (list, tuple)) and len(value) == 2 and isinstance(value[0], str)
            if not sound or isinstance(value[1], bool) or not isinstance(value[1], int) or not 0 <= value[1] <= 1 << 16:
                _fail(f"types[{shown(slot)}]", 'an encoding and a group, like ["int4", 128]', value, path)
            types[slot] = (value[0], value[1])
        expected = {"", *slots}
        for slot in [*sorted(expected - types.keys()), *sorted(types.keys() - expected)]:
            what = "has no type for" if slot in expected else "has a type for"
            raise CheckpointError(
                f"{KEY} {what} {shown(slot)}, which this model {'has' if slot in expected else 'lacks'}. "
                "Is config.json of another model?",
                path=path,
                field=KEY,
            )
        return cls(layout, types)

    def to_dict(self) -> dict[str, Any]:
        """The object for config.json."""
        types = {slot: list(self.types[slot]) for slot in sorted(self.types)}
        return {"quant_method": METHOD, "layout": self.layout, "types": types}


def _fail(name: str, expected: str, got: object, path: str | None) -> NoReturn:
    raise FormatError(
        f"{KEY}.{name} must be {expected}, got {shown(got)}.", path=path, field=KEY, expected=expected, got=shown(got)
    )
