"""A RUN → one self-contained ONNX file (graph, tokenizer, labels, sizes), and such a file as a model.

``senticlip.load("F.onnx")`` predicts as the RUN does; examples/onnx_only.py uses the file without torch.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from senticlip.config import from_dict
from senticlip.data.sims import read_clips
from senticlip.files import staging_folder
from senticlip.progress import spinner
from senticlip.quantize import quantize
from senticlip.sources import clip_modalities
from senticlip.structures import LABELS, Batch, Output, Sequence, UsageError, UserError, valid_utf8

if TYPE_CHECKING:
    from senticlip.models.base import SentimentModel
    from senticlip.predictor import Predictor

FORMAT = 2
MAX_AUDIO_STEPS = 1 << 18
"""The largest number of audio steps: 87 minutes in steps of 20 ms. Without a bound, tracing takes minutes."""


class Graph(nn.Module):
    """The exported graph: tensors in, tensors out, no control flow that depends on values.

    Shape:
        text, text_mask B×n; vision B×m×3×S×S uint8, vision_mask B×m; audio B×L×bands (log-mel), audio_mask B×L (those
        that the model reads) →
        log_probs B×C; then each head's logits B×C; each weight B; each modality's log-probs B×C given it alone
    """

    def __init__(self, model: SentimentModel) -> None:
        super().__init__()
        self.model = model
        self.names = clip_modalities(model)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Encode every frame, including padding, which the fusion network ignores."""
        features = {}
        for name, values, mask in zip(self.names, inputs[::2], inputs[1::2], strict=True):
            if name == "audio":
                features[name] = Sequence(values, mask)
                continue
            encoder: Any = self.model.encoders[name]
            if name == "vision":
                states = encoder.images(encoder.normalize(values.flatten(0, 1)))
                features[name] = Sequence(states.unflatten(0, mask.shape), mask)
            else:
                features[name] = encoder(Sequence(values, mask))
        heads = self.model.experiment.modalities
        output = self.model.fuse(_with_unimodal_rows(features, heads))
        assert output.log_probs is not None
        log_probs, *alone = output.log_probs.unflatten(0, (1 + len(heads), -1)).unbind()
        parts, rows = [output.logits, output.weights], log_probs.shape[0]
        return (log_probs, *(part[name][:rows] for part in parts for name in heads), *alone)


def _with_unimodal_rows(features: dict[str, Sequence], heads: list[str]) -> Batch:
    """Stack the rows, then for each head the rows with its modality only: one pass through the network gives a smaller
    graph than 1 + len(heads) passes, in a third of the time."""
    stacked = {}
    for name, (values, mask) in features.items():
        masks = [mask, *(mask if name == head else torch.zeros_like(mask) for head in heads)]
        stacked[name] = Sequence(values.repeat(1 + len(heads), 1, 1), torch.cat(masks))
    return Batch(stacked, {})


def export(
    run: str | Path, out: str | Path, int8: bool = False, data: str | Path | None = None, split: str | None = None
) -> dict[str, Any]:
    """Write a RUN as an ONNX file with dynamic batch, frames and text length.

    Args:
        run: the RUN folder.
        out: the file, ``….onnx``.
        int8: store weights as int8, quantise activations dynamically (matrix products only).
        data: a data set on which to compare the file with the RUN.
        split: a split of ``data``, drawn as for the RUN's training; None for all of it.

    Returns:
        ``file``, ``int8``, ``bytes`` and, with ``data``, ``disagreement`` (see ``precision.disagreement``).

    Raises:
        UsageError: ``out`` does not end in .onnx, onnx is not installed, or the model reads feature files or is not a
            CLIP-CA-MSA. UserError: the RUN or the data cannot be read, or the file cannot be written.
    """
    out = Path(out)
    if out.suffix != ".onnx":
        raise UsageError(f"--out {out}: the name must end in .onnx — senticlip recognises an exported file by it")
    import_extra("onnx")
    from senticlip.precision import compare
    from senticlip.predictor import Predictor

    if Path(run).suffix == ".onnx":
        raise UsageError(f"{run}: already exported — give the RUN that it was made from")
    predictor = Predictor(run, "cpu")
    config = predictor.config
    # before the export, which takes minutes: it may fail
    clips = [] if data is None else read_clips(data, split, config.protocol, config.seed)
    if set(config.modalities) != set(clip_modalities(predictor.model)) or config.model != "clip_ca_msa":
        raise UsageError(f"{run}: only a CLIP-CA-MSA model that reads clips can be exported to ONNX")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with staging_folder(out) as folder, spinner(f"exporting {out.name}"):
            os.replace(_write_file(predictor, folder, int8), out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error}) — choose another --out") from None
    result: dict[str, Any] = {"file": str(out), "int8": int8, "bytes": out.stat().st_size}
    return result if data is None else {**result, "disagreement": compare(predictor, Predictor(out), clips)}


