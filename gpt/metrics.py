"""One record a step: metrics.jsonl, TensorBoard and the console, from rank 0."""

import contextlib
import json
import math
import os
import resource
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.tensorboard import SummaryWriter

from gpt.checkpoint.format import Greedy
from gpt.goodput import computing_seconds
from gpt.run_directory import RunDirectory, json_lines

GIB = 2**30
Record = dict[str, float | str | None]


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation gives, the same on every rank."""

    metrics: Record
    sample_text: str | None
    greedy: Greedy | None

    @property
    def loss(self) -> float:
        """Nats per token."""
        loss = self.metrics["evaluate/loss"]
        assert isinstance(loss, float)
        return loss


class MetricsWriter:
    """Writes the records of one start of a run.

    After a resume the lines of metrics.jsonl past the checkpoint are dropped, and TensorBoard is told to purge them, so
    that every step stands in both exactly once.
    """

    def __init__(self, run: RunDirectory, resumed_step: int, total_steps: int, console_every_steps: int) -> None:
        self._run = run
        self._total_steps = total_steps
        self._console_every_steps = console_every_steps
        self._open(resumed_step)
        self._recent: deque[float] = deque([time.monotonic()], maxlen=21)

    def _open(self, resumed_step: int) -> None:
        run = self._run
        path = run.path / "metrics.jsonl"
        run.check_ownership()
        kept = _drop_lines_after(path, resumed_step)
        self._first_start = next((event["time"] for event in run.events("start")), time.time())
        self._computing_seconds = sum(map(computing_seconds, kept))
        self._file = path.open("ab", buffering=0)
        self._pending = b""
        self._writing = threading.Lock()
        self._synced_step = resumed_step
        # At step 0 are the texts, which a start from 0 writes anew. The first start too says that it purges:
        # TensorBoard takes the first purge in a directory for its beginning, and ignores it.
        purge_step = resumed_step + 1 if resumed_step else 0
        self._board: SummaryWriter | None = self._open_board(purge_step)
        self._step = resumed_step

    def rewind(self, step: int) -> None:
        """Go back to `step`, as a resume there does: what was written for later steps is dropped."""
        self.close()
        self._open(step)

    def _open_board(self, purge_step: int) -> SummaryWriter:
        return SummaryWriter(str(self._run.path / "tensorboard"), purge_step=purge_step, flush_secs=10)

    def write(self, step: int, record: Record) -> None:
        """Append the record of a step, with the run's goodput. A number that is not finite is written as null.

        What a full disk does not take now waits: for the next step's line, TensorBoard's for the next `sync`.
        """
        self._computing_seconds += computing_seconds(record)
        record = record | {"run/goodput": self._computing_seconds / max(1e-9, time.time() - self._first_start)}
        clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
        self._check_ownership()
        with self._writing:
            self._step = step
            self._pending += (json.dumps({"step": step, "time": time.time(), **clean}) + "\n").encode()
            try:
                self._add_scalars(step, clean)  # first, as lines wait where the disk takes none
                self._write_pending()
            except OSError as error:
                say(f"warning: the metrics of step {step} wait to be written: {error}")
        self._recent.append(time.monotonic())
        if step % self._console_every_steps == 0 or step in (1, self._total_steps) or "evaluate/loss" in record:
            say(self._console_line(step, record))

    def _check_ownership(self) -> None:
        with contextlib.suppress(OSError):  # where the file system has gone, writing says so
            self._run.check_ownership()

    def _write_pending(self) -> None:
        while self._pending:
            self._pending = self._pending[self._file.write(self._pending) :]

    def _add_scalars(self, step: int, record: Record) -> None:
        if self._board is None:
            return
        try:
            for key, value in record.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(key, value, step)
        except OSError:  # its thread has died of it
            self._board = None
            raise

    def write_text(self, tag: str, text: str, step: int) -> None:
        """A text for TensorBoard, shown as it is. One that a full disk does not take is lost, with a warning."""
        self._check_ownership()
        with self._writing:
            try:
                if self._board is None:
                    raise OSError("TensorBoard's file takes nothing at the moment")
                self._board.add_text(tag, "    " + text.replace("\n", "\n    "), step)
            except OSError as error:  # its thread has died of it
                self._board = None
                say(f"warning: the text {tag} of step {step} is not written: {error}")

    def sync(self) -> None:
        """Bring everything to disk: what a checkpoint commits must not be ahead of its metrics. Any thread may call it.

        Raises OSError when the disk does not take it.
        """
        with self._writing:
            self._write_pending()
            step = self._step
        os.fsync(self._file.fileno())  # which may take its time: the next step's line need not wait
        with self._writing:
            if self._board is None:
                self._write_pending()
                self._board = self._open_board(self._synced_step + 1)
                for record in json_lines(self._run.path / "metrics.jsonl"):
                    if record["step"] > self._synced_step:
                        del record["time"]
                        self._add_scalars(record.pop("step"), record)
            try:
                self._board.flush()
            except OSError:
                self._board = None
                raise
            self._synced_step = step

    def close(self) -> None:
        """Write what is left."""
        self.sync()
        self._file.close()
        assert self._board is not None
        self._board.close()

    def _console_line(self, step: int, record: Record) -> str:
        seconds = (self._recent[-1] - self._recent[0]) / max(1, len(self._recent) - 1)
        left = int(seconds * (self._total_steps - step))
        parts = [f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}"]
        shown = {
            "train/loss": "loss {:.4f}", "evaluate/loss": "validation {:.4f}",
            "evaluate/bits_per_byte": "bits/byte {:.4f}", "train/learning_rate": "lr {:.2e}",
            "train/gradient_norm": "gradient {:.2f}",
            "performance/tokens_per_second": "{:,.0f} tokens/s", "performance/model_flops_utilization": "MFU {:.0%}",
        }  # fmt: skip
        parts += [
            text.format(value) for key, text in shown.items() if isinstance(value := record.get(key), int | float)
        ]
        return "  ".join([*parts, f"ETA {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"])


def say(line: str) -> None:
    """A line on the console, where the full disk that may hold its log does not end the run."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


