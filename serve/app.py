"""The application: routes, errors, the limits of a request, and what happens when its client leaves.

POST /v1/completions, /v1/chat/completions     generate
GET  /v1/models, /v1/models/NAME               the one model
GET  /health, /metrics                         for who watches the server
GET  /, /playground/run                        the playground
POST /playground/inspect                       how a text looks to the model
"""

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Coroutine
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from data.tokenizer import Tokenizer
from model import GPT
from serve import openai_api, playground
from serve.limits import Limits
from serve.metrics import Metrics
from serve.openai_api import ApiError, ApiResponse, ChatRequest, CompletionRequest
from serve.scheduler import MAX_BETWEEN, Generation, QueueFull, Scheduler

# 1. Routes ----------------------------------------------------------------------------------------------------------


def create_app(
    name: str, model: GPT, tokenizer: Tokenizer, limits: Limits, origins: list[str], hosts: list[str]
) -> FastAPI:
    """The application for one model, whose `state.scheduler` runs from its start-up to its shutdown.

    name: of the model, for clients. origins: of the web pages that may use the server (CORS). hosts: the names that a
    request may have for the server; none: every name.
    """
    scheduler = Scheduler(model, limits.max_sequences, limits.max_queue)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        scheduler.start()
        yield
        await scheduler.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None)  # the pages about an openapi_url load scripts from elsewhere
    app.state.scheduler = scheduler
    if hosts:
        app.add_middleware(AllowedHosts, hosts=hosts)
    app.add_middleware(RequestLimits, limits=limits, metrics=scheduler.metrics)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    add_error_handlers(app)
    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "heed"}

    def check_model(asked: str) -> None:
        if asked != name:
            raise ApiError(404, f"model = {asked!r:.80}: must be {name!r}", "model", "model_not_found")

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{asked:path}")
    async def one_model(asked: str) -> Any:
        check_model(asked)
        return card

    async def generate(asked: CompletionRequest | ChatRequest, request: Request) -> Response:
        check_model(asked.model)
        try:  # in a thread, since a long prompt takes a while
            generation = await asyncio.to_thread(asked.generation, tokenizer, model.config, limits)
            scheduler.submit(generation)
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        except QueueFull:
            raise ApiError(429, f"the queue of {limits.max_queue} sequences is full", code="queue_full") from None
        response = ApiResponse(asked, tokenizer, generation)
        if asked.stream:
            return EventStream(response.events(), scheduler, generation)
        try:
            return JSONResponse(await while_connected(request, response.whole()))
        finally:
            scheduler.cancel(generation)

    @app.post("/v1/completions")
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        return await generate(asked, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        return await generate(asked, request)

    run = playground.about(name, model.config, tokenizer, limits)

    @app.get("/")
    async def playground_page() -> Response:
        return playground.page()

    @app.get("/playground/run")
    async def playground_run() -> Any:
        return run

    @app.post("/playground/inspect")
    async def playground_inspect(asked: playground.InspectRequest, request: Request) -> Response:
        try:
            ids = await asyncio.to_thread(asked.ids, tokenizer, model.config)
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        # In the scheduler's thread: maps of zoo/ need that no model runs in another one, see inference/implied_maps.py.
        inspect = partial(playground.inspect, model, tokenizer, ids)
        try:
            return JSONResponse(await while_connected(request, scheduler.between_steps(inspect)))
        except QueueFull:
            raise ApiError(429, f"{MAX_BETWEEN} texts wait to be inspected already", code="queue_full") from None

    @app.get("/health")
    async def health() -> Response:
        alive = scheduler.thread.is_alive()
        return JSONResponse({"status": "ok" if alive else "the scheduler has ended"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(scheduler.metrics.render(), media_type="text/plain; version=0.0.4")

    return app


# 2. Clients that leave ----------------------------------------------------------------------------------------------


class EventStream(StreamingResponse):
    """Server-sent events. However they end, their sequences leave the batch."""

    def __init__(self, events: AsyncIterator[str], scheduler: Scheduler, generation: Generation) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.scheduler, self.generation = scheduler, generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.scheduler.cancel(self.generation)


async def while_connected(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of `work`. If the client leaves first, cancels it and raises ClientDisconnect."""

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(leave())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


# 3. Limits and errors -----------------------------------------------------------------------------------------------


class AllowedHosts:
    """ASGI middleware: refuses a request that calls the server by another name than `hosts`, whatever the port."""

    def __init__(self, app: ASGIApp, hosts: list[str]) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = Headers(scope=scope).get("host", "") if scope["type"] == "http" else self.hosts[0]
        if re.sub(r":\d*$", "", host).lower() in self.hosts:
            await self.app(scope, receive, send)
            return
        right = f"must be {', '.join(self.hosts[:-1])} or {self.hosts[-1]}; --allowed-host permits another name"
        await ApiError(400, f"Host: {host!r:.80}: {right}", code="host_not_allowed").response()(scope, receive, send)


class RequestLimits:
    """ASGI middleware: limits the size of a request's body and its time, whatever it waits for; counts responses."""

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics) -> None:
        self.app, self.limits, self.metrics = app, limits, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared, size, status = int(dict(scope["headers"]).get(b"content-length", 0)), 0, 0

        async def receive_limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if max(size, declared) > self.limits.max_body_bytes:
                raise ApiError(413, f"the body has more than {self.limits.max_body_bytes} bytes")
            return message

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self.metrics.requests.add(path=getattr(scope.get("route"), "path", "other"), status=status)
            await send(message)

        try:
            async with asyncio.timeout(self.limits.timeout):
                await self.app(scope, receive_limited, send_counted)
        except TimeoutError:
            error = ApiError(408, f"the request took longer than {self.limits.timeout:g} seconds", code="timeout")
            if not status:
                await error.response()(scope, receive, send_counted)
                return
            with contextlib.suppress(TimeoutError):  # of a stream, whose client may not read it
                async with asyncio.timeout(1):
                    await send({"type": "http.response.body", "body": openai_api.event(error.content).encode()})


def add_error_handlers(app: FastAPI) -> None:
    """Let every error have OpenAI's format."""

    @app.exception_handler(HTTPException)
    async def known(request: Request, error: HTTPException) -> Response:
        if not isinstance(error, ApiError):  # of FastAPI: a path or a method that does not exist, or a body
            error = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return openai_api.invalid(error.errors()).response()

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it, but it is counted

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> Response:
        return ApiError(500, "internal error, see the server's log").response()
