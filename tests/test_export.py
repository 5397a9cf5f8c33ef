"""An ONNX file answers as its RUN does, for any number of rows, frames and characters; int8 and bf16 are close."""

import errno
import json
import logging
import os
import runpy
import shutil
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import onnx
import pytest
import torch
from tests.data.test_cutaways import write_shots
from tests.data.test_video import write

import senticlip
from senticlip.config import Config
from senticlip.data.sims import read_clips
from senticlip.data.video import read_frames
from senticlip.encoders.text import load_tokenizer
from senticlip.export import OnnxModel, export
from senticlip.models import create_model
from senticlip.models.base import SentimentModel
from senticlip.precision import compare, disagreement
from senticlip.quantize import fp32_products
from senticlip.structures import Batch, Clip, Output, Sequence, UsageError, UserError

EXAMPLE = Path(__file__).parents[1] / "examples" / "onnx_only.py"
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def make_run(folder: Path, **changes) -> Path:
    """A RUN with random weights."""
    text = {"model_type": "bert", "vocab_size": 22000, **SMALL}
    clip = {
        "model_type": "chinese_clip",
        "projection_dim": 12,
        "text_config": {"model_type": "chinese_clip_text_model", "vocab_size": 22000, **SMALL},
        "vision_config": {"patch_size": 8, "image_size": 32, **SMALL},
    }
    keys = {"width": 16, "heads": 2, "vision.frames": 4, "text.max_length": 24, "text.prefix_length": 2}
    keys |= {"protocol": "tenth", "seed": 3, **changes}
    for name, spec in (("text", text), ("vision", clip)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(spec))
        keys |= {f"{name}.encoder": str(folder / name), f"{name}.pretrained": False}
    torch.manual_seed(0)
    config = Config().override({**keys, "label.pretrained": False})
    model = create_model(config, {"audio": config.audio.bands})
    model.network.temperature.copy_(torch.tensor([0.7, 3.0, 1.6])[: len(config.modalities)])
    model.save_pretrained(folder / "run")
    load_tokenizer(None).save_pretrained(folder / "run" / "tokenizer")
    return folder / "run"


def make_video(path: Path) -> Path:
    """A video of two seconds of noise."""
    random = np.random.default_rng(0)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for _ in range(20):
            image = random.integers(0, 256, (4, 6, 3), np.uint8).repeat(16, 0).repeat(16, 1)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        out.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def onnx_file(run) -> Path:
    path = run.parent / "model.onnx"
    assert export(run, path)["bytes"] == path.stat().st_size
    return path


@pytest.fixture(scope="module")
def video(run) -> Path:
    return make_video(run.parent / "clip.mp4")


def random_batch(rows: int, frames: int, characters: int) -> Batch:
    random = torch.Generator().manual_seed(rows + frames)
    ids = torch.randint(1, 20000, (rows, characters), generator=random)
    pixels = torch.randint(0, 256, (rows, frames, 3, 32, 32), generator=random, dtype=torch.uint8)
    masks = [torch.ones(rows, n, dtype=torch.bool) for n in (characters, frames)]
    for mask in masks:
        mask[rows // 2 :, mask.shape[1] // 2 + 1 :] = False
    masks[0][-1] = rows == 1
    return Batch({"text": Sequence(ids, masks[0]), "vision": Sequence(pixels, masks[1])}, {})


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 2), (2, 2, 3), (3, 3, 24), (7, 4, 11)])
def test_onnx_matches_run_for_every_shape(run, onnx_file, shape):
    batch = random_batch(*shape)
    expected, actual = senticlip.load(run).output(batch), senticlip.load(onnx_file).output(batch)
    torch.testing.assert_close(actual.log_probs, expected.log_probs, atol=1e-5, rtol=1e-5)
    for part in ("logits", "weights"):
        assert list(getattr(expected, part)) == list(getattr(actual, part))
        for name, value in getattr(expected, part).items():
            torch.testing.assert_close(getattr(actual, part)[name], value, atol=1e-5, rtol=1e-4)


