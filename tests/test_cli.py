"""The command line, in process: what it prints, and that whatever goes wrong is one line and the right exit code."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import shutil
import statistics
import subprocess
import sys

import pytest
import torch
from tests.tiny import data_folder, text_folder, timm_folder

from senticlip import cli
from senticlip.config import Config
from senticlip.data.mmsa import write_features
from senticlip.models import create_model
from senticlip.models.base import SentimentModel
from senticlip.tables import EXPERIMENTS, load_preset

TINY = str(EXPERIMENTS / "tiny.yaml")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    data_folder(root / "data", (3, 3, 6))
    text_folder(root / "text")
    timm_folder(root / "vision")
    names = {"text.encoder": str(root / "text"), "vision.encoder": str(root / "vision"), "head": "linear"}
    sizes = {"width": 16, "heads": 2, "text.max_length": 20, "vision.frames": 2, "vision.size": 32}
    for seed in (0, 1):
        torch.manual_seed(seed)
        create_model(Config().override({**names, **sizes})).save_pretrained(root / f"run{seed}")
    return root


@pytest.fixture
def say(capsys, tmp_path, monkeypatch):
    """Run a command in a folder of its own → exit code, stdout, stderr."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return run


@pytest.fixture
def fails(say):
    """Run a command that must end in one line with this code."""

    def run(code, said, *arguments):
        found, out, err = say(*arguments)
        lines = [line for line in err.splitlines() if line.startswith("senticlip: ")]
        assert (found, len(lines)) == (code, 1), err
        assert re.search(said, lines[0]), lines[0]
        assert "Traceback" not in err
        assert err.endswith(lines[0] + "\n")
        assert out == ""

    return run


def test_predict_prints_one_object(place, say):
    video = next((place / "data" / "Raw").rglob("*.mp4"))
    code, out, _ = say("predict", place / "run0", video, "--text", "天气好", "--json", "--device", "cpu")
    found = json.loads(out.splitlines()[-1])
    assert code == 0
    assert set(found) == {"label", "probabilities", "modalities", "weights"}
    assert found["label"] == max(found["probabilities"], key=found["probabilities"].get)
    assert set(found["weights"]) == set(found["modalities"]) == {"text", "video"}
    assert sum(found["weights"].values()) == pytest.approx(1)


def test_predict_tells_what_it_did_not_read_and_takes_any_line(place, say):
    whole = say("predict", place / "run0", "--text", "天气好" * 20, "--device", "cpu")[1]
    assert "the last 42 characters of the text are ignored: this model reads 20 tokens" in whole
    code, out, _ = say("predict", place / "run0", "--text", "-天气好", "--device", "cpu")
    assert (code, "ignored" in out) == (0, False)
    video = next((place / "data" / "Raw").rglob("*.mp4"))
    for name, known, lacks in (("text", "text", "video"), ("vision", "video", "text")):
        torch.manual_seed(0)
        alone = create_model(load_run(place).override({"modalities": [name]}))
        alone.save_pretrained(place / f"{name}-alone")
        out = say("predict", place / f"{name}-alone", video, "--text", "好", "--device", "cpu")[1]
        assert f"the {lacks} is ignored: this model reads only {known}" in out
    torch.manual_seed(0)
    peer = {"model": "tfn", "modalities": ["text", "vision"], "text.train": "frozen", "vision.train": "frozen"}
    create_model(Config.override(load_run(place), peer)).save_pretrained(place / "peer")
    code, out, _ = say("predict", place / "peer", "--text", "好", "--json", "--device", "cpu")
    score = json.loads(out)["score"]
    assert f"score {score:+.3f}" in say("predict", place / "peer", "--text", "好", "--device", "cpu")[1]
    found = json.loads(say("evaluate", place / "peer", "--data", place / "data", "--json")[1])
    said = say("evaluate", place / "peer", "--data", place / "data")[1]
    assert f"score: MAE {found['mae']:.4f}, Corr {found['corr']:.4f}, Acc-3 {found['acc_3']:.4f}" in said
    assert f"Acc-2 {found['acc_2']:.4f}, F1-2 {found['f1_2']:.4f}" in said


def load_run(place):
    """The experiment of ``run0``, with the peers' own options still to come."""
    return SentimentModel.from_pretrained(place / "run0").experiment


