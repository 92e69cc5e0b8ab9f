"""Which checkpoints are kept, and in which form.

Only folders that are committed checkpoints by their anchored name are touched, and never the newest.
"""

import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch

from gpt.checkpoint.files import DTYPE_CODES, FragmentFile, TensorToWrite, write_safetensors
from gpt.checkpoint.format import (
    DamagedFileError,
    Manifest,
    checkpoint_directory,
    list_checkpoints,
    read_manifest,
    temporary_checkpoint_directory,
    write_manifest,
)
from gpt.early_stopping import checkpoint_costs
from gpt.recipe import Checkpoint

BYTES_PER_ELEMENT, WEIGHTS_BYTES_PER_ELEMENT = 12, 4
"""fp32 weights and AdamW's two moments; the weights alone."""
RANK_FILE_PATTERN = re.compile(r"rank_\d{5,}(\.weights)?\.safetensors")
CHUNK_ELEMENTS = 2**20


def apply_retention(
    run: Path, settings: Checkpoint, newest: int, generation: int, check_ownership: Callable[[], None], metric: str
) -> Iterator[tuple[str, int]]:
    """After `newest` was committed: delete and reduce what the recipe says, giving each deed's ("checkpoint deleted" or
    "checkpoint reduced to weights", step) when it is done. What `check_ownership` raises before a deed, it is not done.
    The best are those by `metric` (evaluate.metric).

    A kill at any point leaves whole checkpoints only: a doomed one gets a temporary name first.
    """
    steps = [step for step in list_checkpoints(run) if step <= newest]
    kept = kept_steps(settings, checkpoint_costs(run, steps, metric) if settings.keep_best else dict.fromkeys(steps))
    for step in steps:
        if step not in kept:
            check_ownership()
            yield _delete(run, step, generation)
    if settings.weights_only_after is not None:
        for step in sorted(kept)[: -settings.weights_only_after]:
            check_ownership()
            try:
                if reduce_to_weights(checkpoint_directory(run, step)):
                    yield "checkpoint reduced to weights", step
            except DamagedFileError:
                yield "checkpoint found damaged", step  # left as it is
    if settings.budget_bytes is not None:
        sizes = {step: _size(checkpoint_directory(run, step)) for step in sorted(kept)}
        for step in sorted(kept - {newest}):
            if sum(sizes.values()) + sizes[newest] > settings.budget_bytes:  # the next save needs room, too
                check_ownership()
                yield _delete(run, step, generation)
                del sizes[step]


def kept_steps(settings: Checkpoint, costs: Mapping[int, float | None]) -> set[int]:
    """Of the steps with their costs (less is better; None: not evaluated there), those that the recipe keeps."""
    steps = sorted(costs)
    kept = set(steps[-settings.keep_last :])
    if settings.keep_every_steps is not None:
        kept |= {step for step in steps if step % settings.keep_every_steps == 0}
    if settings.keep_best is not None:
        rated = sorted((cost, step) for step, cost in costs.items() if cost is not None)
        kept |= {step for _, step in rated[: settings.keep_best]}
    return kept


def planned_checkpoints(settings: Checkpoint, total_steps: int) -> tuple[int, int]:
    """How many there will be at most: (whole ones, with the one that is being written; those of weights only)."""
    every = settings.every_steps or total_steps
    forever = total_steps // math.lcm(every, settings.keep_every_steps) if settings.keep_every_steps else 0
    kept = min(settings.keep_last + (settings.keep_best or 0) + forever, -(-total_steps // every))
    whole = min(kept, settings.weights_only_after or kept)
    return whole + 1, kept - whole


def check_budget(settings: Checkpoint, run: Path, parameters: int, total_steps: int) -> None:
    """Before a run: does what it will keep, and the checkpoint that is being written, fit `budget_bytes` and the disk?

    Raises:
        ValueError: it does not; the sentence has the sum.
    """
    if settings.budget_bytes is None:
        return
    whole, reduced = planned_checkpoints(settings, total_steps)
    needed = parameters * (BYTES_PER_ELEMENT * whole + WEIGHTS_BYTES_PER_ELEMENT * reduced)
    there = sum(_size(checkpoint_directory(run, step)) for step in list_checkpoints(run))
    folder = next(parent for parent in (run, *run.absolute().parents) if parent.exists())
    room = min(settings.budget_bytes, there + shutil.disk_usage(folder).free)
    if needed > room:
        what = "checkpoint.budget_bytes is" if room == settings.budget_bytes else "with the disk's free space there are"
        raise ValueError(
            f"checkpoints of {parameters:,} parameters will take up to {needed:,} bytes ({whole} whole ones, the one "
            f"being written among them, and {reduced} of weights only), but {what} {room:,}: keep fewer, make "
            f"room or raise the budget"
        )


def reduce_to_weights(directory: Path) -> bool:
    """Rewrite a checkpoint without moments and random states, verified on the way; whether there was anything to do.

    The new files get names of their own, so that the manifest's replacement is what changes it, at once.
    """
    manifest = read_manifest(directory)
    done = manifest.weights_only
    if not done:
        manifest = _write_weights(directory, manifest)
        write_manifest(directory, manifest)
    for path in directory.iterdir():  # also what a kill left here
        if RANK_FILE_PATTERN.fullmatch(path.name) and path.name not in manifest.files:
            path.unlink()
    return not done


def _write_weights(directory: Path, manifest: Manifest) -> Manifest:
    dropped = ("rng", *(state for state in manifest.optimizer.states if state != "fp32"))
    files, fragments = {}, {}
    for name, entry in manifest.files.items():
        source = FragmentFile(directory / name, entry)
        names = [tensor for tensor in source.names if tensor.partition("/")[0] not in dropped]
        new_name = name.replace(".safetensors", ".weights.safetensors")
        tensors = [
            TensorToWrite(n, DTYPE_CODES[source.dtype(n)], source.shape(n), partial(_chunks, source, n)) for n in names
        ]
        files[new_name] = write_safetensors(directory / new_name, tensors)
        fragments[new_name] = manifest.fragments[name]
    return manifest.model_copy(
        update={
            "weights_only": True,
            "files": files,
            "fragments": fragments,
            "optimizer": manifest.optimizer.model_copy(update={"states": ["fp32"]}),
            "norms": {
                entry.name: {entry.weights: manifest.norms[entry.name][entry.weights]} for entry in manifest.parameters
            },
        }
    )


def _chunks(source: FragmentFile, name: str) -> Iterator[torch.Tensor]:
    elements = math.prod(source.shape(name))
    for start in range(0, elements, CHUNK_ELEMENTS):
        yield source.read(name, start, min(CHUNK_ELEMENTS, elements - start))


def _delete(run: Path, step: int, generation: int) -> tuple[str, int]:
    doomed = temporary_checkpoint_directory(run, step, generation)
    checkpoint_directory(run, step).rename(doomed)
    shutil.rmtree(doomed)
    return "checkpoint deleted", step


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir())
