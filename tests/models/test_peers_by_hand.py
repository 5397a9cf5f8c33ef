"""The peers' outputs by hand, row by row from its real positions only; and their dropout."""

from __future__ import annotations

import math

import pytest
import torch
from tests.models.tester import DIMS, answers, features
from torch import nn

from senticlip.config import Config
from senticlip.models import MODELS, mult

NAMES = ("text", "vision", "audio")
linear = nn.functional.linear


def make_network(model, names=NAMES, **options):
    """A network in eval mode whose norms and biases differ from their initial values."""
    torch.manual_seed(0)
    config = Config().override({"model": model, "modalities": list(names), "options": options})
    network = MODELS[model](config, {name: DIMS[name] for name in names}).eval()
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, (nn.BatchNorm1d, nn.LayerNorm)):
                part.weight.uniform_(0.5, 2)
                part.bias.normal_()
            if isinstance(part, nn.BatchNorm1d):
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2)
            if isinstance(part, nn.Linear):
                part.bias.normal_()
    return network


def rows_of(batch):
    """The real positions L×d of each modality, row by row."""
    for index in range(5):
        yield index, {name: values[index][mask[index]] for name, (values, mask) in batch.modalities.items()}


def last_lstm_state(net, x):
    return net.lstm(x[None])[1][0][0, 0]


