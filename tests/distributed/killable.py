"""A tests' server in a process of its own, which is killed and started again under the same port."""

import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event

from ranged_server import RangedServer
from s3_store import S3Store

FORK = multiprocessing.get_context("fork")


class Killable:
    """Serves while its block runs. At each start it holds what the server in this process held at the first."""

    def __init__(self, server: RangedServer | S3Store) -> None:
        self._server = server

    def __enter__(self) -> "Killable":
        with self._server.serving():  # takes a free port, which it then keeps
            pass
        self._start()
        return self

    def __exit__(self, *error: object) -> None:
        self._kill()

    @contextmanager
    def killed(self) -> Iterator[None]:
        """SIGKILL, and another process behind the block."""
        self._kill()
        yield
        self._start()

    def _kill(self) -> None:
        self._process.kill()
        self._process.join()
        assert self._process.exitcode == -signal.SIGKILL

    def _start(self) -> None:
        ready = FORK.Event()
        self._process = FORK.Process(target=self._serve, args=(ready,), daemon=True)
        self._process.start()
        assert ready.wait(10), "the server did not start"

    def _serve(self, ready: Event) -> None:
        with self._server.serving():
            ready.set()
            signal.pause()
