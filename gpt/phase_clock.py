"""Where a rank's time goes: the seconds of each phase of its steps, taken without waiting for a device."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

COMPUTING = ("forward", "backward", "optimizer")
"""Phases of a step that a GPU works through while its host is ahead; collectives interrupt them."""
TAGS = {
    "data_wait": "performance/data_wait_seconds",
    "forward": "performance/forward_seconds",
    "backward": "performance/backward_seconds",
    "communication": "performance/communication_seconds",
    "optimizer": "performance/optimizer_seconds",
    "checkpoint_stall": "performance/checkpoint_stall_seconds",
    "logging": "performance/logging_seconds",
    "evaluation": "performance/evaluation_seconds",
}
STEP_PHASES = tuple(name for name in TAGS if name != "evaluation")


class PhaseClock:
    """Seconds of each phase since they were last taken. A phase within another one interrupts it: no time counts twice.

    On a CUDA device the phases of COMPUTING are timed by events in its stream, which are read once they have passed:
    what is not done when it is taken (of a step, the end of its update) counts to the next step. Phases have their
    names in torch's profiler, too.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0
        self._bytes = 0
        self._event: torch.cuda.Event | None = None
        self._on_device: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around what is to be counted as `name`."""
        self._switch()
        self._open.append(name)
        try:
            with torch.profiler.record_function(name):
                yield
        finally:
            self._switch()
            self._open.pop()

    def collective(self) -> AbstractContextManager[None]:
        """Around a collective: the phase `communication`. On a GPU nothing: its host does not wait there, or it waits
        for all that the GPU has still to do."""
        return nullcontext() if self._cuda else self.phase("communication")

    def _waiting(self) -> AbstractContextManager[None]:
        """`collective` where it interrupts one of COMPUTING; what evaluations and saves gather is their own time."""
        return self.collective() if self._open and self._open[-1] in COMPUTING else nullcontext()

    def so_far(self, name: str) -> float:
        """Seconds of a phase of the host that is not under way."""
        return self._seconds[name]

    def take(self, names: Sequence[str]) -> dict[str, float]:
        """Seconds of these phases since they were last taken."""
        passed = [pair for pair in self._on_device if pair[2].query()]
        self._on_device = [pair for pair in self._on_device if pair not in passed]
        for name, begin, end in passed:
            self._seconds[name] += begin.elapsed_time(end) / 1e3
        return {name: self._seconds.pop(name, 0.0) for name in names}

    def watched(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        """A collective, asynchronous or not, that tells this clock the bytes of its whole tensors, where they are part
        of a step's computing, and the time for which it is awaited."""

        def call(*arguments: Any, **options: Any) -> Any:
            if self._open and self._open[-1] in COMPUTING:
                self._bytes += max(map(_bytes, (*arguments, *options.values())))
            with self._waiting():
                work = collective(*arguments, **options)
            return work if work is None else _Watched(work, self._waiting)

        return call

    def take_bytes(self) -> int:
        """Bytes since they were last taken."""
        taken, self._bytes = self._bytes, 0
        return taken

    def _switch(self) -> None:
        """The phase that was under way until now gets its time."""
        now, name = time.perf_counter(), self._open[-1] if self._open else None
        event = None
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        if event is not None and self._event is not None and name is not None and name in COMPUTING:
            self._on_device.append((name, self._event, event))
        elif name is not None:
            self._seconds[name] += now - self._since
        self._since, self._event = now, event


class _Watched:
    """A collective under way, whose wait is counted."""

    def __init__(self, work: Any, waiting: Callable[[], AbstractContextManager[None]]) -> None:
        self._work, self._waiting = work, waiting

    def wait(self, *arguments: Any, **options: Any) -> Any:
        with self._waiting():
            return self._work.wait(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _bytes(argument: Any) -> int:
    """Of a tensor or of a list of tensors; 0 for anything else."""
    if isinstance(argument, torch.Tensor):
        return argument.numel() * argument.element_size()
    return sum(map(_bytes, argument)) if isinstance(argument, list | tuple) else 0
