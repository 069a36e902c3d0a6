"""Kills the driver of a sweep (SIGKILL) in the middle, starts the sweep again, and counts what was lost or done twice.

    python tests/faults/kill_sweep.py --kills 3,9 toy name=proof        # kill after the 3rd and the 9th measurement

Options come first; the rest is given to tuning/sweep.py. Ends with a table of facts, and 1 if one of them is wrong.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for tuning, which is not installed

from rlvid.terminal import numbers, run_command, say  # noqa: E402
from tuning.description import Sweep  # noqa: E402
from tuning.journal import FINISHED, STOPPED, Journal  # noqa: E402
from tuning.load import load_sweep, split_source  # noqa: E402


def written(folder: Path) -> dict[str, int]:
    """When each measurement and each checkpoint was written, in nanoseconds."""
    found = [*folder.glob("*/rungs/*.json"), *folder.glob("*/step-*/state.json")]
    return {str(path): path.stat().st_mtime_ns for path in found}


def run_killed(arguments: list[str], folder: Path, kills: list[int], cwd: Path | None = None) -> list[dict[str, int]]:
    """Runs a sweep to its end and kills its driver whenever it has so many measurements.

    Returns:
        ``written(folder)`` at each kill.

    Raises:
        RuntimeError: the sweep failed, or ended before a kill.
    """
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, str(ROOT / "tuning" / "sweep.py"), *arguments]
    standing = []
    for wanted in [*kills, None]:
        process = subprocess.Popen(command, cwd=cwd, env=environment)
        while process.poll() is None:
            if wanted is not None and len(list(folder.glob("*/rungs/*.json"))) >= wanted:
                process.send_signal(signal.SIGKILL)
                process.wait()
                standing.append(written(folder))
                say(f"killed the driver after {wanted} measurements")
                break
            time.sleep(0.1)
        else:
            if process.returncode or wanted is not None:
                raise RuntimeError(
                    f"the sweep ended with {process.returncode} before {wanted or 'its end'} measurements"
                )
    return standing


def facts(sweep: Sweep, standing: list[dict[str, int]]) -> dict[str, tuple[Any, bool]]:
    """What the sweep's folder shows, and whether it is as it should be."""
    trials, after = Journal(sweep.folder).trials, written(sweep.folder)
    ends = [trial.end for trial in trials]
    twice = [trial.name for trial in trials if len(set(trial.judged)) < len(trial.judged)]
    again = {path for kept in standing for path, when in kept.items() if after.get(path, when) != when}
    from_scratch = []
    for trial in trials:
        steps = sorted((sweep.folder / trial.name).glob("step-*/state.json"))
        if not steps or json.loads(steps[-1].read_text(encoding="utf-8"))["step"] != max(trial.judged, default=0):
            from_scratch.append(trial.name)
    return {
        "drivers killed": (len(standing), True),
        "trials": (len(trials), len(trials) == sweep.count),
        "finished": (ends.count(FINISHED), FINISHED in ends),
        "stopped early": (ends.count(STOPPED), True),
        "neither": (len(ends) - ends.count(FINISHED) - ends.count(STOPPED), set(ends) <= {FINISHED, STOPPED}),
        "rungs judged": (sum(len(trial.judged) for trial in trials), not twice),
        "measured or trained again after a kill": (len(again), not again),
        "trials whose last checkpoint is not that of their last rung": (len(from_scratch), not from_scratch),
    }


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", default="3", help="after how many measurements, such as 3,9")
    options, given = parser.parse_known_args(arguments)
    return run_command(lambda: prove(options, given))


def prove(options: argparse.Namespace, given: list[str]) -> int:
    """Runs and kills the sweep, and says what its folder shows; 0 if that is as it should be."""
    kills = numbers(options.kills, "--kills")
    sweep = load_sweep(*split_source(given))
    began = time.monotonic()
    found = facts(sweep, run_killed(given, sweep.folder, kills))
    for name, (value, right) in found.items():
        say(f"{'ok   ' if right else 'WRONG'} {name}: {value}")
    say(f"{time.monotonic() - began:.0f} s in all")
    return 0 if all(right for _, right in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
