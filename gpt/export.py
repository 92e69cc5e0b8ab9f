"""A checkpoint to a Hugging Face folder, tensor by tensor, and through the gate before it gets its name.

Needs no GPU and no process group, whatever world size the run had. Memory is bounded by the largest tensor (a model
that transformers holds in another layout than the hub) or by a few MiB (all others), until the gate loads the folder.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from gpt.checkpoint.files import DTYPE_CODES, TensorToWrite, hash_file, write_safetensors
from gpt.checkpoint.format import FileEntry, Manifest, Precision, fsync_directory
from gpt.checkpoint.read import (
    NORM_TOLERANCE,
    TORCH_DTYPES,
    CheckpointReader,
    empty_model,
    newest_manifest,
    open_checkpoint,
)

MAX_SHARD_BYTES = 5_000_000_000
CHUNK_ELEMENTS = 1 << 20
OTHER_FILES_BYTES = 64 * 1024 * 1024
"""Room for the tokenizer and the small files, when free space is checked."""
CHECKSUMS_NAME = "checksums.json"
SAMPLE_TEXT = "The year 2026: “naïve” café, 東京 and 🙂 — x_1 = 3.14;\n\tEnd."
SAMPLE_CHAT = [{"role": "user", "content": "Who goes there?"}, {"role": "assistant", "content": "A friend."}]

Progress = Callable[[int, int], None]


def export_run(
    source: Path,
    out: Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the newest checkpoint of the run `source` (or the one of `step`) as the Hugging Face folder `out`.

    `dtype` is bf16, fp16 or fp32, by default the training dtype. `progress(done_bytes, total_bytes)` is called while
    weights are written. The folder is written under a temporary name, checked by `export_gate.py` in a fresh process
    and renamed; one that fails the gate is renamed `<out>.failed`. Returns what was written and, for each check of the
    gate, its sentence; the folder's `export_report.json` has the numbers.

    Raises:
        ValueError: an `out` that is not empty, no such checkpoint, damaged files, too little disk or memory, or the
            gate found the folder unequal to the live engine.
        FileNotFoundError: `source` is no run directory, or the run's tokenizer is gone.
    """
    source, out = Path(source), Path(out)
    reader = _open_source(source, out, step)
    manifest = reader.manifest
    precision = _precision(dtype, manifest)
    tokenizer = run_tokenizer(source, manifest)
    with torch.device("meta"):
        model = empty_model(manifest, TORCH_DTYPES[precision])
    tensors = plan_tensors(reader, model, TORCH_DTYPES[precision])
    total = sum(tensor.size_bytes for tensor in tensors)
    _check_room(out, total, sum(parameter.elements for parameter in manifest.parameters), manifest)
    folder = out.parent / f".tmp-{out.name}"
    shutil.rmtree(folder, ignore_errors=True)  # what a killed export left
    folder.mkdir(parents=True)
    try:
        files = _write_weights(folder, tensors, max_shard_bytes, total, progress)
        ends = _write_configuration(folder, model, tokenizer, precision)
        (folder / "README.md").write_text(model_card(source, manifest, precision), encoding="utf-8")
        report = run_gate(folder, expected_of(manifest, precision, tokenizer, ends))
        length = (manifest.recipe.get("data") or {}).get("sequence_length")
        about = {"step": manifest.step, "data_kind": manifest.data_kind, "sequence_length": length}
        _write_json(folder / "export_report.json", about | report)
        _finish(folder, files)
        if not report["passed"]:
            raise ValueError(_failure(report, _rename_failed(folder, out)))
        folder.rename(out)  # replaces an empty folder
        fsync_directory(out.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "folder": str(out),
        "step": manifest.step,
        "dtype": precision,
        "tensors": len(tensors),
        "bytes": total,
        "weight_files": sorted(files),
        "end_tokens": ends,
        "gate": {check["check"]: check["sentence"] for check in report["checks"]},
    }


