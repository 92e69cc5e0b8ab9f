"""The composition root: recipe -> streams, model, engine, trainer. `python -m gpt.train` is one rank of a run."""

import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import yaml
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from data_pipeline.mixture import Stage
from data_pipeline.remote_blocks import RemoteOptions
from data_pipeline.stream import TrainingStream, ValidationStream
from data_pipeline.tokenizer import load_tokenizer, token_byte_lengths, tokenizer_fingerprint
from gpt.batch import BatchPlan, plan_batch
from gpt.deepspeed_config import build_deepspeed_config
from gpt.embedding_noise import embedding_noise
from gpt.heartbeat import Heartbeat, answer_with_stacks, heartbeat_interval
from gpt.lora import saved_elements, target_names
from gpt.loss import output_layer
from gpt.model import DTYPES, build_config, check_weights, elements_of, meta_model, tied_names
from gpt.optimizer import Schedule, total_steps
from gpt.recipe import Recipe
from gpt.recipe_file import parse_recipe
from gpt.run_directory import InUseError, NotMetError, SupersededError, compare_recipes, stored_recipe
from gpt.stop_requests import StopRequests

MEETING_SECONDS = 600.0
"""How long a rank waits for the others at the start, see launch/watch.py."""


@dataclass(frozen=True)
class RunPlan:
    """Everything of a run that can be known, and refused, without a process group."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    config: PreTrainedConfig
    training: TrainingStream
    validation: ValidationStream | None
    batch: BatchPlan
    schedule: Schedule
    deepspeed: dict[str, Any]
    changes: list[str]
    """What differs from the stored recipe of a run that goes on, as "field: old -> new"."""

    def describe(self) -> list[str]:
        """The lines that a run prints at its start."""
        steps, tokens = self.schedule.total_steps, self.recipe.train.global_batch_tokens
        epochs = steps * self.recipe.global_batch_sequences / self.training.samples_per_epoch
        lines = [f"run: {self.recipe.run_directory()}", *(f"data: {line}" for line in self.training.describe())]
        lines += self.batch.describe()
        lines.append(f"length: {steps:,} steps of {tokens:,} tokens = {steps * tokens:,} tokens, {epochs:.2f} epochs")
        lines += self.repeated_data()
        lines += self.schedule.describe()
        return lines + [f"changed since the run began: {change}" for change in self.changes]

    def repeated_data(self) -> list[str]:
        """Warnings about data that the run repeats or never reaches. Raises ValueError beyond a set's max_epochs."""
        samples = self.schedule.total_steps * self.recipe.global_batch_sequences
        return self.training.describe_run(samples, [source.max_epochs for source in self.recipe.data.train])


def plan_run(recipe: Recipe, world_size: int) -> RunPlan:
    """Check a recipe against its data, tokenizer, model, DeepSpeed file and run directory.

    Raises:
        FileNotFoundError, ValueError: whatever does not fit, in one sentence.
    """
    changes = changes_since(recipe)
    tokenizer = load_tokenizer(Path(recipe.tokenizer))
    length = recipe.data.sequence_length
    training = open_training_data(recipe)
    place, remote = recipe.data.validation, RemoteOptions(**recipe.data.remote.model_dump())
    validation = ValidationStream(place, length, remote) if place is not None else None
    hang_seconds = recipe.faults.hang_seconds
    if (training.is_remote or (validation and validation.is_remote)) and remote.deadline_seconds >= hang_seconds:
        raise ValueError(
            f"data.remote.deadline_seconds is {remote.deadline_seconds:g}, but a run that waits faults.hang_seconds, "
            f"{hang_seconds:g}, is taken for hung: make the deadline shorter"
        )
    sha256 = tokenizer_fingerprint(Path(recipe.tokenizer))
    for name, stream in (("data.train", training), ("data.validation", validation)):
        if stream is not None and stream.tokenizer_sha256 != sha256:
            raise ValueError(
                f"{name} was prepared with another tokenizer than {recipe.tokenizer} (or that one changed since): "
                f"prepare the data again with --tokenizer {recipe.tokenizer}, or name the one it was prepared with"
            )
    if validation is not None and recipe.evaluate.metric == "bits_per_byte" and token_byte_lengths(tokenizer) is None:
        raise ValueError(
            f"evaluate.metric bits_per_byte is never computed with {recipe.tokenizer}: the bytes of its tokens are "
            "unknown; choose loss"
        )
    config = build_config(recipe.model, tokenizer, length)
    check_weights(recipe.model, config, recipe.precision)
    if recipe.lora is not None:
        target_names(meta_model(config), recipe.lora)
    batch = plan_batch(recipe.global_batch_sequences, recipe.train.micro_batch_sequences, world_size)
    schedule = Schedule(recipe.optimizer, total_steps(recipe, training.samples_per_epoch))
    if recipe.profile is not None and recipe.profile.steps[1] > schedule.total_steps:
        raise ValueError(f"profile.steps is {recipe.profile.steps}, but the run has {schedule.total_steps} steps")
    deepspeed = build_deepspeed_config(recipe, batch, config.get_text_config().hidden_size)
    plan = RunPlan(recipe, tokenizer, config, training, validation, batch, schedule, deepspeed, changes)
    plan.repeated_data()
    if validation is not None:
        sample_prompt(plan)  # refused here, not at the first evaluation
    return plan


