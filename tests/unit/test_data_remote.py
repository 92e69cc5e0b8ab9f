"""Token shards at a URL: the rows are the local ones, fetched about once, whatever the store and the cache do."""

import errno
import gc
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import random_documents, write_shards
from fsspec.implementations.local import LocalFileSystem
from ranged_server import RangedServer

from data_pipeline import remote_blocks, shard_writer, stream, token_shards
from data_pipeline.order import LANES, RUN_WINDOWS
from data_pipeline.remote_blocks import RemoteOptions
from data_pipeline.stream import TrainingStream, ValidationStream
from data_pipeline.token_shards import TokenShards

BLOCK = 4096
LENGTH = 32
SHARD_BYTES = 40 * BLOCK + 17


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (token_shards, shard_writer, stream):
        monkeypatch.setattr(module, "BLOCK_BYTES", BLOCK)
    remote_blocks.open_cache.cache_clear()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RangedServer]:
    """Serves a data set of some 320 blocks in several shards."""
    write_shards(tmp_path / "served", random_documents(2600, 500), shard_bytes=SHARD_BYTES)
    with RangedServer(tmp_path / "served").serving() as served:
        yield served


@pytest.fixture
def one_block(tmp_path: Path) -> Iterator[RangedServer]:
    write_shards(tmp_path / "served", [np.arange(2, 1000)])
    with RangedServer(tmp_path / "served").serving() as served:
        yield served


def options(tmp_path: Path, blocks: int = 60, deadline: float = 20.0) -> RemoteOptions:
    return RemoteOptions(str(tmp_path / "cache"), blocks * BLOCK, deadline)


def data_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def read_epoch(data: TrainingStream, count: int, first: int = 0, step: int = 1) -> np.ndarray:
    """The tokens of every ``step``-th batch of 64 positions from ``first`` on."""
    return np.concatenate([data.rows(range(p, min(p + 64, count))).tokens for p in range(64 * first, count, 64 * step)])


def test_an_epoch_equals_the_local_one_and_is_fetched_about_once(server: RangedServer, tmp_path: Path) -> None:
    local = TrainingStream([(server.folder, 1.0)], LENGTH, 7, order="block")
    count = local.samples_per_epoch
    assert count > 2 * LANES * RUN_WINDOWS * BLOCK // (2 * LENGTH), "too small for all lanes"
    remote = TrainingStream([(server.url, 1.0)], LENGTH, 7, remote=options(tmp_path))
    assert remote.fingerprint == local.fingerprint
    rows = remote.rows(range(32))
    assert np.array_equal(rows.tokens, local.rows(range(32)).tokens)
    assert len([name for name in server.requests if name.endswith(".bin")]) <= 2 * LANES + 2, "a cold start is quick"
    assert np.array_equal(read_epoch(remote, count), read_epoch(local, count))
    for part in ("target_mask", "begin_rows", "begin_columns"):
        assert np.array_equal(getattr(rows, part), getattr(local.rows(range(32)), part))
    whole = data_bytes(server.folder)
    assert whole > 4 * 60 * BLOCK
    assert whole * 0.99 < server.bytes_sent <= 1.1 * whole
    kept = [file.stat().st_size for file in (tmp_path / "cache").iterdir() if file.suffix != ".lock"]
    assert sum(kept) <= 60 * BLOCK


@pytest.mark.parametrize("documents", [190, 420, 900])
def test_few_blocks_are_fetched_once_through_a_cache_that_is_smaller(tmp_path: Path, documents: int) -> None:
    folder = write_shards(tmp_path / "served", random_documents(documents, 500), shard_bytes=SHARD_BYTES)
    whole, cached = data_bytes(folder), 16
    with RangedServer(folder).serving() as served:
        remote = TrainingStream([(served.url, 1.0)], LENGTH, 7, remote=options(tmp_path, cached))
        assert any("windows" in line for line in remote.describe()) and whole > 1.4 * cached * BLOCK
        read_epoch(remote, remote.samples_per_epoch)
        assert whole * 0.99 < served.bytes_sent <= 1.1 * whole


def test_a_shuffle_of_everything_would_be_fetched_many_times(server: RangedServer, tmp_path: Path) -> None:
    """What the order in blocks is for, and that the count above can fail."""
    remote = TrainingStream([(server.url, 1.0)], LENGTH, 7, order="full", remote=options(tmp_path))
    read_epoch(remote, 640)
    assert server.bytes_sent > data_bytes(server.folder)


