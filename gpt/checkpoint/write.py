"""Writing a checkpoint: each rank its own file from a copy in host memory, rank 0 the manifest and the commit.

Nothing here is a collective: rank 0 sees in the folder that the others are done, by the sidecar that each leaves last.
"""

import errno
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpt.checkpoint.files import DTYPE_CODES, TensorToWrite, sum_of_squares, write_safetensors
from gpt.checkpoint.format import (
    Manifest,
    OptimizerEntry,
    ParameterEntry,
    ParameterGroup,
    checkpoint_directory,
    fsync_directory,
    rank_file_name,
    write_manifest,
)
from gpt.distributed import ShardedState

TEMPORARY_PATTERN = re.compile(r"\.tmp-step_\d{8,}-g(\d{6,})(-replaced)?")
POLL_SECONDS = 0.05


class RankError(OSError):
    """A rank's part of a checkpoint could not be written; `errno` says why."""

    def __init__(self, rank: int, code: int) -> None:
        super().__init__(code, os.strerror(code))
        self.rank = rank


class HostBuffers:
    """Copies of tensors in host memory that is used again by the next save: the first touch of its pages is slow."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def copy(self, sources: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors' values as they are now; valid until the next call.

        On CUDA the copies are in the order of the thread's current stream, which is the engine's.
        """
        for name, source in sources.items():
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
                self._buffers[name] = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            self._buffers[name].copy_(source)
        return {name: self._buffers[name] for name in sources}


def fragments(state: ShardedState) -> dict[str, torch.Tensor]:
    """This rank's elements of every parameter and state, as "state/parameter": views, where ZeRO keeps them so."""
    return {f"{kind}/{name}": state.read(name, kind) for name in state.parameters for kind in state.states_of(name)}


def reserved(state: ShardedState, kinds: list[str]) -> dict[str, torch.Tensor]:
    """Tensors of the names and sizes that `fragments` gives once the optimizer has all its states, `kinds`."""
    now = fragments(state)
    trained = [name for name in state.parameters if f"fp32/{name}" in now]
    return now | {f"{kind}/{name}": state.read(name, "fp32") for name in trained for kind in kinds}


