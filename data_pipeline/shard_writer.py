"""Writes the format ``tokenshard/1`` (see token_shards.py): units by any number of workers, the manifest last."""

import contextlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_pipeline.token_shards import (
    BLOCK_BYTES,
    CHECKSUM_PLACE,
    FORMAT_VERSION,
    MANIFEST_NAME,
    SHARD_BYTES,
    token_dtype,
)


def write_file_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` under a temporary name, sync it, rename it to ``path`` and sync the directory."""
    temporary = _temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make the names in ``directory`` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary_name(path: Path) -> Path:
    # random, because a unit that was given out again may be written twice at a time; both then write the same bytes
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")


class _BlockFile:
    """A file under a temporary name whose blocks are hashed on the way out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self.digests: list[int] = []
        self._temporary = _temporary_name(path)
        self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed by close() or abandon()
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
                self.digests.append(self._hash.intdigest())
                self._hash.reset()

    def close(self) -> None:
        if self.bytes % BLOCK_BYTES:
            self.digests.append(self._hash.intdigest())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # on a full disk the rest of the buffer cannot be written
            self._file.close()
        self._temporary.unlink(missing_ok=True)


class UnitWriter:
    """Writes the documents of one work unit and split as shards ``u-<unit>-<number>``; they count once a manifest
    lists them.

    The bytes depend on the documents alone, not on how they were divided between calls.

    A shard is closed when its ``.bin`` has reached ``shard_bytes``; documents are never divided between shards.
    ``tokens``, ``documents`` and ``longest_document_tokens`` count what was added.
    """

    def __init__(
        self, directory: Path, *, kind: str, vocabulary_size: int, unit: int = 0, shard_bytes: int = SHARD_BYTES
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.tokens = 0
        self.documents = 0
        self.longest_document_tokens = 0
        self._dtype = token_dtype(vocabulary_size)
        self._vocabulary_size = vocabulary_size
        self._unit = unit
        self._shard_tokens = -(-shard_bytes // self._dtype.itemsize)
        self._kind = kind
        self._shards: list[dict[str, Any]] = []
        self._open: dict[str, _BlockFile] = {}
        self._lengths: list[np.ndarray] = []  # of the open shard's documents
        self._in_shard = 0  # tokens of the open shard
        self._mask_rest = np.zeros(0, dtype=bool)  # bits of the open shard that do not fill a byte yet

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Append documents: their ids one after another (integers), the tokens of each, and for kind "chat" a mask.

        Raises:
            ValueError: an empty or too long document, ids outside the vocabulary, a mask that is missing, not wanted
                or of another length.
        """
        self._check(tokens, lengths, mask)
        ends = np.cumsum(lengths)
        first, begin = 0, 0
        while first < lengths.size:
            if not self._open:
                self._start_shard()
            # up to and with the document that fills the shard
            last = int(np.searchsorted(ends, begin + self._shard_tokens - self._in_shard)) + 1
            last = min(last, lengths.size)
            end = int(ends[last - 1])
            self._open["bin"].write(tokens[begin:end].astype(self._dtype).data.cast("B"))
            if mask is not None:
                self._write_mask(mask[begin:end])
            self._lengths.append(lengths[first:last])
            self._in_shard += end - begin
            if self._in_shard >= self._shard_tokens:
                self._finish_shard()
            first, begin = last, end
        self.tokens += int(tokens.size)
        self.documents += int(lengths.size)
        self.longest_document_tokens = max(self.longest_document_tokens, int(lengths.max(initial=0)))

    def finish(self) -> list[dict[str, Any]]:
        """Close the shards, make them durable and return their entries for the manifest."""
        if self._open:
            self._finish_shard()
        sync_directory(self.directory)
        return self._shards

    def abandon(self) -> None:
        """Close and remove what is open."""
        for file in self._open.values():
            file.abandon()
        self._open = {}

    def _check(self, tokens: np.ndarray, lengths: np.ndarray, mask: np.ndarray | None) -> None:
        if (mask is not None) != (self._kind == "chat"):
            raise ValueError(
                f"documents of kind {self._kind!r} come {'with' if self._kind == 'chat' else 'without'} a mask"
            )
        if mask is not None and mask.size != tokens.size:
            raise ValueError(f"the mask has {mask.size} entries for {tokens.size} tokens")
        if lengths.size and int(lengths.min()) < 1:
            raise ValueError("a document without tokens cannot be stored")
        if lengths.size and int(lengths.max()) > 0xFFFFFFFF:
            raise ValueError(
                f"a document of {lengths.max()} tokens is longer than the format can store (4,294,967,295)"
            )
        assert int(lengths.sum()) == tokens.size, "the lengths do not add up to the tokens"
        if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) >= self._vocabulary_size):
            raise ValueError(
                f"a document has token ids from {tokens.min()} to {tokens.max()}, outside the vocabulary of "
                f"{self._vocabulary_size}"
            )

    def _name(self) -> str:
        return f"u-{self._unit:05d}-{len(self._shards):03d}"

    def _start_shard(self) -> None:
        suffixes = ("bin", "docs", "mask") if self._kind == "chat" else ("bin", "docs")
        self._open = {suffix: _BlockFile(self.directory / f"{self._name()}.{suffix}") for suffix in suffixes}
        self._lengths, self._in_shard = [], 0

    def _finish_shard(self) -> None:
        if self._mask_rest.size:
            self._open["mask"].write(np.packbits(self._mask_rest, bitorder="little").tobytes())
            self._mask_rest = self._mask_rest[:0]
        lengths = np.concatenate(self._lengths)
        starts = np.cumsum(lengths) - lengths
        self._open["docs"].write(starts.astype("<u4").tobytes())
        for file in self._open.values():
            file.close()
        digests = [digest for file in self._open.values() for digest in file.digests]
        sums = np.array(digests, dtype="<u8").tobytes()
        write_file_atomically(self.directory / f"{self._name()}.sums", sums)
        sizes = {suffix: file.bytes for suffix, file in self._open.items()}
        entry = {"name": self._name(), "documents": int(lengths.size), "tokens": self._in_shard}
        self._shards.append(entry | {"bytes": sizes, "sums_xxh3_64": xxhash.xxh3_64_hexdigest(sums)})
        self._open = {}

    def _write_mask(self, mask: np.ndarray) -> None:
        bits = np.concatenate([self._mask_rest, mask])
        whole = bits.size // 8 * 8
        self._open["mask"].write(np.packbits(bits[:whole], bitorder="little").tobytes())
        self._mask_rest = bits[whole:]


def write_manifest(
    directory: Path,
    *,
    kind: str,
    split: str,
    tokenizer_sha256: str,
    vocabulary_size: int,
    special_ids: dict[str, int | None],
    shards: list[dict[str, Any]],
    units: list[dict[str, Any]],
) -> dict[str, Any]:
    """Commit a split: its manifest, written last and atomically, makes the directory a data set.

    Args:
        special_ids: "eos" and "pad" (None where the tokenizer has none).
        shards: what ``UnitWriter.finish`` returned, in the order of the units.
        units: of each source its ``source`` (name), ``bytes``, ``documents_in`` and ``documents_kept``.
    """
    manifest = {
        "version": FORMAT_VERSION,
        "checksum": CHECKSUM_PLACE,
        "kind": kind,
        "split": split,
        "dtype": token_dtype(vocabulary_size).name,
        "tokenizer_sha256": tokenizer_sha256,
        "vocabulary_size": vocabulary_size,
        "special_ids": dict(sorted(special_ids.items())),
        "totals": {
            "documents": sum(shard["documents"] for shard in shards),
            "tokens": sum(shard["tokens"] for shard in shards),
        },
        "shards": shards,
        "units": units,
    }
    content = (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()
    checksum = xxhash.xxh3_128_hexdigest(content)
    content = content.replace(CHECKSUM_PLACE.encode(), checksum.encode(), 1)
    path = directory / MANIFEST_NAME
    if path.exists() and path.read_bytes() != content:
        raise ValueError(f"{directory} already holds other token shards: delete it or choose another directory")
    write_file_atomically(path, content)
    return manifest | {"checksum": checksum}
