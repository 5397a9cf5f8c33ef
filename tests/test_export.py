"""The exported file answers as the RUN does, at any number of rows, frames and characters; int8 and bf16 nearly so."""

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
from senticlip.quantize import spared
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
    """Two seconds of noise."""
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
def file(run) -> Path:
    made = run.parent / "model.onnx"
    assert export(run, made)["bytes"] == made.stat().st_size
    return made


@pytest.fixture(scope="module")
def video(run) -> Path:
    return make_video(run.parent / "clip.mp4")


def made_batch(rows: int, frames: int, characters: int) -> Batch:
    random = torch.Generator().manual_seed(rows + frames)
    ids = torch.randint(1, 20000, (rows, characters), generator=random)
    pixels = torch.randint(0, 256, (rows, frames, 3, 32, 32), generator=random, dtype=torch.uint8)
    masks = [torch.ones(rows, n, dtype=torch.bool) for n in (characters, frames)]
    for mask in masks:
        mask[rows // 2 :, mask.shape[1] // 2 + 1 :] = False
    masks[0][-1] = rows == 1
    return Batch({"text": Sequence(ids, masks[0]), "vision": Sequence(pixels, masks[1])}, {})


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 2), (2, 2, 3), (3, 3, 24), (7, 4, 11)])
def test_every_shape_gives_the_same(run, file, shape):
    batch = made_batch(*shape)
    one, two = senticlip.load(run).output(batch), senticlip.load(file).output(batch)
    torch.testing.assert_close(two.log_probs, one.log_probs, atol=1e-5, rtol=1e-5)
    for part in ("logits", "weights"):
        assert list(getattr(one, part)) == list(getattr(two, part))
        for name, value in getattr(one, part).items():
            torch.testing.assert_close(getattr(two, part)[name], value, atol=1e-5, rtol=1e-4)


def add_sound(video: Path, out: Path, seconds: float) -> Path:
    """The same pictures, and a tone that rises, with clicks."""
    with av.open(str(video)) as source, av.open(str(out), "w") as made:
        pictures = made.add_stream_from_template(source.streams.video[0])
        voice = made.add_stream("aac", rate=44100, layout="stereo")
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = pictures
                made.mux(packet)
        time = np.arange(round(seconds * 44100)) / 44100
        clicks = np.random.default_rng(0).normal(0, 0.1, len(time)) * (time % 0.5 < 0.01)
        wave = np.sin(900 * time * (1 + time)) / 3 + clicks
        frame = av.AudioFrame.from_ndarray(np.stack([wave, 0.5 * wave]).astype(np.float32), "fltp", "stereo")
        frame.sample_rate = 44100
        made.mux(voice.encode(frame))
        made.mux(voice.encode(None))
    return out


def test_sound_is_heard_by_all_three(tmp_path):
    """RUN, its file and the example, with a clip's sound of any length, without it, and by sound alone; int8, too."""
    run, silent = make_run(tmp_path, modalities=["audio", "text", "vision"], **{"audio.average": 3}), tmp_path / "a.mp4"
    make_video(silent)
    export(run, tmp_path / "m.onnx")
    one, two, small = senticlip.load(run), senticlip.load(tmp_path / "m.onnx"), senticlip.load(run, precision="int8")
    example = runpy.run_path(str(EXAMPLE))["predict"]
    loud, louder = (add_sound(silent, tmp_path / f"{seconds}.mp4", seconds) for seconds in (0.5, 3))
    answers = []
    for video, text in ((loud, "好"), (louder, "好"), (louder, None), (silent, "好"), (None, "好")):
        a, b, c = (predictor(video, text=text) for predictor in (one, two, small))
        assert ("audio" in a.weights) == (video in (loud, louder))
        assert a.weights == pytest.approx(b.weights, abs=1e-6)
        assert a.probabilities == pytest.approx(b.probabilities, abs=1e-5)
        assert a.probabilities == pytest.approx(c.probabilities, abs=0.03)
        for name, probabilities in a.modalities.items():
            assert probabilities == pytest.approx(b.modalities[name], abs=1e-5)
        assert a.probabilities == pytest.approx(example(str(tmp_path / "m.onnx"), video and str(video), text), abs=2e-3)
        answers.append(a.probabilities["neutral"])
    assert len({round(answer, 4) for answer in answers}) == 5
    clips = [Clip("a", loud, "好"), Clip("b", louder, "好"), Clip("c", silent, None)]  # of three lengths together
    batch = one.batch(clips)
    torch.testing.assert_close(two.output(batch).log_probs, one.output(batch).log_probs, atol=1e-5, rtol=1e-5)


