"""`trainyard status` and `why` on run directories that the launcher, real processes and the run's own writers made."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml
from stand_in import stand_in_recipe, stand_in_worker

from gpt.metrics import MetricsWriter
from gpt.recipe import Faults, Recipe
from gpt.run_directory import NotMetError, RunDirectory
from launch import local, status, why
from launch.cli import app
from launch.log_folder import refusals_recorded
from launch.submitted import SubmittedJob, SweepRun, write_submitted, write_sweep

RANK = """
import json, os, pathlib, signal, sys, time
from gpt.heartbeat import Heartbeat, answer_with_stacks
from gpt.run_directory import RunDirectory
from gpt.stop_requests import StopRequests

rank = int(os.environ["RANK"])
errors = pathlib.Path(os.environ["TRAINYARD_ERROR_DIRECTORY"])
run = errors.parent.parent
stop = StopRequests(errors)
answer_with_stacks(errors / f"rank_{rank}.stacks.txt")
owner = RunDirectory(run)
if rank == 0:
    owner.claim()
    kind = "continue" if owner.events("start") else "start"
    owner.write_event(kind, host="h", world_size=2, pid=os.getpid(), total_steps=20)
    (errors / "claimed").touch()

def wait_for(name):
    while not (errors / name).exists():
        time.sleep(0.01)

wait_for("claimed")
generation = len(list((run / "generations").glob("*.json")))
heartbeat = Heartbeat(run, generation, rank, 0.1)
heartbeat.progress("step", 3)
heartbeat._write()
(errors / f"ready_{rank}").touch()
wait_for(f"ready_{1 - rank}")

def end(code):
    heartbeat.end()
    os._exit(code)
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return stand_in_recipe(tmp_path, "dying")


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Gives the function that sets what both ranks do after they have claimed the run and come to step 3."""
    return stand_in_worker(monkeypatch, tmp_path, RANK)


def explained(recipe: Recipe) -> tuple[str, str, str, str]:
    """State, cause, headline and all evidence of a run."""
    found = why.explain(recipe.run_directory())
    assert found["todo"] and re.search(r"[^.?!][.?!]$", found["headline"])
    assert "\n".join(why.describe(found)).startswith(found["headline"])
    assert "\n".join(status.describe(status.report(recipe.run_directory()))), "status has words for it"
    for item in found["evidence"]:
        assert not item["file"] or (recipe.run_directory() / item["file"]).exists(), item
    return found["state"], found["cause"], found["headline"], json.dumps(found["evidence"])


def with_faults(recipe: Recipe, **values: float) -> Recipe:
    return recipe.model_copy(update={"faults": Faults.model_validate(values)})


# What the launcher saw


def test_an_error_of_python(recipe: Recipe, ranks: Any) -> None:
    ranks("""
        if rank == 1:
            (errors / "rank_1.traceback.txt").write_text("Traceback\\n  File 'x.py', line 7\\nRuntimeError: no luck\\n")
            end(1)
        time.sleep(60)
    """)
    assert local.run_workers(recipe, processes=2) == 1
    state, cause, headline, evidence = explained(recipe)
    assert (state, cause) == ("failed", "exception")
    assert "rank 1 on" in headline and "RuntimeError: no luck" in headline
    assert "File 'x.py', line 7" in evidence and "rank_1.traceback.txt" in evidence
    [event] = [e for e in RunDirectory(recipe.run_directory()).events("failed")]
    assert (event["failure"], event["rank"], event["exit_code"], event["step"]) == ("exception", 1, 1, 3)


@pytest.mark.parametrize(
    ("error", "cause", "todo"),
    [
        ("[Errno 116] Stale file handle: 'runs/x'", "file system or network", "see whether its file systems"),
        ("[Errno 28] No space left on device", "disk", "make room"),
    ],
)
def test_what_the_system_did_to_it(error: str, cause: str, todo: str) -> None:
    outcome = {
        "event": "failed",
        "time": 1.0,
        "reason": f"rank 0 failed: RuntimeError: the system failed the run: {error}",
    }
    found = why._exception(SimpleNamespace(directory=Path("nowhere")), outcome)  # type: ignore[arg-type]
    assert found.cause == cause and error in found.headline and found.todo.startswith(todo)


@pytest.mark.parametrize(
    ("counters", "cause"),
    [
        ([{"control group": 0, "host": 5}, {"control group": 1, "host": 6}], "out of memory"),
        ([{"control group": 2, "host": 5}, {"control group": 2, "host": 5}], "killed"),
        ([{"host": 5}, {"host": 5}], "killed, cause unknown"),
    ],
)
def test_a_rank_that_got_sigkill(
    recipe: Recipe, ranks: Any, monkeypatch: pytest.MonkeyPatch, counters: list[dict[str, int]], cause: str
) -> None:
    monkeypatch.setattr(local, "oom_kills", lambda: counters.pop(0))
    ranks("os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(60)")
    assert local.run_workers(recipe, processes=2) == 86
    state, found, headline, _ = explained(recipe)
    assert (state, found) == ("failed", cause)
    assert "rank 1 (process" in headline and "SIGKILL" in headline


def test_a_hang(recipe: Recipe, ranks: Any) -> None:
    ranks("os.kill(os.getpid(), signal.SIGSTOP) if rank == 1 else time.sleep(60)")
    assert local.run_workers(with_faults(recipe, hang_seconds=1, restarts=0), processes=2) == 86
    state, cause, headline, evidence = explained(recipe)
    assert (state, cause) == ("failed", "hang")
    assert "rank 1 on" in headline and "its process is stopped" in headline
    assert "hang.txt" in evidence and "gave its stacks" in evidence


def test_a_failure_that_comes_again_at_the_same_step(recipe: Recipe, ranks: Any) -> None:
    ranks("os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(60)")
    assert local.run_workers(with_faults(recipe, restarts=1), processes=2) == 86
    state, _, headline, evidence = explained(recipe)
    assert state == "failed" and "at the same step, 3, before, without a checkpoint between" in headline
    assert "restart" in evidence
    report = status.report(recipe.run_directory())
    assert len(report["restarts"]) == 1 and "SIGKILL" in report["restarts"][0]["reason"] and report["starts"] == 2


REFUSAL = """
if rank == 0:
    {before}
