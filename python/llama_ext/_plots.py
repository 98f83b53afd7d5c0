"""Pictures, by matplotlib, which is an extra."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_ext.errors import UnsupportedError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["new_figure"]


def new_figure(what: str, size: tuple[float, float]) -> Figure:
    """An empty figure. Not pyplot's: no window, no backend of a desktop, nothing that stays open.

    Args:
        what: Who draws, for the error.
        size: Width and height in inches.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(
            f"{what} needs the package matplotlib, which cannot be imported ({error}). "
            "Install it: pip install 'llama_ext[plot]'"
        ) from error
    return Figure(figsize=size, layout="constrained")
