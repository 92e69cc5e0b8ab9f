"""`trainyard` as a process that is forked from the tests' own, which has imported torch and transformers already.

The imports of the launcher take 4 s of a processor, and the tests start it more than a hundred times. Its workers are
started by it as always: by a new interpreter each.
"""

import logging
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import IO, NoReturn

import gpt.train  # noqa: F401  here, so that a fork has it
import launch.local  # noqa: F401
from launch import cli


class Forked:
    """A command under way, in a session of its own, with what the tests need of `subprocess.Popen`."""

    def __init__(self, arguments: list[str], *, cwd: Path, output: IO[str], errors: IO[str], env: Mapping[str, str]):
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            _become(arguments, cwd, output.fileno(), errors.fileno(), env)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended."""
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("trainyard", timeout or 0)
            time.sleep(0.01)
        return code


def _become(arguments: list[str], cwd: Path, output: int, errors: int, env: Mapping[str, str]) -> NoReturn:
    """In the child: the command with its own files, folder and environment. It never comes back to the tests."""
    code = 1
    try:
        os.setsid()
        os.chdir(cwd)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (output, 1), (errors, 2)):
            os.dup2(source, target)
        os.environ.clear()
        os.environ.update(env)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
        logging.root.handlers.clear()  # the tests' own
        sys.argv = ["trainyard", *arguments]
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
