"""Preflight finds what is planted: another version, another recipe, an unwritable place, a full disk, a wrong
interface, a stale lock; everything at once, and a start says the same."""

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_runs import CLI, Runs, environment, trainyard

READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
"""Of a shell in a mount namespace of its own, to whose root everything is writable by permission."""


def another_torch(folder: Path, condition: str) -> str:
    """PYTHONPATH of processes that find another version of torch, where the condition holds."""
    code = f"import os\nif {condition}:\n    import torch\n    torch.__version__ = '2.0.0'\n"
    (folder / "sitecustomize.py").write_text(code, encoding="utf-8")
    return os.pathsep.join([str(folder), environment()["PYTHONPATH"]])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no right to mount a tmpfs: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_start_is_refused_for_all_reasons_together(
    runs: Runs, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 has another torch, no checkpoint has room, and a build was killed."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    lock = tmp_path / "extensions" / "some_op" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (1e9, 1e9))  # in a folder of the user's another host may build at this moment
    recipe = runs.write_recipe("refused", runs_directory=str(small_disk))
    variables = environment() | {"PYTHONPATH": another_torch(tmp_path, "os.environ.get('RANK') == '1'")}
    done = subprocess.run([*CLI, "train", str(recipe), "--processes", "2"], cwd=runs.folder, env=variables,
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"removed the build lock {lock}" in done.stderr
    host = socket.gethostname()
    assert done.stderr.count("trainyard: error: this run would not work, for 2 reasons:\n") == 1
    reasons = done.stderr.partition("for 2 reasons:\n")[2].splitlines()
    assert reasons[0].startswith(f"  versions: rank 1 on {host}: it has torch '2.0.0' and not ")
    assert reasons[1].startswith(f"  disk: {small_disk}/refused has 0.00 GiB free, but a checkpoint takes 0.00 GiB")
    assert len(reasons) == 2 and not (small_disk / "refused" / "generations").exists(), "it came to own the run"


def preflight_of(runs: Runs, recipe: Path, node: int, place: str, *arguments: str, prefix: Any = (), **variables: str):
    command = [*prefix, *CLI, "preflight", str(recipe), "--processes", "1", "--nodes", "2", "--node-rank", str(node)]
    return subprocess.Popen([*command, "--rendezvous", place, "--json", *arguments], cwd=runs.folder, text=True,
                            env=environment() | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


@pytest.mark.full
def test_faults_of_one_of_two_hosts(runs: Runs, tmp_path: Path) -> None:
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("no right to make a mount namespace")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{probe.getsockname()[1]}"
    (tmp_path / "runs").mkdir()
    recipe = runs.write_recipe("looked-at", runs_directory=str(tmp_path / "runs"))
    hosts = [
        preflight_of(runs, recipe, 0, place),
        preflight_of(runs, recipe, 1, place, "train.seed=4",
                     prefix=("unshare", "--mount", "sh", "-c", READ_ONLY, str(tmp_path / "runs")),
                     PYTHONPATH=another_torch(tmp_path, "True"), GLOO_SOCKET_IFNAME="eth9", TRAINYARD_HOST="second"),
    ]  # fmt: skip
    answers = [host.communicate(timeout=100) for host in hosts]
    assert [host.returncode for host in hosts] == [1, 1], answers
    for report in (json.loads(out) for out, _ in answers):
        failed = {item["name"]: item["message"] for item in report["items"] if item["state"] == "failed"}
        assert set(failed) == {"versions", "recipe", "network", "run directory"} and report["failed"] == 4
        assert all(message.startswith("rank 1 on second: ") for message in failed.values())
        assert "torch '2.0.0' and not" in failed["versions"]
        assert "train.seed 4 and not 3" in failed["recipe"]
        assert "GLOO_SOCKET_IFNAME is 'eth9', which is no network interface" in failed["network"]
        assert f"{tmp_path}/runs cannot be written to: Read-only file system" in failed["run directory"]
        [skipped] = [item for item in report["items"] if item["state"] == "skipped"]
        assert skipped["name"] == "all-reduce"
        assert any("2 ranks x" in line for line in report["plan"]), "the batch arithmetic"
        assert report["seconds"] < 60
    assert list((tmp_path / "runs").iterdir()) == [], "preflight left something behind"


@pytest.mark.full
def test_a_run_that_can_start(runs: Runs) -> None:
    recipe = runs.write_recipe("looked-at")
    done = trainyard("preflight", str(recipe), "--processes", "2", "--json", cwd=runs.folder)
    report = json.loads(done.stdout)
    states = {item["name"]: item["state"] for item in report["items"]}
    assert {name for name, state in states.items() if state == "passed"} >= {
        "ranks", "versions", "recipe", "data", "recipe and data", "network", "run directory", "clocks", "disk",
        "memory", "build locks", "all-reduce",
    }  # fmt: skip
    [speed] = [item["message"] for item in report["items"] if item["name"] == "all-reduce"]
    print(f"{report['seconds']:.1f} s, {speed}")
    assert speed.startswith("64 MiB right in ") and speed.endswith(" GB/s a rank")
    assert not runs.directory("looked-at").exists(), "preflight is no start"
