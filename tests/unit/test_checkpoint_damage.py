"""What a rank reads of a checkpoint, and that no byte of it can change without notice.

In blocks of some KiB instead of 8 MiB, so that the files of a small model have many.
"""

import random
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path

import pytest
import torch
from small_checkpoint import make_model, write_checkpoint

from gpt.checkpoint import files
from gpt.checkpoint.files import VerifiedFile
from gpt.checkpoint.format import DamagedFileError, checkpoint_directory
from gpt.checkpoint.read import CheckpointReader, newest_checkpoint
from gpt.export_source import CheckpointWeights
from launch.verify import verify

Block = tuple[str, int]
"""(name of the file, index)."""


def load(reader: CheckpointReader, processes: int, rank: int) -> tuple[int, int]:
    """Read what a rank needs, in the loader's order; its elements, and the ends of its slices within files."""
    elements, slice_ends = 0, 0
    for index, entry in enumerate(reader.manifest.parameters):
        size = -(-entry.elements // processes)
        start = min(entry.elements, rank * size)
        count = min(size, entry.elements - start)
        elements += count
        for state in reader.manifest.states_of(entry):
            assert len(reader.read_range(state, entry.name, start, count)) == count
            for ranges in reader.manifest.fragments.values():
                first, stop = max(start, ranges[index][0]), min(start + count, sum(ranges[index]))
                slice_ends += 2 * (first < stop)
    return elements, slice_ends


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[Block]:
    """Every block that is taken from the file system, in order."""
    blocks: list[Block] = []
    fetch = VerifiedFile._fetch

    def fetch_and_note(self: VerifiedFile, descriptor: int, index: int, target: memoryview) -> None:
        blocks.append((self.path.name, index))
        fetch(self, descriptor, index, target)

    monkeypatch.setattr(VerifiedFile, "_fetch", fetch_and_note)
    return blocks


@pytest.mark.parametrize("written_by", [1, 2, 3, 20])
def test_a_rank_reads_its_share_and_no_block_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fetched: list[Block], written_by: int
) -> None:
    """12 bytes an element of its own, at most a block for each end of a slice, and a file's header: 43 MB in 64 KiB."""
    monkeypatch.setattr(files, "BLOCK_BYTES", 1 << 16)
    model = make_model(hidden_size=256, intermediate_size=1024, vocab_size=4096)
    write_checkpoint(tmp_path, model, ranks=written_by, probe=False, tokenizer=False)
    total = sum(parameter.numel() for parameter in model.parameters())
    for processes in (1, 2, 3):
        for rank in range(processes):
            fetched.clear()
            reader = newest_checkpoint(tmp_path, report=pytest.fail)
            assert reader is not None and not fetched, "finding a checkpoint reads nothing of its tensor files"
            elements, slice_ends = load(reader, processes, rank)
            assert elements <= total / processes + len(reader.manifest.parameters)
            opened = len({name for name, _ in fetched})
            assert reader.bytes_read <= 12 * elements + (slice_ends + opened) * files.BLOCK_BYTES
            assert len(fetched) == len(set(fetched)), f"a block was read twice by rank {rank} of {processes}"
            if processes == written_by:
                assert opened == 1 and reader.bytes_read <= 12 * elements + 2 * files.BLOCK_BYTES


@pytest.mark.parametrize("written_by", [1, 3, 20])
def test_an_export_reads_no_block_twice_and_what_it_was_given_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fetched: list[Block], written_by: int
) -> None:
    """Pieces are views of blocks, looked at when the thread has read ahead all it does; 20 files keep one each."""
    monkeypatch.setattr(files, "BLOCK_BYTES", 256)
    directory = write_checkpoint(tmp_path, make_model(), ranks=written_by, tokenizer=False)
    plain, weights = CheckpointReader(directory), CheckpointWeights(CheckpointReader(directory))
    expected = {name: plain.read_tensor(name).flatten() for name in weights.shapes}
    fetched.clear()
    for name, values in expected.items():
        done = 0
        for piece in weights.chunks(name):
            wait(weights._ahead)
            assert torch.equal(piece, values[done : done + piece.numel()]), name
            done += piece.numel()
        assert done == values.numel()
    assert len(fetched) == len(set(fetched)) > 20
    first = next(iter(expected))  # not what was read ahead
    assert torch.equal(torch.cat([piece.clone() for piece in weights.chunks(first)]), expected[first])


