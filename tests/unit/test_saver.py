"""Saves in the background: what is in them, who must be done before a commit, and disks that fail."""

import errno
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from recipe_samples import make_recipe

import gpt.checkpoint.write as writing
import gpt.saver
from gpt.batch import BatchPositions, MicroBatch
from gpt.checkpoint.format import checkpoint_directory, list_checkpoints
from gpt.checkpoint.read import CheckpointReader
from gpt.distributed import Ranks
from gpt.run_directory import RunDirectory, SupersededError
from gpt.saver import Saver

SHAPES = {"embed.weight": [6, 4], "norm.weight": [3], "gate": [1]}


class State:
    """What ShardedState gives, of tensors that a test can change: rank r of 2 holds its half."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.parameters = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        kinds = enumerate(("fp32", "exp_avg", "exp_avg_sq"))
        self.whole = {
            f"{k}/{n}": torch.arange(p.numel()) + 100.0 * i for i, k in kinds for n, p in self.parameters.items()
        }
        self.steps = 7

    zero_stage = 3

    def states_of(self, name: str) -> list[str]:
        return ["fp32", "exp_avg", "exp_avg_sq"]

    def optimizer_type(self) -> str:
        return "adamw"

    def shape(self, name: str) -> list[int]:
        return SHAPES[name]

    def range(self, name: str) -> tuple[int, int]:
        elements = self.parameters[name].numel()
        size = -(-elements // 2)
        start = min(self.rank * size, elements)
        return start, min(size, elements - start)

    def read(self, name: str, kind: str) -> torch.Tensor:
        start, count = self.range(name)
        return self.whole[f"{kind}/{name}"][start : start + count]

    def group(self, name: str) -> int:
        return 0

    def groups(self) -> list[dict[str, Any]]:
        return [{"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}]

    def scalars(self) -> list[dict[str, float]]:
        return [{"step": float(self.steps)}]

    def loss_scaler(self) -> dict[str, float]:
        return {}

    def buffers(self) -> dict[str, torch.Tensor]:
        return {}


class Group:
    """The savers of two ranks in one process, and the all-gather that every step does."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        recipe = make_recipe({"runs_directory": str(folder), "checkpoint": {"every_steps": 2} | settings})
        self.run = recipe.run_directory()
        self.owner = RunDirectory(self.run)
        self.owner.claim()
        self.synced: list[int] = []
        plan: Any = SimpleNamespace(
            recipe=recipe,
            training=SimpleNamespace(fingerprint="f", kind="text"),
            config=SimpleNamespace(to_dict=lambda: {"model_type": "llama"}),
        )
        self.states: list[Any] = [State(0), State(1)]
        self.savers = [
            Saver(
                plan, self.states[rank], Ranks(rank, 2, torch.device("cpu")), self.owner if rank == 0 else None,
                self.owner.generation, {}, lambda: self.synced.append(len(list_checkpoints(self.run))), True,
            )
            for rank in (0, 1)
        ]  # fmt: skip

    def begin(self, step: int, evaluate_loss: float | None = None) -> None:
        for saver in self.savers:
            saver.begin(step, 0, BatchPositions(8, ()), None, evaluate_loss)

    def give_probe(self) -> None:
        batch = MicroBatch(
            *(torch.zeros(2, 5, dtype=torch.int64) for _ in range(3)), torch.ones(2, 5, dtype=torch.bool)
        )
        for saver in self.savers:
            saver.give_probe(torch.arange(90.0).reshape(2, 5, 9), batch)

    def take(self) -> None:
        states = np.array([saver.state() for saver in self.savers])
        for saver in self.savers:
            saver.hear(states)

    def settle(self) -> None:
        """Steps until the save under way has ended."""
        until(lambda: self.take() or self.savers[0].begun_step is None)

    def save(self, step: int, **details: Any) -> None:
        self.begin(step, **details)
        self.give_probe()
        self.settle()

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = (self.run / "events.jsonl").read_text(encoding="utf-8").splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == f"checkpoint {kind}"]

    def leftovers(self) -> list[str]:
        return [path.name for path in (self.run / "checkpoints").glob(".*")]


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    group = Group(tmp_path, max_failed_saves=2, commit_deadline_seconds=1)
    yield group


def fail_on_rank(monkeypatch: pytest.MonkeyPatch, rank: int, code: int, times: int = 1) -> None:
    """A disk that takes a part of a rank's file and then no more."""
    left, write = [times], writing.write_safetensors

    def broken(path: Path, tensors: Any) -> Any:
        if path.name == f"rank_{rank:05d}.safetensors" and left[0]:
            left[0] -= 1
            path.write_bytes(b"half")
            raise OSError(code, "of the test", str(path))
        return write(path, tensors)

    monkeypatch.setattr(writing, "write_safetensors", broken)


