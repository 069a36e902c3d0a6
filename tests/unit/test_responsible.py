"""What a model card warns of is what the guard's looks and the scores of single prompts say."""

import json
from pathlib import Path

import pytest
from evaluations import write_evaluation
from markdown_it import MarkdownIt

from rlvid.evaluate.results.about import read_about
from rlvid.evaluate.results.read import read_scores
from rlvid.evaluate.tables.run_card import over_optimisation, worse_prompts
from rlvid.export.evaluation import find_evaluation


def look(run: Path, *held: float) -> Path:
    """A guard's looks in which the trained reward rises all along."""
    run.mkdir(parents=True)
    wave = [0.001 * (k % 3) for k in range(8)]
    lines = []
    for place, value in enumerate(held):
        values = {"reward": [0.4 + place / 10 + w for w in wave], "held_out": [value + w for w in wave]}
        values |= {name: [0.9 + w for w in wave] for name in ("consistency", "motion", "diversity")}
        lines.append({"step": 20 * place, "time": 0.0, "of": "x", "mean": {}, "values": values})
    (run / "guard.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def worse(folder: Path, model: str = "toy") -> str:
    """The section of a card on an evaluation's folder."""
    about = read_about(folder)
    return worse_prompts(read_scores(folder, about), about.sets, "base", [model])


def test_the_guards_warnings_and_its_best_step_are_told(tmp_path: Path) -> None:
    run = look(tmp_path / "run", 0.4, 0.6, 0.3, 0.2)
    (run / "best").mkdir()
    (run / "best" / "best.json").write_text('{"step": 20}')
    told = over_optimisation(run)
    assert "- over-optimised at step 60: since step 20 the trained reward went from 0.501 to 0.701" in told
    assert "the best checkpoint is that of step 20." in told
    (run / "best" / "best.json").write_text('{"step": 20, "scale": 0.5, "reason": "held-out reward +0.2 <b>"}')
    told = over_optimisation(run)
    assert "the best checkpoint is that of step 20, at scale 0.5 of the learned change: held-out reward" in told
    assert r"\<b>" in told


def test_no_warning_and_no_guard_are_two_things(tmp_path: Path) -> None:
    assert "raised no warning" in over_optimisation(look(tmp_path / "run", 0.4, 0.5, 0.6))
    assert "made 3 evaluations" in over_optimisation(tmp_path / "run")
    short = over_optimisation(look(tmp_path / "short", 0.4, 0.1))
    assert "made 2 evaluations" in short
    assert "none could be raised" in short
    assert "raised no warning" not in short
    (tmp_path / "blind").mkdir()
    assert "guard.every" in over_optimisation(tmp_path / "blind")


def test_prompts_that_got_worse_are_named_the_worst_first(tmp_path: Path) -> None:
    sets = {"a": ["one", "two | <b>2</b> ![x](http://x.org/y.png)", "three"]}
    folder = write_evaluation(tmp_path / "ev", sets=sets, steps=(20,))
    path = find_evaluation(folder)
    assert path == folder / "evaluation.parquet"
    told = worse(folder)
    assert "toy: 1 of 3 prompts have a lower held-out reward than with the base" in told
    page = MarkdownIt("commonmark", {"html": False}).enable("table").render(told)
    assert "<td>two | &lt;b&gt;2&lt;/b&gt; ![x](http://x.org/y.png)</td>" in page
    assert "0.411</td>" in page, "0.4 + 0.01 of the case + 0.001 of the prompt"
    assert "-0.050</td>" in page
    assert "three" not in told
    assert "no pair of videos" in worse(folder, "nobody")
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"evaluation\.parquet is damaged"):
        worse(folder)
