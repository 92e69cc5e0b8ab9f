"""A run's directory: its places, its one writer, its recipe, its events.

One writer: each start claims the next generation number by linking a file that must not exist yet, which is atomic on
NFS too. A start is refused while the last one is alive; a generation that is no longer the newest writes nothing.
"""

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import xxhash

from gpt.recipe import Recipe
from gpt.recipe_file import PROJECT_ROOT, parse_recipe, read_mapping

FREE_FIELDS = (
    "name", "runs_directory", "train.micro_batch_sequences", "data.workers", "data.remote", "deepspeed", "compile",
    "attention", "fused_loss", "gradient_checkpointing", "checkpoint", "divergence", "evaluate", "logging", "profile",
    "faults",
)  # fmt: skip
ANNOUNCED_FIELDS = (
    "train.tokens", "train.steps", "train.epochs", "optimizer.learning_rate", "optimizer.schedule",
    "optimizer.warmup_steps", "optimizer.decay_steps", "optimizer.minimum_learning_rate_ratio",
)  # fmt: skip

RECORDED_VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM", "PYTHONUNBUFFERED", "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "DS_ACCELERATOR",
    "TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRAINYARD_CACHE", "TRAINYARD_HOST", "HF_HUB_OFFLINE",
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS",
    "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_IB_DISABLE", "NCCL_IB_GID_INDEX", "NCCL_NET",
    "NCCL_NET_PLUGIN", "NCCL_NET_GDR_LEVEL", "NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL", "NCCL_SHM_DISABLE", "NCCL_ALGO",
    "NCCL_PROTO", "NCCL_DEBUG", "NCCL_CROSS_NIC", "NCCL_NVLS_ENABLE", "NCCL_TOPO_FILE",
    "SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_PARTITION", "SLURM_JOB_QOS",
    "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT",
    "SLURM_NTASKS", "SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "SLURM_GPUS_ON_NODE", "SLURM_MEM_PER_NODE",
)  # fmt: skip
"""What environment.json may show. By name: a prefix such as SLURM_ lets SLURM_JWT through, which is a key."""
CHOSEN_VARIABLES = "TRAINYARD_CHOSEN_VARIABLES"
"""Tells the workers which of them Trainyard has set; what it has not is the user's own, or the scheduler's."""


class SupersededError(RuntimeError):
    """A newer start has taken the run directory over; this one must stop without writing."""


