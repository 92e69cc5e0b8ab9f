"""What was submitted to Slurm: the job folders of a run, and the manifest of a sweep.

Imports nothing heavy, because `trainyard status` reads them.

`<run directory>/jobs/<number>/` holds `recipe.yaml`, `deepspeed.json`, `job.sbatch` and, once Slurm has taken the job,
`job.json`. A sweep's folder `<runs_directory>/<name>.sweep/` holds `sweep.json` and its own `jobs/`.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SWEEP_SUFFIX = ".sweep"
MANIFEST_NAME = "sweep.json"


@dataclass(frozen=True)
class SubmittedJob:
    """One call of `trainyard submit` for one run."""

    job_ids: list[str]
    """Slurm's job ids as squeue and scontrol take them (a task of an array is ARRAY_INDEX), the first one first."""
    export_job_id: str | None
    submitted: float
    """Seconds since 1970."""


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    name: str
    values: dict[str, str]
    """The swept keys of the recipe and this run's values, as they were written."""


def next_job_folder(place: Path) -> Path:
    """`jobs/<number>` below a run's or a sweep's folder, one above the highest number; nothing is made."""
    numbers = [int(folder.name) for folder in (place / "jobs").glob("*") if folder.name.isdigit()]
    return place / "jobs" / f"{max(numbers, default=0) + 1:04d}"


def write_submitted(job_folder: Path, job: SubmittedJob) -> None:
    """Note in a job folder that Slurm has taken the job."""
    _replace(job_folder / "job.json", asdict(job))


def submitted_jobs(run: Path) -> list[SubmittedJob]:
    """What was submitted for a run, oldest first. A file that is not whole counts for nothing."""
    found = []
    for file in sorted((run / "jobs").glob("[0-9]*/job.json")):
        try:
            found.append(SubmittedJob(**json.loads(file.read_text(encoding="utf-8"))))
        except (ValueError, TypeError, OSError):
            continue
    return found


def sweep_folder(runs_directory: Path, name: str) -> Path:
    """Where the sweep over the recipe `name` is kept."""
    return runs_directory / (name + SWEEP_SUFFIX)


def is_sweep(folder: Path) -> bool:
    """Whether a folder is a sweep's."""
    return (folder / MANIFEST_NAME).is_file()


def read_sweep(folder: Path) -> list[tuple[Path, SweepRun]]:
    """(run directory, run) of a sweep, in the order in which they were first submitted.

    Raises:
        ValueError: the manifest is damaged.
    """
    file = folder / MANIFEST_NAME
    try:
        runs = [SweepRun(**run) for run in json.loads(file.read_text(encoding="utf-8"))["runs"]]
        return [(folder.parent / run.name, run) for run in runs]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is no manifest of a sweep ({error}): submit the sweep again") from error


def write_sweep(folder: Path, runs: list[SweepRun]) -> None:
    """Note the runs of a sweep; those that are in its manifest already stay."""
    known = [run for _, run in read_sweep(folder)] if is_sweep(folder) else []
    names = {run.name for run in runs}
    folder.mkdir(parents=True, exist_ok=True)
    merged = [run for run in known if run.name not in names] + runs
    _replace(folder / MANIFEST_NAME, {"runs": [asdict(run) for run in merged]})


def _replace(file: Path, content: dict[str, Any]) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2), encoding="utf-8")
    temporary.replace(file)
