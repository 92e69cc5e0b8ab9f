"""Every second of a step belongs to one phase; a GPU is never waited for."""

import time
from typing import Any

import pytest
import torch

from gpt.phase_clock import PhaseClock

CPU = torch.device("cpu")


class Work:
    """A collective under way."""

    def wait(self) -> str:
        time.sleep(0.02)
        return "done"


def test_a_phase_interrupts_the_one_around_it() -> None:
    clock = PhaseClock(CPU)
    with clock.phase("forward"):
        time.sleep(0.02)
        with clock.phase("checkpoint_stall"):
            time.sleep(0.05)
    assert clock.so_far("checkpoint_stall") == pytest.approx(0.05, abs=0.015)
    assert clock.take(["forward"])["forward"] == pytest.approx(0.02, abs=0.015)
    assert clock.take(["forward", "checkpoint_stall"]) == {"forward": 0.0, "checkpoint_stall": pytest.approx(0.05, 0.3)}


def test_collectives_count_where_they_interrupt_computing() -> None:
    clock = PhaseClock(CPU)
    gather = clock.watched(lambda output_tensor, input_tensor, async_op=False: Work() if async_op else None)
    whole, part = torch.zeros(8), torch.zeros(4)
    with clock.phase("backward"):
        assert gather(whole, input_tensor=part) is None
        assert gather([part, part], part, async_op=True).wait() == "done"
    assert clock.take(["communication"])["communication"] == pytest.approx(0.02, abs=0.015)
    assert clock.take_bytes() == 2 * whole.nbytes
    with clock.phase("evaluation"):
        gather(whole, part, async_op=True).wait()
    assert clock.take(["communication"]) == {"communication": 0.0} and clock.take_bytes() == 0


def test_on_a_gpu_the_phases_are_read_when_they_have_passed(monkeypatch: pytest.MonkeyPatch) -> None:
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
        time.sleep(0.02)
    with clock.phase("optimizer"), clock.collective():
        pass
    stream["done"] = 4.0
    names = ("forward", "optimizer", "communication", "checkpoint_stall")
    first = clock.take(names)
    assert (first["forward"], first["optimizer"], first["communication"]) == (2.0, 0.0, 0.0)
    assert first["checkpoint_stall"] == pytest.approx(0.02, abs=0.015), "what the host waits for is its own time"
    stream["done"] = 6.0
    assert clock.take(names)["optimizer"] == 1.0
