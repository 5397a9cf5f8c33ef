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

TAIL_BYTES = 4096
"""The closing boundary of a form is searched for in this many bytes at its end."""

CODEC = "utf_8_marking"
"""Name of a codec that is UTF-8 with U+FFFD for invalid bytes; starlette takes a codec only by name."""


def _find_codec(name: str) -> codecs.CodecInfo | None:
    def decode(data: Any, errors: str = "strict", /) -> tuple[str, int]:
        return codecs.utf_8_decode(data, "replace", True)

    return codecs.CodecInfo(codecs.utf_8_encode, decode, name=CODEC) if name == CODEC else None


codecs.register(_find_codec)


class FormCheck:
    """Middleware for forms, which must be complete and in UTF-8.

    starlette would read raw bytes as Latin-1, and take a truncated form for a complete one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request: percent-encode non-ASCII bytes of a plain form; in a multipart form, mark invalid bytes and
        require the closing boundary."""
        headers = dict(scope.get("headers", ()))
        content_type, encoding = (headers.get(name, b"") for name in (b"content-type", b"content-encoding"))
        parsed = email.message.Message()
        parsed["content-type"] = content_type.decode("latin-1")
        media_type = parsed.get_content_type()
        if media_type in (MULTIPART, PLAIN) and encoding.lower() not in (b"", b"identity"):
            error = f"the form is compressed ({encoding.decode('latin-1')}) — send it uncompressed"
            await JSONResponse({"error": error}, 415)(scope, receive, send)
            return
        try:  # "boundary*=" may name any codec
            closing, tail = f"--{parsed.get_boundary('') if media_type == MULTIPART else ''}--".encode("latin-1"), b""
        except ValueError:
            error = "the form's boundary cannot be read — use ASCII letters, as in boundary=…"
            await JSONResponse({"error": error}, 400)(scope, receive, send)
            return
        if media_type == MULTIPART:  # of two charsets, the last counts
            with_charset = content_type + b"; charset=" + CODEC.encode()
            scope = {
                **scope,
                "headers": [(k, with_charset if k == b"content-type" else v) for k, v in scope["headers"]],
            }

        async def checked_receive() -> Message:
            nonlocal tail
            message = await receive()
            body = message.get("body", b"")
            if media_type == PLAIN:
                body = re.sub(rb"[\x80-\xff]", lambda byte: b"%%%02X" % byte[0][0], body)
            tail = (tail + body)[-TAIL_BYTES:]
            is_last = message["type"] == "http.request" and not message.get("more_body")
            if media_type == MULTIPART and is_last and closing not in tail:
                raise HTTPException(400, "the form ends before its closing boundary — send all of it")
            return {**message, "body": body} if "body" in message else message

        await self.app(scope, checked_receive, send)


class CrossSiteGuard:
    """Middleware that refuses posts from other sites' pages, and forbids browsers from guessing content types.

    Any page may post a form to any address, even one that only the browser's machine can reach.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request: check Sec-Fetch-Site, which browsers send to https and to their own machine, and which
        pages cannot set."""

        async def send_with_header(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = message.get("headers", ())
                message = {**message, "headers": [*headers, (b"x-content-type-options", b"nosniff")]}
            await send(message)

        site = dict(scope.get("headers", ())).get(b"sec-fetch-site")
        if scope.get("method") == "POST" and site == b"cross-site":
            error = "sent by another site's page — open this server's own page, or send it without a browser"
            await JSONResponse({"error": error}, 403)(scope, receive, send_with_header)
            return
        await self.app(scope, receive, send_with_header)


class BodyLimit:
    """Middleware that refuses a body of more than ``max_bytes`` bytes before all of it is on disk."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes
        self.error = f"the upload is larger than {max_bytes / 2**20:g} MiB — send a shorter clip, or raise --limit"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request: check its Content-Length and the bytes received."""
        declared = int(dict(scope.get("headers", ())).get(b"content-length", b"0"))
        if declared > self.max_bytes:
            await JSONResponse({"error": self.error}, 413)(scope, receive, send)
            return
        received = 0

        async def counting_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise HTTPException(413, self.error)
            return message

        try:
            await self.app(scope, counting_receive, send)
        except CancelledError:  # at shutdown, after GRACE seconds
            await JSONResponse({"error": "the server is shutting down"}, 503)(scope, receive, send)
