"""Readers of Arrow data: Parquet, Arrow IPC files and streams, and Hugging Face datasets from disk or from the hub.

pyarrow and datasets are imported where they are needed: that takes 0.2 and 2 seconds.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.byte_streams import open_bytes
from data_pipeline.documents import BadRow, Place, Reading, Row, SourceFile

BATCH_ROWS = 1024
BATCH_BYTES = 4 * 2**20  # what is turned into Python objects at once; rows of documents may be long
ARROW_FILE_MAGIC = b"ARROW1"
HUB_PREFIX = "hf://"  # NAME[/CONFIG][:SPLIT], streamed at one revision


def _batch_rows(total_bytes: int, rows: int) -> int:
    return max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(total_bytes, 1)))


def _as_rows(reading: Reading, batches: Iterable[tuple[Any, int]], first: int = 0) -> Iterator[Row]:
    """Rows of (batch, bytes of the file read) pairs; ``first`` rows of the file stand before them."""
    number = first
    try:
        for batch, position in batches:
            try:
                rows = batch.to_pylist()
            except UnicodeDecodeError:
                rows = [_one_row(batch.slice(index, 1)) for index in range(batch.num_rows)]
            for row in rows:
                number += 1
                yield number, row, position
    except (OSError, ValueError) as error:  # pyarrow's errors are subclasses of these
        where = f"behind {reading.place.name(number)}" if number else "from its first row"
        raise ValueError(f"{reading.file.label} cannot be read {where}: {error}") from None


def _one_row(batch: Any) -> Any:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return BadRow("not valid in the encoding", f"a text is not valid utf-8 ({error.reason})")


def _columns_to_read(reading: Reading, names: Sequence[str]) -> list[str]:
    return [name for name in names if name in reading.fields]


# Parquet


def parquet_file(file: SourceFile) -> Any:
    """A ``pyarrow.parquet.ParquetFile``. Raises ValueError where it is not Parquet."""
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(open_bytes(file) if file.url else file.path, buffer_size=2**20, pre_buffer=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file.label} cannot be read as Parquet: {error}") from None


def parquet_rows(reading: Reading) -> Iterator[Row]:
    """Rows of the part's row groups."""
    reading.place = Place(f"{reading.file.label}, row ")
    table = parquet_file(reading.file)
    columns = _columns_to_read(reading, table.schema_arrow.names)
    groups = [table.metadata.row_group(index) for index in range(table.num_row_groups)]
    part = reading.part
    begin, end = (part.begin, part.end) if part else (0, len(groups))
    before = sum(group.num_rows for group in groups[:begin])

    def batches() -> Iterator[tuple[Any, int]]:
        done = before
        for index in range(begin, end):
            size = _batch_rows(groups[index].total_byte_size, groups[index].num_rows)
            for batch in table.iter_batches(size, row_groups=[index], columns=columns):
                done += batch.num_rows
                yield batch, reading.file.bytes * done // table.metadata.num_rows

    yield from _as_rows(reading, batches(), before)


# Arrow IPC


def is_arrow_file(file: SourceFile) -> bool:
    """Whether it is of the file format, whose batches can be read in any order, and not of the stream format."""
    with open_bytes(file) as content:
        return content.read(len(ARROW_FILE_MAGIC)) == ARROW_FILE_MAGIC


def arrow_reader(file: SourceFile) -> Any:
    """A RecordBatchFileReader or RecordBatchStreamReader. Raises ValueError where it is neither."""
    import pyarrow as pa

    try:
        # pages of a memory map would count as memory in use
        source = pa.PythonFile(open_bytes(file)) if file.url else pa.OSFile(str(file.path))
        return pa.ipc.open_file(source) if is_arrow_file(file) else pa.ipc.open_stream(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file.label} cannot be read as Arrow: {error}") from None


