"""The command line, run in process: its output, its one-line errors and its exit codes."""

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
def assets(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    data_folder(root / "data", (3, 3, 6))
    text_folder(root / "text")
    timm_folder(root / "vision")
    encoders = {"text.encoder": str(root / "text"), "vision.encoder": str(root / "vision"), "head": "linear"}
    sizes = {"width": 16, "heads": 2, "text.max_length": 20, "vision.frames": 2, "vision.size": 32}
    for seed in (0, 1):
        torch.manual_seed(seed)
        create_model(Config().override({**encoders, **sizes})).save_pretrained(root / f"run{seed}")
    return root


@pytest.fixture
def run_cli(capsys, tmp_path, monkeypatch):
    """Run a command in a temporary working directory → exit code, stdout, stderr."""
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
def expect_error(run_cli):
    """Run a command that must fail with this exit code and a single line on stderr that matches the pattern."""

    def run(code, pattern, *arguments):
        exit_code, out, err = run_cli(*arguments)
        lines = [line for line in err.splitlines() if line.startswith("senticlip: ")]
        assert (exit_code, len(lines)) == (code, 1), err
        assert re.search(pattern, lines[0]), lines[0]
        assert "Traceback" not in err
        assert err.endswith(lines[0] + "\n")
        assert out == ""

    return run


def test_predict_prints_one_json_object(assets, run_cli):
    video = next((assets / "data" / "Raw").rglob("*.mp4"))
    code, out, _ = run_cli("predict", assets / "run0", video, "--text", "天气好", "--json", "--device", "cpu")
    result = json.loads(out.splitlines()[-1])
    assert code == 0
    assert set(result) == {"label", "probabilities", "modalities", "weights"}
    assert result["label"] == max(result["probabilities"], key=result["probabilities"].get)
    assert set(result["weights"]) == set(result["modalities"]) == {"text", "video"}
    assert sum(result["weights"].values()) == pytest.approx(1)


def test_predict_reports_ignored_input(assets, run_cli):
    out = run_cli("predict", assets / "run0", "--text", "天气好" * 20, "--device", "cpu")[1]
    assert "the last 42 characters of the text are ignored: this model reads 20 tokens" in out
    code, out, _ = run_cli("predict", assets / "run0", "--text", "-天气好", "--device", "cpu")
    assert (code, "ignored" in out) == (0, False)
    video = next((assets / "data" / "Raw").rglob("*.mp4"))
    for modality, reads, ignored in (("text", "text", "video"), ("vision", "video", "text")):
        torch.manual_seed(0)
        model = create_model(run0_experiment(assets).override({"modalities": [modality]}))
        model.save_pretrained(assets / f"{modality}-alone")
        out = run_cli("predict", assets / f"{modality}-alone", video, "--text", "好", "--device", "cpu")[1]
        assert f"the {ignored} is ignored: this model reads only {reads}" in out
    torch.manual_seed(0)
    peer = {"model": "tfn", "modalities": ["text", "vision"], "text.train": "frozen", "vision.train": "frozen"}
    create_model(Config.override(run0_experiment(assets), peer)).save_pretrained(assets / "peer")
    code, out, _ = run_cli("predict", assets / "peer", "--text", "好", "--json", "--device", "cpu")
    score = json.loads(out)["score"]
    assert f"score {score:+.3f}" in run_cli("predict", assets / "peer", "--text", "好", "--device", "cpu")[1]
    result = json.loads(run_cli("evaluate", assets / "peer", "--data", assets / "data", "--json")[1])
    out = run_cli("evaluate", assets / "peer", "--data", assets / "data")[1]
    assert f"score: MAE {result['mae']:.4f}, Corr {result['corr']:.4f}, Acc-3 {result['acc_3']:.4f}" in out
    assert f"Acc-2 {result['acc_2']:.4f}, F1-2 {result['f1_2']:.4f}" in out


def run0_experiment(assets):
    """The experiment config of ``run0``."""
    return SentimentModel.from_pretrained(assets / "run0").experiment


@pytest.mark.parametrize("threads", ["", "1,2", "x", " 1 "])
def test_any_omp_num_threads_is_accepted(assets, run_cli, monkeypatch, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    before = torch.get_num_threads()
    try:
        assert run_cli("predict", assets / "run0", "--text", "好", "--device", "cpu")[0] == 0
        if threads.strip("x "):
            assert torch.get_num_threads() == int(threads.split(",")[0])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("policy", "spincount"), [(None, "1000"), ("ACTIVE", "None")])
def test_gomp_spincount_is_set_before_torch_is_imported(policy, spincount):
    code = "import os, sys; from senticlip import cli; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment |= {"OMP_WAIT_POLICY": policy} if policy else {}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert process.stdout.split() == [spincount, "False"]


def test_evaluate_one_run_and_two_runs(assets, run_cli):
    data = ("--data", assets / "data", "--json", "--device", "cpu")
    one = json.loads(run_cli("evaluate", assets / "run0", *data)[1])
    assert {"accuracy", "macro_f1", "weighted_f1", "precision", "recall", "per_class", "ece", "n"} <= set(one)
    out = run_cli("evaluate", assets / "run0", *(word for word in data if word != "--json"))[1]
    assert re.findall(r"(\w+)  precision .* support (\S+)", out) == [(name, "2") for name in one["per_class"]]
    two = ("evaluate", assets / "run0", assets / "run1", *data, "--target", "V")
    both = json.loads(run_cli(*two)[1])
    assert both["a"] == json.loads(run_cli("evaluate", assets / "run0", *data, "--target", "V")[1])
    lines = run_cli(*(word for word in two if word != "--json"))[1].splitlines()
    for run, result, line in zip(two[1:3], (both["a"], both["b"]), lines[:2], strict=True):
        assert line == f"{run}  accuracy {result['accuracy']:.4f}, macro-F1 {result['macro_f1']:.4f}"
    gap = both["difference"]["accuracy"]
    assert gap["difference"] == pytest.approx(both["a"]["accuracy"] - both["b"]["accuracy"])
    printed = [float(number) for number in re.findall(r"[-+]?\d\.\d+", lines[3])]
    assert printed == pytest.approx([gap[name] for name in ("difference", "low", "high", "p")], abs=1e-4)


def test_evaluate_several_runs_gives_mean_and_std(assets, run_cli, expect_error):
    runs = (assets / "run0", assets / "run1", assets / "run0")
    result = json.loads(run_cli("evaluate", *runs, "--data", assets / "data", "--json")[1])
    values = [result["runs"][str(run)]["macro_f1"] for run in runs]
    mean, std = statistics.mean(values), statistics.stdev(values)
    assert result["scores"]["macro_f1"] == pytest.approx({"mean": mean, "std": std})
    out = run_cli("evaluate", *runs, "--data", assets / "data")[1]
    assert f"of 3 runs: accuracy {statistics.mean(result['runs'][str(r)]['accuracy'] for r in runs):.4f} ± " in out
    assert f"macro-F1 {mean:.4f} ± {std:.4f}, weighted F1" in out
    model = create_model(run0_experiment(assets).override({"target": "T"}))
    model.save_pretrained(assets / "of-T")
    expect_error(
        2,
        "trained on different labels — choose one with --target",
        "evaluate",
        *runs,
        assets / "of-T",
        "--data",
        assets / "data",
    )
    assert run_cli("evaluate", *runs, assets / "of-T", "--data", assets / "data", "--target", "M")[0] == 0


@pytest.mark.parametrize("seeds", [(0, 0, 0), (0, 1, 2)])
def test_runs_with_different_random_splits_are_reported(assets, run_cli, tmp_path, seeds):
    runs = [tmp_path / f"run{number}" for number in range(3)]
    for run, seed in zip(runs, seeds, strict=True):
        experiment = run0_experiment(assets).override({"protocol": "tenth", "seed": seed})
        create_model(experiment).save_pretrained(run)
        (run / "metrics.json").write_text(json.dumps({"experiment": experiment.to_dict()}))
    out = run_cli("evaluate", *runs, "--data", assets / "data")[1]
    assert ("each run drew its own split" in out) == (len({*seeds}) > 1)
    assert "different experiments" not in out


def test_usage_errors_are_one_line(assets, expect_error):
    expect_error(2, "required: VERB — see senticlip --help")
    expect_error(2, "invalid choice: 'fly'", "fly")
    expect_error(2, "required: --data, --out — see senticlip train --help", "train", TINY)
    expect_error(2, "invalid int value: 'x'", "demo", "--seed", "x")
    expect_error(2, "--target Q: choose one of M, T, A, V", "evaluate", assets / "run0", "--data", "d", "--target", "Q")
    expect_error(2, "--target Q", "evaluate", assets / "run0", assets / "run1", "--data", "d", "--target", "Q")
    expect_error(2, "--seeds 0: must be at least 1", "reproduce", "--data", "d", "--out", "o", "--seeds", "0")


def test_unusable_out_is_rejected(assets, expect_error, tmp_path):
    (tmp_path / "file").touch()
    for verb in (("train", TINY, "--data", "d"), ("demo",), ("reproduce", "--data", "d"), ("analyze", "r", "v")):
        expect_error(2, r"argument --out: .*file is a file, not a folder", *verb, "--out", tmp_path / "file")
        deeper = tmp_path / "file" / "deeper" / "run"
        expect_error(2, r"argument --out: .*file is a file, not a folder", *verb, "--out", deeper)
    expect_error(2, "is a file, not a folder", "features", "d", "--out", tmp_path / "file" / "f.pkl")
    expect_error(2, "is a folder, not a file", "export", assets / "run0", "--out", tmp_path)
    expect_error(2, "argument --out: no name given", "explain", assets / "run0", "--text", "好", "--out", "")
    expect_error(2, "argument --out: no name given", "export", assets / "run0", "--out", "")
    expect_error(2, r"a+: cannot create this folder — File name too long", "demo", "--out", "a" * 300)
    expect_error(1, r"a+", "export", assets / "run0", "--out", "a" * 300 + "/m.onnx")


@pytest.mark.parametrize("device", ["mps", "cuda:77", "meta", "toaster"])
def test_unavailable_device_is_rejected(assets, expect_error, device):
    message = f"--device {device}: cannot be used here .* choose cpu, cuda or cuda:N"
    expect_error(2, message, "predict", assets / "run0", "--text", "好", "--device", device)
    expect_error(2, message, "train", TINY, "--data", assets / "data", "--out", "run", "--device", device)


def test_invalid_overrides_are_rejected(expect_error):
    command = ("train", TINY, "--data", "d", "--out", "o", "--set")
    for override in ("heads=0", "seed.x=1", "text.encoder.x=1", "stages.text=3", "model=foo"):
        expect_error(2, override.partition("=")[0].partition(".x")[0], *command, override)
    expect_error(2, "config key model: 'foo'", "demo", "--set", "model=foo")


def test_json_is_valid_when_stdout_is_not_utf8(assets, tmp_path):
    video = tmp_path / "é电.mp4"
    shutil.copy(next((assets / "data" / "Raw").rglob("*.mp4")), video)
    table = tmp_path / "é.csv"
    table.write_text("path,text,label\né电.mp4,好,2\n", encoding="utf-8")
    command = [sys.executable, "-m", "senticlip", "data", "check", str(table), "--json"]
    process = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert "é.csv" in json.loads(process.stdout.splitlines()[-1])["problems"][0]


def damaged_copy(assets, tmp_path, name, content=None):
    run = tmp_path / "run"
    shutil.copytree(assets / "run0", run)
    if content is None:
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    else:
        (run / name).write_bytes(content)
    return run


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b"\x10\x00", r"run/model\.safetensors: broken, or does not match its config"),
        ("config.json", b"{", r"run/config\.json: not a valid model config"),
        ("config.json", b'{"model_type": "bert"}', r"run/config\.json: format"),
        ("tokenizer", None, "run/tokenizer: the tokenizer folder is missing"),
        ("tokenizer/tokenizer.json", None, "run/tokenizer: no vocabulary found .*tokenizer.json"),
    ],
)
def test_broken_run(assets, expect_error, tmp_path, name, content, message):
    run = damaged_copy(assets, tmp_path, name, content)
    expect_error(1, message, "predict", run, "--text", "好", "--device", "cpu")


