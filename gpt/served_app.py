"""transformers' OpenAI-compatible server around one model that is already loaded, with a gate in front of it.

Its own command would also load and unload whatever model a request names, from this disk or from the hub.
"""

import hmac
from inspect import signature
from typing import Any

from fastapi import HTTPException, Request
from jinja2 import TemplateError
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerateManager, GenerationState

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health")
LONGEST_ANSWER_TOKENS = 16_384


def build_app(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token: str | None) -> ASGIApp:
    """The server as an ASGI application; with `token`, each request must carry it as its bearer token."""
    _sample_as_asked(model.generation_config)
    manager, state = _OneModel(name, model, tokenizer), _BoundedState()
    unused: Any = None  # handlers of paths that the gate does not let through
    app = build_server(
        manager,
        _Chats(manager, state),
        completion_handler=_Completions(manager, state),
        response_handler=unused,
        transcription_handler=unused,
        systemone_handler=unused,
        generation_state=state,
    )
    for kind in (HTTPException, ValueError, KeyError, TypeError, TemplateError):
        app.add_exception_handler(kind, _refuse)
    return _Gate(app, token)


def _sample_as_asked(config: GenerationConfig | None) -> None:
    """Let a request's temperature count: without this, transformers' server takes the most likely token whatever it is.

    A folder that itself asks for sampling is left as it is. Otherwise the defaults are those of OpenAI's interface.
    """
    if config is not None and not config.do_sample:
        config.do_sample, config.temperature, config.top_p, config.top_k = True, 1.0, 1.0, 0


def _check_request(body: dict[str, Any]) -> None:
    """Refuse what transformers adds to OpenAI's interface and what takes the model's own settings away: its end tokens
    and its template, or lets one request search with a thousand beams."""
    if body.get("generation_config") is not None:
        raise HTTPException(400, "generation_config is not taken; use temperature, top_p, max_tokens, seed and stop.")
    given = body.get("chat_template_kwargs") or {}
    if not isinstance(given, dict):
        raise HTTPException(400, "chat_template_kwargs must be an object of the template's own variables.")
    if taken := sorted(given.keys() & signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys()):
        raise HTTPException(
            400, f"chat_template_kwargs is for the template's own variables, not for {', '.join(taken)}."
        )


class _Chats(ChatCompletionHandler):
    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)
        _check_request(body)


class _Completions(CompletionHandler):
    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)
        _check_request(body)


class _OneModel(ModelManager):
    """Knows one model, by its name; a request for another is refused and never loads anything."""

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._loaded = model, tokenizer
        super().__init__(force_model=name)

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> Any:
        return self._loaded

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def get_gen_models(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "trainyard"}]


class _BoundedState(GenerationState):
    """Generation that ends where the model's positions do, which transformers itself does not see to."""

    def get_manager(self, model_id: str, use_cb: bool = False) -> GenerateManager:
        manager: GenerateManager = self._generate_managers.setdefault(model_id, _BoundedManager())
        return manager


class _BoundedManager(GenerateManager):
    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kw: Any
    ) -> Any:
        _bound(model, inputs, gen_config)
        return super().generate_streaming(model, processor, inputs, gen_config, *args, **kw)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kw: Any
    ) -> Any:
        _bound(model, inputs, gen_config)
        return await super().generate_non_streaming(model, processor, inputs, gen_config, *args, **kw)


def _bound(model: PreTrainedModel, inputs: Any, config: GenerationConfig) -> None:
    """Limit the new tokens to the positions that are left, or to LONGEST_ANSWER_TOKENS of a model that has no end of
    them; the answer's finish_reason then says "length"."""
    tokens = inputs["input_ids"].shape[-1]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if tokens == 0:
        raise HTTPException(400, "The prompt is empty; give at least one character to continue from.")
    if positions is not None and tokens >= positions:
        raise HTTPException(
            400, f"The prompt has {tokens} tokens, but the model has {positions} positions; shorten it."
        )
    if config.max_new_tokens is not None and config.max_new_tokens < 1:
        raise HTTPException(400, f"max_tokens is {config.max_new_tokens}; it must be at least 1.")
    limit = LONGEST_ANSWER_TOKENS if positions is None else positions - tokens
    config.max_new_tokens = min(config.max_new_tokens or limit, limit)


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, HTTPException):
        return _error(error.status_code, str(error.detail))
    return _error(400, f"The request cannot be answered: {type(error).__name__}: {' '.join(str(error).split())}")


def _error(status: int, message: str, **headers: str) -> JSONResponse:
    """An error in the form that OpenAI's clients show."""
    kind = "authentication_error" if status == 401 else "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": None}}, status, headers)


class _Gate:
    """Lets a request through that carries the token and asks for one of PATHS."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app = app
        self._expected = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = None if scope["type"] == "lifespan" else self._refusal(scope)
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        given = dict(scope["headers"]).get(b"authorization", b"")
        if self._expected is not None and not hmac.compare_digest(given, self._expected):
            return _error(
                401,
                "Give the token that `trainyard serve` printed: Authorization: Bearer TOKEN.",
                **{"WWW-Authenticate": "Bearer"},
            )
        if scope["path"] not in PATHS:
            return _error(404, f"There is no {scope['path']} here, only {', '.join(PATHS)}.")
        return None
