"""Sources of text at URLs: the data are those of the same files here, and what a store does wrong is one sentence."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from data_samples import save_tokenizer
from pyarrow import parquet
from ranged_server import RangedServer
from source_samples import read

from data_pipeline import remote_files
from data_pipeline.prepare import PrepareOptions, prepare
from data_pipeline.sources import ReadOptions, find_files

TEXTS = [f"Document {number}: {'blow, winds, ' * (number % 40)}" for number in range(3000)]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangedServer]:
    """Serves files of every kind, each of many ranges."""
    monkeypatch.setattr(remote_files, "RANGE_BYTES", 10_000)
    folder = tmp_path / "served"
    folder.mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "a.jsonl").write_text(lines, encoding="utf-8")
    (folder / "b.json").write_text(f"[{','.join(lines.splitlines())}]", encoding="utf-8")
    (folder / "c.csv").write_text("text\n" + "\n".join(f'"{text}"' for text in TEXTS) + "\n", encoding="utf-8")
    (folder / "d.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    with fsspec.open(folder / "e.jsonl.gz", "wt", compression="gzip") as file:
        file.write(lines)
    table = pa.table({"other": list(range(len(TEXTS))), "text": TEXTS})
    parquet.write_table(table, folder / "f.parquet", row_group_size=500, compression="none")
    with pa.OSFile(str(folder / "g.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, 500)
    with RangedServer(folder).serving() as served:
        yield served


def texts(*inputs: Path | str) -> list[str]:
    return read(*inputs)


@pytest.mark.parametrize("name", ["a.jsonl", "b.json", "c.csv", "d.txt", "e.jsonl.gz", "f.parquet", "g.arrow"])
def test_every_kind_of_file_reads_as_it_does_here(server: RangedServer, name: str) -> None:
    assert texts(f"{server.url}/{name}") == texts(server.folder / name)
    largest = (server.folder / name).stat().st_size
    assert largest > 2 * remote_files.RANGE_BYTES or name.endswith(".gz")
    assert server.requests.count(name) > largest // remote_files.RANGE_BYTES, "it was not read in ranges"
    assert server.bytes_sent < 3 * largest + 10 * remote_files.RANGE_BYTES


def options(output: Path, *inputs: Path | str, **more: Any) -> PrepareOptions:
    tokenizer = output.parent / "tokenizer"
    if not tokenizer.exists():
        save_tokenizer(tokenizer)
    return PrepareOptions([str(entry) for entry in inputs], output, tokenizer, unit_bytes=30_000, **more)


def shards(output: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(output.glob("*/u-*"))}


def test_prepare_gives_the_same_data_and_knows_a_file_that_changed(server: RangedServer, tmp_path: Path) -> None:
    url = f"{server.url}/a.jsonl"
    report = prepare(options(tmp_path / "far", url, workers=2))
    prepare(options(tmp_path / "near", server.folder / "a.jsonl"))
    assert shards(tmp_path / "far") == shards(tmp_path / "near") and len(shards(tmp_path / "far")) > 20
    assert report["files"][0]["name"] == "a.jsonl" and url in report["command"]
    server.requests.clear()
    assert prepare(options(tmp_path / "far", url))["reused"]
    assert len(server.requests) < 10, "an equal preparation is known by what the store says of the file"
    with open(server.folder / "a.jsonl", "r+b") as file:  # in the first bytes, for this server has no ETag
        file.write(b'{"text": "F')
    with pytest.raises(ValueError, match="already holds data made with other options or from other files"):
        prepare(options(tmp_path / "far", url))


def test_folders_and_patterns_at_a_url(server: RangedServer) -> None:
    store = fsspec.filesystem("memory")
    store.put(f"{server.folder}/", "memory://lake/", recursive=True)
    store.pipe("/lake/.hidden.txt", b"no")
    store.pipe("/lake/deep/notes.pdf", b"no")
    store.pipe("/lake/deep/h.txt", b"yes")
    files, ignored = find_files(["memory://lake"], ReadOptions())
    assert [file.name for file in files] == sorted([*(path.name for path in server.folder.iterdir()), "deep/h.txt"])
    assert ignored == ["memory://lake/deep/notes.pdf"]
    assert texts("memory://lake/*.jsonl", "memory://lake/a.jsonl") == TEXTS, "a file named twice is read once"
    assert texts("memory://lake/deep") == ["yes"]
    with pytest.raises(FileNotFoundError, match=r"memory://lake/\*\.xml' gives no file to read"):
        texts("memory://lake/*.xml")


def test_a_server_that_was_away_is_waited_for(server: RangedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing but its size was asked for: of that fsspec says that the file is not there."""
    with RangedServer(server.folder).serving() as other:
        pass
    with other.away_for(1):
        assert texts(f"{other.url}/a.jsonl") == TEXTS
    monkeypatch.setattr(remote_files, "DEADLINE_SECONDS", 1.0)
    with pytest.raises(OSError, match=r"a\.jsonl could not be read for \d seconds .*keeps the units that are done"):
        texts(f"{other.url}/a.jsonl")


