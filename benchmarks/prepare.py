"""Time `trainyard prepare` on one core: JSONL to token shards, next to datatrove, on 230 MB of Debian documentation.

    python benchmarks/prepare.py [--core 1] [--rounds 2] [--part-megabytes 60] [--out benchmarks/results/prepare.json]

Every round runs all contenders one after another, each a process pinned to the same core with one thread. Their start
(interpreter, imports, loading the tokenizer) is measured by the same command on one document, and taken off the rates;
the table shows the seconds with and without. Slow contenders get the first part of the corpus, and ours runs on that
part, too. Everything is made under build/: the corpus, a tokenizer of 32,000 entries, datatrove in a venv of its own.
"""

import argparse
import contextlib
import filecmp
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.corpus import DEFAULT_FOLDER, build_corpus  # noqa: E402

VOCABULARY_SIZE = 32_000
TRAINING_SHARE = 12  # every twelfth document trains the tokenizer
MEMORY_INTERVAL_SECONDS = 0.05
# Exact versions; what they need beside these comes in the versions of constraints.txt.
DATATROVE = ("datatrove==0.10.1", "humanize==4.17.0", "loguru==0.7.3", "orjson==3.13.0", "tokenizers==0.23.3")
DATATROVE_PROGRAM = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
source, tokenizer, output = sys.argv[1:]
steps = [
    JsonlReader(source, glob_pattern="*.jsonl"),
    DocumentTokenizer(output, tokenizer, local_working_dir=output + "/unshuffled", eos_token="<|endoftext|>"),
]
LocalPipelineExecutor(pipeline=steps, tasks=1, workers=1, logging_dir=output + "/logs").run()
"""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
TARGETS = (
    ("fast engine, MB/s", 80.0),
    ("Hugging Face tokenizers, MB/s", 2.3),
    ("fast engine / datatrove", 30.0),
    ("memory, GiB (at most)", 1.5),
)


def main() -> None:
    options = read_options()
    work = ROOT / "build" / "prepare"
    inputs = make_inputs(build_corpus(options.corpus), work, options.part_megabytes * 10**6)
    tokenizer = options.tokenizer or trained_tokenizer(inputs["whole"], work / "tokenizer")
    contenders = {
        ("ours, fast engine", "whole"): ours(tokenizer, options.engine),
        ("ours, fast engine", "part"): ours(tokenizer, options.engine),
        ("ours, huggingface", "part"): ours(tokenizer, "huggingface"),
        ("datatrove", "part"): datatrove(tokenizer, peer_python("datatrove", DATATROVE)),
    }
    facts = describe(options, tokenizer)  # the load of the machine before our own
    results = [
        {"contender": name, "input": part, "text_bytes": text_bytes(inputs[part]), "runs": [], "start_runs": []}
        for name, part in contenders
    ]
    for _ in range(options.rounds):
        for result, (key, command) in zip(results, contenders.items(), strict=True):
            for source, runs in (("start", "start_runs"), (key[1], "runs")):
                output = work / f"{key[0]} {source}".replace(", ", "-").replace(" ", "-")
                run = timed(command(inputs[source], output), output, options.core)
                result[runs].append(run | {"tokens": count_tokens(output)})
                print(f"{key[0]}, {source}: {run['seconds']:.1f} s, CPU {run['cpu_seconds']:.1f} s", flush=True)
    same = same_shards(work / "ours-fast-engine-part", work / "ours-huggingface-part")
    for result in results:
        summarize(result, results)
    tokens = {result["tokens"] for result in results if result["input"] == "part"}
    facts |= {"results": results, "same_tokens": len(tokens) == 1, "same_shards": same, "targets": judge(results)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(facts, indent=1) + "\n")
    show(facts)
    if not (facts["same_tokens"] and facts["same_shards"]):
        sys.exit("the contenders made different tokens of the same texts: their rates mean nothing")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time trainyard prepare next to datatrove, on one core.")
    parser.add_argument("--corpus", type=Path, default=DEFAULT_FOLDER, help="folder of the corpus; made if absent")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer (default: one is trained)")
    parser.add_argument("--engine", default="auto", help="the fast engine: auto, gigatoken or tiktoken")
    parser.add_argument("--core", type=int, default=os.cpu_count() - 1, help="the core that everything is pinned to")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--part-megabytes", type=int, default=60, help="text that slow contenders get")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "prepare.json")
    return parser.parse_args()


def make_inputs(corpus: Path, work: Path, part_bytes: int) -> dict[str, Path]:
    """Folders with one JSONL file each: the whole corpus, its first part, one document (what a start takes)."""
    limits = {"whole": corpus.stat().st_size, "part": part_bytes, "start": 1}
    for name, limit in limits.items():
        folder = work / "input" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with open(corpus, "rb") as lines, open(folder / "corpus.jsonl", "wb") as output:
            while output.tell() < limit and (line := lines.readline()):
                output.write(line)
    return {name: work / "input" / name / "corpus.jsonl" for name in limits}


def text_bytes(path: Path) -> int:
    """UTF-8 bytes of the texts alone: rates are given in these, not in bytes of JSON."""
    with open(path, encoding="utf-8") as lines:
        return sum(len(json.loads(line)["text"].encode()) for line in lines)


def trained_tokenizer(corpus: Path, folder: Path) -> Path:
    if not (folder / "tokenizer.json").is_file():
        from data_pipeline.tokenizer import train_tokenizer

        with open(corpus, encoding="utf-8") as lines:
            texts = (json.loads(line)["text"] for line in islice(lines, 0, None, TRAINING_SHARE))
            train_tokenizer(texts, VOCABULARY_SIZE, folder)
    return folder


def ours(tokenizer: Path, engine: str) -> Any:
    def command(source: Path, output: Path) -> list[str]:
        words = [sys.executable, "-m", "launch.cli", "prepare", "--input", str(source), "--out", str(output)]
        words += ["--tokenizer", str(tokenizer), "--engine", engine]
        return [*words, "--validation-fraction", "0", "--workers", "1"]

    return command


def datatrove(tokenizer: Path, python: Path) -> Any:
    def command(source: Path, output: Path) -> list[str]:
        file = str(tokenizer / "tokenizer.json")
        return [str(python), "-c", DATATROVE_PROGRAM, str(source.parent), file, str(output)]

    return command


def peer_python(name: str, pins: tuple[str, ...]) -> Path:
    """The Python of a peer's own virtual environment, which is made if it does not hold these versions."""
    folder = ROOT / "build" / "bench-venvs" / name
    stamp, python = folder / "pins.txt", folder / "bin" / "python"
    if not stamp.is_file() or stamp.read_text().split() != list(pins):
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        constraints = ["--constraint", str(ROOT / "constraints.txt")]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *constraints, *pins], check=True)
        stamp.write_text("\n".join(pins) + "\n")
    return python


