"""A model behind HTTP: JSON for programs, and a page to try it on a clip.

    POST /predict   form fields ``video`` (a file) and ``text``, or one of them → what ``senticlip predict --json`` says
    POST /explain   the same fields → the page of ``senticlip explain`` (not of an exported model)
    GET  /          the page;  GET /health → the model and what it reads;  GET /openapi.json → the interface

Errors that the client can fix are answered with 400 and ``{"error": line}``, a body over the limit with 413, one for
which the disk has no space with 507, and one posted by another site's page with 403. Clips are answered one at a time;
others wait, and a client that has disconnected meanwhile is skipped. An upload is kept in a temporary folder until it
is answered or the server ends.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import socket
import sys
import tempfile
from asyncio import get_running_loop, run_coroutine_threadsafe
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import senticlip
from senticlip.explain import explanation, heated, html
from senticlip.files import is_full, terminable
from senticlip.occlusion import unread_text
from senticlip.pages import page
from senticlip.sources import clip_modalities
from senticlip.structures import SURFACE, Clip, UsageError, UserError, text_or_none

try:
    import uvicorn
    from fastapi import FastAPI, File, Form, Request, UploadFile
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse
    from starlette.exceptions import HTTPException

    from senticlip.middleware import MULTIPART, PLAIN, BodyLimit, CrossSiteGuard, FormCheck
except ImportError:
    raise UsageError("serve needs fastapi and uvicorn: pip install 'senticlip[serve]'") from None

MAX_CONNECTIONS = 256
"""Most open connections, including idle ones; further ones are refused with 503."""

GRACE = 10
"""Seconds that running requests are given to finish at shutdown."""

MAX_TEXT_LENGTH = 10_000
"""Most characters of a text: models read far fewer, but an explanation shows them all."""

Video = Annotated[UploadFile | None, File()]
Text = Annotated[str | None, Form()]


def serve(
    run: str | Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    limit: float = 200,
    device: str | None = None,
    precision: str = "fp32",
    ready: Callable[[str], None] = print,
) -> str:
    """Serve a model until interrupted (Ctrl-C, SIGTERM or SIGHUP); return the address.

    If an answer is still being computed GRACE seconds later, the process exits: a computation cannot be stopped.

    Args:
        run: a RUN folder, a hub id or an exported file.
        host: 127.0.0.1 is for this machine only; there is no password, so use a proxy in front of any other address.
        port: 0 picks a free one.
        limit: largest upload in MiB.
        device: cpu, cuda, cuda:N.
        precision: fp32, bf16 or int8.
        ready: called with the address once the server listens there.

    Raises:
        UsageError: an address that cannot be used, or a model that reads feature files. UsageError, UserError: as
            ``senticlip.load``.
    """
    max_bytes = int(limit * 2**20) if math.isfinite(limit * 2**20) else 0
    if max_bytes < 1:
        raise UsageError(f"--limit {limit:g}: must be a number of MiB above 0")
    if not host.strip():  # would listen on all networks
        raise UsageError("--host: no address given — is a shell variable unset?")
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = str(getattr(error, "strerror", None) or error).split(" (while")[0]  # Python repeats the address
        raise UsageError(f"{host}:{port}: cannot listen here ({reason}) — choose another --port or --host") from None
    with listener:
        name = Path(run).resolve().name if Path(run).exists() else str(run)
        running: set[str] = set()
        application = app(senticlip.load(run, device, precision), name, max_bytes, lambda: server.should_exit, running)
        server = uvicorn.Server(
            uvicorn.Config(
                application,
                log_level="error",
                limit_concurrency=MAX_CONNECTIONS,
                timeout_graceful_shutdown=GRACE,
                lifespan="off",
            )
        )
        url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        with suppress(KeyboardInterrupt), terminable():
            ready(url)
            server.run(sockets=[listener])
    if running:  # Python would wait for it to finish
        for folder in filter(None, tuple(running)):
            shutil.rmtree(folder, ignore_errors=True)
        sys.stdout.flush()
        os._exit(0)
    return url


def app(
    predictor: Any,
    name: str,
    max_bytes: int = 200 << 20,
    ending: Callable[[], bool] = lambda: False,
    running: set[str] | None = None,
) -> FastAPI:
    """The application around a Predictor.

    Args:
        predictor: senticlip.load(RUN).
        name: of the model, for the page.
        max_bytes: largest body in bytes.
        ending: tells whether the server is shutting down; waiting requests are then refused.
        running: holds "" and the folder of the upload (if any) while a clip is answered.

    Raises:
        UsageError: the model reads feature files.
    """
    modalities = [SURFACE[modality] for modality in clip_modalities(predictor.model)]
    if not modalities:
        raise UsageError(f"{name}: reads feature files, not clips — serve a model with its own encoders")
    explains = hasattr(predictor.model, "encode")  # an exported file cannot be taken apart
    home_page = page("serve.html", name=name, reads=modalities, explains=explains)
    application = FastAPI(
        title="senticlip",
        version=senticlip.__version__,
        description=__doc__ or "",
        servers=[{"url": "."}],  # may be behind a proxy, below a path unknown here
        redirect_slashes=False,
        docs_url=None,  # FastAPI's own pages load scripts from other sites
        redoc_url=None,
    )
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of each broken form: the client is told
    application.add_middleware(FormCheck)
    application.add_middleware(BodyLimit, max_bytes=max_bytes)
    application.add_middleware(CrossSiteGuard)
    _add_error_handlers(application)
    fields = ["video"] * (modalities != ["text"]) + ["text"] * ("text" in modalities)
    answer = _one_at_a_time(fields, ending, set() if running is None else running)

    @application.head("/", include_in_schema=False, response_class=HTMLResponse)
    @application.get("/", response_class=HTMLResponse)
    async def home() -> str:
        return home_page

    @application.head("/health", include_in_schema=False)  # for load balancers
    @application.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": name, "reads": modalities}

    @application.post("/predict")
    async def predict(request: Request, video: Video = None, text: Text = None) -> Any:
        def predict_clip(clip: Clip) -> dict[str, Any]:
            ignored = unread_text(predictor, clip.text)
            return predictor(clip.video, clip.text).to_json() | ({"unread": len(ignored)} if ignored else {})

        return await answer(request, video, text, predict_clip)

    if not explains:
        return application

    @application.post("/explain", response_class=HTMLResponse)
    async def explain(request: Request, video: Video = None, text: Text = None) -> Any:
        def explain_clip(clip: Clip) -> str:
            result = explanation(predictor, clip)._replace(name=clip.id)
            return html(result, heated(result))

        return await answer(request, video, text, explain_clip)

    return application


def _one_at_a_time(fields: list[str], ending: Callable[[], bool], running: set[str]) -> Callable[..., Awaitable[Any]]:
    """A function that answers one request at a time; ``ending`` and ``running`` are as for ``app``."""
    executor = ThreadPoolExecutor(1)  # for each computing thread, OpenMP starts others, and glibc keeps memory

    async def answer(
        request: Request, video: UploadFile | None, text: str | None, compute: Callable[[Clip], Any]
    ) -> Any:
        names = [name for name, _ in (await request.form()).multi_items()]
        if unexpected := [name for name in names if name not in fields or names.count(name) > 1]:
            raise UsageError(f"{unexpected[0][:40]}: send {' and '.join(fields)}, each once, and no other field")
        checked, loop = _checked_text(text), get_running_loop()

        def take_turn() -> Any:
            if ending():
                raise HTTPException(503, "the server is shutting down")
            if run_coroutine_threadsafe(request.is_disconnected(), loop).result(GRACE):
                raise HTTPException(499, "the client has disconnected")  # read by no one
            running.add("")
            try:
                with _saved_clip(video, checked, running) as clip:
                    return compute(clip)
            finally:
                running.clear()

        return await loop.run_in_executor(executor, take_turn)

    return answer


def _add_error_handlers(application: FastAPI) -> None:
    """Answer every error with one line of JSON."""

    @application.exception_handler(UserError)
    def user_error(request: Request, error: UserError) -> JSONResponse:
        content_type = request.headers.get("content-type", "").lower()
        is_form = content_type.startswith((MULTIPART, PLAIN))  # of other bodies, no field was read
        advice = "" if is_form else "; send a form: -F video=@clip.mp4 -F text=…"
        return JSONResponse({"error": f"{error}{advice}"}, 400)

    @application.exception_handler(RequestValidationError)
    def invalid_form(request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"error": "video must be a form file (with a filename=), text a plain field"}, 400)

    @application.exception_handler(OSError)
    def full_disk(request: Request, error: OSError) -> JSONResponse:
        if not is_full(error):
            raise error
        logging.getLogger("uvicorn.error").error("%s: the disk is full, uploads are refused", tempfile.gettempdir())
        return JSONResponse({"error": "the server has no disk space for the upload — try again later"}, 507)

    @application.exception_handler(HTTPException)
    def http_error(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error.__cause__, OSError):  # FastAPI blames the client for it
            return full_disk(request, error.__cause__)
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    @application.exception_handler(Exception)
    def internal_error(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": "internal server error — see the server log"}, 500)


def _checked_text(text: str | None) -> str | None:
    """The text of a request, or None for a blank one.

    Raises:
        UsageError: too long, or not in UTF-8.
    """
    text = text_or_none(text)
    if text is not None and len(text) > MAX_TEXT_LENGTH:
        raise UsageError(f"text: {len(text)} characters — send at most {MAX_TEXT_LENGTH}")
    if text is not None and _is_garbled(text):
        raise UsageError("text: not UTF-8 — save it as a UTF-8 file and send -F 'text=<FILE'")
    return text


@contextmanager
def _saved_clip(video: UploadFile | None, text: str | None, folders: set[str]) -> Iterator[Clip]:
    """The request as a Clip: the video is in a temporary file with the same suffix, ``id`` is the client's file name.

    The file's folder is added to ``folders``.
    """
    if video is None or not (video.filename or video.size):  # both are empty if no file was chosen
        yield Clip("", None, text)
        return
    name = text_or_none(Path(video.filename or "").name) or "video"
    with tempfile.TemporaryDirectory(prefix="senticlip-") as folder:
        folders.add(folder)
        suffix = re.search(r"\.[A-Za-z0-9]{1,5}$", name)
        path = Path(folder) / ("clip" + (suffix[0].lower() if suffix else ""))
        with path.open("wb") as file:
            shutil.copyfileobj(video.file, file)
        try:
            yield Clip(name, path, text)
        except UserError as error:
            raise type(error)(str(error).replace(str(path), name)) from None


def _is_garbled(text: str) -> bool:
    """Whether the text came in another encoding (UTF-16 has zeros); a few damaged bytes do not count."""
    return "\0" in text or 10 * text.count("\ufffd") > sum(ord(c) > 127 for c in text)
