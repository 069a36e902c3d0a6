"""Methods and seeds at one budget: variants of a sweep, the runs' length, and the table over seeds."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import save_run
from scipy.stats import ttest_ind

from rlvid.config import RunConfig
from rlvid.config.methods import METHODS
from rlvid.config.reward import NamedReward
from rlvid.evaluate.results.rows import METRICS, Row
from rlvid.metric_names import MAIN
from rlvid.plan.plan import make_plan
from tuning.comparison import by_seed, differences, table
from tuning.description import Evaluation, Sweep
from tuning.journal import Journal, Trial, read_scores, scores_path, write_scores
from tuning.load import load_sweep
from tuning.measure import job_of, least, measure, rows_of
from tuning.outcomes import collect
from tuning.report import write_report
from tuning.resume import keep_description
from tuning.search import Proposals
from tuning.trial import run_trial


def sweep(tmp_path: Path, *overrides: str) -> Sweep:
    return load_sweep("methods", [f"storage={tmp_path}", *overrides])


def test_every_method_starts_from_its_shipped_description(tmp_path: Path) -> None:
    made = sweep(tmp_path)
    trials = [Trial(number, settings) for number, settings in enumerate(made.planned())]
    assert len(trials) == made.count == 3 * len(METHODS)
    runs = [made.run(trial.settings, trial.name, 200) for trial in trials]
    assert [run.name for run in runs] == [f"{name}-seed{seed}" for seed in range(3) for name in METHODS]
    assert {(run.method.name, run.seed) for run in runs} == {(name, seed) for name in METHODS for seed in range(3)}
    rates = {run.method.name: run.optimizer.lr for run in runs}
    assert (rates["instructvideo"], rates["draft"], rates["alignprop"], rates["rwr"]) == (8e-3, 8e-3, 4e-3, 1e-3)
    assert {run.optimizer.warmup for run in runs} == {2}  # a setting of the sweep is of all
    assert made.base().optimizer.lr == 2e-3


def test_runs_get_the_same_budget_whatever_their_batch(tmp_path: Path) -> None:
    variant = "space.variant={a: {method.name: draft-lv, method.repeats: 4, train.batch_size: 4}, b: {config: toy-rwr}}"
    made = sweep(tmp_path, variant, "space.seed=[3]", "unit=videos", "rungs=[80, 160]")
    first, second = (made.run(settings, "trial", 160) for settings in made.planned())
    assert (first.seed, first.method.name) == (3, "draft-lv")
    assert first.train.steps * first.train.batch_size * first.method.repeats == 160
    assert second.train.steps * second.train.batch_size == 160
    assert made.budget(first, 80) == {"steps": 5, "max_seconds": None}
    made = sweep(tmp_path, variant, "space.seed=[3]", "unit=tflops", "rungs=[1]")
    for settings in made.planned():
        run = made.run(settings, "trial", 1)
        step = make_plan(run).flops_per_step / 1e12
        assert run.train.steps * step <= 1 < (run.train.steps + 1) * step
    dear = sweep(tmp_path, "space.variant={a: {train.batch_size: 512}, b: {}}", "unit=tflops", "rungs=[2]")
    with pytest.raises(ValueError, match=r"rungs = \[2\]: a step takes .* TFLOPs; allowed: from \d+ on"):
        dear.planned()
    made = sweep(tmp_path, "rungs=[7]")
    run = made.run(made.planned()[0], "trial", 7)
    assert run.train.max_seconds == 7
    assert run.train.steps > 10_000


def test_the_sweep_over_remedies_has_each_beside_none_at_equal_compute() -> None:
    made = load_sweep("remedies")
    assert (made.scheduler, made.unit, len(made.rungs)) == ("none", "tflops", 1)
    runs = {s["variant"]: made.run(s, "trial", made.rungs[-1]) for s in made.planned()}
    assert made.count == 3 * len(runs)
    plain, remedies = runs.pop("none"), runs.keys()
    kinds = {"kl-path-1", "kl-path-10", "denoising", "levels", "pessimism", "ceiling", "whole-video", "lower-rate"}
    assert remedies == kinds
    assert {run.method.name for run in runs.values()} == {plain.method.name} == {"instructvideo"}
    assert all(run != plain for run in runs.values())
    assert runs["lower-rate"].optimizer.lr < plain.optimizer.lr == runs["levels"].optimizer.lr
    assert runs["kl-path-1"].method.kl_at == "path"
    assert runs["whole-video"].reward.name == "builtin-video"
    assert runs["kl-path-1"].train.steps < runs["denoising"].train.steps < runs["levels"].train.steps
    for run in (plain, *runs.values()):
        step = make_plan(run).flops_per_step / 1e12
        assert run.train.steps * step <= made.rungs[-1] < (run.train.steps + 1) * step
    assert (runs["ceiling"].reward.ceiling, runs["ceiling"].reward.tar_normalisation) == (0.8, "normalised")
    assert runs["pessimism"].reward.pessimism > 0
    assert made.evaluation.scales


def test_the_evidence_has_rates_of_the_search_for_rates() -> None:
    """At the same budget: so its runs of seed 0 are among those of the search, under another name."""
    searched, evidence = load_sweep("rates"), load_sweep("evidence")
    assert (evidence.rungs, evidence.unit) == (searched.rungs[-1:], searched.unit) == ([10], "tflops")
    assert (searched.metric, searched.scheduler, evidence.scheduler) == ("gain", "none", "none")

    def runs(made: Sweep) -> list[dict[str, Any]]:
        return [made.run(settings, "trial", made.rungs[-1]).model_dump() for settings in made.planned()]

    def plain(run: dict[str, Any]) -> dict[str, Any]:
        return run | {"name": "", "output": run["output"] | {"storage": ""}}

    found, wanted = map(plain, runs(searched)), list(map(plain, runs(evidence)))
    assert len(wanted) == evidence.count == 12
    assert sum(run in wanted for run in found) == 4
    assert {run["method"]["name"] for run in wanted} == {"instructvideo", "draft", "rwr", "ddpo"}
    assert all(run["method"].get("denoising", 0) == 0 for run in wanted), "methods as their papers have them"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("space.variant=[a, b]", "space.variant = ['a', 'b']; expected labels with settings"),
        ("space.variant={}", "space.variant = {}; expected labels with settings"),
        ("space.variant={a: {seed: 1}}", "seed is in space, and in settings or a variant too"),
        ("space.variant={a: {train.steps: 1}}", "train.steps belongs to the sweep"),
        ("space.variant={a: {method.name: ppo}}", "'ppo' is not a method; allowed: instructvideo"),
        ("space.variant={a: {method.tau: 2}}", "method.tau = 2"),
        ("space.variant={a: {config: nothing}}", "config 'nothing' is neither a file nor a shipped description"),
        ("unit=minutes", "unit = 'minutes': input should be 'steps', 'seconds', 'videos' or 'tflops'"),
        ("space.seed=[0, 0]", "0 stands in the list twice"),
        ("space.seed=[a]", "seed = 'a'"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        sweep(tmp_path, override).planned()
    assert "\n" not in str(error.value)


def test_another_budget_or_variant_is_another_sweep(tmp_path: Path) -> None:
    keep_description(sweep(tmp_path, "unit=videos"))
    keep_description(sweep(tmp_path, "unit=videos"))
    with pytest.raises(ValueError, match="unit: videos -> seconds"):
        keep_description(sweep(tmp_path))
    with pytest.raises(ValueError, match=r"space.variant.draft.optimizer.lr: None -> 1"):
        keep_description(sweep(tmp_path, "unit=videos", f"space.variant={variants(draft=1)}"))
    note = tmp_path / "methods" / "sweep.yaml"
    kept = yaml.safe_load(note.read_text())
    kept["variants"]["rwr"]["method"]["beta"] = 3.0  # as if the shipped description had been edited meanwhile
    note.write_text(yaml.safe_dump(kept))
    with pytest.raises(ValueError, match=r"method.beta: 3.0 -> 10.0"):
        keep_description(sweep(tmp_path, "unit=videos"))


def variants(**rates: float) -> str:
    given = load_sweep("methods").variants
    return json.dumps({name: each | ({"optimizer.lr": rates[name]} if name in rates else {})
                       for name, each in given.items()})  # fmt: skip


VIDEO = {"model": "m", "set": "in_domain", "steps": 20, "prompt": "a dog"}
ROW = VIDEO | {"index": 0, **dict.fromkeys(METRICS, 0.5)}


def point(step: int, value: float) -> dict[str, Any]:
    cost = {"step": step, "seconds": 2.0 * step, "videos": 8 * step}
    return cost | {"mean": dict.fromkeys(MAIN, value), "std": {"reward": value / 10}}


def test_the_table_has_the_base_once_and_each_variant_at_its_end() -> None:
    runs = [[point(5, 0.6), point(10, last)] for last in (0.7, 0.9)]
    lines = table(point(0, 0.5), {"ddpo": runs}).splitlines()
    assert lines[2].startswith("| base | 0 | 0 | 0.500 | 0.500 |")
    assert lines[3].startswith("| ddpo | 20 | 80 | 0.800 ± 1.271 |")
    assert lines[3].endswith("| 0.080 |")
    assert len(lines) == 4
    sure = table(point(0, 0.5), {"rwr": [[point(10, last)] for last in (0.79, 0.80, 0.81)]}).splitlines()
    assert sure[3].startswith("| rwr | 20 | 80 | **0.800 ± 0.025** |")


def test_settings_are_compared_with_the_first_ones_over_seeds() -> None:
    half, two = (0.70, 0.74, 0.75), (0.79, 0.80, 0.81)
    lines = differences({"half": [[point(10, v)] for v in half], "two": [[point(10, v)] for v in two]}).splitlines()
    assert lines[0].startswith("| Difference from half | Reward | Held-out reward |")
    assert len(lines) == 3
    interval = ttest_ind(two, half, equal_var=False).confidence_interval(0.95)
    middle, margin = (interval.high + interval.low) / 2, (interval.high - interval.low) / 2
    assert interval.low > 0
    assert lines[2].startswith(f"| two | **{middle:+.3f} ± {margin:.3f}** |")
    alike = differences({"half": [[point(10, v)] for v in half], "two": [[point(10, v)] for v in half[::-1]]})
    assert "**" not in alike
    assert not differences({"half": [[point(10, v)] for v in half]})
    assert not differences({"half": [[point(10, v)] for v in half], "two": [[point(10, 0.9)]]})


def test_clipsim_stands_only_where_it_is_not_the_held_out_reward() -> None:
    same, other = point(10, 0.8), point(10, 0.8)
    same["mean"]["clipsim"] += 1e-7  # as rounding makes it
    other["mean"]["clipsim"] = 0.3
    heads = [table(point(0, 0.5), {"rwr": [[end]]}).splitlines()[0] for end in (same, other)]
    assert ["CLIPSIM" in head for head in heads] == [False, True]


def test_further_scales_stand_below_their_settings() -> None:
    ends = [point(10, value) | {"scaled": {"0.5": {k: point(0, value / 2)[k] for k in ("mean", "std")}}}
            for value in (0.79, 0.80, 0.81)]  # fmt: skip
    lines = table(point(0, 0.5), {"rwr": [[end] for end in ends], "raft": [[point(10, 0.6)]]}).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["base", "rwr", "rwr at scale 0.5", "raft"]
    assert lines[4].startswith("| rwr at scale 0.5 | 20 | 80 | 0.400 ± 0.012 |")


def test_a_trial_is_measured_at_every_scale(tmp_path: Path) -> None:
    folder, config = save_run(tmp_path, 3)
    how = Evaluation(videos=2, steps=2, scales=[0.01, 0.5])
    prompts = ["a red circle moving left", "a blue square moving up"]
    guard = config.guard.model_copy(update={"rewards": [NamedReward(name="builtin-frames")]})
    judged = config.model_copy(update={"guard": guard}).model_dump()
    job = {"base": judged, "evaluation": how.model_dump(), "prompts": prompts, "here": str(tmp_path)}
    base = measure(job, None, 0)
    tuned = measure(job, str(folder), 3, base)
    write_scores(tmp_path / "scores.json", tuned)
    kept = read_scores(tmp_path / "scores.json")
    assert kept is not None
    assert (base["scaled"], kept["scaled"].keys()) == ({}, {"0.01", "0.5"})
    reward = {scale: kept["scaled"][scale]["mean"]["reward"] for scale in ("0.01", "0.5")}
    gaps = [abs(each - base["mean"]["reward"]) for each in (*reward.values(), tuned["mean"]["reward"])]
    assert 0 < gaps[0] < gaps[1]
    assert gaps[2] > gaps[0], "the largest scale is the trial itself"
    judge = "reward_builtin_frames"
    rows = rows_of(kept)
    assert kept["mean"][judge] == pytest.approx(sum(row.score(judge) for row in rows) / 2, rel=1e-9)
    assert base["mean"]["gain"] == 0
    assert kept["mean"]["gain"] == least(rows, rows_of(base)).deviations
    assert 0 < abs(kept["scaled"]["0.01"]["mean"]["gain"]) < abs(kept["mean"]["gain"])
    del base["mean"]["gain"]  # as a former version left it
    job["evaluation"]["scales"] = []
    assert "gain" not in measure(job, str(folder), 3, base)["mean"]


def test_the_report_has_the_seeds_of_each_variant_in_one_row(tmp_path: Path) -> None:
    made = sweep(tmp_path, "space.seed=[0, 1]", "space.variant={a: {}, b: {}}")
    made.folder.mkdir()
    journal = Journal(made.folder)
    for number, settings in enumerate(made.planned()):
        journal.append({"trial": number, "settings": settings})
        name = Trial(number, settings).name
        for rung in made.rungs[: 1 if number == 3 else 2]:  # the last one has only begun
            write_scores(scores_path(made.folder, name, rung), whole(point(rung // 10, 0.5 + number / 10), ROW))
            end = "finished" if rung == 200 else "goes on"
            journal.append({"trial": number, "step": rung, "score": 0.5, "decision": end})
    write_scores(made.folder / "base.json", whole(point(0, 0.4), ROW))
    found = by_seed(made, collect(made, journal))
    assert {name: len(runs) for name, runs in found.items()} == {"a": 2, "b": 1}
    folder = write_report(made, journal)
    assert folder is not None
    lines = (folder / "comparison.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[4:]] == ["base", "a", "b"]
    assert lines[5].startswith("| a | 40 | 160 | 0.600 ± 1.271 |")
    assert (folder / "comparison.png").stat().st_size > 10_000
    page = (folder / "report.md").read_text()
    assert "## Over seeds" in page
    assert "after 200 seconds" in page
    assert "another seed" not in page


def whole(scores: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    mean = dict.fromkeys(METRICS, 0.5) | scores["mean"]
    return scores | {"mean": mean, "std": dict.fromkeys(METRICS, 0.1) | scores["std"], "rows": [row]}


def test_a_trial_is_trained_to_each_rung_and_goes_on_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = sweep(tmp_path, "space.seed=[3]", "space.variant={a: {}}")
    proposal = Proposals(made, Journal(tmp_path), made.planned()).suggest("id")
    trained, reported = [], []

    def train(config: RunConfig, console: Any) -> Any:
        trained.append((config.name, config.train.max_seconds))
        return SimpleNamespace(folder=made.folder / config.name, last_step=int(config.train.max_seconds or 0) // 10)

    def measured(job: dict[str, Any], run: Path, step: int, base: dict[str, Any]) -> dict[str, Any]:
        assert base["rows"] == [ROW]
        return whole(point(step, 0.5), ROW | {"model": run.name})

    made.folder.mkdir()
    write_scores(made.folder / "base.json", whole(point(0, 0.4), ROW))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rlvid.train.launch.train", train)
    monkeypatch.setattr("tuning.trial.measured", measured)
    monkeypatch.setattr("tuning.trial.tune.report", reported.append)
    run_trial(proposal, job_of(made, use_gpu=False))
    assert trained == [("a-seed3", 100.0), ("a-seed3", 200.0)]
    assert [(each["step"], each["seconds"]) for each in reported] == [(100, 20.0), (200, 40.0)]
    scores_path(made.folder, "a-seed3", 200).unlink()  # as after a kill in the second measurement
    run_trial(proposal | {"judged": [100]}, job_of(made, use_gpu=False))
    assert trained[2:] == [("a-seed3", 200.0)]
    assert [each["step"] for each in reported[2:]] == [200]


def test_the_gain_is_the_least_one_of_the_held_out_rewards_in_deviations_of_the_base() -> None:
    """Three prompts with two videos each; numpy has the same."""

    def rows(held_out: list[float], video: list[float]) -> list[Row]:
        return [
            Row(**ROW | {"index": place // 2, "copy": place % 2, "held_out": a, "extra": {"reward_video": b}})
            for place, (a, b) in enumerate(zip(held_out, video, strict=True))
        ]

    base = rows([0.2, 0.4, 0.5, 0.5, 0.8, 0.6], [1.0, 3.0, 4.0, 4.0, 5.0, 7.0])
    levels = [0.7, 0.5, 0.9, 0.7, 0.8, 1.0]
    tuned = rows(levels, [2.0, 3.0, 5.0, 4.0, 6.0, 9.0])
    assert least(base, base).deviations == 0
    held_out = np.mean([0.3, 0.3, 0.2]) / np.std([0.3, 0.5, 0.7], ddof=1)
    video = np.mean([0.5, 0.5, 1.5]) / np.std([2, 4, 6], ddof=1)
    assert least(tuned, base).deviations == pytest.approx(min(held_out, video), rel=1e-12)
    assert least(tuned, base).metric.key == "reward_video"
    one_broken = rows(levels, [math.nan, 3.0, 5.0, 4.0, 6.0, 9.0])
    assert least(one_broken, base).deviations == pytest.approx(np.mean([1.0, 0.5, 1.5]) / 2, rel=1e-12)
    both_broken = rows(levels, [math.nan, math.nan, 5.0, 4.0, 6.0, 9.0])
    assert math.isnan(least(both_broken, base).deviations)  # a prompt without a finite video
    assert math.isnan(least(tuned[:2], base[:2]).deviations)  # one prompt has no deviation


def test_damaged_files_of_a_sweep_are_named_in_one_line(tmp_path: Path) -> None:
    scores = tmp_path / "000004.json"
    assert read_scores(scores) is None
    for text in ("", '{"step": 4', "[1]", '{"step": 4}', '{"step": 4, "seconds": "?"}'):
        scores.write_text(text)
        with pytest.raises(ValueError, match=r"000004.json is damaged .*; bring it back") as error:
            read_scores(scores)
        assert "\n" not in str(error.value)
    whole_line = '{"trial": 0, "settings": {"seed": 1, "reward.held_out": null}}\n'
    journal = tmp_path / "journal.jsonl"
    for line in ("nonsense", '{"trial": 0, "sett', "[]", '{"trial": "0", "settings": {}}', '{"trial": 0}',
                 '{"trial": 1, "failed": "x"}', '{"trial": 0, "step": 2, "score": 0.5, "decision": "so"}'):  # fmt: skip
        journal.write_text(f"{whole_line}{line}\n{whole_line}")
        with pytest.raises(ValueError, match=r"journal.jsonl is damaged \(line 2: .*start again$") as error:
            Journal(tmp_path)
        assert "\n" not in str(error.value)
    journal.write_text(whole_line)
    assert Journal(tmp_path).trials[0].settings == {"seed": 1, "reward.held_out": None}
    made = sweep(tmp_path)
    keep_description(made)
    (made.folder / "sweep.yaml").write_text("sweep: {name: methods}\n")
    with pytest.raises(ValueError, match=r"sweep.yaml is damaged .*; choose another name=") as error:
        keep_description(made)
    assert "\n" not in str(error.value)
