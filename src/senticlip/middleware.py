"""ASGI middleware of the server: requires complete UTF-8 forms, limits bodies, refuses other sites' posts."""

from __future__ import annotations

import codecs
import email.message
import re
from asyncio import CancelledError
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MULTIPART, PLAIN = "multipart/form-data", "application/x-www-form-urlencoded"

ENDING = 4096
"""The closing boundary of a form is searched for in this many bytes at its end."""

MARKING = "utf_8_marking"
"""Name of a codec that is UTF-8 with U+FFFD for invalid bytes; starlette takes a codec only by name."""


def _marking(name: str) -> codecs.CodecInfo | None:
    def decode(data: Any, errors: str = "strict", /) -> tuple[str, int]:
        return codecs.utf_8_decode(data, "replace", True)

    return codecs.CodecInfo(codecs.utf_8_encode, decode, name=MARKING) if name == MARKING else None


codecs.register(_marking)


class Forms:
    """Middleware for forms, which must be complete and in UTF-8.

    starlette would read raw bytes as Latin-1, and take a truncated form for a complete one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request: percent-encode non-ASCII bytes of a plain form; in a multipart form, mark invalid bytes and
        require the closing boundary."""
        headers = dict(scope.get("headers", ()))
        told, packed = (headers.get(name, b"") for name in (b"content-type", b"content-encoding"))
        parsed = email.message.Message()
        parsed["content-type"] = told.decode("latin-1")
        kind = parsed.get_content_type()
        if kind in (MULTIPART, PLAIN) and packed.lower() not in (b"", b"identity"):
            line = f"the form is compressed ({packed.decode('latin-1')}) — send it uncompressed"
            await JSONResponse({"error": line}, 415)(scope, receive, send)
            return
        try:  # "boundary*=" may name any codec
            close, last = f"--{parsed.get_boundary('') if kind == MULTIPART else ''}--".encode("latin-1"), b""
        except ValueError:
            line = "the form's boundary cannot be read — use ASCII letters, as in boundary=…"
            await JSONResponse({"error": line}, 400)(scope, receive, send)
            return
        if kind == MULTIPART:  # of two charsets, the last counts
            marked = told + b"; charset=" + MARKING.encode()
            scope = {**scope, "headers": [(k, marked if k == b"content-type" else v) for k, v in scope["headers"]]}

        async def whole() -> Message:
            nonlocal last
            message = await receive()
            body = message.get("body", b"")
            if kind == PLAIN:
                body = re.sub(rb"[\x80-\xff]", lambda byte: b"%%%02X" % byte[0][0], body)
            last = (last + body)[-ENDING:]
            ends = message["type"] == "http.request" and not message.get("more_body")
            if kind == MULTIPART and ends and close not in last:
                raise HTTPException(400, "the form ends before its closing boundary — send all of it")
            return {**message, "body": body} if "body" in message else message

        await self.app(scope, whole, send)


class Browsers:
    """Middleware that refuses posts from other sites' pages, and forbids browsers from guessing content types.

    Any page may post a form to any address, even one that only the browser's machine can reach.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request: check Sec-Fetch-Site, which browsers send to https and to their own machine, and which
        pages cannot set."""

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = message.get("headers", ())
                message = {**message, "headers": [*kept, (b"x-content-type-options", b"nosniff")]}
            await send(message)

        site = dict(scope.get("headers", ())).get(b"sec-fetch-site")
        if scope.get("method") == "POST" and site == b"cross-site":
            line = "sent by another site's page — open this server's own page, or send it without a browser"
            await JSONResponse({"error": line}, 403)(scope, receive, marked)
            return
        await self.app(scope, receive, marked)


class Limit:
    """Middleware that refuses a body of more than ``most`` bytes before all of it is on disk."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most
        self.line = f"the upload is larger than {most / 2**20:g} MiB — send a shorter clip, or raise --limit"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request: check its Content-Length and the bytes received."""
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
