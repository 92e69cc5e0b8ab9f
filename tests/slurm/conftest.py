"""A real Slurm for the tests: one mini cluster of three nodes, shared by all of them, in a folder of its own."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

MINI_CLUSTER = Path(__file__).resolve().parents[2] / "slurm" / "mini_cluster.sh"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a running mini cluster; SLURM_CONF is set for every program that a test starts."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [program for program in ("munged", "slurmctld", "slurmd") if shutil.which(program, path=path) is None]
    if missing:
        pytest.skip(f"there is no Slurm here ({', '.join(missing)} missing): apt-get install slurm-wlm munge")
    folder = tmp_path_factory.mktemp("cluster")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
    environment["TRAINYARD_MINI_CLUSTER"] = str(folder)
    up = subprocess.run(
        ["bash", str(MINI_CLUSTER), "up", "--nodes", "3"], env=environment, capture_output=True, text=True, timeout=120
    )
    try:
        assert up.returncode == 0, up.stderr
        found = re.search(r"SLURM_CONF=(\S+)", up.stdout)
        assert found, up.stdout
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", found.group(1))
            yield folder
    finally:
        subprocess.run(["bash", str(MINI_CLUSTER), "down"], env=environment, check=True, timeout=60)
