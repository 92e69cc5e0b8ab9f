"""Training from a server that is killed in the middle equals training from the directory, and fetches the data once.

All sizes are 8,192 times smaller than in the product, in the tests' process and in the ranks: blocks of 1 KiB. So the
data are many blocks, the cache holds a part of them, and both are needed for an epoch of few steps.
"""

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import s3fs
from live_runs import PLAYS, Live, Runs, comparable

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from killable import Killable
from ranged_server import RangedServer
from s3_store import S3Store

from data_pipeline import shard_writer, stream, token_shards
from data_pipeline.prepare import PrepareOptions, prepare

SMALLER = 8192
BLOCK_BYTES = token_shards.BLOCK_BYTES // SMALLER
CACHE_BLOCKS = 48
PLANTED = f"""
from data_pipeline import remote_blocks, stream, token_shards
token_shards.BLOCK_BYTES = stream.BLOCK_BYTES = {BLOCK_BYTES}
token_shards.open_cache = lambda place, size: remote_blocks.open_cache(place, size // {SMALLER})
"""
STEP_TOKENS = 4096
CHECKPOINT_STEPS = 5


@pytest.fixture(scope="module")
def near(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`runs` with two plays in small blocks, and the run `near` from its folder: one epoch."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (shard_writer, stream, token_shards):
            patch.setattr(module, "BLOCK_BYTES", BLOCK_BYTES)
        folder = tmp_path_factory.mktemp("planted")
        (folder / "sitecustomize.py").write_text(PLANTED, encoding="utf-8")
        patch.setenv("SITECUSTOMIZE", str(folder))
        plays = [str(PLAYS / "train" / name) for name in ("hamlet.txt", "othello.txt")]
        tokenizer = runs.folder / "data" / "tokenizer"
        prepare(PrepareOptions(plays, runs.folder / "blocks", tokenizer, validation_fraction=0))
        runs.train("near", **changes(runs, runs.folder / "blocks", 3))
        yield runs


def changes(runs: Runs, place: Path | str, deadline_seconds: float) -> dict[str, Any]:
    tokens = token_shards.TokenShards(runs.folder / "blocks" / "train").tokens
    remote = {
        "cache_directory": str(runs.folder / "cache"),
        "cache_bytes": CACHE_BLOCKS * token_shards.BLOCK_BYTES * SMALLER,
        "deadline_seconds": deadline_seconds,
    }
    return {
        "data": {"train": [{"path": f"{place}/train"}], "sequence_length": 64, "order": "block", "remote": remote},
        "train": {
            "global_batch_tokens": STEP_TOKENS,
            "micro_batch_sequences": 32,
            "steps": (tokens - 1) // STEP_TOKENS,
            "seed": 3,
        },
        "evaluate": {},
        "checkpoint": {"every_steps": CHECKPOINT_STEPS},
    }


def kill_in_the_middle(live: Live, server: Killable, steps: int, seconds: float) -> None:
    """The run waits as long as the server is away, and then goes on to its end."""
    live.wait_until(lambda: live.last_step() >= steps // 3)
    with server.killed():
        time.sleep(seconds)
        assert live.process.poll() is None and live.last_step() < steps, "it did not wait"
    assert live.process.wait(120) == 0, live.log.read_text()
    assert "cannot be read" in live.log.read_text()


def require_equal_and_fetched_once(
    runs: Runs, name: str, server: RangedServer | S3Store, repeated_steps: int = 0
) -> None:
    assert comparable(runs.metrics(name)) == comparable(runs.metrics("near"))
    data_bytes = sum(file.stat().st_size for file in (runs.folder / "blocks" / "train").iterdir())
    assert data_bytes > 4 * CACHE_BLOCKS * BLOCK_BYTES
    repeated_bytes = repeated_steps * STEP_TOKENS * 2
    assert 0.95 * data_bytes < server.bytes_sent <= 1.1 * data_bytes + repeated_bytes
    cache = runs.folder / "cache"
    assert sum(file.stat().st_size for file in cache.iterdir()) <= CACHE_BLOCKS * BLOCK_BYTES
    shutil.rmtree(cache)


@pytest.mark.parametrize("seconds", [pytest.param(4, marks=pytest.mark.few), pytest.param(30, marks=pytest.mark.full)])
def test_an_http_server_killed_in_the_middle(near: Runs, seconds: float) -> None:
    server = RangedServer(near.folder / "blocks")
    with Killable(server) as killable:
        options = changes(near, server.url, 120)
        kill_in_the_middle(near.start("http", **options), killable, options["train"]["steps"], seconds)
    require_equal_and_fetched_once(near, "http", server)


@pytest.mark.full
def test_an_s3_store_killed_for_longer_than_the_deadline_and_again(near: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    with S3Store().serving() as store:
        for name, value in store.environment().items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem().mkdir("lake")
        s3fs.S3FileSystem().put(f"{near.folder / 'blocks'}/", "s3://lake/", recursive=True)
    store = S3Store(store.port)  # the same objects, which moto keeps in this process, and nothing sent yet
    with Killable(store) as killable:
        options = changes(near, "s3://lake", 2)
        steps = options["train"]["steps"]
        live = near.start("s3", **options)
        live.wait_until(lambda: live.last_step() >= steps // 4)
        with killable.killed():
            assert live.process.wait(120) == 1, live.log.read_text()
        assert "could not be read for" in live.log.read_text()
        reached = live.last_step()
        assert reached < steps
        live = near.start("s3", log="-again", **changes(near, "s3://lake", 60))
        live.wait_until(lambda: live.last_step() > reached)
        kill_in_the_middle(live, killable, steps, 5)
    require_equal_and_fetched_once(near, "s3", store, CHECKPOINT_STEPS)
