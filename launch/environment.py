"""The one place that sets process environment variables, each with its reason.

A variable that the user has set already is never changed.
"""

import contextlib
import os
import platform
import re
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import psutil
import xxhash

MIB = 2**20
LEFTOVER_SECONDS = 24 * 3600.0
LONGEST_BUILD_SECONDS = 3600.0
TORCH_LOG_LEVEL = "TORCH_CPP_LOG_LEVEL"

# glibc returns the large temporary tensors of each step to the kernel and faults their pages in again at the next.
# A 7 M parameter Llama, bf16, 8 x 512 tokens, one thread: 2,369 tokens/s and 870,000 page faults without these
# settings, 2,613 and 329,000 with them; 1 GiB of padding gives 2,626, a 32 MiB threshold 2,557.
MALLOC_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": str(1024 * MIB),  # tensors below 1 GiB come from the heap, not from fresh mappings
    "MALLOC_TRIM_THRESHOLD_": str(4096 * MIB),  # the heap keeps up to 4 GiB of free memory at its end
    "MALLOC_TOP_PAD_": str(64 * MIB),  # and grows by 64 MiB at a time
}


def worker_environment(processes: int) -> dict[str, str]:
    """The variables that the worker processes of this host get in addition to what the user has set.

    They must be set before a worker starts: its allocator and its thread pools read them only then.

    Args:
        processes: worker processes on this host, at least 1.
    """
    settings = {name: value for name, value in _wanted(processes).items() if name not in os.environ}
    return _noted(settings)


def import_torch_quietly() -> None:
    """Import torch so that its C++ code prints errors only: the store by which launchers meet would warn of each host
    that has ended, with a stack trace. torch reads the variable once; the workers do not inherit it."""
    before = os.environ.get(TORCH_LOG_LEVEL)
    os.environ.setdefault(TORCH_LOG_LEVEL, "ERROR")
    import torch  # noqa: F401

    if before is None:
        del os.environ[TORCH_LOG_LEVEL]


def _noted(settings: dict[str, str]) -> dict[str, str]:
    """With the names of all that Trainyard has set so far, for environment.json."""
    from gpt.run_directory import CHOSEN_VARIABLES  # with the recipe's types: `prepare` only asks for cores

    return settings | {CHOSEN_VARIABLES: " ".join([*os.environ.get(CHOSEN_VARIABLES, "").split(), *settings])}


def own_settings(processes: int) -> list[str]:
    """The variables that the user has set otherwise than Trainyard would, as "name=value (Trainyard's: value)"."""
    wanted = _wanted(processes)
    return [
        f"{name}={os.environ[name]} (Trainyard's: {value})"
        for name, value in wanted.items()
        if os.environ.get(name, value) != value
    ]


