"""The peers, compared with independent reference computations."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from tests.models.tester import ModelTester, answers, features
from torch import nn

from senticlip.models.lmf import LowRankFusion
from senticlip.models.mult import Layer, attend, attention_map, causal, sinusoids
from senticlip.models.peer import LastState, PooledNet, RecurrentNet, drop_mask, dropout, groups, masked_mean, packed
from senticlip.models.self_mm import SelfMM, gathered, pool
from senticlip.models.tfn import SlicedProduct, TensorLinear
from senticlip.structures import Sequence, UsageError


class PeerTester(ModelTester):
    def test_unknown_option_is_rejected(self):
        with pytest.raises(UsageError, match=r"options\.ranc: .* no such option, only .*task"):
            self.network(options={"ranc": 3})


class TestTFN(PeerTester):
    model = "tfn"
    changes = {"options.text_hidden": 8, "options.text_out": 6, "options.vision_hidden": 5, "options.audio_hidden": 4}

    def test_scores_are_within_range(self):
        network = self.network().eval()
        nn.init.constant_(network.out.bias, 50.0)
        assert network(features()).score.tolist() == pytest.approx([3.0] * 5)

    def test_classification_loss_is_smoothed_weighted_cross_entropy(self):
        changes = {"options.task": "classification", "train.label_smoothing": 0.3}
        network, batch = self.network(**changes).eval(), features()
        network.class_weights.copy_(torch.tensor([3.0, 1.0, 0.5]))
        output = network(batch)
        assert output.score is None
        assert output.logits["fused"].shape == (5, 3)
        batch.labels["M"][1] = torch.nan
        rows = []
        for row in (0, 2, 3, 4):
            true, log = int(batch.labels["M"][row].sign()) + 1, output.logits["fused"][row].log_softmax(-1)
            rows.append([3.0, 1.0, 0.5][true] * -(0.7 * log[true] + 0.3 * log.mean()))
        torch.testing.assert_close(network.loss(output, batch)[0], torch.stack(rows).mean())


class TestLMF(PeerTester):
    model = "lmf"
    changes = {"options.text_hidden": 8, "options.vision_hidden": 5, "options.audio_hidden": 4, "options.rank": 3}

    def test_every_parameter_is_in_exactly_one_group(self):
        network = self.network()
        param_groups = network.param_groups(self.config(**{"train.weight_decay": 0.3}))
        assert [(group["lr"], group["weight_decay"]) for group in param_groups] == [(5e-4, 0.3), (1e-4, 0.3)]
        ids = [id(p) for group in param_groups for p in group["params"]]
        assert sorted(ids) == sorted(id(p) for p in network.parameters())


class TestMulT(PeerTester):
    model = "mult"
    changes = {"options.width": 8, "options.heads": 2}

    def test_positions_change_the_answer(self):
        without_positions, with_positions = self.network().eval(), self.network(**{"options.positions": True}).eval()
        with_positions.load_state_dict(without_positions.state_dict())
        assert not torch.allclose(answers(without_positions(features())), answers(with_positions(features())))

    def test_text_dropout_only_affects_text_in_training(self):
        no_dropout = dict.fromkeys(("attention_dropout", "embed_dropout", "res_dropout", "output_dropout"), 0.0)
        network = self.network(options={"width": 8, "heads": 2, **no_dropout, "text_dropout": 0.9}).eval()
        for name in ("text", "vision"):
            x = features().modalities[name]
            before = network.eval().embed(name, x)[0]
            assert torch.equal(network.train().embed(name, x)[0], before) == (name == "vision")

    def test_attention_map_matches_attention_used(self):
        pair, x, y = self.network().eval().pairs["text_asks_vision"], torch.randn(2, 5, 8), torch.randn(2, 4, 8)
        del pair.layers[1:]
        mask = causal(torch.tensor([5, 3]), torch.tensor([4, 2]), (5, 4))
        q, k, v = pair.layers[0].qkv(pair.embed(x), pair.embed(y))
        torch.testing.assert_close(attention_map(pair, x, y, mask) @ v, attend(q, k, v, mask, 0.0))

    def test_memory_has_at_least_three_layers(self):
        """As in MMSA, whatever the number of layers of the pairs."""
        for layers, memory_layers in ((1, 3), (5, 5)):
            network = self.network(options={"width": 8, "heads": 2, "layers": layers})
            assert len(network.pairs["text_asks_vision"].layers) == layers
            assert len(network.memory["text"].layers) == memory_layers

    def test_text_shorter_than_kernel(self):
        batch = features()
        short = {n: Sequence(s.values[:, :2], s.mask[:, :2]) for n, s in batch.modalities.items()}
        assert answers(self.network().eval()(batch._replace(modalities=short))).isfinite().all()


class TestSelfMM(PeerTester):
    model = "self_mm"

    def network(self, *args, rows=5, **changes):
        network = super().network(*args, **changes)
        network.prepare(range(rows))
        return network

    def test_state_dict_loads_into_other_training_set_size(self):
        network, other = self.network(), self.network(rows=0)
        network.loss(network(features()), features())
        other.load_state_dict(network.state_dict())
        torch.testing.assert_close(other.labels, network.labels)
        batch = features()
        torch.testing.assert_close(answers(other.eval()(batch)), answers(network.eval()(batch)))

    def test_row_outside_the_training_set_is_rejected(self):
        network, batch = self.network(rows=3), features()
        with pytest.raises(UsageError, match="row 4"):
            network.loss(network(batch), batch)

    def test_branch_dropout_rate_applies_only_in_training(self):
        network = self.network(**{"options.fused_dropout": 0.25}).eval()
        branch, x = network.branches["fused"], torch.ones(200, 44)
        nn.init.constant_(branch.layer1.weight, 1.0)
        nn.init.zeros_(branch.layer1.bias)
        assert branch(x)[0].unique().tolist() == [44]  # 12 of the text, 32 of the frames
        kept = branch.train()(x)[0][:, 0].detach() * 0.75
        assert len(kept.unique()) > 5
        assert float(kept.mean()) == pytest.approx(33, abs=0.75)  # 3.7 standard errors

    def test_centre_of_one_row_is_that_row(self):
        network, has_modality = self.network(), torch.ones(3, 3, dtype=torch.bool)
        row_features = torch.randn(3, 128 + 64 + 32)
        network.remember(torch.arange(3), torch.tensor([0.8, -0.6, 0.0]), row_features, has_modality)
        torch.testing.assert_close(network.centres_fused, row_features[[1, 0], :128])

    def test_lstms_have_their_own_learning_rates(self):
        options = {"audio_lr": 0.1, "vision_lr": 0.2, "sequence_decay": 0.3}
        config = self.config(
            ("text", "vision", "audio"), options=options, **{"train.lr": 0.4, "train.weight_decay": 0.5}
        )
        network = self.network(("text", "vision", "audio"), options=options)
        rates = {id(p): (g["lr"], g["weight_decay"]) for g in network.param_groups(config) for p in g["params"]}
        for name, expected in (("nets.audio", (0.1, 0.3)), ("nets.vision", (0.2, 0.3)), ("branches", (0.4, 0.5))):
            assert {rates[id(p)] for p in network.get_submodule(name).parameters()} == {expected}

    def test_evaluation_does_not_change_state(self):
        network, batch = self.network().eval(), features()
        before = copy.deepcopy(network.state_dict())
        network.loss(network(batch), batch)
        for name, value in network.state_dict().items():
            torch.testing.assert_close(value, before[name], equal_nan=True)


class TestMMAF(PeerTester):
    model = "mmaf"
    changes = {"options.width": 16, "options.heads": 2}

    def test_single_task_loss_is_plain_cross_entropy(self):
        network, batch = self.network().eval(), features()
        output = network(batch)
        expected = nn.functional.cross_entropy(output.logits["fused"], batch.labels["M"].sign().long() + 1)
        torch.testing.assert_close(network.loss(output, batch)[0], expected)
        assert not any(name.startswith("weigh.") for name, _ in network.named_parameters())

    def test_each_row_by_hand(self):
        """From each row's real positions only: pairwise attention, absent parts, the gate and its shares, the heads."""
        names = ("text", "vision", "audio")
        network = self.network(names, **{"options.tasks": ["M", "T", "A", "V"]}).eval()
        batch = features(names=names, absent=[(1, "vision"), (2, "text"), (2, "audio")])
        output = network(batch)
        for row in range(5):
            encoded, pooled = {}, {}
            for name, (values, mask) in batch.modalities.items():
                if mask[row].any():
                    encoded[name] = network.self_attention[name](network.project[name](values[row][mask[row]][None]))
                    pooled[name] = encoded[name].mean(1)
            parts, shares = [], []
            for name in names:
                parts.append(pooled.get(name))
                shares.append({name: 1.0})
            for a, b in (("text", "vision"), ("text", "audio"), ("vision", "audio")):
                perception = network.perception[f"{a}_{b}"]
                both = a in encoded and b in encoded
                pair = zip(perception.attention, (a, b), (b, a), strict=True)
                contexts = [m(pooled[x][:, None], encoded[y], encoded[y])[0][:, 0] for m, x, y in pair] if both else []
                parts.append(perception.join(torch.cat(contexts, -1)) if both else None)
                shares.append({a: 0.5, b: 0.5})
            filled = [torch.zeros(1, 16) if part is None else part for part in parts]
            scores = network.gate(torch.cat(filled, -1))[0]
            present = [i for i, part in enumerate(parts) if part is not None]
            gate = dict(zip(present, scores[present].softmax(-1), strict=True))
            fused = sum(gate[i] * filled[i] for i in present)
            torch.testing.assert_close(output.logits["fused"][row], network.heads["fused"](fused)[0])
            for name in names:
                weight = sum(gate[i] * shares[i].get(name, 0.0) for i in present)
                torch.testing.assert_close(output.weights[name][row], torch.as_tensor(weight))
                if name in pooled:
                    torch.testing.assert_close(output.logits[name][row], network.heads[name](pooled[name])[0])


