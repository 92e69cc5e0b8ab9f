"""The checkpoint format `checkpoint/1`: its manifest, its folder names, and how both are found and checked.

A checkpoint is the folder `RUN/checkpoints/step_00001000/` with one `rank_NNNNN.safetensors` per rank of the run
that wrote it, and `manifest.json`, which is written last: a folder without a manifest is not a checkpoint.
"""

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

VERSION = "checkpoint/1"
MANIFEST_NAME = "manifest.json"
BLOCK_BYTES = 8 * 1024 * 1024
"""Files are hashed in blocks of this size, so that a reader can verify exactly the part that it reads."""
SPARE_BYTES = 16 * 2**20
"""What a save leaves free on the disk: with less, no save is begun and nothing can be counted on to be written."""

STEP_PATTERN = re.compile(r"^step_(\d{8,})$")
Precision = Literal["bf16", "fp16", "fp32"]


class DamagedFileError(ValueError):
    """A file is missing, has another size than recorded, or holds bytes whose checksum is not the recorded one."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Strict):
    """What the manifest knows of one file: its size and the xxh3-64 (16 hex digits) of each 8 MiB block."""

    size_bytes: int = Field(ge=0)
    blocks: list[str]


class ParameterEntry(_Strict):
    """One parameter: its name in the transformers model, full shape, training dtype and optimizer group.

    `group` is an index into `optimizer.groups`, or None for a frozen parameter.
    """

    name: str
    shape: list[int]
    dtype: Precision
    group: int | None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def weights(self) -> str:
        """The state that holds its weights: the fp32 master of a trained one, the frozen values in its own dtype."""
        return "fp32" if self.group is not None else "frozen"


class ParameterGroup(_Strict):
    """One optimizer group: its settings and the numbers of its state, both by torch's names."""

    settings: dict[str, Any]
    scalars: dict[str, float]

    @property
    def learning_rate(self) -> float:
        """Of the last step."""
        return float(self.settings["lr"])


class OptimizerEntry(_Strict):
    """The optimizer's type, the per-element states of trained parameters (`fp32` is the master weight), its groups."""

    type: str
    states: list[str]
    groups: list[ParameterGroup]
    loss_scaler: dict[str, float] = {}
    """Numbers of the dynamic fp16 loss scale; empty in other precisions."""


class Greedy(_Strict):
    """A greedy continuation by the live engine: token ids of the prompt and the new ones."""

    prompt_ids: list[int]
    new_ids: list[int]


class Probe(_Strict):
    """One row run by the live engine on exactly the saved weights, for others to be held against.

    `targets` is -1 where a position does not count; `loss` is the fp32 mean over the counted ones (nats per token).
    `top_logits[i][j]` is the logit (training dtype, as a float) at `positions[i]` of vocabulary entry
    `top_indices[i][j]`. `rows` is the number of rows of the forward, of which this one was the first.
    """

    input_ids: list[int]
    position_ids: list[int]
    targets: list[int]
    rows: int = Field(default=1, ge=1)
    loss: float
    positions: list[int]
    top_indices: list[list[int]]
    top_logits: list[list[float]]
    greedy: Greedy | None

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        if not len(self.input_ids) == len(self.position_ids) == len(self.targets):
            raise ValueError("the probe's input_ids, position_ids and targets differ in length")
        if not len(self.positions) == len(self.top_indices) == len(self.top_logits):
            raise ValueError("the probe's positions, top_indices and top_logits differ in length")
        if any(len(i) != len(v) for i, v in zip(self.top_indices, self.top_logits, strict=True)):
            raise ValueError("the probe's top_indices and top_logits differ in length")
        if any(not 0 <= p < len(self.input_ids) for p in self.positions):
            raise ValueError("the probe has positions outside its input_ids")
        return self