def arrow_rows(reading: Reading) -> Iterator[Row]:
    """Rows of the part's record batches."""
    reader, size, part = arrow_reader(reading.file), reading.file.bytes, reading.part
    columns = _columns_to_read(reading, reader.schema.names)
    if not is_arrow_file(reading.file):
        reading.place = Place(f"{reading.file.label}, row ")
        yield from _as_rows(reading, _slices(((batch, 0) for batch in reader), columns, size))
        return
    total = reader.num_record_batches
    begin, end = (part.begin, part.end) if part else (0, total)

    # The file has no count of rows before a batch: it is made when a message needs it.
    def count_before() -> int:
        return sum(reader.get_batch(index).num_rows for index in range(begin))

    reading.place = Place(f"{reading.file.label}, row ", count_before if begin else None)
    loaded = ((reader.get_batch(index), size * (index + 1) // total) for index in range(begin, end))
    yield from _as_rows(reading, _slices(loaded, columns, size // max(total, 1)))


def _slices(loaded: Iterable[tuple[Any, int]], columns: list[str], batch_bytes: int) -> Iterator[tuple[Any, int]]:
    for batch, position in loaded:
        wanted = batch.select(columns)
        size = _batch_rows(max(wanted.nbytes, 1), batch.num_rows)
        for begin in range(0, batch.num_rows, size):
            yield wanted.slice(begin, size), position


# Hugging Face datasets


def dataset_on_disk(file: SourceFile) -> Any:
    """The ``datasets.Dataset`` in a folder. Raises ValueError where there is none."""
    import datasets

    try:
        return datasets.load_from_disk(str(file.path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file.label} cannot be read as a Hugging Face dataset: {error}") from None


def dataset_rows(reading: Reading) -> Iterator[Row]:
    """Rows of the part of a dataset on disk."""
    dataset, part = dataset_on_disk(reading.file), reading.part
    total = len(dataset)
    begin, end = (part.begin, part.end) if part else (0, total)
    selected = dataset if part is None else dataset.select(range(begin, end))
    size = _batch_rows(reading.file.bytes, total)
    yield from rows_of_dataset(reading, selected, dataset.column_names, begin, total, size)


def rows_of_dataset(
    reading: Reading, dataset: Any, names: Sequence[str], first: int = 0, total: int = 0, batch_rows: int = BATCH_ROWS
) -> Iterator[Row]:
    """Rows of a ``Dataset`` or ``IterableDataset``; ``first`` rows of the ``total`` (0: unknown) stand before them."""
    reading.place = Place(f"{reading.file.label}, row ")
    selected = dataset.select_columns(_columns_to_read(reading, names)).with_format("arrow")

    def batches() -> Iterator[tuple[Any, int]]:
        done = first
        for batch in selected.iter(batch_size=batch_rows):
            done += batch.num_rows
            yield batch, reading.file.bytes * done // total if total else 0

    yield from _as_rows(reading, batches(), first)


# The Hugging Face hub


def hub_file(entry: str) -> SourceFile:
    """The dataset that an input names, its revision in ``SourceFile.name``, so that a later run reads the same rows.

    NAME is ``dataset`` or ``owner/dataset``; a CONFIG needs the owner. SPLIT is ``train`` unless given.

    Raises:
        ValueError: the name is not of this form, or the hub cannot be asked for it.
    """
    from huggingface_hub import HfApi

    name, _, split = entry.removeprefix(HUB_PREFIX).partition(":")
    words = name.split("/")
    if len(words) > 3 or not all(words):
        raise ValueError(f"{entry!r} is not a dataset of the hub: it is written hf://OWNER/NAME[/CONFIG][:SPLIT]")
    repository = "/".join(words[:2])
    try:
        revision = HfApi().dataset_info(repository).sha
    except Exception as error:  # of httpx, of the hub, of the operating system
        reason = " ".join(str(error).split())
        raise ValueError(f"{entry} cannot be reached: {reason}") from None
    config = words[2] if len(words) == 3 else ""
    return SourceFile(Path(entry), f"{HUB_PREFIX}{repository}/{config}:{split or 'train'}@{revision}", "hub", 0)


def hub_dataset(file: SourceFile) -> Any:
    """The streaming ``datasets.IterableDataset`` of a file made by ``hub_file``.

    It promises less than a file: rows have no place at which reading could begin again, so that one worker reads them,
    and what a kill or a lost connection interrupts is read from the first row. That suits small sets; of a large one
    fetch the files. The revision is pinned, and training reads the shards, so that a run's order does not suffer.
    """
    import datasets

    place, _, revision = file.name.removeprefix(HUB_PREFIX).rpartition("@")
    name, _, split = place.rpartition(":")
    repository, _, config = name.rpartition("/")
    try:
        return datasets.load_dataset(repository, config or None, split=split, streaming=True, revision=revision)
    except Exception as error:
        raise ValueError(f"{file.name} cannot be read: {' '.join(str(error).split())}") from None


def hub_column_names(dataset: Any) -> list[str]:
    """Of a streaming dataset; the first row tells them where the dataset's card does not."""
    return list(dataset.column_names or next(iter(dataset.take(1)), {}))


def hub_rows(reading: Reading) -> Iterator[Row]:
    """All rows of the split."""
    dataset = hub_dataset(reading.file)
    yield from rows_of_dataset(reading, dataset, hub_column_names(dataset))
