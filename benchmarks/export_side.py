"""One contender of `export.py`, in a process of its own: export_side.py CONTENDER DTYPE FOLDER OUT.

Imports come first; then one JSON line says so and gives the process's anonymous memory, and after an empty line on
stdin the work begins. A second line has its duration, and the one until the disk has all files.
`digest DTYPE FOLDER OUT` prints the hashes of what was written.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def anonymous_bytes(pid: int | str = "self") -> int:
    """Memory of a process that is not backed by files (RssAnon): mapped checkpoints are not counted."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def ours(dtype: str, folder: Path, out: Path, *, foreign: bool) -> tuple[Callable[[], Any], dict[str, float]]:
    sys.path.insert(0, str(ROOT))
    import transformers.models.llama.modeling_llama  # noqa: F401  # code that is not ours, and DeepSpeed needs none

    import gpt.export

    gate, seconds = gpt.export.run_gate, {"gate_seconds": 0.0}

    def timed_gate(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return gate(*arguments, **options)
        finally:
            seconds["gate_seconds"] = time.perf_counter() - started

    gpt.export.run_gate = timed_gate
    if foreign:
        given: dict[str, Any] = {"tokenizer": folder / "tokenizer", "ungated": True, "dtype": dtype}
        return lambda: gpt.export.export_deepspeed(folder / "deepspeed", out, **given), seconds
    return lambda: gpt.export.export_run(folder / "run", out, dtype=dtype), seconds


def deepspeed(dtype: str, folder: Path, out: Path) -> tuple[Callable[[], Any], dict[str, float]]:
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_state_dict

    return lambda: convert_zero_checkpoint_to_state_dict(str(folder / "deepspeed"), str(out), dtype=dtype), {}


def digest(out: Path) -> dict[str, str]:
    """xxh3 of every tensor's bytes; an alias of tied weights, which DeepSpeed writes too, is left out."""
    import torch
    import xxhash
    from safetensors.torch import load_file

    found: dict[str, str] = {}
    for file in sorted([*out.glob("*.safetensors"), *out.glob("*.bin")]):
        tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file, mmap=True, weights_only=True)
        for name, value in tensors.items():
            if name != "lm_head.weight":
                data = value.contiguous().view(-1).view(torch.uint8).numpy()
                found[name] = f"{value.dtype} {tuple(value.shape)} {xxhash.xxh3_64_hexdigest(data)}"
    return found


def main(contender: str, dtype: str, folder: Path, out: Path) -> None:
    if contender == "digest":
        print(json.dumps(digest(out)))
        return
    if contender == "deepspeed":
        work, seconds = deepspeed(dtype, folder, out)
    else:
        work, seconds = ours(dtype, folder, out, foreign=contender == "ours from DeepSpeed's files")
    print(json.dumps({"imported_bytes": anonymous_bytes()}), flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    work()
    seconds["seconds"] = time.perf_counter() - started
    for file in [out, *out.rglob("*")]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds["durable_seconds"] = time.perf_counter() - started
    print("\n" + json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
