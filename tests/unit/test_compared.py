"""Models side by side: what MODEL means, one base for all, seeds as one, the paper's layouts, tables in LaTeX."""

import csv
import dataclasses
import gc
import io
import json
import math
import re
import shutil
import subprocess
import weakref
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from evaluated_runs import another
from helpers import save_run
from rows import models_of_the_paper, row
from typer.testing import CliRunner

from rlvid.actions import evaluate_and_show
from rlvid.cli import app
from rlvid.config import load_config, parse_config
from rlvid.config.reward import RewardConfig
from rlvid.data.prompts import ANIMAL_SETS, resolve_prompts
from rlvid.diffusion.generate import generate
from rlvid.escape import latex_text
from rlvid.evaluate.cache import read_part
from rlvid.evaluate.command import default_sets, evaluation_folder, prompts_of
from rlvid.evaluate.load import TunedModel
from rlvid.evaluate.models import Loader, base_alone, find_models, load_found, parse_spec
from rlvid.evaluate.results.pairwise import pairwise
from rlvid.evaluate.results.rows import METRICS
from rlvid.evaluate.results.seeds import RunGroup, group_seeds, name_groups, seed_results
from rlvid.evaluate.results.summary import compare
from rlvid.evaluate.scorers import Scorers, differences, parse_rewards
from rlvid.evaluate.tables.groups import write_pairwise, write_seeds
from rlvid.evaluate.tables.pages import write_results
from rlvid.evaluate.tables.paper import write_layouts
from rlvid.evaluate.tables.table import Cell, Grid
from rlvid.evaluate.work import check_distinct
from rlvid.models.load import resolved_shift
from rlvid.reward.motion import motion
from rlvid.stats import bootstrap_means
from rlvid.world.captions import prompts_in_set


@pytest.mark.parametrize(
    ("text", "label", "run", "which", "scale"),
    [
        ("toy", None, "toy", None, None),
        ("toy@40", None, "toy", "40", None),
        ("toy@all*0.5", None, "toy", "all", 0.5),
        ("my label=runs/toy@best*2", "my label", "runs/toy", "best", 2.0),
        ("runs/lr=1", None, "runs/lr=1", None, None),
        ("s3://b/runs/toy?scheme=http&endpoint_override=h:9", None,
         "s3://b/runs/toy?scheme=http&endpoint_override=h:9", None, None),
        ("far=s3://b/toy@40", "far", "s3://b/toy", "40", None),
    ],
)  # fmt: skip
def test_a_model_is_read_part_by_part(
    text: str, label: str | None, run: str, which: str | None, scale: float | None
) -> None:
    spec = parse_spec(text)
    assert (spec.label, spec.run, spec.which, spec.scale) == (label, run, which, scale)


def test_models_have_names_of_their_own_and_one_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, config = save_run(tmp_path)
    save_run(tmp_path, step=6)
    other = another(run, "other")
    names = [
        (model.name, model.kind, model.step, model.scale)
        for model in find_models([f"{run}@all", f"{other}*0.5", f"mine={other}@3"], scales=(1.0,))
    ]
    assert names == [
        ("base", "base", None, 0.0), ("run@3", "checkpoint", 3, 1.0), ("run@6", "checkpoint", 6, 1.0),
        ("other × 0.5", "run", 6, 0.5), ("mine", "checkpoint", 3, 1.0),
    ]  # fmt: skip
    alone = find_models([str(run)], scales=(0.5, 1.0), step=3)
    assert [(model.name, model.step) for model in alone] == [
        ("base", None), ("instructvideo × 0.5", 3), ("instructvideo", 3)
    ]  # fmt: skip
    assert alone[0].describe()["path"] == str(tmp_path / "tiny")
    assert alone[0].made_of == find_models([str(other)])[0].made_of
    for texts, complaint in (
        ([str(run), str(run)], "two models are called 'instructvideo'; give each a label: LABEL=RUN"),
        ([f"base={run}"], "two models are called 'base'; that is what the base model is called"),
        ([f"{run}@5"], "no checkpoint of step 5; it has: 3, 6"),
        ([f"{run}@best"], r"the best checkpoint of run .* was never sought; guard\.every=N"),
        ([], "no MODEL; name at least one"),
    ):
        with pytest.raises(ValueError, match=complaint):
            find_models(texts)
    model = config.model.model_dump(mode="json")
    odd = another(run, "odd", model=model | {"frames": 8})
    with pytest.raises(ValueError, match=r"'odd' cannot stand beside 'run': .* 8 frames .*, the other's .* 4 frames"):
        find_models([str(run), str(odd)])
    monkeypatch.chdir(tmp_path)
    assert evaluation_folder(alone, None) == run
    assert evaluation_folder(find_models([str(run), str(other)]), None) == Path("runs/evaluation")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letters.txt").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in (tmp_path / "mine", Path("~/mine")):
        with pytest.raises(ValueError, match="holds something that is no evaluation"):
            evaluation_folder(alone, folder)


