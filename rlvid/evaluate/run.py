"""Evaluating a run's folder: base against fine-tuned, as tables and as pictures beside the run."""

import logging
import math
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlvid.config import RunConfig
from rlvid.diffusion.generate import generate
from rlvid.models.lora import lora_scale
from rlvid.models.trained import blend, load_trainable, load_trained
from rlvid.models.unet3d import UNet3DModel
from rlvid.plots.pictures import before_after, reward_curve
from rlvid.reward.load import trained_reward
from rlvid.reward.video import mean_of_frames
from rlvid.runs.scalars import read_scalars
from rlvid.storage import is_uri, run_mirror, split_uri
from rlvid.train.checkpoint import Found, find_checkpoints, flaw, step_of
from rlvid.train.looks import find_best
from rlvid.train.record import read_settings

log = logging.getLogger("rlvid.evaluate")

_CURVES = {"reward/trained": "trained reward", "reward/held_out": "held-out reward"}


@dataclass
class TunedModel:
    """A run's model that can be the base and the tuned model in turn.

    ``base`` holds the denoiser's first weights, on the CPU, where all of them were trained.
    """

    config: RunConfig
    checkpoint: Found
    model: UNet3DModel
    base: dict[str, Tensor] | None = None

    def use(self, scale: float) -> UNet3DModel:
        """The model at a scale: 0 is the base, 1 the fine-tuned model; between them part of what was learned."""
        if self.base is None:
            lora_scale(self.model.denoiser, scale)
        else:
            blend(self.model.denoiser, self.base, self.checkpoint.folder, scale)
        return self.model


def find_run(run: str | Path, step: int | None = None) -> tuple[RunConfig, Found]:
    """A run's settings and one of its checkpoints, the latest by default.

    Args:
        run: see ``find_checkpoints_of``.
        step: of the checkpoint.

    Raises:
        ValueError: no such run, or no such checkpoint in it, or the store cannot be reached.
    """
    config, found = find_checkpoints_of(run)
    return config, choose(found, step)


def choose(found: list[Found], step: int | None) -> Found:
    """The checkpoint of a step, or the newest one, out of those of a run; its trained weights are as they were written.

    Newer ones that are damaged are passed over, and named in the log.

    Raises:
        ValueError: there is none of that step, or it is damaged.
    """
    run = found[-1].folder.parent
    if step is None:
        return _newest(run, found)
    chosen = next((c for c in found if c.step == step), None)
    if chosen is None:
        steps = ", ".join(str(c.step) for c in found)
        raise ValueError(f"run {run}: no checkpoint of step {step}; it has: {steps}")
    check_whole(chosen)
    return chosen


def check_whole(found: Found) -> None:
    """Raises ValueError where what evaluation needs of a checkpoint is not as it was written."""
    if why := flaw(found.folder, resumable=False, read=True):
        raise ValueError(f"checkpoint {found.folder} is damaged ({why}); name another step, or train the run again")


def _newest(run: Path, found: list[Found]) -> Found:
    """The newest whole checkpoint; newer folders of checkpoints that are not whole are named in the log."""
    known = {each.folder: each for each in found}
    other = [Found(folder, step) for folder in run.iterdir() if (step := step_of(folder.name)) and folder not in known]
    passed = list[str]()
    for each in sorted([*found, *other], key=lambda each: each.step, reverse=True):
        why = flaw(each.folder, resumable=False, read=True)
        if why is None:
            for line in passed:
                log.error("%s; step %d is used", line, each.step)
            return each
        passed.append(f"checkpoint {each.folder} is not whole ({why})")
    raise ValueError(f"{passed[0]}, and there is no other; train the run again")


