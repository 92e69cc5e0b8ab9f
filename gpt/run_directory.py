"""A run's directory: its places, its one writer, its recipe, its events.

One writer: each start claims the next generation number by linking a file that must not exist yet, which is atomic on
NFS too. A start is refused while the last one is alive; a generation that is no longer the newest writes nothing.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from gpt.recipe import PROJECT_ROOT, Recipe, parse_recipe, read_mapping

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
"""A writer on another host is taken for dead when its heartbeat is older than this."""

FREE_FIELDS = (
    "name", "runs_directory", "train.micro_batch_sequences", "data.workers", "deepspeed", "compile",
    "gradient_checkpointing", "checkpoint", "divergence", "evaluate", "logging",
)  # fmt: skip
ANNOUNCED_FIELDS = (
    "train.tokens", "train.steps", "train.epochs", "optimizer.learning_rate", "optimizer.schedule",
    "optimizer.warmup_steps", "optimizer.decay_steps", "optimizer.minimum_learning_rate_ratio",
)  # fmt: skip


class SupersededError(RuntimeError):
    """A newer start has taken the run directory over; this one must stop without writing."""


def compare_recipes(stored: Recipe, new: Recipe) -> list[str]:
    """What a run that goes on changes and is announced, as "field: old -> new".

    Raises:
        ValueError: a field differs that may not change, naming field, old and new value.
    """
    old_values, new_values = _flatten(stored.model_dump()), _flatten(new.model_dump())
    announced: list[str] = []
    refused: list[str] = []
    for field in sorted(old_values.keys() | new_values.keys()):
        old, value = old_values.get(field), new_values.get(field)
        if old == value or _is_in(field, FREE_FIELDS):
            continue
        (announced if _is_in(field, ANNOUNCED_FIELDS) else refused).append(f"{field}: {old!r} -> {value!r}")
    if refused:
        raise ValueError(
            f"run directory {new.run_directory()} belongs to another recipe: {'; '.join(refused)}. Choose another "
            f"name, or start a new run from this one's weights with --fork NEW_NAME"
        )
    return announced


def changes_of_schedule(stored: dict[str, Any], new: Recipe) -> bool:
    """Whether a recipe differs from a stored one (its `model_dump`) in what may change with a printed line."""
    old_values, new_values = _flatten(stored), _flatten(new.model_dump())
    return any(old_values.get(field) != new_values.get(field) for field in ANNOUNCED_FIELDS)


def _flatten(node: Any, place: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {place: node}
    return {k: v for key, child in node.items() for k, v in _flatten(child, f"{place}.{key}".lstrip(".")).items()}


def _is_in(field: str, sections: tuple[str, ...]) -> bool:
    return any(field == section or field.startswith(section + ".") for section in sections)


def stored_recipe(run: Path) -> Recipe | None:
    """The recipe that a run directory belongs to; None where there is no run."""
    file = run / "recipe.yaml"
    return parse_recipe(read_mapping(file), str(file)) if file.is_file() else None


class RunDirectory:
    """Rank 0's hold on a run directory: the claim, its heartbeat, and the files that this start appends to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.generation = 0
        self._stop = threading.Event()
        self._heartbeat: threading.Thread | None = None
        self._phase = "starting"
        self._events = threading.Lock()

    def claim(self) -> None:
        """Become the one writer.

        Raises:
            ValueError: another start is alive, named by host, process and Slurm job.
        """
        generations = self.path / "generations"
        for folder in (generations, self.path / "heartbeats", self.path / "logs", self.path / "checkpoints"):
            folder.mkdir(parents=True, exist_ok=True)
        newest = self._newest()
        if newest:
            self._refuse_if_alive(newest)
        mine = {
            "generation": newest + 1,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "pid_started": psutil.Process().create_time(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "time": time.time(),
        }
        temporary = generations / f".{mine['host']}-{mine['pid']}"
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(mine))
            file.flush()
            os.fsync(file.fileno())  # an empty claim, left by a host that lost power, would block every later start
        try:
            os.link(temporary, self._claim_file(newest + 1))
        except FileExistsError:
            raise ValueError(
                f"run directory {self.path} was claimed by another start at this moment: try again"
            ) from None
        finally:
            temporary.unlink()
        self.generation = newest + 1
        self._beat()
        self._heartbeat = threading.Thread(target=self._beat_for_ever, name="heartbeat", daemon=True)
        self._heartbeat.start()

    def release(self) -> None:
        """End the heartbeat and mark the claim as ended, so that the next start need not wait for it to go stale."""
        self._stop.set()
        if self._heartbeat is not None:
            self._heartbeat.join()
        if self.generation and self.is_newest():
            self._beat(ended=True)

    def set_phase(self, phase: str) -> None:
        """What the heartbeat says this rank is doing."""
        self._phase = phase

    def is_newest(self) -> bool:
        """Whether no later start has claimed the directory."""
        return not self._claim_file(self.generation + 1).exists()

    def check_ownership(self) -> None:
        """Before every commit and append. Raises SupersededError when a later start owns the directory."""
        if not self.is_newest():
            raise SupersededError(
                f"run directory {self.path} was taken over by start {self._newest()}; this is start {self.generation}: "
                f"stopping without writing"
            )

    def write_event(self, kind: str, **details: Any) -> None:
        """Append one line to events.jsonl, which is never cut. Any thread may call it."""
        self.check_ownership()
        line = json.dumps({"time": time.time(), "generation": self.generation, "event": kind, **details}) + "\n"
        with self._events, (self.path / "events.jsonl").open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else "\n" + line  # a full disk had cut the last one short
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Events of one kind over all starts, oldest first; a line that a full disk cut short is none."""
        file = self.path / "events.jsonl"
        found = []
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return [event for event in found if event["event"] == kind]

    def write_file(self, name: str, content: str) -> None:
        """Replace a small file of the directory atomically."""
        self.check_ownership()
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(self.path / name)

    def _claim_file(self, generation: int) -> Path:
        return self.path / "generations" / f"{generation:06d}.json"

    def _heartbeat_file(self, generation: int) -> Path:
        return self.path / "heartbeats" / f"generation_{generation:06d}.json"

    def _newest(self) -> int:
        numbers = [int(p.stem) for p in (self.path / "generations").glob("*.json") if p.stem.isdigit()]
        return max(numbers, default=0)

    def _refuse_if_alive(self, generation: int) -> None:
        claim = json.loads(self._claim_file(generation).read_text(encoding="utf-8"))
        beat = claim
        with contextlib.suppress(FileNotFoundError, ValueError):  # not yet there, or cut short with its host
            beat = json.loads(self._heartbeat_file(generation).read_text(encoding="utf-8"))
        age = time.time() - beat["time"]
        if beat.get("ended") or age > STALE_SECONDS:
            return
        if claim["host"] == socket.gethostname() and not _is_running(claim["pid"], claim["pid_started"]):
            return
        job = f", Slurm job {claim['job']}" if claim["job"] else ""
        raise ValueError(
            f"run directory {self.path} is in use: host {claim['host']}, process {claim['pid']}{job}, alive "
            f"{age:.0f} s ago. Stop it, or wait {STALE_SECONDS:.0f} s after it died"
        )

    def _beat(self, ended: bool = False) -> None:
        content = {
            "time": time.time(),
            "phase": self._phase,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "ended": ended,
        }
        file = self._heartbeat_file(self.generation)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(file)

    def _beat_for_ever(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                if not self.is_newest():
                    return
                self._beat()
            except OSError:
                continue  # a full or absent disk must not kill the thread; the next beat may succeed


def _is_running(pid: int, started: float) -> bool:
    """Whether the process exists and is the one that started then (process numbers are used again)."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def package_versions() -> dict[str, str | None]:
    """Versions of what decides a run's numbers."""
    names = ("trainyard", "torch", "deepspeed", "transformers", "tokenizers", "safetensors", "numpy")
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions | {"git_commit": _git_commit()}


def _git_commit() -> str | None:
    """Commit of the checkout that runs, with "+changes" when files differ from it; None outside a git checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(PROJECT_ROOT), *arguments], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return commit and commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def describe_environment(world_size: int) -> dict[str, Any]:
    """What environment.json holds: enough to say later what a run was made with."""
    prefixes = (
        "OMP_",
        "MALLOC_",
        "DS_",
        "TORCH_EXTENSIONS",
        "NCCL_",
        "GLOO_",
        "CUDA_VISIBLE",
        "SLURM_",
        "TRAINYARD_CACHE",
    )
    return {
        "versions": package_versions(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "world_size": world_size,
        "job": os.environ.get("SLURM_JOB_ID"),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(prefixes)},
    }
