"""Datasets of the Hugging Face hub, named ``hf://NAME[/CONFIG][:SPLIT]`` and streamed at one revision."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.arrow_tables import rows_of_dataset
from data_pipeline.documents import Reading, Row, SourceFile

PREFIX = "hf://"


def hub_file(entry: str) -> SourceFile:
    """The dataset that an input names, its revision in ``SourceFile.name``, so that a later run reads the same rows.

    NAME is ``dataset`` or ``owner/dataset``; a CONFIG needs the owner. SPLIT is ``train`` unless given.

    Raises:
        ValueError: the name is not of this form, or the hub cannot be asked for it.
    """
    from huggingface_hub import HfApi

    name, _, split = entry.removeprefix(PREFIX).partition(":")
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
    return SourceFile(Path(entry), f"{PREFIX}{repository}/{config}:{split or 'train'}@{revision}", "hub", 0)


def hub_dataset(file: SourceFile) -> Any:
    """The streaming ``datasets.IterableDataset`` of a file made by ``hub_file``."""
    import datasets

    place, _, revision = file.name.removeprefix(PREFIX).rpartition("@")
    name, _, split = place.rpartition(":")
    repository, _, config = name.rpartition("/")
    try:
        return datasets.load_dataset(repository, config or None, split=split, streaming=True, revision=revision)
    except Exception as error:
        raise ValueError(f"{file.name} cannot be read: {' '.join(str(error).split())}") from None


def column_names(dataset: Any) -> list[str]:
    """Of a streaming dataset; the first row tells them where the dataset's card does not."""
    return list(dataset.column_names or next(iter(dataset.take(1)), {}))


def hub_rows(reading: Reading) -> Iterator[Row]:
    """All rows of the split."""
    dataset = hub_dataset(reading.file)
    yield from rows_of_dataset(reading, dataset, column_names(dataset))
