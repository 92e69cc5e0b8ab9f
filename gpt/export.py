"""Trained weights to a Hugging Face folder, tensor by tensor, and through the gate before it gets its name.

Needs no GPU and no process group, whatever world size the run had. Memory is bounded by the largest tensor (a model
that transformers holds in another layout than the hub) or by a few MiB (all others), until the gate loads the folder.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from gpt.checkpoint.direct import BLOCKS_ON_THE_WAY
from gpt.checkpoint.files import TensorToWrite, hash_file
from gpt.checkpoint.format import BLOCK_BYTES, FileEntry, Precision, fsync_directory
from gpt.checkpoint.read import TORCH_DTYPES, empty_model
from gpt.deepspeed_checkpoint import source_of_deepspeed
from gpt.early_stopping import best_step, better_than
from gpt.export_check import (
    GateMemory,
    available_memory_bytes,
    end_tokens,
    expected_of,
    gate_memory,
    gib,
    run_gate,
)
from gpt.export_source import CHUNK_ELEMENTS, ExportSource, source_of_run
from gpt.export_weights import Progress, parse_size, plan_adapter, plan_tensors, write_weights
from gpt.gguf_export import add_gguf, check_convertible, gate_weights_bytes
from gpt.lora import adapter_config, merged
from gpt.model_card import UNKNOWN_LICENCE, check_licence, model_card

MAX_SHARD_SIZE = "5GB"
OTHER_FILES_BYTES = 64 * 1024 * 1024
"""Room for the tokenizer and the small files, when free space is checked."""
Say = Callable[[str], None]
CHECKSUMS_NAME = "checksums.json"


@dataclass(frozen=True)
class ExportOptions:
    """How a folder is written; what a call to `export_run` or `export_deepspeed` may give by name."""

    dtype: str | None = None
    """bf16, fp16 or fp32; None: the training dtype."""
    ungated: bool = False
    """Whether a source without a probe of the live engine is exported all the same."""
    licence: str = UNKNOWN_LICENCE
    max_shard_size: str = MAX_SHARD_SIZE
    gguf: bool = False
    """Whether the folder also holds the model as one file for llama.cpp, which is compared, too."""
    say: Say = print
    progress: Progress | None = None


def export_run(
    source: Path,
    out: Path,
    *,
    step: int | None = None,
    best: bool = False,
    adapter: bool = False,
    describe_data: Callable[[Path], str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Export the newest checkpoint of the run directory `source`, the one of `step`, or the best: see `best_step`,
    `source_of_run` and `export_model`. Of a run with `lora`, base and adapter are merged, or the `adapter` is written
    alone: see `export_adapter`.

    Raises:
        ValueError: no such checkpoint or damaged files, no adapter or another base, and as `export_model`.
        FileNotFoundError: `source` is no run directory, or the run's tokenizer is gone.
    """
    how = ExportOptions(**options)
    if best:
        step = best_step(Path(source))
        if (better := better_than(Path(source), step)) is not None:
            how.say(
                f"warning: step {better} was better than step {step}, but has no checkpoint; see checkpoint.keep_best"
            )
    found = source_of_run(Path(source), step, describe_data)
    if found.recipe is not None and found.recipe.get("lora"):
        if adapter:
            return export_adapter(found, out, how)
        found = merged(found)
    elif adapter:
        raise ValueError(f"{source} trained no adapter (its recipe has no lora): leave --adapter out.")
    return export_model(found, out, how)


