"""The floor of a motion part as the motion of the base model's videos: ``floor: base``.

    first captions --one Ray task--> motion of a video each --driver--> mean, kept in config.yaml of the run

The number takes the place of ``base`` in the run's settings, so all that reads them finds a number. The noise of video
i is a function of (``seed``, i) alone.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice
from statistics import fmean

import torch
from rich.console import Console

from rlvid.collection import collection_paused
from rlvid.config import RunConfig
from rlvid.config.train import FLOOR_VIDEOS
from rlvid.data.training_set import TrainingSet
from rlvid.reward.motion import motion
from rlvid.train.job import Job
from rlvid.train.one_task import in_one_task
from rlvid.train.preflight import write_settings

_OF = "reward.mixture: floor = 'base'"


def floor_prompts(config: RunConfig, clips: TrainingSet) -> list[str]:
    """Returns a prompt for each video that the floor is measured on; none where there is no floor to measure.

    They are the first different captions of the training set, from the start again where there are fewer.

    Raises:
        ValueError: no caption can be read.
    """
    if not config.reward.floor_is_open:
        return []
    captions = clips.first_captions(FLOOR_VIDEOS)
    if not captions:
        raise ValueError(f"{_OF}: no caption can be read in {clips.places}; give a number such as floor=0.03")
    return list(islice(cycle(captions), FLOOR_VIDEOS))


def with_measured_floor(job: Job, prompts: Sequence[str], console: Console) -> Job:
    """Returns the job with the floor as a number, which is written into the run's settings.

    Three digits are kept, more than so few videos tell: what the console prints is what the run trains with.

    Args:
        job: of the run; its workers do not run yet.
        prompts: see ``floor_prompts``; without any, the job is returned as it is.
        console: prints the floor.

    Raises:
        ValueError: the videos do not move, or are not finite.
        RuntimeError: the task failed.
    """
    if not prompts:
        return job
    console.print(f"measures the motion of {len(prompts)} videos of the base model", highlight=False)
    mean = fmean(_on_ray(job, prompts))
    if not math.isfinite(mean):
        raise ValueError(
            f"{_OF}: videos of the base model have pixels that are not finite; set model.precision=float32, or floor "
            "to a number such as 0.03"
        )
    if mean == 0:
        raise ValueError(
            f"{_OF}: {len(prompts)} videos of the base model do not move, so there is no motion to hold; leave the "
            "part 'motion' out, or set floor to a number such as 0.03"
        )
    floor = float(f"{mean:.3g}")
    config = job.config.model_copy(update={"reward": job.config.reward.with_floor(floor)})
    write_settings(job.run, config)
    console.print(f"motion floor {floor:g}, of {len(prompts)} videos of the base model", highlight=False)
    return replace(job, config=config, reward=job.reward.with_floor(floor))


def _on_ray(job: Job, prompts: Sequence[str]) -> list[float]:
    return in_one_task(base_motion, job, prompts, setting=_OF, lost="killed or crashed")


def base_motion(job: Job, prompts: Sequence[str]) -> list[float]:
    """Returns the motion of a video of the base model for each prompt, in pixel values of [0, 1].

    The videos are those of the guard before the first step: of the run's seed, steps, guidance and negative prompt.

    Raises:
        ValueError: the model cannot be loaded, or its videos have one frame.
    """
    with collection_paused():
        from rlvid.data.embeddings import embedder_of  # in the task alone: they take seconds
        from rlvid.diffusion.generate import generate
        from rlvid.models.trained import load_trainable

    config, sampling = job.config, job.config.sampling
    model = load_trainable(
        config.model, config.seed, job.model, torch.device("cuda" if job.use_gpu else "cpu"),
        negative_prompt=sampling.negative_prompt, text=embedder_of(job.model, job.texts),
    )  # fmt: skip
    found = []
    for index, prompt in enumerate(prompts):  # one at a time: large videos fill the memory
        frames_BFCHW = generate(
            model, [prompt], seed=config.seed, first_index=index, steps=sampling.steps, guidance=sampling.guidance,
            final=sampling.final_level,
        )  # fmt: skip
        found.append(motion(frames_BFCHW).item())
    return found
