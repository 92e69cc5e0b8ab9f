"""How a global batch is dealt over ranks and forwards; the one place that does batch arithmetic.

A global batch is a contiguous range of sample positions. Its sequences are dealt to the ranks as evenly as possible;
ranks with fewer get zero-weight rows, so that all ranks run the same number of forwards of the same shape.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

PADDED_SHARE_TO_WARN = 0.05


@dataclass(frozen=True)
class BatchPlan:
    """The split of one optimizer step's sequences."""

    global_batch_sequences: int
    world_size: int
    rows_per_forward: int
    """Rows of one forward of one rank, zero-weight ones included; at most the recipe's micro_batch_sequences."""
    accumulation_steps: int
    """Forwards of each rank in one optimizer step."""

    @property
    def padded_share(self) -> float:
        """Share of all rows that carry no weight."""
        rows = self.rows_per_forward * self.accumulation_steps * self.world_size
        return 1 - self.global_batch_sequences / rows

    def rank_range(self, rank: int) -> tuple[int, int]:
        """(first, end) of this rank's sequences within the global batch; sizes of ranks differ by at most one."""
        base, extra = divmod(self.global_batch_sequences, self.world_size)
        first = rank * base + min(rank, extra)
        return first, first + base + (1 if rank < extra else 0)

    def describe(self) -> list[str]:
        """Lines for the start of a run."""
        lines = [
            f"batch: {self.global_batch_sequences} sequences = {self.world_size} ranks x {self.accumulation_steps} "
            f"accumulation steps x {self.rows_per_forward} rows, {self.padded_share:.1%} of the rows are padding"
        ]
        if self.padded_share > PADDED_SHARE_TO_WARN:
            lines.append(
                f"warning: {self.padded_share:.1%} of the computation is padding: {self.global_batch_sequences} "
                f"sequences do not divide evenly over {self.world_size} ranks"
            )
        return lines


def plan_batch(global_batch_sequences: int, micro_batch_sequences: int, world_size: int) -> BatchPlan:
    """Deal a global batch: the fewest forwards of at most `micro_batch_sequences` rows, filled evenly.

    Raises:
        ValueError: more processes than sequences in a batch.
    """
    if world_size > global_batch_sequences:
        raise ValueError(
            f"{world_size} processes but only {global_batch_sequences} sequences in a global batch: some processes "
            f"would never train; use at most {global_batch_sequences} processes or a larger train.global_batch_tokens"
        )
    most = -(-global_batch_sequences // world_size)
    accumulation_steps = -(-most // micro_batch_sequences)
    return BatchPlan(
        global_batch_sequences,
        world_size,
        rows_per_forward=-(-most // accumulation_steps),
        accumulation_steps=accumulation_steps,
    )


@dataclass(frozen=True)
class BatchPositions:
    """Where each step's global batch stands in the data order, in samples: a pure function of the step and of what the
    run leaves out."""

    global_batch_sequences: int
    skipped: tuple[tuple[int, int], ...] = ()
    """(first, end) of what is left out: whole global batches. In any order when given, ascending and apart when read.

    Raises ValueError for a range that is not of whole global batches.
    """

    def __post_init__(self) -> None:
        merged: list[tuple[int, int]] = []
        for first, end in sorted(self.skipped):
            if not 0 <= first < end or first % self.global_batch_sequences or end % self.global_batch_sequences:
                raise ValueError(
                    f"samples {first} to {end} cannot be left out: they are not whole global batches of "
                    f"{self.global_batch_sequences} samples"
                )
            if merged and first <= merged[-1][1]:
                first, end = merged[-1][0], max(end, merged.pop()[1])
            merged.append((first, end))
        object.__setattr__(self, "skipped", tuple(merged))

    def first(self, step: int) -> int:
        """Position of the first sample of step `step` (the first is 1)."""
        position = (step - 1) * self.global_batch_sequences
        for first, end in self.skipped:
            if first > position:
                break
            position += end - first
        return position

    def of_steps(self, first_step: int, last_step: int) -> tuple[int, int]:
        """(first, end) of the samples of these steps, with what is left out between them."""
        return self.first(first_step), self.first(last_step) + self.global_batch_sequences


class Rows(Protocol):
    """n sequences of L tokens: int64 [n, L] each, the mask bool [n, L]."""

    @property
    def input_ids(self) -> np.ndarray: ...
    @property
    def targets(self) -> np.ndarray: ...
    @property
    def position_ids(self) -> np.ndarray: ...
    @property
    def target_mask(self) -> np.ndarray: ...


@dataclass(frozen=True)
class MicroBatch:
    """One forward of one rank: [rows, tokens] each, on the rank's device."""

    input_ids: torch.Tensor
    targets: torch.Tensor
    position_ids: torch.Tensor
    mask: torch.Tensor


def micro_batches(rows: Rows, count: int, rows_per_forward: int, device: torch.device) -> list[MicroBatch]:
    """Split a rank's rows into `count` forwards of equal shape, filled up with rows without weight.

    Such a row repeats the first one, so that its numbers are ordinary; a rank without any gets zeros.
    """
    have, need = len(rows.input_ids), count * rows_per_forward

    def filled(values: np.ndarray, blank: bool = False) -> torch.Tensor:
        if have < need:
            extra_shape = (need - have, values.shape[1])
            blank = blank or not have
            extra = np.zeros(extra_shape, values.dtype) if blank else np.broadcast_to(values[:1], extra_shape)
            values = np.concatenate([values, extra])
        return torch.from_numpy(values).to(device)

    mask = filled(rows.target_mask, blank=True)
    parts = [filled(rows.input_ids), filled(rows.targets), filled(rows.position_ids), mask]
    split = [part.split(rows_per_forward) for part in parts]
    return [MicroBatch(*(part[i] for part in split)) for i in range(count)]
