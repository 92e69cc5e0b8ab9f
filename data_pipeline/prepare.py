"""Files in, token shards out: a plan of work units, made by any number of processes and hosts, then merged.

The report is written last. Until then the marker says whose work the output holds: a start with the same plan goes on
with it, and one with another begins anew.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from data_pipeline.duplicates import mark_duplicates
from data_pipeline.merge import merge_units
from data_pipeline.plan import SPLITS, Plan, PrepareOptions, Progress, make_plan
from data_pipeline.remote_blocks import is_url
from data_pipeline.report import render_page
from data_pipeline.shard_writer import sync_directory, write_file_atomically
from data_pipeline.token_shards import TokenShards
from data_pipeline.tokenizer import copy_tokenizer, train_tokenizer
from data_pipeline.unit_documents import RECORDS, require_kept, unit_is_judged
from data_pipeline.units import TOKENIZER, no_room, sample_path, unit_is_done
from data_pipeline.workers import run_units

REPORT_VERSION = "prepare/3"
REPORT_NAME = "report.json"
PAGE_NAME = "report.html"
MARKER_NAME = "prepare.incomplete"
SAMPLE_NAME = "sample.json"  # in RECORDS: what the tokenizer was trained on


def prepare(options: PrepareOptions, progress: Progress | None = None) -> dict[str, Any]:
    """Write ``train``, ``validation``, ``tokenizer``, ``report.json`` and ``report.html`` into ``options.output``;
    return the report.

    The same options on the same files give the same bytes, for any number of workers and after any interruption. What
    an interrupted call has finished is kept; where the output already holds all of it, nothing is done and the stored
    report comes back.

    Args:
        options: see ``PrepareOptions``.
        progress: called now and then with (bytes done, bytes in all), passes over the files counted each.

    Returns:
        The report, and beside what its file holds ``reused`` (nothing had to be done) and ``run`` (``engine``,
        ``units_made``, ``seconds``). Of a task whose fellows are at work: ``task``, ``units``, ``units_done``, ``run``.

    Raises:
        FileNotFoundError, ValueError: bad options, bad input, or an output that holds something else; one sentence.
        OSError: the disk is full, or a unit's worker was killed again and again; the same call goes on afterwards.
    """
    began = time.monotonic()
    _check_options(options)
    bar = _Bar(progress, passes=2 + (options.train_vocabulary is not None) + (options.rules is not None))
    plan = make_plan(options, bar.within_pass)
    bar.next_pass()
    stored = _stored_report(options, plan)
    if stored is None:
        try:
            with _claimed(options, plan):
                result, run = _make(options, plan, bar)
        except OSError as error:
            stored = _stored_report(options, plan)
            if stored is None:  # else another task merged meanwhile and removed the records
                raise no_room(error, plan.output) from None
    if stored is not None:
        result, run = stored | {"reused": True}, {"engine": "", "units_made": 0}
    return result | {"run": run | {"seconds": time.monotonic() - began}}


def parse_task(text: str) -> tuple[int, int]:
    """``"3/16"`` as ``PrepareOptions.task``. ValueError for anything else."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match:
        raise ValueError(f"the task is {text!r}; it is written I/N, for example 0/16")
    return int(match[1]), int(match[2])


