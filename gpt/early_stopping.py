"""Which step of a run is the best by one metric of its evaluations, and when they no longer get better."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpt.checkpoint.format import checkpoint_directory, list_checkpoints, read_manifest
from gpt.recipe import EarlyStopping
from gpt.run_directory import json_lines, stored_recipe


def cost(metric: str, value: Any) -> float:
    """A metric as a number of which less is better; one that is not finite (or None, as JSON has it) is the worst."""
    if value is None or not math.isfinite(value):
        return math.inf
    return -value if metric == "accuracy" else float(value)


def evaluations(run: Path, metric: str) -> list[tuple[int, float]]:
    """(step, cost) of each evaluation of the run, in order."""
    records = [record for record in json_lines(run / "metrics.jsonl") if "evaluate/loss" in record]
    return [(record["step"], cost(metric, record.get("evaluate/" + metric))) for record in records]


def checkpoint_costs(run: Path, steps: Iterable[int], metric: str) -> dict[int, float | None]:
    """Of the checkpoints of these steps; None where the run was not evaluated at that step."""
    if metric == "accuracy":
        known = dict(evaluations(run, metric))
        return {step: known.get(step) for step in steps}
    return {step: _loss(run, step) for step in steps}  # every manifest has it, and it orders steps as the others do


def best_step(run: Path) -> int:
    """The step of the best checkpoint that the run has, the earliest of equal ones.

    Raises:
        ValueError: no checkpoint has an evaluation at its step.
        FileNotFoundError: it is no run directory.
    """
    recipe = stored_recipe(run)
    if recipe is None:
        raise FileNotFoundError(f"{run} is no run directory: it has no recipe.yaml")
    metric = recipe.evaluate.metric
    rated = [(value, step) for step, value in checkpoint_costs(run, list_checkpoints(run), metric).items()]
    known = [(value, step) for value, step in rated if value is not None]
    if not known:
        raise ValueError(
            f"no checkpoint of {run} was evaluated at its step, so none is known to be the best: use --step"
        )
    return min(known)[1]


def better_than(run: Path, step: int) -> int | None:
    """The step of the run's best evaluation where it was better than the one of `step`, a checkpoint's."""
    recipe = stored_recipe(run)
    assert recipe is not None, "best_step has read it"
    values = dict(evaluations(run, recipe.evaluate.metric))
    best = min(values, key=lambda other: (values[other], other), default=step)
    return best if values.get(best, math.inf) < values.get(step, math.inf) else None


def _loss(run: Path, step: int) -> float | None:
    try:
        loss = read_manifest(checkpoint_directory(run, step)).evaluate_loss
        return None if loss is None else cost("loss", loss)
    except ValueError:  # damaged: it is no good one
        return None


class Patience:
    """Notices that a run no longer gets better. Every rank sees the same metrics and comes to the same answer."""

    def __init__(self, settings: EarlyStopping, metric: str) -> None:
        self._settings, self.metric = settings, metric
        self._best, self._best_step, self._without = math.inf, 0, 0

    def restore(self, past: Iterable[tuple[int, float]]) -> str | None:
        """Take up, in a new one, the state after these (step, cost) of all evaluations; as `see`, for the last one."""
        reason = None
        for step, value in past:
            reason = self.see(step, value)
        return reason

    def see(self, step: int, value: float) -> str | None:
        """An evaluation's cost; the reason why the run should end, where it should."""
        if value < self._best - self._settings.minimum_improvement or (self._best == math.inf and value < math.inf):
            self._best, self._best_step, self._without = value, step, 0
        else:
            self._without += 1
        if self._without < self._settings.patience_evaluations:
            return None
        best = f"{abs(self._best):.6g} at step {self._best_step}" if self._best_step else "never finite"
        return (
            f"the validation {self.metric} did not get better by more than {self._settings.minimum_improvement:g} in "
            f"{self._without} evaluations; the best was {best}"
        )
