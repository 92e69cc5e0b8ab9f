"""The process group and the DeepSpeed engine: the only owner of torch.distributed and deepspeed calls.

What the rest of `gpt` needs from them is a small function here, so that a reader finds every collective in this file.
"""

import contextlib
import datetime
import io
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from transformers.integrations import HfDeepSpeedConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's states of a parameter's shape, by torch's names."""


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
        timeout = datetime.timedelta(seconds=timeout_seconds)
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
    """What must stay alive while transformers builds a ZeRO-3 model (it is held by a weak reference only)."""
    return HfDeepSpeedConfig(config)


def mark_leaf_modules(model: torch.nn.Module, layers: Sequence[torch.nn.Module]) -> None:
    """Gather each decoder layer as a whole: fewer, larger all-gathers, and no ZeRO hooks inside a layer."""
    deepspeed.utils.set_z3_leaf_modules(model, sorted({type(layer) for layer in layers}, key=lambda cls: cls.__name__))


def initialize_engine(model: torch.nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """The DeepSpeed engine around model and optimizer."""
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Learning rate of the next optimizer step, in every parameter group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


class ShardedState:
    """This rank's part of parameters and optimizer state under ZeRO-3.

    Rank r of w holds elements [r*c, min(n, (r+1)*c)) of every flattened parameter of n elements, c = ceil(n / w);
    the tail is padded with zeros.
    """

    def __init__(self, engine: Any, ranks: Ranks) -> None:
        self._engine = engine
        self._optimizer = engine.optimizer
        self._ranks = ranks
        self.parameters: dict[str, Any] = dict(engine.module.named_parameters())

    def shape(self, name: str) -> list[int]:
        """Full shape of a parameter."""
        return list(self.parameters[name].ds_shape)

    def group(self, name: str) -> int:
        """Index of the parameter's optimizer group."""
        identity = self.parameters[name].ds_id
        for sub_group, parameters in enumerate(self._optimizer.fp16_groups):
            if any(p.ds_id == identity for p in parameters):
                return int(self._optimizer.sub_group_to_group_id[sub_group])
        raise AssertionError(f"{name} is in no optimizer group")

    def range(self, name: str) -> tuple[int, int]:
        """(start, count) of this rank's elements."""
        elements = self.parameters[name].ds_numel
        size = -(-elements // self._ranks.world_size)
        start = min(self._ranks.rank * size, elements)
        return start, min(size, elements - start)

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, for their scalars."""
        return list(self._optimizer.param_groups)

    def buffers(self) -> dict[str, torch.Tensor]:
        """Persistent buffers, which ZeRO keeps whole on every rank."""
        module = self._engine.module
        persistent = set(module.state_dict().keys()) - set(self.parameters)
        return {name: buffer for name, buffer in module.named_buffers() if name in persistent}

    def ensure_moments(self) -> None:
        """Create AdamW's state where no step was made yet; every flat group gets a `step` tensor of its own."""
        state = self._optimizer.optimizer.state
        for flat in self._optimizer.fp32_partitioned_groups_flat:
            if "step" not in state[flat]:
                state[flat]["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
                for moment in MOMENTS:
                    state[flat][moment] = torch.zeros_like(flat)

    def read(self, name: str, state: str) -> torch.Tensor:
        """This rank's elements, fp32 1-D without padding; `state` is "fp32" or one of MOMENTS."""
        parameter = self.parameters[name]
        value: torch.Tensor
        if state == "fp32":
            value = safe_get_local_fp32_param(parameter)
        else:
            value = safe_get_local_optimizer_state(parameter, state)
        return value.detach().flatten()[: self.range(name)[1]]

    def write(self, name: str, state: str, value: torch.Tensor) -> None:
        """Set this rank's elements (the inverse of `read`). Only inside `loading`."""
        parameter = self.parameters[name]
        padded = torch.zeros(parameter.ds_tensor.numel(), dtype=torch.float32, device=self._ranks.device)
        padded[: len(value)] = value
        if state == "fp32":
            safe_set_local_fp32_param(parameter, padded)
            parameter.ds_tensor.data.copy_(padded)  # DeepSpeed does not touch the training-dtype copy
        else:
            safe_set_local_optimizer_state(parameter, padded, state)

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """While parameters are set: those that ZeRO keeps whole are partitioned before and gathered again after."""
        self.ensure_moments()
        self._optimizer.checkpoint_event_prologue()
        try:
            with torch.no_grad():
                yield
        finally:  # a collective: a rank that met a damaged file must not leave the others waiting in it
            self._optimizer.checkpoint_event_epilogue()

    def optimizer_steps(self) -> list[int]:
        """Updates that each optimizer group has had (skipped steps do not count)."""
        steps = [0] * len(self._optimizer.param_groups)
        for sub_group, flat in enumerate(self._optimizer.fp32_partitioned_groups_flat):
            state = self._optimizer.optimizer.state[flat]
            steps[self._optimizer.sub_group_to_group_id[sub_group]] = (
                int(state["step"].item()) if "step" in state else 0
            )
        return steps

    def set_optimizer_steps(self, steps: Sequence[int]) -> None:
        """Set each group's count of updates, from which AdamW computes its bias correction."""
        for sub_group, flat in enumerate(self._optimizer.fp32_partitioned_groups_flat):
            step = steps[self._optimizer.sub_group_to_group_id[sub_group]]
            self._optimizer.optimizer.state[flat]["step"].fill_(float(step))

    def loss_scaler(self) -> dict[str, float]:
        """The numbers of the dynamic fp16 loss scale; empty in other precisions."""
        scaler = self._optimizer.loss_scaler
        names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
        dynamic = getattr(self._optimizer, "dynamic_loss_scale", False)
        return {name: getattr(scaler, name) for name in names if hasattr(scaler, name)} if dynamic else {}

    def set_loss_scaler(self, numbers: dict[str, float]) -> None:
        """Set what `loss_scaler` gave."""
        for name, value in numbers.items():
            setattr(self._optimizer.loss_scaler, name, value)


def loss_scale(engine: Any) -> float:
    """The factor by which fp16 losses are scaled; 1 in other precisions."""
    return float(engine.optimizer.loss_scale)


def gradient_norm(engine: Any) -> float:
    """L2 norm of the last step's gradient over all parameters and ranks, before clipping."""
    return float(engine.get_global_grad_norm())


def gather_objects(value: Any, ranks: Ranks) -> list[Any]:
    """Every rank's value, in the order of ranks, on each rank."""
    everyone: list[Any] = [None] * ranks.world_size
    torch.distributed.all_gather_object(everyone, value)
    return everyone


def supports_fp16() -> bool:
    """Whether the device computes in fp16 as far as DeepSpeed knows."""
    return bool(deepspeed.accelerator.get_accelerator().is_fp16_supported())
