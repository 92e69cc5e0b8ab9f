"""Job scripts for Slurm: what may be asked for, the script, and the programs that take it.

Values get into a script in two ways: escaped for Slurm's own reader in the `#SBATCH` lines, where no shell expands
anything, and quoted for the shell below them. `--extra-line` is the only text that goes in as it is.
"""

import contextlib
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from gpt.recipe_file import PROJECT_ROOT

SHORTEST_LEAD_SECONDS = 180
LONGEST_LEAD_SECONDS = 65535
"""The largest that sbatch's --signal takes."""
SAVES_IN_LEAD = 3
LITTLE_SECONDS = 300
"""Loading Python, the model and a checkpoint may take minutes on a busy file system."""
PROBE_BYTES = 64 * 2**20
SLURM_TIME = re.compile(r"(?:(\d+)-(\d+)(?::(\d+)(?::(\d+))?)?|(\d+)(?::(\d+)(?::(\d+))?)?)")
MEMORY = re.compile(r"\d+[KMGTkmgt]?")
BYTES_PER_SECOND = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B?(?:/s)?", re.IGNORECASE)
PLAIN = re.compile(r"[A-Za-z0-9_./,:=@%+-]+")
COMMAND_TIMEOUT_SECONDS = 120
_TEMPLATES = PROJECT_ROOT / "slurm"


