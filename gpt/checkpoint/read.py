"""Reading a checkpoint at any world size and without an engine: any range of any tensor, verified block by block."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gpt.checkpoint.files import VIEW_BLOCKS, FragmentFile, VerifiedFile
from gpt.checkpoint.format import (
    BLOCK_BYTES,
    MANIFEST_NAME,
    DamagedFileError,
    Manifest,
    Precision,
    checkpoint_directory,
    list_checkpoints,
    list_step_folders,
    rank_file_name,
    read_manifest,
)

if TYPE_CHECKING:  # takes two seconds, which a launcher that only checks a recipe need not wait
    from transformers import PreTrainedModel

TORCH_DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NAMES_SHOWN = 6
NORM_TOLERANCE = 1e-10
"""Relative. Norms are summed in float64, over other ranges and so in another order than at the save: for a sum of n
squares that is at most n * 1.1e-16, and for torch's sums in blocks far below 1e-12 at any n that memory holds."""


class CheckpointReader:
    """The tensors of one committed checkpoint. Files are opened when first needed, and only needed blocks are read.

    Raises FileNotFoundError, DamagedFileError or ValueError as `read_manifest` does.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest: Manifest = read_manifest(directory)
        self._files: dict[str, FragmentFile] = {}
        self._indices = {entry.name: index for index, entry in enumerate(self.manifest.parameters)}
        # One block kept per file makes reading in order cheap; two only while that is little memory.
        self._cache_blocks = 2 if len(self.manifest.files) <= 16 else 1
        self._spare: list[memoryview] = []

    @property
    def bytes_read(self) -> int:
        """Bytes taken from the files so far."""
        return sum(file.bytes_read for file in self._files.values())

    @property
    def memory_bytes(self) -> int:
        """What the kept blocks take at most."""
        return (self._cache_blocks * len(self.manifest.files) + VIEW_BLOCKS + 1) * BLOCK_BYTES

    def shape(self, parameter: str) -> tuple[int, ...]:
        """Full shape of a parameter."""
        return tuple(self.manifest.parameters[self.index(parameter)].shape)

    def read_range(self, state: str, parameter: str, start: int, count: int) -> torch.Tensor:
        """Elements `[start, start + count)` of a flattened parameter's `state`, whichever ranks wrote them.

        `state` is one of `manifest.states_of` it (`fp32` is the master weight). Returns fp32 [count].
        """
        total = self.manifest.parameters[self.index(parameter)].elements
        if start < 0 or count < 0 or start + count > total:
            raise ValueError(f"Elements {start} to {start + count} lie outside {parameter}, which has {total}.")
        result = torch.empty(count, dtype=torch.float32)
        position, end = start, start + count
        for first, elements, name in self._fragments(parameter):
            stop = min(end, first + elements)
            if first <= position < stop:
                file = self._checked_file(name, f"{state}/{parameter}", elements)
                file.read_into(f"{state}/{parameter}", position - first, result[position - start : stop - start])
                position = stop
        assert position == end, "the manifest guarantees that fragments cover every parameter"
        return result

    def view(self, state: str, parameter: str, start: int) -> torch.Tensor:
        """The elements of a flattened parameter's `state` from `start` on, as many as one block of a file holds: fp32
        [count]. Nothing is copied: they stay as they are while `VIEW_BLOCKS` more blocks are read, not longer."""
        for first, elements, name in self._fragments(parameter):
            if first <= start < first + elements:
                file = self._checked_file(name, f"{state}/{parameter}", elements)
                return file.view(f"{state}/{parameter}", start - first, first + elements - start).float()
        raise ValueError(f"Element {start} lies outside {parameter}, which has {math.prod(self.shape(parameter))}.")

    def _fragments(self, parameter: str) -> list[tuple[int, int, str]]:
        """(first element, elements, file) of each fragment of a flattened parameter, in order."""
        index = self.index(parameter)
        return sorted((*ranges[index], name) for name, ranges in self.manifest.fragments.items())

    def _checked_file(self, name: str, tensor: str, elements: int) -> FragmentFile:
        file = self._file(name)
        if file.shape(tensor) != (elements,):
            raise DamagedFileError(
                f"{file.path} holds {tensor} with the shape {file.shape(tensor)}, but the manifest says ({elements},)."
            )
        return file

    def read_tensor(self, parameter: str, state: str | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A whole parameter's `state` (its weights by default) in its full shape, rounded from fp32 to `dtype`."""
        shape = self.shape(parameter)
        state = state or self.manifest.parameters[self.index(parameter)].weights
        return self.read_range(state, parameter, 0, math.prod(shape)).to(dtype).reshape(shape)

    def read_rng(self, rank: int, generator: str = "torch_cpu") -> torch.Tensor:
        """State of torch's CPU (or "torch_cuda") generator on `rank` of the run that wrote the checkpoint: uint8."""
        if not 0 <= rank < self.manifest.world_size:
            raise ValueError(
                f"{self.directory} has the states of {self.manifest.world_size} ranks, not of rank {rank}."
            )
        return self._file(rank_file_name(rank)).read(f"rng/{generator}")

    def read_buffer(self, name: str) -> torch.Tensor:
        """A persistent buffer in its own shape and dtype."""
        file, tensor = self._file(min(self.manifest.files)), f"buffer/{name}"
        return file.read(tensor).reshape(file.shape(tensor))

    def check_sizes(self) -> None:
        """Raise DamagedFileError for the first file that is missing or has another size; reads nothing."""
        for name, entry in self.manifest.files.items():
            VerifiedFile(self.directory / name, entry)

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read every block of every file; raises DamagedFileError for the first that is damaged.

        `progress` is called with (bytes done, bytes in all).
        """
        done, total = 0, sum(entry.size_bytes for entry in self.manifest.files.values())
        for name, entry in self.manifest.files.items():
            VerifiedFile(self.directory / name, entry).verify()
            done += entry.size_bytes
            if progress is not None:
                progress(done, total)

    def index(self, parameter: str) -> int:
        """Place of a parameter in `manifest.parameters`."""
        try:
            return self._indices[parameter]
        except KeyError:
            raise ValueError(f"{self.directory} holds no parameter {parameter}.") from None

    def _file(self, name: str) -> FragmentFile:
        if name not in self._files:
            try:
                entry = self.manifest.files[name]
            except KeyError:
                raise DamagedFileError(f"The manifest of {self.directory} lists no file {name}.") from None
            path, kept = self.directory / name, self._cache_blocks
            self._files[name] = FragmentFile(path, entry, cache_blocks=kept, spare=self._spare)
        return self._files[name]


def newest_checkpoint(
    run: Path, *, report: Callable[[str], None], before_step: int | None = None, resumable: bool = False
) -> CheckpointReader | None:
    """The newest checkpoint of a run directory whose manifest and file sizes are right, or None.

    One that holds weights only is passed over where it must be `resumable`.

    A damaged one is passed over for the one before it, with a line to `report`. Blocks are verified when they are read:
    a caller that meets a DamagedFileError then asks again with `before_step`, the step of the damaged checkpoint.
    """
    for step in reversed(list_step_folders(run)):
        if before_step is not None and step >= before_step:
            continue
        try:
            reader = CheckpointReader(checkpoint_directory(run, step))
            reader.check_sizes()
            if not (resumable and reader.manifest.weights_only):
                return reader
            report(f"The checkpoint of step {step} is passed over: it holds weights only, a run cannot resume from it")
        except (DamagedFileError, FileNotFoundError) as error:
            report(f"The checkpoint of step {step} is passed over: {error}")
    return None


def newest_manifest(run: Path) -> Manifest | None:
    """The manifest of the newest checkpoint of a run directory that is not seen to be damaged, or None where there is
    none. Loading says what is passed over."""
    reader = newest_checkpoint(run, report=lambda line: None)
    return reader.manifest if reader else None


def open_checkpoint(run: Path, step: int | None = None) -> CheckpointReader:
    """The checkpoint of `step` of a run directory, the newest by default. Nothing damaged is passed over here.

    Raises FileNotFoundError when `run` is no run directory, and ValueError when it has no such checkpoint.
    """
    if not (run / "checkpoints").is_dir():
        raise FileNotFoundError(f"{run} is not a run directory: it has no folder checkpoints/.")
    steps = list_checkpoints(run)
    if not steps:
        raise ValueError(f"{run} has no committed checkpoint; train until one is written.")
    if step is not None and step not in steps:
        raise ValueError(f"{run} has no checkpoint of step {step}; there are {', '.join(map(str, steps))}.")
    newest = list_step_folders(run)[-1]
    if step is None and newest != steps[-1]:
        raise DamagedFileError(
            f"{checkpoint_directory(run, newest)}, the newest checkpoint, has lost its {MANIFEST_NAME}; choose the "
            f"step of another ({', '.join(map(str, steps))}), or remove that folder."
        )
    return CheckpointReader(checkpoint_directory(run, steps[-1] if step is None else step))


def empty_model(fields: dict[str, Any], shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> "PreTrainedModel":
    """The transformers model of the configuration `fields` with unset parameters, for the CPU or the meta device.

    Raises ValueError for a model type that transformers does not know, a configuration that it refuses, or one whose
    parameters do not have these `shapes`.
    """
    model_type = str(fields.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"The model type {model_type!r} of the checkpoint is unknown to this version of transformers.")
    try:
        config = CONFIG_MAPPING[model_type].from_dict(fields)
    except Exception as error:  # transformers raises its own validation errors of many types
        reason = " ".join(str(error).split())
        raise ValueError(
            f"transformers refuses the checkpoint's configuration of a {model_type} model: {reason}"
        ) from error
    with no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    actual = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if shapes != actual:
        names = sorted(name for name in shapes.keys() | actual.keys() if shapes.get(name) != actual.get(name))
        listed = [f"{name} {shapes.get(name, 'none')} and {actual.get(name, 'none')}" for name in names[:NAMES_SHOWN]]
        more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        raise ValueError(
            f"The checkpoint's parameters are not those of its configuration; their shapes in the checkpoint and in "
            f"transformers' {type(model).__name__}: {', '.join(listed)}{more}."
        )
    return model


def load_plain_model(source: Path, dtype: torch.dtype | None = None, *, step: int | None = None) -> "PreTrainedModel":
    """A transformers model on the CPU of this process with a checkpoint's weights, in evaluation mode.

    `source` is a run directory; `dtype` is the training dtype by default. Tensors are read one after the other.
    Raises as `open_checkpoint` and `empty_model` do, and DamagedFileError for a damaged file.
    """
    reader = open_checkpoint(source, step)
    dtype = TORCH_DTYPES[reader.manifest.precision] if dtype is None else dtype
    shapes = {entry.name: tuple(entry.shape) for entry in reader.manifest.parameters}
    model = empty_model(reader.manifest.model_config_dict, shapes, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.read_tensor(name).to(parameter.dtype))
        buffers = dict(model.named_buffers())
        for name in reader.manifest.buffers:
            buffers[name].copy_(reader.read_buffer(name))
    return model.eval()
