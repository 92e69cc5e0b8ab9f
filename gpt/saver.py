"""The run's checkpoints: begun at a step, written in the background, committed by rank 0, known to all ranks.

What a save copies does not change before the next optimizer update, so a thread copies it while the next step runs
forward and backward; the update waits for what is left of the copy. Then the thread writes. Every step's all-gather
carries how each rank's save stands, so that all ranks learn in the same step that it is committed or has failed.
"""

import contextlib
import errno
import math
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gpt import distributed
from gpt.batch import BatchPositions, MicroBatch
from gpt.checkpoint.format import SPARE_BYTES, Greedy, Probe, rank_file_name, temporary_checkpoint_directory
from gpt.checkpoint.probe import make_probe
from gpt.checkpoint.retention import apply_retention
from gpt.checkpoint.write import (
    HostBuffers,
    RankError,
    collect,
    commit,
    fragments,
    give_up_rank,
    optimizer_entry,
    parameter_entries,
    remove_leftovers,
    reserved,
    small_tensors,
    write_rank,
)
from gpt.distributed import Ranks, ShardedState
from gpt.metrics import say
from gpt.optimizer import state_names
from gpt.phase_clock import PhaseClock
from gpt.run_directory import RunDirectory, package_versions

if TYPE_CHECKING:
    from gpt.train import RunPlan

NO_SAVE, UNDER_WAY, DONE = 0.0, 1.0, 2.0
"""How a rank's save stands; rank 0's is DONE when it is committed. A failure is `_failure_code`, which is negative."""
WRITER_NICENESS = 5
RANK_STEP = 4096
"""Of `_failure_code`: more than any errno."""


def _failure_code(rank: int, code: int) -> float:
    return -float(rank * RANK_STEP + code)


def _failure_text(state: float) -> str:
    rank, code = divmod(int(-state), RANK_STEP)
    return f"rank {rank}: {os.strerror(code)}"


@dataclass
class _Save:
    """One save on this rank."""

    step: int
    number: int
    fields: dict[str, Any]
    sources: dict[str, torch.Tensor]
    small: dict[str, torch.Tensor]
    has_room: bool
    greedy: Greedy | None
    began: float
    probe: Probe | None = None
    has_probe: bool = False
    """Whether the forward that the probe is made of has run; known to all ranks, the probe to rank 0 only."""
    state: float = UNDER_WAY
    crash: BaseException | None = None
    copied: threading.Event = field(default_factory=threading.Event)
    probe_ready: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """End it as failed, soon."""
        self.cancelled.set()
        self.probe_ready.set()


