"""ASGI middleware of the server: plain forms are in UTF-8, and a body has a limit."""

from __future__ import annotations

import re
from asyncio import CancelledError

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PLAIN = "application/x-www-form-urlencoded"


class PlainForm:
    """Middleware for plain forms in UTF-8, as ``curl -d`` sends them: starlette would decode raw bytes as Latin-1."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request; of a plain form, percent-encode all bytes beyond ASCII."""
        kind = dict(scope.get("headers", ())).get(b"content-type", b"")

        async def encoded() -> Message:
            message = await receive()
            body = re.sub(rb"[\x80-\xff]", lambda byte: b"%%%02X" % byte[0][0], message.get("body", b""))
            return {**message, "body": body} if "body" in message else message

        plain = kind.decode("latin-1").lower().startswith(PLAIN)
        await self.app(scope, encoded if plain else receive, send)


class Limit:
    """Middleware that refuses a body over ``most`` bytes before all of it is written to disk."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most
        self.line = f"the upload is larger than {most / 2**20:g} MiB — send a shorter clip, or start with --limit"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request: check its Content-Length, and the bytes received."""
        told = int(dict(scope.get("headers", ())).get(b"content-length", b"0"))
        if told > self.most:
            await JSONResponse({"error": self.line}, 413)(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.most:
                raise HTTPException(413, self.line)
            return message

        try:
            await self.app(scope, counted, send)
        except CancelledError:  # at shutdown, after GRACE seconds
            await JSONResponse({"error": "the server is shutting down"}, 503)(scope, receive, send)
