"""`trainyard submit`: what the scripts hold, what is refused before Slurm hears of it, what is handed over."""

import functools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import golden_scripts
import pytest
import yaml
from huggingface_hub import snapshot_download as REAL_DOWNLOAD
from recipe_samples import PreparedData, recipe_content
from typer.testing import CliRunner

from gpt.recipe_file import PROJECT_ROOT, load_recipe
from launch import cli, hub, slurm, submit
from launch.preflight import run_preflight
from launch.slurm import Lead, Request, Task
from launch.submitted import read_sweep, submitted_jobs

NASTY = """it's "a" $(touch PWNED) `touch PWNED`; touch PWNED & #é %j \\ *"""
LOGIN_NODE = {
    "sbatch": """#!/bin/bash
printf '%s\\n' "$*" "${SBATCH_TIMELIMIT-}${SBATCH_ARRAY_INX-}${SBATCH_WAIT-}" "${SBATCH_ACCOUNT-}" >> "$0.calls"
n=$(($(cat "$0.number" 2>/dev/null || echo 41) + 1))
[ "$n" = "$(cat "$0.refuses" 2>/dev/null)" ] && { echo "sbatch: error: Batch job submission failed:" >&2
  echo "Invalid account or account/partition combination specified" >&2; exit 1; }
echo "$n" > "$0.number"; echo "$n;cluster"
""",
    "squeue": """#!/bin/bash
for argument; do case "$argument" in --jobs=*) grep "^${argument#--jobs=} " "$0.jobs" | cut -d' ' -f2 ;; esac; done
""",
    "scontrol": """#!/bin/bash
common="PriorityJobFactor=1 DefaultTime=NONE MaxTime=1-00:00:00 PreemptMode=REQUEUE"
echo "PartitionName=low Default=YES PriorityTier=1 GraceTime=0 $common"
echo "PartitionName=high Default=NO PriorityTier=2 GraceTime=0 $common"
""",
}


@pytest.fixture
def login_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of stand-ins for Slurm's programs, first in PATH; sbatch.calls has what sbatch was called with."""
    folder = tmp_path / "slurm programs"
    folder.mkdir()
    for name, text in LOGIN_NODE.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "squeue.jobs").touch()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith(("SBATCH_", "SLURM_"))]:
        monkeypatch.delenv(name)
    return folder


