"""The HTTP application: which path does what, and how each fault is answered.

    app, gate = build_app(engine, config, log=RequestLog("json"))

Everything is answered as OpenAI's API answers, so that its clients work as they are; what is
Moesaic's own is marked so in `protocol`. `GET /` is a page to talk to the model on, which asks
nothing of any other server.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException

from moesaic.serving.config import ServeConfig
from moesaic.serving.engine.engine import Engine
from moesaic.serving.server.chat import create_chat_completion
from moesaic.serving.server.completions import create_completion
from moesaic.serving.server.delivery import Post
from moesaic.serving.server.embeddings import create_embedding
from moesaic.serving.server.faults import ApiFault, fault_of_validation
from moesaic.serving.server.gate import Gate, RequestLog
from moesaic.serving.server.metrics import Metrics
from moesaic.serving.server.protocol import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    EmbeddingList,
    EmbeddingRequest,
    Error,
    Health,
    Model,
    ModelFacts,
    ModelList,
    MoEFacts,
)
from moesaic.serving.server.work import Service
from moesaic.version import __version__

STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with `stream` as server-sent events, the last one [DONE].",
        "content": {
            "text/event-stream": {
                "schema": {
                    "type": "object",  # an event
                    "properties": {"data": {"type": "string"}},
                    "required": ["data"],
                }
            }
        },
    }
}

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

FAULTS: dict[int | str, dict[str, Any]] = {
    status: {"model": Error, "description": what}
    for status, what in {
        400: "The request is wrong; `param` says where.",
        401: "No valid API key.",
        404: "No such model.",
        408: "The body or the answer took too long.",
        413: "The body is too large.",
        500: "A fault of the server.",
        503: "The server is full or stopping; Retry-After says when to come again.",
    }.items()
}


class _Request(Request):
    """Reads JSON strictly: no NaN, no half surrogate pairs, no depth that ends the stack."""

    async def json(self) -> Any:
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise ApiFault(400, f"The body is not JSON: {error}.", code="invalid_json") from error


class _Route(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(_Request(request.scope, request.receive))

        return handle_strictly


def build_app(
    engine: Engine, config: ServeConfig, *, keys: tuple[str, ...], log: RequestLog
) -> Gate:
    """The application around a loaded engine; close the engine yourself.

    Args:
        engine: The model.
        config: Limits and names.
        keys: API keys; none lets everyone in.
        log: Where requests are written.
    """
    metrics = Metrics(engine.statistics)
    name = config.name or config.model.resolve().name
    created = int(time.time())
    model = Model(
        id=name,
        created=created,
        owned_by="moesaic",
        max_model_len=engine.max_context,
        moesaic=_facts(engine),
    )
    services: list[Service] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        post = Post(asyncio.get_running_loop())
        services.append(Service(engine, config, name, created, post, metrics))
        yield

    app = FastAPI(
        title="Moesaic",
        version=__version__,
        summary="OpenAI's API for a model that Moesaic serves.",
        lifespan=lifespan,
        # Their pages load scripts from elsewhere; the document itself is at /openapi.json.
        docs_url=None,
        redoc_url=None,
    )
    app.router.route_class = _Route
    app.openapi = lambda: _described(app, name)  # type: ignore[method-assign]
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(RequestValidationError, _answer_validation)
    app.add_exception_handler(Exception, _answer_fault)

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAMED | FAULTS)
    async def chat_completions(body: ChatRequest, http: Request) -> Response:
        return _answer(await create_chat_completion(services[-1], http, body))

    @app.post("/v1/completions", response_model=Completion, responses=STREAMED | FAULTS)
    async def completions(body: CompletionRequest, http: Request) -> Response:
        return _answer(await create_completion(services[-1], http, body))

    @app.post("/v1/embeddings", response_model=EmbeddingList, responses=FAULTS)
    async def embeddings(body: EmbeddingRequest, http: Request) -> Response:
        return _answer(await create_embedding(services[-1], http, body))

    known: dict[int | str, dict[str, Any]] = {status: FAULTS[status] for status in (401, 404, 503)}

    @app.get("/v1/models", response_model=ModelList, responses=known)
    async def models() -> Response:
        return _answer(ModelList(data=[model]))

    @app.get("/v1/models/{model_id:path}", response_model=Model, responses=known)
    async def one_model(model_id: str) -> Response:
        services[-1].check_model(model_id)
        return _answer(model)

    @app.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health() -> Response:
        now = engine.statistics()
        if now.is_broken:
            return JSONResponse({"status": "failed"}, 503)
        if gate.is_draining:
            return JSONResponse({"status": "draining"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        headers = {"Content-Security-Policy": PAGE_POLICY, "Referrer-Policy": "no-referrer"}
        return Response(_file("page.html"), media_type="text/html", headers=headers)

    @app.get("/page.js", include_in_schema=False)
    async def script() -> Response:
        return Response(_file("page.js"), media_type="text/javascript")

    gate = Gate(
        app,
        keys=keys,
        max_body_bytes=config.max_body_bytes,
        body_seconds=config.body_seconds,
        max_requests=config.max_requests,
        log=log,
        metrics=metrics,
    )
    return gate


def _facts(engine: Engine) -> ModelFacts:
    spec = engine.executor.spec
    moe = None
    if spec.moe is not None:
        experts, top_k = spec.moe.num_experts, spec.moe.top_k
        moe = MoEFacts(layers=len(spec.moe_layers), experts=experts, top_k=top_k)
    return ModelFacts(chat=bool(engine.tokenizer.chat_template), moe=moe)


def _described(app: FastAPI, name: str) -> dict[str, Any]:
    """The OpenAPI document. There is one model, and a wrong body is answered 400, not 422."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, summary=app.summary, routes=app.routes
        )
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for unused in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(unused, None)
        for schema in document["components"]["schemas"].values():
            if "model" in schema.get("required", ()) and not schema["title"].endswith("List"):
                schema["properties"]["model"]["enum"] = [name]
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = document
    return app.openapi_schema


def _file(name: str) -> bytes:
    return (files(__package__) / name).read_bytes()


def _answer(answer: Any) -> Response:
    """An answer as it is sent. What was not asked for is left out, as `experts`."""
    if isinstance(answer, Response):
        return answer
    if answer is None:  # the client has gone, and nobody reads this
        return Response(status_code=408)
    body = answer.model_dump()
    for choice in body.get("choices", ()):
        if choice["experts"] is None:
            del choice["experts"]
        message = choice.get("message", {})
        if message.get("tool_calls", ()) is None:
            del message["tool_calls"]
    return JSONResponse(body)


async def _answer_http(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if not isinstance(error, ApiFault):
        names = {404: "There is no such path here.", 405: "This path has other methods."}
        message = names.get(error.status_code, str(error.detail))
        fault = ApiFault(error.status_code, message)
        fault.headers = error.headers  # such as which methods a path has
        error = fault
    return _noted(http, error)


async def _answer_validation(http: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors = [{**each, "loc": each["loc"][1:]} for each in error.errors()]
    return _noted(http, fault_of_validation(errors, error.body))


async def _answer_fault(http: Request, error: Exception) -> Response:
    return _noted(http, ApiFault(500, "The server met a fault of its own. Its log has more."))


def _noted(http: Request, fault: ApiFault) -> Response:
    http.state.facts["fault"] = fault.body["error"]["message"]
    return fault.response()
