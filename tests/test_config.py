"""Config files: what is accepted, what is rejected with a one-line error, and that this does not need torch."""

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
def write_yaml(tmp_path):
    def write(text):
        path = tmp_path / "e.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip_through_resolved_yaml(name, tmp_path):
    config = load_preset(name)
    (tmp_path / "resolved.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert load(tmp_path / "resolved.yaml") == config


def test_configuration_page_lists_all_keys_and_defaults():
    page = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `([\w.]+)` \| `(.*?)` \| .+ \|$", page, re.MULTILINE)
    data = Config().to_dict()
    sections = {key: value for key, value in data.items() if isinstance(value, dict) and value}
    flat = {key: value for key, value in data.items() if key not in sections}
    flat |= {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
    assert {key: yaml.safe_load(value) for key, value in documented} == flat


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_table_rows_apply_to_every_preset(path):
    changes = row_changes(f"{path.parent.name}/{path.name}")
    assert changes
    for preset in PRESETS:
        config = load_preset(preset).override(changes)
        assert all(config.stage(name).stages == {} for name in config.stages)


@pytest.mark.parametrize(
    ("override", "message"),
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
def test_invalid_overrides_are_rejected_in_one_line(override, message):
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        load(EXPERIMENTS / "tiny.yaml", [override])
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


def test_invalid_config_files(write_yaml, tmp_path):
    for text, message in [
        ("a: [", "cannot be read as YAML"),
        ("- 1", "expected keys and values"),
        ("text: 3", "text: expected keys"),
        ("foo: 1", "unknown config key foo"),
    ]:
        with pytest.raises(UsageError, match=rf"e\.yaml: .*{message}"):
            load(write_yaml(text))
    write_yaml("").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read as YAML"):
        load(tmp_path / "e.yaml")
    with pytest.raises(UsageError, match="no such config file"):
        load(tmp_path)


def nested(item, outer):
    """YAML with aliases nested seven levels deep, each level ten times as long as the one below it."""
    levels = [f"k0: &a0 {item}"] + [f"k{i}: &a{i} {outer.format(', '.join([f'*a{i - 1}'] * 10))}" for i in range(1, 7)]
    return "".join(f"\n  {level}" for level in levels)


@pytest.mark.parametrize(
    ("text", "message"),
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
def test_oversized_yaml_is_rejected_in_one_line(write_yaml, text, message):
    with pytest.raises(UsageError, match=rf"e\.yaml: cannot be read as YAML — {message}$"):
        load(write_yaml(text))


def test_yaml_anchors_can_be_reused(write_yaml):
    text = "text: &one {lr: 0.1, train: 2}\nvision: {<<: *one, frames: 3}\nstages: {a: {text: *one}, b: {text: *one}}"
    config = load(write_yaml(text))
    assert (config.vision.lr, config.vision.frames, config.stage("b").text.train) == (0.1, 3, 2)


@pytest.mark.parametrize("value", ["x" * 10_000, ["x"] * 10_000, {"x" * 10_000: 1}])
def test_error_messages_shorten_long_values(value):
    for data in ({"target": [value]}, {"target": value}, {"modalities": [value, "x"]}, {"seed": value}):
        with pytest.raises(UsageError) as error:
            from_dict(data)
        assert len(str(error.value)) < 200
    for data in ({"x" * 10_000: 1}, {"options": {"x" * 10_000: 1}}):
        with pytest.raises(UsageError) as error:
            from_dict(data)
        assert len(str(error.value)) < 300


def test_presets_are_found_from_any_working_directory(write_yaml, tmp_path, monkeypatch):
    """The README's paths also work for an installed package, without an experiments/ folder here."""
    monkeypatch.chdir(tmp_path)
    assert load("experiments/tiny.yaml") == load_preset("tiny")
    (tmp_path / "experiments").mkdir()
    write_yaml("seed: 7").rename("experiments/tiny.yaml")
    assert load("experiments/tiny.yaml").seed == 7
    with pytest.raises(UsageError, match=r"^experiments/none\.yaml: no such config file"):
        load("experiments/none.yaml")


def test_ranges_cover_exactly_the_numeric_keys():
    numbers = set()
    for field in dataclasses.fields(Config):
        value = getattr(Config(), field.name)
        inner = dataclasses.fields(value) if dataclasses.is_dataclass(value) else []
        for name, kind in [(field.name, field.type), *((f"{field.name}.{f.name}", f.type) for f in inner)]:
            if re.search(r"\b(int|float|Trainable)\b", str(kind)):
                numbers.add(name)
    assert numbers == set(RANGES)


def test_range_limits_are_inclusive():
    assert Config(dropout=0.99).dropout == 0.99
    changes = {"train.warmup": 0.99, "train.ema": 0, "vision.size": None, "text.train": "full", "train.lr": "1e-4"}
    assert Config().override(changes).train.lr == 1e-4


def test_stage_overrides_keys_of_main_training(write_yaml):
    file = write_yaml(
        "width: 64\nheads: 4\nstages:\n  text:\n    modalities: [text]\n    train: {epochs: 3, lr: 0.1}\n"
    )
    assert load(file).stage("text").train.lr == 0.1
    changed = load(file, ["stages.text.train.epochs=9", "stages.text.dropout=0.5", "width=32"]).stage("text")
    assert (changed.train.epochs, changed.train.lr, changed.dropout, changed.width) == (9, 0.1, 0.5, 32)
    dotted = load(EXPERIMENTS / "tiny.yaml", ["stages.text.train.epochs=2"]).stage("text")
    assert (dotted.train.epochs, dotted.train.patience, dotted.train.lr) == (2, 40, load_preset("tiny").train.lr)


def test_override_does_not_modify_original():
    config = Config()
    config.override({"text.lr": 1.0, "stages.a.width": 8, "model": "tfn", "options.x": 1})
    assert config == Config() == from_dict(yaml.safe_load(Config().to_yaml()))


def test_model_names_match_models():
    from typing import get_args

    from senticlip.models import MODELS

    assert get_args(configs.Model) == tuple(MODELS)


def test_config_does_not_import_torch():
    script = "import sys, senticlip.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_stage_rejects_different_seed_or_protocol():
    for key, value in (("seed", 7), ("protocol", "tenth")):
        config = Config().override({"stages": {"text": {"modalities": ["text"], key: value}}})
        with pytest.raises(UsageError, match=rf"stages.text: {key} must equal the main training's"):
            config.stage("text")
    assert Config().override({"seed": 7, "stages": {"text": {"modalities": ["text"]}}}).stage("text").seed == 7


def test_partial_section_keeps_other_keys():
    config = load(EXPERIMENTS / "small.yaml", ["train={epochs: 5}", "vision={size: 96}"])
    preset = load_preset("small")
    assert (config.train.epochs, config.train.lr, config.train.ema) == (5, preset.train.lr, preset.train.ema)
    assert (config.vision.size, config.vision.encoder) == (96, preset.vision.encoder)
    stage = Config().override({"train.lr": 0.5, "stages": {"a": {"train": {"epochs": 3}}}}).stage("a")
    assert (stage.train.epochs, stage.train.lr) == (3, 0.5)


def test_stage_rejects_incompatible_encoder_settings():
    for key, value in (("prompt", "none"), ("text.prefix_length", 2), ("text.encoder", "other")):
        config = Config().override({"stages": {"text": {"modalities": ["text"], key: value}}})
        with pytest.raises(UsageError, match=rf"stages\.text: {key} is {value}, but .* in the main training"):
            config.stage("text")
    vision_stage = {"modalities": ["vision"], "text.prefix_length": 2, "prompt": "none", "vision.size": 96}
    assert Config().override({"stages": {"eyes": vision_stage}}).stage("eyes").vision.size == 96


def test_stage_names_must_be_valid_folder_names():
    for name in ("../../esc", "a/b", "", ".", "-x", "a b"):
        with pytest.raises(UsageError, match=r"stages: .* becomes a folder name"):
            Config().override({"stages": {name: {}}})
    assert Config().override({"stages": {1: {1: 2}, "文字": {}}}).stages
    with pytest.raises(UsageError, match=r"stages\.1: unknown config key 1"):
        Config().override({"stages": {1: {1: 2}}}).stage("1")
    numbered = Config().override({"stages": {1: {"target": "T"}}})
    assert numbered.override({"stages.1.dropout": 0.5}).stage("1").target == "T"


def test_self_mm_rejects_incompatible_training_keys():
    changes = {"train.recombine": 1, "train.mislead": 0.1, "train.modality_dropout": 0.1, "train.balance": "sampler"}
    for change in ({key: value} for key, value in changes.items()):
        with pytest.raises(UsageError, match="self_mm keeps a label per row"):
            Config().override({"model": "self_mm", **change})


def test_only_peers_have_options():
    with pytest.raises(UsageError, match="options: nonsense"):
        Config().override({"options.nonsense": 1})
    assert Config().override({"model": "tfn", "options": {"dropout": 0.1}}).options == {"dropout": 0.1}
