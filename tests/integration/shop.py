"""The whole way through the command line, on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).resolve().parents[2]
EMBEDDED = PROJECT / "data_pipeline" / "embedded"


class Shop:
    """A working directory in which commands are run as a user runs them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def trainyard(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "launch.cli", *arguments],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "PYTHONPATH": str(PROJECT), "HF_HUB_OFFLINE": "1"},
        )
        assert not check or done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
        return done

    def answer(self, *arguments: str) -> Any:
        """A command's --json answer."""
        return json.loads(self.trainyard(*arguments, "--json").stdout)

    def train(self, name: str, processes: int = 2, **sections: Any) -> subprocess.CompletedProcess[str]:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"name": name, **sections}), encoding="utf-8")
        return self.trainyard("train", str(path), "--processes", str(processes))

    def metrics(self, name: str) -> list[dict[str, Any]]:
        lines = (self.folder / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]
