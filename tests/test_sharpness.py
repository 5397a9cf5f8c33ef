"""Sharpness-aware gradients, against numbers worked out by hand and a plain loop."""

import copy

import torch
from torch import nn

from senticlip.sharpness import sharpness_aware


def test_the_gradient_is_the_one_uphill():
    bowl = nn.ParameterDict({"w": nn.Parameter(torch.tensor([3.0, 4.0]))})
    curve = torch.tensor([1.0, 2.0])  # loss ½ Σ c w²: the gradient is c w = (3, 8), of length √73

    def backward():
        loss = (curve * bowl.w**2).sum() / 2
        loss.backward()
        return loss.item()

    loss = sharpness_aware(bowl, 0.5, backward)
    assert loss == 20.5  # ½ (1·9 + 2·16), at w itself
    length = 73**0.5
    torch.testing.assert_close(bowl.w.grad, torch.tensor([3 + 0.5 * 3 / length, 2 * (4 + 0.5 * 8 / length)]))
    assert torch.equal(bowl.w.detach(), torch.tensor([3.0, 4.0]))


def test_both_passes_draw_the_same_and_batch_norms_learn_once():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    twin, batch, drawn = copy.deepcopy(network), torch.randn(16, 4), []

    def backward():
        drawn.append(torch.rand(5))
        network(batch).square().mean().backward()

    state = torch.get_rng_state()
    sharpness_aware(network, 0.1, backward)
    assert torch.equal(*drawn)
    torch.set_rng_state(state)
    torch.rand(5)
    twin(batch)
    torch.testing.assert_close(network[1].running_mean, twin[1].running_mean, rtol=0, atol=0)
    torch.testing.assert_close(network[1].running_var, twin[1].running_var, rtol=0, atol=0)
    assert network[1].momentum == 0.1


def test_what_was_accumulated_stays_and_what_is_frozen_moves_nowhere():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    network[0].bias.requires_grad_(False)
    unused = nn.Parameter(torch.ones(2))
    whole = nn.ModuleDict({"network": network, "unused": nn.ParameterList([unused])})
    start, batches = copy.deepcopy(network.state_dict()), torch.randn(2, 8, 4)

    def gradients(x, radius):
        """The slow way: two separate passes over a copy."""
        twin = copy.deepcopy(network)
        names = [name for name, p in twin.named_parameters() if p.requires_grad]
        first = torch.autograd.grad(twin(x).square().mean(), [twin.get_parameter(name) for name in names])
        length = torch.cat([g.flatten() for g in first]).norm()
        moved = {**start, **{name: start[name] + radius * g / length for name, g in zip(names, first, strict=True)}}
        twin.load_state_dict(moved)
        return torch.autograd.grad(twin(x).square().mean(), [twin.get_parameter(name) for name in names])

    for x in batches:
        sharpness_aware(whole, 0.1, lambda x=x: network(x).square().mean().backward())
    wanted = [a + b for a, b in zip(gradients(batches[0], 0.1), gradients(batches[1], 0.1), strict=True)]
    found = [p.grad for p in network.parameters() if p.requires_grad]
    torch.testing.assert_close(found, wanted)
    assert all(torch.equal(value, start[name]) for name, value in network.state_dict().items())
    assert network[0].bias.grad is None
    assert unused.grad is None
    assert torch.equal(unused.detach(), torch.ones(2))
