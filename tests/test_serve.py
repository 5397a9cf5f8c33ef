"""A model behind HTTP: the predictor's own answers, errors that the sender can mend, and nothing left behind."""

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
from types import SimpleNamespace
from urllib.parse import quote, quote_plus

import pytest
import torch
from fastapi.testclient import TestClient
from tests.data.test_video import write
from tests.tiny import text_folder, timm_folder, write_clip

from senticlip.config import Config
from senticlip.models import create_model
from senticlip.predictor import load
from senticlip.serve import app, serve
from senticlip.structures import Prediction, UsageError

TEXT = "天气很好"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("serve")
    encoders = {"text.encoder": str(text_folder(root / "text")), "vision.encoder": str(timm_folder(root / "vision"))}
    size = {"width": 16, "heads": 2, "head": "linear", "text.max_length": 20, "vision.frames": 2, "vision.size": 32}
    torch.manual_seed(0)
    create_model(Config().override({**encoders, **size})).save_pretrained(root / "run")
    create_model(Config().override({**encoders, **size, "modalities": ["text"]})).save_pretrained(root / "words")
    write_clip(root / "clip.mp4", 40, 0)
    return root


@pytest.fixture(scope="module")
def predictor(place):
    return load(place / "run", "cpu")


@pytest.fixture
def left(tmp_path, monkeypatch):
    """Where temporary files go."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture(autouse=True)
def hang_ups():
    """Are not ignored: under nohup the tests, and so the servers that they start, would begin with that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


class Said:
    """A model that reads text and says one thing; ``first`` happens before."""

    def __init__(self, label, first=lambda: None):
        self.label, self.first = label, first
        self.config, self.tokenizer = Config(modalities=["text"]), None
        self.model = SimpleNamespace(encoders={"text": 0}, experiment=self.config)

    def __call__(self, path, text):
        self.first()
        return Prediction(self.label, {}, {}, {})


def video(place, name="我的.MP4"):
    return {"video": (name, (place / "clip.mp4").read_bytes(), "video/mp4")}


def test_answers_are_the_predictors(place, predictor, left):
    client = TestClient(app(predictor, "run"))
    asked = {"files": video(place), "data": {"text": TEXT}}
    for given, wanted in (
        (asked, predictor(place / "clip.mp4", TEXT)),
        ({"files": video(place)}, predictor(place / "clip.mp4")),
        ({"data": {"text": TEXT}}, predictor(text=TEXT)),
        ({**asked, "data": {"text": " "}}, predictor(place / "clip.mp4")),
    ):
        answer = client.post("/predict", **given)
        assert answer.status_code == 200, answer.text
        assert answer.json() == wanted.to_json()
    assert not list(left.iterdir())


def test_the_explanation_is_the_page_of_explain(place, predictor, left):
    answer = TestClient(app(predictor, "run")).post("/explain", files=video(place), data={"text": TEXT})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert f"“<bdi>{TEXT}</bdi>”" in answer.text
    assert "我的.MP4" in answer.text
    assert answer.text.count("<figure>") == 2
    assert not list(left.iterdir())


def test_what_the_sender_can_mend_is_told_by_the_names_that_he_knows(place, predictor, left):
    client = TestClient(app(predictor, "run"))
    answer = client.post("/predict")
    assert (answer.status_code, "text or video" in answer.json()["error"]) == (400, True)
    empty = client.post("/predict", data={"text": " "}).json()["error"]
    assert empty == "clip: nothing to read — this model reads text or video"
    answer = client.post("/predict", json={"text": TEXT})
    assert (answer.status_code, answer.json()["error"]) == (400, f"{empty}; send a form: -F video=@clip.mp4 -F text=…")
    for fields, name in (({"txt": TEXT}, "txt"), ({"text": [TEXT, TEXT]}, "text")):
        answer = client.post("/predict", files=video(place), data=fields)
        told = f"{name}: send video and text, each once, and no other field"
        assert (answer.status_code, answer.json()["error"]) == (400, told)
    for where in ("/predict", "/explain"):
        answer = client.post(where, files={"video": ("片段.mp4", b"no video at all")})
        assert answer.status_code == 400
        line = answer.json()["error"]
        assert line.startswith("片段.mp4: not a video")
        assert str(left) not in line
    assert not list(left.iterdir())


@pytest.mark.parametrize("charset", ["utf-8", "us-ascii", "foo", "gbk", "raw_unicode_escape"])
def test_a_form_is_in_utf_8_whatever_it_says_of_itself(predictor, charset):
    client, kind = (
        TestClient(app(predictor, "run")),
        {"content-type": f"multipart/form-data; charset={charset}; boundary=x"},
    )
    form = f'--x\r\nContent-Disposition: form-data; name="text"\r\n\r\n{TEXT}\r\n--x--'
    assert client.post("/predict", content=form.encode(), headers=kind).json() == predictor(text=TEXT).to_json()
    assert client.post("/predict", content=form.encode("gbk"), headers=kind).status_code == 400


