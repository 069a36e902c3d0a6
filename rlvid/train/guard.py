"""The guard: checkpoints are looked at beside training, by an actor of its own, and training never waits for it.

The driver's thread watches the run's folder. A checkpoint that is due is copied (or it might be deleted before its
turn), handed to an actor that makes and scores the fixed videos, noted in ``guard.jsonl``, and judged with all looks
before it (``rlvid.runs.over_optimisation``). A resumed run makes up for missing
looks. Its files are listed in ``rlvid.train.guard_folder``.
"""

import logging
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from rich.console import Console
from safetensors import SafetensorError

from rlvid.cluster.nodes import Shape, guard_gpus, worker_gpus
from rlvid.config import RunConfig
from rlvid.data.clips import EncodedClips
from rlvid.metric_names import metric_of
from rlvid.models.folders import movable
from rlvid.plots.curves import draw_rewards
from rlvid.runs.checkpoints import checkpoint_name
from rlvid.runs.guard_log import GuardEvaluation, best_step, read_means
from rlvid.runs.over_optimisation import COLLAPSE, HELD_OUT, TOLERANCE, TRAINED, Verdict
from rlvid.terminal import short
from rlvid.train.guard_evaluator import GuardEvaluator
from rlvid.train.guard_folder import GuardLog, guard_prompts
from rlvid.train.metrics import TensorBoard

log = logging.getLogger("rlvid.guard")

SHOWN = (TRAINED, *TOLERANCE, "oracle_score")
_PAUSE = 1.0
"""Seconds between two glances at the run's folder."""
_START = 180.0
"""Seconds that the actor may take to start once training has ended and left the cluster to it."""


def check_room(config: RunConfig, use_gpu: bool, nodes: list[tuple[Shape, float]]) -> None:
    """Whether the cluster has room for the guard beside the workers, or it would wait for ever.

    Args:
        config: the run's.
        use_gpu: whether workers have GPUs.
        nodes: (resources, how many of that shape), as of ``rlvid.cluster.nodes.nodes_possible``.

    Raises:
        ValueError: it has not.
    """
    if not config.guard.every:
        return
    have = sum(shape.get("GPU", 0) * count for shape, count in nodes)
    gpus = guard_gpus(config, use_gpu)
    free = have - (config.train.workers * worker_gpus(config) if use_gpu else 0)
    if gpus > free + 1e-9:
        raise ValueError(
            f"guard.gpus = {gpus:g}: the cluster has {have:g} GPUs, and the workers leave "
            f"{max(0, free):g}; set guard.gpus=0.3 to share a worker's, guard.gpus=0 for the CPU, or guard.every=0"
        )


