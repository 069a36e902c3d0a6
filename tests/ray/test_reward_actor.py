"""A user's reward in a Ray actor: its scores, its failures, and a training on it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import config

from rlvid.actions import train_and_show
from rlvid.cluster.nodes import check_resources
from rlvid.cluster.reward_actor import ActorCaller
from rlvid.config.reward import RemoteConfig
from rlvid.reward import remote
from rlvid.reward.remote import RemoteReward
from rlvid.runs.scalars import read_scalars

FILE = """
import os
import time

calls = []

def bright(frames, prompts):
    calls.append(1)
    if "break" in prompts[0]:
        raise KeyError("nothing here")
    if "sleep" in prompts[0]:
        time.sleep(60)
    if "end" in prompts[0]:
        os._exit(1)
    return frames.mean((1, 2, 3, 4)) + len(calls)
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("actor") / "mine.py"
    path.write_text(FILE)
    return path


def test_an_actor_answers_fails_and_is_started_again(
    file: Path, ray_cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_FIRST_PAUSE", 0.0)
    settings = RemoteConfig(where="actor", cpus=0.1, timeout=20, retries=0)
    reward = RemoteReward(ActorCaller(f"{file}:bright", settings), settings, "mine.py:bright", whole_video=True)
    pixels = torch.full((2, 3, 3, 4, 4), 0.2)
    assert reward(pixels, ["a", "b"]).tolist() == pytest.approx([1.2, 1.2])
    assert reward(pixels, ["break", "b"]).isnan().all()
    assert "KeyError: 'nothing here'" in str(reward.failure)
    assert reward(pixels, ["a", "b"]).tolist() == pytest.approx([3.2, 3.2]), "an error of the function ended the actor"
    assert reward(pixels, ["end", "b"]).isnan().all()
    assert reward(pixels, ["a", "b"]).tolist() == pytest.approx([1.2, 1.2])
    late = RemoteConfig(where="actor", cpus=0.1, timeout=3, retries=0)
    reward.call._settings = late
    assert reward(pixels, ["sleep", "b"]).isnan().all()
    assert "no answer within 3 s" in str(reward.failure)
    reward.call._settings = settings
    assert np.isfinite(reward(pixels, ["a", "b"]).numpy()).all()


@pytest.mark.slow
def test_a_training_on_an_actors_reward(
    folder: Path, file: Path, ray_cluster: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    own = (
        "reward.name=custom",
        f"reward.path={file}:bright",
        "reward.remote={where: actor, cpus: 0.5, whole_video: true, batch: 2}",
    )
    run = config(folder, "remote", "method={name: grpo, window: 1}", "train.group_size=2", "train.steps=1", *own,
                 "train.zero_stage=0", "train.workers=1", "train.micro_batch=4")  # fmt: skip
    home = train_and_show(run, None)
    assert (home / "before-after.png").is_file(), "the pictures ask the actor for rewards"
    assert "--trust" in capsys.readouterr().out
    scalars = read_scalars(home / "tensorboard", lambda tag: tag.startswith("reward/"))
    assert scalars["reward/excluded"][0] == 0
    assert 1.5 < scalars["reward/trained"][0] < 2.5, "the mean over two requests of brightness plus their number"
    much = config(folder, "remote", "method={name: grpo, window: 1}", "train.group_size=2", *own[:2],
                  "reward.remote={where: actor, cpus: 99}")  # fmt: skip
    with pytest.raises(ValueError, match=r"reward.remote takes 99 CPU beside each of 2 workers"):
        check_resources(much)
