"""The code blocks of docs/python.md run as they are, on tiny encoders and clips."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pandas as pd
import pytest
from tests.test_train import make_assets, settings

import senticlip
from senticlip.data.sims import read_clips
from senticlip.train import train

PAGE = Path(__file__).parents[1] / "docs" / "python.md"


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """The folders and files that the page names."""
    root = make_assets(tmp_path)
    (root / "data").rename(root / "SIMS")
    (root / "OTHER").symlink_to("SIMS")
    experiment = settings(root, **{"train.epochs": 1})
    (root / "experiments").mkdir()
    (root / "experiments" / "small.yaml").write_text(experiment.to_yaml(), encoding="utf-8")
    train(experiment, root / "SIMS", root / "RUN")
    clips = read_clips(root / "SIMS", "test")[:3]
    with (root / "clips.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["path", "text"], *((clip.video, clip.text) for clip in clips[:2])])
        csv.writer(file).writerow([clips[2].video, ""])
    monkeypatch.chdir(root)
    return root


def test_page_runs(workspace):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 5
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)

    found, output = names["found"], names["output"]
    assert list(found.label) == [answer.label for answer in names["predictor"].predict(names["clips"])]
    assert pd.isna(found.text_positive[2])  # an empty cell means no text
    assert output.attention["text_asks_vision"].shape[-1] == 1 + 2
    assert output.alone["vision"].shape == (2, len(senticlip.LABELS))
    assert output.features["vision"].shape == (2, 16)
    assert {"accuracy", "macro_f1"} <= names["difference"].keys()
    before, after = (senticlip.load(run)(text="好") for run in ("RUN", "tuned"))
    assert before.probabilities != after.probabilities
    encoder = names["other"].encoders["text"].state_dict()
    assert all((value == encoder[name]).all() for name, value in names["model"].encoders["text"].state_dict().items())
    assert names["other"].network.config.target == "V"