class Watch:
    """Looks at a run's checkpoints while its block runs, and at those that are left when it ends.

    Args:
        config: the run's; ``guard.every`` above 0.
        folder: the run's.
        clips: folder of its encoded clips.
        use_gpu: whether the workers have GPUs.
        console: where warnings are printed.

    Raises:
        ValueError: see ``guard_prompts`` and ``GuardLog``.
    """

    def __init__(self, config: RunConfig, folder: Path, clips: Path, use_gpu: bool, console: Console):
        self.config, self.folder, self.console = config, folder, console
        prompts = guard_prompts(config, EncodedClips.open(clips).captions)
        self.looks = GuardLog(folder, prompts, config)
        self.verdict = self.looks.verdict() if self.looks.all else Verdict(0)
        self.stopping = self.looks.flag(self.verdict)
        self._told = set[str]()
        self._job = (config.model_dump(), movable(config.model.path), config.reward.resolved().model_dump(), prompts)
        self._gpus = guard_gpus(config, use_gpu)
        self._tensorboard: TensorBoard | None = None
        self._actor: Any = None
        self._there: Any = None
        self._ended, self._given_up = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="guard", daemon=True)

    def __enter__(self) -> "Watch":
        (self.folder / "logs").mkdir(exist_ok=True)
        handler = logging.FileHandler(self.folder / "logs" / "guard.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
        log.propagate = False
        log.setLevel(logging.INFO)
        if self.stopping:
            self._say("it warned before, so training does not go on; guard.stop=false lets it")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._given_up.set()
        self._ended.set()
        try:
            self._thread.join(timeout=5)
            if self._thread.is_alive() and error is None:
                self._say("training has ended, its last checkpoints are looked at")
            self._thread.join()  # an interrupt ends it
        finally:
            self._given_up.set()
            if self._actor is not None:
                ray.kill(self._actor)
            for handler in list(log.handlers):
                log.removeHandler(handler)
                handler.close()
        if error is None and self.looks.all:
            draw(self.folder, self.verdict, self.looks)
            self._say(self._summary())

    def _run(self) -> None:
        try:
            self._watch()
        except (ray.exceptions.RayError, OSError, ValueError, SafetensorError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            log.exception("no more looks")
            self._say(f"no more looks in this start, training goes on: {lines[-1]}")
        finally:
            if self._tensorboard is not None:
                self._tensorboard.close()

    def _watch(self) -> None:
        if self.looks.all:  # what an earlier start was killed before it could tell or keep
            self._follow(self.looks.all[-1].step)
        else:
            self._look(0)
        while not self._given_up.is_set():
            ended = self._ended.is_set()  # asked before the folder is read: what came before the end is seen
            waiting = self.looks.stage(last=ended)
            if waiting:
                self._look(waiting[0])
            elif ended:
                return
            else:
                self._ended.wait(_PAUSE)

    def _look(self, step: int) -> None:
        """One look from beginning to end; noted before anything follows from it, so that it is never made twice."""
        actor = self._actor = self._actor or self._start()
        values = self._wait_for(actor.look.remote(str(self.looks.pending / checkpoint_name(step)) if step else None))
        if values is None:
            return
        self.looks.add(GuardEvaluation(step, values))
        self._follow(step)

    def _follow(self, step: int) -> None:
        """What follows from the looks, the last of them at ``step``."""
        self.verdict = verdict = self.looks.verdict()
        self.looks.settle(verdict)
        self._tell(step, verdict)
        self.stopping = self.looks.flag(verdict)

    def _start(self) -> Any:
        threads = {"env_vars": {"OMP_NUM_THREADS": "1"}}
        again = self.config.train.max_failures
        options = {"num_cpus": 0, "num_gpus": self._gpus, "max_restarts": again, "max_task_retries": again}
        # DEFAULT: not in the placement group of a trial, which has no room for it.
        made = ray.remote(GuardEvaluator).options(**options, scheduling_strategy="DEFAULT", runtime_env=threads)
        actor = made.remote(*self._job, self._gpus > 0, aside=not self._gpus)
        self._there = actor.__ray_ready__.remote()  # before any look: an actor does one thing after the other
        return actor

    def _wait_for(self, reference: Any) -> Any:
        """The result of a look; copies checkpoints meanwhile. None when the guard is given up."""
        waited = 0.0
        while not self._given_up.is_set():
            done, _ = ray.wait([reference], timeout=_PAUSE)
            if done:
                return ray.get(reference)
            self.looks.stage(last=False)
            begun = bool(ray.wait([self._there], timeout=0)[0])
            waited += _PAUSE if self._ended.is_set() and not begun else 0
            if waited > _START:
                raise ValueError(f"its actor found no room in the cluster for {_START:.0f} s after training")
        return None

    def _tell(self, step: int, verdict: Verdict) -> None:
        """To TensorBoard, to the log, and what is new also to the console."""
        look = self.looks.all[-1]
        if self._tensorboard is None:
            self._tensorboard = TensorBoard(self.folder / "tensorboard" / "guard", step)
        values = {f"guard/{metric}": look.mean(metric) for metric in SHOWN if math.isfinite(look.mean(metric))}
        values |= {"guard/over_optimised": float(verdict.over_optimised)}
        values |= {"guard/collapsed": float(COLLAPSE in verdict.warnings)}
        values |= {"guard/best_step": float(self.looks.all[verdict.best].step)}
        self._tensorboard.scalars(step, values)
        log.info("step %d %s", step, " ".join(f"{name}={value:.6g}" for name, value in values.items()))
        for metric, loss in verdict.warnings.items():
            if metric not in self._told:
                self._told.add(metric)
                line = self.looks.describe(loss)
                if metric in (HELD_OUT, COLLAPSE):
                    best = self.looks.all[verdict.best].step
                    line += f"; best checkpoint: step {best}, kept in {short(self.folder / 'best')}"
                    line += "; training ends (guard.stop)" if self.config.guard.stop else ""
                self._tensorboard.text(step, f"guard/{metric}", line)
                log.warning(line)
                self._say(line)
        self._tensorboard.flush()

    def _summary(self) -> str:
        best, shown = self.looks.all[self.verdict.best], short(self.folder)
        what = f"step {best.step}, in {shown}/best" if best.step else "the base model"
        steps = ", ".join(str(step) for step in self.looks.steps)
        return f"best of steps {steps} by held-out reward: {what}; {shown}/guard.png, {shown}/guard.jsonl"

    def _say(self, line: str) -> None:
        self.console.print(f"guard: {line}", soft_wrap=True, markup=False, highlight=False)


@contextmanager
def watching(config: RunConfig, folder: Path, clips: Path, use_gpu: bool, console: Console) -> Iterator[bool]:
    """Guards the block's training, if the config asks for it; yields whether the run is to end before it begins."""
    if not config.guard.every:
        yield False
        return
    with Watch(config, folder, clips, use_gpu, console) as watch:
        yield watch.stopping


def draw(folder: Path, verdict: Verdict, looks: GuardLog) -> None:
    """Writes ``guard.png``: rewards over the looks, with the best checkpoint and the warning marked."""
    steps, means = read_means(folder)
    shown = (m for m in (TRAINED, HELD_OUT, "oracle_score") if any(map(math.isfinite, means[m])))
    series = {metric_of(m).axis: means[m] for m in shown}
    best = best_step(folder)
    marks = {} if best is None else {f"best: step {best}": float(best)}
    if verdict.spoilt:
        step = looks.all[verdict.spoilt.at].step
        marks[f"warning: step {step}"] = float(step)
    draw_rewards(folder / "guard.png", steps, series, window=1, y_label="mean over the guard's videos", marks=marks)
