"""A model behind HTTP: answers like the predictor's, errors that the client can fix, and no temporary files left."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from urllib.parse import quote, quote_plus

import pytest
import torch
from fastapi.testclient import TestClient
from starlette.exceptions import HTTPException
from tests.data.test_video import write
from tests.tiny import text_folder, timm_folder, write_clip

from senticlip.config import Config
from senticlip.middleware import FormCheck
from senticlip.models import create_model
from senticlip.predictor import load
from senticlip.serve import app, serve
from senticlip.structures import Prediction, UsageError

TEXT = "天气很好"


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    root = tmp_path_factory.mktemp("serve")
    encoders = {"text.encoder": str(text_folder(root / "text")), "vision.encoder": str(timm_folder(root / "vision"))}
    options = {"width": 16, "heads": 2, "head": "linear", "text.max_length": 20, "vision.frames": 2, "vision.size": 32}
    torch.manual_seed(0)
    create_model(Config().override({**encoders, **options})).save_pretrained(root / "run")
    create_model(Config().override({**encoders, **options, "modalities": ["text"]})).save_pretrained(root / "words")
    write_clip(root / "clip.mp4", 40, 0)
    return root


@pytest.fixture(scope="module")
def predictor(assets):
    return load(assets / "run", "cpu")


@pytest.fixture
def temp_folder(tmp_path, monkeypatch):
    """The folder for temporary files; tests check that it is empty afterwards."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture(autouse=True)
