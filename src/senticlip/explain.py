"""One clip's answer explained: heat maps over its frames, and what is answered without each modality and frame."""

from __future__ import annotations

import base64
import functools
import html
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image

import senticlip
from senticlip import cam
from senticlip.answers import write_whole
from senticlip.structures import LABELS, SURFACE, Batch, Clip, Sequence, UsageError

STYLE = (
    "body{font:16px sans-serif;max-width:900px;margin:auto;padding:12px}img{width:31%;margin:1%}td{padding:2px 12px}"
)


@torch.no_grad()
def without(model: Any, batch: Batch, index: int) -> dict[str, float]:
    """The value of class ``index`` as it is, and with each modality and each frame left out (exact occlusion)."""
    features = model.encode(batch)
    cases = [("everything", "", -1)]
    for name, sequence in features.modalities.items():
        if sequence.mask.any():
            cases.append((f"without {SURFACE[name]}", name, -1))
    places = features.modalities["vision"].mask[0].nonzero()[:, 0].tolist() if "vision" in features.modalities else []
    cases += [(f"without frame {i + 1}", "vision", place) for i, place in enumerate(places)]
    rows = cam.repeat(features, len(cases))
    for name, sequence in rows.modalities.items():
        mask = sequence.mask.clone()
        for row, (_, gone, place) in enumerate(cases):
            if gone == name:
                mask[row, slice(None) if place < 0 else place] = False
        rows.modalities[name] = Sequence(sequence.values, mask)
    found = cam.values(model.network, model.fuse(rows))[:, index].tolist()
    return {case[0]: value for case, value in zip(cases, found, strict=True)}


def _png(pixels: np.ndarray, heat: np.ndarray) -> bytes:
    """A frame 3×S×S uint8 under its map h×w in 0 … 1."""
    frame = Image.fromarray(pixels.transpose(1, 2, 0))
    strength = np.asarray(Image.fromarray(heat.astype(np.float32)).resize(frame.size, Image.Resampling.BILINEAR))
    share = 0.6 * strength[..., None]
    mixed = (1 - share) * np.asarray(frame) + share * 255 * colormaps["turbo"](strength)[..., :3]
    file = io.BytesIO()
    Image.fromarray(mixed.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def explain(run: Any, video: str | Path | None, text: str | None, out: str | Path) -> dict[str, Any]:
    """Explain the predicted class of one clip; writes ``OUT/explain.html`` (self-contained) and a PNG for each frame.

    Args:
        run: a RUN folder or a Predictor.
        video: the clip, or None.
        text: what is said in it, or None.
        out: the folder to write to.

    Raises:
        UsageError: nothing to read. UserError: the video cannot be read, the folder cannot be written.
    """
    predictor = senticlip.load(run) if isinstance(run, str | Path) else run
    folder = Path(out)
    batch = predictor.batch([Clip("", Path(video) if video is not None else None, text)])
    prediction = predictor.predictions(predictor.output(batch))[0]
    index = LABELS.index(prediction.label)
    answers = without(predictor.model, batch, index)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: no folder to write to — {error.strerror}") from None
    pictures, paths = [], []
    if video is not None and "ablation-cam" in cam.methods_for(predictor.model):
        maps = cam.ablation_cam(predictor.model, batch, index).cpu().numpy()
        pixels, mask = batch.modalities["vision"]
        for i, (frame, heat) in enumerate(zip(pixels[0][mask[0]].cpu().numpy(), maps, strict=True)):
            data, path = _png(frame, heat / (maps.max() or 1)), folder / f"frame-{i + 1}.png"
            write_whole(path, functools.partial(Path.write_bytes, data=data))
            pictures.append(f'<img alt="frame {i + 1}" src="data:image/png;base64,{base64.b64encode(data).decode()}">')
            paths.append(str(path))
    said = {name: max(p, key=p.__getitem__) for name, p in prediction.modalities.items()}
    rows = "".join(f"<tr><td>{html.escape(case)}</td><td>{value:.3f}</td></tr>" for case, value in answers.items())
    heads = "".join(f"<li>{n}: {said[n]}, weight {prediction.weights[n]:.2f}</li>" for n in said)
    clash = "<p>文字和画面不一致。 Text and video disagree.</p>" if len(set(said.values())) > 1 else ""
    page = (
        '<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>senticlip explain</title><style>{STYLE}</style><h1>{prediction.label}</h1>"
        f"<p>{html.escape(text or '')}</p>{clash}<ul>{heads}</ul><p>Ablation-CAM</p>{''.join(pictures)}"
        f"<table><tr><th>seen</th><th>{prediction.label}</th></tr>{rows}</table>"
    )
    target = folder / "explain.html"
    write_whole(target, lambda partial: partial.write_text(page, encoding="utf-8"))
    return {"html": str(target), "frames": paths}