@pytest.mark.parametrize(
    "positions", [pytest.param(40, marks=pytest.mark.few), pytest.param(400, marks=pytest.mark.full)]
)
def test_no_flipped_byte_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fetched: list[Block], positions: int
) -> None:
    """Every file in turn, at a random byte and at those of its header: `verify` names the file; ranks that use the
    block refuse it, the others do not read it; a damaged manifest is passed over for the checkpoint before it."""
    monkeypatch.setattr(files, "BLOCK_BYTES", 4096)
    run, dice, processes = tmp_path / "run", random.Random(positions), 3
    for step in (10, 20):
        folder = write_checkpoint(run, make_model(), step=step, ranks=2, tokenizer=False)
    used: list[set[Block]] = []
    for rank in range(processes):
        fetched.clear()
        load(CheckpointReader(folder), processes, rank)
        used.append(set(fetched))
    noticed = 0
    for attempt in range(positions):
        path = sorted(folder.iterdir())[attempt % 3]
        content = path.read_bytes()
        position = dice.randrange(12 if attempt % 4 == 0 else len(content))
        path.write_bytes(
            content[:position] + bytes([content[position] ^ dice.randrange(1, 256)]) + content[position + 1 :]
        )
        with pytest.raises(ValueError, match=path.name):
            verify(run)
        with pytest.raises(DamagedFileError, match=path.name):
            verify(folder)
        warnings: list[str] = []
        for rank in range(processes):
            reader = newest_checkpoint(run, report=warnings.append)
            assert reader is not None
            if path.name == "manifest.json":
                assert reader.manifest.step == 10 and path.name in warnings[-1]
            elif (path.name, position // 4096) in used[rank]:
                noticed += 1
                with pytest.raises(DamagedFileError, match=path.name):
                    load(reader, processes, rank)
                previous = newest_checkpoint(run, report=warnings.append, before_step=20)
                assert previous is not None and previous.manifest.step == 10
            else:
                load(reader, processes, rank)
        path.write_bytes(content)
    assert noticed > positions / 2
    assert verify(run)["checkpoints"] == [10, 20]


def cut(folder: Path) -> None:
    path = folder / "rank_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(folder: Path) -> None:
    with (folder / "rank_00000.safetensors").open("ab") as file:
        file.write(b"\0")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (cut, "rank_00001.safetensors"),
        (lengthen, "rank_00000.safetensors"),
        (lambda folder: (folder / "rank_00001.safetensors").unlink(), "rank_00001.safetensors"),
        (lambda folder: (folder / "manifest.json").write_bytes(b""), "manifest.json"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"[]"), "manifest.json"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json"),
    ],
)
def test_whole_files_that_are_wrong(tmp_path: Path, damage: Callable[[Path], None], named: str) -> None:
    for step in (10, 20, 30):
        write_checkpoint(tmp_path, make_model(), step=step, probe=False, tokenizer=False)
    (checkpoint_directory(tmp_path, 10) / "rank_00000.json").write_text("{")  # a leftover is no part of it
    damage(checkpoint_directory(tmp_path, 20))
    damage(checkpoint_directory(tmp_path, 30))
    warnings: list[str] = []
    found = newest_checkpoint(tmp_path, report=warnings.append)
    assert found is not None and found.manifest.step == 10
    assert len(warnings) == 2 and all(named in line for line in warnings)
    with pytest.raises(ValueError, match=rf"2 of 3 checkpoints cannot be loaded.*{named}.*Whole are those of steps 10"):
        verify(tmp_path)
    damage(checkpoint_directory(tmp_path, 10))
    with pytest.raises(ValueError, match=r"3 of 3 checkpoints .* None is whole"):
        verify(tmp_path)
