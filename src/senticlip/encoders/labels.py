"""Prompted class names → C×d (eq. 3 and 5): CLIP's text tower, or another text encoder.

If frozen, they are computed once and only the result is kept; if trained, the tower encodes them at each step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from senticlip.encoders import hub
from senticlip.encoders.text import build_body, load_body


class LabelEncoder(nn.Module):
    """The C label vectors.

    CLIP: the [CLS] state × the text projection, without the pooler, as in its ``get_text_features``. Other encoders:
    the mean of the states, minus the mean of the C vectors (our choice): sentence encoders map prompts that differ in
    one word to nearly the same vector (e5: cosine 0.95), and their common part does not separate classes.

    Args:
        spec: the encoder's spec, see ``hub``.
        shape: (C, n) of the prompt ids.
        train: keep the tower and encode the prompts at each step.
    """

    ids: Tensor
    mask: Tensor
    states: Tensor

    def __init__(self, spec: dict[str, Any], shape: tuple[int, int], train: bool) -> None:
        super().__init__()
        config = hub.hf_config(spec)
        self.dim: int = config.projection_dim if config.model_type == "chinese_clip" else config.hidden_size
        self.trained = train
        if train:
            self.tower = LabelTower(spec)
            self.register_buffer("ids", torch.zeros(shape, dtype=torch.long))
            self.register_buffer("mask", torch.ones(shape, dtype=torch.bool))
        else:
            self.register_buffer("states", torch.zeros(shape[0], self.dim))

    def start(self, spec: dict[str, Any], folder: Path | None, ids: Tensor, mask: Tensor) -> None:
        """Load the tower's weights (random ones without a folder) and encode the prompts; ids and mask C×n."""
        tower = self.tower if self.trained else LabelTower(spec)
        if folder is not None:
            tower.load_folder(folder)
        if self.trained:
            self.ids.copy_(ids)
            self.mask.copy_(mask)
        else:
            with torch.no_grad():
                self.states.copy_(tower.eval()(ids, mask))

    def forward(self) -> Tensor:
        """The label vectors C×d."""
        return self.tower(self.ids, self.mask) if self.trained else self.states


class LabelTower(nn.Module):
    """A text encoder with its pooling: ids and mask C×n → C×d."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        self.body: Any = build_body(spec)
        self.projection: nn.Linear | None = None
        if spec.get("model_type") == "chinese_clip":
            self.projection = nn.Linear(self.body.config.hidden_size, hub.hf_config(spec).projection_dim, bias=False)

    def load_folder(self, folder: Path) -> None:
        """Load the folder's weights."""
        from transformers import ChineseCLIPModel

        self.body.load_state_dict(load_body(folder, "label.encoder").state_dict())
        if self.projection is not None:
            weights = hub.read_weights(ChineseCLIPModel, folder)
            hub.load_pretrained(self.projection, weights, "label.encoder", "text_projection.")

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode the prompts: ids and mask C×n → C×d."""
        states = self.body(input_ids=ids, attention_mask=mask.long()).last_hidden_state  # C×n×h
        if self.projection is not None:
            return self.projection(states[:, 0])
        means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return means - means.mean(0)
