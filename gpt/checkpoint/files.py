"""Tensor files of a checkpoint: safetensors written as a stream with block checksums, and read with verification.

The layout is that of the safetensors format (https://huggingface.co/docs/safetensors, "Format"): an 8-byte
little-endian header length, a JSON header, then the tensors' bytes without gaps.
"""

import contextlib
import json
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
import xxhash

from gpt.checkpoint.direct import block_memory, direct_file
from gpt.checkpoint.format import BLOCK_BYTES, DamagedFileError, FileEntry

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The safetensors dtype codes that checkpoints and exports use."""

DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}


NORM_ELEMENTS = 1 << 16
"""As many are converted at a time."""

VIEW_BLOCKS = 2
"""While as many more blocks are read, a view of one stays as it is."""

PART_BYTES = 1 << 19
"""As many are read at a time: their checksum is taken while the processor's cache still holds them."""


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor to be stored under `name`: dtype code of safetensors, shape, and where its values come from.

    `read` is called once, when the tensor's turn comes, and gives either the tensor or its consecutive flattened
    chunks, on the CPU and in the stated dtype; only one chunk is alive at a time.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor | Iterable[torch.Tensor]]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class _BlockHasher:
    """Writes bytes to a file and takes the xxh3-64 of each block of `BLOCK_BYTES` on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = xxhash.xxh3_64()
        self._in_block = 0
        self._size_bytes = 0
        self._blocks: list[str] = []

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        self._file.write(view)
        self._size_bytes += len(view)
        while len(view):
            part = view[: BLOCK_BYTES - self._in_block]
            self._hash.update(part)
            self._in_block += len(part)
            view = view[len(part) :]
            if self._in_block == BLOCK_BYTES:
                self._end_block()

    def finish(self) -> FileEntry:
        """Make the content durable (fsync)."""
        if self._in_block:
            self._end_block()
        self._file.flush()
        os.fsync(self._file.fileno())
        return FileEntry(size_bytes=self._size_bytes, blocks=self._blocks)

    def _end_block(self) -> None:
        self._blocks.append(self._hash.hexdigest())
        self._hash.reset()
        self._in_block = 0


@contextlib.contextmanager
def _cached_file(path: Path) -> Iterator[_BlockHasher]:
    with path.open("wb") as file:
        yield _BlockHasher(file)


def write_safetensors(
    path: Path,
    tensors: Iterable[TensorToWrite],
    metadata: Mapping[str, str] | None = None,
    *,
    direct: bool = False,
) -> FileEntry:
    """Write a safetensors file, one chunk in memory at a time, and make its content durable (fsync of the file).

    `direct` goes around the page cache (see `direct.py`), for many GB.
    The caller makes its name durable with `fsync_directory`. Returns the size and block checksums for the manifest.
    Raises ValueError when a tensor's values do not have the stated dtype or number of elements.
    """
    # Wider types first, as the safetensors library does: then every tensor starts at a multiple of its item size.
    ordered = sorted(tensors, key=lambda tensor: -DTYPES[tensor.dtype].itemsize)
    with direct_file(path) if direct else _cached_file(path) as output:
        output.write(_header(ordered, metadata))
        for chunk in _checked_chunks(ordered):
            output.write(_bytes_of(chunk))
        return output.finish()


def _checked_chunks(tensors: list[TensorToWrite]) -> Iterator[torch.Tensor]:
    for tensor in tensors:
        given_bytes = 0
        values = tensor.read()
        for chunk in [values] if isinstance(values, torch.Tensor) else values:
            if chunk.dtype != DTYPES[tensor.dtype]:
                raise ValueError(f"{tensor.name} is announced as {tensor.dtype}, but its values are {chunk.dtype}.")
            given_bytes += chunk.numel() * chunk.itemsize
            yield chunk
        if given_bytes != tensor.size_bytes:
            raise ValueError(
                f"{tensor.name} of shape {tensor.shape} takes {tensor.size_bytes} bytes, "
                f"but its values have {given_bytes}."
            )


def hash_file(path: Path) -> FileEntry:
    """Size and block checksums of a file as it is."""
    blocks = []
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            blocks.append(xxhash.xxh3_64_hexdigest(block))
        return FileEntry(size_bytes=file.tell(), blocks=blocks)


def _header(tensors: list[TensorToWrite], metadata: Mapping[str, str] | None) -> bytes:
    content: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for tensor in tensors:
        if tensor.name in content:
            raise ValueError(f"The tensor name {tensor.name} occurs twice in one file.")
        begin, end = end, end + tensor.size_bytes
        content[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The tensor's own memory, when it is contiguous, else that of a contiguous copy."""
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().data