def add_sound(video: Path, out: Path, seconds: float) -> Path:
    """A copy of a video with sound: a rising tone with clicks."""
    with av.open(str(video)) as source, av.open(str(out), "w") as target:
        video_stream = target.add_stream_from_template(source.streams.video[0])
        audio_stream = target.add_stream("aac", rate=44100, layout="stereo")
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = video_stream
                target.mux(packet)
        time = np.arange(round(seconds * 44100)) / 44100
        clicks = np.random.default_rng(0).normal(0, 0.1, len(time)) * (time % 0.5 < 0.01)
        tone = np.sin(900 * time * (1 + time)) / 3 + clicks
        frame = av.AudioFrame.from_ndarray(np.stack([tone, 0.5 * tone]).astype(np.float32), "fltp", "stereo")
        frame.sample_rate = 44100
        target.mux(audio_stream.encode(frame))
        target.mux(audio_stream.encode(None))
    return out


def test_audio_in_run_onnx_file_and_example(tmp_path):
    """Compared with the RUN: with sound of two lengths, without text, without sound, without video; int8, too."""
    run, silent = make_run(tmp_path, modalities=["audio", "text", "vision"], **{"audio.average": 3}), tmp_path / "a.mp4"
    make_video(silent)
    export(run, tmp_path / "m.onnx")
    original, exported, reduced = (
        senticlip.load(run),
        senticlip.load(tmp_path / "m.onnx"),
        senticlip.load(run, precision="int8"),
    )
    example = runpy.run_path(str(EXAMPLE))["predict"]
    short, long = (add_sound(silent, tmp_path / f"{seconds}.mp4", seconds) for seconds in (0.5, 3))
    answers = []
    for video, text in ((short, "好"), (long, "好"), (long, None), (silent, "好"), (None, "好")):
        expected, from_onnx, from_int8 = (predictor(video, text=text) for predictor in (original, exported, reduced))
        assert ("audio" in expected.weights) == (video in (short, long))
        assert expected.weights == pytest.approx(from_onnx.weights, abs=1e-6)
        assert expected.probabilities == pytest.approx(from_onnx.probabilities, abs=1e-5)
        assert expected.probabilities == pytest.approx(from_int8.probabilities, abs=0.03)
        for name, probabilities in expected.modalities.items():
            assert probabilities == pytest.approx(from_onnx.modalities[name], abs=1e-5)
        assert expected.probabilities == pytest.approx(
            example(str(tmp_path / "m.onnx"), video and str(video), text), abs=2e-3
        )
        answers.append(expected.probabilities["neutral"])
    assert len({round(answer, 4) for answer in answers}) == 5
    clips = [Clip("a", short, "好"), Clip("b", long, "好"), Clip("c", silent, None)]  # three audio lengths
    batch = original.batch(clips)
    torch.testing.assert_close(exported.output(batch).log_probs, original.output(batch).log_probs, atol=1e-5, rtol=1e-5)


def test_onnx_matches_run_with_lstm_and_vision_first(tmp_path):
    run = make_run(tmp_path, modalities=["vision", "text"], temporal="lstm")
    export(run, tmp_path / "m.onnx")
    model, batch = SentimentModel.from_pretrained(run), random_batch(3, 4, 9)
    with torch.inference_mode():
        expected, actual = model(batch, alone=True), OnnxModel(tmp_path / "m.onnx")(batch)
    for name in ("text", "vision"):
        for kind in ("logits", "weights", "alone"):
            torch.testing.assert_close(getattr(actual, kind)[name], getattr(expected, kind)[name], atol=1e-4, rtol=1e-4)


def test_repeated_lstm_exports_accept_any_number_of_frames(tmp_path):
    """torch remembers the LSTM of an earlier export."""
    run = make_run(tmp_path, modalities=["text", "vision", "audio"], temporal="lstm")
    model = SentimentModel.from_pretrained(run)
    for name in ("first", "second"):
        export(run, tmp_path / f"{name}.onnx")
        onnx_model = OnnxModel(tmp_path / f"{name}.onnx")
        for frames in (1, 3, 4):
            batch = random_batch(2, frames, 5)
            with torch.inference_mode():
                expected, actual = model(batch), onnx_model(batch)
            torch.testing.assert_close(actual.log_probs, expected.log_probs, atol=1e-4, rtol=1e-4)


