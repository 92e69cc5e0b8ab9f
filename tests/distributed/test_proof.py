"""The resume proof and damaged files in a real ZeRO-3 engine: changed checkpoints with right checksums are refused, and
damaged ones passed over."""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from live_runs import Runs, environment
from safetensors.torch import load_file

from gpt.checkpoint import files
from gpt.checkpoint.files import DTYPE_CODES, TensorToWrite, write_safetensors
from gpt.checkpoint.format import BLOCK_BYTES as FORMAT_BLOCK_BYTES
from gpt.checkpoint.format import checkpoint_directory, rank_file_name, read_manifest, write_manifest

BLOCK_BYTES = 4096
"""Instead of the format's 8 MiB, so that the files of a small model have many blocks."""
WORKER = Path(__file__).with_name("proof_worker.py")
FIRST, SECOND = (f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1))
Tensors = dict[str, torch.Tensor]


def load_all(runs: Runs, names: list[str], processes: int) -> dict[str, dict[str, Any]]:
    """What comes of each run directory when an engine of the reference recipe is to go on from it."""
    out = runs.folder / f"outcomes-{processes}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, str(WORKER), "runs/reference/recipe.yaml", str(out), str(BLOCK_BYTES), *names],
        cwd=runs.folder,
        env=environment() | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, dict[str, Any]] = json.loads(out.read_text())
    return result


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, in its order, and the byte at which the tensors begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def needed_bytes(folder: Path, processes: int, rank: int) -> int:
    """Bytes of the blocks that hold what `rank` of `processes` needs: headers, its elements, its random state."""
    manifest, needed = read_manifest(folder), 0
    for file, ranges in manifest.fragments.items():
        header, begin = read_header(folder / file)
        parts = []
        for entry, (start, count) in zip(manifest.parameters, ranges, strict=True):
            size = -(-entry.elements // processes)
            first, end = max(start, rank * size), min(start + count, (rank + 1) * size)
            for state in manifest.states_of(entry) if first < end else ():
                offset = begin + header[f"{state}/{entry.name}"]["data_offsets"][0]
                parts.append((offset + 4 * (first - start), offset + 4 * (end - start)))
        if file == rank_file_name(rank) and processes == manifest.world_size:
            parts.append(tuple(begin + offset for offset in header["rng/torch_cpu"]["data_offsets"]))
        parts += [(0, begin)] if parts else []
        blocks = {block for low, high in parts for block in range(low // BLOCK_BYTES, -(-high // BLOCK_BYTES))}
        needed += sum(min(BLOCK_BYTES, manifest.files[file].size_bytes - block * BLOCK_BYTES) for block in blocks)
    return needed


def rewrite(folder: Path, change: Callable[[Tensors], None] | None = None, **fields: Any) -> None:
    """Write a checkpoint's files anew, with the tensors of each changed and with right checksums."""
    manifest = read_manifest(folder)
    entries = {}
    for name in manifest.files:
        tensors = {key: value.clone() for key, value in load_file(folder / name).items()}  # not a map of the file
        if change is not None:
            change(tensors)
        writes = [
            TensorToWrite(key, DTYPE_CODES[value.dtype], tuple(value.shape), lambda value=value: value)  # type: ignore[misc]
            for key, value in ((key, tensors[key]) for key in read_header(folder / name)[0] if key in tensors)
        ]
        entries[name] = write_safetensors(folder / name, writes)
    write_manifest(folder, manifest.model_copy(update={"files": entries} | fields))


def scale_weight(tensors: Tensors) -> None:
    tensors[f"fp32/{FIRST}"].mul_(1.01)


def swap(tensors: Tensors) -> None:
    for state in ("fp32", "exp_avg", "exp_avg_sq"):
        first, second = f"{state}/{FIRST}", f"{state}/{SECOND}"
        tensors[first], tensors[second] = tensors[second], tensors[first]


def zero_moment(tensors: Tensors) -> None:
    tensors[f"exp_avg/{FIRST}"].zero_()


@pytest.fixture(scope="module")
def small_blocks(reference: Runs) -> Iterator[Runs]:
    """The run `small-blocks`: the reference run with checkpoints of steps 10 and 20 in blocks of BLOCK_BYTES."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BLOCK_BYTES", BLOCK_BYTES)
        reference.copy("reference", "small-blocks")
        for step in (10, 20):
            rewrite(checkpoint_directory(reference.directory("small-blocks"), step))
        yield reference


@pytest.fixture(scope="module")
def mutations(small_blocks: Runs) -> dict[str, str]:
    """Copies of the run with its checkpoint of step 10 changed -> what the refusal must say."""
    runs, expected = small_blocks, dict[str, str]()

    def mutate(name: str, said: str, change: Callable[[Tensors], None] | None = None, **fields: Any) -> Path:
        runs.copy("small-blocks", name)
        run = runs.directory(name)
        checkpoint_directory(run, 20).rename(run / "set-aside")
        rewrite(checkpoint_directory(run, 10), change, **fields)
        expected[name] = said
        return checkpoint_directory(run, 10)

    manifest = read_manifest(checkpoint_directory(runs.directory("small-blocks"), 10))
    swapped_norms = manifest.norms | {FIRST: manifest.norms[SECOND], SECOND: manifest.norms[FIRST]}
    mutate("scaled", f"the norm of fp32/{FIRST} is", scale_weight)
    mutate("swapped", f"the norm of fp32/{FIRST} is", swap)
    mutate("swapped-with-norms", "logits within", swap, norms=swapped_norms)
    mutate("zeroed", f"the norm of exp_avg/{FIRST} is 0 in the engine", zero_moment)
    mutate("step-in-manifest", "the folder is step_00000010, the manifest's step 11", step=11)
    mutate("step", "optimizer group 0 has had 10 updates, but of 11 steps 0 were skipped", step=11).rename(
        checkpoint_directory(runs.directory("step"), 11)
    )
    # everything that an editor can count on: only the schedule and the data show that these are the weights of step 10
    groups = [
        group.model_copy(update={"scalars": group.scalars | {"step": 11.0}}) for group in manifest.optimizer.groups
    ]
    later = {"step": 11, "tokens": 11 * 512, "samples_consumed": 11 * 8}
    optimizer = manifest.optimizer.model_copy(update={"groups": groups})
    mutate("step-everywhere", "the learning rate is", optimizer=optimizer, **later).rename(
        checkpoint_directory(runs.directory("step-everywhere"), 11)
    )
    mutate("position", "the checkpoint is at sample 81, but step 10 at 80", samples_consumed=81)
    mutate("other-loss", "loss", probe=manifest.probe.model_copy(update={"loss": 3.0}))  # type: ignore[union-attr]
    return expected


@pytest.fixture(scope="module")
def damages(small_blocks: Runs) -> dict[str, str]:
    """Copies of the run with a damaged checkpoint of step 20 -> what the warning must name."""
    runs, expected = small_blocks, dict[str, str]()

    def copy(name: str, said: str) -> Path:
        runs.copy("small-blocks", name)
        expected[name] = said
        return checkpoint_directory(runs.directory(name), 20)

    generator = random.Random(0)
    for file in ("rank_00000.safetensors", "rank_00001.safetensors", "manifest.json"):
        for place in ("begin", "middle"):
            folder = copy(f"flip-{file}-{place}", file)
            content = bytearray((folder / file).read_bytes())
            content[generator.randrange(8) if place == "begin" else generator.randrange(len(content))] ^= 1
            (folder / file).write_bytes(content)
    path = copy("cut", "rank_00001.safetensors") / "rank_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    path = copy("longer", "rank_00000.safetensors") / "rank_00000.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    (copy("missing", "rank_00001.safetensors") / "rank_00001.safetensors").unlink()
    (copy("empty-manifest", "manifest.json") / "manifest.json").write_bytes(b"")
    (copy("no-manifest", "manifest.json") / "manifest.json").unlink()
    (copy("sidecar-left", "") / "rank_00001.json").write_text("{")
    return expected


@pytest.mark.parametrize("processes", [2, *(pytest.param(count, marks=pytest.mark.full) for count in (1, 3))])
def test_every_loading_is_proved(
    small_blocks: Runs, mutations: dict[str, str], damages: dict[str, str], processes: int
) -> None:
    """Checkpoints that were written by 2 ranks, each loaded as a start of `processes` ranks would, in one engine."""
    runs, lost = small_blocks, "all-damaged"
    if not runs.directory(lost).exists():
        runs.copy("small-blocks", lost)
        for step in (10, 20):
            (checkpoint_directory(runs.directory(lost), step) / "rank_00001.safetensors").unlink()
    found = load_all(runs, ["small-blocks", *mutations, *damages, lost], processes)

    assert found["small-blocks"]["step"] == 20 and found["small-blocks"]["warnings"] == ""
    for name, said in mutations.items():
        error = found[name]["error"]
        assert "resume proof of " in error and ": FAIL: " in error and said in error, f"{name}: {found[name]}"
    for name, file in damages.items():
        assert found[name]["step"] == (10 if file else 20), f"{name}: {found[name]}"
        if file:
            assert "step 20 is passed over" in found[name]["warnings"] and file in found[name]["warnings"]
    assert "can be loaded (steps [10, 20]" in found[lost]["error"]

    folder = checkpoint_directory(runs.directory("small-blocks"), 20)
    for rank, count in enumerate(found["small-blocks"]["bytes_read"]):
        assert count == needed_bytes(folder, processes, rank), f"rank {rank}"


@pytest.mark.full
def test_a_start_on_a_changed_checkpoint_ends_with_one_sentence(
    reference: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command line: of the run itself, and of another one that would go on from its weights."""
    monkeypatch.setattr(files, "BLOCK_BYTES", FORMAT_BLOCK_BYTES)  # small_blocks, of the whole module, may be in force
    reference.copy("reference", "changed")
    folder = checkpoint_directory(reference.directory("changed"), 20)
    rewrite(folder, scale_weight)
    before = (reference.directory("changed") / "metrics.jsonl").read_bytes()
    pretrained = {"model": {"pretrained": str(reference.directory("changed"))}}
    for name, changes in (("changed", {}), ("from-changed", pretrained)):
        done = reference.train(name, check=False, **changes)
        assert done.returncode == 1
        assert f"resume proof of {folder}: FAIL: the norm of fp32/{FIRST} is" in "".join(done.stderr.splitlines())
    assert (reference.directory("changed") / "metrics.jsonl").read_bytes() == before
    reference.copy("reference", "unchanged")
    done = reference.train("from-unchanged", model={"pretrained": str(reference.directory("unchanged"))})
    assert "resume proof: logits within 0 " in done.stdout and ": PASS" in done.stdout
