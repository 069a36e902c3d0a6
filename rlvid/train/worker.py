"""State of one training worker: model, method, engine, clips, logs."""

import logging
import math
import shutil
import time
from collections.abc import Generator
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import ray.train
import torch
from torch import distributed

from rlvid import randomness
from rlvid.algorithms.base import Batch, Context, Samples, Stopwatch, Update, peak_memory, summed
from rlvid.algorithms.catalogue import ALGORITHMS
from rlvid.cluster.reward_actor import ActorCaller
from rlvid.data.chunks import ArchiveFolder
from rlvid.data.embeddings import embedder_of
from rlvid.data.shares import Share
from rlvid.diffusion.generate import generate
from rlvid.models.text_rows import cut_rows, pad_rows
from rlvid.models.trained import load_trainable, load_trained
from rlvid.plots.video import GIF_SIDE, shrunk
from rlvid.reward.load import held_out_reward, trained_reward
from rlvid.runs.checkpoints import checkpoint_name, read_state
from rlvid.storage import worker_mirror
from rlvid.train.checkpoint import checkpoint_write_errors, load_checkpoint, save_checkpoint
from rlvid.train.engine import DeepSpeedEngine, StepOutcome
from rlvid.train.group import TorchWorkerGroup
from rlvid.train.guard_folder import stop_flag
from rlvid.train.handover import Handover
from rlvid.train.job import Job
from rlvid.train.metrics import TensorBoard, average, speeds
from rlvid.train.progress import end_requested
from rlvid.train.reporter import Reporter, newest_part
from rlvid.train.resume import carries_over
from rlvid.train.waits import Waits

log = logging.getLogger("rlvid.train")

MAX_SKIPPED = 5
"""Steps in a row without a finite loss, or without any reward, after which a run stops."""
EMBEDDINGS = 256
"""Embeddings of prompts that a worker keeps; 80 MB for ModelScopeT2V. Only runs without clips make any."""


