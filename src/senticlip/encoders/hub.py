"""Sources of encoders: a folder, a hub id, or (with random weights) the known configs of the paper's encoders.

Other modules get a local folder, or a ``spec``: a JSON dict that rebuilds the architecture offline.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from senticlip.structures import UsageError, UserError, first_line

OPENAI_MEAN, OPENAI_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
SHIPPED = "senticlip/"
"""The name prefix of encoders in this package, such as the demo's senticlip/towers/vision."""
BERT_BASE = {"model_type": "bert", "vocab_size": 21128}
CLIP_TEXT = {"model_type": "chinese_clip_text_model", "vocab_size": 21128}

# The configs of the paper's encoders, so that each can be built with random weights without access to the hub.
KNOWN: dict[str, dict[str, Any]] = {
    "OFA-Sys/chinese-clip-vit-base-patch16": {
        "model_type": "chinese_clip",
        "projection_dim": 512,
        "text_config": CLIP_TEXT,
        "vision_config": {"patch_size": 16},
    },
    "hfl/chinese-roberta-wwm-ext": BERT_BASE,
    "hfl/chinese-macbert-base": BERT_BASE,
    "bert-base-chinese": BERT_BASE,
    "nghuyong/ernie-3.0-base-zh": {
        "model_type": "ernie",
        "vocab_size": 40000,
        "type_vocab_size": 4,
        "max_position_embeddings": 2048,
        "use_task_id": True,
        "task_type_vocab_size": 3,
    },
    "voidful/albert_chinese_base": {
        "model_type": "albert",
        "vocab_size": 21128,
        "embedding_size": 128,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
    "intfloat/multilingual-e5-small": {
        "model_type": "bert",
        "vocab_size": 250037,
        "hidden_size": 384,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
}


def fetch(name: str, key: str, advice: str | None = None) -> Path:
    """The local folder of an encoder: ``name`` itself if it is a folder, else a snapshot, cached or from the hub.

    Args:
        name: a folder or a hub id.
        key: its config key, for messages.
        advice: what an error message advises; by default, how to set ``key``.

    Raises:
        UsageError: no such folder or hub id, or no network (detected in seconds; the hub's own retries take minutes).
    """
    if name.startswith(SHIPPED):
        return Path(__file__).parents[1] / name.removeprefix(SHIPPED)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UsageError(f"{key}: no such folder: {name} — give a folder with config.json or a hub id") from None
    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        if has_weights(folder):  # an interrupted download may leave a snapshot without them
            return folder
    except OSError:
        pass
    part = key.split(".")[0]
    more = "" if part == "label" else f"; the data set's own feature file: --set {key}=features"
    random = f"(random weights: --set {part}.pretrained=false{more})"
    advice = advice or f"set a local folder instead: --set {key}=FOLDER {random}"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise UsageError(f"{key}: {name} is not on this disk and HF_HUB_OFFLINE is set; {advice}")
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if not reachable(hub):
        raise UsageError(f"{key}: {name} is not on this disk and {hub} cannot be reached; {advice}")
    try:
        files = list_repo_files(name)
        weights = "*.safetensors" if any(file.endswith(".safetensors") for file in files) else "*.bin"
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.model", weights]))
    except Exception as error:
        # errors of the hub, the network library or the disk
        raise UsageError(f"{key}: {name} cannot be fetched from the hub ({type(error).__name__}); {advice}") from None


def has_weights(folder: Path) -> bool:
    """Whether a folder has an encoder's weights: a single file, or all shards that an index lists."""
    # model.bin is CTranslate2's format, for faster-whisper
    if any((folder / name).is_file() for name in ("model.safetensors", "pytorch_model.bin", "model.bin")):
        return True
    for index in folder.glob("*.index.json"):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if all((folder / name).is_file() for name in shards):
            return True
    return False


def reachable(url: str, seconds: float = 5.0) -> bool:
    """Whether a URL's host (or its proxy) accepts connections within ``seconds``.

    Runs in a daemon thread that may outlive the call: name resolution has no timeout, and each address has its own.
    """
    scheme = urllib.parse.urlparse(url).scheme
    address = urllib.parse.urlparse(urllib.request.getproxies().get(scheme, url))
    port = address.port or (80 if address.scheme == "http" else 443)
    answer: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def connect() -> None:
        try:
            socket.create_connection((address.hostname or "", port), seconds).close()
            answer.put(True)
        except OSError:
            answer.put(False)

    threading.Thread(target=connect, daemon=True).start()
    try:
        return answer.get(timeout=seconds)
    except queue.Empty:
        return False


@contextmanager
def loading(folder: Path, key: str) -> Iterator[None]:
    """Turn any library error about missing or broken weights into a one-line UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # each library and format fails in its own way
        reason = first_line(error)
        raise UserError(f"{key}: the weights in {folder} cannot be read ({reason}) — download them again") from error


def read_config(folder: Path, key: str, file: str = "config.json") -> dict[str, Any]:
    """The ``config.json`` (or another JSON object) of an encoder's folder."""
    try:
        data = dict(json.loads((folder / file).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise UsageError(f"{key}: {folder} has no readable {file} — it is not an encoder folder") from None
    if data.get("model_type") == "senticlip":
        raise UsageError(f"{key}: {folder} is a RUN, not an encoder folder — start={folder} continues from it")
    return data


def hf_config(data: dict[str, Any]) -> Any:
    """The transformers config for a dict with ``model_type``; models built from it are float32."""
    from transformers import AutoConfig

    settings = {
        name: value for name, value in _strip_runtime_keys(data).items() if name not in ("model_type", "architectures")
    }
    try:
        return AutoConfig.for_model(data["model_type"], **settings)
    except ValueError as error:
        raise UsageError(f"config.json: transformers cannot build this ({str(error).partition('. ')[0]})") from None


def _strip_runtime_keys(data: dict[str, Any]) -> dict[str, Any]:
    """A config without the keys that say how it is computed or what code to load, also in nested dicts.

    ``dtype`` (formerly torch_dtype) could build models in half precision; ``attn_implementation`` and ``auto_map`` may
    name code on a hub.
    """
    removed = ("dtype", "torch_dtype", "auto_map")
    kept = {name: value for name, value in data.items() if name not in removed and not is_code(name)}
    return {name: _strip_runtime_keys(value) if isinstance(value, dict) else value for name, value in kept.items()}


def is_code(name: Any) -> bool:
    """Whether a ``config.json`` key can make transformers download code (kernels); keys may be ints, as in id2label."""
    return str(name).endswith("_implementation")


def read_weights(kind: Any, folder: Path, **kwargs: Any) -> dict[str, Any]:
    """The state dict of a transformers class from a folder, in float32.

    Tensors that the folder lacks are left out: transformers would initialise them at random.
    """
    model, info = kind.from_pretrained(
        folder, dtype="float32", output_loading_info=True, trust_remote_code=False, **kwargs
    )
    return {name: value for name, value in model.state_dict().items() if name not in info["missing_keys"]}


def load_pretrained(module: Any, weights: dict[str, Any], key: str, part: str = "") -> None:
    """Load all tensors of ``module`` from ``weights``, where their names have the prefix ``part``; ignore the rest.

    Raises:
        UsageError: a tensor is missing.
    """
    names = list(module.state_dict())
    missing = sorted(name for name in names if part + name not in weights)
    if missing:
        raise UsageError(f"{key}: the weights lack {len(missing)} tensors, the first: {part}{missing[0]}")
    module.load_state_dict({name: weights[part + name] for name in names})