def test_onnx_predictions_match_run(run, onnx_file, video):
    original, exported = senticlip.load(run), senticlip.load(onnx_file)
    for clip in ((video, "今天真开心"), (video, None), (None, "呵呵，真棒啊"), (video, "很长" * 40)):
        expected, actual = original(clip[0], text=clip[1]), exported(clip[0], text=clip[1])
        assert expected.label == actual.label
        assert expected.probabilities == pytest.approx(actual.probabilities, abs=1e-5)
        assert expected.weights == pytest.approx(actual.weights, abs=1e-6)
        for name, probabilities in expected.modalities.items():
            assert probabilities == pytest.approx(actual.modalities[name], abs=1e-5)


def test_example_runs_without_torch(run, onnx_file, video):
    """In a separate process in which importing torch fails."""
    code = (
        "import sys, runpy; sys.modules['torch'] = None; "
        f"sys.argv = {['x', str(onnx_file), str(video), '--text', '开心']!r}"
    )
    code += f"; runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(process.stdout) == pytest.approx(senticlip.load(run)(video, text="开心").probabilities, abs=2e-3)


def test_example_rejects_blank_input(onnx_file):
    process = subprocess.run(
        [sys.executable, str(EXAMPLE), str(onnx_file), "--text", " "], capture_output=True, text=True
    )
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr == f"{onnx_file}: nothing to read — give it a video, --text or both\n"


def test_example_drops_cutaways(onnx_file, tmp_path):
    """The file is made by changing the experiment in one that keeps cutaways."""
    proto = onnx.load(str(onnx_file))
    properties = {entry.key: entry.value for entry in proto.metadata_props}
    metadata = json.loads(properties["senticlip"])
    metadata["experiment"]["vision"]["cutaways"] = "drop"
    onnx.helper.set_model_props(proto, properties | {"senticlip": json.dumps(metadata)})
    onnx.save(proto, str(tmp_path / "drop.onnx"))
    clip = write_shots(tmp_path / "a.mp4", [0, 0, 1, 0])
    predict = runpy.run_path(str(EXAMPLE))["predict"]
    kept, dropped = (predict(str(path), str(clip), "好") for path in (onnx_file, tmp_path / "drop.onnx"))
    assert dropped == pytest.approx(senticlip.load(tmp_path / "drop.onnx")(clip, text="好").probabilities, abs=1e-4)
    assert max(abs(kept[name] - dropped[name]) for name in kept) > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"rotation": 90},
        {"rotation": 180},
        {"rotation": 270},
        {"base": Fraction(1, 1000), "stamps": [0, 10, 30, 900, 1000, 1010, 2500, 2600]},
        {"base": Fraction(1, 1000), "stamps": [0, 40, 80, 2000]},
    ],
)
def test_example_reads_the_same_frames(tmp_path, options):
    path = write(tmp_path / "a.mp4", bf="2", **options)
    expected = read_frames(path, 6, size=32).pixels.astype(int)
    actual = runpy.run_path(str(EXAMPLE))["frames"](str(path), 6, 32)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= 1


def test_lower_precision_is_close_and_reports_disagreement(run, video):
    fp32 = senticlip.load(run)
    clips = [Clip(str(i), video, "今天天气" * i, start=i / 10, end=1 + i / 10) for i in range(1, 9)]
    for precision in ("bf16", "int8"):
        other = senticlip.load(run, precision=precision)
        assert other.disagreement["n"] == 4
        measured = compare(fp32, other, clips)
        assert measured["n"] == 8
        assert 0 < measured["max_difference"] < 0.03
        assert compare(fp32, other, [*clips, Clip("nothing to read")])["n"] == 8


def fp32_weights(path):
    """For each matrix product with a constant fp32 weight: the sorted dimensions of the weight, and its metadata."""
    graph = onnx.load(str(path)).graph
    shapes = {w.name: w.dims for w in graph.initializer if w.data_type == onnx.TensorProto.FLOAT and len(w.dims) == 2}
    nodes = [node for node in graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in shapes]
    return [(tuple(sorted(shapes[node.input[1]])), str(node.metadata_props)) for node in nodes]


