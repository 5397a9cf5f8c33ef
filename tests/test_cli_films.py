"""analyze, bulk, explain --data and --precision on the command line: JSON keys, files, exit codes."""

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
def folder(tmp_path_factory):
    """A folder with a data set, a film with subtitles, and a RUN with random weights."""
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
def run_verb(capsys, folder):
    """``senticlip VERB RUN …`` → exit code, the object of --json (else stdout), stderr."""

    def run(verb, *arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            cli.main([verb, str(folder / "run"), *map(str, arguments), "--device", "cpu"])
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("senticlip: ")]
        assert len(lines) == (exit_info.value.code != 0)
        return exit_info.value.code, json.loads(out.splitlines()[-1]) if out and "--json" in arguments else out, err

    return run


def test_analyze(folder, run_verb, tmp_path):
    film = (folder / "film.mp4", "--out", tmp_path / "out", "--json")
    code, result, _ = run_verb("analyze", *film, "--subtitles", folder / "film.srt")
    assert (code, set(result), result["segments"]) == (0, {"segments", "failed", "seconds", "html"}, 2)
    assert result["failed"] == 0
    assert result["html"] == str(tmp_path / "out" / "timeline.html")
    rows = pq.read_table(tmp_path / "out" / "timeline.parquet").to_pylist()
    predictor = senticlip.load(folder / "run", "cpu")
    for row, text in zip(rows, ("天气好", "难过"), strict=True):
        expected = answers.record(predictor(folder / "film.mp4", text, row["start"], row["end"]))
        assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-5)

    assert (
        run_verb("analyze", folder / "film.mp4", "--out", tmp_path / "w", "--seconds", "0.5", "--json")[1]["segments"]
        == 4
    )
    for wrong, code, message in (
        (("--shift", "nan"), 2, "--shift nan"),
        (("--seconds", "1e-9"), 2, "--seconds 1e-09"),
        (("--cut", "scenes"), 2, "choose windows or shots"),
        (("--subtitles", folder / "none.srt"), 2, "no such subtitle file"),
        (("--subtitles", folder / "film.srt", "--shift", "99"), 1, "after the end"),
        (("--precision", "fp8"), 2, "fp32, bf16, int8"),
    ):
        result = run_verb("analyze", *film, *wrong)
        assert (result[0], message in result[2]) == (code, True), result
    (folder / "no.mp4").write_text("no film")
    assert run_verb("analyze", folder / "no.mp4", "--out", tmp_path / "out")[0] == 1


def test_failed_lines_are_counted(folder, run_verb, tmp_path, monkeypatch):
    """A timeline with gaps must not look complete to someone who reads only the last line."""
    rows = [{"error": None}, {"error": "line 2: broken"}, {"error": "line 3: broken"}]
    monkeypatch.setattr("senticlip.analyze.analyze", lambda *_, **__: iter(rows))
    code, summary, err = run_verb("analyze", folder / "film.mp4", "--out", tmp_path, "--json")
    assert (code, summary["segments"], summary["failed"]) == (0, 3, 2)
    assert "2 have no answer (see the column error), the first: line 2: broken" in err


def test_bulk(folder, run_verb, tmp_path):
    rows = [{"id": "a", "path": "film.mp4"}, {"id": "b", "path": "none.mp4"}, {"id": "c", "text": "好"}, {"id": "d"}]
    manifest = folder / "manifest.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    arguments = (manifest, "--out", tmp_path / "out", "--workers", 1, "--json")
    for _ in range(2):  # the second time, all parts exist
        code, summary, err = run_verb("bulk", *arguments)
        assert "2 done, 2 failed" in err
        assert "--retry tries them again; see the column error, the first: " in err
        assert "none.mp4: no such video" in err
        assert (code, set(summary)) == (0, {"done", "failed", "seconds"})
        assert (summary["done"], summary["failed"]) == (2, 2)
    errors = {row["id"]: row["error"] for row in pq.read_table(tmp_path / "out" / "part-000000.parquet").to_pylist()}
    assert errors["a"] is errors["c"] is None
    assert "none.mp4: no such video" in errors["b"]
    assert "manifest.jsonl, row 4: neither path nor text" in errors["d"]

    code, _, err = run_verb("bulk", *arguments, "--precision", "bf16")
    assert (code, "a different precision" in err) == (1, True)
    assert run_verb("bulk", folder / "none.csv", "--out", tmp_path / "new")[0] == 2
    (folder / "bad.csv").write_text("url\nx\n")
    assert run_verb("bulk", folder / "bad.csv", "--out", tmp_path / "new")[0] == 1
    assert run_verb("bulk", manifest, "--out", tmp_path / "new", "--workers", 0)[0] == 2


def test_progress_of_bulk_and_analyze_in_a_terminal(folder, run_verb, tmp_path, terminal):
    (tmp_path / "manifest.jsonl").write_text('{"text": "好"}', encoding="utf-8")
    assert run_verb("bulk", tmp_path / "manifest.jsonl", "--out", tmp_path / "out", "--workers", 1)[0] == 0
    assert "rows" in terminal.getvalue()
    assert "1/1" in terminal.getvalue()
    film = (folder / "film.mp4", "--subtitles", folder / "film.srt", "--out", tmp_path / "film")
    assert run_verb("analyze", *film)[0] == 0
    assert "lines" in terminal.getvalue()
    assert "2/2" in terminal.getvalue()


def test_explain_of_a_data_set(folder, run_verb, tmp_path):
    data = ("--data", folder / "data", "--out", tmp_path / "out", "--json")
    code, summary, _ = run_verb("explain", *data, "--worst", 1)
    assert code == 0
    assert set(summary) == {"html", "n", "accuracy", "kinds", "by", "modalities", "single", "worst"}
    assert (summary["n"], summary["by"], set(summary["modalities"])) == (6, "labels", {"text", "video"})
    assert summary["html"] == str(tmp_path / "out" / "index.html")
    assert (tmp_path / "out" / "index.html").is_file()
    assert [path.endswith("worst-01/explain.html") for path in summary["worst"]] == [True] * (summary["accuracy"] < 1)
    assert run_verb("explain", folder / "film.mp4", *data)[0] == 2
    assert run_verb("explain", *data, "--worst", -1)[0] == 2
    assert run_verb("explain", *data, "--split", "tomorrow")[0] == 2
    assert run_verb("explain", "--data", folder / "none", "--out", tmp_path / "out")[0] in (1, 2)


def test_reduced_precision_reports_disagreement(folder, run_verb):
    code, reduced, _ = run_verb("predict", "--text", "天气好", "--precision", "bf16", "--json")
    full = run_verb("predict", "--text", "天气好", "--json")[1]
    assert code == 0
    assert set(reduced) == set(full) | {"disagreement"}
    assert {"n", "flips", "max_difference"} <= set(reduced["disagreement"])
    output = run_verb("predict", "--text", "天气好", "--precision", "bf16")[1]
    flips, largest = round(4 * reduced["disagreement"]["flips"]), reduced["disagreement"]["max_difference"]
    assert f"bf16 vs. fp32 on 4 generated clips: {flips} labels change, largest difference {largest:.2g}\n" in output
    reduced = run_verb("evaluate", "--data", folder / "data", "--precision", "bf16", "--json")[1]
    full = run_verb("evaluate", "--data", folder / "data", "--json")[1]
    assert set(reduced) == set(full) | {"disagreement"}
    assert reduced["ece"] != full["ece"]
    assert reduced["ece"] == pytest.approx(full["ece"], abs=0.05)
