"""Rewards that are computed elsewhere: by a server, and in a process of their own."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Listener, clips, flat_gradient, make

from rlvid.config import parse_config
from rlvid.config.reward import RemoteConfig, RewardConfig
from rlvid.config.reward_names import absolute
from rlvid.evaluate.reward_calls import RewardCaller
from rlvid.reward import remote
from rlvid.reward.load import check_reward, check_trust, scores_whole_videos, trained_reward
from rlvid.reward.mixture import MixtureReward
from rlvid.reward.remote import HttpCaller, ProcessCaller, RemoteReward, checked
from rlvid.reward.server import Server, load

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

def loud(frames, prompts):
    import os
    os.write(1, b"x" * 1_000_000)
    return frames.mean((2, 3, 4))

def leaves(frames, prompts):
    raise SystemExit("enough")

def clip_of(frames, prompts):
    import clip
    return [float(clip.SCORE)] * len(prompts)
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
        servers.append(Server(("127.0.0.1", 0), load(f"{file}:{function}"), function))
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
    [
        ("broken", "KeyError: 'nothing here'"),
        pytest.param("leaves", "SystemExit: enough", marks=pytest.mark.slow),
        pytest.param("slow", "timed out", marks=pytest.mark.slow),
        ("ends", "without response"),
        pytest.param("gone", "ended with code 1", marks=pytest.mark.slow),
    ],
)
def test_what_fails_elsewhere_is_tried_again_and_left_out(file: Path, function: str, words: str) -> None:
    settings = RemoteConfig(timeout=0.5 if function == "slow" else 30, retries=1, batch=2)
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


def test_after_a_part_that_failed_the_others_have_one_try() -> None:
    tried = list[str]()

    def call(pixels: np.ndarray, prompts: list[str]) -> list[Any]:
        tried.append(prompts[0])
        if prompts[0] == "lucky" and tried.count("lucky") < 2:
            raise OSError("once")
        if prompts[0] in ("dead", "lost"):
            raise OSError("for ever")
        return [1.0] * len(prompts)

    reward = RemoteReward(call, RemoteConfig(retries=2, batch=1), "r", whole_video=True)
    assert reward(frames(1), ["lucky"]).tolist() == [1.0]
    assert reward.failure is None, "a try that failed before one that did not is no failure"
    tried.clear()
    assert reward(frames(3), ["dead", "lost", "a"]).isnan().tolist() == [True, True, False]
    assert tried == ["dead"] * 3 + ["lost", "a"]
    assert "for ever (3 tries)" in str(reward.failure)


@pytest.mark.slow
def test_the_server_stands_in_nobodys_way(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output in C, packages named as modules of rlvid, a proxy, and a function that hangs while its parent ends."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    (file.parent / "clip.py").write_text("SCORE = 7")
    for function, found in (("loud", expected()), ("clip_of", torch.full((3,), 7.0))):
        call = ProcessCaller(f"{file}:{function}", sys.executable, 30)
        scores = RemoteReward(call, RemoteConfig(), function, whole_video=False)(frames(), ["a", "b", "c"])
        torch.testing.assert_close(scores, found)
        call.stop()
    hanging = ProcessCaller(f"{file}:slow", sys.executable, 1)
    hanging.start()
    process = hanging._process
    assert process is not None
    assert process.stdin is not None
    address = hanging.start()
    with pytest.raises(OSError, match="timed out"):
        address(np.zeros((1, 4, 3, 8, 8), np.uint8), ["a"])
    process.stdin.close()
    assert process.wait(20) == 0, "the function sleeps for half a minute"
    stranger = HttpCaller(address.url, 5)
    with pytest.raises(OSError, match="refused"):
        stranger.about()


def test_a_server_with_a_password_answers_nobody_else(file: Path) -> None:
    call = ProcessCaller(f"{file}:bright", sys.executable, 30)
    own = call.start()
    pixels = np.zeros((1, 4, 3, 8, 8), np.uint8)
    assert own(pixels, ["a"]) == [[0.0] * 4]
    with pytest.raises(OSError, match="asks for a password"):
        HttpCaller(own.url, 30)(pixels, ["a"])
    call.stop()


def test_an_evaluation_ends_with_the_reason(file: Path) -> None:
    reward = RemoteReward(
        ProcessCaller(f"{file}:broken", sys.executable, 30), RemoteConfig(retries=0), "mine.py:broken", whole_video=True
    )
    with pytest.raises(RuntimeError, match=r"the reward mine.py:broken gave no score: .*KeyError: 'nothing here'"):
        RewardCaller()(reward, frames(), ["a", "b", "c"])
    mixture = MixtureReward(["r"], [reward], [1.0])
    with pytest.raises(RuntimeError, match="gave no score"):
        RewardCaller()(mixture, frames(), ["a", "b", "c"])
    reward.call.stop()  # type: ignore[attr-defined]


def test_a_part_with_one_score_a_video_is_the_same_for_all_its_frames() -> None:
    class Each(torch.nn.Module):
        def forward(self, frames: torch.Tensor, prompts: list[str]) -> torch.Tensor:
            return torch.arange(16.0).reshape(4, 4)

    own = RemoteReward(lambda pixels, prompts: [10.0, 20.0, 30.0, 40.0], RemoteConfig(), "r", whole_video=False)
    scores_BS = MixtureReward(["a", "b"], [own, Each()], [1.0, 1.0])(frames(4), ["a"] * 4)
    assert torch.equal(scores_BS, torch.tensor([[10.0], [20.0], [30.0], [40.0]]) + torch.arange(16.0).reshape(4, 4))


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
        (f"{file}:bright", {"python": "/no/python"}, "reward.remote.python = '/no/python' is not there"),
        (f"{file}:bright", {"python": "/etc/passwd"}, "reward.remote.python = '/etc/passwd' is no program"),
    ):
        with pytest.raises(ValueError, match=words):
            check_reward(RewardConfig(path=path, held_out=None, remote=more), needs_gradient=False)
    (tmp_path / "foreign.py").write_text("import a_package_that_is_not_here\ndef score(frames, prompts): ...\n")
    check_reward(RewardConfig(path=f"{tmp_path}/foreign.py:score", held_out=None, remote={}), needs_gradient=False)
    foreign = RewardConfig(path=f"{file}:bright", held_out_path="http://host:1", remote={"python": "/bin/x"})
    with pytest.raises(
        ValueError, match=r"run the reward in .*mine.py, send videos to http://host:1, run /bin/x.*--trust"
    ):
        check_trust(foreign, Path("runs/a"), trusted=False)
    with pytest.raises(ValueError, match=r"send videos to http://.*--trust"):
        check_trust(nowhere, Path("runs/a"), trusted=False)
    check_trust(nowhere, Path("runs/a"), trusted=True)


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ({"path": "http://127.0.0.1:9"}, ["'http://127.0.0.1:9' gives no gradient", "grpo"]),
        ({"path": "mine.py:score", "remote": {}}, ["'mine.py:score' gives no gradient"]),
        ({"name": "hpsv2", "path": "http://host/x"}, ["'hpsv2' takes a checkpoint"]),
        ({"path": "http://host:80a0"}, ["path = 'http://host:80a0' is no address of a server", "http://HOST:PORT"]),
        ({"path": "http://[::1"}, ["is no address of a server"]),
        ({"path": "a.py:f", "remote": {"where": "actor", "gpus": 1.5}}, ["gpus = 1.5", "allowed: 0 to 1, 2, 3"]),
        ({"path": "a.py:f", "remote": {"retries": 11}}, ["reward.remote.retries = 11"]),
        ({"name": "builtin", "remote": {}}, ["remote is for a reward of your own", "'builtin'"]),
        ({"path": "a.py:f", "remote": {"where": "actor", "python": "python"}}, ["python is for where=process"]),
        ({"path": "a.py:f", "remote": {"packages": ["x"]}}, ["packages is for where=actor"]),
    ],
)
def test_what_does_not_fit_is_said(reward: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        parse_config({"reward": reward})
    assert all(word in str(error.value) for word in words), str(error.value)


def test_where_a_reward_runs_is_no_part_of_a_runs_identity(tmp_path: Path) -> None:
    def config(**remote_settings: Any) -> Any:
        own = {"path": f"{tmp_path}/a.py:f", "held_out": None, "remote": remote_settings}
        return parse_config({"method": {"name": "grpo"}, "train": {"group_size": 2}, "reward": own})

    assert config(timeout=5, retries=0).fingerprint == config(where="actor", gpus=1).fingerprint
    assert config(whole_video=True).fingerprint != config().fingerprint
    relative = config(python="venv/bin/python").reward.resolved().remote
    assert relative.python == str(Path.cwd() / "venv/bin/python")