def pooled_state(net, x):
    """Mean over time, batch norm by its running statistics, three layers."""
    norm, x = net.norm, x.mean(0)
    x = (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    assert len(net.layers) == 3
    for layer in net.layers:
        x = linear(x, layer.weight, layer.bias).clamp(min=0)
    return x


def factors_of(network, row):
    """A row's vectors that TFN and LMF multiply, each with a 1 prepended."""
    text = linear(last_lstm_state(network.nets["text"].last, row["text"]), network.nets["text"].out.weight)
    states = {"text": text + network.nets["text"].out.bias}
    states |= {name: pooled_state(network.nets[name], row[name]) for name in ("vision", "audio")}
    return [torch.cat([torch.ones(1), states[name]]) for name in NAMES]


def test_tfn():
    network = make_network("tfn", text_hidden=8, text_out=6, vision_hidden=5, audio_hidden=4, score_range=2.0)
    batch = features(names=NAMES)
    scores = network(batch).score
    weight = network.fusion.weight.view(5, 32, 7, 6)  # axes: sound, output, text, video
    for row, parts in rows_of(batch):
        text, vision, audio = factors_of(network, parts)
        fused = (torch.einsum("a,b,c,coab->o", text, vision, audio, weight) + network.fusion.bias).clamp(min=0)
        hidden = linear(fused, network.hidden.weight, network.hidden.bias).clamp(min=0)
        raw = linear(hidden, network.out.weight, network.out.bias)[0]
        torch.testing.assert_close(scores[row], 2.0 * (2 / (1 + (-raw).exp()) - 1))  # between -2 and 2


def test_lmf():
    network = make_network("lmf", text_hidden=8, vision_hidden=5, audio_hidden=4, rank=3)
    batch = features(names=NAMES)
    scores = network(batch).score
    for row, parts in rows_of(batch):
        factors = factors_of(network, parts)
        assert [len(state) for state in factors] == [5, 6, 5]  # the text branch outputs half the LSTM's width
        expected = network.fusion.bias[0]
        for r, weight in enumerate(network.fusion.weights[0]):
            text, vision, audio = (
                x @ factor[r, :, 0] for x, factor in zip(factors, network.fusion.factors, strict=True)
            )
            expected = expected + weight * text * vision * audio
        torch.testing.assert_close(scores[row], expected)


def mult_layer(layer, x, memory):
    """Pre-norm; step i attends to the steps up to i + the difference of the lengths."""
    heads, d = layer.heads, x.shape[1]
    weight, bias = layer.project.weight.split(d), layer.project.bias.split(d)
    normed_memory = layer.norm1(memory)
    q, k, v = (linear(y, weight[i], bias[i]) for i, y in enumerate((layer.norm1(x), normed_memory, normed_memory)))
    context = torch.zeros_like(x)
    for i in range(len(x)):
        visible = min(i + abs(len(memory) - len(x)) + 1, len(memory))
        for h in torch.arange(d).split(d // heads):
            weights = (k[:visible, h] @ q[i, h] / math.sqrt(d // heads)).softmax(0)
            context[i, h] = weights @ v[:visible, h]
    x = x + linear(context, layer.out.weight, layer.out.bias)
    inner = linear(layer.norm2(x), layer.fc1.weight, layer.fc1.bias).clamp(min=0)
    return x + linear(inner, layer.fc2.weight, layer.fc2.bias)


def mult_encoder(encoder, x, memory=None):
    """All layers attend to the same memory, or each to its own input (self-attention); inputs are scaled by √d."""
    x = math.sqrt(x.shape[1]) * x
    memory = memory if memory is None else math.sqrt(memory.shape[1]) * memory
    for layer in encoder.layers:
        x = mult_layer(layer, x, x if memory is None else memory)
    return encoder.norm(x)


def test_mult():
    network, batch = make_network("mult", width=8, heads=2, text_kernel=3), features(names=NAMES)
    scores = network(batch).score
    for row, parts in rows_of(batch):
        x = {}
        for name, values in parts.items():
            kernel = network.project[name].weight  # width×d×k
            width = kernel.shape[2]
            values = torch.cat([values, torch.zeros(max(width - len(values), 0), values.shape[1])])
            steps = [values[i : i + width].T for i in range(len(values) - width + 1)]
            x[name] = torch.stack([(kernel * step).sum((1, 2)) for step in steps])
        last = []
        for a in NAMES:
            attended = [mult_encoder(network.pairs[f"{a}_asks_{b}"], x[a], x[b]) for b in NAMES if a != b]
            last.append(mult_encoder(network.memory[a], torch.cat(attended, 1))[-1])
        joint = torch.cat(last)
        hidden = linear(joint, network.proj1.weight, network.proj1.bias).clamp(min=0)
        joint = joint + linear(hidden, network.proj2.weight, network.proj2.bias)
        torch.testing.assert_close(scores[row], linear(joint, network.out.weight, network.out.bias)[0])


@pytest.mark.parametrize("how", ["first", "mean"])
def test_self_mm(how):
    network, batch = make_network("self_mm", text_pool=how), features(names=NAMES)
    output = network(batch).features
    for row, parts in rows_of(batch):
        states = {"text": parts["text"][0] if how == "first" else parts["text"].mean(0)}
        for name in ("vision", "audio"):
            net = network.nets[name]
            states[name] = linear(last_lstm_state(net.last, parts[name]), net.out.weight, net.out.bias)
        for name, x in {"fused": torch.cat([states[n] for n in NAMES]), **states}.items():
            branch = network.branches[name]
            x = linear(x, branch.layer1.weight, branch.layer1.bias).clamp(min=0)
            torch.testing.assert_close(output[name][row], x)
            x = linear(x, branch.layer2.weight, branch.layer2.bias).clamp(min=0)
            torch.testing.assert_close(
                output[f"{name}_score"][row], linear(x, branch.layer3.weight, branch.layer3.bias)
            )


@pytest.mark.parametrize("model", ["tfn", "lmf"])
def test_absent_modality_contributes_only_its_one(model):
    network, batch = make_network(model), features(names=NAMES, absent=[(1, "text"), (2, "vision"), (3, "audio")])
    seen = {}
    network.fusion.register_forward_pre_hook(lambda module, factors: seen.update(enumerate(factors)))
    network(batch)
    for row, i in ((1, 0), (2, 1), (3, 2)):
        assert seen[i][row].tolist() == [1.0] + [0.0] * (seen[i].shape[1] - 1)
        assert (seen[i][0] != 0).any()


# ---- what is dropped in training

DROPPED = [(m, option) for m in MODELS if m != "clip_ca_msa" for option in MODELS[m].DEFAULTS if "dropout" in option]


@pytest.mark.parametrize(("model", "option"), DROPPED)
def test_each_dropout_option_alone_changes_training_output(model, option):
    def training_outputs(rate):
        options = {name: 0.0 for other, name in DROPPED if other == model}
        network, batch = make_network(model, **options | {option: rate}).train(), features(names=NAMES)
        outputs = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            output = network(batch)
            outputs.append(torch.cat([answers(output), *(x.flatten(1) for x in output.features.values())], 1))
        return outputs

    torch.testing.assert_close(*training_outputs(0.0))
    assert not torch.equal(*training_outputs(0.5))


def test_tfn_applies_dropout_to_its_product():
    product = make_network("tfn", dropout=0.5).fusion.train()
    factors = [torch.ones(2, size) for size in (257, 129, 33)]
    assert not torch.equal(product(*factors), product(*factors))


def test_mult_applies_each_dropout_option_where_it_belongs(monkeypatch):
    rates = []
    monkeypatch.setattr(mult, "dropout", lambda x, p, training: (rates.append(p), x)[1])
    layer = mult.Layer(8, 2, 0.1, {"res_dropout": 0.2, "relu_dropout": 0.3}).train()
    layer(torch.randn(1, 3, 8), torch.randn(1, 4, 8), torch.ones(1, 1, 3, 4, dtype=torch.bool))
    assert rates == [0.1, 0.2, 0.3, 0.2]
    network = make_network("mult", attention_dropout=0.4, vision_attention_dropout=0.5, audio_attention_dropout=0.6)
    attention_rate = {"text": 0.4, "vision": 0.5, "audio": 0.6}
    for a in NAMES:
        assert {layer.p for layer in network.memory[a].layers} == {0.4}
        for b in NAMES:
            assert a == b or {layer.p for layer in network.pairs[f"{a}_asks_{b}"].layers} == {attention_rate[b]}