@dataclass(frozen=True)
class Request:
    """What a job asks Slurm for. Fields named as sbatch's options are passed on as they are."""

    nodes: int
    processes_per_node: int
    gpus_per_node: int | None = None
    cpus_per_process: int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    memory: str | None = None
    constraint: str | None = None
    exclusive: bool = False
    reservation: str | None = None
    container: str | None = None
    """An Apptainer image (a .sif file or a folder), else what Pyxis takes as --container-image."""
    modules: list[str] = field(default_factory=list)
    extra_lines: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Refuse what no cluster can hold. Raises ValueError or FileNotFoundError, one sentence."""
        for name in ("nodes", "processes_per_node", "gpus_per_node", "cpus_per_process"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {number}, but it is at least 1")
        if self.gpus_per_node is not None and self.gpus_per_node < self.processes_per_node:
            raise ValueError(
                f"--processes-per-node {self.processes_per_node} needs a GPU for each process, but --gpus-per-node is "
                f"{self.gpus_per_node}: ask for as many"
            )
        texts = {"partition": self.partition, "account": self.account, "qos": self.qos, "constraint": self.constraint}
        texts |= {"reservation": self.reservation, "container": self.container}
        named = [(name, text) for name, text in texts.items() if text is not None]
        for name, text in [*named, *(("module", module) for module in self.modules)]:
            if not text.strip() or not text.isprintable():
                raise ValueError(
                    f"--{name} is {text!r}: it must not be empty nor hold line breaks or control characters"
                )
        if self.time is not None:
            time_limit_seconds(self.time)
        if self.memory is not None and not MEMORY.fullmatch(self.memory):
            raise ValueError(f"--memory is {self.memory!r}, which is no size as Slurm writes it: 64G, 500M, … per node")
        if self.container is not None and self.container.endswith(".sif") and not Path(self.container).is_file():
            raise FileNotFoundError(f"--container {self.container}: there is no such Apptainer image")

    def options(self) -> list[str]:
        """The `#SBATCH` options that depend on the request, besides those that the template has itself."""
        cpus = self.cpus_per_process or (None if self.exclusive else 1)
        values = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "time": self.time,
            "mem": self.memory,
            "constraint": self.constraint,
            "reservation": self.reservation,
            "gpus-per-node": self.gpus_per_node,
            "cpus-per-task": cpus and cpus * self.processes_per_node,
        }
        options = [f"--{name}={escaped(str(value))}" for name, value in values.items() if value is not None]
        return options + (["--exclusive"] if self.exclusive else [])


@dataclass(frozen=True)
class Lead:
    """How long before the time limit the ranks are asked to save."""

    save_bytes: int
    bytes_per_second: float
    source: str
    """Where the bandwidth is from."""

    @property
    def save_seconds(self) -> float:
        return self.save_bytes / self.bytes_per_second

    @property
    def seconds(self) -> int:
        return max(SHORTEST_LEAD_SECONDS, math.ceil(SAVES_IN_LEAD * self.save_seconds))

    def describe(self) -> str:
        """The arithmetic, for the console."""
        return (
            f"warning signal {self.seconds} s before the time limit = max({SHORTEST_LEAD_SECONDS} s, {SAVES_IN_LEAD} x "
            f"{self.save_bytes:,} bytes of a checkpoint / {self.bytes_per_second / 1e6:,.0f} MB/s {self.source} = "
            f"{SAVES_IN_LEAD * self.save_seconds:,.1f} s)"
        )

    def check(self, limit_seconds: int | None) -> list[str]:
        """Warnings about a limit that leaves little. Raises ValueError when the signal would come before the job."""
        if self.seconds > LONGEST_LEAD_SECONDS or (limit_seconds is not None and self.seconds >= limit_seconds):
            limit = "without a time limit" if limit_seconds is None else f"but the time limit is {limit_seconds} s"
            raise ValueError(
                f"the {self.describe()}, {limit} and sbatch's --signal takes at most {LONGEST_LEAD_SECONDS} s: ask for "
                "more --time, or state a faster --write-bandwidth if the measured one is not the nodes'"
            )
        left = None if limit_seconds is None else limit_seconds - self.seconds
        if left is None or left >= LITTLE_SECONDS:
            return []
        return [
            f"each start has {left} s until that signal, which Slurm may send up to 60 s early: a run that trains "
            "nothing in two starts is stopped; ask for more --time"
        ]


@dataclass(frozen=True)
class Task:
    """A run in a job: the only one, or that of one task of an array."""

    run: Path
    recipe: Path
    """The frozen one."""
    mounted: tuple[Path, ...] = ()
    """Folders besides the checkout that a container needs."""


def escaped(value: str) -> str:
    """A value for an `#SBATCH` line, quoted for Slurm's own reader.

    That one takes quotes and backslashes nearly as a shell does (but a backslash does not keep a space in a word), and
    `$` and backticks as they are.

    Raises:
        ValueError: a line break, which nothing can protect there.
    """
    _require_printable(value)
    if PLAIN.fullmatch(value):
        return value
    return '"' + re.sub(r'(["\\#])', r"\\\1", value) + '"'


def quoted(value: str) -> str:
    """A value for the shell. Raises ValueError for a line break, which the shell would take, but no reader expects."""
    _require_printable(value)
    if "," in value:  # shlex finds none in need of quotes; shellcheck takes one in an array for a mistake
        return "'" + value.replace("'", "'\"'\"'") + "'"
    return shlex.quote(value)


def _require_printable(value: str) -> None:
    if not value.isprintable():
        raise ValueError(f"{value!r} cannot stand in a job script: it holds line breaks or control characters")


def time_limit_seconds(text: str) -> int | None:
    """Seconds of a time as Slurm writes it; None for no limit, as of 0. Raises ValueError when it is none."""
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return None
    found = SLURM_TIME.fullmatch(text)
    if found is None:
        raise ValueError(
            f"--time is {text!r}, which is no time as Slurm writes it: MINUTES, HOURS:MINUTES:SECONDS or "
            "DAYS-HOURS[:MINUTES[:SECONDS]]"
        )
    days, hours, minutes, seconds, first, second, third = (None if n is None else int(n) for n in found.groups())
    if first is None:
        return ((((days or 0) * 24 + (hours or 0)) * 60 + (minutes or 0)) * 60 + (seconds or 0)) or None
    if third is None:
        return (first * 60 + (second or 0)) or None
    return ((first * 60 + (second or 0)) * 60 + third) or None


def parse_bandwidth(text: str) -> float:
    """Bytes per second of `500MB/s`, `2.5GB` or a number of bytes. Raises ValueError when it is none of them."""
    found = BYTES_PER_SECOND.fullmatch(text.strip())
    if found is None or float(found.group(1)) == 0:
        raise ValueError(f"--write-bandwidth is {text!r}, which is no bandwidth: 500MB/s, 2.5GB/s, …")
    number, prefix, binary = found.groups()
    return float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " ")


def measure_bandwidth(folder: Path) -> float:
    """Bytes per second of a short write with fsync into a folder, as one writer of this host sees it.

    Raises:
        ValueError: the folder does not take it.
    """
    block = os.urandom(4 * 2**20)  # not zeros, which a file system may store as a hole
    file = folder / f".write-bandwidth-{os.getpid()}"
    try:
        begin = time.monotonic()
        with file.open("wb") as out:
            for _ in range(PROBE_BYTES // len(block)):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
        return PROBE_BYTES / max(time.monotonic() - begin, 1e-6)
    except OSError as error:
        raise ValueError(
            f"{folder} takes no {PROBE_BYTES:,} bytes ({error.strerror}): runs need a place with room"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            file.unlink()


def render(
    template: str, request: Request, tasks: list[Task], *, title: str, job_name: str, output: str, **more: Any
) -> str:
    """A job script from `slurm/<template>`, checked by bash.

    Args:
        tasks: more than one makes an array job.
        output: where Slurm writes what the job prints, with its `%` symbols; see `literal`.
    """
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {"sbatch": escaped, "sh": quoted}
    directives = [line for line in request.extra_lines if line.startswith("#SBATCH")]
    options = request.options() + ([f"--array=0-{len(tasks) - 1}"] if len(tasks) > 1 else [])
    script = environment.get_template(template).render(
        title=title,
        job_name=job_name,
        output=output,
        options=options,
        extra_directives=directives,
        extra_commands=[line for line in request.extra_lines if line not in directives],
        modules=request.modules,
        nodes=request.nodes,
        processes_per_node=request.processes_per_node,
        runs=[str(task.run) for task in tasks],
        recipes=[str(task.recipe) for task in tasks],
        **_programs(request, tasks),
        **more,
    )
    _check_syntax(script)
    return script


def literal(path: Path) -> str:
    """A path for sbatch's --output, in which `%` begins a symbol. Raises ValueError for a backslash, which ends it."""
    if "\\" in str(path):
        raise ValueError(f"{path} cannot be where Slurm writes a job's output, because of its backslash: rename it")
    return str(path).replace("%", "%%")


