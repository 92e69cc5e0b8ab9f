"""The loader of a run (stream, batch plan and source): stopped anywhere, gone on at any shape, the same batches."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import write_shards

from data_pipeline.stream import TrainingStream
from gpt.batch import plan_batch
from gpt.batch_source import BatchSource
from gpt.distributed import Ranks

LENGTH = 8
SHAPES = [(1, 8), (2, 4), (8, 1), (3, 3)]  # ranks x rows of a forward
WORKERS = [0, 1, 3]


def counting_data(directory: Path, samples: int) -> Path:
    """A text whose tokens count up, so that a row's first token says which sample it is; documents of 37 tokens."""
    tokens = np.arange(samples * LENGTH + 1)
    documents = np.split(tokens, np.arange(37, tokens.size, 37))
    return write_shards(directory, documents, vocabulary_size=tokens.size, shard_bytes=3000)


def read_steps(data: Path, seed: int, sequences: int, shape: tuple[int, int], workers: int, steps: range) -> list:
    """Sample numbers of each global batch, in the order of the ranks, as the forwards hold them."""
    ranks, rows = shape
    batch = plan_batch(sequences, rows, ranks)
    streams = [TrainingStream([(data, 1.0)], LENGTH, seed) for _ in range(ranks)]
    sources = [
        BatchSource(stream, batch, Ranks(rank, ranks, torch.device("cpu")), workers)
        for rank, stream in enumerate(streams)
    ]
    batches = []
    for step in steps:
        found: list[int] = []
        for rank, source in enumerate(sources):
            first, end = batch.rank_range(rank)
            forwards = source.take(step)
            assert len(forwards) == batch.accumulation_steps
            firsts = torch.cat([forward.input_ids[:, 0] for forward in forwards])
            counted = torch.cat([forward.mask.any(dim=1) for forward in forwards])
            assert counted[: end - first].all() and not counted[end - first :].any()
            found += (firsts[: end - first] // LENGTH).tolist()
        batches.append(found)
    for source in sources:
        source.close()
    return batches


@pytest.mark.parametrize("cases", [pytest.param(12, marks=pytest.mark.few), pytest.param(200, marks=pytest.mark.full)])
def test_stopped_and_continued_at_any_shape_the_order_is_the_uninterrupted_one(tmp_path: Path, cases: int) -> None:
    dice = random.Random(cases)
    for case in range(cases):
        seed, sequences = dice.randrange(2**63), dice.choice([8, 9, 16, 24])
        samples = dice.randrange(40, 400)
        data = tmp_path / f"data-{samples}"
        if not data.exists():
            counting_data(data, samples)
        steps = 2 * samples // sequences + 2  # more than two epochs
        found: list[int] = []
        step = 1
        while step <= steps:  # stopped at random, continued by others
            stop = min(steps, step + dice.randrange(1, steps))
            shape, workers = dice.choice(SHAPES), dice.choice(WORKERS)
            for batch in read_steps(data, seed, sequences, shape, workers, range(step, stop + 1)):
                assert len(batch) == sequences
                found += batch
            step = stop + 1
        whole = TrainingStream([(data, 1.0)], LENGTH, seed)
        assert found == whole.sample_ids(0, steps * sequences).tolist(), (case, seed)
        for epoch in range(2):
            assert sorted(found[epoch * samples : (epoch + 1) * samples]) == list(range(samples)), (case, seed)


def test_every_shape_and_number_of_workers_gives_the_same_batches(tmp_path: Path) -> None:
    data = counting_data(tmp_path / "data", 50)
    expected = read_steps(data, 7, 8, (1, 8), 0, range(1, 15))
    for shape in SHAPES:
        for workers in WORKERS:
            assert read_steps(data, 7, 8, shape, workers, range(1, 15)) == expected, (shape, workers)


def test_samples_are_left_out_in_the_middle_of_a_run(tmp_path: Path) -> None:
    """What was read ahead of them is dropped; batches, digests and first rows are those of a run that left them out
    from the start."""
    data = counting_data(tmp_path / "data", 50)
    stream, batch, ranks = (
        TrainingStream([(data, 1.0)], LENGTH, 7),
        plan_batch(8, 4, 2),
        Ranks(1, 2, torch.device("cpu")),
    )
    for workers in WORKERS:
        live = BatchSource(stream, batch, ranks, workers)
        unseen = BatchSource(stream, batch, ranks, workers, [(24, 40)])
        for step in (1, 2, 3, 4, 5):
            live.take(step)
        samples = live.positions.of_steps(4, 5)
        assert samples == (24, 40)
        live.leave_out(samples)
        for step in (3, 4, 5, 6):
            for mine, theirs in zip(live.take(step), unseen.take(step), strict=True):
                assert torch.equal(mine.input_ids, theirs.input_ids)
            assert live.digest(step) == unseen.digest(step)
            assert torch.equal(live.first_row(step).input_ids, unseen.first_row(step).input_ids)
        assert live.digest(4) == BatchSource(stream, batch, ranks).digest(6)
        live.close()
        unseen.close()


def test_workers_read_so_many_batches_ahead_and_no_further(tmp_path: Path) -> None:
    data = counting_data(tmp_path / "data", 50)
    asked: list[int] = []

    class Watched(TrainingStream):
        def rows(self, positions):  # type: ignore[no-untyped-def]
            asked.append(positions.start // 8 + 1)
            return super().rows(positions)

    for workers in WORKERS:
        asked.clear()
        source = BatchSource(
            Watched([(data, 1.0)], LENGTH, 0), plan_batch(8, 8, 1), Ranks(0, 1, torch.device("cpu")), workers
        )
        for step in (1, 2, 3):
            source.take(step)
        for future in source._ready.values():
            future.result()
        source.close()
        assert sorted(asked) == list(range(1, 4 + workers))  # each once


def test_an_error_of_a_worker_reaches_the_trainer(tmp_path: Path) -> None:
    data = counting_data(tmp_path / "data", 400)
    file = sorted(data.glob("*.bin"))[1]
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    for workers in WORKERS:
        with pytest.raises(ValueError, match=rf"{file.name}: block 0 .*damaged"):
            read_steps(data, 0, 8, (1, 8), workers, range(1, 52))
