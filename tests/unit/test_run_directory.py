"""One writer per run directory, held by real processes; what may change when a run goes on; events are never cut."""

import errno
import json
import multiprocessing
import os
import signal
import socket
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from recipe_samples import make_recipe

from gpt.heartbeat import Heartbeat
from gpt.run_directory import (
    RunDirectory,
    SupersededError,
    claimed_from,
    compare_recipes,
    describe_environment,
    host_label,
    process_space,
    stored_recipe,
)

RACES = 20
STALE_SECONDS = 60.0
PROCESSES = multiprocessing.get_context("spawn")


def write_claim(run: Path, *, host: str, pid: int = 4242, started: float = 0.0, beat_age: float | None = 0.0,
                job: str | None = None, ended: bool = False, generation: int = 1,
                here: bool = False) -> None:  # fmt: skip
    """The files that a start on another host or of a process that is gone leaves behind."""
    now = time.time()
    claim = {"generation": generation, "host": host, "pid": pid, "pid_started": started, "job": job, "time": now}
    claim |= {"launcher": 1, "stale_seconds": STALE_SECONDS}
    claim |= {"process_space": process_space() if here else f"{host} another-boot pid:[1]"}
    files = {run / "generations" / f"{generation:06d}.json": claim}
    if beat_age is not None:
        beat = {"time": now - beat_age, "phase": "training", "pid": pid, "host": host, "ended": ended}
        files[run / "heartbeats" / f"generation_{generation:06d}" / "rank_00000.json"] = beat
    for file, content in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content), encoding="utf-8")


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]


def heartbeat(run: Path, generation: int) -> dict[str, Any]:
    file = run / "heartbeats" / f"generation_{generation:06d}" / "rank_00000.json"
    return json.loads(file.read_text(encoding="utf-8"))


def release(owner: RunDirectory) -> None:
    """End as a rank does: its heartbeat says so."""
    Heartbeat(owner.path, owner.generation, 0, 60.0).end()


# The claim


def test_a_second_start_is_refused_while_the_first_is_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "777")
    first = RunDirectory(tmp_path)
    first.claim()
    second = RunDirectory(tmp_path)
    with pytest.raises(ValueError, match=rf"in use: host {socket.gethostname()}, process {os.getpid()}, Slurm job 777"):
        second.claim()
    first.check_ownership()
    release(first)
    second.claim()
    assert (first.generation, second.generation) == (1, 2)
    with pytest.raises(SupersededError):
        first.check_ownership()


def test_a_claim_makes_the_directory(tmp_path: Path) -> None:
    owner = RunDirectory(tmp_path / "new" / "run")
    owner.claim()
    assert {p.name for p in owner.path.iterdir()} == {"generations", "heartbeats", "logs", "checkpoints"}
    assert [p.name for p in (owner.path / "generations").iterdir()] == ["000001.json"]


@pytest.mark.parametrize("age", [STALE_SECONDS - 5, 0.0, -30.0])
def test_a_fresh_heartbeat_of_another_host_is_refused(tmp_path: Path, age: float) -> None:
    write_claim(tmp_path, host="node7", pid=os.getpid(), started=psutil.Process().create_time(), beat_age=age)
    with pytest.raises(ValueError, match=f"in use: host node7, process {os.getpid()}, alive"):
        RunDirectory(tmp_path).claim()


def test_a_host_of_the_same_name_is_another_one(tmp_path: Path) -> None:
    """Containers share names: that no process of theirs is found here says nothing."""
    write_claim(tmp_path, host=socket.gethostname(), pid=os.getpid(), started=1000.0)
    with pytest.raises(ValueError, match=f"in use: host {socket.gethostname()}, process {os.getpid()}, alive"):
        RunDirectory(tmp_path).claim()
    assert claimed_from(tmp_path, 1) is None
    write_claim(tmp_path, host=socket.gethostname(), here=True)
    assert claimed_from(tmp_path, 1) is not None and claimed_from(tmp_path, 2) is None


