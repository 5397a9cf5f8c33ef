"""A run as a callable: the same answers as evaluation gives, whatever is missing, and sound that is really heard."""

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
from senticlip.sources import clip_set, hears
from senticlip.structures import LABELS, Clip, UsageError, UserError


def config(place, names, **changes):
    base = {"modalities": names, "width": 16, "heads": 2, "head": "linear", "text.max_length": 20}
    vision = {"vision.encoder": str(place / "vision"), "vision.frames": 2, "vision.size": 32}
    return Config().override({**base, **vision, "text.encoder": str(place / "text"), **changes})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("predictor")
    text_folder(root / "text")
    timm_folder(root / "vision")
    write_clip(root / "dark.mp4", 40, 0)
    write_clip(root / "light.mp4", 210, 1)
    write_wav(root / "low.wav", tone(200, 1.0), RATE)
    write_wav(root / "two.wav", np.concatenate([tone(200, 1.0), tone(3000, 1.0)]), RATE)
    write_wav(root / "high.wav", tone(3000, 1.0), RATE)
    torch.manual_seed(0)
    create_model(config(root, ["text", "vision"])).save_pretrained(root / "run")
    for model in ("clip_ca_msa", "mult"):
        create_model(config(root, ["text", "audio"], model=model), {"audio": 33}).save_pretrained(root / model)
    return root


def probabilities(prediction):
    return [prediction.probabilities[name] for name in LABELS]


def test_answers_are_those_of_evaluation(place, tmp_path):
    predictor = load(place / "run", "cpu")
    clips = [
        Clip("a", place / "dark.mp4", "天气坏，难过"),
        Clip("b", place / "light.mp4", "好"),
        Clip("c", None, "天气很好"),
        Clip("d", place / "dark.mp4", None),
    ]
    rows = clip_set(clips, predictor.model, tmp_path / "cache")
    wanted = outputs(predictor.model, rows).log_probs.exp().numpy()
    found = list(predictor.predict(clips, batch_size=3))
    np.testing.assert_allclose([probabilities(p) for p in found], wanted, atol=1e-5)
    alone = [predictor(clip.video, clip.text) for clip in clips]
    np.testing.assert_allclose([probabilities(p) for p in alone], wanted, atol=1e-5)
    assert [sorted(p.modalities) for p in found] == [["text", "video"], ["text", "video"], ["text"], ["video"]]
    assert all(sum(p.weights.values()) == pytest.approx(1) for p in found)


@pytest.mark.parametrize("train", ["frozen", "full"])
def test_cutaways_are_dropped_in_evaluation_and_in_answers_alike(place, tmp_path, train):
    film = write_shots(tmp_path / "a.mp4", [0, 0, 1, 0, 0, 2])
    clips = [Clip("a", film), Clip("b", film, start=0.5, end=2.5), Clip("c", place / "dark.mp4")]
    found = {}
    for cutaways in ("keep", "drop"):
        torch.manual_seed(0)
        changes = {"vision.frames": 6, "vision.train": train, "vision.cutaways": cutaways}
        create_model(config(place, ["vision"], **changes)).save_pretrained(tmp_path / cutaways)
        predictor = Predictor(tmp_path / cutaways, "cpu")
        rows = clip_set(clips, predictor.model, tmp_path / "cache")
        found[cutaways] = outputs(predictor.model, rows).log_probs.exp().numpy()
        answers = [probabilities(p) for p in predictor.predict(clips)]
        np.testing.assert_allclose(answers, found[cutaways], atol=1e-5)
        assert predictor.batch(clips[:1]).modalities["vision"].mask.sum() == {"keep": 6, "drop": 4}[cutaways]
    differ = np.abs(found["keep"] - found["drop"]).max(1)
    assert differ[:2].min() > 1e-5
    assert differ[2] == 0


def test_a_modality_says_alone_what_the_model_says_when_given_no_other(place):
    predictor = load(place / "run", "cpu")
    both = predictor(place / "dark.mp4", "天气坏，难过")
    text, video = predictor(None, "天气坏，难过"), predictor(place / "dark.mp4")
    assert both.modalities["text"] == pytest.approx(text.probabilities, abs=1e-6)
    assert both.modalities["video"] == pytest.approx(video.probabilities, abs=1e-6)
    assert text.modalities == {"text": pytest.approx(text.probabilities, abs=1e-6)}