def _open_source(source: Path, out: Path, step: int | None) -> CheckpointReader:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty; give another folder, or remove this one.")
    reader = open_checkpoint(source, step)
    if reader.manifest.probe is None:
        raise ValueError(f"{reader.directory} has no probe of the live engine, so an export could not be checked.")
    return reader


def _precision(dtype: str | None, manifest: Manifest) -> Precision:
    for precision in TORCH_DTYPES:
        if precision == (dtype or manifest.precision):
            return precision
    raise ValueError(f"The dtype {dtype} is unknown; give {', '.join(TORCH_DTYPES)}.")


def run_tokenizer(source: Path, manifest: Manifest) -> PreTrainedTokenizerBase:
    """The run's tokenizer: `tokenizer/` of the run directory, else the recipe's. Without its chat template when neither
    this run nor the weights it began with saw chats, since the model then knows nothing of its turns."""
    place = source / "tokenizer" if (source / "tokenizer").is_dir() else Path(str(manifest.recipe.get("tokenizer")))
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"The run's tokenizer cannot be loaded from {place}: {error}") from error
    if not trained_on_chat(manifest):
        tokenizer.chat_template = None
    vocabulary = manifest.model_config_dict.get("vocab_size")
    if vocabulary is not None and len(tokenizer) > vocabulary:
        raise ValueError(f"The tokenizer {place} has {len(tokenizer)} tokens, but the model only {vocabulary}.")
    return tokenizer


def trained_on_chat(manifest: Manifest) -> bool:
    """Whether the weights have seen chats: in this run, or in the one (or the Hugging Face folder) it began with.

    A Hugging Face folder with a chat template counts as trained on chats.
    """
    pretrained = (manifest.recipe.get("model") or {}).get("pretrained")
    if manifest.data_kind != "text" or pretrained is None:
        return manifest.data_kind != "text"
    if (Path(pretrained) / "checkpoints").is_dir():
        base = newest_manifest(Path(pretrained))
        return base is not None and trained_on_chat(base)
    return True


def plan_tensors(reader: CheckpointReader, model: PreTrainedModel, dtype: torch.dtype) -> list[TensorToWrite]:
    """The tensors of the folder, named and shaped as `save_pretrained` would, in the order of the checkpoint.

    `model` is on the meta device. Tied aliases are left out. A parameter that transformers holds in another layout than
    the hub (fused experts) is read whole and reversed; all others are read in chunks.
    """
    ignored = set(model._keys_to_ignore_on_save or ())
    parameters = {n: p for n, p in model.named_parameters() if n not in ignored}
    layout = revert_weight_conversion(model, {n: torch.empty_like(p) for n, p in parameters.items()})
    tensors: list[TensorToWrite] = []
    for name, parameter in parameters.items():
        products = revert_weight_conversion(model, {name: torch.empty_like(parameter)})
        shapes = {n: tuple(tensor.shape) for n, tensor in products.items()}
        if shapes == {name: tuple(parameter.shape)}:
            tensors.append(_streamed(reader, name, dtype))
        else:
            source = _Reversed(reader, model, name, dtype)
            tensors += [source.tensor(product, shape) for product, shape in shapes.items()]
    if {t.name: t.shape for t in tensors} != {n: tuple(t.shape) for n, t in layout.items()}:
        raise ValueError(
            f"{type(model).__name__} cannot be exported: the hub's layout joins several of its parameters."
        )
    for name in (n for n in reader.manifest.buffers if n not in ignored):
        buffer = reader.read_buffer(name)
        tensors.append(_buffer(name, buffer))
    empty = [tensor.name for tensor in tensors if not tensor.size_bytes]
    if empty:
        raise ValueError(f"{reader.directory} holds empty tensors: {', '.join(empty)}.")
    return tensors


def _streamed(reader: CheckpointReader, name: str, dtype: torch.dtype) -> TensorToWrite:
    return TensorToWrite(name, DTYPE_CODES[dtype], reader.shape(name), lambda: checked_chunks(reader, name, dtype))