@pytest.mark.parametrize("threads", ["", "2,1", "x", " 1 "])
def test_whatever_the_environment_says_of_threads(place, say, monkeypatch, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    before = torch.get_num_threads()
    try:
        assert say("predict", place / "run0", "--text", "好", "--device", "cpu")[0] == 0
        if threads.strip("x "):
            assert torch.get_num_threads() == int(threads.split(",")[0])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("policy", "count"), [(None, "1000"), ("ACTIVE", "None")])
def test_threads_are_told_not_to_spin_before_torch_starts_them(policy, count):
    told = "import os, sys; from senticlip import cli; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment |= {"OMP_WAIT_POLICY": policy} if policy else {}
    done = subprocess.run([sys.executable, "-c", told], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [count, "False"]


def test_evaluate_of_one_run_and_of_two(place, say):
    data = ("--data", place / "data", "--json", "--device", "cpu")
    one = json.loads(say("evaluate", place / "run0", *data)[1])
    assert {"accuracy", "macro_f1", "weighted_f1", "precision", "recall", "per_class", "ece", "n"} <= set(one)
    said = say("evaluate", place / "run0", *(word for word in data if word != "--json"))[1]
    assert re.findall(r"(\w+)  precision .* support (\S+)", said) == [(name, "2") for name in one["per_class"]]
    two = ("evaluate", place / "run0", place / "run1", *data, "--target", "V")
    both = json.loads(say(*two)[1])
    assert both["a"] == json.loads(say("evaluate", place / "run0", *data, "--target", "V")[1])
    lines = say(*(word for word in two if word != "--json"))[1].splitlines()
    for run, result, line in zip(two[1:3], (both["a"], both["b"]), lines[:2], strict=True):
        assert line == f"{run}  accuracy {result['accuracy']:.4f}, macro-F1 {result['macro_f1']:.4f}"
    gap = both["difference"]["accuracy"]
    assert gap["difference"] == pytest.approx(both["a"]["accuracy"] - both["b"]["accuracy"])
    told = [float(number) for number in re.findall(r"[-+]?\d\.\d+", lines[3])]
    assert told == pytest.approx([gap[name] for name in ("difference", "low", "high", "p")], abs=1e-4)


def test_evaluate_of_several_runs_is_their_mean_and_deviation(place, say, fails):
    runs = (place / "run0", place / "run1", place / "run0")
    found = json.loads(say("evaluate", *runs, "--data", place / "data", "--json")[1])
    values = [found["runs"][str(run)]["macro_f1"] for run in runs]
    mean, std = statistics.mean(values), statistics.stdev(values)
    assert found["scores"]["macro_f1"] == pytest.approx({"mean": mean, "std": std})
    said = say("evaluate", *runs, "--data", place / "data")[1]
    assert f"of 3 runs: accuracy {statistics.mean(found['runs'][str(r)]['accuracy'] for r in runs):.4f} ± " in said
    assert f"macro-F1 {mean:.4f} ± {std:.4f}, weighted F1" in said
    other = create_model(load_run(place).override({"target": "T"}))
    other.save_pretrained(place / "of-T")
    fails(
        2,
        "trained on different labels — choose one with --target",
        "evaluate",
        *runs,
        place / "of-T",
        "--data",
        place / "data",
    )
    assert say("evaluate", *runs, place / "of-T", "--data", place / "data", "--target", "M")[0] == 0


@pytest.mark.parametrize("seeds", [(0, 0, 0), (0, 1, 2)])
def test_runs_that_drew_their_own_clips_are_told(place, say, tmp_path, seeds):
    runs = [tmp_path / f"run{number}" for number in range(3)]
    for run, seed in zip(runs, seeds, strict=True):
        experiment = load_run(place).override({"protocol": "tenth", "seed": seed})
        create_model(experiment).save_pretrained(run)
        (run / "metrics.json").write_text(json.dumps({"experiment": experiment.to_dict()}))
    told = say("evaluate", *runs, "--data", place / "data")[1]
    assert ("each run drew its own split" in told) == (len({*seeds}) > 1)
    assert "different experiments" not in told


def test_wrong_use_is_one_line(place, fails):
    fails(2, "required: VERB — see senticlip --help")
    fails(2, "invalid choice: 'fly'", "fly")
    fails(2, "required: --data, --out — see senticlip train --help", "train", TINY)
    fails(2, "invalid int value: 'x'", "demo", "--seed", "x")
    fails(2, "--target Q: choose one of M, T, A, V", "evaluate", place / "run0", "--data", "d", "--target", "Q")
    fails(2, "--target Q", "evaluate", place / "run0", place / "run1", "--data", "d", "--target", "Q")
    fails(2, "--seeds 0: must be at least 1", "reproduce", "--data", "d", "--out", "o", "--seeds", "0")


def test_out_must_be_possible(place, fails, tmp_path):
    (tmp_path / "file").touch()
    for verb in (("train", TINY, "--data", "d"), ("demo",), ("reproduce", "--data", "d"), ("analyze", "r", "v")):
        fails(2, r"argument --out: .*file is a file, not a folder", *verb, "--out", tmp_path / "file")
        deeper = tmp_path / "file" / "deeper" / "run"
        fails(2, r"argument --out: .*file is a file, not a folder", *verb, "--out", deeper)
    fails(2, "is a file, not a folder", "features", "d", "--out", tmp_path / "file" / "f.pkl")
    fails(2, "is a folder, not a file", "export", place / "run0", "--out", tmp_path)
    fails(2, "argument --out: no name given", "explain", place / "run0", "--text", "好", "--out", "")
    fails(2, "argument --out: no name given", "export", place / "run0", "--out", "")
    fails(2, r"a+: cannot create this folder — File name too long", "demo", "--out", "a" * 300)
    fails(1, r"a+", "export", place / "run0", "--out", "a" * 300 + "/m.onnx")


@pytest.mark.parametrize("device", ["mps", "cuda:77", "meta", "toaster"])
def test_a_device_that_cannot_be_used(place, fails, device):
    said = f"--device {device}: cannot be used here .* choose cpu, cuda or cuda:N"
    fails(2, said, "predict", place / "run0", "--text", "好", "--device", device)
    fails(2, said, "train", TINY, "--data", place / "data", "--out", "run", "--device", device)


def test_a_config_that_cannot_be(fails):
    base = ("train", TINY, "--data", "d", "--out", "o", "--set")
    for pair in ("heads=0", "seed.x=1", "text.encoder.x=1", "stages.text=3", "model=foo"):
        fails(2, pair.partition("=")[0].partition(".x")[0], *base, pair)
    fails(2, "config key model: 'foo'", "demo", "--set", "model=foo")


def test_json_is_json_where_stdout_is_not_utf_8(place, tmp_path):
    video = tmp_path / "é电.mp4"
    shutil.copy(next((place / "data" / "Raw").rglob("*.mp4")), video)
    table = tmp_path / "é.csv"
    table.write_text("path,text,label\né电.mp4,好,2\n", encoding="utf-8")
    command = [sys.executable, "-m", "senticlip", "data", "check", str(table), "--json"]
    found = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert "é.csv" in json.loads(found.stdout.splitlines()[-1])["problems"][0]


def damage(place, tmp_path, name, content=None):
    run = tmp_path / "run"
    shutil.copytree(place / "run0", run)
    if content is None:
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    else:
        (run / name).write_bytes(content)
    return run


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.safetensors", b"\x10\x00", r"run/model\.safetensors: broken, or does not match its config"),
        ("config.json", b"{", r"run/config\.json: not a valid model config"),
        ("config.json", b'{"model_type": "bert"}', r"run/config\.json: format"),
        ("tokenizer", None, "run/tokenizer: the tokenizer folder is missing"),
        ("tokenizer/tokenizer.json", None, "run/tokenizer: no vocabulary found .*tokenizer.json"),
    ],
)
def test_a_broken_run(place, fails, tmp_path, name, content, said):
    run = damage(place, tmp_path, name, content)
    fails(1, said, "predict", run, "--text", "好", "--device", "cpu")


