"""Files at any fsspec URL, read in checked blocks through a cache on the node's own disk.

The cache is a folder of files, one a block, named by the data set, file and block: processes of a node share it, and a
kill at any moment leaves at most a file under a temporary name. What is read from it is compared with the checksum that
the data set gives, so that nothing there needs to be trusted.
"""

import errno
import fcntl
import functools
import mmap
import os
import random
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import xxhash
from fsspec.asyn import AsyncFileSystem, sync

ATTEMPT_SECONDS = 60.0
"""How long one request may take: a store that hangs is asked again."""
LONGEST_PAUSE_SECONDS = 10.0
ABANDONED_SECONDS = 3600.0
"""A temporary file of this age was left by a process that was killed."""
SETTINGS_ERRORS = (
    *("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ConfigNotFound", "ConfigParseError"),
    *(
        "ParamValidationError",
        "InvalidRegionError",
        "NoRegionError",
        "InvalidURL",
        "InvalidUrlClientError",
        "ValueError",
    ),
)
"""Names of botocore's (under s3fs), aiohttp's and Python's errors for what no store was asked yet."""
SETTINGS_NUMBERS = (errno.EINVAL, getattr(errno, "EREMCHG", None))
"""What s3fs makes of a store's answers that the request itself is wrong: another region, a malformed signature."""
MOUNTS = "/proc/self/mounts"
"""Of each mount the device, the place and the type."""
NETWORK_TYPES = ("nfs", "nfs4", "lustre", "cifs", "smb3", "ceph", "glusterfs", "gpfs", "beegfs", "afs")
LOCAL_FUSE_TYPES = ("fuseblk", "fusectl", "fuse.fuse-overlayfs", "fuse.lxcfs")
HELD_BLOCKS = 24
"""Blocks that a process keeps open: of 8 lanes the tokens of two and the beginnings of documents. They are mapped, so
that the ranks of a node share the memory; one that is deleted meanwhile keeps its place on the disk until then."""


@dataclass(frozen=True)
class RemoteOptions:
    """How data sets at URLs are read."""

    cache_directory: str | None = None
    """None: `trainyard-blocks-<user id>` in the system's folder for temporary files."""
    cache_bytes: int = 20 * 2**30
    deadline_seconds: float = 300.0


def is_url(place: Path | str) -> bool:
    """Whether a data set is at a URL and not in a directory."""
    return "://" in str(place)


def is_on_network(path: Path) -> bool:
    """Whether a path is on a file system that another host serves, by the type of the longest mount point above it.

    A memory map of such a file ends the process with SIGBUS where a page cannot be had.
    """
    try:
        mounts = [line.split()[1:3] for line in Path(MOUNTS).read_text(encoding="utf-8").splitlines()]
    except OSError:  # not on Linux
        return False
    whole, found, longest = path.resolve(), "", 0
    for place, kind in mounts:
        point = Path(place.replace("\\040", " "))  # as a space is written there
        if len(point.parts) >= longest and whole.is_relative_to(point):  # of equal ones the last is on top
            found, longest = kind, len(point.parts)
    return found in NETWORK_TYPES or (found.startswith("fuse") and found not in LOCAL_FUSE_TYPES)


