"""The folder of a fitted reward: what is saved is what scores, and what does not fit is refused in one line."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import clips, flat_gradient, make
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlvid.config import parse_config
from rlvid.config.fit import HeadConfig
from rlvid.plan.counts import count
from rlvid.reward.clip import build_clip
from rlvid.reward.fit.folder import FittedVideoReward, Scorer, Spec, build_head, save_fitted
from rlvid.reward.fit.models import Backbone, ImageScorer, VideoScorer
from rlvid.reward.load import check_one, check_reward, load_reward, scores_whole_videos, trained_reward
from rlvid.reward.mixture import MixtureReward
from rlvid.reward.preprocess import Preprocess
from rlvid.reward.text_limit import reward_text_limit
from rlvid.toy.pretrain.text import CONTEXT_LENGTH, build_tokenizer

PROMPTS = ["a red circle moving left", "a dog"]
WORDS = build_tokenizer()
STRUCTURE = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 16, "head_width": 8, "image_size": 16, "patch_size": 4},
    "text_cfg": {"context_length": CONTEXT_LENGTH, "vocab_size": len(WORDS), "width": 16, "heads": 2, "layers": 1},
}
IMAGE = Spec(
    axes=("quality",), preprocess=Preprocess(16), base_mean=(0.5,), base_deviation=(2.0,),
    mean=0.3, deviation=0.1,
)  # fmt: skip
VIDEO = Spec(
    axes=("quality", "motion"), preprocess=Preprocess(16), head=HeadConfig(grid=2, width=16), mean=0.3,
    base_mean=(0.5, -1.0), base_deviation=(2.0, 0.5), deviation=0.1,
)  # fmt: skip


def write(folder: Path, spec: Spec) -> Scorer:
    """Saves random weights; returns their scorer."""
    torch.manual_seed(3)
    clip = build_clip(STRUCTURE)
    backbone = Backbone(clip, Preprocess(16), grid=spec.head.grid if spec.head else 0)
    scorer: Scorer = ImageScorer(backbone)
    if spec.head is not None:
        scorer = VideoScorer(backbone, build_head(spec.head, clip, len(spec.axes), "cpu"))
        nn.init.normal_(scorer.head.out)  # an untrained head says nothing
    folder.mkdir()
    save_fitted(folder, spec, scorer, STRUCTURE, WORDS)
    return scorer


def frames(count: int = 4) -> Tensor:
    return torch.rand((2, count, 3, 16, 16), generator=torch.Generator().manual_seed(0))


def tokens() -> Tensor:
    return WORDS(PROMPTS, padding="max_length", max_length=CONTEXT_LENGTH, return_tensors="pt").input_ids


def test_an_image_reward_answers_what_was_fitted_in_the_unit_of_the_reference(tmp_path: Path) -> None:
    scorer = write(tmp_path / "mine", IMAGE)
    reward = load_reward("fitted", path=str(tmp_path / "mine"))
    raw_BS = torch.cat([scorer(frames()[:, place : place + 1], tokens()) for place in range(4)], 1)
    torch.testing.assert_close(reward(frames(), PROMPTS), 0.3 + 0.1 * (raw_BS - 0.5) / 2, atol=1e-5, rtol=1e-4)
    assert not getattr(reward, "whole_video", False)
    coarse = load_reward("fitted", path=str(tmp_path / "mine"), precision="bfloat16")
    assert coarse.scale == reward.scale
    assert not any(each.requires_grad for each in reward.parameters())


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_coarser_type_does_not_round_the_scale_of_cosines(tmp_path: Path, precision: str) -> None:
    write(tmp_path / "mine", VIDEO)
    found = [load_reward("fitted", path=str(tmp_path / "mine"), precision=each) for each in ("float32", precision)]
    fine, coarse = (each.scorer.backbone.scale for each in found)
    assert torch.equal(fine, coarse)
    assert float(fine) == pytest.approx(math.exp(load_file(tmp_path / "mine" / "model.safetensors")["logit_scale"]))


@pytest.mark.parametrize("combined", [1.0, 0.7])
def test_a_video_reward_answers_the_mean_of_its_standardised_axes(tmp_path: Path, combined: float) -> None:
    scorer = write(tmp_path / "mine", VIDEO.model_copy(update={"combined_deviation": combined}))
    reward = load_reward("fitted", path=str(tmp_path / "mine"), chunk=3)
    assert isinstance(reward, FittedVideoReward)
    assert reward.whole_video
    for length in (4, 8):
        raw_BA = scorer(frames(length), tokens())
        expected_B = 0.3 + 0.1 * ((raw_BA[:, 0] - 0.5) / 2 + (raw_BA[:, 1] + 1) / 0.5) / 2 / combined
        torch.testing.assert_close(reward(frames(length), PROMPTS), expected_B, atol=1e-5, rtol=1e-4)
    pixels = frames().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(pixels, PROMPTS).sum(), pixels)
    assert (gradient.flatten(2).norm(dim=2) > 0).all(), "every frame has a gradient"
    assert load_reward("fitted", path=str(tmp_path / "mine"), precision="bfloat16")(frames(), PROMPTS).isfinite().all()


@pytest.mark.parametrize(
    ("length", "places"), [(4, range(4)), (8, (1, 3, 5, 7)), (9, (1, 3, 5, 7)), (6, (0, 2, 3, 5)), (2, (0, 0, 1, 1))]
)
def test_a_video_reward_looks_at_as_many_frames_as_in_its_fit(tmp_path: Path, length: int, places: Any) -> None:
    write(tmp_path / "all", VIDEO)
    write(tmp_path / "four", VIDEO.model_copy(update={"frames": 4}))
    whole, four = (load_reward("fitted", path=str(tmp_path / name)) for name in ("all", "four"))
    pixels = frames(length).requires_grad_()
    found, chosen = four(pixels, PROMPTS), whole(pixels[:, [*places]], PROMPTS)
    torch.testing.assert_close(found, chosen, atol=1e-6, rtol=1e-5)
    assert torch.equal(found, chosen) or length < 4
    gradient, expected = (torch.autograd.grad(each.sum(), pixels)[0] for each in (found, chosen))
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)
    seen = gradient.flatten(2).norm(dim=2) > 0
    assert all(row.nonzero().flatten().tolist() == sorted({*places}) for row in seen), "the others have no gradient"


def test_a_number_of_frames_is_sealed_and_left_out_where_there_is_none(tmp_path: Path) -> None:
    write(tmp_path / "all", VIDEO)
    assert "frames" not in json.loads((tmp_path / "all" / "reward.json").read_text()), "as earlier versions wrote it"
    write(tmp_path / "four", VIDEO.model_copy(update={"frames": 4}))
    alter(tmp_path / "four", frames=8)
    with pytest.raises(ValueError, match=r"reward\.json is not as rlvid reward fit wrote it"):
        check_one("fitted", str(tmp_path / "four"))
    write(tmp_path / "still", IMAGE)
    alter(tmp_path / "still", frames=4)
    with pytest.raises(ValueError, match="frames = 4: a cosine is of each frame; leave it out"):
        check_one("fitted", str(tmp_path / "still"))


def test_runs_train_on_it_and_are_judged_by_it(tmp_path: Path) -> None:
    write(tmp_path / "still", IMAGE)
    write(tmp_path / "whole", VIDEO)
    still, whole = str(tmp_path / "still"), str(tmp_path / "whole")
    config = parse_config({"reward": {"name": "fitted", "path": whole, "held_out": "fitted", "held_out_path": still}})
    check_reward(config.reward, needs_gradient=True)
    assert scores_whole_videos(config.reward)
    limit = reward_text_limit("fitted", whole)
    assert limit is not None
    assert limit.tokens == CONTEXT_LENGTH
    parts = [{"name": "fitted", "path": still}, {"name": "fitted", "path": whole, "weight": 2.0}]
    mixture = parse_config({"reward": {"name": "mixture", "mixture": parts}})
    made = trained_reward(mixture.reward)
    assert isinstance(made, MixtureReward)
    assert made.labels == ["still", "whole"]
    method = make({"name": "draft"})
    method.context.reward = trained_reward(config.reward)
    assert flat_gradient(method, clips(method))[0].norm() > 0
    counted = count(config, 8)
    assert (counted.reward.graph, counted.held_out.plain) == (8, 8), "both look at all frames"
    other = {"name": "fitted", "path": still, "held_out": "fitted", "held_out_path": whole}
    counted = count(parse_config({"reward": other}), 8)
    assert (counted.reward.graph, counted.held_out.plain) == (4, 8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "reward.json").unlink(), ["no reward.json there", "rlvid reward fit"]),
        (lambda folder: (folder / "reward.json").write_text("{"), ["reward.json", "damaged"]),
        (lambda folder: alter(folder, base_mean=[0.5]), ["reward.json", "differ in length"]),
        (lambda folder: alter(folder, base_deviation=[1.0, 0.0]), ["reward.json", "must be above 0"]),
        (lambda folder: alter(folder, combined_deviation=0.0), ["reward.json", "combined_deviation"]),
        (
            lambda folder: alter(folder, axes=["quality"], base_mean=[0], base_deviation=[1], combined_deviation=0.7),
            ["reward.json", "combined_deviation = 0.7: of one axis it is 1"],
        ),
        (lambda folder: alter(folder, head={"grid": 0}), ["reward.json", "head.grid"]),
        (
            lambda folder: alter(folder, head={"grid": 3, "width": 16}),
            ["head.safetensors", "frame.weight (16, 96) instead of (16, 176)"],
        ),
        (lambda folder: alter(folder, preprocess={"size": 16, "zoom": 2}), ["reward.json", "zoom"]),
        (lambda folder: alter(folder, preprocess={"size": 16, "fit": "Pad"}), ["reward.json", "preprocess.fit"]),
        (lambda folder: alter(folder, preprocess={"size": 32}), ["reward.json", "preprocess.size = 32"]),
        (lambda folder: alter(folder, head={"grid": 2, "width": 18}), ["reward.json", "width = 18"]),
        (lambda folder: alter(folder, base_mean=[0.5, math.nan]), ["reward.json", "base_mean.1"]),
        (lambda folder: alter(folder, head=None), ["reward.json", "a cosine has one axis"]),
        (lambda folder: alter(folder, colour="red"), ["reward.json", "colour"]),
        (lambda folder: (folder / "head.safetensors").unlink(), ["head.safetensors"]),
        (lambda folder: (folder / "open_clip_config.json").unlink(), ["no open_clip_config.json"]),
        (lambda folder: configure(folder, width=32), ["not the weights of this model"]),
        (lambda folder: configure(folder, "", model_cfg=None), ["open_clip_config.json is damaged", "no model_cfg"]),
        (lambda folder: configure(folder, "model_cfg", vision_cfg=None), ["no table model_cfg.vision_cfg"]),
        (lambda folder: configure(folder, "model_cfg", text_cfg=[3]), ["no table model_cfg.text_cfg"]),
        (lambda folder: configure(folder, "model_cfg", embed_dim="x"), ["open_clip_config.json is damaged"]),
        (lambda folder: configure(folder, colour=1), ["open_clip_config.json is damaged", "colour"]),
        (lambda folder: configure(folder, head_width=0), ["open_clip_config.json is damaged"]),
        (lambda folder: configure(folder, patch_size=0), ["open_clip_config.json is damaged"]),
        (lambda folder: configure(folder, layers=None), ["open_clip_config.json is damaged"]),
        (lambda folder: configure(folder, "text_cfg", heads=7), ["open_clip_config.json is damaged"]),
        (lambda folder: configure(folder, "text_cfg", hf_model_name="x"), ["of another class than CLIP"]),
        (
            lambda folder: [(folder / name).unlink() for name in ("tokenizer.json", "vocab.json")],
            ["a vocabulary of its own", "no tokenizer.json"],
        ),
        (lambda folder: foreign_tokenizer(folder), ["its tokenizer is damaged (Unk token", "tokenizer.json"]),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), ["its tokenizer is damaged", "tokenizer.json"]),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text('{"pad_token": null}'),
            ["its tokenizer is damaged (it has no padding token)"],
        ),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text('{"pad_token": "[PAD]"}'),
            [f"tokens up to {len(WORDS)}, and the model those below {len(WORDS)}"],
        ),
        (lambda folder: age(folder), ["head.safetensors is of an earlier version", "fit the reward anew"]),
        (lambda folder: replace(folder, "model.safetensors"), ["model.safetensors is not as", "copy the whole folder"]),
        (lambda folder: replace(folder, "head.safetensors"), ["head.safetensors is not as"]),
        (lambda folder: configure(folder, head_width=16), ["open_clip_config.json is not as"]),
        (lambda folder: (folder / "merges.txt").write_text("#version: 0.2\n"), ["merges.txt is not as"]),
        (lambda folder: (folder / "vocab.json").unlink(), ["no vocab.json there", "copy the whole folder"]),
        (
            lambda folder: alter(folder, head={"grid": 2, "width": 16, "heads": 8}),
            ["reward.json is not as", "delete sha256"],
        ),
        (lambda folder: alter(folder, preprocess={"size": 16, "mode": "bilinear"}), ["reward.json is not as"]),
        (lambda folder: alter(folder, sha256=5), ["reward.json", "sha256"]),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_before_its_weights_are_read(
    tmp_path: Path, change: Any, words: list[str]
) -> None:
    write(tmp_path / "mine", VIDEO)
    change(tmp_path / "mine")
    with pytest.raises(ValueError, match=r"reward\.path = ") as error:
        check_one("fitted", str(tmp_path / "mine"))
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


def alter(folder: Path, **settings: object) -> None:
    file = folder / "reward.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def age(folder: Path) -> None:
    file = folder / "head.safetensors"
    save_file({name: each for name, each in load_file(file).items() if not name.startswith("change")}, file)


def configure(folder: Path, part: str = "vision_cfg", **settings: object) -> None:
    """Changes a part of the CLIP's structure: the whole, ``model_cfg``, or a tower of it."""
    file = folder / "open_clip_config.json"
    whole = json.loads(file.read_text())
    parts = {"": whole, "model_cfg": whole["model_cfg"], **whole["model_cfg"]}
    parts[part].update(settings)
    file.write_text(json.dumps(whole))


