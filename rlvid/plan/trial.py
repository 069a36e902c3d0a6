"""Seconds and memory of a step on this machine, measured: the method itself runs, without Ray and DeepSpeed."""

import itertools
import math
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from rlvid.algorithms.base import Context, Observer, Stopwatch, peak_memory
from rlvid.algorithms.catalogue import ALGORITHMS
from rlvid.config import RunConfig, parse_config
from rlvid.config.reward_names import PUBLISHED
from rlvid.models.folders import is_text_apart, model_folder, random_structure
from rlvid.models.trained import load_trainable
from rlvid.plan.counts import drawn_batch, drawn_cuts
from rlvid.plan.parts import Parts
from rlvid.reward.load import held_out_reward, trained_reward

_ROUNDS, _LONG = 4, 30.0
"""Most rounds, the first of which warms up; and the seconds of timed rounds after which no further one begins."""


@dataclass(frozen=True)
class Trial:
    """What a worker of a run would take here.

    Attributes:
        device: ``cuda`` or ``cpu``.
        threads: of torch on the CPU.
        random: settings whose weights are not on this machine; random ones stood in for them.
        stages: stage -> seconds of a worker in a step; the names are those of ``seconds/`` in TensorBoard.
        memory: bytes: on a GPU the peak of tensors; else the growth of this process from before the model was loaded
            to its peak. None where the videos of several workers were in one process.
    """

    device: str
    threads: int
    random: tuple[str, ...]
    stages: dict[str, float]
    memory: int | None

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.stages.values())


class _Failures(Observer):
    """Collects the reports of rewards that failed."""

    def __init__(self) -> None:
        self.lines = list[str]()

    def report(self, line: str) -> None:
        """Adds a report; scores that are not finite take as long as others, and are no failure here."""
        if "NaN or infinity" not in line:
            self.lines.append(line)


def run_trial(config: RunConfig, parts: Parts) -> Trial:
    """Runs one worker's part of a step a few times, and takes the medians.

    Methods that back-propagate the reward run on one micro-batch, whose seconds are multiplied; the others, which
    compare the videos of a batch, on the batch of all workers, whose seconds are divided. Latents are random. So are
    weights that are not on this machine, and embeddings where the text encoder does not stay beside training: numbers
    change neither time nor memory.

    Args:
        config: of the run.
        parts: its networks, as ``rlvid.plan.parts.outline_parts`` finds them.

    Raises:
        ValueError: weights are missing, and nothing can stand in for them; or the reward fails.
    """
    config, stand_ins = _with_stand_ins(config)
    on_gpu = config.train.use_gpu is not False and torch.cuda.is_available()
    device, threads = torch.device("cuda" if on_gpu else "cpu"), max(1, int(config.train.cpus_per_worker))
    before = 0 if on_gpu else peak_memory(device)
    videos = config.micro_batch if config.method.needs_gradient else config.train.batch_size
    one = {"workers": 1, "batch_size": videos, "micro_batch": config.micro_batch}
    alone = config.model_copy(update={"train": config.train.model_copy(update=one)})
    with _threads(threads):
        seen = list(itertools.islice(_rounds(alone, parts, device, config.train.workers), _ROUNDS))
    share = config.train.batch_size / config.train.workers / videos
    shares = {name: 1.0 if name == "sync" else share for name in seen[0]}  # the optimiser's steps are a batch's
    stages = {name: each * statistics.median(times[name] for times in seen[1:]) for name, each in shares.items()}
    memory = peak_memory(device) - before if config.method.needs_gradient or config.train.workers == 1 else None
    return Trial(device.type, threads, tuple(stand_ins), stages, memory)


def _rounds(config: RunConfig, parts: Parts, device: torch.device, workers: int) -> Iterator[dict[str, float]]:
    """Yields the seconds of each stage: of a first round, which is slower, and of timed ones."""
    path = config.model.path
    model = load_trainable(
        config.model, config.seed, path, device,
        negative_prompt=config.sampling.negative_prompt, text=not is_text_apart(path),
    )  # fmt: skip
    watch, until, observer = Stopwatch(device), None, _Failures()
    context = Context(
        config, model, trained_reward(config.reward, device), held_out_reward(config.reward, device), watch,
        observer=observer, measured_ceiling=math.inf,
    )  # fmt: skip
    algorithm = ALGORITHMS[config.method.name](context)
    trained = [each for each in model.denoiser.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)
    text_1LD = None
    if is_text_apart(path):
        model.negative_1LD, text_1LD = (torch.randn(1, *parts.text_shape).to(device) for _ in range(2))
    for step in _typical_steps(config, len(context.grid)):
        batch = drawn_batch(config, model, step, workers, text_1LD)
        for update in algorithm.updates(batch):
            with watch.stage("backward"):
                update.loss.backward()
            if update.step:
                with watch.stage("sync"):
                    norm = torch.nn.utils.clip_grad_norm_(trained, config.optimizer.clip_norm or math.inf)
                    if norm.isfinite():
                        optimizer.step()
                    optimizer.zero_grad()
        if observer.lines:
            raise ValueError(f"a step was not measured: {observer.lines[0]}")
        yield watch.read()
        if until is None:
            until = time.perf_counter() + _LONG
        elif time.perf_counter() > until:
            return


def _typical_steps(config: RunConfig, length: int) -> Iterable[int]:
    """Returns numbers of steps; where a method draws a step's share of a chain of ``length``, the most usual first."""
    cuts = drawn_cuts(config, length)
    if not cuts:
        return itertools.count()
    mean = statistics.fmean(cuts.values())
    return sorted(cuts, key=lambda step: abs(cuts[step] - mean))


def _with_stand_ins(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """Returns the run with random weights where its own are not on this machine, and the settings that this changed."""
    found, changed = config.model_dump(), list[str]()
    try:
        model_folder(config.model.path)
    except ValueError:
        structure = random_structure(config.model.path)
        if structure is None:
            raise
        found["model"]["path"] = structure
        changed.append("model.path")
    reward = found["reward"]
    places = [(reward, "name", "path", "reward.path"), (reward, "held_out", "held_out_path", "reward.held_out_path")]
    places += [(part, "name", "path", f"reward.mixture.{n}.path") for n, part in enumerate(reward.get("mixture") or ())]
    for section, name, path, key in places:
        where = section.get(path)
        if section.get(name) in PUBLISHED and where and not Path(where).expanduser().exists() and where != "random":
            section[path] = "random"
            changed.append(key)
    config = parse_config(found) if changed else config
    # Any floor stands in for the one that a run measures.
    return config.model_copy(update={"reward": config.reward.with_floor(1.0)}), changed


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