@pytest.mark.parametrize("model", ["clip_ca_msa", "mult"])
def test_sound_is_heard_as_in_training(place, tmp_path, model):
    predictor = load(place / model, "cpu")
    clips = [Clip("a", place / "low.wav", "好"), Clip("b", place / "high.wav", "天气很好"), Clip("c", None, "好")]
    rows = clip_set(clips, predictor.model, tmp_path / "cache", data=tmp_path)
    batch = predictor.batch(clips)
    for name, sequence in batch.modalities.items():
        values, mask = rows.stores[name].gather(np.arange(3))
        assert np.array_equal(sequence.mask.numpy(), mask), name
        np.testing.assert_allclose(sequence.values.numpy()[mask], values[mask], atol=1e-5)
    assert batch.modalities["audio"].mask.sum(1).tolist() == [1 + (RATE - 640) // 320] * 2 + [0]
    found, wanted = predictor.output(batch), outputs(predictor.model, rows)
    one, other = (o.score if o.score is not None else o.log_probs for o in (found, wanted))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    silent = predictor.output(predictor.batch([clip._replace(video=None) for clip in clips]))
    assert not torch.allclose(silent.score if silent.score is not None else silent.log_probs, one, atol=1e-4)


def test_a_piece_has_finite_times(place):
    with pytest.raises(UsageError, match=r"a segment from None to inf s"):
        load(place / "run")(place / "clip.mp4", end=float("inf"))


def test_times_are_any_numbers(place):
    predictor = load(place / "run")
    wanted = predictor(place / "dark.mp4", start=0.25, end=0.75)
    assert predictor(place / "dark.mp4", start=np.float32(0.25), end=torch.tensor(0.75)) == wanted


def test_only_the_piece_is_heard(place):
    predictor = load(place / "clip_ca_msa", "cpu")
    whole, piece, high = (
        probabilities(predictor(place / name, "好", *when))
        for name, when in (("two.wav", ()), ("two.wav", (1.0, 2.0)), ("high.wav", ()))
    )
    np.testing.assert_allclose(piece, high, atol=1e-3)
    assert not np.allclose(whole, high, atol=1e-3)


def test_a_video_without_sound_is_no_sound(place):
    predictor = load(place / "clip_ca_msa", "cpu")
    assert sorted(predictor(place / "dark.mp4", "好").modalities) == ["text"]
    np.testing.assert_allclose(
        probabilities(predictor(place / "dark.mp4", "好")), probabilities(predictor(None, "好")), atol=1e-6
    )


def test_sound_of_a_feature_file_is_not_looked_for_in_clips(place):
    assert hears(config(place, ["text", "audio"]))
    assert not hears(config(place, ["text", "audio"], **{"text.encoder": "features"}))
    assert not hears(config(place, ["text", "vision"]))


def test_nothing_to_read_is_said(place):
    with pytest.raises(UsageError, match="clip: nothing to read — this model reads text or video"):
        load(place / "run", "cpu")()
    with pytest.raises(UsageError, match="this model reads text or audio"):
        load(place / "mult", "cpu")()
    with pytest.raises(UsageError, match=r"dark\.mp4: nothing to read — this model reads text or audio"):
        load(place / "mult", "cpu")(place / "dark.mp4")  # it has no sound
    with pytest.raises(UserError, match=r"gone\.mp4"):
        load(place / "run", "cpu")(place / "gone.mp4")
    with pytest.raises(UsageError, match="precision"):
        load(place / "run", "cpu", "fp8")


def test_a_blank_text_is_none_and_half_a_character_is_one(place):
    predictor = load(place / "run", "cpu")
    video = place / "dark.mp4"
    without = predictor(video)
    assert predictor(video, " \n") == without
    assert list(predictor.predict([Clip("a", video, "  ")])) == [without]
    with pytest.raises(UsageError, match="nothing to read"):
        predictor(None, "  ")
    assert predictor(None, "天\udce5好") == predictor(None, "天?好")


def test_what_a_table_brings_is_no_silent_answer(place):
    predictor, video = load(place / "run", "cpu"), place / "dark.mp4"
    with pytest.raises(UsageError, match="b: nan is not a text — give a string or None"):  # pandas' empty cell
        list(predictor.predict([Clip("a", video, "好"), Clip("b", video, float("nan"))]))
    assert predictor("", "好") == predictor(None, "好")
    assert predictor.batch([Clip("a", "", "好")]).modalities["vision"].mask.sum() == 0  # what pandas reads as ""
    for clips, said in (
        ([Clip("b", float("nan"), "好")], "b: nan is not a path — give a path or None"),
        ([Clip("b", video, None, start="1")], "a segment from '1' to None s — give finite times"),
        ([str(video)], "dark.mp4': not a clip — give senticlip.structures.Clip"),
        ([], "batch: no clip given"),
    ):
        with pytest.raises(UsageError, match=said):
            predictor.batch(clips)
    with pytest.raises(UsageError, match="batch_size: 0"):
        list(predictor.predict([Clip("a", video, "好")], batch_size=0))


def test_what_is_imported_on_use_is_offered():
    assert {"load", "LABELS", "analyze", "bulk", "explain"} <= set(dir(senticlip))
    assert all(getattr(senticlip, name) for name in dir(senticlip))


def test_a_hub_ids_own_folder_is_read(place, monkeypatch):
    asked = []

    def fetch(name, key, advice):
        asked.append((name, key))
        return place / "run"

    monkeypatch.setattr("senticlip.encoders.hub.fetch", fetch)
    predictor = Predictor("someone/run", "cpu")
    assert asked == [("someone/run", "RUN")]
    assert predictor.run == place / "run"
    assert predictor(None, "好") == load(place / "run", "cpu")(None, "好")
