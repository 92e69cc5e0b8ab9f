"""Runs of the real thing: `trainyard train` with real processes, on a tiny model and a small corpus."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from forked import Forked, fork_trainyard, rank_of

from gpt.metrics import fast_precision

PRECISION = fast_precision()
"""bf16, but where its steps are so slow that nothing comes when the tests expect it."""
PROJECT = Path(__file__).resolve().parents[2]
PLAYS = PROJECT / "data_pipeline" / "embedded" / "shakespeare"
CLI = (sys.executable, "-m", "launch.cli")
LLAMA = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
GPT2_WITH_DROPOUT = {"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128} | {
    f"{place}_pdrop": 0.1 for place in ("resid", "embd", "attn")
}


def trainyard(*arguments: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    run = run_forked if arguments[0] in ("train", "tune") else run_interpreter
    done = run(*arguments, cwd=cwd)
    assert not check or done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
    return done


def prepare_play(folder: Path) -> None:
    """`folder / "data"`: a part of a play for training and another for validation."""
    lines = (PLAYS / "train" / "hamlet.txt").read_text(encoding="utf-8")
    (folder / "train.txt").write_text(lines[:60_000], encoding="utf-8")
    (folder / "validation.txt").write_text(lines[60_000:70_000], encoding="utf-8")
    trainyard(
        *("prepare", "--input", "train.txt", "--validation-input", "validation.txt"),
        *("--train-tokenizer", "600", "--out", "data"),
        cwd=folder,
    )


def run_interpreter(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300, env=environment())


def run_forked(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = fork_trainyard([*arguments], cwd=cwd, output=output, errors=errors, env=environment())
        try:
            code = process.wait(timeout=300)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(arguments, code, output.read(), errors.read())


def environment() -> dict[str, str]:
    """Every process also takes a sitecustomize.py from the folder SITECUSTOMIZE, where a test has set it."""
    path = os.pathsep.join([str(PROJECT), *os.environ.get("SITECUSTOMIZE", "").split()])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Runs:
    """Training runs in one directory that share prepared data, each of one test file but `reference`."""

    folder: Path
    _files: dict[str, str] = field(default_factory=dict)

    def _note_user(self, name: str) -> None:
        """In another file's tests a run of this name would go on from what these left."""
        file = os.environ.get("PYTEST_CURRENT_TEST", "").partition("::")[0]
        first = self._files.setdefault(name, file)
        assert first == file or name == "reference", f"{first} has a run {name}, too: give this one another name"

    def write_recipe(self, name: str, **changes: Any) -> Path:
        """A recipe file; `changes` replace whole top-level sections."""
        self._note_user(name)
        recipe = {
            "name": name,
            "model": {"config": LLAMA},
            "tokenizer": "data/tokenizer",
            "data": {
                "train": [{"path": "data/train"}],
                "validation": "data/validation",
                "sequence_length": 64,
            },
            "train": {"global_batch_tokens": 512, "micro_batch_sequences": 2, "steps": 20, "seed": 3},
            "optimizer": {"learning_rate": 5e-3, "warmup_steps": 4},
            "precision": PRECISION,
            "compile": False,  # also in those that have many steps, to be stopped somewhere
            "checkpoint": {"every_steps": 10},
            "evaluate": {"every_steps": 5, "batches": 1, "sample_tokens": 4},
            "logging": {"console_every_steps": 1},
        } | changes
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return path

    def train(self, name: str, *arguments: str, processes: int = 2, check: bool = True, **changes: Any) -> Any:
        """Write the recipe and train it to its end."""
        recipe = self.write_recipe(name, **changes)
        return trainyard("train", str(recipe), "--processes", str(processes), *arguments, cwd=self.folder, check=check)

    def copy(self, name: str, new_name: str) -> None:
        """A run directory under another name: a run's name is free to change."""
        self._note_user(new_name)
        shutil.copytree(self.directory(name), self.directory(new_name))

    def directory(self, name: str) -> Path:
        return self.folder / "runs" / name

    def metrics(self, name: str) -> dict[int, dict[str, Any]]:
        """metrics.jsonl by step, each step exactly once."""
        lines = (self.directory(name) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        steps = [record["step"] for record in records]
        assert steps == list(range(1, len(steps) + 1)), f"steps of {name}: {steps}"
        return {record["step"]: record for record in records}

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = (self.directory(name) / "events.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def start(
        self,
        name: str,
        *arguments: str,
        processes: int = 2,
        log: str = "",
        prefix: Sequence[str] = (),
        interpreters: bool = False,
        **changes: Any,
    ) -> "Live":
        """Begin a run in its own process group; `log` names its output where a run is started more than once, `prefix`
        is a command that starts the one behind it, `interpreters` makes its ranks new interpreters, not forks."""
        recipe = self.write_recipe(name, **changes)
        log_file = self.folder / f"{name}{log}.log"
        words = ["train", str(recipe), "--processes", str(processes), *arguments]
        with log_file.open("w", encoding="utf-8") as output:
            process = (
                subprocess.Popen(
                    [*prefix, *CLI, *words],
                    cwd=self.folder,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment(),
                    start_new_session=True,
                )
                if prefix
                else fork_trainyard(
                    words,
                    cwd=self.folder,
                    output=output,
                    errors=output,
                    env=environment(),
                    interpreters=interpreters,
                )
            )
        return Live(process, self.directory(name), log_file)


@dataclass(frozen=True)
class Live:
    """A run that is under way."""

    process: subprocess.Popen[bytes] | Forked
    directory: Path
    log: Path

    def wait_until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"the run ended: {self.log.read_text()}"
            assert time.monotonic() < deadline, f"not reached in {seconds} s: {self.log.read_text()}"
            time.sleep(0.01)

    def last_step(self) -> int:
        """The newest whole line of metrics.jsonl."""
        file = self.directory / "metrics.jsonl"
        return file.read_text(encoding="utf-8").count("\n") if file.exists() else 0

    def has_checkpoint(self, step: int) -> bool:
        """Whether the checkpoint of `step` is committed, which comes some steps after it."""
        return (self.directory / "checkpoints" / f"step_{step:08d}" / "manifest.json").exists()

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes of the ranks, once the launcher has started them."""
        children = psutil.Process(self.process.pid).children()
        return {rank_of(child): child for child in children}

    def kill(self) -> None:
        """SIGKILL to the launcher and all workers at once, as a lost node looks."""
        # workers are in sessions of their own: find them by their parent before it dies
        workers = psutil.Process(self.process.pid).children()
        for pid in [self.process.pid, *(worker.pid for worker in workers)]:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        while any(_lives(worker) for worker in workers):  # one that is still ending looks alive to `status`
            time.sleep(0.01)


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def comparable(records: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """What must be equal between a run and the same run killed and resumed."""
    return {
        step: {k: v for k, v in record.items() if k.startswith(("train/", "evaluate/")) or k == "sample_digest"}
        for step, record in records.items()
    }