(errors / f"rank_{{rank}}.txt").write_text({sentence!r})
wait_for(f"rank_{{1 - rank}}.txt")
end(1)
"""


@pytest.mark.parametrize(
    ("before", "sentence", "cause"),
    [
        ("pass", "the resume proof fails", "stopped itself"),
        ("owner.write_event('diverged', step=3, reason='3 spikes')", "step 3: 3 spikes in a row", "diverged"),
        (
            "owner.note_event('checkpoint failed', step=3, errors=['rank 0: No space left on device'])",
            "the checkpoint of step 3 could not be written: rank 0: No space left on device. … the run stops",
            "disk",
        ),
        ("pass", "no checkpoint in runs/x/checkpoints can be loaded (steps [10, 20])", "damaged checkpoints"),
    ],
)
def test_what_a_run_says_itself(recipe: Recipe, ranks: Any, before: str, sentence: str, cause: str) -> None:
    ranks(REFUSAL.format(before=before, sentence=sentence))
    assert local.run_workers(recipe, processes=2) == 1
    state, found, headline, _ = explained(recipe)
    assert (state, found) == ("failed", cause) and sentence in headline


def test_a_start_whose_place_a_later_one_took(recipe: Recipe, ranks: Any) -> None:
    """The later start is the run; the loser may not write events, and why finds what it left beside its logs."""
    ranks("""
        if rank == 0:
            from gpt.run_directory import claim_file
            claim = json.loads(claim_file(run, 1).read_text()) | {"launcher": 1, "pid": os.getppid()}
            claim_file(run, 2).write_text(json.dumps(claim | {"time": time.time()}))
            (errors / "rank_0.another_start").touch()
        (errors / f"rank_{rank}.txt").write_text("run directory x was taken over by start 2; this is start 1: stopping")
        wait_for(f"rank_{1 - rank}.txt")
        end(1)
    """)
    assert local.run_workers(recipe, processes=2) == 1
    assert not RunDirectory(recipe.run_directory()).events("failed")
    state, _, _, evidence = explained(recipe)
    assert state == "starting" and "taken over by start 2" in evidence and "outcome.json" in evidence
    claim = recipe.run_directory() / "generations" / "000002.json"
    claim.write_text(json.dumps(json.loads(claim.read_text()) | {"process_space": "elsewhere"}))
    assert explained(recipe)[0] == "dead", "how the loser ended says nothing of the run"


@pytest.mark.parametrize(("without_word", "cause"), [((0, 1), "hosts did not meet"), ((0,), "stopped itself")])
def test_ranks_that_waited_in_vain(recipe: Recipe, ranks: Any, without_word: tuple[int, ...], cause: str) -> None:
    """It is no refusal, after which a Slurm job would not go on, unless a rank has refused."""
    ranks(f"""
        if rank in {without_word}:
            (errors / f"rank_{{rank}}.not_met").touch()
        (errors / f"rank_{{rank}}.txt").write_text("nothing was heard of the facts of number 2 in 600 s")
        wait_for(f"rank_{{1 - rank}}.txt")
        end(1)
    """)
    assert local.run_workers(recipe, processes=2) == 1
    assert explained(recipe)[:2] == ("failed", cause)


def asked_to_stop(process: int, run: Path, *waits: float) -> threading.Thread:
    """SIGTERM to the process when both ranks are ready, once after each wait."""

    def user() -> None:
        while len(list(run.glob("logs/*/ready_*"))) < 2:
            time.sleep(0.01)
        for seconds in waits:
            time.sleep(seconds)
            subprocess.run(["kill", "-TERM", str(process)], check=True)

    thread = threading.Thread(target=user)
    thread.start()
    return thread


def test_a_run_that_was_asked_to_stop(recipe: Recipe, ranks: Any) -> None:
    ranks("""
        while not stop.requested():
            time.sleep(0.01)
        (errors / f"rank_{rank}.stopped").write_text("3")
        end(0)
    """)
    thread = asked_to_stop(os.getpid(), recipe.run_directory(), 0)
    assert local.run_workers(recipe, processes=2) == 85
    thread.join()
    state, cause, headline, _ = explained(recipe)
    assert (state, cause) == ("stopped", "stopped")
    assert "SIGTERM" in headline and "after step 3" in headline


def test_a_run_that_was_asked_to_stop_twice(recipe: Recipe, ranks: Any) -> None:
    ranks("time.sleep(60)")
    thread = asked_to_stop(os.getpid(), recipe.run_directory(), 0, 1.2)
    assert local.run_workers(recipe, processes=2) == 143
    thread.join()
    state, cause, headline, _ = explained(recipe)
    assert (state, cause) == ("failed", "ended by a second signal") and "SIGTERM" in headline


# What nobody said


@pytest.fixture
def launched(recipe: Recipe, ranks: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A launcher in a process of its own, with ranks that stay in step 3."""
    ranks("time.sleep(60)")
    code = (
        "import sys, json; from gpt.recipe_file import parse_recipe; from launch import local;"
        "local.WORKER_MODULE = 'stand_in_worker';"
        "sys.exit(local.run_workers(parse_recipe(json.loads(sys.argv[1]), 'test'), processes=2))"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code, recipe.model_dump_json()])
    deadline = time.monotonic() + 60
    while len(list(recipe.run_directory().glob("logs/*/ready_*"))) < 2:
        assert launcher.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    yield launcher
    launcher.kill()
    launcher.wait()