class TestMMAFWithUnimodalTasks(PeerTester):
    model = "mmaf"
    changes = {"options.width": 16, "options.heads": 2, "options.tasks": ["M", "T", "A", "V"]}

    def test_tasks_have_heads_and_uncertainties(self):
        network = self.network(("text", "vision", "audio"))
        assert set(network.heads) == {"fused", "text", "vision", "audio"}
        assert network.param_groups(self.config())[0] | {"params": 4} == {"params": 4, "lr": 1e-2, "weight_decay": 0.0}
        network.weigh.s["text"].data.fill_(99.0)
        network.step_finished()
        assert float(network.weigh.s["text"].detach()) == 5.0

    def test_each_task_learns_its_own_label(self):
        network, batch = self.network(**{"target": "A"}).eval(), features()
        output = network(batch)
        logs = network.loss(output, batch)[1]
        for name, label in (("fused", "A"), ("text", "T"), ("vision", "V")):
            expected = nn.functional.cross_entropy(output.logits[name], batch.labels[label].sign().long() + 1)
            torch.testing.assert_close(logs[f"loss_{name}"], expected.detach())

    def test_tasks_ignore_rows_without_their_modality(self):
        network, batch = self.network(), features(absent=[(1, "text"), (2, "vision"), (3, "vision")])
        output = network(batch)
        logits = [output.logits[name] for name in ("text", "vision", "fused")]
        gradients = torch.autograd.grad(network.loss(output, batch)[0], logits)
        has_gradient = [gradient.any(1).tolist() for gradient in gradients]
        assert has_gradient == [[True, False, True, True, True], [True, True, False, False, True], [True] * 5]


