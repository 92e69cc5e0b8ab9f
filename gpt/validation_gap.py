"""How far the validation loss is above the training loss, and when that gap opens."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.run_directory import json_lines

EVALUATIONS = 3
"""How many in a row must show the gap wider before it is called open."""
WIDER_BY = 0.02
"""Of the lowest validation loss: less is taken for noise."""


@dataclass(frozen=True)
class _Losses:
    step: int
    validation: float
    training: float

    @property
    def gap(self) -> float:
        return self.validation - self.training


class ValidationGap:
    """Sees the record of every step, in order, on rank 0.

    The gap is the validation loss less the mean over the target tokens of all steps since the evaluation before. It
    opens when, in EVALUATIONS in a row, the validation loss is above its lowest, the training loss is below what it was
    then, and the gap is wider than then by more than WIDER_BY of that lowest loss.
    """

    def __init__(self) -> None:
        self._loss_sum, self._target_tokens, self._wider = 0.0, 0, 0
        self._lowest: _Losses | None = None

    @classmethod
    def restore(cls, metrics: Path) -> "ValidationGap":
        """As it was after the newest step of a metrics.jsonl."""
        gap = cls()
        for record in json_lines(metrics):
            gap.see(record["step"], record)
        return gap

    def see(self, step: int, record: dict[str, Any]) -> str | None:
        """A step's record, which gets the gap where it has an evaluation (None: a loss was not finite). Returns a
        warning where the gap opens."""
        if _is_finite(record["train/loss"]):
            self._loss_sum += record["train/loss"] * record["train/target_tokens"]
            self._target_tokens += record["train/target_tokens"]
        if "evaluate/loss" not in record:
            return None
        if not (self._target_tokens and _is_finite(record["evaluate/loss"])):
            record["evaluate/gap"] = None
            return None
        now = _Losses(step, record["evaluate/loss"], self._loss_sum / self._target_tokens)
        self._loss_sum, self._target_tokens = 0.0, 0
        record["evaluate/gap"] = now.gap
        lowest = self._lowest
        if lowest is None or now.validation < lowest.validation:
            self._lowest, self._wider = now, 0
            return None
        wider = now.training < lowest.training and now.gap - lowest.gap > WIDER_BY * lowest.validation
        self._wider = self._wider + 1 if wider and now.validation > lowest.validation else 0
        if self._wider != EVALUATIONS:
            return None
        return (
            f"the model begins to over-fit: in {EVALUATIONS} evaluations in a row the validation loss was above its "
            f"lowest, {lowest.validation:.4f} at step {lowest.step} (now {now.validation:.4f}), while the training "
            f"loss fell from {lowest.training:.4f} to {now.training:.4f}. See evaluate.early_stopping, and "
            f"checkpoint.keep_best for the best step"
        )


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
