"""The experiment's file: what is taken, what is refused in one line, and that no torch is needed to say so."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from senticlip import config as configs
from senticlip.config import RANGES, Config, from_dict, load
from senticlip.structures import UsageError
from senticlip.tables import EXPERIMENTS, load_preset, row_changes

PRESETS = ["paper", "small", "tiny"]


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "e.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_loads_and_its_resolved_form_is_the_same(name, tmp_path):
    config = load_preset(name)
    (tmp_path / "resolved.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert load(tmp_path / "resolved.yaml") == config


def test_the_page_of_all_keys_is_that_of_the_code():
    page = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| `([\w.]+)` \| `(.*?)` \| .+ \|$", page, re.MULTILINE)
    data = Config().to_dict()
    parts = {key: value for key, value in data.items() if isinstance(value, dict) and value}
    flat = {key: value for key, value in data.items() if key not in parts}
    flat |= {f"{part}.{key}": value for part, keys in parts.items() for key, value in keys.items()}
    assert {key: yaml.safe_load(value) for key, value in told} == flat


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_row_of_a_table_is_a_change_of_a_preset(path):
    changes = row_changes(f"{path.parent.name}/{path.name}")
    assert changes
    for preset in PRESETS:
        config = load_preset(preset).override(changes)
        assert all(config.stage(name).stages == {} for name in config.stages)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("model=foo", "config key model: 'foo' is not one of clip_ca_msa, tfn, lmf, mult, self_mm, mmaf"),
        ("heads=0", "config key heads: 0 — must be at least 1"),
        ("heads=-4", "config key heads: -4 — must be at least 1"),
        ("width=0", "config key width: 0 — must be at least 1"),
        ("layers=0", "config key layers: 0 — must be at least 1"),
        ("width=10", "width: 10 is not divisible by heads: 4"),
        ("dropout=5", "config key dropout: 5.0 — must be from 0 to 0.99"),
        ("seed=-1", "config key seed: -1 — must be from 0 to 4294967295"),
        ("text.max_length=3", "config key text.max_length: 3 — must be at least 4"),
        ("text.train=0", "config key text.train: 0 — must be at least 1"),
        ("vision.size=0", "config key vision.size: 0 — must be from 8 to 4096"),
        ("vision.size=20000", "config key vision.size: 20000 — must be from 8 to 4096"),
        ("vision.frames=0", "config key vision.frames: 0 — must be from 1 to 1000"),
        ("vision.train_frames=0", "config key vision.train_frames: 0 — must be at least 1"),
        ("train.accumulation=0", "config key train.accumulation: 0 — must be at least 1"),
        ("train.ema=2", "config key train.ema: 2.0 — must be from 0 to 0.99999"),
        ("train.lr=.nan", "config key train.lr: nan — must be at least 0"),
        ("train.lr=.inf", "config key train.lr: inf — must be at least 0"),
        ("train.recombine=3", "config key train.recombine: 3.0 — must be from 0 to 1"),
        ("train.epochs=1.5", "config key train.epochs: 1.5 is not one of int"),
        ("seed.x=1", "unknown config key seed.x: seed has no keys below it"),
        ("text.encoder.x=1", "unknown config key text.encoder.x: text.encoder has no keys below it"),
        ("label.names.x=1", "unknown config key label.names.x: label.names has no keys below it"),
        ("text.encodr=x", "unknown config key text.encodr — did you mean text.encoder?"),
        ("foo.bar=1", "unknown config key foo"),
        ("stages.text=3", "config key stages.text: expected a dict, not 3"),
        ("stages.text.widht=8", "stages.text: unknown config key widht — did you mean width?"),
        ("stages.text.train.epochs=0", "stages.text: config key train.epochs: 0 — must be at least 1"),
        ("stages.text.head=none", "stages.text: config key head: 'none' is not one of similarity, linear"),
        ("modalities=[smell]", "modalities: ['smell'] — choose from text, vision, audio, each once"),
        ("target=Q", "target: 'Q' — choose one of M, T, A, V"),
        ("text.prefix_text=' '", "text.prefix_text is empty"),
        ("label.prompt=x", "label.prompt needs a {}"),
        ("width", "--set width: expected KEY=VALUE"),
        ("width=[", "--set width=[: the value cannot be read as YAML"),
        ("text.encoder=2020-13-45", "--set text.encoder=2020-13-45: the value cannot be read as YAML"),
        ("label.names=[null,x,y]", "config key label.names: None is not one of str"),
        ("options=" + "[" * 5000, "the value cannot be read as YAML"),
        ("seed=0x" + "f" * 6000, "the value cannot be read as YAML"),
    ],
)
def test_what_cannot_be_is_told_at_once(change, said):
    with pytest.raises(UsageError, match=re.escape(said)) as error:
        load(EXPERIMENTS / "tiny.yaml", [change])
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


def test_files_that_are_none(file, tmp_path):
    for text, said in [
        ("a: [", "cannot be read as YAML"),
        ("- 1", "expected keys and values"),
        ("text: 3", "text: expected keys"),
        ("foo: 1", "unknown config key foo"),
    ]:
        with pytest.raises(UsageError, match=rf"e\.yaml: .*{said}"):
            load(file(text))
    file("").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read as YAML"):
        load(tmp_path / "e.yaml")
    with pytest.raises(UsageError, match="no such config file"):
        load(tmp_path)


def nested(item, many):
    """Seven levels, each ten times the one below it."""
    levels = [f"k0: &a0 {item}"] + [f"k{i}: &a{i} {many.format(', '.join([f'*a{i - 1}'] * 10))}" for i in range(1, 7)]
    return "".join(f"\n  {level}" for level in levels)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: tfn\noptions:" + nested("[x, x]", "[{}]"), "more than 65536 characters, with its aliases expanded"),
        ("target:" + nested("[x, x]", "[{}]"), "more than 65536 characters, with its aliases expanded"),
        ("stages:" + nested("{a: 1}", "{{<<: [{}]}}"), "more than 65536 characters, with its aliases expanded"),
        ("modalities: &a [*a]", "more than 65536 characters, with its aliases expanded"),
        ("options: " + "[" * 5000, "more than 20 levels"),
        ("options: {a: " + "[" * 30 + "]" * 30 + "}", "more than 20 levels"),
        ("seed: 0x" + "f" * 6000, "a number of more than 1000 digits"),
    ],
)  # fmt: skip
def test_a_short_file_that_would_be_long_to_print_is_one_line(file, text, said):
    with pytest.raises(UsageError, match=rf"e\.yaml: cannot be read as YAML — {said}$"):
        load(file(text))


def test_an_anchor_may_be_used_again(file):
    text = "text: &one {lr: 0.1, train: 2}\nvision: {<<: *one, frames: 3}\nstages: {a: {text: *one}, b: {text: *one}}"
    found = load(file(text))
    assert (found.vision.lr, found.vision.frames, found.stage("b").text.train) == (0.1, 3, 2)


@pytest.mark.parametrize("value", ["x" * 10_000, ["x"] * 10_000, {"x" * 10_000: 1}])
def test_a_wrong_value_is_told_in_short(value):
    for data in ({"target": [value]}, {"target": value}, {"modalities": [value, "x"]}, {"seed": value}):
        with pytest.raises(UsageError) as error:
            from_dict(data)
        assert len(str(error.value)) < 200
    for data in ({"x" * 10_000: 1}, {"options": {"x" * 10_000: 1}}):
        with pytest.raises(UsageError) as error:
            from_dict(data)
        assert len(str(error.value)) < 300


def test_the_presets_are_found_wherever_one_works(file, tmp_path, monkeypatch):
    """As the README calls them: who installed the package has no experiments/ here."""
    monkeypatch.chdir(tmp_path)
    assert load("experiments/tiny.yaml") == load_preset("tiny")
    (tmp_path / "experiments").mkdir()
    file("seed: 7").rename("experiments/tiny.yaml")
    assert load("experiments/tiny.yaml").seed == 7
    with pytest.raises(UsageError, match=r"^experiments/none\.yaml: no such config file"):
        load("experiments/none.yaml")


def test_every_number_has_a_range_and_every_range_a_key():
    numbers = set()
    for field in dataclasses.fields(Config):
        value = getattr(Config(), field.name)
        inner = dataclasses.fields(value) if dataclasses.is_dataclass(value) else []
        for name, kind in [(field.name, field.type), *((f"{field.name}.{f.name}", f.type) for f in inner)]:
            if re.search(r"\b(int|float|Trainable)\b", str(kind)):
                numbers.add(name)
    assert numbers == set(RANGES)


def test_the_ends_of_a_range_are_in_it():
    assert Config(dropout=0.99).dropout == 0.99
    changes = {"train.warmup": 0.99, "train.ema": 0, "vision.size": None, "text.train": "full", "train.lr": "1e-4"}
    assert Config().override(changes).train.lr == 1e-4


def test_a_stage_is_the_main_training_with_its_own_keys(file):
    plain = file("width: 64\nheads: 4\nstages:\n  text:\n    modalities: [text]\n    train: {epochs: 3, lr: 0.1}\n")
    assert load(plain).stage("text").train.lr == 0.1
    changed = load(plain, ["stages.text.train.epochs=9", "stages.text.dropout=0.5", "width=32"]).stage("text")
    assert (changed.train.epochs, changed.train.lr, changed.dropout, changed.width) == (9, 0.1, 0.5, 32)
    dotted = load(EXPERIMENTS / "tiny.yaml", ["stages.text.train.epochs=2"]).stage("text")
    assert (dotted.train.epochs, dotted.train.patience, dotted.train.lr) == (2, 40, load_preset("tiny").train.lr)


def test_an_override_leaves_the_config_it_came_from():
    config = Config()
    config.override({"text.lr": 1.0, "stages.a.width": 8, "model": "tfn", "options.x": 1})
    assert config == Config() == from_dict(yaml.safe_load(Config().to_yaml()))


def test_model_names_are_those_that_there_are():
    from typing import get_args

    from senticlip.models import MODELS

    assert get_args(configs.Model) == tuple(MODELS)


def test_a_config_needs_no_torch():
    script = "import sys, senticlip.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_stage_keeps_the_main_trainings_splits():
    for key, value in (("seed", 7), ("protocol", "tenth")):
        config = Config().override({"stages": {"text": {"modalities": ["text"], key: value}}})
        with pytest.raises(UsageError, match=rf"stages.text: {key} must equal the main training's"):
            config.stage("text")
    assert Config().override({"seed": 7, "stages": {"text": {"modalities": ["text"]}}}).stage("text").seed == 7


def test_a_section_that_is_given_in_part_keeps_the_rest():
    config = load(EXPERIMENTS / "small.yaml", ["train={epochs: 5}", "vision={size: 96}"])
    whole = load_preset("small")
    assert (config.train.epochs, config.train.lr, config.train.ema) == (5, whole.train.lr, whole.train.ema)
    assert (config.vision.size, config.vision.encoder) == (96, whole.vision.encoder)
    stage = Config().override({"train.lr": 0.5, "stages": {"a": {"train": {"epochs": 3}}}}).stage("a")
    assert (stage.train.epochs, stage.train.lr) == (3, 0.5)


def test_a_stage_whose_encoder_would_not_fit_is_told_before_it_is_trained():
    for key, value in (("prompt", "none"), ("text.prefix_length", 2), ("text.encoder", "other")):
        config = Config().override({"stages": {"text": {"modalities": ["text"], key: value}}})
        with pytest.raises(UsageError, match=rf"stages\.text: {key} is {value}, but .* in the main training"):
            config.stage("text")
    eyes = {"modalities": ["vision"], "text.prefix_length": 2, "prompt": "none", "vision.size": 96}
    assert Config().override({"stages": {"eyes": eyes}}).stage("eyes").vision.size == 96


def test_a_stage_is_named_like_a_folder():
    for name in ("../../esc", "a/b", "", ".", "-x", "a b"):
        with pytest.raises(UsageError, match=r"stages: .* becomes a folder name"):
            Config().override({"stages": {name: {}}})
    assert Config().override({"stages": {1: {1: 2}, "文字": {}}}).stages
    with pytest.raises(UsageError, match=r"stages\.1: unknown config key 1"):
        Config().override({"stages": {1: {1: 2}}}).stage("1")
    numbered = Config().override({"stages": {1: {"target": "T"}}})
    assert numbered.override({"stages.1.dropout": 0.5}).stage("1").target == "T"


def test_self_mm_keeps_its_rows():
    changes = {"train.recombine": 1, "train.mislead": 0.1, "train.modality_dropout": 0.1, "train.balance": "sampler"}
    for change in ({key: value} for key, value in changes.items()):
        with pytest.raises(UsageError, match="self_mm keeps a label per row"):
            Config().override({"model": "self_mm", **change})


def test_options_are_the_peers():
    with pytest.raises(UsageError, match="options: nonsense"):
        Config().override({"options.nonsense": 1})
    assert Config().override({"model": "tfn", "options": {"dropout": 0.1}}).options == {"dropout": 0.1}
