"""The settings of RWR and RAFT, which train on their own samples."""

from typing import ClassVar, Literal

from pydantic import Field

from rlvid.config.methods.base import Method


class Supervised(Method):
    """Methods that train on their own samples, chosen or weighed by the reward."""

    needs_gradient: ClassVar[bool] = False

    inner_steps: int = Field(4, ge=1, description="optimiser steps on each batch of samples")
    guided: bool = Field(False, description="whether training uses the guided prediction")


class RwrConfig(Supervised):
    """Reward-weighted regression (Lee et al. 2023; as compared with in DDPO): exponential weights."""

    name: Literal["rwr"] = "rwr"
    beta: float = Field(0.2, gt=0, description="factor of rewards before the softmax")
    per_prompt: bool = Field(False, description="softmax within the samples of a prompt and not over the batch")

    def check(self, steps: int, eta: float, batch_size: int, group_size: int) -> None:
        """See ``Method.check``."""
        if self.per_prompt and group_size < 2:
            raise ValueError(
                "method.per_prompt weighs train.group_size samples of a prompt against each other; set it to 2 or more"
            )


class RaftConfig(Supervised):
    """RAFT (Dong et al. 2023): keep the best samples, train on them."""

    name: Literal["raft"] = "raft"
    keep: Literal["local", "global"] = Field(
        "global", description="the best of each prompt's train.group_size samples, or the best share of the batch"
    )
    share: float = Field(0.25, gt=0, le=1, description="share of the batch that is kept (global)")

    def check(self, steps: int, eta: float, batch_size: int, group_size: int) -> None:
        """See ``Method.check``."""
        if self.keep == "local" and group_size < 2:
            raise ValueError(
                "method.keep = 'local' takes the best of train.group_size samples of a prompt; set it to 2 or more"
            )
        if self.keep == "global" and round(self.share * batch_size, 6) < 1:
            raise ValueError(
                f"method.share = {self.share} keeps none of train.batch_size = {batch_size}; "
                f"allowed: {1 / batch_size:g} to 1"
            )
