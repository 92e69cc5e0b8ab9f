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
"""

import bisect
import itertools
import json
import mmap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import orjson
import xxhash

FORMAT_VERSION = "tokenshard/1"
BLOCK_BYTES = 8 * 2**20
SHARD_BYTES = 256 * 2**20
MANIFEST_NAME = "manifest.json"
CHECKSUM_PLACE = "0" * 32
SUFFIXES = ("bin", "docs", "mask")


def token_dtype(vocabulary_size: int) -> np.dtype:
    """The smallest stored type that holds every id of the vocabulary."""
    return np.dtype("<u2") if vocabulary_size <= 65_536 else np.dtype("<u4")


class _BlockReader:
    """A memory-mapped file whose blocks are compared with their checksums the first time they are touched."""

    def __init__(self, path: Path, digests: np.ndarray, dtype: np.dtype, data_set: Path) -> None:
        self._path = path
        self._digests = digests
        self._data_set = data_set
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.values = np.frombuffer(
            self._map, dtype=dtype
        )  # a plain array: slicing a np.memmap costs several times as much
        self._items_per_block = BLOCK_BYTES // dtype.itemsize
        self._unchecked = np.ones(digests.size, dtype=bool)
        self._unchecked_count = digests.size
        self._lock = threading.Lock()

    def check(self, start: int, stop: int) -> None:
        """Verify the blocks that hold items ``[start, stop)``; ValueError names the first damaged one."""
        if self._unchecked_count == 0 or stop <= start:
            return
        first, last = start // self._items_per_block, (stop - 1) // self._items_per_block
        for block in np.flatnonzero(self._unchecked[first : last + 1]) + first:
            self._check_block(int(block))

    def _check_block(self, block: int) -> None:
        begin = block * BLOCK_BYTES
        end = min(begin + BLOCK_BYTES, len(self._map))
        actual, expected = xxhash.xxh3_64_intdigest(memoryview(self._map)[begin:end]), int(self._digests[block])
        if actual != expected:
            raise ValueError(
                f"{self._path}: block {block} (bytes {begin:,} to {end:,}) has the checksum {actual:016x}, but "
                f"{expected:016x} was written: the file is damaged; {rebuild_hint(self._data_set)}"
            )
        with self._lock:  # two threads may verify the same block; it must be counted once
            if self._unchecked[block]:
                self._unchecked[block] = False
                self._unchecked_count -= 1


def rebuild_hint(data_set: Path) -> str:
    """What to type to make the data set again, from the report that ``prepare`` left beside it."""
    output = data_set.parent
    try:
        command = json.loads((output / "report.json").read_text(encoding="utf-8"))["command"]
    except (OSError, ValueError, KeyError):
        command = "trainyard prepare … (the command that made it)"
    return f"delete {output} and rebuild it with: {command}"


class _Shard:
    """The files of one shard, opened and checked as they are needed."""

    def __init__(self, data_set: Path, entry: dict[str, Any], dtype: np.dtype) -> None:
        self._data_set = data_set
        self._entry = entry
        self._dtype = dtype
        self._lock = threading.Lock()
        self._files: dict[str, _BlockReader] | None = None
        self._docs: np.ndarray | None = None

    def file(self, suffix: str) -> _BlockReader:
        """The reader of one of the files; the first call opens them all."""
        if self._files is None:
            with self._lock:
                if self._files is None:
                    self._files = self._open()
        return self._files[suffix]

    @property
    def document_starts(self) -> np.ndarray:
        """uint32 ``[documents]``, checked: where documents begin, in tokens from the start of the shard."""
        if self._docs is None:
            reader = self.file("docs")
            reader.check(0, reader.values.size)
            self._docs = reader.values
        return self._docs

    def check_files(self) -> None:
        """Compare names and sizes with the manifest. FileNotFoundError, ValueError."""
        for suffix, size in self._entry["bytes"].items():
            path = self._path(suffix)
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path} is missing, but the manifest beside it lists it: {rebuild_hint(self._data_set)}"
                )
            if path.stat().st_size != size:
                raise ValueError(
                    f"{path} has {path.stat().st_size:,} bytes, but the manifest says {size:,}: the file is damaged; "
                    f"{rebuild_hint(self._data_set)}"
                )
        sums = self._path("sums")
        if not sums.is_file():
            raise FileNotFoundError(f"{sums} is missing: {rebuild_hint(self._data_set)}")

    def check_all(self) -> None:
        """Read every byte and compare it with the checksums; the first damaged block raises ValueError."""
        for suffix in self._entry["bytes"]:
            reader = self.file(suffix)
            reader.check(0, reader.values.size)

    def _path(self, suffix: str) -> Path:
        return self._data_set / f"{self._entry['name']}.{suffix}"

    def _open(self) -> dict[str, _BlockReader]:
        self.check_files()
        sums = self._path("sums").read_bytes()
        sizes: dict[str, int] = self._entry["bytes"]
        blocks = {suffix: -(-sizes[suffix] // BLOCK_BYTES) for suffix in SUFFIXES if suffix in sizes}
        damaged = xxhash.xxh3_64_hexdigest(sums) != self._entry["sums_xxh3_64"]
        if damaged or len(sums) != 8 * sum(blocks.values()):
            raise ValueError(f"{self._path('sums')} is damaged: {rebuild_hint(self._data_set)}")
        bounds = np.cumsum(list(blocks.values()))[:-1]
        digests = dict(zip(blocks, np.split(np.frombuffer(sums, "<u8"), bounds), strict=True))
        dtypes = {"bin": self._dtype, "docs": np.dtype("<u4"), "mask": np.dtype("u1")}
        return {
            suffix: _BlockReader(self._path(suffix), digests[suffix], dtypes[suffix], self._data_set)
            for suffix in blocks
        }


class TokenShards:
    """A ``tokenshard/1`` directory as one flat stream of tokens over all its shards. Threads may share it.

    Attributes:
        tokens, documents: totals.
        kind: "text" or "chat".
        fingerprint: xxh3-128 of the manifest's bytes; equal fingerprints mean equal data.
        special_ids, vocabulary_size, tokenizer_sha256, split: as the writer got them.

    Opening reads the manifest alone, so that it takes the same time for any number of shards; a shard's files are
    opened at first touch, and their blocks checked then. ``check_files`` looks at names and sizes of all.

    Raises:
        FileNotFoundError: no directory or no manifest; later, a file missing.
        ValueError: another version or a damaged manifest; later, a file of the wrong size or a damaged block.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
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
        self._shard_starts = list(itertools.accumulate((entry["tokens"] for entry in entries), initial=0))
        self._bounds = np.array(self._shard_starts, dtype=np.int64)
        dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        self._shards = [_Shard(self.directory, entry, dtype) for entry in entries]

    def check_files(self) -> None:
        """Compare names and sizes of all files with the manifest, without reading them."""
        for shard in self._shards:
            shard.check_files()

    def check_all(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read everything and compare it with the checksums. Raises for the first damaged file.

        ``progress`` is called with (bytes done, bytes in all).
        """
        sizes = [sum(entry["bytes"].values()) for entry in self.manifest["shards"]]
        for done, shard in zip(itertools.accumulate(sizes), self._shards, strict=True):
            shard.check_all()
            if progress is not None:
                progress(done, sum(sizes))

    def document_lengths(self) -> np.ndarray:
        """int64 ``[documents]``: tokens of each document, in order; takes memory and time for all of them."""
        tokens = (entry["tokens"] for entry in self.manifest["shards"])
        parts = [
            np.diff(shard.document_starts, append=np.uint32(count))
            for shard, count in zip(self._shards, tokens, strict=True)
        ]
        return np.concatenate(parts).astype(np.int64)

    def document_beginnings(self, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """(row, column) of each document that begins inside a window ``[start, start + length)``, column 0 left out.

        Args:
            starts: int64 ``[n]``, positions in the stream; a window may reach over the stream's end.
            length: tokens of a window.

        Returns:
            int64 arrays, ordered by row and column.
        """
        rows: list[np.ndarray] = []
        columns: list[np.ndarray] = []
        for row, start in enumerate(starts.tolist()):
            for shard, begin, end, offset in self._pieces(start, min(length, self.tokens - start)):
                documents = self._shards[shard].document_starts
                first, last = np.searchsorted(documents, (begin, end))
                if first < last and documents[first] == begin and offset == 0:
                    first += 1
                if first < last:
                    columns.append(documents[first:last].astype(np.int64) + (offset - begin))
                    rows.append(np.full(last - first, row))
        if not rows:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        return np.concatenate(rows), np.concatenate(columns)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens ``[start, start + count)`` of the stream, int64."""
        out = np.empty(count, dtype=np.int64)
        for shard, begin, end, offset in self._pieces(start, count):
            reader = self._shards[shard].file("bin")
            reader.check(begin, end)
            out[offset : offset + end - begin] = reader.values[begin:end]
        return out

    def read_windows(self, starts: np.ndarray, out: np.ndarray) -> None:
        """Fill each row of ``out`` (int64 ``[n, length]``) with the tokens from ``starts[row]`` (int64 ``[n]``) on."""
        count = out.shape[1]
        if starts.size and (int(starts.min()) < 0 or int(starts.max()) + count > self.tokens):
            self._refuse_range(int(starts.min()), int(starts.max()) + count)
        shards = np.searchsorted(self._bounds, starts, side="right") - 1
        begins = starts - self._bounds[shards]
        inside = starts + count <= self._bounds[shards + 1]
        for row, (shard, begin, whole) in enumerate(
            zip(shards.tolist(), begins.tolist(), inside.tolist(), strict=True)
        ):
            if whole:
                reader = self._shards[shard].file("bin")
                reader.check(begin, begin + count)
                out[row] = reader.values[begin : begin + count]
            else:
                out[row] = self.read(int(starts[row]), count)

    def read_mask(self, start: int, count: int) -> np.ndarray:
        """The mask of tokens ``[start, start + count)``, bool; only for kind "chat"."""
        out = np.empty(count, dtype=bool)
        for shard, begin, end, offset in self._pieces(start, count):
            reader = self._shards[shard].file("mask")
            first, last = begin // 8, (end + 7) // 8
            reader.check(first, last)
            bits = np.unpackbits(reader.values[first:last], bitorder="little")
            out[offset : offset + end - begin] = bits[begin - first * 8 : end - first * 8]
        return out

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
        path = self.directory / MANIFEST_NAME
        if not self.directory.is_dir():
            raise FileNotFoundError(f"there is no directory {self.directory}: make the data set with trainyard prepare")
        if not path.is_file():
            inside = [name for name in ("train", "validation") if (self.directory / name / MANIFEST_NAME).is_file()]
            hint = f"; did you mean {self.directory / inside[0]}?" if inside else ": make it with trainyard prepare"
            raise FileNotFoundError(f"{self.directory} is not a prepared data set (it has no {MANIFEST_NAME}){hint}")
        return path.read_bytes()

    def _parse_manifest(self, content: bytes) -> dict[str, Any]:
        path = self.directory / MANIFEST_NAME
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
