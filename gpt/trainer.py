"""The training loop: pretraining and fine-tuning alike; it never asks which.

A step is a function of the weights and of its positions in the data order, so a run that goes on from a checkpoint is
the run that was never stopped.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import xxhash

from gpt import distributed
from gpt.batch import BatchPlan, MicroBatch, Rows, micro_batches
from gpt.distributed import Ranks
from gpt.loss import cross_entropy_sum, loss_for_backward
from gpt.metrics import Evaluation, MetricsWriter, Record, host_metrics, peak_memory_gib
from gpt.optimizer import Schedule
from gpt.recipe import Recipe
from gpt.run_directory import RunDirectory
from gpt.saver import Saver


class SampleStream(Protocol):
    """Training data: sample positions in, rows out; its order is a pure function of seed and position."""

    def sample_ids(self, start: int, count: int) -> np.ndarray: ...
    def rows(self, positions: range) -> Rows: ...


class BatchSource:
    """The global batches of a run as this rank sees them; `workers` threads make the next ones ready, one each."""

    def __init__(self, stream: SampleStream, batch: BatchPlan, ranks: Ranks, workers: int = 1) -> None:
        self._stream, self._batch, self._ranks, self._workers = stream, batch, ranks, workers
        self._threads = ThreadPoolExecutor(max_workers=max(1, workers), thread_name_prefix="batches")
        self._ready: dict[int, Future[list[MicroBatch]]] = {}

    def take(self, step: int) -> list[MicroBatch]:
        """This rank's forwards of optimizer step `step` (the first is 1). The next steps' are begun."""
        future = self._ready.pop(step, None)
        result = future.result() if future is not None else self._make(step)
        ahead = range(step + 1, step + 1 + self._workers)
        self._ready = {s: self._ready.get(s) or self._threads.submit(self._make, s) for s in ahead}
        return result

    def first_row(self, step: int) -> MicroBatch:
        """The first sequence of a step's global batch, the same on every rank."""
        position = (step - 1) * self._batch.global_batch_sequences
        return micro_batches(self._stream.rows(range(position, position + 1)), 1, 1, self._ranks.device)[0]

    def digest(self, step: int) -> str:
        """xxh3 of the sample ids of a step's global batch."""
        count = self._batch.global_batch_sequences
        ids = self._stream.sample_ids((step - 1) * count, count)
        return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(ids, "<u8").tobytes())

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)

    def _make(self, step: int) -> list[MicroBatch]:
        first, end = self._batch.rank_range(self._ranks.rank)
        start = (step - 1) * self._batch.global_batch_sequences
        rows, plan = self._stream.rows(range(start + first, start + end)), self._batch
        return micro_batches(rows, plan.accumulation_steps, plan.rows_per_forward, self._ranks.device)


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step's data on this rank, and what all ranks know of it."""

    forwards: list[MicroBatch]
    target_tokens: int
    """Of the whole global batch."""
    stop: bool
    """Whether a rank was asked to stop."""
    started: float
    """`perf_counter` when the step began to wait for its data."""
    data_wait_seconds: float


