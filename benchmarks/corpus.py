"""Build the benchmarks' text: some 320 MB of documentation from Debian packages, as JSONL with one field, ``text``.

    python benchmarks/corpus.py [FOLDER]

Packages are downloaded and unpacked into the folder (default build/corpus), not installed. A document is a file; of
dictionaries, which are one large file, about 8 KB. Paragraphs that a package repeats (headers, footers, navigation) are
dropped: an engine with a cache would look faster than it is.
"""

import contextlib
import gzip
import hashlib
import html
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

DEFAULT_FOLDER = Path(__file__).resolve().parents[1] / "build" / "corpus"
SMALLEST_BYTES = 200_000_000
ENTRIES_CHARACTERS = 8000
PACKAGES = (
    "anarchism",
    "apache2-doc",
    "dict-foldoc",
    "dict-gcide",
    "dict-wn",
    "linux-doc-6.1",
    "openjdk-17-doc",
    "perl-doc",
    "postgresql-doc-15",
    "python-django-doc",
    "python3.11-doc",
    "rust-doc",
    "sqlite3-doc",
    "vim-doc",
    "erlang-doc",
    "ghc-doc",
    "libboost1.74-doc",
    "python-pandas-doc",
    "qtbase5-doc-html",
)
WITH_SOURCES = ("anarchism", "linux-doc-6.1", "python3.11-doc")  # these hold every page twice, the second time as HTML
SUFFIXES = (".html", ".htm", ".txt", ".rst", ".md", ".pod", ".dict.dz")
HTML_DROPPED = re.compile(r"<(script|style|head|nav)\b.*?</\1\s*>|<!--.*?-->", re.DOTALL | re.IGNORECASE)
HTML_BLOCK = re.compile(r"</?(p|div|h[1-6]|li|ul|ol|table|tr|pre|dl|dt|dd|section|br|hr)\b[^>]*>", re.IGNORECASE)
HTML_TAG = re.compile(r"<[a-zA-Z/!][^>]*>")
DECLARED_ENCODING = re.compile(rb"charset=[\"']?([\w-]+)")
BLANK_LINES = re.compile(r"\n\s*\n")


def build_corpus(folder: Path = DEFAULT_FOLDER) -> Path:
    """The path of corpus.jsonl in the folder, made if it is not there; corpus.json beside it says of what.

    Raises:
        OSError: apt-get or dpkg-deb failed.
        ValueError: the packages hold less than 200 MB of text.
    """
    corpus = folder / "corpus.jsonl"
    if (folder / "corpus.json").is_file():
        return corpus
    folder.mkdir(parents=True, exist_ok=True)
    versions, text_bytes, documents = {}, 0, 0
    with open(corpus, "w", encoding="utf-8") as output:
        for package in PACKAGES:
            versions[package] = unpack(package, folder)
            package_bytes = 0
            for text in documents_of(folder / package):
                output.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                package_bytes += len(text.encode())
                documents += 1
            print(f"{package} {versions[package]}: {package_bytes / 1e6:.1f} MB", flush=True)
            text_bytes += package_bytes
    if text_bytes < SMALLEST_BYTES:
        raise ValueError(f"the packages hold {text_bytes} bytes of text only, {SMALLEST_BYTES} are needed")
    facts = {"packages": versions, "documents": documents, "text_bytes": text_bytes, "bytes": corpus.stat().st_size}
    (folder / "corpus.json").write_text(json.dumps(facts, indent=1) + "\n")
    return corpus


def unpack(package: str, folder: Path) -> str:
    """Unpack a Debian package into FOLDER/PACKAGE and return its version."""
    files = list(folder.glob(f"{package}_*.deb"))
    if not files:
        run(["apt-get", "download", "-q", package], folder)
        files = list(folder.glob(f"{package}_*.deb"))
    if not (folder / package).is_dir():
        run(["dpkg-deb", "-x", files[0].name, f"{package}.part"], folder)
        (folder / f"{package}.part").rename(folder / package)
    return files[0].name.split("_")[1].replace("%3a", ":")


def run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        hint = " (this needs Debian; run apt-get update once before)" if command[0] in ("apt-get", "dpkg-deb") else ""
        raise OSError(f"{' '.join(command)} failed: {done.stderr.strip()}{hint}")


def documents_of(folder: Path) -> Iterator[str]:
    """The texts of a package's files in a fixed order, without paragraphs that were there before."""
    seen: set[bytes] = set()
    for path in sorted(folder.rglob("*")):
        name = path.name.removesuffix(".gz")
        page = name.endswith((".html", ".htm"))
        if (
            path.is_symlink()
            or not path.is_file()
            or not name.endswith(SUFFIXES)
            or (page and folder.name in WITH_SOURCES)
        ):
            continue
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        text = decoded(data)
        if page:
            text = html_text(text)
        for piece in entries(text) if name.endswith(".dict.dz") else [text]:
            paragraphs = [paragraph for paragraph in BLANK_LINES.split(piece) if is_new(paragraph, seen)]
            if paragraphs:
                yield "\n\n".join(paragraphs)


def decoded(data: bytes) -> str:
    """UTF-8, else the encoding that a page declares, else Latin-1, which old files are in."""
    declared = DECLARED_ENCODING.search(data)
    for encoding in ("utf-8", *([declared[1].decode()] if declared else [])):
        with contextlib.suppress(UnicodeDecodeError, LookupError):
            return data.decode(encoding)
    return data.decode("latin-1")


def is_new(paragraph: str, seen: set[bytes]) -> bool:
    digest = hashlib.blake2b(paragraph.strip().encode(), digest_size=12).digest()
    if not paragraph.strip() or digest in seen:
        return False
    seen.add(digest)
    return True


def html_text(page: str) -> str:
    page = HTML_BLOCK.sub("\n", HTML_DROPPED.sub(" ", page))
    lines = html.unescape(HTML_TAG.sub("", page)).replace("\u00a0", " ").splitlines()
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in lines))


def entries(text: str) -> Iterator[str]:
    """Pieces of about 8000 characters, cut at line ends."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + ENTRIES_CHARACTERS) + 1 or len(text)
        yield text[start:end]
        start = end


if __name__ == "__main__":
    print(build_corpus(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_FOLDER))
