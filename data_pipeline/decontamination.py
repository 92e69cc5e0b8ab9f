"""What training must not hold: runs of words of the evaluation files, as hashes that all units are held against."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.clean import Reason
from data_pipeline.n_grams import n_grams
from data_pipeline.plan import Plan
from data_pipeline.shard_writer import write_file_atomically
from data_pipeline.sources import read_texts
from data_pipeline.unit_documents import RECORDS, judged_tally

RUN_WORDS = 13  # as for GPT-3 (arXiv:2005.14165, appendix C)
LARGEST_SHARE = 0.5  # of the documents; above it the evaluation files are the training data


def _hashes_path(plan: Plan) -> Path:
    return plan.output / RECORDS / "evaluation.hashes"


def write_evaluation(plan: Plan) -> None:
    """Write the sorted hashes of all runs in the evaluation files, and then what they are of, where it is not there."""
    if evaluation_counts(plan) is not None:
        return
    counts = {"files": len(plan.evaluation_files), "texts": 0, "texts_of_one_run": 0}
    found: list[np.ndarray] = [np.zeros(0, np.uint64)]
    for file in plan.evaluation_files:
        for text in read_texts(file):
            runs = n_grams(text, RUN_WORDS)
            counts["texts"] += runs.size > 0
            counts["texts_of_one_run"] += runs.size == 1
            found.append(runs)
    hashes = np.unique(np.concatenate(found))
    if not hashes.size:
        names = ", ".join(file.label for file in plan.evaluation_files)
        raise ValueError(f"there are no words in the evaluation files {names} (decontamination)")
    write_file_atomically(_hashes_path(plan), hashes.astype("<u8").tobytes())
    counts["runs"] = hashes.size
    write_file_atomically(_hashes_path(plan).with_suffix(".json"), json.dumps(counts).encode())


def evaluation_counts(plan: Plan) -> dict[str, int] | None:
    """Files, texts and different runs in them; None where they are not written yet."""
    try:
        return json.loads(_hashes_path(plan).with_suffix(".json").read_bytes())
    except FileNotFoundError:
        return None


class HashSet:
    """Sorted hashes, to be looked up in large arrays: 8 bytes each, and 8 to 16 for the search."""

    def __init__(self, hashes: np.ndarray) -> None:
        self._hashes = hashes
        # which leading bits there are: most others are told by these without a search
        self._unused_bits = np.uint64(64 - (8 * self._hashes.size).bit_length())
        self._leading = np.zeros(2 ** (64 - int(self._unused_bits)), dtype=bool)
        self._leading[self._hashes >> self._unused_bits] = True

    def places(self, hashes: np.ndarray) -> np.ndarray:
        """Where those of ``hashes`` that are there stand."""
        possible = hashes[self._leading[hashes >> self._unused_bits]]
        places = np.minimum(np.searchsorted(self._hashes, possible), self._hashes.size - 1)
        return places[self._hashes[places] == possible]


class Contamination:
    """Finds texts that share a run of words with the evaluation files."""

    def __init__(self, plan: Plan) -> None:
        self._hashes = HashSet(np.fromfile(_hashes_path(plan), "<u8"))

    def find(self, text: str) -> Reason | None:
        """Why the text must not be in training."""
        runs = n_grams(text, RUN_WORDS)
        count = self._hashes.places(runs).size
        if not count:
            return None
        return "decontamination", f"{count:,} of {runs.size:,} runs of words stand in the evaluation files"


def require_other_data(plan: Plan) -> None:
    """Raise ValueError where the evaluation files hold text of most documents."""
    tally: dict[str, Any] = judged_tally(plan)
    others = sum(entry["documents"] for name, entry in tally["dropped"].items() if name != "decontamination")
    count, total = tally["dropped"]["decontamination"]["documents"], tally["documents_in"] - others
    if count > LARGEST_SHARE * total:
        raise ValueError(
            f"{count:,} of the {total:,} documents that the other rules keep hold text of the evaluation files "
            "(decontamination): these are the training data; give other files"
        )
