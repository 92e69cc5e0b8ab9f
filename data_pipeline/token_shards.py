"""The format ``tokenshard/1``: tokenised documents on disk, written once, checked block by block when read.

A directory holds shards ``u-<unit>-<number>`` and, written last, ``manifest.json``. A shard is these files:

- ``.bin``: the token ids of its documents one after another, without a header: little-endian uint16 (vocabulary up to
  65,536) or uint32;
- ``.docs``: where each document begins, counted in tokens from the start of the shard, little-endian uint32. Starts,
  not lengths: the documents of a window are found by binary search, without reading or summing all;
- ``.mask`` (kind "chat"): one bit a token, lowest bit first, 1 where the assistant produced the token;
- ``.sums``: xxh3-64 of each 8 MiB block of ``.bin``, then of ``.docs``, then of ``.mask``, little-endian uint64.

The manifest has of every file its size, of ``.sums`` the xxh3-64, and its own xxh3-128 with ``CHECKSUM_PLACE`` in the
place of the checksum. A directory without a manifest is not a data set. shard_writer.py writes the format.

A local directory is read through memory maps; one at a URL or on a network file system in blocks through a cache:
remote_blocks.py.
"""

import bisect
import itertools
import json
import mmap
import resource
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import orjson
import xxhash

from data_pipeline.remote_blocks import RemoteFile, RemoteFolder, RemoteOptions, is_on_network, is_url, open_cache

FORMAT_VERSION = "tokenshard/1"
BLOCK_BYTES = 8 * 2**20
SHARD_BYTES = 256 * 2**20
MANIFEST_NAME = "manifest.json"
CHECKSUM_PLACE = "0" * 32
SUFFIXES = ("bin", "docs", "mask")
MOST_OPEN_SHARDS = 2048
REQUESTS_AT_ONCE = 16


def token_dtype(vocabulary_size: int) -> np.dtype:
    """The smallest stored type that holds every id of the vocabulary."""
    return np.dtype("<u2") if vocabulary_size <= 65_536 else np.dtype("<u4")


