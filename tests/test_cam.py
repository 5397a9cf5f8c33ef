"""Heat maps, compared with the naive method: zero a channel in the layer, rerun the model, compare probabilities."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_grad_cam import AblationCAM
from transformers import ChineseCLIPVisionModel

import tiny
from senticlip import cam, cut
from senticlip.config import from_dict
from senticlip.models import create_model
from senticlip.structures import LABELS, Batch, Output, Sequence, UsageError

M, N = 3, 7


def build(folder: Path, vision: Path, size: int = 32, gain: float = 1.0, **changes):
    config = from_dict(
        {
            "text": {"encoder": str(tiny.text_folder(folder / "text")), "max_length": 12, "prefix_length": 2},
            "vision": {"encoder": str(vision), "frames": M, "size": size},
            "width": 16,
            "heads": 2,
            **changes,
        }
    )
    torch.manual_seed(3)
    model = create_model(config).eval()
    tiny.perturb(model.network, 5)
    if gain != 1.0:  # for networks in which a single channel has little effect
        model.network.entrances["vision"].project.weight.data.mul_(gain)
    if hasattr(model.network, "temperature"):
        model.network.temperature.copy_(torch.tensor([0.7, 2.0]))
    return model


def make_batch(size: int = 32, frames: int = 2) -> Batch:
    random = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (1, M, 3, size, size), generator=random, dtype=torch.uint8)
    words = torch.randint(5, 20, (1, N), generator=random)
    mask = torch.arange(M)[None] < frames
    return Batch({"text": Sequence(words, torch.ones(1, N, dtype=torch.bool)), "vision": Sequence(pixels, mask)}, {})


BUILDERS = {
    "chinese_clip": lambda folder: build(folder, tiny.clip_folder(folder / "clip")),
    "vit": lambda folder: build(folder, tiny.timm_folder(folder / "vit", "test_vit")),
    "resnet": lambda folder: build(folder, tiny.timm_folder(folder / "cnn", "test_resnet"), 64),
    "efficientnet": lambda folder: build(folder, tiny.timm_folder(folder / "cnn"), 64, gain=1000.0),
    "mambaout": lambda folder: build(folder, tiny.timm_folder(folder / "nhwc", "test_mambaout"), 64),
}
SIZES = {"chinese_clip": 32, "vit": 32, "resnet": 64, "efficientnet": 64, "mambaout": 64}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    cache = {}

    def get(name):
        if name not in cache:
            cache[name] = BUILDERS[name](tmp_path_factory.mktemp(name))
        return cache[name]

    return get


def explained_layer(model):
    """The explained layer, its channel axis and its number of tokens that are not patches."""
    encoder = model.encoders["vision"]
    if encoder.kind == "chinese_clip":
        return encoder.body.encoder.layers[-1].layer_norm1, 2, 1
    if hasattr(encoder.body, "blocks") and hasattr(encoder.body, "num_prefix_tokens"):
        return encoder.body.blocks[-1].norm1, 2, encoder.body.num_prefix_tokens
    axis = 3 if getattr(encoder.body, "output_fmt", "") == "NHWC" else 1
    return encoder.body.get_submodule(cut.last_stage(encoder.body)), axis, 0


def maps_of(values, axis, prefix):
    """The explained layer's output as N×C×h×w."""
    return cut.to_grid(values[:, prefix:].transpose(1, 2)) if axis == 2 else values.movedim(axis, 1)


@torch.no_grad()
def naive_ablation_cam(model, batch):
    """Σ w_k A_k of each class, with one forward pass of the whole model for each channel of each frame."""
    layer, axis, prefix = explained_layer(model)
    outputs = []
    handle = layer.register_forward_hook(lambda module, inputs, output: outputs.append(output.clone()))
    y = model(batch).log_probs.double().exp()[0]
    handle.remove()
    activations = outputs[0].double()
    weights = torch.zeros(activations.shape[0], activations.shape[axis], 3, dtype=torch.float64)
    for frame in range(weights.shape[0]):
        for channel in range(weights.shape[1]):

            def ablate(module, inputs, output, frame=frame, channel=channel):
                output = output.clone()
                output[frame].select(axis - 1, channel).zero_()
                return output

            handle = layer.register_forward_hook(ablate)
            weights[frame, channel] = (y - model(batch).log_probs.double().exp()[0]) / y
            handle.remove()
    return torch.einsum("ncl,nchw->lnhw", weights, maps_of(activations, axis, prefix)).relu()


