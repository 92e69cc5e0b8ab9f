"""prepare on work units: the same bytes for any number of workers and tasks, after kills and after a full disk."""

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from data_samples import EMBEDDED, VOCABULARY, add_document, macbeth, save_tokenizer, small_tokenizer, write_jsonl

from data_pipeline import duplicates, units
from data_pipeline.plan import PrepareOptions, file_digest, make_plan
from data_pipeline.prepare import MARKER_NAME, prepare
from data_pipeline.shard_writer import UnitWriter, write_file_atomically
from data_pipeline.sources import ReadOptions
from data_pipeline.token_shards import TokenShards
from data_pipeline.unit_documents import RECORDS

ROOT = EMBEDDED.parents[1]
LINES = [f"{number}: {line}" for number, line in enumerate(macbeth().splitlines()) if line][:1500]
UNIT_BYTES = 4000


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A large file, small ones and some lines of the first again, so that units hold parts, groups and duplicates."""
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "large.jsonl", [{"text": line} for line in LINES])
    for number in range(12):
        write_jsonl(
            folder / f"small_{number:02d}.jsonl", [{"text": line} for line in LINES[number * 5 : number * 5 + 9]]
        )
    return folder


def _options(corpus: Path, output: Path, tokenizer: Path | None, **changes: Any) -> PrepareOptions:
    defaults: dict[str, Any] = {"validation_fraction": 0.1, "unit_bytes": UNIT_BYTES}
    return PrepareOptions([str(corpus)], output, tokenizer=tokenizer, **(defaults | changes))


def _files(output: Path) -> dict[str, bytes]:
    """All files of an output; the report without the output's own name."""
    files = {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}
    files["report.json"] = files["report.json"].replace(str(output).encode(), b"OUT")
    return files


