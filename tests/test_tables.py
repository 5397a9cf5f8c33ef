"""The rows of the paper's tables: every file loads, and rows share stages and runs where they can."""

from __future__ import annotations

import dataclasses
import re

import pytest
import yaml

from senticlip.config import Config, TrainConfig, load
from senticlip.models import MODELS
from senticlip.structures import UsageError
from senticlip.tables import (
    EXPERIMENTS,
    Row,
    RunSettings,
    Table,
    digest,
    load_experiment,
    load_tables,
    notes,
    row_changes,
)

STAGES = {
    "text": {"modalities": ["text"], "target": "T", "text.train": "full", "train.epochs": 2},
    "vision": {"modalities": ["vision"], "target": "V", "vision.train": "full"},
}
FILES = sorted(p for p in EXPERIMENTS.rglob("*.yaml") if p.name != "tables.yaml")


def staged_preset():
    return Config().override({"stages": STAGES, "text.train": "frozen", "vision.train": "frozen"})


def tables(preset, numbers=None, labels=("M", "T", "V"), random=False):
    return {table.number: table for table in load_tables(preset, numbers, set(labels), random)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(EXPERIMENTS)))
def test_every_shipped_yaml_loads_as_an_experiment(path):
    config = load(path)
    assert config.model in MODELS
    for stage in config.stages:
        config.stage(stage)


def test_every_row_file_is_used_by_a_table():
    text = (EXPERIMENTS / "tables.yaml").read_text(encoding="utf-8")
    for path in FILES:
        if path.parent != EXPERIMENTS:
            assert str(path.relative_to(EXPERIMENTS)) in text


def test_the_tables_of_the_paper_are_complete():
    by_number = tables(Config())
    assert [len(by_number[n].rows) for n in "12345678"] == [7, 7, 5, 4, 3, 2, 2, 2]
    assert by_number["1"].rows[-1].paper == {"accuracy": 78.07, "macro_f1": 77.39}
    for table in by_number.values():
        assert table.reference in [row.name for row in table.rows]
    assert any("k/228" in note for note in notes())


def test_paper_numbers_have_the_right_column_order():
    rows = yaml.safe_load((EXPERIMENTS / "tables.yaml").read_text(encoding="utf-8"))["tables"]["2"]["rows"]
    # macro F1 lies near the harmonic mean of P and R, so swapped columns would show
    for name in ("OpenFace2.0", "ConvNeXt", "ViT-B-32"):
        _, f1, precision, recall = rows[name]["paper"]
        assert f1 == pytest.approx(2 * precision * recall / (precision + recall), abs=0.5)


def test_identical_rows_share_a_digest():
    by_number = tables(staged_preset())
    full = {digest(config) for n in "15678" for config in by_number[n].rows[-1].configs.values()}
    assert len(full) == 1
    ablations = {digest(config) for n in "5678" for row in by_number[n].rows for config in row.configs.values()}
    assert len(ablations) == 6
    config = staged_preset()
    assert digest(config) == digest(config.override({"seed": 4}))


def test_all_rows_share_the_stages():
    preset = staged_preset()
    expected = {name: digest(preset.stage(name)) for name in STAGES}
    for number, table in tables(preset, ["1", "5", "6", "7", "8"]).items():
        for row in table.rows:
            for config in row.configs.values():
                for name in STAGES:
                    assert digest(config.stage(name)) == expected[name], (number, row.name)
                    assert config.override({"seed": 3}).stage(name).seed == 3


def test_row_with_another_encoder_trains_its_own_stage():
    preset = staged_preset()
    row = tables(preset, ["4"])["4"].rows[0].configs["M"]
    assert row.vision.encoder == row.stage("vision").vision.encoder == "timm/resnet34.a1_in1k"
    assert digest(row.stage("vision")) != digest(preset.stage("vision"))
    assert digest(row.stage("text")) == digest(preset.stage("text"))  # this stage does not use the replaced encoder


def test_single_encoders_are_scored_on_their_own_label_and_on_m():
    by_number = tables(staged_preset(), ["2", "3"])
    row = by_number["3"].rows[-1]
    assert [(t, c.target, c.modalities) for t, c in row.configs.items()] == [("T", "T", ["text"]), ("M", "M", ["text"])]
    assert digest(row.configs["T"]) == digest(staged_preset().stage("text"))
    assert list(tables(Config(), ["2"], labels=("M",))["2"].rows[0].configs) == ["M"]


def test_replaced_encoders_get_random_weights_and_no_stage():
    by_number = tables(staged_preset(), ["2", "4"], random=True)
    vgg = by_number["2"].rows[0].configs["V"]
    assert (vgg.vision.pretrained, vgg.vision.train, vgg.vision.size) == (False, "frozen", 64)
    multimodal = by_number["4"].rows[0].configs["M"]
    assert list(multimodal.stages) == ["text"]
    assert multimodal.label.encoder is None
    assert by_number["4"].rows[-1].configs["M"].vision.pretrained


def test_unknown_table_is_rejected():
    with pytest.raises(UsageError, match="the paper has Tables 1, 2"):
        tables(Config(), ["9"])


def test_nested_keys_become_dotted():
    assert row_changes("clip/resnet34.yaml")["vision.encoder"] == "timm/resnet34.a1_in1k"
    assert row_changes("peers/tfn.yaml")["options"]["post_fusion"] == 32


