"""OpenAI's routes and the form of their responses."""

import asyncio
import contextlib
import difflib
import hmac
import ipaddress
import json
import os
import socket
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path

import torch
from fastapi import APIRouter, Depends, FastAPI, Response
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Scope, Send

from engine.tools import Tool
from server.answer import Answer, append
from server.guard import BODY_SECONDS, UNREAD_SECONDS, Guard, Refusal
from server.models import OUT, Served
from server.responses import ResponseForm, ResponsesRequest, StoredResponses
from server.runs import router as runs_router
from server.schema import ChatRequest, CompletionRequest, Request, unknown_field
from server.service import ServerConfig, Service, usage

WEB = Path(__file__).parent / "web"
Pieces = AsyncGenerator[tuple[Answer, dict], None]
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1", "[::1]")


class ChatForm:
    """The objects of a response, for one of the two endpoints."""

    def __init__(self, served: Served, request: Request):
        self.request, self.is_chat = request, isinstance(request, ChatRequest)
        kind = "chat.completion" if self.is_chat else "text_completion"
        self.head = {"id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}", "object": kind}
        self.has_usage = bool(request.stream_options and request.stream_options.include_usage)
        self.head |= {"created": int(time.time()), "model": served.name}

    async def whole(self, answers: list[Answer], pieces: Pieces) -> dict:
        collected = [{} for _ in answers]  # all pieces of each answer in one
        async for answer, piece in pieces:
            for name, new in piece.items():
                append(collected[answer.index], name, new)
        choices = [self.choice(answer, piece, "message") for answer, piece in zip(answers, collected)]
        return self.head | {"choices": choices, "usage": usage(answers)}

    async def events(self, answers: list[Answer], pieces: Pieces) -> AsyncIterator[dict | None]:
        """None at the end."""
        roles = {answer.index for answer in answers if self.is_chat}  # still to send, with the first text
        try:
            async for answer, piece in pieces:
                if answer.index in roles and (piece or answer.finish_reason):
                    roles.remove(answer.index)
                    piece = {"role": "assistant", "content": ""} | piece
                if piece:
                    yield self.chunk([self.choice(answer, piece, "delta") | {"finish_reason": None}])
                if answer.finish_reason:
                    yield self.chunk([self.choice(answer, {}, "delta")])
        except Refusal as refusal:
            yield refusal.body()
            return
        if self.has_usage:
            yield self.chunk([], usage(answers))
        yield None

    def chunk(self, choices: list[dict], counts: dict | None = None) -> dict:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return self.head | {"object": kind, "choices": choices} | ({"usage": counts} if self.has_usage else {})

    def choice(self, answer: Answer, piece: dict, field: str) -> dict:
        """field: message, or delta of a stream."""
        choice = {"index": answer.index, "finish_reason": answer.finish_reason, "logprobs": None}
        tokens = piece.get("logprobs", [])
        if self.is_chat:
            choice[field] = {name: value for name, value in piece.items() if name != "logprobs"}
            if "reasoning_content" in piece:  # as vLLM, whose newer name is the second
                choice[field]["reasoning"] = piece["reasoning_content"]
            if field == "message":
                choice[field] = {"role": "assistant", "content": None if "tool_calls" in piece else ""} | choice[field]
            log_probs = {"content": [{name: each[name] for name in each if name != "start"} for each in tokens]}
        else:
            choice["text"] = piece.get("content", "")
            log_probs = {"tokens": [each["token"] for each in tokens]}
            log_probs |= {"token_logprobs": [each["logprob"] for each in tokens]}
            log_probs |= {"text_offset": [each["start"] for each in tokens]}
            tops = [{top["token"]: top["logprob"] for top in each["top_logprobs"]} or None for each in tokens]
            log_probs |= {"top_logprobs": tops if self.request.n_top else None}
        if self.request.n_top is not None and (tokens or field == "message"):
            choice["logprobs"] = log_probs
        return choice


Form = ChatForm | ResponseForm


