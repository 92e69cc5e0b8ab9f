"""What the benchmarks share: peers in venvs of their own, the facts of a run, tables, targets."""

import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Target = tuple[str, float, float]  # what, the bar, what was reached; "at most" in the name says which side is good


def peer_python(name: str, pins: Sequence[str], *options: str) -> Path:
    """The Python of a peer's own virtual environment, which is made if it does not hold these versions.

    ``options`` go to pip.
    """
    folder = ROOT / "build" / "bench-venvs" / name
    stamp, python = folder / "pins.txt", folder / "bin" / "python"
    if not stamp.is_file() or stamp.read_text().split() != list(pins):
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *options, *pins], check=True)
        stamp.write_text("\n".join(pins) + "\n")
    return python


def describe(packages: Sequence[str], **peers: Any) -> dict[str, Any]:
    """Name, commit, command, machine and versions of the benchmark that is running; the load is that before it."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "benchmark": Path(sys.argv[0]).stem,
        "commit": _git("rev-parse", "HEAD") + (" with changes" if _git("status", "--porcelain", "-uno") else ""),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "machine": {
            "processor": models[0].partition(": ")[2] if models else platform.machine(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": platform.platform(),
            "load_before": [round(load, 2) for load in os.getloadavg()],
        },
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
            **peers,
        },
    }


def judge(targets: Sequence[Target]) -> list[dict[str, Any]]:
    """Which targets are met."""
    return [
        {"target": name, "bar": bar, "reached": value, "met": value <= bar if "at most" in name else value >= bar}
        for name, bar, value in targets
    ]


def write_and_show(facts: dict[str, Any], out: Path, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write the facts as JSON; print a table, and the targets in ``facts["targets"]``."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts, indent=1) + "\n")
    table = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print()
    for first, *others in table:
        print("  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))]))
    for target in facts["targets"]:
        verdict = "met" if target["met"] else "missed"
        print(f"{target['target']}: {target['reached']:,} (target {target['bar']:,}): {verdict}")


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