def test_a_form_that_was_cut_off_is_not_answered_from_what_is_there(place, predictor):
    client, kind = TestClient(app(predictor, "run")), {"content-type": "multipart/form-data; boundary=x"}
    part = '--x\r\nContent-Disposition: form-data; name="{}"{}\r\n\r\n'
    text = part.format("text", "").encode() + TEXT.encode() + b"\r\n"
    clip = part.format("video", '; filename=""').encode() + (place / "clip.mp4").read_bytes()
    for end in (b"", b"\r\n--x", b"\r\n--x-"):
        answer = client.post("/predict", content=text + clip + end, headers=kind)
        wanted = "the form ends before its closing boundary — send all of it"
        assert (answer.status_code, answer.json()) == (400, {"error": wanted})
    # nor is a file without a name passed over
    for told in ({}, {"content-encoding": "Identity"}):
        whole = client.post("/predict", content=text + clip + b"\r\n--x--", headers={**kind, **told})
        assert whole.json() == predictor(place / "clip.mp4", TEXT).to_json()
    packed = client.post("/predict", content=text, headers={**kind, "content-encoding": "gzip"})
    assert (packed.status_code, packed.json()["error"]) == (415, "the form is compressed (gzip) — send it uncompressed")
    assert client.get("/health", headers={"content-encoding": "gzip"}).status_code == 200


@pytest.mark.parametrize("boundary", ["utf-8''%E4%B8%AD", "undefined''x", "idna''%ff", "punycode''%ff"])
def test_a_boundary_that_cannot_be_read_is_refused(boundary):
    kind = {"content-type": f"multipart/form-data; boundary*={boundary}"}
    answer = TestClient(app(Said("neutral"), "run")).post("/predict", content=b"--x--", headers=kind)
    told = "the form's boundary cannot be read — use ASCII letters, as in boundary=…"
    assert (answer.status_code, answer.json()) == (400, {"error": told})


def test_another_sites_page_sends_nothing(left):
    begun = []
    client = TestClient(app(Said("neutral", lambda: begun.append(1)), "run", most=2**10))
    for where, status in (("cross-site", 403), ("same-origin", 200), ("none", 200), (None, 200)):
        headers = {} if where is None else {"sec-fetch-site": where}
        answer = client.post("/predict", files={"text": (None, TEXT)}, headers=headers)
        assert (answer.status_code, answer.headers["x-content-type-options"]) == (status, "nosniff")
        assert client.get("/", headers=headers).status_code == 200  # a link to the page is none
    refused = client.post("/predict", data={"text": TEXT}, headers={"sec-fetch-site": "cross-site"}).json()
    assert (len(begun), list(refused)) == (3, ["error"])
    assert refused["error"].startswith("sent by another site's page — ")
    large = client.post("/predict", content=b"x" * 2**11)
    for answer in (client.get("/"), client.get("/nothing"), client.post("/predict"), large):
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_what_is_not_read_is_told(place, predictor):
    words = load(place / "words", "cpu")
    answer = TestClient(app(words, "words")).post("/predict", files=video(place), data={"text": TEXT})
    told = "video: send text, each once, and no other field"
    assert (answer.status_code, answer.json()["error"]) == (400, told)
    long = TestClient(app(predictor, "run")).post("/predict", data={"text": 30 * "好"}).json()
    assert long.pop("unread") == 30 - (20 - 2)
    assert long == predictor(text=18 * "好").to_json()


def test_a_playlist_is_no_video_and_shows_nothing_of_this_machine(place, predictor, tmp_path):
    """FFmpeg would read the files that it names."""
    write(tmp_path / "secret.ts", bf="2")
    assert predictor(tmp_path / "secret.ts").label
    shutil.copy(place / "clip.mp4", tmp_path / "secret.mp4")
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
    def broken():
        raise RuntimeError("no")

    client = TestClient(app(Said("neutral", broken), "broken"), raise_server_exceptions=False)
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
def test_a_plain_form_is_utf_8(predictor, body):
    """curl -d sends the bytes as they are."""
    kind = {"content-type": "application/x-www-form-urlencoded"}
    found = TestClient(app(predictor, "run")).post("/predict", content=body.encode(), headers=kind).json()
    assert found == predictor(text=TEXT).to_json()


