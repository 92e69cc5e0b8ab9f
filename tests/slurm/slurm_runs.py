"""Runs that are submitted to the mini cluster, watched through their directories, and disturbed."""

import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from live_runs import CLI, PROJECT, Runs, environment

MINI_CLUSTER = PROJECT / "slurm" / "mini_cluster.sh"
NODES = 6

PACE = """
import os, sys, time
if "RANK" in os.environ and int(os.environ.get("SLURM_RESTART_COUNT", 0)) < int(os.environ["PACED_STARTS"]):
    import importlib.abc, importlib.util
    class Paced(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name != "data_pipeline.stream":
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            run = spec.loader.exec_module
            def exec_module(module):
                run(module)
                rows = module.TrainingStream.rows
                def paced(stream, positions):
                    try:
                        time.sleep(float(open(os.environ["PACE_FILE"]).read()))
                    except FileNotFoundError:
                        pass
                    return rows(stream, positions)
                module.TrainingStream.rows = paced
            spec.loader.exec_module = exec_module
            return spec
    sys.meta_path.insert(0, Paced())
"""
"""In the first PACED_STARTS starts of a run each step waits as many seconds as PACE_FILE says, if it is there: the time
in which it is disturbed costs no CPU."""


@dataclass(frozen=True)
class SlurmRuns(Runs):
    """Training runs by `trainyard submit`, in one directory that shares prepared data."""

    def submit(
        self, name: str, *options: str, pace_seconds: float = 0.0, paced_starts: int = 99, **changes: Any
    ) -> str:
        """Write the recipe and submit it; the id of the job, of a chain's first one."""
        recipe = self.write_recipe(name, **changes)
        variables = environment()
        if pace_seconds:
            self.pace_file(name).write_text(str(pace_seconds), encoding="utf-8")
            (self.folder / "sitecustomize.py").write_text(PACE, encoding="utf-8")
            path = os.pathsep.join([str(self.folder), variables["PYTHONPATH"]])
            variables |= {"PACE_FILE": str(self.pace_file(name)), "PACED_STARTS": str(paced_starts), "PYTHONPATH": path}
        done = subprocess.run(
            [*CLI, "submit", str(recipe), *options, "--json"],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=100,
            env=variables,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["job_ids"][0]

    def pace_file(self, name: str) -> Path:
        return self.folder / f"{name}.pace"

    def output(self, name: str, job: str) -> str:
        """What the job has printed, over all its starts."""
        file = self.directory(name) / "logs" / f"slurm-{job}.out"
        return file.read_text(encoding="utf-8") if file.exists() else ""

    def job_events(self, name: str, *kinds: str) -> list[dict[str, Any]]:
        file = self.directory(name) / "events.jsonl"
        return [event for event in self.events(name) if event["event"] in kinds] if file.exists() else []

    def decisions(self, name: str) -> list[str]:
        """What came after each start of the run's jobs."""
        return [event["decision"] for event in self.job_events(name, "job ended")]

    def last_step(self, name: str) -> int:
        file = self.directory(name) / "metrics.jsonl"
        return file.read_text(encoding="utf-8").count("\n") if file.exists() else 0

    def wait_until(self, name: str, job: str, condition: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not in {seconds} s: {fields(job)}\n{self.output(name, job)}"
            time.sleep(0.1)

    def wait_end(self, name: str, job: str, seconds: float = 200, state: str = "COMPLETED") -> None:
        """Wait for the job's end; requeued jobs need not wait for their time."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")

        def ended() -> bool:
            found = fields(job)
            # a start that just ends is COMPLETING in between, and pending again a moment later
            return found["JobState"] in ends and found.get("Reason") != "BeginTime"

        self.wait_until(name, job, ended, seconds)
        assert fields(job)["JobState"] == state, self.output(name, job)

    def wait_restart(self, name: str, job: str, restart: int, seconds: float = 90) -> None:
        """Wait until the job runs for the `restart`th time after its first."""

        def runs_again() -> bool:
            found = fields(job)
            return found["JobState"] == "RUNNING" and found["Restarts"] == str(restart)

        self.wait_until(name, job, runs_again, seconds)


def fields(job: str) -> dict[str, str]:
    """Slurm's record of a job."""
    return dict(re.findall(r"(\w+)=(\S*)", scontrol("show", "job", job)))


def scontrol(*arguments: str) -> str:
    return command("scontrol", *arguments)


def command(*arguments: str) -> str:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=30, check=True).stdout
