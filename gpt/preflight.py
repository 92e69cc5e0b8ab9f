"""Will this run work: what every rank finds on its host, and what rank 0 makes of it for all.

It comes before the model is built, and before there is a process group: what ranks find goes through the store by which
they meet, so that a host which cannot take part in a collective is heard, too. All that fails is said together.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from gpt.checkpoint.format import SPARE_BYTES
from gpt.checkpoint.retention import BYTES_PER_ELEMENT, WEIGHTS_BYTES_PER_ELEMENT, planned_checkpoints
from gpt.distributed import Meeting, Ranks, gather_objects, timed_all_reduce
from gpt.metrics import processor_flops
from gpt.model import DTYPES
from gpt.recipe import Recipe
from gpt.run_directory import flatten, host_label, package_versions

State = Literal["passed", "warning", "failed", "skipped"]
CONNECT_SECONDS = 5.0
CLOCK_WARNING_SECONDS = 2.0


@dataclass(frozen=True)
class Item:
    """One thing that was looked at."""

    name: str
    state: State
    message: str

    def __str__(self) -> str:
        return f"{self.name}: {self.message}"


@dataclass(frozen=True)
class Facts:
    """What one rank found."""

    rank: int
    node: int
    host: str
    asked_ranks: int
    """Processes of its host times hosts, as its launcher was told."""
    versions: dict[str, str | None]
    recipe: dict[str, Any]
    """The resolved recipe, by field."""
    problem: str | None
    """Why the recipe, the data, the model or the batch does not fit, as it sees them."""
    data: str | None
    """Fingerprints of training and validation data and of the tokenizer; None with a problem."""
    threads: int
    """Of all ranks of its host together."""
    cores: int
    memory_bytes: int
    """Of its host, or of its control group where that is less."""
    available_bytes: int
    device_bytes: int | None
    """Memory of its GPU; None without one."""
    network: str | None
    """Why it does not reach others."""
    directory: str | None
    """Why the run directory is not usable from there."""


@dataclass(frozen=True)
class Needs:
    """What the run takes, in bytes: at least, since activations and buffers come on top."""

    checkpoint_bytes: int
    planned_bytes: int
    """Of the checkpoints that are kept, and the one that is being written."""
    rank_state_bytes: int
    """Of one rank: weights, fp32 weights and moments."""
    rank_gradient_bytes: int
    on_device: bool
    """Whether they are in a GPU's memory."""

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        parameters: int,
        saved_parameters: int,
        total_steps: int,
        deepspeed: dict[str, Any],
        world_size: int,
    ) -> "Needs":
        """By what each ZeRO stage shards (arXiv:1910.02054, section 5). Nothing is counted that may not be there: of a
        model with frozen parameters the weights alone. Of an adapter, `saved_parameters` are trained."""
        frozen, sgd = bool(recipe.model.frozen), recipe.optimizer.type == "sgd"
        zero, keep = deepspeed["zero_optimization"], recipe.checkpoint
        stage, weights = zero["stage"], parameters * (4 if recipe.precision == "fp32" else 2)
        optimizer = 0 if frozen else saved_parameters * (WEIGHTS_BYTES_PER_ELEMENT if sgd else BYTES_PER_ELEMENT)
        whole, reduced = planned_checkpoints(keep, total_steps)
        planned = (optimizer or weights) * whole + min(optimizer or weights, saved_parameters * 4) * reduced
        return cls(
            checkpoint_bytes=optimizer or weights,
            planned_bytes=min(planned, keep.budget_bytes or planned),
            rank_state_bytes=optimizer // world_size + weights // (world_size if stage == 3 else 1),
            rank_gradient_bytes=0
            if frozen
            else weights * saved_parameters // parameters // (world_size if stage >= 2 else 1),
            on_device=torch.cuda.is_available() and not zero.get("offload_optimizer"),
        )


