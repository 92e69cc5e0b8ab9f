"""Whole conversations, or documents and the pieces of long ones, into rows of fixed capacity: best-fit decreasing."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PackTable:
    """Which documents share a row. Pack ``i`` holds ``documents[offsets[i]:offsets[i + 1]]``, longest first."""

    documents: np.ndarray  # int64, indices of documents
    offsets: np.ndarray  # int64 [packs + 1]
    too_long: np.ndarray  # int64, indices of documents longer than the capacity, which are in no pack
    fill: float  # tokens in packs / (packs * capacity)


def pack_best_fit(lengths: np.ndarray, capacity: int) -> PackTable:
    """Pack documents of ``lengths`` tokens into rows of ``capacity`` tokens, none split, none twice.

    The table takes 8 bytes a document and 8 a row; while it is made, up to 50 bytes a document.

    Best-fit decreasing: longest first, each into the fullest row that still has room (Johnson, *Near-optimal bin
    packing algorithms*, 1973). Equal lengths keep the order of the documents, so the table is a function of its
    arguments alone.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if capacity < 1:
        raise ValueError(f"a row must hold at least one token, not {capacity}")
    order = np.argsort(-lengths, kind="stable")
    too_long_count = int(np.count_nonzero(lengths > capacity))
    too_long, order = np.sort(order[:too_long_count]), order[too_long_count:]

    pack_of = np.empty(order.size, dtype=np.int64)
    packs_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    # bit c is set when some pack has exactly c tokens free: the best fit is the lowest set bit at or above a length
    rooms = 0
    packs = 0
    for index, length in enumerate(lengths[order].tolist()):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = packs_with_room[room].pop()
            if not packs_with_room[room]:
                rooms ^= 1 << room
        else:
            room, pack = capacity, packs
            packs += 1
        pack_of[index] = pack
        room -= length
        if room:
            packs_with_room[room].append(pack)
            rooms |= 1 << room

    by_pack = np.argsort(pack_of, kind="stable")
    counts = np.bincount(pack_of, minlength=packs) if packs else np.zeros(0, dtype=np.int64)
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)])
    fill = float(lengths[order].sum()) / (packs * capacity) if packs else 0.0
    return PackTable(documents=order[by_pack], offsets=offsets, too_long=too_long, fill=fill)


def cut_long_documents(lengths: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Where documents longer than a row (``sequence_length + 1`` tokens) are cut.

    Pieces of a document overlap by one token, as the windows of a flat stream do, so that every token but a document's
    first is a target exactly once. A last piece of one token would have no target and is left out.

    Args:
        lengths: int64 ``[documents]``, tokens of each.

    Returns:
        (starts, lengths) of the pieces, int64: starts are tokens from the first document's beginning.
    """
    starts = np.cumsum(lengths) - lengths
    cuts = np.where(lengths > sequence_length + 1, (lengths - 1) // sequence_length, 0)
    rests = lengths - cuts * sequence_length
    pieces = cuts + ((cuts == 0) | (rests > 1))
    document = np.repeat(np.arange(lengths.size), pieces)
    number = np.arange(document.size) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    sizes = np.where(number < cuts[document], sequence_length + 1, rests[document])
    return starts[document] + number * sequence_length, sizes