@dataclass
class Trainer:
    """One start of a run. `owner` and `metrics` are rank 0's and None elsewhere."""

    recipe: Recipe
    run: Path
    owner: RunDirectory | None
    metrics: MetricsWriter | None
    engine: Any
    ranks: Ranks
    batches: BatchSource
    batch: BatchPlan
    schedule: Schedule
    evaluate: Callable[["Trainer"], Evaluation] | None
    saver: Saver
    stop_requested: Callable[[], bool]
    uncompiled: Callable[[], AbstractContextManager[None]] = nullcontext
    flops_per_token: float = 0.0
    peak_flops: float = 0.0
    first_step: int = 1
    restarts: int = 0

    def __post_init__(self) -> None:
        self._stop_at = self.schedule.total_steps
        self.stopped_at: int | None = None
        """The last step before a requested stop; None where nobody asked for one."""

    def fit(self) -> None:
        """Train from `first_step` to the end of the schedule, evaluating and saving on the way and at the end.

        When a rank was asked to stop, all ranks save what they have and leave before the next step.

        Raises:
            ValueError: the loss is not finite, too many saves in a row failed, or the last one cannot be written.
        """
        try:
            for step in range(self.first_step, self.schedule.total_steps + 1):
                self._phase(f"step {step}")
                batch = self.take(step)
                if batch.stop:
                    self._stop(step - 1)
                    break
                self._do_step(step, batch)
        except (ValueError, OSError):
            self.saver.leave()
            raise
        self.batches.close()

    def _do_step(self, step: int, batch: "StepBatch") -> None:
        """Train, and evaluate, record and save where it is due."""
        record, evaluation = self.train_step(step, batch), None
        if self.evaluate is not None and self._is_due(step, self.recipe.evaluate.every_steps):
            self._phase(f"evaluation at step {step}")
            evaluation = self.evaluate(self)
            record |= evaluation.metrics
            if self.metrics is not None and evaluation.sample_text is not None:
                self.metrics.write_text("evaluate/sample", evaluation.sample_text, step)
        if self.metrics is not None:
            self.metrics.write(step, record)
        if self._is_due(step, self.recipe.checkpoint.every_steps):
            self._save(step, evaluation)

    def take(self, step: int) -> "StepBatch":
        """This rank's part of a global batch, and what all ranks must know of it, in one collective."""
        started = time.perf_counter()
        forwards = self.batches.take(step)
        waited = time.perf_counter() - started
        mine = [sum(int(f.mask.sum()) for f in forwards), self.stop_requested(), self.saver.state()]
        everyone = distributed.gather_floats(mine, self.ranks)
        self.saver.hear(everyone[:, 2])
        return StepBatch(forwards, int(everyone[:, 0].sum()), bool(everyone[:, 1].any()), started, waited)

    def _stop(self, step: int) -> None:
        """Leave after `step`, which is saved unless it already is."""
        self.stopped_at = self._stop_at = step
        if self.owner is not None:
            self.owner.write_event("stop requested", step=step)
        if self.saver.begun_step == step:
            self._finish_save(step)
        elif step >= self.first_step and self.saver.committed_step != step:
            self._save(step, None)

    def train_step(self, step: int, batch: "StepBatch") -> Record:
        """One optimizer step; returns the step's record (complete on rank 0 only)."""
        started, busy = batch.started, time.process_time()
        forwards, target_tokens = batch.forwards, batch.target_tokens
        if target_tokens == 0:
            raise ValueError(f"the global batch of step {step} has no target token: nothing can be learned from it")
        learning_rate = self.schedule.learning_rate(max(1, step - self.engine.skipped_steps))
        distributed.set_learning_rate(self.engine, learning_rate)
        loss_sum = torch.zeros((), dtype=torch.float32, device=self.ranks.device)
        self.engine.train()
        for index, forward in enumerate(forwards, start=1):
            logits = self.forward(forward.input_ids, forward.position_ids)
            self.saver.give_probe(logits, forward)
            part = cross_entropy_sum(logits, forward.targets, forward.mask)
            self.engine.backward(loss_for_backward(part, target_tokens, self.ranks.world_size), scale_wrt_gas=False)
            if index == len(forwards):
                self.saver.wait_copied()
            self.engine.step()
            loss_sum += part.detach()
        # Its own processor time: on a CPU a rank sleeps while it waits for another one. A GPU's host tells nothing.
        busy = time.process_time() - busy if self.ranks.device.type == "cpu" else 0.0
        stall, self.saver.stall_seconds = self.saver.stall_seconds, 0.0
        mine = [float(loss_sum), busy, batch.data_wait_seconds, peak_memory_gib(self.ranks.device), stall]
        everyone = distributed.gather_floats(mine, self.ranks)
        loss = float(everyone[:, 0].sum()) / target_tokens
        if not np.isfinite(loss):
            raise ValueError(
                f"the loss of step {step} is {loss}: the run stops, its last checkpoint is good. Lower "
                f"optimizer.learning_rate or lengthen optimizer.warmup_steps"
            )
        return self._record(step, loss, target_tokens, learning_rate, time.perf_counter() - started, everyone)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Logits [rows, tokens, vocabulary] of int64 [rows, tokens] each, by the engine in its present mode.

        Without a cache and without an attention mask transformers keeps documents apart by their positions; with either
        of the two it would not.
        """
        return self.engine(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits

    def _record(
        self, step: int, loss: float, target_tokens: int, learning_rate: float, seconds: float, everyone: np.ndarray
    ) -> Record:
        if not self.ranks.is_first:
            return {}
        tokens = self.recipe.train.global_batch_tokens
        flops = tokens / seconds * self.flops_per_token
        # on a busy machine the peak may have been measured too low: what was reached is a lower bound of it
        self.peak_flops = max(self.peak_flops, flops)
        busy = everyone[:, 1]
        return {
            "train/loss": loss,
            "train/gradient_norm": distributed.gradient_norm(self.engine),
            "train/learning_rate": learning_rate,
            "train/tokens": step * tokens,
            "train/target_tokens": target_tokens,
            "train/skipped_steps": self.engine.skipped_steps,
            "train/loss_scale": distributed.loss_scale(self.engine),
            "performance/tokens_per_second": tokens / seconds,
            "performance/model_flops_utilization": flops / self.peak_flops if flops else None,
            "performance/step_seconds": seconds,
            "performance/data_wait_seconds": float(everyone[:, 2].max()),
            "performance/checkpoint_stall_seconds": float(everyone[:, 4].max()),
            "performance/slowest_rank_ratio": float(busy.max() / busy.mean()) if busy.any() else None,
            "checkpoint/seconds_since_commit": time.monotonic() - self.saver.committed_at,
            "checkpoint/bytes": self.saver.size_bytes,
            "checkpoint/failed_saves": self.saver.failed_saves,
            "run/restarts": self.restarts,
            "run/rollbacks": self.owner.count_events("rollback") if self.owner else 0,
            "memory/peak_gib": float(everyone[:, 3].max()),
            **host_metrics(self.run),
            "sample_digest": self.batches.digest(step),
        }

    def _is_due(self, step: int, every_steps: int | None) -> bool:
        return step == self._stop_at or (every_steps is not None and step % every_steps == 0)

    def _phase(self, phase: str) -> None:
        if self.owner is not None:
            self.owner.set_phase(phase)

    def _save(self, step: int, evaluation: Evaluation | None) -> None:
        """Begin the checkpoint of `step`; the last one of a run is also finished."""
        self._phase(f"checkpoint at step {step}")
        greedy = evaluation.greedy if evaluation is not None else None
        loss = evaluation.loss if evaluation is not None else None
        self.saver.begin(step, self.engine.skipped_steps, greedy, loss)
        if step == self._stop_at:
            self._finish_save(step)
        elif not self.saver.probe_from_training:
            self._run_probe(step)

    def _finish_save(self, step: int) -> None:
        """Wait for the run's last checkpoint, that of `step`. Raises ValueError when it cannot be written."""
        self._phase(f"checkpoint at step {step}")
        if self.saver.needs_probe:
            self._run_probe(step)
        self.saver.finish()
        if self.saver.committed_step != step:
            raise ValueError(
                f"the last checkpoint, of step {step}, could not be written: make room and start the run again"
            )

    @torch.no_grad()
    def _run_probe(self, step: int) -> None:
        """The probe of the save of `step` by a forward of its own."""
        started = time.perf_counter()
        self.engine.eval()
        row = self.batches.first_row(step + 1)
        with self.uncompiled():
            logits = self.forward(row.input_ids, row.position_ids)
        self.saver.stall_seconds += time.perf_counter() - started
        self.saver.give_probe(logits, row)
