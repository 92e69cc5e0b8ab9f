"""The local launcher with real processes, which are small scripts: output, first causes, signals, several hosts."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from stand_in import stand_in_recipe, stand_in_worker

from gpt.recipe import Faults, Recipe
from launch import local, watch

WORKER = """
import json, os, pathlib, signal, sys, time
rank = int(os.environ["RANK"])
errors = pathlib.Path(os.environ["TRAINYARD_ERROR_DIRECTORY"])
name = json.loads(os.environ["TRAINYARD_RECIPE"])["name"]

from gpt.stop_requests import StopRequests
stop = StopRequests(errors)

def wait_for(file):
    while not (errors / file).exists():
        time.sleep(0.01)
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return stand_in_recipe(tmp_path, "launched")


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Gives the function that sets what every worker process runs."""
    return stand_in_worker(monkeypatch, tmp_path, WORKER)


def worker_processes() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ended at this moment
            if "stand_in_worker" in child.cmdline():
                found.append(child)
    return found


def test_workers_get_recipe_ranks_and_environment(
    recipe: Recipe, worker: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    worker("""
        print(name, rank, os.environ["WORLD_SIZE"], os.environ["DS_ACCELERATOR"], "MALLOC_TOP_PAD_" in os.environ)
        sys.stderr.write("a word without a newline")
    """)
    before = dict(os.environ)
    handlers = [signal.getsignal(number) for number in local.SIGNALS]
    assert local.run_workers(recipe, processes=2) == 0
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["launched 0 2 cpu True", "launched 1 2 cpu True"]
    assert err == "a word without a newline" * 2
    assert dict(os.environ) == before
    assert [signal.getsignal(number) for number in local.SIGNALS] == handlers
    (logs,) = (recipe.run_directory() / "logs").iterdir()
    assert (logs / "rank_00001.stdout.log").read_text() == "launched 1 2 cpu True\n"


def test_lines_of_two_ranks_are_not_mixed(recipe: Recipe, worker: Any, capfd: pytest.CaptureFixture[str]) -> None:
    worker("""
        for _ in range(300):
            sys.stdout.write(f"<{rank}:")
            sys.stdout.flush()
            time.sleep(0.001)
            sys.stdout.write(f"{rank}>\\n")
    """)
    assert local.run_workers(recipe, processes=2) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == ["<0:0>"] * 300 + ["<1:1>"] * 300


def test_a_refusal_of_all_ranks_is_one_sentence(recipe: Recipe, worker: Any, capfd: pytest.CaptureFixture[str]) -> None:
    worker("""
        (errors / f"rank_{rank}.txt").write_text("the batch is 7, use 8")
        wait_for(f"rank_{1 - rank}.txt")
        sys.exit(1)
    """)
    assert local.run_workers(recipe, processes=2) == 1
    assert capfd.readouterr().err == "trainyard: error: the batch is 7, use 8\n"


def test_the_first_traceback_comes_last_and_the_others_stay_in_the_logs(
    recipe: Recipe, worker: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    worker("""
        if rank == 0:
            wait_for("rank_1.traceback.txt")
            time.sleep(0.02)
        (errors / f"rank_{rank}.traceback.txt").write_text(f"Traceback\\nRuntimeError: of rank {rank}")
        wait_for("rank_0.traceback.txt")
        print("last words", file=sys.stderr)
        sys.exit(1)
    """)
    assert local.run_workers(recipe, processes=2) == 1
    err = capfd.readouterr().err
    assert err.endswith(f"rank 1 on {socket.gethostname()} failed:\nTraceback\nRuntimeError: of rank 1\n")
    assert "of rank 0" not in err
    (logs,) = (recipe.run_directory() / "logs").iterdir()
    assert f"what every rank printed: {logs}" in err
    assert "of rank 0" in (logs / "rank_0.traceback.txt").read_text()


def test_a_killed_rank_is_named_and_takes_the_others_down(
    recipe: Recipe, worker: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    worker("""
        print(os.getpid())
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    """)
    started = time.monotonic()
    assert local.run_workers(recipe, processes=2) == 86
    assert time.monotonic() - started < 40
    out, err = capfd.readouterr()
    killed = re.findall(r"rank (\d) \(process (\d+) on \S+\) was killed by (\w+)", err)
    assert [(rank, name) for rank, _, name in killed] == [("1", "SIGKILL")]
    assert killed[0][1] in out.split()
    assert worker_processes() == []


def test_an_exit_without_a_word_is_said(recipe: Recipe, worker: Any, capfd: pytest.CaptureFixture[str]) -> None:
    worker("sys.exit(3) if rank == 1 else time.sleep(60)")
    assert local.run_workers(recipe, processes=2) == 1
    err = capfd.readouterr().err
    assert re.search(r"rank 1 \(process \d+ on \S+\) ended with exit code 3 and left no traceback\n$", err)
    assert "rank 0" not in err


def send_when_ready(place: Path, workers: int, *actions: tuple[float, int, signal.Signals]) -> threading.Thread:
    """After all workers are ready: (seconds to wait, process, signal), one after another."""

    def user() -> None:
        while len(list(place.glob("ready_*"))) < workers:
            time.sleep(0.01)
        for seconds, pid, number in actions:
            time.sleep(seconds)
            pid = pid or int((place / "ready_1").read_text())
            # from a third process: what comes from the launcher is the agent's, and this process is the launcher here
            subprocess.run(["kill", f"-{number.value}", str(pid)], check=True)

    thread = threading.Thread(target=user)
    thread.start()
    return thread


SAVING = """
    place = pathlib.Path({place!r})
    (place / f"ready_{{rank}}").write_text(str(os.getpid()))
    while not stop.requested() and not list(errors.glob("rank_*.stopped")):
        time.sleep(0.01)
    time.sleep(0.5)
    (errors / f"rank_{{rank}}.stopped").write_text("7")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_lets_the_workers_save(
    recipe: Recipe, worker: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    """Sent twice at once, as a scheduler does that signals every process and the step: one request."""
    worker(SAVING.format(place=str(tmp_path)))
    thread = send_when_ready(tmp_path, 2, (0, os.getpid(), number), (0.1, os.getpid(), number))
    assert local.run_workers(recipe, processes=2) == 85
    thread.join()
    err = capfd.readouterr().err
    assert f"{number.name}: stopping after the present step" in err
    assert err.endswith("stopped on request after step 7; the same command goes on from there\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_is_a_request_too(
    recipe: Recipe, worker: Any, tmp_path: Path, number: signal.Signals
) -> None:
    worker(SAVING.format(place=str(tmp_path)))
    thread = send_when_ready(tmp_path, 2, (0, 0, number), (0.1, 0, number))
    assert local.run_workers(recipe, processes=2) == 85
    thread.join()


def test_a_second_signal_to_one_rank_ends_the_run(
    recipe: Recipe, worker: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    worker(SAVING.format(place=str(tmp_path)).replace("sleep(0.5)", "sleep(60)"))
    thread = send_when_ready(tmp_path, 2, (0, 0, signal.SIGTERM), (1.2, 0, signal.SIGTERM))
    recipe = recipe.model_copy(update={"faults": Faults(restarts=1)})  # what was asked to stop is not started again
    assert local.run_workers(recipe, processes=2) == 143
    thread.join()
    assert re.search(r"rank 1 .* ended with exit code 143", capfd.readouterr().err)
    assert worker_processes() == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_all_workers_at_once(
    recipe: Recipe, worker: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals, code: int
) -> None:
    """The workers never come to their end, and an impatient user sends the signal again and again."""
    worker(SAVING.format(place=str(tmp_path)).replace("sleep(0.5)", "sleep(60)"))
    here = os.getpid()
    thread = send_when_ready(tmp_path, 2, (0, here, number), (1.2, here, number), (0, here, number), (0, here, number))
    started = time.monotonic()
    assert local.run_workers(recipe, processes=2) == code
    assert time.monotonic() - started < 40
    thread.join()
    assert worker_processes() == []
    assert f"ended by {number.name} without saving" in capfd.readouterr().err


# Starting again


CLAIMING = """
    from gpt.run_directory import RunDirectory
    starts = pathlib.Path({place!r})
    number = len(list(starts.glob(f"start_{{rank}}_*")))
    (starts / f"start_{{rank}}_{{number}}").touch()
    if rank == 0:
        RunDirectory(errors.parent.parent).claim()
"""


def with_faults(recipe: Recipe, **values: float) -> Recipe:
    return recipe.model_copy(update={"faults": Faults.model_validate(values)})


def events(recipe: Recipe) -> list[tuple[str, str]]:
    lines = (recipe.run_directory() / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [(event["event"], event["reason"]) for event in map(json.loads, lines)]


def test_a_crashed_group_is_started_again(
    recipe: Recipe, worker: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    worker(
        CLAIMING.format(place=str(tmp_path))
        + """
    wait_for(f"../../generations/00000{number + 1}.json")
    if rank == 1 and number == 0:
        (errors / "rank_1.traceback.txt").write_text("Traceback\\nRuntimeError: of the first start")
        sys.exit(1)
    if rank == 1 and number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if number < 2:
        time.sleep(60)
    """
    )
    assert local.run_workers(with_faults(recipe, restarts=2), processes=2) == 0
    err = capfd.readouterr().err
    assert f"restart 1 of at most 2, since rank 1 on {socket.gethostname()} failed: RuntimeError: of the first" in err
    assert re.search(r"restart 2 of at most 2, since rank 1 \(process \d+ on \S+\) was killed by SIGKILL", err)
    assert [kind for kind, _ in events(recipe)] == ["failed", "restart"] * 2
    assert events(recipe)[1][1].endswith("RuntimeError: of the first start")
    assert len(list((recipe.run_directory() / "logs").iterdir())) == 3


def test_restarts_are_bounded_and_the_last_cause_comes_last(
    recipe: Recipe, worker: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    worker(f"""
    place = pathlib.Path({str(tmp_path)!r})
    (place / f"start_{{len(list(place.glob('start_*')))}}").touch()
    os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert local.run_workers(with_faults(recipe, restarts=1), processes=1) == 86
    assert len(list(tmp_path.glob("start_*"))) == 2
    assert re.search(r"error: rank 0 \(.*\) was killed by SIGKILL[^\n]*\n$", capfd.readouterr().err)
    assert not (recipe.run_directory() / "events.jsonl").exists(), "an event in a directory that no rank had claimed"


def test_a_refusal_is_not_tried_again(recipe: Recipe, worker: Any, capfd: pytest.CaptureFixture[str]) -> None:
    worker("""
        (errors / f"rank_{rank}.txt").write_text("the batch is 7, use 8")
        sys.exit(1)
    """)
    assert local.run_workers(with_faults(recipe, restarts=2), processes=1) == 1
    assert capfd.readouterr().err == "trainyard: error: the batch is 7, use 8\n"


@pytest.mark.parametrize("target", ["launcher", "rank"])
def test_what_was_asked_to_stop_is_not_started_again(
    recipe: Recipe, worker: Any, tmp_path: Path, target: str, capfd: pytest.CaptureFixture[str]
) -> None:
    worker(SAVING.format(place=str(tmp_path)).replace("time.sleep(0.5)", "os.kill(os.getpid(), signal.SIGKILL)"))
    pid = os.getpid() if target == "launcher" else 0
    thread = send_when_ready(tmp_path, 2, (0, pid, signal.SIGTERM))
    assert local.run_workers(with_faults(recipe, restarts=2), processes=2) == 86
    thread.join()
    assert "restart" not in capfd.readouterr().err


def test_a_signal_while_no_worker_is_there(
    recipe: Recipe, worker: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    worker("os.kill(os.getpid(), signal.SIGKILL)")
    record = local._record

    def record_and_be_signalled(recipe: Recipe, logs: Path, event: str, **details: Any) -> None:
        record(recipe, logs, event, **details)
        if event == "restart":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(local, "_record", record_and_be_signalled)
    assert local.run_workers(with_faults(recipe, restarts=2), processes=1) == 85
    assert capfd.readouterr().err.count("was killed by SIGKILL") == 2  # the error, and the reason of the restart


# Hangs


HANGING = """
    from gpt.heartbeat import answer_with_stacks
    answer_with_stacks(errors / f"rank_{rank}.stacks.txt")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    def waits_for_rank_1():
        time.sleep(60)
    waits_for_rank_1()
"""


def test_a_hang_before_the_ranks_have_met(
    recipe: Recipe, worker: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    worker(HANGING)
    monkeypatch.setattr(watch, "MEETING_SECONDS", 8.0)  # until then both have imported what they need to answer
    started = time.monotonic()
    assert local.run_workers(with_faults(recipe, hang_seconds=1, restarts=0), processes=2) == 86
    assert time.monotonic() - started < 40
    err = capfd.readouterr().err
    assert re.search(r"no progress for \d+ s: rank 1 on \S+ \(it no longer runs: its process is stopped\)\n$", err), err
    (logs,) = (recipe.run_directory() / "logs").iterdir()
    assert "waits_for_rank_1" in (logs / "rank_0.stacks.txt").read_text()
    assert not (logs / "rank_1.stacks.txt").exists(), "an empty file is no answer"
    assert worker_processes() == []


def test_the_launcher_does_not_wait_for_a_rank_that_cannot_be_killed(recipe: Recipe, worker: Any) -> None:
    worker(HANGING)
    recipe = with_faults(recipe, hang_seconds=0.5, restarts=2)
    code = (
        "import psutil; from gpt.recipe_file import parse_recipe; from launch import local, watch;"
        "local.WORKER_MODULE = 'stand_in_worker'; watch.MEETING_SECONDS = 8.0; watch.KILL_SECONDS = 1.0;"
        "psutil.Process.kill = lambda self: None;"
        f"local.run_workers(parse_recipe({recipe.model_dump(mode='json')!r}, 'test'), processes=2)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 86, done.stderr
    assert done.stderr.endswith("its process is stopped); it cannot be killed\n")


def test_workers_end_with_a_launcher_that_is_killed(worker: Any, recipe: Recipe, tmp_path: Path) -> None:
    worker(f"""
        (pathlib.Path({str(tmp_path)!r}) / f"ready_{{rank}}").write_text(str(os.getpid()))
        time.sleep(60)
    """)
    code = (
        "import sys; from gpt.recipe_file import parse_recipe; from launch import local;"
        "local.WORKER_MODULE = 'stand_in_worker';"
        f"local.run_workers(parse_recipe({recipe.model_dump(mode='json')!r}, 'test'), processes=2)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code])
    while len(list(tmp_path.glob("ready_*"))) < 2:
        assert launcher.poll() is None
        time.sleep(0.05)
    pids = [int(file.read_text()) for file in tmp_path.glob("ready_*")]
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers live on without their launcher"
        time.sleep(0.05)


def test_a_damaged_claim_does_not_replace_the_exit_code(recipe: Recipe, worker: Any) -> None:
    worker("""
        (errors.parent.parent / "generations").mkdir()
        (errors.parent.parent / "generations" / "000001.json").write_text("{")
        sys.exit(3)
    """)
    assert local.run_workers(recipe, processes=1) == 1
    [outcome] = recipe.run_directory().glob("logs/*/outcome.json")
    assert json.loads(outcome.read_text())["rank_exit_code"] == 3


def test_a_build_lock_of_a_killed_run_is_removed_and_the_users_settings_are_shown(
    recipe: Recipe, worker: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    worker("print(os.environ['TORCH_EXTENSIONS_DIR'])")
    assert local.run_workers(recipe, processes=1) == 0
    lock = Path(capfd.readouterr().out.splitlines()[-1]) / "some_op" / "lock"  # behind a line on the user's settings
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    assert local.run_workers(recipe, processes=1) == 0
    out, err = capfd.readouterr()
    assert f"removed the build lock {lock}" in err
    assert out.startswith("environment: your own settings stay: OMP_NUM_THREADS=77 (Trainyard's: ")
    assert not lock.exists()
    monkeypatch.setenv("SLURM_NODEID", "1")
    assert local.run_workers(recipe, processes=1) == 0
    assert "own settings" not in capfd.readouterr().out, "the first node of the job has said it"


LAUNCHER = """
import sys
from gpt.recipe_file import parse_recipe
from launch import local
import json
local.WORKER_MODULE = "stand_in_worker"
recipe = parse_recipe(json.loads(sys.argv[1]), "test")
sys.exit(local.run_workers(recipe, processes=2, nodes=2, node_rank=int(sys.argv[2]), rendezvous=sys.argv[3]))
"""


def test_two_hosts_number_their_ranks_by_node_rank(recipe: Recipe, worker: Any, tmp_path: Path) -> None:
    worker("print(os.environ['GROUP_RANK'], rank, os.environ['WORLD_SIZE'], os.environ['MASTER_PORT'])")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", LAUNCHER, recipe.model_dump_json()]
    hosts = []
    for node_rank in (1, 0):  # the second host is there first
        hosts.append(
            subprocess.Popen([*command, str(node_rank), f"127.0.0.1:{port}"], stdout=subprocess.PIPE, text=True)
        )
        time.sleep(0.2)
    (second, _), (first, _) = (host.communicate(timeout=60) for host in hosts)
    assert [host.returncode for host in hosts] == [0, 0]
    assert sorted(first.splitlines()) == [f"0 0 4 {port}", f"0 1 4 {port}"]
    assert sorted(second.splitlines()) == [f"1 2 4 {port}", f"1 3 4 {port}"]


def test_hosts_that_do_not_meet(recipe: Recipe, worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    worker("")
    monkeypatch.setattr(local, "MEETING_TIMEOUT_SECONDS", 1)
    with socket.socket() as other_program:
        other_program.bind(("127.0.0.1", 0))
        other_program.listen()
        endpoint = f"127.0.0.1:{other_program.getsockname()[1]}"
        with pytest.raises(OSError, match=rf"2 hosts of the run did not meet at {endpoint}.*within 1 s"):
            local.run_workers(recipe, processes=1, nodes=2, node_rank=0, rendezvous=endpoint)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"processes": 0}, "--processes and --nodes are at least 1; given: 0 and 1"),
        (
            {"processes": 1, "nodes": 2, "node_rank": 2, "rendezvous": "a:1"},
            "--node-rank is 2, but 2 node.s. have ranks 0 to 1",
        ),
        ({"processes": 1, "nodes": 2}, "2 nodes need --rendezvous HOST:PORT"),
        ({"processes": 1, "nodes": 2, "rendezvous": "host"}, "'host', not HOST:PORT"),
        ({"processes": 1, "nodes": 2, "rendezvous": "host:99999"}, "port from 1 to 65535"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_before_anything_is_written(
    recipe: Recipe, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        local.run_workers(recipe, **arguments)
    assert not recipe.run_directory().exists()


@pytest.mark.parametrize(("devices", "cores", "processes"), [(8, 64, 8), (0, 64, 2), (0, 1, 1)])
def test_default_processes(monkeypatch: pytest.MonkeyPatch, devices: int, cores: int, processes: int) -> None:
    monkeypatch.setattr("launch.environment.cuda_devices", lambda: devices)
    monkeypatch.setattr("launch.environment.usable_cores", lambda: cores)
    number, reason = local.default_processes()
    assert number == processes
    assert str(devices or cores) in reason
