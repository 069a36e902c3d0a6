"""Kills parts of trainings at seeded random moments, and checks that nothing of their result changes.

    python tests/faults/chaos.py                                            # 20 kills on the built-in model
    python tests/faults/chaos.py --kills 6 --victims worker,driver --seed 7 train.workers=1 train.steps=10
    python tests/faults/chaos.py --config my.yaml output.storage=/mnt/shared/chaos   # your model, your storage

It starts a Ray cluster of its own on this machine, of a head and two nodes, and first trains an
undisturbed reference run. Then, for each seed, it trains the same run again and kills one process without warning
(SIGKILL), at a random moment of its start or of its steps:

    worker   a process that trains
    raylet   Ray's daemon on the node where the workers are, and with it all of the node; another node joins
    driver   `rlvid train` itself; the same command is given again
    spot     only if asked for: as raylet, but announced ten seconds before, so that workers can save in time

Each must end with the adapter (or the weights) of the first run, bit for bit, each sample once in the archive and each
step once in TensorBoard. Exit code 1 if one does not; its folder is kept.
"""

import argparse
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chaos_cluster import LocalCluster, ask_for_token, train_workers
from rich.console import Console
from rich.table import Table

from rlvid.terminal import run_command

VICTIMS = ("worker", "raylet", "driver")
SPOT = "spot"
_NOTICE = 10  # seconds between a spot node's announcement and its end
SMALL = (
    "train.steps=6", "output.checkpoint_every=2", "train.batch_size=2", "train.workers=2", "sampling.steps=3",
    "data.count=4", "output.videos_every=0", "optimizer.lr=1e-4", "optimizer.warmup=0",
)  # fmt: skip
"""What makes a run last seconds; overrides come after it."""
_STEP = 0.25  # seconds of a step, about
_GIVE_UP = 600  # seconds


@dataclass
class Outcome:
    """A kill and what came of it: ``moment`` in seconds since the victim could be killed, ``faults`` empty if well."""

    seed: int
    victim: str
    moment: float
    after_step: int
    starts: int
    seconds: float
    faults: list[str]


def last_step(run: Path) -> int:
    """Steps that worker 0 has noted in its log."""
    log = run / "logs" / "worker-00.log"
    text = log.read_text(encoding="utf-8") if log.is_file() else ""
    return max((int(step) + 1 for step in re.findall(r"rlvid\.train step (\d+) \S+=", text)), default=0)