def export_deepspeed(
    source: Path,
    out: Path,
    *,
    config: Path | None = None,
    tokenizer: Path | None = None,
    trust_pickle: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Export what DeepSpeed's own `save_checkpoint` wrote: see `source_of_deepspeed` and `export_model`.

    Raises as they do.
    """
    found = source_of_deepspeed(source, config=config, tokenizer=tokenizer, trust_pickle=trust_pickle)
    return export_model(found, out, ExportOptions(**options))


def export_model(source: ExportSource, out: Path, how: ExportOptions) -> dict[str, Any]:
    """Write `source` as the Hugging Face folder `out`.

    The folder is written under a temporary name, checked by `export_gate.py` and renamed; one that fails is renamed
    `<out>.failed`. Returns what was written and, for each check of the gate, its sentence.

    Raises ValueError for an `out` that is not empty, damaged files, a tokenizer that does not fit, too little disk or
    memory, or where the gate found the folder unequal to the live engine.
    """
    out = _checked_out(Path(out), source, how.ungated)
    check_licence(how.licence)
    shard_bytes = parse_size(how.max_shard_size)
    precision = _precision(how.dtype, source.weights.precision)
    with torch.device("meta"):
        model = empty_model(source.weights.config, source.weights.shapes, TORCH_DTYPES[precision])
    _check_vocabulary(source.tokenizer, model)
    if how.gguf:
        check_convertible(model.config, source.tokenizer)
    tensors = plan_tensors(source.weights, model, TORCH_DTYPES[precision])
    expected = expected_of(source, precision)
    expected["memory_bytes"] = _check_room(out, source, model, tensors, gate_memory(model, expected), how)

    def write(folder: Path) -> dict[str, FileEntry]:
        files = write_weights(folder, tensors, shard_bytes, how.progress)
        _write_configuration(folder, model, source.tokenizer, precision)
        return files

    return _publish(source, out, how, precision, tensors, expected, write)


def export_adapter(source: ExportSource, out: Path, how: ExportOptions) -> dict[str, Any]:
    """Write the adapter alone as the folder `out`, which peft puts onto its base. As `export_model` otherwise.

    Raises as it does, and ValueError for what only a whole model can be: a GGUF file, or several files.
    """
    out = _checked_out(Path(out), source, how.ungated)
    check_licence(how.licence)
    precision = _precision(how.dtype, source.weights.precision)
    tensors = plan_adapter(source.weights, TORCH_DTYPES[precision])
    if how.gguf or sum(tensor.size_bytes for tensor in tensors) > parse_size(how.max_shard_size):
        raise ValueError(f"An adapter is one file for peft; leave --gguf out, and give more than {how.max_shard_size}.")
    config, base = adapter_config(source)
    expected = expected_of(source, precision) | {"masters": None}
    memory, available = gate_memory(base, expected), available_memory_bytes()
    if available < memory.rest + memory.weights:
        raise ValueError(
            f"The check loads the whole base and needs {gib(memory.rest + memory.weights)} of memory, but "
            f"{gib(available)} are available; export on a larger machine."
        )

    def write(folder: Path) -> dict[str, FileEntry]:
        config.save_pretrained(str(folder))
        source.tokenizer.save_pretrained(folder)
        return write_weights(folder, tensors, sum(t.size_bytes for t in tensors), how.progress, stem="adapter_model")

    return _publish(source, out, how, precision, tensors, expected, write)


def _publish(
    source: ExportSource,
    out: Path,
    how: ExportOptions,
    precision: Precision,
    tensors: list[TensorToWrite],
    expected: dict[str, Any],
    write: Callable[[Path], dict[str, FileEntry]],
) -> dict[str, Any]:
    """Let `write` fill a folder, put it through the gate and give it its name; what `export_model` returns."""
    with _unfinished(out) as folder:
        files = write(folder)
        report = run_gate(folder, expected)
        if how.gguf:
            add_gguf(folder, out.name, report)
        (folder / "README.md").write_text(model_card(source, precision, how.licence, report), encoding="utf-8")
        _write_json(folder / "export_report.json", source.facts | report)
        _finish(folder, files)
        if not report["passed"]:
            raise ValueError(_failure(report, _rename_failed(folder, out)))
        folder.rename(out)  # replaces an empty folder
        fsync_directory(out.parent)
    if not report["gated"]:
        how.say(f"warning: {out} was not checked against the training engine (--ungated); its card and report say so")
    return source.facts | {
        "folder": str(out),
        "dtype": precision,
        "tensors": len(tensors),
        "bytes": sum(tensor.size_bytes for tensor in tensors),
        "weight_files": sorted(files),
        "end_tokens": expected["tokenizer"]["end_tokens"],
        "gated": report["gated"],
        "weights_held": report["weights_held"],
        "gate": {check["check"]: check["sentence"] for check in report["checks"]},
    }


def _checked_out(out: Path, source: ExportSource, ungated: bool) -> Path:
    """The folder's place, where an empty folder may be. Raises ValueError where nothing may be written."""
    if out.is_symlink() or out.name in ("", ".."):  # the finished folder gets its name by a rename, which needs one
        out = out.resolve()
    _refuse_filled(out)
    if out.is_mount():
        raise ValueError(f"{out} is a mount point, which the finished folder cannot replace; give a folder in it.")
    if source.probe is None and not ungated:
        raise ValueError(
            f"{source.weights.directory} has no probe of the live engine, so an export could not be checked; "
            f"--ungated exports it all the same, marked as unchecked."
        )
    return out


def _refuse_filled(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty; give another folder, or remove this one.")


@contextlib.contextmanager
def _unfinished(out: Path) -> Iterator[Path]:
    """A folder beside `out` under a temporary name; it is gone afterwards where it was not renamed. A second export to
    `out` is refused meanwhile."""
    folder, lock = (out.parent / f".tmp-{out.name}{ending}" for ending in ("", ".lock"))
    out.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"Another export to {out} is at work; wait for it or end it, or give another folder."
            ) from None
        except OSError:
            pass  # no locks on this file system
        _refuse_filled(out)  # again: the other export may have ended just now
        shutil.rmtree(folder, ignore_errors=True)  # what a killed export left
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)