@pytest.mark.parametrize("file", sorted(path.name for path in (EXPERIMENTS / "peers").glob("*.yaml")))
def test_peers_set_every_training_option(file):
    # left to the preset: how rows are scored, on what they run, and an option of the main model only
    from_preset = {"metric", "precision", "compile", "scalar_lr"}
    assert {f.name for f in dataclasses.fields(TrainConfig)} - from_preset <= {
        key.removeprefix("train.") for key in row_changes(f"peers/{file}")
    }


def test_peer_file_on_top_of_a_preset_equals_the_table_row(tmp_path):
    small, tfn = (str(EXPERIMENTS / name) for name in ("small.yaml", "peers/tfn.yaml"))
    config = load_experiment([small, tfn], ["train.epochs=7"])
    row = next(row for row in tables(load(small))["1"].rows if row.name == "TFN").configs["M"]
    assert config.to_dict() == row.override({"train.epochs": 7}).to_dict()
    assert config.stage("text").train.epochs == load(small).stage("text").train.epochs
    # overrides reach the stages, as with a single file: stages use the same encoders and the same split
    overrides = [
        "text.encoder=F",
        "vision.encoder=G",
        "protocol=tenth",
        "stages.text.train.epochs=2",
        "options.post_fusion=8",
    ]
    config = load_experiment([small, tfn], overrides)
    text, vision = config.stage("text"), config.stage("vision")
    assert (text.text.encoder, vision.vision.encoder, text.protocol, text.train.epochs) == ("F", "G", "tenth", 2)
    assert (config.text.encoder, config.model, config.options["post_fusion"], text.options) == ("F", "tfn", 8, {})
    vgg = load_experiment([small, str(EXPERIMENTS / "vision" / "vgg16.yaml")], ["vision.encoder=G"])
    assert vgg.vision.encoder == vgg.stage("vision").vision.encoder == "G"
    (tmp_path / "wrong.yaml").write_text("fusion: {x: 1}", encoding="utf-8")
    with pytest.raises(UsageError, match=r"wrong\.yaml: config key fusion"):
        load_experiment([small, str(tmp_path / "wrong.yaml")])


def test_rows_change_what_their_names_say():
    all_tables = load_tables(Config(), None, set("MTAV"), False)
    configs = {table.number: {row.name: row.configs["M"] for row in table.rows} for table in all_tables}
    values = {
        n: {name: str(getattr(c, key)) for name, c in configs[n].items()}
        for n, key in zip("15678", ("model", "temporal", "fusion", "head", "loss"), strict=True)
    }
    assert values["1"] == {
        "TFN": "tfn",
        "LMF": "lmf",
        "MulT": "mult",
        "Self-MM": "self_mm",
        "MMAF": "mmaf",
        "MMAF+T+A+V": "mmaf",
        "CLIP-CA-MSA": "clip_ca_msa",
    }
    assert values["5"] == {"MeanP": "mean", "LSTM": "lstm", "Transformer": "transformer"}
    assert values["6"] == {"concat": "concat", "cross-attention": "cross-attention"}
    assert values["7"] == {"linear-CLS": "linear", "similarity-CLS": "similarity"}
    assert values["8"] == {"加权求和损失": "sum", "同方差不确定性损失": "uncertainty"}
    patterns = {
        "VGG-16": "vgg16",
        "ConvNeXt": "convnext",
        "OpenFace2.0": "openface",
        "ResNet34": "resnet34",
        "ResNet50": "resnet50",
        "ViT-B-32": "patch32",
        "ViT-B-16": "patch16",
        "CLIP-ResNet34": "resnet34",
        "CLIP-ResNet50": "resnet50",
        "CLIP-ViT32": "patch32",
        "Al-PIFT": "albert",
        "B-PIFT": "/?bert-base",
        "E-PIFT": "ernie",
        "M-PIFT": "macbert",
        "PIFT": "roberta",
        "CLIP-CA-MSA": "chinese-clip",
    }
    for number in "234":
        for name, config in configs[number].items():
            encoder = config.text.encoder if number == "3" else config.vision.encoder
            assert re.search(patterns[name], encoder), (name, encoder)


def test_paper_numbers_are_stored_by_metric():
    """Table 2's VGG-16 in the paper: accuracy 48.25, F1 35.95, precision 31.08, recall 42.63."""
    paper = {"accuracy": 48.25, "macro_f1": 35.95, "precision": 31.08, "recall": 42.63}
    assert tables(Config())["2"].rows[0].paper == paper


@pytest.mark.parametrize("change", ["width=32", "train.lr=0.5", "text.train=2", "target=T", "label.prompt='{}'"])
def test_digest_changes_with_the_config(change):
    assert digest(load_experiment([str(EXPERIMENTS / "tiny.yaml")], [change])) != digest(
        load(EXPERIMENTS / "tiny.yaml")
    )


def test_row_that_keeps_its_own_value_is_reported():
    preset = Config().override({"width": 64})
    rows = [Row("both", {"M": preset, "T": preset}, {}), Row("one", {"M": preset, "T": Config()}, {})]
    (sentence,) = RunSettings(preset, "paper", ["width=64"], "data").kept_value_notes(Table("1", "", "", "both", rows))
    assert sentence == "The change to width does not apply to one: their own value stays."
