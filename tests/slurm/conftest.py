"""A real Slurm for the tests: slurm/mini_cluster.sh, in a folder of its own. Skipped where Slurm is not installed."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "distributed"))

from live_runs import PLAYS, PROJECT, trainyard
from slurm_runs import SlurmRuns

MINI_CLUSTER = PROJECT / "slurm" / "mini_cluster.sh"
NODES = 6


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """SLURM_CONF of a running cluster, which is also set in the environment."""
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"no Slurm here: {', '.join(missing)} missing (Debian's slurm-wlm and munge)")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SLURM_CONF", raising=False)
        patch.setenv("TRAINYARD_MINI_CLUSTER", str(tmp_path_factory.mktemp("slurm") / "c"))
        up = subprocess.run(
            [MINI_CLUSTER, "up", "--nodes", str(NODES)], capture_output=True, text=True, timeout=60, check=False
        )
        if "belongs to a Slurm cluster" in up.stderr:
            pytest.skip(up.stderr.strip())
        assert up.returncode == 0, up.stderr
        conf = up.stdout.strip().removeprefix("export SLURM_CONF=")
        patch.setenv("SLURM_CONF", conf)
        try:
            yield conf
        finally:
            subprocess.run([MINI_CLUSTER, "down"], check=True, timeout=60)


@pytest.fixture(scope="session")
def runs(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> SlurmRuns:
    """Runs on the cluster, of one play that is prepared for training and a part of another for validation."""
    folder = tmp_path_factory.mktemp("slurm-runs")
    lines = (PLAYS / "train" / "hamlet.txt").read_text(encoding="utf-8")
    (folder / "train.txt").write_text(lines[:60_000], encoding="utf-8")
    (folder / "validation.txt").write_text(lines[60_000:70_000], encoding="utf-8")
    trainyard(
        *("prepare", "--input", "train.txt", "--validation-input", "validation.txt"),
        *("--train-tokenizer", "600", "--out", "data"),
        cwd=folder,
    )
    return SlurmRuns(folder)


@pytest.fixture(scope="session")
def reference(runs: SlurmRuns) -> SlurmRuns:
    """The uninterrupted run `reference` on two nodes of one process."""
    job = runs.submit("reference", "--nodes", "2", "--processes-per-node", "1")
    runs.wait_end("reference", job)
    return runs
