"""Rewards that are computed elsewhere: by a server, and in a process of their own."""

import sys
import threading
from collections.abc import Iterator
from http.server import HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Listener, clips, flat_gradient, make

from rlvid.config import parse_config
from rlvid.config.reward import RemoteConfig, RewardConfig, absolute
from rlvid.reward import remote
from rlvid.reward.load import check_reward, check_trust, scores_whole_videos, trained_reward
from rlvid.reward.remote import HttpCaller, ProcessCaller, RemoteReward, checked
from rlvid.reward.server import Handler, load

FILE = """
import time

def bright(frames, prompts):
    print("words of the function")
    return frames.mean((2, 3, 4))

def whole(frames, prompts):
    assert frames.shape[1] == 4
    return [None if "star" in prompt else float(video.mean()) for video, prompt in zip(frames, prompts)]
whole.whole_video = True

def broken(frames, prompts):
    raise KeyError("nothing here")

def slow(frames, prompts):
    time.sleep(30)

def ends(frames, prompts):
    import os
    os._exit(3)
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("remote") / "mine.py"
    path.write_text(FILE)
    return path


@pytest.fixture
def serve(file: Path) -> Iterator[Any]:
    servers = []

    def start(function: str) -> str:
        handler = type("Own", (Handler,), {"function": staticmethod(load(f"{file}:{function}")), "name": function})
        servers.append(HTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_PAUSE", 0.0)


def frames(videos: int = 3) -> torch.Tensor:
    return torch.rand(videos, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.1


def expected() -> torch.Tensor:
    return ((frames().clamp(0, 1) * 255).round() / 255).mean((2, 3, 4))


def test_a_server_scores_frames_and_videos(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config = RewardConfig(path=serve("bright"), held_out=None)
    assert config.name == "custom"
    assert config.without_gradient == config.path == absolute(config.path)
    reward = trained_reward(config)
    assert not reward.whole_video
    torch.testing.assert_close(reward(frames(), ["a", "b", "c"]), expected())
    assert reward.failure is None

    config = RewardConfig(path=serve("whole"), held_out=None, remote={"batch": 2})
    assert scores_whole_videos(config)
    reward = trained_reward(config)
    assert reward.whole_video
    scores_B = reward(frames(), ["a", "a star", "c"])
    torch.testing.assert_close(scores_B[[0, 2]], expected().mean(1)[[0, 2]])
    assert scores_B[1].isnan()


def test_a_process_of_its_own_scores_and_ends(file: Path) -> None:
    config = RewardConfig(path=f"{file}:bright", held_out=None, remote={"python": sys.executable})
    reward = trained_reward(config)
    assert isinstance(reward, RemoteReward)
    assert isinstance(reward.call, ProcessCaller)
    assert reward.label == "mine.py:bright"
    torch.testing.assert_close(reward(frames(), ["a", "b", "c"]), expected())
    process = reward.call._process
    assert process is not None
    process.kill()
    process.wait()
    torch.testing.assert_close(reward(frames(), ["a", "b", "c"]), expected(), msg="it was not started again")
    second = reward.call._process
    assert second is not None
    assert second.stdin is not None
    second.stdin.close()  # as when this process ends
    assert second.wait(20) == 0


@pytest.mark.parametrize(
    ("function", "words"),
    [("broken", "KeyError: 'nothing here'"), ("slow", "timed out"), ("ends", "without response"), ("gone", "code 1")],
)
def test_what_fails_elsewhere_is_tried_again_and_left_out(file: Path, function: str, words: str) -> None:
    settings = RemoteConfig(timeout=1 if function == "slow" else 30, retries=1, batch=2)
    call, calls = ProcessCaller(f"{file}:{function}", sys.executable, settings.timeout), list[int]()

    def counting(pixels: np.ndarray, prompts: list[str]) -> list[Any]:
        calls.append(len(prompts))
        return call(pixels, prompts) if prompts[0] != "sound" else [0.5] * len(prompts)

    method = make({"name": "grpo"}, train={"group_size": 2})
    method.context.reward = reward = RemoteReward(counting, settings, f"mine.py:{function}", whole_video=True)
    method.context.observer = heard = Listener()
    batch = clips(method)
    batch.prompts[2:] = ["sound", "sound"]
    _, updates = flat_gradient(method, batch)
    assert updates[0].metrics["reward/excluded"] == (2.0, 1.0)
    assert updates[0].samples is not None
    assert updates[0].samples.reward_B.isnan().tolist() == [True, True, False, False]
    assert calls == [2, 2, 2], "two tries of the first part, one of the second"
    assert words in heard.lines[0]
    assert "2 of 4 videos, which are left out" in heard.lines[0]
    assert "(2 tries)" in str(reward.failure)
    call.stop()


def test_answers_of_another_form_are_failures() -> None:
    assert checked([1, None], 2, 4)[0] == 1.0
    assert np.isnan(checked([[1, None]], 1, 2)[0][1])
    for scores, words in (
        ({"scores": []}, "dict for 2 videos"),
        ([1.0], "1 scores for 2 videos"),
        ([[1.0], [2.0]], r"lists of \[1\] scores for 2 videos of 4 frames"),
        ([[1.0] * 4, 2.0], r"lists of \[1, 4\]"),
    ):
        with pytest.raises(ValueError, match=words):
            checked(scores, 2, 4)


def test_a_server_that_is_not_there_is_told_before_the_start(file: Path, serve: Any, tmp_path: Path) -> None:
    nowhere = RewardConfig(path="http://127.0.0.1:9/score", held_out=None)
    with pytest.raises(ValueError, match=r"reward.path = 'http://127.0.0.1:9/score': no reward server answers there"):
        check_reward(nowhere, needs_gradient=False)
    check_reward(RewardConfig(path=serve("bright"), held_out=None), needs_gradient=False)
    assert HttpCaller(serve("bright"), 5).about() == {"function": "bright", "whole_video": False}
    for path, more, words in (
        (f"{file}:missing", {}, "mine.py has no function 'missing'"),
        (f"{tmp_path}/gone.py:score", {}, "there is no file"),
        (f"{file}:bright", {"python": "/no/python"}, "reward.remote.python = '/no/python': there is no such file"),
    ):
        with pytest.raises(ValueError, match=words):
            check_reward(RewardConfig(path=path, held_out=None, remote=more), needs_gradient=False)
    (tmp_path / "foreign.py").write_text("import a_package_that_is_not_here\ndef score(frames, prompts): ...\n")
    check_reward(RewardConfig(path=f"{tmp_path}/foreign.py:score", held_out=None, remote={}), needs_gradient=False)
    with pytest.raises(ValueError, match=r"name the reward server http://.*--trust"):
        check_trust(nowhere, Path("runs/a"), trusted=False)
    check_trust(nowhere, Path("runs/a"), trusted=True)


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ({"path": "http://127.0.0.1:9"}, ["'http://127.0.0.1:9' gives no gradient", "grpo"]),
        ({"path": "mine.py:score", "remote": {}}, ["'mine.py:score' gives no gradient"]),
        ({"name": "hpsv2", "path": "http://host/x"}, ["'hpsv2' takes a checkpoint"]),
        ({"name": "builtin", "remote": {}}, ["remote is for a reward of your own", "'builtin'"]),
        ({"path": "a.py:f", "remote": {"where": "actor", "python": "python"}}, ["python is for where=process"]),
        ({"path": "a.py:f", "remote": {"packages": ["x"]}}, ["packages is for where=actor"]),
    ],
)
def test_what_does_not_fit_is_said(reward: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        parse_config({"reward": reward})
    assert all(word in str(error.value) for word in words), str(error.value)