def default_sighup():
    """Restore SIGHUP's default: under nohup, the tests and the servers they start would inherit that it is ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


class FakePredictor:
    """A predictor that reads text and always answers with ``label``; it calls ``before`` first."""

    def __init__(self, label, before=lambda: None):
        self.label, self.before = label, before
        self.config, self.tokenizer = Config(modalities=["text"]), None
        self.model = SimpleNamespace(encoders={"text": 0}, experiment=self.config)

    def __call__(self, path, text):
        self.before()
        return Prediction(self.label, {}, {}, {})


def video_upload(assets, name="我的.MP4"):
    return {"video": (name, (assets / "clip.mp4").read_bytes(), "video/mp4")}


def test_predict_matches_predictor(assets, predictor, temp_folder):
    client = TestClient(app(predictor, "run"))
    form = {"files": video_upload(assets), "data": {"text": TEXT}}
    for request, expected in (
        (form, predictor(assets / "clip.mp4", TEXT)),
        ({"files": video_upload(assets)}, predictor(assets / "clip.mp4")),
        ({"data": {"text": TEXT}}, predictor(text=TEXT)),
        ({**form, "data": {"text": " "}}, predictor(assets / "clip.mp4")),
    ):
        answer = client.post("/predict", **request)
        assert answer.status_code == 200, answer.text
        assert answer.json() == expected.to_json()
    assert not list(temp_folder.iterdir())


def test_explain_returns_the_explanation_page(assets, predictor, temp_folder):
    answer = TestClient(app(predictor, "run")).post("/explain", files=video_upload(assets), data={"text": TEXT})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert f"“<bdi>{TEXT}</bdi>”" in answer.text
    assert "我的.MP4" in answer.text
    assert answer.text.count("<figure>") == 2
    assert not list(temp_folder.iterdir())


def test_client_errors_use_names_that_the_client_knows(assets, predictor, temp_folder):
    client = TestClient(app(predictor, "run"))
    answer = client.post("/predict")
    assert (answer.status_code, "text or video" in answer.json()["error"]) == (400, True)
    empty = client.post("/predict", data={"text": " "}).json()["error"]
    assert empty == "clip: nothing to read — this model reads text or video"
    answer = client.post("/predict", json={"text": TEXT})
    assert (answer.status_code, answer.json()["error"]) == (400, f"{empty}; send a form: -F video=@clip.mp4 -F text=…")
    for fields, name in (({"txt": TEXT}, "txt"), ({"text": [TEXT, TEXT]}, "text")):
        answer = client.post("/predict", files=video_upload(assets), data=fields)
        message = f"{name}: send video and text, each once, and no other field"
        assert (answer.status_code, answer.json()["error"]) == (400, message)
    for path in ("/predict", "/explain"):
        answer = client.post(path, files={"video": ("片段.mp4", b"no video at all")})
        assert answer.status_code == 400
        message = answer.json()["error"]
        assert message.startswith("片段.mp4: not a video")
        assert str(temp_folder) not in message
    assert not list(temp_folder.iterdir())


@pytest.mark.parametrize("charset", ["utf-8", "us-ascii", "foo", "gbk", "raw_unicode_escape"])
def test_forms_are_utf8_whatever_charset_they_declare(predictor, charset):
    client = TestClient(app(predictor, "run"))
    headers = {"content-type": f"multipart/form-data; charset={charset}; boundary=x"}
    form = f'--x\r\nContent-Disposition: form-data; name="text"\r\n\r\n{TEXT}\r\n--x--'
    assert client.post("/predict", content=form.encode(), headers=headers).json() == predictor(text=TEXT).to_json()
    assert client.post("/predict", content=form.encode("gbk"), headers=headers).status_code == 400


def test_truncated_or_compressed_form_is_rejected(assets, predictor):
    client, headers = TestClient(app(predictor, "run")), {"content-type": "multipart/form-data; boundary=x"}
    part_head = '--x\r\nContent-Disposition: form-data; name="{}"{}\r\n\r\n'
    text = part_head.format("text", "").encode() + TEXT.encode() + b"\r\n"
    clip = part_head.format("video", '; filename=""').encode() + (assets / "clip.mp4").read_bytes()
    for end in (b"", b"\r\n--x", b"\r\n--x-"):
        answer = client.post("/predict", content=text + clip + end, headers=headers)
        message = "the form ends before its closing boundary — send all of it"
        assert (answer.status_code, answer.json()) == (400, {"error": message})
    # a complete form is answered, although its file has an empty name
    for encoding in ({}, {"content-encoding": "Identity"}):
        answer = client.post("/predict", content=text + clip + b"\r\n--x--", headers={**headers, **encoding})
        assert answer.json() == predictor(assets / "clip.mp4", TEXT).to_json()
    answer = client.post("/predict", content=text, headers={**headers, "content-encoding": "gzip"})
    assert (answer.status_code, answer.json()["error"]) == (415, "the form is compressed (gzip) — send it uncompressed")
    assert client.get("/health", headers={"content-encoding": "gzip"}).status_code == 200


@pytest.mark.parametrize(("last", "complete"), [("x--", True), ("x-", False)])
def test_form_in_several_messages_needs_its_closing_boundary(last, complete):
    """The boundary may be cut by the network; only the last message shows whether it is missing."""
    parts = [
        b'--x\r\nContent-Disposition: form-data; name="text"\r\n\r\n',
        TEXT.encode(),
        b"\r\n-",
        b"-",
        last.encode(),
    ]
    messages = [{"type": "http.request", "body": part, "more_body": part is not parts[-1]} for part in parts]
    received = []

    async def read_body(scope, receive, send):
        while (message := await receive())["more_body"]:
            received.append(message)

    async def receive():
        return messages.pop(0)

    headers = [(b"content-type", b"multipart/form-data; boundary=x")]
    request = FormCheck(read_body)({"type": "http", "headers": headers}, receive, None)
    with nullcontext() if complete else pytest.raises(HTTPException, match="ends before its closing boundary"):
        asyncio.run(request)
    assert [message["body"] for message in received] == parts[:-1]


@pytest.mark.parametrize("boundary", ["utf-8''%E4%B8%AD", "undefined''x", "idna''%ff", "punycode''%ff"])
def test_unreadable_boundary_is_rejected(boundary):
    headers = {"content-type": f"multipart/form-data; boundary*={boundary}"}
    answer = TestClient(app(FakePredictor("neutral"), "run")).post("/predict", content=b"--x--", headers=headers)
    message = "the form's boundary cannot be read — use ASCII letters, as in boundary=…"
    assert (answer.status_code, answer.json()) == (400, {"error": message})


def test_cross_site_posts_are_rejected(temp_folder):
    calls = []
    client = TestClient(app(FakePredictor("neutral", lambda: calls.append(1)), "run", max_bytes=2**10))
    for site, status in (("cross-site", 403), ("same-origin", 200), ("none", 200), (None, 200)):
        headers = {} if site is None else {"sec-fetch-site": site}
        answer = client.post("/predict", files={"text": (None, TEXT)}, headers=headers)
        assert (answer.status_code, answer.headers["x-content-type-options"]) == (status, "nosniff")
        assert client.get("/", headers=headers).status_code == 200  # following a link from another site is allowed
    refused = client.post("/predict", data={"text": TEXT}, headers={"sec-fetch-site": "cross-site"}).json()
    assert (len(calls), list(refused)) == (3, ["error"])
    assert refused["error"].startswith("sent by another site's page — ")
    large = client.post("/predict", content=b"x" * 2**11)
    for answer in (client.get("/"), client.get("/nothing"), client.post("/predict"), large):
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_ignored_input_is_reported(assets, predictor):
    text_model = load(assets / "words", "cpu")
    answer = TestClient(app(text_model, "words")).post("/predict", files=video_upload(assets), data={"text": TEXT})
    message = "video: send text, each once, and no other field"
    assert (answer.status_code, answer.json()["error"]) == (400, message)
    result = TestClient(app(predictor, "run")).post("/predict", data={"text": 30 * "好"}).json()
    assert result.pop("unread") == 30 - (20 - 2)
    assert result == predictor(text=18 * "好").to_json()


def test_playlists_are_rejected(assets, predictor, tmp_path):
    """FFmpeg would read the server's files that a playlist names."""
    write(tmp_path / "secret.ts", bf="2")
    assert predictor(tmp_path / "secret.ts").label
    shutil.copy(assets / "clip.mp4", tmp_path / "secret.mp4")
    head = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n"
    client = TestClient(app(predictor, "run"))
    for name, text in (
        ("a.m3u8", f"{head}{tmp_path / 'secret.ts'}\n#EXT-X-ENDLIST\n"),
        ("a.m3u8", f"{head}{tmp_path / 'secret.ts'}\n"),  # no end: FFmpeg would wait for more
        ("a", f"ffconcat version 1.0\nfile {tmp_path / 'secret.mp4'}\n"),
        ("a", "ffconcat version 1.0\nfile clip\n"),
    ):
        answer = client.post("/predict", files={"video": (name, text.encode())})
        assert answer.status_code == 400
        assert answer.json()["error"].startswith(f"{name}: not a video file")


