"""Weights as sharded safetensors, named and shaped as the hub has them, one chunk in memory at a time."""

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from gpt.checkpoint.files import DTYPE_CODES, TensorToWrite, write_safetensors
from gpt.checkpoint.format import FileEntry
from gpt.export_source import WeightSource
from gpt.lora import peft_name

Progress = Callable[[int, int], None]


def parse_size(text: str) -> int:
    """Bytes of a size as "5GB" or "512MiB" (decimal and binary units). Raises ValueError for anything else."""
    try:
        size = convert_file_size_to_int(text)
    except ValueError:
        size = 0
    if size <= 0 or text.endswith("b"):
        raise ValueError(f"The shard size {text!r} is no size; give one as 5GB, 500MB or 2GiB.")
    return int(size)


def plan_tensors(source: WeightSource, model: PreTrainedModel, dtype: torch.dtype) -> list[TensorToWrite]:
    """The tensors of the folder, named and shaped as `save_pretrained` would, in the order of the model.

    `model` is on the meta device. Tied aliases are left out. A parameter that transformers holds in another layout than
    the hub (fused experts) is read whole and reversed; all others are read in chunks.
    """
    ignored = set(model._keys_to_ignore_on_save or ())
    parameters = {n: p for n, p in model.named_parameters() if n not in ignored}
    layout = revert_weight_conversion(model, dict(parameters))
    tensors: list[TensorToWrite] = []
    for name, parameter in parameters.items():
        if layout.get(name) is parameter:  # untouched, and asking for each one alone would take seconds
            tensors.append(_streamed(source, name, tuple(parameter.shape), dtype))
        else:
            products = revert_weight_conversion(model, {name: torch.empty_like(parameter)})
            shapes = {n: tuple(tensor.shape) for n, tensor in products.items()}
            reverted = _Reverted(source, model, name, tuple(parameter.shape), dtype)
            tensors += [reverted.tensor(product, shape) for product, shape in shapes.items()]
    if {t.name: t.shape for t in tensors} != {n: tuple(t.shape) for n, t in layout.items()}:
        raise ValueError(
            f"{type(model).__name__} cannot be exported: the hub's layout joins several of its parameters."
        )
    tensors += [_buffer(name, source.buffer(name)) for name in source.buffers if name not in ignored]
    empty = [tensor.name for tensor in tensors if not tensor.size_bytes]
    if empty:
        raise ValueError(f"{source.directory} holds empty tensors: {', '.join(empty)}.")
    return tensors


def plan_adapter(source: WeightSource, dtype: torch.dtype) -> list[TensorToWrite]:
    """The tensors of an adapter's file, by peft's names."""
    tensors = [_streamed(source, name, shape, dtype) for name, shape in source.shapes.items()]
    return [replace(tensor, name=peft_name(tensor.name)) for tensor in tensors]


def _streamed(source: WeightSource, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> TensorToWrite:
    return TensorToWrite(name, DTYPE_CODES[dtype], shape, lambda: _rounded(source, name, dtype))


def _rounded(source: WeightSource, name: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """A parameter's weights in chunks of `dtype`, each of them finite."""
    for chunk in source.chunks(name):
        values = chunk.to(dtype)
        _check_finite(name, values)
        yield values


def _check_finite(name: str, values: torch.Tensor) -> None:
    if not values.is_floating_point() or not values.numel():
        return
    extremes = torch.aminmax(values)  # a NaN or an infinity is one of them, and they take a twentieth of the time
    if not all(math.isfinite(value) for value in extremes):
        count = int((~torch.isfinite(values)).sum())
        raise ValueError(f"{name} has {count} values that are not finite in {values.dtype}; use an earlier checkpoint.")


class _Reverted:
    """One parameter in the hub's layout, where it is several tensors; held while they are written one after another."""

    def __init__(
        self, source: WeightSource, model: PreTrainedModel, name: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self._source, self._model, self._name, self._shape, self._dtype = source, model, name, shape, dtype
        self._products: dict[str, torch.Tensor] = {}

    def tensor(self, product: str, shape: tuple[int, ...]) -> TensorToWrite:
        return TensorToWrite(product, DTYPE_CODES[self._dtype], shape, lambda: self._take(product))

    def _take(self, product: str) -> torch.Tensor:
        if product not in self._products:
            whole = torch.empty(self._shape, dtype=self._dtype)
            position = 0
            for chunk in _rounded(self._source, self._name, self._dtype):
                whole.view(-1)[position : position + chunk.numel()] = chunk
                position += chunk.numel()
            self._products = dict(revert_weight_conversion(self._model, {self._name: whole}))
        return self._products.pop(product)


def _buffer(name: str, values: torch.Tensor) -> TensorToWrite:
    _check_finite(name, values)
    return TensorToWrite(name, DTYPE_CODES[values.dtype], tuple(values.shape), lambda: values)


def write_weights(
    folder: Path,
    tensors: list[TensorToWrite],
    max_shard_bytes: int,
    progress: Progress | None,
    stem: str = "model",
) -> dict[str, FileEntry]:
    """Write the shards, and the index when there are several; returns their entries for the checksums.

    `progress` is called with (bytes done, bytes in all).
    """
    shards: list[list[TensorToWrite]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.size_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.size_bytes
    files: dict[str, FileEntry] = {}
    weight_map: dict[str, str] = {}
    done, total = 0, sum(tensor.size_bytes for tensor in tensors)

    def counted(tensor: TensorToWrite) -> TensorToWrite:
        def read() -> Iterator[torch.Tensor]:
            nonlocal done
            values = tensor.read()
            for chunk in [values] if isinstance(values, torch.Tensor) else values:
                yield chunk
                done += chunk.numel() * chunk.itemsize
                if progress is not None:
                    progress(done, total)

        return TensorToWrite(tensor.name, tensor.dtype, tensor.shape, read)

    with _one_torch_thread():
        for index, shard in enumerate(shards, start=1):
            name = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{index:05d}-of-{len(shards):05d}.safetensors"
            files[name] = write_safetensors(folder / name, map(counted, shard), {"format": "pt"}, direct=True)
            weight_map |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        content: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return files


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    """The work on a chunk is short: more threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
