"""Time `trainyard prepare` on one core: JSONL to token shards, next to datatrove, on 320 MB of Debian documentation.

    python benchmarks/prepare.py [--core 1] [--rounds 2] [--part-megabytes 60] [--out benchmarks/results/prepare.json]

Every round runs all contenders one after another, each a process pinned to the same core with one thread. Rates are of
the whole process. Its start (interpreter, imports, loading the tokenizer) is measured by the same command on one
document, and a second rate, by which datatrove is compared, is without it. Slow contenders get the first part of the
corpus, and ours runs on that part, too. Everything is made under build/: the corpus, a tokenizer of 32,000 entries,
datatrove in a venv of its own.
"""

import argparse
import contextlib
import filecmp
import json
import os
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
from benchmarks.facts import describe, judge, peer_python, write_and_show  # noqa: E402

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


def main() -> None:
    options = read_options()
    work = ROOT / "build" / "prepare"
    inputs = make_inputs(build_corpus(options.corpus), work, options.part_megabytes * 10**6)
    tokenizer = options.tokenizer or trained_tokenizer(inputs["whole"], work / "tokenizer")
    contenders = {
        ("ours, fast engine", "whole"): ours(tokenizer, options.engine),
        ("ours, fast engine", "part"): ours(tokenizer, options.engine),
        ("ours, huggingface", "part"): ours(tokenizer, "huggingface"),
        ("datatrove", "part"): datatrove(
            tokenizer, peer_python("datatrove", DATATROVE, "--constraint", str(ROOT / "constraints.txt"))
        ),
    }
    packages = ("tokenizers", "gigatoken", "tiktoken", "transformers", "numpy", "pyarrow", "orjson")
    facts = describe(packages, datatrove=DATATROVE[0].partition("==")[2])
    facts["corpus"] = json.loads((options.corpus / "corpus.json").read_text())
    facts["vocabulary_size"] = len(json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"])
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
    facts |= {"results": results, "same_tokens": len(tokens) == 1, "same_shards": same, "targets": targets(results)}
    show(facts, options.out)
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
    """The contender's best run, whole and less its best start: what else the machine does only ever adds."""
    starts = [run for other in results if other["contender"] == result["contender"] for run in other["start_runs"]]
    for clock in ("seconds", "cpu_seconds"):
        whole, start = (min(run[clock] for run in runs) for runs in (result["runs"], starts))
        result[clock], result[f"start_{clock}"] = whole, start
        rate = "mb_per_" + clock.removesuffix("s")
        result[rate] = round(result["text_bytes"] / 1e6 / whole, 2)
        result[f"{rate}_without_start"] = round(result["text_bytes"] / 1e6 / (whole - start), 2)
    result["tokens"] = result["runs"][0]["tokens"]
    result["peak_memory_bytes"] = max(run["peak_memory_bytes"] for run in result["runs"])


def targets(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    fast, fast_part, slow, peer = results
    ratio = fast["mb_per_cpu_second_without_start"] / peer["mb_per_cpu_second_without_start"]
    memory = max(entry["peak_memory_bytes"] for entry in (fast, fast_part, slow)) / 2**30
    return judge(
        [
            ("fast engine, MB/s of CPU with its start", 80.0, fast["mb_per_cpu_second"]),
            ("Hugging Face tokenizers, MB/s of CPU with its start", 2.3, slow["mb_per_cpu_second"]),
            ("fast engine / datatrove, both without their start", 30.0, round(ratio, 1)),
            ("memory, GiB (at most)", 1.5, round(memory, 2)),
        ]
    )


def show(facts: dict[str, Any], out: Path) -> None:
    head = ("contender", "text MB", "tokens", "s (CPU)", "start s (CPU)", "MB/s", "of CPU", "without start", "MiB")
    rows = [
        (
            entry["contender"],
            f"{entry['text_bytes'] / 1e6:.0f}",
            f"{entry['tokens']:,}",
            f"{entry['seconds']:.1f} ({entry['cpu_seconds']:.1f})",
            f"{entry['start_seconds']:.1f} ({entry['start_cpu_seconds']:.1f})",
            entry["mb_per_second"],
            entry["mb_per_cpu_second"],
            entry["mb_per_cpu_second_without_start"],
            round(entry["peak_memory_bytes"] / 2**20),
        )
        for entry in facts["results"]
    ]
    write_and_show(facts, out, head, rows)
    same = "the same bytes" if facts["same_shards"] else "DIFFERENT"
    print(f"shards of the fast engine and of huggingface: {same}")


if __name__ == "__main__":
    main()
