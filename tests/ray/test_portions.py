"""Evaluation in a pool of actors: the numbers of one process, whatever the pool, also after a kill."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from helpers import save_run
from processes import HANG, started
from typer.testing import CliRunner

from rlvid.cli import app, main
from rlvid.evaluate.cache import identity_of, write_part
from rlvid.evaluate.models import find_models
from rlvid.evaluate.results.rows import METRICS
from rlvid.evaluate.work import Evaluation
from rlvid.evaluate.workers import run_evaluation

SETS = {"own": [f"a {c} {s} {m}" for c in ("red", "blue", "green") for s in ("circle", "star") for m in "abcd"]}


@pytest.mark.slow
def test_two_actors_give_the_numbers_of_one_process(tmp_path: Path, ray_cluster: Any) -> None:
    run, _ = save_run(tmp_path)
    rows = {}
    for workers in (None, 2):
        evaluation = Evaluation.of(find_models([str(run)]), SETS, steps_list=[2])
        rows[workers] = run_evaluation(evaluation, workers=workers)
        evaluation.clear()
    for expected, found in zip(rows[None], rows[2], strict=True):
        assert (found.model, found.set, found.steps, found.index, found.prompt) == (
            expected.model, expected.set, expected.steps, expected.index, expected.prompt
        )  # fmt: skip
        for metric in METRICS:  # other numbers of threads may round a pixel to the next of its 256 levels
            assert getattr(found, metric) == pytest.approx(getattr(expected, metric), abs=1e-4, nan_ok=True), metric
    with pytest.raises(ValueError, match=r"--workers 99 needs 49.5 CPU cores; the cluster has 8; .* at most 16"):
        run_evaluation(Evaluation.of(find_models([str(run)]), SETS, steps_list=[3]), workers=99)


@pytest.mark.slow
def test_a_reward_that_hangs_ends_a_pool_too(
    tmp_path: Path, ray_cluster: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = save_run(tmp_path)
    (tmp_path / "mine.py").write_text("import time\ndef score(frames, prompts):\n    time.sleep(600)\n")
    own = {"name": "custom", "path": f"{tmp_path}/mine.py:score", "timeout": 0.5}
    (run / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json") | {"reward": own}))
    asked = ["--steps", "2", "--sets", "in_domain", "--videos", "2", "--workers", "1", "--trust"]
    monkeypatch.setattr(sys, "argv", ["rlvid", "evaluate", str(run), *asked, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    line = said.splitlines()[-1]  # before it Ray may remark on its actors
    assert line.startswith("error: ")
    assert "in_domain, D = 2: the reward mine.py:score gave no answer for 0.5 s (reward.timeout)" in line


@pytest.mark.slow
def test_what_a_killed_evaluation_had_finished_is_not_made_again(tmp_path: Path) -> None:
    run, _ = save_run(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(SETS["own"]))
    command = [
        sys.executable, "-m", "rlvid.cli", "evaluate", run, "--sets", tmp_path / "prompts.txt", "--steps", "30",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_API")}
    in_pool = [*command, "--workers", "1"]
    with started(in_pool, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        deadline = time.monotonic() + HANG
        while not list(run.glob("videos/part-*.parquet")):
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        first.kill()
    parts = sorted(run.glob("videos/part-*.parquet"))
    assert 0 < len(parts) < 4, "the evaluation was not interrupted"
    labels = pq.read_table(parts[0]).drop_columns("frames").to_pylist()
    write_part(parts[0], labels, torch.ones(len(labels), 4, 3, 16, 16), identity_of(parts[0]))
    kept = {path: path.read_bytes() for path in parts}
    again = CliRunner().invoke(app, [str(word) for word in command[3:]])
    assert again.exit_code == 0, again.output
    there = sum(pq.read_metadata(path).num_rows for path in parts)
    assert f"{there} of {2 * len(SETS['own'])} videos" in again.output
    assert {path: path.read_bytes() for path in parts} == kept
    motion = pq.read_table(run / "evaluation.parquet")["motion"].to_pylist()
    assert len(motion) == 2 * len(SETS["own"])
    assert motion.count(0.0) == len(labels)  # taken as it was found
    assert yaml.safe_load((run / "evaluation.yaml").read_text())["complete"]
