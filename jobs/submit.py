"""Sends a command to a Ray cluster as a job, follows its log and ends with its exit code.

    python jobs/submit.py --address http://127.0.0.1:8265 train toy name=mine output.storage=/mnt/shared/runs
    python jobs/submit.py evaluate /mnt/shared/runs/mine
    python jobs/submit.py --detach sweep methods storage=/mnt/shared/sweeps

The repository travels with the job (without what .gitignore and .rayignore name). A job has the name of its run; the
same command again follows the job while it runs, and afterwards submits it anew, as mine-2, mine-3, ..., which resumes
the run. Ctrl-C asks whether to leave the job alone or to stop it. Paths are the cluster's, so they are absolute.
"""

import argparse
import asyncio
import itertools
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if sys.path and Path(sys.path[0] or ".").resolve() == ROOT / "jobs":
    sys.path[0] = str(ROOT)  # started as a script: tuning is beside jobs

from rlvid import interrupt  # noqa: E402
from rlvid.cluster.address import check_cluster, connect  # noqa: E402
from rlvid.config import load_config  # noqa: E402
from rlvid.config.fit import load_fit  # noqa: E402
from rlvid.config.model import BUILT_IN  # noqa: E402
from rlvid.credentials import refuse_credentials_in_arguments  # noqa: E402
from rlvid.interrupt import kept  # noqa: E402
from rlvid.storage import split_uri  # noqa: E402
from rlvid.terminal import run_command, shell  # noqa: E402

RLVID = "python -m rlvid.cli"
ENTRYPOINTS = {
    **{verb: f"{RLVID} {verb}" for verb in ("train", "encode", "generate", "evaluate", "export", "reward")},
    "sweep": "python tuning/sweep.py",
}
_SECONDS_TO_START = 30.0
"""Seconds in which a cluster that has just started may have no agent for the job."""


def main() -> int:
    """Submits or follows a job; returns its exit code, 0 when it keeps running."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", help="of the dashboard; default: RAY_API_SERVER_ADDRESS, else port 8265 here")
    parser.add_argument("--name", help="of the job; default: the run's name")
    parser.add_argument("--detach", action="store_true", help="submit, and do not follow")
    parser.add_argument("command", choices=ENTRYPOINTS, help="what runs: a command of rlvid, or sweep")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command, as at home")
    options = parser.parse_args()
    name = job_name(options.command, options.arguments, options.name)
    address = (options.address or os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265").rstrip("/")
    headers = check_cluster(address)
    client = connect(address, headers)
    entrypoint = " ".join([ENTRYPOINTS[options.command], shlex.join(options.arguments)]).strip()
    job = running_job(client, name, entrypoint)
    if job is None:
        job = submit(client, name, entrypoint)
        say(f"job {job} submitted to {address}")
    else:
        say(f"job {job} is running already; this follows it")
    if options.detach:
        say(f"follow it: the same command without --detach; stop it: {stop_command(address, job)}")
        return 0
    return follow(client, job, address)


def stop_command(address: str, job: str) -> str:
    """Returns the shell command that stops a job."""
    return f"ray job stop --address {shell(address)} {job}"


def say(text: str) -> None:
    """Prints a line of this program between those of the job."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


# ------------------------------------------------------------------------------------------- what is asked for


