"""`trainyard` as a process that is forked from the tests' own, which has imported torch, transformers and deepspeed
already, and its ranks as forks of that process.

Their imports take seconds of a processor at each start. A forked rank is a process like any other: in a session of its
own, with its own files, environment and process group, and it ends by the same signals. What only a new interpreter has
(its environment for others to read, which the watch for hangs does, and a planted sitecustomize.py) takes
`interpreters`; the runs of tests/integration and tests/slurm have no forks at all.
"""

import contextlib
import gc
import importlib
import json
import logging
import os
import pkgutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

import psutil
from planted import plant
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from transformers import trainer_utils  # noqa: F401  which imports peft
from transformers.models.gpt2 import modeling_gpt2  # noqa: F401  the models of the tests' runs
from transformers.models.llama import modeling_llama  # noqa: F401

import gpt
import launch.local
from gpt import checkpoint, train
from gpt.stop_requests import SIGNALS
from launch import cli

for package in (gpt, checkpoint):  # a rank imports some of them late; a fork has them
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
gc.freeze()  # a fork's collections would go through, and copy, all that was imported


class Forked:
    """A process under way that does `main`, in a session of its own, with what users of `subprocess.Popen` need."""

    def __init__(
        self, main: Callable[[], Any], arguments: list[str], *, output: IO[str], errors: IO[str], env: Mapping[str, str]
    ):
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            _become(main, arguments, output.fileno(), errors.fileno(), env)

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


def fork_trainyard(
    arguments: list[str],
    *,
    cwd: Path,
    output: IO[str],
    errors: IO[str],
    env: Mapping[str, str],
    interpreters: bool = False,
) -> Forked:
    """The command `trainyard`; with `interpreters` its ranks are new interpreters, as a user's are, and where a
    sitecustomize.py is planted."""
    interpreters = interpreters or "SITECUSTOMIZE" in env
    assert not (interpreters and "PLANTED_FAULT" in env), "a new interpreter knows nothing of a planted fault"

    def main() -> None:
        os.chdir(cwd)
        if not interpreters:
            SubprocessHandler._popen = _fork_rank  # type: ignore[method-assign]
        cli.main()

    return Forked(main, ["trainyard", *arguments], output=output, errors=errors, env=env)


def _fork_rank(handler: Any, command: tuple[str, ...], env: dict[str, str]) -> Forked:
    """In the place of torchrun's agent's own way to start a process."""
    python, *options, module = command[:4]
    assert (python, options, module) == (sys.executable, ["-P", "-m"], launch.local.WORKER_MODULE), command

    def main() -> None:
        Path("/proc/self/comm").write_text(f"rank {env['RANK']}", encoding="ascii")  # for `rank_of`
        if "PLANTED_FAULT" in env:
            plant(**json.loads(env["PLANTED_FAULT"]))
        train.main()

    return Forked(main, [module, *command[4:]], output=handler._stdout, errors=handler._stderr, env=env)


def rank_of(process: psutil.Process) -> int:
    """The rank that a process of a run is. A fork's environment is, to others, that of the process it comes from."""
    name = str(process.name())
    return int(name.removeprefix("rank ")) if name.startswith("rank ") else int(process.environ()["RANK"])


def _become(
    main: Callable[[], Any], arguments: list[str], output: int, errors: int, env: Mapping[str, str]
) -> NoReturn:
    """In the child: `main` with its own files and environment. It never comes back to the parent's code."""
    code = 1
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (output, 1), (errors, 2)):
            os.dup2(source, target)
        for number in (*SIGNALS, signal.SIGQUIT):  # the parent's handlers
            signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
        os.environ.clear()
        os.environ.update(env)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
        logging.root.handlers.clear()  # the tests' own
        sys.argv = arguments
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
    finally:
        os._exit(code)
