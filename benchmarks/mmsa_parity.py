"""MMSA's weights in our peers: the same outputs and gradients on unpadded input, and how each handles padding.

Needs ``mmsa`` 2.2.1, which requires torch below 2.15 to import, and so its own environment:

    python -m venv mmsa && mmsa/bin/pip install torch==2.13.0 mmsa==2.2.1 pyyaml av
    PYTHONPATH=src mmsa/bin/python benchmarks/mmsa_parity.py
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import torch
from MMSA.config import get_config_regression
from MMSA.models.multiTask.SELF_MM import SELF_MM
from MMSA.models.singleTask.LMF import LMF
from MMSA.models.singleTask.MULT import MULT
from MMSA.models.singleTask.TFN import TFN

from senticlip.config import Config
from senticlip.models import MODELS, peer
from senticlip.structures import Batch, Sequence

peer.MODALITIES = ("text", "audio", "vision")  # MMSA's order of concatenation
DIMS = {"text": 768, "audio": 33, "vision": 709}
STEPS = {"text": 39, "audio": 400, "vision": 55}
THEIRS = {"tfn": TFN, "lmf": LMF, "mult": MULT, "self_mm": SELF_MM}
SHORT = {"l": "text", "a": "audio", "v": "vision"}


def settings(name, **changes):
    """MMSA's own published arguments for SIMS."""
    args = get_config_regression(name, "sims")
    args.update(train_mode="regression", feature_dims=list(DIMS.values()), device="cpu", **changes)
    return args


def tiny_bert(folder, width=768):
    """A random BERT for MMSA's Self-MM, which always loads one."""
    from transformers import BertConfig, BertModel, BertTokenizer

    config = BertConfig(vocab_size=100, hidden_size=width, num_hidden_layers=1, num_attention_heads=12)
    BertModel(config).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(chr(0x4E00 + i) for i in range(95))]
    (Path(folder) / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return str(folder)


RENAME = {
    "tfn|lmf": [
        (r"^video_", "vision_"),
        (r"^(audio|vision|text)_subnet\.rnn", r"nets.\1.last.lstm"),
        (r"^text_subnet\.linear_1", "nets.text.out"),
        (r"^(audio|vision)_subnet\.linear_(\d)", lambda m: f"nets.{m[1]}.layers.{int(m[2]) - 1}"),
        (r"^(audio|vision)_subnet\.", r"nets.\1."),
        (r"^post_fusion_layer_1", "fusion"),
        (r"^post_fusion_layer_2", "hidden"),
        (r"^post_fusion_layer_3", "out"),
        (r"^text_factor", "fusion.factors.0"),
        (r"^audio_factor", "fusion.factors.1"),
        (r"^vision_factor", "fusion.factors.2"),
        (r"^fusion_weights", "fusion.weights"),
        (r"^fusion_bias", "fusion.bias"),
    ],
    "mult": [
        (r"^proj_([lav])", lambda m: f"project.{SHORT[m[1]]}"),
        (r"^trans_([lav])_with_([lav])", lambda m: f"pairs.{SHORT[m[1]]}_asks_{SHORT[m[2]]}"),
        (r"^trans_([lav])_mem", lambda m: f"memory.{SHORT[m[1]]}"),
        (r"self_attn\.in_proj_", "project."),
        (r"self_attn\.out_proj", "out"),
        (r"layer_norms\.0", "norm1"),
        (r"layer_norms\.1", "norm2"),
        (r"layer_norm\.", "norm."),
        (r"^out_layer", "out"),
    ],
    "self_mm": [
        (r"^video_", "vision_"),
        (r"post_video", "post_vision"),
        (r"^(audio|vision)_model\.rnn", r"nets.\1.last.lstm"),
        (r"^(audio|vision)_model\.linear_1", r"nets.\1.out"),
        (r"^post_fusion_layer_(\d)", r"branches.fused.layer\1"),
        (r"^post_(text|audio|vision)_layer_(\d)", r"branches.\1.layer\2"),
    ],
}


def translate(name, state):
    """Their state dict with our names and layouts; entries without a counterpart are left out."""
    rules = next(rules for key, rules in RENAME.items() if re.fullmatch(key, name))
    result = {}
    for key, value in state.items():
        if key.startswith(("output_", "text_model.")) or key.endswith(".version"):
            continue
        for pattern, new in rules:
            key = re.sub(pattern, new, key)
        result[key] = value.clone()
    if name == "tfn":
        a, v, t = 33, 129, 257
        weight = result["fusion.weight"].view(32, a, v, t)
        result["fusion.weight"] = weight.permute(2, 0, 3, 1).reshape(v, 32, t * a)  # theirs a, v, t; ours v | t, a
    if name == "lmf":
        result["fusion.bias"] = result["fusion.bias"][0]
    return result


def pair(name, bert):
    """Their model and ours with the same weights, in eval mode."""
    torch.manual_seed(0)
    args = settings(name, transformers="bert", pretrained=bert)
    theirs = THEIRS[name](args).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm1d):  # nontrivial statistics
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    config = Config().override({"model": name, "modalities": ["text", "audio", "vision"]})
    ours = MODELS[name](config, DIMS).eval()
    missing = set(ours.state_dict()) - set(translate(name, theirs.state_dict()))
    buffers = {key for key in missing if key.startswith(("seen_", "centres_", "labels", "class_weights"))}
    assert missing == buffers, missing - buffers
    ours.load_state_dict({**ours.state_dict(), **translate(name, theirs.state_dict())})
    return theirs, ours


