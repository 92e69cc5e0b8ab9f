"""A real sbatch reads what `trainyard submit` renders: options, names that would do harm, dependencies, arrays."""

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpt.recipe_file import PROJECT_ROOT
from launch import slurm, submit
from launch.slurm import Request, Task
from launch.submitted import submitted_jobs

NASTY = """it's "a" $(touch PWNED) `touch PWNED`; touch PWNED & #é |<> *"""
PLAYS = PROJECT_ROOT / "data_pipeline" / "embedded" / "shakespeare" / "validation"


def render(request: Request, runs: Path, tasks: int = 1, job_name: str = "small", **more: Any) -> str:
    template = more.pop("template", "train.sbatch.j2")
    all_tasks = [Task(runs / f"run {i}", runs / f"run {i}" / "jobs" / "0001" / "recipe.yaml") for i in range(tasks)]
    output = f"{slurm.literal(all_tasks[0].run)}/slurm-%j.out"
    life = {"best": True} if template == "export.sbatch.j2" else {"lead_seconds": 180, "requeue": True}
    return slurm.render(template, request, all_tasks, title="test", job_name=job_name, output=output, **life | more)


def sbatch(script: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    file = folder / "job.sbatch"
    file.write_text(script)
    return subprocess.run(["sbatch", *options, str(file)], cwd=folder, capture_output=True, text=True, timeout=60)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "not within 30 s"
        time.sleep(0.1)


def show_job(job_id: str) -> str:
    done = subprocess.run(["scontrol", "show", "job", job_id], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


@pytest.fixture
def cancelled(cluster: Path) -> Iterator[None]:
    """Whatever the test has put into the queue is taken out again."""
    yield
    subprocess.run(["scancel", "--user", str(os.getuid())], check=True, timeout=60)


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({}, {}),
        ({"nodes": 3, "processes_per_node": 2, "time": "1-02:30:00", "memory": "500M"}, {}),
        ({"partition": "urgent", "constraint": "odd"}, {}),
        ({"partition": "train,urgent", "constraint": "cpu&even", "exclusive": True}, {}),
        ({"gpus_per_node": 2, "processes_per_node": 2, "cpus_per_process": 1}, {}),
        ({"extra_lines": ["#SBATCH --comment=mine", "export A=b"], "modules": ["cuda"]}, {}),
        ({}, {"tasks": 3}),
        ({}, {"requeue": False}),
        ({"gpus_per_node": 1}, {"template": "export.sbatch.j2"}),
        ({}, {"job_name": NASTY}),
    ],
)
def test_sbatch_accepts_what_the_cluster_can_hold(
    cluster: Path, tmp_path: Path, changes: dict[str, Any], more: dict[str, Any]
) -> None:
    request = Request(**{"nodes": 1, "processes_per_node": 1} | changes)
    request.check()
    done = sbatch(render(request, tmp_path, **more), tmp_path, "--test-only")
    assert done.returncode == 0, done.stderr
    assert re.search(r"Job \d+ to start at \S+ using \d+ processors on nodes? n", done.stderr), done.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"partition": NASTY}, f"invalid partition specified: {NASTY}"),
        ({"constraint": "absent"}, "Invalid feature specification"),
        ({"memory": "900T"}, "Memory required by task is not available|Requested node configuration is not available"),
    ],
)
def test_what_it_cannot_hold_is_refused_in_its_words(
    cluster: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    request = Request(**{"nodes": 1, "processes_per_node": 1} | changes)
    script = tmp_path / "job.sbatch"
    script.write_text(render(request, tmp_path))
    with pytest.raises(ValueError, match=r"^sbatch refused the job: sbatch: error: ") as caught:
        slurm.sbatch(script)
    assert words in str(caught.value) or re.search(words, str(caught.value)), caught.value


def test_slurm_reads_names_and_paths_as_they_are(cluster: Path, cancelled: None, tmp_path: Path) -> None:
    runs = tmp_path / f"{NASTY} %j %%"
    (runs / "run 0").mkdir(parents=True)
    script = render(Request(1, 1, extra_lines=["echo here; exit 0"]), runs, job_name=NASTY)
    job_id = sbatch(script, tmp_path, "--parsable", "--wait").stdout.strip()
    assert f"JobName={NASTY}\n" in show_job(job_id)
    assert (runs / "run 0" / f"slurm-{job_id}.out").read_text() == "here\n"
    assert list(tmp_path.rglob("PWNED")) == []


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from data_pipeline.prepare import PrepareOptions, prepare

    folder = tmp_path_factory.mktemp("data")
    plays = {"inputs": [str(PLAYS / "macbeth.txt")], "validation_inputs": [str(PLAYS / "twelfth-night.txt")]}
    prepare(PrepareOptions(output=folder / "data", train_vocabulary=300, **plays))  # type: ignore[arg-type]
    llama = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    content = {
        "name": "small",
        "runs_directory": str(folder / "runs"),
        "model": {"config": llama | {"num_attention_heads": 4, "max_position_embeddings": 64}},
        "tokenizer": str(folder / "data" / "tokenizer"),
        "data": {"train": [{"path": str(folder / "data" / "train")}], "sequence_length": 32},
        "train": {"global_batch_tokens": 256, "micro_batch_sequences": 2, "steps": 4},
        "optimizer": {"learning_rate": 3e-4},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


def held(recipe: Path, **options: Any) -> dict[str, Any]:
    request = Request(2, 1, time="30", extra_lines=["#SBATCH --hold"])
    return submit.submit(str(recipe), [], request, write_bandwidth="1GB/s", **options)


def test_a_chain_with_its_export_waits_in_the_queue(cluster: Path, cancelled: None, recipe: Path) -> None:
    answer = held(recipe, chain=2, then_export=True)
    [first, second], export = answer["job_ids"], answer["export_job_id"]
    assert f"Dependency=afterany:{first}" in show_job(second)
    assert f"Dependency=afterok:{second}" in show_job(export)
    assert "Requeue=0" in show_job(first)
    with pytest.raises(ValueError, match=f"job {second} of run .* is PENDING, and a run has one job at a time"):
        held(recipe)
    subprocess.run(["scancel", first, second, export], check=True, timeout=60)
    answer = held(recipe)  # again, once they have gone
    assert "Requeue=1" in show_job(answer["job_ids"][0])
    assert f"StdOut={answer['logs'][0]}\n" in show_job(answer["job_ids"][0])
    assert answer["warnings"] == []  # 30 s of GraceTime are enough for this model
    slow = submit.submit(str(recipe), ["name=slow"], Request(1, 1, time="60"), write_bandwidth="15kB/s", dry_run=True)
    [warning] = slow["warnings"]
    assert warning.startswith("partition train gives a preempted job 30 s (GraceTime)")


def test_a_sweep_is_an_array_whose_tasks_print_into_their_runs(cluster: Path, cancelled: None, recipe: Path) -> None:
    request = Request(1, 1, time="10", extra_lines=["echo here; exit 0"])
    answer = submit.submit(str(recipe), [], request, write_bandwidth="1GB/s", sweep=["train.seed=1,2"])
    for index, run in enumerate(answer["runs"]):
        [job] = submitted_jobs(Path(run))
        assert job.job_ids == [f"{answer['job_ids'][0]}_{index}"]
        log = Path(answer["logs"][index])
        wait_until(lambda log=log: log.is_file() and log.read_text() == "here\n")  # type: ignore[misc]
