"""The contenders of stream.py. Each is run in a process, and some in a virtual environment, of its own.

    python benchmarks/stream_readers.py NAME write TOKENS FOLDER     make the contender's own files
    python benchmarks/stream_readers.py NAME run FOLDER STATE        one epoch in batches of 8; saves the state at 90 %
    python benchmarks/stream_readers.py NAME resume FOLDER STATE     to the first batch after that state

Prints one JSON line. Every contender gives the same number of rows of 2048 int64 tokens, shuffled, from local files.
"""

import hashlib
import importlib
import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np

LENGTH, ROWS, SEED = 2048, 8, 0
STATE_AT = 0.9
SHUFFLE_BUFFER_ROWS = 1000  # of Hugging Face streaming
ROWS_OF_A_STEP = 64  # what a rank reads at once in training


class Ours:
    """Rows as the stream gives them: tokens with their targets, the mask, where documents begin; checksums on."""

    modules: tuple[str, ...] = ("data_pipeline.stream",)

    @staticmethod
    def write(tokens: np.ndarray, folder: Path) -> None:
        """Documents with the lengths that texts have: log-normal, 1,100 tokens on average."""
        from data_pipeline.shard_writer import UnitWriter, write_manifest

        lengths = np.random.default_rng(SEED).lognormal(6.5, 1, tokens.size // 500).astype(np.int64) + 1
        lengths = lengths[np.cumsum(lengths) < tokens.size]
        lengths = np.append(lengths, tokens.size - lengths.sum())
        writer = UnitWriter(folder, kind="text", vocabulary_size=2**16)
        writer.add_documents(tokens, lengths)
        write_manifest(
            folder,
            kind="text",
            split="train",
            tokenizer_sha256="0" * 64,
            vocabulary_size=2**16,
            special_ids={"eos": 0, "pad": 1},
            shards=writer.finish(),
            units=[],
        )

    def __init__(self, folder: Path, state: bytes | None) -> None:
        from data_pipeline.stream import TrainingStream

        self.stream = TrainingStream([(folder, 1.0)], LENGTH, SEED)
        saved = json.loads(state) if state else {"samples_consumed": 0, "data_fingerprint": self.stream.fingerprint}
        if saved["data_fingerprint"] != self.stream.fingerprint:
            raise ValueError("the state is of other data")
        self.position = saved["samples_consumed"]

    def batches(self) -> Iterator[Any]:
        while True:
            rows = self.stream.rows(range(self.position, self.position + ROWS))
            self.position += ROWS
            yield rows.input_ids

    def state(self) -> bytes:
        state = {"samples_consumed": self.position, "data_fingerprint": self.stream.fingerprint, "seed": SEED}
        return json.dumps(state).encode()


class OursByStep(Ours):
    """The same in the way of training: a rank reads its rows of an optimizer step at once, here 64."""

    def batches(self) -> Iterator[Any]:
        while True:
            inputs = self.stream.rows(range(self.position, self.position + ROWS_OF_A_STEP)).input_ids
            for start in range(0, ROWS_OF_A_STEP, ROWS):
                self.position += ROWS
                yield inputs[start : start + ROWS]


class OursForTheModel(Ours):
    """All that a rank does to have its forwards: a step's rows at once, tensors, position ids, forwards of 8 rows."""

    modules = ("data_pipeline.stream", "gpt.batch")

    def batches(self) -> Iterator[Any]:
        import torch

        from gpt.batch import micro_batches

        while True:
            rows = self.stream.rows(range(self.position, self.position + ROWS_OF_A_STEP))
            for forward in micro_batches(rows, ROWS_OF_A_STEP // ROWS, ROWS, torch.device("cpu")):
                self.position += ROWS
                yield forward.input_ids


class Memmap:
    """np.memmap in a torch DataLoader with a permutation: what many training scripts do."""

    modules: tuple[str, ...] = ("torch.utils.data",)

    @staticmethod
    def write(tokens: np.ndarray, folder: Path) -> None:
        tokens.tofile(folder / "tokens.bin")

    def __init__(self, folder: Path, state: bytes | None) -> None:
        import torch

        values = np.memmap(folder / "tokens.bin", dtype=np.uint16, mode="r")

        class Windows(torch.utils.data.Dataset):
            def __len__(self) -> int:
                return (len(values) - 1) // LENGTH

            def __getitem__(self, index: int) -> torch.Tensor:
                return torch.from_numpy(values[index * LENGTH : (index + 1) * LENGTH].astype(np.int64))

        self.position = json.loads(state)["position"] if state else 0
        order = torch.randperm(len(Windows()), generator=torch.Generator().manual_seed(SEED))
        self.loader = torch.utils.data.DataLoader(Windows(), ROWS, sampler=order[self.position :].tolist())

    def batches(self) -> Iterator[Any]:
        for batch in self.loader:
            self.position += ROWS
            yield batch

    def state(self) -> bytes:
        return json.dumps({"position": self.position, "seed": SEED}).encode()


class LitData:
    modules: tuple[str, ...] = ("litdata", "litdata.streaming.item_loader")

    @staticmethod
    def write(tokens: np.ndarray, folder: Path) -> None:
        import torch
        from litdata.streaming.cache import Cache
        from litdata.streaming.item_loader import TokensLoader

        usable = tokens[: tokens.size // LENGTH * LENGTH].astype(np.int32)
        cache = Cache(str(folder), chunk_size=LENGTH * 8192, item_loader=TokensLoader(LENGTH))
        for index, piece in enumerate(np.split(usable, range(LENGTH * 1024, usable.size, LENGTH * 1024))):
            cache._add_item(index, torch.from_numpy(piece))
        cache.done()
        cache.merge()

    def __init__(self, folder: Path, state: bytes | None) -> None:
        import litdata
        from litdata.streaming.item_loader import TokensLoader

        data = litdata.StreamingDataset(str(folder), item_loader=TokensLoader(LENGTH), shuffle=True, seed=SEED)
        self.loader = litdata.StreamingDataLoader(data, batch_size=ROWS, num_workers=0)
        if state:
            self.loader.load_state_dict(json.loads(state))

    def batches(self) -> Iterator[Any]:
        return iter(self.loader)

    def state(self) -> bytes:
        return json.dumps(self.loader.state_dict()).encode()


class MosaicML:
    """Its classes for images import torchvision, whose released wheels do not fit every build of torch: left out."""

    modules: tuple[str, ...] = ("streaming",)
    unneeded_modules = ("streaming.vision",)

    @staticmethod
    def write(tokens: np.ndarray, folder: Path) -> None:
        from streaming import MDSWriter

        with MDSWriter(out=str(folder), columns={"tokens": f"ndarray:uint16:{LENGTH}"}, exist_ok=True) as writer:
            for row in tokens[: tokens.size // LENGTH * LENGTH].reshape(-1, LENGTH):
                writer.write({"tokens": row})

    def __init__(self, folder: Path, state: bytes | None) -> None:
        from streaming import StreamingDataLoader, StreamingDataset

        class Rows(StreamingDataset):
            def __getitem__(self, index: Any) -> Any:
                return super().__getitem__(index)["tokens"].astype(np.int64)

        data = Rows(local=str(folder), shuffle=True, shuffle_seed=SEED, batch_size=ROWS)
        self.loader = StreamingDataLoader(data, batch_size=ROWS)
        if state:
            self.loader.load_state_dict(json.loads(state))

    def batches(self) -> Iterator[Any]:
        return iter(self.loader)

    def state(self) -> bytes:
        return json.dumps(self.loader.state_dict()).encode()


class HuggingFaceMap:
    """An Arrow dataset on disk, shuffled by an index."""

    modules: tuple[str, ...] = ("datasets", "torch")

    @staticmethod
    def write(tokens: np.ndarray, folder: Path) -> None:
        _arrow_rows(tokens).save_to_disk(str(folder / "arrow"))

    def __init__(self, folder: Path, state: bytes | None) -> None:
        import datasets

        self.data = datasets.load_from_disk(str(folder / "arrow")).shuffle(seed=SEED, load_from_cache_file=False)
        self.data = self.data.with_format("torch")
        self.position = json.loads(state)["position"] if state else 0

    def batches(self) -> Iterator[Any]:
        while True:
            self.position += ROWS
            yield self.data[self.position - ROWS : self.position]["input_ids"]

    def state(self) -> bytes:
        return json.dumps({"position": self.position, "seed": SEED}).encode()


class HuggingFaceStreaming:
    """Parquet files, streamed through a shuffle buffer."""

    modules: tuple[str, ...] = ("datasets", "torch")

    @staticmethod
    def write(tokens: np.ndarray, folder: Path) -> None:
        rows = _arrow_rows(tokens)
        for part in range(4):
            rows.shard(4, part).to_parquet(str(folder / f"{part}.parquet"))

    def __init__(self, folder: Path, state: bytes | None) -> None:
        import datasets

        files = [str(file) for file in sorted(folder.glob("*.parquet"))]
        data = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
        self.data = data.with_format("torch").shuffle(seed=SEED, buffer_size=SHUFFLE_BUFFER_ROWS)
        if state:
            self.data.load_state_dict(json.loads(state))

    def batches(self) -> Iterator[Any]:
        import torch

        rows = iter(self.data)
        while True:
            yield torch.stack([next(rows)["input_ids"] for _ in range(ROWS)])

    def state(self) -> bytes:
        return json.dumps(self.data.state_dict()).encode()


CONTENDERS: dict[str, Any] = {
    "ours": Ours,
    "ours, by step": OursByStep,
    "ours, for the model": OursForTheModel,
    "memmap, DataLoader": Memmap,
    "litdata": LitData,
    "MosaicML streaming": MosaicML,
    "HF datasets, map": HuggingFaceMap,
    "HF datasets, streaming": HuggingFaceStreaming,
}


def _arrow_rows(tokens: np.ndarray) -> Any:
    import datasets

    count = tokens.size // LENGTH
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("uint16"), length=LENGTH)})
    return datasets.Dataset.from_dict({"input_ids": list(tokens[: count * LENGTH].reshape(count, LENGTH))}, features)


def measure(name: str, mode: str, folder: Path, state_file: Path) -> dict[str, Any]:
    """Run one contender; seconds are wall time, cpu_seconds this process's processor time."""
    contender = CONTENDERS[name]
    started = time.perf_counter()
    leave_out(contender)
    for module in contender.modules:
        importlib.import_module(module)
    result: dict[str, Any] = {"import_seconds": time.perf_counter() - started}
    # As any training process has freed large arrays before: malloc then keeps the memory of batches for the next ones.
    np.empty(30 << 20, np.uint8)
    memory = anonymous_bytes()
    wall, cpu = time.perf_counter(), time.process_time()
    reader = contender(folder, state_file.read_bytes() if mode == "resume" else None)
    batches = iter(reader.batches())
    batch = next(batches)
    result |= {"start_seconds": time.perf_counter() - wall, "start_cpu_seconds": time.process_time() - cpu}
    result["digest"] = digest(batch)
    if mode == "resume":
        return result
    total = int((folder / "rows.txt").read_text()) // ROWS
    stop = int(total * STATE_AT)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(1, stop):
        batch = next(batches)
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    state = reader.state()
    state_file.write_bytes(state)
    result["digest"] = digest(next(batches))
    return result | {
        "sequences_per_second": (stop - 1) * ROWS / seconds,
        "sequences_per_cpu_second": (stop - 1) * ROWS / cpu_seconds,
        "state_bytes": len(state),
        "memory_bytes": anonymous_bytes() - memory,
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def leave_out(contender: Any) -> None:
    """Empty modules in the place of those that a contender imports for what is not measured."""
    for name in getattr(contender, "unneeded_modules", ()):
        sys.modules[name] = MagicMock()


def anonymous_bytes() -> int:
    """Resident memory that is not the page cache of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def digest(batch: Any) -> str:
    """Of the tokens of a batch, whatever holds them."""
    values = np.ascontiguousarray(np.asarray(batch)[:, :LENGTH], dtype=np.int64)
    if values.shape != (ROWS, LENGTH):
        raise ValueError(f"a batch has the shape {values.shape}")
    return hashlib.blake2b(values.tobytes(), digest_size=16).hexdigest()


def main() -> None:
    name, mode, first, second = sys.argv[1:]
    if mode == "write":
        leave_out(CONTENDERS[name])
        tokens = np.fromfile(first, dtype=np.uint16)
        CONTENDERS[name].write(tokens, Path(second))
        (Path(second) / "rows.txt").write_text(str((tokens.size - 1) // LENGTH))
    else:
        print("\n" + json.dumps(measure(name, mode, Path(first), Path(second))), flush=True)


if __name__ == "__main__":
    main()