def _precision(dtype: str | None, training: Precision) -> Precision:
    for precision in TORCH_DTYPES:
        if precision == (dtype or training):
            return precision
    raise ValueError(f"The dtype {dtype} is unknown; give {', '.join(TORCH_DTYPES)}.")


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Every token must have its row of the embedding. (`len` is too small where a vocabulary has gaps.)"""
    tokens, rows = max(tokenizer.get_vocab().values()) + 1, model.config.get_text_config().vocab_size
    if tokens > rows:
        raise ValueError(f"The tokenizer {tokenizer.name_or_path} has {tokens} tokens, but the model only {rows}.")


def _check_room(
    out: Path,
    source: ExportSource,
    model: PreTrainedModel,
    tensors: list[TensorToWrite],
    memory: GateMemory,
    how: ExportOptions,
) -> int | None:
    """Print what the export needs of disk and memory, then compare it with what there is.

    Returns what the gate may hold of the weights, None for all. Raises ValueError where there is too little.
    """
    names = {tensor.name for tensor in tensors}
    joined = [p.numel() for name, p in model.named_parameters() if name not in names]
    converted = max([2 * CHUNK_ELEMENTS, *(2 * elements for elements in joined)]) * 4
    writing = converted + source.weights.memory_bytes + (BLOCKS_ON_THE_WAY + 1) * BLOCK_BYTES
    place = next(parent for parent in out.absolute().parents if parent.exists())
    weights = sum(tensor.size_bytes for tensor in tensors)
    free, needed = shutil.disk_usage(place).free, weights * (2 if how.gguf else 1) + OTHER_FILES_BYTES
    available = available_memory_bytes()
    by_layer = available < memory.rest + memory.weights
    if by_layer:
        needed += 4 * sum(joined)  # a layout that accelerate cannot read from the folder's files is written beside it
    way = "the model layer by layer, the rest on disk" if by_layer else "the whole model in memory"
    check_gguf = memory.rest + gate_weights_bytes(model) if how.gguf else 0
    how.say(f"disk: {gib(needed)} needed, {gib(free)} free in {place}")
    how.say(
        f"memory: {gib(writing)} needed to write, {gib(memory.least if by_layer else memory.rest + memory.weights)} "
        f"to check with {way}{f', {gib(check_gguf)} to check the GGUF file' * how.gguf}, {gib(available)} available"
    )
    if free < needed:
        raise ValueError(f"The export needs {gib(needed)} of disk, but {place} has {gib(free)} free.")
    if available < check_gguf:
        raise ValueError(
            f"The check of the GGUF file loads the whole model in fp32 and needs {gib(check_gguf)} of memory, but "
            f"{gib(available)} are available; leave --gguf out."
        )
    return memory.limit(available)


def _write_configuration(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, precision: Precision
) -> None:
    """Write config, generation config and tokenizer."""
    config, ends = model.config, end_tokens(tokenizer)
    config.dtype = TORCH_DTYPES[precision]
    config.architectures = [type(model).__name__]
    config.use_cache = True  # off in training only
    config.save_pretrained(folder)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), None)
    GenerationConfig(
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        pad_token_id=pad,
        bos_token_id=tokenizer.bos_token_id,
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _failure(report: dict[str, Any], folder: Path) -> str:
    failed = "; ".join(check["sentence"] for check in report["checks"] if not check["passed"])
    return f"The export is not what the run trained: {failed}. The folder is kept as {folder}; do not use it."


def _rename_failed(folder: Path, out: Path) -> Path:
    names = (out.with_name(f"{out.name}.failed{f'-{n}' if n else ''}") for n in range(1000))
    target = next(name for name in names if not name.exists())
    folder.rename(target)
    return target


def _finish(folder: Path, weights: dict[str, FileEntry]) -> None:
    """Write the checksums of every file and make the folder durable."""
    files = dict(weights)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if name not in files:
            files[name] = hash_file(path)
            with path.open("rb") as file:
                os.fsync(file.fileno())
    content = {name: entry.model_dump() for name, entry in sorted(files.items())}
    _write_json(folder / CHECKSUMS_NAME, {"algorithm": "xxh3-64 of each 8 MiB block", "files": content})
    with (folder / CHECKSUMS_NAME).open("rb") as file:
        os.fsync(file.fileno())
    fsync_directory(folder)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