def test_every_error_is_one_line(caplog):
    def raise_error():
        raise RuntimeError("no")

    client = TestClient(app(FakePredictor("neutral", raise_error), "broken"), raise_server_exceptions=False)
    multipart = {"content-type": "multipart/form-data"}
    for status, answer in (
        (404, client.get("/nothing")),
        (405, client.get("/predict")),
        (400, client.post("/predict", content=b"abc", headers=multipart)),
        (400, client.post("/predict", content=b"-x", headers={"content-type": "multipart/form-data; boundary=abcd"})),
        (400, client.post("/predict", data={"video": "no file"})),
        (400, client.post("/predict", files={"text": ("a.txt", b"no field")})),
        (400, client.post("/predict", data={"text": "好" * 10_001})),
        (500, client.post("/predict", data={"text": TEXT})),
    ):
        assert answer.status_code == status, answer.text
        assert list(answer.json()) == ["error"]
        assert "\n" not in answer.json()["error"]
        assert answer.headers.get("allow") == ("POST" if status == 405 else None)
    assert not [record for record in caplog.records if "multipart" in record.name]


@pytest.mark.parametrize("body", [f"text={TEXT}", f"text={quote(TEXT)}", f"text={quote_plus(TEXT + ' ')}"])
def test_urlencoded_form_is_utf8(predictor, body):
    """``curl -d`` sends UTF-8 without percent-encoding."""
    headers = {"content-type": "application/x-www-form-urlencoded"}
    result = TestClient(app(predictor, "run")).post("/predict", content=body.encode(), headers=headers).json()
    assert result == predictor(text=TEXT).to_json()