def _write_file(predictor: Predictor, folder: Path, int8: bool) -> Path:
    """Make the ONNX file in a temporary folder."""
    import onnx

    model, config = predictor.model, predictor.config
    metadata: dict[str, Any] = {"format": FORMAT, "labels": LABELS, "names": clip_modalities(model)}
    metadata |= {"experiment": config.to_dict(), "temperature": model.network.temperature.tolist()}
    if "vision" in model.encoders:
        metadata |= {"frames": config.vision.frames, "size": model.encoders["vision"].size}
    tokenizer = ""
    if predictor.tokenizer is not None:
        metadata |= {"max_length": config.text.max_length, "pad": int(predictor.tokenizer.pad_token_id or 0)}
        tokenizer = predictor.tokenizer.backend_tokenizer.to_str()
    path = folder / "model.onnx"
    trace(model).save(str(path))
    if int8:
        import_extra("onnxruntime")
        path = quantize(path)
    proto = onnx.load(str(path))
    onnx.helper.set_model_props(proto, {"senticlip": json.dumps(metadata, ensure_ascii=False), "tokenizer": tokenizer})
    onnx.save(proto, str(folder / "whole.onnx"))
    return folder / "whole.onnx"


def trace(model: SentimentModel) -> Any:
    """The ONNX program of a model."""
    import_extra("onnxscript")
    graph = Graph(model).eval().float()
    names, inputs, shapes = [], [], []
    rows = torch.export.Dim("batch")
    for name in graph.names:
        # a clip has at most as many frames as the model has temporal positions
        limit = {"text": model.experiment.text.max_length, "vision": model.experiment.vision.frames}.get(
            name, MAX_AUDIO_STEPS
        )
        length = torch.export.Dim(f"{name}_length", min=1, max=limit) if limit > 1 else None
        mask = torch.ones(2, min(3, limit), dtype=torch.bool)
        mask[1, 2:] = False
        names += [name, f"{name}_mask"]
        inputs += [_zeros(name, mask.shape, model), mask]
        shapes += [{0: rows} if length is None else {0: rows, 1: length}] * 2
    heads = list(model.experiment.modalities)
    outputs = ["log_probs", *(f"{kind}_{name}" for kind in ("logits", "weight", "alone") for name in heads)]
    return traced(graph, inputs, shapes, input_names=names, output_names=outputs)


def traced(graph: nn.Module, inputs: Iterable[Tensor], shapes: Iterable[Any], **names: Any) -> Any:
    """The ONNX program of a module whose ``forward(*inputs)`` takes tensors; ``shapes``: the dynamic axes of each."""
    with _export_mode():
        return torch.onnx.export(
            graph, tuple(inputs), dynamic_shapes=(tuple(shapes),), dynamo=True, verbose=False, **names
        )


@contextmanager
def _export_mode() -> Iterator[None]:
    """Disable torch's fused Transformer layers, which cannot be exported, and silence the exporter."""
    before = torch.backends.mha.get_fastpath_enabled()
    levels = {name: logging.getLogger(name).level for name in ("torch.onnx", "onnxscript", "onnx_ir")}
    torch.backends.mha.set_fastpath_enabled(False)
    # for the time of an export torch.onnx registers an LSTM of any length; after an earlier export, torch's dispatcher
    # remembers the usual one, which has the sample's length
    getattr(torch.ops.aten.lstm.input, "_dispatch_cache", {}).clear()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            for name in levels:
                logging.getLogger(name).setLevel(logging.ERROR)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _zeros(name: str, shape: torch.Size, model: Any) -> Tensor:
    """Zeros as input of a modality, for a mask of this shape."""
    if name == "text":
        return torch.zeros(shape, dtype=torch.long)
    if name == "audio":
        return torch.zeros(*shape, model.experiment.audio.bands)
    size = model.encoders[name].size
    return torch.zeros(*shape, 3, size, size, dtype=torch.uint8)