def timed(command: list[str], output: Path, core: int) -> dict[str, Any]:
    """Run a command on one core into a fresh output; ValueError with its last lines if it fails."""
    shutil.rmtree(output, ignore_errors=True)
    environment = {**os.environ, **ONE_THREAD, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    log = output.with_suffix(".log")
    peak = [0]
    with open(log, "w") as file:
        started = time.perf_counter()
        process = subprocess.Popen(
            ["taskset", "-c", str(core), *command], cwd=ROOT, env=environment, stdout=file, stderr=file
        )
        watch = threading.Thread(target=peak_memory, args=(process.pid, peak))
        watch.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)  # Popen must not wait for what is gone
        watch.join()
    if process.returncode:
        raise ValueError(f"{shlex.join(command[:4])} ... failed: {log.read_text()[-1000:]}")
    return {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3),
        "peak_memory_bytes": peak[0],  # not ru_maxrss, which begins with the memory of this process
    }


def peak_memory(pid: int, peak: list[int]) -> None:
    """Keep the largest resident memory of a process and its children together, until it ends."""
    while psutil.pid_exists(pid):
        with contextlib.suppress(psutil.NoSuchProcess):  # one of them has just ended
            process = psutil.Process(pid)
            family = [process, *process.children(recursive=True)]
            peak[0] = max(peak[0], sum(member.memory_info().rss for member in family))
        time.sleep(MEMORY_INTERVAL_SECONDS)