@pytest.fixture
def recipe(prepared_data: PreparedData, tmp_path: Path) -> Path:
    """A recipe file whose runs are in `tmp_path / "runs"`."""
    shutil.copyfile(PROJECT_ROOT / "ds_configs" / "zero3.json", tmp_path / "zero3.json")
    content = recipe_content(
        {
            "tokenizer": str(prepared_data.text / "tokenizer"),
            "data.train": [{"path": str(prepared_data.text / "train")}],
            "data.validation": str(prepared_data.text / "validation"),
            "runs_directory": str(tmp_path / "runs"),
            "deepspeed": str(tmp_path / "zero3.json"),
        }
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def request(**changes: Any) -> Request:
    return Request(**({"nodes": 2, "processes_per_node": 2, "time": "1:00:00"} | changes))


def submitted(recipe: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    asked = options.pop("request", request())
    return submit.submit(str(recipe), overrides, asked, **({"write_bandwidth": "500MB/s"} | options))


def refusal(recipe: Path, *overrides: str, **options: Any) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        submitted(recipe, *overrides, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def calls(login_node: Path) -> list[str]:
    file = login_node / "sbatch.calls"
    return file.read_text().splitlines()[::3] if file.exists() else []


# the scripts


@pytest.mark.parametrize("name", sorted(golden_scripts.scripts()))
def test_scripts_are_the_golden_ones(name: str) -> None:
    golden = (golden_scripts.GOLDEN / f"{name}.sbatch").read_text("utf-8")
    assert golden_scripts.head(golden_scripts.scripts()[name]) == golden, (
        "if it is meant: python tests/unit/golden_scripts.py --write, and read the difference"
    )


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="shellcheck is not installed (Debian's package of that name)"
)
@pytest.mark.parametrize("name", sorted(golden_scripts.scripts()))
def test_shellcheck_finds_nothing(name: str) -> None:
    done = subprocess.run(
        ["shellcheck", "--shell=bash", "-"], input=golden_scripts.scripts()[name], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


def nasty_script(tmp_path: Path) -> tuple[str, Task]:
    run = tmp_path / NASTY.replace("\\", "") / "small"
    task = Task(run, run / "jobs" / "0001" / "recipe.yaml")
    asked = request(partition=NASTY, account=NASTY, qos=NASTY, constraint=NASTY, reservation=NASTY, modules=[NASTY])
    script = slurm.render(
        "train.sbatch.j2",
        asked,
        [task],
        title="run small",
        job_name=NASTY,
        output=slurm.literal(run / "logs"),
        lead_seconds=180,
        requeue=True,
    )
    return script, task


def test_no_value_does_any_harm_in_the_shell(recipe: Path, tmp_path: Path) -> None:
    script, task = nasty_script(tmp_path)
    task.recipe.parent.mkdir(parents=True)
    shutil.copyfile(recipe, task.recipe)
    programs = tmp_path / "programs"
    programs.mkdir()
    stand_in = '#!/bin/bash\nprintf "%s" "${0##*/}"; printf "|%s" "$@"; echo\n'
    for name in ("srun", "scontrol"):
        (programs / name).write_text(stand_in)
        (programs / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_NNODES": "2",
        "PATH": f"{programs}:{os.environ['PATH']}",
    }
    start = f"module() {{ printf 'module|%s|%s\\n' \"$@\"; }}\n{script}"
    done = subprocess.run(
        ["bash", "-c", start], cwd=tmp_path, env=os.environ | job, capture_output=True, text=True, timeout=60
    )
    assert f"module|load|{NASTY}\n" in done.stdout
    assert f"|train|{task.recipe}|--processes|2|--nodes|2|--rendezvous|" in done.stdout, done.stderr
    assert list(tmp_path.rglob("PWNED")) == []


def test_no_value_ends_its_sbatch_line_or_begins_a_comment(tmp_path: Path) -> None:
    script, _ = nasty_script(tmp_path)
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    values = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines)
    for name in ("partition", "account", "qos", "constraint", "reservation", "job-name"):
        inside = values[name].removeprefix('"').removesuffix('"')
        assert len(inside) == len(values[name]) - 2
        assert re.sub(r"\\(.)", r"\1", inside) == NASTY
        assert not re.search(r'["#\\]', re.sub(r"\\.", "", inside))  # none without its backslash
    assert "%%j" in values["output"]


@pytest.mark.parametrize("name", ["partition", "account", "qos", "constraint", "reservation", "container", "modules"])
@pytest.mark.parametrize("value", ["a\nb", "a\r#SBATCH --x", "", " ", "a\x85b", "a\u2028b"])
def test_line_breaks_and_nothing_are_refused(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"--{name.rstrip('s') if name == 'modules' else name} is "):
        request(**{name: [value] if name == "modules" else value}).check()


def test_a_run_directory_that_no_script_can_name_is_refused(recipe: Path, tmp_path: Path) -> None:
    for folder, words in (("a\\nb", "holds line breaks"), ("a\\\\b", "because of its backslash")):
        message = refusal(recipe, f'runs_directory="{tmp_path}/{folder}"', dry_run=True)
        assert words in message
    asked = request(container="nvcr.io#nvidia/pytorch:25.06-py3")
    assert "comma or colon" in refusal(recipe, f"runs_directory={tmp_path}/a:b", dry_run=True, request=asked)


# what is asked for


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("12:30:15", 45015),
        ("2-12", 216000),
        ("2-12:30", 217800),
        ("2-12:30:15", 217815),
        ("UNLIMITED", None),
        ("0", None),
        ("0:00", None),
        ("00:00:00", None),
        ("0-0", None),
    ],
)
def test_times(text: str, seconds: int | None) -> None:
    assert slurm.time_limit_seconds(text) == seconds


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"time": "1h"}, "--time is '1h', which is no time as Slurm writes it"),
        ({"time": "1:2:3:4"}, "no time as Slurm writes it"),
        ({"memory": "64GB"}, "--memory is '64GB', which is no size"),
        ({"memory": "lots"}, "no size as Slurm writes it"),
        ({"nodes": 0}, "--nodes is 0, but it is at least 1"),
        ({"processes_per_node": 0}, "--processes-per-node is 0"),
        ({"gpus_per_node": 1}, "needs a GPU for each process, but --gpus-per-node is 1"),
        ({"cpus_per_process": -1}, "--cpus-per-process is -1"),
        ({"container": "/absent/image.sif"}, "there is no such Apptainer image"),
    ],
)
def test_a_request_that_no_cluster_can_hold_is_refused(changes: dict[str, Any], words: str, recipe: Path) -> None:
    assert words in refusal(recipe, request=request(**changes), dry_run=True)


