"""Calls Ray Train: handles interruptions and lost nodes, and says in one line why a run failed."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from rich.console import Console

from rlvid import interrupt
from rlvid.faults import one_line
from rlvid.terminal import short

log = logging.getLogger("rlvid.train")

TIMEOUT = "Timeout ("
"""The beginning of the line that faulthandler writes when it ends a process."""


def run_fit(fit: Callable[[], Any], progress: Any, grace_period: float, console: Console) -> Any:
    """Calls ``fit`` in a thread and returns its result; after an interruption the workers write a checkpoint.

    In the main thread, Ray Train would handle Ctrl-C itself and end the workers at once.

    Args:
        fit: the trainer's.
        progress: the run's ``rlvid.train.progress.ProgressActor``.
        grace_period: seconds that the workers have after an interruption, to finish the step and save a checkpoint.
        console: for the line that the command waits for a checkpoint.

    Raises:
        KeyboardInterrupt: the run was interrupted.
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
        if not outcome.done() and _request_end(progress):
            began = time.monotonic()
            interrupt.postpone_end(grace_period)
            limit = f"the workers have {grace_period:g} s to finish the step and save a checkpoint"
            with contextlib.suppress(OSError, SystemExit):  # the terminal may be gone
                console.print(f"interrupted: {limit}; a second signal ends at once", highlight=False, soft_wrap=True)
            wait([outcome], grace_period)
            interrupt.postpone_end(time.monotonic() - began)
        raise


def _request_end(progress: Any) -> bool:
    """Asks the workers to end after the current step; returns whether there is a step to wait for."""
    import ray

    try:
        return bool(ray.get(progress.request_end.remote(), timeout=2))
    except ray.exceptions.RayError:
        return False


def fit_again(fit: Callable[[], Any], failures: int, repair: Callable[[dict[str, str]], None]) -> dict[str, Any]:
    """Calls ``fit`` until training has ended; returns the result of the first worker.

    Ray Train 2.60 restarts lost workers. But it gives up if a node dies between the start of the workers and that of
    the training function, or if its own controller dies. Another ``fit`` then continues from the last checkpoint.

    Args:
        fit: the trainer's.
        failures: number of further calls after such a loss.
        repair: called with the checkpoints that workers found damaged (name -> fault), before another ``fit``
            continues from an earlier one.
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
            log.warning("a node or the controller was lost; the workers are restarted (%s)", lost)
            continue
        if "damaged" not in done:
            return done
        repair(done["damaged"])


def reason(error: Exception, folder: Path, progress: Any, logs_here: bool, what: str = "training") -> str:
    """Says why a run failed, in one line: the worker, its step, the error, and where its log is.

    Of several workers that failed, the message names the one that failed first. A killed process cannot write its
    log, so the reason is added to it here.

    Args:
        error: what Ray Train raised.
        folder: the run's.
        progress: the run's ``rlvid.train.progress.ProgressActor``.
        logs_here: whether the workers write their logs into ``folder``, and not into an object store.
        what: stopped.
    """
    from rlvid.train.reporter import WorkerError

    failures: dict[int, Any] = dict(getattr(error, "worker_failures", {}))
    own = {rank: getattr(each, "_base_exc", each) for rank, each in failures.items()}
    spoken = {rank: each for rank, each in own.items() if isinstance(each, WorkerError)}
    dead = {rank: each for rank, each in own.items() if rank not in spoken}
    first = next((rank for rank, each in spoken.items() if not each.secondary), None)
    if first is None and dead:
        first = min(dead)
        log_file = folder / "logs" / f"worker-{first:02d}.log"
        text = _death(first, dead[first], progress, log_file if logs_here else None)
        _note(log_file, f"{text}\n{dead[first]}")
    elif spoken:
        first = min(spoken) if first is None else first
        text = spoken[first].text
    else:
        text = one_line(error)
    logs = Path("logs", "" if first is None else f"worker-{first:02d}.log")
    place = short(folder / logs) if logs_here else f"{logs}* of the run in the store"
    return f"{what} stopped: {text} (full log: {place}; start the same command again to resume)"


def _death(rank: int, error: Any, progress: Any, log_file: Path | None) -> str:
    """Says why a worker's process ended that raised no error itself.

    A process that a reward held up for longer than reward.timeout ends itself, and leaves ``TIMEOUT`` in its log. One
    that was killed inside a reward's call leaves none.
    """
    import ray

    step, overdue = 0, dict[int, str]()
    with contextlib.suppress(ray.exceptions.RayError):
        step = ray.get(progress.get.remote(), timeout=2)[0].get("step", 0)
        overdue = ray.get(progress.overdue.remote(), timeout=2)
    killed = log_file is not None and log_file.is_file() and TIMEOUT not in log_file.read_text(errors="replace")
    if rank in overdue and not killed:
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
    """Adds a line to a worker's log, if the log is on this machine."""
    if log_file.is_file():
        with contextlib.suppress(OSError), open(log_file, "a", encoding="utf-8") as file:
            file.write(f"{text}\n")