def count_tokens(output: Path) -> int:
    """From the sizes of the files: 2 bytes a token, since the vocabulary is smaller than 65,536."""
    files = [*output.glob("train/*.bin"), *output.glob("*.ds")]
    if not files:
        raise ValueError(f"there are no token files in {output}")
    return sum(path.stat().st_size for path in files) // 2


def same_shards(one: Path, other: Path) -> bool:
    """Whether two outputs of ours hold the same bytes in all token files."""
    names = sorted(path.name for path in (one / "train").iterdir())
    if names != sorted(path.name for path in (other / "train").iterdir()):
        return False
    return not any(filecmp.cmpfiles(one / "train", other / "train", names, shallow=False)[1:])


def summarize(result: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """The contender's best run less its best start: what else the machine does only ever adds."""
    starts = [run for other in results if other["contender"] == result["contender"] for run in other["start_runs"]]
    for clock in ("seconds", "cpu_seconds"):
        whole = min(run[clock] for run in result["runs"])
        start = min(run[clock] for run in starts)
        result[clock], result[f"start_{clock}"] = whole, start
        result["mb_per_" + clock.removesuffix("s")] = round(result["text_bytes"] / 1e6 / (whole - start), 2)
    result["tokens"] = result["runs"][0]["tokens"]
    result["peak_memory_bytes"] = max(run["peak_memory_bytes"] for run in result["runs"])


def judge(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    fast, fast_part, slow, peer = results
    reached = (
        fast["mb_per_cpu_second"],
        slow["mb_per_cpu_second"],
        round(fast["mb_per_cpu_second"] / peer["mb_per_cpu_second"], 1),
        round(max(entry["peak_memory_bytes"] for entry in (fast, fast_part, slow)) / 2**30, 2),
    )
    return [
        {"target": name, "bar": bar, "reached": value, "met": value <= bar if "at most" in name else value >= bar}
        for (name, bar), value in zip(TARGETS, reached, strict=True)
    ]


def describe(options: argparse.Namespace, tokenizer: Path) -> dict[str, Any]:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    packages = ("tokenizers", "gigatoken", "tiktoken", "transformers", "numpy", "pyarrow", "orjson")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "benchmark": "prepare",
        "commit": git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "-uno") else ""),
        "command": shlex.join(["python", "benchmarks/prepare.py", *sys.argv[1:]]),
        "machine": {
            "processor": models[0].partition(": ")[2] if models else platform.machine(),
            "cores": os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
            "system": platform.platform(),
            "load_before": [round(load, 2) for load in os.getloadavg()],
        },
        "versions": {"python": platform.python_version(), **versions, "datatrove": DATATROVE[0].partition("==")[2]},
        "corpus": json.loads((options.corpus / "corpus.json").read_text()),
        "vocabulary_size": len(json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"]),
    }


def show(facts: dict[str, Any]) -> None:
    head = ("contender", "text MB", "tokens", "s (CPU)", "start s (CPU)", "MB/s", "MB/s of CPU", "memory MiB")
    row = "{:<20}{:>9}{:>13}{:>15}{:>15}{:>9}{:>13}{:>12}"
    print("\n" + row.format(*head))
    for entry in facts["results"]:
        print(
            row.format(
                entry["contender"],
                f"{entry['text_bytes'] / 1e6:.0f}",
                f"{entry['tokens']:,}",
                f"{entry['seconds']:.1f} ({entry['cpu_seconds']:.1f})",
                f"{entry['start_seconds']:.1f} ({entry['start_cpu_seconds']:.1f})",
                entry["mb_per_second"],
                entry["mb_per_cpu_second"],
                round(entry["peak_memory_bytes"] / 2**20),
            )
        )
    print(
        f"\nshards of the fast engine and of huggingface: {'the same bytes' if facts['same_shards'] else 'DIFFERENT'}"
    )
    for target in facts["targets"]:
        verdict = "met" if target["met"] else "missed"
        print(f"{target['target']}: {target['reached']} (target {target['bar']}): {verdict}")


if __name__ == "__main__":
    main()