def import_extra(name: str) -> Any:
    """Import a package of the extra ``onnx``.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return __import__(name)
    except ImportError:
        raise UsageError(f"{name} is not installed: pip install 'senticlip[onnx]'") from None


def _unreadable(path: str | Path, error: Exception) -> UserError:
    reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    return UserError(f"{path}: not readable as a senticlip export ({reason}) — export the RUN again")


class OnnxModel:
    """An exported file with the interface that Predictor uses: ``model(batch)`` → Output, ``encoders``, ``experiment``.

    Raises:
        UsageError: no such file. UserError: not made by ``senticlip export``.
    """

    def __init__(self, path: str | Path) -> None:
        if not Path(path).is_file():
            raise UsageError(f"{path}: no such file — create it with senticlip export RUN --out F.onnx")
        if str(path) != valid_utf8(str(path)):
            raise UserError(f"{path}: onnxruntime cannot open a path that is not UTF-8 — rename it")
        runtime = import_extra("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self.session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            properties = self.session.get_modelmeta().custom_metadata_map
            metadata = json.loads(properties["senticlip"])
            if metadata["format"] != FORMAT:
                raise ValueError(f"format {metadata['format']}, expected {FORMAT}")
            self.experiment, self.names = from_dict(metadata["experiment"]), list(metadata["names"])
            inputs = {node.name for node in self.session.get_inputs()}
            if inputs != {part for name in self.names for part in (name, f"{name}_mask")}:
                raise ValueError(f"names {self.names}, but its graph reads {', '.join(sorted(inputs))}")
            self.network = SimpleNamespace(temperature=torch.tensor(metadata["temperature"], dtype=torch.float))
        except Exception as error:
            raise _unreadable(path, error) from None
        self.path, self.device = path, torch.device("cpu")
        self.encoders = {name: SimpleNamespace(size=metadata.get("size")) for name in self.names if name != "audio"}
        self._tokenizer, self._pad = properties.get("tokenizer") or "", metadata.get("pad", 0)

    def frozen(self, name: str) -> bool:
        """False: the file takes ids and frames, and its encoders cannot be run separately."""
        return False

    def eval(self) -> OnnxModel:
        """Do nothing: the file is always in eval mode."""
        return self

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer in the file, or None; loaded on first use.

        Raises:
            UserError: it cannot be read.
        """
        if not self._tokenizer:
            return None
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        try:
            tokenizer = Tokenizer.from_str(self._tokenizer)
            return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=tokenizer.id_to_token(self._pad))
        except Exception as error:  # tokenizers raises nothing more specific
            raise _unreadable(self.path, error) from None

    def __call__(self, batch: Batch, attention: bool = False, alone: bool = True) -> Output:
        """Run the graph, which always computes ``alone``."""
        if attention:
            raise UsageError("an ONNX file gives no attention maps — use the RUN folder")
        feed: dict[str, np.ndarray] = {}
        for name in self.names:
            values, mask = self._modality(name, batch)
            feed[name], feed[f"{name}_mask"] = values.cpu().numpy(), mask.cpu().numpy()
        names = [output.name for output in self.session.get_outputs()]
        parts = (torch.from_numpy(np.asarray(part)) for part in self.session.run(None, feed))
        outputs = dict(zip(names, parts, strict=True))
        logits, weights, unimodal = (
            {name: outputs[f"{kind}_{name}"] for name in self.experiment.modalities}
            for kind in ("logits", "weight", "alone")
        )
        return Output(logits, outputs["log_probs"], weights, alone=unimodal)

    def _modality(self, name: str, batch: Batch) -> Sequence:
        """A modality of the batch; a missing one becomes one masked position."""
        if name in batch.modalities:
            return batch.modalities[name]
        mask = torch.zeros(len(next(iter(batch.modalities.values())).mask), 1, dtype=torch.bool)
        return Sequence(_zeros(name, mask.shape, self), mask)