def _check_options(options: PrepareOptions) -> None:
    if (options.tokenizer is None) == (options.train_vocabulary is None):
        raise ValueError("give either a tokenizer folder (--tokenizer) or the size of one to train (--train-tokenizer)")
    if not 0 <= options.validation_fraction < 1:
        raise ValueError(f"the validation fraction is {options.validation_fraction}; it must be at least 0 and below 1")
    if not 0 <= options.seed < 2**64:
        raise ValueError(f"the seed is {options.seed}; it must be at least 0 and below 2**64")
    for name in ("workers", "tokenizer_sample_bytes", "unit_bytes"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 1")
    if options.task is not None:
        index, count = options.task
        if not 0 <= index < count:
            raise ValueError(f"the task is {index}/{count}; tasks of {count} are numbered from 0 to {count - 1}")
        if options.tokenizer is None:
            raise ValueError(
                "tasks share one tokenizer: train it first (trainyard prepare with --train-tokenizer on a part of the "
                "data), then give its folder to all tasks with --tokenizer"
            )
        if options.rules is not None:
            raise ValueError(
                "tasks see their own share only, and rules (--rules) drop duplicates in the whole: prepare with one "
                "call and many --workers"
            )
    if not options.inputs:
        raise ValueError("give at least one input")
    output = Path(options.output).resolve()
    used = [*options.inputs, *options.validation_inputs]
    for entry in used if options.tokenizer is None else [*used, str(options.tokenizer)]:
        if not is_url(entry) and Path(entry).resolve().is_relative_to(output):
            raise ValueError(f"{entry} is inside the output {options.output}: choose another output directory")


class _Bar:
    """Progress over several passes that never goes back, also where a killed worker's unit begins again."""

    def __init__(self, progress: Progress | None, passes: int) -> None:
        self._progress = progress
        self._passes = passes
        self._finished = 0
        self._shown = 0.0

    def within_pass(self, done: float, total: float) -> None:
        self._shown = max(self._shown, self._finished + done / max(total, 1))
        if self._progress is not None:
            size = max(int(total), 1)
            self._progress(int(self._shown * size), size * self._passes)

    def next_pass(self) -> None:
        self._finished += 1


# The output directory


def _stored_report(options: PrepareOptions, plan: Plan) -> dict[str, Any] | None:
    """The report of an earlier, equal preparation; None where there is none; ValueError for an unequal one."""
    output = plan.output
    path = output / REPORT_NAME
    if not path.is_file():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["version"] != REPORT_VERSION:
            raise ValueError("it lacks parts, or has others")
        same = report["identity"] == plan.identity
        fingerprints = {split: report["splits"][split]["fingerprint"] for split in report["splits"]}
        same = same and (not report["skipped_rows"] or options.read.skip_bad_rows)
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path} is not a report of this version of trainyard prepare: delete {output} or choose another --out"
        ) from None
    if not same:
        raise ValueError(
            f"{output} already holds data made with other options or from other files "
            f"({report.get('command', 'unknown')}): delete it or choose another --out"
        )
    for split, fingerprint in fingerprints.items():
        shards = TokenShards(output / split)
        shards.check_files()
        if shards.fingerprint != fingerprint:
            raise ValueError(
                f"{output / split} is not the data that {path} describes: delete {output} and prepare it again"
            )
    _remove_traces(output)
    return report


def _remove_traces(output: Path) -> None:
    """Remove what only an unfinished preparation needs."""
    (output / MARKER_NAME).unlink(missing_ok=True)
    shutil.rmtree(output / RECORDS, ignore_errors=True)
    for folder in (output, *(output / name for name in SPLITS)):
        for leftover in folder.glob("*.tmp"):
            leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def _claimed(options: PrepareOptions, plan: Plan) -> Iterator[None]:
    """Make the output this plan's and keep others from it; what an interrupted start with the same plan left stays.

    The lock is on the marker: shared between tasks, else exclusive. Where the file system has no locks, tasks still
    agree, because all they write is the same.
    """
    output = plan.output
    _refuse_foreign(output)
    output.mkdir(parents=True, exist_ok=True)
    with open(output / MARKER_NAME, "a+b") as marker:
        _lock(marker.fileno(), output, shared=options.task is not None)
        marker.seek(0)
        content = marker.read()
        mine = orjson.dumps({"identity": plan.identity, "command": options.command()})
        identity = None
        with contextlib.suppress(ValueError, KeyError, TypeError):
            identity = orjson.loads(content)["identity"]
        if identity != plan.identity:
            if content and options.task is not None:
                raise ValueError(
                    f"{output} holds an interrupted preparation with other options or from other files: delete it or "
                    "choose another --out"
                )
            if options.task is None:
                _clear(output)
            marker.truncate(0)
            marker.write(mine)
            marker.flush()
            os.fsync(marker.fileno())
        (output / RECORDS).mkdir(exist_ok=True)
        sync_directory(output)
        try:
            yield
        except ValueError:
            # a refused input leaves nothing behind, unless a call with --skip-bad-rows would keep what is done of it
            begun = any(unit_is_done(plan, unit.number) or unit_is_judged(plan, unit.number) for unit in plan.units)
            if options.task is None and not begun:
                _clear(output)
                (output / MARKER_NAME).unlink()
            raise


def _lock(descriptor: int, output: Path, shared: bool) -> None:
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another trainyard prepare is at work on {output}: wait for it or end it") from None
    except OSError:
        pass  # no locks on this file system


def _refuse_foreign(output: Path) -> None:
    """Refuse a directory that holds anything not made by ``prepare``."""
    if not output.exists():
        return
    if not output.is_dir():
        raise ValueError(f"{output} is a file: choose another --out")
    names = {
        entry.name
        for entry in output.iterdir()
        if not re.fullmatch(r"(tokenizer|report\.json|report\.html)\..*\.tmp", entry.name)
    }
    if names and (MARKER_NAME not in names or names - {*SPLITS, TOKENIZER, RECORDS, MARKER_NAME, PAGE_NAME}):
        raise ValueError(f"{output} is not empty and was not made by trainyard prepare: choose another --out")


