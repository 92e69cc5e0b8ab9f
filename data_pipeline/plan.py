"""What ``prepare`` is asked to do, and the plan that follows from it: the same on every worker and node."""

import hashlib
import json
import shlex
import unicodedata
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from data_pipeline.sources import ReadOptions, SourceFile, Unit, content_kind, content_paths, find_files, plan_units
from data_pipeline.tokenizer import tokenizer_files

if TYPE_CHECKING:  # without rules nothing of them is loaded
    from data_pipeline.rules import Rules

SPLITS = ("train", "validation")
MAX_UNITS = 4096
WHOLE_DIGEST_BYTES = 64 * 2**20
EDGE_BYTES = 2**20
RULES_VERSION = 4  # to be raised when a rule does something else

Progress = Callable[[int, int], None]


@dataclass
class PrepareOptions:
    """What ``trainyard prepare`` is asked to do."""

    inputs: list[str]  # files, folders, globs, URLs, hf://
    output: Path
    tokenizer: Path | None = None  # an existing tokenizer folder, or ...
    train_vocabulary: int | None = None  # ... the vocabulary size of one to train
    read: ReadOptions = field(default_factory=ReadOptions)
    validation_fraction: float = 0.01  # share of documents, where validation_inputs does not name files of their own
    validation_inputs: list[str] = field(default_factory=list)
    rules: "Rules | None" = None  # what is repaired and dropped
    rules_file: str = ""  # its name, for the command line
    seed: int = 0
    tokenizer_sample_bytes: int = 512 * 2**20  # of text that a tokenizer is trained on, at most
    unit_bytes: int = 128 * 2**20  # of input in one work unit; larger where there would be more than MAX_UNITS
    # these do not change the result
    workers: int = 1  # processes
    task: tuple[int, int] | None = None  # (i, n): make only the units whose number is i modulo n
    engine: str = "auto"  # see engines.open_engine

    def command(self) -> str:
        """The command line that makes the same data."""
        words = ["trainyard", "prepare", *(word for entry in self.inputs for word in ("--input", entry))]
        words += ["--out", str(self.output)]
        for name, chosen in (("--tokenizer", self.tokenizer), ("--train-tokenizer", self.train_vocabulary)):
            words += [] if chosen is None else [name, str(chosen)]
        words += [word for entry in self.validation_inputs for word in ("--validation-input", entry)]
        words += ["--rules", self.rules_file] if self.rules is not None else []
        own = ["seed"] + ["tokenizer_sample_bytes"] * (self.train_vocabulary is not None)
        own += ["validation_fraction"] * (not self.validation_inputs)
        default = PrepareOptions([], self.output)
        given = [(name, getattr(self, name), getattr(default, name)) for name in own]
        given += [(f.name, getattr(self.read, f.name), getattr(default.read, f.name)) for f in fields(ReadOptions)]
        for name, value, usual in given:
            if value != usual:
                words.append("--" + name.replace("_", "-"))
                words += [] if value is True else [str(value)]
        return shlex.join(words)


@dataclass(frozen=True)
class Plan:
    """Which units are made of which files, and how. Workers get it pickled."""

    output: Path
    read: ReadOptions
    files: tuple[SourceFile, ...]
    train_files: int  # the files from this index on are validation inputs
    ignored: tuple[str, ...]  # paths found but not read
    units: tuple[Unit, ...]
    kind: str  # "text" or "chat"
    splits: tuple[str, ...]
    rules: "Rules | None"
    evaluation_files: tuple[SourceFile, ...]  # whose texts the rules keep out of training
    pairs: dict[str, list[tuple[str, str]]]  # of the files that augmentation names, by its kind
    seed: int
    validation_threshold: int | None  # content hashes below it fall to validation; None: by file
    weights: tuple[int, ...]  # bytes of input of each unit, at least 1
    sample_bytes: tuple[int, ...]  # of text that each unit gives to a tokenizer's training, at most
    engine: str
    identity: str

    def split_of(self, file: int, content_hash: int) -> str:
        """By file where validation has its own, else by content: equal documents always fall to one split."""
        if self.validation_threshold is None:
            return SPLITS[file >= self.train_files]
        return SPLITS[content_hash < self.validation_threshold]

    @property
    def total_bytes(self) -> int:
        return sum(file.bytes for file in self.files)


