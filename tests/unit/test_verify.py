"""trainyard verify: what is whole is said, and the first damaged file of every kind of folder is named."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
from data_samples import save_tokenizer, small_tokenizer, write_jsonl
from ranged_server import RangedServer
from small_checkpoint import make_model, write_checkpoint
from typer.testing import CliRunner

from data_pipeline.prepare import PrepareOptions, prepare
from data_pipeline.remote_blocks import open_cache
from data_pipeline.token_shards import TokenShards
from gpt.checkpoint.format import checkpoint_directory
from gpt.export import _finish
from launch.cli import app
from launch.verify import verify

TEXTS = [f"The {number}th line of a short text." for number in range(400)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    source = write_jsonl(folder / "lines.jsonl", [{"text": text} for text in TEXTS])
    tokenizer = save_tokenizer(folder / "tokenizer")
    prepare(
        PrepareOptions([str(source)], folder / "out", tokenizer=tokenizer, validation_fraction=0.2, unit_bytes=4000)
    )
    return folder / "out"


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "out"))


def _flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_whole_data_and_one_split(prepared: Path) -> None:
    calls: list[tuple[int, int]] = []
    found = verify(prepared, lambda done, total: calls.append((done, total)))
    assert found["kind"] == "prepared data"
    assert sum(split["documents"] for split in found["splits"].values()) == len(TEXTS)
    tokens = sum(len(ids) + 1 for ids in small_tokenizer()(TEXTS)["input_ids"])
    assert sum(split["tokens"] for split in found["splits"].values()) == tokens
    assert calls == sorted(calls) and calls[-1][0] == calls[-1][1]
    one = verify(prepared / "validation")
    assert one == {"kind": "token shards", "splits": {"validation": found["splits"]["validation"]}}


@pytest.mark.parametrize("name", ["train/u-00001-000.bin", "validation/u-00002-000.docs", "train/u-00000-000.sums"])
def test_a_flipped_byte_is_named_with_the_command(copy: Path, name: str) -> None:
    _flip(copy / name, 5)
    result = CliRunner().invoke(app, ["verify", str(copy)])
    assert result.exit_code == 1
    message = str(result.exception)
    assert str(copy / name) in message
    assert "block 0" in message or name.endswith(".sums")
    assert f"delete {copy} and rebuild it with: trainyard prepare --input" in message
    with pytest.raises(ValueError, match=name.split("/")[1]):
        verify(copy / name.split("/")[0])


def test_cut_missing_and_changed_files_are_named(copy: Path) -> None:
    shard = copy / "train" / "u-00002-000.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-2])
    with pytest.raises(ValueError, match=r"u-00002-000\.bin has .* bytes, but the manifest says"):
        verify(copy)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"u-00002-000\.bin is missing"):
        verify(copy)
    shard.write_bytes(content)
    verify(copy)
    file = copy / "tokenizer" / "tokenizer.json"
    kept = file.read_bytes()
    file.write_bytes(kept + b" ")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not the tokenizer that made the data"):
        verify(copy)
    file.write_bytes(kept)
    manifests = [copy / split / "manifest.json" for split in ("train", "validation")]
    shutil.copy(manifests[1], manifests[0])
    with pytest.raises(ValueError, match="is not the one that"):
        verify(copy)
    manifests[0].unlink()
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json"):
        verify(copy)
    (copy / "report.json").write_text('{"splits": []}')
    with pytest.raises(ValueError, match=r"report\.json is damaged"):
        verify(copy)


def test_data_at_a_url_is_verified_there(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one below the URL is read, not what an earlier command left in the cache."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where the cache is by default
    open_cache.cache_clear()
    with RangedServer(copy).serving() as server:
        assert verify(server.url) == verify(copy)
        assert verify(f"{server.url}/train/")["splits"] == {"train": verify(copy)["splits"]["train"]}
        stored = sum(file.stat().st_size for file in copy.glob("*/u-*.bin"))
        TokenShards(f"{server.url}/train").read(0, 10)  # into the cache
        shard = copy / "train" / "u-00000-000.bin"
        before = server.bytes_sent
        verify(server.url)
        assert server.bytes_sent - before > stored
        kept = shard.read_bytes()
        for content, said in [(bytes([kept[0] ^ 1]) + kept[1:], "block 0"), (kept + b"xx", "but the manifest says")]:
            shard.write_bytes(content)
            with pytest.raises(ValueError, match=rf"/train/u-00000-000\.bin.*{said}.*copy the data set"):
                verify(server.url)
        shard.write_bytes(kept)
        (copy / "tokenizer" / "tokenizer.json").write_text("{}")
        with pytest.raises(ValueError, match=rf"{server.url}/tokenizer/tokenizer\.json is not the tokenizer"):
            verify(server.url)
        with pytest.raises(FileNotFoundError, match=r"/absent/manifest\.json does not exist: look at the URL"):
            verify(f"{server.url}/absent")
        result = CliRunner().invoke(app, ["verify", f"{server.url}/validation"])
        assert result.exit_code == 0 and f"whole: {server.url}/validation" in result.output


def test_checkpoints_and_runs(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_checkpoint(run, make_model())
    found = verify(run)
    assert found["kind"] == "run" and found["checkpoints"]
    checkpoint = checkpoint_directory(run, found["checkpoints"][-1])
    assert verify(checkpoint)["kind"] == "checkpoint"
    file = next(checkpoint.glob("rank_*.safetensors"))
    _flip(file, file.stat().st_size - 1)
    for folder in (run, checkpoint):
        with pytest.raises(ValueError, match=file.name):
            verify(folder)
    empty = tmp_path / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="without a committed checkpoint"):
        verify(empty)


def test_exports(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    (tmp_path / "config.json").write_text("{}")
    _finish(tmp_path, {})
    assert verify(tmp_path) == {"kind": "export", "files": 2}
    _flip(tmp_path / "model.safetensors", 500)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        verify(tmp_path)
    (tmp_path / "checksums.json").write_text(json.dumps({"files": {"x": {}}}))
    with pytest.raises(ValueError, match=r"checksums\.json is damaged"):
        verify(tmp_path)
    (tmp_path / "checksums.json").write_text(json.dumps({"files": {}}))
    with pytest.raises(ValueError, match=r"checksums\.json has no checksum of model\.safetensors"):
        verify(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"checksums\.json has no checksum of any file"):
        verify(tmp_path)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither prepared data nor"):
        verify(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        verify(tmp_path / "absent")


def test_json_answer(prepared: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(prepared)])
    assert result.exit_code == 0
    assert f"whole: {prepared}" in result.stdout and "splits.train.documents: " in result.stdout
