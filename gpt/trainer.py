"""The training loop: pretraining and fine-tuning alike; it never asks which.

A step is a function of the weights and of its positions in the data order, so a run that goes on from a checkpoint is
the run that was never stopped.
"""

import time
from bisect import bisect_right
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt import distributed
from gpt.batch import BatchPlan, MicroBatch
from gpt.batch_source import BatchSource
from gpt.checkpoint.format import Manifest
from gpt.distributed import Ranks
from gpt.divergence import Fault, LossWatch, Origin, RandomState, first_non_finite, random_state, set_random_state
from gpt.early_stopping import Patience, cost, evaluations
from gpt.heartbeat import STRAGGLER_STEPS, Heartbeat, Stragglers, busy_seconds, read_beat
from gpt.loss import OutputLayer, loss_for_backward, smoothed_cross_entropy_sums
from gpt.metrics import Evaluation, MetricsWriter, Record, host_metrics, peak_memory_gib, recent_losses
from gpt.optimizer import Schedule
from gpt.phase_clock import STEP_PHASES, TAGS
from gpt.recipe import Recipe
from gpt.run_directory import RunDirectory
from gpt.saver import Saver
from gpt.step_trace import StepTrace
from gpt.validation_gap import ValidationGap


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step's data on this rank, and what all ranks know of it."""

    forwards: list[MicroBatch]
    first_position: int
    """Of this rank's first sample in the data order; the others follow it."""
    target_tokens: int
    """Of the whole global batch."""
    stop: bool
    """Whether a rank was asked to stop."""
    started: float
    """`perf_counter` when the step began to wait for its data."""