class Chaos:
    """Runs of one description that differ in what dies.

    Args:
        source: the description, as for ``rlvid train``.
        overrides: settings of all runs; ``output.storage`` is where they are.
        cluster: to train on.
    """

    def __init__(self, source: str, overrides: list[str], cluster: LocalCluster) -> None:
        from rlvid.config import load_config
        from rlvid.runs.find import run_folder

        self._source, self._overrides, self._cluster = source, overrides, cluster
        self.config = load_config(source, [*overrides, "name=whole"])
        self.steps = self.config.train.steps
        self._folder = run_folder(self.config).parent
        self.seconds, self.first_worker, self.first_step = 0.0, 0.0, 0.0

    def run_whole(self) -> None:
        """The undisturbed reference run; its clips are encoded first, so that it takes as long as the others."""
        import ray

        from rlvid.cluster.connect import start_ray
        from rlvid.data.sources import training_set

        shutil.rmtree(self._folder / "whole", ignore_errors=True)  # of an earlier chaos in the same storage
        start_ray(self._cluster.address)
        training_set(self.config, Console(quiet=True))
        ray.shutdown()
        began = time.monotonic()
        driver = self._start("whole")
        self._until(lambda: bool(train_workers()), driver)
        self.first_worker = time.monotonic() - began
        self._until(lambda: last_step(self._folder / "whole") > 0, driver)
        self.first_step = time.monotonic() - began
        code, printed = self._finish(driver, "whole")
        self.seconds = time.monotonic() - began
        if code:
            raise RuntimeError(f"the undisturbed run failed: {printed}")
        if told := self._faults("whole"):
            raise RuntimeError(f"the undisturbed run: {'; '.join(told)}")

    def run_killed(self, seed: int, victim: str, moment: float) -> Outcome | None:
        """A run whose ``victim`` dies at ``moment``; None if it had ended before.

        Below 0.5 it is a part of the time to the first step (of a driver from the start, of workers and their raylets
        from the first worker's appearance); above, a part of the steps, the last one left out.
        """
        name, draw = f"seed-{seed:03d}", random.Random(f"{seed}/which")
        shutil.rmtree(self._folder / name, ignore_errors=True)
        began = time.monotonic()
        driver = self._start(name)
        if victim != "driver":
            self._until(lambda: bool(train_workers()), driver)
        alive = time.monotonic()
        if moment < 0.5:
            due = alive + 2 * moment * (self.first_step - (0 if victim == "driver" else self.first_worker))
            self._until(lambda: time.monotonic() >= due, driver)
        else:
            place = (2 * moment - 1) * (self.steps - 1)
            self._until(lambda: last_step(self._folder / name) >= max(1, int(place)), driver)
            time.sleep(place % 1 * _STEP)
        wait, after = time.monotonic() - alive, last_step(self._folder / name)
        if not self._kill(victim, driver, draw):
            code, printed = self._finish(driver, name)
            if code:
                raise RuntimeError(f"seed {seed}: a run ended by itself with exit code {code}: {printed}")
            return None
        if victim == "driver":
            driver.wait()
            driver = self._start(name)
        code, printed = self._finish(driver, name)
        faults = self._faults(name) if code == 0 else [f"exit code {code}: {printed}"]
        from rlvid.train.audit import starts

        begun = starts(self._folder / name)
        if not faults:
            shutil.rmtree(self._folder / name)
        return Outcome(seed, victim, round(wait, 2), after, begun, round(time.monotonic() - began, 1), faults)

    def _kill(self, victim: str, driver: "subprocess.Popen[str]", draw: random.Random) -> bool:
        if driver.poll() is not None:
            return False
        if victim == "driver":
            driver.kill()
            return True
        workers = train_workers()
        if not workers:
            return False
        chosen = draw.choice(workers)
        try:
            if victim in ("raylet", SPOT):
                self._cluster.kill_raylet_of(chosen, _NOTICE if victim == SPOT else None)
            else:
                os.kill(chosen, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def _start(self, name: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "rlvid.cli", "train", self._source, *self._overrides, f"name={name}"]
        command += ["--address", self._cluster.address]
        at_once = os.environ | {"PYTHONUNBUFFERED": "1"}  # or a killed driver takes what it said with it
        with open(self._folder / f"{name}.out", "a", encoding="utf-8") as out:
            return subprocess.Popen(command, env=at_once, stdout=out, stderr=subprocess.STDOUT, text=True)

    def _finish(self, driver: "subprocess.Popen[str]", name: str) -> tuple[int, str]:
        """Exit code, and the last line that it printed."""
        try:
            code = driver.wait(_GIVE_UP)
        except subprocess.TimeoutExpired:
            driver.kill()
            return 124, f"not done after {_GIVE_UP} s"
        lines = (self._folder / f"{name}.out").read_text(encoding="utf-8").strip().splitlines()
        return code, lines[-1] if lines else ""

    def _until(self, happened: Callable[[], bool], driver: "subprocess.Popen[str]") -> None:
        deadline = time.monotonic() + _GIVE_UP
        while not happened() and driver.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)

    def _faults(self, name: str) -> list[str]:
        from safetensors.torch import load_file

        from rlvid.models.trained_files import trained_file
        from rlvid.runs.checkpoints import checkpoint_name
        from rlvid.train.audit import faults

        last = [self._folder / run / checkpoint_name(self.steps) for run in ("whole", name)]
        expected, found = (load_file(trained_file(folder)) for folder in last)
        differ = [key for key in expected if key not in found or not expected[key].equal(found[key])]
        told = [f"{len(differ)} of {len(expected)} tensors differ, such as {differ[0]}"] if differ else []
        return told + faults(self._folder / name, self.config, self.steps)