@pytest.fixture(scope="module")
def reference(corpus: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one worker makes without interruption."""
    output = tmp_path_factory.mktemp("reference") / "out"
    report = prepare(_options(corpus, output, tokenizer_folder))
    assert report["units"] == report["run"]["units_made"] > 20
    files = _files(output)
    assert not [name for name in files if name.startswith(".") or name.endswith(".tmp") or name == MARKER_NAME]
    return files


def _command(corpus: Path, output: Path, tokenizer: Path, **changes: Any) -> list[str]:
    """A prepare in a process of its own, as options that the command line does not have need it."""
    script = f"""
        from pathlib import Path
        from data_pipeline.plan import PrepareOptions
        from data_pipeline.prepare import prepare
        prepare(PrepareOptions([{str(corpus)!r}], Path({str(output)!r}), tokenizer=Path({str(tokenizer)!r}),
            validation_fraction=0.1, unit_bytes={UNIT_BYTES}, **{changes!r}))
    """
    return [sys.executable, "-c", textwrap.dedent(script)]


def _records(output: Path) -> int:
    return len(list((output / RECORDS).glob("u-*.json")))


def _wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


# The same bytes


def test_units_are_shards_in_the_order_of_the_input(reference: dict[str, bytes], corpus: Path, tmp_path: Path) -> None:
    for name, content in reference.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    shards = TokenShards(tmp_path / "train")
    names = [entry["name"] for entry in shards.manifest["shards"]]
    assert names == sorted(names) and len(names) > 20
    ids = np.split(shards.read(0, shards.tokens), np.cumsum(shards.document_lengths())[:-1])
    texts = [small_tokenizer().decode(document[:-1]) for document in ids]
    rows = [json.loads(line)["text"] for file in sorted(corpus.iterdir()) for line in file.read_text().splitlines()]
    kept = set(texts)
    assert texts == [row for row in rows if row in kept]
    report = json.loads(reference["report.json"])
    assert report["splits"]["validation"]["documents"] == len(rows) - len(texts)
    assert report["duplicates"]["documents_in_both_splits"] == 0
    repeated = sum(report["duplicates"][f"{split}_repeated_documents"] for split in ("train", "validation"))
    assert repeated == len(rows) - len(set(rows)) > 0


def test_engines_write_the_same_bytes(
    corpus: Path, tokenizer_folder: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    report = prepare(_options(corpus, tmp_path / "out", tokenizer_folder, engine="huggingface"))
    assert report["run"]["engine"] == "huggingface"
    assert _files(tmp_path / "out") == reference


def test_tasks_share_the_units_and_the_last_one_merges(
    corpus: Path, tokenizer_folder: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    results = [prepare(_options(corpus, output, tokenizer_folder, task=(index, 3))) for index in (2, 0)]
    assert [result["task"] for result in results] == ["2/3", "0/3"]
    assert "splits" not in results[1] and not (output / "report.json").exists()
    assert results[1]["units_done"] == sum(result["run"]["units_made"] for result in results) < results[1]["units"]
    again = prepare(_options(corpus, output, tokenizer_folder, task=(0, 3)))
    assert again["run"]["units_made"] == 0
    last = prepare(_options(corpus, output, tokenizer_folder, task=(1, 3)))
    assert last["run"]["units_made"] == last["units"] - results[1]["units_done"]
    assert _files(output) == reference
    late = prepare(_options(corpus, output, tokenizer_folder, task=(0, 3)))
    assert late["reused"] is True


@pytest.mark.full
def test_tasks_at_the_same_time(
    corpus: Path, tokenizer_folder: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    commands = [_command(corpus, tmp_path / "out", tokenizer_folder, task=(index, 3)) for index in range(3)]
    processes = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert _files(tmp_path / "out") == reference


# Interruptions


class _Killer(threading.Thread):
    """SIGKILLs a random worker so many times, each time after some progress and a random moment."""

    def __init__(self, output: Path, count: int) -> None:
        super().__init__(daemon=True)
        self._output = output
        self._count = count
        self._dice = random.Random(count)
        self.killed = 0

    def run(self) -> None:
        while self.killed < self._count:
            before = _records(self._output)
            while _records(self._output) == before:
                time.sleep(0.001)
            time.sleep(self._dice.uniform(0.0, 0.03))
            self._dice.choice(psutil.Process().children()).kill()
            self.killed += 1


@pytest.mark.parametrize(
    ("workers_count", "kills", "unit_bytes"),
    [pytest.param(2, 2, UNIT_BYTES, marks=pytest.mark.few), pytest.param(8, 20, 250, marks=pytest.mark.full)],
)
def test_killed_workers_are_replaced_and_nothing_changes(
    corpus: Path,
    tokenizer_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers_count: int,
    kills: int,
    unit_bytes: int,
) -> None:
    # a file of the user's that is called like a library must not be imported by the workers
    (tmp_path / "orjson.py").write_text("raise RuntimeError('imported from the working directory')")
    monkeypatch.chdir(tmp_path)
    prepare(_options(corpus, tmp_path / "one", tokenizer_folder, unit_bytes=unit_bytes))
    killer = _Killer(tmp_path / "out", kills)
    killer.start()
    calls: list[tuple[int, int]] = []
    report = prepare(
        _options(corpus, tmp_path / "out", tokenizer_folder, unit_bytes=unit_bytes, workers=workers_count),
        lambda done, total: calls.append((done, total)),
    )
    assert killer.killed == kills
    assert _files(tmp_path / "out") == _files(tmp_path / "one")
    assert report["run"]["units_made"] == report["units"]
    assert calls == sorted(calls) and calls[-1][0] == calls[-1][1]


@pytest.mark.parametrize("workers_count", [1, pytest.param(2, marks=pytest.mark.full)])
def test_a_killed_command_goes_on(
    corpus: Path, tokenizer_folder: Path, reference: dict[str, bytes], tmp_path: Path, workers_count: int
) -> None:
    output = tmp_path / "out"
    command = _command(corpus, output, tokenizer_folder, workers=workers_count)
    parent = subprocess.Popen(command, cwd=ROOT)
    _wait_until(lambda: _records(output) > 5)
    children = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    gone, alive = psutil.wait_procs(children, timeout=5)
    assert (len(gone), alive) == (workers_count if workers_count > 1 else 0, [])
    done = _records(output)
    assert done > 5 and not (output / "report.json").exists()
    times = {path.name: path.stat().st_mtime_ns for path in (output / RECORDS).glob("u-*.json")}
    seen: list[int] = []

    def note(done: int, total: int) -> None:
        now = {path.name: path.stat().st_mtime_ns for path in (output / RECORDS).glob("u-*.json")}
        seen.append(sum(now.get(name) == value for name, value in times.items()))

    report = prepare(_options(corpus, output, tokenizer_folder, workers=workers_count), note)
    assert report["units"] - report["run"]["units_made"] == done == max(seen)
    assert _files(output) == reference


def test_a_done_unit_whose_file_is_cut_is_made_again(
    corpus: Path, tokenizer_folder: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    prepare(_options(corpus, output, tokenizer_folder, task=(0, 2)))
    shard = output / "train" / "u-00002-000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    (output / "train" / "u-00004-000.sums").unlink()
    (output / "train" / "u-00001-000.bin.0123456789ab.tmp").write_bytes(b"left by a killed worker")
    report = prepare(_options(corpus, output, tokenizer_folder))
    assert report["run"]["units_made"] == report["units"] // 2 + 2
    assert _files(output) == reference


@pytest.mark.full
def test_interrupt_ends_all_and_keeps_what_is_done(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent(
            """
            import sys, time
            if "data_pipeline.workers" in sys.orig_argv:
                import data_pipeline.units as units
                fill = units.UnitMaker._fill
                def slow(self, number, splits, report):
                    time.sleep(0.3)  # the interrupt must come before the end
                    return fill(self, number, splits, report)
                units.UnitMaker._fill = slow
            """
        )
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    output = tmp_path / "out"
    command = _command(corpus, output, tokenizer_folder, workers=2)
    # a shell starts what is behind `&` with SIGINT ignored, which the tests may have inherited
    hear_interrupts = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    parent = subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True, preexec_fn=hear_interrupts
    )
    _wait_until(lambda: _records(output) > 2)
    children = psutil.Process(parent.pid).children()
    os.killpg(parent.pid, signal.SIGINT)  # as a terminal does it: to every process
    _, errors = parent.communicate(timeout=10)
    assert errors.count("Traceback") == 1 and errors.rstrip().endswith("KeyboardInterrupt")  # of the parent alone
    assert psutil.wait_procs(children, timeout=5)[1] == []
    assert (output / MARKER_NAME).exists() and _records(output) > 2


@pytest.mark.full
def test_a_unit_that_kills_its_worker_ends_the_command(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker dies of a memory limit as the kernel would end it: by SIGKILL, at the same unit each time."""
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent(
            """
            import os, signal, sys
            if "data_pipeline.workers" in sys.orig_argv:
                import data_pipeline.units as units
                fill = units.UnitMaker._fill
                def dying(self, number, splits, report):
                    if number == 3:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return fill(self, number, splits, report)
                units.UnitMaker._fill = dying
            """
        )
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(ChildProcessError) as caught:
        prepare(_options(corpus, tmp_path / "out", tokenizer_folder, workers=2))
    message = str(caught.value)
    assert "the worker on unit 3 (" in message and "large.jsonl" in message
    assert "4 times in a row with signal 9 (SIGKILL)" in message and "fewer --workers" in message
    assert _records(tmp_path / "out") > 0  # the others stay


@pytest.mark.parametrize("workers_count", [1, pytest.param(2, marks=pytest.mark.full)])
def test_a_bad_row_ends_all_workers_with_its_place(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path, workers_count: int
) -> None:
    rows: list[dict[str, Any]] = [{"text": line} for line in LINES]
    rows[700] = {"text": None}
    bad = write_jsonl(tmp_path / "bad.jsonl", rows)
    options = _options(bad, tmp_path / "out", tokenizer_folder, workers=workers_count)
    with pytest.raises(ValueError, match=r"bad\.jsonl:701: .*null"):
        prepare(options)
    done = _records(tmp_path / "out")
    options.read = ReadOptions(skip_bad_rows=True)
    report = prepare(options)
    assert report["units"] - report["run"]["units_made"] >= done > 0  # what was done before is kept
    [skipped] = report["skipped_rows"].values()
    assert skipped == {"count": 1, "locations": [f"{bad}:701"]}
    assert report["files"][0]["documents_in"] == len(LINES) - 1
    with pytest.raises(ValueError, match="other options"):  # what was skipped is not taken for what must be whole
        prepare(_options(bad, tmp_path / "out", tokenizer_folder))
    interrupted = _options(bad, tmp_path / "half", tokenizer_folder, read=options.read)
    for task in ((0, 2), (1, 2)):  # one of them makes the unit that skips, and none merges
        interrupted.task, interrupted.seed = task, task[0]
        interrupted.output = tmp_path / f"half{task[0]}"
        prepare(interrupted)
        interrupted.task, interrupted.read = None, ReadOptions()
        with pytest.raises(ValueError, match=r"bad\.jsonl:701"):
            prepare(interrupted)
        interrupted.read = options.read


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=320k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("workers_count", [1, pytest.param(2, marks=pytest.mark.full)])
def test_a_full_disk_is_one_sentence_and_room_lets_it_go_on(
    corpus: Path, tokenizer_folder: Path, reference: dict[str, bytes], small_disk: Path, workers_count: int
) -> None:
    options = _options(corpus, small_disk / "out", tokenizer_folder, workers=workers_count)
    with pytest.raises(OSError, match=r"cannot be written: no space left on device \([\d,]+ bytes are free there\)"):
        prepare(options)
    done = _records(small_disk / "out")
    assert done > 0
    subprocess.run(["mount", "-o", "remount,size=32m", str(small_disk)], check=True)
    report = prepare(options)
    assert report["units"] - report["run"]["units_made"] == done
    assert _files(small_disk / "out") == reference


@contextlib.contextmanager
def _largest_file(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_writers_leave_no_temporary_file_where_even_the_buffer_does_not_fit(tmp_path: Path) -> None:
    writer = UnitWriter(tmp_path, kind="text", vocabulary_size=1000)
    add_document(writer, list(range(500)))
    with _largest_file(100):
        with pytest.raises(OSError, match="File too large"):
            writer.finish()
        writer.abandon()
        with pytest.raises(OSError, match="File too large"):
            write_file_atomically(tmp_path / "record", bytes(200))
    assert list(tmp_path.iterdir()) == []


def test_a_limit_of_file_sizes_is_the_same_sentence(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    options = _options(corpus, tmp_path / "out", tokenizer_folder, unit_bytes=60_000)
    sentence = r"out cannot be written: file too large \([\d,]+ bytes are free there\)"
    with _largest_file(25_000), pytest.raises(OSError, match=sentence):
        prepare(options)
    assert not list((tmp_path / "out").rglob("*.tmp"))
    prepare(options)
    prepare(_options(corpus, tmp_path / "clean", tokenizer_folder, unit_bytes=60_000))
    assert _files(tmp_path / "out") == _files(tmp_path / "clean")


# One writer, one plan


def test_a_second_start_while_the_first_is_at_work_is_refused(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    first = subprocess.Popen(_command(corpus, tmp_path / "out", tokenizer_folder), cwd=ROOT)
    try:
        _wait_until(lambda: _records(tmp_path / "out") > 0)
        os.kill(first.pid, signal.SIGSTOP)
        with pytest.raises(ValueError, match="another trainyard prepare is at work"):
            prepare(_options(corpus, tmp_path / "out", tokenizer_folder))
        with pytest.raises(ValueError, match="another trainyard prepare is at work"):
            prepare(_options(corpus, tmp_path / "out", tokenizer_folder, task=(0, 2)))
    finally:
        first.kill()
        first.wait()


def test_an_interrupted_output_of_other_options_is_made_anew_but_not_by_a_task(
    corpus: Path, tokenizer_folder: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    prepare(_options(corpus, output, tokenizer_folder, task=(0, 2), seed=7))
    assert _records(output) > 0
    with pytest.raises(ValueError, match="interrupted preparation with other options"):
        prepare(_options(corpus, output, tokenizer_folder, task=(0, 2)))
    report = prepare(_options(corpus, output, tokenizer_folder))
    assert report["run"]["units_made"] == report["units"]
    assert _files(output) == reference


def test_tasks_that_cannot_be(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    for options, message in (
        (_options(corpus, tmp_path / "out", None, train_vocabulary=VOCABULARY, task=(0, 2)), "train it first"),
        (_options(corpus, tmp_path / "out", tokenizer_folder, task=(2, 2)), "numbered from 0 to 1"),
        (_options(corpus, tmp_path / "out", tokenizer_folder, workers=0), "--workers is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(options)


def test_digest_of_a_large_file_takes_its_edges_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large"
    monkeypatch.setattr("data_pipeline.plan.WHOLE_DIGEST_BYTES", 3 * 2**20)
    content = bytearray(random.Random(0).randbytes(4 * 2**20))
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    first = file_digest(path)
    for position, changed in ((0, True), (2 * 2**20, False), (4 * 2**20 - 1, True)):
        other = bytearray(content)
        other[position] ^= 1
        path.write_bytes(other)
        os.utime(path, ns=(1, 1))
        assert (file_digest(path) != first) == changed
    path.write_bytes(content)
    os.utime(path, ns=(2, 2))
    assert file_digest(path) != first


# The tokenizer's sample and the duplicates


@pytest.mark.parametrize("workers_count", [1, pytest.param(2, marks=pytest.mark.full)])
def test_tokenizer_sample_is_even_bounded_and_the_same_for_any_workers(
    corpus: Path, tmp_path: Path, workers_count: int
) -> None:
    changes = {"train_vocabulary": 300, "tokenizer_sample_bytes": 30_000}
    outputs = [tmp_path / "one", tmp_path / "two"]
    counts = (1, workers_count)
    reports = [
        prepare(_options(corpus, output, None, workers=count, **changes))
        for count, output in zip(counts, outputs, strict=True)
    ]
    assert _files(outputs[0]) == _files(outputs[1])
    assert 29_000 < reports[0]["tokenizer"]["sample_text_bytes"] <= 30_000
    assert reports[0]["tokenizer"]["sample_documents"] > 300
    assert prepare(_options(corpus, outputs[0], None, **changes))["reused"] is True
    with pytest.raises(ValueError, match="other options"):
        prepare(_options(corpus, outputs[0], None, train_vocabulary=300))


def test_sample_of_a_unit_is_the_smallest_hashes_of_the_training_split(corpus: Path, tmp_path: Path) -> None:
    options = _options(corpus, tmp_path, None, train_vocabulary=300, unit_bytes=40_000, validation_fraction=0.3)
    options.tokenizer_sample_bytes = 20_000
    plan = make_plan(options)
    (tmp_path / RECORDS).mkdir()
    units.sample_unit(plan, 1, lambda share: None)
    texts = [texts[0] for texts in json.loads(units.sample_path(plan, 1).read_bytes())]
    share = 20_000 * plan.weights[1] // sum(plan.weights)
    assert share - 3 <= sum(len(text.encode()) for text in texts) <= share
    rows = [
        (content.decode(), units.xxhash.xxh3_64_intdigest(content))
        for _, _, content in units.kept_documents(plan, 1, units.Ledger(), lambda share: None)
        if content is not None
    ]
    train = [(text, key) for text, key in rows if plan.split_of(0, key) == "train"]
    assert 0.5 < len(train) / len(rows) < 0.9
    by_hash = [text for text, _ in sorted(train, key=lambda entry: entry[1])][: len(texts)]
    expected = [text for text, _ in train if text in by_hash]  # in the order of the file
    cut = [(ours, whole) for ours, whole in zip(texts, expected, strict=True) if ours != whole]
    assert all(whole.startswith(ours) and whole == by_hash[-1] for ours, whole in cut) and len(cut) <= 1


def test_duplicates_are_counted_the_same_in_any_number_of_buckets(
    corpus: Path, tokenizer_folder: Path, reference: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "BUCKET_HASHES", 500)
    prepare(_options(corpus, tmp_path / "out", tokenizer_folder))
    assert _files(tmp_path / "out") == reference
