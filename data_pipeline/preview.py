"""The rows of a training stream as people can read them: what is learnt, where documents begin, what is padding."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from data_pipeline.remote_blocks import is_url
from data_pipeline.stream import SOURCE_SHIFT, TrainingStream
from data_pipeline.tokenizer import load_tokenizer, tokenizer_at, tokenizer_fingerprint
from data_pipeline.units import TOKENIZER

DOCUMENT_MARK = "▐document▌"
LEARNT_MARKS = ("«", "»")
"""Around learnt tokens where there is no colour."""


@dataclass(frozen=True)
class PreviewRow:
    """One row with its last target: ``sequence_length + 1`` tokens."""

    batch: int
    position: int
    source: str
    sample: int
    token_ids: list[int]
    learnt: list[bool]
    """Of each token, whether the loss counts its prediction."""
    document_starts: list[int]
    """Columns at which documents begin, a column 0 included whether or not a document begins or goes on there."""
    padding_tokens: int


def preview_rows(stream: TrainingStream, batch_rows: int, batches: int, shown: int) -> list[PreviewRow]:
    """The first ``shown`` rows of each of the first ``batches`` global batches of ``batch_rows`` rows."""
    positions = [b * batch_rows + row for b in range(batches) for row in range(min(shown, batch_rows))]
    rows = stream.rows(np.array(positions))
    ids = [int(stream.sample_ids(position, 1)[0]) for position in positions]
    result = []
    for index, (position, sample) in enumerate(zip(positions, ids, strict=True)):
        tokens = rows.tokens[index]
        learnt = np.concatenate([[False], rows.target_mask[index]])
        source = sample >> SOURCE_SHIFT
        starts = [0, *sorted(rows.begin_columns[rows.begin_rows == index].tolist())]
        padding = 0
        if (tokens[starts[-1] :] == stream.padding_ids[source]).all() and not learnt[starts[-1] :].any():
            padding = len(tokens) - starts.pop()
        result.append(
            PreviewRow(
                batch=position // batch_rows + 1,
                position=position,
                source=str(stream.sources[source]),
                sample=sample & ((1 << SOURCE_SHIFT) - 1),
                token_ids=tokens.tolist(),
                learnt=learnt.tolist(),
                document_starts=starts,
                padding_tokens=padding,
            )
        )
    return result


def tokenizer_beside(data: str) -> str:
    """Where ``prepare`` puts the tokenizer of a split at a path or URL. ValueError: a URL without a folder above it."""
    folder = os.path.dirname(data.rstrip("/"))
    if is_url(data) and not is_url(folder):
        raise ValueError(f"nothing can be beside {data}, and so no tokenizer: name it in a recipe, with --recipe")
    return os.path.join(folder, TOKENIZER)


def open_tokenizer(stream: TrainingStream, place: Path | str) -> Any:
    """The tokenizer in a folder or at a URL. ValueError unless it is the one that the stream's data was made with."""
    with tokenizer_at(place) as path:
        if tokenizer_fingerprint(path) != stream.tokenizer_sha256:
            raise ValueError(
                f"{stream.sources[0]} was prepared with another tokenizer than {place} (or that one changed since): "
                "name the one it was prepared with in a recipe"
            )
        return load_tokenizer(path)


def print_preview(rows: Sequence[PreviewRow], tokenizer: Any, console: Console) -> None:
    """Learnt tokens green, others dim, a mark where a document begins; without colour learnt tokens stand in « »."""
    coloured = console.is_terminal and not console.no_color
    for row in rows:
        length, learnt = len(row.token_ids) - 1, sum(row.learnt)
        head = (
            f"batch {row.batch}, position {row.position:,}: {row.source} sample {row.sample:,}, {length:,} tokens, "
            f"{learnt:,} learnt, documents: {len(row.document_starts):,}, padding: {row.padding_tokens:,}"
        )
        text = Text()
        text.append(f"{head}\n", style="bold" if coloured else "")
        for begins, is_learnt, ids in _runs(row):
            if begins:
                text.append(DOCUMENT_MARK, style="bold magenta" if coloured else "")
            shown = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            shown = shown.replace("\x1b", "␛")  # data must not steer the terminal
            if coloured:
                text.append(shown, style="green" if is_learnt else "dim")
            else:
                text.append(shown if not is_learnt else shown.join(LEARNT_MARKS))
        if row.padding_tokens:
            text.append(f"▐padding: {row.padding_tokens:,} tokens▌", style="dim" if coloured else "")
        console.print(text, soft_wrap=True)


def as_json(rows: Sequence[PreviewRow]) -> list[dict[str, Any]]:
    """The rows as plain values."""
    return [asdict(row) for row in rows]


def _runs(row: PreviewRow) -> Iterator[tuple[bool, bool, list[int]]]:
    """(a document begins here, learnt, token ids) of each stretch of tokens that are alike, without the padding."""
    end = len(row.token_ids) - row.padding_tokens
    starts = set(row.document_starts[1:])
    changes = [i for i in range(1, end) if i in starts or row.learnt[i] != row.learnt[i - 1]]
    for begin, stop in zip([0, *changes], [*changes, end], strict=True):
        yield begin in starts, row.learnt[begin], row.token_ids[begin:stop]