def test_a_run_that_lives_and_then_dies_without_a_word(recipe: Recipe, launched: subprocess.Popen[bytes]) -> None:
    """One launcher: it runs, refuses a second start, hangs, is killed, and all that is looked at from another host."""
    run = recipe.run_directory()
    state, cause, headline, _ = explained(recipe)
    assert (state, cause) == ("running", "running") and "It did not die" in headline
    report = status.report(run)
    assert (report["total_steps"], [rank["step"] for rank in report["ranks"]]) == (20, [3, 3])
    assert all(rank["alive"] for rank in report["ranks"]) and report["remarks"] == []

    with pytest.raises(ValueError, match="in use"), refusals_recorded(run):
        RunDirectory(run).claim()
    assert explained(recipe)[0] == "running"
    assert "another start was refused" in status.report(run)["remarks"][0]

    (run / "recipe.yaml").write_text(yaml.safe_dump({"faults": {"hang_seconds": 0.2}}))
    time.sleep(0.3)
    state, cause, headline, _ = explained(recipe)
    assert (state, cause) == ("hung", "hang") and "no rank has gone on for" in headline
    (run / "recipe.yaml").unlink()

    pids = [beat["pid"] for beat in map(json.loads, (f.read_text() for f in run.glob("heartbeats/*/rank_*.json")))]
    launched.kill()
    launched.wait()
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    state, cause, headline, evidence = explained(recipe)
    assert (state, cause) == ("dead", "died without a word") and "SIGKILL of the launcher" in headline
    assert "in step 3, phase step; its process is gone" in evidence
    judged_by_age(recipe)


