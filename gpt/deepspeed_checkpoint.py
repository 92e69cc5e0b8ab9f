"""A folder that DeepSpeed's own `save_checkpoint` wrote, as a source of export: ZeRO stages 1, 2 and 3, any world size.

Its files are pickles, which can run code when they are loaded. Here they are loaded as data: only the classes of
`ALLOWED` may occur, and inert ones stand in for them. Tensors stay in the files (mmap) until a chunk of them is used.
"""

import json
import math
import pickle
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gpt.checkpoint.format import Precision
from gpt.checkpoint.read import NAMES_SHOWN, TORCH_DTYPES
from gpt.export_source import CHUNK_ELEMENTS, ExportSource

MODEL_FILE, OPTIMIZER_FILE = "mp_rank_00_model_states.pt", "mp_rank_00_optim_states.pt"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


class _Inert:
    """Stands in for an object of DeepSpeed's: holds its state, does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


ALLOWED = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Inert, "deepspeed.utils.tensor_fragment.fragment_address"),
]
"""What DeepSpeed 0.19.8 writes beyond tensors and plain values, and what is made of it."""


class _Saved(dict[str, Any]):
    """What a file holds; a key that is not there is an error with the file's name."""

    def __init__(self, path: Path, content: Any) -> None:
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds no dictionary: DeepSpeed's save_checkpoint did not write it.")
        super().__init__(content)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"{self.path} has no {key}: DeepSpeed's save_checkpoint with ZeRO 1, 2 or 3 did not write it.")


def is_deepspeed_checkpoint(source: Path) -> bool:
    """Whether `source` is a folder for `save_checkpoint`, one of its tag folders, or would be one of them."""
    holds_tags = _tags(source if source.is_dir() else source.parent)
    return bool(holds_tags) or _is_tag_folder(source) or (source / "latest").is_file()


def tag_folder(source: Path) -> Path:
    """The checkpoint in `source`: itself, or the one that its file `latest` names.

    Raises FileNotFoundError where there is none, listing those that there are.
    """
    if _is_tag_folder(source):
        return source
    parent = source if source.is_dir() else source.parent
    tags = ", ".join(_tags(parent)) or "none"
    if not source.is_dir():
        raise FileNotFoundError(f"There is no checkpoint {source}; {parent} has {tags}.")
    if not (source / "latest").is_file():
        raise FileNotFoundError(
            f"{source} has no file latest that names a checkpoint; give one of its folders: {tags}."
        )
    tag = (source / "latest").read_text(encoding="utf-8").strip()
    if tag not in _tags(source):
        raise FileNotFoundError(
            f"{source / 'latest'} names {tag!r}, which is not there; give one of its folders: {tags}."
        )
    return source / tag


def _is_tag_folder(folder: Path) -> bool:
    return any(any(folder.glob(f"*{name}")) for name in (MODEL_FILE, OPTIMIZER_FILE))


