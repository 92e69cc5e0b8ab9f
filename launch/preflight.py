"""The command `trainyard preflight`: what the ranks found (gpt/preflight.py) and what this host itself has to say."""

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from gpt.recipe import Recipe
from launch import environment, local
from launch.hub import fetch


def run_preflight(
    recipe: Recipe, *, processes: int | None, nodes: int, node_rank: int, rendezvous: str | None
) -> dict[str, Any]:
    """Start this host's ranks for a look; returns the report.

    Raises:
        ValueError: numbers that do not fit together, or what the hub does not give.
        OSError: the hosts did not meet, or the ranks ended without a report; why is on stderr.
    """
    started = time.monotonic()
    recipe = fetch(recipe)  # as `train` does
    if processes is None:
        processes, _ = local.default_processes()
    items = [_build_locks()]
    with tempfile.TemporaryDirectory(prefix="trainyard-preflight-") as folder:
        code = local.run_preflight(
            recipe, Path(folder), processes=processes, nodes=nodes, node_rank=node_rank, rendezvous=rendezvous
        )
        file = Path(folder) / "preflight.json"
        if code != 0 or not file.exists():
            raise ChildProcessError("the ranks ended before they had looked at everything; the reason is above")
        report = json.loads(file.read_text(encoding="utf-8"))
    items = report["items"] + items
    failed = sum(item["state"] == "failed" for item in items)
    return {"failed": failed, "seconds": time.monotonic() - started, "items": items, "plan": report["plan"]}


def _build_locks() -> dict[str, str]:
    """Looked at before the ranks are started, which removes stale ones."""
    folder = Path(
        os.environ.get("TORCH_EXTENSIONS_DIR") or environment.extensions_directory(bool(environment.cuda_devices()))
    )
    item = {"name": "build locks", "state": "passed", "message": f"no stale one in {folder}"}
    if removed := environment.clear_stale_build_locks(folder):
        names = ", ".join(map(str, removed))
        item |= {"state": "warning", "message": f"{names}, left by a killed build, blocked every start: removed"}
    return item


def print_report(report: dict[str, Any]) -> None:
    """One line an item, what failed last."""
    print("\n".join(report["plan"]))
    order = ("passed", "skipped", "warning", "failed")
    for item in sorted(report["items"], key=lambda item: order.index(item["state"])):
        print(f"{item['state']:8}{item['name']}: {item['message']}")
    failed = report["failed"]
    result = f"{failed} of these would make the run fail" if failed else "this run can start"
    print(f"{result} ({report['seconds']:.1f} s)")
