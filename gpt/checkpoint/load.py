"""Loading a checkpoint into a running engine, at any world size."""

import torch

from gpt.checkpoint.read import CheckpointReader
from gpt.distributed import Ranks, ShardedState


def load_into_engine(reader: CheckpointReader, state: ShardedState, *, weights_only: bool) -> None:
    """Set this rank's fragments of every parameter, and of its optimizer state unless `weights_only`.

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
    kinds = ["fp32"] if weights_only else manifest.optimizer.states
    with state.loading():
        for name in state.parameters:
            start, count = state.range(name)
            for kind in kinds:
                state.write(name, kind, reader.read_range(kind, name, start, count))
        for name, buffer in buffers.items():
            buffer.copy_(reader.read_buffer(name))
    if not weights_only:
        state.set_optimizer_steps([group.step for group in manifest.optimizer.groups])
        state.set_loss_scaler(manifest.optimizer.loss_scaler)


def restore_random_state(reader: CheckpointReader, ranks: Ranks, seed: int) -> None:
    """The random state of this rank at the checkpoint; at another world size a new one from seed, step and rank."""
    if reader.manifest.world_size != ranks.world_size:
        torch.manual_seed((seed * 1_000_003 + reader.manifest.step) * 1_000_003 + ranks.rank)
        return
    torch.set_rng_state(reader.read_rng(ranks.rank))
    if ranks.device.type == "cuda":
        torch.cuda.set_rng_state(reader.read_rng(ranks.rank, "torch_cuda"), ranks.device)