def _programs(request: Request, tasks: list[Task]) -> dict[str, Any]:
    """How Trainyard is called on the host (`python`) and where the workers run (`trainyard`)."""
    python = [sys.executable, "-P"]  # without the working directory, which may hold a folder named as a package
    if request.container is None:
        return {"python": python, "trainyard": [*python, "-m", "launch.cli"], "srun_options": [], "variables": {}}
    mounted = _mounts([PROJECT_ROOT, *(path for task in tasks for path in (task.run.parent, *task.mounted))])
    inside = ["python3", "-P", "-m", "launch.cli"]  # the image's packages, the checkout's code
    found: dict[str, Any] = {"python": python, "trainyard": inside, "srun_options": []}
    found["variables"] = {"PYTHONPATH": str(PROJECT_ROOT)}
    if request.container.endswith(".sif") or Path(request.container).is_dir():
        devices = ["--nv"] if request.gpus_per_node is not None else []
        binds = [part for mount in mounted for part in ("--bind", mount)]
        found["trainyard"] = ["apptainer", "exec", *devices, *binds, str(Path(request.container).absolute()), *inside]
    else:
        mounts = ",".join(f"{mount}:{mount}" for mount in mounted)
        found["srun_options"] = [f"--container-image={request.container}", f"--container-mounts={mounts}"]
    return found


def _mounts(folders: Iterable[Path]) -> list[str]:
    """Folders for a container, none inside another. Raises ValueError for names that its options cannot hold."""
    outermost: list[Path] = []
    for folder in sorted(set(folders)):
        if not any(folder.is_relative_to(other) for other in outermost):
            outermost.append(folder)
    for folder in outermost:
        if re.search("[,:]", str(folder)):
            raise ValueError(f"{folder} cannot be mounted into a container, because of its comma or colon: rename it")
    return [str(folder) for folder in outermost]