def test_a_server_that_stops_midway_gives_no_short_file(server: RangedServer, tmp_path: Path) -> None:
    server.answer = lambda name, content: content if len(server.requests) < 30 else content[:-1]
    with pytest.raises(ValueError, match=r"a\.jsonl: of bytes [\d,]+ to [\d,]+ 9,999 came, twice: see whether"):
        prepare(options(tmp_path / "out", f"{server.url}/a.jsonl"))
    assert not (tmp_path / "out" / "report.json").exists()
    server.answer = lambda name, content: content
    assert prepare(options(tmp_path / "out", f"{server.url}/a.jsonl"))["run"]["units_made"] > 10


def test_a_file_that_changes_while_it_is_read_is_not_mixed(server: RangedServer) -> None:
    [file] = find_files([f"{server.url}/d.txt"], ReadOptions())[0]
    (server.folder / "d.txt").write_text("shorter")
    with pytest.raises(ValueError, match=r"d\.txt was changed meanwhile \(\d+ bytes.*; now 7 bytes"):
        remote_files.open_stored(file)


@pytest.mark.parametrize(
    ("url", "error", "said"),
    [
        ("URL/none.txt", FileNotFoundError, r"none\.txt does not exist: look at the URL"),
        ("URL/d.pdf", ValueError, r"/d\.pdf: the extension '\.pdf' is unknown"),
        ("URL/d.bin", ValueError, "Megatron pairs are read through memory maps"),
        ("memory://nowhere/d.txt", FileNotFoundError, "does not exist"),
        ("nosuch://place/d.txt", ValueError, "cannot be read: Protocol not known"),
        ("http:///d.txt", ValueError, "cannot be asked for"),
        ("dropbox://place/d.txt", ValueError, r"cannot be read: .*dropbox.*trainyard\[remote\]"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(server: RangedServer, url: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said) as refused:
        texts(url.replace("URL", server.url))
    assert "\n" not in str(refused.value)


def test_servers_that_tell_too_little(server: RangedServer, capsys: pytest.CaptureFixture[str]) -> None:
    find_files([f"{server.url}/d.txt"], ReadOptions())
    assert "d.txt the store tells neither an ETag nor a time" in capsys.readouterr().out
    server.requests.clear()
    server.ranges = False
    with pytest.raises(
        ValueError, match=r"d\.txt can only be read from its begin to its end \(its server gives no ranges"
    ):
        find_files([f"{server.url}/d.txt"], ReadOptions())
    assert server.requests == ["d.txt"], "which was given up at its first byte"
    server.ranges, server.sizes = True, False
    with pytest.raises(ValueError, match=r"d\.txt can only be read from .*\(the store tells no size\)"):
        find_files([f"{server.url}/d.txt"], ReadOptions())