def test_masked_mean_and_packing_by_hand():
    values, mask = torch.tensor([[[1.0], [9.0], [3.0]], [[5.0], [6.0], [7.0]]]), torch.tensor([[1, 0, 1], [0, 0, 0]])
    sequence = Sequence(values, mask.bool())
    assert masked_mean(sequence).tolist() == [[2.0], [0.0]]
    front, lengths = packed(sequence)
    assert front[..., 0].tolist() == [[1.0, 3.0], [0.0, 0.0]]
    assert lengths.tolist() == [2, 0]


def test_last_state_matches_each_row_without_padding():
    torch.manual_seed(0)
    module, values = LastState(3, 4), torch.randn(4, 6, 3)
    mask = torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0], [0, 1, 0, 1, 1, 0], [0] * 6]).bool()
    result = module(Sequence(values, mask))
    for row in range(3):
        expected = module.lstm(values[row][mask[row]][None])[1][0][0, 0]
        torch.testing.assert_close(result[row], expected)
    assert result[3].tolist() == [0] * 4
    assert RecurrentNet(3, 4, 2)(Sequence(values, mask))[3].tolist() == [0] * 2  # not even the last layer's bias


@pytest.mark.parametrize("sizes", [(3,), (3, 4), (3, 4, 2)])
def test_tensor_linear_matches_outer_product_by_loops(sizes):
    torch.manual_seed(0)
    module = TensorLinear(list(sizes), 5, 0.0)
    factors = [torch.randn(2, size) for size in sizes]
    expected = module.bias.detach().repeat(2, 1)
    for row, out in itertools.product(range(2), range(5)):
        for index in itertools.product(*map(range, sizes)):
            product = 1.0
            for factor, i in zip(factors, index, strict=True):
                product *= float(factor[row, i])
            *first, last = index if len(index) > 1 else (0, *index)
            flat = first[0] if len(first) == 1 else first[0] * sizes[1] + first[1]
            expected[row, out] += product * float(module.weight[last, out, flat].detach())
    torch.testing.assert_close(module(*factors), expected)