def recent_losses(path: Path, count: int) -> tuple[list[tuple[int, float]], int]:
    """The last `count` (step, loss) of metrics.jsonl with a finite loss, and how many steps in a row up to the newest
    were skipped."""
    losses: deque[tuple[int, float]] = deque(maxlen=count)
    in_a_row = skipped = 0
    for record in json_lines(path):
        in_a_row = in_a_row + 1 if record["train/skipped_steps"] > skipped else 0
        skipped = record["train/skipped_steps"]
        if record["train/loss"] is not None:
            losses.append((record["step"], record["train/loss"]))
    return list(losses), in_a_row


def _drop_lines_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep the whole lines up to `step`, and return their records; what a later start rewrites, or a kill cut short,
    goes."""
    kept = [record for record in json_lines(path) if record["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    temporary.replace(path)
    return kept


def flops_per_token(
    matrix_parameters: int, layers: int, hidden_size: int, sequence_length: int, *, beside_adapter: int = 0
) -> float:
    """Floating-point operations of training on one token: 6 for each parameter of a matrix product, 4 for each of those
    `beside_adapter`, which get no gradient of their own, and
    6 * layers * hidden * sequence for causal attention (half of arXiv:2204.02311 appendix B, which counts the full
    square). Recomputation is not counted."""
    return 6.0 * matrix_parameters - 2.0 * beside_adapter + 6.0 * layers * hidden_size * sequence_length


def measure_matmul_flops(
    device: torch.device, dtype: torch.dtype, *, sizes: Sequence[int] = (256, 1024, 2048), seconds: float = 0.15
) -> float:
    """FLOP/s of this process on square matrix products of the training dtype: the best of the sizes, each over at least
    so many seconds. All ranks measure at once, as they compute at once.

    A larger size is left out where a product would take longer than half a second: where a processor has no
    instructions for the type, 2048 takes 24.
    """
    best = 0.0
    generator = torch.Generator(device).manual_seed(0)  # its own: the state of training's is part of a checkpoint
    for size in sizes:
        if best and 2.0 * size**3 / best > 0.5:
            break
        a = torch.randn(size, size, device=device, dtype=torch.float32, generator=generator).to(dtype)
        _matmul(a, device)
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            _matmul(a, device)
            count += 1
        best = max(best, 2.0 * size**3 * count / (time.perf_counter() - start))
    return best


def processor_flops(dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of this processor on small products of the dtype and on the same in fp32."""
    asked, fp32 = (
        measure_matmul_flops(torch.device("cpu"), measured, sizes=[256], seconds=0.03)
        for measured in (dtype, torch.float32)
    )
    return asked, fp32


def fast_precision() -> str:
    """bf16, or fp32 on a processor (without a GPU) that computes bf16 at less than half the speed of fp32: one
    without AVX-512 took 20 to 100 times as long, by the size of the product."""
    bf16, fp32 = (1.0, 1.0) if torch.cuda.is_available() else processor_flops(torch.bfloat16)
    return "fp32" if bf16 < fp32 / 2 else "bf16"


def _matmul(a: torch.Tensor, device: torch.device) -> None:
    torch.mm(a, a)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process: the device's for CUDA, else the resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def host_metrics(run: Path) -> Record:
    """Memory in use on this host and free disk at the run directory; None where its file system has gone."""
    free = None
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(run).free / GIB
    return {"memory/host_gib": psutil.virtual_memory().used / GIB, "disk/free_gib": free}