def test_the_users_name_of_a_host_is_made_fit_for_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    assert host_label() == socket.gethostname()
    monkeypatch.setenv("TRAINYARD_HOST", "rack 3/node 7@10.0.0.7")
    assert host_label() == "rack_3_node_7@10.0.0.7"


def test_a_claim_without_heartbeat_yet_is_fresh(tmp_path: Path) -> None:
    write_claim(tmp_path, host="node7", beat_age=None)
    with pytest.raises(ValueError, match="in use: host node7"):
        RunDirectory(tmp_path).claim()
    file = tmp_path / "heartbeats" / "generation_000001" / "rank_00000.json"
    file.parent.mkdir(parents=True)
    file.write_text("", encoding="utf-8")  # as a host that lost power may leave it
    with pytest.raises(ValueError, match="in use: host node7"):
        RunDirectory(tmp_path).claim()


@pytest.mark.parametrize(
    "left",
    [
        {"host": "node7", "beat_age": STALE_SECONDS + 1},
        {"host": "node7", "ended": True},
        # on this host: a process number that another process has by now
        {"host": socket.gethostname(), "pid": os.getpid(), "started": 1000.0, "here": True},
    ],
    ids=["stale", "ended", "reused process number"],
)
def test_what_a_dead_start_left_is_taken_over(tmp_path: Path, left: dict[str, Any]) -> None:
    write_claim(tmp_path, generation=41, **left)
    owner = RunDirectory(tmp_path)
    owner.claim()
    assert owner.generation == 42
    release(owner)


def _claim_and_hang(path: str, ready: Any) -> None:
    RunDirectory(Path(path)).claim()
    ready.set()
    time.sleep(60)


def test_a_killed_process_of_this_host_is_taken_over_at_once(tmp_path: Path) -> None:
    ready = PROCESSES.Event()
    process = PROCESSES.Process(target=_claim_and_hang, args=(str(tmp_path), ready))
    process.start()
    assert process.pid is not None
    try:
        assert ready.wait(30)
        owner = RunDirectory(tmp_path)
        with pytest.raises(ValueError, match=f"in use: host {socket.gethostname()}, process {process.pid}, alive"):
            owner.claim()
    finally:
        os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.01)
    owner.claim()  # a zombie, which its parent has not yet waited for, is dead too
    assert owner.generation == 2
    release(owner)
    process.join()


def _race(folder: str, together: Barrier, results: Any) -> None:
    for round_ in range(RACES):
        owner = RunDirectory(Path(folder) / str(round_))
        together.wait(30)
        try:
            owner.claim()
            results.put((round_, owner.generation))
        except ValueError as error:
            results.put((round_, str(error)))
        together.wait(30)  # the winner stays alive until the other has tried
        release(owner)


def test_of_two_processes_that_claim_at_once_exactly_one_wins(tmp_path: Path) -> None:
    together, results = PROCESSES.Barrier(2), PROCESSES.Queue()
    processes = [PROCESSES.Process(target=_race, args=(str(tmp_path), together, results)) for _ in range(2)]
    for process in processes:
        process.start()
    outcomes = sorted((results.get(timeout=60) for _ in range(2 * RACES)), key=lambda outcome: outcome[0])
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    for round_ in range(RACES):
        both = [result for number, result in outcomes if number == round_]
        assert sorted(type(result).__name__ for result in both) == ["int", "str"], both
        assert 1 in both
        assert any(
            "in use" in str(result) or "claimed by another start at this moment" in str(result) for result in both
        )