def kill_many(chaos: Chaos, kills: int, victims: list[str], seed: int, console: Console) -> list[Outcome]:
    """Kills the victims in turn, at random moments, until ``kills`` have hit."""
    outcomes: list[Outcome] = []
    while len(outcomes) < kills:
        victim = victims[len(outcomes) % len(victims)]
        outcome = chaos.run_killed(seed, victim, random.Random(f"{seed}/when").random())
        if outcome is None:
            console.print(f"seed {seed}: the {victim} had ended before its time", highlight=False)
        else:
            outcomes.append(outcome)
            console.print(
                f"seed {seed}: {victim} killed after {outcome.moment:.1f} s (step {outcome.after_step}); "
                f"{'equal' if not outcome.faults else '; '.join(outcome.faults)}",
                highlight=False,
            )
        seed += 1
    return outcomes


def show(outcomes: list[Outcome], chaos: Chaos, console: Console) -> None:
    config = chaos.config.train
    table = Table(
        title=f"{len(outcomes)} kills; {config.steps} steps of {config.batch_size} videos, {config.workers} workers, "
        f"ZeRO {config.zero_stage}, a checkpoint every {chaos.config.output.checkpoint_every}; {chaos.seconds:.0f} s "
        "undisturbed"
    )
    for column in ("seed", "killed", "after", "step", "starts", "seconds", "equal, bit for bit"):
        table.add_column(column, justify="left" if column in ("killed", "equal, bit for bit") else "right")
    for each in outcomes:
        said = "yes" if not each.faults else "; ".join(each.faults)
        table.add_row(
            str(each.seed), each.victim, f"{each.moment:.1f} s", f"{each.after_step}/{config.steps}", str(each.starts),
            f"{each.seconds:.0f}", said,
        )  # fmt: skip
    console.print(table)


def parse(arguments: list[str]) -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many (default: 20)")
    parser.add_argument("--victims", default=",".join(VICTIMS), help=f"in turn (default: {','.join(VICTIMS)})")
    parser.add_argument("--seed", type=int, default=0, help="the first one; each kill has one of its own")
    parser.add_argument("--config", default="toy", help="a shipped description or a YAML file (default: toy)")
    parser.add_argument("--out", type=Path, help="file for the outcomes, JSON")
    parser.add_argument("overrides", nargs="*", help="settings to change, as for rlvid train")
    options = parser.parse_intermixed_args(arguments)
    options.victims = options.victims.split(",")
    if unknown := set(options.victims) - {*VICTIMS, SPOT}:
        raise ValueError(f"--victims {sorted(unknown)[0]!r}: allowed: {', '.join(VICTIMS)}, {SPOT}")
    if options.kills < 1:
        raise ValueError(f"--kills {options.kills}: allowed: 1 or more")
    return options


def main() -> int:
    """Kills, checks, shows; returns 1 if a run did not end as it should."""
    options, console = parse(sys.argv[1:]), Console(width=None if sys.stdout.isatty() else 120)
    ask_for_token()
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", str(int(SPOT in options.victims)))
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    os.environ.pop("RAY_ADDRESS", None)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # warns of restarts, which are the purpose here
    overrides = [*SMALL, *options.overrides]
    if not any(each.startswith("output.storage=") for each in overrides):
        overrides.append(f"output.storage={tempfile.mkdtemp(prefix='rlvid-chaos-')}")
    from rlvid.config import load_config
    from rlvid.runs.find import run_folder

    config = load_config(options.config, overrides)
    run_folder(config).parent.mkdir(parents=True, exist_ok=True)
    with LocalCluster(cpus=config.train.workers + 1) as cluster:  # one for encoding clips
        chaos = Chaos(options.config, overrides, cluster)
        chaos.run_whole()
        outcomes = kill_many(chaos, options.kills, options.victims, options.seed, console)
    show(outcomes, chaos, console)
    if options.out:
        options.out.write_text(json.dumps([asdict(each) for each in outcomes], indent=2), encoding="utf-8")
    return int(any(each.faults for each in outcomes))


if __name__ == "__main__":
    sys.exit(run_command(main))