def test_a_run_that_is_nowhere(fails):
    fails(2, "RUN: no/run is not on this disk .*; give a folder written by senticlip train", "predict", "no/run")
    fails(2, "RUN: no such folder: my run", "evaluate", "my run", "--data", "d")
    fails(2, r"a\.onnx: no such file", "predict", "a.onnx", "--text", "好")


def test_a_video_that_is_nowhere(place, fails):
    fails(2, r"gone\.mp4: no such video file", "predict", place / "run0", "gone.mp4", "--device", "cpu")


def test_an_encoder_without_weights(place, fails, tmp_path):
    shutil.copytree(place / "text", tmp_path / "text")
    (tmp_path / "text" / "model.safetensors").unlink()
    change = ("--set", f"text.encoder={tmp_path / 'text'}", "--set", "stages={}", "--set", "modalities=[text]")
    base = ("train", TINY, "--data", place / "data", "--out", "o", "--device", "cpu", *change)
    fails(1, "text.encoder: the weights in .*text cannot be read", *base)


def test_a_feature_file_that_is_none(fails, tmp_path):
    part = {"id": ["a"], "regression_labels": ["good"]}
    write_features(tmp_path / "f.pkl", dict.fromkeys(("train", "valid", "test"), part))
    fails(1, "f.pkl, train, regression_labels: expected a number", "data", "check", tmp_path / "f.pkl")


