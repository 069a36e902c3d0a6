"""The loop by the commands alone: videos, votes, a reward, a model trained on it, and its evaluation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet
from runs import settings

from rlvid.study.pairs import choose_pairs
from rlvid.study.store import Store
from rlvid.study.videos import Videos

ONE = ("train.workers=1", "train.zero_stage=0")


@pytest.mark.slow
def test_votes_become_a_reward_that_a_model_is_trained_on(
    folder: Path, ray_cluster: Any, rlvid: Callable[..., str]
) -> None:
    def train(name: str, *overrides: str) -> Path:
        rlvid("train", "toy", *settings(folder, name, "method=draft", "optimizer.lr=0.01", *ONE, *overrides))
        return folder / "runs" / name

    prompts = folder / "asked.txt"
    prompts.write_text("".join(f"a dog number {number}\n" for number in range(12)))
    first, asked = train("first", "reward.name=brightness"), folder / "asked"
    rlvid("evaluate", first, "--sets", prompts, "--steps", "2", "--out", asked)

    videos = Videos(asked)
    store = Store.begin(
        asked / "study.sqlite", asked, 0, videos.models, choose_pairs(videos, ["base", "draft"], 12, 0, 0)
    )
    for pair in store.study().pairs:
        liked = "left" if pair.first == "base" else "right"
        for person in ("ada", "ben"):
            store.save(0, person, pair.number, {"quality": liked, "alignment": "tie"})
    rlvid("study", "export", asked, "--out", folder / "votes.parquet")
    assert parquet.read_table(folder / "votes.parquet").num_rows == 12 * 2 * 2

    liked_reward = folder / "liked"
    fit = ["kind=video", "axes=[quality]", "frames=4", "steps=100", "batch_size=8", "group=4", "lr=0.003"]
    told = rlvid("reward", "fit", folder / "votes.parquet", *fit, "backbone.layers=0", "--out", liked_reward)
    assert "quality: it agrees with" in told or "not shown to be better than a coin" in told
    report = json.loads((liked_reward / "report.json").read_text())
    assert report["base"]["model"] == "base"
    assert report["base"]["samples"] == 12
    assert report["axes"]["quality"]["fitted"]["share"] == 1

    again = train("liked-by-us", "reward.name=fitted", f"reward.path={liked_reward}", "reward.held_out=null")
    out = folder / "evaluated"
    rlvid("evaluate", again, "--sets", prompts, "--steps", "2", "--rewards", f"fitted={liked_reward}", "--out", out)
    rows = parquet.read_table(out / "evaluation.parquet").to_pylist()
    scores = {model: [row["reward"] for row in rows if row["model"] == model] for model in ("base", "draft")}
    assert len(scores["base"]) == 12
    assert scores["draft"] != scores["base"]