@pytest.mark.parametrize("words", ["你今天心情很好，我们走 OK", "今天好囧", "這部電影很無聊"])
@pytest.mark.parametrize("encoding", ["gbk", "big5", "utf-16", "utf-8"])
def test_a_text_that_is_not_utf_8_is_refused_and_not_answered(predictor, encoding, words):
    """Windows' curl sends a console's GBK; starlette reads that as Latin-1, and any answer to it would be wrong."""
    client, words = TestClient(app(predictor, "run")), words.translate({ord("们"): "們"} if encoding == "big5" else {})
    head = b'--x\r\nContent-Disposition: form-data; name="text"\r\n\r\n'
    for kind, body in (
        ("multipart/form-data; boundary=x", head + words.encode(encoding, "replace") + b"\r\n--x--\r\n"),
        ("application/x-www-form-urlencoded", b"text=" + words.encode(encoding, "replace")),
    ):
        answer = client.post("/predict", content=body, headers={"content-type": kind})
        wanted = (200, predictor(text=words).to_json()) if encoding == "utf-8" else (400, None)
        assert (answer.status_code, answer.json() if answer.status_code == 200 else None) == wanted, answer.text
        assert encoding == "utf-8" or answer.json()["error"].startswith("text: not UTF-8")
    for rare in ("嗯嗯", "嗯，OK"):
        answer = client.post("/predict", content=b"text=" + rare.encode("gbk"), headers={"content-type": kind})
        assert answer.status_code == 400
    damaged = "一\ufffd二三四五六七八九十一"  # one character is no encoding
    for sound in ("très bien", "déjà vu", "informação", "créée", "5 °C", damaged):
        assert client.post("/predict", data={"text": sound}).status_code == 200


@pytest.mark.parametrize("where", ["while it is read", "while it is stored"])
def test_a_full_disk_is_the_servers_fault(place, predictor, left, monkeypatch, caplog, where):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "while it is read":
        monkeypatch.setattr("starlette.datastructures.UploadFile.write", full)
    else:
        monkeypatch.setattr("shutil.copyfileobj", full)
    answer = TestClient(app(predictor, "run")).post("/predict", files=video(place))
    assert (answer.status_code, list(answer.json())) == (507, ["error"])
    assert str(left) not in answer.text
    assert f"{left}: the disk is full" in caplog.text
    assert not list(left.iterdir())


def test_a_balancer_may_ask_for_the_head_alone(predictor):
    client = TestClient(app(predictor, "run"))
    for path in ("/", "/health"):
        assert (client.head(path).status_code, client.get(path).status_code) == (200, 200)
        assert client.head(path).headers["content-type"] == client.get(path).headers["content-type"]
    assert set(client.get("/openapi.json").json()["paths"]["/health"]) == {"get"}


@pytest.mark.parametrize("told", [True, False])
def test_a_body_over_the_limit_is_turned_away(place, predictor, left, told):
    client = TestClient(app(predictor, "run", most=2**18))
    head = b'--x\r\nContent-Disposition: form-data; name="video"; filename="a.mp4"\r\n\r\n'
    parts = [head, *[bytes(2**16)] * 4, b"\r\n--x--\r\n"]
    body = b"".join(parts) if told else iter(parts)  # an iterator's length is not known beforehand
    answer = client.post("/predict", content=body, headers={"content-type": "multipart/form-data; boundary=x"})
    assert answer.status_code == 413
    assert "larger than 0.25 MiB" in answer.json()["error"]
    assert not list(left.iterdir())
    assert client.post("/predict", files=video(place)).status_code == 200


def test_the_page_asks_for_what_the_model_reads(place, predictor):
    both = TestClient(app(predictor, "run"))
    assert both.get("/health").json() == {"status": "ok", "model": "run", "reads": ["text", "video"]}
    assert all(f'id="{name}"' in both.get("/").text for name in ("video", "text", "why"))
    assert "http" not in both.get("/").text
    words = TestClient(app(load(place / "words", "cpu"), "words"))
    assert 'id="video"' not in words.get("/").text
    exported = TestClient(app(Said("neutral"), "<b>.onnx"))
    page = exported.get("/").text
    assert 'id="why"' not in page
    assert "<b>" not in page
    assert exported.post("/explain", data={"text": TEXT}).status_code == 404


def test_the_interface_is_told_without_a_third_party():
    client = TestClient(app(Said("neutral"), "run"))
    told = client.get("/openapi.json").json()
    assert "/predict" in told["paths"]
    assert told["servers"] == [{"url": "."}]  # below whatever path a proxy has put it
    assert client.post("/predict/", follow_redirects=False).status_code == 404  # whose path a redirect would lose
    assert [client.get(path).status_code for path in ("/docs", "/redoc")] == [404, 404]


def test_one_clip_is_answered_at_a_time_and_all_in_one_thread():
    """Each thread that computes has OpenMP start threads of its own, and keeps memory."""
    inside, most, where = threading.Semaphore(1), [], set()

    def slow():
        most.append(inside.acquire(blocking=False))
        where.add(threading.get_ident())
        time.sleep(0.05)
        inside.release()

    client = TestClient(app(Said("neutral", slow), "slow"))
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: client.post("/predict", data={"text": TEXT}).status_code, range(4)))
    assert found == [200] * 4
    assert most == [True] * 4
    assert len(where) == 1