@pytest.mark.parametrize(
    ("text", "expected"), [("500MB/s", 5e8), ("2.5 GB", 2.5e9), ("1GiB/s", 2**30), ("1000000", 1e6), ("3k", 3000)]
)
def test_bandwidths(text: str, expected: float) -> None:
    assert slurm.parse_bandwidth(text) == expected


@pytest.mark.parametrize("text", ["fast", "0", "-5MB", "5PB", ""])
def test_what_is_no_bandwidth_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no bandwidth"):
        slurm.parse_bandwidth(text)


def test_the_bandwidth_is_measured_and_leaves_nothing(tmp_path: Path) -> None:
    measured = slurm.measure_bandwidth(tmp_path)
    assert 1e5 < measured < 1e12
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_refused(recipe: Path) -> None:
    message = refusal(recipe, "runs_directory=/proc/runs", write_bandwidth=None, dry_run=True)
    assert message.startswith("/proc takes no 67,108,864 bytes (")


def test_the_lead_is_three_saves_or_180_seconds() -> None:
    assert Lead(1000, 1e9, "as stated").seconds == 180
    large = Lead(84 * 10**9, 1e9, "as stated")
    assert large.seconds == 252
    assert large.describe() == (
        "warning signal 252 s before the time limit = max(180 s, 3 x 84,000,000,000 bytes of a checkpoint / 1,000 MB/s "
        "as stated = 252.0 s)"
    )
    assert large.check(252 + 300) == large.check(None) == []
    [warning] = large.check(253)
    assert warning.startswith("each start has 1 s until that signal")
    with pytest.raises(ValueError, match="but the time limit is 252 s"):
        large.check(252)
    with pytest.raises(ValueError, match="without a time limit and sbatch's --signal takes at most 65535 s"):
        Lead(10**13, 1e8, "as stated").check(None)


def test_the_planned_save_is_that_of_the_model(recipe: Path, login_node: Path) -> None:
    from gpt.model import elements_of
    from gpt.train import plan_run

    elements = elements_of(plan_run(load_recipe(recipe), 4).config)
    signal = submitted(recipe, dry_run=True, write_bandwidth="1kB/s")["signal"]
    assert signal == {
        "lead_seconds": -(-3 * 12 * elements // 1000),
        "save_bytes": 12 * elements,
        "bytes_per_second": 1e3,
    }
    short = request(time="5")
    assert "the time limit is 300 s" in refusal(recipe, dry_run=True, write_bandwidth="1kB/s", request=short)
    without = request(time=None)  # the default partition's MaxTime: a day
    assert "the time limit is 86400 s" in refusal(recipe, dry_run=True, write_bandwidth="10B/s", request=without)


def test_a_grace_time_shorter_than_a_save_is_warned_about(recipe: Path, login_node: Path) -> None:
    [warning] = submitted(recipe, dry_run=True)["warnings"]
    assert warning.startswith("partition low gives a preempted job 0 s (GraceTime), but a save of ")
    assert submitted(recipe, dry_run=True, request=request(partition="high"))["warnings"] == []
    scontrol = login_node / "scontrol"
    scontrol.write_text(LOGIN_NODE["scontrol"].replace("GraceTime=0", "GraceTime=60"))
    assert submitted(recipe, dry_run=True)["warnings"] == []
    scontrol.write_text("#!/bin/bash\nexit 1\n")
    assert submitted(recipe, dry_run=True)["warnings"] == []


# the recipe is checked here


def test_what_training_would_refuse_is_refused_before_submission(recipe: Path, login_node: Path) -> None:
    assert "9 processes" in refusal(recipe, request=request(nodes=3, processes_per_node=3))  # 8 sequences in a batch
    assert "there is no tokenizer folder" in refusal(recipe, "tokenizer=/absent")
    assert "unknown key optimizer.learning_rat" in refusal(recipe, sweep=["optimizer.learning_rat=1,2"])
    assert "is not KEY=VALUE" in refusal(recipe, sweep=["optimizer.learning_rate=1e-4,,2"])
    assert "each key once" in refusal(recipe, sweep=["name=a,b"])
    assert "two runs the name small-seed-1" in refusal(recipe, sweep=["train.seed=1,1"])
    assert "--chain is 0" in refusal(recipe, chain=0)
    assert calls(login_node) == []
    assert not (recipe.parent / "runs").exists()


def finish(run: Path, step: int, **why: str) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "events.jsonl").write_text(
        json.dumps({"event": "start"}) + "\n" + json.dumps({"event": "end", "step": step} | why)
    )