def test_the_loser_of_a_race_for_the_same_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def after_another(source: Path, target: Path) -> None:
        target.write_text("the other's", encoding="utf-8")
        link(source, target)

    monkeypatch.setattr(os, "link", after_another)
    owner = RunDirectory(tmp_path)
    with pytest.raises(ValueError, match="was claimed by another start at this moment: try again"):
        owner.claim()
    assert owner.generation == 0
    assert [p.name for p in (tmp_path / "generations").iterdir()] == ["000001.json"]
    assert (tmp_path / "generations" / "000001.json").read_text(encoding="utf-8") == "the other's"
    assert list((tmp_path / "heartbeats").iterdir()) == []


# A generation that was taken over


def test_an_older_generation_writes_nothing_any_more(tmp_path: Path) -> None:
    older = RunDirectory(tmp_path)
    older.claim()
    older.check_ownership()
    older.write_event("start")
    older.write_file("environment.json", "old")
    beating = Heartbeat(tmp_path, 1, 0, interval_seconds=0.01)
    write_claim(tmp_path, host="node7", generation=2)
    time.sleep(0.05)  # a heartbeat that was under way may still end
    last_beat = heartbeat(tmp_path, 1)
    with pytest.raises(SupersededError, match="taken over by start 2; this is start 1"):
        older.check_ownership()
    with pytest.raises(SupersededError):
        older.write_event("end")
    with pytest.raises(SupersededError):
        older.write_file("environment.json", "new")
    time.sleep(0.05)
    beating.end()
    assert [event["event"] for event in events(tmp_path)] == ["start"]
    assert (tmp_path / "environment.json").read_text(encoding="utf-8") == "old"
    assert heartbeat(tmp_path, 1) == last_beat


def test_what_a_stale_start_holds_open_is_replaced(tmp_path: Path) -> None:
    """A process that was stopped between its look at the claims and its write must not reach the new start's files."""
    write_claim(tmp_path, host="node7", beat_age=STALE_SECONDS + 1)
    board = tmp_path / "tensorboard" / "events.out.tfevents.1"
    board.parent.mkdir()
    for file in (tmp_path / "events.jsonl", board):
        file.write_text("before\n", encoding="utf-8")
    with (tmp_path / "events.jsonl").open("a") as event_file, board.open("a") as board_file:
        RunDirectory(tmp_path).claim()
        for late in (event_file, board_file):
            late.write("late\n")
    for file in (tmp_path / "events.jsonl", board):
        assert file.read_text(encoding="utf-8") == "before\n"
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["events.jsonl"]


def test_the_time_after_which_a_start_is_stale_is_its_own(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path)
    first.claim(stale_seconds=0.2)
    beating = Heartbeat(tmp_path, 1, 0, interval_seconds=0.02)
    time.sleep(0.4)
    with pytest.raises(ValueError, match=r"or wait 0 s after it died"):
        RunDirectory(tmp_path).claim()
    beating._stop.set()  # as though the process were stopped: it is there, and beats no more
    time.sleep(0.4)
    RunDirectory(tmp_path).claim()
    with pytest.raises(SupersededError):
        first.write_event("late")


def test_the_launcher_finds_the_claim_of_its_own_ranks_only(tmp_path: Path) -> None:
    assert claimed_from(tmp_path, os.getppid()) is None
    owner = RunDirectory(tmp_path)
    owner.claim()
    found = claimed_from(tmp_path, os.getppid())
    assert found is not None and found.generation == 1
    found.write_event("failed")
    assert claimed_from(tmp_path, os.getpid()) is None
    write_claim(tmp_path, host="node7", generation=2)
    assert claimed_from(tmp_path, 1) is None, "another host's launcher may have the same number"


# Events and files


def test_events_of_all_starts_stay(tmp_path: Path) -> None:
    for step in (10, 20):
        owner = RunDirectory(tmp_path)
        owner.claim()
        owner.write_event("checkpoint committed", step=step)
        owner.write_event("end", step=step)
        release(owner)
    written = [(event["generation"], event["event"], event["step"]) for event in events(tmp_path)]
    assert written == [
        (1, "checkpoint committed", 10),
        (1, "end", 10),
        (2, "checkpoint committed", 20),
        (2, "end", 20),
    ]
    assert len(owner.events("end")) == 2
    assert len(owner.events("signal")) == 0
    assert all(abs(event["time"] - time.time()) < 60 for event in events(tmp_path))


