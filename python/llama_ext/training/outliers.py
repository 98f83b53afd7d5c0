"""Steps that would do harm: losses or gradients far from those before them."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable

from llama_ext.errors import NumericError
from llama_ext.training.history import StepRecord

__all__ = ["OutlierRule"]

_WINDOW = 128
_LEAST = 32
_MOST_IN_A_ROW = 32


class OutlierRule:
    """Whether to skip a step.

    A step is an outlier when its loss or the norm of its gradients lies more than `deviations` standard deviations above the mean
    of the last 128 steps that were not skipped, once there are 32 of them; or is not finite.

    Args:
        deviations: None skips nothing: then a number that is not finite raises.
        records: The steps so far, of a run that goes on.
    """

    def __init__(self, deviations: float | None, records: Iterable[StepRecord] = ()) -> None:
        self._deviations = deviations
        self._recent: deque[tuple[float, float]] = deque(maxlen=_WINDOW)
        self._skipped = 0
        for record in records:
            self.note(record.loss, record.grad_norm, record.skipped)

    def note(self, loss: float, norm: float, skipped: bool) -> None:
        """Remembers a step."""
        self._skipped = self._skipped + 1 if skipped else 0
        if not skipped:
            self._recent.append((loss, norm))

    def skips(self, loss: float, norm: float, step: int) -> bool:
        """Whether a step is an outlier.

        Raises:
            NumericError: It is not finite and nothing is to be skipped, or 32 steps in a row were outliers.
        """
        finite = math.isfinite(loss) and math.isfinite(norm)
        if self._deviations is None:
            if not finite:
                raise NumericError(
                    f"step {step}: the loss is {loss} and the norm of the gradients {norm}. Nothing was changed by this step. "
                    "Lower the learning rate, add warm-up, or skip such steps: skip_outliers=6"
                )
            return False
        outlier = not finite or self._is_far(loss, norm)
        if outlier and self._skipped >= _MOST_IN_A_ROW:
            raise NumericError(
                f"step {step}: {self._skipped} steps in a row were outliers (loss {loss}, norm of the gradients {norm}): "
                "the run has left what it was. Go on from an earlier checkpoint with a lower learning rate"
            )
        return outlier

    def _is_far(self, loss: float, norm: float) -> bool:
        if self._deviations is None or len(self._recent) < _LEAST:
            return False
        for value, column in zip((loss, norm), zip(*self._recent, strict=True), strict=True):
            if value > statistics.fmean(column) + self._deviations * statistics.pstdev(column):
                return True
        return False