def test_tensor_linear_under_autocast_matches_fp32():
    """Autocast takes the path without ``SlicedProduct``, as on a GPU; equal up to bf16's two or three digits."""
    torch.manual_seed(0)
    module, factors = TensorLinear([3, 4, 2], 5, 0.0), [torch.randn(6, size) for size in (3, 4, 2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = module(*factors)
    torch.testing.assert_close(result.float(), module(*factors), rtol=0.03, atol=0.03)


def test_sliced_product_gradients_match_autograd():
    torch.manual_seed(0)
    inputs = [torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((3, 7), (3, 4), (4, 5, 7))]
    assert torch.autograd.gradcheck(lambda *x: SlicedProduct.apply(*x, 0.0), inputs)
    product, last, weight = (x.detach().float().requires_grad_() for x in inputs)
    torch.manual_seed(1)
    out = SlicedProduct.apply(product, last, weight, 0.5)
    torch.manual_seed(1)
    masks = [drop_mask(product.shape, 0.5)[0] for _ in range(4)]
    expected = sum((2 * product * last[:, i : i + 1] * masks[i]) @ weight[i].T for i in range(4))
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(
        *[torch.autograd.grad(x.square().sum(), (product, last, weight)) for x in (out, expected)], strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_low_rank_fusion_matches_full_tensor():
    torch.manual_seed(0)
    module = LowRankFusion([3, 4, 2], 5, rank=2)
    a, b, c = torch.randn(6, 3), torch.randn(6, 4), torch.randn(6, 2)
    full = torch.einsum("r,rio,rjo,rko->ijko", module.weights[0], *module.factors)
    torch.testing.assert_close(module(a, b, c), torch.einsum("bi,bj,bk,ijko->bo", a, b, c, full))


def test_blockwise_attention_matches_plain_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 150, 4), torch.randn(2, 3, 90, 4), torch.randn(2, 3, 90, 4)
    mask = causal(torch.tensor([150, 40]), torch.tensor([90, 20]), (150, 90))
    # p below 1/512 drops no weight but still selects the blockwise path
    result = attend(q, k, v, mask, 1e-3)
    scores = (q @ k.mT / 2).masked_fill(~mask, -torch.inf).softmax(-1)
    torch.testing.assert_close(result, scores @ v)


def test_self_attending_layer_matches_torch_pre_norm_layer():
    torch.manual_seed(0)
    options = dict.fromkeys(("res_dropout", "relu_dropout"), 0.0)
    ours, theirs = Layer(8, 2, 0.0, options), nn.TransformerEncoderLayer(8, 2, 32, 0.0, "relu", 1e-5, True, True)
    with torch.no_grad():
        for parameter, their_parameter in zip(ours.parameters(), theirs.parameters(), strict=True):  # in the same order
            their_parameter.copy_(parameter.add_(0.2 * torch.randn_like(parameter)))
    x, allowed = torch.randn(3, 5, 8), torch.ones(5, 5, dtype=torch.bool).tril()
    torch.testing.assert_close(ours(x, x, allowed.expand(3, 1, 5, 5)), theirs(x, src_mask=~allowed))


def test_causal_mask_by_hand():
    mask = causal(torch.tensor([2, 3]), torch.tensor([4, 1]), (3, 4))[:, 0].int().tolist()
    assert mask[0][:2] == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert mask[1] == [[1, 0, 0, 0]] * 3


def test_causal_attention_ignores_later_keys():
    torch.manual_seed(0)
    length = torch.tensor([6])
    mask, (q, k, v) = causal(length, length, (6, 6)), torch.randn(3, 1, 2, 6, 4)
    before = attend(q, k, v, mask, 0.0)
    v[:, :, 4:] += 100
    torch.testing.assert_close(attend(q, k, v, mask, 0.0)[:, :, :4], before[:, :, :4])


@pytest.mark.parametrize("d", [7, 8])
def test_positions_by_hand(d):
    """Sines, then cosines, of i · 10000^(−k/3), i from 1."""
    angles = [[i * 10000 ** (-k / 3) for k in range(4)] for i in (1, 2, 3)]
    expected = torch.tensor([[*map(math.sin, row), *map(math.cos, row)] for row in angles])[:, :d]
    torch.testing.assert_close(sinusoids(3, d), expected)


def test_pooled_net_batch_norm_in_training():
    net, values = PooledNet(3, 4, 0.0).train(), 5 + torch.randn(8, 1, 3)
    mask = torch.ones(8, 1, dtype=torch.bool)
    net(Sequence(values[:1], mask[:1]))
    assert net.norm.running_mean.tolist() == [0, 0, 0]  # one row has no statistics
    inputs_seen = []
    net.layers[0].register_forward_pre_hook(lambda _, inputs: inputs_seen.append(inputs[0]))
    net(Sequence(values, mask))
    torch.testing.assert_close(inputs_seen[0].mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(net.norm.running_mean, 0.1 * values.mean((0, 1)))


def test_dropout_rate_mean_and_gradient():
    torch.manual_seed(0)
    x = torch.ones(1001, 103, requires_grad=True)
    y = dropout(x, 0.4, True)
    assert float((y == 0).float().mean()) == pytest.approx(0.4, abs=0.01)
    assert float(y.detach().mean()) == pytest.approx(1, abs=0.01)
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach())
    assert dropout(x, 0.4, False) is x
    assert drop_mask(x.shape, 0.999)[1] == 256


def test_groups_assign_each_parameter_once():
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    special, rest = groups(network, [(network[0].parameters(), 0.5, 0.1)], 0.2, 0.3)
    assert special["params"] == list(network[0].parameters())
    assert (rest["params"], rest["lr"]) == (list(network[1].parameters()), 0.2)


def test_self_mm_label_updates_by_hand():
    """Two epochs of five rows, compared with plain arithmetic from the paper's formulas."""
    torch.manual_seed(0)
    network: SelfMM = TestSelfMM().network(("text", "vision"))
    truth = torch.tensor([0.8, -0.6, 0.4, 0.0, -0.2])
    heads = {"fused": 128, "text": 64, "vision": 32}
    first = {n: torch.randn(5, w) for n, w in heads.items()}
    second = {n: torch.randn(5, w) for n, w in heads.items()}
    index, has_modality = torch.arange(5), torch.ones(3, 5, dtype=torch.bool)
    network.remember(index, truth, torch.cat(list(first.values()), -1), has_modality)
    for labels in network.labels:
        torch.testing.assert_close(labels, truth)
    for name in heads:
        torch.testing.assert_close(network.get_buffer(f"centres_{name}")[1], first[name][[0, 2]].mean(0))
        torch.testing.assert_close(network.get_buffer(f"centres_{name}")[0], first[name][[1, 4]].mean(0))
    network.epoch_started(2)
    network.remember(index, truth, torch.cat(list(second.values()), -1), has_modality)
    for name in ("text", "vision"):
        for row in range(5):
            delta = {}
            for which in (name, "fused"):
                feature = second[which][row]
                positive, negative = first[which][[0, 2]].mean(0), first[which][[1, 4]].mean(0)
                d_p, d_n = (feature - positive).norm(), (feature - negative).norm()
                delta[which] = (d_n - d_p) / (d_p + 1e-8)
            alpha = delta[name] / (delta["fused"] + 1e-8)
            new = 0.5 * alpha * truth[row] + 0.5 * (truth[row] + delta[name] - delta["fused"])
            expected = 1 / 3 * truth[row] + 2 / 3 * new.clamp(-1, 1)
            torch.testing.assert_close(network.labels[network.heads.index(name), row], expected)
    torch.testing.assert_close(network.labels[0], truth)


def test_lstm_keeps_its_precision_under_autocast():
    net = LastState(4, 3)
    sequence = Sequence(torch.randn(2, 5, 4), torch.ones(2, 5, dtype=torch.bool))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = net(sequence)
    torch.testing.assert_close(result, net(sequence))
    assert net.double()(sequence).dtype == torch.float64


def test_gathered_concatenates_rows_by_rank(monkeypatch):
    ours, theirs = torch.randn(3, 2), torch.randn(5, 2)

    def all_gather(parts, local):  # the real one needs the same shape in all processes
        for part, value in zip(parts, (local, torch.tensor(5) if local.dim() == 0 else theirs), strict=True):
            assert part.shape == value.shape
            part.copy_(value)

    for name, stub in {"is_initialized": lambda: True, "get_world_size": lambda: 2, "all_gather": all_gather}.items():
        monkeypatch.setattr(torch.distributed, name, stub)
    torch.testing.assert_close(gathered(ours), torch.cat([ours, theirs]))


def test_self_mm_ignores_absent_modalities():
    network: SelfMM = TestSelfMM().network(("text", "vision"), rows=4)
    batch = features(4, absent=((1, "vision"), (2, "vision")))
    network.train()
    for epoch in (1, 2, 3):
        network.epoch_started(epoch)
        output = network(batch)
        (gradient,) = torch.autograd.grad(network.loss(output, batch)[0], output.features["vision_score"])
    assert gradient[:, 0].bool().tolist() == [True, False, False, True]
    vision = network.labels[network.heads.index("vision")]
    assert vision.isnan().tolist() == [False, True, True, False]
    assert not network.labels[:2].isnan().any()


def test_options_are_parsed_and_validated():
    peers = {"tfn": TestTFN, "lmf": TestLMF, "mult": TestMulT, "self_mm": TestSelfMM, "mmaf": TestMMAF}
    network = peers["lmf"]().network(**{"options.factor_lr": "5e-4"})  # as YAML reads it
    assert network.options["factor_lr"] == 5e-4
    for name, key, value in (
        ("tfn", "task", "classify"), ("mmaf", "task", "regression"), ("self_mm", "task", "classification"),
        ("mmaf", "tasks", ["M", "X"]), ("self_mm", "text_pool", "average"), ("lmf", "rank", 0), ("mult", "layers", 0),
        ("tfn", "dropout", 2), ("mult", "heads", 7), ("mmaf", "heads", 3), ("mult", "text_kernel", 0),
        ("lmf", "factor_lr", float("nan")), ("tfn", "post_fusion", 1.5), ("mult", "positions", "no"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=rf"options\.({key}|width)"):
            peers[name]().network(**{f"options.{key}": value})
    with pytest.raises(UsageError, match=r"train\.balance: weights — tfn learns a score"):
        peers["tfn"]().network(**{"train.balance": "weights"})
    peers["tfn"]().network(**{"train.balance": "weights", "options.task": "classification"})


def test_self_mm_loss_weight_grows_with_label_difference():
    network, batch = TestSelfMM().network(), features()
    network.train()
    network.loss(network(batch), batch)
    truth = batch.labels["M"]
    network.labels[1] = truth + 0.5
    output = network(batch)
    total, logs = network.loss(output, batch)
    expected = (torch.tensor(0.5).tanh() * (output.features["text_score"][:, 0] - truth - 0.5).abs()).mean()
    torch.testing.assert_close(logs["loss_text"], expected.detach())
    torch.testing.assert_close(logs["loss_vision"], torch.zeros(()))
    torch.testing.assert_close(total.detach(), sum(logs.values()))


def test_score_loss_is_l1():
    network, batch = TestLMF().network().eval(), features()
    batch.labels["M"][1] = torch.nan
    output = network(batch)
    errors = (output.score - batch.labels["M"])[[0, 2, 3, 4]].detach().abs()
    torch.testing.assert_close(network.loss(output, batch)[0].detach(), errors.mean())


def test_pool_first_takes_first_real_position():
    values, mask = torch.arange(24.0).reshape(2, 3, 4), torch.tensor([[False, True, True], [False] * 3])
    sequence = Sequence(values, mask)
    assert pool(sequence, "first").tolist() == [[4, 5, 6, 7], [0] * 4]
