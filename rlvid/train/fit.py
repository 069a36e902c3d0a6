"""Calls Ray Train and waits: interruptions, nodes that are lost, and the one line that says why a run failed."""

import contextlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from rich.console import Console

from rlvid import interrupt
from rlvid.faults import one_line
from rlvid.terminal import short

log = logging.getLogger("rlvid.train")

GRACE = 10.0
"""Seconds that workers have for a checkpoint after an interruption."""


def run_fit(fit: Callable[[], Any], progress: Any, console: Console) -> Any:
    """Calls ``fit`` in a thread of its own and returns its result; an interruption asks the workers for a checkpoint.

    In the main thread Ray Train would take Ctrl-C for itself, and end the workers at once.

    Args:
        fit: the trainer's.
        progress: the run's ``rlvid.train.progress.ProgressActor``.
        console: prints that the command waits for a checkpoint.

    Raises:
        KeyboardInterrupt: the run was interrupted; the workers had ``GRACE`` seconds for the step under way and a
            checkpoint.
    """
    outcome: Future[Any] = Future()

    def call() -> None:
        try:
            outcome.set_result(fit())
        except BaseException as error:
            outcome.set_exception(error)

    try:
        threading.Thread(target=call, name="fit", daemon=True).start()
        return outcome.result()
    except KeyboardInterrupt:
        if not outcome.done() and _asked_to_end(progress):
            line = f"interrupted: finishes the step and saves a checkpoint within {GRACE:.0f} s; again ends at once"
            with contextlib.suppress(OSError, SystemExit):  # the terminal may be gone
                console.print(line, highlight=False, soft_wrap=True)
            wait([outcome], GRACE)
        raise


def _asked_to_end(progress: Any) -> bool:
    """Asks the workers to end after the step under way; whether there is a step to wait for."""
    import ray

    try:
        return bool(ray.get(progress.end.remote(), timeout=2))
    except ray.exceptions.RayError:
        return False


def fit_again(fit: Callable[[], Any], failures: int, repair: Callable[[dict[str, str]], None]) -> dict[str, Any]:
    """Calls ``fit`` until training has ended; what its first worker returned.

    Ray Train 2.60 starts lost workers again, but gives the run up if their node dies between their start and that of
    the training function, or if its own controller dies. A further ``fit`` goes on from the last checkpoint.

    Args:
        fit: the trainer's.
        failures: how often it is called again after such a loss.
        repair: is called with the checkpoints that workers found damaged (name -> what is wrong), before another
            ``fit`` goes on from an earlier one.
    """
    import ray.train

    while True:
        try:
            done: dict[str, Any] = fit().return_value
        except (ray.train.ControllerError, ray.exceptions.RayActorError) as error:
            lost = getattr(error, "controller_failure", error)  # by the controller, or the controller itself
            if failures == 0 or not isinstance(lost, ray.exceptions.RayActorError) or interrupt.received():
                raise
            failures -= 1
            log.warning("a node or the controller was lost; workers are started again (%s)", lost)
            continue
        if "damaged" not in done:
            return done
        repair(done["damaged"])


def reason(error: Exception, folder: Path, progress: Any) -> str:
    """Why a run failed, in one line: which worker, at which step, what happened; and where its log is.

    Of several workers that failed, the one that failed by itself is named. What killed a process is noted in its log,
    since it could not do so itself.

    Args:
        error: what Ray Train raised.
        folder: the run's.
        progress: the run's ``rlvid.train.progress.ProgressActor``.
    """
    from rlvid.train.reporter import WorkerError

    failures: dict[int, Any] = dict(getattr(error, "worker_failures", {}))
    own = {rank: getattr(each, "_base_exc", each) for rank, each in failures.items()}
    spoken = {rank: each for rank, each in own.items() if isinstance(each, WorkerError)}
    dead = {rank: each for rank, each in own.items() if rank not in spoken}
    first = next((rank for rank, each in spoken.items() if not each.secondary), None)
    if first is None and dead:
        first = min(dead)
        text = _death(first, dead[first], progress)
        _note(folder / "logs" / f"worker-{first:02d}.log", f"{text}\n{dead[first]}")
    elif spoken:
        first = min(spoken) if first is None else first
        text = spoken[first].text
    else:
        text = one_line(error)
    logs = folder / "logs" / ("" if first is None else f"worker-{first:02d}.log")
    return f"training stopped: {text} (full log: {short(logs)}; start the same command again to resume)"


def _death(rank: int, error: Any, progress: Any) -> str:
    """What is known of a process that ended without a word of its own."""
    import ray

    step, overdue = 0, dict[int, str]()
    with contextlib.suppress(ray.exceptions.RayError):
        step = ray.get(progress.get.remote(), timeout=2)[0].get("step", 0)
        overdue = ray.get(progress.overdue.remote(), timeout=2)
    if rank in overdue:
        return overdue[rank]
    text = str(error)
    if "OutOfMemory" in text or "low on memory" in text:
        how = "was killed because its node ran out of memory"
    elif isinstance(getattr(error, "health_check_failure", error), ray.exceptions.RayActorError):
        how = "died: it was killed (as by the system when memory runs out), or crashed in C code"
    else:
        how = f"failed: {one_line(error)}"
    return f"worker {rank}, after step {step}: its process {how}"


def _note(log_file: Path, text: str) -> None:
    """Adds to a worker's log, where it lies on this machine."""
    if log_file.is_file():
        with contextlib.suppress(OSError), open(log_file, "a", encoding="utf-8") as file:
            file.write(f"{text}\n")
