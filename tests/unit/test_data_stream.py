"""Streams: rows at positions, masks and position ids, epochs, mixtures, validation in full."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import random_documents, write_shards

from data_pipeline.stream import SOURCE_SHIFT, Rows, TrainingStream, ValidationStream

FIELDS = ("input_ids", "targets", "position_ids", "target_mask")


def _equal(part: Rows, whole: Rows, chosen: Any = slice(None)) -> bool:
    """Whether ``part`` is the rows ``chosen`` of ``whole``."""
    return all(np.array_equal(getattr(part, name), getattr(whole, name)[chosen]) for name in FIELDS)


def _text(directory: Path, seed: int = 0, **options: object) -> Path:
    return write_shards(directory, random_documents(60, 30, seed), **options)  # type: ignore[arg-type]


def _chat(directory: Path, seed: int = 0, longest: int = 12) -> Path:
    documents = random_documents(80, longest, seed)
    masks = [np.random.default_rng(index).random(len(document)) < 0.6 for index, document in enumerate(documents)]
    return write_shards(directory, documents, masks)


def test_text_rows_of_a_hand_made_example(tmp_path: Path) -> None:
    # Stream: 10 11 0 | 20 21 22 0 | 30 0 ; windows of 4 + 1 tokens with stride 4.
    write_shards(tmp_path / "d", [[10, 11, 0], [20, 21, 22, 0], [30, 0]])
    rows = ValidationStream(tmp_path / "d", 4).rows(np.arange(2))
    assert rows.input_ids.tolist() == [[10, 11, 0, 20], [21, 22, 0, 30]]
    assert rows.targets.tolist() == [[11, 0, 20, 21], [22, 0, 30, 0]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 0], [0, 1, 2, 0]]
    assert rows.target_mask.tolist() == [[True, True, False, True], [True, True, False, True]]
    assert [getattr(rows, name).dtype for name in FIELDS] == [np.int64, np.int64, np.int64, np.bool_]


def test_last_validation_window_is_padded(tmp_path: Path) -> None:
    write_shards(tmp_path / "d", [[10, 11, 0], [20, 21, 22, 0], [30, 0]])
    stream = ValidationStream(tmp_path / "d", 5)
    assert stream.number_of_samples == 2
    rows = stream.rows(np.array([1]))
    assert rows.input_ids.tolist() == [[22, 0, 30, 0, 1]]
    assert rows.targets.tolist() == [[0, 30, 0, 1, 1]]
    assert rows.position_ids.tolist() == [[0, 1, 0, 1, 0]]
    assert rows.target_mask.tolist() == [[True, False, True, False, False]]


def test_chat_rows_of_a_hand_made_example(tmp_path: Path) -> None:
    documents = [[10, 11, 12, 13], [20, 21, 22], [30] * 9]
    masks = [[False, False, True, True], [False, True, True], [True] * 9]
    write_shards(tmp_path / "d", documents, masks)
    stream = ValidationStream(tmp_path / "d", 7)  # rows of 8 tokens: 4 + 3 + padding; the third is too long
    rows = stream.rows(np.arange(1))
    assert stream.number_of_samples == 1
    assert rows.input_ids.tolist() == [[10, 11, 12, 13, 20, 21, 22]]
    assert rows.targets.tolist() == [[11, 12, 13, 20, 21, 22, 1]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert rows.target_mask.tolist() == [[False, True, True, False, True, True, False]]
    assert any("longer than 8 tokens: 1 conversations (the longest has 9)" in line for line in stream.describe())


def test_first_token_of_a_packed_conversation_is_never_a_target(tmp_path: Path) -> None:
    write_shards(tmp_path / "d", [[10, 11], [20, 21]], [[True, True], [True, True]])
    rows = TrainingStream([(tmp_path / "d", 1.0)], 3, 0).rows(np.array([0]))
    assert rows.target_mask.tolist() == [[True, False, True]]


@pytest.mark.parametrize("make", [_text, _chat])
def test_rows_do_not_depend_on_how_positions_are_dealt(tmp_path: Path, make: object) -> None:
    make(tmp_path / "d")  # type: ignore[operator]
    stream = TrainingStream([(tmp_path / "d", 1.0)], 16, seed=5)
    whole = stream.rows(np.arange(100))
    fresh = TrainingStream([(tmp_path / "d", 1.0)], 16, seed=5)
    for ranks, micro_batch in ((1, 8), (2, 4), (3, 5), (8, 1)):
        for rank in range(ranks):
            mine = np.arange(rank, 100, ranks)
            for start in range(0, len(mine), micro_batch):
                positions = mine[start : start + micro_batch]
                part = fresh.rows(positions)
                assert _equal(part, whole, positions)


def test_text_samples_are_the_windows_of_the_stream_and_each_comes_once_an_epoch(tmp_path: Path) -> None:
    documents = random_documents(60, 30)
    flat = np.concatenate(documents)
    stream = TrainingStream([(write_shards(tmp_path / "d", documents, shard_bytes=300), 1.0)], 16, seed=1)
    n = stream.samples_per_epoch
    assert n == (flat.size - 1) // 16
    for epoch in range(3):
        ids = stream.sample_ids(epoch * n, n)
        assert np.array_equal(np.sort(ids), np.arange(n, dtype=np.uint64))
    assert not np.array_equal(stream.sample_ids(0, n), stream.sample_ids(n, n))
    rows = stream.rows(np.arange(n))
    for row, sample in enumerate(stream.sample_ids(0, n).tolist()):
        assert rows.input_ids[row].tolist() == flat[sample * 16 : sample * 16 + 16].tolist()
        assert rows.targets[row].tolist() == flat[sample * 16 + 1 : sample * 16 + 17].tolist()


def test_position_ids_and_masks_against_a_slow_count(tmp_path: Path) -> None:
    documents = random_documents(60, 30)
    document_of = np.repeat(np.arange(60), [len(document) for document in documents])
    stream = ValidationStream(write_shards(tmp_path / "d", documents, shard_bytes=300), 16)
    rows = stream.rows(np.arange(stream.number_of_samples - 1))
    for row in range(len(rows.input_ids)):
        position = 0
        for column in range(16):
            here = row * 16 + column
            begins = column == 0 or document_of[here] != document_of[here - 1]
            position = 0 if begins else position + 1
            assert rows.position_ids[row, column] == position
            assert rows.target_mask[row, column] == (document_of[here] == document_of[here + 1])


def test_validation_is_complete(tmp_path: Path) -> None:
    documents = random_documents(60, 30)
    flat = np.concatenate(documents)
    stream = ValidationStream(write_shards(tmp_path / "d", documents), 16)
    rows = stream.rows(np.arange(stream.number_of_samples))
    assert int(rows.target_mask.sum()) == flat.size - len(documents)
    assert np.concatenate([[flat[0]], rows.targets.ravel()[: flat.size - 1]]).tolist() == flat.tolist()
    with pytest.raises(ValueError, match=f"there are {stream.number_of_samples}"):
        stream.rows(np.array([stream.number_of_samples]))


def test_chat_conversations_come_whole_and_once_an_epoch(tmp_path: Path) -> None:
    documents = [document for document in random_documents(90, 12) if len(document) > 1]
    write_shards(tmp_path / "d", documents, [np.ones(len(document), dtype=bool) for document in documents])
    stream = TrainingStream([(tmp_path / "d", 1.0)], 15, seed=0)
    rows = stream.rows(np.arange(stream.samples_per_epoch))
    found = []
    for ids, positions, last in zip(rows.input_ids, rows.position_ids, rows.targets[:, -1], strict=True):
        pieces = np.split(np.append(ids, last), np.flatnonzero(positions == 0)[1:])
        found += [piece[piece != 1].tolist() for piece in pieces]  # 1 pads; documents have ids from 2
    assert sorted(filter(None, found)) == sorted(document.tolist() for document in documents)


def test_mixture_keeps_shares_and_epochs_of_each_source(tmp_path: Path) -> None:
    sources = [(_text(tmp_path / "a"), 3.0), (_chat(tmp_path / "b"), 1.0)]
    stream = TrainingStream(sources, 16, seed=0)
    assert stream.kind == "mixed"
    ids = stream.sample_ids(0, 4000)
    source_of = (ids >> np.uint64(SOURCE_SHIFT)).astype(int)
    assert np.bincount(source_of).tolist() == [3000, 1000]
    for source, (path, _) in enumerate(sources):
        alone = TrainingStream([(path, 1.0)], 16, seed=0).samples_per_epoch
        mine = ids[source_of == source] & np.uint64((1 << SOURCE_SHIFT) - 1)
        assert np.array_equal(np.sort(mine[:alone]), np.arange(alone, dtype=np.uint64))
    rows = stream.rows(np.arange(64))
    for source, (path, _) in enumerate(sources):
        single = TrainingStream([(path, 1.0)], 16, seed=0)
        row = int(np.flatnonzero(source_of[:64] == source)[0])
        sample = ids[row] & np.uint64((1 << SOURCE_SHIFT) - 1)
        position = int(np.flatnonzero(single.sample_ids(0, single.samples_per_epoch) == sample)[0])
        assert _equal(single.rows(np.array([position])), rows, [row])
    assert stream.samples_per_epoch == sum(TrainingStream([source], 16, 0).samples_per_epoch for source in sources)


def test_positions_far_out_are_reached_at_once(tmp_path: Path) -> None:
    stream = TrainingStream([(_text(tmp_path / "d"), 1.0)], 16, seed=0)
    n = stream.samples_per_epoch
    far = 10**12 * n
    assert np.array_equal(np.sort(stream.sample_ids(far, n)), np.arange(n, dtype=np.uint64))
    with pytest.raises(ValueError, match="position -1"):
        stream.rows(np.array([-1]))


def test_fingerprint_follows_data_weights_and_length_but_not_place_or_seed(tmp_path: Path) -> None:
    a, same, b = _text(tmp_path / "a"), _text(tmp_path / "elsewhere"), _text(tmp_path / "b", seed=1)

    def fingerprint(*sources: tuple[Path, float], length: int = 16, seed: int = 0) -> str:
        return TrainingStream(list(sources), length, seed).fingerprint

    base = fingerprint((a, 1.0), (b, 1.0))
    assert base == fingerprint((same, 2.0), (b, 2.0), seed=3)
    others = [fingerprint((a, 1.0)), fingerprint((b, 1.0), (a, 1.0)), fingerprint((a, 2.0), (b, 1.0))]
    others.append(fingerprint((a, 1.0), (b, 1.0), length=17))
    assert base not in others
    assert len(set(others)) == len(others)
    assert ValidationStream(a, 16).fingerprint == ValidationStream(same, 16).fingerprint
    assert ValidationStream(a, 16).fingerprint != ValidationStream(a, 17).fingerprint


def test_describe_says_what_is_left_out(tmp_path: Path) -> None:
    lines = TrainingStream([(_text(tmp_path / "a"), 1.0)], 16, 0).describe()
    tokens = ValidationStream(tmp_path / "a", 16)._shards.tokens
    assert f"{tokens:,} tokens" in lines[0]
    assert f"{(tokens - 1) % 16:,} tokens at the end left out" in lines[0]
    lines = TrainingStream([(_text(tmp_path / "b"), 1.0), (_chat(tmp_path / "c"), 3.0)], 10, 0).describe()
    assert "75.0% of the samples" in lines[1]
    assert "left out for being longer than 11 tokens" in lines[2]


def test_sources_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not one sample of 101 tokens \(it has 3 tokens\)"):
        TrainingStream([(write_shards(tmp_path / "small", [[5, 6, 0]]), 1.0)], 100, 0)
    with pytest.raises(ValueError, match="its longest 9 tokens"):
        TrainingStream([(write_shards(tmp_path / "long", [[5] * 9], [[True] * 9]), 1.0)], 4, 0)
    other = _text(tmp_path / "other", tokenizer_sha256="f" * 64)
    with pytest.raises(ValueError, match="different tokenizers"):
        TrainingStream([(_text(tmp_path / "a"), 1.0), (other, 1.0)], 16, 0)
    with pytest.raises(ValueError, match="sequence length is 0"):
        TrainingStream([(other, 1.0)], 0, 0)
    with pytest.raises(ValueError, match="at least one source"):
        TrainingStream([], 16, 0)
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        ValidationStream(tmp_path / "none", 16)
