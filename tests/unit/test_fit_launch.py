"""The folder of a fit until its reward is there: what a second start finds in it; no Ray."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from runs import QUIET

from rlvid.config.fit import FitConfig
from rlvid.data.clips import EncodedClips
from rlvid.fitting import launch
from rlvid.fitting.launch import fit_reward
from rlvid.fitting.prepare import read_batch

PAIRS = 4


class Fits(Exception):
    """The workers would start."""


@pytest.fixture
def fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Fits to votes.jsonl up to the start of the workers; pairs are read in this process."""

    def read(made: list[dict[str, Any]], frames: int, preprocess: Any, readers: int) -> Iterator[pa.Table]:
        yield read_batch(pa.Table.from_pylist(made), frames, preprocess)

    def start(*arguments: Any) -> None:
        raise Fits

    for name in ("start_ray", "check_nodes", "check_files"):
        monkeypatch.setattr(launch, name, lambda *arguments: None)
    monkeypatch.setattr(launch, "check_workers", lambda *arguments: False)
    monkeypatch.setattr(launch, "read_on_ray", read)
    monkeypatch.setattr(launch, "_fit", start)
    return lambda **settings: fit_reward(FitConfig(**settings), tmp_path / "votes.jsonl", tmp_path / "out", QUIET)


def picture(path: Path) -> None:
    pixels = np.random.default_rng(sum(path.name.encode())).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def votes(folder: Path, prompts: Sequence[str] = ("a dog 0", "a dog 1")) -> None:
    """Writes pairs of some prompts, the first of which cannot be read."""
    rows = []
    for place in range(PAIRS):
        sides = {side: f"{place}{side}.png" for side in "ab"}
        for name in sides.values():
            picture(folder / name)
        rows.append({"prompt": prompts[place % len(prompts)], **sides, "preference": place // 2})
    (folder / "0a.png").write_bytes(b"broken")
    (folder / "votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_fit_without_a_step_gives_way_to_a_changed_one(fit: Callable[..., None], tmp_path: Path) -> None:
    votes(tmp_path)
    work = tmp_path / "out.unfinished"
    for held_out in (0.2, 0.4):
        with pytest.raises(ValueError, match="the axis 'quality' has 1 pairs"):
            fit(held_out=held_out)
    (work / "looks").mkdir()
    picture(tmp_path / "0a.png")
    with pytest.raises(Fits):
        fit(held_out=0.4)
    assert not (work / "looks").exists(), "it was of other pairs"
    assert json.loads((work / "skipped.json").read_text()) == []
    assert json.loads((work / "plan.json").read_text())["settings"]["held_out"] == 0.4
    (work / "state.pt").touch()
    with pytest.raises(ValueError, match=r"holds an unfinished fit \(held_out 0\.4 and now 0\.2\)"):
        fit(held_out=0.2)


def test_prompts_that_are_cut_are_said_and_not_divided(
    fit: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    votes(tmp_path, [" ".join(["star"] * 23) + end for end in ("", " moon", " dog", " moon dog")])
    picture(tmp_path / "0a.png")
    with pytest.raises(ValueError, match="all 4 prompts have the same tokens"):
        fit()
    votes(tmp_path, [" ".join(["star"] * 23) + end for end in ("", " moon", " dog")] + ["a dog"])
    picture(tmp_path / "0a.png")
    said: list[str] = []
    monkeypatch.setattr(QUIET, "print", lambda line, **options: said.append(line))
    for check in ("_check_split", "_check_base"):
        monkeypatch.setattr(launch, check, lambda *arguments: None)
    with pytest.raises(Fits):
        fit()
    assert said[0].startswith("3 of 4 different prompts are longer than 24 tokens")
    assert "the backbone 'builtin'" in said[0]
    rows = EncodedClips.open(tmp_path / "out.unfinished" / "pairs")
    held_out = dict(zip(rows.column("caption"), rows.column("held_out"), strict=True))
    assert len({held_out[prompt] for prompt in held_out if prompt != "a dog"}) == 1


def test_an_unfinished_folder_of_something_else_is_kept(fit: Callable[..., None], tmp_path: Path) -> None:
    votes(tmp_path)
    work = tmp_path / "out.unfinished"
    work.mkdir()
    (work / "plan.json").write_text('{"videos": "of rlvid encode"}')
    with pytest.raises(ValueError, match=r"out\.unfinished: holds an unfinished fit"):
        fit()
    assert (work / "plan.json").read_text() == '{"videos": "of rlvid encode"}'
