"""Streams: rows at positions, masks and position ids, epochs, mixtures, validation in full."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import random_documents, write_shards

from data_pipeline import token_shards
from data_pipeline.mixture import Stage
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


def test_best_fit_keeps_documents_whole_and_cuts_only_long_ones(tmp_path: Path) -> None:
    documents = [[10, 11, 12], [20, 21, 22, 23, 24, 25, 26], [30, 31], [40, 41, 42, 43, 44]]
    write_shards(tmp_path / "d", documents)
    stream = TrainingStream([(tmp_path / "d", 1.0)], 4, seed=0, packing="best_fit")
    rows = stream.rows(np.arange(stream.samples_per_epoch))
    found = {tuple(row) for row in rows.tokens.tolist()}
    # 20..24 fills a row; its rest 24..26 and the 3 of the first have room for 30 31; 40..44 fills a row
    assert found == {(20, 21, 22, 23, 24), (40, 41, 42, 43, 44), (24, 25, 26, 1, 1), (10, 11, 12, 30, 31)} or found == {
        (20, 21, 22, 23, 24), (40, 41, 42, 43, 44), (10, 11, 12, 1, 1), (24, 25, 26, 30, 31)
    }  # fmt: skip
    learnt = sorted(rows.targets[rows.target_mask].tolist())
    assert learnt == sorted(token for document in documents for token in document[1:])
    joined = next(i for i, row in enumerate(rows.tokens.tolist()) if row[-1] == 31)
    assert rows.position_ids[joined].tolist() == [0, 1, 2, 0]
    assert rows.target_mask[joined].tolist() == [True, True, False, True]
    assert "5 pieces: 4 samples of 4 tokens, 90.0% filled" in stream.describe()[0]


def test_best_fit_learns_every_token_once_and_has_another_fingerprint(tmp_path: Path) -> None:
    documents = random_documents(80, 40)
    write_shards(tmp_path / "d", documents, shard_bytes=300)
    stream = TrainingStream([(tmp_path / "d", 1.0)], 16, seed=0, packing="best_fit")
    rows = stream.rows(np.arange(stream.samples_per_epoch))
    learnt = np.sort(rows.targets[rows.target_mask])
    assert np.array_equal(learnt, np.sort(np.concatenate([document[1:] for document in documents])))
    plain = TrainingStream([(tmp_path / "d", 1.0)], 16, seed=0)
    assert stream.fingerprint != plain.fingerprint
    with pytest.raises(ValueError, match="packing is 'tight'; it must be one of concatenate, best_fit"):
        TrainingStream([(tmp_path / "d", 1.0)], 16, 0, packing="tight")


def test_fingerprint_of_version_1(tmp_path: Path) -> None:
    # Checkpoints written before there were stages and packings must still be continued.
    write_shards(tmp_path / "d", [[10, 11, 0], [20, 21, 22, 0], [30, 0]])
    assert TrainingStream([(tmp_path / "d", 1.0)], 4, 0).fingerprint == "bc97b0029b7a3aa67fa72b923f8070bd"


def test_stages_change_the_sources_at_their_positions(tmp_path: Path) -> None:
    sources = [(_text(tmp_path / "a"), 1.0), (_text(tmp_path / "b", seed=1), 1.0)]
    stages = [Stage([1, 0], 40), Stage([1, 1])]
    stream = TrainingStream(sources, 16, seed=0, stages=stages)
    ids = stream.sample_ids(0, 400)
    source_of = (ids >> np.uint64(SOURCE_SHIFT)).astype(int)
    assert not source_of[:40].any()
    assert np.bincount(source_of[40:]).tolist() == [180, 180]
    n = TrainingStream(sources[:1], 16, 0).samples_per_epoch
    first = ids[source_of == 0]
    assert np.array_equal(np.sort(first[:n]), np.arange(n, dtype=np.uint64))  # epochs run through the stages
    assert stream.epochs(400) == [220 / n, 180 / (stream.samples_per_epoch - n)]
    assert "(100.0%, then 50.0% of the samples)" in stream.describe()[0]
    later = TrainingStream(sources, 16, seed=0, stages=[Stage([1, 0], 48), Stage([1, 1])])
    plain = TrainingStream(sources, 16, seed=0)
    assert len({stream.fingerprint, later.fingerprint, plain.fingerprint}) == 3


def test_repeated_data_is_warned_about_or_refused(tmp_path: Path) -> None:
    sources = [(_text(tmp_path / "a"), 3.0), (_text(tmp_path / "b", seed=1), 1.0)]
    stream = TrainingStream(sources, 16, seed=0)
    n = TrainingStream(sources[:1], 16, 0).samples_per_epoch
    samples = 6 * n  # the first set 4.5 times, the second about 1.5
    [warning] = stream.describe_run(samples, [None, None])
    assert warning.startswith(f"warning: the run repeats {tmp_path / 'a'} 4.5 times")
    assert stream.describe_run(5 * n, [None, None]) == []
    assert stream.describe_run(samples, [5.0, None]) == []  # who allows it knows it
    with pytest.raises(ValueError, match=r"a 4\.5\d times, but its max_epochs is 4:"):
        stream.describe_run(samples, [4.0, None])
    staged = TrainingStream(sources, 16, seed=0, stages=[Stage([1, 1], 10), Stage([1, 1], 20), Stage([1, 2])])
    assert staged.describe_run(15, [None, None]) == [
        "warning: the run ends before its last 1 of 3 stages of data begin"
    ]
    assert staged.describe_run(21, [None, None]) == []


def test_whether_rows_may_join_documents(tmp_path: Path) -> None:
    assert not ValidationStream(write_shards(tmp_path / "one", [[5] * 40]), 16).may_join_documents
    assert ValidationStream(_text(tmp_path / "many"), 16).may_join_documents
    whole_rows = write_shards(tmp_path / "chat", [[5] * 16, [6] * 16], [[True] * 16] * 2)
    assert not TrainingStream([(whole_rows, 1.0)], 16, 0).may_join_documents
    assert TrainingStream([(whole_rows, 1.0)], 31, 0).may_join_documents
    mixed = TrainingStream([(tmp_path / "one", 1.0), (_text(tmp_path / "text"), 1.0)], 16, 0)
    assert mixed.may_join_documents


def test_a_range_and_an_array_of_positions_are_the_same(tmp_path: Path) -> None:
    for make in (_text, _chat):
        stream = TrainingStream([(make(tmp_path / make.__name__), 1.0)], 16, seed=0)
        for positions in (range(3, 11), range(4090, 4102), range(0), range(5, 0), range(2, 30, 5)):
            assert _equal(stream.rows(positions), stream.rows(np.array(positions, dtype=np.int64)))
    with pytest.raises(ValueError, match="position -2"):
        stream.rows(range(-2, 1))


def test_more_shards_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = random_documents(200, 60)
    write_shards(tmp_path / "d", documents, shard_bytes=100)
    opened: list[str] = []
    plain = token_shards._Shard._open
    monkeypatch.setattr(
        token_shards._Shard, "_open", lambda shard: (opened.append(shard._entry["name"]), plain(shard))[1]
    )
    checked: list[int] = []
    check = token_shards._Blocks.check
    monkeypatch.setattr(token_shards._Blocks, "check", lambda *args: (checked.append(1), check(*args))[1])
    monkeypatch.setattr(token_shards, "MOST_OPEN_SHARDS", 5)
    monkeypatch.setattr(token_shards, "_OPEN_SHARDS", token_shards._OpenShards())
    stream = ValidationStream(tmp_path / "d", 16)
    shards = stream._shards
    assert len(shards.manifest["shards"]) > 40
    everything = [stream.rows(np.arange(stream.number_of_samples)) for _ in range(2)]
    assert _equal(everything[0], everything[1])
    flat = np.concatenate(documents)
    assert np.array_equal(everything[0].targets.ravel()[: flat.size - 1], flat[1:])
    assert sum(shard._files is not None for shard in shards._opened.values()) <= 5
    assert len(opened) > len(set(opened))  # some were closed and opened again
    assert len(checked) == 2 * len(set(opened))  # but each block of .bin and .docs was checked once