def checked_chunks(reader: CheckpointReader, name: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """A parameter's weights in chunks, rounded to `dtype`; each finite, and together of the recorded norm.

    Raises ValueError where they are not.
    """
    entry = reader.manifest.parameters[reader.index(name)]
    square = 0.0
    for start in range(0, entry.elements, CHUNK_ELEMENTS):
        master = reader.read_range(entry.weights, name, start, min(CHUNK_ELEMENTS, entry.elements - start))
        square += float(torch.linalg.vector_norm(master, dtype=torch.float64)) ** 2
        values = master.to(dtype)
        _check_finite(name, values)
        yield values
    recorded = reader.manifest.norms.get(name, {}).get(entry.weights)
    if recorded is None or not abs(square**0.5 - recorded) <= NORM_TOLERANCE * recorded:
        raise ValueError(
            f"{name} in {reader.directory} has the L2 norm {square**0.5:.9g}, but the live engine recorded {recorded}."
        )


def _check_finite(name: str, values: torch.Tensor) -> None:
    if values.is_floating_point() and not bool(torch.isfinite(values).all()):
        count = int((~torch.isfinite(values)).sum())
        raise ValueError(f"{name} has {count} values that are not finite in {values.dtype}; use an earlier checkpoint.")


class _Reversed:
    """One parameter in the hub's layout, where it is several tensors; held while they are written one after another."""

    def __init__(self, reader: CheckpointReader, model: PreTrainedModel, name: str, dtype: torch.dtype) -> None:
        self._reader, self._model, self._name, self._dtype = reader, model, name, dtype
        self._products: dict[str, torch.Tensor] = {}

    def tensor(self, product: str, shape: tuple[int, ...]) -> TensorToWrite:
        return TensorToWrite(product, DTYPE_CODES[self._dtype], shape, lambda: self._take(product))

    def _take(self, product: str) -> torch.Tensor:
        if product not in self._products:
            chunks = list(checked_chunks(self._reader, self._name, self._dtype))
            whole = torch.cat(chunks).reshape(self._reader.shape(self._name))
            del chunks
            self._products = dict(revert_weight_conversion(self._model, {self._name: whole}))
        return self._products.pop(product)


def _buffer(name: str, values: torch.Tensor) -> TensorToWrite:
    _check_finite(name, values)
    return TensorToWrite(name, DTYPE_CODES[values.dtype], tuple(values.shape), lambda: values)


def _check_room(out: Path, total_bytes: int, elements: int, manifest: Manifest) -> None:
    place = next(parent for parent in out.absolute().parents if parent.exists())
    free, needed = shutil.disk_usage(place).free, total_bytes + OTHER_FILES_BYTES
    if free < needed:
        raise ValueError(f"The export needs {_gib(needed)} of disk, but {place} has {_gib(free)} free.")
    memory, model = psutil.virtual_memory().available, elements * TORCH_DTYPES[manifest.precision].itemsize
    if memory < model and not torch.cuda.is_available():
        raise ValueError(
            f"The export's check loads the model, which takes {_gib(model)} of memory; {_gib(memory)} are available. "
            "Run it on a larger machine."
        )


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"


def _write_weights(
    folder: Path, tensors: list[TensorToWrite], max_shard_bytes: int, total: int, progress: Progress | None
) -> dict[str, FileEntry]:
    """Write the shards, and the index when there are several; returns their entries for the checksums."""
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
    done = 0

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

    for index, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        files[name] = write_safetensors(folder / name, map(counted, shard), metadata={"format": "pt"})
        weight_map |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / "model.safetensors.index.json", content)
    return files