def _check_syntax(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(
            f"the job script is not valid bash: {' '.join(done.stderr.split())}; look at the values of --extra-line"
        )


def partitions() -> list[dict[str, str]]:
    """What `scontrol show partition` says; empty where scontrol does not answer, which sbatch will say better."""
    command = ["scontrol", "show", "partition", "--oneliner"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines if line.startswith("PartitionName=")]


def chosen_partitions(found: list[dict[str, str]], names: str | None) -> list[dict[str, str]]:
    """Those that a job may run in: the named ones (commas between them), else the default one."""
    wanted = names.split(",") if names is not None else [p["PartitionName"] for p in found if p["Default"] == "YES"]
    return [partition for partition in found if partition["PartitionName"] in wanted]


def default_limit_seconds(chosen: list[dict[str, str]]) -> int | None:
    """The shortest time limit that a job without --time gets in these partitions; None for no or an unknown limit."""
    limits = [p["MaxTime"] if p["DefaultTime"] == "NONE" else p["DefaultTime"] for p in chosen]
    seconds = [time_limit_seconds(limit) for limit in limits]
    return min((limit for limit in seconds if limit is not None), default=None)


def grace_warnings(found: list[dict[str, str]], chosen: list[dict[str, str]], lead: Lead) -> list[str]:
    """One for each chosen partition whose jobs give way to a higher one's sooner than they can save."""
    highest = max((int(partition["PriorityTier"]) for partition in found), default=0)
    return [
        f"partition {partition['PartitionName']} gives a preempted job {partition['GraceTime']} s (GraceTime), but a "
        f"save of {lead.save_bytes:,} bytes takes about {lead.save_seconds:,.1f} s, after the step that is under way: "
        "what was trained since the last checkpoint may be done again; ask for a longer GraceTime, or lower "
        "checkpoint.every_steps"
        for partition in chosen
        if partition["PreemptMode"] != "OFF"
        and int(partition["PriorityTier"]) < highest
        and int(partition["GraceTime"]) <= lead.save_seconds
    ]


def sbatch(script: Path, *options: str) -> str:
    """Submit a script; the job's id.

    Raises:
        FileNotFoundError: there is no sbatch.
        ValueError: sbatch refused, in its own words.
    """
    command = ["sbatch", "--parsable", *options, str(script)]
    environment = _without_contradictions(script.read_text(encoding="utf-8"))
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=COMMAND_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(f"sbatch did not answer within {COMMAND_TIMEOUT_SECONDS} s: is slurmctld up?") from None
    if done.returncode:
        raise ValueError(f"sbatch refused the job: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0]


def require_sbatch() -> None:
    """Raises FileNotFoundError where nothing can be submitted."""
    if shutil.which("sbatch") is None:
        raise FileNotFoundError(
            "sbatch is not here: submit on a login node of the cluster, or look at the job script with --dry-run"
        )


def _without_contradictions(script: str) -> dict[str, str]:
    """The environment without those SBATCH_ variables that would win over the script's own lines, make an array of one
    run, or wait for its end."""
    options = set(re.findall(r"^#SBATCH --([a-z-]+)", script, re.MULTILINE))
    options |= {"requeue", "no-requeue", "array", "wait"}
    named = {"array": "ARRAY_INX", "time": "TIMELIMIT", "mem": "MEM_PER_NODE"}
    variables = {"SBATCH_" + named.get(option, option.upper().replace("-", "_")) for option in options}
    return {name: value for name, value in os.environ.items() if name not in variables}


def queued(job_ids: Iterable[str]) -> dict[str, str]:
    """Of these jobs, those that are in the queue or run, with their state. Empty without Slurm."""
    found = {}
    for job_id in job_ids:
        command = ["squeue", "--noheader", "--format=%T", f"--jobs={job_id}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            return {}
        states = set(done.stdout.split()) - {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        if done.returncode == 0 and states:
            found[job_id] = sorted(states)[0]
    return found
