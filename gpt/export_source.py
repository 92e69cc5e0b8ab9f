"""What an export reads from: trained weights by name, and what else the folder tells of them."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gpt.checkpoint.files import VIEW_BLOCKS, sum_of_squares
from gpt.checkpoint.format import BLOCK_BYTES, Manifest, Precision, Probe
from gpt.checkpoint.read import NORM_TOLERANCE, CheckpointReader, newest_manifest, open_checkpoint
from gpt.run_directory import check_kept_tokenizer, json_lines

CHUNK_ELEMENTS = BLOCK_BYTES // 4


class WeightSource(Protocol):
    """Trained weights, of which no more than a chunk needs to be in memory.

    `directory` is named in messages, `precision` is the training dtype, and `config` the transformers configuration.
    `shapes` has every parameter once, by the name that `named_parameters` gives it; `buffers` the persistent buffers.
    `memory_bytes` are held while reading, the chunks aside.
    """

    @property
    def directory(self) -> Path: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def shapes(self) -> dict[str, tuple[int, ...]]: ...
    @property
    def buffers(self) -> list[str]: ...
    @property
    def memory_bytes(self) -> int: ...

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        """A parameter's consecutive flattened pieces, of `CHUNK_ELEMENTS` at most, on the CPU and in the widest dtype
        that there is (the fp32 master). One is good until the next is taken. Raises ValueError for a parameter that is
        not what was recorded."""

    def buffer(self, name: str) -> torch.Tensor:
        """A persistent buffer in its own shape and dtype."""


@dataclass(frozen=True)
class ExportSource:
    """Weights and everything else that becomes a model folder.

    Without a `probe` of the live engine the folder's logits cannot be checked. `masters` is the folder of a
    `checkpoint/1` whose fp32 weights the gate reads by itself, None for other sources. `facts` goes into
    `export_report.json`, `card` (name and value) into the model card's table, `recipe` below it.
    """

    name: str
    weights: WeightSource
    tokenizer: PreTrainedTokenizerBase
    probe: Probe | None
    facts: dict[str, Any]
    card: dict[str, str]
    recipe: dict[str, Any] | None
    masters: Path | None = None
    merged: bool = False
    """Whether the weights are a base's and an adapter's together, which the live engine held apart."""


class CheckpointWeights:
    """The weights of a `checkpoint/1`, verified by block checksum and by norm."""

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader
        self.directory = reader.directory
        self.precision: Precision = reader.manifest.precision
        self.config = reader.manifest.model_config_dict
        self.shapes = {entry.name: tuple(entry.shape) for entry in reader.manifest.parameters}
        self.buffers = reader.manifest.buffers
        self.memory_bytes = reader.memory_bytes
        self._thread = ThreadPoolExecutor(1, "read ahead")  # alone, since a reader is for one thread
        self._ahead: deque[Future[_Piece]] = deque()
        self._expected: _Place | None = None  # where the first of `_ahead` begins
        self._following = dict(pairwise([*self.shapes, None]))
        self._next: _Place | None = None  # what the thread reads next, for itself alone

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        """As `WeightSource`; the pieces together have the norm that the live engine recorded."""
        entry = self._reader.manifest.parameters[self._reader.index(name)]
        square, start = 0.0, 0
        while start < entry.elements:
            piece = self._take(_Place(name, start))
            start, square = start + piece.values.numel(), square + piece.square
            yield piece.values
        norm, recorded = square**0.5, self._reader.manifest.norms.get(name, {}).get(entry.weights)
        if recorded is None or not abs(norm - recorded) <= NORM_TOLERANCE * recorded:
            raise ValueError(
                f"{name} in {self.directory} has the L2 norm {norm:.9g}, but the live engine recorded {recorded}."
            )

    def _take(self, wanted: "_Place") -> "_Piece":
        """What one block holds. What follows, also in the next parameters, is read while the caller uses it."""
        if wanted != self._expected:
            self._ahead.clear()
            self._thread.submit(self._seek, wanted)
        while len(self._ahead) <= VIEW_BLOCKS:
            self._ahead.append(self._thread.submit(self._read))
        piece = self._ahead.popleft().result()
        self._expected = piece.following
        return piece

    def _seek(self, place: "_Place") -> None:
        self._next = place

    def _read(self) -> "_Piece":
        if (place := self._next) is None:
            return _Piece(torch.empty(0), 0.0, None)  # behind the last parameter: nobody asks for it
        entry = self._reader.manifest.parameters[self._reader.index(place.name)]
        values = self._reader.view(entry.weights, place.name, place.start)
        end = place.start + values.numel()
        if end < entry.elements:
            self._next = _Place(place.name, end)
        else:
            name = self._following[place.name]
            self._next = None if name is None else _Place(name, 0)
        return _Piece(values, sum_of_squares(values), self._next)

    def buffer(self, name: str) -> torch.Tensor:
        """As `WeightSource`."""
        return self._thread.submit(self._reader.read_buffer, name).result()


class _Place(NamedTuple):
    """An element of a flattened parameter."""

    name: str
    start: int


class _Piece(NamedTuple):
    """Elements of a flattened parameter, their sum of squares, and what is read after them."""

    values: torch.Tensor
    square: float
    following: _Place | None


def source_of_run(
    run: Path, step: int | None = None, describe_data: Callable[[Path], str] | None = None
) -> ExportSource:
    """The checkpoint of `step` of a run directory, the newest by default.

    `describe_data` says in a line what a folder of token shards holds, for the model card.
    Raises as `open_checkpoint` and `run_tokenizer` do.
    """
    reader = open_checkpoint(run, step)
    reader.check_sizes()
    manifest = reader.manifest
    length = (manifest.recipe.get("data") or {}).get("sequence_length")
    return ExportSource(
        name=str(manifest.recipe.get("name", run.name)),
        weights=CheckpointWeights(reader),
        tokenizer=run_tokenizer(run, manifest),
        probe=manifest.probe,
        facts={"step": manifest.step, "data_kind": manifest.data_kind, "sequence_length": length},
        card=card_of_run(run, manifest, describe_data),
        recipe=manifest.recipe,
        masters=reader.directory,
    )


def run_tokenizer(source: Path, manifest: Manifest) -> PreTrainedTokenizerBase:
    """The run's tokenizer: `tokenizer/` of the run directory, else the recipe's. Without its chat template when neither
    this run nor the weights it began with saw chats, since the model then knows nothing of its turns."""
    place = source / "tokenizer" if (source / "tokenizer").is_dir() else Path(str(manifest.recipe.get("tokenizer")))
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # transformers raises many types here
        raise FileNotFoundError(f"The run's tokenizer cannot be loaded from {place}: {error}") from error
    if place.parent == source:
        check_kept_tokenizer(source)
    if not trained_on_chat(manifest):
        tokenizer.chat_template = None
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


def card_of_run(run: Path, manifest: Manifest, describe_data: Callable[[Path], str] | None) -> dict[str, str]:
    """The table's rows for a checkpoint of the run directory `run`.

    `describe_data` says in a line what a folder of token shards holds.
    """
    recipe, config = manifest.recipe, manifest.model_config_dict
    elements = sum(parameter.elements for parameter in manifest.parameters)
    frozen = sum(parameter.elements for parameter in manifest.parameters if parameter.group is None)
    sets = [
        f"{path.parent.name}/{path.name}, weight {item.get('weight', 1.0):g}"
        + (f": {describe_data(path)}" if describe_data is not None else "")
        for item in (recipe.get("data") or {}).get("train") or []
        for path in [Path(item["path"])]
    ]
    metrics = _last_evaluation(run / "metrics.jsonl", manifest.step)
    base = (recipe.get("model") or {}).get("pretrained")
    return {
        "Architecture": f"{config.get('model_type')}, {elements:,} parameters"
        + (f", {frozen:,} of them frozen" if frozen else ""),
        "Started from": base or "random weights",
        "Training data": f"{manifest.data_kind}, fingerprint of data and mixture {manifest.data_fingerprint}",
        **{f"Data set {number}": line for number, line in enumerate(sets, start=1)},
        "Trained on": f"{manifest.tokens:,} tokens in {manifest.step:,} steps, {manifest.world_size} ranks at the end",
        "Precision": manifest.precision,
        **{f"Validation {name.removeprefix('evaluate/')}": f"{value:.4f}" for name, value in metrics.items()},
        "Trained with": versions_line(manifest.versions),
    }


def versions_line(versions: dict[str, str | None]) -> str:
    """Names and versions, without those that are not known."""
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()) if version)


def _last_evaluation(path: Path, step: int) -> dict[str, float]:
    """The last evaluation metrics that the run recorded up to `step`; empty when there are none."""
    found: dict[str, float] = {}
    for record in json_lines(path):
        values = {k: v for k, v in record.items() if k.startswith("evaluate/") and isinstance(v, float)}
        if values and record["step"] <= step:
            found = values
    return found
