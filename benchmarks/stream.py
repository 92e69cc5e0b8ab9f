"""Time the reading of training rows on one core, next to other loaders, and of an index of 1e9 samples.

    python benchmarks/stream.py [--core 1] [--rounds 2] [--tokens 112000000] [--out benchmarks/results/stream.json]

Rows of 2048 tokens in batches of 8 int64 tensors or arrays, shuffled, from local files in the page cache, in the
process that measures (stream_readers.py holds the contenders). Rates are per second of processor time, the best of the
rounds; the contenders of a round run one after another. Resuming is exact where the first batch after the saved state
equals the one of the run that went on. The large index is a store of empty files made with truncate; its first start is
with a cold page cache. Everything is made under build/: data, and peers in venvs of their own.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.facts import describe, judge, peer_python, write_and_show  # noqa: E402
from benchmarks.stream_readers import CONTENDERS, LENGTH, ROWS, STATE_AT  # noqa: E402

READERS = ROOT / "benchmarks" / "stream_readers.py"
PINS = {
    "litdata": ("litdata==0.2.76", "numpy==2.4.6", "torch==2.13.0"),
    "MosaicML streaming": ("mosaicml-streaming==0.13.0", "transformers==4.57.1", "numpy==2.1.3", "torch==2.13.0"),
}
LARGE_SAMPLES = 10**9
SHARD_TOKENS = 2**27  # of the large store: 256 MiB
MEAN_DOCUMENT_TOKENS = 1000
TIMEOUT_SECONDS = 300


def main() -> None:
    options = read_options()
    work = ROOT / "build" / "stream"
    facts = describe(("numpy", "torch", "datasets", "pyarrow", "xxhash"), peers=PINS)
    folders = {name: make_data(name, options.tokens, work) for name in CONTENDERS}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for _ in range(options.rounds):
        for name, folder in folders.items():
            run, resumed = (measure(name, mode, folder, options.core) for mode in ("run", "resume"))
            exact = run["digest"] == resumed["digest"]
            runs[name].append(
                run | {"exact": exact} | {f"resume_{k}": v for k, v in resumed.items() if k.startswith("start")}
            )
            print(f"{name}: {run['sequences_per_cpu_second']:,.0f} sequences a second of CPU", flush=True)
    results = [summarize(name, found) for name, found in runs.items()]
    facts |= {"tokens": options.tokens, "results": results, "runs": runs, "large": large_index(work, options)}
    facts["targets"] = targets(results, facts["large"])
    show(facts, options.out)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the reading of training rows next to other loaders.")
    parser.add_argument("--core", type=int, default=os.cpu_count() - 1, help="the core that everything is pinned to")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=112_000_000, help="tokens of the data, 2 bytes each")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "stream.json")
    return parser.parse_args()


def python_of(name: str) -> Path:
    """The Python of a contender: this one, or of its own virtual environment."""
    return peer_python(name.split()[0].lower(), PINS[name]) if name in PINS else Path(sys.executable)


def read(name: str, words: list[str], core: int) -> str:
    """Run stream_readers.py for a contender on one core; its standard output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = ["taskset", "-c", str(core), str(python_of(name)), str(READERS), name, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    if done.returncode:
        raise ValueError(f"{name} {words[0]} failed: {done.stderr[-1500:]}")
    return done.stdout


def make_data(name: str, tokens: int, work: Path) -> Path:
    """The same tokens in a contender's own format."""
    source = work / f"tokens-{tokens}.bin"
    if not source.is_file():
        work.mkdir(parents=True, exist_ok=True)
        np.random.default_rng(0).integers(0, 32_000, tokens, dtype=np.uint16).tofile(source)
    folder = work / f"{name.replace(',', '').replace(' ', '-').lower()}-{tokens}"
    if not (folder / "rows.txt").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        read(name, ["write", str(source), str(folder)], os.cpu_count() - 1)
    return folder


def measure(name: str, mode: str, folder: Path, core: int) -> dict[str, Any]:
    return json.loads(read(name, [mode, str(folder), str(folder) + ".state"], core).splitlines()[-1])


def summarize(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The best of each figure: what else the machine does only ever adds."""
    least = ("start_seconds", "start_cpu_seconds", "resume_start_seconds", "resume_start_cpu_seconds", "import_seconds")
    return {
        "contender": name,
        **{key: max(run[key] for run in runs) for key in ("sequences_per_second", "sequences_per_cpu_second")},
        **{key: min(run[key] for run in runs) for key in least},
        "exact_resume": all(run["exact"] for run in runs),
        "state_bytes": max(run["state_bytes"] for run in runs),
        "memory_bytes": max(run["memory_bytes"] for run in runs),
        "peak_resident_bytes": max(run["peak_resident_bytes"] for run in runs),
    }


def large_index(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Start and resume on the large store, cold once and then warm, and the memory that its order takes."""
    started = time.perf_counter()
    folder = make_sparse_store(work / "sparse")
    made = time.perf_counter() - started
    state = Path(f"{folder}.state")
    result: dict[str, Any] = {"samples": LARGE_SAMPLES, "make_seconds": made}
    from data_pipeline.stream import TrainingStream

    stream = TrainingStream([(folder, 1.0)], LENGTH, 0)
    if stream.samples_per_epoch != LARGE_SAMPLES:
        raise ValueError(f"the large store has {stream.samples_per_epoch} samples")
    for place, position in (("start", 0), ("resume", int(LARGE_SAMPLES * STATE_AT))):
        state.write_text(json.dumps({"samples_consumed": position, "data_fingerprint": stream.fingerprint, "seed": 0}))
        runs = [measure("ours", "resume", folder, options.core) for _ in range(1 + 3 * options.rounds)]
        for clock in ("start_seconds", "start_cpu_seconds"):
            result[f"{place}_cold_{clock[6:]}"] = runs[0][clock]
            result[f"{place}_{clock[6:]}"] = min(run[clock] for run in runs)
    result["state_bytes"] = state.stat().st_size
    result["order_memory_bytes"] = order_memory(stream)
    shutil.rmtree(folder)
    return result


def make_sparse_store(folder: Path) -> Path:
    """A data set of 1e9 samples: .bin files without content; one .docs and .sums, linked for all full shards."""
    from data_pipeline.shard_writer import write_manifest
    from data_pipeline.token_shards import BLOCK_BYTES

    def digests(size: int, content: bytes | None) -> list[int]:
        parts = [min(BLOCK_BYTES, size - at) for at in range(0, size, BLOCK_BYTES)]
        known = {part: xxhash.xxh3_64_intdigest(bytes(part)) for part in set(parts)} if content is None else {}
        begins = range(0, size, BLOCK_BYTES)
        return [
            known[part] if content is None else xxhash.xxh3_64_intdigest(content[begin : begin + part])
            for begin, part in zip(begins, parts, strict=True)
        ]

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    left, shards = LARGE_SAMPLES * LENGTH + 1, []
    while left:
        tokens, name = min(left, SHARD_TOKENS), f"u-{len(shards):05d}-000"
        docs = np.arange(0, tokens, MEAN_DOCUMENT_TOKENS, dtype="<u4").tobytes()
        with open(folder / f"{name}.bin", "wb") as file:
            file.truncate(tokens * 2)
        if shards and tokens == SHARD_TOKENS:
            for suffix in ("docs", "sums"):
                os.link(folder / f"u-00000-000.{suffix}", folder / f"{name}.{suffix}")
            entry = shards[0] | {"name": name}
        else:
            sums = np.array(digests(tokens * 2, None) + digests(len(docs), docs), "<u8").tobytes()
            (folder / f"{name}.docs").write_bytes(docs)
            (folder / f"{name}.sums").write_bytes(sums)
            sizes = {"bin": tokens * 2, "docs": len(docs)}
            entry = {"name": name, "documents": len(docs) // 4, "tokens": tokens, "bytes": sizes}
            entry |= {"sums_xxh3_64": xxhash.xxh3_64_hexdigest(sums)}
        shards.append(entry)
        left -= tokens
    write_manifest(
        folder,
        kind="text",
        split="train",
        tokenizer_sha256="0" * 64,
        vocabulary_size=2**16,
        special_ids={"eos": 0, "pad": 1},
        shards=shards,
        units=[],
    )
    return folder


def order_memory(stream: Any) -> int:
    """Most bytes that the order of the samples takes: a mixture of three sources, and 64 blocks of positions."""
    from data_pipeline.mixture import Mixture, Stage

    tracemalloc.start()
    mixture = Mixture([Stage([0.5, 0.3, 0.2])])
    for start in range(0, LARGE_SAMPLES, LARGE_SAMPLES // 64):
        stream.sample_ids(start, ROWS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del mixture
    return peak


def targets(results: list[dict[str, Any]], large: dict[str, Any]) -> list[dict[str, Any]]:
    rates = {entry["contender"]: round(entry["sequences_per_cpu_second"]) for entry in results}
    state = max(large["state_bytes"], results[0]["state_bytes"])
    return judge(
        [
            ("sequences a second of CPU, 8 a call", 250_000, rates["ours"]),
            ("sequences a second of CPU, 64 a call", 250_000, rates["ours, by step"]),
            ("start at 1e9 samples, ms of CPU (at most)", 50, round(1e3 * large["start_cpu_seconds"], 1)),
            (
                "exact resume at 90 % of 1e9 samples, ms of CPU (at most)",
                50,
                round(1e3 * large["resume_cpu_seconds"], 1),
            ),
            ("state, bytes (at most)", 300, state),
            ("memory of the order, MiB (at most)", 5, round(large["order_memory_bytes"] / 2**20, 2)),
        ]
    )


def show(facts: dict[str, Any], out: Path) -> None:
    head = ("contender", "rows/s CPU", "rows/s", "start ms", "resume ms", "exact", "state B", "memory MiB")
    rows = [
        (
            entry["contender"],
            f"{entry['sequences_per_cpu_second']:,.0f}",
            f"{entry['sequences_per_second']:,.0f}",
            f"{1e3 * entry['start_seconds']:.1f}",
            f"{1e3 * entry['resume_start_seconds']:.1f}",
            "yes" if entry["exact_resume"] else "no",
            entry["state_bytes"],
            f"{entry['memory_bytes'] / 2**20:.1f}",
        )
        for entry in facts["results"]
    ]
    write_and_show(facts, out, head, rows)
    large = facts["large"]
    for place in ("start", "resume"):
        print(
            f"1e9 samples, {place}: {1e3 * large[f'{place}_seconds']:.1f} ms (CPU "
            f"{1e3 * large[f'{place}_cpu_seconds']:.1f}), cold page cache {1e3 * large[f'{place}_cold_seconds']:.1f} ms"
        )


if __name__ == "__main__":
    main()
