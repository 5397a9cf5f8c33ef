"""Text → states: PIFT (eq. 4), a prompt prefix before the token embeddings of a pretrained encoder.

Lai et al. 2023, "基于提示嵌入的突发公共卫生事件微博文本情感分析"; our reading is in docs/equations.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from senticlip.config import TextConfig
from senticlip.encoders import hub
from senticlip.structures import Sequence, UsageError, UserError, first_line


def build_body(spec: dict[str, Any]) -> Any:
    """The transformers text encoder of a spec, without head or pooler; for Chinese-CLIP, its text tower."""
    from transformers import AutoModel, ChineseCLIPTextModel

    config = hub.hf_config(spec)
    if config.model_type == "chinese_clip":
        return ChineseCLIPTextModel(config.text_config, add_pooling_layer=False)
    if config.model_type.startswith("timm") or _names_backbone(config.to_dict()):
        raise UsageError(f"text.encoder: {config.model_type} reads images through an external network")
    try:
        return AutoModel.from_config(config, add_pooling_layer=False, trust_remote_code=False)
    except TypeError:
        return AutoModel.from_config(config, trust_remote_code=False)


def _names_backbone(config: dict[str, Any]) -> bool:
    """Whether the config names a backbone, which transformers would build as another network, possibly from a hub."""
    return any(
        (value and "backbone" in str(name)) or (isinstance(value, dict) and _names_backbone(value))
        for name, value in config.items()
    )


def load_body(folder: Path, key: str = "text.encoder") -> Any:
    """``build_body`` with the weights from a folder, in float32."""
    from transformers import AutoModel, ChineseCLIPModel

    spec = hub.read_config(folder, key)
    body = build_body(spec)
    with hub.loading(folder, key):
        if spec.get("model_type") == "chinese_clip":
            hub.load_pretrained(body, hub.read_weights(ChineseCLIPModel, folder), key, "text_model.")
        else:
            pooler = {"add_pooling_layer": False} if getattr(body, "pooler", True) is None else {}
            hub.load_pretrained(body, hub.read_weights(AutoModel, folder, **pooler), key)
    return body


def text_spec(config: Any, key: str = "text.encoder") -> tuple[dict[str, Any], Path | None]:
    """The JSON spec of an encoder and its folder (None: a known encoder with random weights, built offline).

    Args:
        config: anything with ``encoder`` and ``pretrained``.
        key: the config key, for messages.
    """
    if not config.pretrained and config.encoder in hub.KNOWN:
        return hub.KNOWN[config.encoder], None
    folder = hub.fetch(config.encoder, key)
    spec = hub.read_config(folder, key)
    if "model_type" not in spec:
        raise UsageError(f"{key}: {config.encoder} is not a text encoder (its config.json has no model_type)")
    return spec, folder


def spec_width(spec: dict[str, Any]) -> int:
    """The hidden size of a spec's encoder."""
    config = hub.hf_config(spec)
    return getattr(config, "text_config", config).hidden_size


def load_tokenizer(folder: Path | None, random: bool = False) -> Any:
    """The tokenizer of a folder; without a folder, a character tokenizer with the common Chinese characters.

    It always pads on the right, where rows are trimmed. With ``random`` (random weights), the character tokenizer also
    serves a folder without a vocabulary.

    Raises:
        UserError: the folder has no tokenizer, or it cannot be read.
    """
    from transformers import AutoTokenizer, BertTokenizer

    if folder is not None:
        if not folder.is_dir():
            raise UserError(f"{folder}: the tokenizer folder is missing — copy it from where the weights came from")
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right", trust_remote_code=False)
        except Exception as error:
            # each kind of tokenizer fails in its own way
            reason = first_line(error)
            raise UserError(f"{folder}: the tokenizer cannot be read ({reason}) — get the folder again") from error
        files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
        if any((folder / name).is_file() for name in files):
            return tokenizer
        if not random:  # transformers has made a tokenizer with an empty vocabulary
            raise UserError(f"{folder}: no vocabulary found ({', '.join(sorted(files))}) — get the folder again")
    characters = [
        chr(code)
        for code in (*range(0x21, 0x7F), *range(0x3000, 0x3020), *range(0x4E00, 0x9FA6), *range(0xFF01, 0xFF20))
    ]
    return BertTokenizer(
        vocab={word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters])}
    )


