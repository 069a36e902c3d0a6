"""Methods side by side at equal budgets on the built-in world: a table, and curves against seconds and videos.

    python jobs/compare.py --seconds 150                             # every method, three seeds; about 100 minutes
    python jobs/compare.py --methods instructvideo,ddpo --seeds 0 --videos 400
    python jobs/compare.py --methods a=instructvideo,b=instructvideo:reward.attenuation=0

The budget of a run is seconds of its own steps, or videos shown to the reward. A method may be given a label and
settings of its own (label=method:key=value:...), so ablations are compared in the same way. Whatever is finished is
kept: start the same command again to go on.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5 % quantile of Student's t for 1, 2, ... degrees of freedom."""
ALL = "instructvideo,draft,draft-lv,alignprop,ddpo,dpok,rwr,raft"
SHOWN = {
    "reward": "Reward", "held_out": "Held-out reward", "clipsim": "CLIPSIM", "consistency": "Temporal consistency",
    "motion": "Motion", "oracle_score": "Oracle score",
}  # fmt: skip


def parse_entry(text: str) -> tuple[str, str, list[str]]:
    """(label, method, settings) of ``[label=]method[:key=value]...``.

    Raises:
        ValueError: no such method.
    """
    from rlvid.config.methods import METHODS

    head, *settings = text.split(":")
    label, _, method = head.rpartition("=")
    if method not in METHODS:
        raise ValueError(f"--methods {text!r}: {method!r} is not a method; allowed: {', '.join(METHODS)}")
    return label or method, method, settings


def run_settings(label: str, method: str, seed: int, out: Path, options: argparse.Namespace) -> list[str]:
    """The overrides of one run."""
    budget = [f"train.max_seconds={options.seconds}"] if options.seconds else []
    return [
        f"name={label}-seed{seed}", f"seed={seed}", f"method={method}", f"output.storage={out}",
        "output.videos_every=0", "output.archive_every=0", "output.keep_checkpoints=1000", *budget,
    ]  # fmt: skip


def steps_of(config: Any, options: argparse.Namespace) -> int:
    """Steps of a run: as many as show the reward so many videos, or more than any number of seconds takes."""
    if not options.videos:
        return 100_000
    shown = config.train.batch_size * getattr(config.method, "repeats", 1)
    return max(1, options.videos // shown)


Point = dict[str, Any]
"""A checkpoint's step, its cost so far, and the mean and deviation of every metric."""


def evaluate_checkpoints(folder: Path, prompts: dict[str, list[str]], points: int, console: Console) -> list[Point]:
    """Scores of the base and of ``points`` checkpoints of a run, spread to the last; each is kept beside the run."""
    from rlvid.evaluate.evaluate import evaluate_model, summarise
    from rlvid.evaluate.run import device, load_run
    from rlvid.reward.clip import load_reward
    from rlvid.train.checkpoint import find_checkpoints

    found = find_checkpoints(folder)
    chosen = {found[math.ceil((i + 1) * len(found) / points) - 1].step for i in range(points)} if found else set()
    results = []
    for step in [0, *sorted(chosen)]:
        path = folder / f"scores-{step:06d}.json"
        if not path.is_file():
            tuned = load_run(folder, step or None)
            model = tuned.use(1.0 if step else 0.0)
            rows = evaluate_model(
                model, prompts, name=folder.name, reward=load_reward("builtin", device()),
                held_out=load_reward("builtin-heldout", device()), steps_list=[tuned.config.sampling.steps],
                guidance=tuned.config.sampling.guidance, final=tuned.config.sampling.final,
            )  # fmt: skip
            state = json.loads((tuned.checkpoint.folder / "state.json").read_text(encoding="utf-8"))
            (summary,) = summarise(rows)
            cost = {"seconds": state["seconds"], "videos": state["videos"]} if step else {"seconds": 0.0, "videos": 0}
            scores = {"step": step, **cost, "mean": summary.mean, "std": summary.std}
            path.write_text(json.dumps(scores), encoding="utf-8")
            console.print(f"{folder.name} step {step}: reward {summary.mean['reward']:.3f}", highlight=False)
        results.append(json.loads(path.read_text(encoding="utf-8")))
    return results


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the 95 % interval of Student's t over seeds (NaN for one seed)."""
    if len(values) < 2:
        return values[0], math.nan
    quantile = STUDENT[min(len(values) - 2, len(STUDENT) - 1)]
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), half