def as_json(data: dict) -> bytes:
    """Half a surrogate pair, which a model may write as an escape in a call's arguments, becomes a question mark."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


async def respond(service: Service, request: Request, http: HTTPRequest, form_of: Callable[[Served], Form]) -> Response:
    served, answers = await service.answers(request)
    form, pieces = form_of(served), service.generate(served, answers)
    await anext(pieces)  # before the response starts, so that it can still be a refusal
    if request.stream:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return Events(as_events(form, answers, pieces), media_type="text/event-stream", headers=headers)
    generating = asyncio.ensure_future(whole(form, answers, pieces))
    leaving = asyncio.ensure_future(http.receive())  # the next message after the body: the client has disconnected
    try:
        await asyncio.wait([generating, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not generating.done():
            return Response(status_code=499)  # nobody reads it
        return Response(as_json(generating.result()), media_type="application/json")
    finally:
        generating.cancel()
        leaving.cancel()


async def whole(form: Form, answers: list[Answer], pieces: Pieces) -> dict:
    async with contextlib.aclosing(pieces):
        return await form.whole(answers, pieces)


class Events(StreamingResponse):
    """A stream that closes its generator, and so frees its rows, when it is sent or the client has gone."""

    async def stream_response(self, send: Send):
        async with contextlib.aclosing(self.body_iterator):
            await super().stream_response(send)


async def as_events(form: Form, answers: list[Answer], pieces: Pieces) -> AsyncIterator[bytes]:
    """The response as server-sent events. Those of /v1/responses have names; the others end with [DONE]."""
    async with contextlib.aclosing(pieces):
        async for event in form.events(answers, pieces):
            name = f"event: {event['type']}\n" if event and "type" in event else ""
            yield name.encode() + b"data: " + (as_json(event) if event else b"[DONE]") + b"\n\n"


class Pages(StaticFiles):
    """The web pages. A request for none of them is told which route of the API is right."""

    def __init__(self, routes: list[APIRoute]):
        super().__init__(directory=WEB, html=True)
        self.routes = routes
        self.paths = {"/", *(f"/{page.relative_to(WEB).as_posix()}" for page in WEB.rglob("*"))}

    async def get_response(self, path: str, scope: Scope) -> Response:
        try:
            return await super().get_response(path, scope)
        except HTTPException as error:
            if error.status_code in (404, 405):
                is_page = error.status_code == 405 and scope["path"] in self.paths
                raise self.refusal(scope["path"], is_page) from None
            raise

    def refusal(self, path: str, is_page: bool) -> Refusal:
        methods = {method for route in self.routes if route.path_regex.match(path) for method in route.methods}
        if is_page:
            methods |= {"GET", "HEAD"}
        if methods:
            allowed = ", ".join(sorted(methods))
            return Refusal(405, f"this route is for {allowed}", "method_not_allowed", headers={"Allow": allowed})
        paths = sorted({route.path for route in self.routes if "{" not in route.path})
        near = difflib.get_close_matches(path, paths, n=1, cutoff=0.7)
        question = f"did you mean {near[0]}? " if near else ""
        return Refusal(404, f"there is no such route; {question}This server has {', '.join(paths)}")


def is_local(host: str) -> bool:
    """Whether this address or name can be reached from this machine only."""
    try:
        return ipaddress.ip_address(socket.getaddrinfo(host, None)[0][4][0]).is_loopback
    except (OSError, ValueError):  # not an address: serve.py reports it
        return False


def create_app(
    models: dict[str, Served], config: ServerConfig, device: torch.device, tools: dict[str, Tool]
) -> FastAPI:
    service, stored = Service(models, config, device, tools), StoredResponses()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        for served in models.values():
            if served.batcher:
                await asyncio.to_thread(served.batcher.close)

    async def authorize(http: HTTPRequest):
        scheme, _, key = http.headers.get("authorization", "").partition(" ")
        given = key.strip().encode("latin-1") if scheme.lower() == "bearer" else b""
        if config.api_key and not hmac.compare_digest(given, os.fsencode(config.api_key)):
            raise Refusal(401, "this server needs its API key: Authorization: Bearer KEY")

    app = FastAPI(title="Jiezi", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    # request_timeout limits the engine (service.py); a client that reads slowly gets little more time.
    limit = config.request_timeout + BODY_SECONDS + UNREAD_SECONDS
    is_limited = is_local(config.host) or config.allowed_hosts
    hosts = (*LOCAL_NAMES, config.host, *config.allowed_hosts) if is_limited else ("*",)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=config.allowed_origins, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(Guard, seconds=limit, origins=config.allowed_origins, hosts=hosts)
    routes = APIRouter(dependencies=[Depends(authorize)])

    def model_card(served: Served) -> dict:
        card = {"id": served.name, "object": "model", "created": served.created, "owned_by": "jiezi"}
        card |= {"is_chat": served.is_chat, "max_position_embeddings": served.context}
        return card | {"parameters": served.parameters}

    @routes.get("/v1/models")
    async def list_models() -> dict:
        return {"object": "list", "data": [model_card(served) for served in models.values()]}

    @routes.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict:
        return model_card(service.model(name)) if name else await list_models()

    @routes.post("/v1/chat/completions")
    async def chat_completions(request: ChatRequest, http: HTTPRequest) -> Response:
        return await respond(service, request, http, lambda served: ChatForm(served, request))

    @routes.post("/v1/completions")
    async def completions(request: CompletionRequest, http: HTTPRequest) -> Response:
        return await respond(service, request, http, lambda served: ChatForm(served, request))

    @routes.post("/v1/responses")
    async def responses(request: ResponsesRequest, http: HTTPRequest) -> Response:
        before = request.previous_response_id
        history = stored.get(before)["items"] if before else []
        chat = request.chat_request(history)
        return await respond(service, chat, http, lambda served: ResponseForm(served, request, chat, history, stored))

    @routes.get("/v1/responses/{name}")
    async def stored_response(name: str) -> Response:
        return Response(as_json(stored.get(name)["response"]), media_type="application/json")

    @routes.delete("/v1/responses/{name}")
    async def forget_response(name: str) -> dict:
        stored.delete(name)
        return {"id": name, "object": "response", "deleted": True}

    @routes.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(models), media_type=CONTENT_TYPE_LATEST)

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok"}

    @app.exception_handler(Refusal)
    async def refuse(http: HTTPRequest, refusal: Refusal) -> Response:
        service.metrics.refused.labels(refusal.status).inc()
        return refusal.response()

    @app.exception_handler(HTTPException)
    async def refuse_as_openai(http: HTTPRequest, error: HTTPException) -> Response:
        return await refuse(http, Refusal(error.status_code, str(error.detail)))

    @app.exception_handler(RequestValidationError)
    async def refuse_fields(http: HTTPRequest, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        param = ".".join(map(str, first["loc"][1:]))[:100] or None
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            reason = unknown_field(str(first["loc"][-1]))
        return await refuse(http, Refusal(400, f"{param}: {reason}" if param else reason, None, param))

    @app.exception_handler(Exception)
    async def fail(http: HTTPRequest, error: Exception) -> Response:
        return Refusal(500, "internal error; the server's terminal shows the traceback").response()

    runs = runs_router(OUT)
    known = [route for route in (*app.routes, *routes.routes, *runs.routes) if isinstance(route, APIRoute)]
    routes.include_router(runs)
    app.include_router(routes)
    app.mount("/", Pages(known))
    return app