class FixedStates(torch.nn.Module):
    """Stands in for their BERT."""

    def __init__(self, states):
        super().__init__()
        self.states = states

    def forward(self, _):
        return self.states


def their_output(name, theirs, values, lengths):
    """Their output, B."""
    text, audio, vision = (values[key] for key in ("text", "audio", "vision"))
    if name in ("tfn", "lmf"):
        audio, vision = audio.mean(1, keepdim=True), vision.mean(1, keepdim=True)  # need_normalized
    if name == "self_mm":
        theirs.text_model = FixedStates(text)  # both read the same text states
        ids = torch.ones(len(text), 3, STEPS["text"])
        return theirs(ids, (audio, lengths["audio"]), (vision, lengths["vision"]))["M"][:, 0]
    return theirs(text, audio, vision)["M"][:, 0]


def batch(values, lengths):
    masks = {k: torch.arange(v.shape[1]) < lengths[k][:, None] for k, v in values.items()}
    return Batch({k: Sequence(v, masks[k]) for k, v in values.items()}, {})


def self_mm_label_difference(ours):
    """Three epochs of label updates by MMSA's trainer and by ours, on the same features."""
    from MMSA.trains.multiTask.SELF_MM import SELF_MM as Trainer

    args = settings("self_mm", train_samples=48, dataset_name="sims")
    trainer, heads = Trainer(args), {"fusion": "fused", "text": "text", "audio": "audio", "vision": "vision"}
    ours.prepare(range(48))
    torch.manual_seed(1)
    truth = torch.randint(-5, 6, (48,)) / 5
    trainer.init_labels(torch.arange(48), truth)
    for epoch in (1, 2, 3):
        ours.epoch_started(epoch)
        for rows in torch.randperm(48).split(16):
            features = {key: torch.randn(16, args[f"post_{'video' if key == 'vision' else key}_dim"]) for key in heads}
            if epoch > 1:
                trainer.update_labels(*features.values(), epoch, rows, None)
            trainer.update_features(*features.values(), rows)
            trainer.update_centers()
            all_features = torch.cat([features[k] for k in ("fusion", "text", "audio", "vision")], -1)
            ours.remember(rows, truth[rows], all_features, torch.ones(4, len(rows), dtype=torch.bool))
    return max(
        float((trainer.label_map[key] - ours.labels[ours.heads.index(head)]).abs().max()) for key, head in heads.items()
    )


def main():
    torch.manual_seed(0)
    full_lengths = {k: torch.full((4,), n) for k, n in STEPS.items()}
    values = {k: torch.randn(4, n, DIMS[k]) for k, n in STEPS.items()}
    lengths = {k: torch.randint(n // 3, n, (4,)) for k, n in STEPS.items()}
    padded = {
        k: torch.where((torch.arange(n) < lengths[k][:, None])[..., None], values[k], 0) for k, n in STEPS.items()
    }
    trimmed = {k: v[:, : int(lengths[k].max())] for k, v in padded.items()}
    width = 58
    print("random input, SIMS shapes 39×768 / 400×33 / 55×709, MMSA's SIMS hyperparameters; |difference| at most")
    with tempfile.TemporaryDirectory() as folder:
        bert = tiny_bert(folder)
        for name in THEIRS:
            theirs, ours = pair(name, bert)
            inputs = {k: v.clone().requires_grad_() for k, v in values.items()}
            a, b = their_output(name, theirs, inputs, full_lengths), ours(batch(inputs, full_lengths)).score
            grads = [torch.autograd.grad(x.sum(), list(inputs.values()), allow_unused=True) for x in (a, b)]
            scale = max(float(g.abs().max()) for g in grads[0] if g is not None)
            gap = max(float((x - y).abs().max()) for x, y in zip(*grads, strict=True) if x is not None) / scale
            with torch.no_grad():
                our_change = (ours(batch(padded, lengths)).score - ours(batch(trimmed, lengths)).score).abs().max()
                their_change = (
                    (their_output(name, theirs, padded, lengths) - their_output(name, theirs, trimmed, lengths))
                    .abs()
                    .max()
                )
                difference = (
                    (their_output(name, theirs, padded, lengths) - ours(batch(padded, lengths)).score).abs().max()
                )
            print(f"{name:8} {'unpadded: outputs':>{width - 9}} {float((a - b).detach().abs().max()):.1e}")
            print(f"{'gradients, relative to the largest':>{width}} {gap:.1e}")
            print(f"{'padded: theirs against ours':>{width}} {float(difference):.1e}")
            print(f"{'padding cut to the longest row changes theirs by':>{width}} {float(their_change):.1e}")
            print(f"{'… and ours by':>{width}} {float(our_change):.1e}")
            if name == "self_mm":
                print(f"{'labels after three epochs of updates':>{width}} {self_mm_label_difference(ours):.1e}")


if __name__ == "__main__":
    main()
