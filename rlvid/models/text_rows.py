"""Embeddings of prompts that end in rows of zeros, as Wan's do: only the rows before them are stored."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

TEXT_LENGTH = 512
"""Rows of a prompt's embedding for which the published models were trained."""


def cut_rows(text_LD: Tensor) -> Tensor:
    """Returns a prompt's embedding without the zeros behind its last token, (N, D); ``pad_rows`` restores it."""
    filled = text_LD.any(1).nonzero()
    return text_LD[: int(filled[-1]) + 1 if len(filled) else 0]


def pad_rows(rows: Sequence[Tensor], length: int) -> Tensor:
    """Returns text_BLD of embeddings that ``cut_rows`` made, each (N, D) with N <= ``length``."""
    padded = [torch.nn.functional.pad(each, (0, 0, 0, length - len(each))) for each in rows]
    return torch.stack(padded)


class TextEmbedder(Protocol):
    """Embeds prompts: ``length`` is L, rows of a prompt, and ``encoder`` the network behind it, if there is one."""

    length: int
    encoder: Any

    def embed(self, prompts: list[str]) -> Tensor:
        """Returns text_BLD of prompts, zeros behind the last token; no gradient."""