class RemoteFolder:
    """A file, or the files of one folder, at a URL. What fails is tried again with growing pauses until the deadline.

    Args:
        url: of the folder, or of a file, whose name is then "".
        deadline_seconds: how long is tried.
        advice: what to do when that was in vain.

    Raises:
        FileNotFoundError, PermissionError: the store says so; that is not tried again.
        OSError: the deadline has passed.
        ValueError: no filesystem of fsspec serves the URL, its package is missing, or it is not set up for it.
    """

    def __init__(
        self,
        url: str,
        deadline_seconds: float = RemoteOptions.deadline_seconds,
        advice: str = "or raise data.remote.deadline_seconds; the same command goes on from the last checkpoint",
    ) -> None:
        self.url = url.rstrip("/")
        self._deadline_seconds, self._advice = deadline_seconds, advice
        self._filesystem, self._root = _open_filesystem(self.url)

    def read(self, name: str, begin: int | None = None, end: int | None = None) -> bytes:
        """A whole file, or its bytes ``[begin, end)``; what comes may be shorter or longer."""
        content: bytes = self._ask("cat_file", name, start=begin, end=end)
        return content

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where the store does not tell."""
        size: int | None = self.info(name).get("size")
        return size

    def info(self, name: str) -> dict[str, Any]:
        """What the filesystem tells of a file: `type`, maybe `size`, and more by names of its own."""
        info: dict[str, Any] = self._ask("info", name)
        return info

    def names(self, pattern: str = "") -> list[str]:
        """Sorted, the files under the folder, or those that match a pattern."""
        found = self._ask("glob", pattern) if pattern else self._ask("find", "")
        return sorted(path.removeprefix(self._root).lstrip("/") for path in found)

    def gives_ranges(self) -> bool:
        """Of a file over HTTP: a server that knows no ranges sends the whole of it each time."""
        return bool(self._ask(_status_of_a_range, "") == 206)

    def _ask(self, method: "str | Callable[..., Any]", name: str, **arguments: Any) -> Any:
        began, pause, told = time.monotonic(), 0.1, False
        place, path = (f"{start}/{name}".rstrip("/") for start in (self.url, self._root))
        while True:
            left = self._deadline_seconds - (time.monotonic() - began)
            try:
                return self._call(method, path, max(0.1, min(left, ATTEMPT_SECONDS)), arguments)
            except Exception as raised:  # each filesystem has its own
                error = _cause(raised)
                problem = " ".join(f"{type(error).__name__}: {error}".rstrip(": ").split())
                _refuse_lasting(error, place, problem)
            waited = time.monotonic() - began
            if waited + pause >= self._deadline_seconds:
                raise OSError(
                    f"{place} could not be read for {waited:.0f} seconds ({problem}): see that the store answers, "
                    f"{self._advice}"
                )
            if waited + pause > 2 and not told:  # however the pauses fall, a store that is away for 2 seconds is named
                told = True
                print(
                    f"warning: {place} cannot be read ({problem}): waiting for it, at most "
                    f"{self._deadline_seconds:g} seconds",
                    flush=True,
                )
            time.sleep(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _call(
        self, method: "str | Callable[..., Any]", path: str, timeout_seconds: float, arguments: dict[str, Any]
    ) -> Any:
        if callable(method):
            return sync(self._filesystem.loop, method, self._filesystem, path, timeout=timeout_seconds)
        if isinstance(self._filesystem, AsyncFileSystem):  # what reaches a network; only so can a request be given up
            call = getattr(self._filesystem, f"_{method}")
            return sync(self._filesystem.loop, call, path, timeout=timeout_seconds, **arguments)
        return getattr(self._filesystem, method)(path, **arguments)


def _open_filesystem(url: str) -> tuple[Any, str]:
    try:
        return fsspec.url_to_fs(url)
    except ImportError as error:
        raise ValueError(f"{url} cannot be read: {error} (for s3://: pip install 'trainyard[remote]')") from None
    except ValueError as error:
        raise ValueError(f"{url} cannot be read: {error}") from None


async def _status_of_a_range(filesystem: Any, url: str) -> int:
    session = await filesystem.set_session()
    async with session.get(filesystem.encode_url(url), headers={"Range": "bytes=0-0"}, **filesystem.kwargs) as answer:
        answer.raise_for_status()
        return int(answer.status)


def _cause(error: Exception) -> Exception:
    """Of ``info`` over HTTP fsspec says that there is no such file, whatever went wrong."""
    from aiohttp import ClientError  # takes 0.2 s, and with local data nothing needs it

    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, ClientError | TimeoutError):
        return cause
    return error


def _refuse_lasting(error: Exception, place: str, problem: str) -> None:
    """Raise for what trying again does not change."""
    status = getattr(error, "status", None)  # of aiohttp's errors
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        raise FileNotFoundError(f"{place} does not exist: look at the URL, or copy the data there")
    if isinstance(error, PermissionError) or status in (401, 403):
        raise PermissionError(f"{place} may not be read ({problem}): give the credentials that its filesystem asks for")
    malformed = type(error) is OSError and error.errno in SETTINGS_NUMBERS
    if malformed or type(error).__name__ in SETTINGS_ERRORS:
        raise ValueError(
            f"{place} cannot be asked for ({problem}): look at the URL, and at the credentials, region and endpoint "
            "that its filesystem is set up with"
        )


class BlockCache:
    """Blocks on this node's disk, at most ``most_bytes`` of them; those that were not used for longest go first.

    A cache that cannot be written is passed over with one warning. Any threads and processes may share a directory.
    """

    def __init__(self, directory: Path, most_bytes: int) -> None:
        self._directory = directory
        self._most_bytes = most_bytes
        self._held: OrderedDict[str, np.ndarray] = OrderedDict()
        self._held_lock = threading.Lock()
        self._warned = False

    def get(self, key: str, digest: int, fetch: Callable[[], bytes]) -> np.ndarray:
        """A block as uint8, whose xxh3-64 is ``digest``; ``fetch`` gives it, checked, where it is not at hand."""
        with self._held_lock:
            block = self._held.get(key)
            if block is not None:
                self._held.move_to_end(key)
                return block
        block = self._load(key, digest)
        if block is None:
            with self._lock(key):  # of the ranks of a node one fetches it
                block = self._load(key, digest)
                if block is None:
                    content = fetch()
                    self._store(key, content)
                    block = self._load(key, digest)
                    if block is None:
                        block = np.frombuffer(content, np.uint8)
        with self._held_lock:
            self._held[key] = block
            while len(self._held) > HELD_BLOCKS:
                self._held.popitem(last=False)
        return block

    def _load(self, key: str, digest: int) -> np.ndarray | None:
        path = self._directory / key
        try:
            with open(path, "rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            os.utime(path)  # the age of its last use decides what goes first
        except (OSError, ValueError):  # not there, or empty
            return None
        if xxhash.xxh3_64_intdigest(content) == digest:
            return np.frombuffer(content, np.uint8)
        print(f"warning: the cached block {path} is damaged: it is fetched again", flush=True)
        with suppress(OSError):
            path.unlink()
        return None

    def _store(self, key: str, content: bytes) -> None:
        partial = self._directory / f"{key}.{os.getpid()}.{threading.get_ident()}.tmp"
        try:
            partial.write_bytes(content)
            partial.rename(self._directory / key)
            self._evict()
        except OSError as error:
            self._warn(error)
            with suppress(OSError):
                partial.unlink()

    def _evict(self) -> None:
        """Delete until the rest fits; what another process has open stays readable there."""
        files = []
        for entry in os.scandir(self._directory):
            with suppress(FileNotFoundError):
                stat = entry.stat()
                fresh = entry.name.endswith(".tmp") and time.time() - stat.st_mtime < ABANDONED_SECONDS
                if not fresh and not entry.name.endswith(".lock"):
                    files.append((stat.st_mtime_ns, stat.st_size, entry.path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._most_bytes:
                break
            Path(path).unlink(missing_ok=True)
            total -= size

    @contextmanager
    def _lock(self, key: str) -> Iterator[None]:
        """One of 256 locks; the system takes it back from a process that is killed."""
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = open(self._directory / f"{key[:2]}.lock", "ab")  # noqa: SIM115
        except OSError as error:
            self._warn(error)
            yield
            return
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            print(
                f"warning: the cache {self._directory} cannot be written ({error.strerror}): blocks are fetched again "
                "whenever they are needed; make room there, or choose another data.remote.cache_directory",
                flush=True,
            )


@functools.cache
def open_cache(directory: str | None, most_bytes: int) -> BlockCache:
    """The cache in a directory, one object for all data sets of this process."""
    default = Path(tempfile.gettempdir()) / f"trainyard-blocks-{os.getuid()}"
    return BlockCache(default if directory is None else Path(directory), most_bytes)


class RemoteFile:
    """One file of a shard, as ``token_shards._BlockReader`` reads a local one.

    Args:
        folder, name: where it is.
        size_bytes: what the manifest says.
        digests: xxh3-64 of each block of ``block_bytes``.
        data_set: fingerprint of the data set, which names the blocks in the cache.
    """

    def __init__(
        self,
        folder: RemoteFolder,
        name: str,
        size_bytes: int,
        digests: np.ndarray,
        dtype: np.dtype,
        block_bytes: int,
        cache: BlockCache,
        data_set: str,
    ) -> None:
        self.size = size_bytes // dtype.itemsize
        self._folder, self._name, self._size_bytes = folder, name, size_bytes
        self._digests, self._dtype, self._block_bytes = digests, dtype, block_bytes
        self._cache, self._data_set = cache, data_set
        self.items_per_block = block_bytes // dtype.itemsize
        self.blocks: int = digests.size

    def block(self, index: int) -> np.ndarray:
        """All items of one block, checked."""
        key = xxhash.xxh3_128_hexdigest(f"{self._data_set}/{self._name}/{index}".encode())
        digest = int(self._digests[index])
        return self._cache.get(key, digest, lambda: self._fetch(index, digest)).view(self._dtype)

    def check(self, index: int) -> None:
        """Fetch one block and compare it, whatever the cache has of it; ValueError where it is damaged."""
        self._fetch(index, int(self._digests[index]))

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Items ``[start, stop)``, checked; a view where they are of one block."""
        if stop <= start:
            return np.empty(0, self._dtype)
        first, last = start // self.items_per_block, (stop - 1) // self.items_per_block
        parts = [self.block(index) for index in range(first, last + 1)]
        items = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return items[start - first * self.items_per_block : stop - first * self.items_per_block]

    def windows(self, starts: np.ndarray, width: int) -> np.ndarray:
        """Checked copies ``[n, width]`` of the items from each of ``starts`` on, all inside the file."""
        out = np.empty((starts.size, width), self._dtype)
        block_of = starts // self.items_per_block
        inside = (starts + width - 1) // self.items_per_block == block_of
        for index in set(block_of[inside].tolist()):
            chosen = np.flatnonzero((block_of == index) & inside)
            every = np.lib.stride_tricks.sliding_window_view(self.block(index), width)
            out[chosen] = every[starts[chosen] - index * self.items_per_block]
        for row in np.flatnonzero(~inside).tolist():
            out[row] = self.slice(int(starts[row]), int(starts[row]) + width)
        return out

    def _fetch(self, index: int, digest: int) -> bytes:
        begin = index * self._block_bytes
        end = min(begin + self._block_bytes, self._size_bytes)
        for _ in range(2):  # a byte may be lost on the way; what is damaged there comes damaged again
            content = self._folder.read(self._name, begin, end)
            actual = xxhash.xxh3_64_intdigest(content)
            if len(content) == end - begin and actual == digest:
                return content
        found = f"{len(content):,} bytes came" if len(content) != end - begin else f"its checksum is {actual:016x}"
        raise ValueError(
            f"{self._folder.url}/{self._name}: block {index} (bytes {begin:,} to {end:,}, checksum {digest:016x}) was "
            f"read twice, and {found}: the file there is damaged; copy the data set there again"
        )
