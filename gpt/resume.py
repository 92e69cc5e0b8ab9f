"""Where a run's weights come from when it starts."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt import distributed
from gpt.checkpoint.format import DamagedFileError, Manifest, list_step_folders
from gpt.checkpoint.load import load_into_engine, restore_random_state
from gpt.checkpoint.read import CheckpointReader, newest_checkpoint
from gpt.distributed import Ranks, ShardedState
from gpt.model import is_run_directory
from gpt.proof import prove
from gpt.run_directory import RunDirectory, json_lines

if TYPE_CHECKING:
    from gpt.train import RunPlan


def resume(
    plan: "RunPlan", engine: Any, state: ShardedState, ranks: Ranks, owner: RunDirectory | None
) -> Manifest | None:
    """Load the run's newest good checkpoint, whose manifest is returned, or the weights of another run to begin with.

    Raises:
        ValueError: the data is not the checkpoint's, nothing that was written can be loaded, or the resume proof fails.
    """
    recipe, started = plan.recipe, time.perf_counter()
    newest = load_newest(plan, engine, state, ranks)
    if newest is None:
        if owner is not None and owner.events("continue"):
            owner.write_event("resume", step=0, **work_lost(owner, 0))
            print("no checkpoint was committed yet: the run begins again", flush=True)
        if recipe.model.pretrained is None or not is_run_directory(recipe.model.pretrained):
            return None
        source = Path(recipe.model.pretrained)
        loaded = _load_newest(source, state, ranks, weights_only=True)
        if loaded is None:
            raise ValueError(f"model.pretrained {source} has no checkpoint that can be loaded")
        line = prove(loaded, plan, engine, state, ranks, weights_only=True)
        if owner is not None:
            owner.write_event("weights loaded", source=str(source), step=loaded.manifest.step, proof=line)
            print(f"weights of {source}, step {loaded.manifest.step}. {line}", flush=True)
        return None
    (manifest, line), seconds = newest, time.perf_counter() - started
    if owner is not None:
        owner.write_event(
            "resume",
            step=manifest.step,
            **work_lost(owner, manifest.step),
            from_world_size=manifest.world_size,
            load_seconds=seconds,
            proof=line,
        )
        print(f"resumed at step {manifest.step}, written by {manifest.world_size} ranks. {line}", flush=True)
    return manifest


def work_lost(owner: RunDirectory, step: int) -> dict[str, float]:
    """What a resume at `step` has to do again: the steps that metrics.jsonl holds beyond it, and the seconds that the
    last start spent on them, from the save of `step`, or from its own beginning, to its last sign of life."""
    metrics = owner.path / "metrics.jsonl"
    events = owner.events("start", "resume", "continue", "checkpoint begun")
    begun = max(i for i, event in enumerate(events) if event["event"] in ("start", "resume"))
    # a start that died between its resume and its first step has already said what was lost
    new = metrics.exists() and metrics.stat().st_mtime > events[begun]["time"]
    steps = sum(1 for record in json_lines(metrics) if record["step"] > step) if new else 0
    ended = next((e["last_seen"] for e in events[begun:] if e["event"] == "continue"), None)
    saved = [e["time"] for e in events[begun:] if e["event"] == "checkpoint begun" and e["step"] == step]
    lost = ended - max([events[begun]["time"], *saved]) if steps and ended else 0.0
    return {"steps_lost": steps, "seconds_lost": max(0.0, lost)}


def load_newest(plan: "RunPlan", engine: Any, state: ShardedState, ranks: Ranks) -> tuple[Manifest, str] | None:
    """Put the engine, at the start or in the middle of a run, into the state of the run's newest good checkpoint.

    Returns the checkpoint's manifest and the line of its proof, None where there is no checkpoint. Raises as `resume`.
    """
    recipe = plan.recipe
    loaded = _load_newest(recipe.run_directory(), state, ranks, weights_only=False)
    if loaded is None:
        return None
    manifest = loaded.manifest
    if manifest.data_fingerprint != plan.training.fingerprint:
        raise ValueError(
            f"the data under data.train is not what this run was trained on (fingerprint {plan.training.fingerprint}, "
            f"the checkpoint's {manifest.data_fingerprint}): restore it, or start a new run with --fork NEW_NAME"
        )
    restore_random_state(loaded, ranks, recipe.train.seed)
    engine.skipped_steps = manifest.skipped_steps
    return manifest, prove(loaded, plan, engine, state, ranks, weights_only=False)


def samples_left_out(manifest: Manifest | None, owner: RunDirectory | None) -> tuple[list[tuple[int, int]], int]:
    """(first, end) positions of the samples that the run leaves out, by its checkpoint and by its events (a kill may
    have come before the next checkpoint), and how often it went back; the same on every rank, from rank 0."""
    found = None
    if owner is not None:
        ranges = [(event["first"], event["end"]) for event in owner.events("samples skipped")]
        found = ranges + (manifest.skipped_samples if manifest else []), len(owner.events("rollback"))
    result: tuple[list[tuple[int, int]], int] = distributed.broadcast(found)
    return result


def _load_newest(run: Path, state: ShardedState, ranks: Ranks, *, weights_only: bool) -> CheckpointReader | None:
    """Load the newest checkpoint that is good on every rank; a damaged one is passed over with a warning.

    None where a run has no checkpoint. Raises ValueError where it has some and all are damaged: to begin anew there
    would lose what was committed.
    """
    before: int | None = None

    def report(line: str) -> None:
        if ranks.is_first:
            print(f"warning: {line}", flush=True)

    while True:
        reader = newest_checkpoint(run, report=report, before_step=before, resumable=not weights_only)
        step = int(reader.directory.name.removeprefix("step_")) if reader else -1
        steps = distributed.gather_floats([step], ranks)[:, 0]
        if len(set(steps.tolist())) > 1:
            raise ValueError(
                f"the ranks see different checkpoints in {run}, steps {sorted(set(map(int, steps)))}: is it shared?"
            )
        if reader is None:
            if folders := list_step_folders(run):
                raise ValueError(
                    f"no checkpoint in {run / 'checkpoints'} can be loaded (steps {folders}, see the warnings): bring "
                    f"back a good copy of one, or start a new run under another name"
                )
            return None
        error = _attempt(lambda found=reader: load_into_engine(found, state, weights_only=weights_only))  # type: ignore[misc]
        errors = [message for message in distributed.gather_objects(error, ranks) if message]
        if not errors:
            return reader
        report(f"the checkpoint of step {step} is passed over: {errors[0]}")
        before = step


def _attempt(action: Callable[[], None]) -> str | None:
    try:
        action()
    except (DamagedFileError, OSError) as error:
        return str(error)
    return None