def test_what_runs_differ_in_is_said(tmp_path: Path) -> None:
    run, _ = save_run(tmp_path)
    mixed = [
        another(run, f"mixed{weight}", reward={"mixture": [{"name": "brightness", "weight": weight}]})
        for weight in (1, 2)
    ]
    other = another(run, "other", sampling={"guidance": 3.0}, reward={"held_out": "compression"})
    assert differences(find_models([str(run), str(another(run, "same"))])) == []
    assert differences(find_models(list(map(str, mixed)))) == [
        "the runs differ in reward (1 x brightness, 2 x brightness); all are evaluated with 1 x brightness"
    ]
    assert differences(find_models([str(run), str(other)])) == [
        "the runs differ in sampling.guidance (2.0, 3.0); all are evaluated with 2.0",
        "the runs differ in reward.held_out (builtin-heldout, compression); all are evaluated with builtin-heldout",
    ]


def test_runs_whose_base_is_sampled_otherwise_are_not_evaluated_together(tmp_path: Path) -> None:
    run, config = save_run(tmp_path, base="tiny-wan")
    model, sampling = config.model.model_dump(mode="json"), config.sampling.model_dump(mode="json")
    same = another(run, "same", model=model | {"shift": resolved_shift(config.model)})
    moved = another(run, "moved", model=model | {"shift": 7.0})
    assert len(find_models([str(run), str(same)])) == 3
    with pytest.raises(ValueError, match=r"^'moved' cannot stand beside 'run': its model\.shift is 7\.0, .*of one mod"):
        find_models([str(run), str(moved)])
    negative = another(run, "negative", sampling=sampling | {"negative_prompt": "blur"})
    with pytest.raises(ValueError, match=r"its sampling\.negative_prompt is 'blur', the other's '', and the base"):
        find_models([str(run), str(negative)])
    unguided = another(run, "unguided", sampling=sampling | {"guidance": 1.0})
    assert len(find_models([str(unguided), str(negative)])) == 3, "no branch reads the negative prompt"


def test_a_model_is_let_go_before_the_next_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, config = save_run(tmp_path)
    other = another(run, "other", model=config.model.model_dump(mode="json") | {"decode_chunk": 2})
    loaded: list[weakref.ref[object]] = []
    alive: list[int] = []

    def watched(*what: object) -> TunedModel:
        gc.collect()
        alive.append(sum(each() is not None for each in loaded))
        made = load_found(*what)
        loaded.append(weakref.ref(made.model))
        return made

    monkeypatch.setattr("rlvid.evaluate.models.load_found", watched)
    loader = Loader()
    for model in find_models([str(run), str(other)]):
        loader.use(model)
    assert alive == [0, 0]  # the base and the first run are one


@pytest.mark.parametrize("finetune", ["lora", "full"])
def test_a_base_model_alone_is_the_base_of_its_run(tmp_path: Path, finetune: str) -> None:
    run, config = save_run(tmp_path, finetune=finetune)
    loaders = Loader(), Loader()
    models = [
        loader.use(each[0]) for loader, each in zip(loaders, (base_alone(config), find_models([str(run)])), strict=True)
    ]
    alone, beside = (generate(model, ["a dog"], seed=0, steps=2) for model in models)
    assert torch.equal(alone, beside)
    assert base_alone(config)[0].made_of == find_models([str(run)])[0].made_of
    assert loaders[0].use(base_alone(config)[0]) is models[0], "it is loaded once"