def check_before(
    meeting: Meeting, recipe: Recipe, problem: str | None, data: str | None, needs: Needs | None
) -> list[Item]:
    """Everything that needs no process group; the same list on every rank.

    Args:
        problem: why this rank cannot take part.
        data: what must be the same on every rank.
        needs: rank 0's; None with a problem.
    """
    run = recipe.run_directory()
    with _listening(meeting) as network, _probe_files(meeting, run) as directory:
        facts = _find(meeting, recipe, problem, data, network, directory)
        everyone = [Facts(**values) for values in meeting.collect("facts", dataclasses.asdict(facts))]
        meeting.broadcast("go", None)  # all wait for it, so that what follows happens at one time
        clocks = meeting.collect("clock", time.time() if meeting.local_rank == 0 else None)
    items: list[Item] = []
    if meeting.rank == 0:
        items = judge(everyone, clocks, recipe)
        if needs is not None:
            items += judge_disk(run, needs) + judge_memory(everyone, needs)
    verdict = meeting.broadcast("verdict", [dataclasses.asdict(item) for item in items])
    return [Item(**values) for values in verdict]


def check_collectives(ranks: Ranks, size_bytes: int, repetitions: int) -> list[Item]:
    """An all-reduce over all ranks: whether every element of the sum is right, and how fast; the same on every rank."""
    everyone = gather_objects((host_label(), *timed_all_reduce(ranks, size_bytes // 4, repetitions)), ranks)
    bad = [f"rank {rank} on {host}" for rank, (host, is_right, _) in enumerate(everyone) if not is_right]
    if bad:
        sentence = f"the sum over all ranks is wrong on {', '.join(bad)}: look at these hosts' network and memory"
        return [Item("all-reduce", "failed", sentence)]
    seconds = max(seconds for _, _, seconds in everyone)
    # the least that each rank sends and receives, as in a ring (Patarasuk and Yuan, doi:10.1016/j.jpdc.2008.09.002)
    moved = 2 * (ranks.world_size - 1) / ranks.world_size * size_bytes
    speed = f", {moved / seconds / 1e9:.2f} GB/s a rank" if ranks.world_size > 1 else ""
    return [Item("all-reduce", "passed", f"{size_bytes / 2**20:.0f} MiB right in {seconds * 1e3:.1f} ms{speed}")]


def check_precision(precision: str) -> list[Item]:
    """Whether this host's processor computes in that type about as fast as in fp32. Of a GPU nothing is said."""
    if torch.cuda.is_available() or precision == "fp32":
        return []
    asked, fp32 = processor_flops(DTYPES[precision])
    speeds = (
        f"products of {precision} run at {asked / 1e9:,.1f} GFLOP/s on this processor, of fp32 at {fp32 / 1e9:,.1f}"
    )
    if asked < fp32 / 2:
        return [Item("precision", "warning", f"{speeds}: with precision=fp32 this run takes a fraction of the time")]
    return [Item("precision", "passed", speeds)]


def refuse(items: Sequence[Item]) -> None:
    """Raise ValueError with all that failed."""
    failed = [str(item) for item in items if item.state == "failed"]
    if len(failed) > 1:
        raise ValueError(f"this run would not work, for {len(failed)} reasons:\n  " + "\n  ".join(failed))
    if failed:
        raise ValueError(failed[0])


def can_meet(items: Sequence[Item]) -> bool:
    """Whether the ranks can become a process group: with other versions or without a network they would only wait."""
    return not any(item.state == "failed" and item.name in ("ranks", "versions", "network") for item in items)


def describe(items: Sequence[Item], ranks: int) -> list[str]:
    """The lines that a run prints at its start: how its ranks are connected, where there are several, and warnings."""
    good = "; ".join(str(item) for item in items if item.state == "passed" and item.name in ("ranks", "all-reduce"))
    return [good] * (ranks > 1) + [f"warning: {item}" for item in items if item.state == "warning"]


# What a rank finds


def _find(
    meeting: Meeting, recipe: Recipe, problem: str | None, data: str | None, network: str | None, directory: str | None
) -> Facts:
    memory = psutil.virtual_memory()
    limit = _memory_limit_bytes(memory.total)
    device = torch.cuda.get_device_properties(meeting.local_rank).total_memory if torch.cuda.is_available() else None
    return Facts(
        rank=meeting.rank,
        node=meeting.node,
        host=host_label(),
        asked_ranks=meeting.asked_ranks,
        versions=package_versions(commit=meeting.local_rank == 0) | {"torch": torch.__version__},
        recipe=flatten(recipe.model_dump(mode="json")),
        problem=problem,
        data=data,
        threads=torch.get_num_threads() * meeting.local_ranks,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=limit,
        available_bytes=min(limit, memory.available),
        device_bytes=device,
        network=network,
        directory=directory,
    )


def _memory_limit_bytes(total: int) -> int:
    """The host's memory, or a version 2 control group's limit where that is less."""
    with contextlib.suppress(OSError, ValueError):
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return total


@contextlib.contextmanager
def _listening(meeting: Meeting) -> Iterator[str | None]:
    """Gives why this rank's host does not reach the next one by the address that gloo will use; while inside, the one
    before can reach this. The first rank of each host looks, the others only at their own settings."""
    address, problem = _own_address()
    if meeting.nodes == 1 or meeting.local_rank != 0:
        yield problem
        return
    with socket.socket(socket.AF_INET6 if address and ":" in address else socket.AF_INET) as listener:
        if address is not None:
            try:
                listener.bind((address, 0))
                listener.listen()
            except OSError as error:
                problem = f"it cannot listen at {address} (GLOO_SOCKET_IFNAME): {error.strerror}"
                address = None
        meeting.tell("address", None if address is None else listener.getsockname(), of=meeting.node)
        there = meeting.hear("address", (meeting.node + 1) % meeting.nodes)
        if address is not None and there is not None:
            problem = _cannot_reach(address, *there[:2])
        yield problem


def _own_address() -> tuple[str | None, str | None]:
    """(the address of GLOO_SOCKET_IFNAME's interface, what is wrong with that setting)."""
    name = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    if not name:
        return None, None
    there = psutil.net_if_addrs()
    for family in (socket.AF_INET, socket.AF_INET6):
        for entry in there.get(name, []):
            if entry.family == family:
                return entry.address, None
    return None, (
        f"GLOO_SOCKET_IFNAME is {name!r}, which is no network interface with an address: there are "
        f"{', '.join(sorted(there))}; leave it out or name one of them"
    )


def _cannot_reach(own: str, address: str, port: int) -> str | None:
    interface = os.environ["GLOO_SOCKET_IFNAME"]
    try:
        socket.create_connection((address, port), CONNECT_SECONDS, source_address=(own, 0)).close()
    except OSError as error:
        return (
            f"from {own} (GLOO_SOCKET_IFNAME={interface}) it does not reach {address}, which the next host's ranks "
            f"would use: {error}. Set GLOO_SOCKET_IFNAME on each to the interface between the hosts, and open its ports"
        )
    return None


@contextlib.contextmanager
def _probe_files(meeting: Meeting, run: Path) -> Iterator[str | None]:
    """Gives why the run directory is not the same writable place for this host as for host 0. The first rank of each
    host writes a small file into the nearest folder of it that exists and looks for host 0's."""
    if meeting.local_rank != 0:
        yield None
        return
    mine = run.with_name(f".preflight-{meeting.node}-{os.getpid()}-{time.time_ns()}")
    try:
        problem = None
        try:
            mine = _nearest_folder(run) / mine.name
            mine.write_bytes(bytes(4096))  # a page: a full disk takes an empty file
        except OSError as error:
            problem = (
                f"{mine.parent} cannot be written to: {error.strerror}. Choose another runs_directory or make room"
            )
        meeting.tell("file", None if problem is not None else str(mine), of=meeting.node)
        theirs = meeting.hear("file", 0)
        if problem is None and theirs is not None and not os.path.exists(theirs):
            problem = (
                f"it does not see {theirs}, which host 0 wrote: runs_directory must be on a file system that all "
                "hosts share"
            )
        yield problem
    finally:
        with contextlib.suppress(OSError):
            mine.unlink(missing_ok=True)


# What rank 0 makes of it


def judge(everyone: Sequence[Facts], clocks: Sequence[float | None], recipe: Recipe) -> list[Item]:
    """Everything but sizes, from the facts of all ranks and the times that their clocks gave at one moment."""
    return [
        *_judge_ranks(everyone),
        *_judge_same(everyone),
        *_judge_recipe(everyone),
        *_judge_each("network", [fact.network for fact in everyone], everyone),
        *_judge_each("run directory", [fact.directory for fact in everyone], everyone),
        *_judge_clocks(everyone, clocks, min(recipe.faults.hang_seconds, recipe.faults.stale_seconds) / 4),
        *_judge_threads(everyone),
    ]


def _judge_ranks(everyone: Sequence[Facts]) -> list[Item]:
    ranks = len(everyone)
    other = {fact.host: fact.asked_ranks for fact in everyone if fact.asked_ranks != ranks}
    if other:
        told = ", ".join(f"{host} was told {asked}" for host, asked in other.items())
        sentence = f"{ranks} ranks have met, but {told}: give the same --nodes and --processes on each host"
        return [Item("ranks", "failed", sentence)]
    return [Item("ranks", "passed", f"{ranks} on {_count(len({fact.node for fact in everyone}), 'host')}")]


def _judge_same(everyone: Sequence[Facts]) -> list[Item]:
    """Versions, recipe and data: as rank 0 has them."""
    items, first = [], everyone[0]
    for name, advice in (
        ("versions", "install the same on each host"),
        ("recipe", "start each host with the same recipe and values"),
    ):
        mine = getattr(first, name)
        problems = []
        for fact in everyone:
            theirs = getattr(fact, name)
            differing = [key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)]
            if None in (mine.get("git_commit"), theirs.get("git_commit")):  # no git there, or no answer in time
                differing = [key for key in differing if key != "git_commit"]
            if differing:
                told = ", ".join(f"{key} {theirs.get(key)!r} and not {mine.get(key)!r}" for key in sorted(differing))
                problems.append(f"it has {told}, which rank 0 on {first.host} has: {advice}")
            else:
                problems.append("")
        items += _judge_each(name, problems, everyone)
    data = [
        f"it sees other data than rank 0 on {first.host} (fingerprints {fact.data} and {first.data}): copy them again"
        if fact.data is not None and first.data is not None and fact.data != first.data
        else None
        for fact in everyone
    ]
    return items + _judge_each("data", data, everyone)


def _judge_recipe(everyone: Sequence[Facts]) -> list[Item]:
    """What does not fit; of one host without the ranks, which have the same recipe and files."""
    name, problems = "recipe and data", [fact.problem for fact in everyone]
    if any(problems) and len({fact.node for fact in everyone}) == 1:
        return [Item(name, "failed", problem) for problem in dict.fromkeys(filter(None, problems))]
    return _judge_each(name, problems, everyone)


def _judge_each(name: str, problems: Sequence[str | None], everyone: Sequence[Facts]) -> list[Item]:
    """An item for each sentence, with the hosts or the ranks that it is about; one that passed where there is none."""
    where: dict[str, list[Facts]] = {}
    for fact, problem in zip(everyone, problems, strict=True):
        if problem:
            where.setdefault(problem, []).append(fact)
    items = []
    for problem, facts in where.items():
        ranks = "all ranks" if len(facts) == len(everyone) else ", ".join(f"rank {f.rank} on {f.host}" for f in facts)
        items.append(Item(name, "failed", f"{ranks}: {problem}"))
    return items or [Item(name, "passed", "the same everywhere" if name in ("versions", "recipe", "data") else "good")]


def _judge_clocks(everyone: Sequence[Facts], clocks: Sequence[float | None], limit_seconds: float) -> list[Item]:
    """From each host's clock (None for its other ranks)."""
    ahead = [clock - (clocks[0] or 0.0) if clock is not None else 0.0 for clock in clocks]
    worst = max(range(len(clocks)), key=lambda rank: abs(ahead[rank]))
    spread, limit_seconds = max(ahead) - min(ahead), max(limit_seconds, CLOCK_WARNING_SECONDS)
    names = everyone[worst].host, everyone[0].host
    sentence = f"the clock of {names[0]} is {ahead[worst]:+.1f} s from that of {names[1]}: synchronise them (chrony)"
    if spread > limit_seconds:
        return [Item("clocks", "failed", f"{sentence}; heartbeats allow {limit_seconds:.1f} s")]
    if spread > CLOCK_WARNING_SECONDS:
        return [Item("clocks", "warning", sentence)]
    return [Item("clocks", "passed", f"within {spread:.2f} s")]


def _judge_threads(everyone: Sequence[Facts]) -> list[Item]:
    crowded = {fact.host: fact for fact in everyone if fact.threads > fact.cores}
    if not crowded:
        return [Item("threads", "passed", f"{everyone[0].threads} on {_count(everyone[0].cores, 'core')} a host")]
    return [
        Item(
            "threads",
            "warning",
            f"{host} has {_count(fact.cores, 'core')} for {fact.threads} threads of all its ranks: lower "
            "OMP_NUM_THREADS or --processes",
        )
        for host, fact in crowded.items()
    ]


def judge_disk(run: Path, needs: Needs) -> list[Item]:
    """Room for the checkpoints that the recipe keeps and the one that is being written, those there counted in."""
    folder = _nearest_folder(run)
    free = shutil.disk_usage(folder).free
    sizes = {path.name: _size(path) for path in (run / "checkpoints").glob("*")}
    left_over = sum(size for name, size in sizes.items() if name.startswith("."))  # which the start removes
    room = f"{folder} has {_gib(free)} free"
    if free + left_over < needs.checkpoint_bytes + SPARE_BYTES:
        sentence = f"{room}, but a checkpoint takes {_gib(needs.checkpoint_bytes)} and leaves {_gib(SPARE_BYTES)}"
        return [Item("disk", "failed", f"{sentence}: make room there, or choose another runs_directory")]
    if free + sum(sizes.values()) < needs.planned_bytes + SPARE_BYTES:
        sentence = f"{room}, but the checkpoints that are kept, and the one being written, take"
        advice = "make room, or lower checkpoint.keep_last"
        return [Item("disk", "warning", f"{sentence} {_gib(needs.planned_bytes)}: {advice}")]
    return [Item("disk", "passed", f"{room}, checkpoints take up to {_gib(needs.planned_bytes)}")]


def _nearest_folder(run: Path) -> Path:
    """The run directory, or the folder in which it will be made."""
    return next(folder for folder in (run, *run.parents) if folder.exists())


def _size(folder: Path) -> int:
    """Bytes of a folder's files; 0 for one that another start deletes at this moment."""
    with contextlib.suppress(FileNotFoundError):
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return 0


def judge_memory(everyone: Sequence[Facts], needs: Needs) -> list[Item]:
    """Memory for weights, optimizer states and gradients. What is certain to fail is refused: states that are more than
    there is; activations and what else is needed decide above that."""
    nodes: dict[int, list[Facts]] = {}
    for fact in everyone:
        nodes.setdefault(fact.node, []).append(fact)
    items = []
    for here, ranks in ((facts[0], len(facts)) for facts in nodes.values()):
        total, free = here.memory_bytes, here.available_bytes
        if needs.on_device and here.device_bytes is not None:
            total, free, ranks = here.device_bytes, here.device_bytes, 1
        states, gradients = ranks * needs.rank_state_bytes, ranks * needs.rank_gradient_bytes
        sentence = f"{here.host}: weights and optimizer states of {_count(ranks, 'rank')} take {_gib(states)}"
        if states > total:
            advice = "use more hosts, a higher ZeRO stage, offload or a smaller model"
            items.append(Item("memory", "failed", f"{sentence}, but it has {_gib(total)}: {advice}"))
        elif states + gradients > free:
            sentence += (
                f", gradients {_gib(gradients)} and activations more, and {_gib(free)} of {_gib(total)} are free"
            )
            items.append(Item("memory", "warning", f"{sentence}: a rank may be killed for want of memory"))
    needed, free = needs.rank_state_bytes + needs.rank_gradient_bytes, everyone[0].available_bytes
    summary = f"a rank takes {_gib(needed)} without activations, {everyone[0].host} has {_gib(free)} free"
    return items or [Item("memory", "passed", summary)]


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def write_report(file: Path, items: Sequence[Item], plan: Sequence[str]) -> None:
    """For the launcher: what was looked at, and the lines that a run prints at its start."""
    report = {"items": [dataclasses.asdict(item) for item in items], "plan": list(plan)}
    file.write_text(json.dumps(report), encoding="utf-8")
