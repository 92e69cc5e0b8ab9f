"""A trace of some steps of rank 0, by torch's profiler, in the format of Chrome's and Perfetto's traces."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, tensorboard_trace_handler

from gpt.metrics import say
from gpt.recipe import Recipe


class StepTrace:
    """Traces the steps `first` to `last`, or those of them that this start runs, into a file in `folder`."""

    def __init__(self, first: int, last: int, folder: Path) -> None:
        self._first, self._last, self._folder = first, last, folder
        self._profiler: profile | None = None
        self._done = False

    def before(self, step: int) -> None:
        """Begin where `step` is the first of them to run."""
        if self._profiler is None and not self._done and self._first <= step <= self._last:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profiler = profile(activities=activities)
            self._profiler.start()

    def after(self, step: int) -> None:
        """End and write where `step` is the last of them."""
        if step >= self._last:
            self.end()

    def end(self) -> None:
        """Write what was traced. The run does not end with a disk that does not take it."""
        if self._profiler is None:
            return
        self._profiler.stop()
        try:
            tensorboard_trace_handler(str(self._folder), worker_name="rank0")(self._profiler)
            say(f"profile: the trace is in {self._folder}, as rank0.….pt.trace.json")
        except (OSError, RuntimeError) as error:
            say(f"warning: the trace of profile.steps is not written: {error}")
        self._profiler, self._done = None, True


def step_trace(recipe: Recipe) -> StepTrace | None:
    """What traces the recipe's `profile.steps`, if it has any."""
    if recipe.profile is None:
        return None
    first, last = recipe.profile.steps
    return StepTrace(first, last, recipe.run_directory() / "tensorboard")