@dataclass
class Trainer:
    """One start of a run. `owner` and `metrics` are rank 0's and None elsewhere."""

    recipe: Recipe
    run: Path
    owner: RunDirectory | None
    metrics: MetricsWriter | None
    engine: Any
    ranks: Ranks
    batches: BatchSource
    batch: BatchPlan
    schedule: Schedule
    evaluate: Callable[["Trainer"], Evaluation] | None
    saver: Saver
    stop_requested: Callable[[], bool]
    uncompiled: Callable[[], AbstractContextManager[None]] = nullcontext
    """In it, the model computes as it will where it is loaded: layers not compiled."""
    output_layer: OutputLayer | None = None
    """Where it gives the loss; logits are then never whole."""
    embedding_noise: Callable[[int], AbstractContextManager[Any]] = nullcontext
    """Around a training forward, given the position of its first sample."""
    flops_per_token: float = 0.0
    peak_flops: float = 0.0
    load: Callable[[], tuple[Manifest, str] | None] = lambda: None
    """Puts the engine into the state of the newest good checkpoint: its manifest, and the line of its proof."""
    first_step: int = 1
    restarts: int = 0
    rollbacks: int = 0
    heartbeat: Heartbeat | None = None
    trace: StepTrace | None = None

    def __post_init__(self) -> None:
        self.clock = self.saver.clock
        distributed.watch_collectives(self.clock)
        self._stragglers = Stragglers()
        self._stop_at = self.schedule.total_steps
        self._loaded_step = self.first_step - 1
        self._watch = self._new_watch()
        self._patience = self._new_patience()
        self._gap = ValidationGap()
        self._fault: Fault | None = None
        self._postponed = False
        self.stopped_at: int | None = None
        """The last step before a requested stop; None where nobody asked for one."""
        self.ended_early: str | None = None
        """Why early stopping ended the run; None where it did not."""

    def fit(self) -> None:
        """Train from `first_step` to the end of the schedule, evaluating and saving on the way and at the end.

        When a rank was asked to stop, all ranks save what they have and leave before the next step.

        Raises:
            ValueError: the run has diverged and cannot go back, too many saves in a row failed, or the last one did.
        """
        step = self.first_step - 1
        if (reason := self._restore_watch()) and step < self.schedule.total_steps:
            self._end_early(step, reason)
        try:
            while step < self._stop_at:
                step += 1
                self._phase("waiting for data", step)
                if self.trace is not None:
                    self.trace.before(step)
                batch = self.take(step)
                if batch.stop:
                    self._stop(step - 1)
                    break
                step = self._do_step(step, batch)
                if self.trace is not None:
                    self.trace.after(step)
        except (ValueError, OSError):
            self.saver.leave()
            raise
        if self.trace is not None:
            self.trace.end()
        self.batches.close()

    def _do_step(self, step: int, batch: "StepBatch") -> int:
        """Train, and evaluate, record and save where it is due. Returns the step after which the run goes on."""
        record, evaluation = self.train_step(step, batch), None
        if self._fault is not None:
            return self._roll_back(step, self._fault)
        if self.evaluate is not None and self._is_due(step, self.recipe.evaluate.every_steps):
            self._phase(f"evaluation at step {step}")
            with self.clock.phase("evaluation"), self.uncompiled():
                evaluation = self.evaluate(self)
            record |= evaluation.metrics | _named(self.clock.take(["evaluation"]))
            if self.metrics is not None and evaluation.sample_text is not None:
                self.metrics.write_text("evaluate/sample", evaluation.sample_text, step)
            if self._patience is not None and step < self.schedule.total_steps:
                value = cost(self._patience.metric, evaluation.metrics["evaluate/" + self._patience.metric])
                if reason := self._patience.see(step, value):
                    self._end_early(step, reason)
        if self.metrics is not None:
            with self.clock.phase("logging"):
                self._watch_gap(step, record)
                self.metrics.write(step, record)
        save = self._postponed or self._is_due(step, self.recipe.checkpoint.every_steps)
        # what a run goes back to has to be good: nothing is saved amid skipped steps or spikes, but at the end
        self._postponed = save and self._watch.suspicious and step != self._stop_at
        if save and not self._postponed:
            self._save(step, evaluation)
        return step

    def take(self, step: int) -> "StepBatch":
        """This rank's part of a global batch, and what all ranks must know of it, in one collective."""
        started = time.perf_counter()
        with self.clock.phase("data_wait"):
            forwards = self.batches.take(step)
        self._phase("step")
        mine = [sum(int(f.mask.sum()) for f in forwards), self.stop_requested(), self.saver.state()]
        with self.clock.collective():
            everyone = distributed.gather_floats(mine, self.ranks)
        self.saver.hear(everyone[:, 2])
        position, target_tokens = self.batches.first_position(step), int(everyone[:, 0].sum())
        return StepBatch(forwards, position, target_tokens, bool(everyone[:, 1].any()), started)

    def _stop(self, step: int) -> None:
        """Leave after `step`, which is saved unless it already is."""
        self.stopped_at = self._stop_at = step
        if self.owner is not None:
            self.owner.note_event("stop requested", step=step)
        if self.saver.begun_step == step:
            self._finish_save(step)
        elif step > self._loaded_step and self.saver.committed_step != step:
            self._save(step, None)

    def _end_early(self, step: int, reason: str) -> None:
        """Make `step` the run's last one."""
        self._stop_at, self.ended_early = step, reason
        if self.owner is not None:
            self.owner.note_event("early stopping", step=step, reason=reason)
            print(f"early stopping after step {step}: {reason}", flush=True)

    def _watch_gap(self, step: int, record: Record) -> None:
        """Rank 0: put the gap of an evaluated step into its record, and say when it opens."""
        if warning := self._gap.see(step, record):
            assert self.owner is not None
            self.owner.note_event("over-fitting", step=step, reason=warning)
            print(f"warning: step {step}: {warning}", flush=True)

    @property
    def last_step(self) -> int:
        """Of the run, as far as is known: the schedule's, or an earlier one."""
        return self._stop_at

    def train_step(self, step: int, batch: "StepBatch") -> Record:
        """One optimizer step; returns the step's record (complete on rank 0 only)."""
        started, busy = batch.started, busy_seconds()
        target_tokens = batch.target_tokens
        if target_tokens == 0:
            raise ValueError(f"the global batch of step {step} has no target token: nothing can be learned from it")
        learning_rate = self.schedule.learning_rate(max(1, step - self.engine.skipped_steps))
        distributed.set_learning_rate(self.engine, learning_rate)
        random = random_state(self.ranks.device)
        loss_sum = self._accumulate(batch)
        # on a CPU a rank sleeps while it waits for another one; a GPU's host tells nothing
        busy = busy_seconds() - busy if self.ranks.device.type == "cpu" else 0.0
        with self.clock.phase("optimizer"):
            square = distributed.gradient_square(self.engine)
        waits = [self.clock.so_far("data_wait"), self.clock.so_far("checkpoint_stall")]
        mine = [float(loss_sum), square, busy, peak_memory_gib(self.ranks.device), *waits]
        with self.clock.collective():
            everyone = distributed.gather_floats(mine, self.ranks)
        loss = float(everyone[:, 0].sum()) / target_tokens
        # DeepSpeed sums the squares in fp32, too
        with self.clock.phase("optimizer"):
            if np.isfinite(loss) and everyone[:, 1].sum() < np.finfo(np.float32).max:
                self.engine.step()
            else:
                distributed.discard_gradients(self.engine)
        applied = self.engine.was_step_applied()
        self._fault = self._watch.see(step, loss, applied=applied, can_go_back=self._can_go_back())
        seconds, phases = time.perf_counter() - started, self.clock.take(STEP_PHASES)
        if not applied:
            self._explain_skip(step, batch, loss, random)
            self.clock.take(STEP_PHASES)  # it is of no step
        with self.clock.phase("logging"):
            return self._record(step, loss, target_tokens, learning_rate, seconds, phases, everyone)

    def _accumulate(self, batch: StepBatch, *, whole_logits: bool = False) -> torch.Tensor:
        """The forwards and backwards of one step, whose gradient then waits for the update; this rank's loss sum, which
        label smoothing does not change."""
        loss_sum = torch.zeros((), dtype=torch.float32, device=self.ranks.device)
        self.engine.train()
        position = batch.first_position
        for number, forward in enumerate(batch.forwards):
            if number:
                self.engine.step()  # no update yet: by these calls DeepSpeed counts its micro-batches
            noise = self.embedding_noise(position + number * self.batch.rows_per_forward)
            with self.clock.phase("forward"), noise:
                minimised, part = self._loss_sums(forward, None if whole_logits else self.output_layer)
                loss = loss_for_backward(minimised, batch.target_tokens, self.ranks.world_size)
            with self.clock.phase("backward"):
                self.engine.backward(loss, scale_wrt_gas=False)
            loss_sum += part
        self.saver.wait_copied()
        return loss_sum

    def _loss_sums(self, batch: MicroBatch, output: OutputLayer | None) -> tuple[torch.Tensor, torch.Tensor]:
        """What is minimised, and the plain loss without a gradient: sums over the counted targets of one forward."""
        if output is None:
            logits = self.forward(batch.input_ids, batch.position_ids)
            self.saver.give_probe(logits, batch)
            smoothing = self.recipe.train.label_smoothing
            return smoothed_cross_entropy_sums(logits, batch.targets, batch.mask, smoothing)
        with output.gives_loss(batch.targets, batch.mask, first_row=self.saver.needs_probe) as first_row:
            loss = self.forward(batch.input_ids, batch.position_ids)
        for logits in first_row:
            self.saver.give_probe(logits, batch)
        return loss, loss.detach()

    def _explain_skip(self, step: int, batch: "StepBatch", loss: float, random: RandomState) -> None:
        """Say why a step was skipped: in an event and a line.

        A gradient that overflows in fp16 while the loss scale can be lowered is ordinary, unless it goes on for too
        long. For all else the step's micro-batches are run once more to find where it began.
        """
        seconds = time.perf_counter() - batch.started
        reason = "the gradient is not finite" if np.isfinite(loss) else f"the loss is {loss}"
        details: dict[str, Any] = {"loss_scale": distributed.loss_scale(self.engine)}
        if np.isfinite(loss) and self._fault is None and distributed.lower_loss_scale(self.engine):
            reason += f": an overflow at the fp16 loss scale {details['loss_scale']:g}"
        elif origin := self._find_origin(batch, random):
            reason += f"; first not finite was {origin}"
            details |= asdict(origin)
        else:
            reason += "; run again, the same batch gave finite values"
        if self.owner is not None:
            self.owner.note_event("step skipped", step=step, reason=reason, seconds=seconds, **details)
            print(f"step {step} is skipped: {reason}", flush=True)

    def _find_origin(self, batch: "StepBatch", random: RandomState) -> Origin | None:
        """Run a step's micro-batches once more, from the same random state, uncompiled, with whole logits and
        without effect: where, on any rank, a value was first not finite."""
        now, skipped_steps = random_state(self.ranks.device), self.engine.skipped_steps
        set_random_state(random, self.ranks.device)
        with self.uncompiled(), first_non_finite(self.engine.module, self.ranks.rank) as found:
            self._accumulate(batch, whole_logits=True)
        distributed.discard_gradients(self.engine)
        self.engine.skipped_steps = skipped_steps
        set_random_state(now, self.ranks.device)
        everyone = distributed.gather_objects(found, self.ranks)
        return min((origin for mine in everyone for origin in mine), default=None)

    def _new_watch(self) -> LossWatch:
        ends = [stage.until_tokens for stage in self.recipe.data.stages if stage.until_tokens is not None]
        length, warmup_steps = self.recipe.data.sequence_length, self.recipe.optimizer.warmup_steps

        def stage(step: int) -> int:
            return bisect_right(ends, self.batches.positions.first(step) * length)

        return LossWatch(self.recipe.divergence, warmup_steps, stage)

    def _new_patience(self) -> Patience | None:
        settings = self.recipe.evaluate
        return Patience(settings.early_stopping, settings.metric) if settings.early_stopping is not None else None

    def _restore_watch(self) -> str | None:
        """The watches as they were after the newest step of metrics.jsonl: on rank 0's word, since the file is its own.

        Returns the reason where the run should not go on from there.
        """
        self._watch, self._fault, self._postponed = self._new_watch(), None, False
        past = None
        if self.ranks.is_first:
            past = recent_losses(self.run / "metrics.jsonl", self._watch.memory_steps)
            self._gap = ValidationGap.restore(self.run / "metrics.jsonl")
        self._watch.restore(*distributed.broadcast(past))
        self._patience = self._new_patience()
        if self._patience is None:
            return None
        seen = evaluations(self.run, self._patience.metric) if self.ranks.is_first else None
        return self._patience.restore(distributed.broadcast(seen))

    def _roll_back(self, step: int, fault: Fault) -> int:
        """Go back to the newest good checkpoint, without the samples of the steps at fault; returns its step.

        Raises:
            ValueError: the run went back as often as the recipe allows, or there is no checkpoint.
        """
        started = time.perf_counter()
        self._phase(f"rollback at step {step}")
        may = self.rollbacks < self.recipe.divergence.rollbacks
        self.saver.finish()  # what is read here is the newest that is committed
        with self.uncompiled():
            loaded = self.load() if may else None
        if loaded is None:
            why = "there is no checkpoint to go back to"
            if not may:
                why = f"divergence.rollbacks allows no more after {self.rollbacks} of them; the checkpoints are good"
            if self.owner is not None:
                self.owner.write_event("diverged", step=step, reason=f"{fault.reason}; {why}")
            raise ValueError(
                f"step {step}: {fault.reason}, and {why}. The run stops: lower optimizer.learning_rate, lengthen "
                f"optimizer.warmup_steps, or look at the samples of these steps"
            )
        saved, proof = loaded[0].step, loaded[1]
        steps = max(fault.first_step, saved + 1), step
        samples = self.batches.positions.of_steps(*steps)
        self.batches.leave_out(samples)
        self.rollbacks += 1
        self._loaded_step = self.saver.committed_step = saved
        if self.owner is not None and self.metrics is not None:
            # the samples first: a kill between the two must not bring them back
            self.owner.write_event("samples skipped", first=samples[0], end=samples[1], steps=steps)
            seconds = time.perf_counter() - started
            self.owner.write_event(
                "rollback", step=saved, steps_lost=step - saved, reason=fault.reason, seconds=seconds, proof=proof
            )
            self.metrics.rewind(saved)
            print(
                f"step {step}: {fault.reason}. The run goes back to step {saved} and leaves out samples {samples[0]:,} "
                f"to {samples[1] - 1:,}, those of steps {steps[0]} to {steps[1]}",
                flush=True,
            )
        self._restore_watch()
        return saved

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Logits [rows, tokens, vocabulary] of int64 [rows, tokens] each, by the engine in its present mode.

        Without a cache and without an attention mask transformers keeps documents apart by their positions; with either
        of the two it would not.
        """
        return self.engine(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits

    def _record(
        self,
        step: int,
        loss: float,
        target_tokens: int,
        learning_rate: float,
        seconds: float,
        phases: dict[str, float],
        everyone: np.ndarray,
    ) -> Record:
        if not self.ranks.is_first:
            return {}
        tokens = self.recipe.train.global_batch_tokens
        flops = tokens / seconds * self.flops_per_token
        # on a busy machine the peak may have been measured too low: what was reached is a lower bound of it
        self.peak_flops = max(self.peak_flops, flops)
        busy = everyone[:, 2]
        for rank, ratio in self._stragglers.observe(busy):
            self._report_straggler(step, rank, ratio)
        return {
            "train/loss": loss,
            "train/gradient_norm": distributed.gradient_norm(self.engine),
            "train/learning_rate": learning_rate,
            "train/tokens": step * tokens,
            "train/target_tokens": target_tokens,
            "train/skipped_steps": self.engine.skipped_steps,
            "train/loss_scale": distributed.loss_scale(self.engine),
            "performance/tokens_per_second": tokens / seconds,
            "performance/model_flops_utilization": flops / self.peak_flops if flops else None,
            "performance/step_seconds": seconds,
            **_named(phases),
            "performance/data_wait_seconds": float(everyone[:, 4].max()),
            "performance/checkpoint_stall_seconds": float(everyone[:, 5].max()),
            "performance/communication_bytes": self.clock.take_bytes(),
            "performance/slowest_rank_ratio": float(busy.max() / busy.mean()) if busy.any() else None,
            "checkpoint/seconds_since_commit": time.monotonic() - self.saver.committed_at,
            "checkpoint/bytes": self.saver.size_bytes,
            "checkpoint/failed_saves": self.saver.failed_saves,
            "run/restarts": self.restarts,
            "run/rollbacks": self.rollbacks,
            "memory/peak_gib": float(everyone[:, 3].max()),
            **host_metrics(self.run),
            "sample_digest": self.batches.digest(step),
        }

    def _can_go_back(self) -> bool:
        return self._loaded_step > 0 or self.saver.committed_step > 0 or self.saver.begun_step is not None

    def _report_straggler(self, step: int, rank: int, ratio: float) -> None:
        assert self.owner is not None
        beat = read_beat(self.run, self.owner.generation, rank)
        host = beat.host if beat is not None else "an unknown host"
        self.owner.note_event("straggler", step=step, rank=rank, host=host, ratio=ratio)
        print(
            f"warning: rank {rank} on {host} needed {ratio:.1f} times the others' median for its part of the last "
            f"{STRAGGLER_STEPS} steps, and they wait for it: see what else runs there",
            flush=True,
        )

    def _is_due(self, step: int, every_steps: int | None) -> bool:
        return step == self._stop_at or (every_steps is not None and step % every_steps == 0)

    def _phase(self, phase: str, step: int | None = None) -> None:
        """Tell the heartbeat that this rank goes on; every rank calls this in the same order."""
        if self.heartbeat is not None:
            self.heartbeat.progress(phase, step)

    def _save(self, step: int, evaluation: Evaluation | None) -> None:
        """Begin the checkpoint of `step`; the last one of a run is also finished."""
        self._phase(f"checkpoint at step {step}")
        greedy = evaluation.greedy if evaluation is not None else None
        loss = evaluation.loss if evaluation is not None else None
        self.saver.begin(step, self.engine.skipped_steps, self.batches.positions, greedy, loss)
        if step == self._stop_at:
            self._finish_save(step)
        elif not self.saver.probe_from_training:
            self._run_probe(step)

    def _finish_save(self, step: int) -> None:
        """Wait for the run's last checkpoint, that of `step`. Raises ValueError when it cannot be written."""
        self._phase(f"checkpoint at step {step}")
        if self.saver.needs_probe:
            self._run_probe(step)
        self.saver.finish()
        if self.saver.committed_step != step:
            raise ValueError(
                f"the last checkpoint, of step {step}, could not be written: make room and start the run again"
            )

    @torch.no_grad()
    def _run_probe(self, step: int) -> None:
        """The probe of the save of `step` by a forward of its own."""
        with self.clock.phase("checkpoint_stall"):
            self.engine.eval()
            row = self.batches.first_row(step + 1)
            with self.uncompiled():
                logits = self.forward(row.input_ids, row.position_ids)
        self.saver.give_probe(logits, row)


def _named(phases: dict[str, float]) -> Record:
    return {TAGS[name]: seconds for name, seconds in phases.items()}