def _wanted(processes: int) -> dict[str, str]:
    has_cuda = cuda_devices() > 0
    extensions = extensions_directory(has_cuda)
    settings = {
        # one thread per physical core over all workers; torch takes every core for each worker by itself
        "OMP_NUM_THREADS": str(max(1, usable_cores() // processes)),
        # forks of a process that has used the tokenizer's own threads would deadlock or warn
        "TOKENIZERS_PARALLELISM": "false",
        # a host's and a version's own folder: a build for another CPU or torch is never loaded; see own_extensions
        "TORCH_EXTENSIONS_DIR": str(extensions),
        # compiled layers, for the next start: torch's own choice is in /tmp. It names files by their content, renames
        # whole ones into place, and its locks end with the process that holds them
        "TORCHINDUCTOR_CACHE_DIR": str(extensions.with_name(f"{extensions.name}-inductor")),
        # lines reach logs and terminal when they are written, not when a buffer is full
        "PYTHONUNBUFFERED": "1",
    }
    if not has_cuda:
        settings["DS_ACCELERATOR"] = "cpu"  # DeepSpeed guesses by installed packages, not by devices
        settings |= MALLOC_SETTINGS
    return settings


def network_environment(interface: str | None, own_address: str) -> dict[str, str]:
    """The variables that the workers of a run on several hosts get in addition to what the user has set.

    Args:
        interface: the network interface of `own_address`; None: the libraries choose.
        own_address: the one by which the other hosts reach this one.
    """
    name = os.environ.get("SLURMD_NODENAME") or platform.node()
    # hosts may have the same name (containers, two Slurm nodes on one machine), not the same address
    settings = {"TRAINYARD_HOST": f"{name}@{own_address}"}
    if interface is not None:
        # gloo looks its own host's name up, and takes the loopback interface where that fails or says 127.0.1.1
        settings["GLOO_SOCKET_IFNAME"] = interface
        # NCCL takes the first interface that it finds; "=": this one, not all whose names begin so
        settings["NCCL_SOCKET_IFNAME"] = f"={interface}"
    return _noted({variable: value for variable, value in settings.items() if variable not in os.environ})


def cuda_devices() -> int:
    """CUDA devices that this process may use."""
    import torch  # takes a second, and most commands need no torch

    return torch.cuda.device_count()


def usable_cores() -> int:
    """Physical cores of this host that this process may use: its affinity and its control group's quota count."""
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    return max(1, min(cores, _quota_cores(Path("/sys/fs/cgroup/cpu.max"), cores)))


def _quota_cores(cpu_max: Path, default: int) -> int:
    """Whole cores of a version 2 control group's quota ("200000 100000": 2); `default` without one."""
    try:
        quota, period = cpu_max.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return default
    return default if quota == "max" else max(1, int(quota) // int(period))


def cache_directory() -> Path:
    """Where Trainyard keeps what can be made again: TRAINYARD_CACHE, else trainyard in the user's cache directory."""
    if chosen := os.environ.get("TRAINYARD_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "trainyard"


def extensions_directory(has_cuda: bool) -> Path:
    """The folder of compiled extensions for this host, Python, torch, DeepSpeed and kind of device.

    Two installations have one each: the paths of their headers differ, and each would build the other's anew.
    """
    python = f"py{sys.version_info.major}.{sys.version_info.minor}-{xxhash.xxh3_64_hexdigest(sys.prefix.encode())[:8]}"
    libraries = f"torch{version('torch')}-deepspeed{version('deepspeed')}-{'cuda' if has_cuda else 'cpu'}"
    host = re.sub(r"[^A-Za-z0-9._-]", "_", platform.node()) or "unnamed"
    return cache_directory() / "extensions" / host / f"{python}-{libraries}"


@contextlib.contextmanager
def own_extensions(shared: Path) -> Iterator[Path]:
    """A copy of the compiled extensions for one start of a Slurm job on this host; what it builds goes to `shared`.

    torch takes a lock at every start, also where nothing is to be built, and waits for it without end. In one folder a
    job would wait for another job of this user that was suspended, or is killed in a container of its own, meanwhile.
    """
    own = shared.with_name(f"{shared.name}.job{os.environ['SLURM_JOB_ID']}-{os.getpid()}")
    for left in shared.parent.glob(f"{shared.name}.job*"):
        with contextlib.suppress(FileNotFoundError):  # its job ended at this moment
            if time.time() - left.stat().st_mtime > LEFTOVER_SECONDS:  # a kill's; a living job has long loaded its own
                shutil.rmtree(left, ignore_errors=True)
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    shared.mkdir(parents=True, exist_ok=True)
    for extension in _built(shared):
        whole = False
        with contextlib.suppress(OSError):  # shutil.Error is one: a file went away, since it is being built anew
            shutil.copytree(
                extension, own / extension.name
            )  # with times, by which ninja sees that nothing is to be done
            whole = not (extension / "lock").exists()  # else the copy may be half of the one and of the other
        if not whole:
            shutil.rmtree(own / extension.name, ignore_errors=True)
    try:
        yield own
    finally:
        for extension in _built(own):
            with contextlib.suppress(OSError):  # it is there already
                extension.rename(shared / extension.name)
        shutil.rmtree(own, ignore_errors=True)


def _built(folder: Path) -> list[Path]:
    """The extensions of a folder that are whole: whoever builds one holds its lock until then."""
    return [file.parent for file in folder.glob("*/*.so") if not (file.parent / "lock").exists()]


def clear_stale_build_locks(folder: Path) -> list[Path]:
    """Remove build locks that no live process of this host holds; returns the removed ones.

    Raises:
        OSError: one cannot be removed.
    """
    removed = []
    for lock in stale_build_locks(folder):
        try:
            lock.unlink()
        except FileNotFoundError:  # its builder finished meanwhile, or another start removed it
            continue
        except OSError as error:
            raise OSError(
                f"the build lock {lock}, which a killed run left behind, cannot be removed ({error.strerror}), and "
                "every start would wait for it: remove it, or set TRAINYARD_CACHE to a folder of your own"
            ) from error
        removed.append(lock)
    return removed


def stale_build_locks(folder: Path) -> list[Path]:
    """Build locks that no live process holds.

    torch marks a build by the existence of `<extension>/lock`, which the builder keeps open, and waits for its removal
    without end (torch/utils/file_baton.py): a builder that was killed blocks every later start. A lock that a live
    process holds is none: torch waits for it. Where there is no /proc, none is found. In a folder that the user has
    chosen other hosts may build, too: there a lock is stale when it is older than any build.
    """
    own = folder.is_relative_to(cache_directory())
    locks = sorted(folder.glob("*/lock")) if Path("/proc/self/fd").is_dir() else []
    held = set(_open_files()) if locks else set()
    stale = []
    for lock in locks:
        with contextlib.suppress(FileNotFoundError):  # its builder finished meanwhile
            status = lock.stat()
            old = own or time.time() - status.st_mtime > LONGEST_BUILD_SECONDS
            if old and stat.S_ISREG(status.st_mode) and (status.st_dev, status.st_ino) not in held:
                stale.append(lock)
    return stale


def _open_files() -> Iterator[tuple[int, int]]:
    """(device, inode) of every file that a process of this host has open, as far as this user may look."""
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            descriptors = list((process / "fd").iterdir())
        except OSError:  # ended meanwhile, or another user's, which holds no lock in this user's folder
            continue
        for descriptor in descriptors:
            try:
                status = descriptor.stat()
            except OSError:
                continue
            yield status.st_dev, status.st_ino
