"""Advantages from per-prompt statistics (DDPO, Black et al., ICLR 2024, appendix) and from groups (GRPO).

Rewards that differ by rounding alone are equal. Otherwise a spread that rounding made would be divided by, and a
constant reward of 21.3 would give advantages of 1.
"""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from rlvid.shapes import ROUNDING


def rounding_of(*dtypes: torch.dtype) -> float:
    """Returns the largest relative difference that rounding makes to a reward computed in these types.

    ``ROUNDING``, or half the distance of neighbouring numbers in a coarser type: 2^-8 in bfloat16, 2^-11 in float16.
    More would silence HPSv2, whose scores of one prompt's videos differ by a few hundredths of their size.
    """
    return max([ROUNDING, *(torch.finfo(dtype).eps / 2 for dtype in dtypes)])


def standardised(
    reward_N: Tensor, among_M: Tensor, rounding: float = ROUNDING, spread_M: Tensor | None = None
) -> Tensor:
    """(reward - mean) / (deviation + 1e-6), with the mean and the deviation of ``among_M``: (N,), float64.

    ``spread_M`` gives the deviation in place of ``among_M``. All are 0 where the deviation of ``among_M`` is so small
    against the rewards that it may be rounding.
    """
    reward_N, among_M = reward_N.double(), among_M.double()
    deviation = among_M.std(correction=0)
    if deviation <= rounding * among_M.abs().max():
        return torch.zeros_like(reward_N)
    if spread_M is not None:
        deviation = spread_M.double().std(correction=0)
    return (reward_N - among_M.mean()) / (deviation + 1e-6)


PROMPTS = 16_384
"""Prompts whose rewards are kept: some 25 MB with the default buffer. A prompt that comes back later starts anew."""


class PromptStatistics:
    """Keeps the latest rewards of each prompt, of the ``PROMPTS`` that were used last.

    Args:
        buffer: how many of a prompt's rewards are kept.
        min_count: how many it takes before they are used; until then the batch's own mean and deviation are.
    """

    def __init__(self, buffer: int, min_count: int) -> None:
        self.buffer, self.min_count = buffer, min_count
        self.rewards: dict[str, deque[float]] = {}

    def advantages(
        self, prompts: Sequence[str], rewards: Sequence[float], limit: float, rounding: float = ROUNDING
    ) -> Tensor:
        """Returns standardised rewards, clipped to +-``limit``; remembers the rewards first.

        Args:
            prompts: N prompts.
            rewards: N rewards; NaN stands for a video that takes no part and gets advantage 0.
            limit: largest absolute advantage.
            rounding: relative rounding of the rewards.

        Returns:
            (N,), float32.
        """
        sound = [(p, r) for p, r in zip(prompts, rewards, strict=True) if r == r]
        for prompt, reward in sound:
            own = self.rewards.pop(prompt, None) or deque(maxlen=self.buffer)
            own.append(reward)
            self.rewards[prompt] = own  # last, since it is the one used last
        batch = [r for _, r in sound]
        result = torch.zeros(len(prompts), dtype=torch.float64)
        for row, (prompt, reward) in enumerate(zip(prompts, rewards, strict=True)):
            if reward == reward:
                own = self.rewards[prompt]
                among = torch.tensor(list(own) if len(own) >= self.min_count else batch, dtype=torch.float64)
                result[row] = standardised(torch.tensor(reward, dtype=torch.float64), among, rounding)
        while len(self.rewards) > PROMPTS:
            del self.rewards[next(iter(self.rewards))]
        return result.float().clamp(-limit, limit)

    def state_dict(self) -> dict[str, list[float]]:
        """Returns rewards by prompt, oldest first; the prompt that was used last comes last."""
        return {prompt: list(values) for prompt, values in self.rewards.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Restores what ``state_dict`` gave."""
        self.rewards = {prompt: deque(values, maxlen=self.buffer) for prompt, values in state.items()}


def group_advantages(
    rewards: Sequence[float], group: int, limit: float, deviation: str = "group", rounding: float = ROUNDING
) -> Tensor:
    """Returns rewards standardised within each prompt's videos, clipped to +-``limit`` (GRPO, Shao et al. 2024).

    Args:
        rewards: N rewards, of which each ``group`` neighbours are of one prompt; NaN stands for a video that takes no
            part and gets advantage 0.
        group: videos of a prompt.
        limit: largest absolute advantage.
        deviation: ``group`` divides by the deviation within the prompt, ``batch`` by that of all rewards of the batch
            (Flow-GRPO), which weighs prompts by how much their videos differ.
        rounding: relative rounding of the rewards.

    Returns:
        (N,), float32.
    """
    reward_N = torch.tensor(rewards, dtype=torch.float64)
    sound_N = ~reward_N.isnan()
    spread_M = reward_N[sound_N] if deviation == "batch" else None
    result_N = torch.zeros_like(reward_N)
    for first in range(0, len(rewards), group):
        sound = sound_N[first : first + group].nonzero().flatten() + first
        if len(sound):
            result_N[sound] = standardised(reward_N[sound], reward_N[sound], rounding, spread_M)
    return result_N.float().clamp(-limit, limit)


def others_mean(rewards: Sequence[float], group: int) -> Tensor:
    """Returns for each video the mean reward of its prompt's other videos: (N,), float32.

    Args:
        rewards: as in ``group_advantages``; NaN are left out. A video that is alone gets its own reward, and so
            advantage 0.
        group: videos of a prompt.
    """
    reward_PG = torch.tensor(rewards, dtype=torch.float64).reshape(-1, group)
    sound_PG = ~reward_PG.isnan()
    known_PG = reward_PG.nan_to_num(0.0)
    others_PG = sound_PG.sum(1, keepdim=True) - sound_PG.long()
    mean_PG = (known_PG.sum(1, keepdim=True) - known_PG) / others_PG
    return torch.where(others_PG > 0, mean_PG, known_PG).flatten().float()