def find_checkpoints_of(run: str | Path) -> tuple[RunConfig, list[Found]]:
    """A run's settings and all of its checkpoints, oldest first, with the guard's best where training deleted it.

    Args:
        run: the run's folder, or the name of one under ``runs``, or the run's URI; what it holds of the model is
            fetched then.

    Raises:
        ValueError: no such run, or no checkpoint in it, or the store cannot be reached.
    """
    if is_uri(run):
        run = run_mirror(*split_uri(run)).folder
    folder = run_folder_of(run)
    if folder is None:
        raise ValueError(_no_run(str(run)))
    config = read_settings(folder)
    kept, best = find_checkpoints(folder, resumable=False), find_best(folder)
    found = sorted([*kept, *([best] if best and best.step not in {c.step for c in kept} else [])], key=lambda c: c.step)
    if not found:
        broken = {p.name: flaw(p, resumable=False) for p in sorted(folder.iterdir()) if step_of(p.name) is not None}
        if broken:
            each = ", ".join(f"{name}: {why}" for name, why in broken.items())
            raise ValueError(f"run {folder}: no checkpoint is whole ({each}); start the run's `rlvid train` again")
        raise ValueError(
            f"run {folder}: no checkpoint; it has: none yet, and one is written every {config.output.checkpoint_every} "
            "steps (output.checkpoint_every) and at the end; wait for it, or start the run's `rlvid train` again"
        )
    return config, found


def _no_run(run: str) -> str:
    """Why a run is not found, and what to name instead."""
    known = ", ".join(sorted(p.parent.name for p in Path("runs").glob("*/config.yaml"))) or "none"
    there = next((p for p in (Path(run), Path("runs") / run) if p.is_dir()), None)
    if there is None:
        return f"run {run!r}: no such folder, and no such run under runs (there: {known})"
    if (there / "model_index.json").is_file():
        what = "is a model, as `rlvid export` writes one, and no run; name the run that it is of"
        setting = shlex.quote(f"model.path={there}")
        return f"run {run!r}: {what} (under runs there are: {known}), or train from it with {setting}"
    what = "is no run, for it has no config.yaml; name a folder that `rlvid train` wrote"
    return f"run {run!r}: {what}, or a name under runs (there: {known})"


def run_folder_of(run: str | Path) -> Path | None:
    """The folder of a run by its path or by its name under ``runs``; None where there is none."""
    return next((p for p in (Path(run), Path("runs") / run) if (p / "config.yaml").is_file()), None)


def load_run(run: str | Path, step: int | None = None) -> TunedModel:
    """Loads a run's model with what was trained of it; see ``find_run``.

    Raises:
        ValueError: no such run, or no such checkpoint in it; or what it holds does not fit the model.
    """
    return load_found(*find_run(run, step))


def load_found(config: RunConfig, found: Found) -> TunedModel:
    """Loads the model of what ``find_run`` found.

    Raises:
        ValueError: what the checkpoint holds does not fit the model.
    """
    model = load_trainable(config.model, config.seed, config.model.path, device())
    base = None
    if config.model.train == "full":
        base = {name: tensor.cpu().clone() for name, tensor in model.denoiser.state_dict().items()}
    load_trained(model.denoiser, config.model, found.folder)
    return TunedModel(config, found, model, base)


def device() -> torch.device:
    """Where evaluation runs: the GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def scale_name(method: str, scale: float) -> str:
    """How tables call a model that has ``scale`` of what was learned."""
    return method if scale == 1 else f"{method} × {scale:g}"


def picture_before_after(tuned: TunedModel, prompts: list[str], path: Path, seed: int = 0) -> None:
    """Writes a strip of the prompts' videos from the base and from the tuned model, with the trained reward below."""
    sampling, reward = tuned.config.sampling, trained_reward(tuned.config.reward, device())
    how = {"seed": seed, "steps": sampling.steps, "guidance": sampling.guidance, "final": sampling.final}
    videos = [generate(tuned.use(scale), prompts, **how) for scale in (0.0, 1.0)]
    scores = [mean_of_frames(reward(frames, prompts)) for frames in videos]
    before_after(path, prompts, *videos, *scores)


def picture_reward_curve(run: Path, path: Path) -> None:
    """Writes the trained and the held-out reward of a run's TensorBoard events against its steps."""
    scalars = read_scalars(run / "tensorboard", _CURVES.__contains__)
    found = {label: scalars[tag] for tag, label in _CURVES.items() if tag in scalars}
    steps = sorted({step for values in found.values() for step in values})
    reward_curve(path, steps, {name: [values.get(s, math.nan) for s in steps] for name, values in found.items()})