def test_what_a_rank_can_hold_is_shuffled_as_a_whole(tmp_path: Path) -> None:
    def order_of(blocks: float, order: str) -> tuple[str, list[int]]:
        name = tmp_path / str(blocks)
        if not name.exists():
            write_shards(name, [2 + np.arange(int(blocks * BLOCK / 2)) % 900])
        data = TrainingStream([(name, 1.0)], LENGTH, 7, order=order)
        return data.fingerprint, data.sample_ids(0, data.samples_per_epoch).tolist()

    assert order_of(2 * LANES, "block") == order_of(2 * LANES, "full")
    fingerprint, ids = order_of(2 * LANES + 1.5, "block")
    assert (fingerprint, ids) != order_of(2 * LANES + 1.5, "full")
    assert fingerprint != order_of(2 * LANES + 1.5, "full")[0], "a run would go on in another order"


def _rank(url: str, options: RemoteOptions, first: int, answer: "multiprocessing.Queue[np.ndarray]") -> None:
    data = TrainingStream([(url, 1.0)], LENGTH, 7, remote=options)
    answer.put(read_epoch(data, 6400, first, 2))


def test_processes_share_what_one_of_them_fetched(server: RangedServer, tmp_path: Path) -> None:
    answers = [multiprocessing.get_context("fork").Queue() for _ in range(2)]
    ranks = [
        multiprocessing.get_context("fork").Process(
            target=_rank, args=(server.url, options(tmp_path), first, answers[first])
        )
        for first in range(2)
    ]
    for rank in ranks:
        rank.start()
    found = [answer.get(timeout=60) for answer in answers]
    for rank in ranks:
        rank.join()
    local = TrainingStream([(server.folder, 1.0)], LENGTH, 7, order="block")
    for first in range(2):
        assert np.array_equal(found[first], read_epoch(local, 6400, first, 2))
    fetched = [name for name in server.requests if name.endswith(".bin")]
    assert len(fetched) <= 1.25 * 6400 * LENGTH * 2 / BLOCK + 2 * LANES


def test_validation_and_masks_from_afar(tmp_path: Path) -> None:
    documents = random_documents(300, 60)
    masks = [np.arange(len(document)) % 3 > 0 for document in documents]
    folder = write_shards(tmp_path / "chat", documents, masks, shard_bytes=5000)
    with RangedServer(folder).serving() as served:
        local, remote = ValidationStream(folder, 64), ValidationStream(served.url, 64, options(tmp_path))
        wanted = np.arange(local.number_of_samples)
        assert local.number_of_samples > 100
        for mine, theirs in zip(remote.rows(wanted), local.rows(wanted), strict=True):
            assert np.array_equal(mine, theirs)


def test_a_block_damaged_in_the_cache_is_fetched_again(
    one_block: RangedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = TokenShards(one_block.url, options(tmp_path)).read(0, 998)
    for file in (tmp_path / "cache").iterdir():
        if content := bytearray(file.read_bytes()):
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
    remote_blocks.open_cache.cache_clear()  # as another process, that has nothing open
    assert np.array_equal(TokenShards(one_block.url, options(tmp_path)).read(0, 998), expected)
    assert "is damaged: it is fetched again" in capsys.readouterr().out
    assert len([name for name in one_block.requests if name.endswith(".bin")]) == 2


def test_a_byte_lost_on_the_way_is_asked_for_again(one_block: RangedServer, tmp_path: Path) -> None:
    def flip_first(name: str, content: bytes) -> bytes:
        first = name.endswith(".bin") and one_block.requests.count(name) == 1
        return bytes([content[0] ^ 1]) + content[1:] if first else content

    one_block.answer = flip_first
    assert TokenShards(one_block.url, options(tmp_path)).read(0, 998).tolist() == list(range(2, 1000))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content[:5] + b"\xff" + content[6:], "its checksum is [0-9a-f]{16}"),
        (lambda content: content[:-3], "1,993 bytes came"),
        (lambda content: content + b"more", "2,000 bytes came"),
    ],
)
def test_damage_at_the_store_is_named(one_block: RangedServer, tmp_path: Path, change, said: str) -> None:  # type: ignore[no-untyped-def]
    one_block.answer = lambda name, content: change(content) if name.endswith(".bin") else content
    with pytest.raises(ValueError, match=rf"u-00000-000\.bin: block 0 \(bytes 0 to 1,996, .*{said}.*copy the data set"):
        TokenShards(one_block.url, options(tmp_path)).read(0, 10)
    assert one_block.requests.count("u-00000-000.bin") == 2


