"""Which checkpoints are kept."""

import shutil
from pathlib import Path

from gpt.checkpoint.format import checkpoint_directory, list_checkpoints, temporary_checkpoint_directory
from gpt.recipe import Checkpoint


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
