"""A worker of a fit: its shares of the batches, its steps, what it resumes from, and the reward that it writes."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from rlvid.config.fit import FitConfig
from rlvid.data.training_set import Source
from rlvid.fitting.looks import LOOKS, PAIRS_IN_FILE, Looks
from rlvid.fitting.pairs import Media, Pair, Vote
from rlvid.fitting.prepare import held_out_prompts, items, read_batch, write_pairs
from rlvid.fitting.worker import RESULT, STATE, FitJob, FitWorker, Scores
from rlvid.plots.video import to_bytes, write_mp4
from rlvid.reward.fit.folder import check_fitted
from rlvid.reward.fit.optimise import Pairs
from rlvid.reward.load import load_reward
from rlvid.reward.preprocess import Preprocess
from rlvid.runs.scalars import read_events
from rlvid.world.captions import write_captions
from rlvid.world.render import degrade, render, sample_clips

COUNT, FRAMES, SIZE = 16, 4, 32
AXES = {"image": ("quality",), "video": ("quality", "motion")}
SMALL: dict[str, Any] = {
    "steps": 4, "batch_size": 8, "group": 2, "warmup": 2, "average": 0.5, "frames": FRAMES, "mean": 0.4,
    "deviation": 0.05, "held_out": 0.25,
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """Two pairs for each of 8 prompts: a clean clip, preferred, and a spoilt one; as images, and as videos."""
    home, random = tmp_path_factory.mktemp("pairs"), torch.Generator().manual_seed(0)
    clips = sample_clips(COUNT // 2, random)
    prompts = write_captions(clips, random) * 2
    clean = render(clips, FRAMES, SIZE).repeat(2, 1, 1, 1, 1)
    spoilt = degrade(clean, torch.arange(COUNT) % 4 + 1, torch.ones(COUNT), random)
    found = {}
    for kind, axes in AXES.items():
        pairs = []
        for place, prompt in enumerate(prompts):
            swap = place % 3 == 0
            a, b = (save(home / f"{place}-{side}", kind, each[place]) for side, each in (("a", clean), ("b", spoilt)))
            votes = [Vote(axis, float(not swap), None, f"votes:{place}") for axis in axes[: 1 + place % 2]]
            models = ("", "base") if place % 4 else ("base", "tuned")
            pairs.append(Pair(prompt, *((b, a) if swap else (a, b)), "", tuple(votes), models))
        made = items(pairs, axes, held_out_prompts(prompts, 0.25, 0), "base")
        read = [read_batch(pa.Table.from_pylist(made), FRAMES, Preprocess(SIZE))]
        assert write_pairs(read, home / kind, axes, FRAMES, SIZE) == []
        found[kind] = Source.of(home / kind)
    return found


def save(path: Path, kind: str, frames_FCHW: Tensor) -> Media:
    if kind == "image":
        Image.fromarray(to_bytes(frames_FCHW)[1]).save(path.with_suffix(".png"))
        return Media(path.with_suffix(".png"))
    write_mp4(path.with_suffix(".mp4"), frames_FCHW, 8)
    return Media(path.with_suffix(".mp4"))


def job(sources: dict[str, Source], work: Path, kind: str = "image", **settings: Any) -> FitJob:
    work.mkdir(exist_ok=True)
    return FitJob(FitConfig(kind=kind, **SMALL | settings), AXES[kind], sources[kind], work, False)


def pixels(frames_PFCHW: Tensor) -> list[bytes]:
    return [each.numpy().tobytes() for each in frames_PFCHW]


def put_together(shares: list[Pairs]) -> Pairs:
    """The pairs of all workers in the order of their serials."""
    whole = Pairs(
        [serial for each in shares for serial in each.serials],
        *(torch.cat([getattr(each, name) for each in shares]) for name in ("tokens_PL", "a", "b", "preference_PA")),
    )
    return whole.take(sorted(range(len(whole.serials)), key=whole.serials.__getitem__))


def test_any_number_of_workers_has_the_same_batches_and_none_has_a_held_out_pair(
    sources: dict[str, Source], tmp_path: Path
) -> None:
    made = job(sources, tmp_path)
    workers = {world: [FitWorker(made, rank, world) for rank in range(world)] for world in (1, 2, 4)}
    rows = sources["image"].open()
    held_out = [place for place, each in enumerate(rows.column("held_out")) if each]
    drawn = set[bytes]()
    for step in range(4):
        (alone,) = (each.share(step) for each in workers[1])
        assert list(alone.serials) == [*range(8 * step, 8 * step + 8)]
        drawn |= {*pixels(alone.a)}
        for world in (2, 4):
            shares = [each.share(step) for each in workers[world]]
            assert {len(each.serials) for each in shares} == {8 // world}
            together = put_together(shares)
            assert list(together.serials) == list(alone.serials)
            for name in ("tokens_PL", "a", "b", "preference_PA"):
                assert torch.equal(getattr(together, name), getattr(alone, name)), name
    a = rows.rows(range(COUNT), ["a"])["a"].to_pylist()
    assert drawn == {each for place, each in enumerate(a) if place not in held_out}, "12 pairs in 4 batches of 8"
    assert len(held_out) == 4


def test_two_shares_of_a_gradient_add_up_to_one_workers(sources: dict[str, Source], tmp_path: Path) -> None:
    for kind in AXES:
        made = job(sources, tmp_path, kind, contrastive=0.3)
        alone, first, second = (FitWorker(made, rank, world) for rank, world in ((0, 1), (0, 2), (1, 2)))
        whole = alone.fitter.gradient(alone.share(1))
        parts = [each.fitter.gradient(each.share(1)) for each in (first, second)]
        assert whole.norm() > 1e-3
        assert min((part - whole / 2).norm() for part in parts) > 1e-3 * whole.norm(), "each has other pairs"
        assert (parts[0] + parts[1] - whole).norm() <= 1e-9 * whole.norm()


def flat(state: Any) -> Any:
    """The same with the numbers of tensors in their place, which can be compared."""
    if isinstance(state, dict):
        return {name: flat(each) for name, each in state.items()}
    return state.tolist() if isinstance(state, Tensor) else state


def to_the_end(worker: FitWorker) -> Scores:
    """Takes the steps that are left; returns the scores without the time."""
    assert worker.run()
    found = worker.finish()
    assert found is not None
    return replace(found, seconds=0.0)


@pytest.mark.parametrize("kind", ["image", pytest.param("video", marks=pytest.mark.slow)])
def test_a_fit_that_was_ended_goes_on_to_the_same_bits(sources: dict[str, Source], tmp_path: Path, kind: str) -> None:
    whole, told = FitWorker(job(sources, tmp_path / "whole", kind, checkpoint_every=3)), list[dict[str, float]]()
    expected = to_the_end(whole)
    made = job(sources, tmp_path / "ended", kind)
    first = FitWorker(made, tell=told.append, ended=lambda: len(told) == 1)
    assert not first.run(), "it was asked in its second step"
    assert [each["step"] for each in told] == [1, 2]
    second = FitWorker(made, tell=told.append)
    assert second.first_step == 2
    assert to_the_end(second) == expected
    assert [each["step"] for each in told] == [1, 2, 3, 4]
    states = [torch.load(tmp_path / name / STATE, weights_only=True) for name in ("whole", "ended")]
    assert flat(states[0]) == flat(states[1]), "weights, average, moments and numbers of steps"
    weights, average = (states[0][name] for name in ("weights", "average"))
    assert any(not torch.equal(weights[name], average[name]) for name in weights)
    written = load_file(tmp_path / "whole" / RESULT / "model.safetensors")
    assert all(torch.equal(each, average[f"backbone.clip.{name}"]) for name, each in written.items())
    losses = [read_events(each.job.work / "tensorboard", "fit/loss".__eq__)["fit/loss"] for each in (whole, second)]
    assert [step for step, _ in losses[1]] == [0, 1, 2, 3]
    assert losses[0] == losses[1]
    for file in (tmp_path / "whole" / RESULT).iterdir():
        assert (tmp_path / "ended" / RESULT / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("kind", AXES)
def test_the_written_reward_scores_base_samples_with_the_asked_mean_and_deviation(
    sources: dict[str, Source], tmp_path: Path, kind: str
) -> None:
    worker = FitWorker(job(sources, tmp_path, kind, steps=8, lr=1e-3))
    found = to_the_end(worker)
    reward, rows = load_reward("fitted", path=str(tmp_path / RESULT)), sources[kind].open()
    table = rows.rows(range(COUNT), ["caption", "a", "b", "shape", "a_base", "b_base"])
    answers = []
    for side in "ab":
        shape = (COUNT, *table["shape"][0].as_py())
        frames = torch.frombuffer(bytearray(b"".join(table[side].to_pylist())), dtype=torch.uint8).view(shape)
        answers.append(reward(frames / 255, table["caption"].to_pylist()).view(COUNT))
    base = torch.cat(answers)[torch.tensor([*table["a_base"].to_pylist(), *table["b_base"].to_pylist()])]
    assert found.samples == len(base) == COUNT
    assert float(base.mean()) == pytest.approx(0.4, rel=1e-4)
    deviation_A = torch.tensor(found.deviation_A)
    standard_N = (torch.tensor(found.differences_NA) / deviation_A).mean(1)
    spec = check_fitted(str(tmp_path / RESULT), "here")
    assert spec.frames == (FRAMES if kind == "video" else None)
    differences_N = (answers[0] - answers[1]) / 0.05 * spec.combined_deviation
    torch.testing.assert_close(differences_N, standard_N, rtol=1e-4, atol=1e-4)
    assert (spec.axes, spec.base_mean, spec.base_deviation) == (
        AXES[kind], tuple(found.mean_A), tuple(found.deviation_A),
    )  # fmt: skip
    assert float(base.std()) == pytest.approx(0.05, rel=1e-4)
    assert (spec.combined_deviation == 1) == (kind == "image"), "the mean of several axes deviates less"
    assert standard_N.abs().max() > 0.1, "the scores of the sides differ"


@pytest.mark.parametrize("kind", AXES)
def test_a_fixed_image_tower_looks_at_each_pair_once(sources: dict[str, Source], tmp_path: Path, kind: str) -> None:
    backbone = {"towers": "text"}
    alone = FitWorker(job(sources, tmp_path / "alone", kind, backbone=backbone, contrastive=0.3))
    assert alone.run()
    (file,) = (tmp_path / "alone" / LOOKS).iterdir()
    before = {name: each.detach().clone() for name, each in alone.scorer.named_parameters()}
    share = alone.share(1)
    assert share.a.dtype == torch.float16
    assert len(np.load(file)) == len(alone.fitted) < COUNT, "none of a held-out pair"
    found = alone.fitter.gradient(share)
    alone.looks = None
    seen = alone.fitter.gradient(alone.share(1))  # through the image tower
    assert seen.norm() > 1e-3
    assert (found - seen).norm() < 3e-3 * seen.norm(), "float16 and no more"
    begun = FitWorker(job(sources, tmp_path / "begun", kind, backbone=backbone))
    same = {name for name, each in begun.scorer.named_parameters() if torch.equal(each, before[name])}
    assert {name for name in before if ".visual." in name} <= same
    assert len(same) < len(before), "the rest was fitted"
    time_of = file.stat().st_mtime_ns
    again = FitWorker(job(sources, tmp_path / "alone", kind, backbone=backbone, contrastive=0.3, steps=5))
    assert again.run()
    assert file.stat().st_mtime_ns == time_of


def test_any_number_of_workers_looks_at_the_pairs_alike(tmp_path: Path) -> None:
    look_NM = torch.randn(3 * PAIRS_IN_FILE - 5, 2, 4, 6).half()
    one, two = Looks(tmp_path / "one", len(look_NM)), Looks(tmp_path / "two", len(look_NM))
    assert one.missing() == [0, 1, 2]
    for number in one.missing():
        one.make(number, lambda places: look_NM[list(places)])
    for rank in range(2):
        for number in range(3)[rank::2]:
            two.make(number, lambda places: look_NM[list(places)])
    assert one.missing() == two.missing() == []
    places = [0, 186, 64, 63, 5, 128]
    for each in (one, two):
        assert torch.equal(each.read(places), look_NM[places])
    file = tmp_path / "one" / "part-00001.npy"
    for bad in (file.read_bytes()[:999], b""):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match=rf"^{re.escape(str(file))} is damaged .*; delete it"):
            Looks(tmp_path / "one", len(look_NM)).read([64])


def test_features_that_are_no_numbers_are_named_with_their_pair(sources: dict[str, Source], tmp_path: Path) -> None:
    worker = FitWorker(job(sources, tmp_path, backbone={"towers": "text"}))
    worker.beginning.clip.visual.proj.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"^votes:\d+ \(.+\): the features .* another backbone$"):
        worker.run()
    assert not [*tmp_path.glob(f"{LOOKS}/*")]


def test_a_damaged_state_is_named_in_one_line(sources: dict[str, Source], tmp_path: Path) -> None:
    made, file = job(sources, tmp_path, steps=1), tmp_path / STATE
    assert FitWorker(made).run()
    whole = file.read_bytes()
    turned = bytearray(whole)
    turned[len(whole) // 2] ^= 1
    torch.save({"step": 1}, tmp_path / "other.pt")
    poor = (tmp_path / "other.pt").read_bytes()
    for bad in (whole[: len(whole) // 2], b"", b"no state\n" * 99, bytes(turned), poor):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match=rf"^{re.escape(str(file))} is damaged; delete it.*$") as error:
            FitWorker(made)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_backbone_that_gives_no_number_is_named_with_a_pair(
    sources: dict[str, Source], tmp_path: Path, bad: float
) -> None:
    worker = FitWorker(job(sources, tmp_path))
    worker.beginning.clip.visual.proj.data[0, 0] = bad
    with pytest.raises(ValueError, match=r"^votes:\d+ \(.+\): .* lr \(now 0\.0001\)"):
        worker.run()
    assert not (tmp_path / STATE).exists()


def test_the_first_pair_without_a_score_is_the_one_that_is_named(sources: dict[str, Source], tmp_path: Path) -> None:
    worker = FitWorker(job(sources, tmp_path))
    prompts = [*sources["image"].open().column("caption")][: COUNT // 2]
    words_NL = worker.beginning.tokenise(prompts)
    place, word = next(
        (place, word)
        for place in range(2, COUNT // 2)
        for word in words_NL[place].tolist()
        if int((words_NL == word).any(1).sum()) == 1
    )
    worker.beginning.clip.token_embedding.weight.data[word] = math.nan
    with pytest.raises(ValueError, match=rf"^votes:{place} \({prompts[place]}\): "):
        to_the_end(worker)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_learning_rate_that_overflows_is_named(sources: dict[str, Source], tmp_path: Path, steps: int) -> None:
    made = job(sources, tmp_path, warmup=1, steps=steps)
    worker = FitWorker(replace(made, config=made.config.model_copy(update={"lr": 1e30})))
    with pytest.raises(ValueError, match=r"lr \(now 1e\+30\)"):
        to_the_end(worker)
    assert not (tmp_path / RESULT).exists()


def test_of_many_fitted_pairs_some_are_scored_and_those_with_base_samples_first(
    sources: dict[str, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlvid.fitting.worker.FITTED", 3)
    worker = FitWorker(job(sources, tmp_path))
    held_out = worker.held_out_N.nonzero().flatten().tolist()
    worker.base_2N = [torch.zeros(COUNT, dtype=torch.bool) for _ in range(2)]
    worker.base_2N[1][worker.fitted[-1]] = True
    worker.base_2N[0][held_out[0]] = True
    rows = worker._judged()
    assert rows == sorted(rows)
    assert {*held_out, worker.fitted[-1]} < {*rows}
    assert len(rows) == len(held_out) + 3
    found = worker.finish()
    assert found is not None
    assert (found.rows_N, len(found.differences_NA), found.samples) == (rows, len(rows), 2)


def test_scores_that_are_all_alike_have_no_unit(sources: dict[str, Source], tmp_path: Path) -> None:
    worker = FitWorker(job(sources, tmp_path))
    for each in worker.fitter.average.values():
        each.zero_()
    with pytest.raises(ValueError, match="all base samples have one score"):
        worker.finish()


def test_scores_that_differ_by_rounding_have_no_unit(
    sources: dict[str, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = FitWorker(job(sources, tmp_path))
    scores = FitWorker._scores

    def rounded(self: FitWorker, rows: list[int]) -> tuple[Tensor, Tensor]:
        a_NA, b_NA = scores(self, rows)
        return 0.3 + 1e-8 * a_NA, 0.3 + 1e-8 * b_NA

    monkeypatch.setattr(FitWorker, "_scores", rounded)
    with pytest.raises(ValueError, match="all base samples have one score"):
        worker.finish()


def test_axes_that_cancel_out_have_no_unit(
    sources: dict[str, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = FitWorker(job(sources, tmp_path, "video"))
    a_N, b_N = torch.randn((2, COUNT), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores = tuple(torch.stack([each, 3 - 2 * each], 1) for each in (a_N, b_N))
    monkeypatch.setattr(worker, "_scores", lambda rows: scores)
    with pytest.raises(ValueError, match=r"axes = \['quality', 'motion'\]: .* cancel out"):
        worker.finish()
    assert not (tmp_path / RESULT).exists()
