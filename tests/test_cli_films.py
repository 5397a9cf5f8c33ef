"""analyze, bulk, explain --data and --precision at the command line: keys, files, exit codes."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from tests.fakes import write_film
from tests.tiny import data_folder, text_folder, timm_folder

import senticlip
from senticlip import answers, cli
from senticlip.config import Config
from senticlip.models import create_model

SRT = "1\n00:00:00,100 --> 00:00:00,900\n天气好\n\n2\n00:00:01,100 --> 00:00:01,900\n难过\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A data set, a film with subtitles, and a run of random weights."""
    root = tmp_path_factory.mktemp("films")
    data_folder(root / "data", (3, 3, 6))
    write_film(root / "film.mp4", ["positive", "negative"])
    (root / "film.srt").write_text(SRT, encoding="utf-8")
    names = {"text.encoder": str(text_folder(root / "t")), "vision.encoder": str(timm_folder(root / "v"))}
    sizes = {"width": 16, "heads": 2, "text.max_length": 20, "vision.frames": 2, "vision.size": 32, "head": "linear"}
    torch.manual_seed(0)
    create_model(Config().override({**names, **sizes})).save_pretrained(root / "run")
    return root


@pytest.fixture
def say(capsys, place):
    """``senticlip VERB RUN …`` → exit code, the object of --json (else stdout), stderr."""

    def run(verb, *arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main([verb, str(place / "run"), *map(str, arguments), "--device", "cpu"])
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("senticlip: ")]
        assert len(lines) == (end.value.code != 0)
        return end.value.code, json.loads(out.splitlines()[-1]) if out and "--json" in arguments else out, err

    return run


def test_analyze(place, say, tmp_path):
    film = (place / "film.mp4", "--out", tmp_path / "out", "--json")
    code, found, _ = say("analyze", *film, "--subtitles", place / "film.srt")
    assert (code, set(found), found["segments"]) == (0, {"segments", "failed", "seconds", "html"}, 2)
    assert found["failed"] == 0
    assert found["html"] == str(tmp_path / "out" / "timeline.html")
    rows = pq.read_table(tmp_path / "out" / "timeline.parquet").to_pylist()
    predictor = senticlip.load(place / "run", "cpu")
    for row, text in zip(rows, ("天气好", "难过"), strict=True):
        expected = answers.record(predictor(place / "film.mp4", text, row["start"], row["end"]))
        assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-5)

    assert say("analyze", place / "film.mp4", "--out", tmp_path / "w", "--seconds", "0.5", "--json")[1]["segments"] == 4
    for wrong, code, told in (
        (("--shift", "nan"), 2, "--shift nan"),
        (("--seconds", "1e-9"), 2, "--seconds 1e-09"),
        (("--cut", "scenes"), 2, "choose windows or shots"),
        (("--subtitles", place / "none.srt"), 2, "no such subtitle file"),
        (("--subtitles", place / "film.srt", "--shift", "99"), 1, "after the end"),
        (("--precision", "fp8"), 2, "fp32, bf16, int8"),
    ):
        found = say("analyze", *film, *wrong)
        assert (found[0], told in found[2]) == (code, True), found
    (place / "no.mp4").write_text("no film")
    assert say("analyze", place / "no.mp4", "--out", tmp_path / "out")[0] == 1


def test_lines_without_an_answer_are_told(place, say, tmp_path, monkeypatch):
    """A timeline with gaps must not look whole to who reads the last line only."""
    rows = [{"error": None}, {"error": "line 2: broken"}, {"error": "line 3: broken"}]
    monkeypatch.setattr("senticlip.analyze.analyze", lambda *_, **__: iter(rows))
    code, found, err = say("analyze", place / "film.mp4", "--out", tmp_path, "--json")
    assert (code, found["segments"], found["failed"]) == (0, 3, 2)
    assert "2 have no answer (see the column error), the first: line 2: broken" in err


