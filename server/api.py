"""OpenAI's routes and the shapes of what they answer."""

import argparse
import asyncio
import contextlib
import hmac
import ipaddress
import json
import os
import socket
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import torch
from fastapi import APIRouter, Depends, FastAPI, Response
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import Send

from engine.tools import Tool
from server.answer import Answer, tell
from server.guard import BODY_SECONDS, UNREAD_SECONDS, Guard, Refusal
from server.models import OUT, Served
from server.runs import router as runs_router
from server.schema import ChatRequest, CompletionRequest, Request
from server.service import Service, usage

WEB = Path(__file__).parent.parent / "web"
Pieces = AsyncGenerator[tuple[Answer, dict], None]
OWN_NAMES = ("localhost", "127.0.0.1", "::1", "[::1]")


class Shape:
    """The objects of a response, for one of the two endpoints."""

    def __init__(self, served: Served, request: Request):
        self.request, self.is_chat = request, isinstance(request, ChatRequest)
        kind = "chat.completion" if self.is_chat else "text_completion"
        self.head = {"id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}", "object": kind}
        self.tells_usage = bool(request.stream_options and request.stream_options.include_usage)
        self.head |= {"created": int(time.time()), "model": served.name}

    def whole(self, answers: list[Answer], pieces: list[dict]) -> dict:
        choices = [self.choice(answer, piece, "message") for answer, piece in zip(answers, pieces)]
        return self.head | {"choices": choices, "usage": usage(answers)}

    def chunk(self, choices: list[dict], counts: dict | None = None) -> dict:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return self.head | {"object": kind, "choices": choices} | ({"usage": counts} if self.tells_usage else {})

    def choice(self, answer: Answer, piece: dict, field: str) -> dict:
        """field: message, or delta of a stream."""
        choice = {"index": answer.index, "finish_reason": answer.finish_reason, "logprobs": None}
        said = piece.get("logprobs", [])
        if self.is_chat:
            choice[field] = {name: value for name, value in piece.items() if name != "logprobs"}
            if field == "message":
                choice[field] = {"role": "assistant", "content": None if "tool_calls" in piece else ""} | choice[field]
            log_probs = {"content": [{name: each[name] for name in each if name != "start"} for each in said]}
        else:
            choice["text"] = piece.get("content", "")
            log_probs = {"tokens": [each["token"] for each in said]}
            log_probs |= {"token_logprobs": [each["logprob"] for each in said]}
            log_probs |= {"text_offset": [each["start"] for each in said]}
            tops = [{top["token"]: top["logprob"] for top in each["top_logprobs"]} for each in said]
            log_probs |= {"top_logprobs": tops if self.request.n_top else None}
        if self.request.n_top is not None and (said or field == "message"):
            choice["logprobs"] = log_probs
        return choice