class InUseError(ValueError):
    """Another start owns the run directory and is, or may be, alive.

    Args:
        stale_in_seconds: when it may be taken for dead, unless it gives another sign of life.
    """

    def __init__(self, message: str, stale_in_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.stale_in_seconds = stale_in_seconds


class NotMetError(ConnectionError):
    """The hosts or the ranks of a start did not meet in time. Unlike a refusal, another start may go better."""


def compare_recipes(stored: Recipe, new: Recipe) -> list[str]:
    """What a run that goes on changes and is announced, as "field: old -> new".

    Raises:
        ValueError: a field differs that may not change, naming field, old and new value.
    """
    old_values, new_values = flatten(stored.model_dump()), flatten(new.model_dump())
    # where evaluations are compared with one another, all must be of the same batches
    compared = new.evaluate.early_stopping is not None or new.checkpoint.keep_best is not None
    announced: list[str] = []
    refused: list[str] = []
    for field in sorted(old_values.keys() | new_values.keys()):
        old, value = old_values.get(field), new_values.get(field)
        if old == value or (_is_in(field, FREE_FIELDS) and not (compared and field == "evaluate.batches")):
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
    old_values, new_values = flatten(stored), flatten(new.model_dump())
    return any(old_values.get(field) != new_values.get(field) for field in ANNOUNCED_FIELDS)


def flatten(node: Any, place: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, by their keys joined with dots."""
    if not isinstance(node, dict):
        return {place: node}
    return {k: v for key, child in node.items() for k, v in flatten(child, f"{place}.{key}".lstrip(".")).items()}


def _is_in(field: str, sections: tuple[str, ...]) -> bool:
    return any(field == section or field.startswith(section + ".") for section in sections)


def stored_recipe(run: Path) -> Recipe | None:
    """The recipe that a run directory belongs to; None where there is no run."""
    file = run / "recipe.yaml"
    return parse_recipe(read_mapping(file), str(file)) if file.is_file() else None


def claim_file(run: Path, generation: int) -> Path:
    """The file whose existence makes a start the owner of a run directory."""
    return run / "generations" / f"{generation:06d}.json"


def heartbeat_file(run: Path, generation: int, rank: int) -> Path:
    """Where a rank of a start says what it is doing."""
    return run / "heartbeats" / f"generation_{generation:06d}" / f"rank_{rank:05d}.json"


def newest_generation(run: Path) -> int:
    """Number of the newest start; 0 where there was none."""
    numbers = [int(p.stem) for p in (run / "generations").glob("*.json") if p.stem.isdigit()]
    return max(numbers, default=0)


def json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of metrics.jsonl or events.jsonl, none where there is no file: one that a kill or a full disk cut
    short counts for nothing."""
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def is_newest(run: Path, generation: int) -> bool:
    """Whether no start after this one has claimed the run directory."""
    return not claim_file(run, generation + 1).exists()


class RunDirectory:
    """Rank 0's hold on a run directory: the claim, and the files that this start appends to."""

    def __init__(self, path: Path, generation: int = 0) -> None:
        self.path = path
        self.generation = generation
        self._events = threading.Lock()

    def claim(self, stale_seconds: float = 60.0) -> None:
        """Become the one writer.

        Args:
            stale_seconds: this start may be taken for dead when its heartbeat is older than this; kept in the claim.

        Raises:
            InUseError: another start is alive, named by host, process and Slurm job.
        """
        generations = self.path / "generations"
        for folder in (generations, self.path / "heartbeats", self.path / "logs", self.path / "checkpoints"):
            folder.mkdir(parents=True, exist_ok=True)
        newest = newest_generation(self.path)
        may_live = self._refuse_if_alive(newest) if newest else False
        mine = {
            "generation": newest + 1,
            "host": host_label(),
            "process_space": process_space(),
            "pid": os.getpid(),
            "pid_started": psutil.Process().create_time(),
            "launcher": os.getppid(),
            "stale_seconds": stale_seconds,
            "job": os.environ.get("SLURM_JOB_ID"),
            "time": time.time(),
        }
        temporary = generations / f".{mine['host']}-{mine['pid']}"
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(mine))
            file.flush()
            os.fsync(file.fileno())  # an empty claim, left by a host that lost power, would block every later start
        try:
            os.link(temporary, claim_file(self.path, newest + 1))
        except FileExistsError:
            raise InUseError(
                f"run directory {self.path} was claimed by another start at this moment: try again"
            ) from None
        finally:
            temporary.unlink()
        self.generation = newest + 1
        if may_live:
            self._fence()

    def remove_old_heartbeats(self) -> None:
        """All but this start's and those of the one before, which say how it ended. Not before the event of this start
        has kept when the run was last seen: a start that died without an event of its own had no use for them."""
        before = heartbeat_file(self.path, self.generation - 1, 0).parent.name
        for old in (self.path / "heartbeats").glob("generation_*"):
            if old.name < before:
                shutil.rmtree(old, ignore_errors=True)

    def check_ownership(self) -> None:
        """Before every commit and append. Raises SupersededError when a later start owns the directory."""
        if not is_newest(self.path, self.generation):
            raise SupersededError(
                f"run directory {self.path} was taken over by start {newest_generation(self.path)}; this is start "
                f"{self.generation}: stopping without writing"
            )

    def write_event(self, kind: str, **details: Any) -> None:
        """Append one line to events.jsonl, which is never cut. Any thread may call it."""
        line = json.dumps({"time": time.time(), "generation": self.generation, "event": kind, **details}) + "\n"
        with self._events, (self.path / "events.jsonl").open("ab+") as file:
            self.check_ownership()  # with the file open: one who claims after this replaces it, see _fence
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else "\n" + line  # a full disk had cut the last one short
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def note_event(self, kind: str, **details: Any) -> None:
        """`write_event`; a disk that cannot take it does not end the run."""
        try:
            self.write_event(kind, **details)
        except OSError as error:
            with contextlib.suppress(OSError):  # the disk may hold the console's log, too
                print(f"warning: the event {kind!r} {details} could not be written: {error}", flush=True)

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """Events of these kinds over all starts, oldest first."""
        return [event for event in json_lines(self.path / "events.jsonl") if event["event"] in kinds]

    def write_file(self, name: str, content: str) -> None:
        """Replace a small file of the directory atomically."""
        self.check_ownership()
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(self.path / name)

    def refuse_if_in_use(self) -> None:
        """Raises InUseError while the newest start is, or may be, alive."""
        if newest := newest_generation(self.path):
            self._refuse_if_alive(newest)

    def _refuse_if_alive(self, generation: int) -> bool:
        """Whether that start, which is stale, may nevertheless go on one day. Raises InUseError while it is alive."""
        claim = json.loads(claim_file(self.path, generation).read_text(encoding="utf-8"))
        beat = claim
        with contextlib.suppress(FileNotFoundError, ValueError):  # not yet there, or cut short with its host
            beat = json.loads(heartbeat_file(self.path, generation, 0).read_text(encoding="utf-8"))
        if beat.get("ended"):
            return False
        if claim.get("process_space") == process_space() and not _is_running(claim["pid"], claim["pid_started"]):
            return False
        age, stale_seconds = time.time() - beat["time"], claim["stale_seconds"]
        if age > stale_seconds:
            return True
        job = f", Slurm job {claim['job']}" if claim["job"] else ""
        raise InUseError(
            f"run directory {self.path} is in use: host {claim['host']}, process {claim['pid']}{job}, alive "
            f"{age:.0f} s ago. Stop it, or wait {stale_seconds:.0f} s after it died",
            stale_seconds - age,
        )

    def _fence(self) -> None:
        """Replace what the stale start may hold open by copies: what it still writes then is seen nowhere."""
        for file in [self.path / "events.jsonl", *(self.path / "tensorboard").glob("*")]:
            if file.is_file():
                shutil.copy2(file, self.path / ".fenced.tmp")
                (self.path / ".fenced.tmp").replace(file)


def claimed_from(run: Path, launcher: int) -> RunDirectory | None:
    """The newest start's hold if that launcher of this host began it, for the launcher to record how it ended."""
    generation = newest_generation(run)
    claim = json.loads(claim_file(run, generation).read_text(encoding="utf-8")) if generation else {}
    mine = (claim.get("process_space"), claim.get("launcher")) == (process_space(), launcher)
    return RunDirectory(run, generation) if mine else None


def tokenizer_checksums(folder: Path) -> dict[str, str]:
    """xxh3 of each file of a run's own tokenizer (the folder may be a whole model's): its event `tokenizer kept` has
    them, and export compares them."""
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".json", ".jinja", ".txt", ".model")]
    return {file.name: xxhash.xxh3_64_hexdigest(file.read_bytes()) for file in files}