class Saver:
    """This rank's saves, one at a time; every rank calls the same methods in the same steps.

    `owner` is rank 0's hold on the run directory, None elsewhere; `sync` brings the metrics to disk, which a commit
    must not be ahead of. With `probe_from_training` the next step's first forward gives the probe for nothing: it runs
    on exactly the saved weights. It must then compute what an evaluation would: no dropout, layers not compiled.
    """

    def __init__(
        self,
        plan: "RunPlan",
        state: ShardedState,
        ranks: Ranks,
        owner: RunDirectory | None,
        generation: int,
        tied: dict[str, str],
        sync: Callable[[], None],
        probe_from_training: bool,
    ) -> None:
        self._plan, self._state, self._ranks, self._owner = plan, state, ranks, owner
        self._generation, self._sync = generation, sync
        self._settings, self._run = plan.recipe.checkpoint, plan.recipe.run_directory()
        self._metric = plan.recipe.evaluate.metric
        self.probe_from_training = probe_from_training
        self._buffers = HostBuffers()
        self._save: _Save | None = None
        self._thread: threading.Thread | None = None
        self._saves = 0
        self._failed_in_a_row = 0
        states = ["fp32", *state_names(plan.recipe.optimizer)]
        self._checkpoint_bytes = sum(
            math.prod(state.shape(name)) * (4 * len(states) if state.group(name) is not None else parameter.itemsize)
            for name, parameter in state.parameters.items()
        )
        self._ranges = [state.range(name) for name in state.parameters]
        self.clock = PhaseClock(ranks.device)
        """Has the seconds for which training has waited for saves; the trainer counts its own phases there, too."""
        self.failed_saves = 0
        self.committed_step = 0
        """Step of the last commit of this start that all ranks know of."""
        self.committed_at = time.monotonic()
        self.size_bytes = 0
        self._fixed: dict[str, Any] = {}
        if owner is not None:
            self._fixed = {
                "world_size": ranks.world_size,
                "zero_stage": state.zero_stage,
                "generation": generation,
                "data_fingerprint": plan.training.fingerprint,
                "data_kind": plan.training.kind,
                "precision": plan.recipe.precision,
                "parameters": parameter_entries(state),
                "buffers": sorted(state.buffers()),
                "tied": tied,
                "model_config": plan.config.to_dict(),
                "recipe": plan.recipe.model_dump(),
                "versions": package_versions(),
            }
        if self._settings.every_steps is not None:
            self._buffers.copy(reserved(state, states))  # their pages are touched now, not at the first save

    @property
    def begun_step(self) -> int | None:
        """Step of the save that is under way."""
        return self._save.step if self._save is not None else None

    @property
    def needs_probe(self) -> bool:
        """Whether a save is under way whose probe is still to come."""
        return self._save is not None and not self._save.has_probe

    def begin(
        self,
        step: int,
        skipped_steps: int,
        positions: BatchPositions,
        greedy: Greedy | None,
        evaluate_loss: float | None,
    ) -> None:
        """Save what the engine holds now. A save that is still under way is awaited first.

        Raises ValueError as `hear` does.
        """
        if self._save is not None:
            self.finish()
        with self._stalling():
            self._join()  # of a save that failed on another rank: it may still read the buffers
            self._saves += 1
            fields: dict[str, Any] = {}
            if self._owner is not None:
                recipe = self._plan.recipe
                fields = self._fixed | {
                    "step": step,
                    "tokens": step * recipe.train.global_batch_tokens,
                    "samples_consumed": positions.first(step + 1),
                    "skipped_samples": positions.skipped,
                    "skipped_steps": skipped_steps,
                    "optimizer": optimizer_entry(self._state),
                    "evaluate_loss": evaluate_loss,
                }
            save = _Save(
                step=step,
                number=self._saves,
                fields=fields,
                sources=fragments(self._state),
                small=small_tensors(self._state, self._ranks.rank, self._ranks.device),
                has_room=self._has_room(),
                greedy=greedy,
                began=time.perf_counter(),
            )
            self._save = save
            self._thread = threading.Thread(target=self._work, args=(save,), name="checkpoint", daemon=True)
            self._thread.start()

    def give_probe(self, logits: torch.Tensor, batch: MicroBatch) -> None:
        """A forward of this rank on the saved weights, its logits [rows, tokens, vocabulary] or those of its first row
        alone; rank 0 records its."""
        save = self._save
        if save is None or save.has_probe:
            return
        with self._stalling():
            save.has_probe = True
            if self._ranks.is_first:
                save.probe = make_probe(logits, batch, save.greedy)
            save.probe_ready.set()

    def wait_copied(self) -> None:
        """Must come before anything changes the fragments."""
        if self._save is not None and not self._save.copied.is_set():
            with self._stalling():
                self._save.copied.wait()

    def state(self) -> float:
        """How this rank's save stands, for `hear` on all ranks. Raises what ended its thread but no OSError: a
        SupersededError, or a defect."""
        if self._save is None:
            return NO_SAVE
        if self._save.crash is not None:
            raise self._save.crash
        return self._save.state

    def hear(self, states: np.ndarray) -> None:
        """Learn from all ranks' `state()`, the same on every rank, whether the save under way has ended.

        Raises ValueError when too many saves in a row have failed.
        """
        save = self._save
        if save is None:
            return
        if states[0] == DONE:
            self._save, self._failed_in_a_row, self.committed_step = None, 0, save.step
            return
        failures = sorted({float(state) for state in states if state < 0}, reverse=True)
        if not failures:
            return
        save.cancel()
        save.copied.wait()
        self._save = None
        assert self._thread is not None
        self._thread = threading.Thread(target=self._clear, args=(self._thread, save), name="clear", daemon=True)
        self._thread.start()
        self.failed_saves += 1
        self._failed_in_a_row += 1
        errors = [_failure_text(failure) for failure in failures]
        message = f"the checkpoint of step {save.step} could not be written: {'; '.join(errors)}"
        if self._owner is not None:
            self._owner.note_event("checkpoint failed", step=save.step, errors=errors)
            say(f"warning: {message}. The earlier ones are untouched")
        if self._failed_in_a_row >= self._settings.max_failed_saves:
            raise ValueError(
                f"{message}. It was the last of {self._failed_in_a_row} saves in a row that failed "
                f"(checkpoint.max_failed_saves): the run stops. Make room and start it again"
            )

    def finish(self) -> None:
        """Wait until the save under way is committed or has failed, and tell all ranks. Its probe must have come.

        Raises ValueError as `hear` does.
        """
        if self._save is None:
            return
        assert self._save.has_probe
        with self._stalling():
            self._join()
            self.hear(distributed.gather_floats([self.state()], self._ranks)[:, 0])

    def leave(self) -> None:
        """Before an error ends the run: let the save under way come to its end on this rank, if need be without its
        probe."""
        if self._save is not None:
            self._save.probe_ready.set()
        self._join()

    def _folder(self, save: _Save) -> Path:
        return temporary_checkpoint_directory(self._run, save.step, self._generation)

    def _clear(self, thread: threading.Thread, save: _Save) -> None:
        """When the thread of a failed save has ended: make room for the next."""
        thread.join()
        with contextlib.suppress(OSError):  # another rank's thread may still write into the folder
            (self._folder(save) / rank_file_name(self._ranks.rank)).unlink(missing_ok=True)
            if self._owner is not None:  # of this save only: other ranks may have begun the next
                shutil.rmtree(self._folder(save))

    def _has_room(self) -> bool:
        """Whether the file system takes a whole checkpoint and still some metrics: better to do without one than to
        fill the disk. Asked by all ranks before any of them writes."""
        try:
            return shutil.disk_usage(self._run).free > self._checkpoint_bytes + SPARE_BYTES
        except OSError:
            return True  # the writing will say what is wrong

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _stalling(self) -> contextlib.AbstractContextManager[None]:
        return self.clock.phase("checkpoint_stall")

    def _work(self, save: _Save) -> None:
        """The thread of one save."""
        folder, rank = self._folder(save), self._ranks.rank
        try:
            copies = self._buffers.copy(save.sources)
            save.sources = {}
            save.copied.set()
            with contextlib.suppress(OSError):  # on a CPU the writing must not slow the steps down
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WRITER_NICENESS)
            if self._owner is not None:
                self._owner.note_event("checkpoint begun", step=save.step)
            if not save.has_room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
            RunDirectory(self._run, self._generation).check_ownership()  # other ranks write here, too
            write_rank(folder, rank, save.number, copies | save.small, self._ranges, save.cancelled.is_set)
            if self._owner is not None:
                self._commit(save, folder, self._owner)
            save.state = DONE
        except OSError as error:
            failed_rank = error.rank if isinstance(error, RankError) else rank
            save.state = _failure_code(failed_rank, error.errno or errno.EIO)
            say(f"warning: rank {rank}, checkpoint of step {save.step}: {error}")
            with contextlib.suppress(OSError):
                give_up_rank(folder, rank, save.number, error.errno or errno.EIO)
        except BaseException as error:
            save.crash = error
        finally:
            save.copied.set()

    def _commit(self, save: _Save, folder: Path, owner: RunDirectory) -> None:
        """Rank 0: when all ranks' files are there, commit, and delete what is no longer kept."""
        save.probe_ready.wait()
        sidecars = collect(
            folder,
            self._ranks.world_size,
            save.number,
            self._settings.commit_deadline_seconds,
            save.cancelled.is_set,
        )
        self._sync()
        size = commit(self._run, folder, save.fields | {"probe": save.probe}, sidecars, owner.check_ownership)
        self.size_bytes, self.committed_at = size, time.monotonic()
        seconds = time.perf_counter() - save.began
        owner.note_event("checkpoint committed", step=save.step, bytes=size, seconds=seconds)
        try:
            remove_leftovers(self._run, self._generation)
            done = apply_retention(
                self._run, self._settings, save.step, self._generation, owner.check_ownership, self._metric
            )
            for deed, step in done:
                owner.note_event(deed, step=step)
        except OSError as error:  # the checkpoint is there all the same; the next one's commit tries again
            say(f"warning: old checkpoints of {self._run} could not be deleted: {error}")
