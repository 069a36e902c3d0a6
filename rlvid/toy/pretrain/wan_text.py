"""Text of the model of Wan's classes: a tokenizer with a token for each word of the captions, and a UMT5 encoder."""

from functools import partial

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from rlvid.models.wan_text import UMT5Embedder
from rlvid.toy.pretrain.denoiser import fit_text_encoder
from rlvid.toy.pretrain.text import caption_words

TEXT_LENGTH = 16
"""Rows of a prompt's embedding; the longest caption has 14 tokens."""
TEXT_WIDTH = 64
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def build_wan_tokenizer() -> PreTrainedTokenizerFast:
    """Builds a tokenizer whose words are those of the captions; all other words are one token, ``<unk>``."""
    words = (PAD, END, UNKNOWN, ",", *sorted(caption_words()))
    fast = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token=UNKNOWN))
    fast.normalizer = normalizers.Lowercase()
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, model_max_length=TEXT_LENGTH
    )


def build_wan_text_encoder(tokenizer: PreTrainedTokenizerFast) -> UMT5EncoderModel:
    """Builds the text encoder: two layers of four heads, 0.09 M parameters, no dropout."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=16,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def fit_wan_text(seed: int, steps: int, device: torch.device) -> UMT5Embedder:
    """Trains the text encoder on the labels of captions; it is frozen from then on."""
    torch.manual_seed(seed)
    tokenizer = build_wan_tokenizer()
    encoder = build_wan_text_encoder(tokenizer).to(device).train()
    generator = torch.Generator().manual_seed(seed)
    fit_text_encoder(encoder, partial(_states, tokenizer, encoder), generator, steps)
    return UMT5Embedder(tokenizer, encoder)


def _states(tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel, captions: list[str]) -> Tensor:
    """Returns the rows of captions as Wan reads them, zeros behind the last token: (B, L, D)."""
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").to(encoder.device)
    states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return states.masked_fill(tokens.attention_mask[..., None] == 0, 0.0)
