"""Explanation pages of a clip and of a split; occlusion compared with the predictor; attention over real positions."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tests.data.test_cutaways import write_shots
from tests.data.test_video import write
from tests.test_export import add_sound
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import senticlip
import tiny
from senticlip import cam
from senticlip import explain_set as explaining
from senticlip.config import from_dict
from senticlip.explain import Explanation, _heat_maps, explain, explanation, heated, html, inline, sentences
from senticlip.explain_set import ClipAnswers, _kinds, _summary, _truth_score, explain_set, kind
from senticlip.models import create_model
from senticlip.occlusion import (
    Case,
    alone,
    characters,
    cross_attention,
    occlude,
    prediction_distance,
    support,
    unread_text,
)
from senticlip.predictor import Predictor
from senticlip.structures import LABELS, Batch, Clip, Output, Prediction, Sequence, UsageError, UserError

TEXT = "天气好，很高兴"
M = 3


def run_folder(folder, vision, **changes):
    """A RUN with random weights."""
    config = from_dict(
        {
            "text": {"encoder": str(tiny.text_folder(folder / "text")), "max_length": 16, "prefix_length": 2},
            "vision": {"encoder": str(vision), "frames": M, "size": 32},
            "width": 16,
            "heads": 2,
            **changes,
        }
    )
    torch.manual_seed(4)
    model = create_model(config, {"audio": config.audio.bands})
    tiny.perturb(model.network, 6)
    model.save_pretrained(folder / "run")
    tiny.tokenizer().save_pretrained(folder / "run" / "tokenizer")
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return run_folder(folder, tiny.clip_folder(folder / "clip"))


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return tiny.write_clip(tmp_path_factory.mktemp("video") / "片 段.mp4", 120, 1)


def test_occlusion_matches_predictor_on_remaining_parts(run, video):
    predictor = Predictor(run)
    batch = predictor.batch([Clip("", video, TEXT)])
    cases = occlude(predictor, batch, TEXT)
    assert [case.kind for case in cases] == ["everything", "text", "video", *["frame"] * M, *["character"] * len(TEXT)]
    expected_predictions = {
        ("everything", 0): predictor(video, TEXT),
        ("text", 0): predictor(video),
        ("video", 0): predictor(None, TEXT),
        **{("character", i): predictor(video, TEXT[:i] + TEXT[i + 1 :]) for i in range(len(TEXT))},
    }
    pixels, mask = batch.modalities["vision"]
    for i in range(M):
        remaining = mask.clone()
        remaining[0, i] = False
        # the removed frame must not be read either
        pixels_without = pixels.masked_fill(~remaining[..., None, None, None], 255)
        reduced = Batch({**batch.modalities, "vision": Sequence(pixels_without, remaining)}, {})
        expected_predictions["frame", i] = predictor.predictions(predictor.output(reduced))[0]
    assert len(expected_predictions) == len(cases)
    for case in cases:
        for name in LABELS:
            expected = expected_predictions[case.kind, case.place].probabilities[name]
            assert case.prediction.probabilities[name] == pytest.approx(expected, abs=1e-5)
    assert len({round(case.prediction.probabilities["positive"], 6) for case in cases}) > 3
    unimodal = alone(predictor, predictor.model.encode(batch))
    for name, case in (("text", cases[2]), ("video", cases[1])):
        assert unimodal[name].probabilities == pytest.approx(case.prediction.probabilities, abs=1e-6)


def test_padding_does_not_change_occlusion(run, video):
    """In ``explain_set`` a clip comes from a batch, padded to the longest."""
    predictor = Predictor(run)
    unpadded = predictor.batch([Clip("", video, TEXT)])
    both = predictor.batch([Clip("", video, TEXT), Clip("", video, TEXT + "一二三")])
    padded = Batch({name: Sequence(part.values[:1], part.mask[:1]) for name, part in both.modalities.items()}, {})
    assert not padded.modalities["text"].mask.all()
    for one, two in zip(occlude(predictor, unpadded, TEXT), occlude(predictor, padded, TEXT), strict=True):
        assert one[:3] == two[:3]
        assert one.prediction.probabilities == pytest.approx(two.prediction.probabilities, abs=1e-5)


def test_change_between_predictions():
    def prediction(*probabilities, score=None):
        return Prediction("", dict(zip(LABELS, probabilities, strict=True)), {}, {}, score)

    assert prediction_distance(prediction(0.2, 0.3, 0.5), prediction(0.5, 0.3, 0.2)) == pytest.approx(0.3)
    assert prediction_distance(prediction(1, 0, 0), prediction(0, 0, 1)) == 1
    assert prediction_distance(prediction(1, 0, 0, score=-0.7), prediction(0, 0, 1, score=0.5)) == pytest.approx(0.6)
    assert prediction_distance(prediction(1, 0, 0, score=-1.4), prediction(0, 0, 1, score=2.5)) == 1


def test_occlusion_never_removes_the_whole_input(run, video):
    predictor = Predictor(run)
    kinds = [case.kind for case in occlude(predictor, predictor.batch([Clip("", video)]), None)]
    assert kinds == ["everything", *["frame"] * M]
    kinds = [case.kind for case in occlude(predictor, predictor.batch([Clip("", None, "好 ")]), "好 ")]
    assert kinds == ["everything"]
    *_, last_case = occlude(predictor, predictor.batch([Clip("", video, "好 ")]), "好 ")
    assert last_case[:3] == ("character", 0, "好")
    assert last_case.prediction.probabilities == pytest.approx(predictor(video).probabilities, abs=1e-5)


def test_attention_rows_sum_to_one_over_real_positions(run, video):
    predictor = Predictor(run)
    clips = [Clip("", video, TEXT), Clip("", video, TEXT + "一二三四五")]  # the first one is padded
    batch = predictor.batch(clips)
    vision = batch.modalities["vision"]
    mask = vision.mask.clone()
    mask[0, 1] = False
    first = Batch({n: Sequence(s.values[:1], s.mask[:1]) for n, s in batch.modalities.items()}, {})
    first.modalities["vision"] = Sequence(vision.values[:1], mask[:1])
    with torch.no_grad():
        features = predictor.model.encode(first)
        maps = cross_attention(predictor.model.fuse(features, attention=True), features)
    words, frames = len(TEXT) + 2, 1 + M - 1  # with [CLS] and [SEP]; the clip state and the unmasked frames
    assert maps["text_asks_vision"].shape == (words, frames)
    assert maps["vision_asks_text"].shape == (frames, words)
    for weights in maps.values():
        assert torch.allclose(weights.sum(1), torch.ones(len(weights)), atol=1e-5)


def test_dropped_cutaway_is_not_shown(run, tmp_path):
    film = write_shots(tmp_path / "a.mp4", [0, 1, 0])
    predictor = Predictor(run)
    predictor.config.vision.cutaways = "drop"
    result = explanation(predictor, Clip("", film, TEXT))
    assert result.times == pytest.approx([0.2, 1.2])
    assert len(result.pictures) == len(result.maps) == 2
    assert [case.place for case in result.cases if case.kind == "frame"] == [0, 1]
    page = Path(explain(predictor, film, TEXT, tmp_path / "drop")["html"]).read_text(encoding="utf-8")
    predictor.config.vision.cutaways = "keep"
    full_page = Path(explain(predictor, film, TEXT, tmp_path / "keep")["html"]).read_text(encoding="utf-8")
    assert ("only the frames of the main shot" in page, "only the frames of the main shot" in full_page) == (
        True,
        False,
    )


def check_page(result, folder, text):
    page = (folder / "explain.html").read_text(encoding="utf-8")
    assert result["html"] == str(folder / "explain.html")
    assert all(source.startswith("data:image/") for source in re.findall(r'src="(.*?)"', page))
    page = re.sub(r'src="data:.*?"', "", page)
    assert "http" not in page
    assert "<script" not in page
    assert "NaN" not in page
    assert text in page
    return page


@pytest.mark.parametrize("read", ["text", "vision"])
def test_modality_from_feature_file_is_not_explained(video, tmp_path, read):
    run_folder(tmp_path, tiny.clip_folder(tmp_path / "clip"))
    encoders = {"text": tmp_path / "text", "vision": tmp_path / "clip"}
    encoder_settings = {f"{name}.encoder": str(encoders[name]) if name == read else "features" for name in encoders}
    sizes = {"text.max_length": 16, "vision.size": 32}
    config = from_dict({"width": 16, "heads": 2, "head": "linear"}).override({**sizes, **encoder_settings})
    model = create_model(config, {name: 5 for name in encoders if name != read})
    model.save_pretrained(tmp_path / "half")
    if read == "text":
        tiny.tokenizer().save_pretrained(tmp_path / "half" / "tokenizer")
    page = check_page(senticlip.explain(tmp_path / "half", video, "好", tmp_path / "out"), tmp_path / "out", "好")
    assert ("模型不读文本" in page) == (read == "vision")


def test_page_is_self_contained(run, video, tmp_path):
    text = "天气好，<script>很高兴"
    result = senticlip.explain(run, video, text, tmp_path / "out")
    page = check_page(result, tmp_path / "out", "天气好，&lt;script&gt;很高兴")
    assert [name.rsplit("/", 1)[1] for name in result["frames"]] == [f"frame-{i + 1}.png" for i in range(M)]
    assert all(Path(name).read_bytes().startswith(b"\x89PNG") for name in result["frames"])
    assert "ablation-cam" in page
    assert "每个字看了哪一帧" in page
    assert "每一帧看了哪些字" in page
    prediction = Predictor(run)(video, text)
    assert f"Why {prediction.label}?" in page
    assert f"{prediction.probabilities[prediction.label]:.2f}" in page
    for method in ("grad-cam", "rollout"):
        assert method in page_for_method(run, video, tmp_path / method, method)
    # no frame of the previous page remains
    assert explain(run, None, TEXT, tmp_path / "out")["frames"] == []
    assert not list((tmp_path / "out").glob("*.png"))


def page_for_method(run, video, out, method):
    explain(run, video, TEXT, out, method)
    return (out / "explain.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "changes",
    [
        {"head": "linear", "temporal": "mean"},
        {"fusion": "concat", "temporal": "lstm"},
        {"model": "tfn"},
        {"model": "mult"},
        {"model": "mmaf", "target": "M"},
        {"modalities": ["vision"]},
        {"modalities": ["text"]},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_all_model_variants_are_explained(tmp_path, video, changes):
    run = run_folder(tmp_path, tiny.timm_folder(tmp_path / "cnn", "test_resnet"), **changes)
    predictor = Predictor(run)
    explained = explanation(predictor, Clip("", video, TEXT))
    result = explain(predictor, video, TEXT, tmp_path / "out")
    check_page(result, tmp_path / "out", TEXT)
    modalities = predictor.config.modalities
    assert (explained.maps is not None) == ("vision" in modalities)
    page = (tmp_path / "out" / "explain.html").read_text(encoding="utf-8")
    assert ("模型不读文本" in page) == ("text" not in modalities)
    assert len(result["frames"]) == (M if "vision" in modalities else 0)
    assert {"text", "video"} <= {case.kind for case in explained.cases} or len(modalities) == 1
    answer = predictor(video, TEXT)
    assert explained.prediction.label == answer.label
    assert explained.prediction.probabilities == pytest.approx(answer.probabilities, abs=1e-5)
    assert explained.prediction.score == (answer.score and pytest.approx(answer.score, abs=1e-5))


@pytest.mark.parametrize("score", [-0.7, 0.05, 0.4])
def test_characters_and_heat_maps_explain_the_same_value(score):
    values = [support(Prediction("", {}, {}, {}, score), label) for label in LABELS]
    expected = cam.log_odds(None, Output(score=torch.tensor([score], dtype=torch.float64)))[0]
    assert values == pytest.approx(expected.tolist())


def test_too_long_or_blank_text(run, video):
    predictor = Predictor(run)
    max_length = predictor.config.text.max_length
    too_long = explanation(predictor, Clip("", None, "好" * max_length + "坏"))
    assert too_long.unread == "好好坏"  # [CLS] and [SEP] are tokens, too
    assert "好好坏</span>" in html(too_long, [])
    assert unread_text(predictor, "天\udce5好") == ""  # text that is not valid UTF-8
    assert unread_text(predictor, "好❤\ufe0f") == ""  # the last character is no token
    blank = explanation(predictor, Clip("", video, "  "))
    both = explanation(predictor, Clip("", video, "好"))
    assert ["各模态的判断" in html(item, heated(item)) for item in (both, blank)] == [True, False]
    assert (blank.text, blank.unread) == (None, "")
    assert blank.prediction.probabilities == pytest.approx(predictor(video).probabilities, abs=1e-6)


def test_sentences_describe_conflict_in_both_languages():
    def prediction(label, p=0.8):
        rest = (1 - p) / 2
        return Prediction(label, {name: p if name == label else rest for name in LABELS}, {}, {})

    cases = [
        Case("everything", 0, "", prediction("negative")),
        Case("text", 0, "", prediction("negative")),
        Case("video", 0, "", prediction("positive")),
        Case("frame", 1, "2", prediction("neutral")),
    ]
    unimodal = {"text": prediction("positive"), "video": prediction("negative")}
    explained = Explanation("", "好", cases[0].prediction, cases, unimodal, None, [], [], None, "")
    chinese, english = map(" ".join, zip(*sentences(explained), strict=True))
    assert "文本与视频不一致：只看文本是积极，只看视频是消极；模型采信了视频，可能是反话。" in chinese
    assert "the words alone are positive, the picture alone is negative; the model follows the picture" in english
    assert "irony" in english
    assert "去掉视频，预测会变为积极。" in chinese
    assert "去掉文本" not in chinese
    assert chinese.endswith("只去掉第 2 帧，预测也会改变。")
    assert english.endswith("Leaving out frame 2 alone also changes the answer.")
    small_cases = [cases[0], cases[3], Case("character", 0, "好", prediction("neutral"))]
    assert sentences(explained._replace(cases=small_cases))[-1] == (
        "只去掉第 2 帧或“好”，预测就会改变。",
        "Leaving out frame 2 or “好” alone changes the answer.",
    )
    explained = explained._replace(alone={"text": prediction("negative"), "video": prediction("negative")})
    assert sentences(explained)[0][1] == "Words and picture agree: both are negative."
    explained = explained._replace(alone={**unimodal, "audio": prediction("negative")})
    assert sentences(explained)[0] == (
        "文本、视频与音频不一致：只看文本是积极，只看视频是消极，只听音频是消极；模型采信了视频与音频，可能是反话。",
        "Words, picture and sound disagree: the words alone are positive, the picture alone is negative, "
        "the sound alone is negative; the model follows the picture and sound. This may be irony.",
    )
    explained = explained._replace(alone={**explained.alone, "text": prediction("negative")})
    assert sentences(explained)[0] == (
        "文本、视频与音频一致，都是消极。",
        "Words, picture and sound agree: all are negative.",
    )


def test_character_has_the_same_number_throughout_the_page():
    def prediction(p):
        return Prediction("negative", {"negative": p, "neutral": 1 - p, "positive": 0.0}, {}, {})

    cases = [
        Case("everything", 0, "", prediction(0.9)),
        Case("character", 0, "差", prediction(0.3)),
        Case("character", 1, "不", prediction(1)),
    ]
    page = html(Explanation("", "差不", cases[0].prediction, cases, {}, None, [], [], None, ""), [])
    assert (page.count("−0.600"), page.count("+0.100")) == (2, 2)  # both below the character and in the table
    assert re.findall(r"rgba\(var\(--(\w+)\),[\d.]+\)\">(.)<small>", page) == [("for", "差"), ("against", "不")]


def test_displayed_numbers_add_up():
    def prediction(score):
        return Prediction("positive", {}, {}, {}, score)

    scores = [0.1376, 0.13749, 0.1372, -0.0001, -0.0463]
    cases = [Case("frame" if i else "everything", i, str(i), prediction(score)) for i, score in enumerate(scores)]
    page = html(Explanation("", None, cases[0].prediction, cases, {}, None, [], [], None, ""), [])
    rows = re.findall(r'<td class="n">([^<]*)</td>', page)
    shown = ["0.138", "", "0.137", "−0.001", "0.137", "−0.001", "0.000", "−0.138", "−0.046", "−0.184"]
    assert rows == shown


@pytest.mark.parametrize(
    ("label", "score", "shown_score", "definition"),
    [
        ("negative", -1.4, "−1.00", "支持 = −分数。 Support is −score."),
        ("neutral", 0.04, "+0.04", "支持 = −|分数|。 Support is −|score|."),
        ("positive", 1.4, "+1.00", "支持 = 分数。 Support is score."),
    ],
)
def test_score_is_clipped_and_support_is_defined(label, score, shown_score, definition):
    answer = Prediction(label, {}, {}, {}, score)
    cases = [Case("everything", 0, "", answer), Case("text", 0, "", Prediction("neutral", {}, {}, {}, 0.0))]
    page = html(Explanation("", None, answer, cases, {}, None, [], [], None, ""), [])
    assert f"分数 score {shown_score}（−1 … 1）" in page
    assert definition in page
    assert '<th class="n">支持<span class="wide"> support</span></th>' in page
    support = {"negative": "1.000", "neutral": "−0.040", "positive": "1.000"}[label]
    assert re.findall(r'<td class="n">([^<]*)</td>', page)[0] == support


@pytest.mark.parametrize(("without", "noted"), [(0.805, True), (0.82, False)])
def test_page_notes_that_the_video_hardly_matters(without, noted):
    def prediction(p):
        return Prediction("negative", {"negative": p, "neutral": 1 - p, "positive": 0.0}, {}, {})

    cases = [
        Case("everything", 0, "", prediction(0.8)),
        Case("text", 0, "", prediction(0.8)),
        Case("video", 0, "", prediction(without)),
    ]
    pictures = [Image.new("RGB", (4, 4))]
    explained = Explanation(
        "", "好", prediction(0.8), cases, {}, None, [0.5], pictures, torch.ones(1, 2, 2).numpy(), "grad-cam"
    )
    assert ("画面几乎不影响预测" in html(explained, heated(explained))) == noted


def test_characters_are_spans_of_the_text():
    tokenizer = tiny.tokenizer()
    text = " 好 Q天"  # Q is unknown; spaces have no token
    spans = characters(tokenizer, text, 16)
    assert [text[c.start : c.end] for c in spans] == ["好", "Q", "天"]
    assert [c.token for c in spans] == list(range(1, 1 + len(spans)))
    assert len(characters(tokenizer, TEXT, 5)) == 3
    assert characters(tokenizer, None, 5) == characters(tokenizer, "", 5) == []


def test_sentencepiece_word_mark_is_not_a_character():
    pieces = ["<unk>", "<pad>", "▁", "感动", "▁好", "的", "天", "…"]
    model = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], 0, False))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", pad_token="<pad>")
    for text, tokens, expected, indices in (
        ("感动的", ["▁", "感动", "的"], ["感动", "的"], [1, 2]),
        ("天 好", ["▁", "天", "▁好"], ["天", " 好"], [1, 2]),
        ("好的", ["▁好", "的"], ["好", "的"], [0, 1]),
    ):
        assert tokenizer.tokenize(text) == tokens
        spans = characters(tokenizer, text, 16)
        assert ([text[c.start : c.end] for c in spans], [c.token for c in spans]) == (expected, indices)


def test_token_for_part_of_a_character_is_skipped():
    class Parts:
        def __call__(self, text, **_):
            return {"input_ids": [0, 1, 2, 3], "offset_mapping": [(0, 1), (0, 2), (1, 2), (2, 3)]}

        def convert_ids_to_tokens(self, ids):
            return ["a", "ab", "b", "c"]

    assert characters(Parts(), "好的。", 16) == [(1, 0, 2), (3, 2, 3)]


def test_explain_set_of_a_split(run, tmp_path):
    data = tiny.data_folder(tmp_path / "data", (3, 3, 6))
    result = explain_set(run, data, tmp_path / "out", "test", 2)
    predictor, rows = Predictor(run), []
    for line in (data / "label.csv").read_text(encoding="utf-8").splitlines()[1:]:
        video, clip, text, score, *_, split = line.split(",")
        if split == "test":
            answer = predictor(data / "Raw" / video / f"{clip}.mp4", text)
            rows.append((answer, LABELS[int(score) + 1]))
    right = sum(answer.label == truth for answer, truth in rows)
    assert result["n"] == 6
    assert result["accuracy"] == pytest.approx(right / 6)
    assert result["by"] == "labels"
    assert {name: part["n"] for name, part in result["kinds"].items()} == {"agree": 4, "neutral": 2}
    assert sum(part["share"] for part in result["modalities"].values()) == pytest.approx(1)
    assert len(result["worst"]) == min(2, 6 - right)
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "http" not in re.sub(r'src="data:.*?"', "", page)
    for link in re.findall(r'href="(.*?)"', page):
        assert (tmp_path / "out" / link).is_file()
    assert json.dumps(result)
    (tmp_path / "out" / "worst-07").mkdir()
    (tmp_path / "out" / "worst-07" / "explain.html").write_text("of an earlier report")
    (tmp_path / "out" / "worst-08").mkdir()
    (tmp_path / "out" / "worst-08" / "notes.txt").write_text("somebody's own")
    explain_set(run, data, tmp_path / "out", "test", 0)
    assert [path.name for path in (tmp_path / "out").glob("worst-*")] == ["worst-08"]


@pytest.mark.parametrize(
    ("model", "terms"), [("mult", ["两个分数之差的一半"]), ("clip_ca_msa", ["总变差", "融合权重"])]
)
def test_set_page_names_the_distance_used(tmp_path, model, terms):
    run = run_folder(tmp_path, tiny.timm_folder(tmp_path / "cnn", "test_resnet"), model=model, head="linear")
    explain_set(run, tiny.data_folder(tmp_path / "data", (0, 0, 3)), tmp_path / "out", worst=0)
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert [term for term in ("两个分数之差的一半", "总变差", "融合权重") if term in page] == terms


def test_clip_without_readable_input_is_listed_without_page(tmp_path, video):
    run = run_folder(tmp_path, tiny.timm_folder(tmp_path / "cnn"), modalities=["text"], head="linear")
    lines = [f"{video},{text},{label},test" for text in ("", TEXT) for label in (-1, 0, 1)]
    (tmp_path / "own.csv").write_text("\n".join(["path,text,label,split", *lines]), encoding="utf-8")
    result = explain_set(run, tmp_path / "own.csv", tmp_path / "out")
    # all three clips with text get the same answer, right for one of them
    assert (result["n"], result["single"], len(result["worst"])) == (6, 6, 2)
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert (page.count("应为 should be"), page.count("为什么 why?")) == (4, 2)


def test_mean_weights_exclude_unimodal_clips():
    def prediction(**weights):
        return Prediction("neutral", dict.fromkeys(LABELS, 1 / 3), {}, weights)

    def row(**weights):
        others = dict.fromkeys(weights, prediction()) if len(weights) > 1 else {}
        return ClipAnswers(Clip(""), 0.0, prediction(**weights), others, others)

    rows = [row(text=0.5, video=0.3, audio=0.2), row(text=0.4, video=0.6), row(text=1.0)]
    summary = _summary(rows, [""] * len(rows))
    weights = {name: part["weight"] for name, part in summary["modalities"].items()}
    assert weights == pytest.approx({"text": 0.45, "video": 0.45, "audio": 0.1})
    assert summary["single"] == 1


def test_explain_set_of_a_model_with_audio(tmp_path):
    vision = tiny.clip_folder(tmp_path / "clip")
    run = run_folder(tmp_path, vision, modalities=["text", "vision", "audio"], head="linear")
    data, rows = tiny.data_folder(tmp_path / "data", (0, 0, 6)), ["path,text,label,split"]
    for i, video in enumerate(sorted(data.glob("Raw/*/*.mp4"))):
        loud = add_sound(video, tmp_path / video.name, 0.5) if i else video  # the first one is silent
        rows.append(f"{loud},{TEXT},{i % 3 - 1},test")
    (tmp_path / "own.csv").write_text("\n".join(rows), encoding="utf-8")
    result = explain_set(run, tmp_path / "own.csv", tmp_path / "out", worst=6)
    predictor, kinds = Predictor(run), []
    for line in rows[1:]:
        clip, text = line.split(",")[:2]
        unimodal = predictor(clip, text).modalities
        kinds.append(
            kind(*(list(unimodal[name].values()).index(max(unimodal[name].values())) for name in ("text", "video")))
        )
    assert result["by"] == "model"
    assert {name: part["n"] for name, part in result["kinds"].items()} == {name: kinds.count(name) for name in kinds}
    assert set(result["modalities"]) == {"text", "video", "audio"}
    assert len(result["worst"]) == round(6 * (1 - result["accuracy"])) > 0
    assert all(Path(page).is_file() for page in result["worst"])


def test_worst_scores_are_farthest_from_the_target_label():
    def row(score, **labels):
        return ClipAnswers(Clip("", labels=labels), labels["T"], Prediction("neutral", {}, {}, {}, score), {}, {})

    rows = [row(0.0, M=1.0, T=0.2), row(0.0, M=0.0, T=-0.8), row(0.4, M=0.4, T=0.0), row(1.9, T=0.9)]
    assert sorted(rows, key=_truth_score) == [rows[1], rows[2], rows[0], rows[3]]  # 1.9 is shown, and counts, as 1
    assert [answered.truth for answered in rows] == [2, 0, 1, 2]


def test_kind():
    assert [kind(*pair) for pair in ((0, 0), (0, 2), (0, 1), (1, 2), (1, 1))] == [
        "agree",
        "conflict",
        "text only",
        "video only",
        "neutral",
    ]


def test_very_wide_frame_is_downscaled(run, tmp_path):
    flat = write(tmp_path / "a.mp4", stamps=[0, 1], size=(8000, 20))
    for name in explain(run, flat, TEXT, tmp_path / "out")["frames"]:
        assert Image.open(name).size == (1024, 3)


def test_invalid_input_is_rejected(run, video, tmp_path):
    with pytest.raises(UsageError, match="nothing to read"):
        explain(run, None, None, tmp_path / "out")
    with pytest.raises(UserError, match=r"nowhere\.mp4"):
        explain(run, tmp_path / "nowhere.mp4", TEXT, tmp_path / "out")
    with pytest.raises(UsageError, match=r"--method x: unknown — choose one of ablation-cam, grad-cam, rollout"):
        explain(run, video, TEXT, tmp_path / "out", method="x")
    with pytest.raises(UsageError, match=r"--method rollout: heat maps need a video, and none was given"):
        explain(run, None, TEXT, tmp_path / "out", method="rollout")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot create this folder"):
        explain(run, None, TEXT, tmp_path / "file")
    with pytest.raises(UsageError, match="--worst"):
        explain_set(run, tmp_path, tmp_path / "out", worst=-1)


def test_command_line(run, video, tmp_path):
    command = [sys.executable, "-m", "senticlip", "explain", str(run), str(video), "--text", TEXT, "--json"]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) == {"html", "frames"}
    check_page(result, tmp_path / "out", TEXT)
    done = subprocess.run([*command, "--out", "x", "--data", "y"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_only_frames_of_an_earlier_page_are_removed(run, video, tmp_path):
    own_files = [tmp_path / "out" / name for name in ("frame-0099.png", "frame-front.png", "frame-77.png")]
    own_files[0].parent.mkdir()
    for path in own_files:
        path.write_bytes(b"mine")
    explain(run, video, TEXT, tmp_path / "out")
    assert all(path.read_bytes() == b"mine" for path in own_files)
    explain(run, None, TEXT, tmp_path / "out")
    remaining = {path.name for path in own_files[0].parent.glob("*.png")}
    # a page existed by then, so frame-77 may have been its frame
    assert remaining == {"frame-0099.png", "frame-front.png"}


def test_split_summary_by_hand():
    def prediction(*probabilities):
        return Prediction(LABELS[int(np.argmax(probabilities))], dict(zip(LABELS, probabilities, strict=True)), {}, {})

    first = {"text": prediction(0.5, 0.3, 0.2), "video": prediction(0.2, 0.2, 0.6)}
    second = {"text": prediction(0.1, 0.2, 0.7), "video": prediction(0.1, 0.4, 0.5)}
    rows = [
        ClipAnswers(Clip("a", labels={"T": -1.0, "V": 0.0}), -1.0, prediction(0.2, 0.3, 0.5), first, {}),
        ClipAnswers(Clip("b", labels={"T": 0.0, "V": 0.4}), 1.0, prediction(0.1, 0.2, 0.7), second, {}),
    ]
    by, kinds = _kinds(rows)
    assert (by, kinds) == ("labels", ["text only", "video only"])
    summary = _summary(rows, ["agree", "agree"])
    assert summary["kinds"]["agree"]["confusion"] == [[0, 0, 1], [0, 0, 0], [0, 0, 1]]  # rows are the truth
    text, video = summary["modalities"]["text"], summary["modalities"]["video"]
    assert (text["change"], text["flips"]) == (pytest.approx((0.3 + 0) / 2), 1 / 2)
    assert (video["change"], video["flips"]) == (pytest.approx((0.1 + 0.2) / 2), 0)
    assert text["share"] == pytest.approx(0.15 / 0.3)


def test_worst_errors_come_first(tmp_path, monkeypatch):
    listed = []
    monkeypatch.setattr(
        explaining,
        "_write_error_page",
        lambda predictor, row, *rest: (
            listed.append(row) or explaining.Worst(row.clip, LABELS[row.truth], row.whole, "", None, None)
        ),
    )
    run = run_folder(tmp_path, tiny.timm_folder(tmp_path / "cnn"), head="linear")
    data = tiny.data_folder(tmp_path / "data", (0, 0, 9))
    explaining.explain_set(run, data, tmp_path / "out", worst=99)
    chances = [row.whole.probabilities[LABELS[row.truth]] for row in listed]
    assert len(chances) > 2
    assert chances == sorted(chances)


def test_cross_attention_averages_heads():
    maps = torch.rand(1, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    modalities = {
        name: Sequence(torch.zeros(1, n, 8), torch.ones(1, n, dtype=torch.bool))
        for name, n in (("text", 2), ("vision", 4))
    }
    attention = cross_attention(Output({}, attention={"text_asks_vision": maps}), Batch(modalities, {}))
    torch.testing.assert_close(attention["text_asks_vision"], maps[0].mean(0))


def test_heat_maps_share_one_scale(monkeypatch):
    maps = torch.tensor([[[1.0, 2.0]], [[4.0, 0.0]]])
    monkeypatch.setattr(cam, "methods_for", lambda model: ["grad-cam"])
    monkeypatch.setitem(cam.METHODS, "grad-cam", lambda model, batch, index: maps)
    answer = Prediction("positive", {}, {}, {})
    scaled, name = _heat_maps(SimpleNamespace(model=None), None, answer, None)
    assert (scaled.tolist(), name) == ([[[0.25, 0.5]], [[1.0, 0.0]]], "grad-cam")


def test_frame_is_shown_plain_and_with_heat_map():
    plain, heat = (Image.new("RGB", (8, 8), color) for color in ("blue", "red"))
    answer = Prediction("positive", dict.fromkeys(LABELS, 1 / 3), {}, {})
    cases = [Case("everything", 0, "", answer)]
    explained = Explanation("a.mp4", None, answer, cases, {}, None, [0.5], [plain], np.ones((1, 2, 2)), "grad-cam")
    assert re.findall(r'<img [^>]*src="(data:[^"]+)"', html(explained, [heat])) == [inline(plain), inline(heat)]


def test_requested_method_is_used_for_every_page(tmp_path, monkeypatch):
    methods = []
    run = run_folder(tmp_path, tiny.timm_folder(tmp_path / "cnn"), head="linear")
    data = tiny.data_folder(tmp_path / "data", (0, 0, 9))
    monkeypatch.setattr(explaining, "explanation", lambda predictor, clip, method: methods.append(method))
    monkeypatch.setattr(explaining, "write", lambda found, out: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        explain_set(run, data, tmp_path / "out", method="grad-cam")
    assert methods == ["grad-cam"]
