"""The cluster of one machine: it comes up again after kills, leaves nothing behind, and keeps away from others."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from slurm_runs import MINI_CLUSTER, command


def mini_cluster(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([MINI_CLUSTER, *arguments], capture_output=True, text=True, timeout=60)


def processes_of(conf: str) -> list[psutil.Process]:
    """Daemons and jobs of a cluster."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SLURM_CONF") == conf and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return [process for process in found if process.pid != os.getpid()]


@pytest.fixture
def second(cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of another cluster, of which nothing is left afterwards, also where the test fails."""
    monkeypatch.setenv("TRAINYARD_MINI_CLUSTER", str(tmp_path / "c"))
    yield tmp_path / "c"
    assert mini_cluster("down").returncode == 0


def test_it_comes_up_after_kills_and_leaves_nothing(
    cluster: Path, second: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, conf = cluster / "slurm.conf", second / "slurm.conf"
    refused = mini_cluster("up")
    assert refused.returncode == 1 and f"SLURM_CONF names another cluster ({other})" in refused.stderr
    monkeypatch.delenv("SLURM_CONF")
    for _ in range(2):
        up = mini_cluster("up")
        assert (up.returncode, up.stdout) == (0, f"export SLURM_CONF={conf}\n"), up.stderr
    monkeypatch.setenv("SLURM_CONF", str(conf))
    assert len(command("sinfo", "--noheader", "--Node", "--partition=train").splitlines()) == 2
    command("sbatch", "--nodes=2", "--output=none", "--wrap=srun sleep 1000")
    deadline = time.monotonic() + 20
    while sum(process.name() == "sleep" for process in processes_of(str(conf))) < 2:
        assert time.monotonic() < deadline, "the job did not start"
        time.sleep(0.1)
    for daemon in ("munge", "slurmctld", "n1"):
        os.kill(int((conf.parent / f"{daemon}.pid").read_text()), signal.SIGKILL)
    assert mini_cluster("up").returncode == 0
    assert len(command("squeue", "--noheader").splitlines()) == 1, "it still knows its job"
    for file in conf.parent.glob("*.pid"):
        os.kill(int(file.read_text()), signal.SIGKILL)
    assert mini_cluster("down").returncode == 0
    assert processes_of(str(conf)) == [] and not conf.parent.exists()
    monkeypatch.setenv("SLURM_CONF", str(other))
    assert command("sinfo", "--noheader").count("train") > 0, "the other cluster stays"


def test_down_finds_daemons_whose_folder_was_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINYARD_MINI_CLUSTER", str(tmp_path / "deleted"))
    (tmp_path / "slurmd").symlink_to(sys.executable)  # by whose name the process goes
    variables = os.environ | {"SLURM_CONF": str(tmp_path / "deleted" / "slurm.conf")}
    daemon = subprocess.Popen([tmp_path / "slurmd", "-c", "import time; time.sleep(60)"], env=variables)
    assert mini_cluster("down").returncode == 0
    assert daemon.wait(timeout=10) == -signal.SIGKILL


def test_what_is_no_cluster_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINYARD_MINI_CLUSTER", str(tmp_path))
    (tmp_path / "thesis.txt").touch()
    down = mini_cluster("down")
    assert down.returncode == 1 and "nothing was removed" in down.stderr
    assert (tmp_path / "thesis.txt").exists()
    assert mini_cluster("up", "--nodes", "0").returncode == 1
    assert mini_cluster("sideways").returncode == 2