def _write_configuration(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, precision: Precision
) -> list[int]:
    """Write config, generation config and tokenizer; returns the tokens at which generation ends."""
    ends = end_tokens(tokenizer)
    config = model.config
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
    return ends


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text and, with a chat template, the first special token after an assistant's answer."""
    ends = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if tokenizer.chat_template is not None:
        rendered = str(tokenizer.apply_chat_template(SAMPLE_CHAT, tokenize=False))
        tail = rendered.rpartition(SAMPLE_CHAT[-1]["content"])[2]
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        closing = [i for i in tokenizer(tail, add_special_tokens=False)["input_ids"] if i in special]
        ends += closing[:1]
    return list(dict.fromkeys(ends))


def model_card(source: Path, manifest: Manifest, precision: Precision) -> str:
    """The folder's README: where the weights come from, in numbers."""
    recipe, config = manifest.recipe, manifest.model_config_dict
    elements = sum(parameter.elements for parameter in manifest.parameters)
    data = recipe.get("data") or {}
    sources = ", ".join(Path(item["path"]).parent.name or item["path"] for item in data.get("train") or [])
    metrics = _last_evaluation(source / "metrics.jsonl", manifest.step)
    rows = {
        "Architecture": f"{config.get('model_type')}, {elements:,} parameters, stored in {precision}",
        "Started from": (recipe.get("model") or {}).get("pretrained") or "random weights",
        "Training data": f"{sources or 'unknown'} ({manifest.data_kind}), fingerprint {manifest.data_fingerprint}",
        "Trained on": f"{manifest.tokens:,} tokens in {manifest.step:,} steps, {manifest.world_size} ranks at the end",
        "Precision": manifest.precision,
        **{f"Validation {name.removeprefix('evaluate/')}": f"{value:.4f}" for name, value in metrics.items()},
        "Made with": ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items()) if version),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [trainyard]\n---\n"
        f"# {recipe.get('name', source.name)}\n\n"
        f"A causal language model trained with Trainyard.\n\n| | |\n| --- | --- |\n{table}\n\n"
        "The licence of these weights is not stated: who trained them decides, and it depends on the data.\n\n"
        f"## Recipe\n\n```json\n{json.dumps(recipe, indent=2, ensure_ascii=False)}\n```\n"
    )


def _last_evaluation(path: Path, step: int) -> dict[str, float]:
    """The last evaluation metrics that the run recorded up to `step`; empty when there are none."""
    found: dict[str, float] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            if '"evaluate/' in line:
                record = json.loads(line)
                if record["step"] <= step:
                    found = {k: v for k, v in record.items() if k.startswith("evaluate/") and isinstance(v, float)}
    return found


def expected_of(
    manifest: Manifest, precision: Precision, tokenizer: PreTrainedTokenizerBase, ends: list[int]
) -> dict[str, Any]:
    """What the gate holds the folder against: the live engine's probe, and samples of the run's own tokenizer."""
    assert manifest.probe is not None
    chat = None
    if tokenizer.chat_template is not None:
        chat = {"messages": SAMPLE_CHAT, "ids": tokenizer.apply_chat_template(SAMPLE_CHAT, return_dict=False)}
    return {
        "training_dtype": manifest.precision,
        "exported_dtype": precision,
        "probe": manifest.probe.model_dump(),
        "tokenizer": {
            "text": SAMPLE_TEXT,
            "ids": tokenizer(SAMPLE_TEXT)["input_ids"],
            "chat": chat,
            "end_tokens": ends,
        },
    }


def run_gate(folder: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Check `folder` in a fresh isolated Python that imports torch and transformers only; returns its report.

    A folder that cannot be loaded at all gives a report that did not pass.
    """
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "expected.json"
        _write_json(file, expected)
        result = subprocess.run(
            [sys.executable, "-I", str(Path(__file__).with_name("export_gate.py")), str(folder), str(file)],
            capture_output=True,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
    try:
        report: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        check = {"check": "load", "passed": False, "sentence": f"the folder could not be loaded and run: {last}"}
        return {"passed": False, "checks": [check]}
    return report


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
