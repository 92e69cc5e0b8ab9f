"""Every second of a step belongs to one phase; a GPU is never waited for."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import gpt.phase_clock
from gpt.phase_clock import PhaseClock

CPU = torch.device("cpu")


class Watch:
    """A clock that goes on when a test says so."""

    now = 100.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def wait(self) -> str:
        """As a collective's."""
        self.sleep(0.02)
        return "done"


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch = Watch()
    monkeypatch.setattr(gpt.phase_clock, "time", SimpleNamespace(perf_counter=lambda: watch.now))
    return watch


def test_a_phase_interrupts_the_one_around_it(watch: Watch) -> None:
    clock = PhaseClock(CPU)
    with clock.phase("forward"):
        watch.sleep(0.02)
        with clock.phase("checkpoint_stall"):
            watch.sleep(0.05)
    assert clock.so_far("checkpoint_stall") == pytest.approx(0.05, abs=1e-9)
    assert clock.take(["forward"])["forward"] == pytest.approx(0.02, abs=1e-9)
    assert clock.take(["forward", "checkpoint_stall"]) == {"forward": 0.0, "checkpoint_stall": pytest.approx(0.05)}


def test_collectives_count_where_they_interrupt_computing(watch: Watch) -> None:
    clock = PhaseClock(CPU)
    gather = clock.watched(lambda output_tensor, input_tensor, async_op=False: watch if async_op else None)
    whole, part = torch.zeros(8), torch.zeros(4)
    with clock.phase("backward"):
        assert gather(whole, input_tensor=part) is None
        assert gather([part, part], part, async_op=True).wait() == "done"
    assert clock.take(["communication"])["communication"] == pytest.approx(0.02, abs=1e-9)
    assert clock.take_bytes() == 2 * whole.nbytes
    with clock.phase("evaluation"):
        gather(whole, part, async_op=True).wait()
    assert clock.take(["communication"]) == {"communication": 0.0} and clock.take_bytes() == 0


def test_on_a_gpu_the_phases_are_read_when_they_have_passed(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    stream: dict[str, float] = {"done": 0.0, "recorded": 0.0}

    class Event:
        """The stream takes a second for everything between two events."""

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            stream["recorded"] += 1
            self.at = stream["recorded"]

        def query(self) -> bool:
            return self.at <= stream["done"]

        def elapsed_time(self, end: Any) -> float:
            return float(end.at - self.at) * 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = PhaseClock(torch.device("cuda"))
    with clock.phase("forward"), clock.phase("checkpoint_stall"):
        watch.sleep(0.02)
    with clock.phase("optimizer"), clock.collective():
        pass
    stream["done"] = 4.0
    names = ("forward", "optimizer", "communication", "checkpoint_stall")
    first = clock.take(names)
    assert (first["forward"], first["optimizer"], first["communication"]) == (2.0, 0.0, 0.0)
    assert first["checkpoint_stall"] == pytest.approx(0.02, abs=1e-9), "what the host waits for is its own time"
    stream["done"] = 6.0
    assert clock.take(names)["optimizer"] == 1.0
