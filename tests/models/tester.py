"""Tests that every model must pass: inherit from ``ModelTester`` and set ``model``."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from senticlip.config import Config
from senticlip.models import MODELS
from senticlip.structures import Batch, Output, Sequence

DIMS = {"text": 12, "vision": 10, "audio": 6}
LENGTHS = {"text": 9, "vision": 4, "audio": 20}


def features(rows=5, names=("text", "vision"), seed=0, absent=()):
    """Random features of random lengths; ``absent``: (row, modality) pairs whose positions are all masked."""
    random = torch.Generator().manual_seed(seed)
    modalities = {}
    for name in names:
        longest = LENGTHS[name]
        lengths = torch.randint(1, longest + 1, (rows,), generator=random)
        lengths[0] = longest
        for row, missing in absent:
            if missing == name:
                lengths[row] = 0
        mask = torch.arange(longest) < lengths[:, None]
        modalities[name] = Sequence(torch.randn(rows, longest, DIMS[name], generator=random), mask)
    labels = {t: (torch.randint(-5, 6, (rows,), generator=random) / 5).float() for t in "MTAV"}
    return Batch(modalities, labels, torch.arange(rows))


def answers(output: Output) -> torch.Tensor:
    """B×C log-probabilities, or B×1 scores."""
    return output.log_probs if output.log_probs is not None else output.score[:, None]


class ModelTester:
    """Tests of a network on random features."""

    model = ""
    changes: dict = {}
    subsets = (("text", "vision"), ("text",), ("vision",), ("text", "vision", "audio"))

    def config(self, names=("text", "vision"), **changes):
        base = {"model": self.model, "modalities": list(names), "width": 16, "heads": 4, "vision.frames": 4}
        return Config().override({**base, **self.changes, **changes})

    def network(self, names=("text", "vision"), seed=0, **changes):
        torch.manual_seed(seed)
        return MODELS[self.model](self.config(names, **changes), {n: DIMS[n] for n in names})

    @pytest.mark.parametrize("names", subsets, ids="+".join)
    def test_any_subset_of_modalities_gives_an_answer(self, names):
        network, batch = self.network(names).eval(), features(names=names)
        output = network(batch)
        assert answers(output).isfinite().all()
        assert len(answers(output)) == 5
        if output.log_probs is not None:
            torch.testing.assert_close(output.log_probs.exp().sum(-1), torch.ones(5))
        if output.weights:
            torch.testing.assert_close(torch.stack(list(output.weights.values())).sum(0), torch.ones(5))

    def test_padding_has_no_effect(self):
        network, batch = self.network().eval(), features(absent=[(1, "text"), (2, "vision")])
        longer = {}
        for name, (values, mask) in batch.modalities.items():
            junk = torch.where(mask[..., None], values, torch.nan)
            tail = torch.full((5, 3, DIMS[name]), torch.inf)
            longer[name] = Sequence(torch.cat([junk, tail], 1), torch.nn.functional.pad(mask, (0, 3)))
        torch.testing.assert_close(answers(network(batch)), answers(network(batch._replace(modalities=longer))))

    def test_rows_are_independent(self):
        network, batch = self.network().eval(), features(absent=[(1, "text")])
        row = {n: Sequence(s.values[2:3], s.mask[2:3]) for n, s in batch.modalities.items()}
        torch.testing.assert_close(answers(network(batch))[2:3], answers(network(Batch(row, {}))))

    def test_rows_with_missing_modalities_get_finite_answers(self):
        network = self.network().eval()
        batch = features(absent=[(0, "text"), (1, "vision"), (2, "text"), (2, "vision")])
        assert answers(network(batch)).isfinite().all()
        only_text = batch._replace(modalities={"text": batch.modalities["text"]})
        assert answers(network(only_text)).isfinite().all()

    def test_every_parameter_gets_a_gradient(self):
        network, batch = self.network(), features(absent=[(1, "text"), (2, "vision")])
        network.train()
        if hasattr(network, "epoch_started"):
            network.epoch_started(2)
            network.loss(network(batch), batch)  # from here on, Self-MM has centres and its unimodal labels differ
        loss, logs = network.loss(network(batch), batch)
        loss.backward()
        assert loss.isfinite()
        assert all(torch.as_tensor(value).isfinite().all() for value in logs.values())
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name

    def test_rows_without_a_label_are_ignored_in_training(self):
        network, batch = self.network().eval(), features()
        labels = {
            t: values.clone().index_fill_(0, torch.tensor([1, 3]), torch.nan) for t, values in batch.labels.items()
        }
        labelled = torch.tensor([0, 2, 4])
        subset = Batch(
            {n: Sequence(s.values[labelled], s.mask[labelled]) for n, s in batch.modalities.items()},
            {t: values[labelled] for t, values in labels.items()},
            labelled,
        )
        with_gaps = network.loss(network(batch), batch._replace(labels=labels))[0]
        torch.testing.assert_close(with_gaps, network.loss(network(subset), subset)[0])
        no_labels = {t: torch.full_like(values, torch.nan) for t, values in labels.items()}
        assert network.loss(network(batch), batch._replace(labels=no_labels))[0].isfinite()
        network.train()
        network.loss(network(batch), batch._replace(labels=labels))[0].backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())

    def test_loss_decreases_in_training(self):
        network, batch = self.network(seed=1), features()
        groups = network.param_groups(self.config()) if hasattr(network, "param_groups") else network.parameters()
        optimizer = torch.optim.Adam(groups, lr=5e-3)
        network.eval()  # without dropout
        losses = []
        for _ in range(40):
            loss = network.loss(network(batch), batch)[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if hasattr(network, "step_finished"):
                network.step_finished()
            losses.append(float(loss.detach()))
        assert np.mean(losses[-5:]) < np.mean(losses[:3])

    def test_state_dict_round_trip(self, tmp_path):
        network, batch = self.network().eval(), features()
        torch.save(network.state_dict(), tmp_path / "state.pt")
        restored = self.network(seed=9).eval()
        restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        torch.testing.assert_close(answers(network(batch)), answers(restored(batch)))

    def test_attention_weights_are_normalised(self):
        network, batch = self.network().eval(), features()
        output = network(batch, attention=True)
        default = network(batch)
        assert not default.attention
        torch.testing.assert_close(answers(output), answers(default))
        for name, weights in output.attention.items():
            assert weights.dim() == 4, name
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