def test_another_order_and_another_switch_give_the_same(tmp_path):
    run = make_run(tmp_path, modalities=["vision", "text"], temporal="lstm")
    export(run, tmp_path / "m.onnx")
    model, batch = SentimentModel.from_pretrained(run), made_batch(3, 4, 9)
    with torch.inference_mode():
        one, two = model(batch, alone=True), OnnxModel(tmp_path / "m.onnx")(batch)
    for name in ("text", "vision"):
        for kind in ("logits", "weights", "alone"):
            torch.testing.assert_close(getattr(two, kind)[name], getattr(one, kind)[name], atol=1e-4, rtol=1e-4)


def test_every_export_of_a_process_takes_any_number_of_frames(tmp_path):
    """torch remembers the LSTM of an export before."""
    run = make_run(tmp_path, modalities=["text", "vision", "audio"], temporal="lstm")
    model = SentimentModel.from_pretrained(run)
    for name in ("first", "second"):
        export(run, tmp_path / f"{name}.onnx")
        again = OnnxModel(tmp_path / f"{name}.onnx")
        for frames in (1, 3, 4):
            batch = made_batch(2, frames, 5)
            with torch.inference_mode():
                one, two = model(batch), again(batch)
            torch.testing.assert_close(two.log_probs, one.log_probs, atol=1e-4, rtol=1e-4)


def test_predictions_are_the_same(run, file, video):
    one, two = senticlip.load(run), senticlip.load(file)
    for clip in ((video, "今天真开心"), (video, None), (None, "呵呵，真棒啊"), (video, "很长" * 40)):
        a, b = one(clip[0], text=clip[1]), two(clip[0], text=clip[1])
        assert a.label == b.label
        assert a.probabilities == pytest.approx(b.probabilities, abs=1e-5)
        assert a.weights == pytest.approx(b.weights, abs=1e-6)
        for name, probabilities in a.modalities.items():
            assert probabilities == pytest.approx(b.modalities[name], abs=1e-5)


def test_without_torch(run, file, video):
    """The example, in a process of its own where importing torch fails."""
    code = (
        f"import sys, runpy; sys.modules['torch'] = None; sys.argv = {['x', str(file), str(video), '--text', '开心']!r}"
    )
    code += f"; runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == pytest.approx(senticlip.load(run)(video, text="开心").probabilities, abs=2e-3)