def judged_by_age(recipe: Recipe) -> None:
    """The same run as another host sees it, to which its process numbers say nothing."""
    run = recipe.run_directory()
    [file] = run.glob("generations/*.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"process_space": "elsewhere", "host": "far"}))

    def last_beats(seconds: float) -> None:
        for beat in run.glob("heartbeats/*/rank_*.json"):
            beat.write_text(json.dumps(json.loads(beat.read_text()) | {"time": time.time() - seconds}))

    last_beats(50)
    assert explained(recipe)[0] == "running"
    assert "silent for 50 s" in status.report(run)["remarks"][0]
    last_beats(-5)
    assert "clock of" in status.report(run)["remarks"][0] and "5 s ahead" in status.report(run)["remarks"][0]
    last_beats(70)
    state, cause, headline, _ = explained(recipe)
    assert (state, cause) == ("dead", "died without a word") and "no sign of life from far" in headline


@pytest.mark.parametrize(
    ("change", "value", "cause"),
    [("psutil.boot_time", time.time() + 1e6, "host restarted"), ("shutil.disk_usage", (9, 9, 4096), "disk")],
    ids=["restarted", "disk"],  # the time in a name would differ between the processes of pytest-xdist
)
def test_what_is_around_a_run_that_died_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, value: Any, cause: str
) -> None:
    owner = trained(tmp_path, 3)
    [file] = (owner.path / "generations").glob("*.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"process_space": "of the boot before"}))
    assert explained_state(tmp_path) == ("dead", "died without a word")
    answer = SimpleNamespace(free=value[2]) if isinstance(value, tuple) else value
    monkeypatch.setattr(change, lambda *arguments: answer)
    assert explained_state(tmp_path) == ("dead", cause)


def test_a_start_that_is_refused_before_any_rank_is_there(recipe: Recipe) -> None:
    run = recipe.run_directory()
    with pytest.raises(FileNotFoundError), refusals_recorded(run):
        raise FileNotFoundError("data/train is not there:\n prepare it")
    assert not run.exists(), "what was never begun has no directory"
    (run / "jobs").mkdir(parents=True)
    assert explained(recipe)[:2] == ("not started", "not started")
    with pytest.raises(FileNotFoundError), refusals_recorded(run):
        raise FileNotFoundError("data/train is not there:\n prepare it")
    state, cause, headline, _ = explained(recipe)
    assert (state, cause) == ("failed", "refused") and "data/train is not there: prepare it" in headline
    with pytest.raises(ConnectionError), refusals_recorded(run):
        raise NotMetError("the 2 hosts of the run did not meet at host0:29500")
    state, cause, headline, _ = explained(recipe)
    assert (state, cause) == ("failed", "hosts did not meet") and "did not meet at host0:29500" in headline


# The numbers


def trained(run: Path, steps: int) -> RunDirectory:
    """A run that has trained, by the run's own writers: a loss that falls, a validation each ten steps."""
    owner = RunDirectory(run)
    owner.claim()
    owner.write_event("start", total_steps=100, host="h", world_size=1)
    writer = MetricsWriter(owner, 0, 100, 1000)
    for step in range(1, steps + 1):
        record = {
            "train/loss": 8.0 - step / 10,
            "performance/tokens_per_second": 100.0,
            "performance/step_seconds": 0.001,
            "train/skipped_steps": 0,
        }
        writer.write(step, record | ({"evaluate/loss": 7.0 - step / 10} if step % 10 == 0 else {}))
    writer.close()
    return owner


def test_the_numbers_of_a_run(tmp_path: Path) -> None:
    owner = trained(tmp_path, 45)
    report = status.report(tmp_path)
    assert (report["step"], report["total_steps"], report["loss"]) == (45, 100, 3.5)
    assert report["trend"]["word"] == "falling"
    assert report["trend"]["mean"] == pytest.approx(8 - 35.5 / 10)
    assert report["validation"] == {"loss": 3.0, "step": 40}
    assert report["tokens_per_second"] == 100.0 and report["step_seconds"] > 0
    first = owner.events("start")[0]["time"]
    goodput = report["goodput"]
    assert goodput["share"] == pytest.approx(0.045 / goodput["seconds"])
    assert 0 < goodput["seconds"] <= time.time() - first
    assert (report["checkpoint"], report["eta_seconds"]) == (None, None)
    folder = tmp_path / "checkpoints" / "step_00000040"
    folder.mkdir()
    assert status.report(tmp_path)["checkpoint"] is None, "a folder without a manifest is no checkpoint"
    (folder / "manifest.json").write_text("{}")
    assert 0 <= status.report(tmp_path)["checkpoint"]["age_seconds"] < 5
    owner.write_event("end", step=45)
    assert explained_state(tmp_path) == ("finished", "finished")


def explained_state(run: Path) -> tuple[str, str]:
    found = why.explain(run)
    return found["state"], found["cause"]


@pytest.mark.parametrize(
    ("losses", "word"),
    [
        ([5.0 - i / 100 for i in range(40)], "falling"),
        ([5.0 + i / 100 for i in range(40)], "rising"),
        ([5.0 + (-1) ** i - i / 1000 for i in range(40)], "flat"),
    ],
)
def test_the_trend_of_the_loss(losses: list[float], word: str) -> None:
    found = status.loss_trend([*losses, None])
    assert found is not None and found["word"] == word
    assert status.loss_trend(losses[:21]) is None


def test_damage_is_said_and_does_no_harm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path, 30)
    for name in ("metrics.jsonl", "events.jsonl"):
        with (tmp_path / name).open("ab") as file:
            file.write(b'{"step": 31, "tra\n\xff\xfe\x00\n17\n[1]\n{"no": "keys"}\n{"step"')
    (tmp_path / "generations" / "000001.json").write_text("{")
    (tmp_path / "heartbeats" / "generation_000001").mkdir()
    (tmp_path / "heartbeats" / "generation_000001" / "rank_00000.json").write_text("[")
    (tmp_path / "recipe.yaml").write_text("a: [")
    (tmp_path / "logs" / "20200101T000000Z_h_7").mkdir(parents=True)
    (tmp_path / "logs" / "20200101T000000Z_h_7" / "outcome.json").write_text("nonsense")
    (tmp_path / "logs" / "oddZ_name").mkdir()
    app(["why", str(tmp_path)], standalone_mode=False)
    app(["status", str(tmp_path)], standalone_mode=False)
    said = capsys.readouterr().out
    assert "step 30 of 100" in said
    for problem in ("6 lines of metrics.jsonl", "6 lines of events.jsonl", "generations/000001.json", "recipe.yaml",
                    "outcome.json"):  # fmt: skip
        assert problem in said, problem


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        status.report(tmp_path / "absent")
    with pytest.raises(ValueError, match="is no run directory"):
        why.explain(tmp_path)


