"""Reading of sources as the tests want it: whole, in parts, with a ledger, and with the peak of memory measured."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from data_pipeline.sources import Document, Ledger, ReadOptions, find_files, plan_units, read_documents

ROOT = Path(__file__).parents[2]
MEMORY_PROGRAM = """
import json, sys
import pyarrow.parquet  # its import is no part of what reading takes
from data_pipeline.sources import Ledger, ReadOptions, find_files, read_documents

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

options, ledger = ReadOptions(), Ledger()
(file,), _ = find_files([sys.argv[1]], options)
before, count, longest = peak(), 0, 0
for document in read_documents(file, options, None, ledger):
    count, longest = count + 1, max(longest, len(document.text))
print(json.dumps([count, longest, peak() - before, ledger.cut_short]))
"""


def values(documents: Any) -> list[Any]:
    """What documents hold: a text, messages or ids."""
    return [
        document.text if document.messages is None and document.ids is None else (document.messages or document.ids)
        for document in documents
    ]


def read(*inputs: Path | str, ledger: Ledger | None = None, **options: Any) -> list[Any]:
    """Texts, or messages, of all documents."""
    chosen = ReadOptions(**options)
    files, _ = find_files([str(entry) for entry in inputs], chosen)
    return values(document for file in files for document in read_documents(file, chosen, None, ledger))


def read_units(path: Path | str, unit_bytes: int, **options: Any) -> list[list[Document]]:
    """Documents of each unit, read as a worker does."""
    chosen = ReadOptions(**options)
    files, _ = find_files([str(path)], chosen)
    return [
        [document for part in unit.parts for document in read_documents(files[part.file], chosen, part, Ledger())]
        for unit in plan_units(files, chosen, unit_bytes)
    ]


def read_in_a_process(path: Path) -> tuple[int, int, int, list[dict[str, Any]]]:
    """(documents, characters of the longest, growth of the peak of memory in bytes, what was cut short)."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEMORY_PROGRAM, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    count, longest, growth, cuts = json.loads(done.stdout)
    return count, longest, growth, cuts
