"""Locating encoders without a network: folders, incomplete downloads, an unreachable hub."""

from __future__ import annotations

import json
import re
import socket
import threading
import time

import pytest
import torch
from tests.tiny import clip_folder, text_folder, timm_folder

from senticlip.config import Config, TextConfig
from senticlip.encoders import hub
from senticlip.encoders.text import build_body, load_body, spec_width, text_spec
from senticlip.models import create_model
from senticlip.structures import UsageError, UserError

NAME = "someone/bert"


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """A hub cache whose snapshot of NAME has its config but, after an interrupted download, no weights."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    repository = tmp_path / "hub" / "models--someone--bert"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    folder = repository / "snapshots" / ("a" * 40)
    text_folder(folder)
    (folder / "model.safetensors").rename(tmp_path / "weights")
    return folder


def test_complete_snapshot_needs_no_network(snapshot, tmp_path):
    (tmp_path / "weights").rename(snapshot / "model.safetensors")
    assert hub.fetch(NAME, "text.encoder") == snapshot


def test_incomplete_snapshot_is_downloaded_again(snapshot, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="is not on this disk"):
        hub.fetch(NAME, "text.encoder")
    patterns = []

    def download(name, local_files_only=False, allow_patterns=None):
        patterns.append(allow_patterns)
        if not local_files_only:
            (tmp_path / "weights").rename(snapshot / "model.safetensors")
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda name: ["config.json", "model.safetensors", "x.bin"])
    monkeypatch.setattr(hub, "reachable", lambda url: True)
    assert hub.fetch(NAME, "text.encoder") == snapshot
    assert patterns == [None, ["*.json", "*.txt", "*.model", "*.safetensors"]]
    assert text_spec(TextConfig(encoder=NAME))[1] == snapshot


def test_has_weights_requires_every_shard(tmp_path):
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (tmp_path / "model-1.safetensors").touch()
    assert not hub.has_weights(tmp_path)
    (tmp_path / "model-2.safetensors").touch()
    assert hub.has_weights(tmp_path)


@pytest.mark.parametrize("offline", [True, False])
def test_unreachable_hub_error_is_immediate_and_suggests_folder(snapshot, monkeypatch, offline):
    if offline:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    began = time.monotonic()
    with pytest.raises(UsageError) as error:
        create_model(Config().override({"text.encoder": "nobody/nothing", "modalities": ["text"]}))
    assert time.monotonic() - began < 10
    reason = "HF_HUB_OFFLINE is set" if offline else "http://127.0.0.1:9 cannot be reached"
    assert str(error.value) == (
        f"text.encoder: nobody/nothing is not on this disk and {reason}; set a local folder instead: "
        "--set text.encoder=FOLDER (random weights: --set text.pretrained=false; "
        "the data set's own feature file: --set text.encoder=features)"
    )


def test_reachable_times_out(monkeypatch):
    release = threading.Event()

    def connect(*_):
        release.wait(30)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", connect)
    began = time.monotonic()
    assert not hub.reachable("http://127.0.0.1:9", 0.2)
    assert time.monotonic() - began < 5
    release.set()


def test_reachable_tries_the_proxy_if_one_is_set(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert hub.reachable(f"http://127.0.0.1:{port}")
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        assert hub.reachable("https://hub.invalid")
    monkeypatch.delenv("https_proxy")
    assert not hub.reachable("https://127.0.0.1:9")


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c", "my folder"])
def test_invalid_hub_id_is_reported_as_missing_folder(name):
    with pytest.raises(UsageError, match=re.escape(f"text.encoder: no such folder: {name} — give a folder")):
        hub.fetch(name, "text.encoder")


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("make", [text_folder, clip_folder])
def test_half_precision_config_builds_float32(tmp_path, key, make):
    spec = json.loads((make(tmp_path) / "config.json").read_text()) | {key: "float16"}
    for part in ("text_config", "vision_config"):
        if part in spec:
            spec[part] |= {key: "float16"}
    assert {p.dtype for p in build_body(spec).parameters()} == {torch.float32}
    assert hub.hf_config(spec).dtype is None


@pytest.mark.parametrize("broken", ["missing", "truncated"])
def test_unreadable_weights_give_one_line_error(tmp_path, broken):
    for folder, key in ((text_folder(tmp_path / "t"), "text"), (timm_folder(tmp_path / "v"), "vision")):
        weights = folder / "model.safetensors"
        content = weights.read_bytes()
        weights.unlink()
        if broken == "truncated":
            weights.write_bytes(content[: len(content) // 2])
        changes = {f"{key}.encoder": str(folder), "modalities": [key], "head": "linear", "text.max_length": 20}
        with pytest.raises(UserError, match=f"{key}.encoder: the weights in {folder} cannot be read") as error:
            create_model(Config().override(changes))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["text.encoder", "vision.encoder", "label.encoder"])
def test_run_folder_is_rejected_as_encoder(tmp_path, key):
    encoders = {"text.encoder": str(text_folder(tmp_path / "text")), "vision.encoder": str(timm_folder(tmp_path / "v"))}
    experiment = Config().override({**encoders, "text.max_length": 20, "width": 16, "heads": 2})
    create_model(experiment).save_pretrained(tmp_path / "run")
    with pytest.raises(UsageError, match=rf"{re.escape(key)}: .*run is a RUN, not an encoder folder"):
        create_model(experiment.override({key: str(tmp_path / "run")}))


@pytest.mark.parametrize("make", [text_folder, clip_folder])
def test_missing_weights_are_not_randomly_initialized(tmp_path, make):
    spec = json.loads((make(tmp_path) / "config.json").read_text())
    spec.get("text_config", spec)["num_hidden_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(spec))
    with pytest.raises(UsageError, match=r"text\.encoder: the weights lack 16 tensors, the first: .*encoder\.layer\.2"):
        load_body(tmp_path)


def test_unknown_model_type_is_reported(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nosuch"}')
    message = "config.json: transformers cannot build this (Unrecognized model identifier: nosuch)"
    with pytest.raises(UsageError, match=re.escape(message)):
        spec_width(text_spec(TextConfig(encoder=str(tmp_path)), "text.encoder")[0])
