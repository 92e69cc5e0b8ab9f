"""The batches of a run, read ahead of the steps that train on them."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol

import numpy as np
import xxhash

from gpt.batch import BatchPlan, BatchPositions, MicroBatch, Rows, micro_batches
from gpt.distributed import Ranks


class SampleStream(Protocol):
    """Training data: sample positions in, rows out; its order is a pure function of seed and position."""

    def sample_ids(self, start: int, count: int) -> np.ndarray: ...
    def rows(self, positions: range) -> Rows: ...


class BatchSource:
    """The global batches of a run as this rank sees them; `workers` threads make the next ones ready, one each."""

    def __init__(
        self,
        stream: SampleStream,
        batch: BatchPlan,
        ranks: Ranks,
        workers: int = 1,
        skipped: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._stream, self._batch, self._ranks, self._workers = stream, batch, ranks, workers
        self.positions = BatchPositions(batch.global_batch_sequences, tuple(skipped))
        self._threads = ThreadPoolExecutor(max_workers=max(1, workers), thread_name_prefix="batches")
        self._ready: dict[int, Future[list[MicroBatch]]] = {}

    def take(self, step: int) -> list[MicroBatch]:
        """This rank's forwards of optimizer step `step` (the first is 1). The next steps' are begun."""
        future = self._ready.pop(step, None)
        result = future.result() if future is not None else self._make(step)
        ahead = range(step + 1, step + 1 + self._workers)
        self._ready = {s: self._ready.get(s) or self._threads.submit(self._make, s) for s in ahead}
        return result

    def first_position(self, step: int) -> int:
        """Position of this rank's first sample of a step in the data order."""
        return self.positions.first(step) + self._batch.rank_range(self._ranks.rank)[0]

    def first_row(self, step: int) -> MicroBatch:
        """The first sequence of a step's global batch, the same on every rank."""
        position = self.positions.first(step)
        return micro_batches(self._stream.rows(range(position, position + 1)), 1, 1, self._ranks.device)[0]

    def digest(self, step: int) -> str:
        """xxh3 of the sample ids of a step's global batch."""
        ids = self._stream.sample_ids(self.positions.first(step), self._batch.global_batch_sequences)
        return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(ids, "<u8").tobytes())

    def leave_out(self, samples: tuple[int, int]) -> None:
        """From now on pass over the samples of these positions (first, end); what was read ahead is dropped."""
        self.positions = replace(self.positions, skipped=(*self.positions.skipped, samples))
        self._ready = {}

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)

    def _make(self, step: int) -> list[MicroBatch]:
        (first, end), start = self._batch.rank_range(self._ranks.rank), self.first_position(step)
        rows, plan = self._stream.rows(range(start, start + end - first)), self._batch
        return micro_batches(rows, plan.accumulation_steps, plan.rows_per_forward, self._ranks.device)