def test_an_event_does_not_run_into_one_that_was_cut_short(tmp_path: Path) -> None:
    owner = RunDirectory(tmp_path)
    owner.claim()
    assert len(owner.events("start")) == 0
    owner.write_event("start")
    with (tmp_path / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"time": 1.0, "gen')
    owner.write_event("continue")
    owner.write_event("end")
    release(owner)
    lines = (tmp_path / "events.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(lines[i])["event"] for i in (0, 2, 3)] == ["start", "continue", "end"]
    assert lines[1] == '{"time": 1.0, "gen'


def test_a_noted_event_does_not_end_a_run_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    owner = RunDirectory(tmp_path)
    owner.claim()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    owner.note_event("straggler", rank=1)
    assert "warning: the event 'straggler' {'rank': 1} could not be written" in capfd.readouterr().out
    write_claim(tmp_path, host="node7", generation=2)
    with pytest.raises(SupersededError):
        owner.note_event("straggler", rank=1)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    owner = RunDirectory(tmp_path)
    owner.claim()
    owner.write_file("recipe.yaml", "first")
    owner.write_file("recipe.yaml", "second")
    release(owner)
    assert (tmp_path / "recipe.yaml").read_text(encoding="utf-8") == "second"
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["recipe.yaml"]


def test_the_environment_names_versions_host_and_only_the_variables_that_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    secrets = (
        *("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "SLURM_JWT", "SLURM_JOB_COMMENT", "NCCL_SECRET"),
        *("TRAINYARD_CACHE_KEY", "OMP_TOKEN", "CUDA_VISIBLE_DEVICES_KEY", "DS_KEY", "SLURM_JOB_ID_TOKEN"),
    )
    for name in secrets:
        monkeypatch.setenv(name, "hidden")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    environment = json.loads(json.dumps(describe_environment(world_size=3)))
    assert environment["versions"]["torch"].startswith("2.")
    assert environment["versions"]["deepspeed"]
    assert (environment["host"], environment["world_size"]) == (socket.gethostname(), 3)
    shown = environment["variables"]["set_outside"]
    assert (shown["OMP_NUM_THREADS"], shown["SLURM_JOB_ID"], environment["job"]) == ("1", "12", "12")
    assert "hidden" not in json.dumps(environment)


# The recipe of a run that goes on


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"data.sequence_length": 64}, "data.sequence_length: 32 -> 64"),
        ({"train.global_batch_tokens": 512}, "train.global_batch_tokens: 256 -> 512"),
        ({"train.seed": 1}, "train.seed: 0 -> 1"),
        ({"precision": "fp32"}, "precision: 'bf16' -> 'fp32'"),
        ({"tokenizer": "other"}, "tokenizer: 'data/tokenizer' -> 'other'"),
        ({"model.config.hidden_size": 64}, "model.config.hidden_size: 32 -> 64"),
        ({"model.config.new_field": 1}, "model.config.new_field: None -> 1"),
        ({"data.train": [{"path": "data/train", "weight": 2}]}, "data.train: "),
        ({"data.validation": None}, "data.validation: 'data/validation' -> None"),
        ({"optimizer.weight_decay": 0.2}, "optimizer.weight_decay: 0.1 -> 0.2"),
        ({"optimizer.betas": [0.9, 0.99]}, "optimizer.betas: [0.9, 0.95] -> [0.9, 0.99]"),
        ({"optimizer.gradient_clip_norm": None}, "optimizer.gradient_clip_norm: 1.0 -> None"),
    ],
)
def test_fixed_fields_are_refused_with_old_and_new_value(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match="belongs to another recipe") as caught:
        compare_recipes(make_recipe(), make_recipe(changes))
    assert field in str(caught.value)
    assert "--fork NEW_NAME" in str(caught.value)


