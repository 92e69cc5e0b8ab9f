"""Training from a URL equals training from the directory, and a store that is away too long loses nothing."""

import shutil
import sys
from pathlib import Path

import pytest
import s3fs
from live_runs import Runs, comparable

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from ranged_server import RangedServer
from s3_store import S3Store


@pytest.mark.full
def test_training_from_a_url_that_goes_away_and_comes_back_equals_the_local_run(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = RangedServer(runs.folder / "data")

    def changes(place: Path | str, deadline: float) -> dict[str, object]:
        remote = {"cache_directory": str(runs.folder / "cache"), "deadline_seconds": deadline}
        data = {"train": [{"path": f"{place}/train"}], "sequence_length": 64, "order": "block", "remote": remote}
        return {"data": data, "evaluate": {}, "checkpoint": {"every_steps": 10}}

    runs.train("near", **changes(runs.folder / "data", 3))
    with server.serving():
        answers = server.answer
        server.answer = lambda name, content: 503 if name.endswith(".bin") else content
        refused = runs.train("far", check=False, **changes(server.url, 3))
        assert refused.returncode == 1 and "could not be read for" in refused.stderr
        server.answer = answers
        runs.train("far", **changes(server.url, 30))
    assert comparable(runs.metrics("far")) == comparable(runs.metrics("near"))
    assert server.requests.count("u-00000-000.bin") > 2
    with S3Store().serving() as store:
        for name, value in store.environment().items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem().mkdir("lake")
        s3fs.S3FileSystem().put(f"{runs.folder / 'data'}/", "s3://lake/", recursive=True)
        store.requests.clear()
        shutil.rmtree(runs.folder / "cache")
        runs.train("s3", **changes("s3://lake", 30))
    assert comparable(runs.metrics("s3")) == comparable(runs.metrics("near"))
    assert "/lake/train/u-00000-000.bin" in store.requests
