"""A file written around the page cache: what is written once and not read again soon need not push anything out of it,
and the kernel neither copies it nor makes pages for it, which takes longer than the disk."""

import contextlib
import mmap
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import xxhash

from gpt.checkpoint.format import BLOCK_BYTES, FileEntry

ALIGNMENT_BYTES = 4096
"""What O_DIRECT asks of lengths and places; the largest sector of today's disks."""

BLOCKS_ON_THE_WAY = 3
"""As many wait for the disk while one is filled, so that it need not wait when filling one takes longer than usual."""


def block_memory() -> memoryview:
    """`BLOCK_BYTES` that begin at a page, as O_DIRECT asks; a page takes memory once it is touched."""
    return memoryview(mmap.mmap(-1, BLOCK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


class DirectFile:
    """Takes bytes in order, and writes them in blocks of `BLOCK_BYTES`, each with its xxh3-64. Blocks are on their way
    to the disk, one after the other, while the next is filled. A file system that knows no O_DIRECT gets the same
    through its cache."""

    def __init__(self, path: Path, disk: ThreadPoolExecutor) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self._descriptor = os.open(path, flags | os.O_DIRECT, 0o666)
        except OSError:
            self._descriptor = os.open(path, flags, 0o666)
        self._disk = disk
        self._free = [block_memory() for _ in range(BLOCKS_ON_THE_WAY)]
        self._filling = block_memory()
        self._filled_bytes, self._size_bytes = 0, 0
        self._writing: deque[tuple[memoryview, Future[None]]] = deque()
        self._blocks: list[str] = []

    def write(self, data: bytes | memoryview) -> None:
        """Take the bytes; they may be changed afterwards."""
        view = memoryview(data).cast("B")
        while len(view):
            part = view[: BLOCK_BYTES - self._filled_bytes]
            target = self._filling[self._filled_bytes : self._filled_bytes + len(part)]
            np.frombuffer(target, np.uint8)[:] = np.frombuffer(part, np.uint8)  # lets other threads run meanwhile
            self._filled_bytes += len(part)
            view = view[len(part) :]
            if self._filled_bytes == BLOCK_BYTES:
                self._end_block()

    def finish(self) -> FileEntry:
        """Make the content durable (fsync)."""
        if self._filled_bytes:
            self._end_block()
        self._wait()
        os.ftruncate(self._descriptor, self._size_bytes)
        os.fsync(self._descriptor)
        return FileEntry(size_bytes=self._size_bytes, blocks=self._blocks)

    def close(self) -> None:
        """Also after an error: nothing is being written any more."""
        wait(future for _, future in self._writing)
        os.close(self._descriptor)

    def _end_block(self) -> None:
        block, start = self._filling[: self._filled_bytes], self._size_bytes
        self._blocks.append(xxhash.xxh3_64_hexdigest(block))  # here, since the disk would wait for it there
        self._writing.append((self._filling, self._disk.submit(self._write_block, self._filling, len(block), start)))
        self._size_bytes += len(block)
        self._filled_bytes = 0
        if not self._free:
            self._wait_for_one()
        self._filling = self._free.pop()

    def _wait(self) -> None:
        while self._writing:
            self._wait_for_one()

    def _wait_for_one(self) -> None:
        buffer, written = self._writing[0]
        written.result()  # interrupted here, it is still waited for by `close`
        self._writing.popleft()
        self._free.append(buffer)

    def _write_block(self, buffer: memoryview, length: int, start: int) -> None:
        block = buffer[: -(-length // ALIGNMENT_BYTES) * ALIGNMENT_BYTES]  # what is too much, `finish` cuts off
        while len(block):
            count = os.pwrite(self._descriptor, block, start)
            block, start = block[count:], start + count


@contextlib.contextmanager
def direct_file(path: Path) -> Iterator[DirectFile]:
    """A new `DirectFile`, closed at the end."""
    with ThreadPoolExecutor(1, "disk") as disk, contextlib.closing(DirectFile(path, disk)) as file:
        yield file