def sum_bytes(sizes: dict[str, int]) -> int:
    """The size of ``.sums`` for files of these sizes."""
    return sum(8 * -(-size // BLOCK_BYTES) for size in sizes.values())


class _Blocks:
    """Which blocks of a file were compared with their checksums. It outlives the mapping of the file."""

    def __init__(self, path: Path, digests: np.ndarray, data_set: Path) -> None:
        self._path = path
        self._digests = digests
        self._data_set = data_set
        self.unchecked = np.ones(digests.size, dtype=bool)
        self.unchecked_count = digests.size
        self._lock = threading.Lock()

    def check(self, block: int, content: mmap.mmap) -> None:
        """Compare one block of the file's ``content`` with its checksum; ValueError when they differ."""
        begin = block * BLOCK_BYTES
        end = min(begin + BLOCK_BYTES, len(content))
        page = begin - begin % mmap.PAGESIZE
        content.madvise(mmap.MADV_WILLNEED, page, end - page)  # one long read, not a fault every few pages
        actual, expected = xxhash.xxh3_64_intdigest(memoryview(content)[begin:end]), int(self._digests[block])
        if actual != expected:
            raise ValueError(
                f"{self._path}: block {block} (bytes {begin:,} to {end:,}) has the checksum {actual:016x}, but "
                f"{expected:016x} was written: the file is damaged; {rebuild_hint(self._data_set)}"
            )
        with self._lock:  # two threads may verify the same block; it must be counted once
            if self.unchecked[block]:
                self.unchecked[block] = False
                self.unchecked_count -= 1


class _BlockReader:
    """A memory-mapped file whose blocks are compared with their checksums the first time they are touched."""

    def __init__(self, path: Path, blocks: _Blocks, dtype: np.dtype) -> None:
        self._blocks = blocks
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # a plain array: slicing a np.memmap costs several times as much
        self._values = np.frombuffer(self._map, dtype=dtype)
        self.size = self._values.size
        self._items_per_block = BLOCK_BYTES // dtype.itemsize
        self._windows: tuple[int, np.ndarray] | None = None

    def check(self, start: int, stop: int) -> None:
        """Verify the blocks that hold items ``[start, stop)``; ValueError names the first damaged one."""
        if self._blocks.unchecked_count == 0 or stop <= start:
            return
        first, last = start // self._items_per_block, (stop - 1) // self._items_per_block
        for block in np.flatnonzero(self._blocks.unchecked[first : last + 1]) + first:
            self._blocks.check(int(block), self._map)

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Items ``[start, stop)``, checked, a view."""
        self.check(start, stop)
        return self._values[start:stop]

    def windows(self, starts: np.ndarray, width: int) -> np.ndarray:
        """Checked copies ``[n, width]`` of the items from each of ``starts`` on, all inside the file."""
        if self._blocks.unchecked_count:
            for start in starts.tolist():
                self.check(start, start + width)
        cached = self._windows  # another thread may replace it
        if cached is None or cached[0] != width:
            shape, strides = (self.size - width + 1, width), self._values.strides * 2
            # every window of the file as one array without memory of its own, so that one call gathers many
            every = np.lib.stride_tricks.as_strided(self._values, shape, strides, writeable=False)
            cached = self._windows = (width, every)
        return cached[1][starts]


class _OpenShards:
    """Bounds how many shards are mapped at once: half of the least recently used are closed when there are too many.

    A mapping holds a file descriptor, so the bound follows from the process's limit of those.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: weakref.WeakSet[_Shard] = weakref.WeakSet()
        self._clock = itertools.count()

    def add(self, shard: "_Shard") -> None:
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        most = descriptors // (2 * len(SUFFIXES)) if descriptors != resource.RLIM_INFINITY else MOST_OPEN_SHARDS
        with self._lock:
            if len(self._open) >= max(2, min(most, MOST_OPEN_SHARDS)):
                oldest = sorted(self._open, key=lambda other: other.last_use)
                for old in oldest[: len(oldest) // 2]:
                    old.close()
                    self._open.discard(old)
            self._open.add(shard)

    def now(self) -> int:
        return next(self._clock)


_OPEN_SHARDS = _OpenShards()


def rebuild_hint(data_set: Path | str) -> str:
    """What to type to make the data set again, from the report that ``prepare`` left beside it."""
    if isinstance(data_set, str):
        return f"copy the data set to {data_set} again, from where it was prepared"
    output = data_set.parent
    try:
        command = json.loads((output / "report.json").read_text(encoding="utf-8"))["command"]
    except (OSError, ValueError, KeyError):
        command = "trainyard prepare … (the command that made it)"
    return f"delete {output} and rebuild it with: {command}"


class _Shard:
    """The files of one shard, opened and checked as they are needed."""

    def __init__(self, shards: "TokenShards", entry: dict[str, Any], dtype: np.dtype) -> None:
        self._shards = shards
        self._data_set = shards.directory
        self._entry = entry
        self._dtypes = {"bin": dtype, "docs": np.dtype("<u4"), "mask": np.dtype("u1")}
        self._lock = threading.Lock()
        self._blocks: dict[str, _Blocks] = {}
        self._files: dict[str, _BlockReader] | dict[str, RemoteFile] | None = None
        self.last_use = 0

    def file(self, suffix: str) -> _BlockReader | RemoteFile:
        """The reader of one of the files; the first call opens them all."""
        self.last_use = _OPEN_SHARDS.now()
        files = self._files
        if files is None:
            with self._lock:
                files = self._files
                if files is None:
                    files = self._files = self._open()
                    _OPEN_SHARDS.add(self)
        return files[suffix]

    def close(self) -> None:
        """Forget the mappings (a reader in another thread keeps its own until it is done); checked blocks stay so."""
        self._files = None

    @property
    def document_starts(self) -> np.ndarray:
        """uint32 ``[documents]``, checked: where documents begin, in tokens from the start of the shard."""
        reader = self.file("docs")
        return reader.slice(0, reader.size)

    def beginnings(self, begins: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """(row, column) of each document that begins inside the windows of ``width`` tokens, column 0 left out."""
        documents = self.document_starts
        bounds = begins + np.array([[1], [width]])
        if self._entry["tokens"] >= 1 << 32:  # one document may make a shard so large; none begins beyond
            bounds = np.minimum(bounds, (1 << 32) - 1)
        # the search would convert all documents to the type of the bounds
        first, last = documents.searchsorted(bounds.astype(documents.dtype))
        counts = last - first
        rows = np.arange(len(begins)).repeat(counts)
        which = np.arange(rows.size) + (last - counts.cumsum())[rows]
        return rows, documents[which] - begins[rows]

    def check_files(self) -> None:
        """Compare names and sizes with the manifest. FileNotFoundError, ValueError."""
        for suffix, size in [*self._entry["bytes"].items(), ("sums", sum_bytes(self._entry["bytes"]))]:
            found = self._size(suffix)
            if found is not None and found != size:
                raise ValueError(
                    f"{self._path(suffix)} has {found:,} bytes, but the manifest says {size:,}: the file is damaged; "
                    f"{rebuild_hint(self._data_set)}"
                )

    def check_all(self) -> None:
        """Compare names, sizes and every byte with the manifest and checksums; the first damage raises ValueError."""
        self.check_files()
        for suffix in self._entry["bytes"]:
            reader = self.file(suffix)
            if isinstance(reader, RemoteFile):
                for _ in self._shards.requests.map(reader.check, range(reader.blocks)):
                    pass
            else:
                reader.slice(0, reader.size)

    def fetch(self, block: int) -> None:
        """Have a block of tokens at hand, and where documents begin; only of remote shards."""
        tokens = self.file("bin")
        assert isinstance(tokens, RemoteFile)
        tokens.block(block)
        _ = self.document_starts

    def _path(self, suffix: str) -> str:
        return f"{self._data_set}/{self._entry['name']}.{suffix}"

    def _size(self, suffix: str) -> int | None:
        """Bytes of a file, None where a store does not tell."""
        if self._shards.remote is not None:
            return self._shards.remote.size(f"{self._entry['name']}.{suffix}")
        path = Path(self._path(suffix))
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing, but the manifest beside it lists it: {rebuild_hint(self._data_set)}"
            )
        return path.stat().st_size

    def _open(self) -> dict[str, _BlockReader] | dict[str, RemoteFile]:
        remote = self._shards.remote
        if remote is not None:
            cache, data_set = self._shards.cache, self._shards.fingerprint
            files = {}
            for suffix, digests in self._digests(remote.read(f"{self._entry['name']}.sums")).items():
                name, size = f"{self._entry['name']}.{suffix}", self._entry["bytes"][suffix]
                dtype = self._dtypes[suffix]
                files[suffix] = RemoteFile(remote, name, size, digests, dtype, BLOCK_BYTES, cache, data_set)
            return files
        if not self._blocks:
            self.check_files()
            self._blocks = {
                suffix: _Blocks(Path(self._path(suffix)), digests, Path(self._data_set))
                for suffix, digests in self._digests(Path(self._path("sums")).read_bytes()).items()
            }
        return {
            suffix: _BlockReader(Path(self._path(suffix)), blocks, self._dtypes[suffix])
            for suffix, blocks in self._blocks.items()
        }

    def _digests(self, sums: bytes) -> dict[str, np.ndarray]:
        """The checksums of each file's blocks, from the content of ``.sums``."""
        sizes: dict[str, int] = self._entry["bytes"]
        counts = {suffix: -(-sizes[suffix] // BLOCK_BYTES) for suffix in SUFFIXES if suffix in sizes}
        if xxhash.xxh3_64_hexdigest(sums) != self._entry["sums_xxh3_64"]:
            raise ValueError(f"{self._path('sums')} is damaged: {rebuild_hint(self._data_set)}")
        parts = np.split(np.frombuffer(sums, "<u8"), np.cumsum(list(counts.values()))[:-1])
        return dict(zip(counts, parts, strict=True))


class TokenShards:
    """A ``tokenshard/1`` directory, or one at a URL, as one flat stream of tokens over all its shards.

    Threads may share it.

    Attributes:
        tokens, documents: totals.
        kind: "text" or "chat".
        token_bytes: size of a stored token.
        fingerprint: xxh3-128 of the manifest's bytes; equal fingerprints mean equal data.
        special_ids, vocabulary_size, tokenizer_sha256, split: as the writer got them.

    Opening reads the manifest alone, so that it takes the same time for any number of shards; a shard's files are
    opened at first touch, and their blocks checked then. ``check_files`` looks at names and sizes of all.

    Raises:
        FileNotFoundError: no directory or no manifest; later, a file missing.
        ValueError: another version or a damaged manifest; later, a file of the wrong size or a damaged block.
        OSError: what a store does not give; see ``RemoteFolder``.
    """

    def __init__(self, directory: Path | str, options: RemoteOptions | None = None) -> None:
        self.directory: Path | str = Path(directory)
        self.remote: RemoteFolder | None = None
        if is_url(directory) or is_on_network(Path(directory)):
            options = options or RemoteOptions()
            url = str(directory) if is_url(directory) else f"file://{Path(directory).resolve()}"
            self.remote = RemoteFolder(url, options.deadline_seconds)
            self.directory = self.remote.url if is_url(directory) else Path(directory)
            self.cache = open_cache(options.cache_directory, options.cache_bytes)
            self.requests = ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="requests")
        content = self._read_manifest()
        self.fingerprint = xxhash.xxh3_128_hexdigest(content)
        self.manifest = self._parse_manifest(content)
        self.kind: str = self.manifest["kind"]
        self.split: str = self.manifest["split"]
        self.tokens: int = self.manifest["totals"]["tokens"]
        self.documents: int = self.manifest["totals"]["documents"]
        self.vocabulary_size: int = self.manifest["vocabulary_size"]
        self.tokenizer_sha256: str = self.manifest["tokenizer_sha256"]
        self.special_ids: dict[str, int | None] = self.manifest["special_ids"]
        entries = self.manifest["shards"]
        self.shard_bytes: list[int] = [sum(entry["bytes"].values()) for entry in entries]
        self._shard_starts = list(itertools.accumulate((entry["tokens"] for entry in entries), initial=0))
        self._bounds = np.array(self._shard_starts, dtype=np.int64)
        self._dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        self.token_bytes: int = self._dtype.itemsize
        self._opened: dict[int, _Shard] = {}

    def check_files(self) -> None:
        """Compare names and sizes of all files with the manifest, without reading them."""
        shards = [self._shard(index) for index in range(len(self.manifest["shards"]))]
        check = self.requests.map if self.remote is not None else map
        for _ in check(_Shard.check_files, shards):
            pass

    def check_all(self) -> Iterator[int]:
        """Read everything and compare it with the checksums; yields the bytes of each shard when it is done.

        Raises for the first damaged file.
        """
        for index, size in enumerate(self.shard_bytes):
            self._shard(index).check_all()
            yield size

    def document_lengths(self) -> np.ndarray:
        """int64 ``[documents]``: tokens of each document, in order; takes memory and time for all of them."""
        parts = [
            np.diff(self._shard(index).document_starts, append=entry["tokens"]).astype(np.int64)
            for index, entry in enumerate(self.manifest["shards"])
        ]
        return np.concatenate(parts)

    def length_histogram(self) -> list[dict[str, int]]:
        """How many documents have ``from_tokens`` (a power of two) up to twice as many; of all shards, one by one."""
        counts = np.zeros(33, dtype=np.int64)
        for index, entry in enumerate(self.manifest["shards"]):
            lengths = np.diff(self._shard(index).document_starts, append=entry["tokens"])
            counts += np.bincount(np.frexp(lengths)[1] - 1, minlength=33)
        return [{"from_tokens": 2**power, "documents": n} for power, n in enumerate(counts.tolist()) if n]

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens ``[start, start + count)`` of the stream, int64."""
        out = np.empty(count, dtype=np.int64)
        for shard, begin, end, offset in self._pieces(start, count):
            out[offset : offset + end - begin] = self._shard(shard).file("bin").slice(begin, end)
        return out

    def read_windows(self, starts: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Windows of the stream and the documents that begin inside them.

        Args:
            starts: int64 ``[n]``, positions in the stream; no window reaches over its end.
            width: tokens of a window.

        Returns:
            (tokens int64 ``[n, width]``, rows, columns): document beginnings besides those at column 0, int64, ordered
            by column within a row; rows in any order.
        """
        # as unsigned numbers negative ones are the largest, so that one pass finds both kinds of wrong
        if starts.size and int(starts.view(np.uint64).max()) + width > self.tokens:
            self._refuse_range(int(starts.min()), int(starts.max()) + width)
        if self.remote is not None:
            self._fetch(starts, width)
        if len(self._shard_starts) == 2:
            shard = self._shard(0)
            return shard.file("bin").windows(starts, width).astype(np.int64), *shard.beginnings(starts, width)
        out = np.empty((len(starts), width), dtype=np.int64)
        shards = np.searchsorted(self._bounds, starts, side="right") - 1
        inside = starts + width <= self._bounds[shards + 1]
        found = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
        for index in set(shards[inside].tolist()):
            chosen = np.flatnonzero((shards == index) & inside)
            shard, begins = self._shard(index), starts[chosen] - self._shard_starts[index]
            out[chosen] = shard.file("bin").windows(begins, width)
            rows, columns = shard.beginnings(begins, width)
            found.append((chosen[rows], columns))
        for row in np.flatnonzero(~inside).tolist():
            out[row], columns = self._window_over_shards(int(starts[row]), width)
            found.append((np.full(columns.size, row), columns))
        rows, columns = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return out, rows, columns

    def _fetch(self, starts: np.ndarray, width: int) -> None:
        """Have the blocks of windows at hand, many requests at once."""
        items_per_block = BLOCK_BYTES // self._dtype.itemsize
        positions = np.concatenate([starts, starts + width - 1])
        shards = np.searchsorted(self._bounds, positions, side="right") - 1
        blocks = (positions - self._bounds[shards]) // items_per_block
        wanted = sorted(set(zip(shards.tolist(), blocks.tolist(), strict=True)))
        for _ in self.requests.map(lambda which: self._shard(which[0]).fetch(which[1]), wanted):
            pass

    def _window_over_shards(self, start: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, columns > 0 at which documents begin) of a window that does not end in the shard it begins in."""
        columns: list[int] = []
        for shard, begin, end, offset in self._pieces(start, width):
            if offset:
                columns.append(offset)  # a shard begins with a document
            _, inside = self._shard(shard).beginnings(np.array([begin]), end - begin)
            columns += (inside + offset).tolist()
        return self.read(start, width), np.array(columns, dtype=np.int64)

    def read_mask(self, start: int, count: int) -> np.ndarray:
        """The mask of tokens ``[start, start + count)``, bool; only for kind "chat"."""
        out = np.empty(count, dtype=bool)
        for shard, begin, end, offset in self._pieces(start, count):
            first, last = begin // 8, (end + 7) // 8
            bits = np.unpackbits(self._shard(shard).file("mask").slice(first, last), bitorder="little")
            out[offset : offset + end - begin] = bits[begin - first * 8 : end - first * 8]
        return out

    def _shard(self, index: int) -> _Shard:
        shard = self._opened.get(index)
        if shard is None:
            # setdefault: of two threads one must win, so that both see the same checked blocks
            made = _Shard(self, self.manifest["shards"][index], self._dtype)
            shard = self._opened.setdefault(index, made)
        return shard

    def _pieces(self, start: int, count: int) -> list[tuple[int, int, int, int]]:
        """(shard, begin and end within it, offset in the result) of a range of the stream."""
        if start < 0 or count < 0 or start + count > self.tokens:
            self._refuse_range(start, start + count)
        pieces = []
        shard = bisect.bisect_right(self._shard_starts, start) - 1
        offset = 0
        while offset < count:
            begin = start + offset - self._shard_starts[shard]
            end = min(self._shard_starts[shard + 1] - self._shard_starts[shard], begin + count - offset)
            pieces.append((shard, begin, end, offset))
            offset += end - begin
            shard += 1
        return pieces

    def _refuse_range(self, start: int, stop: int) -> NoReturn:
        raise ValueError(f"{self.directory} has {self.tokens:,} tokens: {start:,} to {stop:,} is outside")

    def _read_manifest(self) -> bytes:
        if self.remote is not None and is_url(self.directory):
            return self.remote.read(MANIFEST_NAME)
        directory = Path(self.directory)
        path = directory / MANIFEST_NAME
        if not directory.is_dir():
            raise FileNotFoundError(f"there is no directory {directory}: make the data set with trainyard prepare")
        if not path.is_file():
            inside = [name for name in ("train", "validation") if (directory / name / MANIFEST_NAME).is_file()]
            hint = f"; did you mean {directory / inside[0]}?" if inside else ": make it with trainyard prepare"
            raise FileNotFoundError(f"{directory} is not a prepared data set (it has no {MANIFEST_NAME}){hint}")
        return path.read_bytes()

    def _parse_manifest(self, content: bytes) -> dict[str, Any]:
        path = f"{self.directory}/{MANIFEST_NAME}"
        try:
            manifest = orjson.loads(content)
            version, checksum = manifest["version"], str(manifest["checksum"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is damaged: it is not a manifest; {rebuild_hint(self.directory)}") from None
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path} has the format {version!r}, and this version reads {FORMAT_VERSION!r}: prepare the data again"
            )
        if checksum != xxhash.xxh3_128_hexdigest(content.replace(checksum.encode(), CHECKSUM_PLACE.encode(), 1)):
            raise ValueError(f"{path} was changed after it was written: {rebuild_hint(self.directory)}")
        if manifest["totals"]["tokens"] == 0:
            raise ValueError(f"{self.directory} holds no tokens")
        return manifest
