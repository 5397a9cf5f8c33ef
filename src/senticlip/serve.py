"""A model behind HTTP: JSON for programs, and a page to try it on a clip.

    POST /predict   form fields ``video`` (a file) and ``text``, or one of them → what ``senticlip predict --json`` says
    POST /explain   the same fields → the page of ``senticlip explain``
    GET  /          the page;  GET /health → the model and what it reads

What the sender can mend is answered with 400 and ``{"error": line}``, a body over the limit with 413. One clip is
answered at a time, others wait; an upload lives in a temporary folder until its answer is there.
"""

from __future__ import annotations

import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Annotated, Any

import jinja2

import senticlip
from senticlip.explain import CHINESE, explain
from senticlip.sources import hears
from senticlip.structures import LABELS, SURFACE, UsageError, UserError

try:
    import uvicorn
    from fastapi import FastAPI, File, Form, HTTPException, Request, UploadFile
    from fastapi.responses import HTMLResponse, JSONResponse
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError:
    raise UsageError("serve needs fastapi and uvicorn: pip install 'senticlip[serve]'") from None

WAITING = 32
"""Requests at a time; more are turned away with 503."""

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
) -> None:
    """Answer until interrupted (Ctrl-C).

    Args:
        run: a RUN folder, a hub id or an exported file.
        host: 127.0.0.1 is this machine alone; nobody is asked for a password, so put a proxy before anything else.
        port: 0 takes a free one.
        limit: of an upload, MiB.
        device: cpu, cuda, cuda:N.
        precision: fp32, bf16 or int8.
        ready: hears the address once it can be opened.

    Raises:
        UsageError: an address that cannot be had, a model that reads feature files; UsageError, UserError: as
            ``senticlip.load``.
    """
    if not limit > 0:
        raise UsageError(f"--limit {limit:g}: must be above 0 MiB")
    try:
        door = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise UsageError(f"{host}:{port}: cannot be listened at ({error}) — choose another --port or --host") from None
    with door:
        answers = app(senticlip.load(run, device, precision), limit)
        shown = f"[{host}]" if ":" in host else host
        ready(f"http://{shown}:{door.getsockname()[1]}")
        settings = uvicorn.Config(answers, log_level="warning", limit_concurrency=WAITING)
        with suppress(KeyboardInterrupt):
            uvicorn.Server(settings).run(sockets=[door])


def app(predictor: Any, limit: float = 200) -> FastAPI:
    """The application around a Predictor; ``limit`` of a body in MiB.

    Raises:
        UsageError: a model that reads feature files.
    """
    one = Lock()
    reads = [SURFACE[name] for name in predictor.model.encoders]
    reads += ["audio"] if hears(predictor.config) else []
    if not reads:
        raise UsageError(f"{predictor.run}: reads feature files, no clips — serve a model with encoders of its own")
    page = _page(predictor, reads)
    answers = FastAPI(title="senticlip", version=senticlip.__version__, description=__doc__ or "")
    answers.add_middleware(Limit, most=int(limit * 2**20))

    @answers.exception_handler(UserError)
    def mend(request: Request, error: UserError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 400)

    @answers.exception_handler(HTTPException)
    def refuse(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code)

    @answers.get("/", response_class=HTMLResponse)
    def home() -> str:
        return page

    @answers.get("/health")
    def health() -> dict[str, Any]:
        return {"status": "ok", "model": predictor.run.name, "reads": reads}

    @answers.post("/predict")
    def predict(video: Video = None, text: Text = None) -> dict[str, Any]:
        with _kept(video) as path, one:
            return predictor(path, text).to_json()

    @answers.post("/explain", response_class=HTMLResponse)
    def why(video: Video = None, text: Text = None) -> str:
        with _kept(video) as path, tempfile.TemporaryDirectory(prefix="senticlip-") as folder, one:
            said = text if text and text.strip() else None
            return Path(explain(predictor, path, said, folder)["html"]).read_text(encoding="utf-8")

    return answers


def _page(predictor: Any, reads: list[str]) -> str:
    house = jinja2.Environment(loader=jinja2.PackageLoader("senticlip"), autoescape=True)
    can_explain = hasattr(predictor.model, "encode")  # an exported file cannot be taken apart
    return house.get_template("serve.html").render(
        name=predictor.run.name, reads=reads, LABELS=LABELS, CHINESE=CHINESE, can_explain=can_explain
    )


@contextmanager
def _kept(video: UploadFile | None) -> Iterator[Path | None]:
    """An upload as a file of its own, under a name of ours with its ending; None where none was sent."""
    if video is None or not video.filename:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="senticlip-") as folder:
        ending = re.search(r"\.[A-Za-z0-9]{1,5}$", video.filename)
        path = Path(folder) / ("clip" + (ending[0].lower() if ending else ""))
        with path.open("wb") as out:
            shutil.copyfileobj(video.file, out)
        try:
            yield path
        except UserError as error:  # the sender knows the file by its own name
            raise type(error)(str(error).replace(str(path), Path(video.filename).name)) from None


class Limit:
    """Turns away a body over ``most`` bytes before all of it lies on the disk."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most
        self.line = f"the upload is larger than {most / 2**20:g} MiB — send a shorter clip, or start with --limit"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request: what its header tells, and what comes."""
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

        await self.app(scope, counted, send)
