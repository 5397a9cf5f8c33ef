"""Frames → states, compared with transformers' Chinese-CLIP and timm's own networks."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from tests.tiny import clip_folder, text_folder, timm_folder, tokenizer, with_and_without_sync
from transformers import ChineseCLIPModel
from transformers.activations import QuickGELUActivation
from transformers.models.chinese_clip.image_processing_pil_chinese_clip import ChineseCLIPImageProcessorPil

from senticlip.config import Config, VisionConfig
from senticlip.data.video import resize
from senticlip.encoders.hub import OPENAI_MEAN
from senticlip.encoders.vision import QuickGelu, VisionEncoder, vision_spec
from senticlip.models import create_model
from senticlip.structures import Sequence, UsageError


def encoder_of(folder, **changes):
    spec, weights = vision_spec(VisionConfig(encoder=str(folder), **changes))
    encoder = VisionEncoder(spec)
    encoder.load_folder(weights)
    return encoder.eval()


def frames(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def all_real(values):
    return Sequence(values, torch.ones(values.shape[:2], dtype=torch.bool))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def timm_network(tmp_path_factory):
    return timm_folder(tmp_path_factory.mktemp("timm"))


@torch.inference_mode()
def test_frames_equal_chinese_clip(clip):
    pixels, encoder = frames(2, 3, 3, 32, 32), encoder_of(clip)
    reference = ChineseCLIPModel.from_pretrained(clip).eval()
    mean = torch.tensor([0.5, 0.4, 0.3])[:, None, None]
    std = torch.tensor([0.2, 0.3, 0.25])[:, None, None]
    wanted = reference.get_image_features(((pixels / 255 - mean) / std).flatten(0, 1)).pooler_output
    torch.testing.assert_close(encoder(all_real(pixels)).values, wanted.view(2, 3, 12), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_patch_embedding_matches_convolution(clip):
    patches = encoder_of(clip).body.embeddings.patch_embedding
    for size in ((32, 32), (35, 30)):
        pictures = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
        wanted = torch.nn.functional.conv2d(pictures, patches.weight, stride=patches.stride)
        torch.testing.assert_close(patches(pictures), wanted, atol=1e-5, rtol=1e-5)


def test_gradients_equal_chinese_clip(clip):
    """In training mode, also in the last layer, where only the class token is computed."""
    pixels, encoder = frames(4, 3, 32, 32), encoder_of(clip).train()
    reference = ChineseCLIPModel.from_pretrained(clip).train()
    images = encoder.normalize(pixels)
    encoder.images(images).square().sum().backward()
    reference.get_image_features(images).pooler_output.square().sum().backward()
    wanted = dict(reference.vision_model.named_parameters())
    assert list(wanted) == [name for name, _ in encoder.body.named_parameters()]
    for name, parameter in encoder.body.named_parameters():
        if parameter.grad is None:  # the last layer's softmax cancels it out; only rounding errors remain
            assert name.endswith("layers.1.self_attn.k_proj.bias")
            assert wanted[name].grad.abs().max() < 1e-5
        else:
            torch.testing.assert_close(parameter.grad, wanted[name].grad, atol=1e-5, rtol=1e-4, msg=name)


def test_quick_gelu_equals_transformers():
    x, reference = torch.linspace(-12, 12, 97, requires_grad=True), QuickGELUActivation()
    (wanted,) = torch.autograd.grad(reference(x).sum(), x)
    torch.testing.assert_close(torch.autograd.grad(QuickGelu()(x).sum(), x)[0], wanted)
    with torch.inference_mode():
        buffer = x.detach().clone()
        result = QuickGelu()(buffer)
        torch.testing.assert_close(result, reference(x.detach()), atol=1e-6, rtol=1e-6)
        assert result.data_ptr() == buffer.data_ptr()


@torch.inference_mode()
def test_other_frame_size_interpolates_the_positions(clip):
    pixels, encoder = frames(1, 2, 3, 48, 48), encoder_of(clip, size=48)
    reference = ChineseCLIPModel.from_pretrained(clip).eval()
    wanted = reference.get_image_features(encoder.normalize(pixels[0]), interpolate_pos_encoding=True).pooler_output
    torch.testing.assert_close(encoder(all_real(pixels)).values[0], wanted, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("train", [False, True])
def test_labels_equal_chinese_clip(clip, train):
    changes = {"vision.encoder": str(clip), "text.encoder": str(clip), "text.max_length": 20, "width": 16, "heads": 2}
    model = create_model(Config().override({**changes, "label.train": train})).eval()
    reference = ChineseCLIPModel.from_pretrained(clip).eval()
    prompts = [f"这段视频的情感是{name}的" for name in ("消极", "中性", "积极")]
    wanted = reference.get_text_features(**tokenizer()(prompts, return_tensors="pt")).pooler_output
    torch.testing.assert_close(model.network.labels(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(360, 640), (640, 360), (100, 130), (60, 300), (200, 240), (224, 224)])
def test_preprocessing_equals_hub_processor(clip, shape):
    """The hub's settings: squash to a square, bicubic, no crop, OpenAI's mean and standard deviation."""
    random = np.random.default_rng(1)
    blocks = random.integers(0, 256, (1, 3, shape[0] // 20 + 1, shape[1] // 20 + 1))
    smooth = torch.nn.functional.interpolate(torch.from_numpy(blocks).float(), shape, mode="bilinear")
    pixels = (smooth + torch.from_numpy(random.normal(0, 8, (4, 3, *shape)))).clamp(0, 255).byte()
    processor = ChineseCLIPImageProcessorPil(size={"height": 224, "width": 224}, do_center_crop=False)
    wanted = processor(list(pixels), return_tensors="pt")["pixel_values"]
    (clip / "preprocessor_config.json").rename(clip / "away.json")
    try:
        encoder = encoder_of(clip, size=224)
    finally:
        (clip / "away.json").rename(clip / "preprocessor_config.json")
    result = encoder.normalize(resize(pixels, 224))
    assert ((result - wanted) * encoder.std).abs().max() <= 1.001


@torch.inference_mode()
def test_timm_folder_equals_timm(timm_network):
    pixels, encoder = frames(2, 2, 3, 64, 64), encoder_of(timm_network, size=64)
    reference = timm.create_model(f"local-dir:{timm_network}", pretrained=True, num_classes=0).eval()
    wanted = reference((pixels.flatten(0, 1) / 255 - 0.5) / 0.25)
    assert encoder.dim == wanted.shape[1]
    torch.testing.assert_close(encoder(all_real(pixels)).values.flatten(0, 1), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["vgg16", "resnet34", "resnet50", "convnext_tiny", "vit_base_patch32_224"])
def test_spec_dim_matches_output_of_the_papers_networks(name):
    spec, weights = vision_spec(VisionConfig(encoder=f"timm/{name}.some_tag", pretrained=False, size=64))
    assert weights is None
    with torch.device("meta"):
        body = VisionEncoder(spec).body
        assert body(torch.zeros(2, 3, 64, 64)).shape == (2, spec["dim"])


def test_timm_vit_accepts_other_frame_size(tmp_path):
    folder = timm_folder(tmp_path, "test_vit")
    encoder = encoder_of(folder, size=64)
    assert encoder(all_real(frames(1, 2, 3, 64, 64))).values.shape == (1, 2, encoder.dim)
    with pytest.raises(UsageError, match=r"vision\.size: test_vit cannot read 50 pixels"):
        encoder_of(folder, size=50)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "xcit_nano_12_p8_224", "hieradet_small"])
def test_fixed_size_networks_accept_other_frame_size(name):
    spec, _ = vision_spec(VisionConfig(encoder=f"timm/{name}", pretrained=False, size=160))
    with torch.device("meta"):
        assert VisionEncoder(spec).body(torch.zeros(2, 3, 160, 160)).shape == (2, spec["dim"])


def test_unsupported_frame_size_is_rejected(clip):
    with pytest.raises(UsageError, match=r"vision\.encoder: levit_128s cannot turn 160×160 pixels into one vector"):
        vision_spec(VisionConfig(encoder="timm/levit_128s", pretrained=False, size=160))
    with pytest.raises(UsageError, match=r"vision\.size: 4 is smaller than one patch of this network \(\d+ pixels\)"):
        encoder_of(clip, size=4)


@pytest.mark.parametrize("kind", ["clip", "timm_network"])
def test_only_real_frames_are_computed(kind, request):
    encoder = encoder_of(request.getfixturevalue(kind), size=64)
    batch_sizes = []
    encoder.body.register_forward_pre_hook(
        lambda _, args, kwargs: batch_sizes.append(len(args[0] if args else kwargs["pixel_values"])), with_kwargs=True
    )
    pixels = frames(3, 4, 3, 64, 64)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    states = encoder.train()(Sequence(pixels, mask))
    assert batch_sizes == [6]
    assert states.values[~mask].abs().sum() == 0
    altered = encoder(Sequence(torch.where(mask[..., None, None, None], pixels, 255 - pixels), mask))
    torch.testing.assert_close(
        states.values, altered.values
    )  # even in training mode: batch norms see only the real frames
    no_frames = encoder(Sequence(pixels, torch.zeros_like(mask)))
    assert no_frames.values.abs().sum() == 0
    assert no_frames.values.shape == states.values.shape
    assert batch_sizes == [6, 6]


def test_training_without_gpu_sync_gives_same_gradients(clip, monkeypatch):
    """On a GPU a CLIP tower also reads padding, which must affect neither states nor gradients."""
    pixels, encoder = frames(3, 4, 3, 32, 32), encoder_of(clip).train()
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]]).bool()
    results = with_and_without_sync(encoder, Sequence(pixels, mask), monkeypatch)
    assert not results[1][0][~mask].any()
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


def test_when_gpu_sync_is_avoided(clip, timm_network):
    gpu = SimpleNamespace(device=torch.device("cuda"))
    assert encoder_of(clip).train()._avoids_sync(gpu)
    assert not encoder_of(clip).train()._avoids_sync(frames(1, 1, 3, 32, 32))
    assert not encoder_of(clip)._avoids_sync(gpu)
    assert not encoder_of(timm_network).train()._avoids_sync(gpu)
    assert not VisionEncoder(vision_spec(VisionConfig(encoder=str(clip)))[0], sampled=True).train()._avoids_sync(gpu)


def test_invalid_image_encoders_are_rejected(tmp_path):
    with pytest.raises(UsageError, match=r"vision\.encoder: .* neither a Chinese-CLIP model nor a timm network"):
        vision_spec(VisionConfig(encoder=str(text_folder(tmp_path / "text"))))
    with pytest.raises(UsageError, match=r"vision\.encoder: no such folder: ./nowhere"):
        vision_spec(VisionConfig(encoder="./nowhere"))
    with pytest.raises(UsageError, match=r"has no readable config\.json"):
        vision_spec(VisionConfig(encoder=str(tmp_path)))
    for content, message in (
        ('{"architecture": "nosuch_net"}', "neither a Chinese-CLIP model nor a timm network"),
        ("[]", "neither a Chinese-CLIP model nor a timm network"),
        ('{"model_type"', r"has no readable config\.json"),
        ("7", r"has no readable config\.json"),
    ):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UsageError, match=message):
            vision_spec(VisionConfig(encoder=str(tmp_path)))


def test_broken_preprocessing_is_rejected_and_empty_uses_openai(tmp_path):
    folder = clip_folder(tmp_path / "clip")
    (folder / "preprocessor_config.json").write_text('{"image_mean": null, "image_std": null}')
    assert vision_spec(VisionConfig(encoder=str(folder)))[0]["mean"] == OPENAI_MEAN
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5')
    with pytest.raises(UsageError, match=r"vision\.encoder: .* has no readable preprocessor_config\.json"):
        vision_spec(VisionConfig(encoder=str(folder)))