def _tags(folder: Path) -> list[str]:
    """The tags of the checkpoints in a folder, numbers in their order."""
    tags = [child.name for child in folder.iterdir() if _is_tag_folder(child)] if folder.is_dir() else []
    return sorted(tags, key=lambda tag: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", tag)])


class DeepSpeedWeights:
    """The weights of one tag folder, as a `WeightSource`: fp32 masters, and frozen parameters in the training dtype.

    At stages 1 and 2 the files hold the weights twice, the masters in parts and the model's own whole: each chunk is
    held against the second. At stage 3 there is nothing to hold them against but sizes and counts.

    Raises:
        FileNotFoundError: a rank's file is missing.
        ValueError: a file is damaged, of another save, not of ZeRO, or holds what only `trust_pickle` may load.
    """

    def __init__(self, directory: Path, config: dict[str, Any], *, trust_pickle: bool = False) -> None:
        self.directory, self.config = directory, config
        self._trust_pickle = trust_pickle
        try:
            self._lay_out(*self._load_ranks())
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{directory} is damaged, or not of DeepSpeed's save_checkpoint with ZeRO: its files do not hold what "
                f"they name ({type(error).__name__}: {_first_line(error)})."
            ) from error

    def _lay_out(self, models: list[_Saved], optimizers: list[_Saved]) -> None:
        first = models[0]
        self.world_size, self.steps, self.version = len(optimizers), int(first["global_steps"]), first["ds_version"]
        module, tied = first["module"], first["shared_params"]
        self._buffers = {name: module[name] for name in first["buffer_names"]}
        self.buffers = list(self._buffers)
        self.memory_bytes = 0  # its files are mapped
        parameters = {n: value for n, value in module.items() if n not in self._buffers and n not in tied}
        self.precision = self._precision_of(parameters.values())
        self.shapes = {name: tuple(shape) for group in first["param_shapes"] for name, shape in group.items()}
        self._copies: dict[str, torch.Tensor] = {}
        if "fp32_flat_groups" in optimizers[0]:
            self.stage = 3
            self._pieces = self._pieces_of_shares(models, optimizers)
        else:
            self.stage = int(optimizers[0].get("zero_stage", 1))  # its optimizer for bf16, of stage 1, does not say
            self._copies = {name: parameters[name].reshape(-1) for name in self.shapes}
            frozen = {name: value for name, value in parameters.items() if name not in self.shapes}
            self.shapes |= {name: tuple(value.shape) for name, value in frozen.items()}
            self._pieces = self._pieces_of_slices(first["param_shapes"], optimizers) | {
                n: [v.reshape(-1)] for n, v in frozen.items()
            }
        for name, shape in self.shapes.items():
            held = sum(piece.numel() for piece in self._pieces.get(name, []))
            if held != math.prod(shape):
                raise ValueError(f"{self.directory} holds {held} elements of {name}, which has the shape {shape}.")

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        """As `WeightSource`; raises ValueError where masters and the model's own weights differ (stages 1 and 2)."""
        copy, done = self._copies.get(name), 0
        for piece in self._pieces[name]:
            for chunk in piece.split(CHUNK_ELEMENTS):
                if copy is not None:
                    other = copy[done : done + chunk.numel()]
                    if not torch.equal(chunk.to(other.dtype), other) and bool(torch.isfinite(chunk).all()):
                        raise ValueError(
                            f"{self.directory} holds {name} twice, and the two differ: the optimizer's files and the "
                            "model's are not of one save, or one is damaged. Use another checkpoint."
                        )
                    done += chunk.numel()
                yield chunk

    def buffer(self, name: str) -> torch.Tensor:
        """As `WeightSource`."""
        return self._buffers[name].detach()

    def _load_ranks(self) -> tuple[list[_Saved], list[_Saved]]:
        """What every rank wrote: the model's states (at stages 1 and 2 only rank 0 did) and the optimizer's."""
        present = sorted(path.name for path in self.directory.glob("*_states.pt"))
        some = next((name for name in present if name.endswith(MODEL_FILE)), None)
        if some is None:
            raise FileNotFoundError(f"{self.directory} lacks the files *{MODEL_FILE}; use a whole copy of it.")
        whole = not some.startswith("zero_")
        state = self._load(some)
        if not state.get("param_shapes"):
            raise ValueError(
                f"{self.directory / some} names no partitioned parameters: it is not of ZeRO stage 1, 2 or 3, "
                "which alone can be exported."
            )
        ranks = [f"zero_pp_rank_{rank}" for rank in range(int(state["dp_world_size"]))]
        prefix = "bf16_" if any(name.startswith("bf16_") for name in present) else ""
        model_names = [MODEL_FILE] if whole else [f"{rank}_{MODEL_FILE}" for rank in ranks]
        optimizer_names = [f"{prefix}{rank}_{OPTIMIZER_FILE}" for rank in ranks]
        expected = {*model_names, *optimizer_names}
        if missing := sorted(expected - set(present)):
            raise FileNotFoundError(
                f"{self.directory} was written by {len(ranks)} ranks, but lacks {_some(missing)}; use a whole copy."
            )
        if others := sorted(set(present) - expected):
            raise ValueError(
                f"{self.directory} was written by {len(ranks)} ranks, but also holds {_some(others)}: of another save, "
                "or of model or expert parallelism, which cannot be exported."
            )
        models = [state if name == some else self._load(name) for name in model_names]
        optimizers = [self._load(name, "optimizer_state_dict") for name in optimizer_names]
        self._check_one_save(models, optimizers)
        return models, optimizers

    def _check_one_save(self, models: list[_Saved], optimizers: list[_Saved]) -> None:
        """Files that ranks wrote at different steps, as a killed save leaves them, agree in nothing but their sizes."""
        steps = sorted({int(model["global_steps"]) for model in models})
        updates = {tuple(sorted(_updates(optimizer))) for optimizer in optimizers}
        if len(steps) > 1 or len(updates) > 1:
            raise ValueError(
                f"The files in {self.directory} are not of one save: step {' and '.join(map(str, steps))}, "
                f"after {' and '.join(map(str, sorted(updates)))} updates. Use another checkpoint."
            )

    def _load(self, name: str, part: str | None = None) -> _Saved:
        """The content of a file, or a part of it."""
        path = self.directory / name
        try:
            content = _load_as_data(path)
        except pickle.UnpicklingError as error:
            if self._trust_pickle:
                content = _load_trusted(path)
            else:
                raise ValueError(
                    f"{path} is a pickle that would load {_foreign_globals(path, error)}, which DeepSpeed itself does "
                    "not write, and that can run any code. If you trust all who could write it, add --trust-pickle."
                ) from error
        whole = _Saved(path, content)
        return whole if part is None else _Saved(path, whole[part])

    def _precision_of(self, parameters: Iterable[torch.Tensor]) -> Precision:
        dtypes = {value.dtype for value in parameters if value.is_floating_point()}
        for precision, dtype in TORCH_DTYPES.items():
            if dtypes == {dtype}:
                return precision
        names = ", ".join(sorted(map(str, dtypes))) or "none"
        raise ValueError(
            f"The parameters in {self.directory} have the dtypes {names}; one of bf16, fp16, fp32 is known."
        )

    def _pieces_of_shares(self, models: list[_Saved], optimizers: list[_Saved]) -> dict[str, list[torch.Tensor]]:
        """Stage 3: every rank has an equal share of each parameter, padded at the end. Adds the frozen ones' shapes."""
        pieces: dict[str, list[torch.Tensor]] = {}
        groups = models[0]["param_shapes"]
        for optimizer in optimizers:
            _check_count(optimizer, "fp32_flat_groups", len(groups))
        for index, group in enumerate(groups):
            flats, start = [optimizer["fp32_flat_groups"][index].detach() for optimizer in optimizers], 0
            for name in group:
                elements = math.prod(self.shapes[name])
                share = math.ceil(elements / self.world_size)
                pieces[name] = _cut([flat[start : start + share] for flat in flats], 0, elements)
                start += share
            if any(flat.numel() != start for flat in flats):
                sizes = ", ".join(str(flat.numel()) for flat in flats)
                raise ValueError(
                    f"The ranks in {self.directory} hold {sizes} elements of group {index}, not {start} each."
                )
        for name, shape in (models[0]["frozen_param_shapes"] or {}).items():
            self.shapes[name] = tuple(shape)
            fragments = [model["frozen_param_fragments"][name].reshape(-1) for model in models]
            pieces[name] = _cut(fragments, 0, math.prod(shape))
        return pieces

    def _pieces_of_slices(self, groups: list[Any], optimizers: list[_Saved]) -> dict[str, list[torch.Tensor]]:
        """Stages 1 and 2: a group's parameters, in order and perhaps padded, are one vector that is cut into ranks.

        The files also hold `param_slice_mappings`, which are wrong with round_robin_gradients in DeepSpeed 0.19.8.
        """
        pieces: dict[str, list[torch.Tensor]] = {}
        for optimizer in optimizers:
            _check_count(optimizer, "single_partition_of_fp32_groups", len(groups))
        for index, group in enumerate(groups):
            flats = [optimizer["single_partition_of_fp32_groups"][index].detach() for optimizer in optimizers]
            paddings = (optimizers[0].get("param_alignment_paddings") or [[0] * len(group)] * len(groups))[index]
            start = 0
            for name, padding in zip(group, paddings, strict=True):
                elements = math.prod(self.shapes[name])
                pieces[name] = _cut(flats, start, elements)
                start += elements + padding
            held = sum(flat.numel() for flat in flats)
            if not 0 <= held - start < 2 * self.world_size:  # the vector may be filled up to 2 elements a rank
                raise ValueError(f"The ranks in {self.directory} hold {held} elements of group {index}, not {start}.")
        return pieces


