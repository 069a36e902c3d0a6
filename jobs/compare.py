"""Methods side by side at equal budgets on the built-in world: a table, and curves against seconds and videos.

    python jobs/compare.py --seconds 180 --jobs 2 train.workers=1    # every method, three seeds, two runs at a time
    python jobs/compare.py --methods instructvideo,ddpo --seeds 0 --videos 400
    python jobs/compare.py --methods a=instructvideo,b=instructvideo:reward.attenuation=0 --seconds 180

The budget of a run is seconds of its own steps, or videos shown to the reward. A method may be given a label and
settings of its own (label=method:key=value:..., without commas or colons in values), so ablations and searches are
compared in the same way. Each method starts from its shipped description (rlvid/configs/toy-METHOD.yaml, else
toy.yaml). Whatever is finished is kept: start the same command again to go on.
"""

import argparse
import fcntl
import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from rlvid.evaluate.comparison import Point, draw, table, write_board
from rlvid.interrupt import kept
from rlvid.terminal import run_command

ALL = "instructvideo:optimizer.lr=8e-3,draft,draft-lv,alignprop,ddpo,dpok,rwr,raft"
"""At the learning rate of a search; toy.yaml's own is for a run of the demo's length."""
COPIES = 2
"""Videos of each prompt, for the diversity."""

PER_RUN = ("name=", "seed=", "method=", "method.name=", "output.storage=")
"""Settings that the comparison gives to each run."""


@dataclass(frozen=True)
class Entry:
    """A line of the comparison: ``[label=]method[:key=value]...``."""

    label: str
    method: str
    settings: tuple[str, ...]

    @staticmethod
    def parse(text: str) -> "Entry":
        """Reads one.

        Raises:
            ValueError: no such method, or a setting without a value.
        """
        from rlvid.config.methods import METHODS

        head, *settings = text.split(":")
        label, _, method = head.rpartition("=")
        if method not in METHODS:
            raise ValueError(f"--methods {text!r}: {method!r} is not a method; allowed: {', '.join(METHODS)}")
        if bare := [each for each in settings if "=" not in each]:
            raise ValueError(f"--methods {text!r}: {bare[0]!r} is not a setting; write it as key=value")
        return Entry(label or method, method, tuple(settings))


