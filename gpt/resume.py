"""Where a run's weights come from when it starts, and what goes into its checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gpt import distributed
from gpt.checkpoint.format import Manifest, OptimizerEntry, ParameterEntry, Probe
from gpt.checkpoint.load import load_into_engine, restore_random_state
from gpt.checkpoint.probe import check_probe
from gpt.checkpoint.read import CheckpointReader, newest_checkpoint
from gpt.checkpoint.write import Written, save_checkpoint
from gpt.distributed import Ranks, ShardedState
from gpt.metrics import steps_after
from gpt.model import DTYPES, is_run_directory
from gpt.run_directory import RunDirectory, package_versions

if TYPE_CHECKING:
    from gpt.train import RunPlan
    from gpt.trainer import Trainer


@dataclass(frozen=True)
class Saver:
    """Writes the run's checkpoints: `save` of the Trainer."""

    plan: "RunPlan"
    state: ShardedState
    tied: dict[str, str]
    generation: int

    def __call__(self, trainer: "Trainer", step: int, probe: Probe) -> Written:
        """Write the checkpoint of `step` with its probe."""
        plan, recipe, ranks = self.plan, self.plan.recipe, trainer.ranks

        def describe(parameters: list[ParameterEntry], optimizer: OptimizerEntry) -> dict[str, Any]:
            return {
                "tokens": step * recipe.train.global_batch_tokens,
                "samples_consumed": trainer.batches.positions.first(step + 1),
                "skipped_samples": trainer.batches.positions.skipped,
                "skipped_steps": trainer.engine.skipped_steps,
                "data_fingerprint": plan.training.fingerprint,
                "data_kind": plan.training.kind,
                "precision": recipe.precision,
                "parameters": parameters,
                "tied": self.tied,
                "optimizer": optimizer,
                "model_config": plan.config.to_dict(),
                "recipe": recipe.model_dump(),
                "versions": package_versions(),
                "probe": probe,
            }

        def all_succeeded(mine: bool) -> bool:
            return bool(distributed.gather_floats([float(mine)], ranks).all())

        return save_checkpoint(
            trainer.run, trainer.owner, self.generation, self.state, ranks, describe, step, all_succeeded
        )


def resume(
    plan: "RunPlan", engine: Any, state: ShardedState, ranks: Ranks, owner: RunDirectory | None
) -> Manifest | None:
    """Load the run's newest good checkpoint, whose manifest is returned, or the weights of another run to begin with.

    Raises:
        ValueError: the data is not the checkpoint's, nothing that was written can be loaded, or the loaded weights do
            not give the recorded logits.
    """
    recipe = plan.recipe
    newest = load_newest(plan, engine, state, ranks)
    if newest is None:
        if recipe.model.pretrained is None or not is_run_directory(recipe.model.pretrained):
            return None
        source = Path(recipe.model.pretrained)
        loaded = _load_newest(source, state, ranks, weights_only=True)
        if loaded is None:
            raise ValueError(f"model.pretrained {source} has no checkpoint that can be loaded")
        line = _check(loaded, engine, ranks, recipe.precision)
        if owner is not None:
            owner.write_event("weights loaded", source=str(source), step=loaded.manifest.step, proof=line)
            print(f"weights of {source}, step {loaded.manifest.step}. {line}", flush=True)
        return None
    manifest, line = newest
    if owner is not None:
        lost = steps_after(owner.path / "metrics.jsonl", manifest.step)
        owner.write_event(
            "resume", step=manifest.step, steps_lost=lost, from_world_size=manifest.world_size, proof=line
        )
        print(f"resumed at step {manifest.step}, written by {manifest.world_size} ranks. {line}", flush=True)
    return manifest


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
    return manifest, _check(loaded, engine, ranks, recipe.precision)


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
    """Load the newest checkpoint that is good on every rank; a damaged one is passed over with a warning."""
    before: int | None = None

    def report(line: str) -> None:
        if ranks.is_first:
            print(f"warning: {line}", flush=True)

    while True:
        reader = newest_checkpoint(run, report=report, before_step=before)
        steps = distributed.gather_floats([reader.manifest.step if reader else -1], ranks)[:, 0]
        if len(set(steps.tolist())) > 1:
            raise ValueError(
                f"the ranks see different checkpoints in {run}, steps {sorted(set(map(int, steps)))}: is it shared?"
            )
        if reader is None:
            return None
        error = _attempt(lambda found=reader: load_into_engine(found, state, weights_only=weights_only))  # type: ignore[misc]
        errors = [message for message in distributed.gather_objects(error, ranks) if message]
        if not errors:
            return reader
        report(f"the checkpoint of step {reader.manifest.step} is passed over: {errors[0]}")
        before = reader.manifest.step


def _attempt(action: Callable[[], None]) -> str | None:
    from gpt.checkpoint.format import DamagedFileError

    try:
        action()
    except (DamagedFileError, OSError) as error:
        return str(error)
    return None


def _check(reader: CheckpointReader, engine: Any, ranks: Ranks, precision: str) -> str:
    """Hold the loaded weights against the checkpoint's probe, on every rank in step."""
    manifest = reader.manifest
    if manifest.probe is None:
        return "probe: none in the checkpoint"
    if manifest.precision != precision:
        return f"probe: not comparable, recorded in {manifest.precision}"

    def forward(input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return engine(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits

    engine.eval()
    return check_probe(forward, manifest.probe, ranks.device, DTYPES[precision])
