"""Soft targets: each row's from a copy that has not seen it, and what the loss makes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.models.tester import DIMS, features
from tests.test_train import assert_same, furnish, settings

from senticlip import distill
from senticlip.config import Config
from senticlip.data.loader import ArrayRows, ClipSet, to_batch
from senticlip.models.clip_ca_msa import ClipCaMsa
from senticlip.structures import Clip, Output, UserError
from senticlip.train import train


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("distill"))


def words(place, **changes):
    return settings(place, modalities=["text"], **{"train.distill": 0.5, "train.epochs": 2, **changes})


def numbered(n):
    """A set whose row i has i + 1 positions, all of the value i."""
    mask = np.arange(n) <= np.arange(n)[:, None]
    values = (np.arange(n, dtype=np.float32)[:, None] * mask)[..., None]
    clips = [Clip(str(i), None, "好", {"M": float(i % 3 - 1)}) for i in range(n)]
    return ClipSet(clips, {"text": ArrayRows(values, mask)})


def test_a_subset_has_its_rows_values_labels_and_soft_targets():
    whole, rows = numbered(7), np.array([5, 2, 6])
    part = whole.subset(rows)
    assert len(part) == 3
    assert [clip.id for clip in part.clips] == ["5", "2", "6"]
    assert part.stores["text"].lengths.tolist() == [6, 3, 7]
    part.soft = np.eye(3, dtype=np.float32)
    batch = to_batch(part.__getitems__([2, 0]))
    assert batch.modalities["text"].values[:, 0, 0].tolist() == [6, 5]
    assert batch.labels["M"].tolist() == [-1, 1]
    assert batch.labels["soft"].tolist() == [[0, 0, 1], [1, 0, 0]]
    assert "soft" not in to_batch(whole.__getitems__([0])).labels


class Recorder(torch.nn.Module):
    """A model that answers with what it was trained on: the probability of class 0 is the share of seen rows."""

    def __init__(self):
        super().__init__()
        self.experiment, self.seen = Config(modalities=["text"]), []


def recorded(patch, log):
    def fit(model, training, valid, arguments, resume):
        model.seen = [clip.id for clip in training.clips]
        log.append(model.seen)

    def outputs(model, data):
        seen = torch.tensor([float(clip.id in model.seen) for clip in data.clips])
        own = torch.tensor([float(clip.id) for clip in data.clips])
        return Output({}, torch.stack([seen, own, own], 1).log())

    for name, value in {"fit": fit, "outputs": outputs, "calibrate": lambda model, valid: None}.items():
        patch.setattr(distill, name, value)


class Alone:
    """The TrainingArguments of a training by one process."""

    process_index = 0

    def main_process_first(self):
        return torch.no_grad()


@pytest.mark.parametrize("n", [2, 9, 40])
def test_no_row_is_judged_by_a_copy_that_has_seen_it(n, tmp_path, monkeypatch):
    log, model = [], Recorder()
    recorded(monkeypatch, log)
    for fold in range(distill.FOLDS):
        (tmp_path / f"fold-{fold}").mkdir()
    found = distill.soft_targets(model, numbered(n), numbered(3), lambda folder: Alone(), tmp_path, False)
    assert found[:, 0].tolist() == [0] * n
    np.testing.assert_allclose(found[:, 1], np.arange(n), rtol=1e-6)  # in their own places
    assert sorted([*log[0], *log[1]]) == sorted(map(str, range(n)))
    assert {len(seen) for seen in log} <= {n // 2, (n + 1) // 2}
    assert not model.seen
    distill.soft_targets(model, numbered(n), numbered(3), lambda folder: Alone(), tmp_path, True)
    assert len(log) == 2  # nothing was trained again


def test_one_clip_has_no_other_half(tmp_path):
    with pytest.raises(UserError, match="1 training clip"):
        distill.soft_targets(Recorder(), numbered(1), numbered(3), lambda folder: Alone(), tmp_path, False)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_loss_is_between_the_label_and_the_soft_target(share):
    changes = {"modalities": ["text"], "width": 16, "heads": 2, "focal_gamma": 0.0, "dropout": 0.0, "loss": "sum"}
    network = ClipCaMsa(Config().override({**changes, "train.distill": share}), {"text": DIMS["text"]}).eval()
    batch = features(names=("text",))
    output = network(batch)
    logits = output.logits["text"].detach().double().numpy()
    logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    soft = np.random.default_rng(0).dirichlet(np.ones(3), len(logits))
    scores = batch.labels["M"].numpy()
    hard = -logp[np.arange(len(logp)), (np.sign(scores) + 1).astype(int)]
    plain = float(network.loss(output, batch)[0].detach())
    assert plain == pytest.approx(hard.mean(), abs=1e-6)
    batch.labels["soft"] = torch.from_numpy(soft).float()
    wanted = ((1 - share) * hard + share * -(soft * logp).sum(1)).mean()
    assert float(network.loss(output, batch)[0].detach()) == pytest.approx(wanted, abs=1e-5)


def test_a_kill_in_the_second_fold_changes_nothing(place, tmp_path, monkeypatch):
    config, fit, calls = words(place), distill.fit, []
    train(config, place / "data", tmp_path / "whole")

    def dies(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fit(*args)

    with monkeypatch.context() as patch:
        patch.setattr(distill, "fit", dies)
        with pytest.raises(KeyboardInterrupt):
            train(config, place / "data", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(distill, "fit", lambda *args: calls.append(1) or fit(*args))
        train(config, place / "data", tmp_path / "run", resume=True)
    assert len(calls) == 3
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert_same(one, other)
    assert not (tmp_path / "run" / "checkpoints").exists()
    plain = train(words(place, **{"train.distill": 0.0}), place / "data", tmp_path / "plain")
    assert plain["best_epoch"]
    assert any(
        not torch.equal(value, one[name]) for name, value in load_file(tmp_path / "plain" / "model.safetensors").items()
    )


def test_without_resume_the_folds_begin_anew(place, tmp_path, monkeypatch):
    config, fit, calls = words(place), distill.fit, []

    def counted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fit(*args)

    monkeypatch.setattr(distill, "fit", counted)
    with pytest.raises(KeyboardInterrupt):
        train(config, place / "data", tmp_path / "run")
    train(config, place / "data", tmp_path / "run")
    assert len(calls) == 4