def test_int8_spares_network_and_narrowing_text_products(run, video, tmp_path):
    export(run, tmp_path / "fp32.onnx")
    level = logging.getLogger().level
    export(run, tmp_path / "int8.onnx", int8=True)
    assert logging.getLogger().level == level  # the exporter's log level is restored
    batch = senticlip.load(run).batch([Clip("a", None, "今天天气"), Clip("b", video)])
    full, reduced = (senticlip.load(tmp_path / name).output(batch) for name in ("fp32.onnx", "int8.onnx"))
    assert float((full.log_probs.exp() - reduced.log_probs.exp()).abs().max()) < 0.05
    network = [shape for shape, scopes in fp32_weights(tmp_path / "fp32.onnx") if "model.network" in scopes]
    text = (SMALL["hidden_size"], SMALL["intermediate_size"])  # the vision encoder has a weight of this shape, too
    assert sorted(shape for shape, _ in fp32_weights(tmp_path / "int8.onnx")) == sorted([*network, text])


def test_export_compares_on_the_runs_split(run, tmp_path, video, monkeypatch, terminal):
    """It uses the RUN's protocol and seed; and what cannot be read is reported before the export."""
    (tmp_path / "data.csv").write_text(
        "path,text,label\n" + "".join(f"{video},今天{i},{i % 3 - 1}\n" for i in range(20)), encoding="utf-8"
    )
    calls = []
    monkeypatch.setattr("senticlip.export.read_clips", lambda *args: calls.append(args) or read_clips(*args))
    result = export(run, tmp_path / "a.onnx", data=tmp_path / "data.csv", split="train")["disagreement"]
    assert calls == [(tmp_path / "data.csv", "train", "tenth", 3)]
    assert result["n"] == len(read_clips(*calls[0])) == 16
    assert result["max_difference"] < 1e-5
    assert "exporting a.onnx" in terminal.getvalue()
    assert "comparing" in terminal.getvalue()
    monkeypatch.setattr("senticlip.export.trace", lambda model: pytest.fail("exported first"))
    with pytest.raises(UsageError, match="split 'draft'"):
        export(run, tmp_path / "b.onnx", data=tmp_path / "data.csv", split="draft")
    with pytest.raises(UsageError, match=r"must end in \.onnx"):
        export(tmp_path / "no run", tmp_path / "model.bin")
    assert {path.name for path in tmp_path.iterdir()} == {"data.csv", "a.onnx"}


def test_disagreement_by_hand():
    one = Output(log_probs=torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]).log())
    two = Output(log_probs=torch.tensor([[0.4, 0.5, 0.1], [0.1, 0.2, 0.7]]).log())
    result = disagreement([(one, two)])
    assert result == pytest.approx({"n": 2, "flips": 0.5, "max_difference": 0.2, "mean_difference": 0.1}, abs=1e-6)


def test_nan_counts_as_disagreement():
    one = Output(log_probs=torch.tensor([[0.8, 0.1, 0.1], [0.8, 0.1, 0.1]]).log())
    two = Output(log_probs=torch.tensor([[0.8, 0.1, 0.1], [torch.nan] * 3]).log())
    result = disagreement([(one, two)])
    assert (result["flips"], result["max_difference"]) == (0.5, float("inf"))