@pytest.mark.parametrize("name", BUILDERS)
def test_ablation_cam_matches_naive_ablation(models, name):
    model, batch = models(name), make_batch(SIZES[name])
    expected = naive_ablation_cam(model, batch)
    assert expected.amax((1, 2, 3)).max() > 1e-2  # there is something to compare
    for index in range(3):
        progress = []
        heat_map = cam.ablation_cam(model, batch, index, lambda *done, seen=progress: seen.append(done))
        assert (heat_map - expected[index]).abs().max() < 1e-4 * max(1, expected[index].max())
        total = 2 * cut.Split(model.encoders["vision"]).grid(activations_of(model, batch)).shape[1]
        assert progress[-1] == (total, total)


def activations_of(model, batch):
    return cut.Split(model.encoders["vision"]).before(cam.seen_frames(model, batch)[0])[0]


def test_ablation_cam_matches_pytorch_grad_cam_after_relu(models):
    """After a ReLU the package's ablated value is also 0. It explains one image, so the clip has one frame."""
    model, batch = models("resnet"), make_batch(64, frames=1)
    features = model.encode(batch)

    class Probabilities(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, images):
            rows = cam.repeat(features, len(images))
            values = rows.modalities["vision"].values.clone()
            values[:, 0] = model.encoders["vision"].images(images)
            rows.modalities["vision"] = Sequence(values, rows.modalities["vision"].mask)
            return model.fuse(rows).log_probs.exp()

    layer = explained_layer(model)[0]
    images = cam.seen_frames(model, batch)[0]
    activations = activations_of(model, batch)
    assert activations.min() == 0
    theirs = AblationCAM(Probabilities(), [layer], batch_size=16)
    get_cam_weights, weights = theirs.get_cam_weights, []
    theirs.get_cam_weights = lambda *args: weights.append(get_cam_weights(*args)) or weights[-1]
    peaks = []
    for index in range(3):
        theirs(images, [lambda output, index=index: output[index]])
        signed = torch.einsum("nc,nchw->nhw", torch.from_numpy(np.asarray(weights[-1])).float(), activations)
        heat_map = cam.ablation_cam(model, batch, index)
        assert torch.allclose(heat_map, signed.relu(), atol=1e-4)
        peaks.append(heat_map.max())
    assert max(peaks) > 1e-3  # there is something to compare


@pytest.mark.parametrize("name", BUILDERS)
def test_split_encoder_matches_full_encoder(models, name):
    encoder = models(name).encoders["vision"]
    size = SIZES[name]
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(cut.Split(encoder)(images), encoder.images(images), atol=1e-5)
        assert torch.allclose(encoder.images(images), encoder.images(images))  # and is unchanged


@pytest.mark.parametrize("name", BUILDERS)
def test_grad_cam_matches_probability_gradient(models, name):
    model, batch = models(name), make_batch(SIZES[name])
    index = int(max(range(3), key=lambda c: cam.grad_cam(model, batch, c).max()))
    layer, axis, prefix = explained_layer(model)
    outputs = []
    handle = layer.register_forward_hook(lambda module, inputs, output: output.retain_grad() or outputs.append(output))
    for parameter in model.parameters():
        parameter.requires_grad_()
    model(batch).log_probs.exp()[0, index].backward()
    handle.remove()
    model.zero_grad(set_to_none=True)
    activations, gradients = (maps_of(values, axis, prefix) for values in (outputs[0].detach(), outputs[0].grad))
    expected = (gradients.mean((2, 3), keepdim=True) * activations).sum(1).relu()
    heat_map = cam.grad_cam(model, batch, index)
    assert heat_map.max() > 0
    assert torch.allclose(heat_map / heat_map.max(), expected / expected.max(), atol=1e-4)


