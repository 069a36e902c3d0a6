"""Scores finished videos with rewards; runs a user's own reward under a time limit, and checks its scores."""

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
from rlvid.reward.remote import failure_of, remote_parts
from rlvid.reward.video import ImageReward, check_shape, label_of, mean_of_frames

_EXIT_DELAY = 30.0
"""Seconds after the limit at which the process ends, if C code holds Python so that no error can be raised."""

_GRACE = 2.0
"""Seconds that a call may take after an interruption."""


class RewardCaller:
    """Scores videos with a reward; runs a user's own reward in a thread, with a time limit.

    The rewards of rlvid have no limit: they do not hang, but may be slow on a slow machine.

    Args:
        seconds: limit for one call of a user's own reward; 0 or None: no limit.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._seconds = seconds or None
        self._calls: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def __call__(self, reward: ImageReward, frames_BFCHW: Tensor, prompts: list[str]) -> Tensor:
        """Returns the mean score of each video (B,).

        Raises:
            RuntimeError: the reward raised an error, exceeded the limit, or returned another shape. The message names
                the reward and the prompt.
        """
        if remote_parts(reward):
            scores = mean_of_frames(reward(frames_BFCHW, prompts))
            if failure := failure_of(reward):
                raise RuntimeError(f"the reward {label_of(reward)} gave no score: {failure}")
            return scores
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
        except _RewardError as error:
            raise RuntimeError(f"the reward {label} raised {describe(error.cause)} on {where}") from error.cause

    def _call(self, call: Callable[[], Tensor]) -> "Future[Tensor]":
        """Runs a call in the thread; the returned future is not done where the call exceeded the limit."""
        if self._thread is None:  # one thread for all calls: a reward's state may belong to the thread that made it
            self._thread = threading.Thread(target=self._answer, name="reward", daemon=True)
            self._thread.start()
        outcome: Future[Tensor] = Future()
        if self._seconds:
            faulthandler.dump_traceback_later(self._seconds + _EXIT_DELAY, exit=True, file=sys.__stderr__ or sys.stderr)
        try:
            self._calls.put((call, outcome))
            wait([outcome], self._seconds)
        except KeyboardInterrupt:
            wait([outcome], _GRACE)  # torch aborts a process that exits while another thread computes
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
        return outcome

    def _answer(self) -> None:
        while True:
            call, outcome = self._calls.get()
            try:
                with torch.no_grad():  # each thread has its own gradient mode
                    outcome.set_result(call())
            except BaseException as error:  # a user's code may raise anything, also SystemExit
                outcome.set_exception(_RewardError(error))


class _RewardError(Exception):
    """The error that a reward raised, as its ``cause``."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(cause)
        self.cause = cause
