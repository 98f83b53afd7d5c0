"""Reading the fields of a config one by one: type, range and limit are checked where the value enters."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from llama_ext._options import shown
from llama_ext.errors import FormatError, LimitError, OptionError, UnsupportedError
from llama_ext.limits import DEFAULT_LIMITS, Limits, check_limits

__all__ = ["LEAST_EPS", "FieldReader"]

# What is above it is above 0 as float32, too, in which norms use it.
LEAST_EPS = 2.0**-150


class FieldReader:
    """The fields of one JSON object, or the keyword arguments of a constructor, each checked when it is read.

    A field that is absent or null takes its default, as in Hugging Face's configs. `True` is not a number here and
    neither is `"4096"`: a config that says so was not written by a program that knew what it meant.

    Args:
        values: The fields.
        path: The file they come from, for messages.
        from_file: True: mistakes are a FormatError; False: they are an argument's, an OptionError.
        prefix: What comes before a field's name in a message ("rope_parameters.").
        limits: The bounds.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        *,
        path: str | None = None,
        from_file: bool = True,
        prefix: str = "",
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.values = values
        self.path = path
        self.from_file = from_file
        self.prefix = prefix
        check_limits(limits)
        self.limits = limits

    def nested(self, values: Mapping[str, Any], prefix: str) -> FieldReader:
        """A reader of an object inside this one.

        Args:
            values: The inner object.
            prefix: What comes before its fields' names in messages.

        Returns:
            A reader with the same path and limits.
        """
        return FieldReader(values, path=self.path, from_file=self.from_file, prefix=prefix, limits=self.limits)

    def fail(self, name: str, expected: str, got: object, advice: str = "") -> NoReturn:
        """Raises the error for a field that is not what it has to be.

        Args:
            name: The field.
            expected: What it has to be, to follow "must be".
            got: What it is.
            advice: A sentence on what to do.

        Raises:
            FormatError: The fields come from a file.
            OptionError: They are arguments.
        """
        field = self.prefix + name
        message = f"{field} must be {expected}, got {shown(got)}." + (f" {advice}" if advice else "")
        if self.from_file:
            plain = got if got is None or isinstance(got, (bool, int, float, str)) else shown(got)
            raise FormatError(message, path=self.path, field=field, expected=expected, got=plain)
        raise OptionError(message)

    def refuse(self, message: str) -> NoReturn:
        """Raises the error for a value that is valid but not supported.

        Args:
            message: A sentence that names it.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(f"{self.path}: {message}" if self.path else message)

    def integer(
        self, name: str, default: int, *, minimum: int = 1, maximum: int | None = None, limit: str | None = None
    ) -> int:
        """An integer field.

        Args:
            name: The field.
            default: Its value when it is absent or null.
            minimum: The smallest valid value.
            maximum: The largest valid value.
            limit: The field of `Limits` that bounds it.

        Returns:
            The value.

        Raises:
            FormatError: Not an integer, or out of range; OptionError for an argument.
            LimitError: Beyond the limit.
        """
        value = self.optional_integer(name, minimum=minimum, maximum=maximum, limit=limit)
        return default if value is None else value

    def optional_integer(
        self, name: str, *, minimum: int = 1, maximum: int | None = None, limit: str | None = None
    ) -> int | None:
        """An integer field without a default: None when it is absent or null. See `integer`."""
        value = self.values.get(name)
        if value is None:
            return None
        expected = f"an integer >= {minimum}" if maximum is None else f"an integer from {minimum} to {maximum}"
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            self.fail(name, expected, value)
        result = int(value)
        if result < minimum or (maximum is not None and result > maximum):
            self.fail(name, expected, value)
        if limit is not None:
            self.check_limit(name, result, limit)
        return result

    def check_limit(self, name: str, value: int, limit: str) -> None:
        """Raises LimitError when a number is beyond a field of `Limits`.

        Args:
            name: What the number is.
            value: The number.
            limit: The field of `Limits`.

        Raises:
            LimitError: It is larger.
        """
        most: int = getattr(self.limits, limit)
        if value > most:
            where = f"{self.path}: " if self.path else ""
            raise LimitError(
                f"{where}{self.prefix}{name} is {shown(value)}, the limit is {most} (Limits.{limit}). "
                "Pass a larger Limits if you trust it."
            )

    def number(
        self,
        name: str,
        default: float,
        *,
        minimum: float = -math.inf,
        maximum: float = math.inf,
        above: float | None = None,
    ) -> float:
        """A finite number field; an integer is a number.

        Args:
            name: The field.
            default: Its value when it is absent or null.
            minimum: The smallest valid value.
            maximum: The largest valid value.
            above: The value has to be larger than this.

        Returns:
            The value as a float.

        Raises:
            FormatError: Not a finite number, or out of range; OptionError for an argument.
        """
        value = self.optional_number(name, minimum=minimum, maximum=maximum, above=above)
        return default if value is None else value

    def optional_number(
        self, name: str, *, minimum: float = -math.inf, maximum: float = math.inf, above: float | None = None
    ) -> float | None:
        """A number field without a default: None when it is absent or null. See `number`."""
        value = self.values.get(name)
        if value is None:
            return None
        conditions = []
        if above is not None:
            conditions.append(f"> {above:g}")
        if minimum > -math.inf:
            conditions.append(f">= {minimum:g}")
        if maximum < math.inf:
            conditions.append(f"<= {maximum:g}")
        expected = " ".join(["a finite number", " and ".join(conditions)]).rstrip()
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            self.fail(name, expected, value)
        try:
            result = float(value)
        except OverflowError:
            self.fail(name, expected, value)
        inside = math.isfinite(result) and minimum <= result <= maximum and (above is None or result > above)
        if not inside:
            self.fail(name, expected, value)
        return result

    def boolean(self, name: str, default: bool) -> bool:
        """A boolean field: `default` when it is absent or null.

        Args:
            name: The field.
            default: Its value when it is absent or null.

        Returns:
            The value.

        Raises:
            FormatError: Neither true nor false; OptionError for an argument.
        """
        value = self.optional_boolean(name)
        return default if value is None else value

    def optional_boolean(self, name: str) -> bool | None:
        """A boolean field without a default: None when it is absent or null. See `boolean`."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, bool):
            self.fail(name, "true or false", value)
        return value

    def optional_text(self, name: str) -> str | None:
        """A text field: None when it is absent or null.

        Args:
            name: The field.

        Returns:
            The text.

        Raises:
            FormatError: Not a string; OptionError for an argument.
        """
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            self.fail(name, "a string", value)
        return value

    def optional_mapping(self, name: str) -> Mapping[str, Any] | None:
        """An object field: None when it is absent or null.

        Args:
            name: The field.

        Returns:
            The object.

        Raises:
            FormatError: Not an object with text keys; OptionError for an argument.
        """
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            self.fail(name, "an object", value)
        return value

    def token_id(self, name: str, default: int | None) -> int | None:
        """A token id: None when it is null or -1, the spelling of "none" in early Llama conversions.

        It may lie beyond the vocabulary, as the padding id of many fine-tuned checkpoints does: it is a fact about the
        tokenizer, and an id is checked against the vocabulary when it is used.

        Args:
            name: The field.
            default: Its value when it is absent.

        Returns:
            The id.

        Raises:
            FormatError: Not an integer >= -1; OptionError for an argument.
            LimitError: Beyond `Limits.vocabulary`.
        """
        if name not in self.values:
            return default
        value = self.optional_integer(name, minimum=-1, limit="vocabulary")
        return None if value == -1 else value

    def token_ids(self, name: str, default: int | None) -> int | list[int] | None:
        """One token id or a list of them; an empty list is None. See `token_id`."""
        value = self.values.get(name)
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
            return self.token_id(name, default)
        self.check_limit(f"the length of {name}", len(value), "vocabulary")
        inner = self.nested({str(index): item for index, item in enumerate(value)}, f"{self.prefix}{name}.")
        ids = [inner.token_id(key, None) for key in inner.values]
        if None in ids:
            self.fail(name, "a token id or a list of token ids", value)
        return [item for item in ids if item is not None] or None
