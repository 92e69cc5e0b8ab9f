"""`trainyard serve`: a model folder behind transformers' own OpenAI-compatible server, on this host."""

import contextlib
import secrets
import socket
from pathlib import Path

from transformers.utils import logging
from transformers.utils.import_utils import is_serve_available

from gpt.generate import load

SHUTDOWN_SECONDS = 5
"""How long answers that are under way may take when the server is asked to end."""


def serve(model_dir: Path, *, host: str = "127.0.0.1", port: int = 8000, authenticate: bool = True) -> None:
    """Serve the model until a signal ends it; prints address, model name and token when it is ready.

    The loopback address is shared by all users of a host, so each request must carry a token, made anew at each start
    and printed this once; not so with `authenticate` False. `port` 0 takes a free one.

    Raises ValueError when packages are missing, the address cannot be had, or `model_dir` is no model folder.
    """
    if not is_serve_available():
        raise ValueError(
            "`trainyard serve` needs the packages of the extra serve: "
            "pip install --constraint constraints.txt --editable '.[serve]'."
        )
    import uvicorn

    from gpt.served_app import build_app

    with _listen(host, port) as listener:  # before the model, which takes long to load
        model, tokenizer = load(model_dir)
        logging.set_verbosity_error()  # it warns of every request
        name = model_dir.resolve().name
        token = secrets.token_urlsafe(32) if authenticate else None
        server = uvicorn.Server(
            uvicorn.Config(
                build_app(name, model, tokenizer, token),
                log_level="warning",
                timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            )
        )
        shown = f"[{host}]" if ":" in host else host
        print(f"url: http://{shown}:{listener.getsockname()[1]}/v1\nmodel: {name}")
        print(f"token: {token}" if token else "token: none, everyone who reaches this address may ask", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"Cannot listen on {host} port {port}: {reason}; give another --port or --host.") from error
