"""A run that measures the floor of its motion part: it keeps the number, and reads it when it resumes."""

import io
from pathlib import Path

import pytest
from rich.console import Console
from runs import QUIET, adapter, config, difference

from rlvid.data.sources import training_set
from rlvid.diffusion.generate import generate
from rlvid.models.trained import load_trainable
from rlvid.reward.motion import motion
from rlvid.runs.checkpoints import read_settings, read_state
from rlvid.train.launch import train

SETTINGS = (
    "method=draft", "reward.name=mixture", "reward.mixture=[{name: brightness}, {name: motion, floor: base}]",
    "reward.held_out=null", "train.zero_stage=0", "output.archive_every=0", "output.checkpoint_every=1",
)  # fmt: skip


def said() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_measures_its_floor_once_and_reads_it_when_it_resumes(folder: Path) -> None:
    first, then = said(), said()
    run = config(folder, "held", *SETTINGS, "train.workers=1", "train.steps=1")
    done = train(run, first)
    captions = list(training_set(run, QUIET).first_captions(8))
    prompts = (captions * 8)[:8]
    model = load_trainable(run.model, run.seed, run.model.path)
    frames = generate(model, prompts, seed=run.seed, steps=4, guidance=run.sampling.guidance)
    settings = read_settings(done.folder)
    found = settings.reward.measured_floor
    assert found == pytest.approx(float(motion(frames).double().mean()), rel=0.006), "three digits are kept"
    line = f"motion floor {found:g}, of 8 videos of the base model\n"
    assert first.file.getvalue().count(line) == 1  # type: ignore[attr-defined]
    assert read_state(done.checkpoint).settings == settings

    longer = config(folder, "held", *SETTINGS, "train.workers=1", "train.steps=2")
    again = train(longer, then)
    assert (again.first_step, again.last_step) == (1, 2)
    assert read_settings(again.folder).reward == read_state(again.checkpoint).settings.reward == settings.reward
    assert "floor" not in then.file.getvalue()  # type: ignore[attr-defined]
    assert difference(adapter(again.folder, 1), adapter(again.folder, 2)) > 0
    with pytest.raises(ValueError, match=r"another config \(reward\.mixture: "):
        train(longer.model_copy(update={"reward": longer.reward.with_floor(2 * found)}), QUIET)
