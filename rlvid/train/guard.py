"""The guard: an actor evaluates checkpoints beside training; training never waits for it.

A thread of the driver watches the run's folder. It copies a checkpoint that is due (training might delete it), and
passes it to an actor that generates and scores the fixed videos at each scale of ``guard.scales``. The thread saves
each evaluation in ``guard.jsonl``, judges it with all earlier ones (``rlvid.runs.over_optimisation``), and recommends a
checkpoint and a scale (``rlvid.runs.recommendation``). A resumed run makes missing evaluations first.
``rlvid.train.guard_folder`` lists the files.
"""

import logging
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import ray
from rich.console import Console
from safetensors import SafetensorError

from rlvid.cluster.nodes import Shape, guard_gpus, worker_gpus
from rlvid.config import RunConfig
from rlvid.data.training_set import TrainingSet
from rlvid.metric_names import metric_of
from rlvid.models.folders import movable
from rlvid.runs.checkpoints import checkpoint_name
from rlvid.runs.guard_log import GuardEvaluation, read_means, read_recommendation
from rlvid.runs.over_optimisation import COLLAPSE, HELD_OUT, TOLERANCE, TRAINED, Verdict, is_fatal, is_held_out
from rlvid.runs.recommendation import DISTANCE, Recommendation
from rlvid.terminal import short
from rlvid.train.guard_evaluator import GuardEvaluator
from rlvid.train.guard_folder import GuardLog, guard_prompts

if TYPE_CHECKING:
    from rlvid.train.metrics import TensorBoard

log = logging.getLogger("rlvid.guard")

LOGGED_METRICS = (TRAINED, *TOLERANCE, DISTANCE, "oracle_score")
_PAUSE = 1.0
"""Seconds between two readings of the run's folder."""
_START = 180.0
"""Seconds that the actor may take to start after the end of training."""


def check_room(config: RunConfig, use_gpu: bool, nodes: list[tuple[Shape, float]]) -> None:
    """Checks that the cluster has room for the guard beside the workers; otherwise it would wait for ever.

    Args:
        config: the run's.
        use_gpu: whether workers have GPUs.
        nodes: (resources, how many of that shape), as of ``rlvid.cluster.nodes.nodes_possible``.

    Raises:
        ValueError: there is no room.
    """
    if not config.guard.every:
        return
    have = sum(shape.get("GPU", 0) * count for shape, count in nodes)
    gpus = guard_gpus(config, use_gpu)
    encoders = config.data.encoders * config.data.encoder_gpus
    free = have - (config.train.workers * worker_gpus(config) + encoders if use_gpu else 0)
    if gpus > free + 1e-9:
        raise ValueError(
            f"guard.gpus = {gpus:g}: the cluster has {have:g} GPUs, and the workers leave "
            f"{max(0, free):g}; set guard.gpus=0.3 to share a worker's, guard.gpus=0 for the CPU, or guard.every=0"
        )


