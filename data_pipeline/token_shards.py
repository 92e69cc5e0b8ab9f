"""The format ``tokenshard/1``: tokenised documents on disk, written once, checked block by block when read.

A directory holds shards ``u-<unit>-<number>`` and, written last, ``manifest.json``. A shard is three files:

- ``.bin``: the token ids of its documents one after another, without a header: little-endian uint16 (vocabulary up to
  65,536) or uint32;
- ``.docs``: the number of tokens of each document, little-endian uint32;
- ``.mask`` (kind "chat"): one bit a token, lowest bit first, 1 where the assistant produced the token.

The manifest has of every file its size and an xxh3-64 of each 8 MiB block. A directory without a manifest is not a
data set.
"""

import bisect
import itertools
import json
import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import xxhash

FORMAT_VERSION = "tokenshard/1"
BLOCK_BYTES = 8 * 2**20
SHARD_BYTES = 256 * 2**20
MANIFEST_NAME = "manifest.json"


def write_file_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` under a temporary name, sync it, rename it to ``path`` and sync the directory."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make the names in ``directory`` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def token_dtype(vocabulary_size: int) -> np.dtype:
    """The smallest stored type that holds every id of the vocabulary."""
    return np.dtype("<u2") if vocabulary_size <= 65_536 else np.dtype("<u4")


class _BlockFile:
    """A file under a temporary name whose blocks are hashed on the way out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self._temporary = path.with_name(path.name + ".tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed by close() or abandon()
        self._digests: list[str] = []
        self._hash = xxhash.xxh3_64()

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while len(view):
            part = view[: BLOCK_BYTES - self.bytes % BLOCK_BYTES]
            self._file.write(part)
            self._hash.update(part)
            self.bytes += len(part)
            view = view[len(part) :]
            if self.bytes % BLOCK_BYTES == 0:
                self._digests.append(self._hash.hexdigest())
                self._hash.reset()

    def close(self) -> dict[str, Any]:
        if self.bytes % BLOCK_BYTES:
            self._digests.append(self._hash.hexdigest())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)
        return {"bytes": self.bytes, "xxh3_64": self._digests}

    def abandon(self) -> None:
        self._file.close()


class ShardWriter:
    """Writes the documents of one split into a directory that it creates. Nothing counts before ``finish``.

    Args:
        directory: must not hold a manifest.
        kind: "text" or "chat"; chat documents carry a mask.
        tokenizer_sha256: fingerprint of the tokenizer that made the ids.
        vocabulary_size: ids are below it.
        special_ids: ids by name; "eos" and "pad" (None where the tokenizer has none).
        split: name of the split, "train" or "validation".
        shard_bytes: a shard is closed when its ``.bin`` has reached this size; documents are never divided between
        shards.
    """

    def __init__(
        self,
        directory: Path,
        *,
        kind: str,
        tokenizer_sha256: str,
        vocabulary_size: int,
        special_ids: dict[str, int | None],
        split: str,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        if kind not in ("text", "chat"):
            raise ValueError(f"the kind of token shards is 'text' or 'chat', not {kind!r}")
        directory.mkdir(parents=True, exist_ok=True)
        if (directory / MANIFEST_NAME).exists():
            raise ValueError(f"{directory} already holds token shards: delete it or choose another directory")
        self.directory = directory
        self.tokens = 0
        self.documents = 0
        self.longest_document_tokens = 0
        self._dtype = token_dtype(vocabulary_size)
        self._vocabulary_size = vocabulary_size
        self._shard_bytes = shard_bytes
        self._header = {
            "version": FORMAT_VERSION,
            "kind": kind,
            "split": split,
            "dtype": self._dtype.name,
            "tokenizer_sha256": tokenizer_sha256,
            "vocabulary_size": vocabulary_size,
            "special_ids": dict(sorted(special_ids.items())),
        }
        self._with_mask = kind == "chat"
        self._shards: list[dict[str, Any]] = []
        self._open: dict[str, _BlockFile] = {}
        self._lengths: list[int] = []
        self._mask_rest = np.zeros(0, dtype=bool)  # bits of the open shard that do not fill a byte yet

    def add_document(self, ids: Sequence[int] | np.ndarray, mask: Sequence[bool] | np.ndarray | None = None) -> None:
        """Append one document: token ids, and for kind "chat" a mask of the same length."""
        tokens = np.asarray(ids, dtype=np.int64)
        if tokens.size == 0:
            raise ValueError("a document without tokens cannot be stored")
        if tokens.size > 0xFFFFFFFF:
            raise ValueError(f"a document of {tokens.size} tokens is longer than the format can store (4,294,967,295)")
        if int(tokens.min()) < 0 or int(tokens.max()) >= self._vocabulary_size:
            raise ValueError(
                f"a document has token ids from {tokens.min()} to {tokens.max()}, outside the vocabulary of "
                f"{self._vocabulary_size}"
            )
        if (mask is not None) != self._with_mask:
            raise ValueError(
                f"documents of kind {self._header['kind']!r} come {'with' if self._with_mask else 'without'} a mask"
            )
        if not self._open:
            self._start_shard()
        self._open["bin"].write(tokens.astype(self._dtype).data.cast("B"))
        if mask is not None:
            self._write_mask(np.asarray(mask, dtype=bool), tokens.size)
        self._lengths.append(tokens.size)
        self.tokens += tokens.size
        self.documents += 1
        self.longest_document_tokens = max(self.longest_document_tokens, tokens.size)
        if self._open["bin"].bytes >= self._shard_bytes:
            self._finish_shard()

    def finish(self, units: list[dict[str, Any]]) -> dict[str, Any]:
        """Close the shards, write the manifest (the commit point) and return it.

        ``units``: of each source file its ``source`` (name, not an absolute path), ``bytes``, ``documents_in`` and
        ``documents_kept``.
        """
        if self._open:
            self._finish_shard()
        sync_directory(self.directory)
        totals = {"documents": self.documents, "tokens": self.tokens}
        manifest = {**self._header, "totals": totals, "shards": self._shards, "units": units}
        manifest["checksum"] = _manifest_checksum(manifest)
        write_file_atomically(self.directory / MANIFEST_NAME, (json.dumps(manifest, indent=1) + "\n").encode())
        return manifest

    def abandon(self) -> None:
        """Close what is open without committing anything."""
        for file in self._open.values():
            file.abandon()
        self._open = {}

    def _start_shard(self) -> None:
        name = f"u-00000-{len(self._shards):03d}"
        suffixes = ("bin", "docs", "mask") if self._with_mask else ("bin", "docs")
        self._open = {suffix: _BlockFile(self.directory / f"{name}.{suffix}") for suffix in suffixes}
        self._lengths = []

    def _finish_shard(self) -> None:
        if self._mask_rest.size:
            self._open["mask"].write(np.packbits(self._mask_rest, bitorder="little").tobytes())
            self._mask_rest = self._mask_rest[:0]
        self._open["docs"].write(np.asarray(self._lengths, dtype="<u4").tobytes())
        files = {suffix: file.close() for suffix, file in self._open.items()}
        name = f"u-00000-{len(self._shards):03d}"
        self._shards.append(
            {"name": name, "documents": len(self._lengths), "tokens": sum(self._lengths), "files": files}
        )
        self._open = {}

    def _write_mask(self, mask: np.ndarray, tokens: int) -> None:
        if mask.size != tokens:
            raise ValueError(f"the mask has {mask.size} entries for {tokens} tokens")
        bits = np.concatenate([self._mask_rest, mask])
        whole = bits.size // 8 * 8
        self._open["mask"].write(np.packbits(bits[:whole], bitorder="little").tobytes())
        self._mask_rest = bits[whole:]


def _manifest_checksum(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


class _BlockReader:
    """A memory-mapped file whose blocks are compared with their checksums the first time they are touched."""

    def __init__(self, path: Path, entry: dict[str, Any], dtype: np.dtype, data_set: Path) -> None:
        self._path = path
        self._digests: list[str] = entry["xxh3_64"]
        self._data_set = data_set
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, but the manifest beside it lists it: {rebuild_hint(data_set)}")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise ValueError(
                f"{path} has {size:,} bytes, but the manifest says {entry['bytes']:,}: the file is damaged; "
                f"{rebuild_hint(data_set)}"
            )
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.values = np.frombuffer(
            self._map, dtype=dtype
        )  # a plain array: slicing a np.memmap costs several times as much
        self._items_per_block = BLOCK_BYTES // dtype.itemsize
        self._unchecked = np.ones(len(self._digests), dtype=bool)
        self._unchecked_count = len(self._digests)
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
        actual = xxhash.xxh3_64_hexdigest(memoryview(self._map)[begin:end])
        if actual != self._digests[block]:
            raise ValueError(
                f"{self._path}: block {block} (bytes {begin:,} to {end:,}) has the checksum {actual}, but the "
                "manifest says "
                f"{self._digests[block]}: the file is damaged; {rebuild_hint(self._data_set)}"
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


class TokenShards:
    """A ``tokenshard/1`` directory as one flat stream of tokens over all its shards. Threads may share it.

    Attributes:
        tokens, documents: totals.
        kind: "text" or "chat".
        fingerprint: xxh3-128 of the manifest's bytes; equal fingerprints mean equal data.
        special_ids, vocabulary_size, tokenizer_sha256, split: as the writer got them.

    Raises:
        FileNotFoundError: no directory, no manifest or a file missing.
        ValueError: another version, a damaged manifest or a file of the wrong size; later, at first touch, a damaged
        block.
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
        shards = self.manifest["shards"]
        self._shard_starts = list(itertools.accumulate((shard["tokens"] for shard in shards), initial=0))
        dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        self._bins = [self._open(shard, "bin", dtype) for shard in shards]
        self._masks = [self._open(shard, "mask", np.dtype("u1")) for shard in shards] if self.kind == "chat" else []
        self._docs = [self._open(shard, "docs", np.dtype("<u4")) for shard in shards]
        self._document_starts: np.ndarray | None = None

    @property
    def document_starts(self) -> np.ndarray:
        """uint64 ``[documents]``: the position in the stream at which each document begins."""
        if self._document_starts is None:
            for reader in self._docs:
                reader.check(0, reader.values.size)
            lengths = np.concatenate([reader.values for reader in self._docs]).astype(np.uint64)
            starts = np.zeros(lengths.size, dtype=np.uint64)
            np.cumsum(lengths[:-1], out=starts[1:])
            self._document_starts = starts
        return self._document_starts

    @property
    def document_lengths(self) -> np.ndarray:
        """int64 ``[documents]``: tokens of each document."""
        return np.diff(self.document_starts.astype(np.int64), append=self.tokens)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens ``[start, start + count)`` of the stream, int64."""
        out = np.empty(count, dtype=np.int64)
        for shard, begin, end, offset in self._pieces(start, count):
            reader = self._bins[shard]
            reader.check(begin, end)
            out[offset : offset + end - begin] = reader.values[begin:end]
        return out

    def read_windows(self, starts: np.ndarray, out: np.ndarray) -> None:
        """Fill each row of ``out`` (int64 ``[n, length]``) with the tokens from ``starts[row]`` (int64 ``[n]``) on."""
        count = out.shape[1]
        if starts.size and (int(starts.min()) < 0 or int(starts.max()) + count > self.tokens):
            self._refuse_range(int(starts.min()), int(starts.max()) + count)
        bounds = np.asarray(self._shard_starts)
        shards = np.searchsorted(bounds, starts, side="right") - 1
        begins = starts - bounds[shards]
        inside = starts + count <= bounds[shards + 1]
        for row, (shard, begin, whole) in enumerate(
            zip(shards.tolist(), begins.tolist(), inside.tolist(), strict=True)
        ):
            if whole:
                reader = self._bins[shard]
                reader.check(begin, begin + count)
                out[row] = reader.values[begin : begin + count]
            else:
                out[row] = self.read(int(starts[row]), count)

    def read_mask(self, start: int, count: int) -> np.ndarray:
        """The mask of tokens ``[start, start + count)``, bool; only for kind "chat"."""
        out = np.empty(count, dtype=bool)
        for shard, begin, end, offset in self._pieces(start, count):
            reader = self._masks[shard]
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
            manifest = json.loads(content)
            version = manifest["version"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is damaged: it is not a manifest; {rebuild_hint(self.directory)}") from None
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path} has the format {version!r}, and this version reads {FORMAT_VERSION!r}: prepare the data again"
            )
        if manifest.get("checksum") != _manifest_checksum(manifest):
            raise ValueError(f"{path} was changed after it was written: {rebuild_hint(self.directory)}")
        if manifest["totals"]["tokens"] == 0:
            raise ValueError(f"{self.directory} holds no tokens")
        return manifest

    def _open(self, shard: dict[str, Any], suffix: str, dtype: np.dtype) -> _BlockReader:
        return _BlockReader(self.directory / f"{shard['name']}.{suffix}", shard["files"][suffix], dtype, self.directory)