def as_json(data: dict) -> bytes:
    """Half a surrogate pair, which a model may escape in the arguments of a call, becomes a question mark."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


async def respond(service: Service, request: Request, http: HTTPRequest) -> Response:
    served, answers = await service.answers(request)
    shape, pieces = Shape(served, request), service.generate(served, answers)
    await anext(pieces)  # before the response begins, so that it may still be a refusal
    if request.stream:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return Events(events(shape, answers, pieces), media_type="text/event-stream", headers=headers)
    writing = asyncio.ensure_future(collect(answers, pieces))
    leaving = asyncio.ensure_future(http.receive())  # the body has come; what comes next is that the client has gone
    try:
        await asyncio.wait([writing, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not writing.done():
            return Response(status_code=499)  # which nobody reads
        return Response(as_json(shape.whole(answers, writing.result())), media_type="application/json")
    finally:
        writing.cancel()
        leaving.cancel()


async def collect(answers: list[Answer], pieces: Pieces) -> list[dict]:
    """The pieces of each answer put together."""
    wholes = [{} for _ in answers]
    async with contextlib.aclosing(pieces):
        async for answer, piece in pieces:
            for name, new in piece.items():
                tell(wholes[answer.index], name, new)
    return wholes


class Events(StreamingResponse):
    """A stream whose generator is closed as soon as it is sent, or cannot be: what it holds is free then."""

    async def stream_response(self, send: Send):
        async with contextlib.aclosing(self.body_iterator):
            await super().stream_response(send)


async def events(shape: Shape, answers: list[Answer], pieces: Pieces) -> AsyncIterator[bytes]:
    """The response as server-sent events."""

    def event(data: dict) -> bytes:
        return b"data: " + as_json(data) + b"\n\n"

    async with contextlib.aclosing(pieces):
        if shape.is_chat:
            for answer in answers:
                yield event(shape.chunk([shape.choice(answer, {"role": "assistant", "content": ""}, "delta")]))
        try:
            async for answer, piece in pieces:
                if piece:
                    choice = shape.choice(answer, piece, "delta")
                    yield event(shape.chunk([choice | {"finish_reason": None}]))
                if answer.finish_reason:
                    yield event(shape.chunk([shape.choice(answer, {}, "delta")]))
        except Refusal as refusal:
            yield event(refusal.body())
            return
    if shape.tells_usage:
        yield event(shape.chunk([], usage(answers)))
    yield b"data: [DONE]\n\n"


def is_local(host: str) -> bool:
    """Whether only this machine reaches who listens at this address or name."""
    try:
        return ipaddress.ip_address(socket.getaddrinfo(host, None)[0][4][0]).is_loopback
    except (OSError, ValueError):  # no address at all: serve.py will say so
        return False


def create_app(
    models: dict[str, Served], args: argparse.Namespace, device: torch.device, tools: dict[str, Tool]
) -> FastAPI:
    """The server. args has the flags of serve.py."""
    service = Service(models, args, device, tools)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        for served in models.values():
            if served.batcher:
                await asyncio.to_thread(served.batcher.close)

    async def authorize(http: HTTPRequest):
        scheme, _, key = http.headers.get("authorization", "").partition(" ")
        given = key.strip().encode("latin-1") if scheme.lower() == "bearer" else b""
        if args.api_key and not hmac.compare_digest(given, os.fsencode(args.api_key)):
            raise Refusal(401, "this server wants its API key: Authorization: Bearer KEY")

    app = FastAPI(title="Jiezi", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    # The engine has request_timeout (service.py); a client that reads slowly is not waited for much longer.
    app.add_middleware(Guard, seconds=args.request_timeout + BODY_SECONDS + UNREAD_SECONDS)
    if is_local(args.host):  # then a name that leads here by a stranger's DNS is not ours
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*OWN_NAMES, args.host], www_redirect=False)
    routes = APIRouter(dependencies=[Depends(authorize)])

    def described(served: Served) -> dict:
        card = {"id": served.name, "object": "model", "created": served.created, "owned_by": "jiezi"}
        card |= {"is_chat": served.is_chat, "max_position_embeddings": served.context}
        return card | {"parameters": served.parameters}

    @routes.get("/v1/models")
    async def list_models() -> dict:
        return {"object": "list", "data": [described(served) for served in models.values()]}

    @routes.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict:
        return described(service.model(name))

    @routes.post("/v1/chat/completions")
    async def chat_completions(request: ChatRequest, http: HTTPRequest) -> Response:
        return await respond(service, request, http)

    @routes.post("/v1/completions")
    async def completions(request: CompletionRequest, http: HTTPRequest) -> Response:
        return await respond(service, request, http)

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
        param = ".".join(map(str, first["loc"][1:])) or None
        reason = first["msg"].removeprefix("Value error, ")
        return await refuse(http, Refusal(400, f"{param}: {reason}" if param else reason, None, param))

    @app.exception_handler(Exception)
    async def fail(http: HTTPRequest, error: Exception) -> Response:
        return Refusal(500, "the server failed; its terminal says how").response()

    routes.include_router(runs_router(OUT))
    app.include_router(routes)
    if WEB.is_dir():
        app.mount("/", StaticFiles(directory=WEB, html=True))
    return app
