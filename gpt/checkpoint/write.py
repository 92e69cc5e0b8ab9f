"""Writing a checkpoint: each rank its own file, rank 0 the manifest, and the rename that commits.

Nothing here is a collective except through the `all_succeeded` that the caller passes: no rank waits for another one's
disk in a way that the caller does not see.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpt.checkpoint.files import DTYPE_CODES, TensorToWrite, write_safetensors
from gpt.checkpoint.format import (
    Manifest,
    OptimizerEntry,
    ParameterEntry,
    ParameterGroup,
    checkpoint_directory,
    fsync_directory,
    list_checkpoints,
    rank_file_name,
    temporary_checkpoint_directory,
    write_manifest,
)
from gpt.distributed import Ranks, ShardedState
from gpt.recipe import Checkpoint
from gpt.run_directory import RunDirectory

TEMPORARY_PATTERN = re.compile(r"\.tmp-step_\d{8,}-g\d{6,}")


@dataclass(frozen=True)
class Written:
    """What a save came to: this rank's error message or None, and on rank 0 the size of the checkpoint."""

    error: str | None
    size_bytes: int = 0


def save_checkpoint(
    run: Path,
    owner: RunDirectory | None,
    generation: int,
    state: ShardedState,
    ranks: Ranks,
    describe: Callable[[list[ParameterEntry], OptimizerEntry], dict[str, Any]],
    step: int,
    all_succeeded: Callable[[bool], bool],
) -> Written:
    """Write and commit the checkpoint of `step`.

    `owner` is rank 0's hold on the run directory (None elsewhere); `describe` gives the manifest's remaining fields.
    A failure of the file system on any rank leaves the earlier checkpoints as they are and is returned, not raised.
    """
    folder = temporary_checkpoint_directory(run, step, generation)
    error = _attempt(lambda: _make_folder(folder)) if owner is not None else None
    if all_succeeded(error is None):
        error = _attempt(lambda: _write_rank(folder, state, ranks))
        if all_succeeded(error is None):
            error = (
                _attempt(lambda: _commit(run, owner, folder, state, ranks, describe, step))
                if owner is not None
                else None
            )
            all_succeeded(error is None)
    if owner is not None and error is None:
        committed = checkpoint_directory(run, step)
        return Written(None, sum(file.stat().st_size for file in committed.iterdir()) if committed.exists() else 0)
    return Written(error)


def _attempt(action: Callable[[], None]) -> str | None:
    try:
        action()
    except OSError as error:
        return f"{error.strerror or error} ({error.filename})" if error.filename else str(error)
    return None


def _make_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_rank(folder: Path, state: ShardedState, ranks: Ranks) -> None:
    """This rank's fragments, random state and (rank 0) buffers, and a sidecar that describes the file."""
    tensors: list[TensorToWrite] = []
    ranges: list[tuple[int, int]] = []
    squares: dict[str, dict[str, float]] = {}
    for name in state.parameters:
        start, count = state.range(name)
        ranges.append((start, count))
        squares[name] = {}
        for kind in state.states_of(name):
            value = state.read(name, kind)
            squares[name][kind] = float(value.double().square().sum())
            if count:
                tensors.append(TensorToWrite(f"{kind}/{name}", DTYPE_CODES[value.dtype], (count,), value.cpu))
    tensors.append(_tensor("rng/torch_cpu", torch.get_rng_state()))
    if ranks.device.type == "cuda":
        tensors.append(_tensor("rng/torch_cuda", torch.cuda.get_rng_state(ranks.device)))
    if ranks.is_first:
        tensors += [_tensor(f"buffer/{name}", value) for name, value in state.buffers().items()]
    entry = write_safetensors(folder / rank_file_name(ranks.rank), tensors)
    sidecar = {"file": entry.model_dump(), "ranges": ranges, "squares": squares}
    with (folder / _sidecar_name(ranks.rank)).open("w", encoding="utf-8") as file:
        json.dump(sidecar, file)
        file.flush()
        os.fsync(file.fileno())


def _tensor(name: str, value: torch.Tensor) -> TensorToWrite:
    value = value.detach().cpu().contiguous()
    return TensorToWrite(name, DTYPE_CODES[value.dtype], tuple(value.shape), lambda: value)


def _sidecar_name(rank: int) -> str:
    return f"rank_{rank:05d}.json"


def _commit(
    run: Path,
    owner: RunDirectory,
    folder: Path,
    state: ShardedState,
    ranks: Ranks,
    describe: Callable[[list[ParameterEntry], OptimizerEntry], dict[str, Any]],
    step: int,
) -> None:
    sidecars = [json.loads((folder / _sidecar_name(r)).read_text(encoding="utf-8")) for r in range(ranks.world_size)]
    fields = describe(parameter_entries(state), optimizer_entry(state))
    manifest = Manifest(
        **fields,
        step=step,
        world_size=ranks.world_size,
        zero_stage=state.zero_stage,
        generation=owner.generation,
        buffers=sorted(state.buffers()),
        norms={
            name: {k: sum(sidecar["squares"][name][k] for sidecar in sidecars) ** 0.5 for k in state.states_of(name)}
            for name in state.parameters
        },
        files={rank_file_name(r): sidecar["file"] for r, sidecar in enumerate(sidecars)},
        fragments={rank_file_name(r): sidecar["ranges"] for r, sidecar in enumerate(sidecars)},
    )
    for rank in range(ranks.world_size):
        (folder / _sidecar_name(rank)).unlink()
    owner.check_ownership()
    write_manifest(folder, manifest)
    target = checkpoint_directory(run, step)
    if target.exists():  # an earlier start's checkpoint of this step that was found damaged: this one replaces it
        shutil.rmtree(target)
    folder.rename(target)
    fsync_directory(target.parent)


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


def delete_old_checkpoints(run: Path, settings: Checkpoint, newest: int, generation: int) -> list[int]:
    """Delete what the recipe does not keep, after `newest` was committed; returns the deleted steps.

    Only folders that are committed checkpoints by their anchored name are touched. Each is renamed to a temporary one
    first, so that a kill in the middle leaves no half checkpoint.
    """
    steps = [step for step in list_checkpoints(run) if step <= newest]
    kept = set(steps[-settings.keep_last :])
    if settings.keep_every_steps is not None:
        kept |= {step for step in steps if step % settings.keep_every_steps == 0}
    deleted = [step for step in steps if step not in kept]
    for step in deleted:
        doomed = temporary_checkpoint_directory(run, step, generation)
        checkpoint_directory(run, step).rename(doomed)
        shutil.rmtree(doomed)
    return deleted


def remove_leftovers(run: Path) -> list[str]:
    """Delete the temporary folders that killed starts left; returns their names."""
    folder = run / "checkpoints"
    leftovers = [p for p in folder.glob(".tmp-*") if TEMPORARY_PATTERN.fullmatch(p.name)] if folder.exists() else []
    for leftover in leftovers:
        shutil.rmtree(leftover)
    return [leftover.name for leftover in leftovers]
