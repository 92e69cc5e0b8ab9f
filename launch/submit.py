"""`trainyard submit`: what can be refused is refused here, then the recipe is frozen and Slurm takes the job."""

import itertools
import re
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.constants import HF_HUB_CACHE

from gpt.recipe import Recipe
from gpt.recipe_file import load_recipe
from gpt.run_directory import json_lines, stored_recipe
from launch import slurm
from launch.hub import fetch
from launch.slurm import Lead, Request, Task
from launch.submitted import (
    SubmittedJob,
    SweepRun,
    next_job_folder,
    submitted_jobs,
    sweep_folder,
    write_submitted,
    write_sweep,
)


@dataclass(frozen=True)
class Submission:
    """What one call submits: one run, or the runs of a sweep as one array job."""

    name: str
    recipes: list[Recipe]
    values: list[SweepRun]
    """The swept values of each recipe; empty where nothing is swept."""

    @property
    def home(self) -> Path:
        """The folder whose `jobs/` gets the script."""
        if not self.values:
            return self.recipes[0].run_directory()
        return sweep_folder(Path(self.recipes[0].runs_directory), self.name)


def submit(
    recipe_path: str,
    overrides: Sequence[str],
    request: Request,
    *,
    chain: int = 1,
    then_export: bool = False,
    sweep: Sequence[str] = (),
    write_bandwidth: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Check, freeze and submit a run or a sweep.

    Args:
        chain: so many jobs, each after the end of the one before it, and none requeues itself.
        then_export: also a job that exports the run once it has finished.
        sweep: `key=value,value,…` each; every combination is a run of its own.
        write_bandwidth: what a checkpoint is written with; None: it is measured.
        dry_run: only check and render; nothing is written but what the measurement deletes again.

    Returns:
        `home` (of the run or the sweep), `runs`, `scripts` (texts by file name), `script` (the file), `signal`,
        `notes`, `warnings`, and what Slurm gave: `job_ids`, `export_job_id`, `logs`.

    Raises:
        FileNotFoundError, ValueError: whatever does not fit, or sbatch's refusal, in one sentence.
    """
    request.check()
    if chain < 1:
        raise ValueError(f"--chain is {chain}, but it is at least 1")
    if not dry_run:
        slurm.require_sbatch()
    submission, save_bytes, notes = _checked(read_submission(recipe_path, overrides, sweep), request, then_export)
    lead = _lead(save_bytes, Path(submission.recipes[0].runs_directory), write_bandwidth)
    found = slurm.partitions()
    chosen = slurm.chosen_partitions(found, request.partition)
    default = slurm.default_limit_seconds(chosen)
    little = lead.check(default if request.time is None else slurm.time_limit_seconds(request.time))
    folder = next_job_folder(submission.home)
    tasks = _tasks(submission, folder)
    scripts = _render(submission, request, folder, tasks, lead, requeue=chain == 1)
    if not then_export:
        del scripts["export.sbatch"]
    answer = {
        "home": str(submission.home),
        "runs": [str(task.run) for task in tasks],
        "script": str(folder / "job.sbatch"),
        "scripts": scripts,
        "signal": {"lead_seconds": lead.seconds, "save_bytes": save_bytes, "bytes_per_second": lead.bytes_per_second},
        "notes": [*notes, lead.describe()],
        "warnings": [*little, *slurm.grace_warnings(found, chosen, lead)],
        "job_ids": [],
        "export_job_id": None,
        "logs": [],
    }
    if not dry_run:
        made = _freeze(submission, folder, tasks, scripts)
        answer |= _hand_over(submission, folder, tasks, made, chain, then_export)
    return answer


def what_to_watch(answer: dict[str, Any]) -> list[str]:
    """Lines for people about what was submitted: its numbers and where to look."""
    home, jobs = shlex.quote(answer["home"]), " ".join(answer["job_ids"])
    lines = [
        f"submitted: job {jobs}" + (f", then export: job {answer['export_job_id']}" if answer["export_job_id"] else "")
    ]
    lines += [f"run: {run}" for run in answer["runs"]]
    lines += [f"output: {log}" for log in answer["logs"]]
    first = Path(answer["runs"][0])
    boards = shlex.quote(str(first if len(answer["runs"]) == 1 else first.parent))
    ids = ",".join([*answer["job_ids"], *filter(None, [answer["export_job_id"]])])
    watch = [f"trainyard status {home} --watch", f"squeue --jobs={ids}", f"tensorboard --logdir {boards}"]
    whys = [f"trainyard why {shlex.quote(run)}" for run in answer["runs"]]
    return [
        *lines,
        f"job script: {answer['script']}",
        "watch it:",
        *(f"  {line}" for line in [*watch[:1], *whys, *watch[1:]]),
    ]


def read_submission(recipe_path: str, overrides: Sequence[str], sweep: Sequence[str]) -> Submission:
    """The recipe, or one for each combination of the swept values, under names made of them.

    Raises:
        ValueError: a recipe that is not valid, a sweep that is none, or two runs that would have one name.
    """
    base = load_recipe(recipe_path, overrides)
    if not sweep:
        return Submission(base.name, [base], [])
    choices = [_swept_values(text) for text in sweep]
    keys = [key for key, _ in choices]
    if len(set(keys)) < len(keys) or not {"name", "runs_directory"}.isdisjoint(keys):
        raise ValueError(f"--sweep of {', '.join(keys)}: each key once, and neither name nor runs_directory")
    recipes, runs = [], []
    for combination in itertools.product(*(values for _, values in choices)):
        values = dict(zip(keys, combination, strict=True))
        parts = [f"{key.rpartition('.')[2]}-{re.sub('[^A-Za-z0-9._-]+', '_', v)}" for key, v in values.items()]
        name = "-".join([base.name, *parts])
        changes = [f"{key}={value}" for key, value in values.items()]
        recipes.append(load_recipe(recipe_path, [*overrides, *changes, f"name={name}"]))
        runs.append(SweepRun(name, values))
    names = [run.name for run in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"--sweep gives two runs the name {twice[0]}: each value once, and no two keys alike at the end"
        )
    return Submission(base.name, recipes, runs)


def _swept_values(text: str) -> tuple[str, list[str]]:
    """("key", ["value", …]) of `key=value,value`; a comma in brackets or braces does not part values."""
    key, equals, values = text.partition("=")
    parts = [part.strip() for part in re.split(r",(?![^\[{]*[\]}])", values)]
    if not equals or not key or not all(parts):
        raise ValueError(f"--sweep {text!r} is not KEY=VALUE,VALUE,…, for example optimizer.learning_rate=1e-4,3e-4")
    return key, parts


def _checked(submission: Submission, request: Request, then_export: bool) -> tuple[Submission, int, list[str]]:
    """The submission with what is remote fetched and without a sweep's finished runs; the bytes of its largest save;
    notes on what was left out."""
    from gpt.checkpoint.retention import BYTES_PER_ELEMENT
    from gpt.lora import saved_elements
    from gpt.train import check

    recipes: list[Recipe] = []
    values, notes, save_bytes = [], [], 0
    for number, named in enumerate(submission.recipes):
        recipe = fetch(named)
        run = recipe.run_directory()
        plan = check(recipe, request.nodes * request.processes_per_node)
        steps = plan.schedule.total_steps
        end = [e for e in json_lines(run / "events.jsonl") if e["event"] == "end"][-1:]
        ended = max((e["step"] for e in end), default=-1)
        if ended >= steps or (any("reason" in e for e in end) and _same_evaluation(run, recipe)):
            finished = f"run {run} is finished already, at step {ended} of {steps}"
            if not submission.values:
                raise ValueError(f"{finished}: export it, make train longer, or choose another name")
            notes.append(f"{finished}, and left out")
            continue
        _refuse_while_queued(run)
        if then_export and (run / "export").exists():
            raise ValueError(f"--then export: {run / 'export'} exists already; move it away")
        recipes.append(recipe)
        values += submission.values[number : number + 1]
        save_bytes = max(save_bytes, BYTES_PER_ELEMENT * saved_elements(recipe, plan.config))
    if not recipes:
        raise ValueError(f"all {len(submission.recipes)} runs of the sweep {submission.home} are finished already")
    return Submission(submission.name, recipes, values), save_bytes, notes


def _refuse_while_queued(run: Path) -> None:
    """Raises ValueError while the last job of a run is in the queue: a run has one writer, and one of the two would
    fail."""
    last = [job.job_ids[-1] for job in submitted_jobs(run)][-1:]
    for job_id, state in slurm.queued(last).items():
        raise ValueError(
            f"job {job_id} of run {run} is {state}, and a run has one job at a time: wait for its end, or take it back "
            f"with scancel {job_id}"
        )


def _lead(save_bytes: int, runs_directory: Path, stated: str | None) -> Lead:
    """The lead of the warning signal, with the stated bandwidth or that of a short write where the runs will be."""
    if stated is not None:
        return Lead(save_bytes, slurm.parse_bandwidth(stated), "as stated")
    place = next(folder for folder in (runs_directory, *runs_directory.parents) if folder.is_dir())
    return Lead(save_bytes, slurm.measure_bandwidth(place), f"measured in {place} by one writer")


def _tasks(submission: Submission, folder: Path) -> list[Task]:
    """The runs as the script names them; where nothing is swept, script and recipe have one folder."""
    tasks = []
    for recipe in submission.recipes:
        run = recipe.run_directory()
        places = [recipe.tokenizer, *(source.path for source in recipe.data.train), recipe.data.validation]
        mounted = [Path(place) for place in (*places, recipe.model.pretrained, HF_HUB_CACHE) if place]
        home = next_job_folder(run) if submission.values else folder
        tasks.append(Task(run, home / "recipe.yaml", tuple(path for path in mounted if path.is_dir())))
    return tasks


def _same_evaluation(run: Path, recipe: Recipe) -> bool:
    """Whether a run that ended early would do so again."""
    stored = stored_recipe(run)
    return stored is not None and stored.evaluate == recipe.evaluate


def _render(
    submission: Submission, request: Request, folder: Path, tasks: list[Task], lead: Lead, *, requeue: bool
) -> dict[str, str]:
    """The job scripts by the names of their files. An array's output goes through `folder/INDEX`, a link to the logs of
    that task's run, because `--output` is one pattern for all tasks."""
    array = len(tasks) > 1
    logs = f"{slurm.literal(folder)}/%a" if array else slurm.literal(tasks[0].run / "logs")
    job = "%A_%a" if array else "%j"
    what = f"sweep {submission.name}, {len(tasks)} runs" if submission.values else f"run {submission.name}"
    return {
        "job.sbatch": slurm.render(
            "train.sbatch.j2",
            request,
            tasks,
            title=what,
            job_name=submission.name,
            output=f"{logs}/slurm-{job}.out",
            lead_seconds=lead.seconds,
            requeue=requeue,
        ),
        "export.sbatch": slurm.render(
            "export.sbatch.j2",
            replace(request, nodes=1),
            tasks,
            title=f"export of {what}",
            job_name=f"{submission.name}-export",
            output=f"{logs}/slurm-export-{job}.out",
            best=all(r.evaluate.early_stopping and r.checkpoint.keep_best for r in submission.recipes),
        ),
    }


def _freeze(submission: Submission, folder: Path, tasks: list[Task], scripts: dict[str, str]) -> list[Path]:
    """Write recipes and scripts where the job will find them; the folders that were made.

    A file that is edited afterwards, the recipe or its DeepSpeed file, changes nothing in the job.
    """
    made = list(dict.fromkeys([folder, *(task.recipe.parent for task in tasks)]))
    for place in made:
        try:
            place.mkdir(parents=True)
        except FileExistsError:
            raise ValueError(f"another submission took {place} at this moment: look at squeue, and try again") from None
    for index, (recipe, task) in enumerate(zip(submission.recipes, tasks, strict=True)):
        deepspeed = task.recipe.with_name("deepspeed.json")
        shutil.copyfile(recipe.deepspeed, deepspeed)
        frozen = recipe.model_dump() | {"deepspeed": str(deepspeed)}
        task.recipe.write_text(yaml.safe_dump(frozen, sort_keys=False, allow_unicode=True), encoding="utf-8")
        (task.run / "logs").mkdir(exist_ok=True)
        if len(tasks) > 1:
            (folder / str(index)).symlink_to(task.run / "logs")
    for name, text in scripts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return made


def _hand_over(
    submission: Submission, folder: Path, tasks: list[Task], made: list[Path], chain: int, then_export: bool
) -> dict[str, Any]:
    """Give the scripts to sbatch, and note the jobs' numbers in the folders of the runs."""
    job_ids: list[str] = []
    export_id = None
    try:
        for _ in range(chain):
            after = [f"--dependency=afterany:{job_ids[-1]}"] if job_ids else []
            job_ids.append(slurm.sbatch(folder / "job.sbatch", *after))
        if then_export:
            # of an array, each task waits for its own run only
            kind = "aftercorr" if len(tasks) > 1 else "afterok"
            after = [f"--dependency={kind}:{job_ids[-1]}", "--kill-on-invalid-dep=yes"]
            export_id = slurm.sbatch(folder / "export.sbatch", *after)
    except (ValueError, OSError) as error:
        if not job_ids:
            for place in made:
                shutil.rmtree(place)
            raise
        raise ValueError(f"{error}; submitted before that: scancel {' '.join(job_ids)} takes it back") from error
    finally:
        for index, task in enumerate(tasks if job_ids else []):
            suffix = f"_{index}" if len(tasks) > 1 else ""
            own = SubmittedJob([i + suffix for i in job_ids], export_id and export_id + suffix, time.time())
            write_submitted(task.recipe.parent, own)
    if submission.values:
        write_sweep(submission.home, submission.values)
    suffixes = [f"_{index}" for index in range(len(tasks))] if len(tasks) > 1 else [""]
    logs = [str(t.run / "logs" / f"slurm-{job_ids[0]}{s}.out") for t, s in zip(tasks, suffixes, strict=True)]
    return {"job_ids": job_ids, "export_job_id": export_id, "logs": logs}