def changes_since(recipe: Recipe) -> list[str]:
    """What differs from the recipe of the run that its directory holds. Raises ValueError for what may not."""
    stored = stored_recipe(recipe.run_directory())
    return compare_recipes(stored, recipe) if stored is not None else []


def open_training_data(recipe: Recipe) -> TrainingStream:
    """The recipe's training stream: its sources, stages and packing."""
    data = recipe.data
    ends = [None if s.until_tokens is None else s.until_tokens // data.sequence_length for s in data.stages]
    return TrainingStream(
        [(source.path, source.weight) for source in data.train],
        data.sequence_length,
        recipe.train.seed,
        stages=[Stage(stage.weights, end) for stage, end in zip(data.stages, ends, strict=True)],
        packing=data.packing,
        order=data.order,
        remote=RemoteOptions(**data.remote.model_dump()),
    )


def check(recipe: Recipe, world_size: int) -> RunPlan:
    """`plan_run`, a look at every data file, and at the budget for checkpoints. One rank of each host does it, so that
    all hear what is wrong on one, and each start waits for one import of transformers only."""
    from gpt.checkpoint.retention import check_budget

    plan = plan_run(recipe, world_size)
    if recipe.checkpoint.budget_bytes is not None:
        elements = saved_elements(recipe, plan.config)
        check_budget(recipe.checkpoint, recipe.run_directory(), elements, plan.schedule.total_steps)
    for stream in (plan.training, plan.validation):
        if stream is not None:
            stream.check_files()
    return plan


def main() -> NoReturn:
    """One rank, started by the launcher: the recipe is in TRAINYARD_RECIPE, torchrun's variables name the rank. With
    the argument "preflight" it only looks whether the run will work, and leaves its report beside its errors.

    What is refused is written to TRAINYARD_ERROR_DIRECTORY as one sentence, a crash as its traceback, for the launcher
    to print once; the exit code is 1 in both cases. A requested stop leaves its step there and the exit code 0, because
    torchrun's agent takes any other for a failure.
    """
    rank = int(os.environ["RANK"])
    errors = Path(os.environ["TRAINYARD_ERROR_DIRECTORY"])
    stop_requests = StopRequests(errors)
    answer_with_stacks(errors / f"rank_{rank}.stacks.txt")
    code = 1
    try:
        recipe = parse_recipe(json.loads(os.environ["TRAINYARD_RECIPE"]), "from the launcher")
        if sys.argv[1:] == ["preflight"]:
            look(recipe, errors / "preflight.json")
            stopped_at = None
        else:
            stopped_at = run(recipe, stop_requests.requested)
        if stopped_at is not None:
            (errors / f"rank_{rank}.stopped").write_text(str(stopped_at), encoding="utf-8")
        code = 0
    except (ValueError, OSError, SupersededError) as error:
        if isinstance(error, SupersededError | InUseError):
            (errors / f"rank_{rank}.another_start").touch()
        if isinstance(error, NotMetError):
            (errors / f"rank_{rank}.not_met").touch()
        (errors / f"rank_{rank}.txt").write_text(str(error), encoding="utf-8")
        (errors / f"rank_{rank}.details.txt").write_text(traceback.format_exc(), encoding="utf-8")
    except Exception:
        (errors / f"rank_{rank}.traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
    # Not sys.exit. After an error another rank may be waiting in a collective, and torch's own exit would wait for it;
    # after success everything is written and closed, but native threads that outlive the interpreter now and then
    # abort ("terminate called without an active exception"), which would turn a finished run into a failed one.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(recipe: Recipe, stop_requested: Callable[[], bool]) -> int | None:
    """Train the recipe to its end on this rank, from the newest checkpoint where there is one.

    Returns the step after which a requested stop ended it, None where it came to its end.
    """
    from gpt import distributed, preflight
    from gpt.run_directory import RunDirectory

    faults = recipe.faults
    plan, items = _look_before(recipe)
    preflight.refuse(items)
    assert plan is not None
    ranks = distributed.start(max(1800.0, 2 * faults.hang_seconds))
    items += preflight.check_collectives(ranks, size_bytes=4 * 2**20, repetitions=1)
    preflight.refuse(items)
    if ranks.is_first:
        for line in preflight.describe(items, ranks.world_size):
            print(line, flush=True)
    owner = RunDirectory(recipe.run_directory()) if ranks.is_first else None
    refusal = None
    if owner is not None:
        try:
            owner.claim(faults.stale_seconds)
        except InUseError as error:
            refusal = str(error)
    refusal, generation = distributed.broadcast((refusal, owner.generation if owner else 0))
    if refusal is not None:
        raise InUseError(refusal)
    interval = heartbeat_interval(faults.hang_seconds, faults.stale_seconds)
    with _failures_of_the_system():
        heartbeat = Heartbeat(recipe.run_directory(), generation, ranks.rank, interval)
        try:
            plan = replace(plan, changes=changes_since(recipe))  # another start may have come and gone before the claim
            stopped_at = _run_claimed(plan, ranks, owner, heartbeat, stop_requested)
        finally:
            heartbeat.end()
    distributed.stop()
    return stopped_at


@contextmanager
def _failures_of_the_system() -> Iterator[None]:
    """What the file system or the network does to a run that has begun is no refusal: another start may go better."""
    try:
        yield
    except OSError as error:
        if error.errno is None and not isinstance(error, ConnectionError | TimeoutError):
            raise  # a sentence, of our own or transformers': data or weights that are not there
        raise RuntimeError(f"the system failed the run: {error}") from error


def _look_before(recipe: Recipe) -> tuple[RunPlan | None, list[Any]]:
    """The plan, and what all ranks together found before they are a process group; without a plan it has failed."""
    from gpt import distributed, preflight

    meeting = distributed.Meeting(MEETING_SECONDS)
    plan = data = needs = problem = None
    try:
        plan = (check if meeting.local_rank == 0 else plan_run)(recipe, meeting.world_size)
        streams = [stream.fingerprint for stream in (plan.training, plan.validation) if stream is not None]
        data = ", ".join([*streams, tokenizer_fingerprint(Path(recipe.tokenizer))])
        if meeting.rank == 0:
            needs = _needs(plan, meeting.world_size)
    except (ValueError, OSError) as error:
        problem = str(error)
    except Exception as error:  # the other ranks would wait for this one
        traceback.print_exc()
        problem = f"{type(error).__name__}: {error}"
    items = preflight.check_before(meeting, recipe, problem, data, needs)
    return plan, items + (preflight.check_precision(recipe.precision) if plan is not None else [])


def _needs(plan: RunPlan, world_size: int) -> Any:
    """What the run takes; None, with a warning, for a model that cannot be made without memory to count its weights."""
    from gpt.preflight import Needs

    try:
        elements, saved = elements_of(plan.config), saved_elements(plan.recipe, plan.config)
    except RuntimeError as error:
        print(f"warning: whether memory and disk suffice is not known: {error}", flush=True)
        return None
    return Needs.of(plan.recipe, elements, saved, plan.schedule.total_steps, plan.deepspeed, world_size)


def look(recipe: Recipe, report: Path) -> None:
    """The command `trainyard preflight` on this rank: everything that a start looks at, all data files, and a longer
    all-reduce. The first rank of each host writes the report."""
    from gpt import distributed, preflight

    plan, items = _look_before(recipe)
    if preflight.can_meet(items):
        ranks = distributed.start(MEETING_SECONDS)
        items += preflight.check_collectives(ranks, size_bytes=64 * 2**20, repetitions=3)
        distributed.stop()
    else:
        items.append(preflight.Item("all-reduce", "skipped", "not tried before the others are well"))
    if os.environ["LOCAL_RANK"] == "0":
        preflight.write_report(report, items, plan.describe() if plan is not None else [])


def _run_claimed(
    plan: RunPlan, ranks: Any, owner: Any, heartbeat: Heartbeat, stop_requested: Callable[[], bool]
) -> int | None:
    from gpt import distributed
    from gpt.batch_source import BatchSource
    from gpt.metrics import measure_matmul_flops
    from gpt.optimizer import build_optimizer
    from gpt.resume import load_newest, resume, samples_left_out
    from gpt.run_model import build_run_model, training_flops_per_token
    from gpt.step_trace import step_trace
    from gpt.trainer import Trainer

    recipe = plan.recipe
    if recipe.precision == "fp16" and not distributed.supports_fp16():
        raise ValueError("precision is fp16, which this device does not support: use bf16 or fp32")
    if owner is not None:
        _describe_run(plan, owner, ranks.world_size)
    heartbeat.progress("building the model")
    keep_alive = distributed.zero_config(plan.deepspeed)
    model, uncompiled = build_run_model(plan, keep_alive, on_gpu=ranks.device.type == "cuda")
    heartbeat.progress("starting the engine")
    engine = distributed.initialize_engine(model, build_optimizer(model, recipe.optimizer), plan.deepspeed)
    state = distributed.ShardedState(engine, ranks, trained_only=recipe.lora is not None)
    torch.manual_seed(recipe.train.seed * 1_000_003 + ranks.rank)  # dropout differs between ranks
    heartbeat.progress("loading a checkpoint")
    with uncompiled():  # a compilation of a shape that no step has takes seconds
        manifest = resume(plan, engine, state, ranks, owner)
        output = output_layer(recipe, model, engine, ranks.device)
    resumed = manifest.step if manifest is not None else 0
    left_out, rollbacks = samples_left_out(manifest, owner)
    peak = measure_matmul_flops(ranks.device, DTYPES[recipe.precision])
    metrics = _open_metrics(plan, owner, resumed, model, fused=output is not None)
    trainer = Trainer(
        recipe=recipe,
        run=recipe.run_directory(),
        owner=owner,
        metrics=metrics,
        engine=engine,
        ranks=ranks,
        batches=BatchSource(plan.training, plan.batch, ranks, recipe.data.workers, left_out),
        batch=plan.batch,
        schedule=plan.schedule,
        evaluate=_build_evaluation(plan),
        saver=_build_saver(plan, state, ranks, owner, heartbeat.generation, model, metrics, uncompiled),
        load=lambda: load_newest(plan, engine, state, ranks),
        stop_requested=stop_requested,
        uncompiled=uncompiled,
        output_layer=output,
        embedding_noise=embedding_noise(model, recipe.train),
        flops_per_token=training_flops_per_token(recipe, plan.config, model),
        peak_flops=float(distributed.gather_floats([peak], ranks).sum()),
        first_step=resumed + 1,
        restarts=len(owner.events("continue")) if owner is not None else 0,
        rollbacks=rollbacks,
        heartbeat=heartbeat,
        trace=step_trace(recipe) if ranks.is_first else None,
    )
    _check_isolation(plan, trainer)
    return _fit(trainer)


def _build_saver(
    plan: RunPlan, state: Any, ranks: Any, owner: Any, generation: int, model: Any, metrics: Any, uncompiled: Any
) -> Any:
    from gpt.model import draws_random_numbers
    from gpt.saver import Saver

    sync = metrics.sync if metrics is not None else lambda: None
    random = draws_random_numbers(model) or plan.recipe.train.neftune_noise_alpha is not None
    same_as_evaluation = uncompiled is nullcontext and not random
    tied = {name: first for name, first in tied_names(model).items() if first in state.parameters}
    return Saver(plan, state, ranks, owner, generation, tied, sync, same_as_evaluation)


def _fit(trainer: Any) -> int | None:
    """Train to the end, and write what is left to write of it; the step after which a requested stop ended it."""
    if trainer.owner is not None and trainer.first_step > trainer.schedule.total_steps:
        print(f"nothing is left to do: the run ended at step {trainer.first_step - 1}")
    trainer.fit()
    if trainer.owner is not None and trainer.metrics is not None:
        trainer.metrics.close()
        if trainer.stopped_at is None:
            why = {"reason": trainer.ended_early} if trainer.ended_early is not None else {}
            trainer.owner.write_event("end", step=trainer.last_step, **why)
    stopped_at: int | None = trainer.stopped_at
    return stopped_at


def _check_isolation(plan: RunPlan, trainer: Any) -> None:
    """Where rows may hold several documents: refuse a model that does not keep them apart."""
    from gpt.isolation import check_isolation

    if not any(stream is not None and stream.may_join_documents for stream in (plan.training, plan.validation)):
        return
    model = trainer.engine.module
    trainer.engine.eval()
    with trainer.uncompiled():
        line = check_isolation(
            trainer.forward,
            f"{type(model).__name__} with {model.config._attn_implementation} attention",
            rows=plan.batch.rows_per_forward,
            sequence_length=plan.recipe.data.sequence_length,
            vocabulary_size=plan.config.get_text_config().vocab_size,
            dtype=DTYPES[plan.recipe.precision],
            device=trainer.ranks.device,
        )
    if trainer.owner is not None and line is not None:
        print(line, flush=True)


def _open_metrics(plan: RunPlan, owner: Any, resumed: int, model: Any, *, fused: bool) -> Any:
    """Rank 0's metrics; its console says what is trained, TensorBoard gets recipe and environment as the run begins."""
    from gpt.metrics import MetricsWriter
    from gpt.model import describe_model

    if owner is None:
        return None
    loss = "the output layer gives the loss" if fused else "the loss is made of whole logits"
    print(f"model: {describe_model(model, plan.recipe.precision)}, {loss}, from step {resumed}")
    metrics = MetricsWriter(owner, resumed, plan.schedule.total_steps, plan.recipe.logging.console_every_steps)
    if resumed == 0:
        metrics.write_text("recipe", yaml.safe_dump(plan.recipe.model_dump(), sort_keys=False), 0)
        metrics.write_text("environment", (owner.path / "environment.json").read_text(encoding="utf-8"), 0)
    return metrics


def _describe_run(plan: RunPlan, owner: Any, world_size: int) -> None:
    """Everything that is known before step 1, into the run directory and onto the console; leftovers go."""
    from gpt.checkpoint.write import remove_leftovers
    from gpt.heartbeat import last_seen
    from gpt.run_directory import describe_environment, tokenizer_checksums

    owner.check_ownership()  # the plan may have taken long, and a later start may be saving
    remove_leftovers(owner.path)
    recipe = plan.recipe
    environment = describe_environment(world_size)
    starts = owner.events("start", "continue")  # not by a file: a kill may have come between it and the event
    owner.write_file("recipe.yaml", yaml.safe_dump(recipe.model_dump(), sort_keys=False))
    owner.write_file("ds_config.json", json.dumps(plan.deepspeed, indent=2))
    owner.write_file("environment.json", json.dumps(environment, indent=2))
    if Path(recipe.tokenizer).is_dir() and not (owner.path / "tokenizer").exists():
        partial = owner.path / ".tokenizer.tmp"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(recipe.tokenizer, partial)
        owner.write_event("tokenizer kept", xxh3=tokenizer_checksums(partial))
        partial.rename(owner.path / "tokenizer")
    what = {"host": environment["host"], "world_size": world_size, "pid": os.getpid()}
    what |= {"total_steps": plan.schedule.total_steps}
    if not starts:
        owner.write_event("start", **what)
    else:
        # the last start may be a later one, which died between its first heartbeat and its event
        owner.write_event("continue", **what, last_seen=last_seen(owner.path, starts[-1]["generation"]))
    owner.remove_old_heartbeats()
    for change in plan.changes:
        owner.write_event("recipe changed", change=change)
    print("\n".join(plan.describe()), flush=True)


def _build_evaluation(plan: RunPlan) -> Callable[..., Any] | None:
    from gpt.evaluate import RunEvaluation, end_token_ids

    if plan.validation is None:
        return None
    settings, prompt = plan.recipe.evaluate, sample_prompt(plan)
    room = plan.recipe.data.sequence_length + 1 - len(prompt)  # the last new token is not read: no position is exceeded
    return RunEvaluation(
        stream=plan.validation,
        batches=settings.batches,
        micro_batch_sequences=settings.micro_batch_sequences,
        byte_lengths=token_byte_lengths(plan.tokenizer),
        tokenizer=plan.tokenizer,
        sample_prompt_ids=prompt,
        sample_tokens=min(settings.sample_tokens, room),
        end_ids=end_token_ids(plan.tokenizer),
    )


def sample_prompt(plan: RunPlan) -> list[int]:
    """Token ids of the prompt of the text sample: at most sequence_length. Raises ValueError for a longer one."""
    text, tokenizer, length = plan.recipe.evaluate.sample_prompt, plan.tokenizer, plan.recipe.data.sequence_length
    if text is None:
        assert plan.validation is not None
        rows = plan.validation.rows(np.zeros(1, np.uint64))
        first_target = int(rows.target_mask[0].argmax())
        return rows.input_ids[0, : first_target + 1 if plan.validation.kind == "chat" else 16].tolist()
    if plan.training.kind == "chat":
        message = [{"role": "user", "content": text}]
        ids = list(tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False))
    else:
        ids = list(tokenizer.encode(text))
    if len(ids) > length:
        raise ValueError(
            f"evaluate.sample_prompt has {len(ids)} tokens, but data.sequence_length is {length}: shorten the prompt"
        )
    return ids


if __name__ == "__main__":
    main()