def make_plan(options: PrepareOptions, progress: Progress | None = None) -> Plan:
    """Find the files, cut them into units and hash what the result depends on.

    Raises:
        FileNotFoundError, ValueError: inputs that are missing, mixed or given twice; one sentence.
    """
    files, ignored = find_files(options.inputs, options.read)
    train_files = len(files)
    if options.validation_inputs:
        validation, more = find_files(options.validation_inputs, options.read)
        shared = {file.place for file in files} & {file.place for file in validation}
        if shared:
            raise ValueError(f"{min(shared)} is both a training and a validation input: leave it out of one")
        files, ignored = files + validation, ignored + more
    kinds = {content_kind(file, options.read): file for file in files}
    if "chat" in kinds and len(kinds) > 1:
        other = kinds.get("text") or kinds["ids"]
        raise ValueError(
            f"{kinds['chat'].label} holds conversations and {other.label} plain text: prepare them separately"
        )
    if "chat" in kinds and options.engine not in ("auto", "huggingface"):
        raise ValueError(f"{kinds['chat'].label} holds conversations, which the engine huggingface alone encodes")
    if "ids" in kinds and options.train_vocabulary is not None:
        raise ValueError(f"{kinds['ids'].label} holds token ids: give the tokenizer that made them (--tokenizer)")
    if "ids" in kinds and options.rules is not None:
        raise ValueError(f"{kinds['ids'].label} holds token ids, to which rules (--rules) cannot be applied")
    kind = "chat" if "chat" in kinds else "text"  # ids are of texts
    evaluation, pairs = _evaluation_files(options, files), _pairs(options, kind)
    unit_bytes = max(options.unit_bytes, -(-sum(file.bytes for file in files) // MAX_UNITS))
    units = tuple(plan_units(files, options.read, unit_bytes))
    weights, train = _unit_bytes(files, units, len(files)), _unit_bytes(files, units, train_files)
    validated = bool(options.validation_inputs) or options.validation_fraction > 0
    return Plan(
        output=Path(options.output),
        read=options.read,
        files=tuple(files),
        train_files=train_files,
        ignored=tuple(ignored),
        units=units,
        kind=kind,
        splits=SPLITS if validated else SPLITS[:1],
        rules=options.rules,
        evaluation_files=tuple(evaluation),
        pairs=pairs,
        seed=options.seed,
        validation_threshold=None if options.validation_inputs else int(options.validation_fraction * 2**64),
        weights=tuple(weights),
        sample_bytes=tuple(options.tokenizer_sample_bytes * weight // max(1, sum(train)) for weight in train),
        engine=options.engine,
        identity=_identity(options, files, train_files, units, evaluation, pairs, progress),
    )


def _evaluation_files(options: PrepareOptions, inputs: list[SourceFile]) -> list[SourceFile]:
    if options.rules is None or options.rules.decontamination is None:
        return []
    files = find_files(options.rules.decontamination.files, ReadOptions())[0]
    shared = {file.place for file in files} & {file.place for file in inputs}
    if shared:
        raise ValueError(
            f"{min(shared)} is both an input and an evaluation file (decontamination.files): leave it out of one"
        )
    return files


def _pairs(options: PrepareOptions, kind: str) -> dict[str, list[tuple[str, str]]]:
    if options.rules is None or options.rules.augmentation is None:
        return {}
    if options.rules.augmentation.turns is not None and kind == "text":
        raise ValueError("augmentation.turns is for conversations, and the inputs are plain text: leave it out")
    from data_pipeline.augment import read_pairs  # without augmentation nothing of it is loaded

    return read_pairs(options.rules)


def _unit_bytes(files: list[SourceFile], units: tuple[Unit, ...], used: int) -> list[int]:
    """Bytes of input of each unit, of the first ``used`` files; at least 1 where it has parts of them."""
    extents = [0] * len(files)
    for unit in units:
        for part in unit.parts:
            extents[part.file] += part.end - part.begin
    shares = [[(part.file, part.end - part.begin) for part in unit.parts if part.file < used] for unit in units]
    return [
        sum(max(1, files[file].bytes * length // max(1, extents[file])) for file, length in unit) for unit in shares
    ]


def _identity(
    options: PrepareOptions,
    files: list[SourceFile],
    train_files: int,
    units: tuple[Unit, ...],
    evaluation: list[SourceFile],
    pairs: dict[str, list[tuple[str, str]]],
    progress: Progress | None,
) -> str:
    """A hash of all that the result depends on: options, the tokenizer, the units, names and digests of the files.

    Skipping bad rows is not part of it: it gives the same data where there are none, and a stored result that skipped
    some is not taken for one that must not.
    """
    choices: dict[str, Any] = {
        "read": _read_choices(options.read),
        "train_vocabulary": options.train_vocabulary,
        "validation_fraction": None if options.validation_inputs else options.validation_fraction,
        "seed": options.seed,
        "sample": None if options.train_vocabulary is None else options.tokenizer_sample_bytes,
        "units": [[[part.file, part.begin, part.end] for part in unit.parts] for unit in units],
    }
    if options.rules is not None:
        import ftfy
        import stdnum

        tables = {"ftfy": ftfy.__version__, "stdnum": stdnum.__version__, "unicode": unicodedata.unidata_version}
        if options.rules.language is not None:
            import py3langid

            tables["py3langid"] = py3langid.__version__
        choices["rules"] = [RULES_VERSION, options.rules.model_dump(), tables]
        choices["evaluation"] = [digest for file in evaluation for digest in _digests(file)]
        choices["pairs"] = pairs
    if options.tokenizer is not None:
        choices["tokenizer"] = {file.name: file_digest(file) for file in tokenizer_files(options.tokenizer)}
    digests = []
    done, total = 0, sum(file.bytes for file in files)
    for index, file in enumerate(files):
        digests.append([file.name, file.bytes, _digests(file), index >= train_files])
        done += file.bytes
        if progress is not None:
            progress(done, total)
    return hashlib.sha256(json.dumps(["prepare/2", choices, digests], sort_keys=True).encode()).hexdigest()


def _read_choices(read: ReadOptions) -> dict[str, Any]:
    """How files are read, a template by what it says and not by its place."""
    choices = {key: value for key, value in asdict(read).items() if key not in ("skip_bad_rows", "template")}
    return choices if read.template is None else choices | {"template": asdict(replace(read.template, file=""))}


def _digests(file: SourceFile) -> list[str]:
    """Of the content; of a file at a URL what its store says of it."""
    return [file.version] if file.url else [file_digest(path) for path in content_paths(file)]


def file_digest(path: Path) -> str:
    """xxh3-128 of a file's content; above 64 MiB of its size, its modification time and its first and last MiB.

    Each of many nodes takes the digests before it starts, and reading a terabyte for that would take hours. So a large
    file that is changed in its middle, with its size and modification time kept, is not noticed.
    """
    digest = xxhash.xxh3_128()
    status = path.stat()
    with open(path, "rb") as content:
        if status.st_size <= WHOLE_DIGEST_BYTES:
            while block := content.read(2**23):
                digest.update(block)
            return digest.hexdigest()
        digest.update(content.read(EDGE_BYTES))
        content.seek(-EDGE_BYTES, 2)
        digest.update(content.read(EDGE_BYTES))
    return f"{status.st_size} {status.st_mtime_ns} {digest.hexdigest()}"
