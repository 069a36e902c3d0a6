"""Rewards that are computed elsewhere: by a server, or by a function in a process or a Ray actor of its own.

They see frames as 8-bit pixels, give no gradient, and may fail: a request is limited in time and repeated, and videos
without a score are left out.
"""

import io
import json
import logging
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlvid.config.reward import RemoteConfig
from rlvid.faults import describe

log = logging.getLogger("rlvid.reward")

Caller = Callable[[np.ndarray, list[str]], list[Any]]
"""``(frames uint8 (B, S, 3, H, W), prompts) -> B scores, or B lists of S``, None for no score; raises what failed."""
_FIRST_PAUSE = 1.0
"""Seconds before the second try; doubled before each further one."""


class RemoteReward(nn.Module):
    """Sends videos in parts of ``settings.batch`` and repeats a part that failed.

    Args:
        call: computes the scores.
        settings: size of a part, number of tries.
        label: what messages call it.
        whole_video: whether it wants all frames of a video.

    Attributes:
        failure: why the last call left videos out; None if it did not.
    """

    differentiable = False

    def __init__(self, call: Caller, settings: RemoteConfig, label: str, whole_video: bool) -> None:
        super().__init__()
        self.call, self.settings, self.label, self.whole_video = call, settings, label, whole_video
        self.failure: str | None = None

    @torch.no_grad()
    def forward(self, frames_BSCHW: Tensor, prompts: list[str]) -> Tensor:
        """Returns scores_BS or scores_B, float32; NaN for the videos of a part that failed at each try."""
        self.failure = None
        pixels = (frames_BSCHW.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
        size, parts = self.settings.batch, list[Tensor | int]()
        for start in range(0, len(prompts), size):
            part, texts = pixels[start : start + size], prompts[start : start + size]
            scores = self._ask(part, texts)
            parts.append(len(texts) if scores is None else torch.tensor(scores))
        width = next((part.shape[1:] for part in parts if isinstance(part, Tensor)), torch.Size())
        filled = [torch.full((part, *width), torch.nan) if isinstance(part, int) else part for part in parts]
        return torch.cat(filled).to(frames_BSCHW.device)

    def _ask(self, frames: np.ndarray, prompts: list[str]) -> list[Any] | None:
        tries = self.settings.retries + 1
        for number in range(tries):
            if number:
                time.sleep(_FIRST_PAUSE * 2 ** (number - 1))
            try:
                return checked(self.call(frames, prompts), frames.shape[0], frames.shape[1])
            except Exception as error:  # what runs elsewhere may fail in any way, and the run goes on without it
                self.failure = f"{describe(error)} ({tries} tries)"
                log.warning("the reward %s, try %d of %d: %s", self.label, number + 1, tries, describe(error))
        return None


def checked(scores: Any, videos: int, frames: int) -> list[Any]:
    """Returns B numbers or B lists of S, NaN for null; raises ValueError where they are neither."""
    if not isinstance(scores, list) or len(scores) != videos:
        found = f"{len(scores)} scores" if isinstance(scores, list) else type(scores).__name__
        raise ValueError(f"{found} for {videos} videos")
    rows = [each if isinstance(each, list) else [each] for each in scores]
    width = {len(row) for row in rows}
    listed = any(isinstance(each, list) for each in scores)
    if width != {frames if listed else 1}:
        raise ValueError(f"lists of {sorted(width)} scores for {videos} videos of {frames} frames")
    values = [[float("nan") if value is None else float(value) for value in row] for row in rows]
    return values if listed else [row[0] for row in values]


class HttpCaller:
    """Calls a reward server; see ``rlvid/reward/server.py`` for what it is asked and answers.

    Args:
        url: of the server.
        timeout: seconds for one request.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self.timeout = url, timeout

    def __call__(self, frames: np.ndarray, prompts: list[str]) -> list[Any]:
        """Returns the scores; raises what went wrong."""
        body = io.BytesIO()
        np.savez(body, frames=frames, prompts=np.array(prompts, dtype=np.str_))
        answer = self._open(urllib.request.Request(self.url, body.getvalue(), {"Content-Type": "application/x-npz"}))
        scores: list[Any] = answer["scores"] if isinstance(answer, dict) and "scores" in answer else answer
        return scores

    def about(self) -> dict[str, Any]:
        """Returns what the server says of itself; nothing where it answers no such question.

        Raises:
            OSError: no server answers.
        """
        try:
            answer = self._open(urllib.request.Request(self.url))
        except (urllib.error.HTTPError, ValueError):
            return {}
        return answer if isinstance(answer, dict) else {}

    def _open(self, request: urllib.request.Request) -> Any:
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            told = error.read().decode(errors="replace")
            with suppress(ValueError, KeyError, TypeError):
                told = json.loads(told)["error"]
            error.msg = f"{error.msg}: {told[:500]}" if told else error.msg
            raise


class ProcessCaller:
    """Serves a function in a process of its own, which ends with this one; starts it anew after a failure.

    Args:
        function: FILE.py:FUNCTION.
        python: the interpreter of the environment that it runs in.
        timeout: seconds for one request.
    """

    def __init__(self, function: str, python: str, timeout: float) -> None:
        self.function, self.python, self.timeout = function, python, timeout
        self._process: subprocess.Popen[str] | None = None
        self._call: HttpCaller | None = None

    def __call__(self, frames: np.ndarray, prompts: list[str]) -> list[Any]:
        """Returns the scores; raises what went wrong."""
        call = self.start()
        try:
            return call(frames, prompts)
        except urllib.error.HTTPError:
            raise  # the function failed, the process is sound
        except OSError:
            self.stop()
            raise

    def start(self) -> HttpCaller:
        """Returns the caller of a running process.

        Raises:
            RuntimeError: it ended before it served.
        """
        if self._process is None or self._process.poll() is not None or self._call is None:
            self.stop()
            command = [self.python, str(Path(__file__).with_name("server.py")), self.function]
            self._process = subprocess.Popen(
                [*command, "--port", "0", "--with-parent"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            assert self._process.stdout is not None
            url = self._process.stdout.readline().strip()
            if not url:
                code = self._process.wait()
                raise RuntimeError(
                    f"the process of {self.function} ended with code {code} before it served; see the log"
                )
            self._call = HttpCaller(url, self.timeout)
        return self._call

    def stop(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
        self._process = self._call = None

    def __del__(self) -> None:
        self.stop()
