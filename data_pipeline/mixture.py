"""Weighted mixtures: which source, and the how-many-th sample of it, stands at a position. O(1) per position."""

import math
from collections.abc import Sequence

import numpy as np

PATTERN_SLOTS = 65_536


class Mixture:
    """A repeating pattern of 65,536 slots in which each source holds a number of slots proportional to its weight.

    The proportions are exact over every whole pattern, and the slots of a source are spread evenly inside it. A
    weight is therefore rounded to a multiple of 1/65,536 of the sum; ``slots`` (int64 ``[sources]``) says what each
    source got.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights:
            raise ValueError("a mixture needs at least one source")
        for index, weight in enumerate(weights):
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"the weight of source {index} is {weight}; weights must be positive numbers")
        exact = np.asarray(weights, dtype=np.float64) / math.fsum(weights) * PATTERN_SLOTS
        slots = np.floor(exact).astype(np.int64)
        missing = PATTERN_SLOTS - int(slots.sum())
        slots[np.argsort(-(exact - slots), kind="stable")[:missing]] += 1
        if slots.min() == 0:
            index = int(slots.argmin())
            raise ValueError(
                f"the weight of source {index} is {weights[index]}, less than 1/{PATTERN_SLOTS} of the sum of weights "
                f"({math.fsum(weights)}): raise it or leave the source out"
            )
        self.slots = slots
        sources = np.repeat(np.arange(len(slots)), slots)
        ranks = np.concatenate([np.arange(count) for count in slots])
        ideal = (ranks + 0.5) * (PATTERN_SLOTS / slots[sources])
        order = np.argsort(ideal, kind="stable")
        self._source_of_slot = sources[order].astype(np.uint16)
        self._rank_of_slot = ranks[order].astype(np.uint64)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (source, index within the source), uint16 and uint64, of each of the uint64 ``positions``.

        The index counts the samples of that source that stand before the position; it grows without bound over epochs.
        """
        slot = positions % np.uint64(PATTERN_SLOTS)
        source = self._source_of_slot[slot]
        repeats = positions // np.uint64(PATTERN_SLOTS)
        return source, repeats * self.slots[source].astype(np.uint64) + self._rank_of_slot[slot]
