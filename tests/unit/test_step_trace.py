"""A trace of the steps that were asked for, as Perfetto and TensorBoard read it."""

import json
from pathlib import Path

import pytest
import torch

from gpt.step_trace import StepTrace


def run(trace: StepTrace, steps: range, end: bool = True) -> None:
    """Steps that differ in what they compute: step n multiplies matrices n times."""
    for step in steps:
        trace.before(step)
        for _ in range(step):
            torch.mm(torch.ones(4, 4), torch.ones(4, 4))
        trace.after(step)
    if end:
        trace.end()


def products(folder: Path) -> list[int]:
    """Matrix products of each trace file."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("rank0.*.pt.trace.json"))]
    return [sum(event.get("name") == "aten::mm" for event in content["traceEvents"]) for content in files]


@pytest.mark.parametrize(
    ("steps", "traced"),
    [
        (range(1, 8), [3 + 4]),
        (range(4, 8), [4]),  # a start that begins amid them
        (range(1, 4), [3]),  # a run that ends before the last
        (range(5, 8), []),
    ],
)
def test_the_asked_steps_are_traced_and_no_other(tmp_path: Path, steps: range, traced: list[int]) -> None:
    run(StepTrace(3, 4, tmp_path), steps)
    assert products(tmp_path) == traced


def test_steps_that_a_rollback_repeats_are_traced_once(tmp_path: Path) -> None:
    trace = StepTrace(3, 4, tmp_path)
    run(trace, range(1, 6), end=False)
    run(trace, range(2, 6))
    assert products(tmp_path) == [3 + 4]


def test_a_disk_that_does_not_take_the_trace_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder belongs")
    run(StepTrace(1, 1, tmp_path / "tensorboard"), range(1, 3))
    assert "warning: the trace of profile.steps is not written" in capsys.readouterr().out
