"""Frames → clip (eq. 8 and Table 5): transformer | lstm | mean.

Each maps B×m×d to B×(1+m)×d: position 0 represents the clip, the others its frames. Each row needs a real frame.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from senticlip.config import Config
from senticlip.structures import Sequence


def transformer_layers(config: Config, layers: int) -> nn.TransformerEncoder:
    """A plain post-norm Transformer encoder of the model's width."""
    layer = nn.TransformerEncoderLayer(
        config.width, config.heads, 4 * config.width, config.dropout, "gelu", batch_first=True
    )
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def prepend(first: Tensor, frames: Sequence, values: Tensor) -> Sequence:
    """Put ``first`` B×d before ``values`` B×m×d; position 0 is real in every row."""
    return Sequence(torch.cat([first[:, None], values], 1), nn.functional.pad(frames.mask, (1, 0), value=True))


class TransformerTemporal(nn.Module):
    """A Transformer encoder over [H_CLS, H_1 … H_m] + temporal position embeddings."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.cls = nn.Parameter(0.02 * torch.randn(config.width))
        self.positions = nn.Parameter(0.02 * torch.randn(1 + config.vision.frames, config.width))
        self.encoder = transformer_layers(config, config.layers)

    def forward(self, frames: Sequence) -> Sequence:
        """B×m×d → B×(1+m)×d."""
        clip = prepend(self.cls.expand(frames.mask.shape[0], -1), frames, frames.values)
        x = clip.values + self.positions[: clip.values.shape[1]]
        return Sequence(self.encoder(x, src_key_padding_mask=~clip.mask), clip.mask)


class LSTMTemporal(nn.Module):
    """[last state; all states] of an LSTM over the frames."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.lstm = nn.LSTM(config.width, config.width, config.layers, batch_first=True)

    def forward(self, frames: Sequence) -> Sequence:
        """B×m×d → B×(1+m)×d; masked frames between real ones are skipped."""
        real = frames.mask.long()
        # the new position of each frame: real ones first, in order (ONNX has no stable sort)
        position = torch.where(frames.mask, real.cumsum(1) - 1, real.sum(1, keepdim=True) + (1 - real).cumsum(1) - 1)
        index = position[..., None].expand_as(frames.values)
        states, _ = self.lstm(torch.zeros_like(frames.values).scatter(1, index, frames.values))  # B×m×d
        last = states[torch.arange(states.shape[0]), frames.mask.sum(1) - 1]
        return prepend(last, frames, states.gather(1, index))


class MeanTemporal(nn.Module):
    """[mean; H_1 … H_m], without positions."""

    def __init__(self, config: Config) -> None:
        super().__init__()

    def forward(self, frames: Sequence) -> Sequence:
        """B×m×d → B×(1+m)×d."""
        real = frames.mask[..., None].to(frames.values.dtype)
        return prepend((frames.values * real).sum(1) / real.sum(1), frames, frames.values)


TEMPORAL = {"transformer": TransformerTemporal, "lstm": LSTMTemporal, "mean": MeanTemporal}