def test_missing_run(expect_error):
    expect_error(2, "RUN: no/run is not on this disk .*; give a folder written by senticlip train", "predict", "no/run")
    expect_error(2, "RUN: no such folder: my run", "evaluate", "my run", "--data", "d")
    expect_error(2, r"a\.onnx: no such file", "predict", "a.onnx", "--text", "好")


def test_missing_video(assets, expect_error):
    expect_error(2, r"gone\.mp4: no such video file", "predict", assets / "run0", "gone.mp4", "--device", "cpu")


def test_encoder_without_weights(assets, expect_error, tmp_path):
    shutil.copytree(assets / "text", tmp_path / "text")
    (tmp_path / "text" / "model.safetensors").unlink()
    overrides = ("--set", f"text.encoder={tmp_path / 'text'}", "--set", "stages={}", "--set", "modalities=[text]")
    command = ("train", TINY, "--data", assets / "data", "--out", "o", "--device", "cpu", *overrides)
    expect_error(1, "text.encoder: the weights in .*text cannot be read", *command)


def test_feature_file_with_invalid_labels(expect_error, tmp_path):
    split = {"id": ["a"], "regression_labels": ["good"]}
    write_features(tmp_path / "f.pkl", dict.fromkeys(("train", "valid", "test"), split))
    expect_error(1, "f.pkl, train, regression_labels: expected a number", "data", "check", tmp_path / "f.pkl")


