"""A worker's belongings: model, method, engine, clips, and where it writes what it sees."""

import logging
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
import ray.train
import torch
from torch import distributed

from rlvid import randomness
from rlvid.algorithms.base import Algorithm, Batch, Context, Samples, Stopwatch, Update, totals
from rlvid.algorithms.instructvideo import InstructVideo
from rlvid.config import RunConfig
from rlvid.data.archive import ArchiveWriter, trim
from rlvid.data.clips import EncodedClips, clip_index
from rlvid.evaluate.generate import generate
from rlvid.models.lora import inject_lora
from rlvid.models.unet3d import load_model
from rlvid.reward.clip import load_reward
from rlvid.train.checkpoint import checkpoint_name, load_checkpoint, save_checkpoint
from rlvid.train.engine import DeepSpeedEngine, StepOutcome
from rlvid.train.metrics import TensorBoard, average

log = logging.getLogger("rlvid.train")

ALGORITHMS: dict[str, type[Algorithm]] = {"instructvideo": InstructVideo}


class Worker:
    """One of W processes that train together; worker 0 also writes TensorBoard and tells the progress.

    Args:
        config: the run's.
        job: ``clips`` (folder of encoded clips), ``run`` (the run's folder), ``use_gpu``, ``board`` (progress), and
            ``model`` (absolute path of the model, since Ray Train moves its workers to another folder; default: the
            config's).
    """

    def __init__(self, config: RunConfig, job: dict[str, Any]) -> None:
        context = ray.train.get_context()
        self.config, self.run, self.board = config, Path(job["run"]), job["board"]
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        _log_to(self.run / "logs" / f"worker-{self.rank:02d}.log")
        device = torch.device("cuda", torch.cuda.current_device()) if job["use_gpu"] else torch.device("cpu")

        spec = config.model
        path = job.get("model", spec.path)
        self.model = load_model(path, frames=spec.frames, size=spec.size, precision=spec.precision, device=device)
        self.network = self.model.denoiser
        inject_lora(self.network, spec.lora.rank, spec.lora.targets, config.seed)
        self.engine = DeepSpeedEngine(self.network, config.optimizer, config.train, config.micro_batch, spec.precision)
        self.model.denoiser = self.engine.module
        self.stopwatch = Stopwatch(device)
        held_out = load_reward(config.reward.held_out, device) if config.reward.held_out else None
        self.algorithm = ALGORITHMS[config.method.name](
            Context(config, self.model, load_reward(config.reward.name, device), held_out, self.stopwatch)
        )
        self.clips = EncodedClips.open(job["clips"])
        self.problem: str | None = None
        self._in_a_row, self._skipped = 0, 0
        self.first_step, self._began = self._restore(), time.perf_counter()
        if self.rank == 0:
            trim(self.run / "archive", self.first_step)
        distributed.barrier()  # nobody writes to the archive before it is tidy

        name, fingerprint, seed = config.method.name, config.fingerprint, config.seed
        self.archive = ArchiveWriter(
            self.run / "archive", config.name, name, fingerprint, seed, self.model.fps, spec.path
        )
        self.board_writer = TensorBoard(self.run / "tensorboard", self.first_step) if self.rank == 0 else None

    def __enter__(self) -> "Worker":
        every = self.config.output.videos_every
        if every and self.first_step % every == 0:  # those of a resumed run's first step were purged with its scalars
            self._show_videos(self.first_step)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.archive.close()
        if self.board_writer is not None:
            self.board_writer.close()

    def fetch(self, step: int) -> Batch:
        """This worker's share of the batch of ``step``: every W-th sample of it."""
        with self.stopwatch.stage("data"):
            size, seed = self.config.train.batch_size, self.config.seed
            serials = list(range(step * size + self.rank, (step + 1) * size, self.world))
            clips = [clip_index(serial, len(self.clips), seed) for serial in serials]
            prompts, text_BLD, posterior = self.clips.fetch(clips)
            noise = randomness.normal(self.model.latent_shape, seed, "posterior", [(serial,) for serial in serials])
            latents = posterior.sample(noise).to(self.model.device)
            return Batch(step, serials, prompts, text_BLD.to(self.model.device), latents, size)

    def record(self, step: int, updates: list[Update], outcomes: list[StepOutcome], seconds: float) -> None:
        """Averages the step's numbers over workers, writes and tells them, and archives its samples.

        Sets ``problem`` on all workers alike when too many steps in a row were skipped as non-finite.
        """
        skipped = sum(outcome.skipped for outcome in outcomes)
        self._skipped += skipped
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        sums: dict[str, tuple[float, float]] = {"seconds/step": (seconds, 1.0)}
        for name, value in self.stopwatch.read().items():
            sums[f"seconds/{name}"] = (value, 1.0)
        for update in updates:
            for name, (total, count) in (
                update.metrics | totals(**{"optimiser/loss": update.loss * len(updates)})
            ).items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = (before[0] + total, before[1] + count)
        values = average(sums)
        last = outcomes[-1]
        values |= {"optimiser/gradient_norm": last.gradient_norm, "optimiser/lr": last.lr}
        values["optimiser/skipped_steps"] = float(self._skipped)
        every = self.config.output.archive_every
        if every and step % every == 0 and (samples := _joined([u.samples for u in updates if u.samples])):
            self.archive.write(step, self.rank, samples, samples.held_out_B)
        if self.board_writer is not None:
            self.board_writer.scalars(step, values)
            self._tell(step, values)
        if self.config.output.videos_every and (step + 1) % self.config.output.videos_every == 0:
            self._show_videos(step + 1)
        if self._in_a_row >= self.config.train.max_skipped:
            self.problem = (
                f"{self._in_a_row} steps in a row had a non-finite loss or gradient (the last is step {step}); lower "
                "optimizer.lr or set model.precision=float32 under another name; the last checkpoint is untouched"
            )

    def save(self, step: int) -> None:
        """A checkpoint after ``step`` steps, kept by Ray Train; every worker takes part."""
        # First what a run that resumes here will not write again: a kill after the report must not lose it.
        self.archive.flush()
        if self.board_writer is not None:
            self.board_writer.flush()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            counts = {"step": step, "workers": self.world, "skipped": self._skipped}
            save_checkpoint(folder, self.rank, counts, self.config, self.engine, self.algorithm, self.network)
            ray.train.report(
                {"step": step},
                checkpoint=ray.train.Checkpoint.from_directory(name),
                checkpoint_dir_name=checkpoint_name(step),
            )

    def checkpoint_due(self, step: int) -> bool:
        """Whether a checkpoint follows ``step``."""
        return (step + 1) % self.config.output.checkpoint_every == 0 or step + 1 == self.config.train.steps

    def summary(self) -> dict[str, Any]:
        """What this worker did since it started."""
        seconds = time.perf_counter() - self._began
        return {"first_step": self.first_step, "skipped": self._skipped, "seconds": seconds, "problem": self.problem}

    def _restore(self) -> int:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return 0
        with checkpoint.as_directory() as folder:
            counts = load_checkpoint(Path(folder), self.config, self.engine, self.algorithm, self.world)
            distributed.barrier()  # nobody leaves while another still reads
        step, self._skipped = counts["step"], counts["skipped"]
        log.info("continues after step %d", step)
        return step

    def _tell(self, step: int, values: dict[str, float]) -> None:
        done = step + 1 - self.first_step
        pace = (time.perf_counter() - self._began) / done
        news = {"step": step + 1, "reward": values["reward/trained"], "seconds": values["seconds/step"]}
        news |= {"elapsed": pace * done, "eta": pace * (self.config.train.steps - step - 1)}
        if "reward/held_out" in values:
            news["held_out"] = values["reward/held_out"]
        self.board.put.remote(news)
        log.info("step %d %s", step, " ".join(f"{name}={value:.6g}" for name, value in values.items()))

    def _show_videos(self, step: int) -> None:
        """Fixed prompts, the same noise each time; the workers share the work, and all of them take part."""
        wanted = list(dict.fromkeys(self.clips.captions))[: self.config.output.video_prompts]
        share = -(-len(wanted) // self.world)
        mine = [wanted[(self.rank * share + i) % len(wanted)] for i in range(share)]
        sampling = self.config.sampling
        frames = generate(
            self.model,
            mine,
            seed=self.config.seed,
            steps=sampling.steps,
            guidance=sampling.guidance,
            final=sampling.final,
            first_index=self.rank * share,
        )
        gathered: list[Any] = [None] * self.world
        distributed.all_gather_object(gathered, frames)
        if self.board_writer is not None:
            for prompt, clip in zip(wanted, torch.cat(gathered), strict=False):
                self.board_writer.video(step, f"videos/{prompt}", clip, self.model.fps)
            self.board_writer.flush()


def _joined(parts: list[Samples]) -> Samples | None:
    if not parts:
        return None
    return Samples(
        [serial for part in parts for serial in part.serials],
        [prompt for part in parts for prompt in part.prompts],
        torch.cat([part.frames_BSCHW for part in parts]),
        torch.cat([part.frames_BS for part in parts]),
        torch.cat([part.scores_BS for part in parts]),
        torch.cat([part.reward_B for part in parts]),
        None if parts[0].held_out_B is None else torch.cat([p.held_out_B for p in parts if p.held_out_B is not None]),
    )


def _log_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    logging.getLogger("rlvid").setLevel(logging.INFO)