def test_all_fixed_fields_that_differ_are_named_and_nothing_else() -> None:
    new = make_recipe({"train.seed": 1, "precision": "fp32", "optimizer.learning_rate": 1, "compile": True})
    with pytest.raises(ValueError) as caught:
        compare_recipes(make_recipe(), new)
    message = str(caught.value)
    assert "precision: 'bf16' -> 'fp32'; train.seed: 0 -> 1." in message
    assert "learning_rate" not in message
    assert "compile" not in message


@pytest.mark.parametrize(
    "changes",
    [
        {"train.micro_batch_sequences": 1},
        {"deepspeed": "ds_configs/zero3_offload.json"},
        {"compile": False},
        {"fused_loss": False},
        {"attention": "eager"},
        {"profile": {"steps": [1, 2]}},
        {"gradient_checkpointing": {"every_layers": 2}},
        {"checkpoint": {"every_steps": 3, "keep_last": 1}},
        {"evaluate": {"every_steps": 3, "sample_tokens": 0}},
        {"logging": {"console_every_steps": 1}},
        {"faults": {"hang_seconds": 5, "restarts": 0, "stale_seconds": 9}},
        {"runs_directory": "/elsewhere"},
    ],
)
def test_free_fields_change_silently(changes: dict[str, Any]) -> None:
    assert compare_recipes(make_recipe(), make_recipe(changes)) == []


@pytest.mark.parametrize("compared", [{"checkpoint.keep_best": 1}, {"evaluate.early_stopping": {}}])
def test_the_batches_of_evaluations_that_are_compared_stay(compared: dict[str, Any]) -> None:
    before = {"evaluate.every_steps": 5, "checkpoint.every_steps": 5, **compared}
    stored = make_recipe(before)
    assert compare_recipes(stored, make_recipe(before | {"evaluate.sample_tokens": 0})) == []
    with pytest.raises(ValueError, match=r"belongs to another recipe: evaluate.batches: None -> 3"):
        compare_recipes(stored, make_recipe(before | {"evaluate.batches": 3}))


def test_lengths_and_learning_rates_are_announced() -> None:
    changes = {
        "train.tokens": 5000,
        "optimizer.learning_rate": "1e-4",
        "optimizer.schedule": "warmup_stable_decay",
        "optimizer.warmup_steps": 2,
        "optimizer.decay_steps": 5,
        "optimizer.minimum_learning_rate_ratio": 0,
    }
    new = make_recipe(changes, without=("train.steps",))
    assert compare_recipes(make_recipe(), new) == [
        "optimizer.decay_steps: None -> 5",
        "optimizer.learning_rate: 0.0003 -> 0.0001",
        "optimizer.minimum_learning_rate_ratio: 0.1 -> 0.0",
        "optimizer.schedule: 'cosine' -> 'warmup_stable_decay'",
        "optimizer.warmup_steps: 0 -> 2",
        "train.steps: 10 -> None",
        "train.tokens: None -> 5000",
    ]


def test_the_stored_recipe_is_the_one_that_was_written(tmp_path: Path) -> None:
    assert stored_recipe(tmp_path) is None
    recipe = make_recipe({"model.config.rms_norm_eps": 1e-5})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(), sort_keys=False), encoding="utf-8")
    stored = stored_recipe(tmp_path)
    assert stored is not None
    assert compare_recipes(stored, recipe) == []
    assert stored == recipe


@pytest.mark.parametrize("content", ["name: [1", "", "name: x\n"])
def test_a_stored_recipe_that_cannot_be_read_is_refused_in_words(tmp_path: Path, content: str) -> None:
    (tmp_path / "recipe.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"recipe .*recipe\.yaml"):
        stored_recipe(tmp_path)
