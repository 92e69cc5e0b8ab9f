"""Units of work: their parts give the whole, whatever their size, and name the right rows."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from data_samples import write_jsonl
from source_samples import read, read_units, values
from test_sources_containers import _megatron_pair

from data_pipeline.sources import Ledger, Part, ReadOptions, find_files, plan_units, read_documents


def _texts(generator: random.Random) -> list[str]:
    longest = generator.choice([3, 40, 3000])
    return ["ü" * generator.randint(0, longest) + str(number) for number in range(generator.randint(1, 120))]


def _write(container: str, folder: Path, generator: random.Random) -> tuple[Path, list[Any]]:
    """A file with random documents, and the documents."""
    texts = _texts(generator)
    rows = [{"text": text} for text in texts]
    if container == "jsonl":
        ends = generator.choice(["\n", "\r\n", "\n\n \n"])
        content = ends.join(json.dumps(row, ensure_ascii=False) for row in rows) + generator.choice([ends, ""])
        (folder / "a.jsonl").write_bytes(generator.choice([b"", b"\xef\xbb\xbf"]) + content.encode())
        return folder / "a.jsonl", texts
    if container == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), folder / "a.parquet", row_group_size=generator.randint(1, 50))
        return folder / "a.parquet", texts
    if container == "arrow":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(str(folder / "a.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=generator.randint(1, 50))
        return folder / "a.arrow", texts
    if container == "dataset":
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(str(folder / "a"))
        return folder / "a", texts
    documents = [list(range(len(text))) for text in texts]
    return _megatron_pair(folder / "a", documents, split=generator.random() < 0.5), documents


@pytest.mark.parametrize("container", ["jsonl", "parquet", "arrow", "megatron", "dataset"])
def test_parts_give_the_whole_whatever_the_unit(tmp_path: Path, container: str) -> None:
    for seed in range(3 if container == "dataset" else 25):
        generator = random.Random(seed)
        (tmp_path / str(seed)).mkdir()
        path, expected = _write(container, tmp_path / str(seed), generator)
        size = max(1, find_files([str(path)], ReadOptions())[0][0].bytes)
        most = 0
        for unit_bytes in (size, max(1, size // 2), max(1, size // 7), generator.randint(1, size), max(1, size // 300)):
            units = read_units(path, unit_bytes)
            found = values(document for unit in units for document in unit)
            if container == "megatron":
                found = [np.asarray(ids).tolist() for ids in found]
            assert found == expected, (seed, unit_bytes)
            most = max(most, len(units))
        assert most > 1 or len(expected) <= 50
        whole = [document.location for document in read_units(path, 2**40)[0]]
        parts = [document.location for unit in read_units(path, max(1, size // 3)) for document in unit]
        assert parts == whole


def test_plans_depend_on_the_files_only_and_keep_their_order(tmp_path: Path) -> None:
    for number, count in enumerate((1, 1, 500, 1, 1, 1)):
        write_jsonl(tmp_path / f"{number}.jsonl", [{"text": "x" * 90}] * count)
    options = ReadOptions()
    files, _ = find_files([str(tmp_path)], options)
    units = plan_units(files, options, 20_000)
    assert units == plan_units(list(files), options, 20_000)
    parts = [part for unit in units for part in unit.parts]
    assert [unit.number for unit in units] == list(range(len(units)))
    assert [part.file for part in parts] == [0, 1, 2, 2, 2, 3, 4, 5]
    assert parts[2:5] == [Part(2, 0, 17_166), Part(2, 17_166, 34_333), Part(2, 34_333, 51_500)]
    assert [len(unit.parts) for unit in units] == [3, 1, 4]
    for unit in units:
        assert sum(part.end - part.begin for part in unit.parts) <= 20_000


def test_what_cannot_be_cut_is_one_part(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * 90}] * 100)
    (tmp_path / "b.csv").write_text("text\n" + "xxxxxxxxx\n" * 1000)
    options = ReadOptions(encoding="utf-16")
    files, _ = find_files([str(tmp_path / "a.jsonl")], options)
    assert [unit.parts for unit in plan_units(files, options, 100)] == [(Part(0, 0, 1),)]
    files, _ = find_files([str(tmp_path / "b.csv")], ReadOptions())
    assert [unit.parts for unit in plan_units(files, ReadOptions(), 100)] == [(Part(0, 0, 1),)]
    assert len(read_units(tmp_path / "b.csv", 100)[0]) == 1000
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    assert [len(unit) for unit in read_units(tmp_path / "c.jsonl.gz", 10)] == [100]


@pytest.mark.parametrize("container", ["jsonl", "parquet", "arrow", "dataset"])
def test_a_bad_row_in_a_later_part_has_its_own_number(tmp_path: Path, container: str) -> None:
    import datasets

    rows: list[dict[str, Any]] = [{"text": f"row {number}"} for number in range(1, 101)]
    rows[79] = {"text": None}
    name = tmp_path / f"a.{container}"
    if container == "jsonl":
        name = write_jsonl(name, rows)
        name.write_bytes(b"\xef\xbb\xbf\n" + name.read_bytes())  # one line before
    elif container == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), name, row_group_size=9)
    elif container == "arrow":
        with pa.ipc.new_file(str(name), pa.schema([("text", pa.string())])) as writer:
            writer.write_table(pa.Table.from_pylist(rows), max_chunksize=9)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(name))
    place = rf"a\.{container}:81" if container == "jsonl" else rf"a\.{container}, row 80"
    options = ReadOptions(skip_bad_rows=True)
    files, _ = find_files([str(name)], options)
    units = plan_units(files, options, max(files[0].bytes // 6, 1))
    assert len(units) >= 5
    merged = Ledger()
    for unit in units:
        ledger = Ledger()
        for part in unit.parts:
            list(read_documents(files[0], options, part, ledger))
        merged.merge(ledger)
    (locations,) = [entry["locations"] for entry in merged.skipped.values()]
    assert locations == [str(name) + (":81" if container == "jsonl" else ", row 80")]
    with pytest.raises(ValueError, match=place + ": the field 'text' is null"):
        read_units(name, max(files[0].bytes // 6, 1))
    assert read(name, ledger=Ledger(), skip_bad_rows=True) == [row["text"] for row in rows if row["text"]]


def test_a_line_longer_than_a_unit_belongs_to_the_unit_where_it_begins(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b" * 5000}, {"text": "c"}])
    units = read_units(path, 100)
    assert len(units) > 40
    assert [len(unit) for unit in units if unit] == [2, 1]
