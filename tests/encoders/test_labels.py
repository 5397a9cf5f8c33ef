"""Class vectors of an encoder that is not a CLIP tower: the mean of its states, minus the mean over the classes."""

import pytest
import torch
from tests.tiny import text_folder, timm_folder, tokenizer
from transformers import AutoModel

from senticlip.config import Config
from senticlip.models import create_model
from senticlip.structures import UsageError


@torch.inference_mode()
@pytest.mark.parametrize(
    "names", [("消极", "中性", "积极"), ("坏", "一般", "非常好")]
)  # equal lengths, then three different ones
def test_sentence_encoder_class_vectors_are_centred(tmp_path, names):
    text, vision = text_folder(tmp_path / "text"), timm_folder(tmp_path / "vision")
    changes = {"text.encoder": str(text), "vision.encoder": str(vision), "text.max_length": 20, "width": 16, "heads": 2}
    changes["label.names"] = list(names)
    vectors = create_model(Config().override(changes)).eval().network.labels()
    reference, means = AutoModel.from_pretrained(text).eval(), []
    for name in names:  # one by one: no padding
        ids = tokenizer()(f"这段视频的情感是{name}的", return_tensors="pt")["input_ids"]
        means.append(reference(ids).last_hidden_state[0].mean(0))
    wanted = torch.stack(means)
    torch.testing.assert_close(vectors, wanted - wanted.mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(vectors.sum(0), torch.zeros(16), atol=1e-5, rtol=0)


def test_duplicate_labels_or_missing_label_encoder_are_rejected(tmp_path):
    text, vision = text_folder(tmp_path / "text"), timm_folder(tmp_path / "vision")
    config = Config().override(
        {"text.encoder": str(text), "vision.encoder": str(vision), "text.max_length": 20, "width": 16, "heads": 2}
    )
    for change in ({"label.names": ["好", "好", "坏"]}, {"label.prompt": "好" * 60 + "{}"}):
        with pytest.raises(UsageError, match="two labels look the same"):
            create_model(config.override(change))
    features = config.override({"text.encoder": "features", "vision.encoder": "features"})
    with pytest.raises(UsageError, match=r"label\.encoder=FOLDER or head=linear"):
        create_model(features, {"text": 8, "vision": 8})
