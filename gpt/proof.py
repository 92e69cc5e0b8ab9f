"""The resume proof: what a load put into the engine, held against what the checkpoint says of itself.

Checksums show that the bytes are those that were written. This shows that they are the run: the same function, the same
optimizer state, the same place in the schedule and in the data.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from gpt import distributed
from gpt.batch import BatchPositions
from gpt.checkpoint.files import sum_of_squares
from gpt.checkpoint.format import STEP_PATTERN, Manifest
from gpt.checkpoint.probe import check_probe
from gpt.checkpoint.read import NORM_TOLERANCE, CheckpointReader
from gpt.distributed import Ranks, ShardedState
from gpt.model import DTYPES
from gpt.optimizer import Schedule
from gpt.recipe import Recipe
from gpt.run_directory import changes_of_schedule

if TYPE_CHECKING:
    from gpt.train import RunPlan

Findings = tuple[list[str], list[str]]
"""(what was compared and agrees, what differs with both values)."""


def prove(
    reader: CheckpointReader, plan: "RunPlan", engine: Any, state: ShardedState, ranks: Ranks, *, weights_only: bool
) -> str:
    """Compare everything, on every rank in step; the PASS line.

    Of `weights_only`, the start of another run, there are the probe, the weights' norms and the name to compare.

    Raises:
        ValueError: the FAIL line: what differs, with both values.
    """
    manifest = reader.manifest
    findings = [
        _compare_probe(manifest, engine, ranks, plan.recipe.precision),
        compare_norms(manifest.norms, _live_norms(manifest, state, ranks, weights_only=weights_only)),
        compare_step(manifest, reader.directory.name, [] if weights_only else state.optimizer_steps()),
    ]
    if not weights_only:
        findings.append(compare_learning_rate(manifest, plan.schedule, plan.recipe))
        findings.append(compare_position(manifest, plan.recipe, plan.training))
    agreeing = [line for agrees, _ in findings for line in agrees]
    differing = [line for _, differs in findings for line in differs]
    everywhere = dict.fromkeys(line for lines in distributed.gather_objects(differing, ranks) for line in lines)
    if everywhere:
        raise ValueError(
            f"resume proof of {reader.directory}: FAIL: {'; '.join(everywhere)}. This is not what the run saved, and "
            f"nothing was trained on it: move the folder away to go on from the checkpoint before it"
        )
    return f"resume proof: {', '.join(agreeing)}: PASS"


def _live_norms(
    manifest: Manifest, state: ShardedState, ranks: Ranks, *, weights_only: bool
) -> dict[tuple[str, str], float]:
    """L2 norm of each (state, parameter) over all ranks, from what the engine holds now."""
    tensors = []
    for entry in manifest.parameters:
        kinds = [entry.weights] if weights_only else manifest.states_of(entry)
        # a parameter that this run alone freezes, or trains, is kept in another precision: the probe shows it
        tensors += [(kind, entry.name) for kind in kinds if not weights_only or kind in state.states_of(entry.name)]
    squares = [sum_of_squares(state.read(name, kind)) for kind, name in tensors]
    norms = distributed.gather_floats(squares, ranks).sum(axis=0) ** 0.5
    return dict(zip(tensors, norms.tolist(), strict=True))


def compare_norms(recorded: dict[str, dict[str, float]], live: dict[tuple[str, str], float]) -> Findings:
    """The norm of every tensor in the engine against the manifest's."""
    wrong = []
    for (kind, name), norm in live.items():
        saved = recorded.get(name, {}).get(kind)
        if saved is None or not abs(norm - saved) <= NORM_TOLERANCE * saved:  # a NaN differs, too
            wrong.append(f"the norm of {kind}/{name} is {norm:.12g} in the engine, {saved!r} in the manifest")
    if wrong:
        return [], [f"{wrong[0]} ({len(wrong)} of {len(live)} norms differ)"]
    return [f"{len(live)} norms"], []


def compare_step(manifest: Manifest, folder: str, updates: Sequence[int]) -> Findings:
    """The manifest's step against the folder's name and the updates that each optimizer group of the engine has had."""
    step, skipped, wrong = manifest.step, manifest.skipped_steps, []
    match = STEP_PATTERN.match(folder)
    if match and int(match.group(1)) != step:
        wrong.append(f"the folder is {folder}, the manifest's step {step}")
    for group, count in enumerate(updates):
        if count != step - skipped:
            wrong.append(f"optimizer group {group} has had {count} updates, but of {step} steps {skipped} were skipped")
    return ([] if wrong else [f"step {step}"]), wrong


def compare_learning_rate(manifest: Manifest, schedule: Schedule, recipe: Recipe) -> Findings:
    """The learning rate of the last step against the schedule's, where that is still the one of the checkpoint."""
    if changes_of_schedule(manifest.recipe, recipe):
        return ["schedule not compared, since the recipe changed it"], []
    # a skipped step does not advance the schedule; when the last one was skipped, its rate is that of the next
    done = manifest.step - manifest.skipped_steps
    expected = [schedule.learning_rate(max(1, done + late)) for late in ((0, 1) if manifest.skipped_steps else (0,))]
    recorded = sorted({group.learning_rate for group in manifest.optimizer.groups})
    if len(recorded) == 1 and any(math.isclose(recorded[0], rate, rel_tol=1e-14) for rate in expected):
        return [f"learning rate {recorded[0]:.6g}"], []
    return [], [f"the learning rate is {recorded} in the checkpoint, {expected[0]} by the schedule at update {done}"]


def expected_samples(manifest: Manifest, recipe: Recipe) -> int:
    """Position in the data order at which the step after the checkpoint's begins."""
    return BatchPositions(recipe.global_batch_sequences, tuple(manifest.skipped_samples)).first(manifest.step + 1)


def compare_position(manifest: Manifest, recipe: Recipe, stream: Any) -> Findings:
    """Samples and tokens against the step, and the probe's row against the row that the data has at that position.

    `stream` is the training data, a `SampleStream`; the probe was recorded on the first row of the next step.
    """
    wrong, samples = [], expected_samples(manifest, recipe)
    if manifest.samples_consumed != samples:
        wrong.append(f"the checkpoint is at sample {manifest.samples_consumed}, but step {manifest.step} at {samples}")
    tokens = manifest.step * recipe.train.global_batch_tokens
    if manifest.tokens != tokens:
        wrong.append(f"the checkpoint has {manifest.tokens} tokens, but step {manifest.step} has {tokens}")
    if manifest.probe is not None and manifest.samples_consumed >= 0:
        row = stream.rows(range(manifest.samples_consumed, manifest.samples_consumed + 1))
        here, recorded = row.input_ids[0].tolist(), manifest.probe.input_ids
        if here != recorded:
            wrong.append(
                f"the data at sample {manifest.samples_consumed} begins with the tokens {here[:8]}, the row that was "
                f"recorded with {recorded[:8]}"
            )
    return ([] if wrong else [f"data at sample {manifest.samples_consumed}"]), wrong


def _compare_probe(manifest: Manifest, engine: Any, ranks: Ranks, precision: str) -> Findings:
    if manifest.probe is None:
        return ["no logits were recorded, as they were not finite or an error ended the run before"], []
    if manifest.precision != precision:
        return [f"logits not compared, recorded in {manifest.precision}"], []

    def forward(input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return engine(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits

    engine.eval()
    line, passed = check_probe(forward, manifest.probe, ranks.device, DTYPES[precision])
    return ([line], []) if passed else ([], [line])