def configure(entry: Entry, seed: int, options: argparse.Namespace) -> Any:
    """The settings of one run.

    Raises:
        ValueError: a setting is wrong.
    """
    from rlvid.config import load_config, shipped_configs

    start, chosen = f"toy-{entry.method}", []
    if start not in shipped_configs():
        start, chosen = "toy", [f"method={entry.method}"]
    overrides = [
        f"name={entry.label}-seed{seed}", f"seed={seed}", *chosen,
        f"output.storage={options.out.resolve()}", "output.videos_every=0", "output.archive_every=0",
        "output.keep_checkpoints=1000", *options.overrides, *entry.settings,
    ]  # fmt: skip
    if options.seconds:
        budget = [f"train.max_seconds={options.seconds}", "train.steps=100000", "output.checkpoint_every=2"]
    else:
        config = load_config(start, overrides)
        steps = max(1, options.videos // (config.train.batch_size * getattr(config.method, "repeats", 1)))
        budget = [f"train.steps={steps}", f"output.checkpoint_every={max(1, steps // options.points)}"]
    return load_config(start, [*overrides, *budget])


def digest(data: Any) -> str:
    """Ten characters that tell settings apart."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:10]


def identity(config: Any, options: argparse.Namespace) -> str:
    """What must be the same for a finished run to be used again."""
    train = config.train
    return digest([config.fingerprint, train.steps, train.max_seconds, options.points, options.prompts])


def at_cost(states: dict[int, dict[str, float]], points: int) -> list[int]:
    """The steps, of checkpoints, that first reach 1 / points, 2 / points, ... of the last one's seconds."""
    last = states[max(states)]["seconds"]
    return sorted({min(s for s in states if states[s]["seconds"] >= last * (i + 1) / points) for i in range(points)})


def evaluate_checkpoints(folder: Path, options: argparse.Namespace, console: Console) -> list[Point]:
    """Scores of the base and of ``options.points`` checkpoints of a run, spread to the last; kept beside the run."""
    from rlvid.evaluate.load import device, load_run
    from rlvid.evaluate.results.summary import summarise
    from rlvid.evaluate.score import evaluate_model
    from rlvid.reward.load import load_reward
    from rlvid.runs.checkpoints import find_checkpoints, read_state
    from rlvid.world.captions import prompt_set

    prompts = [prompt for prompt in prompt_set("in_domain", options.prompts) for _ in range(COPIES)]
    states = {
        found.step: read_state(found.folder).model_dump(include={"seconds", "videos"})
        for found in find_checkpoints(folder)
    }
    points = []
    for step in [0, *at_cost(states, options.points)]:
        tuned = load_run(folder, step or None)
        model, sampling = tuned.use(1.0 if step else 0.0), tuned.config.sampling
        how = [sampling.steps, sampling.guidance, sampling.final_level, options.prompts]
        path = folder / f"scores-{step:06d}-{options.prompts}.json"
        if not step:  # one base for all runs that have the same
            path = folder.parent / f"base-{digest([weights_of(model.denoiser), *how])}.json"
        if not path.is_file():
            rows = evaluate_model(
                model, {"in_domain": prompts}, name=folder.name, reward=load_reward("builtin", device()),
                held_out=load_reward("builtin-heldout", device()), steps_list=[sampling.steps],
                guidance=sampling.guidance, final=sampling.final_level,
            )  # fmt: skip
            (summary,) = summarise(rows)
            cost = {key: states[step][key] if step else 0 for key in ("seconds", "videos")}
            write_json(path, {"step": step, **cost, "mean": summary.mean, "std": summary.std})
        points.append(json.loads(path.read_text(encoding="utf-8")))
        console.print(f"{folder.name} step {step}: reward {points[-1]['mean']['reward']:.3f}", highlight=False)
    return points


def weights_of(module: nn.Module) -> str:
    """A digest of a denoiser's own weights, without the adapter's."""
    found = hashlib.sha256()
    for name, parameter in module.named_parameters():
        if "lora" not in name:
            found.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def write_json(path: Path, data: Any) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(data), encoding="utf-8")
    temporary.replace(path)


def run_one(entry: Entry, seed: int, options: argparse.Namespace, console: Console) -> None:
    """Trains and scores one run; leaves its points in the run's folder."""
    from rlvid.train.launch import train

    config = configure(entry, seed, options)
    folder = train(config, console).folder
    points = evaluate_checkpoints(folder, options, console)
    write_json(folder / "points.json", {"identity": identity(config, options), "points": points})


def finished(entry: Entry, seed: int, options: argparse.Namespace) -> list[Point] | None:
    """The points of a run, if it has ended.

    Raises:
        ValueError: it ended under another budget or with other settings.
    """
    path = options.out / f"{entry.label}-seed{seed}" / "points.json"
    if not path.is_file():
        return None
    kept = json.loads(path.read_text(encoding="utf-8"))
    if kept["identity"] != identity(configure(entry, seed, options), options):
        raise ValueError(
            f"{path.parent} holds a run of another budget or other settings; delete it, or choose another --out"
        )
    return list(kept["points"])


def run_all(missing: list[tuple[str, Entry, int]], options: argparse.Namespace, console: Console) -> list[str]:
    """Every run in a process of its own, ``options.jobs`` at a time; the names of those that failed."""
    shared = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // options.jobs))}
    budget = ["--seconds", options.seconds] if options.seconds else ["--videos", options.videos]
    running: set[subprocess.Popen[bytes]] = set()

    def one(text: str, entry: Entry, seed: int) -> str | None:
        name = f"{entry.label}-seed{seed}"
        command = [
            sys.executable, __file__, "--one", text, "--seeds", seed, *budget, "--points", options.points,
            "--prompts", options.prompts, "--out", options.out, *options.overrides,
        ]  # fmt: skip
        console.print(f"{name}: training", highlight=False)
        with open(options.out / f"{name}.log", "a", encoding="utf-8") as log:
            process = subprocess.Popen(  # in a session of its own: Ctrl-C reaches it once, from here
                list(map(str, command)), stdout=log, stderr=log, env=os.environ | shared, start_new_session=True
            )
            running.add(process)
            code = process.wait()
        running.discard(process)
        console.print(f"{name}: {'done' if code == 0 else 'failed, see ' + log.name}", highlight=False)
        return name if code else None

    pool = ThreadPoolExecutor(options.jobs)
    try:
        return [name for name in (each.result() for each in [pool.submit(one, *run) for run in missing]) if name]
    finally:  # an interruption ends what runs and starts nothing more
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            process.terminate()
        for process in list(running):
            process.wait()


