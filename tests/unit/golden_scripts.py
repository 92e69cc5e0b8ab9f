"""The job scripts that tests/unit/golden holds. `python tests/unit/golden_scripts.py --write` writes them anew."""

import sys
from pathlib import Path
from unittest import mock

from launch import slurm
from launch.slurm import Request, Task

GOLDEN = Path(__file__).parent / "golden"
ONE = [Task(Path("/runs/small"), Path("/runs/small/jobs/0001/recipe.yaml"), (Path("/data/web/tokenizer"),))]
TWO = [*ONE, Task(Path("/runs/other"), Path("/runs/other/jobs/0002/recipe.yaml"), (Path("/data/web/tokenizer"),))]
EVERYTHING = Request(
    nodes=8,
    processes_per_node=4,
    gpus_per_node=4,
    cpus_per_process=12,
    partition="gpu,preempt",
    account="proj-1",
    qos="long",
    time="1-12:00:00",
    memory="500G",
    constraint="a100&nvlink",
    exclusive=True,
    reservation="maint week",
    modules=["gcc/13.2", "cuda/12.8"],
    extra_lines=["export NCCL_DEBUG=INFO", "#SBATCH --mail-type=END"],
)


def scripts() -> dict[str, str]:
    """Every script by its name, of a checkout in /checkout: a real one's place would decide the order of mounts."""
    small, pyxis = Request(nodes=1, processes_per_node=2), "nvcr.io#nvidia/pytorch:25.06-py3"
    apptainer = {"nodes": 2, "processes_per_node": 4, "gpus_per_node": 4, "container": "/images/train yard.sif"}

    def train(request: Request, tasks: list[Task] = ONE, requeue: bool = True) -> str:
        return slurm.render(
            "train.sbatch.j2",
            request,
            tasks,
            title="run small",
            job_name="small",
            output="/runs/small/logs/slurm-%j.out",
            lead_seconds=180,
            requeue=requeue,
        )

    checkout = Path("/checkout")
    python = mock.patch.object(sys, "executable", str(checkout / ".venv/bin/python"))
    with python, mock.patch.object(slurm, "PROJECT_ROOT", checkout):
        return {
            "smallest": train(small),
            "everything": train(EVERYTHING),
            "apptainer": train(Request(**apptainer)),  # type: ignore[arg-type]
            "pyxis": train(Request(nodes=2, processes_per_node=4, gpus_per_node=4, container=pyxis)),
            "no_requeue": train(small, requeue=False),
            "array": train(small, TWO),
            "export": slurm.render(
                "export.sbatch.j2",
                small,
                ONE,
                title="export of run small",
                job_name="small-export",
                output="/runs/small/logs/slurm-export-%j.out",
                best=False,
            ),
        }


def head(script: str) -> str:
    """What `trainyard submit` decides: from the first line to the blank line behind the exported variables."""
    begin, middle, rest = script.partition("export HF_HUB_OFFLINE=1")
    assert middle
    return begin + middle + rest.partition("\n\n")[0] + "\n"


if __name__ == "__main__" and "--write" in sys.argv:
    GOLDEN.mkdir(exist_ok=True)
    for name, text in scripts().items():
        (GOLDEN / f"{name}.sbatch").write_text(head(text), encoding="utf-8")
