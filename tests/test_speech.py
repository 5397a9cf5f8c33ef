"""faster-whisper's segments become lines; if it, its model or the sound is missing, the error is one clear line."""

import math
import sys
import types

import av
import numpy as np
import pytest
from av.stream import Disposition
from tests.fakes import write_film

from senticlip.data.subtitles import Line
from senticlip.data.video import probe
from senticlip.speech import NEEDED, transcript
from senticlip.structures import UsageError, UserError


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A film with two tracks (tones of 400 and 800 Hz), of which players play the second."""
    path = tmp_path_factory.mktemp("film") / "a.mkv"
    with av.open(str(path), "w") as file:
        tracks = [file.add_stream("pcm_s16le", rate=16000, layout="mono") for _ in range(2)]
        for i, track in enumerate(tracks):
            track.disposition = Disposition.default if i else Disposition(0)
        for i, track in enumerate(tracks):
            samples = 20000 * np.sin(2 * np.pi * 400 * (i + 1) * np.arange(16000) / 16000)
            frame = av.AudioFrame.from_ndarray(samples.astype("<i2")[None], "s16", "mono")
            frame.sample_rate, frame.pts = 16000, 0
            file.mux(track.encode(frame))
    return path


@pytest.fixture
def whisper(monkeypatch, tmp_path):
    """A stand-in for faster-whisper, with a model folder; every film counts as having sound."""
    fake = types.SimpleNamespace(folder=None, options=None, segments=[], error=None, seeds=[], calls=0)
    fake.model = tmp_path / "model"
    fake.model.mkdir()
    for name in NEEDED:
        (fake.model / name).write_text(name)

    class Model:
        def __init__(self, folder, **options):
            fake.folder, fake.options = folder, options

        def transcribe(self, sound, **options):
            assert options["language"] == "zh"
            assert np.abs(np.fft.rfft(sound)).argmax() * 16000 / len(sound) == pytest.approx(800, abs=2)
            fake.seconds, fake.calls = len(sound) / 16000, fake.calls + 1
            if fake.error:
                raise fake.error
            return (types.SimpleNamespace(start=s, end=e, text=t) for s, e, t in fake.segments), None

    names = types.SimpleNamespace(_MODELS={"turbo": "mobius/turbo"})
    module = types.SimpleNamespace(WhisperModel=Model, utils=names, __version__="1")
    monkeypatch.setitem(sys.modules, "faster_whisper", module)
    monkeypatch.setitem(sys.modules, "ctranslate2", types.SimpleNamespace(set_random_seed=fake.seeds.append))
    monkeypatch.setattr("senticlip.speech.probe", lambda path: types.SimpleNamespace(has_audio=True))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return fake


def test_lines_are_cut_at_the_end_of_the_sound(film, whisper):
    whisper.segments = [(0.0, 0.25049, " 真好 "), (0.3, 0.5, "♪"), (0.5, 0.5, "无")]
    whisper.segments += [(0.5, 2.0, "然后呢"), (2.0, 4.0, "谢谢")]
    assert transcript(film, str(whisper.model), "cuda:1") == [Line(0.0, 0.25, "真好"), Line(0.5, 1.0, "然后呢")]
    assert whisper.folder == str(whisper.model)
    assert (whisper.options["device"], whisper.options["device_index"], whisper.seeds) == ("cuda", 1, [0])


def test_late_sound_shifts_the_lines(film, whisper, monkeypatch):
    whisper.segments = [(0.0, 0.25, "真好")]
    monkeypatch.setattr("senticlip.speech.audio_start", lambda path: 3.0)
    assert transcript(film, str(whisper.model)) == [Line(3.0, 3.25, "真好")]
    assert whisper.options["device"] == "auto"


def test_transcripts_are_cached_per_model(film, whisper, tmp_path):
    whisper.segments = [(0.0, 0.25, "真好")]
    first = transcript(film, str(whisper.model))
    whisper.segments = [(0.0, 0.25, "不好")]
    assert transcript(film, str(whisper.model)) == first
    (whisper.model / "model.bin").write_text("another")
    assert transcript(film, str(whisper.model)) == [Line(0.0, 0.25, "不好")]
    for kept in (tmp_path / "cache" / "transcripts").iterdir():
        kept.write_text("damaged")
    transcript(film, str(whisper.model))
    assert whisper.calls == 3


def test_gap_in_the_sound_keeps_its_length(whisper, tmp_path):
    path = tmp_path / "gap.mkv"
    with av.open(str(path), "w") as file:
        track = file.add_stream("pcm_s16le", rate=16000, layout="mono")
        for i in (*range(10), *range(30, 40)):
            samples = 20000 * np.sin(2 * np.pi * 800 * np.arange(1600) / 16000)
            frame = av.AudioFrame.from_ndarray(samples.astype("<i2")[None], "s16", "mono")
            frame.sample_rate, frame.pts = 16000, 1600 * i
            file.mux(track.encode(frame))
    transcript(path, str(whisper.model))
    assert whisper.seconds == 4


def test_missing_extra(film, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(UsageError, match=r"pip install 'senticlip\[asr\]'"):
        transcript(film)


def test_missing_model(film, whisper, tmp_path):
    with pytest.raises(UsageError) as error:
        transcript(film)
    assert "--asr-model small: Systran/faster-whisper-small is not on this disk" in str(error.value)
    assert "--asr-model FOLDER" in str(error.value)
    assert "\n" not in str(error.value)
    for model, message in (
        ("turbo", "mobius/turbo is not"),
        (str(tmp_path / "none"), "no such folder"),
        (" ", "no name"),
    ):
        with pytest.raises(UsageError, match=message):
            transcript(film, model)
    (whisper.model / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"no tokenizer\.json in .*/model — copy"):
        transcript(film, str(whisper.model))


def test_downloaded_model_needs_no_network(film, whisper, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--Systran--faster-whisper-small"
    snapshot = repository / "snapshots" / ("a" * 40)
    for file in (repository / "refs" / "main", snapshot / "config.json", *(snapshot / name for name in NEEDED)):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("a" * 40)
    transcript(film)
    assert whisper.folder == str(snapshot)


def test_unknown_device(film, whisper):
    with pytest.raises(UsageError, match="--device cuda:x: unknown"):
        transcript(film, str(whisper.model), "cuda:x")


def test_film_without_sound(whisper, tmp_path, monkeypatch):
    monkeypatch.setattr("senticlip.speech.probe", probe)
    with pytest.raises(UserError, match="no sound"):
        transcript(write_film(tmp_path / "a.mp4", ["positive"]), str(whisper.model))


@pytest.mark.parametrize("error", [RuntimeError("CUDA\nfailed"), ValueError("no model.bin"), Exception("EOF")])
def test_transcription_errors_are_one_line(error, film, whisper):
    whisper.error = error
    with pytest.raises(UserError, match="cannot be transcribed") as caught:
        transcript(film, str(whisper.model))
    assert "\n" not in str(caught.value)


def test_whole_film_is_read_and_silence_filtered(film, whisper, monkeypatch):
    """The length limit for the sound of clips does not apply to films; in silence, Whisper would invent words."""
    options_seen, model = [], sys.modules["faster_whisper"].WhisperModel
    transcribe = model.transcribe
    monkeypatch.setattr("senticlip.speech.read_audio", lambda path, **options: options_seen.append(options) or tone())
    monkeypatch.setattr(
        model, "transcribe", lambda *args, **options: options_seen.append(options) or transcribe(*args, **options)
    )
    transcript(film, str(whisper.model))
    assert options_seen == [{"max_seconds": math.inf, "gaps": True}, {"language": "zh", "vad_filter": True}]
    assert whisper.options["compute_type"] == "default"  # as in the model's files


def tone():
    return np.sin(2 * np.pi * 800 * np.arange(16000) / 16000).astype(np.float32)