@pytest.mark.parametrize("name", ["chinese_clip", "vit"])
def test_rollout_is_a_distribution_over_tokens(models, name):
    model, batch = models(name), make_batch()
    heat_map = cam.rollout(model, batch)
    assert heat_map.shape[0] == 2
    assert (heat_map >= 0).all()
    assert (heat_map.sum((1, 2)) < 1).all()  # the class token keeps a share
    assert (heat_map.sum((1, 2)) > 0.1).all()


def test_rollout_without_class_token_averages_all_patches(tmp_path):
    args = {"class_token": False, "global_pool": "avg"}
    model = build(tmp_path, tiny.timm_folder(tmp_path / "vit", "test_vit", **args), 160)
    heat_map = cam.rollout(model, make_batch(160))
    assert heat_map.shape == (2, 10, 10)
    torch.testing.assert_close(heat_map.sum((1, 2)), torch.ones(2))


def test_rollout_matches_product_of_chinese_clip_attention(models):
    model, batch = models("chinese_clip"), make_batch()
    encoder = model.encoders["vision"]
    reference = ChineseCLIPVisionModel._from_config(encoder.body.config, attn_implementation="eager").eval()
    reference.load_state_dict(encoder.body.state_dict())
    with torch.no_grad():
        attentions = reference(pixel_values=cam.seen_frames(model, batch)[0], output_attentions=True).attentions
    flow = torch.eye(attentions[0].shape[-1])
    for attention in attentions:
        flow = (attention.mean(1) + torch.eye(attention.shape[-1])) / 2 @ flow
    expected = flow[:, 0, 1:].unflatten(-1, (4, 4))
    torch.testing.assert_close(cam.rollout(model, batch), expected, atol=1e-6, rtol=1e-5)


def test_rollout_is_rejected_for_cnns(models):
    with pytest.raises(UsageError, match="needs a ViT"):
        cam.rollout(models("resnet"), make_batch())
    assert cam.methods_for(models("resnet")) == ["ablation-cam", "grad-cam"]
    assert cam.methods_for(models("vit")) == list(cam.METHODS)


def test_drop_is_exact_for_probabilities_near_one():
    """Even where p rounds to 1."""
    y, without = torch.tensor(300.0).double(), torch.tensor([299.0, 301.0, -2.0]).double()
    expected = [math.exp(-299) - math.exp(-300), math.exp(-301) - math.exp(-300), 1 - 1 / (1 + math.exp(2))]
    assert cam.drop(Output(), y, without).tolist() == pytest.approx(expected, rel=1e-9)


def test_regression_scores_are_explained(tmp_path):
    model = build(tmp_path, tiny.timm_folder(tmp_path / "cnn", "test_resnet"), model="tfn")
    batch = make_batch()
    with torch.no_grad():
        output = model(batch)
        assert cam.log_odds(model.network, output)[0].tolist() == pytest.approx(
            [-output.score.item(), -abs(output.score.item()), output.score.item()]
        )
    up, down = cam.ablation_cam(model, batch, LABELS.index("positive")), cam.ablation_cam(model, batch, 0)
    assert up.shape == down.shape
    assert not torch.equal(up, down)
    assert (up * down).max() == 0  # evidence for one is evidence against the other


@pytest.mark.parametrize("name", ["chinese_clip", "vit", "efficientnet"])
def test_heat_maps_do_not_hook_the_models_own_modules(models, monkeypatch, name):
    """Other threads may use the model: heat maps only add hooks to copies of its modules, or replace their forward."""
    model, batch, touched = models(name), make_batch(SIZES[name]), []
    own, register_hook, passing = set(model.modules()), torch.nn.Module.register_forward_hook, cut.bypass_until

    def hook(module, *args, **options):
        touched.append(module)
        return register_hook(module, *args, **options)

    monkeypatch.setattr(torch.nn.Module, "register_forward_hook", hook)
    monkeypatch.setattr(cut, "bypass_until", lambda body, stage: touched.append(body) or passing(body, stage))
    for method in cam.methods_for(model):
        cam.METHODS[method](model, batch, 1)
    assert touched
    assert own.isdisjoint(touched)