def job_name(command: str, arguments: list[str], given: str | None = None) -> str:
    """Returns the job's name, once everything that can be known here to be wrong has been looked for.

    Raises:
        ValueError: a setting is wrong, an address holds credentials, a path is not one of the cluster's, or the name
            cannot be a job's.
    """
    refuse_credentials_in_arguments(arguments)
    name, own = given or command, positional(arguments)
    if command == "train":
        if not own or arguments[0].startswith("-"):
            raise ValueError("train: name a description first, such as: train toy name=mine output.storage=/mnt/runs")
        config = load_config(own[0], own[1:])
        shared(config.output.storage, "output.storage")
        travels(own[0], "config")
        name = given or config.name
    elif command == "sweep":
        from tuning.load import load_sweep, split_source

        source, overrides = split_source(own)
        sweep = load_sweep(source, overrides)
        sweep.planned()  # reads each setting
        shared(sweep.storage, "sweep: storage")
        travels(source, "sweep")
        name = given or sweep.name
    elif command == "evaluate" and (base := option(arguments, "--base")) is not None:
        own = positional([each for each in arguments if each not in ("--group-seeds", "--trust")])  # without a value
        config = load_config(base, own)
        shared(option(arguments, "--out") or "", "evaluate --base: --out")
        travels(base, "config")
        name = given or f"evaluate-{config.name}-base"
    elif command in ("generate", "evaluate", "export"):
        run = arguments[0] if arguments else "--help"
        if run.startswith("-"):
            raise ValueError(f"{command}: name the run first, such as: {command} /mnt/shared/runs/mine")
        runs = [run]
        if command == "evaluate":  # any number, each LABEL=RUN@STEP*SCALE
            models = list(itertools.takewhile(lambda each: not each.startswith("-"), arguments))
            runs = [re.sub(r"^[^=/@*?:]+=", "", each) for each in models]
            if len(runs) > 1:
                shared(option(arguments, "--out") or "", f"{command}: --out")
        for each in runs:
            if each not in BUILT_IN:
                shared(each, f"{command}: the run")
        name = given or f"{command}-{re.sub(r'[^A-Za-z0-9._-]', '-', split_uri(runs[0])[1])}"
    elif command == "encode":
        for each, what in zip(own[:2], ("source", "folder for the clips"), strict=False):
            shared(each, f"encode: the {what}")
        name = given or f"encode-{PurePosixPath(own[1] if len(own) > 1 else 'clips').name}"
    elif command == "reward":
        own = positional([each for each in arguments if each != "--outside"])  # the one option without a value
        if own[:1] != ["fit"] or len(own) < 2 or "=" in own[1]:
            raise ValueError("reward: name the votes first, such as: reward fit /mnt/votes.parquet --out /mnt/liked")
        backbone = load_fit(own[2:]).backbone.path
        if backbone not in (None, "random"):
            shared(str(backbone), "reward fit: backbone.path")
        shared(own[1], "reward fit: the pairs")
        out = option(arguments, "--out") or ""
        shared(out, "reward fit: --out")
        name = given or f"fit-{PurePosixPath(out).name}"
    if command in ("generate", "export"):
        shared(option(arguments, "--out") or "", f"{command}: --out")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ValueError(f"--name {name!r}: give up to 100 letters, digits, dots, dashes and underscores")
    return name


def positional(arguments: list[str]) -> list[str]:
    """Returns the arguments that are neither an option nor its value; every option here has a value."""
    before = ["", *arguments]
    return [
        each
        for each, last in zip(arguments, before, strict=False)
        if not each.startswith("--") and not (last.startswith("--") and "=" not in last)
    ]


def travels(file: str, what: str) -> None:
    """Raises ValueError where a description is a file outside the folder that goes with the job."""
    path = Path(file)
    if path.is_file() and (path.is_absolute() or not (ROOT / path).is_file()):
        raise ValueError(f"{what} {file!r} is not in {ROOT}, which is all that travels; copy it there")


def option(arguments: list[str], name: str) -> str | None:
    """Returns the value of ``--name VALUE`` or ``--name=VALUE``."""
    for index, each in enumerate(arguments):
        if each == name and index + 1 < len(arguments):
            return arguments[index + 1]
        if each.startswith(f"{name}="):
            return each.partition("=")[2]
    return None


def shared(path: str, what: str) -> None:
    """Raises ValueError unless a path can mean the same on every node."""
    if not ("://" in path or PurePosixPath(path).is_absolute()):
        raise ValueError(
            f"{what} = {path!r} would lie in the job's own folder, which the cluster deletes; give an absolute path "
            "that all nodes share, such as /mnt/shared/runs, or s3://bucket/runs for a run"
        )


# --------------------------------------------------------------------------------------------------- the job


def known_jobs(client: Any, name: str) -> dict[str, Any]:
    """Jobs of this name, by id: ours, and one that `ray job submit` was given the id for."""
    jobs = {job.submission_id: job for job in client.list_jobs() if job.submission_id}
    return {each: job for each, job in jobs.items() if each == name or (job.metadata or {}).get("rlvid") == name}


