"""Rewards of the user's own, mixtures and the two that need no model, in the methods that use them."""

import io
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import PROMPTS, Listener, clips, flat_gradient, make, save_run
from PIL import Image
from torch import Tensor

from rlvid.actions import evaluate_and_show
from rlvid.algorithms.scoring import score
from rlvid.config.reward import RewardConfig
from rlvid.doctor.run import check_run
from rlvid.evaluate.load import load_run
from rlvid.export.export import export_run
from rlvid.faults import describe
from rlvid.report.runs import read_run
from rlvid.reward.load import check_reward, held_out_reward, load_reward, trained_reward
from rlvid.reward.mixture import MixtureReward
from rlvid.reward.video import whole_video

ROOT = Path(__file__).resolve().parents[2]

FILE = """
import torch
calls = []
def score(frames, prompts):
    calls.append(frames.requires_grad)
    return frames.mean((2, 3, 4))
def whole(frames, prompts):
    assert frames.shape[1] == 4, frames.shape
    return frames.diff(dim=1).abs().mean((1, 2, 3, 4))
whole.whole_video = True
def outside(frames, prompts):
    return [[float(frame.mean()) for frame in video] for video in frames]
outside.differentiable = False
def detached(frames, prompts):
    return frames.detach().mean((2, 3, 4))
def wrong(frames, prompts):
    return frames.mean()
def broken(frames, prompts):
    raise KeyError("nothing here")
def leaves(frames, prompts):
    import sys
    sys.exit(3)
def silent(frames, prompts):
    assert frames is None
def words(frames, prompts):
    return ["good"] * len(prompts)
def nothing(frames, prompts):
    pass
class Backward(torch.autograd.Function):
    @staticmethod
    def forward(context, frames):
        return frames.mean((2, 3, 4))
    @staticmethod
    def backward(context, gradient):
        assert False
def late(frames, prompts):
    return Backward.apply(frames)
def imaginary(frames, prompts):
    return frames.mean((2, 3, 4)) * 1j
def holes(frames, prompts):
    return frames.mean((2, 3, 4)).log() * 0 / 0
def narrow(frames):
    return frames
number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def method(reward: dict[str, Any], name: str = "instructvideo") -> Any:
    """A method of the tiny model with the configured rewards in place of the tiny one."""
    found = make({"name": name}, reward=reward)
    found.context.reward = trained_reward(found.context.config.reward)
    found.context.held_out = held_out_reward(found.context.config.reward)
    return found


# ---------------------------------------------------------------------------------------------------------- custom


def test_the_example_of_the_documentation_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8"), re.DOTALL)
    (example,) = [block for block in blocks if block.startswith("# my_reward.py")]
    (tmp_path / "my_reward.py").write_text(example)
    found = method({"path": f"{tmp_path}/my_reward.py:score", "held_out": None})
    assert found.context.config.reward.name == "custom"
    check_reward(found.context.config.reward, needs_gradient=True)
    gradient, (update,) = flat_gradient(found, clips(found))
    assert gradient.norm() > 0
    assert update.metrics["reward/excluded"] == (0.0, 1.0)
    assert update.samples is not None
    assert update.samples.frames_BS.tolist() == [[0, 1, 2, 3]] * 4, "a reward of whole videos sees all frames"


def test_a_function_gets_frames_and_gives_scores_with_their_gradient(file: Path) -> None:
    found = method({"path": f"{file}:score", "held_out": None})
    gradient, (update,) = flat_gradient(found, clips(found))
    assert gradient.norm() > 0
    assert update.samples is not None
    expected = update.samples.frames_BSCHW.mean((2, 3, 4))
    torch.testing.assert_close(update.samples.scores_BS, expected, atol=0.05, rtol=0)  # but for pixels outside [0, 1]
    assert found.context.reward.function.__globals__["calls"] == [True]


def test_a_function_without_gradient_may_answer_with_lists(file: Path) -> None:
    found = method({"path": f"{file}:outside", "held_out": None}, "ddpo")
    check_reward(found.context.config.reward, needs_gradient=False)
    _, updates = flat_gradient(found, clips(found))
    assert updates[0].metrics["reward/trained"][1] == 8
    assert updates[0].metrics["reward/excluded"][0] == 0


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("broken", r"mine.py:broken raised KeyError: 'nothing here' at mine.py:19; 4 videos are left out"),
        ("leaves", r"mine.py:leaves raised sys.exit\(3\) at mine.py:22"),
        ("silent", r"mine.py:silent raised AssertionError at mine.py:24"),
        ("words", r"mine.py:words raised TypeError: mine.py:words returned list, not numbers"),
        ("nothing", r"mine.py:nothing returned NoneType, not numbers"),
        ("imaginary", r"mine.py:imaginary returned complex numbers"),
        ("holes", r"mine.py:holes gave NaN or infinity for 4 of 4 videos"),
    ],
)
def test_a_function_that_fails_costs_its_videos_and_not_the_run(file: Path, function: str, words: str) -> None:
    found = method({"path": f"{file}:{function}", "held_out": None})
    found.context.observer = heard = Listener()
    gradient, (update,) = flat_gradient(found, clips(found))
    assert not gradient.any()
    assert update.metrics["reward/excluded"] == (4.0, 1.0)
    assert re.search(words, heard.lines[0])


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("wrong", r"scores of shape \(\) for 4 videos of 2 frames; expected \(4, 2\) \(one a frame\) or \(4,\)"),
        ("detached", r"the reward mine.py:detached gave scores without a gradient, which this method back-propagates"),
    ],
)
def test_scores_that_cannot_be_used_are_told(file: Path, function: str, words: str) -> None:
    found = method({"path": f"{file}:{function}", "held_out": None})
    with pytest.raises(ValueError, match=words):
        flat_gradient(found, clips(found))


def test_an_error_without_text_in_the_backward_pass_is_named_with_its_line(file: Path) -> None:
    found = method({"path": f"{file}:late", "held_out": None})
    with pytest.raises(AssertionError) as raised:
        flat_gradient(found, clips(found))
    line = FILE.splitlines().index("        assert False") + 1
    assert describe(raised.value) == f"AssertionError at mine.py:{line}"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("gone.py:score", r"reward.path = '.*gone.py:score': there is no file .*gone.py"),
        ("mine.py:missing", r"mine.py has no function 'missing'"),
        ("mine.py:number", r"mine.py has no function 'number'"),
        ("mine.py:narrow", r"narrow must take \(frames, prompts\).*too many positional arguments"),
        ("bad.py:score", r"bad.py cannot be imported \(NameError: name 'undefined' is not defined at bad.py:1\)"),
        ("syntax.py:score", r"syntax.py cannot be imported \(SyntaxError"),
        ("exits.py:score", r"exits.py cannot be imported \(sys.exit\('no'\) at exits.py:1\)"),
        ("mine.py:outside", r"says that it is not differentiable, and the method needs its gradient"),
    ],
)
def test_a_wrong_function_is_told_before_anything_starts(file: Path, path: str, words: str) -> None:
    (file.parent / "bad.py").write_text("undefined")
    (file.parent / "syntax.py").write_text("def score(:")
    (file.parent / "exits.py").write_text("raise SystemExit('no')")
    with pytest.raises(ValueError, match=words):
        check_reward(RewardConfig(path=f"{file.parent}/{path}"), needs_gradient=True)


# --------------------------------------------------------------------------------------------------------- mixture


def mixed(*parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"mixture": list(parts), "held_out": None} | more


def test_a_mixture_is_the_weighted_sum_and_logs_its_parts() -> None:
    parts = [{"name": "brightness", "weight": 2}, {"name": "compression", "weight": -0.5}]
    found = method(mixed(*parts))
    assert found.context.config.reward.name == "mixture"
    gradient, (update,) = flat_gradient(found, clips(found))
    bright, small = (update.metrics[f"reward/part_{name}"] for name in ("brightness", "compression"))
    assert bright[1] == small[1] == update.metrics["reward/trained"][1] == 8
    assert not any(scores.requires_grad for scores in found.context.reward.latest.values()), "they would keep the graph"
    assert update.metrics["reward/trained"][0] == pytest.approx(2 * bright[0] - 0.5 * small[0], abs=1e-4)
    gradients = [flat_gradient(alone := method({"name": p["name"], "held_out": None}), clips(alone))[0] for p in parts]
    torch.testing.assert_close(gradient, 2 * gradients[0] - 0.5 * gradients[1], atol=1e-6, rtol=1e-3)


def test_a_mixture_with_a_part_of_whole_videos_is_of_whole_videos(file: Path) -> None:
    found = method(mixed({"name": "brightness"}, {"path": f"{file}:whole", "weight": 3}))
    assert whole_video(found.context.reward)
    latents = clips(found).latents_BCFhw
    scored = score(found.context, clips(found), latents)
    frames = found.context.model.decode_frames(latents, torch.arange(4).expand(4, -1))
    bright = load_reward("brightness")(frames, PROMPTS).mean(1)
    moved = frames.diff(dim=1).abs().mean((1, 2, 3, 4))
    torch.testing.assert_close(scored.reward_B, bright + 3 * moved, atol=1e-5, rtol=0)
    assert scored.metrics["reward/part_whole"] == pytest.approx((float(moved.sum()), 4.0), abs=1e-4)


def test_a_mixture_whose_part_fails_has_the_same_metrics(file: Path) -> None:
    found = method(mixed({"name": "brightness"}, {"path": f"{file}:broken"}))
    _, (update,) = flat_gradient(found, clips(found))
    assert update.metrics["reward/excluded"] == (4.0, 1.0)
    assert update.metrics["reward/part_brightness"] == update.metrics["reward/part_broken"] == (0.0, 0.0)
    found.context.reward.latest = {"brightness": torch.ones(4, 2)}  # of an earlier batch
    with pytest.raises(KeyError, match="nothing here"):
        found.context.reward(torch.rand(1, 2, 3, 8, 8), ["a"])
    assert found.context.reward.latest == {}


def test_parts_get_the_run_s_settings_and_their_own(file: Path) -> None:
    reward: Any = trained_reward(
        RewardConfig(
            mixture=[{"name": "builtin"}, {"path": f"{file}:score"}], chunk=3, precision="bfloat16",
            checkpoint_activations=True,
        )  # type: ignore[arg-type]
    )  # fmt: skip
    assert isinstance(reward, MixtureReward)
    assert reward.labels == ["builtin", "score"]
    assert (reward.parts[0].chunk, reward.parts[0].recompute) == (3, True)
    assert reward.parts[0].clip.logit_scale.dtype == torch.bfloat16
    assert reward(torch.rand(1, 2, 3, 32, 32), ["a red circle"]).dtype == torch.float32


# -------------------------------------------------------------------------------------------------------- held out


def test_a_held_out_reward_of_whole_videos_sees_all_frames(file: Path) -> None:
    found = method({"name": "brightness", "held_out_path": f"{file}:whole"})
    batch = clips(found)
    scored = score(found.context, batch, batch.latents_BCFhw)
    assert scored.samples.frames_BS.shape == (4, 2)
    frames = found.context.model.decode_frames(batch.latents_BCFhw, torch.arange(4).expand(4, -1))
    moved = frames.diff(dim=1).abs().mean((1, 2, 3, 4))
    assert scored.samples.held_out_B is not None
    torch.testing.assert_close(scored.samples.held_out_B, moved, atol=1e-6, rtol=0)


def test_a_held_out_reward_that_fails_is_left_out(file: Path) -> None:
    found = method({"name": "brightness", "held_out_path": f"{file}:broken"})
    gradient, (update,) = flat_gradient(found, clips(found))
    assert gradient.norm() > 0
    assert update.metrics["reward/held_out"] == (0.0, 0.0)
    assert update.samples is not None
    assert update.samples.held_out_B is not None
    assert update.samples.held_out_B.isnan().all()


# ---------------------------------------------------------------------------------------------------------- simple


def test_brightness_is_the_mean_luma() -> None:
    red = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(1, 2, 3, 4, 4)
    assert load_reward("brightness")(red, ["a"]).tolist() == [[pytest.approx(0.299)] * 2]
    assert load_reward("brightness")(3 * red - 1, ["a"]).tolist() == [[pytest.approx(0.299)] * 2], "clamped"


def pictures() -> list[Tensor]:
    """From one colour to noise: (3, 40, 44) each."""
    generator = torch.Generator().manual_seed(0)
    sizes = [1, 2, 4, 8, 16, 32]
    coarse = [torch.rand(1, 3, size, size, generator=generator) for size in sizes]
    return [torch.nn.functional.interpolate(each, (40, 44), mode="bicubic").clamp(0, 1)[0] for each in coarse]


def test_compression_ranks_pictures_as_jpeg_does() -> None:
    bytes_of = []
    for picture in pictures():
        buffer = io.BytesIO()
        Image.fromarray(picture.mul(255).round().byte().permute(1, 2, 0).numpy()).convert("L").save(
            buffer, "JPEG", quality=50
        )
        bytes_of.append(len(buffer.getvalue()))
    scores = load_reward("compression")(torch.stack(pictures())[None], ["a"])[0].tolist()
    assert scores[0] == pytest.approx(0, abs=1e-4)
    assert sorted(range(6), key=lambda i: -scores[i]) == sorted(range(6), key=lambda i: bytes_of[i])
    assert all(later < earlier for earlier, later in pairwise(scores))


def test_compression_counts_the_bits_of_a_dct_by_hand() -> None:
    """Frames of no whole number of blocks, the table that Pillow writes at quality 50, cosines one by one."""
    frames, buffer = torch.rand(2, 2, 3, 10, 19), io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "JPEG", quality=50)
    quanta = torch.tensor(Image.open(buffer).quantization[0]).reshape(8, 8)  # type: ignore[attr-defined]
    wave = torch.tensor([[math.cos(math.pi * k * (2 * n + 1) / 16) for n in range(8)] for k in range(8)])
    wave *= torch.tensor([math.sqrt(1 / 8), *[math.sqrt(2 / 8)] * 7])[:, None]
    gray = 255 * (frames * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(2)
    gray = gray[..., torch.arange(16).clamp(max=9), :][..., torch.arange(24).clamp(max=18)]  # the edge goes on
    bits = torch.zeros(2, 2)
    for top in (0, 8):
        for left in (0, 8, 16):
            block = gray[..., top : top + 8, left : left + 8]
            counted = (1 + (torch.einsum("kn,bsnm,lm->bskl", wave, block, wave) / quanta).abs()).log2()
            bits += counted.sum((2, 3)) - counted[..., 0, 0]
    torch.testing.assert_close(load_reward("compression")(frames, ["a", "b"]), -bits / (16 * 24), atol=0, rtol=1e-4)


def test_a_step_along_the_gradient_of_compression_smooths() -> None:
    frames = torch.stack(pictures()[3:])[None].requires_grad_()
    reward = load_reward("compression")
    before = reward(frames, ["a"])
    (gradient,) = torch.autograd.grad(before.sum(), frames)
    after = reward(frames.detach() + 1e-3 * gradient / gradient.abs().max(), ["a"])
    assert (after > before).all()
    assert math.isfinite(float(gradient.norm()))


@pytest.mark.parametrize("place", ["path", "held_out_path", "mixture"])
def test_a_file_that_only_a_run_names_does_not_run_unless_it_is_trusted(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run, config = save_run(tmp_path)
    ran = tmp_path / "it-ran"
    Path("theirs.py").write_text(f"from pathlib import Path\nPath({str(ran)!r}).touch()\n{FILE}", encoding="utf-8")
    reward: dict[str, Any] = {place: "theirs.py:score"}
    if place == "mixture":
        reward = {place: [{"name": "brightness"}, {"path": "theirs.py:score"}]}
    settings = config.model_dump(mode="json")
    kept = {"segments": 2, "held_out": None if place != "held_out_path" else "custom"}
    (run / "config.yaml").write_text(yaml.safe_dump(settings | {"reward": kept | reward}), encoding="utf-8")
    how: dict[str, Any] = {"steps": [2], "sets": ["scenes"], "videos": 2}
    with pytest.raises(ValueError, match=r"an evaluation would run the reward in \S*theirs\.py.*--trust") as error:
        evaluate_and_show([str(run)], **how)
    assert "\n" not in str(error.value)
    load_run(run)
    read_run(run)
    export_run(run, tmp_path / "exported")
    list(check_run(run))
    assert not ran.exists()
    if place == "path":
        evaluate_and_show([str(run)], **how, trust=True)
        assert ran.exists()