def test_both_commands_do_without_torch(tmp_path: Path) -> None:
    trained(tmp_path, 3)
    code = (
        "import sys; from launch.cli import app; "
        "app([*sys.argv[1:]], standalone_mode=False); assert 'torch' not in sys.modules"
    )
    for arguments in (["status", str(tmp_path), "--json"], ["why", str(tmp_path), "--json"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["state"] == "starting", "the writer is this process, without a heartbeat"


# Slurm

SCONTROL = (
    "JobId=28 JobName=tiny UserId=root(0) JobState={state} Reason={reason} Dependency=(null) Requeue=0 Restarts=0 "
    "BatchFlag=1 Reboot=0 ExitCode=0:15 RunTime=00:01:16 TimeLimit=00:01:00 TimeMin=N/A "
    "SubmitTime=2026-11-26T22:16:01 EligibleTime=2026-11-26T22:16:01 StartTime={start} EndTime={end} Deadline=N/A "
    "PreemptTime=None NodeList=n[1-2] BatchHost=n1 NumNodes=1 CPUs/Task=1 ReqB:S:C:T=0:0:*:* Features=(null) "
    "Command=/runs/tiny/jobs/0001/job.sbatch StdOut=/runs/tiny/logs/slurm-28.out Power= \n"
)
"""What `scontrol show job --oneliner` of Slurm 22.05 printed of a job that its time limit had ended, shortened."""


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Gives the function that sets what scontrol answers of every job; at first there is none."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def answer(state: str, reason: str = "None", start: str = "Unknown", end: str = "Unknown") -> None:
        text = SCONTROL.format(state=state, reason=reason, start=start, end=end)
        (folder / "scontrol").write_text(f"#!/bin/sh\n[ \"$*\" = 'show job --oneliner 28' ] && echo '{text}'\n")
        (folder / "scontrol").chmod(0o755)

    return answer


def job_of(run: Path, claim: dict[str, Any]) -> RunDirectory:
    """A run in job 28 whose processes are another host's and have given no sign for an hour."""
    owner = trained(run, 3)
    [file] = run.glob("generations/*.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | claim | {"process_space": "elsewhere", "host": "n1"}))
    return owner


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        ("TIMEOUT", "time limit"),
        ("PREEMPTED", "preempted"),
        ("NODE_FAIL", "node failure"),
        ("OUT_OF_MEMORY", "out of memory"),
        ("CANCELLED", "cancelled"),
    ],
)
def test_slurm_says_how_it_ended_a_job(tmp_path: Path, slurm: Any, state: str, cause: str) -> None:
    slurm(state)
    job_of(tmp_path / "run", {"job": "28"})
    assert explained_state(tmp_path / "run") == ("dead", cause)
    found = why.explain(tmp_path / "run")
    assert f"Slurm ended job 28: {why.SLURM_ENDS[state][1]} ({state})" in found["headline"]
    assert "run time 00:01:16, time limit 00:01:00" in json.dumps(found["evidence"])


def test_the_signal_that_a_launcher_saw_was_slurms(tmp_path: Path, slurm: Any) -> None:
    slurm("TIMEOUT")
    owner = job_of(tmp_path, {"job": "28"})
    reason = "ended by SIGTERM without saving"
    owner.write_event("failed", failure="second signal", signal="SIGTERM", exit_code=143, reason=reason)
    assert explained_state(tmp_path) == ("failed", "time limit")
    assert "its time limit (TIMEOUT)" in (headline := why.explain(tmp_path)["headline"]) and reason in headline


def test_an_earlier_job_does_not_explain_the_end_of_a_start_without_one(tmp_path: Path, slurm: Any) -> None:
    slurm("NODE_FAIL")
    owner = job_of(tmp_path, {"job": None})
    owner.write_event("job started", job="28", restart=0)
    owner.write_event("failed", failure="killed", signal="SIGKILL", out_of_memory=False, reason="rank 1 was killed")
    assert explained_state(tmp_path) == ("failed", "killed")


@pytest.mark.parametrize(("seconds_left", "cause"), [(20, "time limit"), (2000, "died without a word")])
def test_the_time_limit_by_the_record_that_the_job_kept_where_slurm_has_forgotten_it(
    tmp_path: Path, slurm: Any, seconds_left: int, cause: str
) -> None:
    job_of(tmp_path, {"job": "28"})
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + seconds_left))
    text = SCONTROL.format(state="RUNNING", reason="None", start="Unknown", end=end)
    (tmp_path / "logs" / "job_28_0_start.txt").write_text(text)
    assert explained_state(tmp_path) == ("dead", cause)
    (tmp_path / "logs" / "job_28_0_end.txt").write_text(text)  # by the job itself, which still ran
    said = "\n".join(status.describe(status.report(tmp_path)))
    assert "job 28: Slurm does not know it any more, or is not here" in said and "RUNNING" not in said


