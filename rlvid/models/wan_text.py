"""Embeds prompts as Wan reads them: UMT5's last hidden states, with rows of zeros behind the last token.

Wan's cross-attention has no mask, and a row of zeros still adds its layers' biases. So a prompt has the same number of
rows always, 512 for the published models.
"""

import hashlib

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from rlvid.models.text_rows import TEXT_LENGTH, pad_rows


class UMT5Embedder:
    """Embeds prompts with a UMT5 encoder.

    Args:
        tokenizer: adds the token that ends a prompt.
        encoder: 5.7 billion parameters in the published models.
        length: L; longer prompts are cut.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, encoder: UMT5EncoderModel, length: int | None = None
    ) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder.eval().requires_grad_(False)
        self.length = length or min(tokenizer.model_max_length, TEXT_LENGTH)

    @torch.no_grad()
    def embed(self, prompts: list[str]) -> Tensor:
        """Returns text_BLD, in the encoder's dtype; prompts are cleaned as diffusers' pipeline cleans them."""
        tokens = self.tokenizer(
            [prompt_clean(prompt) for prompt in prompts],
            padding="max_length",
            max_length=self.length,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.encoder.device)
        text_BLD = self.encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return text_BLD.masked_fill(tokens.attention_mask[..., None] == 0, 0.0)


class RandomEmbedder:
    """Draws a prompt's embedding from the prompt alone, for dry runs without the encoder: a row a word, and one more.

    Args:
        width: D.
        length: L.
        device: of the embeddings.
        dtype: of the embeddings.
    """

    encoder = None

    def __init__(
        self,
        width: int,
        length: int = TEXT_LENGTH,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.width, self.length, self._device, self._dtype = width, length, device, dtype

    def embed(self, prompts: list[str]) -> Tensor:
        """Returns text_BLD, standard normal rows; the same ones for the same prompt."""
        return pad_rows([self._rows(prompt) for prompt in prompts], self.length).to(self._device, self._dtype)

    def _rows(self, prompt: str) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:7], "big")
        count = min(len(prompt.split()) + 1, self.length)
        return torch.randn(count, self.width, generator=torch.Generator().manual_seed(seed))
