"""DPOK's value network: predicts the reward of a video in the middle of its chain."""

import math

import torch
from torch import Tensor, nn


class ValueNetwork(nn.Module):
    """V(x_t, text, t): two strided 3D convolutions, averaged, beside the mean text embedding and sinusoids of t.

    The mean is over a prompt's tokens: the rows of zeros with which Wan pads embeddings do not count.

    Args:
        channels: C of the latents.
        text_width: D of the prompt embeddings.
        width: of everything inside.
    """

    def __init__(self, channels: int, text_width: int, width: int = 64) -> None:
        super().__init__()
        self.width = width
        self.look = nn.Sequential(
            nn.Conv3d(channels, width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv3d(width, width, 3, stride=2, padding=1),
            nn.SiLU(),
        )
        self.read = nn.Linear(text_width, width)
        self.judge = nn.Sequential(nn.Linear(3 * width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, latents_BCFhw: Tensor, text_BLD: Tensor, timestep_B: Tensor) -> Tensor:
        """Returns value_B, float32."""
        frequency = torch.exp(torch.linspace(0, -math.log(1000), self.width // 2, device=timestep_B.device))
        angle = timestep_B[:, None].float() * frequency
        seen = self.look(latents_BCFhw.float()).mean((2, 3, 4))
        count_B1 = text_BLD.any(2).sum(1, keepdim=True).clamp(min=1)
        word_BD = text_BLD.float().mean(1) * (text_BLD.shape[1] / count_B1)  # the factor is exactly 1 if no row is zero
        parts = [seen, self.read(word_BD), angle.sin(), angle.cos()]
        return self.judge(torch.cat(parts, dim=1))[:, 0]