def test_files_of_another_length_or_missing_are_found_before_the_run(one_block: RangedServer, tmp_path: Path) -> None:
    shards = TokenShards(one_block.url, options(tmp_path))
    shards.check_files()
    with open(one_block.folder / "u-00000-000.bin", "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"u-00000-000\.bin has 1,997 bytes, but the manifest says 1,996"):
        shards.check_files()
    (one_block.folder / "u-00000-000.docs").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=r"u-00000-000\.(docs does not exist|bin has)"):
        shards.check_files()


def test_errors_and_a_server_that_is_away_are_waited_for(
    one_block: RangedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one_block.answer = lambda name, content: 503 if one_block.requests.count(name) < 3 else content
    shards = TokenShards(one_block.url, options(tmp_path))
    assert one_block.requests.count("manifest.json") == 3
    with RangedServer(one_block.folder).serving() as other:
        shards = TokenShards(other.url, options(tmp_path))
    with other.away_for(3):
        began = time.monotonic()
        assert shards.read(0, 998).tolist() == list(range(2, 1000))
        assert 2.5 < time.monotonic() - began < 15
    assert f"{other.url}/u-00000-000.sums cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "said"),
    [(500, "500"), (None, "Timeout"), ("away", "Connect call failed|Cannot connect")],
)
def test_beyond_the_deadline_one_sentence_says_so(
    one_block: RangedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: int | str | None, said: str
) -> None:
    monkeypatch.setattr(remote_blocks, "ATTEMPT_SECONDS", 0.5)
    began = time.monotonic()
    url = one_block.url
    if answer == "away":
        with RangedServer(one_block.folder).serving() as other:
            url = other.url
    one_block.answer = lambda name, content: answer  # type: ignore[assignment,return-value]
    with pytest.raises(
        OSError, match=rf"manifest\.json could not be read for \d+ seconds \(.*({said}).*the same command"
    ):
        TokenShards(url, options(tmp_path, deadline=1.5))
    assert time.monotonic() - began < 6


@pytest.mark.parametrize(("status", "error"), [(404, FileNotFoundError), (403, PermissionError)])
def test_what_the_store_refuses_is_not_asked_again(
    one_block: RangedServer, tmp_path: Path, status: int, error: type[OSError]
) -> None:
    one_block.answer = lambda name, content: status
    with pytest.raises(error, match=r"manifest\.json (does not exist|may not be read)"):
        TokenShards(one_block.url, options(tmp_path))
    assert len(one_block.requests) == 1


