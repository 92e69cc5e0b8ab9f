"""Weighted mixtures: which source, and the how-many-th sample of it, stands at a position. O(1) per position.

A run may have stages (a curriculum): ranges of positions, each with weights of its own.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PATTERN_SLOTS = 65_536


@dataclass(frozen=True)
class Stage:
    """Weights from the end of the stage before to position ``until`` (None: without end)."""

    weights: Sequence[float]
    until: int | None = None


class Mixture:
    """In each stage a repeating pattern of 65,536 slots, in which each source holds slots in proportion to its weight.

    The proportions are exact over every whole pattern, and the slots of a source are spread evenly inside it. A
    weight is therefore rounded to a multiple of 1/65,536 of the sum; ``slots`` (int64 ``[stages, sources]``) says what
    each source got. A stage's pattern takes 256 KiB; one whose only source has all the weight needs none.

    Raises:
        ValueError: weights that are no weights, a source without weight in all stages, stages that do not follow one
            another.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        _check_stages(stages)
        self.slots = np.stack([_slots(stage.weights) for stage in stages])
        unused = np.flatnonzero(self.slots.max(axis=0) == 0)
        if unused.size:
            raise ValueError(f"the weight of source {unused[0]} is 0 in every stage: leave the source out")
        self.ends: list[int] = [stage.until for stage in stages if stage.until is not None]
        self._begins = np.array([0, *self.ends], dtype=np.uint64)
        self._patterns = [_Pattern(slots) for slots in self.slots]
        bases = [np.zeros(self.slots.shape[1], dtype=np.uint64)]
        for pattern, length in zip(self._patterns, np.diff(self._begins), strict=False):
            bases.append(bases[-1] + pattern.counts(int(length)))
        self._bases = np.stack(bases)  # samples of each source before each stage

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (source, index within the source), uint16 and uint64, of each of the uint64 ``positions``.

        The index counts the samples of that source that stand before the position; it grows without bound over epochs.
        """
        if len(self._patterns) == 1:
            return self._patterns[0].locate(positions)
        source = np.empty(positions.shape, dtype=np.uint16)
        index = np.empty(positions.shape, dtype=np.uint64)
        stage_of = np.searchsorted(self._begins, positions, side="right") - 1
        for stage in set(stage_of.tolist()):
            chosen = stage_of == stage
            source[chosen], within = self._patterns[stage].locate(positions[chosen] - self._begins[stage])
            index[chosen] = within + self._bases[stage][source[chosen]]
        return source, index

    def counts(self, position: int) -> np.ndarray:
        """int64 ``[sources]``: samples of each source before ``position``."""
        stage = int(np.searchsorted(self._begins, np.uint64(position), side="right")) - 1
        here = self._patterns[stage].counts(position - int(self._begins[stage]))
        return (self._bases[stage] + here).astype(np.int64)


class _Pattern:
    """The order of one stage's slots."""

    def __init__(self, slots: np.ndarray) -> None:
        self._slots = slots.astype(np.uint64)
        self._only = int(slots.argmax()) if slots.max() == PATTERN_SLOTS else None
        if self._only is not None:
            return
        sources = np.repeat(np.arange(len(slots)), slots)
        ranks = np.concatenate([np.arange(count) for count in slots])
        ideal = (ranks + 0.5) * (PATTERN_SLOTS / slots[sources])
        order = np.argsort(ideal, kind="stable")
        self._source_of_slot = sources[order].astype(np.uint16)
        self._rank_of_slot = ranks[order].astype(np.uint16)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self._only is not None:
            return np.full(positions.shape, self._only, dtype=np.uint16), positions
        slot = positions % np.uint64(PATTERN_SLOTS)
        source = self._source_of_slot[slot]
        repeats = positions // np.uint64(PATTERN_SLOTS)
        return source, repeats * self._slots[source] + self._rank_of_slot[slot]

    def counts(self, length: int) -> np.ndarray:
        """uint64 ``[sources]``: samples of each source in the first ``length`` positions."""
        if self._only is not None:
            return (np.arange(self._slots.size) == self._only).astype(np.uint64) * np.uint64(length)
        repeats, rest = divmod(length, PATTERN_SLOTS)
        begun = np.bincount(self._source_of_slot[:rest], minlength=self._slots.size).astype(np.uint64)
        return np.uint64(repeats) * self._slots + begun


def _check_stages(stages: Sequence[Stage]) -> None:
    if not stages or not stages[0].weights:
        raise ValueError("a mixture needs at least one source")
    for number, stage in enumerate(stages):
        if len(stage.weights) != len(stages[0].weights):
            raise ValueError(f"stage {number} has {len(stage.weights)} weights for {len(stages[0].weights)} sources")
        for index, weight in enumerate(stage.weights):
            if not math.isfinite(weight) or weight < 0:
                raise ValueError(f"the weight of source {index} is {weight}; weights must be positive numbers")
        if not math.fsum(stage.weights) > 0:
            raise ValueError(f"the weights of stage {number} are all 0; at least one must be positive")
        if (stage.until is None) != (number == len(stages) - 1):
            raise ValueError("every stage but the last needs an end, and the last has none")
    ends = [0, *(stage.until for stage in stages if stage.until is not None)]
    if any(after <= before for before, after in itertools.pairwise(ends)):
        raise ValueError(f"the ends of the stages, {ends[1:]}, do not grow")


def _slots(weights: Sequence[float]) -> np.ndarray:
    exact = np.asarray(weights, dtype=np.float64) / math.fsum(weights) * PATTERN_SLOTS
    slots = np.floor(exact).astype(np.int64)
    missing = PATTERN_SLOTS - int(slots.sum())
    slots[np.argsort(-(exact - slots), kind="stable")[:missing]] += 1
    for index, weight in enumerate(weights):
        if weight > 0 and slots[index] == 0:
            raise ValueError(
                f"the weight of source {index} is {weight}, less than 1/{PATTERN_SLOTS} of the sum of weights "
                f"({math.fsum(weights)}): raise it or leave the source out"
            )
    return slots
