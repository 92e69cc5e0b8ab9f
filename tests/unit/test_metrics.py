"""Every step stands once in metrics.jsonl and in TensorBoard, whatever was killed in between."""

import errno
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as PluginEventAccumulator
from tensorboard.util.tensor_util import make_ndarray

import gpt.metrics
from gpt.metrics import (
    MetricsWriter,
    Record,
    flops_per_token,
    host_metrics,
    measure_matmul_flops,
    peak_memory_gib,
    recent_losses,
)
from gpt.run_directory import RunDirectory, SupersededError


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    owner = RunDirectory(tmp_path / "run")
    owner.claim()
    return owner


def lines(run: RunDirectory) -> list[Record]:
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def board(run: RunDirectory) -> EventAccumulator:
    return EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def shown(run: RunDirectory, tag: str) -> list[tuple[int, float | str]]:
    """(step, value) of a tag as TensorBoard's own pages get them: unlike scripts, through its plugin reader."""
    reader = PluginEventAccumulator(str(run.path / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    values = [(event.step, make_ndarray(event.tensor_proto)) for event in reader.Tensors(tag)]
    return [(step, float(v) if v.dtype.kind == "f" else v.ravel()[0].decode()) for step, v in values]


def write_steps(run: RunDirectory, resumed_step: int, last_step: int, loss: float) -> None:
    writer = MetricsWriter(run, resumed_step, total_steps=100, console_every_steps=100)
    if resumed_step == 0:
        writer.write_text("recipe", "name: run", 0)
    for step in range(resumed_step + 1, last_step + 1):
        writer.write(step, {"train/loss": loss, "sample_digest": f"digest {step}"})
    writer.close()


def test_lines_past_the_checkpoint_are_dropped_and_written_again(run: RunDirectory) -> None:
    write_steps(run, 0, 7, loss=2.0)
    write_steps(run, 4, 6, loss=1.0)
    expected = [(step, 2.0 if step <= 4 else 1.0) for step in range(1, 7)]
    assert [(record["step"], record["train/loss"]) for record in lines(run)] == expected
    assert lines(run)[5]["sample_digest"] == "digest 6"


@pytest.mark.parametrize("cut", ['{"step": 4, "train/lo', '{"step": 5', "{", '{"step": 9, "a": 1}\n{"st'])
def test_a_last_line_that_a_kill_cut_short_is_dropped(run: RunDirectory, cut: str) -> None:
    write_steps(run, 0, 4, loss=2.0)
    with (run.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(cut)
    write_steps(run, 4, 5, loss=1.0)
    assert [record["step"] for record in lines(run)] == [1, 2, 3, 4, 5]
    assert [p.name for p in run.path.iterdir() if p.is_file()] == ["metrics.jsonl"]


def test_numbers_keep_all_their_digits(run: RunDirectory) -> None:
    values = [0.1 + 0.2, 1e-308, 1 / 3]
    writer = MetricsWriter(run, 0, 10, 100)
    for step, value in enumerate(values, start=1):
        writer.write(step, {"train/loss": value})
    writer.close()
    assert [record["train/loss"] for record in lines(run)] == values


def test_what_is_not_finite_is_null_in_the_file_and_absent_from_the_board(run: RunDirectory) -> None:
    writer = MetricsWriter(run, 0, 10, 100)
    writer.write(1, {"train/loss": float("nan"), "train/gradient_norm": float("inf"), "train/tokens": 5})
    writer.write(2, {"train/loss": 1.5, "train/gradient_norm": -float("inf"), "evaluate/bits_per_byte": None})
    writer.close()
    written = lines(run)
    assert all(record.pop("time") <= time.time() and record.pop("run/goodput") == 0 for record in written)
    assert written == [
        {"step": 1, "train/loss": None, "train/gradient_norm": None, "train/tokens": 5},
        {"step": 2, "train/loss": 1.5, "train/gradient_norm": None, "evaluate/bits_per_byte": None},
    ]
    seen = board(run)
    assert [(event.step, event.value) for event in seen.Scalars("train/loss")] == [(2, 1.5)]
    assert set(seen.Tags()["scalars"]) == {"train/loss", "train/tokens", "run/goodput"}


def test_tensorboard_shows_every_step_once_over_restarts(run: RunDirectory) -> None:
    write_steps(run, 0, 7, loss=4.0)
    time.sleep(1.1)  # event files are ordered by the second in their names
    write_steps(run, 4, 6, loss=2.0)
    expected = [(step, 4.0 if step <= 4 else 2.0) for step in range(1, 7)]
    assert [(event.step, event.value) for event in board(run).Scalars("train/loss")] == expected
    assert shown(run, "train/loss") == expected


def test_tensorboard_starts_over_where_no_checkpoint_was_reached(run: RunDirectory) -> None:
    write_steps(run, 0, 3, loss=4.0)
    time.sleep(1.1)
    write_steps(run, 0, 2, loss=2.0)
    assert [(event.step, event.value) for event in board(run).Scalars("train/loss")] == [(1, 2.0), (2, 2.0)]
    assert shown(run, "train/loss") == [(1, 2.0), (2, 2.0)]
    assert shown(run, "recipe/text_summary") == [(0, "    name: run")]


def test_a_writer_that_is_rewound_drops_the_later_steps(run: RunDirectory) -> None:
    writer = MetricsWriter(run, 0, 100, 100)
    for step in range(1, 8):
        writer.write(step, {"train/loss": 4.0})
    time.sleep(1.1)
    writer.rewind(4)
    for step in (5, 6):
        writer.write(step, {"train/loss": 2.0})
    writer.close()
    expected = [(step, 4.0 if step <= 4 else 2.0) for step in range(1, 7)]
    assert [(record["step"], record["train/loss"]) for record in lines(run)] == expected
    assert [(event.step, event.value) for event in board(run).Scalars("train/loss")] == expected
    assert shown(run, "train/loss") == expected


def test_recent_losses_are_the_last_finite_ones_and_the_skips_up_to_the_end(run: RunDirectory) -> None:
    path = run.path / "metrics.jsonl"
    assert recent_losses(path, 3) == ([], 0)
    writer = MetricsWriter(run, 0, 100, 100)
    for step, (loss, skipped) in enumerate([(9.0, 0), (8.0, 1), (7.0, 1), (6.0, 2), (float("nan"), 3)], start=1):
        writer.write(step, {"train/loss": loss, "train/skipped_steps": skipped})
    writer.close()
    assert recent_losses(path, 3) == ([(2, 8.0), (3, 7.0), (4, 6.0)], 2)
    assert recent_losses(path, 30) == ([(1, 9.0), (2, 8.0), (3, 7.0), (4, 6.0)], 2)


def test_a_text_is_shown_line_by_line_as_it_is(run: RunDirectory) -> None:
    writer = MetricsWriter(run, 0, 10, 100)
    writer.write_text("recipe", "a:\n  b: <1>", 0)
    writer.close()
    assert shown(run, "recipe/text_summary") == [(0, "    a:\n      b: <1>")]


def test_everything_is_on_disk_after_sync(run: RunDirectory) -> None:
    writer = MetricsWriter(run, 0, 10, 100)
    writer.write(1, {"train/loss": 1.0})
    writer.sync()
    assert [record["step"] for record in lines(run)] == [1]
    assert len(board(run).Scalars("train/loss")) == 1
    writer.close()


def test_a_start_that_was_taken_over_writes_no_record(run: RunDirectory) -> None:
    writer = MetricsWriter(run, 0, 10, 100)
    writer.write(1, {"train/loss": 1.0})
    (run.path / "generations" / "000002.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SupersededError):
        writer.write(2, {"train/loss": 1.0})
    writer.close()
    assert [record["step"] for record in lines(run)] == [1]
    assert len(board(run).Scalars("train/loss")) == 1


def test_the_console_has_a_line_each_so_many_steps_and_at_the_ends(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = MetricsWriter(run, 0, total_steps=12, console_every_steps=5)
    for step in range(1, 13):
        record: Record = {"train/loss": 2.5, "train/learning_rate": 3e-4, "performance/tokens_per_second": 12345.6}
        if step == 7:
            record["evaluate/loss"] = 2.25
        if step == 10:
            record["train/loss"] = None
        writer.write(step, record)
    writer.close()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed] == ["1/12", "5/12", "7/12", "10/12", "12/12"]
    assert "loss 2.5000  lr 3.00e-04  12,346 tokens/s  ETA 0:00:00" in printed[0]
    assert "validation 2.2500" in printed[2]
    assert "loss 2.5000" not in printed[3]


def test_flops_per_token_of_an_example() -> None:
    assert flops_per_token(1_000, layers=2, hidden_size=8, sequence_length=16) == 6 * 1_000 + 6 * 2 * 8 * 16
    # GPT-2 of 124 M: 6 * 124,337,664 and 6 * 12 * 768 * 1,024
    assert flops_per_token(124_337_664, 12, 768, 1024) == 746_025_984 + 56_623_104


def test_measured_quantities_are_of_this_machine(tmp_path: Path) -> None:
    assert 1e8 < measure_matmul_flops(torch.device("cpu"), torch.float32) < 1e14
    before = peak_memory_gib(torch.device("cpu"))
    kept = torch.ones(2**27 // 4)  # 128 MiB, touched
    assert 0.05 < before <= peak_memory_gib(torch.device("cpu")) < 1000
    assert kept[0] == 1
    metrics = host_metrics(tmp_path)
    assert set(metrics) == {"memory/host_gib", "disk/free_gib"}
    assert all(isinstance(value, float) and value > 0 for value in metrics.values())
    assert host_metrics(tmp_path / "gone")["disk/free_gib"] is None


def test_a_file_system_that_has_gone_does_not_end_the_run(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = MetricsWriter(run, 0, 100, 100)

    def gone() -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(run, "check_ownership", gone)
        patch.setattr(writer, "_write_pending", gone)  # TensorBoard's file, which is written later, notices nothing
        writer.write(1, {"train/loss": 1.0})
        writer.write_text("evaluate/sample", "text", 1)
    assert lines(run) == []
    writer.write(2, {"train/loss": 2.0})
    writer.close()
    assert [record["step"] for record in lines(run)] == [1, 2]
    assert [s.step for s in board(run).Scalars("train/loss")] == [1, 2]


def test_what_a_full_disk_did_not_take_is_written_later_once(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    writer = MetricsWriter(run, 0, 100, 100)
    full = [False]

    class Disk:
        """Takes ten bytes before it is full."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: bytes) -> int:
            if full == [True]:
                full[0] = "quite"
                return self.file.write(data[:10])
            if full[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    writer._file = Disk(writer._file)
    board = writer._board
    assert board is not None
    for step in range(1, 7):
        full[0] = {3: True, 4: "quite", 5: "quite"}.get(step, False)
        if step == 2:  # its own thread died of the disk
            monkeypatch.setattr(
                board._get_file_writer().event_writer._async_writer._worker, "exception", OSError("full")
            )
        if step == 4:
            with pytest.raises(OSError):
                writer.sync()
        if step in (2, 3):
            writer.write_text("evaluate/sample", "text", step)
        writer.write(step, {"train/loss": float(step)})
    writer.close()
    out = capfd.readouterr().out
    assert "warning: the metrics of step 3 wait" in out
    assert "warning: the text evaluate/sample of step 2 is not written: full" in out
    assert [record["step"] for record in lines(run)] == [1, 2, 3, 4, 5, 6]
    shown = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0}).Reload().Scalars("train/loss")
    assert [(scalar.step, scalar.value) for scalar in shown] == [(step, float(step)) for step in range(1, 7)]


def test_measuring_a_type_that_the_processor_has_no_instructions_for_takes_no_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes, clock = [], 0.0

    def multiply(a: torch.Tensor, device: torch.device) -> None:
        nonlocal clock
        sizes.append(len(a))
        clock += 2.0 * len(a) ** 3 / 0.7e9

    monkeypatch.setattr(gpt.metrics, "_matmul", multiply)
    monkeypatch.setattr(gpt.metrics.time, "perf_counter", lambda: clock)
    assert measure_matmul_flops(torch.device("cpu"), torch.bfloat16) == pytest.approx(0.7e9)
    assert set(sizes) == {256} and clock < 0.3
