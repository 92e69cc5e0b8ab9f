"""Non-finite values and loss spikes: what counts as one, and which module a non-finite value came from."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gpt.recipe import Divergence

NORMAL_MAD = 0.6745
"""Median absolute deviation of a normal distribution with standard deviation 1: its quantile at 3/4."""
SMALLEST_SPREAD = 0.01
"""The standard deviation of a loss counts as at least this share of its median: a loss that hardly varies is no spike
for rising a little."""


@dataclass(frozen=True)
class Fault:
    """Why a run goes back, and the first of the steps whose samples are left out."""

    reason: str
    first_step: int


class LossWatch:
    """Notices that a run has diverged. Every rank sees the same losses, so every rank comes to the same answer.

    `stage(step)` numbers the part of the data that a step belongs to, across which losses are not compared.
    """

    def __init__(self, settings: Divergence, warmup_steps: int, stage: Callable[[int], int]) -> None:
        self._settings, self._warmup_steps, self._stage = settings, warmup_steps, stage
        self._in_a_row = 0
        self._losses: deque[float] = deque(maxlen=settings.spike_window_steps)
        self._spikes: deque[int] = deque(maxlen=settings.spike_steps)
        self._last_stage = 0

    @property
    def memory_steps(self) -> int:
        """Finite losses on which the present answer depends."""
        return self._settings.spike_window_steps + self._settings.spike_steps

    @property
    def suspicious(self) -> bool:
        """Whether the newest step was skipped, or the newest finite loss a spike."""
        return bool(self._in_a_row or self._spikes)

    def restore(self, losses: Sequence[tuple[int, float]], skipped_in_a_row: int) -> None:
        """Take up, in a new one, the state after a step: the last `memory_steps` (step, finite loss) up to it, and how
        many steps in a row up to it were skipped."""
        for step, loss in losses:
            self._see_loss(step, loss)
        self._in_a_row = skipped_in_a_row

    def see(self, step: int, loss: float, *, applied: bool, can_go_back: bool) -> Fault | None:
        """A step's global loss and whether it changed the weights; a fault when the run has to go back.

        Without a checkpoint to go back to (`can_go_back`), a spike is none.
        """
        self._in_a_row = 0 if applied else self._in_a_row + 1
        if np.isfinite(loss):
            self._see_loss(step, loss)
        if self._in_a_row >= self._settings.skipped_steps:
            return Fault(
                f"{self._in_a_row} steps in a row had a loss or gradient that is not finite", step - self._in_a_row + 1
            )
        if can_go_back and len(self._spikes) == self._settings.spike_steps and self._spikes[-1] == step:
            return Fault(
                f"the loss is {loss:.4g}, after a median of {np.median(self._losses):.4g}, and was as far out in the "
                f"last {self._settings.spike_steps} steps",
                self._spikes[0],
            )
        return None

    def _see_loss(self, step: int, loss: float) -> None:
        if step <= self._warmup_steps or self._settings.spike_z_score is None:
            return
        stage = self._stage(step)
        if stage != self._last_stage:
            self._losses.clear()
            self._spikes.clear()
        self._last_stage = stage
        full = len(self._losses) == self._losses.maxlen
        if full and robust_z_score(loss, self._losses) > self._settings.spike_z_score:
            self._spikes.append(step)
        else:
            self._spikes.clear()
        self._losses.append(loss)


def robust_z_score(value: float, others: Sequence[float]) -> float:
    """How many standard deviations `value` is above the median of `others`, the deviation estimated from the median
    absolute one (Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993)."""
    median = float(np.median(others))
    deviation = float(np.median(np.abs(np.asarray(others) - median))) / NORMAL_MAD
    return (value - median) / max(deviation, SMALLEST_SPREAD * abs(median), 1e-12)


@dataclass(frozen=True, order=True)
class Origin:
    """Where a value was first not finite. Ascending: the earlier forward first, an output before a gradient."""

    micro_batch: int
    is_gradient: bool
    rank: int
    module: str

    def __str__(self) -> str:
        what = "gradient" if self.is_gradient else "output"
        return f"the {what} of {self.module} (rank {self.rank}, micro-batch {self.micro_batch})"


@contextlib.contextmanager
def first_non_finite(model: torch.nn.Module, rank: int) -> Iterator[list[Origin]]:
    """Watch the forwards and backwards that run inside: the list gets the first origin, if there is one.

    A module's gradient is that of its parameters or of its own use of its inputs. Micro-batches are counted from 1 by
    the model's own forwards.
    """
    found: list[Origin] = []
    forwards = 0

    def look(value: torch.Tensor, module: str, *, is_gradient: bool) -> None:
        if not found and not torch.isfinite(value).all():
            found.append(Origin(forwards, is_gradient, rank, module))

    def watch_gradient(tensor: torch.Tensor, module: str) -> Any:
        return tensor.register_hook(lambda gradient: look(gradient, module, is_gradient=True))

    def before(name: str) -> Any:
        def own_use(value: Any) -> Any:
            """The input as a tensor of this module alone: its gradient has no other module's share."""
            if not (isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled()):
                return value
            value = value.view_as(value)
            watch_gradient(value, name)
            return value

        def hook(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
            nonlocal forwards
            forwards += module is model
            return tuple(map(own_use, args)), {key: own_use(value) for key, value in kwargs.items()}

        return hook

    def after(name: str) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            for tensor in _float_tensors(output):
                look(tensor, name, is_gradient=False)

        return hook

    handles = []
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(before(name or "the model"), with_kwargs=True))
            handles.append(module.register_forward_hook(after(name or "the model")))
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad:
                    handles.append(watch_gradient(parameter, name or "the model"))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _float_tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict | list | tuple):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _float_tensors(child)


RandomState = tuple[torch.Tensor, torch.Tensor | None]


def random_state(device: torch.device) -> RandomState:
    """The state of torch's generators of the processor and of the rank's device."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
