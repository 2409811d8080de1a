"""Limits on requests and connections, and the errors that answer what is refused."""

import asyncio
import contextlib
import re

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 30  # time limit for a request's first line and headers
MAX_BODY, BODY_SECONDS = 2**20, 30  # of a request: bytes, and time limit for them
UNREAD_SECONDS = 60  # how long a client may stop reading once the system's buffers are full
CODES = {401: "invalid_api_key", 404: "not_found", 413: "request_too_large", 429: "rate_limit_exceeded"}
HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}


class Refusal(Exception):
    """An error response in OpenAI's format."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None, headers=None):
        super().__init__(message)
        self.status, self.code, self.param = status, code or CODES.get(status), param
        self.headers: dict[str, str] | None = headers or HEADERS.get(status)

    def body(self) -> dict:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


class TimeoutProtocol(H11Protocol):
    """A connection that is closed if its client does not send a whole request head, or does not read the response."""

    hanging_up: asyncio.TimerHandle | None = None  # while waiting for a head
    giving_up: asyncio.TimerHandle | None = None  # while waiting for the client to read

    def connection_made(self, transport: asyncio.Transport):
        super().connection_made(transport)
        self.hanging_up = self.loop.call_later(HEAD_SECONDS, transport.abort)

    def data_received(self, data: bytes):
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:  # a head is complete
            self.hanging_up = self._stopped(self.hanging_up)
        elif self.hanging_up is None and self.cycle.response_complete:  # the next one has started
            self.hanging_up = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def pause_writing(self):
        super().pause_writing()
        self.giving_up = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self):
        super().resume_writing()
        self.giving_up = self._stopped(self.giving_up)

    def connection_lost(self, error: Exception | None):
        super().connection_lost(error)
        self.hanging_up, self.giving_up = self._stopped(self.hanging_up), self._stopped(self.giving_up)

    def _stopped(self, timer: asyncio.TimerHandle | None):
        if timer:
            timer.cancel()


class Guard:
    """Refuses requests of other sites' pages, to other hosts, and bodies that are too large or too slow; stops slow
    responses."""

    def __init__(self, app: ASGIApp, seconds: float, origins: tuple[str, ...], hosts: tuple[str, ...]):
        """seconds: from the request's head until the whole response is sent. origins: of pages that may call besides
        the server's own. hosts: names that the server has, against DNS rebinding. "*" allows all of either."""
        self.app, self.seconds, self.origins = app, seconds, {*origins}
        self.hosts = {host.lower() for host in hosts}

    def refusal(self, headers: Headers) -> Refusal | None:
        """Of a request with these headers."""
        host, origin, length = headers.get("host", ""), headers.get("origin"), headers.get("content-length", "0")
        name = re.sub(r":\d+$", "", host).lower()
        if "*" not in self.hosts and name not in self.hosts:
            message = f"this server does not have the name {name[:100]!r}: start it with --allowed_hosts NAME"
            return Refusal(400, message, "unknown_host")
        if origin is not None and origin.partition("://")[2] != host and not {origin, "*"} & self.origins:
            message = f"pages of {origin[:100]} may not call this server: start it with --allowed_origins URL"
            return Refusal(403, message, "foreign_origin")
        if not length.isdecimal() or int(length) > MAX_BODY:
            return Refusal(413, f"a request may have {MAX_BODY} bytes")
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if refusal := self.refusal(Headers(scope=scope)):
            await refusal.response()(scope, receive, send)
            return
        size, more, deadline = 0, True, asyncio.get_running_loop().time() + BODY_SECONDS

        async def receive_limited() -> Message:
            nonlocal size, more
            if not more:
                return await receive()
            try:
                left = deadline - asyncio.get_running_loop().time()
                message = await asyncio.wait_for(receive(), max(left, 0))
            except asyncio.TimeoutError:
                raise HTTPException(408, "the request's body did not arrive in time") from None
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
            if size > MAX_BODY:
                raise HTTPException(413, f"a request may have {MAX_BODY} bytes")
            return message

        with contextlib.suppress(asyncio.TimeoutError, asyncio.CancelledError):  # the second when the server ends
            await asyncio.wait_for(self.app(scope, receive_limited, send), self.seconds)
