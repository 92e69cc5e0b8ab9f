"""Token shards in an S3-compatible store: the rows are the local ones, and what the store says is told apart."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import s3fs
from data_samples import random_documents, write_shards
from moto.core import enable_iam_authentication
from moto.moto_api._internal import moto_api_backend
from s3_store import S3Store
from source_samples import read
from test_data_remote import BLOCK, LENGTH, SHARD_BYTES, data_bytes, options, read_epoch, small_blocks  # noqa: F401

from data_pipeline.sources import ReadOptions, find_files
from data_pipeline.stream import TrainingStream
from data_pipeline.token_shards import TokenShards

URL = "s3://lake/train"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Store]:
    """A store with an empty bucket; where it is and with which key, the environment says."""
    with S3Store().serving() as served:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        for name, value in served.environment().items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("lake")
        yield served
    moto_api_backend.reset()
    s3fs.S3FileSystem.clear_instance_cache()


def put(folder: Path) -> None:
    s3fs.S3FileSystem().put(f"{folder}/", f"{URL}/", recursive=True)


@pytest.fixture
def one_block(store: S3Store, tmp_path: Path) -> S3Store:
    put(write_shards(tmp_path / "local", [np.arange(2, 1000)]))
    store.requests.clear()
    return store


def test_an_epoch_equals_the_local_one_and_is_fetched_about_once(store: S3Store, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "local", random_documents(1000, 500), shard_bytes=SHARD_BYTES)
    put(folder)
    before = store.bytes_sent
    local = TrainingStream([(folder, 1.0)], LENGTH, 7, order="block")
    remote = TrainingStream([(URL, 1.0)], LENGTH, 7, remote=options(tmp_path))
    count = local.samples_per_epoch
    assert remote.fingerprint == local.fingerprint
    assert np.array_equal(read_epoch(remote, count), read_epoch(local, count))
    assert data_bytes(folder) > 1.8 * 60 * BLOCK, "the cache is smaller than the data"
    assert data_bytes(folder) * 0.99 < store.bytes_sent - before <= 1.1 * data_bytes(folder)
    kept = [file.stat().st_size for file in (tmp_path / "cache").iterdir() if file.suffix != ".lock"]
    assert sum(kept) <= 60 * BLOCK


def test_a_store_that_is_away_is_waited_for_until_the_deadline(
    one_block: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with S3Store().serving() as other:  # another way to the same objects
        monkeypatch.setenv("AWS_ENDPOINT_URL", other.environment()["AWS_ENDPOINT_URL"])
        s3fs.S3FileSystem.clear_instance_cache()
        shards = TokenShards(URL, options(tmp_path))
    began = time.monotonic()
    with pytest.raises(OSError, match=r"manifest\.json could not be read for 1 seconds \(.*the same command goes on"):
        TokenShards(URL, options(tmp_path, deadline=1.0))
    assert time.monotonic() - began < 3
    read = threading.Event()

    def back() -> None:
        time.sleep(2)
        with other.serving():
            read.wait(30)

    thread = threading.Thread(target=back)
    thread.start()
    began = time.monotonic()
    assert shards.read(0, 998).tolist() == list(range(2, 1000))
    assert 1.5 < time.monotonic() - began < 20
    read.set()
    thread.join()


@pytest.mark.parametrize("answer", [("503 Slow Down", "SlowDown"), ("500 Internal Server Error", "InternalError")])
def test_a_store_with_errors_is_asked_again(
    one_block: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: tuple[str, str]
) -> None:
    """More often than s3fs does by itself; botocore would double its pauses."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    one_block.answer = lambda path: answer if one_block.requests.count(path) <= 7 else None
    assert TokenShards(URL, options(tmp_path)).tokens == 998
    assert one_block.requests.count("/lake/train/manifest.json") > 7


@pytest.mark.parametrize(
    ("url", "environment", "answer", "error", "said"),
    [
        ("s3://no-lake/train", {}, None, FileNotFoundError, "does not exist"),
        ("s3://lake/other", {}, None, FileNotFoundError, "does not exist"),
        ("s3://no lake/train", {}, None, ValueError, 'Invalid bucket name "no lake"'),
        (URL, {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, None, ValueError, "NoCredentialsError"),
        (URL, {"AWS_PROFILE": "nobody"}, None, ValueError, r"profile \(nobody\) could not be found"),
        (URL, {"AWS_ENDPOINT_URL": "127.0.0.1"}, None, ValueError, "Invalid endpoint"),
        (URL, {}, ("400 Bad Request", "AuthorizationHeaderMalformed"), ValueError, "credentials, region and endpoint"),
    ],
)
def test_what_asking_again_does_not_change_is_refused_at_once(
    one_block: S3Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    url: str,
    environment: dict[str, str | None],
    answer: tuple[str, str] | None,
    error: type[Exception],
    said: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    one_block.answer = lambda path: answer
    began = time.monotonic()
    with pytest.raises(error, match=said) as refused:
        TokenShards(url, options(tmp_path))
    assert f"{url}/manifest.json" in str(refused.value) and "\n" not in str(refused.value)
    assert time.monotonic() - began < 5
    assert len(one_block.requests) <= 3


def test_wrong_credentials_are_refused_at_once(one_block: S3Store, tmp_path: Path) -> None:
    message = r"s3://lake/train/manifest\.json may not be read .* give the credentials"
    with enable_iam_authentication(), pytest.raises(PermissionError, match=message):
        TokenShards(URL, options(tmp_path))
    assert len(one_block.requests) == 1


def test_texts_in_a_bucket(store: S3Store, capsys: pytest.CaptureFixture[str]) -> None:
    lake = s3fs.S3FileSystem()
    for name, content in [("a.txt", b"one"), ("deep/b.txt", b"two"), ("c.pdf", b"no")]:
        lake.pipe(f"lake/texts/{name}", content)
    assert read("s3://lake/texts") == ["one", "two"]
    assert read("s3://lake/texts/*.txt") == read("s3://lake/texts/a.txt") == ["one"]
    versions = {find_files(["s3://lake/texts/a.txt"], ReadOptions())[0][0].version for _ in range(2)}
    lake.pipe("lake/texts/a.txt", b"new")
    versions.add(find_files(["s3://lake/texts/a.txt"], ReadOptions())[0][0].version)
    assert len(versions) == 2 and all(version.startswith("ETag ") for version in versions)
    assert "neither" not in capsys.readouterr().out
    for place in ("s3://no-lake/texts", "s3://lake/none.txt"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            read(place)