def test_export_removes_leftovers_of_killed_exports(run, tmp_path):
    out, two_hours = tmp_path / "m[1].onnx", 2 * 3600
    for name, age in ((".m[1].onnx-killed00", two_hours), (".m[1].onnx-running0", 60), (".n.onnx-killed00", two_hours)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.onnx").write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    export(run, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".m[1].onnx-running0", ".n.onnx-killed00", "m[1].onnx"]


def test_unusable_files_and_options_are_rejected(run, onnx_file, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    with pytest.raises(UserError, match="not readable as a senticlip export"):
        senticlip.load(tmp_path / "bad.onnx")
    shutil.copy(onnx_file, tmp_path / os.fsdecode(b"\xb5.onnx"))
    with pytest.raises(UserError, match="onnxruntime cannot open a path that is not UTF-8 — rename it"):
        senticlip.load(tmp_path / os.fsdecode(b"\xb5.onnx"))
    with pytest.raises(UsageError, match=r"none\.onnx: no such file"):
        senticlip.load(tmp_path / "none.onnx")
    with pytest.raises(UsageError, match="an exported file runs on the CPU"):
        senticlip.load(onnx_file, "cuda")
    older = onnx.load(str(onnx_file))
    (metadata,) = (entry for entry in older.metadata_props if entry.key == "senticlip")
    metadata.value = json.dumps({**json.loads(metadata.value), "format": 1})
    onnx.save(older, str(tmp_path / "older.onnx"))
    with pytest.raises(UserError, match=r"format 1, expected 2.*export the RUN again"):
        senticlip.load(tmp_path / "older.onnx")
    with pytest.raises(UsageError, match="fp32, bf16, int8"):
        senticlip.load(run, precision="fp8")
    with pytest.raises(UsageError, match="is chosen at export"):
        senticlip.load(onnx_file, precision="bf16")
    with pytest.raises(UsageError, match="attention"):
        senticlip.load(onnx_file).model(random_batch(1, 1, 1), attention=True)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("senticlip", lambda metadata: {"format": metadata["format"]}, "KeyError: 'experiment'"),
        ("senticlip", lambda metadata: [], "TypeError"),
        ("senticlip", lambda metadata: metadata | {"experiment": {"width": 0}}, "config key width: 0"),
        ("senticlip", lambda metadata: metadata | {"names": 3}, "TypeError"),
        ("senticlip", lambda metadata: metadata | {"names": ["text"]}, r"names \['text'\], but its graph reads text, "),
        ("senticlip", lambda metadata: metadata | {"temperature": "warm"}, "TypeError|ValueError"),
        ("tokenizer", lambda metadata: "garbage", "Exception: invalid type"),
    ],
)
def test_broken_metadata_is_rejected_in_one_line(onnx_file, tmp_path, key, change, message):
    proto = onnx.load(str(onnx_file))
    properties = {entry.key: entry.value for entry in proto.metadata_props}
    onnx.helper.set_model_props(proto, properties | {key: json.dumps(change(json.loads(properties["senticlip"])))})
    onnx.save(proto, str(tmp_path / "a.onnx"))
    with pytest.raises(UserError, match=rf"a\.onnx: not readable as a senticlip export \(.*({message})") as error:
        senticlip.load(tmp_path / "a.onnx")
    assert "\n" not in str(error.value)


def test_full_disk_is_reported(run, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("senticlip.export._write_file", full)
    with pytest.raises(UserError, match=r"f\.onnx: the disk is full — make room, then run the same command again$"):
        export(run, tmp_path / "f.onnx")


def test_onnx_file_keeps_temperatures(run, onnx_file):
    """``evaluate`` divides the logits by them."""
    assert OnnxModel(onnx_file).network.temperature.tolist() == pytest.approx([0.7, 3.0])
    assert list(OnnxModel(onnx_file).experiment.modalities) == list(senticlip.load(run).config.modalities)


def test_spared_products_by_hand():
    shapes = {"widens": (16, 32), "narrows": (32, 16), "stack": (2, 32, 16)}
    scopes = {"text": "model.encoders.text", "frames": "model.encoders.vision", "fusion": "model.network"}
    nodes = [
        SimpleNamespace(
            name=f"{part} {weight}",
            op_type="MatMul",
            input=["x", weight],
            metadata_props=[SimpleNamespace(key="pkg.torch.onnx.name_scopes", value=f"['', 'model', '{scope}', 'w']")],
        )
        for part, scope in scopes.items()
        for weight in shapes
    ]
    weights = [SimpleNamespace(name=name, dims=dims) for name, dims in shapes.items()]
    names = {name for name in fp32_products(SimpleNamespace(initializer=weights, node=nodes)) if "_" not in name}
    assert names == {"text narrows", "text stack", "frames stack", "fusion widens", "fusion narrows", "fusion stack"}
