"""What is let in, and how the rest is told."""

import asyncio

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY, BODY_SECONDS = 2**20, 30  # of a request: bytes, and how long they may take to come
CODES = {401: "invalid_api_key", 404: "not_found", 413: "request_too_large", 429: "rate_limit_exceeded"}


class Refusal(Exception):
    """An answer in OpenAI's form of an error."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code or CODES.get(status), param

    def body(self) -> dict:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}
        return JSONResponse(self.body(), self.status, headers.get(self.status))


class Guard:
    """Refuses what pages from elsewhere send, and bodies that are too large or too slow."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        origin, length = headers.get("origin"), headers.get("content-length", "0")
        if origin is not None and origin.partition("://")[2] != headers.get("host"):
            refusal = Refusal(403, f"pages of {origin[:100]} may not call this server", "foreign_origin")
            return await refusal.response()(scope, receive, send)
        if not length.isdecimal() or int(length) > MAX_BODY:
            return await Refusal(413, f"a request may have {MAX_BODY} bytes").response()(scope, receive, send)
        size, more = 0, True

        async def receive_limited() -> Message:
            nonlocal size, more
            if not more:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), BODY_SECONDS)
            except asyncio.TimeoutError:
                raise HTTPException(408, "the request's body did not come") from None
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
            if size > MAX_BODY:
                raise HTTPException(413, f"a request may have {MAX_BODY} bytes")
            return message

        return await self.app(scope, receive_limited, send)
