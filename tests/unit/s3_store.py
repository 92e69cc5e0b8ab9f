"""An S3-compatible store on loopback (moto's) that counts what it gives, goes away and fails as it is told."""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from ranged_server import Counting
from werkzeug.serving import make_server

NO_FILE = "/nonexistent/aws"


@dataclass
class S3Store(Counting):
    """What the tests see and set. The objects are kept by moto in this process, also while nothing is served."""

    port: int = 0
    requests: list[str] = field(default_factory=list)
    """Paths asked for with GET and HEAD."""
    answer: Callable[[str], tuple[str, str] | None] = lambda path: None
    """Of a GET's path: a status and S3's code for it, or None, where the store answers."""

    def environment(self) -> dict[str, str]:
        """Where the store is and with which key; nothing that this machine has of its own is used."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_CONFIG_FILE": NO_FILE,
            "AWS_SHARED_CREDENTIALS_FILE": NO_FILE,
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }

    @contextmanager
    def serving(self) -> Iterator["S3Store"]:
        """Serve; after a first time under the same port, as a store that is back."""
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        moto = DomainDispatcherApplication(create_backend_app)

        def application(environment: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            if environment["REQUEST_METHOD"] not in ("GET", "HEAD"):
                return moto(environment, start_response)
            self.requests.append(environment["PATH_INFO"])
            wanted = self.answer(environment["PATH_INFO"]) if environment["REQUEST_METHOD"] == "GET" else None
            if wanted is not None:
                start_response(wanted[0], [("Content-Type", "application/xml")])
                return [f"<Error><Code>{wanted[1]}</Code><Message>as told</Message></Error>".encode()]
            content = b"".join(moto(environment, start_response))
            self.count(len(content))
            return [content]

        server = make_server("127.0.0.1", self.port, application, threaded=True)
        self.port = server.port
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
