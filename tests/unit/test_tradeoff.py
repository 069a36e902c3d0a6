"""Part of what was learned: a model for each --lora-scale, on the same prompts and noise, in table and picture."""

import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import save_run
from PIL import Image

from rlvid.cli import main
from rlvid.evaluate.command import write_all
from rlvid.evaluate.models import find_models
from rlvid.evaluate.results.rows import METRICS, Row
from rlvid.evaluate.results.summary import compare_all, summarise
from rlvid.evaluate.tradeoff import draw_tradeoff
from rlvid.evaluate.work import Evaluation
from rlvid.evaluate.workers import run_evaluation
from rlvid.storage import Mirror
from rlvid.terminal import fractions


def test_each_scale_is_a_model_between_the_base_and_what_was_learned(tmp_path: Path) -> None:
    run, _ = save_run(tmp_path)
    prompts = {"own": ["a red circle", "a dog"]}
    models = find_models([str(run)], scales=(0.001, 0.5, 1.0))
    evaluation = Evaluation.of(models, prompts, steps_list=[2])
    rows = run_evaluation(evaluation)
    (run / "seeds.md").write_text("of an earlier evaluation")
    assert run / "tradeoff.png" in write_all(evaluation, rows, {})
    by_model = {s.model: s.mean["reward"] for s in summarise(rows)}
    assert list(by_model) == ["base", "instructvideo × 0.001", "instructvideo × 0.5", "instructvideo"]
    assert len({c.tuned for c in compare_all(rows, "base")}) == 3
    evaluation = Evaluation.of(find_models([str(run)]), prompts, steps_list=[2])
    rows = run_evaluation(evaluation)
    write_all(evaluation, rows, {})
    assert not any((run / name).exists() for name in ("tradeoff.png", "seeds.md"))  # they would be of other models
    alone = summarise(rows)
    assert [s.model for s in alone] == ["base", "instructvideo"]
    assert by_model["instructvideo"] == pytest.approx(alone[1].mean["reward"])
    base = by_model["base"]
    assert base == pytest.approx(alone[0].mean["reward"])
    assert abs(by_model["instructvideo × 0.001"] - base) < 0.1 * abs(by_model["instructvideo"] - base)


def test_scales_in_any_order_are_drawn_from_the_base_up(tmp_path: Path) -> None:
    rows = []
    for scale, model in enumerate(["base", "a × 0.5", "a"]):
        for index in range(2):
            scores = dict.fromkeys(METRICS, math.nan)
            scores |= {"reward": scale / 2, "held_out": -(scale**2), "consistency": 0.9, "motion": 0.1 * index}
            rows.append(Row(model, "in_domain", 20, index, "p", **scores))
    draw_tradeoff(tmp_path / "a.png", summarise(rows), {"a": 1.0, "a × 0.5": 0.5})
    draw_tradeoff(tmp_path / "ascending.png", summarise(rows), {"a × 0.5": 0.5, "a": 1.0})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "ascending.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        page = np.asarray(image.convert("RGB"))
    assert (page == 255).mean() > 0.8
    assert ((page == (0x00, 0x72, 0xB2)).all(2)).sum() > 200, "there is no line"
    with pytest.raises(ValueError, match="none of b was evaluated; models: "):
        draw_tradeoff(tmp_path / "b.png", summarise(rows), {"b": 1.0})


def test_scales_are_read_once_each_and_ascending() -> None:
    assert fractions("1,0.25,0.5,1", "--lora-scale") == [0.25, 0.5, 1.0]
    for wrong in ("0,1", "a", "", "5", "nan", "0.5,,1"):
        with pytest.raises(ValueError, match=r"--lora-scale .*: expected numbers above 0 and at most 4"):
            fractions(wrong, "--lora-scale")


def test_the_command_brings_videos_table_and_picture_to_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = save_run(tmp_path)
    monkeypatch.setenv("RLVID_CACHE", str(tmp_path / "cache"))
    arguments = ["evaluate", f"file://{run}", "--steps", "2", "--videos", "2", "--sets", "in_domain,scenes"]
    monkeypatch.setattr(sys, "argv", ["rlvid", *arguments, "--lora-scale", "0.5,1"])

    upload = Mirror._upload

    def unreachable(mirror: Mirror, name: str) -> None:
        if name.startswith("videos/"):
            raise ValueError("the store cannot be reached")
        upload(mirror, name)

    for fails in (True, False):
        with monkeypatch.context() as patch:
            if fails:
                patch.setattr(Mirror, "_upload", unreachable)
            with pytest.raises(SystemExit) as ended:
                main()
        assert (ended.value.code or 0) == (2 if fails else 0)
        assert len(list((tmp_path / "cache").rglob("videos/part-*.parquet"))) == 6  # made once, in the first attempt
        assert len(list((run / "videos").glob("part-*"))) == (0 if fails else 6)
        assert (run / "evaluation.yaml").is_file() != fails, "it says that the videos are there"
    page = (run / "evaluation.md").read_text(encoding="utf-8")
    assert [page.count(f"| {model} |") for model in ("base", "instructvideo × 0.5", "instructvideo")] == [2, 2, 2]
    assert (run / "tradeoff.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert "tradeoff.png" in said
    assert f"tables       file://{run}/evaluation.md" in said
    assert re.search(rf"rlvid report {tmp_path}/cache\S+; rlvid study serve {tmp_path}/cache", said), "they take no URI"
