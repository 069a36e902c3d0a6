"""The report of a sweep, on scores made up for the purpose."""

import csv
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlvid.config import load_config
from rlvid.evaluate.results.rows import METRICS
from rlvid.evaluate.results.summary import Comparison
from tuning.description import Sweep
from tuning.journal import Journal, scores_path, write_scores
from tuning.load import load_sweep
from tuning.measure import least, rows_of
from tuning.outcomes import Outcome, collect, pareto, ranked
from tuning.report import write_report
from tuning.words import _few, found

PROMPTS = [f"prompt {i}" for i in range(8)]
BASE = 0.4
FURTHER = ("reward_builtin_frames", "reward_builtin_video")


def made_up(model: str, step: int, level: float, seconds: float) -> dict[str, Any]:
    """Scores around a level; videos differ, in the same way for all trials, as those of fixed prompts and noise do."""
    rows, generator = [], random.Random(step)
    for index, prompt in enumerate(PROMPTS):
        values = {metric: level + index / 50 + generator.gauss(0, 0.002) for metric in METRICS} | {
            "diversity": math.nan
        }
        extra = {name: level + index / 50 for name in FURTHER}
        video = {"model": model, "set": "in_domain", "steps": 10, "index": index, "prompt": prompt}
        rows.append(video | values | {"extra": extra})
    mean = {metric: sum(row[metric] for row in rows) / len(rows) for metric in METRICS}
    mean |= {name: sum(row["extra"][name] for row in rows) / len(rows) for name in FURTHER}
    scores = {"step": step, "seconds": seconds, "videos": 4 * step, "mean": mean, "std": mean, "rows": rows}
    base = scores if model == "base" else made_up("base", 0, BASE, 0.0)
    mean["gain"] = least(rows_of(scores), rows_of(base)).deviations
    return scores


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """A sweep of six trials: two finished, three stopped early, one failed before anything was measured."""
    made = load_sweep(
        "toy",
        [f"storage={tmp_path}", "metric=gain", "space.reward.segments=[1, 4]", "space.reward.attenuation=[0, 1, inf]"],
    )
    made.folder.mkdir()
    journal = Journal(made.folder)
    write_scores(made.folder / "base.json", made_up("base", 0, BASE, 0.0))
    levels = {0: (0.5, 0.6), 1: (0.45, None), 2: (0.42, None), 3: (0.55, 0.8), 4: (0.41, None), 5: (None, None)}
    for number, settings in enumerate(made.planned()):
        other_order = dict(reversed(settings.items()))  # than that of space
        journal.append({"trial": number, "settings": settings if number == 3 else other_order})
        for step, level in zip(made.rungs, levels[number], strict=True):
            if level is not None:
                path = scores_path(made.folder, f"trial-{number:03d}", step)
                write_scores(path, made_up(f"trial-{number:03d}", step, level, 2.0 * step + number))
                end = "finished" if step == 12 else "goes on" if levels[number][1] else "stopped early"
                journal.append({"trial": number, "step": step, "score": level, "decision": end})
    journal.append({"trial": 5, "failed": "the disk is full"})
    return made