def _check_count(optimizer: _Saved, key: str, groups: int) -> None:
    if len(optimizer[key]) != groups:
        raise ValueError(f"{optimizer.path} has {len(optimizer[key])} {key}, but the model {groups} groups.")


def _cut(flats: list[torch.Tensor], start: int, elements: int) -> list[torch.Tensor]:
    """The elements `[start, start + elements)` of the vector that is the `flats` one after another, in pieces."""
    pieces = []
    for flat in flats:
        pieces.append(flat[max(0, start) : max(0, start + elements)])
        start -= flat.numel()
    return pieces


def _updates(optimizer: _Saved) -> set[float]:
    """The optimizer's own counts of its updates, where it has some."""
    base = optimizer.get("optimizer_state_dict") or optimizer.get("base_optimizer_state") or {}
    states = base["state"].values() if isinstance(base, dict) and "state" in base else []
    return {float(state["step"]) for state in states if "step" in state}


def _load_as_data(path: Path) -> Any:
    """Load a pickle that holds nothing but tensors, plain values and `ALLOWED`; raises UnpicklingError for another."""
    try:
        with torch.serialization.safe_globals(ALLOWED):  # type: ignore[arg-type]
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise
    except (RuntimeError, ValueError, TypeError, EOFError, OSError, KeyError) as error:
        raise ValueError(
            f"{path} cannot be read: it is cut short or damaged, or no file of torch.save ({_first_line(error)})."
        ) from error


