"""Loading a checkpoint into a running engine, at any world size."""

import torch

from gpt.checkpoint.read import CheckpointReader
from gpt.distributed import Ranks, ShardedState


def load_into_engine(reader: CheckpointReader, state: ShardedState, *, weights_only: bool) -> None:
    """Set this rank's fragments of every parameter, and of its optimizer state unless `weights_only`.

    With `weights_only`, other parameters may be frozen than in the run that wrote it.

    Only the blocks that hold this rank's elements are read, and each is verified.

    Raises:
        ValueError: the checkpoint's parameters or buffers are not the model's, or a block is damaged.
    """
    manifest = reader.manifest
    stored = {entry.name: entry.shape for entry in manifest.parameters}
    wanted = {name: state.shape(name) for name in state.parameters}
    if stored != wanted:
        names = sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))
        raise ValueError(
            f"checkpoint {reader.directory} does not fit the model: {len(names)} parameters differ, the first is "
            f"{names[0]} with shape {stored.get(names[0])} in the checkpoint and {wanted.get(names[0])} in the model"
        )
    buffers = state.buffers()
    if sorted(buffers) != sorted(manifest.buffers):
        raise ValueError(f"checkpoint {reader.directory} has buffers {manifest.buffers}, the model {sorted(buffers)}")
    groups = {entry.name: entry.group for entry in manifest.parameters}
    if not weights_only and (manifest.optimizer.type, groups) != (
        state.optimizer_type(),
        {name: state.group(name) for name in state.parameters},
    ):
        raise ValueError(
            f"checkpoint {reader.directory} does not fit the run: its optimizer is {manifest.optimizer.type}, "
            f"the run's {state.optimizer_type()}, or other parameters are frozen"
        )
    if not weights_only:
        state.forget_optimizer()
    with state.loading():
        for entry in sorted(manifest.parameters, key=lambda e: e.group is None):  # as they lie in the files
            start, count = state.range(entry.name)
            weights = "frozen" if state.group(entry.name) is None else "fp32"
            state.write(entry.name, weights, reader.read_range(entry.weights, entry.name, start, count))
            for kind in [] if weights_only else manifest.states_of(entry)[1:]:
                state.write(entry.name, kind, reader.read_range(kind, entry.name, start, count))
        for name, buffer in buffers.items():
            buffer.copy_(reader.read_buffer(name))
    if not weights_only:
        state.set_scalars([group.scalars for group in manifest.optimizer.groups])
        state.set_loss_scaler(manifest.optimizer.loss_scaler)


def restore_random_state(reader: CheckpointReader, ranks: Ranks, seed: int) -> None:
    """The random state of this rank at the checkpoint; at another world size a new one from seed, step and rank."""
    if reader.manifest.world_size != ranks.world_size:
        torch.manual_seed((seed * 1_000_003 + reader.manifest.step) * 1_000_003 + ranks.rank)
        return
    torch.set_rng_state(reader.read_rng(ranks.rank))
    if ranks.device.type == "cuda":
        torch.cuda.set_rng_state(reader.read_rng(ranks.rank, "torch_cuda"), ranks.device)
