"""A run as a callable: the same answers as in evaluation, also with missing modalities, and audio that is used."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.data.test_audio import tone, write_wav
from tests.data.test_cutaways import write_shots
from tests.tiny import text_folder, timm_folder, write_clip

import senticlip
from senticlip.checkpoint import outputs
from senticlip.config import Config
from senticlip.data.audio import RATE
from senticlip.models import create_model
from senticlip.predictor import Predictor, load
from senticlip.sources import clip_set, reads_log_mel
from senticlip.structures import LABELS, Clip, UsageError, UserError


def config(assets, modalities, **changes):
    base = {"modalities": modalities, "width": 16, "heads": 2, "head": "linear", "text.max_length": 20}
    vision = {"vision.encoder": str(assets / "vision"), "vision.frames": 2, "vision.size": 32}
    return Config().override({**base, **vision, "text.encoder": str(assets / "text"), **changes})


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predictor")
    text_folder(folder / "text")
    timm_folder(folder / "vision")
    write_clip(folder / "dark.mp4", 40, 0)
    write_clip(folder / "light.mp4", 210, 1)
    write_wav(folder / "low.wav", tone(200, 1.0), RATE)
    write_wav(folder / "two.wav", np.concatenate([tone(200, 1.0), tone(3000, 1.0)]), RATE)
    write_wav(folder / "high.wav", tone(3000, 1.0), RATE)
    torch.manual_seed(0)
    create_model(config(folder, ["text", "vision"])).save_pretrained(folder / "run")
    for model in ("clip_ca_msa", "mult"):
        create_model(config(folder, ["text", "audio"], model=model), {"audio": 33}).save_pretrained(folder / model)
    return folder


def probabilities(prediction):
    return [prediction.probabilities[name] for name in LABELS]


def test_predictions_match_evaluation(assets, tmp_path):
    predictor = load(assets / "run", "cpu")
    clips = [
        Clip("a", assets / "dark.mp4", "天气坏，难过"),
        Clip("b", assets / "light.mp4", "好"),
        Clip("c", None, "天气很好"),
        Clip("d", assets / "dark.mp4", None),
    ]
    rows = clip_set(clips, predictor.model, tmp_path / "cache")
    expected = outputs(predictor.model, rows).log_probs.exp().numpy()
    predictions = list(predictor.predict(clips, batch_size=3))
    np.testing.assert_allclose([probabilities(p) for p in predictions], expected, atol=1e-5)
    one_by_one = [predictor(clip.video, clip.text) for clip in clips]
    np.testing.assert_allclose([probabilities(p) for p in one_by_one], expected, atol=1e-5)
    assert [sorted(p.modalities) for p in predictions] == [["text", "video"], ["text", "video"], ["text"], ["video"]]
    assert all(sum(p.weights.values()) == pytest.approx(1) for p in predictions)


@pytest.mark.parametrize("train", ["frozen", "full"])
def test_cutaways_are_dropped_as_in_evaluation(assets, tmp_path, train):
    film = write_shots(tmp_path / "a.mp4", [0, 0, 1, 0, 0, 2])
    clips = [Clip("a", film), Clip("b", film, start=0.5, end=2.5), Clip("c", assets / "dark.mp4")]
    evaluated = {}
    for cutaways in ("keep", "drop"):
        torch.manual_seed(0)
        changes = {"vision.frames": 6, "vision.train": train, "vision.cutaways": cutaways}
        create_model(config(assets, ["vision"], **changes)).save_pretrained(tmp_path / cutaways)
        predictor = Predictor(tmp_path / cutaways, "cpu")
        rows = clip_set(clips, predictor.model, tmp_path / "cache")
        evaluated[cutaways] = outputs(predictor.model, rows).log_probs.exp().numpy()
        answers = [probabilities(p) for p in predictor.predict(clips)]
        np.testing.assert_allclose(answers, evaluated[cutaways], atol=1e-5)
        assert predictor.batch(clips[:1]).modalities["vision"].mask.sum() == {"keep": 6, "drop": 4}[cutaways]
    difference = np.abs(evaluated["keep"] - evaluated["drop"]).max(1)
    assert difference[:2].min() > 1e-5
    assert difference[2] == 0


def test_unimodal_answers_match_unimodal_input(assets):
    predictor = load(assets / "run", "cpu")
    multimodal = predictor(assets / "dark.mp4", "天气坏，难过")
    text, video = predictor(None, "天气坏，难过"), predictor(assets / "dark.mp4")
    assert multimodal.modalities["text"] == pytest.approx(text.probabilities, abs=1e-6)
    assert multimodal.modalities["video"] == pytest.approx(video.probabilities, abs=1e-6)
    assert text.modalities == {"text": pytest.approx(text.probabilities, abs=1e-6)}


@pytest.mark.parametrize("model", ["clip_ca_msa", "mult"])
def test_audio_matches_training(assets, tmp_path, model):
    predictor = load(assets / model, "cpu")
    clips = [Clip("a", assets / "low.wav", "好"), Clip("b", assets / "high.wav", "天气很好"), Clip("c", None, "好")]
    rows = clip_set(clips, predictor.model, tmp_path / "cache", data=tmp_path)
    batch = predictor.batch(clips)
    for name, sequence in batch.modalities.items():
        values, mask = rows.stores[name].gather(np.arange(3))
        assert np.array_equal(sequence.mask.numpy(), mask), name
        np.testing.assert_allclose(sequence.values.numpy()[mask], values[mask], atol=1e-5)
    assert batch.modalities["audio"].mask.sum(1).tolist() == [1 + (RATE - 640) // 320] * 2 + [0]
    actual, expected = predictor.output(batch), outputs(predictor.model, rows)
    actual_values, expected_values = (
        output.score if output.score is not None else output.log_probs for output in (actual, expected)
    )
    torch.testing.assert_close(actual_values, expected_values, atol=1e-5, rtol=1e-5)
    silent = predictor.output(predictor.batch([clip._replace(video=None) for clip in clips]))
    assert not torch.allclose(silent.score if silent.score is not None else silent.log_probs, actual_values, atol=1e-4)


def test_segment_times_must_be_finite(assets):
    with pytest.raises(UsageError, match=r"a segment from None to inf s"):
        load(assets / "run")(assets / "clip.mp4", end=float("inf"))


def test_segment_times_may_be_numpy_or_torch_scalars(assets):
    predictor = load(assets / "run")
    expected = predictor(assets / "dark.mp4", start=0.25, end=0.75)
    assert predictor(assets / "dark.mp4", start=np.float32(0.25), end=torch.tensor(0.75)) == expected


def test_only_audio_of_the_segment_is_used(assets):
    predictor = load(assets / "clip_ca_msa", "cpu")
    full, segment, high = (
        probabilities(predictor(assets / name, "好", *times))
        for name, times in (("two.wav", ()), ("two.wav", (1.0, 2.0)), ("high.wav", ()))
    )
    np.testing.assert_allclose(segment, high, atol=1e-3)
    assert not np.allclose(full, high, atol=1e-3)


def test_video_without_sound_counts_as_missing_audio(assets):
    predictor = load(assets / "clip_ca_msa", "cpu")
    assert sorted(predictor(assets / "dark.mp4", "好").modalities) == ["text"]
    np.testing.assert_allclose(
        probabilities(predictor(assets / "dark.mp4", "好")), probabilities(predictor(None, "好")), atol=1e-6
    )


def test_log_mel_is_not_read_if_audio_comes_from_feature_files(assets):
    assert reads_log_mel(config(assets, ["text", "audio"]))
    assert not reads_log_mel(config(assets, ["text", "audio"], **{"text.encoder": "features"}))
    assert not reads_log_mel(config(assets, ["text", "vision"]))


def test_unusable_input_is_rejected(assets):
    with pytest.raises(UsageError, match="clip: nothing to read — this model reads text or video"):
        load(assets / "run", "cpu")()
    with pytest.raises(UsageError, match="this model reads text or audio"):
        load(assets / "mult", "cpu")()
    with pytest.raises(UsageError, match=r"dark\.mp4: nothing to read — this model reads text or audio"):
        load(assets / "mult", "cpu")(assets / "dark.mp4")  # this video has no sound
    with pytest.raises(UserError, match=r"gone\.mp4"):
        load(assets / "run", "cpu")(assets / "gone.mp4")
    with pytest.raises(UsageError, match="precision"):
        load(assets / "run", "cpu", "fp8")


def test_blank_text_is_missing_and_lone_surrogate_is_replaced(assets):
    predictor = load(assets / "run", "cpu")
    video = assets / "dark.mp4"
    without_text = predictor(video)
    assert predictor(video, " \n") == without_text
    assert list(predictor.predict([Clip("a", video, "  ")])) == [without_text]
    with pytest.raises(UsageError, match="nothing to read"):
        predictor(None, "  ")
    assert predictor(None, "天\udce5好") == predictor(None, "天?好")


def test_invalid_clips_are_rejected(assets):
    predictor, video = load(assets / "run", "cpu"), assets / "dark.mp4"
    with pytest.raises(UsageError, match="b: nan is not a text — give a string or None"):  # pandas' empty cell
        list(predictor.predict([Clip("a", video, "好"), Clip("b", video, float("nan"))]))
    assert predictor("", "好") == predictor(None, "好")
    assert predictor.batch([Clip("a", "", "好")]).modalities["vision"].mask.sum() == 0  # an empty path, as from a table
    for clips, message in (
        ([Clip("b", float("nan"), "好")], "b: nan is not a path — give a path or None"),
        ([Clip("b", video, None, start="1")], "a segment from '1' to None s — give finite times"),
        ([str(video)], "dark.mp4': not a clip — give senticlip.structures.Clip"),
        ([], "batch: no clip given"),
    ):
        with pytest.raises(UsageError, match=message):
            predictor.batch(clips)
    with pytest.raises(UsageError, match="batch_size: 0"):
        list(predictor.predict([Clip("a", video, "好")], batch_size=0))


def test_lazy_imports_are_listed_by_dir():
    assert {"load", "LABELS", "analyze", "bulk", "explain"} <= set(dir(senticlip))
    assert all(getattr(senticlip, name) for name in dir(senticlip))


def test_hub_id_is_loaded_from_its_snapshot(assets, monkeypatch):
    fetched = []

    def fetch(name, key, advice):
        fetched.append((name, key))
        return assets / "run"

    monkeypatch.setattr("senticlip.encoders.hub.fetch", fetch)
    predictor = Predictor("someone/run", "cpu")
    assert fetched == [("someone/run", "RUN")]
    assert predictor.run == assets / "run"
    assert predictor(None, "好") == load(assets / "run", "cpu")(None, "好")