def foreign_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer.json"
    words = json.loads(file.read_text())
    words["model"] |= {"vocab": {"a": 0, "b": 1}, "merges": []}
    file.write_text(json.dumps(words | {"added_tokens": []}))


def replace(folder: Path, name: str) -> None:
    """Another fit's weights: of the same shapes."""
    save_file({key: each + 0.01 for key, each in load_file(folder / name).items()}, folder / name)


def test_a_folder_without_digests_and_another_unit_are_accepted(tmp_path: Path) -> None:
    write(tmp_path / "mine", VIDEO)
    before = load_reward("fitted", path=str(tmp_path / "mine"))(frames(), PROMPTS)
    alter(tmp_path / "mine", mean=1.3)
    torch.testing.assert_close(load_reward("fitted", path=str(tmp_path / "mine"))(frames(), PROMPTS), before + 1)
    table = json.loads((tmp_path / "mine" / "reward.json").read_text())
    for key in ("sha256", "combined_deviation"):
        del table[key]
    (tmp_path / "mine" / "reward.json").write_text(json.dumps(table | {"mean": 0.3}))
    assert torch.equal(load_reward("fitted", path=str(tmp_path / "mine"))(frames(), PROMPTS), before)
    replace(tmp_path / "mine", "model.safetensors")
    assert not torch.equal(load_reward("fitted", path=str(tmp_path / "mine"))(frames(), PROMPTS), before)


@pytest.mark.parametrize("name", ["model.safetensors", "head.safetensors"])
def test_weights_that_are_nan_are_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / "mine", VIDEO)
    weights = load_file(tmp_path / "mine" / name)
    next(iter(weights.values())).view(-1)[0] = torch.nan
    save_file(weights, tmp_path / "mine" / name)
    alter(tmp_path / "mine", sha256=None)
    with pytest.raises(ValueError, match="NaN or infinite"):
        load_reward("fitted", path=str(tmp_path / "mine"))


def test_settings_that_a_fitted_reward_does_not_take_are_refused(tmp_path: Path) -> None:
    for reward, words in (
        ({"name": "fitted", "path": "random"}, "no random weights"),
        ({"name": "fitted", "path": str(tmp_path), "preprocess": "clip"}, "preprocess"),
        ({"name": "fitted", "path": "mine.py:score"}, "takes a checkpoint"),
    ):
        with pytest.raises(ValueError, match=words):
            parse_config({"reward": reward})
    with pytest.raises(ValueError, match=r"reward\.path is not set"):
        check_one("fitted", None)
