"""What a fit begins with: settings that are refused, backbones, layers, and the folder that comes of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from rlvid.config.fit import FitConfig
from rlvid.fitting.backbone import begin, check_backbone, preprocess_for, scorer_of, spec_of
from rlvid.reward.fit.folder import save_fitted
from rlvid.reward.load import load_reward
from rlvid.reward.published import structure
from rlvid.toy.tiny import save_tiny_clip

PROMPTS = ["a red circle moving left", "a dog"]


def frames() -> torch.Tensor:
    return torch.rand((2, 3, 3, 32, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": 12, "group": 8}, "multiples of 8"),
        ({"batch_size": 32, "group": 8, "workers": 3}, "multiples of 24"),
        ({"axes": ["a", "b"]}, "an image reward has one axis"),
        ({"preferences": 0}, "leave nothing to fit"),
        ({"kind": "video", "preferences": 0, "contrastive": 1}, "learns from votes alone"),
        ({"contrastive": 1, "group": 1}, "compares pairs of a group"),
        ({"backbone": {"layers": 0}}, "leaves nothing to fit of an image reward"),
        ({"backbone": {"name": "clip"}}, "needs it"),
        ({"backbone": {"name": "builtin", "path": "x"}}, "takes none but 'random'"),
        ({"head": {"width": 30, "heads": 4}}, "no multiple of heads"),
        ({"colour": 1}, "Extra inputs"),
        ({"axes": ["a", "a"], "kind": "video"}, "an axis is there twice"),
        ({"head": {"grid": 2}}, "head is for kind=video"),
        ({"kind": "video", "contrastive": 1, "backbone": {"layers": 0}}, "nothing to fit with backbone.layers = 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        FitConfig(**settings)


def test_an_unfitted_image_reward_is_its_backbone_in_another_unit(tmp_path: Path) -> None:
    config = FitConfig(backbone={"layers": 1}, mean=0.5, deviation=0.1)
    made = begin(config)
    scorer = scorer_of(config, made, 1)
    fitted = {name for name, each in scorer.named_parameters() if each.requires_grad}
    assert fitted == {f"backbone.clip.{name}" for name in ("logit_scale", "visual.proj", "text_projection")}
    save_fitted(tmp_path, spec_of(config, made, ["quality"], [2.0], [4.0]), scorer, made.structure, made.tokenizer)
    found, builtin = load_reward("fitted", path=str(tmp_path)), load_reward("builtin")
    expected = 0.5 + 0.1 * (builtin(frames(), PROMPTS) * float(scorer.backbone.scale.detach()) - 2) / 4
    torch.testing.assert_close(found(frames(), PROMPTS), expected, atol=1e-5, rtol=1e-4)


def test_a_video_reward_of_a_published_folder_is_saved_and_scores(tmp_path: Path) -> None:
    save_tiny_clip(tmp_path / "clip")
    settings = {"name": "clip", "path": str(tmp_path / "clip"), "layers": 0}
    config = FitConfig(kind="video", frames=3, backbone=settings, head={"grid": 2, "width": 16, "heads": 2})
    check_backbone(config.backbone)
    made = begin(config)
    scorer = scorer_of(config, made, 2)
    assert not any(each.requires_grad for each in made.clip.parameters())
    again = scorer_of(config, begin(config), 2)
    assert all(torch.equal(a, b) for a, b in zip(scorer.parameters(), again.parameters(), strict=True)), "of the seed"
    (tmp_path / "mine").mkdir()
    spec = spec_of(config, made, ["quality", "motion"], [0.0, 1.0], [1.0, 2.0])
    save_fitted(tmp_path / "mine", spec, scorer, made.structure, made.tokenizer)
    raw_BA = scorer(frames(), made.tokenise(PROMPTS))
    expected_B = (raw_BA[:, 0] + (raw_BA[:, 1] - 1) / 2) / 2
    torch.testing.assert_close(load_reward("fitted", path=str(tmp_path / "mine"))(frames(), PROMPTS), expected_B)


def test_untrained_weights_come_from_the_seed() -> None:
    one, same, other = (begin(FitConfig(backbone={"path": "random"}, seed=seed)).clip.visual.proj for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_backbone_that_is_not_there_is_refused(tmp_path: Path) -> None:
    config = FitConfig(backbone={"name": "clip", "path": str(tmp_path / "gone")})
    with pytest.raises(ValueError, match=r"backbone\.path = .*gone.*: no such file or folder"):
        check_backbone(config.backbone)


@pytest.mark.parametrize(
    ("tower", "settings"),
    [
        ("vision_config", {"num_attention_heads": 0}),
        ("vision_config", {"hidden_size": "x"}),
        ("vision_config", {"patch_size": 0}),
        ("text_config", {"num_attention_heads": 7}),
        ("text_config", None),
        ("text_config", 5),
    ],
)
def test_damaged_settings_of_a_backbone_are_told_in_one_line(
    tmp_path: Path, tower: str, settings: dict[str, Any] | int | None
) -> None:
    save_tiny_clip(tmp_path)
    file = tmp_path / "config.json"
    whole = json.loads(file.read_text())
    whole[tower] = whole[tower] | settings if isinstance(settings, dict) else settings
    file.write_text(json.dumps(whole))
    config = FitConfig(backbone={"name": "clip", "path": str(tmp_path)})
    with pytest.raises(ValueError, match=r"backbone\.path = .*(config\.json is damaged|not the weights)") as error:
        check_backbone(config.backbone)
    assert "\n" not in str(error.value)


def test_sizes_that_settings_leave_out_are_those_of_open_clip(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"embed_dim": 8, "vision_cfg": {"image_size": [32, 32]}, "text_cfg": {}}})
    )
    made = structure("clip", tmp_path, "here")
    assert (made["vision_cfg"]["layers"], made["text_cfg"]["layers"], made["text_cfg"]["context_length"]) == (
        12,
        12,
        77,
    )
    config = FitConfig(backbone={"name": "clip", "path": str(tmp_path)})
    assert preprocess_for(config.backbone).size == 32


def test_half_precision_files_are_fitted_in_float32(tmp_path: Path) -> None:
    save_tiny_clip(tmp_path / "clip")
    file = tmp_path / "clip" / "model.safetensors"
    save_file({name: each.half() for name, each in load_file(file).items()}, file, metadata={"format": "pt"})
    made = begin(FitConfig(backbone={"name": "clip", "path": str(tmp_path / "clip")}))
    assert {each.dtype for each in made.clip.parameters()} == {torch.float32}


def test_the_input_of_a_backbone_is_known_without_its_weights(tmp_path: Path) -> None:
    save_tiny_clip(tmp_path / "clip")
    for settings in ({}, {"name": "builtin-heldout"}, {"name": "clip", "path": str(tmp_path / "clip")}):
        config = FitConfig(backbone=settings)
        assert preprocess_for(config.backbone) == begin(config).preprocess