def check_kept_tokenizer(run: Path) -> None:
    """Raise ValueError where the run's own tokenizer is no longer that with which the model learned.

    Runs that began before the event was written have none, and are not checked.
    """
    for event in RunDirectory(run).events("tokenizer kept")[-1:]:
        place, before = run / "tokenizer", event["xxh3"]
        there = tokenizer_checksums(place)
        if changed := sorted(name for name in there | before if there.get(name) != before.get(name)):
            raise ValueError(
                f"{', '.join(changed)} in {place} changed since the run began, so the model did not learn with it: "
                f"bring the old one back"
            )


def host_label() -> str:
    """How this host is named in what people read, and in file names: TRAINYARD_HOST, else its name."""
    return re.sub(r"[^\w.@:-]", "_", os.environ.get("TRAINYARD_HOST") or socket.gethostname())


def process_space() -> str:
    """Where a process number means the same process: the host's name, its present boot and its pid namespace.

    The name alone is not enough: containers and freshly installed hosts share names. Without /proc it has to do.
    """
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()]
        parts += [os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _is_running(pid: int, started: float) -> bool:
    """Whether the process exists and is the one that started then (process numbers are used again)."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def package_versions(*, commit: bool = True) -> dict[str, str | None]:
    """Versions of what decides a run's numbers; without `commit` git is not asked, which takes its time."""
    names = ("trainyard", "torch", "deepspeed", "transformers", "tokenizers", "safetensors", "numpy")
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions | {"git_commit": _git_commit() if commit else None}


@functools.cache
def _git_commit() -> str | None:
    """Commit of the checkout that runs, with "+changes" when files differ from it; None where git does not say."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(PROJECT_ROOT), *arguments], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:  # not known, rather than without changes: a busy file system takes its time
        return None
    return commit + ("+changes" if changes else "")


def describe_environment(world_size: int) -> dict[str, Any]:
    """What environment.json holds: enough to say later what a run was made with. Of the environment variables only
    those of RECORDED_VARIABLES, which hold no secrets."""
    chosen = os.environ.get(CHOSEN_VARIABLES, "").split()
    known = {name: os.environ[name] for name in RECORDED_VARIABLES if name in os.environ}
    return {
        "versions": package_versions(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "world_size": world_size,
        "job": os.environ.get("SLURM_JOB_ID"),
        "variables": {
            "chosen_by_trainyard": {name: value for name, value in known.items() if name in chosen},
            "set_outside": {name: value for name, value in known.items() if name not in chosen},
        },
    }
