"""ImageReward (Xu et al. 2023) on transformers' BLIP parts, from the original checkpoint's keys.

A frame goes through a ViT-L/16, whose tokens the prompt's tokens attend to in every layer of a BERT; the hidden state
of the first token goes through linear layers without activations to one number, which is standardised.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from rlvid.models.weights import check_fit, check_text, fill, headers, read_weights
from rlvid.reward.clip import at_least_float32, in_chunks
from rlvid.reward.preprocess import Preprocess, normalise, preset

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Mean and deviation of raw scores; the published score is (raw - MEAN) / STD."""
LENGTH = 35
"""Tokens of a prompt, with [CLS] and [SEP]; shorter ones are padded."""
FILE, VOCABULARY = "ImageReward.pt", "vocab.txt"

VISION: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 768, "encoder_hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "vocab_size": 30524, "max_position_embeddings": 512, "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}  # fmt: skip
_WIDTHS = (1024, 128, 64, 16, 1)


class BlipReward(nn.Module):
    """Scores frames against prompts as ImageReward does.

    Args:
        vision: the image encoder; its tokens are what the text attends to.
        text: the text encoder with cross-attention in every layer.
        mlp: linear layers, from the text's width to 1.
        tokenizer: BERT's.
        preprocess: how frames become the encoder's input.
        chunk: most images at once.
        recompute: see ``rlvid.reward.clip.in_chunks``.
    """

    def __init__(
        self,
        vision: BlipVisionModel,
        text: BlipTextModel,
        mlp: nn.Sequential,
        tokenizer: BertTokenizer,
        preprocess: Preprocess,
        chunk: int = 8,
        *,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.vision, self.text, self.mlp = vision, text, mlp
        self.eval().requires_grad_(False)
        self.tokenizer, self.preprocess, self.chunk, self.recompute = tokenizer, preprocess, chunk, recompute

    def tokens(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Returns token ids and attention mask, (B, 35) each."""
        found = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        return found.input_ids, found.attention_mask

    def forward(self, frames_BSCHW: Tensor, prompts: list[str]) -> Tensor:
        """Returns scores_BS, float32, about standard normal over ordinary images; differentiable."""
        images = normalise(self.preprocess(frames_BSCHW.flatten(0, 1)))
        shown = frames_BSCHW.shape[1]
        ids, mask = (each.to(images.device).repeat_interleave(shown, 0) for each in self.tokens(prompts))
        return in_chunks(self._score, self.chunk, self.recompute, images, ids, mask).unflatten(0, (-1, shown))

    def _score(self, images_NCHW: Tensor, ids_NL: Tensor, mask_NL: Tensor) -> Tensor:
        seen = self.vision(images_NCHW.to(self.vision.dtype)).last_hidden_state
        everything = torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device)
        # is_decoder belongs in the configuration, where it makes the cross-attention, and not in the call, where it
        # would make the prompt's own attention causal.
        hidden = self.text(
            input_ids=ids_NL, attention_mask=mask_NL, encoder_hidden_states=seen, encoder_attention_mask=everything,
            is_decoder=False,
        ).last_hidden_state  # fmt: skip
        return (self.mlp(at_least_float32(hidden[:, 0]))[:, 0] - MEAN) / STD


def build_blip(vision: BlipVisionConfig, text: BlipTextConfig) -> tuple[BlipVisionModel, BlipTextModel, nn.Sequential]:
    """Returns the three parts, with initial weights."""
    ends = zip((text.hidden_size, *_WIDTHS[:-1]), _WIDTHS, strict=True)
    layers = [nn.Linear(into, out) for into, out in ends]
    # Dropout stands where Identity does, so that the checkpoint's places are kept: 0, 2, 4, 6, 7.
    mlp = nn.Sequential(layers[0], nn.Identity(), layers[1], nn.Identity(), layers[2], nn.Identity(), *layers[3:])
    return BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False), mlp


def configs() -> tuple[BlipVisionConfig, BlipTextConfig]:
    """ImageReward's configurations."""
    return BlipVisionConfig(**VISION), BlipTextConfig(**TEXT, is_decoder=True)


_RENAMED = (
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.layers\.", "mlp."),
)
_UNUSED = re.compile(r"blip\.(vision|text)_proj\..*|.*\.position_ids")


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the original checkpoint under the names of ``BlipReward``'s parts; its unused projections are left out.

    Names that are unknown stay, so that ``fill`` can name them.
    """
    found = {}
    for key, tensor in weights.items():
        if _UNUSED.fullmatch(key):
            continue
        for pattern, replacement in _RENAMED:
            key = re.sub(pattern, replacement, key)
        found[key] = tensor
    return found


def check_files(path: str, where: str) -> Path | None:
    """Returns the folder of a checkpoint whose weights fit, or None for ``random``; their numbers are not read.

    Raises:
        ValueError: as ``find_files``, or the weights are of another model.
    """
    folder = find_files(path, where)
    if folder is not None:
        with torch.device("meta"):
            vision, text, mlp = build_blip(*configs())
        own = nn.ModuleDict({"vision": vision, "text": text, "mlp": mlp}).state_dict()
        check_fit(own, renamed(headers(folder / FILE, where)), where)
    return folder


def find_files(path: str, where: str) -> Path | None:
    """Returns the folder of a checkpoint, or None for ``random``; weights are not looked into.

    Raises:
        ValueError: it lacks ``ImageReward.pt`` or BERT's ``vocab.txt``.
    """
    if path == "random":
        return None
    folder = Path(path).expanduser()
    folder = folder.parent if folder.name == FILE else folder
    missing = [name for name in (FILE, VOCABULARY) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{where}: {folder} lacks {' and '.join(missing)}; expected a folder with {FILE} and the {VOCABULARY} of "
            "bert-base-uncased (docs/rewards.md says where they are)"
        )
    check_text(folder / VOCABULARY, where)
    return folder


def load_imagereward(
    path: str,
    device: str | torch.device = "cpu",
    *,
    where: str,
    precision: str = "float32",
    preprocess: str | None = None,
    chunk: int = 8,
    recompute: bool = True,
) -> BlipReward:
    """ImageReward from a folder with its checkpoint and BERT's vocabulary.

    ``random`` gives the full structure with initial weights and a vocabulary of letters.

    Raises:
        ValueError: weights of another model, or what ``check_files`` raises.
    """
    folder, (vision, text) = check_files(path, where), configs()
    words, prepare = _tokenizer(folder), preset(preprocess or "imagereward", VISION["image_size"])
    with torch.random.fork_rng(devices=[]), torch.device("cpu" if folder is None else "meta"):
        torch.manual_seed(0)
        reward = BlipReward(*build_blip(vision, text), words, prepare, chunk, recompute=recompute)
    if folder is not None:
        fill(reward, renamed(read_weights(folder / FILE, where)), where)
        places = torch.arange(text.max_position_embeddings)[None]  # a constant that is not saved, and was on meta
        reward.text.embeddings.position_ids = places
    reward.to(device, getattr(torch, precision)).mlp.float()
    return reward


def _tokenizer(folder: Path | None) -> BertTokenizer:
    """BERT's, with BLIP's two extra tokens; without a folder, one that reads letters."""
    if folder is None:
        signs = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz0123456789"]
        pieces = signs + [f"##{sign}" for sign in signs[5:]]
        words = BertTokenizer(vocab={piece: place for place, piece in enumerate(pieces)})
    else:
        words = BertTokenizer.from_pretrained(folder, local_files_only=True)
    words.add_special_tokens({"bos_token": "[DEC]", "extra_special_tokens": ["[ENC]"]})
    return words