def tokenize(tokenizer: Any, texts: list[str | None], max_length: int) -> tuple[Tensor, Tensor]:
    """Texts → ids B×n (int64) and mask B×n; the mask of a missing text (None) is all False."""
    if all(text is None for text in texts):
        return torch.zeros(len(texts), 1, dtype=torch.long), torch.zeros(len(texts), 1, dtype=torch.bool)
    encoded = tokenizer(
        [text or "" for text in texts], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
    )
    present = torch.tensor([text is not None for text in texts])[:, None]
    return encoded["input_ids"], encoded["attention_mask"].bool() & present


ACCEPTS_4D_MASK = {"albert", "bert", "chinese_clip_text_model", "electra", "ernie", "roberta", "xlm-roberta"}
"""Model types that accept a 4-D attention mask B×1×L×L unchanged."""


class TextEncoder(nn.Module):
    """[CLS] + p prompt vectors + the characters → states of [CLS] and the characters.

    The prompt is learned (a p×e parameter, initialised with the embeddings of ``prefix_text``), discrete (the tokens of
    ``prefix_text``) or none. Its output states are dropped: the output has one state for each input token.

    Shape:
        ids B×n, mask B×n → Sequence B×n×d
    """

    prompt_ids: Tensor | None

    def __init__(self, spec: dict[str, Any], config: TextConfig, prompt: str, prompt_length: int) -> None:
        super().__init__()
        self.body: Any = build_body(spec)
        embed = self.body.get_input_embeddings()
        self.dim: int = self.body.config.hidden_size
        self.prefix = (
            nn.Parameter(0.02 * torch.randn(config.prefix_length, embed.embedding_dim)) if prompt == "learned" else None
        )
        ids = torch.zeros(prompt_length, dtype=torch.long) if prompt == "discrete" else None
        self.register_buffer("prompt_ids", ids)
        length = {"learned": config.prefix_length, "discrete": prompt_length, "none": 0}[prompt]
        position_embeddings = getattr(getattr(self.body, "embeddings", None), "position_embeddings", None)
        padding = getattr(position_embeddings, "padding_idx", None)
        unused = 0 if padding is None else padding + 1  # RoBERTa's positions start after it
        positions = getattr(self.body.config, "max_position_embeddings", -1)  # -1: relative positions, no limit
        limit = positions - length - unused
        if positions > 0 and config.max_length > limit:
            raise UsageError(f"text.max_length: {config.max_length} is more than the encoder allows ({limit})")

    def start_prompt(self, ids: Tensor) -> None:
        """Initialise the prompt with token ids ``ids`` p (a learned prompt repeats them up to the prefix length)."""
        if self.prefix is not None:
            embeddings = self.body.get_input_embeddings().weight.detach()
            with torch.no_grad():
                self.prefix.copy_(embeddings[ids.repeat(len(self.prefix) // len(ids) + 1)[: len(self.prefix)]])
        elif self.prompt_ids is not None:
            self.prompt_ids.copy_(ids)

    def _avoids_sync(self, x: Tensor) -> bool:
        """Whether to pass a 4-D mask: with a 2-D one, transformers synchronises with the GPU to check for padding."""
        config = self.body.config
        accepts_4d = config.model_type in ACCEPTS_4D_MASK and config._attn_implementation == "sdpa"
        return self.training and accepts_4d and x.device.type == "cuda"

    def _states(self, x: Tensor, valid: Tensor) -> Tensor:
        """Token embeddings B×L×e and mask B×L → states B×L×d."""
        mask = valid[:, None, None].expand(-1, -1, valid.shape[1], -1) if self._avoids_sync(x) else valid.long()
        return self.body(inputs_embeds=x, attention_mask=mask).last_hidden_state

    def forward(self, text: Sequence) -> Sequence:
        """Encode ids B×n; a row without text gets finite states and an all-False mask."""
        ids, mask = text
        ids = ids.masked_fill(~mask, self.body.config.pad_token_id or 0)
        valid = mask.clone()
        valid[:, 0] = True  # attention over an all-masked row is NaN
        embed = self.body.get_input_embeddings()
        x = embed(ids)  # B×n×e
        prompt = self.prefix if self.prompt_ids is None else embed(self.prompt_ids)
        if prompt is None:
            return Sequence(self._states(x, valid), mask)
        p = len(prompt)
        x = torch.cat([x[:, :1], prompt.to(x.dtype).expand(x.shape[0], -1, -1), x[:, 1:]], 1)  # B×(1+p+n-1)×e
        valid = torch.cat([valid[:, :1], valid.new_ones(x.shape[0], p), valid[:, 1:]], 1)
        states = self._states(x, valid)
        return Sequence(torch.cat([states[:, :1], states[:, 1 + p :]], 1), mask)  # B×n×d