@pytest.mark.parametrize("url", ["nosuch://place/train", "dropbox://place/train", "http:///train"])
def test_urls_that_nothing_can_read(url: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be (read|asked for)"):
        TokenShards(url)


def test_a_full_disk_is_warned_about_once(
    server: RangedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, content: bytes) -> int:
        with open(path, "wb") as file:
            file.write(content[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    local = TrainingStream([(server.folder, 1.0)], LENGTH, 7, order="block")
    remote = TrainingStream([(server.url, 1.0)], LENGTH, 7, remote=options(tmp_path))
    assert np.array_equal(read_epoch(remote, 640), read_epoch(local, 640))
    assert capsys.readouterr().out.count("cannot be written (No space left on device)") == 1
    assert {file.suffix for file in (tmp_path / "cache").iterdir()} == {".lock"}, "half a file was left"


def test_a_cache_in_an_impossible_place(one_block: RangedServer, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert TokenShards(one_block.url, options(tmp_path)).read(0, 3).tolist() == [2, 3, 4]


def test_a_process_killed_while_it_fetches_holds_nobody_up(one_block: RangedServer, tmp_path: Path) -> None:
    hangs = threading.Event()
    hangs.set()
    one_block.answer = lambda name, content: None if name.endswith(".bin") and hangs.is_set() else content
    process = multiprocessing.get_context("fork").Process(
        target=lambda: TokenShards(one_block.url, options(tmp_path)).read(0, 10)
    )
    process.start()
    while "u-00000-000.bin" not in one_block.requests:
        time.sleep(0.01)
    hangs.clear()
    process.kill()
    process.join()
    leftover = tmp_path / "cache" / "x.1.1.tmp"
    leftover.write_bytes(b"half a block")
    os.utime(leftover, (0, 0))
    assert TokenShards(one_block.url, options(tmp_path, blocks=0)).read(0, 3).tolist() == [2, 3, 4]
    assert not leftover.exists()


def test_a_store_that_trickles_is_given_time_and_not_more(
    one_block: RangedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = TokenShards(one_block.url, options(tmp_path))
    one_block.seconds_per_kilobyte = 0.1
    assert shards.read(0, 998).tolist() == list(range(2, 1000))

    def slow_at_first(name: str, content: bytes) -> bytes:
        one_block.seconds_per_kilobyte = 10.0 if one_block.requests.count(name) == 1 else 0.0
        return content

    one_block.requests.clear()
    one_block.answer = slow_at_first
    monkeypatch.setattr(remote_blocks, "ATTEMPT_SECONDS", 0.3)
    assert TokenShards(one_block.url, options(tmp_path, blocks=0)).fingerprint == shards.fingerprint
    assert one_block.requests.count("manifest.json") == 2
    one_block.answer = lambda name, content: content
    one_block.seconds_per_kilobyte = 10.0
    began = time.monotonic()
    with pytest.raises(OSError, match=r"manifest\.json could not be read for \d+ seconds \(FSTimeoutError\)"):
        TokenShards(one_block.url, options(tmp_path, deadline=1.0))
    assert time.monotonic() - began < 3


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    cache = remote_blocks.BlockCache(tmp_path, 30)
    blocks = {key: bytes([number]) * 10 for number, key in enumerate("abcd")}
    digests = {key: remote_blocks.xxhash.xxh3_64_intdigest(content) for key, content in blocks.items()}
    for age, key in enumerate("abc"):
        cache.get(key, digests[key], lambda key=key: blocks[key])  # type: ignore[misc]
        os.utime(tmp_path / key, (age, age))
    remote_blocks.BlockCache(tmp_path, 30).get("a", digests["a"], lambda: b"")  # used by another process
    cache.get("d", digests["d"], lambda: blocks["d"])
    assert sorted(file.name for file in tmp_path.iterdir() if file.suffix != ".lock") == ["a", "c", "d"]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("a / ext4\nhost:/x {0} nfs4", True),
        ("host:/x / nfs4\na {0} xfs", False),
        ("a {0} xfs\nhost {0} fuse.sshfs", True),
        ("host {0} nfs\na {0} tmpfs", False),
        ("a / ext4\nhost {0}x lustre", False),
        ("a / fuse.fuse-overlayfs", False),
    ],
)
def test_the_mount_above_a_path_says_whether_it_is_on_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, expected: bool
) -> None:
    folder = tmp_path / "a b"
    mounts = tmp_path / "mounts"
    rows = lines.format(str(folder).replace(" ", "\\040")).splitlines()
    mounts.write_text("".join(f"{row} rw 0 0\n" for row in rows), encoding="utf-8")
    monkeypatch.setattr(remote_blocks, "MOUNTS", str(mounts))
    assert remote_blocks.is_on_network(folder / "data") is expected


def test_a_network_file_system_is_read_without_memory_maps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_shards(tmp_path / "share" / "train", random_documents(600, 500), shard_bytes=SHARD_BYTES)
    local = TrainingStream([(folder, 1.0)], LENGTH, 7, order="block")
    expected = read_epoch(local, 640)
    assert str(folder) in Path("/proc/self/maps").read_text(), "it would not be seen below"
    del local
    gc.collect()
    mounts = tmp_path / "mounts"
    mounts.write_text(f"a / ext4 rw 0 0\nhost:/share {tmp_path}/share nfs4 rw 0 0\n")
    monkeypatch.setattr(remote_blocks, "MOUNTS", str(mounts))
    plain, failures = LocalFileSystem.cat_file, iter(range(3))

    def fail_at_first(self: LocalFileSystem, *arguments: Any, **more: Any) -> bytes:
        if next(failures, None) is not None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return plain(self, *arguments, **more)

    monkeypatch.setattr(LocalFileSystem, "cat_file", fail_at_first)
    remote = TrainingStream([(folder, 1.0)], LENGTH, 7, remote=options(tmp_path))
    assert remote.sources == [folder] and np.array_equal(read_epoch(remote, 640), expected)
    assert str(folder) not in Path("/proc/self/maps").read_text() and next(failures, None) is None
    for file in folder.glob("*.bin"):
        os.truncate(file, 100)  # where it is mapped, this ends the process
    remote_blocks.open_cache.cache_clear()
    with pytest.raises(ValueError, match=r"u-00000-000\.bin: block \d+ .* was read twice, and"):
        TokenShards(folder, options(tmp_path, blocks=0)).read(0, 10_000)
    with pytest.raises(ValueError, match=r"u-00000-000\.bin has 100 bytes, but the manifest says"):
        TokenShards(folder).check_files()