@pytest.mark.parametrize("words", ["你今天心情很好，我们走 OK", "今天好囧", "這部電影很無聊"])
@pytest.mark.parametrize("encoding", ["gbk", "big5", "utf-16", "utf-8"])
def test_text_in_another_encoding_is_rejected(predictor, encoding, words):
    """curl on Windows sends the console's GBK; starlette would read it as Latin-1, and any answer would be wrong."""
    client, words = TestClient(app(predictor, "run")), words.translate({ord("们"): "們"} if encoding == "big5" else {})
    head = b'--x\r\nContent-Disposition: form-data; name="text"\r\n\r\n'
    for content_type, body in (
        ("multipart/form-data; boundary=x", head + words.encode(encoding, "replace") + b"\r\n--x--\r\n"),
        ("application/x-www-form-urlencoded", b"text=" + words.encode(encoding, "replace")),
    ):
        answer = client.post("/predict", content=body, headers={"content-type": content_type})
        expected = (200, predictor(text=words).to_json()) if encoding == "utf-8" else (400, None)
        assert (answer.status_code, answer.json() if answer.status_code == 200 else None) == expected, answer.text
        assert encoding == "utf-8" or answer.json()["error"].startswith("text: not UTF-8")
    for short in ("嗯嗯", "嗯，OK"):
        answer = client.post("/predict", content=b"text=" + short.encode("gbk"), headers={"content-type": content_type})
        assert answer.status_code == 400
    damaged = "一\ufffd二三四五六七八九十一"  # a single damaged character does not mean another encoding
    for valid in ("très bien", "déjà vu", "informação", "créée", "5 °C", damaged):
        assert client.post("/predict", data={"text": valid}).status_code == 200


@pytest.mark.parametrize("stage", ["while it is read", "while it is stored"])
def test_full_disk_returns_507(assets, predictor, temp_folder, monkeypatch, caplog, stage):
    def raise_full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if stage == "while it is read":
        monkeypatch.setattr("starlette.datastructures.UploadFile.write", raise_full)
    else:
        monkeypatch.setattr("shutil.copyfileobj", raise_full)
    answer = TestClient(app(predictor, "run")).post("/predict", files=video_upload(assets))
    assert (answer.status_code, list(answer.json())) == (507, ["error"])
    assert str(temp_folder) not in answer.text
    assert f"{temp_folder}: the disk is full" in caplog.text
    assert not list(temp_folder.iterdir())


def test_head_requests_are_answered(predictor):
    client = TestClient(app(predictor, "run"))
    for path in ("/", "/health"):
        assert (client.head(path).status_code, client.get(path).status_code) == (200, 200)
        assert client.head(path).headers["content-type"] == client.get(path).headers["content-type"]
    assert set(client.get("/openapi.json").json()["paths"]["/health"]) == {"get"}


@pytest.mark.parametrize("known_length", [True, False])
def test_body_over_the_limit_is_rejected(assets, predictor, temp_folder, known_length):
    client = TestClient(app(predictor, "run", max_bytes=2**18))
    head = b'--x\r\nContent-Disposition: form-data; name="video"; filename="a.mp4"\r\n\r\n'
    parts = [head, *[bytes(2**16)] * 4, b"\r\n--x--\r\n"]
    body = b"".join(parts) if known_length else iter(parts)  # an iterator's length is not known beforehand
    answer = client.post("/predict", content=body, headers={"content-type": "multipart/form-data; boundary=x"})
    assert answer.status_code == 413
    assert "larger than 0.25 MiB" in answer.json()["error"]
    assert not list(temp_folder.iterdir())
    assert client.post("/predict", files=video_upload(assets)).status_code == 200


