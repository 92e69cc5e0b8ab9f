"""Process environment: threads, allocator, build folder, stale build locks."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from gpt.run_directory import CHOSEN_VARIABLES, describe_environment
from launch import environment
from launch.environment import clear_stale_build_locks, own_extensions, worker_environment

VARIABLES = (
    "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "TORCH_EXTENSIONS_DIR", "DS_ACCELERATOR", "TRAINYARD_CACHE",
    "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "PYTHONUNBUFFERED",
    "TORCHINDUCTOR_CACHE_DIR",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_set_by_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("cores", "processes", "threads"), [(8, 2, "4"), (8, 3, "2"), (2, 2, "1"), (2, 5, "1")])
def test_threads_of_all_workers_fill_the_physical_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, processes: int, threads: str
) -> None:
    monkeypatch.setattr(environment, "usable_cores", lambda: cores)
    assert worker_environment(processes)["OMP_NUM_THREADS"] == threads


def test_cores_are_those_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(12)))
    monkeypatch.setattr(environment, "_quota_cores", lambda path, default: default)
    assert environment.usable_cores() == 12


@pytest.mark.parametrize(
    ("content", "cores"), [("max 100000\n", 7), ("250000 100000\n", 2), ("50000 100000", 1), ("", 7)]
)
def test_control_group_quota(tmp_path: Path, content: str, cores: int) -> None:
    (tmp_path / "cpu.max").write_text(content)
    assert environment._quota_cores(tmp_path / "cpu.max", 7) == cores
    assert environment._quota_cores(tmp_path / "absent", 7) == 7


def test_the_users_own_setting_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    settings = worker_environment(1)
    assert "OMP_NUM_THREADS" not in settings
    assert "MALLOC_TOP_PAD_" not in settings
    assert "MALLOC_TRIM_THRESHOLD_" in settings
    assert environment.own_settings(1)[0].startswith("OMP_NUM_THREADS=3 (Trainyard's: ")
    assert settings[CHOSEN_VARIABLES].split() == [name for name in settings if name != CHOSEN_VARIABLES]
    monkeypatch.setenv(CHOSEN_VARIABLES, settings[CHOSEN_VARIABLES])
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", settings["MALLOC_TRIM_THRESHOLD_"])
    shown = describe_environment(world_size=1)["variables"]
    assert (shown["set_outside"]["OMP_NUM_THREADS"], shown["set_outside"]["MALLOC_TOP_PAD_"]) == ("3", "1")
    assert list(shown["chosen_by_trainyard"]) == ["MALLOC_TRIM_THRESHOLD_"]


def test_compiled_layers_outlive_a_start_beside_the_extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINYARD_CACHE", str(tmp_path))
    settings = worker_environment(1)
    extensions, layers = (Path(settings[name]) for name in ("TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR"))
    # not inside: their locks and files are not those of extensions, which a Slurm job copies
    assert layers.parent == extensions.parent and layers.is_relative_to(tmp_path) and layers != extensions
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    assert "TORCHINDUCTOR_CACHE_DIR" not in worker_environment(1)


def test_hosts_of_a_run_use_the_interface_of_their_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRAINYARD_HOST", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "SLURMD_NODENAME"):
        monkeypatch.delenv(name, raising=False)
    settings = environment.network_environment("eth7", "10.0.0.7")
    assert settings == {
        "TRAINYARD_HOST": f"{platform.node()}@10.0.0.7",
        "GLOO_SOCKET_IFNAME": "eth7",
        "NCCL_SOCKET_IFNAME": "=eth7",
        CHOSEN_VARIABLES: "TRAINYARD_HOST GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME",
    }
    monkeypatch.setenv(CHOSEN_VARIABLES, settings[CHOSEN_VARIABLES])
    assert worker_environment(1)[CHOSEN_VARIABLES].startswith(settings[CHOSEN_VARIABLES] + " ")
    monkeypatch.delenv(CHOSEN_VARIABLES)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    settings = environment.network_environment("eth7", "10.0.0.7")
    assert settings == {
        "TRAINYARD_HOST": "n2@10.0.0.7",
        "NCCL_SOCKET_IFNAME": "=eth7",
        CHOSEN_VARIABLES: "TRAINYARD_HOST NCCL_SOCKET_IFNAME",
    }
    assert "NCCL_SOCKET_IFNAME" not in environment.network_environment(None, "10.0.0.7")


def test_a_host_with_gpus_keeps_glibcs_allocator_and_deepspeeds_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "cuda_devices", lambda: 8)
    settings = worker_environment(8)
    assert "DS_ACCELERATOR" not in settings
    assert not [name for name in settings if name.startswith("MALLOC")]
    assert settings["TORCH_EXTENSIONS_DIR"].endswith("-cuda")


def test_build_folder_is_one_per_host_and_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRAINYARD_CACHE", str(tmp_path))
    monkeypatch.setattr("platform.node", lambda: "node/one")
    monkeypatch.setattr(environment, "version", lambda name: {"torch": "2.13.0+cpu", "deepspeed": "0.19.8"}[name])
    folder = environment.extensions_directory(has_cuda=False)
    assert folder.parent == tmp_path / "extensions" / "node_one"
    assert folder.name.endswith("-torch2.13.0+cpu-deepspeed0.19.8-cpu")


def test_cache_is_below_the_users_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert environment.cache_directory() == tmp_path / "trainyard"


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has taken torch's build lock, as a builder does, and keeps it."""
    code = (
        "import sys, time; from torch.utils.file_baton import FileBaton; "
        "print(FileBaton(sys.argv[1]).try_acquire(), flush=True) or time.sleep(60)"
    )
    (tmp_path / "held").mkdir()
    code = code.replace("FileBaton(sys.argv[1]).try_acquire()", "(b := FileBaton(sys.argv[1])).try_acquire()")
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "held" / "lock")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "True"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_only_locks_without_a_living_holder_are_removed(
    tmp_path: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stale, held = tmp_path / "stale" / "lock", tmp_path / "held" / "lock"
    stale.parent.mkdir()
    stale.touch()
    assert not FileBaton(str(stale)).try_acquire()  # torch would now wait without end
    monkeypatch.setenv("TRAINYARD_CACHE", str(tmp_path / "cache"))
    assert clear_stale_build_locks(tmp_path) == [], "another host may build in a user's own folder"
    os.utime(stale, (1e9, 1e9))
    assert clear_stale_build_locks(tmp_path) == [stale]
    stale.touch()
    monkeypatch.setenv("TRAINYARD_CACHE", str(tmp_path))

    assert clear_stale_build_locks(tmp_path) == [stale]
    assert held.exists()
    assert not FileBaton(str(held)).try_acquire()
    baton = FileBaton(str(stale))
    assert baton.try_acquire()
    baton.release()

    holder.kill()
    holder.wait()
    assert held.exists()
    assert clear_stale_build_locks(tmp_path) == [held]


def test_a_folder_that_does_not_exist_yet_has_no_locks(tmp_path: Path) -> None:
    assert clear_stale_build_locks(tmp_path / "absent") == []


def test_an_extension_that_is_built_anew_meanwhile_is_not_copied(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    (tmp_path / "build" / "op").mkdir(parents=True)
    (tmp_path / "build" / "op" / "op.so").touch()
    copytree = shutil.copytree

    def copy_and_lose(source: Path, target: Path) -> None:
        (source / "gone").symlink_to("nowhere")
        copytree(source, target)

    monkeypatch.setattr(shutil, "copytree", copy_and_lose)
    with own_extensions(tmp_path / "build") as own:
        assert list(own.iterdir()) == []


def test_launchers_are_quiet_about_hosts_that_have_ended_and_workers_are_not() -> None:
    code = """
import os
from launch.environment import import_torch_quietly
import_torch_quietly()
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
pid = os.fork()
if not pid:
    client = TCPStore("127.0.0.1", store.port, is_master=False)
    os.kill(os.getppid(), 9)
    try:
        client.wait(["a"])
    except RuntimeError as error:
        print("ended:", error, "TORCH_CPP_LOG_LEVEL" in os.environ, flush=True)
    os._exit(0)
os.wait()
"""
    variables = {name: value for name, value in os.environ.items() if name != "TORCH_CPP_LOG_LEVEL"}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("ended: ") and done.stdout.endswith(" False\n"), done.stdout
    assert done.stderr == ""


def test_a_jobs_own_extensions_are_a_copy_and_what_it_builds_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    shared = tmp_path / "build"
    for name in ("warm", "under_way"):
        (shared / name).mkdir(parents=True)
        (shared / name / f"{name}.so").write_bytes(name.encode())
    os.utime(shared / "warm" / "warm.so", (1e9, 1e9))
    assert FileBaton(str(shared / "under_way" / "lock")).try_acquire()
    left, young = tmp_path / "build.job7-1", tmp_path / "build.job8-1"
    left.mkdir()
    young.mkdir()
    os.utime(left, (1e9, 1e9))

    with own_extensions(shared) as own:
        assert own.parent == tmp_path and own.name.startswith("build.job12-") and not left.exists()
        assert sorted(file.name for file in own.rglob("*")) == ["warm", "warm.so"]
        assert (own / "warm" / "warm.so").stat().st_mtime == 1e9, "ninja would build it again"
        assert FileBaton(str(own / "warm" / "lock")).try_acquire(), "another job does not see it"
        assert not (shared / "warm" / "lock").exists()
        for name in ("new", "half"):
            (own / name).mkdir()
            (own / name / f"{name}.so").write_bytes(b"")
        (own / "half" / "lock").touch()
    assert sorted(file.name for file in shared.iterdir()) == ["new", "under_way", "warm"]
    assert (shared / "warm" / "warm.so").read_bytes() == b"warm"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["build", "build.job8-1"]
