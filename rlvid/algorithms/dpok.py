"""DPOK (Fan et al., NeurIPS 2023): policy gradient with a value network and a KL term to the base model.

==============  ===============================================================================
code            paper
==============  ===============================================================================
``advantage``   A = r(x_0, c) - V(x_t, c, t); the mean of the prompt's other videos may stand in for V
``ratio_B``     rho, clamped to 1 +- range and nothing else: no gradient beyond it
``distance``    mean (eps_theta - eps_base)^2 under guidance (v on a flow), KL up to a factor of the level
``loss``        -w_r mean(A rho) + w_kl distance
==============  ===============================================================================
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rlvid import randomness
from rlvid.algorithms.advantages import others_mean
from rlvid.algorithms.base import Algorithm, Batch, Context, Update, totals
from rlvid.algorithms.rollout import Rollout, Transition, clip_range, replay, roll_out_and_score, windows
from rlvid.algorithms.scoring import BatchRewards, all_rewards, attach
from rlvid.algorithms.value import ValueNetwork
from rlvid.config.methods.policy_gradient import DpokConfig


class Dpok(Algorithm):
    """Rolls out, fits the value network, then takes ``policy_steps`` optimiser steps on random steps of the chains."""

    method: DpokConfig

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.value: ValueNetwork | None = None  # built when the width of the text is seen
        self._saved: dict[str, Any] = {}

    def updates(self, batch: Batch) -> Iterator[Update]:
        """Yields the losses of one optimiser step for each of ``policy_steps``, accumulated over micro-batches."""
        rollouts, scores = roll_out_and_score(self.context, batch)
        if self.method.baseline == "network":
            self.build(batch)
            with self.context.stopwatch.stage("value"):
                errors = [self.fit_value(batch, rollouts, scores, turn) for turn in range(self.method.value_steps)]
            updates = self.train(rollouts, scores, len(batch), error=errors[-1])
        else:
            updates = self.train(rollouts, scores, len(batch), baselines=self.group_means(batch, scores))
        yield from attach(updates, scores)

    def train(
        self,
        rollouts: list[Rollout],
        scores: list[BatchRewards],
        share: int,
        *,
        error: float | None = None,
        baselines: Sequence[Tensor | None] | None = None,
    ) -> Iterator[Update]:
        """Yields the losses of ``policy_steps`` optimiser steps.

        Args:
            rollouts: of the worker's micro-batches.
            scores: of each.
            share: how many videos the worker made.
            error: of the value network, for TensorBoard.
            baselines: (B,) for each rollout, in place of the value network.
        """
        baselines = baselines or [None] * len(rollouts)
        for turn in range(self.method.policy_steps):
            for place, (rollout, scored, baseline_B) in enumerate(zip(rollouts, scores, baselines, strict=True)):
                loss, metrics = self.loss(scored, self.pick(rollout, "policy", turn), baseline_B)
                if error is not None:
                    metrics["policy/value_error"] = (error, 1.0)
                yield Update(loss * (len(rollout.batch) / share), place + 1 == len(rollouts), metrics)

    def build(self, batch: Batch) -> None:
        """Builds the value network and its optimiser, from the run's seed or from a checkpoint."""
        if self.value is not None:
            return
        with torch.random.fork_rng():
            torch.manual_seed(self.context.config.seed)
            network = ValueNetwork(self.context.model.latent_shape[0], batch.text_BLD.shape[-1])
        self.value = network.to(self.context.model.device)
        self.optimizer = torch.optim.AdamW(self.value.parameters(), lr=self.method.value_lr, weight_decay=0.0)
        if self._saved:
            self.value.load_state_dict(self._saved["value"])
            self.optimizer.load_state_dict(self._saved["optimizer"])

    def pick(self, rollout: Rollout, purpose: str, turn: int) -> Transition:
        """Returns one of the random steps of each video's chain, drawn."""
        positions = [(serial, turn) for serial in rollout.batch.serials]
        uniform_B = randomness.uniform((), self.context.config.seed, purpose, positions)
        own = windows(self.context, rollout.batch)
        return rollout.at(torch.tensor([each[0] for each in own]) + (uniform_B * len(own[0])).long())

    def values(self, taken: Transition) -> Tensor:
        """Returns value_B of the latents before the picked steps."""
        assert self.value is not None
        timestep_B = self.context.model.path.timestep(taken.point_B, taken.before_BCFhw.device)
        return self.value(taken.before_BCFhw, taken.text_BLD, timestep_B)

    def fit_value(self, batch: Batch, rollouts: list[Rollout], scores: list[BatchRewards], turn: int) -> float:
        """Takes one step of the value network towards the final rewards; returns the mean squared error before it."""
        assert self.value is not None
        self.optimizer.zero_grad()
        total = 0.0
        for rollout, scored in zip(rollouts, scores, strict=True):
            value_B = self.values(self.pick(rollout, "value", turn))
            error = torch.where(scored.valid_B, F.mse_loss(value_B, scored.reward_B, reduction="none"), 0.0)
            part = error.sum() / len(batch)
            part.backward()
            total += float(part.detach())
        gradients = [p.grad for p in self.value.parameters() if p.grad is not None]
        self.context.workers.mean_(gradients)
        if all(gradient.isfinite().all() for gradient in gradients):  # latents of an overflow would ruin it for good
            self.optimizer.step()
        return total

    def group_means(self, batch: Batch, scores: list[BatchRewards]) -> Sequence[Tensor]:
        """Returns for each rollout the mean reward of each prompt's other videos, those of all workers: (B,)."""
        workers, group = self.context.workers, self.context.config.train.group_size
        _, rewards, _ = all_rewards(workers, batch, scores)
        own = others_mean(rewards, group)[workers.rank :: workers.size].to(scores[0].reward_B)
        return own.split([len(scored.reward_B) for scored in scores])

    def loss(
        self, scored: BatchRewards, taken: Transition, baseline_B: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Returns the policy and the KL term of one step of each video; the baseline is the value by default."""
        context = self.context
        with torch.no_grad():
            expected_B = self.values(taken) if baseline_B is None else baseline_B
            advantage_B = torch.where(scored.valid_B, scored.reward_B - expected_B, 0.0)
        with context.stopwatch.stage("replay"):
            now = replay(context, taken)
        ratio_B, reach = (now.log_probability_B - taken.log_probability_B).exp(), clip_range(context, self.method)
        gain = (advantage_B * ratio_B.clamp(1 - reach, 1 + reach)).mean()
        loss = -self.method.reward_weight * gain
        metrics = {
            "policy/clip_fraction": ((ratio_B - 1).abs() > reach).float(),
            "policy/advantage": advantage_B.abs(),
        }
        if self.method.kl:
            with context.stopwatch.stage("replay"), torch.no_grad(), context.model.base():
                base = replay(context, taken).prediction
            predicted = context.model.path.predicted
            metrics["policy/kl"] = (predicted(now.prediction) - predicted(base)).square().mean()
            loss = loss + self.method.kl * metrics["policy/kl"]
        return loss, totals(**metrics)

    def state_dict(self) -> dict[str, Any]:
        """Returns the value network and its optimiser."""
        if self.value is None:
            return self._saved
        return {"value": self.value.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keeps the state until the network is built."""
        self._saved = state