def test_bulk(place, say, tmp_path):
    rows = [{"id": "a", "path": "film.mp4"}, {"id": "b", "path": "none.mp4"}, {"id": "c", "text": "好"}, {"id": "d"}]
    manifest = place / "manifest.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    archive = (manifest, "--out", tmp_path / "out", "--workers", 1, "--json")
    for _ in range(2):  # the second time everything is there
        code, found, err = say("bulk", *archive)
        assert "2 done, 2 failed" in err
        assert "--retry tries them again; see the column error, the first: " in err
        assert "none.mp4: no such video" in err
        assert (code, set(found)) == (0, {"done", "failed", "seconds"})
        assert (found["done"], found["failed"]) == (2, 2)
    told = {row["id"]: row["error"] for row in pq.read_table(tmp_path / "out" / "part-000000.parquet").to_pylist()}
    assert told["a"] is told["c"] is None
    assert "none.mp4: no such video" in told["b"]
    assert "manifest.jsonl, row 4: neither path nor text" in told["d"]

    code, _, err = say("bulk", *archive, "--precision", "bf16")
    assert (code, "a different precision" in err) == (1, True)
    assert say("bulk", place / "none.csv", "--out", tmp_path / "new")[0] == 2
    (place / "bad.csv").write_text("url\nx\n")
    assert say("bulk", place / "bad.csv", "--out", tmp_path / "new")[0] == 1
    assert say("bulk", manifest, "--out", tmp_path / "new", "--workers", 0)[0] == 2


def test_bulk_and_analyze_show_who_watches_how_far_they_are(place, say, tmp_path, terminal):
    (tmp_path / "manifest.jsonl").write_text('{"text": "好"}', encoding="utf-8")
    assert say("bulk", tmp_path / "manifest.jsonl", "--out", tmp_path / "out", "--workers", 1)[0] == 0
    assert "rows" in terminal.getvalue()
    assert "1/1" in terminal.getvalue()
    film = (place / "film.mp4", "--subtitles", place / "film.srt", "--out", tmp_path / "film")
    assert say("analyze", *film)[0] == 0
    assert "lines" in terminal.getvalue()
    assert "2/2" in terminal.getvalue()


def test_explain_a_data_set(place, say, tmp_path):
    data = ("--data", place / "data", "--out", tmp_path / "out", "--json")
    code, found, _ = say("explain", *data, "--worst", 1)
    assert code == 0
    assert set(found) == {"html", "n", "accuracy", "kinds", "by", "modalities", "single", "worst"}
    assert (found["n"], found["by"], set(found["modalities"])) == (6, "labels", {"text", "video"})
    assert found["html"] == str(tmp_path / "out" / "index.html")
    assert (tmp_path / "out" / "index.html").is_file()
    assert [path.endswith("worst-01/explain.html") for path in found["worst"]] == [True] * (found["accuracy"] < 1)
    assert say("explain", place / "film.mp4", *data)[0] == 2
    assert say("explain", *data, "--worst", -1)[0] == 2
    assert say("explain", *data, "--split", "tomorrow")[0] == 2
    assert say("explain", "--data", place / "none", "--out", tmp_path / "out")[0] in (1, 2)


def test_what_a_reduced_precision_changes_is_said(place, say):
    code, low, _ = say("predict", "--text", "天气好", "--precision", "bf16", "--json")
    full = say("predict", "--text", "天气好", "--json")[1]
    assert code == 0
    assert set(low) == set(full) | {"disagreement"}
    assert {"n", "flips", "max_difference"} <= set(low["disagreement"])
    told = say("predict", "--text", "天气好", "--precision", "bf16")[1]
    flips, most = round(4 * low["disagreement"]["flips"]), low["disagreement"]["max_difference"]
    assert f"bf16 vs. fp32 on 4 generated clips: {flips} labels change, largest difference {most:.2g}\n" in told
    low = say("evaluate", "--data", place / "data", "--precision", "bf16", "--json")[1]
    full = say("evaluate", "--data", place / "data", "--json")[1]
    assert set(low) == set(full) | {"disagreement"}
    assert low["ece"] != full["ece"]
    assert low["ece"] == pytest.approx(full["ece"], abs=0.05)
