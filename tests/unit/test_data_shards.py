"""tokenshard/1: what is written comes back, and damage is refused before a token is used."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from data_samples import add_document, random_documents, write_shards

from data_pipeline import shard_writer, token_shards
from data_pipeline.shard_writer import UnitWriter
from data_pipeline.token_shards import TokenShards


def _flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(bytes(content))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (token_shards, shard_writer):
        monkeypatch.setattr(module, "BLOCK_BYTES", 64)


def test_round_trip_over_several_shards(tmp_path: Path, small_blocks: None) -> None:
    documents = random_documents(50, 60)
    flat = np.concatenate(documents)
    shards = TokenShards(write_shards(tmp_path / "d", documents, shard_bytes=500))
    assert len(shards.manifest["shards"]) > 3
    assert (shards.tokens, shards.documents, shards.kind) == (flat.size, 50, "text")
    assert np.array_equal(shards.read(0, flat.size), flat)
    assert shards.document_lengths().tolist() == [len(document) for document in documents]
    starts = np.arange(0, flat.size - 40, 7)
    windows, _, _ = shards.read_windows(starts, 41)
    assert all(np.array_equal(row, flat[start : start + 41]) for row, start in zip(windows, starts, strict=True))


@pytest.mark.parametrize(("vocabulary", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_type_follows_the_vocabulary(tmp_path: Path, vocabulary: int, dtype: str) -> None:
    write_shards(tmp_path / "d", [[vocabulary - 1, 5]], vocabulary_size=vocabulary)
    shards = TokenShards(tmp_path / "d")
    assert shards.manifest["dtype"] == dtype
    assert shards.read(0, 2).tolist() == [vocabulary - 1, 5]
    assert np.fromfile(tmp_path / "d" / "u-00000-000.bin", dtype=f"<u{2 if dtype == 'uint16' else 4}")[1] == 5


def test_masks_come_back_at_any_offset(tmp_path: Path, small_blocks: None) -> None:
    documents = random_documents(40, 60, seed=1)
    masks = [np.random.default_rng(2).random(len(document)) < 0.5 for document in documents]
    shards = TokenShards(write_shards(tmp_path / "d", documents, masks, shard_bytes=700))
    assert len(shards.manifest["shards"]) > 1
    flat = np.concatenate(masks)
    for start in range(0, flat.size - 33, 5):
        assert np.array_equal(shards.read_mask(start, 33), flat[start : start + 33])


def test_same_documents_give_the_same_bytes(tmp_path: Path) -> None:
    documents = random_documents(20, 30)
    first, second = write_shards(tmp_path / "a", documents), write_shards(tmp_path / "b", documents)
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes()
    assert TokenShards(first).fingerprint == TokenShards(second).fingerprint
    other = write_shards(tmp_path / "c", documents[:-1])
    assert TokenShards(other).fingerprint != TokenShards(first).fingerprint


def test_flipped_byte_is_named_with_block_and_command(tmp_path: Path, small_blocks: None) -> None:
    write_shards(tmp_path / "train", random_documents(30, 60))
    (tmp_path / "report.json").write_text(json.dumps({"command": "trainyard prepare --input x --out y"}))
    _flip(tmp_path / "train" / "u-00000-000.bin", 64 * 5 + 3)
    shards = TokenShards(tmp_path / "train")
    shards.read(0, 32 * 5)  # the blocks before it are whole
    with pytest.raises(
        ValueError, match=r"u-00000-000\.bin: block 5 \(bytes 320 to 384\) .*trainyard prepare --input x"
    ):
        shards.read(32 * 5, 1)
    with pytest.raises(ValueError, match="block 5"):  # and it stays refused
        shards.read_windows(np.array([32 * 4]), 64)


@pytest.mark.parametrize("suffix", ["docs", "mask"])
def test_flipped_byte_beside_the_tokens(tmp_path: Path, suffix: str) -> None:
    documents = random_documents(30, 60)
    write_shards(tmp_path / "d", documents, [np.ones(len(document), dtype=bool) for document in documents])
    _flip(tmp_path / "d" / f"u-00000-000.{suffix}", 1)
    shards = TokenShards(tmp_path / "d")
    with pytest.raises(ValueError, match=rf"\.{suffix}: block 0 .*damaged"):
        _ = shards.document_lengths() if suffix == "docs" else shards.read_mask(0, 8)


def test_flipped_byte_in_the_checksums(tmp_path: Path) -> None:
    write_shards(tmp_path / "d", random_documents(30, 60))
    _flip(tmp_path / "d" / "u-00000-000.sums", 3)
    with pytest.raises(ValueError, match=r"u-00000-000\.sums is damaged"):
        TokenShards(tmp_path / "d").read(0, 8)


def test_check_all_finds_a_flipped_byte_anywhere(tmp_path: Path, small_blocks: None) -> None:
    documents = random_documents(30, 60)
    write_shards(tmp_path / "d", documents, [np.ones(len(document), dtype=bool) for document in documents], "x", 500)
    shards = TokenShards(tmp_path / "d")
    sizes = list(shards.check_all())
    assert len(sizes) > 3 and sizes == shards.shard_bytes
    for path in sorted((tmp_path / "d").iterdir()):
        content = path.read_bytes()
        _flip(path, len(content) * 2 // 3)
        with pytest.raises(ValueError, match=rf"{path.name}.*(damaged|changed after|not a manifest)"):
            list(TokenShards(tmp_path / "d").check_all())
        path.write_bytes(content)


def test_documents_are_found_in_any_window(tmp_path: Path, small_blocks: None) -> None:
    documents = random_documents(60, 40, seed=3)
    shards = TokenShards(write_shards(tmp_path / "d", documents, shard_bytes=300))
    begins = np.cumsum([0, *(len(document) for document in documents)])[:-1]
    starts = np.arange(0, shards.tokens - 36, 3)
    _, rows, columns = shards.read_windows(starts, 37)
    expected = [
        (row, int(begin - start)) for row, start in enumerate(starts) for begin in begins if start < begin < start + 37
    ]
    assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == expected
    assert any(column == 36 for _, column in expected)


def test_units_and_batches_do_not_show_in_the_bytes(tmp_path: Path) -> None:
    """Documents one by one, or all at once: the same shards; units stand in the order of the manifest."""
    documents = random_documents(50, 60)
    write_shards(tmp_path / "one", documents, shard_bytes=500)
    writer = UnitWriter(tmp_path / "all", kind="text", vocabulary_size=1000, shard_bytes=500)
    writer.add_documents(np.concatenate(documents), np.array([len(document) for document in documents]))
    assert len(writer.finish()) > 3
    for file in (tmp_path / "all").iterdir():
        assert file.read_bytes() == (tmp_path / "one" / file.name).read_bytes()


def test_truncated_and_missing_shards_are_refused(tmp_path: Path) -> None:
    write_shards(tmp_path / "d", random_documents(30, 60))
    path = tmp_path / "d" / "u-00000-000.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    with pytest.raises(ValueError, match=rf"has {len(content) - 2:,} bytes, but the manifest says {len(content):,}"):
        TokenShards(tmp_path / "d").check_files()
    with pytest.raises(ValueError, match="the file is damaged"):
        TokenShards(tmp_path / "d").read(0, 1)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"u-00000-000\.bin is missing"):
        TokenShards(tmp_path / "d").check_files()


def test_manifest_is_checked(tmp_path: Path) -> None:
    path = write_shards(tmp_path / "d", random_documents(3, 9)) / "manifest.json"
    good = path.read_text()
    path.write_text(good.replace('"vocabulary_size": 1000', '"vocabulary_size": 1001'))
    with pytest.raises(ValueError, match="was changed after it was written"):
        TokenShards(tmp_path / "d")
    path.write_text(good.replace("tokenshard/1", "tokenshard/9"))
    with pytest.raises(ValueError, match=r"'tokenshard/9'.*reads 'tokenshard/1'"):
        TokenShards(tmp_path / "d")
    path.write_text(good[:-50])
    with pytest.raises(ValueError, match="not a manifest"):
        TokenShards(tmp_path / "d")


def test_directories_without_data(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        TokenShards(tmp_path / "none")
    write_shards(tmp_path / "train", [[5, 6]])
    with pytest.raises(FileNotFoundError, match=r"did you mean .*train\?"):
        TokenShards(tmp_path)


def test_an_unfinished_writer_leaves_no_data_set(tmp_path: Path) -> None:
    writer = UnitWriter(tmp_path / "d", kind="text", vocabulary_size=10)
    add_document(writer, [1, 2, 3])
    writer.abandon()
    with pytest.raises(FileNotFoundError, match="not a prepared data set"):
        TokenShards(tmp_path / "d")


def test_writer_refuses_bad_documents(tmp_path: Path) -> None:
    writer = UnitWriter(tmp_path / "d", kind="chat", vocabulary_size=10)
    for ids, mask, message in (
        ([], [], "without tokens"),
        ([1, 10], [True, True], "outside the vocabulary of 10"),
        ([-1], [True], "outside the vocabulary"),
        ([1, 2], None, "with a mask"),
        ([1, 2], [True], "1 entries for 2 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            add_document(writer, ids, mask)
    writer.abandon()


def test_reading_outside_is_refused(tmp_path: Path) -> None:
    shards = TokenShards(write_shards(tmp_path / "d", [[5, 6, 7]]))
    for start, count in ((0, 4), (3, 1), (-1, 2)):
        with pytest.raises(ValueError, match="has 3 tokens"):
            shards.read(start, count)
        with pytest.raises(ValueError, match="has 3 tokens"):
            shards.read_windows(np.array([start]), count)


def test_threads_share_a_reader(tmp_path: Path, small_blocks: None) -> None:
    documents = random_documents(200, 60)
    flat = np.concatenate(documents)
    shards = TokenShards(write_shards(tmp_path / "d", documents, shard_bytes=2000))
    wrong: list[int] = []

    def read(seed: int) -> None:
        for start in np.random.default_rng(seed).integers(0, flat.size - 50, 300).tolist():
            if not np.array_equal(shards.read(start, 50), flat[start : start + 50]):
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