def table(results: dict[str, list[list[Point]]]) -> str:
    """Markdown: the base, then every method at its end; mean over seeds and its interval."""
    lines = ["| Method | Seconds | Videos | " + " | ".join(SHOWN.values()) + " |", "|---|" + "---:|" * (len(SHOWN) + 2)]
    runs = next(iter(results.values()))
    groups = {"base": [run[0] for run in runs]} | {name: [run[-1] for run in each] for name, each in results.items()}
    for name, ends in groups.items():
        cells = [f"{statistics.mean(end['seconds'] for end in ends):.0f}"]
        cells.append(f"{statistics.mean(end['videos'] for end in ends):.0f}")
        for metric in SHOWN:
            mean, half = interval([end["mean"][metric] for end in ends])
            cells.append(f"{mean:.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}"))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(results: dict[str, list[list[Point]]], path: Path) -> None:
    """Reward against seconds and against videos, and oracle against reward; a line a method, a thin one a seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    styles = ["-", "--", "-.", ":"]
    for index, (name, runs) in enumerate(results.items()):
        look = {"color": f"C{index}", "linestyle": styles[index % 4]}
        for place, (across, up) in enumerate((("seconds", "reward"), ("videos", "reward"), ("reward", "oracle_score"))):
            for number, run in enumerate(runs):
                x = [point["mean"][across] if across in point["mean"] else point[across] for point in run]
                y = [point["mean"][up] for point in run]
                panels[place].plot(x, y, linewidth=1.2, marker=".", label=name if number == 0 else None, **look)
    labels = (("seconds of training", "reward"), ("videos rewarded", "reward"), ("trained reward", "oracle score"))
    for panel, (across, up) in zip(panels, labels, strict=True):
        panel.set_xlabel(across)
        panel.set_ylabel(up)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Trains and evaluates one run after another, then writes the table and the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=ALL, help="comma-separated: [label=]method[:key=value]...")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--seconds", type=float, help="of training a run")
    parser.add_argument("--videos", type=int, help="shown to the reward in a run, instead of seconds")
    parser.add_argument("--points", type=int, default=4, help="checkpoints of a run that are evaluated")
    parser.add_argument("--prompts", type=int, default=24, help="in-domain prompts of an evaluation")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("overrides", nargs="*", help="settings of all runs, as for rlvid train")
    options = parser.parse_args()
    console = Console()
    from rlvid.config import load_config
    from rlvid.toy.captions import prompt_set
    from rlvid.train.launch import train

    if bool(options.seconds) == bool(options.videos):
        raise ValueError("give a budget: either --seconds or --videos")
    prompts = {"in_domain": prompt_set("in_domain", options.prompts)}
    results: dict[str, list[list[Point]]] = {}
    for label, method, settings in map(parse_entry, options.methods.split(",")):
        for seed in map(int, options.seeds.split(",")):
            overrides = [*run_settings(label, method, seed, options.out, options), *options.overrides, *settings]
            config = load_config("toy", overrides)
            config = load_config("toy", [*overrides, f"train.steps={steps_of(config, options)}"])
            console.print(f"{config.name}: training", highlight=False)
            done = train(config, console)
            points = evaluate_checkpoints(done.folder, prompts, options.points, console)
            results.setdefault(label, []).append(points)
            (options.out / "comparison.md").write_text(table(results), encoding="utf-8")
            draw(results, options.out / "comparison.png")
    console.print((options.out / "comparison.md").read_text(encoding="utf-8"), markup=False, highlight=False)
    console.print(f"in {options.out}: comparison.md, comparison.png", highlight=False)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