def _clear(output: Path) -> None:
    """Remove everything but the marker."""
    for path in sorted(output.iterdir()):
        if path.name != MARKER_NAME:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


# Making it


def _make(options: PrepareOptions, plan: Plan, bar: _Bar) -> tuple[dict[str, Any], dict[str, Any]]:
    if plan.rules is not None:
        _judge(options, plan, bar)
    sample = _make_tokenizer(options, plan, bar)
    index, count = options.task or (0, 1)
    missing = [unit.number for unit in plan.units[index::count] if not unit_is_done(plan, unit.number)]
    engine = _run(options, plan, missing, bar)
    run = {"engine": engine, "units_made": len(missing)}
    left = [unit for unit in plan.units if options.task and not unit_is_done(plan, unit.number)]
    if left:
        done = {"task": f"{index}/{count}", "units": len(plan.units), "units_done": len(plan.units) - len(left)}
        return done, run
    report = {"version": REPORT_VERSION, "identity": plan.identity, "command": options.command()}
    try:
        report |= merge_units(options, plan, sample)
    except ValueError:
        if options.task is None:
            shutil.rmtree(plan.output / RECORDS)  # with other options these units are of no use
        raise
    write_file_atomically(plan.output / PAGE_NAME, render_page(report).encode())
    content = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    write_file_atomically(plan.output / REPORT_NAME, content.encode())
    _remove_traces(plan.output)
    return report | {"reused": False}, run


def _run(options: PrepareOptions, plan: Plan, numbers: list[int], bar: _Bar, step: str = "make") -> str:
    """Make the units and report progress in bytes of input."""
    weights = plan.weights
    shares = dict.fromkeys(numbers, 0.0)
    done = float(sum(weights) - sum(weights[number] for number in numbers))

    def progress(number: int, share: float) -> None:
        nonlocal done
        done += weights[number] * (share - shares[number])
        shares[number] = share
        bar.within_pass(done, sum(weights))

    engine = run_units(plan, numbers, options.workers, progress, step) if numbers else ""
    bar.within_pass(sum(weights), sum(weights))
    bar.next_pass()
    return engine


def _judge(options: PrepareOptions, plan: Plan, bar: _Bar) -> None:
    """Apply the rules to all units, before the tokenizer is trained on what they keep."""
    if plan.evaluation_files:
        from data_pipeline.decontamination import (
            require_other_data,
            write_evaluation,
        )  # which without rules nothing needs

        write_evaluation(plan)
    missing = [unit.number for unit in plan.units if not unit_is_judged(plan, unit.number)]
    _run(options, plan, missing, bar, "judge")
    try:
        if plan.evaluation_files:
            require_other_data(plan)
        require_kept(plan)
        if plan.rules is not None and plan.rules.duplicates:
            mark_duplicates(plan)
    except ValueError:
        shutil.rmtree(plan.output / RECORDS)  # with other rules or files these verdicts are of no use
        raise


def _make_tokenizer(options: PrepareOptions, plan: Plan, bar: _Bar) -> dict[str, int]:
    """Train or copy the tokenizer into the output; what a trained one was trained on, for the report."""
    folder = plan.output / TOKENIZER
    sample_file = plan.output / RECORDS / SAMPLE_NAME
    if folder.is_dir():
        if options.train_vocabulary is None:
            return {}
        bar.next_pass()
        return json.loads(sample_file.read_bytes())
    sample: dict[str, int] = {}
    temporary = folder.with_name(f"{TOKENIZER}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        if options.tokenizer is not None:
            copy_tokenizer(options.tokenizer, temporary)
        elif options.train_vocabulary is not None:
            missing = [unit.number for unit in plan.units if not sample_path(plan, unit.number).is_file()]
            _run(options, plan, missing, bar, "sample")
            sample = {"sample_documents": 0, "sample_text_bytes": 0}
            train_tokenizer(_sampled_texts(plan, sample), options.train_vocabulary, temporary)
            write_file_atomically(sample_file, json.dumps(sample).encode())
        for file in temporary.iterdir():
            with open(file, "rb") as content:
                os.fsync(content.fileno())
        with contextlib.suppress(OSError):  # another task was first; its folder is the same
            temporary.rename(folder)
        sync_directory(plan.output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for unit in plan.units:
        sample_path(plan, unit.number).unlink(missing_ok=True)
    return sample


def _sampled_texts(plan: Plan, sample: dict[str, int]) -> Iterator[str]:
    """The sampled texts of all units, counted while they pass."""
    for unit in plan.units:
        for texts in orjson.loads(sample_path(plan, unit.number).read_bytes()):
            sample["sample_documents"] += 1
            sample["sample_text_bytes"] += sum(len(text.encode()) for text in texts)
            yield from texts