def test_its_health_is_told_while_clips_wait():
    go = threading.Event()
    with TestClient(app(Said("neutral", lambda: go.wait(60)), "slow")) as client, ThreadPoolExecutor(50) as threads:
        try:
            asked = [threads.submit(client.post, "/predict", data={"text": TEXT}) for _ in range(45)]
            health = threads.submit(client.get, "/health").result(30)
            assert (health.status_code, sum(answer.done() for answer in asked)) == (200, 0)
        finally:
            go.set()
        assert {answer.result().status_code for answer in asked} == {200}


def test_who_waits_when_it_ends_is_sent_away():
    begun = threading.Event()

    def first():
        time.sleep(0.2)
        begun.set()

    client = TestClient(app(Said("neutral", first), "slow", ending=begun.is_set))
    with ThreadPoolExecutor(3) as threads:
        found = sorted(threads.map(lambda _: client.post("/predict", data={"text": TEXT}).status_code, range(3)))
    assert found == [200, 503, 503]


@pytest.mark.parametrize("gone", [False, True])
def test_who_has_gone_before_his_turn_is_not_answered(gone):
    begun, sent = [], []
    answers = app(Said("neutral", lambda: begun.append(1)), "run")
    scope = {"type": "http", "method": "POST", "path": "/predict", "root_path": "", "query_string": b""}
    scope["headers"] = [(b"content-type", b"application/x-www-form-urlencoded")]

    async def ask():
        body = [{"type": "http.request", "body": b"text=a"}]

        async def receive():
            if not body and not gone:
                await asyncio.sleep(60)
            return body.pop() if body else {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        await answers(scope, receive, send)

    asyncio.run(ask())
    assert (len(begun), sent[0]["status"]) == ((0, 499) if gone else (1, 200))


def test_an_address_that_is_taken_or_none_is_wrong_use(place):
    said = r"cannot listen here \(Address already in use\) — choose another --port"
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UsageError, match=said):
        serve(place / "run", port=taken.getsockname()[1])
    with pytest.raises(UsageError, match="choose another --port"):
        serve(place / "run", port=70000)
    with pytest.raises(UsageError, match="--host: no address given"):
        serve(place / "run", host=" ")
    with pytest.raises(UsageError, match="--limit 0"):
        serve(place / "run", limit=0)
    for limit in (float("inf"), 1e305):
        with pytest.raises(UsageError, match=f"--limit {limit:g}".replace("+", r"\+")):
            serve(place / "run", limit=limit)
    features = Said("neutral")
    features.model.encoders.clear()
    with pytest.raises(UsageError, match="run: reads feature files"):
        app(features, "run")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_the_verb_answers_until_it_is_interrupted(place, how):
    command = [sys.executable, "-m", "senticlip", "serve", str(place / "run"), "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        url = process.stderr.readline().split()[1]
        with urllib.request.urlopen(f"{url}/health", timeout=30) as answer:
            assert json.load(answer)["status"] == "ok"
        process.send_signal(how)
        out, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, errors) == (0, "")
    assert json.loads(out) == {"url": url}


@pytest.mark.parametrize("how", [[signal.SIGTERM], [signal.SIGHUP], [signal.SIGINT, signal.SIGINT]])
def test_an_unfinished_upload_does_not_hold_the_end_up(place, how):
    code = "import sys; from senticlip import serve; serve.GRACE = 0.5; serve.serve(sys.argv[1], port=0)"
    process = subprocess.Popen(
        [sys.executable, "-c", code, place / "run"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline().rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as upload:
            head = "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
            upload.sendall(f"{head}Content-Length: 99999\r\n\r\n--x\r\n".encode())
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30):
                pass  # by now the upload is being read
            for one in how:
                process.send_signal(one)
                time.sleep(0.2)
            _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert "Traceback" not in errors


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_running_answer_does_not_hold_the_end_up_and_leaves_no_upload(place, tmp_path, how):
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
            process.send_signal(how)
            assert process.wait(timeout=20) == 0
            assert b" 503 " in client.recv(4096)
    finally:
        process.kill()
    assert not list(tmp_path.iterdir())


def test_the_model_is_loaded_as_asked_and_the_limit_is_in_mib(place, monkeypatch):
    asked = []

    def made(predictor, name, most, *rest):
        asked.append((predictor.label, name, most))
        raise KeyError

    monkeypatch.setattr("senticlip.load", lambda *options: asked.append(options) or Said("neutral"))
    monkeypatch.setattr("senticlip.serve.app", made)
    with pytest.raises(KeyError):
        serve(place / "run", port=0, limit=1.5, device="cuda:1", precision="bf16")
    assert asked == [(place / "run", "cuda:1", "bf16"), ("neutral", "run", 3 << 19)]
