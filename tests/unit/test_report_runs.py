"""A report of runs: curves, costs, cards, seeds as one, looks of their own."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from evaluated_runs import curves, several_seeds
from evaluations import score, write_evaluation
from helpers import save_run
from pages import Page
from PIL import Image

from rlvid.plots.style import STYLES, styles_of
from rlvid.report.drawings import along_runs, reward_curves
from rlvid.report.inputs import Group, read_inputs
from rlvid.report.page import summaries_of
from rlvid.report.runs import read_run
from rlvid.report.seeds import over_seeds
from rlvid.report.select import select_cases
from rlvid.report.write import write_report


@pytest.mark.slow
def test_runs_bring_curves_costs_config_card_and_evolution(tmp_path: Path) -> None:
    folders = []
    for name, seed in (("one", 0), ("two", 1)):
        run, _ = save_run(tmp_path / name, step=40)
        config = yaml.safe_load((run / "config.yaml").read_text()) | {"name": name, "seed": seed}
        config["model"]["path"] = "builtin"
        config["output"]["storage"] = str(tmp_path / "private" / "store")
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        curves(run, 0.1 * seed)
        folders.append(run)
    looks = [{"step": s, "time": 0.0, "of": "x", "mean": {}, "values": values(s)} for s in (0, 20, 30, 40)]
    (folders[0] / "guard.jsonl").write_text("".join(json.dumps(look) + "\n" for look in looks))
    (folders[0] / "best").mkdir()
    (folders[0] / "best" / "best.json").write_text('{"step": 20, "scale": 0.5, "reason": "the least gain"}')
    models = [{"name": "base", "label": "base", "kind": "base", "path": None, "step": None, "scale": 0.0}] + [
        {"name": f"s{s}", "label": f"step {s}", "kind": "checkpoint", "path": str(folders[0]), "step": s, "scale": 1.0}
        for s in (20, 40)
    ]
    folder = write_evaluation(tmp_path / "ev", models)
    write_evaluation(tmp_path / "alone", models[:2])
    made = write_report([folder, folders[1]], tmp_path / "out", moving=0)
    assert made.notes == ()
    page = Page(made.folder / "index.html")
    for words in (
        "What a step cost", "everything else", "rank: 4", "Intended use and limits", "over-optimised at step 40",
        "it recommends one@20*0.5 (the least gain)",
        "Prompts that got worse", "a green square moving up",
    ):  # fmt: skip
        assert words in page.text, words
    assert str(tmp_path) not in (made.folder / "index.html").read_text(), "where things lie is nobody's business"
    assert "storage: store" in page.text
    assert (made.folder / "pictures" / "evolution-1-1-in-domain.png").is_file()
    runs = [read_run(folder) for folder in folders]
    assert runs[0].costs() == [("chain", 1.5, 0.75), ("decode", pytest.approx(0.1), pytest.approx(0.05)),
                               ("everything else", pytest.approx(0.4), pytest.approx(0.2))]  # fmt: skip
    assert runs[0].clock[39] == pytest.approx(80)
    assert runs[0].kind == runs[1].kind
    assert (made.folder / "pictures" / "along-seconds-50.png").is_file()
    inputs = read_inputs([folder])
    assert {step: model.name for step, model in inputs.line(runs[0]).items()} == {20: "s20", 40: "s40"}
    drawn = along_runs(inputs, 20, "steps")
    assert drawn is not None
    assert b"<svg" in drawn["dark"]
    assert along_runs(read_inputs([tmp_path / "alone"]), 20, "steps") is None  # one checkpoint is no line
    (group,) = read_inputs([folder, *folders]).groups()
    assert {run.name for run in group.runs} == {"one", "two"}
    drawn = reward_curves([Group("both", group.runs, group.style)], "seconds")
    assert drawn is not None
    assert drawn["light"] != drawn["dark"]
    assert b"<svg" in drawn["light"]
    with Image.open(io.BytesIO(drawn["png"])) as image:
        assert image.width > 1200


def test_a_run_without_checkpoints_is_told_and_its_videos_are_shown(tmp_path: Path) -> None:
    folder = several_seeds(tmp_path)
    shutil.rmtree(tmp_path / "other" / "step-000003")
    inputs = read_inputs([folder])
    assert [run.name for run in inputs.runs] == ["iv-seed0", "iv-seed1"]
    assert any(note.startswith("other: its run cannot be read") for note in inputs.notes)


def test_extremes_are_those_of_any_seed(tmp_path: Path) -> None:
    inputs = read_inputs([several_seeds(tmp_path)])
    choice = select_cases(inputs.evaluation, 2, inputs.pictured)
    assert choice.featured[1][1].model.name == "other"  # later models lose more, see score()
    data = replace(inputs.evaluation, scores=dict(inputs.evaluation.scores))
    lowest = data.cases[3]
    data.scores["iv-seed1", lowest] = data.scores["iv-seed1", lowest] | {"held_out": -9.0}
    assert select_cases(data, 2, inputs.pictured).worst[0] == (lowest, data.models[2])


def test_looks_are_told_apart_without_colour() -> None:
    assert len({look.marker for look in STYLES}) == len({look.glyph for look in STYLES}) == len(STYLES)
    assert len({look.dash for look in STYLES}) == len(STYLES)
    assert len({look.colour for look in STYLES[:7]}) == 7
    names = [f"model {number}" for number in range(13)]
    assert len(set(styles_of(names, "model 0").values())) == 13


@pytest.mark.slow
def test_models_that_differ_in_seed_alone_are_a_row_of_tables_and_have_one_look(tmp_path: Path) -> None:
    folder = several_seeds(tmp_path)
    inputs = read_inputs([folder])
    assert inputs.seeds == {"instructvideo (2 seeds)": ["iv-seed0", "iv-seed1"], "other": ["other"]}
    assert inputs.styles["iv-seed0"] == inputs.styles["iv-seed1"]
    assert len(set(inputs.styles.values())) == 3
    assert [model.name for model in inputs.pictured] == ["base", "iv-seed0", "other"]
    assert inputs.called("iv-seed1") == "instructvideo (2 seeds)"
    made = write_report([folder], moving=2)
    page = Page(made.folder / "index.html")
    for words in ("Each against each, D = 50", "a bootstrap over prompts, paired", "Welch's", "Each of the 3 models"):
        assert words in page.text, words
    first = over_seeds(inputs)[0].grid.rows[1]
    assert first[0].text == "instructvideo (2 seeds)"
    gains = [score(model, index, 0, case) for model in (1, 2) for case, index in enumerate(range(3))]
    assert first[1].text == f"{np.mean(gains):.3f} ± {np.std(gains, ddof=1):.3f}"
    again = yaml.safe_load((folder / "evaluation.yaml").read_text())
    again["models"][2]["path"] = again["models"][1]["path"]  # one run under two names: no second seed
    (folder / "evaluation.yaml").write_text(yaml.safe_dump(again))
    assert read_inputs([folder]).seeds == {}
    assert over_seeds(read_inputs([folder])) == []


def test_runs_that_differ_in_more_than_the_seed_have_looks_of_their_own_and_other_rewards_are_told(
    tmp_path: Path,
) -> None:
    first, _ = save_run(tmp_path / "home")
    runs = [first, *(tmp_path / name for name in ("second", "third"))]
    for place, run in enumerate(runs):
        if place:
            shutil.copytree(first, run)
        config = yaml.safe_load((first / "config.yaml").read_text()) | {"name": run.name}
        config["model"]["path"] = "builtin"
        config["sampling"]["guidance"] = 2.0 + place
        config["reward"]["held_out"] = "brightness"
        if place == 2:
            config["reward"]["name"] = "brightness"
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    models = [{"name": "base", "label": "base", "kind": "base", "path": None, "step": None, "scale": 0.0}] + [
        {"name": run.name, "label": run.name, "kind": "run", "path": str(run), "step": 3, "scale": 1.0}
        for run in (runs[0], runs[2])
    ]
    folder = write_evaluation(tmp_path / "ev", models)
    inputs = read_inputs([runs[2], runs[1], folder])  # the second was not evaluated
    groups = inputs.groups()
    assert [group.label for group in groups] == ["third", "second", "run"]
    assert len({group.style for group in groups}) == 3
    assert groups[0].style == inputs.styles["third"]
    assert groups[2].style == inputs.styles["run"]
    told = {each.model.name: " ".join(each.cautions) for each in summaries_of(inputs)}
    assert "trained on" not in told["run"]
    assert "It was trained on the reward brightness; what is called the reward here is builtin." in told["third"]
    assert "brightness is held out here, but not for this model" in told["third"]


def values(step: int) -> dict[str, list[float]]:
    """Looks whose trained reward rises, and whose held-out reward falls from step 20 on."""
    held = {0: 0.4, 20: 0.6, 30: 0.3, 40: 0.2}[step]
    wave = [0.001 * (k % 3) for k in range(8)]
    return {"reward": [0.4 + step / 100 + w for w in wave], "held_out": [held + w for w in wave],
            "consistency": [0.9 + w for w in wave], "motion": [0.02 + w for w in wave],
            "diversity": [0.05 + w for w in wave]}  # fmt: skip