def test_a_job_that_waits(tmp_path: Path, slurm: Any) -> None:
    slurm("PENDING", reason="BeginTime", start="2026-11-26T23:16:01")
    owner = job_of(tmp_path, {"job": "28"})
    owner.write_event("stopped", reason="stopped on request after step 3", exit_code=85, step=3)
    assert explained_state(tmp_path) == ("waiting", "waiting")
    said = "\n".join(status.describe(status.report(tmp_path)))
    assert "PENDING, reason BeginTime, expected to start 2026-11-26T23:16:01" in said
    assert "before, stopped on request after step 3" in said


def test_a_requeued_job_that_runs_again(tmp_path: Path, slurm: Any) -> None:
    slurm("RUNNING")
    owner = job_of(tmp_path, {"job": "28"})
    owner.write_event("stopped", reason="stopped on request after step 3", exit_code=85, step=3)
    owner.write_event("job ended", job="28", decision="go on", reason="asked to stop")
    assert explained_state(tmp_path) == ("stopped", "stopped")
    owner.write_event("job started", job="28", restart=1)
    assert explained_state(tmp_path) == ("starting", "starting")


def test_a_job_that_gives_up(tmp_path: Path, slurm: Any) -> None:
    owner = job_of(tmp_path, {"job": "28"})
    owner.write_event("failed", failure="exception", reason="rank 1 failed: RuntimeError: no luck", step=3)
    owner.write_event("job ended", job="28", decision="no progress", reason="it failed twice without progress")
    assert explained_state(tmp_path) == ("failed", "no progress")
    found = why.explain(tmp_path)
    assert "failed twice without progress" in found["headline"] and "no luck" in json.dumps(found["evidence"])