def test_a_checkpoint_holds_what_was_there_when_it_was_begun(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    go, copy = threading.Event(), writing.HostBuffers.copy
    monkeypatch.setattr(writing.HostBuffers, "copy", lambda *args: go.wait() and copy(*args))
    random = torch.get_rng_state()
    group.begin(2, evaluate_loss=1.5)
    torch.rand(3)
    group.states[0].steps = 8
    group.give_probe()
    threading.Timer(0.3, go.set).start()
    group.savers[0].wait_copied()
    group.savers[1].wait_copied()
    assert 0.2 < group.savers[0].clock.so_far("checkpoint_stall") < 1, "the wait before the update is a stall"
    for state in group.states:  # the update
        for value in state.whole.values():
            value.fill_(-1)
    group.settle()
    reader = CheckpointReader(checkpoint_directory(group.run, 2))
    reader.verify()
    fresh = State(0)
    for name, elements in ((n, p.numel()) for n, p in fresh.parameters.items()):
        for kind in ("fp32", "exp_avg", "exp_avg_sq"):
            assert torch.equal(reader.read_range(kind, name, 0, elements), fresh.whole[f"{kind}/{name}"])
            norm = reader.manifest.norms[name][kind]
            assert norm == pytest.approx(float(fresh.whole[f"{kind}/{name}"].norm()))
    assert torch.equal(reader.read_rng(1), random)
    manifest = reader.manifest
    assert (manifest.step, manifest.evaluate_loss, manifest.optimizer.groups[0].scalars["step"]) == (2, 1.5, 7)
    assert manifest.probe is not None and manifest.probe.rows == 2
    assert group.savers[0].size_bytes == sum(f.stat().st_size for f in reader.directory.iterdir())


def test_nothing_is_committed_before_the_probe_the_metrics_and_every_rank(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, write = threading.Event(), writing.write_safetensors
    held = lambda path, tensors: ("00001" not in path.name or go.wait()) and write(path, tensors)  # noqa: E731
    monkeypatch.setattr(writing, "write_safetensors", held)
    group.begin(2)
    time.sleep(0.3)
    group.give_probe()
    time.sleep(0.3)
    group.take()
    assert group.savers[1].begun_step == 2 and list_checkpoints(group.run) == [] and group.synced == []
    go.set()
    group.settle()
    assert list_checkpoints(group.run) == [2] and group.synced == [0]
    assert [saver.committed_step for saver in group.savers] == [2, 2] and group.leftovers() == []
    assert len(group.events("begun")) == len(group.events("committed")) == 1
    group.begin(4)
    time.sleep(1.3)  # longer than the deadline, which does not count a slow forward
    group.take()
    assert list_checkpoints(group.run) == [2]
    group.give_probe()
    group.settle()
    assert list_checkpoints(group.run) == [2, 4]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_fails_on_one_rank_costs_one_save(
    group: Group, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], rank: int
) -> None:
    group.save(2)
    fail_on_rank(monkeypatch, rank, errno.ENOSPC)
    group.save(4)
    assert list_checkpoints(group.run) == [2]
    [event] = group.events("failed")
    assert event["step"] == 4 and event["errors"] == [f"rank {rank}: No space left on device"]
    assert f"warning: the checkpoint of step 4 could not be written: rank {rank}: No space" in capfd.readouterr().out
    until(lambda: not any((group.run / "checkpoints").glob(".tmp*/*.safetensors")))
    group.save(4)
    group.save(6)
    assert list_checkpoints(group.run) == [2, 4, 6] and group.leftovers() == []
    fail_on_rank(monkeypatch, rank, errno.ENOSPC)
    group.save(8)  # two failures, but not in a row
    assert [saver.failed_saves for saver in group.savers] == [2, 2]


def test_too_many_failures_in_a_row_stop_every_rank(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_on_rank(monkeypatch, 1, errno.EIO, times=3)
    group.save(2)
    group.begin(4)
    until(lambda: min(saver.state() for saver in group.savers) < 0)
    states = np.array([saver.state() for saver in group.savers])
    for saver in group.savers:
        with pytest.raises(ValueError, match=r"step 4 .* rank 1: Input/output error.* last of 2 saves in a row"):
            saver.hear(states)


def test_a_rank_that_is_too_slow_is_named(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    go, write = threading.Event(), writing.write_safetensors
    held = lambda path, tensors: ("00001" not in path.name or go.wait()) and write(path, tensors)  # noqa: E731
    monkeypatch.setattr(writing, "write_safetensors", held)
    group.save(2)
    [event] = group.events("failed")
    assert event["errors"] == ["rank 1: Connection timed out"]
    go.set()
    group.save(4)
    assert list_checkpoints(group.run) == [4]


def test_a_sidecar_of_an_earlier_save_counts_for_nothing(group: Group) -> None:
    folder = gpt.saver.temporary_checkpoint_directory(group.run, 2, group.owner.generation)
    folder.mkdir()
    stale = {"save": 5, "file": {"size_bytes": 1, "blocks": ["0"]}, "ranges": [], "norms": {}}
    for rank in (0, 1):
        (folder / f"rank_{rank:05d}.json").write_text(json.dumps(stale), encoding="utf-8")
    with pytest.raises(writing.RankError, match="timed out"):
        writing.collect(folder, 2, 2, 0.1, lambda: False)
    group.save(2)
    CheckpointReader(checkpoint_directory(group.run, 2)).verify()


def test_a_disk_without_room_is_not_filled(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt.saver.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    group.save(2)
    [event] = group.events("failed")
    assert event["errors"][-1].endswith("No space left on device")
    assert list_checkpoints(group.run) == [] and group.leftovers() == []


def test_a_start_that_was_superseded_commits_nothing(group: Group) -> None:
    group.begin(2)
    (group.run / "generations" / f"{group.owner.generation + 1:06d}.json").write_text("{}", encoding="utf-8")
    group.give_probe()
    with pytest.raises(SupersededError):
        group.settle()  # either rank may be the one that sees it, before it writes or at the commit
    assert list_checkpoints(group.run) == []


def test_a_start_that_was_superseded_before_its_save_writes_no_file(group: Group) -> None:
    (group.run / "generations" / f"{group.owner.generation + 1:06d}.json").write_text("{}", encoding="utf-8")
    group.begin(2)
    for saver in group.savers:
        with pytest.raises(SupersededError):
            until(lambda saver=saver: bool(saver.state() > 1))  # type: ignore[misc]
    assert group.leftovers() == []


@pytest.mark.parametrize("is_there", [False, True])
def test_a_start_that_was_superseded_at_its_commit_takes_it_back(
    group: Group, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    """As when the process is stopped between its look at the claims and the renaming, and goes on much later."""
    target = checkpoint_directory(group.run, 2)
    if is_there:
        target.mkdir()
        (target / "mine").touch()
    claim, rename = group.run / "generations" / f"{group.owner.generation + 1:06d}.json", Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, new: (rename(path, new), new == target and claim.touch())[0])
    group.begin(2)
    group.give_probe()
    with pytest.raises(SupersededError):
        until(lambda: bool(group.savers[0].state() > 1))
    assert list_checkpoints(group.run) == [] and len(group.leftovers()) == 1
    assert [file.name for file in target.glob("*")] == ["mine"] * is_there


def test_what_a_failed_save_left_is_removed_and_no_other(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_on_rank(monkeypatch, 1, errno.EIO)
    next_one = gpt.saver.temporary_checkpoint_directory(group.run, 4, group.owner.generation)
    next_one.mkdir()  # another rank has begun it already
    group.save(2)
    until(lambda: group.leftovers() == [next_one.name])
    for saver in group.savers:
        saver._join()
    assert next_one.exists()


def test_a_checkpoint_of_the_same_step_is_replaced(group: Group) -> None:
    group.save(2)
    (checkpoint_directory(group.run, 2) / "rank_00001.safetensors").unlink()
    group.save(2)
    CheckpointReader(checkpoint_directory(group.run, 2)).verify()
    assert group.leftovers() == []


def test_an_error_that_ends_the_run_lets_the_save_under_way_end(group: Group) -> None:
    group.begin(2)
    for saver in reversed(group.savers):  # before the forward that would have given the probe
        saver.leave()
    assert list_checkpoints(group.run) == [2]
    assert CheckpointReader(checkpoint_directory(group.run, 2)).manifest.probe is None


def test_a_save_that_is_under_way_is_awaited_by_the_next(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    go, write = threading.Event(), writing.write_safetensors
    monkeypatch.setattr(writing, "write_safetensors", lambda path, tensors: go.wait() and write(path, tensors))
    meeting, box = threading.Barrier(2), [0.0, 0.0]

    def gather(values: list[float], ranks: Ranks) -> np.ndarray:
        box[ranks.rank] = values[0]
        meeting.wait()
        return np.array([box]).T

    monkeypatch.setattr(gpt.saver.distributed, "gather_floats", gather)
    group.begin(2)
    group.give_probe()
    threading.Timer(0.3, go.set).start()
    others = [
        threading.Thread(target=saver.begin, args=(4, 0, BatchPositions(8, ()), None, None)) for saver in group.savers
    ]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    assert list_checkpoints(group.run) == [2] and group.savers[0].begun_step == 4
    assert group.savers[0].clock.so_far("checkpoint_stall") > 0.2
    group.give_probe()
    group.settle()
    assert list_checkpoints(group.run) == [2, 4]