def _load_trusted(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    except Exception as error:  # a pickle may raise anything
        raise ValueError(f"{path} cannot be loaded, though it is trusted: {_first_line(error)}.") from error


def _foreign_globals(path: Path, error: Exception) -> str:
    """The names in a pickle that are not allowed; found without running it."""
    try:
        with torch.serialization.safe_globals(ALLOWED):  # type: ignore[arg-type]
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (pickle.UnpicklingError, ValueError, KeyError, IndexError):
        names = []
    return _some(names) if names else f"what cannot be told ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMES_SHOWN]) + (
        f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    )


def source_of_deepspeed(
    source: Path, *, config: Path | None = None, tokenizer: Path | None = None, trust_pickle: bool = False
) -> ExportSource:
    """The checkpoint in `source` with the model's configuration and tokenizer, given or found.

    Where they are not given, `source`'s tag folder, the folder of the tags and the one above it are searched in this
    order, and the first that has a config.json, or a tokenizer, is taken.
    Raises as `tag_folder` and `DeepSpeedWeights` do, and FileNotFoundError or ValueError for a configuration or
    tokenizer that cannot be found or read.
    """
    directory = tag_folder(source).absolute()
    places = [directory, directory.parent, directory.parent.parent]
    config_file = _config_file(config, places)
    fields = _read_config(config_file)
    loaded, place = _load_tokenizer(tokenizer, places)
    weights = DeepSpeedWeights(directory, fields, trust_pickle=trust_pickle)
    elements = sum(math.prod(shape) for shape in weights.shapes.values())
    return ExportSource(
        name=f"{directory.parent.name} {directory.name}",
        weights=weights,
        tokenizer=loaded,
        probe=None,
        facts={
            "step": weights.steps,
            "deepspeed": {
                "checkpoint": str(directory),
                "version": weights.version,
                "zero_stage": weights.stage,
                "world_size": weights.world_size,
                "compared_with": None
                if weights.stage == 3
                else "the model's own weights, which the files hold as well",
                "config": str(config_file),
                "tokenizer": str(place),
            },
        },
        card={
            "Architecture": f"{fields.get('model_type')}, {elements:,} parameters",
            "Training data": "unknown",
            "Trained on": f"{weights.steps:,} steps, {weights.world_size} ranks at the end",
            "Precision": weights.precision,
            "Made with": f"DeepSpeed {weights.version}, ZeRO stage {weights.stage}; exported by Trainyard",
        },
        recipe=None,
    )


def _config_file(given: Path | None, places: list[Path]) -> Path:
    if given is not None:
        file = given / "config.json" if given.is_dir() else given
        if not file.is_file():
            raise FileNotFoundError(f"There is no model configuration {file}.")
        return file
    for place in places:
        if (place / "config.json").is_file():
            return place / "config.json"
    raise FileNotFoundError(
        f"None of {', '.join(map(str, places))} has the model's config.json; give it with --config."
    )


def _read_config(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise ValueError(f"{file} is no configuration of a transformers model: it has no model_type.")
    return fields


def _load_tokenizer(given: Path | None, places: list[Path]) -> tuple[PreTrainedTokenizerBase, Path]:
    candidates = places if given is None else [given]
    place = next((p for p in candidates if any((p / name).is_file() for name in TOKENIZER_FILES)), None)
    if place is None:
        raise FileNotFoundError(
            f"{'None of ' if len(candidates) > 1 else ''}{', '.join(map(str, candidates))} has "
            f"{'a' if len(candidates) > 1 else 'no'} tokenizer; give its folder with --tokenizer."
        )
    try:
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # transformers raises many types here
        raise ValueError(f"The tokenizer cannot be loaded from {place}: {error}") from error
    return loaded, place
