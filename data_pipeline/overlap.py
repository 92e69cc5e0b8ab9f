"""Which share of validation's text stands in training, too: its runs of 13 tokens, by their hashes."""

from collections.abc import Iterator

import numpy as np

from data_pipeline.decontamination import RUN_WORDS, HashSet
from data_pipeline.n_grams import MIX
from data_pipeline.token_shards import TokenShards

RUN_TOKENS = RUN_WORDS
MOST_RUNS = 2**22  # of validation that are looked for
BLOCK_TOKENS = 2**20


def count_overlap(train: TokenShards, validation: TokenShards) -> dict[str, int]:
    """Validation's runs of 13 tokens that were looked for, and those of them that stand in training.

    A run lies within a document; of conversations it is the assistant's alone, as templates repeat the rest. Of more
    than ``MOST_RUNS`` runs those with the smallest hashes are looked for, which is a random choice of texts.
    """
    limit = np.uint64(min(2**64 - 1, 2**64 * MOST_RUNS // max(1, validation.tokens)))
    found = [np.zeros(0, np.uint64)]
    ends = np.cumsum(validation.document_lengths())
    for begin, hashes in _runs(validation):
        starts = begin + np.arange(hashes.size)
        chosen = ends[np.searchsorted(ends, starts, side="right")] - starts >= RUN_TOKENS
        if validation.kind == "chat":
            trained = np.cumsum(np.append(False, validation.read_mask(begin, hashes.size + RUN_TOKENS - 1)))
            chosen &= trained[RUN_TOKENS:] - trained[:-RUN_TOKENS] == RUN_TOKENS
        found.append(hashes[chosen & (hashes <= limit)])
    runs, counts = np.unique(np.concatenate(found), return_counts=True)
    also = np.zeros(runs.size, dtype=bool)
    if runs.size:
        known = HashSet(runs)
        for _, hashes in _runs(train):
            also[known.places(hashes)] = True
    return {"validation_runs": int(counts.sum()), "validation_runs_in_training": int(counts[also].sum())}


def _runs(shards: TokenShards) -> Iterator[tuple[int, np.ndarray]]:
    """(place of the first, uint64 hashes) of all runs, also of those over the ends of documents.

    Those hold an end token in their middle: none of them is like a run within a document.
    """
    for begin in range(0, shards.tokens - RUN_TOKENS + 1, BLOCK_TOKENS):
        count = min(BLOCK_TOKENS + RUN_TOKENS - 1, shards.tokens - begin)
        tokens = (shards.read(begin, count).astype(np.uint64) + np.uint64(1)) * MIX
        tokens ^= tokens >> np.uint64(29)
        hashes = np.zeros(count - RUN_TOKENS + 1, dtype=np.uint64)
        for first in range(RUN_TOKENS):
            hashes *= MIX
            hashes += tokens[first : first + hashes.size]
        yield begin, (hashes ^ (hashes >> np.uint64(32))) * MIX
