"""The process group and the DeepSpeed engine: the only owner of torch.distributed and deepspeed calls.

What the rest of `gpt` needs from them is a small function here, so that a reader finds every collective in this file.
"""

import contextlib
import io
import json
import logging
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from transformers.integrations import HfDeepSpeedConfig

from gpt.phase_clock import PhaseClock
from gpt.run_directory import NotMetError

COLLECTIVES = (
    *("all_gather", "all_gather_into_tensor", "all_gather_coalesced", "reduce_scatter", "reduce_scatter_tensor"),
    *("all_reduce", "reduce", "broadcast", "all_to_all_single"),
)
"""Of DeepSpeed's backend, by which ZeRO calls them."""


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of the run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes the run directory."""
        return self.rank == 0


class Meeting:
    """What ranks tell one another before they are a process group: by the store of the launcher's agent, which all of
    them reach. Values are JSON.

    Args:
        timeout_seconds: how long a rank waits for another one's word.
    """

    def __init__(self, timeout_seconds: float) -> None:
        variables = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
        numbers = [int(os.environ[name]) for name in variables]
        self.rank, self.world_size, self.local_rank, self.local_ranks, self.node, self.nodes = numbers
        self._timeout_seconds = timeout_seconds
        place, timeout = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timedelta(seconds=timeout_seconds)
        store = torch.distributed.TCPStore(*place, is_master=False, timeout=timeout, wait_for_workers=False)
        self._store = torch.distributed.PrefixStore("meeting", store)

    @property
    def asked_ranks(self) -> int:
        """Ranks of the whole run, as the launcher of this host was told."""
        return self.local_ranks * self.nodes

    def tell(self, name: str, value: Any, of: int) -> None:
        """Say something once, under a name and a number (of a rank or of a host)."""
        self._store.set(f"{name}/{of}", json.dumps(value))

    def hear(self, name: str, of: int) -> Any:
        """What was or will be told under that name and number. Raises NotMetError when nobody does."""
        try:
            return json.loads(self._store.get(f"{name}/{of}"))
        except torch.distributed.DistError as error:
            raise NotMetError(
                f"nothing was heard of the {name} of number {of} in {self._timeout_seconds:.0f} s: {error}"
            ) from error

    def collect(self, name: str, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks, on rank 0; an empty list on the others, which do not wait."""
        self.tell(name, value, self.rank)
        return [self.hear(name, rank) for rank in range(self.world_size)] if self.rank == 0 else []

    def broadcast(self, name: str, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.rank == 0:
            self.tell(name, value, 0)
        return self.hear(name, 0)


def start(timeout_seconds: float = 1800.0) -> Ranks:
    """Join the process group that torchrun's environment variables describe: NCCL for CUDA devices, else gloo.

    A collective that takes longer than `timeout_seconds` fails; the launcher's watch for hangs should come first.
    """
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 deprecates; the warning would come at every call site
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    with contextlib.redirect_stdout(io.StringIO()):  # every rank would print that an extension was built
        timeout = timedelta(seconds=timeout_seconds)
        deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False, timeout=timeout)
    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)


def stop() -> None:
    """Leave the process group; called on a normal end only, since a failed rank must not wait for the others."""
    torch.distributed.destroy_process_group()


def broadcast(value: Any) -> Any:
    """Rank 0's value, on every rank. The value is one that this program made, pickled between its own processes."""
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather_floats(values: Sequence[float], ranks: Ranks) -> np.ndarray:
    """Every rank's values, float64 [world_size, len(values)], the same on each rank (so that sums of them are, too)."""
    mine = torch.tensor(values, dtype=torch.float64, device=ranks.device)
    everyone = torch.empty(ranks.world_size * len(values), dtype=torch.float64, device=ranks.device)
    torch.distributed.all_gather_into_tensor(everyone, mine)
    return everyone.view(ranks.world_size, len(values)).cpu().numpy()


def zero_config(config: dict[str, Any]) -> Any:
    """What must stay alive while transformers builds a ZeRO-3 model (it is held by a weak reference only).

    Its `is_zero3()` tells `build_model` the stage.
    """
    return HfDeepSpeedConfig(config)


