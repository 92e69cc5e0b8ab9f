"""A real Slurm for the tests: one mini cluster, shared by all of them, in a folder of its own."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "distributed"))

from live_runs import prepare_play
from slurm_runs import MINI_CLUSTER, NODES, SlurmRuns


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a running mini cluster; SLURM_CONF is set for every program that a test starts."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [program for program in ("munged", "slurmctld", "slurmd") if shutil.which(program, path=path) is None]
    if missing:
        pytest.skip(f"there is no Slurm here ({', '.join(missing)} missing): apt-get install slurm-wlm munge")
    folder = tmp_path_factory.mktemp("cluster")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
            patch.delenv(name)
        patch.setenv("TRAINYARD_MINI_CLUSTER", str(folder))
        up = subprocess.run([MINI_CLUSTER, "up", "--nodes", str(NODES)], capture_output=True, text=True, timeout=120)
        if "belongs to a Slurm cluster" in up.stderr:
            pytest.skip(up.stderr.strip())
        try:
            assert up.returncode == 0, up.stderr
            found = re.search(r"SLURM_CONF=(\S+)", up.stdout)
            assert found, up.stdout
            patch.setenv("SLURM_CONF", found.group(1))
            yield folder
        finally:
            subprocess.run([MINI_CLUSTER, "down"], check=True, timeout=60)


@pytest.fixture(scope="session")
def runs(cluster: Path, tmp_path_factory: pytest.TempPathFactory) -> SlurmRuns:
    """Runs on the cluster, of one play that is prepared for training and a part of another for validation."""
    folder = tmp_path_factory.mktemp("slurm-runs")
    prepare_play(folder)
    return SlurmRuns(folder)


@pytest.fixture(scope="session")
def reference(runs: SlurmRuns) -> SlurmRuns:
    """The uninterrupted run `reference` on two nodes of one process."""
    job = runs.submit("reference", "--nodes", "2", "--processes-per-node", "1")
    runs.wait_end("reference", job)
    return runs
