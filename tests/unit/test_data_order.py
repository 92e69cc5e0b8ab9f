"""The order of samples, mixtures and packing: pure functions of their arguments."""

import functools

import numpy as np
import pytest

from data_pipeline.mixture import PATTERN_SLOTS, Mixture, Stage
from data_pipeline.order import (
    BLOCK_ORDER_VERSION,
    LANES,
    ORDER_VERSION,
    RUN_WINDOWS,
    order_key,
    permute,
    permute_in_blocks,
)
from data_pipeline.packing import cut_long_documents, pack_best_fit
from data_pipeline.remote_blocks import HELD_BLOCKS


def _all(n: int, seed: int = 0, source: int = 0, epoch: int = 0) -> np.ndarray:
    return permute(np.arange(n, dtype=np.uint64), n, order_key(seed, source, epoch))


def test_golden_vectors_of_version_1() -> None:
    # Every stored run depends on these. If they must change, raise ORDER_VERSION and write new ones.
    assert ORDER_VERSION == 1
    assert _all(10).tolist() == [2, 5, 4, 9, 0, 1, 3, 8, 7, 6]
    assert _all(10, epoch=1).tolist() == [6, 0, 1, 4, 5, 2, 3, 7, 9, 8]
    assert _all(10, seed=1).tolist() == [4, 8, 2, 5, 3, 6, 7, 1, 9, 0]
    assert _all(10, source=1).tolist() == [4, 3, 8, 7, 9, 1, 0, 5, 2, 6]
    large = permute(np.arange(5, dtype=np.uint64), 10**12 + 1, order_key(7, 2, 3))
    assert large.tolist() == [212792375685, 149995492869, 529562522529, 789231625659, 928714010516]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 63, 64, 65, 1000, 65_537, 100_003])
@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_permutation_is_a_bijection(n: int, seed: int) -> None:
    assert np.array_equal(np.sort(_all(n, seed)), np.arange(n, dtype=np.uint64))


