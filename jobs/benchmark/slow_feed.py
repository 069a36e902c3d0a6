"""Trains with a source that is slowed down: ``python -m jobs.benchmark.slow_feed SECONDS CONFIG [KEY=VALUE ...]``."""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import pyarrow as pa
from rich.console import Console

from rlvid.config import load_config
from rlvid.data.batches import Shares
from rlvid.terminal import run_command
from rlvid.train import feeding
from rlvid.train.launch import train


@dataclass(frozen=True)
class SlowShares(Shares):
    """Shares that take their time.

    Attributes:
        seconds: before each share.
    """

    seconds: float = 0.0

    def __call__(self) -> Iterator[pa.Table]:
        """See ``Shares``."""
        for table in super().__call__():
            time.sleep(self.seconds)
            yield table


@dataclass(frozen=True)
class SlowFeed(feeding.RunFeed):
    """The feed of a run, of slow shares.

    Attributes:
        seconds: before each share.
    """

    seconds: float = 0.0

    def shares(self, first_step: int) -> SlowShares:
        """See ``RunFeed``."""
        shares = super().shares(first_step)
        return SlowShares(**{each.name: getattr(shares, each.name) for each in fields(shares)}, seconds=self.seconds)


def main() -> None:
    """Trains."""
    seconds = float(sys.argv[1])
    config = load_config(sys.argv[2], sys.argv[3:])
    made = feeding.RunFeed.of

    def slow(*given: Any) -> SlowFeed:
        feed = made(*given)
        return SlowFeed(**{each.name: getattr(feed, each.name) for each in fields(feed)}, seconds=seconds)

    feeding.RunFeed.of = staticmethod(slow)  # type: ignore[assignment]
    train(config, Console(width=1000))


if __name__ == "__main__":
    sys.exit(run_command(main))