def test_the_report_has_every_trial(sweep: Sweep) -> None:
    folder = write_report(sweep, Journal(sweep.folder))
    assert folder is not None
    with open(folder / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == [f"trial-{i:03d}" for i in range(6)]
    assert [row["end"] for row in rows] == ["finished", *["stopped early"] * 2, "finished", "stopped early", "failed"]
    assert [int(row["step"]) for row in rows] == [12, 4, 4, 12, 4, 0]
    assert [row["reward.attenuation"] for row in rows] == ["0", "0", "1", "1", "inf", "inf"]
    for metric in ("held_out", *FURTHER):
        assert float(rows[3][metric]) == pytest.approx(0.87, abs=0.005)
    table = (folder / "results.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table[2:5]] == ["base", "trial-003", "trial-000"]
    page = (folder / "report.md").read_text()
    assert "**Best by least gain: trial-003, reward.attenuation=1 reward.segments=4**, with 8.11 after" in page
    assert "which these videos tell apart" in page
    assert "2 ran to the last of 4, 12 steps, 3 were stopped early, 1 failed" in page
    assert "`reward.segments` after 4 steps, mean least gain (trials): 1: 0.88 (3)" in page


def test_the_best_settings_can_be_trained(sweep: Sweep) -> None:
    folder = write_report(sweep, Journal(sweep.folder))
    assert folder is not None
    best = load_config(folder / "best.yaml")
    assert (best.name, best.reward.attenuation, best.reward.segments) == ("toy-sweep-best", 1, 4)
    assert best.train.steps == 60


def test_pictures_are_drawn_and_hparams_are_read_back(sweep: Sweep) -> None:
    folder = write_report(sweep, Journal(sweep.folder))
    assert folder is not None
    for name in ("parallel.png", "heatmap.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 400
            assert len(picture.convert("RGB").getcolors(2**20) or []) > 50
    boards = sorted(path.name for path in (sweep.folder / "hparams").iterdir())
    assert boards == [f"trial-{i:03d}" for i in range(5)]  # the failed one has nothing to show
    write_report(sweep, Journal(sweep.folder))  # again, as after a restart: nothing twice
    events = EventAccumulator(str(sweep.folder / "hparams" / "trial-003"))
    events.Reload()
    assert [event.step for event in events.Scalars("sweep/held_out")] == [4, 12]
    assert events.Scalars("sweep/held_out")[1].value == pytest.approx(0.87, abs=0.005)
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    (started,) = (
        HParamsPluginData.FromString(content).session_start_info.hparams
        for tag, content in events.PluginTagToContent("hparams").items() if tag.endswith("session_start_info")
    )  # fmt: skip
    assert started["reward.segments"].number_value == 4
    assert started["reward.attenuation"].string_value == "1"  # beside an infinite one


def test_the_front_is_what_no_other_beats(sweep: Sweep) -> None:
    outcomes = collect(sweep, Journal(sweep.folder))
    assert [one.trial.number for one in pareto(outcomes, ["held_out"])] == [3]
    both = pareto(outcomes, ["held_out", "seconds"])  # 0 is worse than 3 and cheaper; 1 beats 2 and 4 in both
    assert [one.trial.number for one in both] == [0, 1, 3]
    assert [one.trial.number for one in ranked(sweep, outcomes)] == [3, 0]


def test_a_sweep_of_ranges_has_no_map(sweep: Sweep, tmp_path: Path) -> None:
    made = load_sweep("toy", [
        f"storage={tmp_path}", "name=ranges", "algorithm=random", "trials=3", "scheduler=none", "rungs=[2]",
        "space={optimizer.lr: {loguniform: [1e-4, 1e-2]}, method.tau: {uniform: [0.4, 0.8]}}",
    ])  # fmt: skip
    made.folder.mkdir()
    journal = Journal(made.folder)
    for number, settings in enumerate(made.planned()):
        journal.append({"trial": number, "settings": settings})
        write_scores(
            scores_path(made.folder, f"trial-{number:03d}", 2),
            made_up(f"trial-{number:03d}", 2, 0.5 - number / 10, 3.0),
        )
        journal.append({"trial": number, "step": 2, "score": 0.5 - number / 10, "decision": "finished"})
    folder = write_report(made, journal)
    assert folder is not None
    assert sorted(path.name for path in folder.glob("*.png")) == ["parallel.png"]
    assert "heatmap" not in (folder / "report.md").read_text()
    assert json.loads((made.folder / "trial-000" / "rungs" / "000002.json").read_text())["step"] == 2


def test_few_prompts_tell_nothing_apart() -> None:
    gain = Comparison("base", "tuned", "set", 20, "held_out", 8, 2, 0, 0.1, 0.05, 0.15, 1.0)
    assert gain.way == 0
    assert _few(gain) == " (2 prompts; certainty takes 6)"
    assert _few(replace(gain, prompts=6)) == ""
    loss = replace(gain, difference=-0.1, low=-0.15, high=-0.05)
    assert _few(loss) == " (2 prompts; certainty takes 6)"
    assert replace(loss, prompts=6).way == -1


def test_a_certain_loss_is_no_chance(sweep: Sweep) -> None:
    outcomes = collect(sweep, Journal(sweep.folder))
    order = ranked(sweep, outcomes)
    base = order[0].scores[order[0].step or 0]
    rows = [row | {"extra": {name: value + 0.5 for name, value in row["extra"].items()}} for row in base["rows"]]
    better = base | {"rows": rows}
    (line,) = (each for each in found(sweep, outcomes, order, better) if "The base's mean" in each)
    assert "a difference of -0.500 [-0.500, -0.500]" in line
    assert "chance" not in line


def test_the_next_one_is_compared_where_it_gains_least(sweep: Sweep) -> None:
    """In the reward where the best gains least, the next one may be ahead of it."""
    outcomes = collect(sweep, Journal(sweep.folder))
    best, second = ranked(sweep, outcomes)

    def moved(one: Outcome, held_out: float, video: float) -> None:
        for row in one.scores[12]["rows"]:
            row["held_out"] += held_out
            row["extra"]["reward_builtin_frames"] += held_out
            row["extra"]["reward_builtin_video"] += video

    moved(best, 0.0, 0.5)
    moved(second, 0.5, 0.0)
    base = made_up("base", 0, BASE, 0.0)
    (line,) = (each for each in found(sweep, outcomes, [best, second], base) if "The next one" in each)
    assert "a difference in reward builtin_video of +0.700 [" in line