def test_what_nobody_foresaw_is_one_line_too(fails, monkeypatch):
    def broken(options):
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setitem(cli.VERBS, "predict", broken)
    fails(1, "^senticlip: ZeroDivisionError: two lines — run with --debug$", "predict", "run")
    with pytest.raises(ZeroDivisionError):
        cli.main(["predict", "run", "--debug"])

    def stopped(options):
        raise KeyboardInterrupt

    for said, *arguments in (
        ("interrupted", "predict", "run"),
        ("interrupted — rerun with --resume to continue", "train", TINY, "--data", "d", "--out", "o"),
        ("interrupted — rerun with --resume to continue", "analyze", "run", "film.mp4", "--out", "o"),
        ("interrupted — rerun the same command to continue", "bulk", "run", "archive.csv", "--out", "o"),
        ("interrupted — rerun the same command to continue", "reproduce", "--data", "d", "--out", "o"),
    ):
        monkeypatch.setitem(cli.VERBS, arguments[0], stopped)
        fails(130, f"^senticlip: {said}$", *arguments)


@pytest.mark.parametrize(("name", "ignored"), [("SIGTERM", False), ("SIGHUP", False), ("SIGHUP", True)])
def test_a_signal_ends_it_like_ctrl_c_unless_it_is_ignored(name, ignored):
    """Ctrl-C itself is ignored where a shell has put the command in the background."""
    code = f"""if True:
        import os, signal
        from senticlip import cli

        def verb(options):
            try:
                os.kill(os.getpid(), signal.{name})
                return {{}}
            finally:
                print("tidied", flush=True)

        signal.signal(signal.SIGINT, signal.SIG_IGN)
        before = signal.SIG_IGN if {ignored} else signal.SIG_DFL
        signal.signal(signal.{name}, before)
        cli.VERBS["predict"] = verb
        try:
            cli.main(["predict", "run"])
        finally:
            assert signal.getsignal(signal.{name}) == before"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    told = "" if ignored else "senticlip: interrupted\n"
    assert (done.returncode, done.stdout, done.stderr) == (0 if ignored else 130, "tidied\n", told)


def test_demo_reads_the_tiny_preset_and_its_changes(say, monkeypatch):
    seen = []

    def demo(out, config, sound):
        seen.append((out, config, sound))
        return {"accuracy": 1.0, "macro_f1": 1.0, "report": "r"}

    monkeypatch.setattr("senticlip.demo.demo", demo)
    changes = ("--set", "width=32", "--set", "stages.text.train.epochs=1")
    code, out, _ = say("demo", "--seed", "7", *changes, "--out", "x")
    assert (code, out) == (0, "on test: accuracy 1.000, macro-F1 1.000; open r\n")
    wanted = load_preset("tiny", ["seed=7", "width=32", "stages.text.train.epochs=1"])
    assert seen == [("x", wanted, False)]
    assert (wanted.seed, wanted.width, wanted.stage("text").train.epochs) == (7, 32, 1)


class Asked(Exception):
    """Ends a verb that has asked for its work."""


@pytest.mark.parametrize(
    ("work", "line", "wanted"),
    [
        (
            "train.train",
            f"train {TINY} --data d --out o --seed 3 --resume --device cpu --set width=32",
            {"data": "d", "out": "o", "seed": 3, "resume": True, "device": "cpu"},
        ),
        (
            "evaluate.evaluate",
            "evaluate r --data d --split valid --target V --precision bf16 --device cpu",
            {"run": "r", "data": "d", "split": "valid", "target": "V", "precision": "bf16", "device": "cpu"},
        ),
        (
            "evaluate.compare",
            "evaluate r s --data d --split valid --target V --precision bf16 --device cpu",
            {"run_a": "r", "run_b": "s", "data": "d", "split": "valid", "target": "V", "precision": "bf16"}
            | {"device": "cpu"},
        ),
        (
            "reproduce.reproduce",
            "reproduce --data d --out o --preset small --tables 1,5 --seeds 2 --protocol video --keep --device cpu "
            "--set width=32",
            {"preset": "small", "tables": ["1", "5"], "seeds": 2, "protocol": "video", "keep": True, "device": "cpu"}
            | {"data": "d", "out": "o", "overrides": ["width=32"]},
        ),
        (
            "features.features",
            "features d --out f.pkl --run r --protocol tenth --device cpu",
            {"data": "d", "out": "f.pkl", "run": "r", "protocol": "tenth", "device": "cpu"},
        ),
        (
            "bulk.bulk",
            "bulk r m.csv --out o --address a:1 --workers 3 --retry --precision bf16 --device cpu",
            {"run": "r", "manifest_file": "m.csv", "out": "o", "address": "a:1", "workers": 3, "retry": True}
            | {"precision": "bf16", "device": "cpu"},
        ),
        (
            "export.export",
            "export r --out f.onnx --int8 --data d --split test",
            {"run": "r", "out": "f.onnx", "int8": True, "data": "d", "split": "test"},
        ),
        (
            "analyze.analyze",
            "analyze r f.mp4 --subtitles s.srt --out o --shift 0.5 --resume --transcribe --asr-model tiny --cut shots "
            "--seconds 3 --track 1 --precision bf16 --device cpu",
            {"run": "r", "video": "f.mp4", "subtitles": "s.srt", "out": "o", "shift": 0.5, "resume": True, "track": 1}
            | {"transcribe": True, "asr_model": "tiny", "cut": "shots", "seconds": 3.0, "precision": "bf16"}
            | {"device": "cpu"},
        ),
        (
            "explain.explain",
            "explain r f.mp4 --text 好 --out o --method rollout --device cpu",
            {"run": "r", "video": "f.mp4", "text": "好", "out": "o", "method": "rollout", "device": "cpu"},
        ),
        (
            "explain_set.explain_set",
            "explain r --data d --split valid --worst 3 --out o --method rollout --device cpu",
            {"run": "r", "data": "d", "split": "valid", "worst": 3, "out": "o", "method": "rollout", "device": "cpu"},
        ),
        (
            "serve.serve",
            "serve r --host ::1 --port 9 --limit 3 --precision bf16 --device cpu",
            {"run": "r", "host": "::1", "port": 9, "limit": 3.0, "precision": "bf16", "device": "cpu"},
        ),
        ("data.sims.check", "data check d --protocol video", {"path": "d", "protocol": "video"}),
        ("demo.demo", "demo --out o --sound", {"out": "o", "sound": True}),
        ("pretrain.pretrain", "demo --pretrain --seed 5", {"seed": 5}),
    ],
)
def test_every_option_reaches_its_work(say, monkeypatch, work, line, wanted):
    module, _, name = f"senticlip.{work}".rpartition(".")
    signature, seen = inspect.signature(getattr(importlib.import_module(module), name)), {}

    def asked(*arguments, **options):
        seen.update(signature.bind(*arguments, **options).arguments)
        raise Asked

    monkeypatch.setattr(f"{module}.{name}", asked)
    with pytest.raises(Asked):
        cli.main([*line.split(), "--debug"])
    assert {key: seen.get(key) for key in wanted} == wanted


def test_data_check_ends_with_1_if_there_are_problems(place, say, tmp_path):
    (tmp_path / "own.csv").write_text("text,label\n好,2\n", encoding="utf-8")
    assert say("data", "check", tmp_path / "own.csv")[0] == 1
    assert say("data", "check", place / "data")[0] == 0