class Manifest(_Strict):
    """Everything of a checkpoint except the tensors. `manifest.json` holds these keys and `checksum`.

    `fragments[file]` holds, in the order of `parameters`, the `(start, count)` element range of each flattened
    parameter that the file stores; with count 0 it stores no tensor. Together they cover every parameter.
    `model_config_dict` is the transformers configuration; its key in the file is `model_config`, an attribute that
    pydantic keeps for itself. `norms[parameter][state]` is the L2 norm of the whole tensor. `evaluate_loss` is
    the validation loss of this step, where there was an evaluation. With `weights_only` the optimizer's moments and the
    random states were deleted: no run can resume here. `samples_consumed` is the position
    in the data order at which the next step begins, and `skipped_samples` are the `(first, end)` positions that the run
    leaves out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    version: Literal["checkpoint/1"] = "checkpoint/1"
    step: int
    tokens: int
    samples_consumed: int
    skipped_samples: list[tuple[int, int]] = []
    skipped_steps: int = 0
    data_fingerprint: str
    data_kind: Literal["text", "chat", "mixed"]
    world_size: int = Field(ge=1)
    zero_stage: int
    weights_only: bool = False
    generation: int
    precision: Precision
    parameters: list[ParameterEntry] = Field(min_length=1)
    buffers: list[str]
    tied: dict[str, str]
    optimizer: OptimizerEntry
    model_config_dict: dict[str, Any] = Field(alias="model_config")
    recipe: dict[str, Any]
    versions: dict[str, str | None]
    norms: dict[str, dict[str, float]]
    probe: Probe | None
    evaluate_loss: float | None = None
    files: dict[str, FileEntry]
    fragments: dict[str, list[tuple[int, int]]]

    def states_of(self, parameter: ParameterEntry) -> list[str]:
        """The states that are stored of a parameter."""
        return self.optimizer.states if parameter.group is not None else [parameter.weights]

    @model_validator(mode="after")
    def _fragments_cover_parameters(self) -> Self:
        for name, ranges in self.fragments.items():
            if name not in self.files:
                raise ValueError(f"fragments of {name} are listed, but the file itself is not")
            if len(ranges) != len(self.parameters):
                raise ValueError(f"{name} has {len(ranges)} fragments for {len(self.parameters)} parameters")
        for index, parameter in enumerate(self.parameters):
            covered = 0
            for start, count in sorted(ranges[index] for ranges in self.fragments.values()):
                if count and (start < 0 or count < 0 or start + count > parameter.elements):
                    raise ValueError(f"a fragment of {parameter.name} lies outside its {parameter.elements} elements")
                if count and start <= covered:
                    covered = max(covered, start + count)
            if covered != parameter.elements:
                raise ValueError(f"{parameter.name}: element {covered} of {parameter.elements} is in no file")
        return self


def rank_file_name(rank: int) -> str:
    """Name of the tensor file of `rank`."""
    return f"rank_{rank:05d}.safetensors"


def checkpoint_directory(run: Path, step: int) -> Path:
    """Folder of the checkpoint of `step` in a run directory, whether it exists or not."""
    return run / "checkpoints" / f"step_{step:08d}"


def temporary_checkpoint_directory(run: Path, step: int, generation: int) -> Path:
    """Folder that a checkpoint is written into before its commit renames it to `checkpoint_directory`."""
    return run / "checkpoints" / f".tmp-step_{step:08d}-g{generation:06d}"


def list_step_folders(run: Path) -> list[int]:
    """Steps that have a folder in a run directory, ascending; empty when there is none. As a commit is a rename, one
    without a manifest has lost it."""
    try:
        matches = [STEP_PATTERN.match(entry.name) for entry in (run / "checkpoints").iterdir()]
    except FileNotFoundError:
        return []
    return sorted(int(match.group(1)) for match in matches if match)


def list_checkpoints(run: Path) -> list[int]:
    """Steps of the committed checkpoints of a run directory, ascending; empty when there is none."""
    return [step for step in list_step_folders(run) if (checkpoint_directory(run, step) / MANIFEST_NAME).is_file()]


def fsync_directory(directory: Path) -> None:
    """Make the names in `directory` durable: a rename or a new file is only safe once its folder is on disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_64_hexdigest(canonical.encode())


def _manifest_text(content: dict[str, Any]) -> bytes:
    """The file that holds `content`: there is one only, so that no byte of it can be changed without notice."""
    return (json.dumps({**content, "checksum": _checksum(content)}, separators=(",", ": ")) + "\n").encode()


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json` durably and atomically, with a checksum of its own content as its last key."""
    # Through JSON and back: keys become strings first, so that the checksum is of what a reader will see.
    content = json.loads(json.dumps(manifest.model_dump(mode="json", by_alias=True)))
    temporary = directory / f".{MANIFEST_NAME}.tmp"
    with temporary.open("wb") as file:
        file.write(_manifest_text(content))
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(directory / MANIFEST_NAME)
    fsync_directory(directory)


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest of a checkpoint folder.

    Raises FileNotFoundError when there is none, DamagedFileError when it is not what was written, and ValueError
    for a version that this program does not read.
    """
    path = directory / MANIFEST_NAME
    try:
        data = path.read_bytes()
        content = json.loads(data)
        recorded, version = content.pop("checksum"), content["version"]
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{directory} is not a checkpoint: it holds no {MANIFEST_NAME}.") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedFileError(f"{path} is damaged: it is not a checkpoint manifest ({error}).") from error
    # Before the version, of which a byte may be damaged as well: every version has this checksum.
    actual = _checksum(content)
    if recorded != actual:
        raise DamagedFileError(f"{path} is damaged: its content has the checksum {actual}, recorded is {recorded}.")
    if data != _manifest_text(content):
        raise DamagedFileError(f"{path} is damaged: it holds other bytes than were written, of the same meaning.")
    if version != VERSION:
        raise ValueError(f"{path} has the format {version!r}, and this version of Trainyard reads {VERSION!r} only.")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{path} is not a valid {VERSION} manifest: {_first_problem(error)}.") from error


def _first_problem(error: ValidationError) -> str:
    problems: Sequence[Any] = error.errors()
    place = ".".join(str(part) for part in problems[0]["loc"])
    return f"{place + ': ' if place else ''}{problems[0]['msg']}"