class Watch:
    """Evaluates a run's checkpoints while the block runs, and the remaining ones when it ends.

    Args:
        config: the run's; ``guard.every`` above 0.
        folder: the run's.
        clips: its training set.
        use_gpu: whether the workers have GPUs.
        console: where warnings are printed.
        texts: where embeddings of the guard's prompts are kept, see ``rlvid.data.embeddings``.

    Raises:
        ValueError: see ``guard_prompts`` and ``GuardLog``.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        clips: TrainingSet,
        use_gpu: bool,
        console: Console,
        texts: str | None = None,
    ):
        self.config, self.folder, self.console = config, folder, console
        prompts = guard_prompts(config, clips.first_captions(config.guard.count))
        self.guard_log = GuardLog(folder, prompts, config)
        self.verdict = self.guard_log.verdict() if self.guard_log.all else Verdict(0)
        self.recommended: Recommendation | None = None
        self.stopping = self.guard_log.flag(self.verdict)
        self._reported = set[str]()
        resolved = config.model_copy(update={"guard": config.guard.resolved()})
        self._job = (resolved.model_dump(), movable(config.model.path), config.reward.resolved().model_dump(), prompts)
        self._gpus, self._texts = guard_gpus(config, use_gpu), texts
        self._tensorboard: TensorBoard | None = None
        self._actor: Any = None
        self._ready: Any = None
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
            self._say("there was a warning before, so training does not continue; set guard.stop=false to train on")
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
                self._say("training has ended; the guard evaluates the last checkpoints")
            self._thread.join()  # an interrupt ends it
        finally:
            self._given_up.set()
            if self._actor is not None:
                ray.kill(self._actor)
            if error is None and self.guard_log.all:
                self._end()
            for handler in list(log.handlers):
                log.removeHandler(handler)
                handler.close()

    def _end(self) -> None:
        """Draws the picture and says what is recommended; a fault of the guard's files never ends training."""
        try:
            draw(self.folder, self.verdict, self.guard_log)
            self._say(self._summary())
        except (OSError, ValueError) as error:
            log.exception("no picture and no recommendation")
            self._say(f"no picture and no recommendation: {error}")

    def _run(self) -> None:
        try:
            self._watch()
        except (ray.exceptions.RayError, OSError, ValueError, SafetensorError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            log.exception("no more evaluations")
            self._say(f"no more evaluations in this start, training continues: {lines[-1]}")
        finally:
            if self._tensorboard is not None:
                self._tensorboard.close()

    def _watch(self) -> None:
        if self.guard_log.all:  # an earlier start may have been killed before it acted on its last evaluation
            last = self.guard_log.all[-1].step  # of which TensorBoard drops all that an earlier start wrote
            for evaluation in [each for each in self.guard_log.all if each.step == last]:
                self._act_on(evaluation)
        else:
            self._evaluate(0, 1.0)
        while not self._given_up.is_set():
            ended = self._ended.is_set()  # before the folder is read, so that no checkpoint is missed
            waiting = self.guard_log.stage(last=ended)
            if waiting:
                self._evaluate(waiting[0], self.guard_log.missing(waiting[0])[0])
            elif ended:
                return
            else:
                self._ended.wait(_PAUSE)

    def _evaluate(self, step: int, scale: float) -> None:
        """Evaluates a checkpoint at a scale; saves the result before it acts on it."""
        actor = self._actor = self._actor or self._start()
        folder = str(self.guard_log.pending / checkpoint_name(step)) if step else None
        values = self._wait_for(actor.evaluate.remote(folder, scale))
        if values is None:
            return
        evaluation = GuardEvaluation(step, scale, values)
        self.guard_log.add(evaluation)
        self._act_on(evaluation)

    def _act_on(self, evaluation: GuardEvaluation) -> None:
        """Updates verdict, recommendation, best checkpoint, reports and flag after an evaluation."""
        self.verdict = verdict = self.guard_log.verdict()
        before, self.recommended = self.recommended, self.guard_log.recommendation()
        self.guard_log.update_best(self.recommended)
        self._report(evaluation, verdict, self.recommended, changed=before != self.recommended)
        self.stopping = self.guard_log.flag(verdict)

    def _start(self) -> Any:
        threads = {"env_vars": {"OMP_NUM_THREADS": "1"}}
        again = self.config.train.max_failures
        options = {"num_cpus": 0, "num_gpus": self._gpus, "max_restarts": again, "max_task_retries": again}
        # DEFAULT: not in the placement group of a trial, which has no room for it.
        made = ray.remote(GuardEvaluator).options(**options, scheduling_strategy="DEFAULT", runtime_env=threads)
        actor = made.remote(*self._job, self._gpus > 0, aside=not self._gpus, texts=self._texts)
        self._ready = actor.__ray_ready__.remote()  # before any evaluation: an actor runs its calls in order
        return actor

    def _wait_for(self, reference: Any) -> Any:
        """Waits for an evaluation and returns it; copies checkpoints meanwhile. None when the guard is given up."""
        waited = 0.0
        while not self._given_up.is_set():
            done, _ = ray.wait([reference], timeout=_PAUSE)
            if done:
                return ray.get(reference)
            self.guard_log.stage(last=False)
            started = bool(ray.wait([self._ready], timeout=0)[0])
            waited += _PAUSE if self._ended.is_set() and not started else 0
            if waited > _START:
                raise ValueError(f"its actor found no room in the cluster for {_START:.0f} s after training")
        return None

    def _report(self, latest: GuardEvaluation, verdict: Verdict, recommended: Recommendation, *, changed: bool) -> None:
        """Writes the evaluation to TensorBoard and the log, and new warnings also to the console."""
        step = latest.step
        if self._tensorboard is None:
            from rlvid.train.metrics import TensorBoard

            self._tensorboard = TensorBoard(self.folder / "tensorboard" / "guard", step)
        values = {"guard/over_optimised": float(verdict.over_optimised)}
        values |= {"guard/collapsed": float(COLLAPSE in verdict.warnings)}
        values |= {"guard/best_step": float(recommended.step), "guard/best_scale": recommended.scale}
        at = "" if latest.scale == 1 else f"_at_scale_{latest.scale:g}"
        means = {
            metric: latest.mean(metric) for metric in latest.values if metric in LOGGED_METRICS or is_held_out(metric)
        }
        values |= {f"guard/{metric}{at}": mean for metric, mean in means.items() if math.isfinite(mean)}
        self._tensorboard.scalars(step, values)
        log.info("%s %s", latest.name, " ".join(f"{name}={value:.6g}" for name, value in values.items()))
        if changed:
            self._tensorboard.text(step, "guard/recommended", self._recommendation(recommended))
            log.info("recommended: %s", self._recommendation(recommended))
        for metric, loss in verdict.warnings.items():
            if metric not in self._reported:
                self._reported.add(metric)
                line = self.guard_log.describe(loss)
                if is_fatal(metric):
                    line += f"; recommended: {self._recommendation(recommended)}"
                    line += "; training ends (guard.stop)" if self.config.guard.stop else ""
                self._tensorboard.text(step, f"guard/{metric}", line)
                log.warning(line)
                self._say(line)
        self._tensorboard.flush()

    def _recommendation(self, found: Recommendation) -> str:
        """Returns the recommendation in the form that other commands take, and the reason."""
        return f"{found.spec(short(self.folder))} ({found.reason})"

    def _summary(self) -> str:
        found = self.recommended or self.guard_log.recommendation()
        steps, shown = ", ".join(str(step) for step in self.guard_log.steps), short(self.folder)
        kept = f", kept in {shown}/best" if found.step else ""
        return (
            f"recommended of steps {steps}: {self._recommendation(found)}{kept}; {shown}/guard.png, {shown}/guard.jsonl"
        )

    def _say(self, line: str) -> None:
        self.console.print(f"guard: {line}", soft_wrap=True, markup=False, highlight=False)


@contextmanager
def watching(
    config: RunConfig, folder: Path, clips: TrainingSet, use_gpu: bool, console: Console, texts: str | None = None
) -> Iterator[bool]:
    """Guards the block's training, if the config says so; yields whether the run should end before it begins."""
    if not config.guard.every:
        yield False
        return
    with Watch(config, folder, clips, use_gpu, console, texts) as watch:
        yield watch.stopping


def draw(folder: Path, verdict: Verdict, guard_log: GuardLog) -> None:
    """Writes ``guard.png``: rewards over the checkpoints, with marks for the recommended one and the warning."""
    from rlvid.plots.curves import draw_rewards

    steps, means = read_means(folder)
    shown = (m for m in (TRAINED, HELD_OUT, "oracle_score") if any(map(math.isfinite, means[m])))
    series = {metric_of(m).axis: means[m] for m in shown}
    best, marks = read_recommendation(folder), dict[str, float]()
    if best is not None:
        at = f" at scale {best.scale:g}" if best.scale != 1 else ""
        marks[f"recommended: step {best.step}{at}"] = float(best.step)
    if verdict.fatal_loss:
        step = guard_log.checkpoints[verdict.fatal_loss.at].step
        marks[f"warning: step {step}"] = float(step)
    draw_rewards(folder / "guard.png", steps, series, window=1, y_label="mean over the guard's videos", marks=marks)
