"""Files of `checkpoint/1`: the safetensors writer against the library, and refusal of every damaged byte."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file

from gpt.checkpoint.files import (
    DTYPE_CODES,
    FragmentFile,
    TensorToWrite,
    VerifiedFile,
    write_safetensors,
)
from gpt.checkpoint.format import BLOCK_BYTES, DamagedFileError, FileEntry


def to_write(name: str, tensor: torch.Tensor, chunk: int | None = None) -> TensorToWrite:
    read = (lambda: tensor) if chunk is None else (lambda: tensor.reshape(-1).split(chunk))
    return TensorToWrite(name, DTYPE_CODES[tensor.dtype], tuple(tensor.shape), read)


def write_two_blocks(path: Path) -> tuple[torch.Tensor, FileEntry]:
    """A file of a little over two blocks that holds one fp32 tensor `a`."""
    tensor = torch.randn(2 * BLOCK_BYTES // 4 + 1000)
    return tensor, write_safetensors(path, [to_write("a", tensor, 300_001)])


def flip_byte(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        value = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([value ^ 1]))


def test_safetensors_library_reads_the_same_tensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "odd": torch.arange(7, dtype=torch.uint8),
        "matrix": torch.randn(33, 17),
        "half": torch.randn(5, 3).to(torch.bfloat16),
        "fp16": torch.randn(9).to(torch.float16),
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.5),
        "long": torch.arange(4),
        "empty": torch.zeros(0),
        "strided": torch.randn(6, 8).t(),
    }
    path = tmp_path / "t.safetensors"
    entry = write_safetensors(path, [to_write(n, t) for n, t in tensors.items()], metadata={"format": "pt"})
    loaded = load_file(path)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert entry.size_bytes == path.stat().st_size
    assert entry.blocks == [xxhash.xxh3_64_hexdigest(path.read_bytes())]
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    assert header["matrix"]["data_offsets"][0] % 4 == 0


def test_blocks_are_hashed_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    tensor, entry = write_two_blocks(path)
    data = path.read_bytes()
    parts = [data[i : i + BLOCK_BYTES] for i in range(0, len(data), BLOCK_BYTES)]
    assert len(parts) == 3
    assert entry.blocks == [xxhash.xxh3_64_hexdigest(part) for part in parts]
    assert torch.equal(load_file(path)["a"], tensor)


def test_slices_equal_the_tensor_and_read_only_their_blocks(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    tensor, entry = write_two_blocks(path)
    file = FragmentFile(path, entry)
    assert file.names == ["a"] and file.shape("a") == (tensor.numel(),) and file.dtype("a") == torch.float32
    assert file.bytes_read == BLOCK_BYTES
    assert torch.equal(file.read("a", 10, 100), tensor[10:110])
    assert file.bytes_read == BLOCK_BYTES, "the header's block was read a second time"
    last = tensor.numel() - 50
    assert torch.equal(file.read("a", last), tensor[last:])
    assert file.bytes_read == BLOCK_BYTES + entry.size_bytes - 2 * BLOCK_BYTES
    assert torch.equal(file.read("a"), tensor)
    assert file.read("a", 5, 0).shape == (0,)
    with pytest.raises(ValueError, match="lie outside a"):
        file.read("a", 5, tensor.numel())


def test_neighbouring_reads_read_each_block_once(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    tensor, entry = write_two_blocks(path)
    file = FragmentFile(path, entry)
    pieces = [file.read("a", i, min(70_001, tensor.numel() - i)) for i in range(0, tensor.numel(), 70_001)]
    assert torch.equal(torch.cat(pieces), tensor)
    assert file.bytes_read == entry.size_bytes


def test_a_flipped_byte_is_found_only_where_it_lies(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    tensor, entry = write_two_blocks(path)
    flip_byte(path, BLOCK_BYTES + 12345)
    file = FragmentFile(path, entry)
    assert torch.equal(file.read("a", 0, 1000), tensor[:1000])
    with pytest.raises(DamagedFileError, match=r"t\.safetensors is damaged: block 1 .* has the checksum \w{16}"):
        file.read("a", BLOCK_BYTES // 4, 1000)
    with pytest.raises(DamagedFileError, match="block 1"):
        file.read("a")
    with pytest.raises(DamagedFileError, match="block 1"):
        file.verify()


def test_a_file_of_another_size_or_a_missing_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    _, entry = write_two_blocks(path)
    with path.open("r+b") as file:
        file.truncate(entry.size_bytes - 1)
    with pytest.raises(DamagedFileError, match=f"has {entry.size_bytes - 1} bytes.*says {entry.size_bytes}"):
        VerifiedFile(path, entry)
    path.unlink()
    with pytest.raises(DamagedFileError, match="is missing"):
        VerifiedFile(path, entry)


def test_a_file_cut_short_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    _, entry = write_two_blocks(path)
    verified = VerifiedFile(path, entry)
    with path.open("r+b") as file:
        file.truncate(BLOCK_BYTES + 5)
    with pytest.raises(DamagedFileError, match="ends at byte"):
        verified.read(BLOCK_BYTES, 10)


def test_values_that_differ_from_the_announcement_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with pytest.raises(ValueError, match=r"w is announced as F32, but its values are torch\.float64"):
        write_safetensors(path, [TensorToWrite("w", "F32", (2,), lambda: torch.zeros(2, dtype=torch.float64))])
    with pytest.raises(ValueError, match="takes 12 bytes, but its values have 8"):
        write_safetensors(path, [TensorToWrite("w", "F32", (3,), lambda: torch.zeros(2))])
    with pytest.raises(ValueError, match="occurs twice"):
        write_safetensors(path, [to_write("w", torch.zeros(2)), to_write("w", torch.zeros(2))])


def test_writing_needs_the_memory_of_a_chunk_only(tmp_path: Path) -> None:
    """256 MiB written in 1 MiB chunks raise the peak resident memory of a fresh process by less than 32 MiB."""
    code = """
import resource, sys, torch
from pathlib import Path
from gpt.checkpoint.files import FragmentFile, TensorToWrite, write_safetensors
chunks = lambda: (torch.full((1 << 18,), float(i)) for i in range(256))
write_safetensors(Path(sys.argv[1]), [TensorToWrite("warm", "F32", (0,), lambda: torch.zeros(0))])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
entry = write_safetensors(Path(sys.argv[1]), [TensorToWrite("a", "F32", (1 << 26,), chunks)])
file = FragmentFile(Path(sys.argv[1]), entry)
for start in range(0, 1 << 26, 1 << 20):
    file.read("a", start, 1 << 20)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "big.safetensors")], cwd=root, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 32, f"{result.stdout.strip()} MiB"
