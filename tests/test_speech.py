"""Transcription: what faster-whisper says as lines, and one clear line where it, its model or the sound is missing."""

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
    """Of two tracks, tones of 400 and 800 Hz, the second is played."""
    path = tmp_path_factory.mktemp("film") / "a.mkv"
    with av.open(str(path), "w") as file:
        tracks = [file.add_stream("pcm_s16le", rate=16000, layout="mono") for _ in range(2)]
        for i, track in enumerate(tracks):
            track.disposition = Disposition.default if i else Disposition(0)
        for i, track in enumerate(tracks):
            sound = 20000 * np.sin(2 * np.pi * 400 * (i + 1) * np.arange(16000) / 16000)
            frame = av.AudioFrame.from_ndarray(sound.astype("<i2")[None], "s16", "mono")
            frame.sample_rate, frame.pts = 16000, 0
            file.mux(track.encode(frame))
    return path


@pytest.fixture
def whisper(monkeypatch, tmp_path):
    """faster-whisper, as far as it is used, a folder with a model, and a film with sound."""
    asked = types.SimpleNamespace(folder=None, options=None, said=[], error=None, seeds=[], times=0)
    asked.model = tmp_path / "model"
    asked.model.mkdir()
    for name in NEEDED:
        (asked.model / name).write_text(name)

    class Model:
        def __init__(self, folder, **options):
            asked.folder, asked.options = folder, options

        def transcribe(self, sound, **options):
            assert options["language"] == "zh"
            assert np.abs(np.fft.rfft(sound)).argmax() * 16000 / len(sound) == pytest.approx(800, abs=2)
            asked.seconds, asked.times = len(sound) / 16000, asked.times + 1
            if asked.error:
                raise asked.error
            return (types.SimpleNamespace(start=s, end=e, text=t) for s, e, t in asked.said), None

    names = types.SimpleNamespace(_MODELS={"turbo": "mobius/turbo"})
    module = types.SimpleNamespace(WhisperModel=Model, utils=names, __version__="1")
    monkeypatch.setitem(sys.modules, "faster_whisper", module)
    monkeypatch.setitem(sys.modules, "ctranslate2", types.SimpleNamespace(set_random_seed=asked.seeds.append))
    monkeypatch.setattr("senticlip.speech.probe", lambda path: types.SimpleNamespace(has_audio=True))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return asked


def test_lines_as_they_are_said_within_the_sound(film, whisper):
    whisper.said = [(0.0, 0.25049, " 真好 "), (0.3, 0.5, "♪"), (0.5, 0.5, "无")]
    whisper.said += [(0.5, 2.0, "然后呢"), (2.0, 4.0, "谢谢")]
    assert transcript(film, str(whisper.model), "cuda:1") == [Line(0.0, 0.25, "真好"), Line(0.5, 1.0, "然后呢")]
    assert whisper.folder == str(whisper.model)
    assert (whisper.options["device"], whisper.options["device_index"], whisper.seeds) == ("cuda", 1, [0])


def test_where_the_sound_begins_late_so_do_the_lines(film, whisper, monkeypatch):
    whisper.said = [(0.0, 0.25, "真好")]
    monkeypatch.setattr("senticlip.speech.audio_start", lambda path: 3.0)
    assert transcript(film, str(whisper.model)) == [Line(3.0, 3.25, "真好")]
    assert whisper.options["device"] == "auto"


def test_a_film_is_listened_to_once_by_each_model(film, whisper, tmp_path):
    whisper.said = [(0.0, 0.25, "真好")]
    first = transcript(film, str(whisper.model))
    whisper.said = [(0.0, 0.25, "不好")]
    assert transcript(film, str(whisper.model)) == first
    (whisper.model / "model.bin").write_text("another")
    assert transcript(film, str(whisper.model)) == [Line(0.0, 0.25, "不好")]
    for kept in (tmp_path / "cache" / "transcripts").iterdir():
        kept.write_text("damaged")
    transcript(film, str(whisper.model))
    assert whisper.times == 3


def test_a_gap_in_the_sound_takes_its_time(whisper, tmp_path):
    path = tmp_path / "gap.mkv"
    with av.open(str(path), "w") as file:
        track = file.add_stream("pcm_s16le", rate=16000, layout="mono")
        for i in (*range(10), *range(30, 40)):
            sound = 20000 * np.sin(2 * np.pi * 800 * np.arange(1600) / 16000)
            frame = av.AudioFrame.from_ndarray(sound.astype("<i2")[None], "s16", "mono")
            frame.sample_rate, frame.pts = 16000, 1600 * i
            file.mux(track.encode(frame))
    transcript(path, str(whisper.model))
    assert whisper.seconds == 4


def test_the_extra_is_missing(film, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(UsageError, match=r"pip install 'senticlip\[asr\]'"):
        transcript(film)


def test_the_model_is_missing(film, whisper, tmp_path):
    with pytest.raises(UsageError) as error:
        transcript(film)
    assert "--asr-model small: Systran/faster-whisper-small is not on this disk" in str(error.value)
    assert "--asr-model FOLDER" in str(error.value)
    assert "\n" not in str(error.value)
    for model, said in (("turbo", "mobius/turbo is not"), (str(tmp_path / "none"), "no such folder"), (" ", "no name")):
        with pytest.raises(UsageError, match=said):
            transcript(film, model)
    (whisper.model / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"no tokenizer\.json in .*/model — copy"):
        transcript(film, str(whisper.model))


def test_a_downloaded_model_needs_no_network(film, whisper, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--Systran--faster-whisper-small"
    folder = place / "snapshots" / ("a" * 40)
    for file in (place / "refs" / "main", folder / "config.json", *(folder / name for name in NEEDED)):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("a" * 40)
    transcript(film)
    assert whisper.folder == str(folder)


def test_a_device_that_is_none(film, whisper):
    with pytest.raises(UsageError, match="--device cuda:x: unknown"):
        transcript(film, str(whisper.model), "cuda:x")


def test_there_is_no_sound(whisper, tmp_path, monkeypatch):
    monkeypatch.setattr("senticlip.speech.probe", probe)
    with pytest.raises(UserError, match="no sound"):
        transcript(write_film(tmp_path / "a.mp4", ["positive"]), str(whisper.model))


@pytest.mark.parametrize("error", [RuntimeError("CUDA\nfailed"), ValueError("no model.bin"), Exception("EOF")])
def test_what_goes_wrong_is_one_line(error, film, whisper):
    whisper.error = error
    with pytest.raises(UserError, match="cannot be transcribed") as told:
        transcript(film, str(whisper.model))
    assert "\n" not in str(told.value)


def test_all_of_a_film_is_heard_where_somebody_speaks(film, whisper, monkeypatch):
    """A clip's sound is read up to a bound; a film has none, and in its pauses words would be made up."""
    asked, model = [], sys.modules["faster_whisper"].WhisperModel
    transcribe = model.transcribe
    monkeypatch.setattr("senticlip.speech.read_audio", lambda path, **options: asked.append(options) or tone())
    monkeypatch.setattr(
        model, "transcribe", lambda *args, **options: asked.append(options) or transcribe(*args, **options)
    )
    transcript(film, str(whisper.model))
    assert asked == [{"most": math.inf, "gaps": True}, {"language": "zh", "vad_filter": True}]
    assert whisper.options["compute_type"] == "default"  # what the model's files hold


def tone():
    return np.sin(2 * np.pi * 800 * np.arange(16000) / 16000).astype(np.float32)