def test_unexpected_exceptions_and_interrupts_are_one_line(expect_error, monkeypatch):
    def raise_error(options):
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setitem(cli.VERBS, "predict", raise_error)
    expect_error(1, "^senticlip: ZeroDivisionError: two lines — run with --debug$", "predict", "run")
    with pytest.raises(ZeroDivisionError):
        cli.main(["predict", "run", "--debug"])

    def raise_interrupt(options):
        raise KeyboardInterrupt

    for message, *arguments in (
        ("interrupted", "predict", "run"),
        ("interrupted — rerun with --resume to continue", "train", TINY, "--data", "d", "--out", "o"),
        ("interrupted — rerun with --resume to continue", "analyze", "run", "film.mp4", "--out", "o"),
        ("interrupted — rerun the same command to continue", "bulk", "run", "archive.csv", "--out", "o"),
        ("interrupted — rerun the same command to continue", "reproduce", "--data", "d", "--out", "o"),
    ):
        monkeypatch.setitem(cli.VERBS, arguments[0], raise_interrupt)
        expect_error(130, f"^senticlip: {message}$", *arguments)


@pytest.mark.parametrize(("name", "ignored"), [("SIGTERM", False), ("SIGHUP", False), ("SIGHUP", True)])
def test_signals_act_like_ctrl_c_unless_ignored(name, ignored):
    """SIGINT is ignored here, as by a shell that starts a command in the background."""
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
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    stderr = "" if ignored else "senticlip: interrupted\n"
    assert (process.returncode, process.stdout, process.stderr) == (0 if ignored else 130, "tidied\n", stderr)


