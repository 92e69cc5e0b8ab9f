"""An HTTP server of a folder on loopback that understands ranges, counts what it gives and fails as it is told."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from typing import Any


@dataclass
class Counting:
    """Counts the bytes sent, also those of processes that are forked from this one and killed."""

    _sent: Any = field(default_factory=lambda: RawValue("q"), init=False)
    _sent_lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    @property
    def bytes_sent(self) -> int:
        return int(self._sent.value)

    def count(self, sent_bytes: int) -> None:
        with self._sent_lock:
            self._sent.value += sent_bytes


@dataclass
class RangedServer(Counting):
    """What the tests see and set."""

    folder: Path
    port: int = 0
    requests: list[str] = field(default_factory=list)
    """Names of the files asked for with GET."""
    answer: Callable[[str, bytes], bytes | int | None] = lambda name, content: content
    """Of a GET's file name and right answer: what is sent, or a status, or None, where it never comes."""
    seconds_per_kilobyte: float = 0.0
    """How slowly an answer trickles."""
    ranges: bool = True
    sizes: bool = True
    """Whether it knows ranges, and tells how long its answers are."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def serving(self) -> Iterator["RangedServer"]:
        """Serve; after a first time under the same port, as a server that is back."""
        state, ended = self, threading.Event()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def parse_request(self) -> bool:
                if ended.is_set():  # a connection may outlive the server
                    self.close_connection = True
                    return False
                return super().parse_request()

            def do_HEAD(self) -> None:
                path = state.folder / self.path.lstrip("/")
                self.send_response(200 if path.is_file() else 404)
                self._end_headers(path.stat().st_size if path.is_file() else 0)

            def do_GET(self) -> None:
                path = state.folder / self.path.lstrip("/")
                content = path.read_bytes() if path.is_file() else b""
                status = 200 if path.is_file() else 404
                if "Range" in self.headers and status == 200 and state.ranges:
                    first, last = self.headers["Range"].removeprefix("bytes=").split("-")
                    content, status = content[int(first) : int(last) + 1], 206
                state.requests.append(path.name)
                answer = state.answer(path.name, content)
                if answer is None:
                    ended.wait(30)
                    return
                if isinstance(answer, int):
                    answer, status = b"", answer
                state.count(len(answer))
                self.send_response(status)
                self._end_headers(len(answer))
                pieces = range(0, len(answer), 64) if state.seconds_per_kilobyte else [0]
                with suppress(ConnectionError):  # the client has given it up
                    for begin in pieces:
                        self.wfile.write(answer[begin : begin + 64] if state.seconds_per_kilobyte else answer)
                        ended.wait(state.seconds_per_kilobyte / 16)

            def _end_headers(self, size_bytes: int) -> None:
                if state.sizes:
                    self.send_header("Content-Length", str(size_bytes))
                else:
                    self.close_connection = True  # which is then the end of the answer
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        ThreadingHTTPServer.allow_reuse_address = True
        with ThreadingHTTPServer(("127.0.0.1", self.port), Handler) as server:
            server.daemon_threads = True
            self.port = server.server_address[1]
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
            thread.start()
            try:
                yield self
            finally:
                ended.set()
                server.shutdown()
                thread.join()

    @contextmanager
    def away_for(self, seconds: float) -> Iterator[None]:
        """While inside, be back after some seconds."""
        ended = threading.Event()

        def back() -> None:
            if not ended.wait(seconds):
                with self.serving():
                    ended.wait()

        thread = threading.Thread(target=back)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
