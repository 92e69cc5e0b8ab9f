"""How a global batch is dealt: complete, even, and the same number of forwards on every rank."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from gpt.batch import micro_batches, plan_batch


@dataclass(frozen=True)
class FewRows:
    """Rows whose values tell which row and token they are."""

    input_ids: np.ndarray
    targets: np.ndarray
    position_ids: np.ndarray
    target_mask: np.ndarray


def make_rows(count: int, length: int = 5) -> FewRows:
    ids = np.arange(count * length, dtype=np.int64).reshape(count, length) + 100
    return FewRows(ids, ids + 1, np.tile(np.arange(length), (count, 1)), np.ones((count, length), dtype=bool))


SIZES = [
    (sequences, micro_batch, world_size)
    for sequences, micro_batch, world_size in itertools.product(
        [1, 2, 3, 7, 8, 16, 30, 31, 100, 1024], [1, 2, 3, 8, 64, 2000], [1, 2, 3, 5, 8, 30, 100, 512]
    )
    if world_size <= sequences
]


def test_every_size_is_dealt_completely_and_evenly() -> None:
    assert len(SIZES) > 200
    for sequences, micro_batch, world_size in SIZES:
        plan = plan_batch(sequences, micro_batch, world_size)
        ranges = [plan.rank_range(rank) for rank in range(world_size)]
        case = (sequences, micro_batch, world_size)
        assert [i for first, end in ranges for i in range(first, end)] == list(range(sequences)), case
        counts = [end - first for first, end in ranges]
        assert max(counts) - min(counts) <= 1, case
        assert min(counts) >= 1, case
        assert 1 <= plan.rows_per_forward <= micro_batch, case
        room = plan.rows_per_forward * plan.accumulation_steps
        assert room >= max(counts), case
        assert room - max(counts) < plan.accumulation_steps, case  # no more padding than an equal shape needs
        assert (plan.accumulation_steps - 1) * micro_batch < max(counts), case  # no forward more than needed
        assert plan.padded_share == pytest.approx((room * world_size - sequences) / (room * world_size)), case


def test_a_worked_example() -> None:
    plan = plan_batch(global_batch_sequences=10, micro_batch_sequences=3, world_size=3)
    assert [plan.rank_range(rank) for rank in range(3)] == [(0, 4), (4, 7), (7, 10)]
    assert (plan.rows_per_forward, plan.accumulation_steps) == (2, 2)
    assert plan.padded_share == pytest.approx(2 / 12)


def test_more_processes_than_sequences_are_refused() -> None:
    assert plan_batch(4, 1, 4).accumulation_steps == 1
    with pytest.raises(ValueError, match=r"5 processes but only 4 sequences in a global batch.*at most 4 processes"):
        plan_batch(4, 1, 5)


@pytest.mark.parametrize(("world_size", "warned"), [(2, False), (3, True)])
def test_the_padded_share_is_printed_and_warned_about_above_5_percent(world_size: int, warned: bool) -> None:
    plan = plan_batch(16, 8, world_size)
    lines = plan.describe()
    assert f"{plan.padded_share:.1%} of the rows are padding" in lines[0]
    assert any(line.startswith("warning:") for line in lines) is warned
    below = plan_batch(100, 100, 3)  # 2 of 102 rows
    assert 0 < below.padded_share < 0.05
    assert len(below.describe()) == 1


@pytest.mark.parametrize(("have", "count", "rows"), [(5, 2, 3), (6, 2, 3), (1, 3, 2), (4, 4, 1)])
def test_micro_batches_hold_every_row_once_and_pad_without_weight(have: int, count: int, rows: int) -> None:
    given = make_rows(have)
    batches = micro_batches(given, count, rows, torch.device("cpu"))
    assert [batch.input_ids.shape for batch in batches] == [(rows, 5)] * count
    for name, values in (("input_ids", given.input_ids), ("targets", given.targets), ("mask", given.target_mask)):
        joined = torch.cat([getattr(batch, name) for batch in batches]).numpy()
        np.testing.assert_array_equal(joined[:have], values)
    mask = torch.cat([batch.mask for batch in batches])
    assert mask.dtype == torch.bool
    assert not mask[have:].any()
    # padding repeats a real row, so that the numbers of its forward are ordinary
    padding = torch.cat([batch.input_ids for batch in batches])[have:]
    assert (padding.numpy() == given.input_ids[0]).all()
    positions = torch.cat([batch.position_ids for batch in batches])
    assert (positions.numpy() == np.arange(5)).all()


def test_a_rank_without_rows_runs_the_same_forwards_with_zeros() -> None:
    batches = micro_batches(make_rows(0), 2, 3, torch.device("cpu"))
    assert len(batches) == 2
    for batch in batches:
        for part in (batch.input_ids, batch.targets, batch.position_ids):
            assert part.shape == (3, 5)
            assert part.dtype == torch.int64
            assert not part.any()
        assert not batch.mask.any()