def main() -> None:
    """Trains and scores the runs that are missing, then writes the table and the curves of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=ALL, help="comma-separated: [label=]method[:key=value]...")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--seconds", type=float, help="of training a run")
    parser.add_argument("--videos", type=int, help="shown to the reward in a run, instead of seconds")
    parser.add_argument("--points", type=int, default=3, help="checkpoints of a run that are scored")
    parser.add_argument("--prompts", type=int, default=16, help=f"in-domain prompts, of {COPIES} videos each")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="settings of all runs, as for rlvid train")
    options = parser.parse_intermixed_args()
    console = Console()
    seeds = check(options)
    if options.one:
        return run_one(Entry.parse(options.one), seeds[0], options, console)
    entries = [(text, Entry.parse(text)) for text in options.methods.split(",")]
    labels = [entry.label for _, entry in entries]
    if len(set(labels)) < len(labels):
        raise ValueError(f"--methods: labels must differ, and these do not: {', '.join(labels)}; give label=method:...")
    cores = os.cpu_count() or 1
    for _, entry in entries:
        train = configure(entry, seeds[0], options).train
        if options.jobs > 1 and "RAY_ADDRESS" not in os.environ and options.jobs * train.workers > cores:
            raise ValueError(
                f"--jobs {options.jobs} of train.workers = {train.workers} share {cores} cores, which makes seconds "
                "mean nothing; add train.workers=1, or lower --jobs"
            )
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / ".lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another comparison runs in {options.out}; wait for its end, or choose another --out"
            ) from None
        runs = [(text, entry, seed) for seed in seeds for text, entry in entries]
        missing = [run for run in runs if finished(run[1], run[2], options) is None]
        with kept(f"finished runs, and checkpoints of the others, are in {options.out}"):
            failed = run_all(missing, options, console)
        ended: dict[str, list[tuple[int, list[Point]]]] = {label: [] for label in labels}
        for _, entry, seed in runs:
            if points := finished(entry, seed, options):
                ended[entry.label].append((seed, points))
        report({label: found for label, found in ended.items() if found}, options.out, console)
    if failed:
        raise RuntimeError(f"{len(failed)} runs failed ({', '.join(failed)}); their logs are in {options.out}")
    return None


def check(options: argparse.Namespace) -> list[int]:
    """The seeds, once all options make sense.

    Raises:
        ValueError: an option does not.
    """
    if bool(options.seconds) == bool(options.videos):
        raise ValueError("give a budget: either --seconds or --videos")
    if min(options.points, options.prompts, options.jobs) < 1:
        raise ValueError("--points, --prompts and --jobs must be 1 or more")
    if taken := [each for each in options.overrides if each.startswith(PER_RUN)]:
        raise ValueError(f"{taken[0]!r}: the comparison sets this for each run; use --methods, --seeds or --out")
    seeds = options.seeds.split(",")
    if len(set(seeds)) < len(seeds) or not all(seed.strip().isdigit() for seed in seeds):
        raise ValueError(f"--seeds {options.seeds!r}: give different whole numbers, such as 0,1,2")
    return [int(seed) for seed in seeds]


def report(ended: dict[str, list[tuple[int, list[Point]]]], out: Path, console: Console) -> None:
    """Writes the table and the curves of the runs that have ended."""
    if not ended:
        return
    results = {label: [points for _, points in found] for label, found in ended.items()}
    (out / "comparison.md").write_text(table(results), encoding="utf-8")
    draw(results, out / "comparison.png")
    write_board(ended, out / "tensorboard")
    console.print((out / "comparison.md").read_text("utf-8"), markup=False, highlight=False, soft_wrap=True)
    console.print(f"in {out}: comparison.md, comparison.png, tensorboard/", highlight=False)


if __name__ == "__main__":
    sys.exit(run_command(main))
