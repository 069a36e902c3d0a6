"""Asks rewards for the scores of finished videos; one of the user's own may hang, raise, or give anything."""

import faulthandler
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn

from rlvid.faults import describe
from rlvid.reward.custom import CustomReward
from rlvid.reward.video import ImageReward, check_shape, label_of, mean_of_frames

_LONGER = 30.0
"""Seconds after the limit at which the process ends, should C code hold Python so that nobody can say anything."""

_GRACE = 2.0
"""Seconds that a call may still take after an interruption."""


class Asker:
    """Asks rewards; calls one of the user's own in a thread, which it waits for so many seconds.

    The rewards that rlvid has need no limit: they compute, on a slow machine for long.

    Args:
        seconds: that a reward of the user's may take for one call; 0 or None: as long as it likes.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._seconds = seconds or None
        self._calls: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def __call__(self, reward: ImageReward, frames_BFCHW: Tensor, prompts: list[str]) -> Tensor:
        """The mean score of each video (B,).

        Raises:
            RuntimeError: the reward raised, took too long, or gave scores of another shape; names it and the prompt.
        """
        if not (isinstance(reward, nn.Module) and any(isinstance(part, CustomReward) for part in reward.modules())):
            return mean_of_frames(reward(frames_BFCHW, prompts))
        label = label_of(reward)
        where = f"{len(prompts)} videos, the first of the prompt {prompts[0]!r}"
        try:
            outcome = self._call(lambda: reward(frames_BFCHW, prompts))
            if not outcome.done():
                raise RuntimeError(
                    f"the reward {label} gave no answer for {self._seconds:g} s (reward.timeout) on {where}"
                )
            return mean_of_frames(check_shape(outcome.result(), frames_BFCHW.shape[:2], label))
        except ValueError as error:  # check_shape's
            raise RuntimeError(f"{error}, on {where}") from error
        except _Raised as error:
            raise RuntimeError(f"the reward {label} raised {describe(error.cause)} on {where}") from error.cause

    def _call(self, call: Callable[[], Tensor]) -> "Future[Tensor]":
        """The outcome of a call, or what is none yet after the limit."""
        if self._thread is None:  # one for all calls: what a reward keeps from one to the next may belong to a thread
            self._thread = threading.Thread(target=self._answer, name="reward", daemon=True)
            self._thread.start()
        outcome: Future[Tensor] = Future()
        if self._seconds:
            faulthandler.dump_traceback_later(self._seconds + _LONGER, exit=True, file=sys.__stderr__)
        try:
            self._calls.put((call, outcome))
            wait([outcome], self._seconds)
        except KeyboardInterrupt:
            wait([outcome], _GRACE)  # torch aborts a process that exits while a thread computes
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
        return outcome

    def _answer(self) -> None:
        while True:
            call, outcome = self._calls.get()
            try:
                with torch.no_grad():  # which is a thread's own
                    outcome.set_result(call())
            except BaseException as error:  # anybody's code may raise anything, sys.exit included
                outcome.set_exception(_Raised(error))


class _Raised(Exception):
    """What a reward raised."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(cause)
        self.cause = cause
