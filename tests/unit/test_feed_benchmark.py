"""The benchmark of the feed, without a training: its sets, and what it reads from a run."""

from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs.benchmark import feed
from rlvid.config import load_config
from rlvid.data.clips import EncodedClips
from rlvid.data.encoders import encode_items
from rlvid.data.prompts import read_prompts
from rlvid.data.sources import read_rendered
from rlvid.data.writing import ClipWriter
from rlvid.toy.tiny import tiny_model
from rlvid.train.metrics import TensorBoard


def test_sets_have_the_rows_that_were_asked_for(tmp_path: Path) -> None:
    feed.write_prompt_file(tmp_path / "p.txt", 300)
    assert len(set(read_prompts(tmp_path / "p.txt"))) == 300
    items = [{"index": i, "source": f"clip {i}", "caption": ""} for i in range(3)]
    with ClipWriter(tmp_path / "few", {}) as writer:
        writer.add(encode_items(tiny_model(frames=2, size=8), items, lambda item, model: read_rendered(0, item, model)))
        writer.finish({"fingerprint": "0" * 16, "model_fingerprint": "1" * 16}, [])
    feed.repeat_clips(tmp_path / "few", 600, tmp_path / "many")
    few, many = EncodedClips.open(tmp_path / "few"), EncodedClips.open(tmp_path / "many", "1" * 16)
    assert (len(many), [rows for _, rows, _ in many.meta["parts"]]) == (600, [256, 256, 88])
    assert many.rows([0, 301, 599]).equals(few.rows([0, 1, 2]))
    assert many.meta["fingerprint"] != few.meta["fingerprint"]


def test_numbers_of_a_run_are_read_from_its_log_and_tensorboard(tmp_path: Path) -> None:
    tensorboard = TensorBoard(tmp_path / "tensorboard", 0, ())
    for step, seconds in enumerate((9.0, 1.0, 2.0, 3.0)):
        values = {"seconds/step": seconds, "seconds/data": seconds / 10, "seconds/archive": 0.5}
        tensorboard.scalars(step, values | {"cost/peak_memory_gib": 1.0 + step})
    tensorboard.close()
    found = feed.scalars(tmp_path)
    medians = {"step": 2.0, "data": pytest.approx(0.2), "archive": 0.5}
    assert found == medians | {"peak GiB": 4.0, "of the first step": 9.0}
    (tmp_path / "logs").mkdir()
    lines = [
        "2026-01-02 03:04:05,500 INFO rlvid.train begins",
        "2026-01-02 03:04:08,250 INFO rlvid.train step 0 loss=1",
    ]
    (tmp_path / "logs" / "worker-00.log").write_text("\n".join([*lines, lines[1].replace("step 0", "step 1")]))

    assert datetime.fromtimestamp(feed.first_step(tmp_path)).isoformat() == "2026-01-02T03:04:08.250000"


def test_trainings_on_clips_go_without_denoising(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = list[list[str]]()
    monkeypatch.setattr(feed, "trained", lambda arguments, run, slow=0.0: given.append(arguments) or {})
    monkeypatch.setattr(feed, "_few_clips", lambda folder, overrides: folder)
    monkeypatch.setattr(feed, "repeat_clips", lambda few, count, out: out.mkdir())
    options = SimpleNamespace(steps=2, prompts=[3], clips=[3], slow=[0.0], overrides=["train.batch_size=4"])
    assert len(list(feed.measurements(options, tmp_path))) == len(given) == 4
    prompts, clips = (
        [load_config(config, own) for config, *own in given if config == name] for name in ("toy-ddpo", "toy")
    )
    assert len(prompts) == len(clips) == 2
    assert all(config.method.denoising == 0 for config in clips)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "1"], "--steps 1: must be at least 2"),
        (["--prompts", "8", "0"], "--prompts 0: must be at least 1"),
        (["--clips", "0"], "--clips 0: must be at least 1"),
        (["--slow", "-1"], "--slow -1: must be a number of seconds"),
    ],
)
def test_numbers_that_cannot_be_are_refused(arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "measurements", None)  # nothing is made or trained
    with pytest.raises(ValueError, match=words):
        feed.main(arguments)


def test_the_table_has_a_line_a_training() -> None:
    one = {
        "source": "clips",
        "rows": 1000,
        "first step": 12.34,
        "peak GiB": 0.5,
        "step": 1.0,
        "data": 0.01,
        "archive": 0.1,
    }
    text = feed.table([one]).markdown()
    assert "| clips | 1,000 | 12.3 | 0.50 | 1.000 | 0.010 | 0.100 |" in " ".join(text.split()).replace("--", "")
