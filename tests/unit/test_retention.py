"""Which checkpoints stay, in which form, and that a kill or a damage in between loses none."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_checkpoint import change_manifest, make_model, write_checkpoint

from gpt.checkpoint import retention
from gpt.checkpoint.format import DamagedFileError, checkpoint_directory, list_checkpoints, read_manifest
from gpt.checkpoint.read import CheckpointReader, load_plain_model, newest_checkpoint
from gpt.checkpoint.retention import apply_retention, check_budget, kept_steps, reduce_to_weights
from gpt.recipe import Checkpoint
from gpt.run_directory import SupersededError


def make_run(run: Path, losses: dict[int, float | None]) -> None:
    for step, loss in losses.items():
        directory = write_checkpoint(run, make_model(seed=step), step=step, probe=False, tokenizer=False)
        change_manifest(directory, evaluate_loss=loss)


def tidy(run: Path, newest: int, **settings: Any) -> list[tuple[str, int]]:
    return list(apply_retention(run, Checkpoint(**settings), newest, 1, check_ownership=lambda: None, metric="loss"))


@pytest.mark.parametrize("settings", [{"keep_last": 1}, {"weights_only_after": 1}, {"budget_bytes": 1}])
def test_a_start_that_was_superseded_changes_no_checkpoint(tmp_path: Path, settings: dict[str, int]) -> None:
    run = tmp_path / "run"
    make_run(run, {1: None, 2: None})

    def superseded() -> None:
        raise SupersededError

    with pytest.raises(SupersededError):
        list(apply_retention(run, Checkpoint(**settings), 2, 1, superseded, "loss"))
    assert list_checkpoints(run) == [1, 2] and not read_manifest(checkpoint_directory(run, 1)).weights_only


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"keep_last": 2}, {50, 60}),
        ({"keep_last": 1, "keep_every_steps": 20}, {20, 40, 60}),
        ({"keep_last": 1, "keep_best": 1}, {20, 60}),
        ({"keep_last": 1, "keep_best": 2}, {20, 30, 60}),
        ({"keep_last": 1, "keep_best": 2, "keep_every_steps": 50}, {20, 30, 50, 60}),
    ],
)
def test_the_kept_ones(settings: dict[str, int], expected: set[int]) -> None:
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: None, 50: 2.5, 60: 2.4}
    assert kept_steps(Checkpoint(**settings), losses) == expected


def test_deletion_touches_only_committed_checkpoints_up_to_the_newest(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run, {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 9: 9.0})
    others = [
        run / "checkpoints" / name for name in ("step_00000002.old", "step_2", "mine", ".tmp-step_00000007-g000009")
    ]
    for other in others:
        other.mkdir()
        (other / "manifest.json").touch()
    assert tidy(run, 4, keep_last=1, keep_best=1) == [("checkpoint deleted", 1), ("checkpoint deleted", 3)]
    assert list_checkpoints(run) == [2, 4, 9] and all((other / "manifest.json").exists() for other in others)


def test_a_damaged_manifest_is_not_the_best(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run, {1: 1.0, 2: 2.0, 3: 3.0})
    (checkpoint_directory(run, 1) / "manifest.json").write_text("{", encoding="utf-8")
    tidy(run, 3, keep_last=1, keep_best=1)
    assert list_checkpoints(run) == [2, 3]


def test_old_ones_lose_their_moments_and_are_still_read(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run, {1: None, 2: None, 3: None})
    size = sum(file.stat().st_size for file in checkpoint_directory(run, 1).glob("*.safetensors"))
    deeds = [("checkpoint reduced to weights", 1), ("checkpoint reduced to weights", 2)]
    assert tidy(run, 3, weights_only_after=1) == deeds
    assert tidy(run, 3, weights_only_after=1) == []
    reader = CheckpointReader(checkpoint_directory(run, 1))
    reader.verify()
    assert reader.manifest.weights_only and not read_manifest(checkpoint_directory(run, 3)).weights_only
    assert sorted(file.name for file in reader.directory.iterdir()) == ["manifest.json", *sorted(reader.manifest.files)]
    assert sum(entry.size_bytes for entry in reader.manifest.files.values()) < size / 2.5
    loaded = load_plain_model(run, torch.float32, step=1)
    for name, parameter in make_model(seed=1).named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
    lines: list[str] = []
    found = newest_checkpoint(run, report=lines.append, resumable=True)
    assert found is not None and found.manifest.step == 3
    assert newest_checkpoint(run, report=lines.append, resumable=True, before_step=3) is None
    assert len(lines) == 2 and "step 2 is passed over: it holds weights only" in lines[0]


@pytest.mark.parametrize("place", ["write_safetensors", "write_manifest", "unlink"])
def test_a_kill_while_it_is_reduced_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    directory = write_checkpoint(tmp_path / "run", make_model(), probe=False, tokenizer=False)

    class Killed(BaseException): ...

    def kill(*args: Any, **kwargs: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "unlink") if place == "unlink" else (retention, place)), kill)
        with pytest.raises(Killed):
            reduce_to_weights(directory)
    CheckpointReader(directory).verify()
    assert read_manifest(directory).weights_only == (place == "unlink")
    reduce_to_weights(directory)
    reader = CheckpointReader(directory)
    reader.verify()
    assert sorted(file.name for file in directory.iterdir()) == ["manifest.json", *sorted(reader.manifest.files)]


def test_a_damaged_checkpoint_is_not_reduced(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run, {1: None, 2: None})
    file = checkpoint_directory(run, 1) / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert tidy(run, 2, weights_only_after=1) == [("checkpoint found damaged", 1)]
    with pytest.raises(DamagedFileError):
        CheckpointReader(checkpoint_directory(run, 1)).verify()
    assert not read_manifest(checkpoint_directory(run, 1)).weights_only


def test_the_oldest_go_where_the_budget_is_exceeded(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run, {1: None, 2: None, 3: None, 4: None})
    size = max(sum(f.stat().st_size for f in checkpoint_directory(run, step).iterdir()) for step in (1, 2, 3, 4))
    assert tidy(run, 4, keep_last=4, budget_bytes=5 * size) == []
    deeds = [("checkpoint deleted", 1), ("checkpoint deleted", 2)]
    assert tidy(run, 4, keep_last=4, budget_bytes=3 * size) == deeds
    assert tidy(run, 4, keep_last=4, budget_bytes=1) == [("checkpoint deleted", 3)], "the newest stays"


def test_a_budget_that_cannot_hold_what_is_kept_is_refused(tmp_path: Path) -> None:
    """3 of the last and the one being written, 12 bytes each: 48 a parameter."""
    for budget, refused in ((47_999, True), (48_000, False)):
        settings = Checkpoint(every_steps=10, keep_last=3, budget_bytes=budget)
        if refused:
            with pytest.raises(ValueError, match=r"up to 48,000 bytes \(4 whole .* checkpoint\.budget_bytes is 47,999"):
                check_budget(settings, tmp_path / "run", 1000, 100)
        else:
            check_budget(settings, tmp_path / "run", 1000, 100)
    # 20 saves: each second one for ever (10), 1 last, 2 best; only the newest keeps its moments: 2 * 12 + 12 * 4
    settings = Checkpoint(
        every_steps=5, keep_last=1, keep_best=2, keep_every_steps=10, weights_only_after=1, budget_bytes=71_999
    )
    with pytest.raises(ValueError, match=r"up to 72,000 bytes \(2 whole ones.*12 of weights only"):
        check_budget(settings, tmp_path / "run", 1000, 100)
    with pytest.raises(ValueError, match="with the disk's free space there are"):
        check_budget(Checkpoint(budget_bytes=2**62), tmp_path / "run", 2**50, 100)
