"""The guard beside real training: it changes nothing, looks once at each checkpoint, and can end a run cleanly."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from rlvid.config import RunConfig, load_config
from rlvid.runs.over_optimisation import HELD_OUT, Loss, Verdict
from rlvid.runs.scalars import read_events
from rlvid.toy.tiny import save_tiny_model
from rlvid.train import guard_folder
from rlvid.train.guard_folder import stop_flag
from rlvid.train.launch import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, ray_cluster: Any) -> Path:
    home = tmp_path_factory.mktemp("guard")
    save_tiny_model(home / "tiny")
    return home


def config(folder: Path, name: str, *overrides: str) -> RunConfig:
    """A run of seconds, with one checkpoint kept."""
    settings = [
        f"name={name}", f"model.path={folder / 'tiny'}", "model.frames=4", "model.size=16", "data.count=12",
        f"output.storage={folder / 'runs'}", "sampling.steps=4", "reward.segments=2", "train.batch_size=4",
        "optimizer.lr=1e-3", "optimizer.warmup=0", "output.checkpoint_every=2", "output.keep_checkpoints=1",
        "output.videos_every=0", *overrides,
    ]  # fmt: skip
    return load_config("toy", settings)


GUARD = ("guard.every=2", "guard.count=4", "guard.steps=2")


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "guard.jsonl").read_text().splitlines()]


def test_the_guard_changes_nothing_looks_once_at_each_checkpoint_and_ends_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = ("train.workers=1", "train.zero_stage=0")
    plain = train(config(folder, "plain", "train.steps=4", *alone), Console(file=io.StringIO()))
    said = io.StringIO()
    guarded = train(config(folder, "guarded", "train.steps=4", *alone, *GUARD), Console(file=said, width=400))
    file = "adapter/adapter_model.safetensors"
    expected, found = load_file(plain.checkpoint / file), load_file(guarded.checkpoint / file)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    run, before = guarded.folder, lines(guarded.folder)
    assert [line["step"] for line in before] == [0, 2, 4], "step 2 was deleted by keep_checkpoints and looked at first"
    assert "guard: best of steps 0, 2, 4 by held-out reward: " in said.getvalue()
    best = json.loads((run / "best" / "best.json").read_text())["step"]
    means = {line["step"]: line["mean"][HELD_OUT] for line in before}
    assert means[best] == max(means.values())
    assert (run / "best" / "adapter").is_dir() == (best > 0)
    assert not list((run / "guard").glob("step-*"))
    assert (run / "guard.png").stat().st_size > 10_000

    loss = Loss(HELD_OUT, 0, 0, 0.5, 0.4, 0.01)  # the same run goes on, and its next look brings a warning
    warning = Verdict(0, {HELD_OUT: loss}, (loss,))
    monkeypatch.setattr(guard_folder, "judge", lambda found: warning if len(found) > len(before) else Verdict(0))
    two = ("train.workers=2", "train.zero_stage=0")  # which must end at the same step
    asked = config(folder, "guarded", "train.steps=2000", "guard.stop=true", *two, *GUARD)
    stopped = train(asked, Console(file=said, width=400))
    assert 4 < stopped.last_step < 2000
    assert "guard: over-optimised at step 0" in said.getvalue()
    assert "training ends (guard.stop)" in said.getvalue()
    assert "over-optimised" in (run / "logs" / "guard.log").read_text()
    assert stop_flag(run).is_file(), "the same command again would go on"
    after = lines(run)
    assert [line["step"] for line in after[:4]] == [0, 2, 4, 6]
    assert after[:3] == before, "a look was made twice"
    held_out = read_events(run / "tensorboard" / "guard", "guard/held_out".__eq__)["guard/held_out"]
    assert [step for step, _ in held_out] == [line["step"] for line in after]