@pytest.mark.parametrize(("state", "expected"), [("FAILED", "failed"), ("RUNNING", "starting"), ("PENDING", "waiting")])
def test_a_job_before_its_first_rank(tmp_path: Path, slurm: Any, state: str, expected: str) -> None:
    slurm(state)
    (tmp_path / "jobs" / "0001").mkdir(parents=True)
    write_submitted(tmp_path / "jobs" / "0001", SubmittedJob(["28"], None, 0.0))
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "slurm-28.out").write_text("module: command not found\n")
    found = why.explain(tmp_path)
    assert found["state"] == expected
    assert ("module: command not found" in json.dumps(found["evidence"])) == (state == "FAILED")


def test_a_sweep_is_a_table_with_the_best_run_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = {"slow": "1e-4", "fast": "3e-4", "later": "1e-3"}
    write_sweep(tmp_path / "lr.sweep", [SweepRun(name, {"optimizer.learning_rate": r}) for name, r in rates.items()])
    trained(tmp_path / "slow", 10).write_event("end", step=10)
    trained(tmp_path / "fast", 20).write_event("end", step=20)
    capsys.readouterr()
    app(["status", str(tmp_path / "lr.sweep"), "--watch"], standalone_mode=False)  # none is running: it ends at once
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert [line.split() for line in lines] == [
        ["run", "optimizer.learning_rate", "state", "step", "loss", "validation"],
        ["fast", "3e-4", "finished", "20", "6.0000", "5.0000"],
        ["slow", "1e-4", "finished", "10", "7.0000", "6.0000"],
        ["later", "1e-3", "not", "started", "0", "-", "-"],
    ]
    app(["status", str(tmp_path / "lr.sweep"), "--json"], standalone_mode=False)
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["fast", "slow", "later"]
    with pytest.raises(ValueError, match=r"lr\.sweep is a sweep's folder: ask for one of its runs, .*/slow, "):
        why.explain(tmp_path / "lr.sweep")


def test_a_validation_that_is_not_finite_is_the_worst(tmp_path: Path) -> None:
    write_sweep(tmp_path / "lr.sweep", [SweepRun(name, {}) for name in ("lost", "good")])
    owner = trained(tmp_path / "lost", 20)
    trained(tmp_path / "good", 10)
    writer = MetricsWriter(owner, 20, 100, 1000)
    writer.write(21, {"evaluate/loss": float("nan")})
    writer.close()
    owner.write_event("rollback", step=21)
    assert [row["name"] for row in status.sweep_report(tmp_path / "lr.sweep")] == ["good", "lost"]
    said = status.describe(status.report(tmp_path / "lost"))
    assert "validation: not finite at step 21" in said and "skipped steps: 0, rollbacks: 1" in said