def small_tensors(state: ShardedState, rank: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Copies of what changes between optimizer updates: this rank's random state and, of rank 0, the buffers."""
    tensors = {"rng/torch_cpu": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["rng/torch_cuda"] = torch.cuda.get_rng_state(device)
    if rank == 0:
        tensors |= {f"buffer/{name}": value.detach().cpu().clone() for name, value in state.buffers().items()}
    return tensors


def write_rank(
    folder: Path,
    rank: int,
    save: int,
    tensors: Mapping[str, torch.Tensor],
    ranges: list[tuple[int, int]],
    cancelled: Callable[[], bool],
) -> None:
    """Write a rank's file durably, then the sidecar that describes it, which makes this rank's part complete.

    `save` is the number of the save in this start, the same on all ranks; `ranges` is as in the manifest.
    """

    def read(name: str) -> torch.Tensor:
        if cancelled():
            raise RankError(rank, errno.ECANCELED)
        return tensors[name]

    folder.mkdir(exist_ok=True)  # not its parents: where the file system has gone there must be an error
    entry = write_safetensors(
        folder / rank_file_name(rank),
        [
            TensorToWrite(name, DTYPE_CODES[value.dtype], tuple(value.shape), partial(read, name))
            for name, value in tensors.items()
            if value.numel()
        ],
    )
    norms = {name: math.sqrt(sum_of_squares(value)) for name, value in tensors.items() if _is_fragment(name)}
    _write_sidecar(folder, rank, {"save": save, "file": entry.model_dump(), "ranges": ranges, "norms": norms})


def give_up_rank(folder: Path, rank: int, save: int, code: int) -> None:
    """Make room, and tell rank 0 by a sidecar, where that much can still be written, that this rank has failed."""
    if folder.exists():
        (folder / rank_file_name(rank)).unlink(missing_ok=True)
        _write_sidecar(folder, rank, {"save": save, "error": code})


def _is_fragment(name: str) -> bool:
    return name.partition("/")[0] not in ("rng", "buffer")


def _write_sidecar(folder: Path, rank: int, content: dict[str, Any]) -> None:
    path = folder / _sidecar_name(rank)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    fsync_directory(folder)


def _sidecar_name(rank: int) -> str:
    return f"rank_{rank:05d}.json"


def collect(
    folder: Path, world_size: int, save: int, deadline_seconds: float, cancelled: Callable[[], bool]
) -> list[dict[str, Any]]:
    """Every rank's sidecar of this save, awaited for at most `deadline_seconds`.

    Raises RankError for a rank that failed or was too slow.
    """
    found: list[dict[str, Any]] = []
    end = time.monotonic() + deadline_seconds
    while len(found) < world_size:
        rank = len(found)
        try:
            sidecar = json.loads((folder / _sidecar_name(rank)).read_text(encoding="utf-8"))
        except FileNotFoundError:
            sidecar = {"save": None}
        if sidecar["save"] == save:
            if "error" in sidecar:
                raise RankError(rank, sidecar["error"])
            found.append(sidecar)
        elif cancelled():
            raise RankError(rank, errno.ECANCELED)
        elif time.monotonic() > end:
            raise RankError(rank, errno.ETIMEDOUT)
        else:
            time.sleep(POLL_SECONDS)
    return found


def commit(
    run: Path, folder: Path, fields: dict[str, Any], sidecars: list[dict[str, Any]], check_ownership: Callable[[], None]
) -> int:
    """Turn the folder into the checkpoint of `fields["step"]`; returns its size in bytes.

    `fields` are the manifest's that the sidecars do not hold. A checkpoint of this step that is there, found damaged or
    rolled back, becomes a leftover. What `check_ownership` raises, nothing is changed.
    """
    norms: dict[str, dict[str, float]] = {entry.name: {} for entry in fields["parameters"]}
    for fragment in sidecars[0]["norms"]:
        kind, _, name = fragment.partition("/")
        norms[name][kind] = sum(sidecar["norms"][fragment] ** 2 for sidecar in sidecars) ** 0.5
    manifest = Manifest(
        **fields,
        norms=norms,
        files={rank_file_name(r): sidecar["file"] for r, sidecar in enumerate(sidecars)},
        fragments={rank_file_name(r): sidecar["ranges"] for r, sidecar in enumerate(sidecars)},
    )
    for rank in range(len(sidecars)):
        (folder / _sidecar_name(rank)).unlink()
    write_manifest(folder, manifest)
    size = sum(file.stat().st_size for file in folder.iterdir())
    target, replaced = checkpoint_directory(run, manifest.step), folder.with_name(f"{folder.name}-replaced")
    check_ownership()
    if target.exists():
        target.rename(replaced)
    folder.rename(target)
    try:
        check_ownership()  # again: between the two this process may have been stopped for long
    except BaseException:
        target.rename(folder)
        if replaced.exists():
            replaced.rename(target)
        raise
    fsync_directory(target.parent)
    return size


def parameter_entries(state: ShardedState) -> list[ParameterEntry]:
    """The manifest's list of parameters."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    return [
        ParameterEntry(name=name, shape=state.shape(name), dtype=names[parameter.dtype], group=state.group(name))  # type: ignore[arg-type]
        for name, parameter in state.parameters.items()
    ]


def optimizer_entry(state: ShardedState) -> OptimizerEntry:
    """The manifest's optimizer: every trained parameter has the same states."""
    groups = [
        ParameterGroup(settings=settings, scalars=scalars)
        for settings, scalars in zip(state.groups(), state.scalars(), strict=True)
    ]
    states = next(state.states_of(name) for name in state.parameters if state.group(name) is not None)
    return OptimizerEntry(type=state.optimizer_type(), states=states, groups=groups, loss_scaler=state.loss_scaler())


def remove_leftovers(run: Path, generation: int | None = None) -> None:
    """Delete the temporary folders that killed starts and failed saves left, of one start or of all."""
    folder = run / "checkpoints"
    matches = [(path, TEMPORARY_PATTERN.fullmatch(path.name)) for path in folder.glob(".tmp-*")]
    for path, match in matches:
        if match and generation in (None, int(match.group(1))):
            shutil.rmtree(path)