def test_page_and_health_match_what_the_model_reads(assets, predictor):
    both = TestClient(app(predictor, "run"))
    assert both.get("/health").json() == {"status": "ok", "model": "run", "reads": ["text", "video"]}
    assert all(f'id="{name}"' in both.get("/").text for name in ("video", "text", "why"))
    assert "http" not in both.get("/").text
    text_only = TestClient(app(load(assets / "words", "cpu"), "words"))
    assert 'id="video"' not in text_only.get("/").text
    exported = TestClient(app(FakePredictor("neutral"), "<b>.onnx"))
    page = exported.get("/").text
    assert 'id="why"' not in page
    assert "<b>" not in page
    assert exported.post("/explain", data={"text": TEXT}).status_code == 404


def test_openapi_is_served_without_third_party_pages():
    client = TestClient(app(FakePredictor("neutral"), "run"))
    schema = client.get("/openapi.json").json()
    assert "/predict" in schema["paths"]
    assert schema["servers"] == [{"url": "."}]  # relative, since a proxy may serve it below any path
    assert client.post("/predict/", follow_redirects=False).status_code == 404  # a redirect would lose the proxy's path
    assert [client.get(path).status_code for path in ("/docs", "/redoc")] == [404, 404]


def test_clips_are_answered_one_at_a_time_in_one_thread():
    """For each computing thread, OpenMP starts more threads and glibc keeps memory."""
    semaphore, acquired, thread_ids = threading.Semaphore(1), [], set()

    def slow():
        acquired.append(semaphore.acquire(blocking=False))
        thread_ids.add(threading.get_ident())
        time.sleep(0.05)
        semaphore.release()

    client = TestClient(app(FakePredictor("neutral", slow), "slow"))
    with ThreadPoolExecutor(4) as threads:
        statuses = list(threads.map(lambda _: client.post("/predict", data={"text": TEXT}).status_code, range(4)))
    assert statuses == [200] * 4
    assert acquired == [True] * 4
    assert len(thread_ids) == 1


def test_health_is_answered_while_clips_wait():
    release = threading.Event()
    with (
        TestClient(app(FakePredictor("neutral", lambda: release.wait(60)), "slow")) as client,
        ThreadPoolExecutor(50) as threads,
    ):
        try:
            pending = [threads.submit(client.post, "/predict", data={"text": TEXT}) for _ in range(45)]
            health = threads.submit(client.get, "/health").result(30)
            assert (health.status_code, sum(answer.done() for answer in pending)) == (200, 0)
        finally:
            release.set()
        assert {answer.result().status_code for answer in pending} == {200}


def test_waiting_requests_get_503_at_shutdown():
    shutdown = threading.Event()

    def begin_shutdown():
        time.sleep(0.2)
        shutdown.set()

    client = TestClient(app(FakePredictor("neutral", begin_shutdown), "slow", ending=shutdown.is_set))
    with ThreadPoolExecutor(3) as threads:
        statuses = sorted(threads.map(lambda _: client.post("/predict", data={"text": TEXT}).status_code, range(3)))
    assert statuses == [200, 503, 503]


