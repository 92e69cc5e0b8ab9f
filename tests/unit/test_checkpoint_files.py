"""Files of `checkpoint/1`: the safetensors writer against the library, and refusal of every damaged byte."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file
from small_checkpoint import change_manifest, forward, in_dtype, make_model, write_checkpoint

from gpt.checkpoint.direct import BLOCKS_ON_THE_WAY
from gpt.checkpoint.files import (
    DTYPE_CODES,
    FragmentFile,
    TensorToWrite,
    VerifiedFile,
    write_safetensors,
)
from gpt.checkpoint.format import (
    BLOCK_BYTES,
    DamagedFileError,
    FileEntry,
    checkpoint_directory,
    list_checkpoints,
    read_manifest,
    temporary_checkpoint_directory,
    write_manifest,
)
from gpt.checkpoint.read import CheckpointReader, load_plain_model, newest_checkpoint


def to_write(name: str, tensor: torch.Tensor, chunk: int | None = None) -> TensorToWrite:
    read = (lambda: tensor) if chunk is None else (lambda: tensor.reshape(-1).split(chunk))
    return TensorToWrite(name, DTYPE_CODES[tensor.dtype], tuple(tensor.shape), read)


def write_two_blocks(path: Path) -> tuple[torch.Tensor, FileEntry]:
    """A file of a little over two blocks that holds one fp32 tensor `a`."""
    tensor = torch.randn(2 * BLOCK_BYTES // 4 + 1000)
    return tensor, write_safetensors(path, [to_write("a", tensor, 300_001)])


@pytest.mark.parametrize("knows_direct", [True, False])
def test_a_file_around_the_cache_is_the_same_and_has_the_same_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, knows_direct: bool
) -> None:
    blocks = BLOCKS_ON_THE_WAY + 3  # so that memory is filled a second time
    tensors = {"a": torch.randn(blocks * BLOCK_BYTES // 4 + 1000), "b": torch.randn(5, 3), "empty": torch.zeros(0)}
    entries = [to_write(name, tensor, 300_001) for name, tensor in tensors.items()]
    alone = write_safetensors(tmp_path / "alone", entries)
    opened, how = os.open, []

    def open_as_the_file_system_can(path: Path, flags: int, mode: int = 0o777) -> int:
        how.append(bool(flags & os.O_DIRECT))
        if flags & os.O_DIRECT and not knows_direct:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opened(path, flags, mode)

    monkeypatch.setattr("gpt.checkpoint.direct.os.open", open_as_the_file_system_can)
    assert write_safetensors(tmp_path / "beside", entries, direct=True) == alone
    assert how == ([True] if knows_direct else [True, False])
    assert (tmp_path / "beside").read_bytes() == (tmp_path / "alone").read_bytes()
    with pytest.raises(OSError, match="No space left on device"):
        write_safetensors(Path("/dev/full"), entries, direct=True)
    with pytest.raises(ValueError, match="takes 4 bytes, but its values have 8"):
        short = TensorToWrite("a", "F32", (1,), lambda: [torch.zeros(1), torch.zeros(1)])
        write_safetensors(tmp_path / "wrong", [short], direct=True)


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
        VerifiedFile(path, entry).verify()


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


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_range_is_the_same_whatever_the_number_of_ranks(tmp_path: Path, ranks: int) -> None:
    model = make_model()
    reader = CheckpointReader(write_checkpoint(tmp_path / "run", model, ranks=ranks))
    reader.verify()
    for name, parameter in model.named_parameters():
        assert torch.equal(reader.read_tensor(name), parameter), name
        assert torch.equal(reader.read_tensor(name, "exp_avg_sq"), parameter * 0.0001), name
        flat, third = parameter.reshape(-1), parameter.numel() // 3
        assert torch.equal(reader.read_range("exp_avg", name, third, third + 1), flat[third : 2 * third + 1] * 0.01)
    assert torch.equal(reader.read_tensor(name, dtype=torch.bfloat16), parameter.to(torch.bfloat16))
    assert reader.read_rng(ranks - 1).dtype == torch.uint8
    with pytest.raises(ValueError, match=f"states of {ranks} ranks, not of rank {ranks}"):
        reader.read_rng(ranks)
    with pytest.raises(ValueError, match="holds no parameter nothing"):
        reader.read_tensor("nothing")
    with pytest.raises(DamagedFileError, match="holds no tensor exp_avg_cubed/"):
        reader.read_tensor(name, "exp_avg_cubed")


def test_frozen_parameters_are_read_in_the_training_dtype_and_have_no_moments(tmp_path: Path) -> None:
    model = make_model(tie_word_embeddings=True)
    model.model.embed_tokens.requires_grad_(False)
    reader = CheckpointReader(write_checkpoint(tmp_path / "run", model, ranks=3))
    name, frozen = "model.embed_tokens.weight", model.model.embed_tokens.weight
    entry = reader.manifest.parameters[reader.index(name)]
    assert (entry.weights, reader.manifest.states_of(entry)) == ("frozen", ["frozen"])
    assert torch.equal(reader.read_tensor(name), frozen.bfloat16().float())
    assert torch.equal(load_plain_model(tmp_path / "run").lm_head.weight, frozen.bfloat16())
    with pytest.raises(DamagedFileError, match=f"holds no tensor exp_avg/{name}"):
        reader.read_tensor(name, "exp_avg")


def test_a_parameter_smaller_than_the_world_is_read(tmp_path: Path) -> None:
    model = make_model()
    model.register_parameter("gate", torch.nn.Parameter(torch.tensor([4.5])))
    reader = CheckpointReader(write_checkpoint(tmp_path / "run", model, ranks=3, probe=False))
    assert reader.read_tensor("gate").item() == 4.5


def test_the_manifest_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "run", make_model(), ranks=3)
    manifest = read_manifest(directory)
    assert manifest.step == 10 and manifest.world_size == 3 and manifest.version == "checkpoint/1"
    write_manifest(directory, manifest)
    assert read_manifest(directory) == manifest
    assert json.loads((directory / "manifest.json").read_text())["model_config"]["model_type"] == "llama"
    assert [path.name for path in directory.glob(".*")] == []


def test_a_changed_manifest_is_refused(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "run", make_model())
    path = directory / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace('"step": 10', '"step": 11', 1))
    with pytest.raises(DamagedFileError, match=r"manifest\.json is damaged: its content has the checksum"):
        read_manifest(directory)
    path.write_text(text[:100])
    with pytest.raises(DamagedFileError, match="not a checkpoint manifest"):
        read_manifest(directory)
    path.write_text(text.replace("checkpoint/1", "checkpoint/2"))
    with pytest.raises(DamagedFileError, match="its content has the checksum"):
        read_manifest(directory)
    for same_meaning in (text.replace(": ", ":", 1), text.rstrip(), text.replace("1e-08", "1E-08")):
        assert same_meaning != text
        path.write_text(same_meaning)
        with pytest.raises(DamagedFileError, match="other bytes than were written"):
            read_manifest(directory)
    path.write_text("")
    with pytest.raises(DamagedFileError, match="not a checkpoint manifest"):
        read_manifest(directory)
    path.write_text(text)
    write_manifest(directory, read_manifest(directory).model_copy(update={"version": "checkpoint/2"}))
    with pytest.raises(ValueError, match="has the format 'checkpoint/2', and this version of Trainyard reads"):
        read_manifest(directory)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="is not a checkpoint"):
        read_manifest(directory)


def test_fragments_with_a_gap_are_refused(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "run", make_model(), ranks=2)
    fragments = read_manifest(directory).model_dump()["fragments"]
    fragments["rank_00001.safetensors"][0] = (0, 0)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight: element 4160 of 8320 is in no file"):
        change_manifest(directory, fragments=fragments)


def test_only_committed_checkpoints_are_listed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert list_checkpoints(run) == []
    for step in (20, 100_000_000, 3):
        write_checkpoint(run, make_model(), step=step, probe=False)
    temporary_checkpoint_directory(run, 30, 3).mkdir()
    (checkpoint_directory(run, 40)).mkdir()
    (run / "checkpoints" / "step_00000050.old").mkdir()
    (run / "checkpoints" / "step_00000050.old" / "manifest.json").touch()
    assert list_checkpoints(run) == [3, 20, 100_000_000]


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    run, model, lines = tmp_path / "run", make_model(), []
    for step in (1, 2, 3, 4):
        write_checkpoint(run, model, step=step, probe=False)
    newest = newest_checkpoint(run, report=lines.append)
    assert newest is not None and newest.manifest.step == 4 and lines == []
    cut = checkpoint_directory(run, 4) / "rank_00001.safetensors"
    with cut.open("r+b") as file:
        file.truncate(100)
    (checkpoint_directory(run, 3) / "manifest.json").write_text("{")
    newest = newest_checkpoint(run, report=lines.append)
    assert newest is not None and newest.manifest.step == 2
    assert len(lines) == 2 and "step 4 is passed over" in lines[0] and "rank_00001.safetensors has 100" in lines[0]
    assert "step 3 is passed over" in lines[1]
    before = newest_checkpoint(run, report=lines.append, before_step=2)
    assert before is not None and before.manifest.step == 1
    assert newest_checkpoint(run, report=lines.append, before_step=1) is None


def test_verify_names_the_first_damaged_file(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "run", make_model(), ranks=3)
    flip_byte(directory / "rank_00001.safetensors", 5000)
    with pytest.raises(DamagedFileError, match=r"rank_00001\.safetensors is damaged: block 0"):
        CheckpointReader(directory).verify()


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_plain_model_gives_the_live_logits(tmp_path: Path, model_type: str) -> None:
    model = make_model(model_type, tie_word_embeddings=True)
    write_checkpoint(tmp_path / "run", model, precision="fp32")
    loaded = load_plain_model(tmp_path / "run")
    assert not loaded.training and loaded.dtype == torch.float32
    ids = list(range(30))
    assert torch.equal(forward(loaded, ids, ids), forward(model, ids, ids))
    half = load_plain_model(tmp_path / "run", torch.bfloat16)
    assert torch.equal(forward(half, ids, ids), forward(in_dtype(model, torch.bfloat16), ids, ids))


def test_parameters_that_are_not_the_configurations_are_refused(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "run", make_model())
    config = read_manifest(directory).model_config_dict
    change_manifest(directory, model_config=config | {"intermediate_size": 48})
    with pytest.raises(ValueError, match=r"LlamaForCausalLM: .*down_proj\.weight \(32, 64\) and \(32, 48\)"):
        load_plain_model(tmp_path / "run")
    change_manifest(directory, model_config=config | {"model_type": "perceptron"})
    with pytest.raises(ValueError, match=r"model type 'perceptron' .* is unknown"):
        load_plain_model(tmp_path / "run")