def test_a_run_that_ended_early_is_finished_until_it_would_not_end_there(recipe: Path, login_node: Path) -> None:
    run = recipe.parent / "runs" / "small"
    finish(run, step=5, reason="the validation loss did not get better")
    (run / "recipe.yaml").write_text(yaml.safe_dump(load_recipe(recipe).model_dump()))
    assert f"run {run} is finished already, at step 5 of 10" in refusal(recipe)
    assert submitted(recipe, "evaluate.sample_tokens=5")["job_ids"] == ["42"]


@pytest.mark.parametrize(("keep_best", "expected"), [("1", "--best "), ("null", "")])
def test_an_export_behind_a_run_with_early_stopping_is_of_the_best(
    recipe: Path, login_node: Path, keep_best: str, expected: str
) -> None:
    early = ("evaluate.every_steps=5", "evaluate.early_stopping.patience_evaluations=2")
    submitted(recipe, *early, "checkpoint.every_steps=5", f"checkpoint.keep_best={keep_best}", then_export=True)
    script = recipe.parent / "runs" / "small" / "jobs" / "0001" / "export.sbatch"
    assert f'export "$run" {expected}--out "$run/export"' in script.read_text()


def test_a_finished_run_and_one_of_another_recipe_are_refused(recipe: Path, login_node: Path) -> None:
    run = recipe.parent / "runs" / "small"
    finish(run, step=10)
    assert f"run {run} is finished already, at step 10 of 10" in refusal(recipe)
    assert submitted(recipe, "train.steps=11")["job_ids"] == ["42"]
    (run / "recipe.yaml").write_text(yaml.safe_dump(load_recipe(recipe, ["train.seed=5"]).model_dump()))
    message = refusal(recipe, "train.steps=11")
    assert "belongs to another recipe: train.seed: 5 -> 0" in message


# handing over