def test_demo_applies_overrides_to_tiny_preset(run_cli, monkeypatch):
    calls = []

    def demo(out, config, sound):
        calls.append((out, config, sound))
        return {"accuracy": 1.0, "macro_f1": 1.0, "report": "r"}

    monkeypatch.setattr("senticlip.demo.demo", demo)
    overrides = ("--set", "width=32", "--set", "stages.text.train.epochs=1")
    code, out, _ = run_cli("demo", "--seed", "7", *overrides, "--out", "x")
    assert (code, out) == (0, "on test: accuracy 1.000, macro-F1 1.000; open r\n")
    expected = load_preset("tiny", ["seed=7", "width=32", "stages.text.train.epochs=1"])
    assert calls == [("x", expected, False)]
    assert (expected.seed, expected.width, expected.stage("text").train.epochs) == (7, 32, 1)


class Called(Exception):
    """Raised instead of running the function that a verb calls."""


@pytest.mark.parametrize(
    ("function", "command", "expected"),
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
def test_every_option_reaches_the_function(run_cli, monkeypatch, function, command, expected):
    module, _, name = f"senticlip.{function}".rpartition(".")
    signature, received = inspect.signature(getattr(importlib.import_module(module), name)), {}

    def record(*arguments, **options):
        received.update(signature.bind(*arguments, **options).arguments)
        raise Called

    monkeypatch.setattr(f"{module}.{name}", record)
    with pytest.raises(Called):
        cli.main([*command.split(), "--debug"])
    assert {key: received.get(key) for key in expected} == expected


def test_data_check_exits_with_1_if_there_are_problems(assets, run_cli, tmp_path):
    (tmp_path / "own.csv").write_text("text,label\n好,2\n", encoding="utf-8")
    assert run_cli("data", "check", tmp_path / "own.csv")[0] == 1
    assert run_cli("data", "check", assets / "data")[0] == 0
