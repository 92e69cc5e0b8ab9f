"""What worker processes print: kept in one file a rank and stream, and shown on the terminal as it comes."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

POLL_SECONDS = 0.1


class RankLogs(LogsSpecs):
    """torchrun's plan of log files: `rank_00000.stdout.log` and `rank_00000.stderr.log` for each rank of this host."""

    def __init__(self, directory: Path) -> None:
        super().__init__(log_dir=str(directory))
        self.directory = directory
        self.paths: list[Path] = []

    @property
    def root_log_dir(self) -> str:
        return str(self.directory)

    def file(self, rank: int, stream: str) -> Path:
        """The file of one rank's stream, "stdout" or "stderr"."""
        return self.directory / f"rank_{rank:05d}.{stream}.log"

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        ranks = {local_rank: int(env["RANK"]) for local_rank, env in envs.items()}
        for env in envs.values():
            env["TORCHELASTIC_ERROR_FILE"] = ""  # workers report through TRAINYARD_ERROR_DIRECTORY
        stdouts = {local_rank: str(self.file(rank, "stdout")) for local_rank, rank in ranks.items()}
        stderrs = {local_rank: str(self.file(rank, "stderr")) for local_rank, rank in ranks.items()}
        self.paths = [Path(path) for path in (*stdouts.values(), *stderrs.values())]
        return LogsDest(stdouts, stderrs, error_files=dict.fromkeys(ranks, os.devnull))


@contextlib.contextmanager
def shown_on_terminal(logs: RankLogs) -> Iterator[None]:
    """While inside, copy the growing log files to this process's stdout and stderr, whole lines at a time.

    When it ends, everything that was written has been shown. Lines of several ranks are never mixed within a line.
    """
    stop = threading.Event()
    thread = threading.Thread(target=_follow, args=(logs, stop), name="worker output", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _follow(logs: RankLogs, stop: threading.Event) -> None:
    with contextlib.ExitStack() as stack:
        files: dict[Path, BinaryIO] = {}
        rests: dict[Path, bytes] = {}
        while True:
            last = stop.is_set()  # asked before reading, so that what came before the stop is read
            for path in logs.paths:
                if path not in files and path.exists():
                    files[path] = stack.enter_context(path.open("rb"))
            for path, file in files.items():
                content = rests.get(path, b"") + file.read()
                end = len(content) if last else content.rfind(b"\n") + 1
                rests[path] = content[end:]
                _show(content[:end], sys.stderr if path.name.endswith(".stderr.log") else sys.stdout)
            if last:
                return
            stop.wait(POLL_SECONDS)


def _show(content: bytes, stream: TextIO) -> None:
    """Write to a terminal stream; one that is gone (a closed pipe) must not end the training."""
    if not content:
        return
    with contextlib.suppress(OSError, ValueError):
        print(content.decode("utf-8", errors="replace"), end="", file=stream, flush=True)