class Worker:
    """One of W processes that train together; worker 0 also writes TensorBoard and reports the progress.

    Args:
        job: of the run.
        temporary: folder for this worker's temporary files.
        shares: the worker's rows of the feed, see ``rlvid.data.feed.rows``.
        checkpoint: folder of the checkpoint to resume from, if there is one.
        reporter: what the worker speaks with; default: one of its own.
    """

    def __init__(
        self,
        job: Job,
        temporary: Path,
        shares: Generator[dict[str, Any]],
        checkpoint: Path | None = None,
        reporter: Reporter | None = None,
    ) -> None:
        config, context = job.config, ray.train.get_context()
        self.temporary = temporary
        self.mirror = worker_mirror(job.storage, config.name, job.run, temporary)
        self.config, self.run, self.progress = config, self.mirror.folder, job.progress
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        own_log = newest_part(f"logs/worker-{self.rank:02d}.log", self.mirror.sizes() or ())
        self.mirror.pull(own_log.__eq__)
        self.reporter = reporter or Reporter(self.rank, self.progress, config.reward.timeout)
        self.reporter.log_to(self.run / own_log)
        self._rows, self._prompts = shares, job.prompts
        self._waits = Waits(self.reporter.warn, config.data.named, job.encodes)
        device = torch.device("cuda", torch.cuda.current_device()) if job.use_gpu else torch.device("cpu")

        spec = config.model
        self.model = load_trainable(
            spec, config.seed, job.model, device,
            negative_prompt=config.sampling.negative_prompt, text=embedder_of(job.model, job.texts),
        )  # fmt: skip
        self.network = self.model.denoiser
        self._load_weights_alone(checkpoint)
        self.engine = DeepSpeedEngine(self.network, config.optimizer, config.train, config.micro_batch, spec.precision)
        self.model.denoiser = self.engine.module
        self._embed = lru_cache(EMBEDDINGS)(self._embedding)
        self.stopwatch = Stopwatch(device)
        self.algorithm = ALGORITHMS[config.method.name](
            Context(
                config,
                self.model,
                trained_reward(job.reward, device, ActorCaller),
                held_out_reward(job.reward, device),
                self.stopwatch,
                TorchWorkerGroup(self.rank, self.world),
                self.reporter,
                job.measured_ceiling,
            )
        )
        self.problem: str | None = None
        self._watched, self._leaving = job.watched, set[str]()
        self.stopped = job.stop
        self._in_a_row, self._skipped, self._seconds, self._videos, self._lost = 0, 0, 0.0, 0, 0
        self.first_step = self._done = self._restore(checkpoint)
        # The first share: seconds of steps are a budget, and do not count the start of the feed.
        self._row = self._next_row() if self.first_step < config.train.steps else None
        self._began = time.perf_counter()
        if self.rank == 0:
            self.progress.start.remote(self.first_step)
        common = {
            "run": config.name, "algorithm": config.method.name, "config_hash": config.fingerprint,
            "seed": config.seed, "fps": self.model.fps, "model": spec.path,
        }  # fmt: skip
        place = ArchiveFolder(job.storage or str(job.run.parent), job.run.name)
        self.archive = Handover(job.archivist, place, self.first_step, common)
        self.tensorboard: TensorBoard | None = None
        if self.rank == 0:
            self.tensorboard = TensorBoard(self.run / "tensorboard", self.first_step, self.mirror.sizes() or ())

    def __enter__(self) -> "Worker":
        every = self.config.output.videos_every
        if every and self.first_step % every == 0:  # those of a resumed run's first step were purged with its scalars
            self._show_videos(self.first_step)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rows.close()
        if error is None:
            self.archive.commit()
        if self.tensorboard is not None:
            self.tensorboard.close()
        self.mirror.push()

    def fetch(self, step: int) -> Batch:
        """Returns this worker's share of the batch of ``step``: every W-th sample of it."""
        self.reporter.step = step
        with self.stopwatch.stage("data"):
            row, self._row = self._row or self._next_row(), None
            share, latents = Share.of(row, step, self.rank), None
            self._lost = len(share.lost)
            if share.posterior is not None:
                positions = [(serial,) for serial in share.serials]
                noise = randomness.normal(self.model.latent_shape, self.config.seed, "posterior", positions)
                latents = share.posterior.sample(noise).to(self.model.device)
            text = self._texts(share)
            if share.fault:
                self.reporter.report(f"{share.fault}; samples of its clips get no reward", kind=share.fault)
            if share.note:
                self.reporter.warn(share.note, kind=share.note)
            return Batch(step, share.serials, share.prompts, text.to(self.model.device), latents, share.lost)

    def _next_row(self) -> dict[str, Any] | None:
        with self._waits.waiting():
            return next(self._rows, None)

    def _embedding(self, prompt: str) -> torch.Tensor:
        """Embeds a prompt by itself, so that the result does not depend on its neighbours: (L, D), on the CPU."""
        with torch.no_grad():
            text_LD = self.model.encode_prompts([prompt])[0].float().cpu()
        return text_LD if self.model.text_length is None else cut_rows(text_LD)

    def _texts(self, share: Share) -> torch.Tensor:
        """Returns text_BLD of a share, at the length that the model reads."""
        rows = [*map(self._embed, share.prompts)] if share.text_BLD is None else [*share.text_BLD]
        return pad_rows(rows, self.model.text_length or len(rows[0]))

    def record(self, step: int, updates: list[Update], outcomes: list[StepOutcome], seconds: float) -> None:
        """Averages the step's numbers over workers, writes and reports them, and archives its samples.

        Sets ``problem`` on all workers alike when too many steps in a row were skipped as non-finite.
        """
        if self.rank == 0:
            self._waits.end_step(seconds)
        sums: dict[str, tuple[float, float]] = {"seconds/step": (seconds, 1.0)}
        for name, value in self.stopwatch.read().items():
            sums[f"seconds/{name}"] = (value, 1.0)
        loss = sum(float(update.loss.detach()) for update in updates) / max(1, len(outcomes))
        rewarded = sum(update.metrics.get("reward/weighted", (0.0, 0.0))[1] for update in updates)
        sums |= {"optimiser/loss": (loss, 1.0), "cost/videos": (rewarded, 1.0), "data/lost": (self._lost, 1.0)}
        guarded = self.config.guard.every > 0 and self.config.guard.stop
        flagged = guarded and stop_flag(self.run).is_file()
        asked_to_stop = self.rank == 0 and (flagged or end_requested(self.progress))
        sums["stop"] = (float(asked_to_stop), 1.0)  # summed with the rest, so that all workers stop at the same step
        values = average(summed([sums, *(update.metrics for update in updates)]))
        self.stopped = values.pop("stop") > 0
        skipped = sum(outcome.skipped for outcome in outcomes)
        self._skipped += skipped
        unrewarded = math.isnan(values["reward/weighted"])
        self._in_a_row = self._in_a_row + 1 if skipped or unrewarded else 0
        last = outcomes[-1]
        values |= {"optimiser/gradient_norm": last.gradient_norm, "optimiser/lr": last.lr}
        values["optimiser/skipped_steps"] = float(self._skipped)
        self._done = step + 1
        self._seconds += values["seconds/step"]  # the mean over workers, so that all of them end at the same step
        self._videos += round(values["cost/videos"] * self.world)
        values |= {"cost/videos": float(self._videos), "cost/seconds": self._seconds}
        values["data/lost"] = float(round(values["data/lost"] * self.world))
        values |= speeds(values, self.config.train.batch_size, not self.config.method.needs_gradient)
        values["cost/peak_memory_gib"] = peak_memory(self.model.device) / 2**30
        every = self.config.output.archive_every
        # Both hand over to others; TensorBoard shows what that took with the numbers of the next step.
        with self.stopwatch.stage("archive"):
            if every and step % every == 0:
                samples = Samples.join([update.samples for update in updates if update.samples])
                self.archive.write(step, samples, samples.held_out_B)
        with self.stopwatch.stage("tensorboard"):
            if self.tensorboard is not None:
                self.tensorboard.scalars(step, values)
        if self.tensorboard is not None:
            self._tell(step, values)
        if self.config.output.videos_every and (step + 1) % self.config.output.videos_every == 0:
            self._show_videos(step + 1)
        if self._in_a_row >= MAX_SKIPPED:
            self.problem = (
                f"{self._in_a_row} steps in a row had a non-finite loss or gradient (the last is step {step}); lower "
                "optimizer.lr or set model.precision=float32 under another name; the last checkpoint is untouched"
                if skipped
                else f"no video of {self._in_a_row} steps in a row got a reward (the last is step {step}): "
                f"{self.reporter.latest}; the full errors are in {self.run / 'logs'}"
            )

    def save(self, step: int) -> None:
        """Saves a checkpoint after ``step`` steps and reports it to Ray Train; every worker must call it."""
        # First what a run that resumes here will not write again: a kill after the report must not lose it.
        with self.stopwatch.stage("archive"):
            self.archive.commit()
        if self.tensorboard is not None:
            self.tensorboard.flush()
            self.mirror.turn([self.tensorboard])
        self.mirror.turn([self.reporter])
        self.mirror.push()
        train_state = {"step": step, "workers": self.world, "skipped": self._skipped, "seconds": self._seconds}
        train_state["videos"] = self._videos
        part = self.temporary / checkpoint_name(step)
        with checkpoint_write_errors(step, self.run):
            save_checkpoint(part, self.rank, train_state, self.config, self.engine, self.algorithm, self.network)
            ray.train.report(
                {"step": step},
                checkpoint=ray.train.Checkpoint.from_directory(str(part)),
                checkpoint_dir_name=part.name,
            )
            shutil.rmtree(part)

    def checkpoint_due(self, step: int) -> bool:
        """Returns whether a checkpoint follows ``step``."""
        last = step + 1 == self.config.train.steps or self.out_of_time or self.stopped
        return last or (step + 1) % self.config.output.checkpoint_every == 0

    def preempted(self) -> bool:
        """Returns whether a worker's node is newly announced to be taken away; every worker calls it after a step."""
        if not self._watched:
            return False
        info = ray.train.get_preemption_info()
        leaving = set(info.preempted_node_ids) - self._leaving if info else set()
        self._leaving |= leaving
        if leaving:
            log.warning("a node is about to be taken away (%s): saves a checkpoint now", ", ".join(sorted(leaving)))
        return bool(leaving)

    @property
    def out_of_time(self) -> bool:
        """Whether train.max_seconds is used up."""
        budget = self.config.train.max_seconds
        return budget is not None and used_up(self._seconds, self._done, budget)

    def summary(self) -> dict[str, Any]:
        """Returns the numbers of this worker since its start."""
        seconds = time.perf_counter() - self._began
        return {"first_step": self.first_step, "skipped": self._skipped, "seconds": seconds, "problem": self.problem}

    def _load_weights_alone(self, checkpoint: Path | None) -> None:
        """Loads the weights before the engine copies them, if the optimiser's state cannot be used."""
        if checkpoint and carries_over(read_state(checkpoint).settings, self.config) == "weights":
            load_trained(self.network, self.config.model, checkpoint)
            log.warning("the optimiser's moments start anew (train.resume=weights)")

    def _restore(self, checkpoint: Path | None) -> int:
        if checkpoint is None:
            return 0
        state = load_checkpoint(checkpoint, self.config, self.engine, self.algorithm)
        self._skipped, self._seconds, self._videos = state.skipped, state.seconds, state.videos
        log.info("continues after step %d", state.step)
        return state.step

    def _tell(self, step: int, values: dict[str, float]) -> None:
        done = step + 1 - self.first_step
        pace = (time.perf_counter() - self._began) / done
        latest = {"step": step + 1, "reward": values["reward/trained"], "seconds": values["seconds/step"]}
        left = pace * min(
            self.config.train.steps - step - 1,
            ((self.config.train.max_seconds or math.inf) - self._seconds) / max(1e-9, values["seconds/step"]),
        )
        latest |= {"elapsed": pace * done, "eta": max(0.0, left)}
        if "reward/held_out" in values:
            latest["held_out"] = values["reward/held_out"]
        self.progress.put.remote(latest)
        log.info("step %d %s", step, " ".join(f"{name}={value:.6g}" for name, value in values.items()))

    def _show_videos(self, step: int) -> None:
        """Fixed prompts, the same noise each time; the workers share the work, and all of them take part."""
        wanted = self._prompts
        share = -(-len(wanted) // self.world)
        mine = [wanted[(self.rank * share + i) % len(wanted)] for i in range(share)]
        sampling = self.config.sampling
        frames = generate(
            self.model,
            mine,
            seed=self.config.seed,
            steps=sampling.steps,
            guidance=sampling.guidance,
            final=sampling.final_level,
            batch=self.config.micro_batch,
            first_index=self.rank * share,
        )
        gathered: list[Any] = [None] * self.world
        distributed.all_gather_object(gathered, shrunk(frames, GIF_SIDE))
        if self.tensorboard is not None:
            for prompt, clip in zip(wanted, torch.cat(gathered), strict=False):
                self.tensorboard.video(step, f"videos/{prompt}", clip, self.model.fps)
            self.tensorboard.flush()


def used_up(seconds: float, steps: int, budget: float) -> bool:
    """Returns whether ``steps`` that took ``seconds`` are nearer to ``budget`` than one step more."""
    return steps > 0 and seconds + seconds / steps / 2 >= budget