def sum_of_squares(values: torch.Tensor) -> float:
    """In double precision, with little memory beside the tensor's own: a quarter of the time of `vector_norm`'s."""
    return sum(float(torch.dot(part, part)) for part in map(torch.Tensor.double, values.flatten().split(NORM_ELEMENTS)))


class VerifiedFile:
    """A file of which no byte is given out before its block has the checksum that `entry` records.

    `bytes_read` counts the bytes taken from the file system. The last `cache_blocks` partly used blocks are kept,
    so that a sequence of neighbouring reads reads every block once. Memory for a block comes from `spare` (files may
    share the list) and goes there when another takes its place: new pages are slow.
    Raises DamagedFileError when the file is missing, has another size or does not match a checksum.
    """

    def __init__(
        self, path: Path, entry: FileEntry, *, cache_blocks: int = 2, spare: list[memoryview] | None = None
    ) -> None:
        self.path = path
        self.entry = entry
        self.bytes_read = 0
        self._cache: OrderedDict[int, memoryview] = OrderedDict()
        self._cache_blocks = cache_blocks
        self._spare: list[memoryview] = [] if spare is None else spare
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise DamagedFileError(f"{path} is missing, though the manifest lists it.") from None
        if size != entry.size_bytes:
            raise DamagedFileError(f"{path} has {size} bytes, but the manifest says {entry.size_bytes}.")
        blocks = -(-size // BLOCK_BYTES)
        if len(entry.blocks) != blocks:
            raise DamagedFileError(f"{path} has {blocks} blocks, but {len(entry.blocks)} checksums.")

    def read(self, offset: int, length: int) -> memoryview:
        """The bytes `[offset, offset + length)`, verified."""
        target = memoryview(bytearray(length))
        self.read_into(offset, target)
        return target

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes that start at `offset`, verified; whole blocks are read in place."""
        end = offset + len(target)
        if offset < 0 or end > self.entry.size_bytes:
            raise ValueError(f"Bytes {offset} to {end} lie outside {self.path} ({self.entry.size_bytes} bytes).")
        position = offset
        with self.path.open("rb", buffering=0) as file:
            while position < end:
                index = position // BLOCK_BYTES
                begin, stop = self._block_range(index)
                if position == begin and stop <= end and index not in self._cache:
                    self._fetch(file.fileno(), index, target[begin - offset : stop - offset])
                else:
                    stop = min(stop, end)
                    block = self._cached_block(file.fileno(), index)
                    target[position - offset : stop - offset] = block[position - begin : stop - begin]
                position = stop

    def view(self, offset: int, length: int) -> memoryview:
        """The bytes `[offset, offset + length)` of one block, verified, in the memory that keeps the block.

        They stay as they are while `VIEW_BLOCKS` more are read (of this file or one that shares `spare`), not longer.
        """
        index = offset // BLOCK_BYTES
        begin, stop = self._block_range(index)
        assert offset + length <= stop, "bytes of one block"
        with self.path.open("rb", buffering=0) as file:
            return self._cached_block(file.fileno(), index)[offset - begin : offset - begin + length]

    def verify(self) -> None:
        """Check every block; raises DamagedFileError for the first that differs."""
        buffer = memoryview(bytearray(min(BLOCK_BYTES, self.entry.size_bytes)))
        with self.path.open("rb", buffering=0) as file:
            for index in range(len(self.entry.blocks)):
                begin, stop = self._block_range(index)
                self._fetch(file.fileno(), index, buffer[: stop - begin])

    def _block_range(self, index: int) -> tuple[int, int]:
        return index * BLOCK_BYTES, min((index + 1) * BLOCK_BYTES, self.entry.size_bytes)

    def _cached_block(self, descriptor: int, index: int) -> memoryview:
        block = self._cache.get(index)
        if block is None:
            begin, stop = self._block_range(index)
            memory = self._spare.pop(0) if len(self._spare) >= VIEW_BLOCKS else block_memory()
            block = memory[: stop - begin]
            self._fetch(descriptor, index, block)
            while len(self._cache) >= self._cache_blocks:
                _, old = self._cache.popitem(last=False)
                self._spare.append(memoryview(old.obj))
            self._cache[index] = block
        self._cache.move_to_end(index)
        return block

    def _fetch(self, descriptor: int, index: int, target: memoryview) -> None:
        begin, stop = self._block_range(index)
        position, checksum = begin, xxhash.xxh3_64()
        while position < stop:
            part = target[position - begin : position - begin + PART_BYTES]
            count = os.preadv(descriptor, [part], position)
            if count == 0:
                raise DamagedFileError(f"{self.path} ends at byte {position}, but should have {self.entry.size_bytes}.")
            checksum.update(part[:count])
            position += count
        self.bytes_read += stop - begin
        actual = checksum.hexdigest()
        if actual != self.entry.blocks[index]:
            raise DamagedFileError(
                f"{self.path} is damaged: block {index} (bytes {begin} to {stop}) has the checksum {actual}, "
                f"but the manifest says {self.entry.blocks[index]}; use another checkpoint, or a good copy of the file."
            )


class FragmentFile:
    """A safetensors file behind a `VerifiedFile`: names, shapes, dtypes, and slices of flattened tensors."""

    def __init__(
        self, path: Path, entry: FileEntry, *, cache_blocks: int = 2, spare: list[memoryview] | None = None
    ) -> None:
        self._file = VerifiedFile(path, entry, cache_blocks=cache_blocks, spare=spare)
        self._tensors, self._data_start = self._read_header()

    def _read_header(self) -> tuple[dict[str, dict], int]:
        path, size = self._file.path, self._file.entry.size_bytes
        length = int.from_bytes(self._file.read(0, 8), "little") if size >= 8 else 0
        if not 2 <= length <= size - 8:
            raise DamagedFileError(f"{path} is not a safetensors file: its header has {length} of {size} bytes.")
        header = json.loads(bytes(self._file.read(8, length)))
        header.pop("__metadata__", None)
        return header, 8 + length

    @property
    def path(self) -> Path:
        return self._file.path

    @property
    def bytes_read(self) -> int:
        return self._file.bytes_read

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entry(name)["shape"])

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._entry(name)["dtype"]]

    def read(self, name: str, start: int = 0, count: int | None = None) -> torch.Tensor:
        """Elements `[start, start + count)` of the flattened tensor (to its end by default), 1-D, in its dtype."""
        total = math.prod(self.shape(name))
        count = total - start if count is None else count
        if start < 0 or count < 0 or start + count > total:
            raise ValueError(f"Elements {start} to {start + count} lie outside {name} in {self.path} ({total}).")
        values = torch.empty(count, dtype=self.dtype(name))
        self.read_into(name, start, values)
        return values

    def read_into(self, name: str, start: int, target: torch.Tensor) -> None:
        """Fill the contiguous 1-D `target` with the elements from `start` on, rounded to its dtype."""
        if target.dtype != self.dtype(name):
            target.copy_(self.read(name, start, target.numel()))
        elif target.numel():
            self._file.read_into(self._offset(name, start), _bytes_of(target))

    def view(self, name: str, start: int, count: int) -> torch.Tensor:
        """At most `count` elements of the flattened tensor, from `start` on: as many as one block holds, 1-D. They stay
        as they are while `VIEW_BLOCKS` more blocks are read, not longer."""
        dtype, offset = self.dtype(name), self._offset(name, start)
        length = min(count * dtype.itemsize, BLOCK_BYTES - offset % BLOCK_BYTES)
        return torch.frombuffer(self._file.view(offset, length), dtype=dtype)

    def _offset(self, name: str, start: int) -> int:
        return int(self._data_start + self._entry(name)["data_offsets"][0] + start * self.dtype(name).itemsize)

    def _entry(self, name: str) -> dict:
        try:
            return self._tensors[name]
        except KeyError:
            raise DamagedFileError(f"{self.path} holds no tensor {name}, though the manifest expects it.") from None
