"""Embeds prompts before a model is loaded, so that a large text encoder never stands beside the denoiser."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlvid.config.model import ModelConfig
from rlvid.models.folders import is_text_apart
from rlvid.models.load import load_video_model
from rlvid.models.text_rows import cut_rows, pad_rows


class KnownEmbedder:
    """Embeds prompts whose embeddings are in memory; a ``rlvid.models.text_rows.TextEmbedder``.

    Args:
        rows: prompt -> its embedding without the zeros behind the last token, (N, D), on the CPU.
        length: L.
    """

    encoder = None

    def __init__(self, rows: Mapping[str, Tensor], length: int) -> None:
        self.length, self._rows = length, dict(rows)

    def embed(self, prompts: list[str]) -> Tensor:
        """Returns text_BLD on the CPU.

        Raises:
            ValueError: one of the prompts is not known.
        """
        unknown = next((prompt for prompt in prompts if prompt not in self._rows), None)
        if unknown is not None:
            raise ValueError(f"the prompt {unknown[:60]!r} was not embedded before the model was loaded")
        return pad_rows([self._rows[prompt] for prompt in prompts], self.length)


def embed_apart(
    spec: ModelConfig, prompts: Sequence[str], *, device: str | torch.device = "cpu"
) -> KnownEmbedder | bool:
    """Embeds prompts with a model's text encoder, and lets the encoder go; for ``load_video_model(text=...)``.

    Each prompt is embedded by itself, so that the result does not depend on its neighbours.

    Args:
        spec: of the model.
        prompts: all that will be embedded, the negative prompt too.
        device: where the encoder runs.

    Returns:
        The embeddings; true where the model's own encoder may stand beside the denoiser.

    Raises:
        ValueError: see ``rlvid.models.load.load_video_model``.
    """
    if not is_text_apart(spec.path):
        return True
    model = load_video_model(spec, denoiser=False, device=device)
    rows = {prompt: cut_rows(model.encode_prompts([prompt])[0]).cpu() for prompt in dict.fromkeys(prompts)}
    assert model.text_length is not None
    return KnownEmbedder(rows, model.text_length)
