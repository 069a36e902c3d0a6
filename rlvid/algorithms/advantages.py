"""Advantages from per-prompt statistics (DDPO, Black et al., ICLR 2024, appendix)."""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor


class PromptStatistics:
    """Keeps the latest rewards of each prompt.

    Args:
        buffer: how many of a prompt's rewards are kept.
        min_count: how many it takes before they are used; until then the batch's own mean and deviation are.
    """

    def __init__(self, buffer: int, min_count: int) -> None:
        self.buffer, self.min_count = buffer, min_count
        self.rewards: dict[str, deque[float]] = {}

    def advantages(self, prompts: Sequence[str], rewards: Sequence[float], limit: float) -> Tensor:
        """(reward - mean) / (deviation + 1e-6), clipped to +-``limit``; remembers the rewards first.

        Args:
            prompts: N prompts.
            rewards: N rewards; NaN stands for a video that takes no part and gets advantage 0.
            limit: largest absolute advantage.

        Returns:
            (N,), float32.
        """
        sound = [(p, r) for p, r in zip(prompts, rewards, strict=True) if r == r]
        for prompt, reward in sound:
            self.rewards.setdefault(prompt, deque(maxlen=self.buffer)).append(reward)
        batch = [r for _, r in sound]
        result = []
        for prompt, reward in zip(prompts, rewards, strict=True):
            own = self.rewards.get(prompt, ())
            values = torch.tensor(list(own) if len(own) >= self.min_count else batch, dtype=torch.float64)
            if reward != reward:
                result.append(0.0)
            else:
                result.append(float((reward - values.mean()) / (values.std(correction=0) + 1e-6)))
        return torch.tensor(result, dtype=torch.float32).clamp(-limit, limit)

    def state_dict(self) -> dict[str, list[float]]:
        """Rewards by prompt, oldest first."""
        return {prompt: list(values) for prompt, values in self.rewards.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Restores what ``state_dict`` gave."""
        self.rewards = {prompt: deque(values, maxlen=self.buffer) for prompt, values in state.items()}