def test_the_motion_of_a_base_model_is_measured_before_there_is_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, config = save_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    mixture = [{"name": "brightness"}, {"name": "motion", "floor": 0.5}]
    description = config.model_dump(mode="json", exclude={"data"})
    Path("mine.yaml").write_text(yaml.safe_dump(description | {"reward": {"mixture": mixture, "held_out": None}}))
    Path("words.txt").write_text("a dog\na red circle\n")
    arguments = ["evaluate", "--base", "mine.yaml", "name=mine", "--steps", "2", "--sets", "words.txt"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    said = capsys.readouterr().out + done.output
    assert "1 model (base), 2 videos" in said
    assert "rlvid report runs/mine-base" in said
    assert "study serve" not in said
    found = pq.read_table("runs/mine-base/evaluation.parquet").to_pylist()
    videos = read_part(Path("runs/mine-base/videos/part-00000.parquet"))
    assert [each["motion"] for each in found] == pytest.approx(motion(videos).tolist())
    assert all(0 < each["motion"] < 0.5 for each in found)
    about = yaml.safe_load(Path("runs/mine-base/evaluation.yaml").read_text())
    assert about["complete"]
    assert about["rewards"]["reward"] == "1 x brightness + 1 x motion (floor 0.5)"
    assert f"base model: {tmp_path}" in Path("runs/mine-base/evaluation.md").read_text()


def test_who_names_a_config_where_a_run_is_wanted_is_told_of_its_base_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my own.yaml").write_text("name: mine\n")
    for text, way in (
        ("toy", "toy"),
        ("builtin-wan", "toy name=builtin-wan model.path=builtin-wan"),
        ("my own.yaml", "'my own.yaml'"),
    ):
        with pytest.raises(ValueError, match=rf"no such folder.* alone: rlvid evaluate --base {re.escape(way)}$"):
            find_models([text])
    with pytest.raises(ValueError, match=r"no such run under runs \(there: none\)$"):
        find_models(["nowhere"])
    assert load_config("toy", ["model.path=builtin-wan", "model.frames=9"]).model.frames == 9
    toy = load_config("toy")
    for further in ({"checkpoint": 3}, {"scales": (0.5, 1.0)}):
        with pytest.raises(ValueError, match="omit --checkpoint and --lora-scale"):
            evaluate_and_show([], base=toy, steps=[2], **further)  # type: ignore[arg-type]
    assert [model.path for model in base_alone(toy)] == ["builtin"]
    for name in ("toy-base", "begun.yaml"):
        Path("runs", name).mkdir(parents=True)
        Path("runs", name, "config.yaml").write_text("name: begun\n")
    with pytest.raises(ValueError, match=r"^runs/toy-base is a run; give --out FOLDER, or another name"):
        evaluate_and_show([], base=toy, steps=[2])
    with pytest.raises(ValueError, match=r"start the run's `rlvid train` again$"):
        find_models(["begun.yaml"])


def test_prompts_are_distinct_and_the_shipped_sets_do_not_overlap(tmp_path: Path) -> None:
    sets = {name: resolve_prompts(name) for name in ANIMAL_SETS}
    words = {name: {" ".join(p.split()[:2]) for p in prompts} for name, prompts in sets.items()}
    assert [len(prompts) for prompts in sets.values()] == [48, 24, 24]
    assert [len(animals) for animals in words.values()][:2] == [24, 12]
    assert not words["animals"] & words["new_animals"]
    known = {phrase.split()[1] for name in ("animals", "new_animals") for phrase in words[name]}
    assert not known & {word for prompt in sets["non_animals"] for word in prompt.split()}
    for name, prompts in sets.items():
        check_distinct(name, prompts)
    assert list(prompts_of(["animals", " scenes"], 10)) == ["animals", "scenes"]
    (tmp_path / "own.txt").write_text("a dog\na cat\na dog\n")
    with pytest.raises(ValueError, match=r"own\.txt' has 'a dog' twice, as prompts 1 and 3; remove one"):
        prompts_of([str(tmp_path / "own.txt")])
    with pytest.raises(ValueError, match="prompt 2 is empty"):
        check_distinct("own", ["a dog", " "])


def test_no_prompt_of_a_file_is_left_out_unless_that_is_asked_for_and_said(tmp_path: Path) -> None:
    file, lines = tmp_path / "prompts.txt", list[str]()
    file.write_text("".join(f"a dog of {place} years\n" for place in range(700)))
    sets = ["scenes", "animals", str(file)]
    counts = [len(prompts) for prompts in prompts_of(sets, tell=lines.append).values()]
    assert (counts, lines) == ([48, 48, 700], [])
    found = prompts_of(sets, 690, lines.append)
    assert [len(prompts) for prompts in found.values()] == [prompts_in_set("scenes"), 48, 690]
    assert found["prompts"][-1] == "a dog of 689 years"
    assert lines.pop() == "prompts.txt: the first 690 of 700 prompts (--videos)"
    prompts_of(sets, 40, lines.append)
    assert lines == [f"{name}: the first 40 of {count} prompts (--videos)" for name, count in
                     (("animals", 48), ("prompts.txt", 700))]  # fmt: skip


def test_the_prompts_fit_the_model_by_default() -> None:
    def sets(**sections: dict[str, str]) -> tuple[str, ...]:
        return default_sets(parse_config(sections))

    folder = {"source": "/clips"}
    assert sets(model={"path": "builtin"}) == sets(model={"path": "builtin"}, data=folder)
    assert sets(model={"path": "/my/export"}, data={"source": "builtin"}) == ("in_domain", "new_shapes", "scenes")
    assert sets(model={"path": "/my/model"}, data=folder) == sets(model={"path": "random"}, data=folder) == ANIMAL_SETS


def test_a_held_out_reward_that_is_null_is_not_measured_but_in_the_built_in_world(tmp_path: Path) -> None:
    reward = RewardConfig(held_out=None)
    for builtin, name in ((True, "builtin-heldout"), (False, None)):
        scorers = Scorers(reward, use_oracle=builtin)
        assert scorers.held_out == scorers.names["held_out"] == name
        assert (scorers.load(torch.device("cpu")).held_out is None) == (name is None)
    (tmp_path / "mine.py").write_text("def score(frames, prompts): return frames.mean((2, 3, 4))\n")
    parts = [{"name": "brightness", "weight": 0.5}, {"name": "compression"}]
    mixture = RewardConfig(name="mixture", mixture=parts, held_out_path=f"{tmp_path}/mine.py:score")
    further = parse_rewards(f"second:hpsv2=random,warm={tmp_path}/mine.py:score")
    assert Scorers(mixture, further=further).names == {
        "reward": "0.5 x brightness + 1 x compression", "held_out": "mine.py:score",
        "reward_second": "hpsv2 with random weights", "reward_warm": "mine.py:score",
    }  # fmt: skip


@pytest.mark.slow
def test_an_evaluation_of_a_model_that_is_not_built_in_says_what_is_not_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = save_run(tmp_path)
    reward = config.reward.model_dump(mode="json") | {"held_out": None}
    other = another(run, "other", reward=reward, data={"source": "/clips"})
    evaluate_and_show([str(other)], steps=[2], videos=2, scales=(0.5, 1.0))
    said = capsys.readouterr().out
    assert said.count("CLIPSIM and consistency are by builtin-heldout, a CLIP that knows only the built-in world") == 1
    assert "animals: the first 2 of 48 prompts (--videos)" in said
    assert said.count(" are longer than 24 tokens") == 1
    about = yaml.safe_load((other / "evaluation.yaml").read_text())
    assert list(about["sets"]) == list(ANIMAL_SETS)
    assert about["rewards"] == {"reward": "builtin", "held_out": None}
    table = pq.read_table(other / "evaluation.parquet")
    assert all(math.isnan(value) for value in table["held_out"].to_pylist())
    assert not any(math.isnan(value) for value in table["reward"].to_pylist())
    assert "held-out reward: none (reward.held_out is null)" in (other / "evaluation.md").read_text()
    evaluate_and_show([str(other)], steps=[2], videos=2, scales=(0.5, 1.0), clip="builtin")
    assert "knows only the built-in world" not in capsys.readouterr().out
    assert Scorers(config.reward).cautions(clip_named=True) == [
        "the held-out reward builtin-heldout knows only the built-in world; set the run's reward.held_out"
    ]
    assert Scorers(config.reward, use_oracle=True).cautions(clip_named=False) == []


@pytest.mark.parametrize(("path", "has"), [("builtin", True), ("builtin-wan", True), ("random", False)])
def test_the_oracle_grades_both_built_in_models(path: str, has: bool) -> None:
    assert Scorers.of(parse_config({"model": {"path": path}})).use_oracle is has


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
@pytest.mark.parametrize("models", [1, 7])
def test_the_latex_is_latex_and_fits_its_page(tmp_path: Path, models: int) -> None:
    names = ["base", *(f"my_model & {place} × 0.5 {{~^<|>\\}}" for place in range(models))]
    scores = {metric: 0.1 for metric in METRICS} | {"reward_own": 0.2}
    rows = [row(name, index=i, **scores | {"reward": 0.1 * i + len(name)}) for name in names for i in range(3)]
    write_results(tmp_path, rows, base="base")
    groups = {name: [name] for name in names[1:]}
    write_layouts(tmp_path, rows, "base", groups)
    write_seeds(tmp_path, seed_results(rows, groups, "base"))
    write_pairwise(tmp_path, pairwise(rows, groups, "base"), groups)
    head = r"\documentclass{article}\usepackage{booktabs,graphicx}\usepackage[T1]{fontenc}\begin{document}"
    pages = "".join(rf"\input{{{name}.tex}}" for name in ("evaluation", "table-a1", "table-a2", "seeds", "versus"))
    (tmp_path / "page.tex").write_text(head + pages + r"\end{document}")
    done = subprocess.run(  # as a draft, for which no shapes of letters need be there
        ["pdflatex", "-draftmode", "-halt-on-error", "-interaction=nonstopmode", "page.tex"],
        cwd=tmp_path, timeout=120, check=False, capture_output=True, text=True, errors="replace",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout, done.stdout[-2000:]


def test_the_bootstrap_draws_prompts_with_all_their_videos() -> None:
    """Against all resamples of four prompts, of which there are 256, each as likely as the next."""
    gains = {3: [0.1, 0.3, 0.2], 5: [-0.4], 8: [0.5, 0.6], 9: [0.0, 0.1, 0.1, 0.2]}
    videos = [(index, copy, gain) for index, each in gains.items() for copy, gain in enumerate(each)]
    base = [row("base", index=index, copy=copy, reward=1.0) for index, copy, _ in videos]
    tuned = [row("tuned", index=index, copy=copy, reward=1 + gain) for index, copy, gain in videos]
    found = next(c for c in compare(base, tuned[::-1], resamples=40_000) if c.metric == "reward")
    every = [np.concatenate([gains[i] for i in drawn]).mean() for drawn in product(gains, repeat=4)]
    assert (found.pairs, found.difference) == (10, pytest.approx(0.17))
    order = np.sort(every)
    for bound, share in ((found.low, 0.025), (found.high, 0.975)):
        assert (order < bound - 1e-9).mean() <= share + 0.004
        assert (order <= bound + 1e-9).mean() >= share - 0.004
    drawn = bootstrap_means(
        np.array([gain for *_, gain in videos]), np.array([i for i, *_ in videos]), 40_000, np.random.default_rng(0)
    )
    assert np.quantile(drawn, [0.1, 0.5, 0.9]) == pytest.approx(np.quantile(every, [0.1, 0.5, 0.9]), abs=0.01)
    one = next(c for c in compare(base[:3], tuned[:3]) if c.metric == "reward")
    assert (one.difference, math.isnan(one.low)) == (pytest.approx(0.2), True)  # three videos of one prompt


def test_results_hold_further_rewards_in_every_form(tmp_path: Path) -> None:
    paths = write_results(tmp_path, models_of_the_paper(), base="base")
    assert {path.name for path in paths} == {
        "evaluation.md", "evaluation.csv", "evaluation.json", "evaluation.tex", "evaluation.parquet",
        "comparison.parquet", "comparison.csv",
    }  # fmt: skip
    page = (tmp_path / "evaluation.md").read_text()
    assert "| Prompts | Model | Videos | Reward | Reward own | CLIPSIM | Temporal consistency |" in page
    assert "reward own +0.100 [0.000, 0.200]" in page
    table = pq.read_table(tmp_path / "evaluation.parquet")
    assert table.schema.names == ["model", "set", "steps", "index", "copy", "prompt", *METRICS, "reward_own"]
    assert {str(table.schema.field(name).type) for name in METRICS} == {"float"}
    assert str(table.schema.field("copy").type) == "int32"
    assert math.isnan(table["held_out"][0].as_py())
    gains = pq.read_table(tmp_path / "comparison.parquet")
    assert gains.schema.names == ["model", "base", "set", "steps", "metric", "pairs", "difference", "low", "high"]
    (gain,) = (g for g in gains.to_pylist() if (g["metric"], g["set"], g["steps"]) == ("reward", "scenes", 50))
    assert (gain["model"], gain["base"], gain["pairs"]) == ("Draft_LV & 100 %", "base", 3)
    assert gain["difference"] == pytest.approx(0.1)
    lines = list(csv.DictReader(io.StringIO((tmp_path / "comparison.csv").read_text())))
    assert len(lines) == gains.num_rows
    for line, same in zip(lines, gains.to_pylist(), strict=True):
        assert line == {k: "" if v != v else str(v) for k, v in same.items()}
    content = json.loads((tmp_path / "evaluation.json").read_text())
    assert content["summaries"][-1]["mean"]["reward_own"] == pytest.approx(0.1)
    tex = (tmp_path / "evaluation.tex").read_text()
    assert tex.startswith(r"% needs \usepackage{booktabs,graphicx} and \usepackage[T1]{fontenc}")
    for line in (
        r"Metric & Draft\_LV \& 100 \% \\", r"Reward & +0.100 {[}0.100, 0.100{]} \\",
        r"Reward own & +0.100 {[}0.000, 0.200{]} \\", r"CLIPSIM & -0.100 {[}-0.100, -0.100{]} \\",
        r"Motion & +0.000 {[}0.000, 0.000{]} \\",
    ):  # fmt: skip
        assert tex.count(line) == 4, line  # two prompt sets, two numbers of steps
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == 6
    assert tex.count(r"\resizebox{\linewidth}{!}{%") == tex.count(r"\end{tabular}}") == 2  # the scores are wide
    assert tex.count(r"\textbf{0.400 $\pm$ 0.100}") == 4


def test_foreign_text_is_text_in_latex_and_markdown() -> None:
    assert latex_text("\\input{x} 50% a_b #1 ~ ^ $y$\n&") == (
        r"\textbackslash{}input\{x\} 50\% a\_b \#1 \textasciitilde{} \textasciicircum{} \$y\$ \&"
    )
    grid = Grid(["a|b", "n"], [[Cell("<b>x</b>\n| y"), Cell("1", True)]])
    assert grid.markdown().splitlines()[2] == r"| \<b>x\</b> \| y | **1** |"


def test_groups_are_called_by_their_method_or_by_what_their_names_share() -> None:
    def named(*groups: tuple[str, str, list[str]], **options: bool) -> list[str]:
        return name_groups([RunGroup(*group) for group in groups], "base", **options)

    assert named(("iv", "", ["x0", "x1"]), ("draft", "@40", ["d"])) == ["iv (2 seeds)", "d"]
    assert named(("iv", "@40", ["x0", "x1"]), ("iv", "", ["y0", "y1"])) == ["iv@40 (2 seeds)", "iv (2 seeds)"]
    twice = [["a-seed0", "a-seed1"], ["a-d50-seed0", "a-d50-seed1"], ["focus-0", "focus-1"], ["bias0", "bias1"],
             ["lr1e-50", "lr1e-51"], ["d50", "d50-seed1"], ["lone"]]  # fmt: skip
    assert named(*(("iv", " × 0.5", each) for each in twice), count=False) == [
        "a × 0.5", "a-d50 × 0.5", "focus × 0.5", "bias × 0.5", "lr1e-5 × 0.5", "d50 × 0.5", "lone",
    ]  # fmt: skip
    assert named(("iv", "", ["0", "1"]), ("iv", "", ["2", "3"]), count=False) == ["iv", "iv'"]
    assert named(("iv", "", ["base"]), ("iv", "", ["base"])) == ["base'", "base''"]


def test_ends_of_runs_of_a_budget_in_seconds_are_one_group(tmp_path: Path) -> None:
    run, _ = save_run(tmp_path)
    runs = [another(run, name, seed=seed, train={"max_seconds": 9.0}) for seed, name in enumerate(("one", "two"))]
    (runs[1] / "step-000003").rename(runs[1] / "step-000004")
    models = find_models(list(map(str, runs)))
    assert [model.step for model in models] == [None, 3, 4]
    assert list(group_seeds(models).values()) == [["one", "two"]]
    with pytest.raises(ValueError, match="no two of the runs differ in their seed alone"):
        group_seeds(find_models([f"a={runs[0]}@3", f"b={runs[1]}@4"]))


def test_runs_that_differ_in_their_seed_alone_are_one_group(tmp_path: Path) -> None:
    run, _ = save_run(tmp_path)
    runs = [
        run,
        another(run, "run1", seed=1),
        another(run, "run2", seed=2),
        another(run, "ddpo", method={"name": "ddpo"}),
    ]
    models = find_models(list(map(str, runs)))
    groups = group_seeds(models)
    assert groups == {"instructvideo (3 seeds)": ["run", "run1", "run2"], "ddpo": ["ddpo"]}
    with pytest.raises(ValueError, match="no two of the runs differ in their seed alone"):
        group_seeds(models[:2])
    with pytest.raises(ValueError, match="run, again have one seed"):
        group_seeds(find_models([str(run), str(runs[1]), f"again={run}@3"]))
    by_step = find_models([f"a{n}={each}@3" for n, each in enumerate(runs[:2])])
    assert group_seeds(by_step) == {"instructvideo@3 (2 seeds)": ["a0", "a1"]}
    levels = {"base": 0.0, "run": 0.1, "run1": 0.2, "run2": 0.3, "ddpo": 0.0}
    rows = [row(model, index=i, reward=0.5 * i + level * (1 + i)) for model, level in levels.items() for i in range(2)]
    found = {r.group: r for r in seed_results(rows, groups, "base") if r.metric == "reward"}
    three = found["instructvideo (3 seeds)"]
    assert (three.seeds, three.mean, three.difference) == (3, pytest.approx(0.55), pytest.approx(0.3))
    assert three.half_width == pytest.approx(4.303 * 0.15 / math.sqrt(3), rel=1e-4)
    # Gains of 1, 2 and 3 tenths at one prompt, and twice that at the other; a resample has one of them twice or both.
    assert (three.low, three.high) == (pytest.approx(0.2), pytest.approx(0.4))
    assert math.isnan(found["base"].difference)
    assert math.isnan(found["ddpo"].half_width)
    write_seeds(tmp_path, list(found.values()))
    page = (tmp_path / "seeds.md").read_text()
    assert "| in domain | base | 0.250 | – |" in page
    assert f"| in domain | instructvideo (3 seeds) | 0.550 ± {three.half_width:.3f} | +0.300 [" in page
    lines = list(csv.DictReader(io.StringIO((tmp_path / "seeds.csv").read_text())))
    assert [line["group"] for line in lines] == list(found)
    assert (lines[0]["difference"], lines[1]["seeds"]) == ("", "3")
    assert dataclasses.asdict(three)["set"] == "in_domain"