def test_a_run_is_frozen_and_submitted(recipe: Path, login_node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_TIMELIMIT", "5")  # would win over the script's line
    monkeypatch.setenv("SBATCH_ARRAY_INX", "0-3")  # would start the run four times
    monkeypatch.setenv("SBATCH_WAIT", "1")
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")  # the script has none
    answer = submitted(recipe, "train.steps=12")
    run = recipe.parent / "runs" / "small"
    script = run / "jobs" / "0001" / "job.sbatch"
    assert (answer["job_ids"], answer["export_job_id"], answer["script"]) == (["42"], None, str(script))
    assert (login_node / "sbatch.calls").read_text().splitlines() == [f"--parsable {script}", "", "mine"]
    assert script.read_text() == answer["scripts"]["job.sbatch"]
    assert f"#SBATCH --output={run}/logs/slurm-%j.out\n#SBATCH --time=1:00:00\n" in script.read_text()
    assert (run / "logs").is_dir()  # Slurm makes no folders
    [job] = submitted_jobs(run)
    assert (job.job_ids, job.export_job_id) == (["42"], None)
    watch = submit.what_to_watch(answer)
    assert watch[:3] == ["submitted: job 42", f"run: {run}", f"output: {run}/logs/slurm-42.out"]
    for line in (f"  trainyard status {run} --watch", f"  trainyard why {run}", "  squeue --jobs=42"):
        assert line in watch

    before = load_recipe(script.parent / "recipe.yaml")
    assert before.train.steps == 12
    recipe.write_text(recipe.read_text().replace("steps: 10", "steps: 99"))
    (recipe.parent / "zero3.json").write_text("{}")
    after = load_recipe(script.parent / "recipe.yaml")
    assert after == before
    assert json.loads(Path(after.deepspeed).read_text())["zero_optimization"]["stage"] == 3
    assert str(script.parent / "recipe.yaml") in script.read_text()


def test_dry_run_prints_the_script_and_writes_nothing(recipe: Path) -> None:
    options = ["--nodes", "2", "--processes-per-node", "2", "--time", "1:00:00", "--dry-run"]
    result = CliRunner().invoke(cli.app, ["submit", str(recipe), *options])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("#!/usr/bin/env bash\n")
    assert "warning signal 180 s before the time limit" in result.stderr
    as_json = CliRunner().invoke(cli.app, ["submit", str(recipe), *options, "--json"])
    assert json.loads(as_json.stdout)["scripts"]["job.sbatch"] + "\n" == result.stdout
    assert not (recipe.parent / "runs").exists()


def test_a_chain_and_an_export_wait_for_what_is_before_them(recipe: Path, login_node: Path) -> None:
    answer = submitted(recipe, chain=3, then_export=True)
    folder = recipe.parent / "runs" / "small" / "jobs" / "0001"
    assert calls(login_node) == [
        f"--parsable {folder}/job.sbatch",
        f"--parsable --dependency=afterany:42 {folder}/job.sbatch",
        f"--parsable --dependency=afterany:43 {folder}/job.sbatch",
        f"--parsable --dependency=afterok:44 --kill-on-invalid-dep=yes {folder}/export.sbatch",
    ]
    assert (answer["job_ids"], answer["export_job_id"]) == (["42", "43", "44"], "45")
    assert "#SBATCH --no-requeue\n" in answer["scripts"]["job.sbatch"]
    assert '--out "$run/export"' in (folder / "export.sbatch").read_text()


def test_a_job_that_is_in_the_queue_is_not_joined_by_another(recipe: Path, login_node: Path) -> None:
    assert submitted(recipe)["job_ids"] == ["42"]
    (login_node / "squeue.jobs").write_text("42 PENDING\n")
    assert "is PENDING, and a run has one job at a time" in refusal(recipe)
    (login_node / "squeue.jobs").write_text("42 COMPLETED\n")
    assert submitted(recipe)["script"].endswith("jobs/0002/job.sbatch")
    assert [job.job_ids for job in submitted_jobs(recipe.parent / "runs" / "small")] == [["42"], ["43"]]


def test_a_refusal_of_sbatch_is_told_in_its_words(recipe: Path, login_node: Path) -> None:
    (login_node / "sbatch.refuses").write_text("42")
    message = refusal(recipe)
    assert message == (
        "sbatch refused the job: sbatch: error: Batch job submission failed: Invalid account or account/partition "
        "combination specified"
    )
    run = recipe.parent / "runs" / "small"
    assert list((run / "jobs").iterdir()) == []
    (login_node / "sbatch.refuses").write_text("43")
    assert "submitted before that: scancel 42 takes it back" in refusal(recipe, chain=2)
    assert [job.job_ids for job in submitted_jobs(run)] == [["42"]]


def test_without_sbatch_nothing_is_begun(recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert refusal(recipe).startswith("sbatch is not here: submit on a login node")
    assert not (recipe.parent / "runs").exists()


# sweeps


def test_a_sweep_is_an_array_of_runs(recipe: Path, login_node: Path) -> None:
    sweep = ["optimizer.learning_rate=1e-4,3e-4", "optimizer.betas=[0.9,0.95],[0.8,0.9]"]
    answer = submitted(recipe, sweep=sweep, then_export=True)
    runs = recipe.parent / "runs"
    names = [
        "small-learning_rate-1e-4-betas-_0.9_0.95_",
        "small-learning_rate-1e-4-betas-_0.8_0.9_",
        "small-learning_rate-3e-4-betas-_0.9_0.95_",
        "small-learning_rate-3e-4-betas-_0.8_0.9_",
    ]
    assert answer["runs"] == [str(runs / name) for name in names]
    home = runs / "small.sweep"
    folder = home / "jobs" / "0001"
    assert calls(login_node) == [
        f"--parsable {folder}/job.sbatch",
        f"--parsable --dependency=aftercorr:42 --kill-on-invalid-dep=yes {folder}/export.sbatch",
    ]
    script = (folder / "job.sbatch").read_text()
    assert "#SBATCH --array=0-3\n" in script
    assert f"#SBATCH --output={folder}/%a/slurm-%A_%a.out\n" in script
    for index, name in enumerate(names):
        frozen = load_recipe(runs / name / "jobs" / "0001" / "recipe.yaml")
        assert (frozen.name, frozen.optimizer.learning_rate) == (name, 1e-4 if index < 2 else 3e-4)
        assert (folder / str(index)).resolve() == runs / name / "logs"
        [job] = submitted_jobs(runs / name)
        assert (job.job_ids, job.export_job_id) == ([f"42_{index}"], f"43_{index}")
    assert answer["logs"][3] == f"{runs / names[3]}/logs/slurm-42_3.out"
    manifest = read_sweep(home)
    assert [(place, run.name) for place, run in manifest] == [(runs / name, name) for name in names]
    assert manifest[3][1].values == {"optimizer.learning_rate": "3e-4", "optimizer.betas": "[0.8,0.9]"}


def test_a_sweep_goes_on_with_the_runs_that_are_not_finished(recipe: Path, login_node: Path) -> None:
    runs = recipe.parent / "runs"
    submitted(recipe, sweep=["train.seed=1,2,3"])
    finish(runs / "small-seed-1", step=10)
    finish(runs / "small-seed-3", step=10)
    answer = submitted(recipe, sweep=["train.seed=1,2,3"])
    assert answer["runs"] == [str(runs / "small-seed-2")]
    assert [note.partition(",")[0] for note in answer["notes"][:2]] == [
        f"run {runs}/small-seed-{seed} is finished already" for seed in (1, 3)
    ]
    assert "--array" not in answer["scripts"]["job.sbatch"]
    assert submitted_jobs(runs / "small-seed-2")[-1].job_ids == ["43"]
    assert len(read_sweep(runs / "small.sweep")) == 3
    finish(runs / "small-seed-2", step=10)
    assert "all 3 runs of the sweep" in refusal(recipe, sweep=["train.seed=1,2,3"])


# the hub


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prepared_data: PreparedData) -> list[str]:
    """huggingface_hub's snapshot_download fills a cache as the real one does; the list has what was asked for."""
    import huggingface_hub
    from transformers import AutoConfig, AutoModelForCausalLM

    cache, asked = tmp_path / "hub", []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    config = AutoConfig.for_model(**recipe_content()["model"]["config"] | {"vocab_size": 300})

    def download(name: str, allow_patterns: list[str]) -> str:
        if name == "absent/name":
            raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nsecond line")
        asked.append(name)
        place = cache / f"models--{name.replace('/', '--')}"
        folder = place / "snapshots" / "0123abc"
        if "tokenizer" in name:
            shutil.copytree(prepared_data.text / "tokenizer", folder, dirs_exist_ok=True)
        elif "pickle" in name:
            folder.mkdir(parents=True)
        else:
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("0123abc")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_what_the_hub_has_is_fetched_here(
    recipe: Path, login_node: Path, fetched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpt.train import check

    recipe.write_text(
        yaml.safe_dump(
            yaml.safe_load(recipe.read_text())
            | {"model": {"pretrained": "hf://some/model"}, "tokenizer": "hf://some/tokenizer"}
        )
    )
    answer = submitted(recipe)
    assert fetched == ["some/model", "some/tokenizer"]
    frozen = load_recipe(Path(answer["script"]).parent / "recipe.yaml")
    assert frozen.model.pretrained == "some/model"  # found in the cache by its name
    assert frozen.tokenizer == str(tmp_path / "hub" / "models--some--tokenizer" / "snapshots" / "0123abc")
    assert "\nexport HF_HUB_OFFLINE=1" in answer["scripts"]["job.sbatch"]
    # and in the job the hub's own code finds it without a network
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", functools.partial(REAL_DOWNLOAD, cache_dir=tmp_path / "hub")
    )
    assert hub.fetch(frozen) == frozen
    assert check(frozen, 4).config.vocab_size == 300


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model": {"pretrained": "absent/name"}},
            "model.pretrained absent/name cannot be fetched from the hub: no conn",
        ),
        ({"model": {"pretrained": "some/pickle"}}, "has no safetensors weights"),
        ({"tokenizer": "hf://absent/name"}, "tokenizer absent/name cannot be fetched from the hub: no connection"),
        ({"tokenizer": "hf://name"}, "tokenizer 'name' is no name on the hub"),
    ],
)
def test_what_cannot_be_fetched_is_said_here(
    recipe: Path, login_node: Path, fetched: list[str], changes: dict[str, Any], words: str
) -> None:
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | changes))
    assert words in refusal(recipe)
    assert calls(login_node) == []


def test_preflight_fetches_what_train_would(recipe: Path, fetched: list[str]) -> None:
    changes = {"model": {"pretrained": "hf://some/model"}, "tokenizer": "hf://absent/name"}
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | changes))
    with pytest.raises(ValueError, match="tokenizer absent/name cannot be fetched from the hub: no connection"):
        run_preflight(load_recipe(str(recipe)), processes=1, nodes=1, node_rank=0, rendezvous=None)
    assert fetched == ["some/model"]