def running_job(client: Any, name: str, entrypoint: str) -> str | None:
    """Returns the job of this name that has not ended, if there is one.

    Raises:
        ValueError: it does something else than the entrypoint.
    """
    for each, job in known_jobs(client, name).items():
        if not job.status.is_terminal():
            if job.entrypoint != entrypoint:
                raise ValueError(
                    f"job {each} has this name, is running, and does something else ({job.entrypoint}); wait for its "
                    f"end, stop it (ray job stop {each}), or choose another name"
                )
            return each
    return None


def submit(client: Any, name: str, entrypoint: str) -> str:
    """Submits and returns the id: the name, or name-2, name-3, ... where it is taken, as ids are never free again."""
    taken = {job.submission_id for job in client.list_jobs()}
    job = next(each for each in (name, *(f"{name}-{n}" for n in range(2, 10_000))) if each not in taken)
    until = time.monotonic() + _SECONDS_TO_START
    while True:
        try:
            return client.submit_job(
                entrypoint=entrypoint,
                submission_id=job,
                runtime_env={"working_dir": str(ROOT)},
                metadata={"rlvid": name},
            )
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > until:
                lines = [line for line in str(error).splitlines() if line.strip()]
                raise RuntimeError(f"the cluster did not take the job: {lines[-1].strip()}") from None
            time.sleep(1)  # the cluster has only just started


def follow(client: Any, job: str, address: str) -> int:
    """Prints the job's log until it ends; returns its exit code, or 0 when the job was left alone."""
    from aiohttp import ClientError  # what Ray's client reads logs with

    printed, lost = [0], 0
    while True:
        before = printed[0]
        try:
            if lost:
                time.sleep(2)
            asyncio.run(_tail(client, job, printed))
            if client.get_job_status(job).is_terminal():
                return outcome(client, job)
            time.sleep(0.5)
        except KeyboardInterrupt:
            with kept(f"job {job} keeps running; to stop it: {stop_command(address, job)}"):
                answer = interrupted(job)
                if answer is None:
                    raise
            interrupt.clear_received()
            if answer == "stop":
                client.stop_job(job)
                say(f"job {job} is being stopped")
            elif answer == "detach":
                say(f"job {job} keeps running; follow it: the same command; stop it: {stop_command(address, job)}")
                return 0
        except (RuntimeError, OSError, ClientError) as error:  # the job did not break
            lost = 1 if printed[0] > before else lost + 1
            if lost > 5:
                why = " ".join(str(error).split())
                raise RuntimeError(
                    f"lost the connection to job {job} ({why}); it may still run; the same command follows it"
                ) from None


async def _tail(client: Any, job: str, printed: list[int]) -> None:
    """Prints the log from where printing ended before; ``printed`` counts characters."""
    seen = 0
    async for text in client.tail_job_logs(job):
        fresh = text[max(0, printed[0] - seen) :]
        seen += len(text)
        if fresh:
            sys.stdout.write(fresh)
            sys.stdout.flush()
            printed[0] += len(fresh)


def interrupted(job: str, read: Callable[[str], str] = input) -> str | None:
    """Asks what to do after Ctrl-C: detach, stop or continue; None after another signal, or without a terminal."""
    if not sys.stdin.isatty() or interrupt.received() not in (None, signal.SIGINT):
        return None
    try:
        answer = read(f"\njob {job} is running on the cluster. [d]etach (it runs on), [s]top it, or [c]ontinue? [d] ")
    except EOFError:
        return None
    return {"s": "stop", "c": "continue"}.get(answer.strip().lower()[:1], "detach")


def outcome(client: Any, job: str) -> int:
    """Returns the exit code of a job that has ended; says why where its log does not."""
    info = client.get_job_info(job)
    status = str(info.status.value).lower()
    if status == "succeeded":
        return 0
    if status == "stopped":
        say(f"job {job} was stopped; the same command again resumes the run")
        return 1
    if info.driver_exit_code is None:
        lines = [line for line in str(info.message).splitlines() if line.strip()]
        say(f"job {job} failed before its command ran or ended: {lines[-1].strip() if lines else 'no reason given'}")
        return 1
    say(f"job {job} failed with exit code {info.driver_exit_code}")
    return int(info.driver_exit_code)


if __name__ == "__main__":
    sys.exit(run_command(main))