def test_the_example_refuses_to_answer_about_nothing(file):
    done = subprocess.run([sys.executable, str(EXAMPLE), str(file), "--text", " "], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"{file}: nothing to read — give it a video, --text or both\n"


def test_cutaways_are_dropped_without_torch_too(file, tmp_path):
    """A file whose experiment drops them, here made from one whose experiment keeps them."""
    proto = onnx.load(str(file))
    found = {entry.key: entry.value for entry in proto.metadata_props}
    about = json.loads(found["senticlip"])
    about["experiment"]["vision"]["cutaways"] = "drop"
    onnx.helper.set_model_props(proto, found | {"senticlip": json.dumps(about)})
    onnx.save(proto, str(tmp_path / "drop.onnx"))
    clip = write_shots(tmp_path / "a.mp4", [0, 0, 1, 0])
    predict = runpy.run_path(str(EXAMPLE))["predict"]
    kept, dropped = (predict(str(path), str(clip), "好") for path in (file, tmp_path / "drop.onnx"))
    assert dropped == pytest.approx(senticlip.load(tmp_path / "drop.onnx")(clip, text="好").probabilities, abs=1e-4)
    assert max(abs(kept[name] - dropped[name]) for name in kept) > 1e-3


@pytest.mark.parametrize(
    "kind",
    [
        {"rotation": 90},
        {"rotation": 180},
        {"rotation": 270},
        {"base": Fraction(1, 1000), "stamps": [0, 10, 30, 900, 1000, 1010, 2500, 2600]},
        {"base": Fraction(1, 1000), "stamps": [0, 40, 80, 2000]},
    ],
)
def test_the_example_takes_the_same_frames(tmp_path, kind):
    path = write(tmp_path / "a.mp4", bf="2", **kind)
    ours = read_frames(path, 6, size=32).pixels.astype(int)
    theirs = runpy.run_path(str(EXAMPLE))["frames"](str(path), 6, 32)
    assert theirs.shape == ours.shape
    assert np.abs(theirs - ours).max() <= 1


def test_lower_precision_is_close_and_says_how_close(run, video):
    fp32 = senticlip.load(run)
    clips = [Clip(str(i), video, "今天天气" * i, start=i / 10, end=1 + i / 10) for i in range(1, 9)]
    for precision in ("bf16", "int8"):
        other = senticlip.load(run, precision=precision)
        assert other.disagreement["n"] == 4
        found = compare(fp32, other, clips)
        assert found["n"] == 8
        assert 0 < found["max_difference"] < 0.03
        assert compare(fp32, other, [*clips, Clip("nothing to read")])["n"] == 8


def products(path):
    """The sides of the constant weights of each product in fp32, and where it comes from."""
    graph = onnx.load(str(path)).graph
    floats = {w.name: w.dims for w in graph.initializer if w.data_type == onnx.TensorProto.FLOAT and len(w.dims) == 2}
    nodes = [node for node in graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in floats]
    return [(tuple(sorted(floats[node.input[1]])), str(node.metadata_props)) for node in nodes]


def test_int8_leaves_the_network_and_what_makes_the_texts_states_narrower(run, video, tmp_path):
    export(run, tmp_path / "fp32.onnx")
    level = logging.getLogger().level
    export(run, tmp_path / "int8.onnx", int8=True)
    assert logging.getLogger().level == level  # it is not ours to silence
    batch = senticlip.load(run).batch([Clip("a", None, "今天天气"), Clip("b", video)])
    whole, small = (senticlip.load(tmp_path / name).output(batch) for name in ("fp32.onnx", "int8.onnx"))
    assert float((whole.log_probs.exp() - small.log_probs.exp()).abs().max()) < 0.05
    network = [sides for sides, scopes in products(tmp_path / "fp32.onnx") if "model.network" in scopes]
    text = (SMALL["hidden_size"], SMALL["intermediate_size"])  # the frames' encoder has one of this shape, too
    assert sorted(sides for sides, _ in products(tmp_path / "int8.onnx")) == sorted([*network, text])


def test_compared_on_the_split_that_the_run_was_trained_on(run, tmp_path, video, monkeypatch, terminal):
    """By its own protocol and seed; and what cannot be read is told before anything is exported."""
    (tmp_path / "data.csv").write_text(
        "path,text,label\n" + "".join(f"{video},今天{i},{i % 3 - 1}\n" for i in range(20)), encoding="utf-8"
    )
    asked = []
    monkeypatch.setattr("senticlip.export.read_clips", lambda *how: asked.append(how) or read_clips(*how))
    found = export(run, tmp_path / "a.onnx", data=tmp_path / "data.csv", split="train")["disagreement"]
    assert asked == [(tmp_path / "data.csv", "train", "tenth", 3)]
    assert found["n"] == len(read_clips(*asked[0])) == 16
    assert found["max_difference"] < 1e-5
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
    found = disagreement([(one, two)])
    assert found == pytest.approx({"n": 2, "flips": 0.5, "max_difference": 0.2, "mean_difference": 0.1}, abs=1e-6)


def test_no_number_is_no_agreement():
    one = Output(log_probs=torch.tensor([[0.8, 0.1, 0.1], [0.8, 0.1, 0.1]]).log())
    two = Output(log_probs=torch.tensor([[0.8, 0.1, 0.1], [torch.nan] * 3]).log())
    found = disagreement([(one, two)])
    assert (found["flips"], found["max_difference"]) == (0.5, float("inf"))


def test_what_a_killed_export_left_goes_with_the_next(run, tmp_path):
    out, hours = tmp_path / "m[1].onnx", 2 * 3600
    for name, age in ((".m[1].onnx-killed00", hours), (".m[1].onnx-running0", 60), (".n.onnx-killed00", hours)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.onnx").write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    export(run, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".m[1].onnx-running0", ".n.onnx-killed00", "m[1].onnx"]


def test_errors(run, file, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    with pytest.raises(UserError, match="not readable as a senticlip export"):
        senticlip.load(tmp_path / "bad.onnx")
    shutil.copy(file, tmp_path / os.fsdecode(b"\xb5.onnx"))
    with pytest.raises(UserError, match="onnxruntime cannot open a path that is not UTF-8 — rename it"):
        senticlip.load(tmp_path / os.fsdecode(b"\xb5.onnx"))
    with pytest.raises(UsageError, match=r"none\.onnx: no such file"):
        senticlip.load(tmp_path / "none.onnx")
    with pytest.raises(UsageError, match="an exported file runs on the CPU"):
        senticlip.load(file, "cuda")
    older = onnx.load(str(file))
    (about,) = (entry for entry in older.metadata_props if entry.key == "senticlip")
    about.value = json.dumps({**json.loads(about.value), "format": 1})
    onnx.save(older, str(tmp_path / "older.onnx"))
    with pytest.raises(UserError, match=r"format 1, expected 2.*export the RUN again"):
        senticlip.load(tmp_path / "older.onnx")
    with pytest.raises(UsageError, match="fp32, bf16, int8"):
        senticlip.load(run, precision="fp8")
    with pytest.raises(UsageError, match="is chosen at export"):
        senticlip.load(file, precision="bf16")
    with pytest.raises(UsageError, match="attention"):
        senticlip.load(file).model(made_batch(1, 1, 1), attention=True)


@pytest.mark.parametrize(
    ("key", "change", "said"),
    [
        ("senticlip", lambda about: {"format": about["format"]}, "KeyError: 'experiment'"),
        ("senticlip", lambda about: [], "TypeError"),
        ("senticlip", lambda about: about | {"experiment": {"width": 0}}, "config key width: 0"),
        ("senticlip", lambda about: about | {"names": 3}, "TypeError"),
        ("senticlip", lambda about: about | {"names": ["text"]}, r"names \['text'\], but its graph reads text, "),
        ("senticlip", lambda about: about | {"temperature": "warm"}, "TypeError|ValueError"),
        ("tokenizer", lambda about: "garbage", "Exception: invalid type"),
    ],
)
def test_what_the_file_says_of_itself_may_be_broken(file, tmp_path, key, change, said):
    proto = onnx.load(str(file))
    found = {entry.key: entry.value for entry in proto.metadata_props}
    onnx.helper.set_model_props(proto, found | {key: json.dumps(change(json.loads(found["senticlip"])))})
    onnx.save(proto, str(tmp_path / "a.onnx"))
    with pytest.raises(UserError, match=rf"a\.onnx: not readable as a senticlip export \(.*({said})") as error:
        senticlip.load(tmp_path / "a.onnx")
    assert "\n" not in str(error.value)


def test_a_full_disk_is_said(run, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("senticlip.export._made", full)
    with pytest.raises(UserError, match=r"f\.onnx: the disk is full — make room, then run the same command again$"):
        export(run, tmp_path / "f.onnx")


def test_the_file_has_the_temperatures_of_the_run(run, file):
    """``evaluate`` gives the heads equal weights by them."""
    assert OnnxModel(file).network.temperature.tolist() == pytest.approx([0.7, 3.0])
    assert list(OnnxModel(file).experiment.modalities) == list(senticlip.load(run).config.modalities)


def test_what_int8_spares_is_the_network_and_the_texts_second_product():
    shapes = {"widens": (16, 32), "narrows": (32, 16), "stack": (2, 32, 16)}
    places = {"text": "model.encoders.text", "frames": "model.encoders.vision", "fusion": "model.network"}
    nodes = [
        SimpleNamespace(
            name=f"{place} {weight}",
            op_type="MatMul",
            input=["x", weight],
            metadata_props=[SimpleNamespace(key="pkg.torch.onnx.name_scopes", value=f"['', 'model', '{scope}', 'w']")],
        )
        for place, scope in places.items()
        for weight in shapes
    ]
    weights = [SimpleNamespace(name=name, dims=dims) for name, dims in shapes.items()]
    found = {name for name in spared(SimpleNamespace(initializer=weights, node=nodes)) if "_" not in name}
    assert found == {"text narrows", "text stack", "frames stack", "fusion widens", "fusion narrows", "fusion stack"}
