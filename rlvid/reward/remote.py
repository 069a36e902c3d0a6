"""Rewards that are computed elsewhere: by a server, or by a function in a process or a Ray actor of its own.

They see frames as 8-bit pixels, give no gradient, and may fail: a request is limited in time and repeated, and videos
without a score are left out.
"""

import http.client
import io
import json
import logging
import os
import secrets
import selectors
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor, nn

from rlvid.config.reward import RemoteConfig
from rlvid.faults import describe
from rlvid.reward.server import LARGEST
from rlvid.reward.video import mean_of_frames

log = logging.getLogger("rlvid.reward")

Caller = Callable[[np.ndarray, list[str]], list[Any]]
"""``(frames uint8 (B, S, 3, H, W), prompts) -> B scores, or B lists of S``, None for no score; raises what failed."""
START = 600.0
"""Seconds that a process or an actor may take to start: its packages are installed and its model is loaded."""
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
"""Seconds before the second try; doubled before each further one, up to a limit."""


class RemoteReward(nn.Module):
    """Sends videos in parts of ``settings.batch`` and repeats a part that failed.

    Args:
        call: computes the scores.
        settings: size of a part, number of tries.
        label: what messages call it.
        whole_video: whether it wants all frames of a video.

    Attributes:
        failure: why the last call left videos out; None where every request was answered.
    """

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
        found = [part for part in parts if isinstance(part, Tensor)]
        if len({part.dim() for part in found}) > 1:  # numbers for some videos, lists for others
            parts = [mean_of_frames(part) if isinstance(part, Tensor) else part for part in parts]
        width = next((part.shape[1:] for part in parts if isinstance(part, Tensor)), torch.Size())
        filled = [torch.full((part, *width), torch.nan) if isinstance(part, int) else part for part in parts]
        return torch.cat(filled).to(frames_BSCHW.device)

    def _ask(self, frames: np.ndarray, prompts: list[str]) -> list[Any] | None:
        """Returns a part's scores; None after the last try, of which a call whose earlier part failed has one."""
        tries = 1 if self.failure else self.settings.retries + 1
        for number in range(1, tries + 1):
            try:
                return checked(self.call(frames, prompts), frames.shape[0], frames.shape[1])
            except Exception as error:  # what runs elsewhere may fail in any way, and the run goes on without it
                log.warning("the reward %s, try %d of %d: %s", self.label, number, tries, describe(error))
                if number == tries:
                    self.failure = self.failure or f"{describe(error)} ({tries} tries)"
                else:
                    time.sleep(min(_FIRST_PAUSE * 2 ** (number - 1), _LONGEST_PAUSE))
        return None


def remote_parts(reward: Any) -> list[RemoteReward]:
    """Returns a reward, or the parts of a mixture, that are computed elsewhere."""
    return (
        [part for part in reward.modules() if isinstance(part, RemoteReward)] if isinstance(reward, nn.Module) else []
    )


def failure_of(reward: Any) -> str | None:
    """Returns why the last call of a reward, or of a part of it, left videos out; None if it did not."""
    return next((part.failure for part in remote_parts(reward) if part.failure), None)


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
        token: its password, if it has one.
    """

    def __init__(self, url: str, timeout: float, token: str | None = None) -> None:
        self.url, self.timeout = url, timeout
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        own = urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")  # no proxy stands before this machine
        self._opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if own else []))

    def __call__(self, frames: np.ndarray, prompts: list[str]) -> list[Any]:
        """Returns the scores; raises what went wrong."""
        body = io.BytesIO()
        np.savez(body, frames=frames, prompts=np.array(prompts, dtype=np.str_))
        if body.tell() > LARGEST:
            raise ValueError(f"a request of {body.tell():,} bytes; allowed: {LARGEST:,}; lower reward.remote.batch")
        headers = self._headers | {"Content-Type": "application/x-npz"}
        answer = self._open(urllib.request.Request(self.url, body.getvalue(), headers))
        scores: list[Any] = answer["scores"] if isinstance(answer, dict) and "scores" in answer else answer
        return scores

    def about(self) -> dict[str, Any]:
        """Returns what the server says of itself; nothing where it answers no such question.

        Raises:
            OSError: no HTTP server answers.
        """
        try:
            answer = self._open(urllib.request.Request(self.url))
        except (urllib.error.HTTPError, json.JSONDecodeError, UnicodeDecodeError):
            return {}
        except http.client.HTTPException as error:
            raise OSError(f"it speaks no HTTP: {describe(error)}") from error
        return answer if isinstance(answer, dict) else {}

    def _open(self, request: urllib.request.Request) -> Any:
        try:
            with self._opener.open(request, timeout=self.timeout) as answer:
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
        self._process: subprocess.Popen[bytes] | None = None
        self._call: HttpCaller | None = None

    def __call__(self, frames: np.ndarray, prompts: list[str]) -> list[Any]:
        """Returns the scores; raises what went wrong."""
        call = self.start()
        try:
            return call(frames, prompts)
        except urllib.error.HTTPError:
            raise  # the function failed, the process is sound
        except (OSError, http.client.HTTPException):
            self.stop()
            raise

    def start(self) -> HttpCaller:
        """Returns the caller of a running process.

        Raises:
            RuntimeError: it ended before it served, or took longer than ``START`` seconds.
        """
        if self._process is None or self._process.poll() is not None or self._call is None:
            self.stop()
            token, server = secrets.token_hex(16), str(Path(__file__).with_name("server.py"))
            self._process = subprocess.Popen(
                [self.python, server, self.function, "--port", "0", "--with-parent"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"REWARD_TOKEN": token},
            )
            self._call = HttpCaller(self._address(self._process), self.timeout, token)
        return self._call

    def _address(self, process: "subprocess.Popen[bytes]") -> str:
        """Returns the address that the process prints once it serves."""
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            ready = selector.select(START)
        url = process.stdout.readline().decode(errors="replace").strip() if ready else ""
        if not url.startswith("http://"):
            if ready:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(10)
            self.stop()
            why = f"ended with code {process.returncode}" if ready else f"did not serve within {START:g} s"
            raise RuntimeError(f"the process of {self.function} {why}; its words are in the log")
        return url

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
