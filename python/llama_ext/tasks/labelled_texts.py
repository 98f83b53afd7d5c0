"""Texts and their labels as a classifier is given them: what they must be, and how often a text is seen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_ext._options import shown, whole_seed
from llama_ext.errors import DTypeError, FormatError, OptionError
from llama_ext.io.json_file import read_json_object
from llama_ext.runtime.classifier import checked_labels

__all__ = [
    "MOST_REPEATS",
    "check_label_names",
    "count_of",
    "listed",
    "read_labels",
    "repeats",
    "texts_and_labels",
]

# A text seen more often in an epoch is learned by heart.
MOST_REPEATS = 1000


def check_label_names(labels: object) -> None:
    """Raises OptionError where labels are something else than strings; what else is wrong with them is told elsewhere."""
    names = list(labels) if isinstance(labels, (Sequence, np.ndarray)) and not isinstance(labels, (str, bytes)) else []
    for name in names:
        if not isinstance(name, str):
            raise OptionError(
                f"labels must be strings, got {shown(name)} ({type(name).__name__}) in {shown(names)}: name them, as "
                f"labels={[str(each) for each in names[:2]]}"
            )


def count_of(what: str, texts: object) -> int:
    """How many texts there are.

    Raises:
        DTypeError: It is no list.
    """
    if isinstance(texts, (str, bytes)) or not isinstance(texts, (Sequence, np.ndarray)):
        raise DTypeError(f"{what} must be a list of texts, got {type(texts).__name__}")
    return len(texts)


def texts_and_labels(data: object) -> tuple[Any, Any]:
    """The two parts of validation_data.

    Raises:
        DTypeError: There are no two.
    """
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise DTypeError(f"validation_data must be (texts, labels), got {type(data).__name__}")
    return data[0], data[1]


def listed(names: Sequence[str]) -> str:
    """Some of them, where there are many."""
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def repeats(indices: Sequence[int], weights: npt.NDArray[np.float64], seed: int) -> list[int]:
    """Which text to take how often: whole parts of its weight, and the rest by chance."""
    number = whole_seed(seed)
    if (weights == 1.0).all():
        return list(range(len(indices)))
    rng = np.random.Generator(np.random.Philox(key=number))
    wanted = np.minimum(weights[np.asarray(indices)], MOST_REPEATS)
    times = np.floor(wanted + rng.random(len(indices))).astype(np.int64)
    found: list[int] = np.repeat(np.arange(len(indices)), times).tolist()
    if not found:
        raise OptionError("class_weights are so small that no text is left")
    return found


def read_labels(path: Path) -> list[str]:
    """The labels of an adapter that was saved.

    Raises:
        FormatError: The file is malformed.
    """
    values = read_json_object(path, what="a classifier's labels")
    try:
        return checked_labels(values.get("labels"))
    except OptionError as error:
        raise FormatError(str(error), path=str(path), field="labels") from error