def mark_leaf_modules(model: torch.nn.Module, layers: Sequence[torch.nn.Module]) -> None:
    """Gather each decoder layer as a whole: fewer, larger all-gathers, and no ZeRO hooks inside a layer."""
    deepspeed.utils.set_z3_leaf_modules(model, sorted({type(layer) for layer in layers}, key=lambda cls: cls.__name__))


def initialize_engine(model: torch.nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """The DeepSpeed engine around model and optimizer."""
    _import_muon_uncompiled()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def _import_muon_uncompiled() -> None:
    """DeepSpeed asks each optimizer whether it is its Muon, whose module imports torch's whole compiler to decorate a
    function: two seconds of every start, for an optimizer that no recipe has."""
    if "TORCHDYNAMO_DISABLE" not in os.environ:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # the decorator reads it
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

        del os.environ["TORCHDYNAMO_DISABLE"]


def watch_collectives(clock: PhaseClock) -> None:
    """From now on DeepSpeed's collectives tell the clock their bytes, and how long this rank waits in them."""
    backend = deepspeed.comm.comm.cdb
    for name in COLLECTIVES:
        setattr(backend, name, clock.watched(getattr(backend, name)))


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Learning rate of the next optimizer step, in every parameter group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


@dataclass(frozen=True)
class Fragment:
    """Where this rank keeps its elements [start, start + count) of a flattened parameter: at `offset` of `storage`.

    A trained parameter's storage is a flat fp32 tensor of its optimizer group, beside which the optimizer keeps states
    of the same size; a frozen one's (group None) is the parameter's own memory, in the training dtype.
    """

    start: int
    count: int
    group: int | None
    storage: torch.Tensor
    offset: int


class ShardedState:
    """This rank's part of parameters and optimizer state under ZeRO 1, 2 or 3.

    At stage 3, rank r of w holds elements [r*c, min(n, (r+1)*c)) of every flattened parameter of n elements,
    c = ceil(n / w). At stages 1 and 2 each optimizer group is one flat tensor that is cut into w equal parts, so that a
    rank may hold all, a part or nothing of a parameter; frozen ones, whole on every rank, are dealt as at stage 3.

    With `trained_only` the frozen ones, which come from elsewhere at each start, are no part of it.

    Nothing but `loading` is a collective. What `read` gives changes with the next update of the weights, not before.
    """

    def __init__(self, engine: Any, ranks: Ranks, *, trained_only: bool = False) -> None:
        self._engine = engine
        self._optimizer = engine.optimizer
        self._ranks = ranks
        self.zero_stage = int(engine.zero_optimization_stage())
        named = engine.module.named_parameters()
        self.parameters: dict[str, Any] = {n: p for n, p in named if p.requires_grad or not trained_only}
        trained = self._fragments_of_stage_3() if self.zero_stage == 3 else self._fragments_of_stages_1_and_2()
        self._fragments = {
            name: trained[id(p)] if id(p) in trained else self._frozen_fragment(p)
            for name, p in self.parameters.items()
        }
        for name, fragment in self._fragments.items():
            copy = self._training_copy(name)
            if fragment.group is not None and not torch.equal(self.read(name, "fp32").to(copy), copy):
                raise AssertionError(f"DeepSpeed keeps {name} at another place than expected")

    def _fragments_of_stage_3(self) -> dict[int, Fragment]:
        fragments = {}
        optimizer = self._optimizer
        flats = zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
        for sub_group, (parameters, flat) in enumerate(flats):
            offset = 0
            for parameter in parameters:
                start, count = self._even_share(parameter.ds_numel)
                group = int(optimizer.sub_group_to_group_id[sub_group])
                fragments[id(parameter)] = Fragment(start, count, group, flat, offset)
                offset += parameter.ds_tensor.numel()
        return fragments

    def _fragments_of_stages_1_and_2(self) -> dict[int, Fragment]:
        fragments = {}
        groups = getattr(self._optimizer, "bit16_groups", None) or self._optimizer.bf16_groups  # by DeepSpeed's class
        for group, parameters in enumerate(groups):
            [flat] = self._optimizer.param_groups[group]["params"]
            for parameter in parameters:
                mapping = parameter._hp_mapping
                if mapping is None:  # all of it is on other ranks
                    fragments[id(parameter)] = Fragment(0, 0, group, flat, 0)
                else:
                    place, offset = mapping.lp_fragment_address, mapping.get_hp_fragment_address().start
                    fragments[id(parameter)] = Fragment(place.start, place.numel, group, flat, offset)
        return fragments

    def _frozen_fragment(self, parameter: Any) -> Fragment:
        if self.zero_stage == 3:
            return Fragment(*self._even_share(parameter.ds_numel), None, parameter.ds_tensor, 0)
        start, count = self._even_share(parameter.numel())
        return Fragment(start, count, None, parameter, start)

    def _even_share(self, elements: int) -> tuple[int, int]:
        size = -(-elements // self._ranks.world_size)
        start = min(self._ranks.rank * size, elements)
        return start, min(size, elements - start)

    def _training_copy(self, name: str) -> torch.Tensor:
        """This rank's elements in the training dtype, as the forward pass uses them."""
        parameter, fragment = self.parameters[name], self._fragments[name]
        if self.zero_stage == 3:
            return parameter.ds_tensor.detach()[: fragment.count]
        return parameter.detach().view(-1)[fragment.start : fragment.start + fragment.count]

    def shape(self, name: str) -> list[int]:
        """Full shape of a parameter."""
        parameter = self.parameters[name]
        return list(getattr(parameter, "ds_shape", parameter.shape))

    def group(self, name: str) -> int | None:
        """Index of the parameter's optimizer group; None for a frozen one."""
        return self._fragments[name].group

    def range(self, name: str) -> tuple[int, int]:
        """(start, count) of this rank's elements."""
        return self._fragments[name].start, self._fragments[name].count

    def optimizer_type(self) -> str:
        """The optimizer's class in lower case: the recipe's `optimizer.type`."""
        return type(self._optimizer.optimizer).__name__.lower()

    def groups(self) -> list[dict[str, Any]]:
        """Each optimizer group's settings, by torch's names, without its parameters."""
        return [{k: v for k, v in group.items() if k != "params"} for group in self._optimizer.param_groups]

    def buffers(self) -> dict[str, torch.Tensor]:
        """Persistent buffers, which ZeRO keeps whole on every rank."""
        module = self._engine.module
        persistent = set(module.state_dict().keys()) - set(self.parameters)
        return {name: buffer for name, buffer in module.named_buffers() if name in persistent}

    def states_of(self, name: str) -> list[str]:
        """What there is to be read of a parameter: "frozen", or "fp32" (the master weight) and, after the first update,
        the optimizer's states of the parameter's size by torch's names."""
        storage = self._fragments[name].storage
        if self.group(name) is None:
            return ["frozen"]
        state = self._optimizer.optimizer.state.get(storage, {})
        return ["fp32", *(k for k, v in state.items() if torch.is_tensor(v) and v.shape == storage.shape)]

    def read(self, name: str, state: str) -> torch.Tensor:
        """This rank's elements of one of `states_of(name)`, 1-D: a view, fp32, or in the training dtype if frozen."""
        return self._storage(name, state)

    def write(self, name: str, state: str, value: torch.Tensor) -> None:
        """Set this rank's elements (the inverse of `read`). Only inside `loading`."""
        self._storage(name, state).copy_(value)
        if state == "fp32" and self.zero_stage == 3:  # at the others `loading` does it for all at once
            self._training_copy(name).copy_(value)

    def _storage(self, name: str, state: str) -> torch.Tensor:
        fragment = self._fragments[name]
        whole = fragment.storage
        if state not in ("fp32", "frozen"):
            states = self._optimizer.optimizer.state[whole]
            if state not in states:  # no update was made yet, before which torch has no states
                states[state] = torch.zeros_like(whole)
            whole = states[state]
        return whole.detach().view(-1)[fragment.offset : fragment.offset + fragment.count]

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """While parameters are set; afterwards the weights of the forward pass are the ones that were set."""
        if self.zero_stage == 3:
            self._optimizer.checkpoint_event_prologue()
        try:
            with torch.no_grad():
                yield
        finally:  # collectives: a rank that met a damaged file must not leave the others waiting in one
            if self.zero_stage == 3:
                self._optimizer.checkpoint_event_epilogue()
            else:
                self._optimizer.update_lp_params()
                self._gather_frozen()

    @torch.no_grad()
    def _gather_frozen(self) -> None:
        for name in (n for n in self.parameters if self.group(n) is None):
            whole = self.parameters[name].view(-1)
            mine = whole.new_zeros(-(-whole.numel() // self._ranks.world_size))
            mine[: self.range(name)[1]] = self.read(name, "frozen")
            everyone = whole.new_empty(len(mine) * self._ranks.world_size)
            torch.distributed.all_gather_into_tensor(everyone, mine)
            whole.copy_(everyone[: whole.numel()])

    def _states_by_group(self) -> Iterator[tuple[int, torch.Tensor, dict[str, Any]]]:
        """Each flat tensor: (optimizer group, the tensor, its optimizer state)."""
        flats = {id(f.storage): f for f in self._fragments.values() if f.group is not None}
        for fragment in flats.values():
            assert fragment.group is not None
            yield fragment.group, fragment.storage, self._optimizer.optimizer.state[fragment.storage]

    def scalars(self) -> list[dict[str, float]]:
        """Each optimizer group's numbers by torch's names: "step", the updates that it has had (skipped ones do not
        count), and what else the optimizer keeps. Empty before the first update."""
        result: list[dict[str, float]] = [{} for _ in self._optimizer.param_groups]
        for group, flat, state in self._states_by_group():
            for name, value in state.items():
                if isinstance(value, int | float) or (torch.is_tensor(value) and value.shape != flat.shape):
                    result[group][name] = float(value)
        return result

    def optimizer_steps(self) -> list[int]:
        """Updates that each optimizer group has had (skipped steps do not count); empty where none are counted."""
        return [int(scalars["step"]) for scalars in self.scalars() if "step" in scalars]

    def forget_optimizer(self) -> None:
        """Make the optimizer's state what it is before the first update: none."""
        for _, _, state in self._states_by_group():
            state.clear()

    def set_scalars(self, scalars: Sequence[dict[str, float]]) -> None:
        """Set what `scalars` gave; every flat tensor gets numbers of its own."""
        for group, flat, state in self._states_by_group():
            options = self._optimizer.param_groups[group]
            on_device = options.get("fused") or options.get("capturable")  # where torch looks for them
            for name, value in scalars[group].items():
                state[name] = torch.tensor(value, dtype=torch.float32, device=flat.device if on_device else "cpu")

    def loss_scaler(self) -> dict[str, float]:
        """The numbers of the dynamic fp16 loss scale; empty in other precisions."""
        names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
        if not getattr(self._optimizer, "dynamic_loss_scale", False):
            return {}
        scaler = self._optimizer.loss_scaler
        return {name: getattr(scaler, name) for name in names if hasattr(scaler, name)}

    def set_loss_scaler(self, numbers: dict[str, float]) -> None:
        """Set what `loss_scaler` gave."""
        for name, value in numbers.items():
            setattr(self._optimizer.loss_scaler, name, value)


def loss_scale(engine: Any) -> float:
    """The factor by which fp16 losses are scaled; 1 in other precisions."""
    return float(getattr(engine.optimizer, "loss_scale", 1.0))  # DeepSpeed's BF16_Optimizer has none


def gradient_norm(engine: Any) -> float:
    """L2 norm of the last step's gradient over all parameters and ranks, before clipping."""
    return float(engine.get_global_grad_norm())


def gradient_square(engine: Any) -> float:
    """Sum of squares, in fp32, of this rank's part of the reduced gradient, before the update; not finite if it is not.

    The parts of all ranks make the whole. In fp16 the gradient still carries the loss scale.
    """
    squares = [torch.linalg.vector_norm(g, dtype=torch.float32).square() for g in _gradients(engine.optimizer)]
    return float(torch.stack(squares).sum()) if squares else 0.0


def _gradients(optimizer: Any) -> list[torch.Tensor]:
    """This rank's part of the gradient: where each of DeepSpeed's optimizers holds it between backward and update."""
    if isinstance(optimizer, BF16_Optimizer):  # stage 1 in bf16
        return list(optimizer.get_grads_for_norm(for_clipping=True))
    third = hasattr(optimizer, "fp32_partitioned_groups_flat")
    if optimizer.offload_optimizer if third else optimizer.cpu_offload:
        if not third:
            optimizer._wait_for_offload_copies()
        flats = optimizer.fp32_partitioned_groups_flat if third else optimizer.single_partition_of_fp32_groups
        return [flat.grad for flat in flats]
    return [g for group in optimizer.averaged_gradients.values() for g in group or () if g is not None]


def discard_gradients(engine: Any) -> None:
    """End an optimizer step without an update: weights, moments and loss scale stay, `engine.skipped_steps` grows by 1.

    DeepSpeed's optimizers do this when their own check, which not all of them make in every precision, finds an
    overflow; here it is told to find one.
    """
    optimizer = engine.optimizer

    def overflow(*_: Any, **__: Any) -> None:
        optimizer.overflow = True

    def drop() -> None:
        overflow()
        optimizer._global_grad_norm = float("inf")
        optimizer.clear_hp_grads()
        optimizer.clear_lp_grads()

    if isinstance(optimizer, BF16_Optimizer):
        changed: dict[str, Any] = {"step": drop}
    elif hasattr(optimizer, "fp32_partitioned_groups_flat"):
        changed = {"_overflow_check_and_loss_scale_update": overflow}
    else:
        changed = {"check_grad_overflow": True, "check_overflow": overflow}
    changed["_update_scale"] = lambda *_: None
    kept = {name: vars(optimizer)[name] for name in changed if name in vars(optimizer)}
    vars(optimizer).update(changed)
    try:
        engine.step()
    finally:
        for name in changed:
            del vars(optimizer)[name]
        vars(optimizer).update(kept)


def lower_loss_scale(engine: Any) -> bool:
    """Lower a dynamic fp16 loss scale after an overflow; False where there is none or it is at its minimum."""
    scaler: Any = getattr(engine.optimizer, "loss_scaler", None)
    if not getattr(scaler, "dynamic", False) or scaler.cur_scale <= scaler.min_scale:
        return False
    scaler.update_scale(True)
    return True


def gather_objects(value: Any, ranks: Ranks) -> list[Any]:
    """Every rank's value, in the order of ranks, on each rank."""
    everyone: list[Any] = [None] * ranks.world_size
    torch.distributed.all_gather_object(everyone, value)
    return everyone


def timed_all_reduce(ranks: Ranks, elements: int, repetitions: int) -> tuple[bool, float]:
    """Add up known fp32 numbers over all ranks: (whether every element came out right here, seconds of one time)."""
    # whole numbers below 2^24, so that the sum is exact in any order
    pattern = torch.arange(elements, dtype=torch.float32, device=ranks.device) % 1009
    expected = pattern * ranks.world_size + ranks.world_size * (ranks.world_size - 1) // 2
    right, seconds = True, 0.0
    for _ in range(repetitions):
        mine = pattern + ranks.rank
        torch.distributed.barrier()
        started = time.perf_counter()
        torch.distributed.all_reduce(mine)
        right = bool(torch.equal(mine, expected)) and right  # which waits for a GPU, too
        seconds += time.perf_counter() - started
    return right, seconds / repetitions


def supports_fp16() -> bool:
    """Whether the device computes in fp16 as far as DeepSpeed knows."""
    return bool(deepspeed.accelerator.get_accelerator().is_fp16_supported())


if __name__ == "__main__":  # see launch.prebuild
    start()
    stop()