@pytest.mark.parametrize("disconnected", [False, True])
def test_disconnected_client_is_skipped(disconnected):
    calls, sent = [], []
    asgi_app = app(FakePredictor("neutral", lambda: calls.append(1)), "run")
    scope = {"type": "http", "method": "POST", "path": "/predict", "root_path": "", "query_string": b""}
    scope["headers"] = [(b"content-type", b"application/x-www-form-urlencoded")]

    async def request():
        body = [{"type": "http.request", "body": b"text=a"}]

        async def receive():
            if not body and not disconnected:
                await asyncio.sleep(60)
            return body.pop() if body else {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        await asgi_app(scope, receive, send)

    asyncio.run(request())
    assert (len(calls), sent[0]["status"]) == ((0, 499) if disconnected else (1, 200))


def test_unusable_address_limit_or_model_is_rejected(assets):
    message = r"cannot listen here \(Address already in use\) — choose another --port"
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UsageError, match=message):
        serve(assets / "run", port=taken.getsockname()[1])
    with pytest.raises(UsageError, match="choose another --port"):
        serve(assets / "run", port=70000)
    with pytest.raises(UsageError, match="--host: no address given"):
        serve(assets / "run", host=" ")
    with pytest.raises(UsageError, match="--limit 0"):
        serve(assets / "run", limit=0)
    for limit in (float("inf"), 1e305):
        with pytest.raises(UsageError, match=f"--limit {limit:g}".replace("+", r"\+")):
            serve(assets / "run", limit=limit)
    feature_model = FakePredictor("neutral")
    feature_model.model.encoders.clear()
    with pytest.raises(UsageError, match="run: reads feature files"):
        app(feature_model, "run")


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_serve_answers_until_signalled(assets, signal_number):
    command = [sys.executable, "-m", "senticlip", "serve", str(assets / "run"), "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        url = process.stderr.readline().split()[1]
        with urllib.request.urlopen(f"{url}/health", timeout=30) as answer:
            assert json.load(answer)["status"] == "ok"
        process.send_signal(signal_number)
        out, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, errors) == (0, "")
    assert json.loads(out) == {"url": url}


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGHUP], [signal.SIGINT, signal.SIGINT]])
def test_shutdown_does_not_wait_for_unfinished_upload(assets, signals):
    code = "import sys; from senticlip import serve; serve.GRACE = 0.5; serve.serve(sys.argv[1], port=0)"
    process = subprocess.Popen(
        [sys.executable, "-c", code, assets / "run"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline().rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as upload:
            head = "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
            upload.sendall(f"{head}Content-Length: 99999\r\n\r\n--x\r\n".encode())
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30):
                pass  # by now the upload is being read
            for number in signals:
                process.send_signal(number)
                time.sleep(0.2)
            _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert "Traceback" not in errors


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_shutdown_ends_running_request_and_removes_upload(assets, tmp_path, signal_number):
    code = """if True:
        import time, types, senticlip
        from senticlip import config, serve

        class Slow:
            experiment = config.Config(modalities=["vision"])
            model = types.SimpleNamespace(encoders={"vision": 0}, experiment=experiment)

            def __call__(self, path, text):
                time.sleep(60)

        serve.GRACE, senticlip.load = 0.5, lambda *_: Slow()
        serve.serve("slow", port=0)"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline().rpartition(":")[2])
        body = b'--x\r\nContent-Disposition: form-data; name="video"; filename="a.mp4"\r\n\r\na\r\n--x--\r\n'
        head = "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            end = time.monotonic() + 30
            while not list(tmp_path.glob("senticlip-*/clip.mp4")):
                assert time.monotonic() < end
                time.sleep(0.05)
            process.send_signal(signal_number)
            assert process.wait(timeout=20) == 0
            assert b" 503 " in client.recv(4096)
    finally:
        process.kill()
    assert not list(tmp_path.iterdir())


def test_serve_passes_its_options_to_load_and_app(assets, monkeypatch):
    calls = []

    def fake_app(predictor, name, limit, *rest):
        calls.append((predictor.label, name, limit))
        raise KeyError

    monkeypatch.setattr("senticlip.load", lambda *options: calls.append(options) or FakePredictor("neutral"))
    monkeypatch.setattr("senticlip.serve.app", fake_app)
    with pytest.raises(KeyError):
        serve(assets / "run", port=0, limit=1.5, device="cuda:1", precision="bf16")
    assert calls == [(assets / "run", "cuda:1", "bf16"), ("neutral", "run", 3 << 19)]
