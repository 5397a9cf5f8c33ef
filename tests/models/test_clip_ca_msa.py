"""CLIP-CA-MSA in all its variants, and its equations compared with plain numpy."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.models.tester import DIMS, ModelTester, answers, features
from transformers import BertConfig

from senticlip.config import Config
from senticlip.data.loader import ArrayRows
from senticlip.models.clip_ca_msa import ClipCaMsa, Whiten
from senticlip.models.fusion import ConcatFusion, CrossAttentionBlock, CrossAttentionFusion
from senticlip.models.heads import LinearHead, PooledHead, SimilarityHead
from senticlip.models.temporal import LSTMTemporal, MeanTemporal, TransformerTemporal
from senticlip.structures import Sequence

SPEC = BertConfig(
    vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
).to_dict()


class VariantTester(ModelTester):
    model = "clip_ca_msa"
    changes = {"dropout": 0.0, "vision.frames": 8}

    def network(self, names=("text", "vision"), seed=0, **changes):
        torch.manual_seed(seed)
        config = self.config(names, **changes)
        similarity = config.head == "similarity" and "vision" in names
        network = ClipCaMsa(
            config, {n: DIMS[n] for n in names}, {"spec": SPEC, "shape": (3, 5)} if similarity else None
        )
        if similarity:
            network.labels.states.copy_(torch.randn(3, 8, generator=torch.Generator().manual_seed(7)))
        return network


class TestPaper(VariantTester):
    def test_permuted_labels_permute_the_video_logits(self):
        network, batch = self.network().eval(), features()
        before = network(batch).logits["vision"]
        network.labels.states.copy_(network.labels.states[[2, 0, 1]].clone())
        torch.testing.assert_close(network(batch).logits["vision"], before[:, [2, 0, 1]])

    def test_similarities_and_whitening_stay_fp32_under_autocast(self):
        """In bf16 a scaled cosine of 14 is only exact to 0.06, and small differences in the sound are lost."""
        head = SimilarityHead(Config(width=16, heads=2), 16)
        states, labels = Sequence(torch.randn(8, 1, 16), torch.ones(8, 1, dtype=torch.bool)), torch.randn(3, 16)
        whiten = Whiten(4)
        whiten.learn([torch.randn(100, 1) + 1e-3 * torch.randn(100, 4)])
        sound = Sequence(torch.randn(2, 5, 1) + 1e-3 * torch.randn(2, 5, 4), torch.ones(2, 5, dtype=torch.bool))
        before = head(states, labels), whiten(sound).values
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close((head(states, labels), whiten(sound).values), before)

    def test_log_probs_by_hand(self):
        network, batch = self.network().eval(), features()
        network.temperature.copy_(torch.tensor([2.0, 0.5]))
        with torch.no_grad():
            network.combine.s["text"].fill_(0.7)
        output = network(batch)
        w = np.exp(-np.array([0.7, 0.0]))
        w /= w.sum()
        text, video = (output.logits[name].detach().numpy().astype(float) for name in ("text", "vision"))
        votes = w[0] * text / 2 + w[1] * video / 0.5
        expected = votes - np.log(np.exp(votes).sum(1, keepdims=True))
        np.testing.assert_allclose(output.log_probs.detach().numpy(), expected, atol=1e-5)

    def test_the_loss_by_hand(self):
        """Focal for text only; smoothed and class-weighted; over the rows that have the modality and a label."""
        network = self.network(**{"train.label_smoothing": 0.3}).eval()
        network.class_weights.copy_(torch.tensor([3.0, 1.0, 0.5]))
        s = {"text": 0.7, "vision": -0.4}
        with torch.no_grad():
            for name, value in s.items():
                network.combine.s[name].fill_(value)
        batch = features(absent=[(1, "text"), (2, "vision")])
        batch.labels["M"].copy_(torch.tensor([-0.4, 0.2, 0.0, 1.0, torch.nan]))
        target = np.array([0, 2, 1, 2])
        output = network(batch)
        expected = {}
        for name, gamma, rows in (("text", 2, [0, 2, 3]), ("vision", 0, [0, 1, 3])):
            p, true = softmax(output.logits[name].detach().numpy().astype(float)[rows]), target[rows]
            wanted = 0.7 * np.eye(3)[true] + 0.3 / 3
            focus = (1 - p[range(3), true]) ** gamma
            expected[name] = np.mean(np.array([3.0, 1.0, 0.5])[true] * focus * -(wanted * np.log(p)).sum(1))
        total, parts = network.loss(output, batch)
        assert {name: float(part) for name, part in parts.items()} == pytest.approx(
            {f"loss_{name}": loss for name, loss in expected.items()}, rel=1e-5
        )
        assert total.item() == pytest.approx(
            sum(np.exp(-s[name]) * loss + s[name] / 2 for name, loss in expected.items()), rel=1e-5
        )

    def test_s_of_an_absent_modality_gets_no_gradient(self):
        network, batch = self.network(), features(absent=[(row, "vision") for row in range(5)])
        network.loss(network(batch), batch)[0].backward()
        assert float(network.combine.s["vision"].grad) == 0
        assert float(network.combine.s["text"].grad) != 0

    def test_step_finished_clamps_s_and_logit_scale(self):
        network = self.network()
        s, scale = network.combine.s, network.heads["vision"].logit_scale
        with torch.no_grad():
            for scalar, value in ((s["text"], 9.0), (s["vision"], -9.0), (scale, 9.0)):
                scalar.fill_(value)
        network.step_finished()
        assert (s["text"].item(), s["vision"].item()) == (5, -5)
        assert scale.item() == pytest.approx(math.log(100))


class TestLinear(VariantTester):
    changes = {"dropout": 0.0, "vision.frames": 8, "head": "linear"}


class TestConcat(VariantTester):
    changes = {"dropout": 0.0, "vision.frames": 8, "fusion": "concat"}


class TestSum(VariantTester):
    changes = {"dropout": 0.0, "vision.frames": 8, "loss": "sum"}


class TestMean(VariantTester):
    changes = {"dropout": 0.0, "vision.frames": 8, "temporal": "mean"}


class TestLSTM(VariantTester):
    changes = {"dropout": 0.0, "vision.frames": 8, "temporal": "lstm"}


@pytest.mark.parametrize(("temporal", "matters"), [("transformer", True), ("lstm", True), ("mean", False)])
def test_whether_frame_order_matters(temporal, matters):
    tester = TestPaper()
    network = tester.network(("vision",), temporal=temporal).eval()
    batch = features(names=("vision",))
    all_real = torch.ones_like(batch.modalities["vision"].mask)
    values = batch.modalities["vision"].values
    original = answers(network(batch._replace(modalities={"vision": Sequence(values, all_real)})))
    reversed_order = answers(network(batch._replace(modalities={"vision": Sequence(values.flip(1), all_real)})))
    assert torch.allclose(original, reversed_order, atol=1e-6) != matters


def test_mean_temporal_prepends_mean_of_real_frames():
    values = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    result = MeanTemporal(Config())(Sequence(torch.from_numpy(values), mask))
    expected = np.stack([values[0, [0, 2]].mean(0), values[1].mean(0)])
    np.testing.assert_allclose(result.values[:, 0].numpy(), expected, atol=1e-6)
    np.testing.assert_array_equal(result.values[:, 1:].numpy(), values)
    assert result.mask.tolist() == [[True, True, False, True], [True] * 4]


def test_whitening_decorrelates_audio_columns():
    random = torch.Generator().manual_seed(0)
    mixed = torch.randn(500, 6, generator=random) @ torch.randn(6, 6, generator=random) * 3 - 7
    rows = torch.cat([mixed, torch.full((500, 1), 4.0)], 1)  # a silent band
    whiten = Whiten(7)
    sound = Sequence(rows[None], torch.ones(1, 500, dtype=torch.bool))
    assert torch.equal(whiten(sound).values, sound.values)
    whiten.learn(rows.split(64))
    whitened = whiten(sound).values[0]
    torch.testing.assert_close(whitened.mean(0), torch.zeros(7), atol=1e-4, rtol=0)
    expected = torch.eye(7)
    expected[0, 0] = 0  # the direction of least variance comes first
    torch.testing.assert_close(whitened.T @ whitened / 500, expected, atol=0.02, rtol=0)
    before = whiten.turn.clone()
    whiten.learn([])
    assert torch.equal(whiten.turn, before)


def test_prepare_whitens_small_differences_in_batches():
    random = torch.Generator().manual_seed(0)
    rows = 3 + 0.2 * torch.randn(130, 4, 6, generator=random)
    network = TestPaper().network(("audio",))
    store = ArrayRows(rows.numpy(), np.ones((130, 4), dtype=bool))
    network.prepare(SimpleNamespace(stores={"audio": store}))
    whitened = network.whiten(Sequence(rows, torch.ones(130, 4, dtype=torch.bool))).values.flatten(0, 1)
    torch.testing.assert_close(whitened.mean(0), torch.zeros(6), atol=1e-3, rtol=0)
    torch.testing.assert_close(whitened.T @ whitened / 520, torch.eye(6), atol=0.05, rtol=0)


def test_audio_own_loss_learns_audio_label():
    names = ("text", "vision", "audio")
    network = TestPaper().network(names, **{"audio.own": 0.5, "train.label_smoothing": 0.3}).eval()
    batch = features(names=names, absent=[(1, "audio")])
    batch.labels["A"][2] = torch.nan
    output = network(batch)
    logits, target = output.features["audio_own"].detach().numpy(), np.sign(batch.labels["A"].numpy())
    rows = [0, 3, 4]  # row 1 has no sound, row 2 no label
    log_probs = np.log(softmax(logits[rows]))
    smoothed = 0.7 * log_probs[range(3), [int(target[row]) + 1 for row in rows]] + 0.3 * log_probs.mean(1)
    loss, parts = network.loss(output, batch)
    np.testing.assert_allclose(parts["loss_own"], -smoothed.mean(), rtol=1e-5)
    network.config.audio.own = 0.0
    np.testing.assert_allclose(loss.item(), network.loss(output, batch)[0].item() + 0.5 * parts["loss_own"], rtol=1e-5)

    parts["loss_own"] = network._own_loss(output, batch)
    parts["loss_own"].backward()
    trained = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert trained == {f"entrances.audio.project.{kind}" for kind in ("weight", "bias")} | {
        "entrances.audio.absent"
    } | {name for name, _ in network.named_parameters() if name.startswith("hearing.")}


@pytest.mark.parametrize("names", [("audio",), ("text", "vision")], ids="+".join)
def test_no_audio_own_head_unless_audio_is_fused(names):
    assert TestPaper().network(names, **{"audio.own": 0.5}).hearing is None


def softmax(x):
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def norm(x, layer):
    scale, shift = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + layer.eps) * scale + shift


def linear(x, weight, bias):
    return x @ weight.detach().numpy().T + bias.detach().numpy()


def attend(module, queries, keys):
    """softmax(Q Kᵀ / √d_k) V in two heads of width 4, concatenated; and the attention maps."""
    weight, bias = module.in_proj_weight, module.in_proj_bias
    q, k, v = (
        linear(x, weight[i * 8 : i * 8 + 8], bias[i * 8 : i * 8 + 8]) for i, x in enumerate((queries, keys, keys))
    )
    heads, maps = [], []
    for h in (slice(0, 4), slice(4, 8)):
        maps.append(softmax(q[:, h] @ k[:, h].T / 2.0))
        heads.append(maps[-1] @ v[:, h])
    return linear(np.concatenate(heads, 1), module.out_proj.weight, module.out_proj.bias), np.stack(maps)


def feed_forward(x, first, last):
    inner = torch.nn.functional.gelu(torch.from_numpy(linear(x, first.weight, first.bias)))
    return linear(inner.numpy(), last.weight, last.bias)


def encode(x, encoder, layers):
    """A post-norm Transformer, norm after each sum."""
    assert len(encoder.layers) == layers
    for layer in encoder.layers:
        x = norm(x + attend(layer.self_attn, x, x)[0], layer.norm1)
        x = norm(x + feed_forward(x, layer.linear1, layer.linear2), layer.norm2)
    return x


def test_equation_8():
    """[H_CLS, H_1 … H_m] + positions through the Transformer; masked frames have no effect."""
    torch.manual_seed(0)
    config = Config().override({"width": 8, "heads": 2, "layers": 3, "vision.frames": 5})
    temporal = TransformerTemporal(config).eval()
    frames, mask = torch.randn(1, 4, 8), torch.tensor([[True, False, True, True]])
    result = temporal(Sequence(frames, mask))
    assert result.mask.tolist() == [[True, True, False, True, True]]
    x = torch.cat([temporal.cls[None], frames[0]]) + temporal.positions[:5]
    expected = encode(x[[0, 1, 3, 4]].detach().numpy(), temporal.encoder, 3)
    np.testing.assert_allclose(result.values[0, [0, 1, 3, 4]].detach().numpy(), expected, atol=1e-5)


def test_lstm_temporal_has_configured_depth():
    torch.manual_seed(0)
    temporal, frames = LSTMTemporal(Config().override({"width": 8, "heads": 2, "layers": 3})), torch.randn(1, 4, 8)
    reference = torch.nn.LSTM(8, 8, 3)
    reference.load_state_dict(temporal.lstm.state_dict())
    states = reference(frames[0])[0]
    result = temporal(Sequence(frames, torch.ones(1, 4, dtype=torch.bool))).values[0]
    torch.testing.assert_close(result, torch.cat([states[-1:], states]))


def test_concat_fusion_by_hand():
    """One sequence of all modalities, each with its own vector; as many layers as cross-attention has blocks."""
    torch.manual_seed(0)
    config, names = Config().override({"width": 8, "heads": 2}), ["text", "vision", "audio"]
    fusion = ConcatFusion(config, names).eval()
    inputs = {n: Sequence(torch.randn(1, k, 8), torch.ones(1, k, dtype=torch.bool)) for k, n in enumerate(names, 2)}
    fused, maps = fusion(inputs)
    assert not maps
    parts = [inputs[n].values[0].numpy() + kind for n, kind in zip(names, fusion.kinds.detach().numpy(), strict=True)]
    expected = encode(np.concatenate(parts), fusion.encoder, len(CrossAttentionFusion(config, names).blocks))
    joined = np.concatenate([fused[n].values[0].detach().numpy() for n in names])
    np.testing.assert_allclose(joined, expected, atol=1e-5)


def test_all_parts_use_the_configured_dropout():
    config, names = Config().override({"width": 8, "heads": 2, "dropout": 0.3}), ["text", "vision"]
    parts = [TransformerTemporal(config), CrossAttentionFusion(config, names), ConcatFusion(config, names)]
    parts += [PooledHead(config), LinearHead(config)]
    counts = []
    for part in parts:
        dropouts = [module.p for module in part.modules() if isinstance(module, torch.nn.Dropout)]
        attentions = [m.dropout for m in part.modules() if isinstance(m, torch.nn.MultiheadAttention)]
        assert {*dropouts, *attentions} == {0.3}
        counts.append((len(dropouts), len(attentions)))
    assert counts == [(3 * config.layers, config.layers), (4, 2), (6, 2), (1, 0), (1, 0)]
    states = Sequence(torch.randn(50, 3, 8), torch.ones(50, 3, dtype=torch.bool))
    for head in parts[3:]:
        assert not torch.equal(head(states), head(states))
        torch.testing.assert_close(head.eval()(states), head(states))


def test_equations_9_to_12():
    """softmax(Q Kᵀ / √d_k) V in each head, then add & norm, feed-forward, add & norm."""
    torch.manual_seed(0)
    config = Config().override({"width": 8, "heads": 2, "dropout": 0.0})
    block = CrossAttentionBlock(config).eval()
    query, context = torch.randn(1, 3, 8), torch.randn(1, 4, 8)
    real = torch.tensor([[True, True, True, False]])
    out, weights = block(Sequence(query, torch.ones(1, 3, dtype=torch.bool)), Sequence(context, real), attention=True)
    queries, keys = query[0].numpy(), context[0, :3].numpy()
    context_states, maps = attend(block.attention, queries, keys)
    s = norm(context_states + queries, block.norm)
    expected = norm(s + feed_forward(s, block.feed_forward[0], block.feed_forward[3]), block.norm2)
    np.testing.assert_allclose(out[0].detach().numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(weights[0, :, :, :3].detach().numpy(), maps, atol=1e-6)


def test_attended_states_are_joined_with_original_input():
    """Linear([H_a2b ; H_a2c ; H_a])."""
    torch.manual_seed(0)
    names = ["text", "vision", "audio"]
    fusion = CrossAttentionFusion(Config().override({"width": 8, "heads": 2, "dropout": 0.0}), names).eval()
    inputs = {n: Sequence(torch.randn(2, k, 8), torch.ones(2, k, dtype=torch.bool)) for k, n in enumerate(names, 2)}
    fused, _ = fusion(inputs)
    for a in names:
        attended = [fusion.blocks[f"{a}_asks_{b}"](inputs[a], inputs[b])[0].detach() for b in names if a != b]
        joined = np.concatenate([part.numpy() for part in (*attended, inputs[a].values)], -1)
        expected = linear(joined, fusion.join[a].weight, fusion.join[a].bias)
        np.testing.assert_allclose(fused[a].values.detach().numpy(), expected, atol=1e-5)


def test_equation_13():
    head = SimilarityHead(Config().override({"width": 8, "heads": 2}), 8)
    states, labels = torch.randn(2, 3, 8), torch.randn(3, 8)
    logits = head(Sequence(states, torch.ones(2, 3, dtype=torch.bool)), labels).detach().numpy()
    v, p = states[:, 0].numpy(), labels.numpy()
    cosine = (v @ p.T) / np.linalg.norm(v, axis=1)[:, None] / np.linalg.norm(p, axis=1)
    np.testing.assert_allclose(logits, cosine / 0.07, rtol=1e-4, atol=1e-4)


def test_norm_of_projected_labels_has_no_effect():
    head = SimilarityHead(Config().override({"width": 8, "heads": 2}), 5)
    states, labels = Sequence(torch.randn(2, 1, 8), torch.ones(2, 1, dtype=torch.bool)), torch.randn(3, 5)
    torch.testing.assert_close(head(states, 7 * labels), head(states, labels))


def test_whitening_statistics_ignore_padding():
    """The statistics are computed over real positions only."""
    rows = torch.randn(40, 6, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(6) < torch.arange(40)[:, None] % 6 + 1
    rows[~mask] = 50
    network = TestPaper().network(("audio",))
    network.prepare(SimpleNamespace(stores={"audio": ArrayRows(rows.numpy(), mask.numpy())}))
    torch.testing.assert_close(network.whiten.mean, rows[mask].mean(0))


def test_continued_run_does_not_recompute_whitening():
    network = TestPaper().network(("audio",), start="run")
    store = ArrayRows(torch.randn(40, 6, 6).numpy() + 3, np.ones((40, 6), bool))
    network.prepare(SimpleNamespace(stores={"audio": store}))
    assert not network.whiten.mean.any()


def test_heads_by_hand():
    config = Config().override({"width": 8, "heads": 2, "dropout": 0.0})
    torch.manual_seed(0)
    states = Sequence(torch.randn(2, 3, 8), torch.tensor([[True, True, False], [True] * 3]))
    x, linear_head, pooled_head = states.values.numpy(), LinearHead(config), PooledHead(config)
    expected = linear(x[:, 0], linear_head.classify.weight, linear_head.classify.bias)  # position 0 is the whole clip
    np.testing.assert_allclose(linear_head(states).detach().numpy(), expected, atol=1e-5)
    for row, n in enumerate((2, 3)):
        weights = softmax(x[row, :n] @ pooled_head.query.weight[0].detach().numpy())
        expected = linear(weights @ x[row, :n], pooled_head.classify.weight, pooled_head.classify.bias)
        np.testing.assert_allclose(pooled_head(states)[row].detach().numpy(), expected, atol=1e-5)