def _all_in_blocks(n: int, window: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return permute_in_blocks(np.arange(n, dtype=np.uint64), n, window, functools.partial(order_key, seed, 0, epoch))


def test_golden_vectors_in_blocks_of_version_2() -> None:
    assert BLOCK_ORDER_VERSION == 2
    assert _all_in_blocks(10, 4).tolist() == [8, 3, 9, 2, 7, 1, 6, 0, 5, 4]
    assert _all_in_blocks(600, 2, seed=3, epoch=1)[290:300].tolist() == [
        259,
        555,
        184,
        407,
        332,
        554,
        371,
        222,
        72,
        334,
    ]


@pytest.mark.parametrize("n", [1, 2, 7, 16, 17, 255, 256, 257, 2049, 4097])
@pytest.mark.parametrize("window", [1, 3, 16, 100, 1000])
def test_permutation_in_blocks_is_a_bijection_however_it_is_asked(n: int, window: int) -> None:
    whole = _all_in_blocks(n, window, seed=5)
    assert np.array_equal(np.sort(whole), np.arange(n, dtype=np.uint64))
    some = np.random.default_rng(0).permutation(n)[:200].astype(np.uint64)
    assert np.array_equal(permute_in_blocks(some, n, window, functools.partial(order_key, 5, 0, 0)), whole[some])


def test_permutation_in_blocks_is_local_and_differs_by_epoch() -> None:
    n, window = 8 * LANES * RUN_WINDOWS * 50 + 11, 50
    whole = _all_in_blocks(n, window)
    for start in range(0, n - 200, 4999):
        assert len(set((whole[start : start + 200] // window).tolist())) <= 4 * LANES  # a window may end in between
    near = whole[: LANES * window].reshape(-1, LANES)
    assert np.ptp(near.astype(np.int64), axis=0).max() < window, "a lane stays in its window"
    assert np.abs(np.diff(np.sort(near[0].astype(np.int64)))).min() > window, "lanes are far from each other"
    other = _all_in_blocks(n, window, epoch=1)
    assert (whole == other).mean() < 0.01 and (_all_in_blocks(n, window, seed=1) == whole).mean() < 0.01
    forwards = [
        np.corrcoef(np.arange(50 * RUN_WINDOWS), whole[lane::LANES][: 50 * RUN_WINDOWS])[0, 1] for lane in range(LANES)
    ]
    assert min(forwards) < -0.9 and max(forwards) > 0.9, "some runs go forwards, some backwards"


@pytest.mark.parametrize("windows", [17, 40, 127, 255])
@pytest.mark.parametrize("seed", range(4))
def test_few_windows_are_mixed_eight_at_a_time_and_needed_once(windows: int, seed: int) -> None:
    window = 50
    blocks = _all_in_blocks(windows * window + 3, window, seed) // window
    near = [len(set(blocks[start : start + LANES * window // 2].tolist())) for start in range(0, blocks.size, 13)]
    assert np.mean(near) > 0.95 * LANES and max(near) <= 4 * LANES, "half a window of each lane"
    held: list[int] = []  # as many blocks as a rank holds, the one that was used last at the end
    fetched = 0
    for block in blocks.tolist():
        if block in held:
            held.remove(block)
        else:
            fetched += 1
        held = [*held, block][-HELD_BLOCKS:]
    assert fetched <= windows + 2, (
        "blocks are one more than windows, and its last values may need a block of the beginning"
    )


def test_permutation_does_not_depend_on_how_it_is_asked() -> None:
    key = order_key(3, 1, 4)
    whole = permute(np.arange(1001, dtype=np.uint64), 1001, key)
    for index in (0, 1, 500, 1000):
        assert permute(np.array([index], dtype=np.uint64), 1001, key)[0] == whole[index]
    assert np.array_equal(permute(np.arange(10, dtype=np.uint64).reshape(2, 5), 1001, key).ravel(), whole[:10])


def test_permutation_mixes() -> None:
    n = 100_003
    values = _all(n).astype(np.float64)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.02
    assert np.abs(values - np.arange(n)).mean() / n == pytest.approx(1 / 3, abs=0.01)  # what a random order has
    assert np.mean(_all(n) == _all(n, epoch=1)) < 0.001


def test_small_permutations_are_all_reached() -> None:
    orders = {tuple(_all(3, epoch=epoch).tolist()) for epoch in range(200)}
    assert len(orders) == 6


@pytest.mark.parametrize(("indices", "n"), [([5], 5), ([0], 0)])
def test_permutation_refuses_what_is_outside(indices: list[int], n: int) -> None:
    with pytest.raises(ValueError, match="element"):
        permute(np.array(indices, dtype=np.uint64), n, order_key(0, 0, 0))


def test_mixture_has_exact_proportions_and_counts_each_source_without_gaps() -> None:
    mixture = Mixture([Stage([5, 3, 2])])
    assert mixture.slots.tolist() == [[32768, 19661, 13107]]
    source, index = mixture.locate(np.arange(3 * PATTERN_SLOTS, dtype=np.uint64))
    for number, slots in enumerate(mixture.slots[0]):
        assert np.array_equal(index[source == number], np.arange(3 * slots, dtype=np.uint64))
    # Spread evenly: any 1000 positions hold each source's share to within a few samples.
    for start in range(0, PATTERN_SLOTS - 1000, 997):
        assert np.bincount(source[start : start + 1000], minlength=3) == pytest.approx([500, 300, 200], abs=3)


def test_stages_have_their_own_proportions_and_count_on_without_gaps() -> None:
    stages = [Stage([1, 0, 3], 10_000), Stage([0, 1, 0], 10_007), Stage([1, 1, 2], 200_001), Stage([5, 1, 0])]
    mixture = Mixture(stages)
    n = 300_000
    source, index = mixture.locate(np.arange(n, dtype=np.uint64))
    for number in range(3):
        mine = index[source == number]
        assert np.array_equal(mine, np.arange(mine.size, dtype=np.uint64))
    ends = [0, 10_000, 10_007, 200_001, n]
    for stage, begin, end in zip(stages, ends, ends[1:], strict=False):
        found = np.bincount(source[begin:end], minlength=3)
        assert found == pytest.approx(np.array(stage.weights) / sum(stage.weights) * (end - begin), abs=3)
        assert not found[np.array(stage.weights) == 0].any()
    for position in (0, 1, 9_999, 10_000, 10_003, 10_007, 150_000, 200_001, n):
        assert mixture.counts(position).tolist() == np.bincount(source[:position], minlength=3).tolist()
    dice = np.random.default_rng(0).integers(0, n, 500)
    again = mixture.locate(dice.astype(np.uint64))
    assert np.array_equal(again[0], source[dice]) and np.array_equal(again[1], index[dice])


def test_one_stage_without_end_is_the_mixture_of_version_1() -> None:
    # Written before there were stages: stored runs depend on these.
    source, index = Mixture([Stage([0.5, 0.3, 0.2])]).locate(np.arange(70_000, 70_010, dtype=np.uint64))
    assert source.tolist() == [1, 0, 0, 2, 1, 0, 0, 1, 2, 0]
    assert index.tolist() == [21000, 35000, 35001, 14000, 21001, 35002, 35003, 21002, 14001, 35004]


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([Stage([1, 1], 5), Stage([1])], "stage 1 has 1 weights for 2 sources"),
        ([Stage([1, 1], 5), Stage([0, 0])], "the weights of stage 1 are all 0"),
        ([Stage([1, 0], 5), Stage([1, 0])], "source 1 is 0 in every stage"),
        ([Stage([1, 1]), Stage([1, 1])], "every stage but the last needs an end"),
        ([Stage([1, 1], 5)], "the last has none"),
        ([Stage([1, 1], 5), Stage([1, 0], 5), Stage([1, 1])], "do not grow"),
    ],
)
def test_stages_that_do_not_fit(stages: list[Stage], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Mixture(stages)


def test_mixture_far_from_the_start_equals_the_walk_there() -> None:
    mixture = Mixture([Stage([0.9, 0.1])])
    source, index = mixture.locate(np.array([10**12], dtype=np.uint64))
    repeats, slot = divmod(10**12, PATTERN_SLOTS)
    near_source, near_index = mixture.locate(np.array([slot], dtype=np.uint64))
    assert source[0] == near_source[0]
    assert int(index[0]) == repeats * int(mixture.slots[0, source[0]]) + int(near_index[0])


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [1.0, -1.0], [float("nan")], [float("inf")], [1.0, 1e-9]])
def test_mixture_refuses_bad_weights(weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"weight|at least one source"):
        Mixture([Stage(weights)])


def test_packing_places_each_document_once_and_within_capacity() -> None:
    lengths = np.random.default_rng(0).integers(1, 140, 5000)
    table = pack_best_fit(lengths, 100)
    assert np.array_equal(np.sort(np.concatenate([table.documents, table.too_long])), np.arange(5000))
    assert set(table.too_long.tolist()) == set(np.flatnonzero(lengths > 100).tolist())
    filled = np.add.reduceat(lengths[table.documents], table.offsets[:-1])
    assert filled.max() <= 100
    assert table.fill == pytest.approx(filled.sum() / (100 * len(filled)))
    assert table.fill > 0.95


def test_packing_is_best_fit_and_deterministic() -> None:
    table = pack_best_fit(np.array([3, 6, 4, 7]), 10)  # 7 + 3 and 6 + 4: first fit would put 3 with 6
    packs = [table.documents[a:b].tolist() for a, b in zip(table.offsets, table.offsets[1:], strict=False)]
    assert packs == [[3, 0], [1, 2]]
    assert table.fill == 1.0
    table = pack_best_fit(np.array([7, 8, 2]), 10)  # the 2 belongs with the 8, the fuller row, and not with the 7
    assert [part.tolist() for part in np.split(table.documents, table.offsets[1:-1])] == [[1, 2], [0]]


def test_packing_of_nothing_that_fits() -> None:
    table = pack_best_fit(np.array([11, 12]), 10)
    assert table.offsets.tolist() == [0]
    assert table.too_long.tolist() == [0, 1]


def test_long_documents_are_cut_so_that_every_token_but_the_first_is_a_target_once() -> None:
    lengths = np.array([1, 2, 5, 6, 7, 10, 11, 12, 25], dtype=np.int64)
    starts, sizes = cut_long_documents(lengths, 5)
    assert sizes.max() == 6
    begins = np.cumsum(lengths) - lengths
    targets = [token for start, size in zip(starts, sizes, strict=True) for token in range(start + 1, start + size)]
    assert sorted(targets) == sorted(set(range(lengths.sum())) - set(begins.tolist()))
    short = lengths <= 6  # these stay whole
    kept = set(zip(starts.tolist(), sizes.tolist(), strict=True))
    assert set(zip(begins[short].tolist(), lengths[short].tolist(), strict=True)) <= kept
