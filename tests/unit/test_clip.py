"""The CLIP that measures: whichever the user names, with the preprocessing it came with."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import to_pil_image

from rlvid.diffusion.generate import generate
from rlvid.evaluate.clip import load_clip
from rlvid.evaluate.metrics import clipsim, flickering, temporal_consistency
from rlvid.evaluate.score import VideoBatch, VideoScorer, evaluate_model
from rlvid.reward.clip import ClipReward
from rlvid.toy.tiny import save_tiny_clip, tiny_model, tiny_reward

PROMPTS = ["a red circle", "a dog"]


def test_the_built_in_models_are_named_too() -> None:
    clip = load_clip("builtin-heldout")
    assert isinstance(clip, ClipReward)


def test_features_have_length_one_and_the_chunk_does_not_matter(tmp_path: Path) -> None:
    save_tiny_clip(tmp_path)
    clip, frames = load_clip(str(tmp_path)), torch.rand(2, 3, 3, 20, 30)
    image, text = clip.image_features(frames), clip.text_features([*PROMPTS, "a dog " * 300])
    assert (image.shape, text.shape) == ((2, 3, 16), (3, 16))
    assert image.dtype == text.dtype == torch.float32
    for features in (image, text):
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(features.shape[:-1]))
    clip._chunk = 1
    torch.testing.assert_close(clip.image_features(frames), image, atol=1e-6, rtol=0)
    torch.testing.assert_close(clip.text_features(PROMPTS[:1]), text[:1], atol=1e-6, rtol=0)


def test_an_evaluation_measures_with_the_clip_that_was_named(tmp_path: Path) -> None:
    save_tiny_clip(tmp_path)
    clip, model = load_clip(str(tmp_path)), tiny_model()
    scorer = VideoScorer(tiny_reward(1), tiny_reward(2), clip, use_oracle=False)
    batch = VideoBatch("base", "own", 2, 0, tuple(PROMPTS), copies=1)
    rows = evaluate_model(model, [batch], scorer, seed=0, guidance=3.0, final="exact")
    frames = generate(model, PROMPTS, seed=0, steps=2)
    assert [r.clipsim for r in rows] == pytest.approx(clipsim(clip, frames, PROMPTS).tolist(), abs=1e-6)
    assert [r.flickering for r in rows] == pytest.approx(flickering(frames).tolist(), abs=1e-6)
    names = ("consecutive", "all_pairs", "vbench")
    for field, name in zip(("consistency", "consistency_all_pairs", "consistency_vbench"), names, strict=True):
        expected = temporal_consistency(clip, frames, name).tolist()
        assert [getattr(r, field) for r in rows] == pytest.approx(expected, abs=1e-6)
    assert abs(rows[0].clipsim - rows[0].held_out) > 1e-3


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small architecture in open_clip's register."""
    folder = tmp_path_factory.mktemp("open_clip")
    vision = {"layers": 1, "width": 16, "head_width": 8, "image_size": 16, "patch_size": 4}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (folder / "tiny-of-the-tests.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    return "tiny-of-the-tests"


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_checkpoint_of_open_clip_measures(tmp_path: Path, architecture: str, suffix: str) -> None:
    model, _, prepare = open_clip.create_model_and_transforms(architecture)
    model.eval()
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pt":
        torch.save({"state_dict": model.state_dict()}, path)
    else:
        save_file({n: t.contiguous() for n, t in model.state_dict().items()}, path)
    clip, frames = load_clip(f"{architecture}:{path}"), torch.rand(1, 2, 3, 20, 30)
    pixels = (frames[0] * 255).round().to(torch.uint8)
    with torch.no_grad():
        image = model.encode_image(torch.stack([prepare(to_pil_image(each)) for each in pixels]), normalize=True)
        text = model.encode_text(open_clip.get_tokenizer(architecture)(PROMPTS), normalize=True)
    torch.testing.assert_close(clip.image_features(frames)[0], image, atol=1e-6, rtol=0)
    torch.testing.assert_close(clip.text_features(PROMPTS), text, atol=1e-6, rtol=0)


def test_what_is_no_clip_is_told_in_one_line(tmp_path: Path, architecture: str) -> None:
    def message(name: str) -> str:
        with pytest.raises(ValueError, match=r".") as error:
            load_clip(name)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "to fetch it: hf download somebody/some-clip" in message("somebody/some-clip")
    assert "is no folder of a whole CLIP" in message(str(tmp_path / "nowhere"))
    save_tiny_clip(tmp_path / "half")
    weights = tmp_path / "half" / "model.safetensors"
    state = load_file(weights)
    del state["visual_projection.weight"]
    save_file(state, weights, metadata={"format": "pt"})
    assert "1 keys missing (visual_projection.weight)" in message(str(tmp_path / "half"))
    save_file(state | {"visual_projection.weight": torch.full((16, 16), torch.nan)}, weights)
    assert "1 weights are NaN or infinite (visual_projection.weight)" in message(str(tmp_path / "half"))
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0")
    assert "model.safetensors is a Git LFS pointer" in message(str(tmp_path / "half"))
    weights.unlink()
    assert "the folder has no weights" in message(str(tmp_path / "half"))
    (tmp_path / "half" / "preprocessor_config.json").write_text("<!DOCTYPE html>")
    assert "preprocessor_config.json is a web page" in message(str(tmp_path / "half"))
    (tmp_path / "half" / "preprocessor_config.json").write_text("{}")
    (tmp_path / "half" / "config.json").write_text('{"model_type": "siglip"}')
    assert "is a model of type 'siglip'; expected a CLIP" in message(str(tmp_path / "half"))
    assert "open_clip has no 'ViT-Z'" in message(f"ViT-Z:{weights}")
    assert "there is no file" in message(f"{architecture}:{tmp_path / 'nowhere.pt'}")
    torch.save({"state_dict": {"visual.proj": torch.zeros(3)}}, tmp_path / "other.pt")
    assert "other.pt" in message(f"{architecture}:{tmp_path / 'other.pt'}")
    torch.save({"state_dict": {}, "args": Path("x")}, tmp_path / "code.pt")
    assert "code.pt is a pickle that holds more than weights" in message(f"{architecture}:{tmp_path / 'code.pt'}")
    model = open_clip.create_model(architecture).state_dict()
    torch.save(model | {"visual.positional_embedding": torch.zeros(26, 16)}, tmp_path / "larger.pt")
    assert "visual.positional_embedding (26, 16) instead of" in message(f"{architecture}:{tmp_path / 'larger.pt'}")


def test_nobody_is_asked_whether_a_folders_code_may_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("input was asked for")

    monkeypatch.setattr("builtins.input", asked)
    save_tiny_clip(tmp_path)
    own = {"auto_map": {"AutoConfig": "own.Own", "AutoTokenizer": ["own.Own", None], "AutoImageProcessor": "own.Own"}}
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        file = tmp_path / name
        file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | own))
    (tmp_path / "own.py").write_text("raise SystemExit('code of the folder ran')")
    assert load_clip(str(tmp_path)).text_features(PROMPTS).shape == (2, 16)


def test_weights_of_the_other_activation_are_refused(tmp_path: Path, architecture: str) -> None:
    """OpenAI's fit ViT-B-32 by name and shape, and want ViT-B-32-quickgelu."""
    config = open_clip.get_model_config(architecture)
    (tmp_path / "register").mkdir()
    for name, quick in (("tiny-pair", False), ("tiny-pair-quickgelu", True)):
        (tmp_path / "register" / f"{name}.json").write_text(json.dumps(config | {"quick_gelu": quick}))
    open_clip.add_model_config(tmp_path / "register")
    weights = open_clip.create_model("tiny-pair").state_dict()
    numbers = {name: torch.tensor(16) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save({name: each.half() for name, each in weights.items()}, tmp_path / "halves.pt")
    torch.save({name: each.half().float() for name, each in weights.items()}, tmp_path / "rounded.pt")
    torch.save(weights | numbers, tmp_path / "openai.pt")
    torch.save(weights, tmp_path / "other.pt")
    for name in ("halves", "rounded", "openai"):
        path = tmp_path / f"{name}.pt"
        with pytest.raises(ValueError, match=rf"another activation .*; name it tiny-pair-quickgelu:.*{name}\.pt"):
            load_clip(f"tiny-pair:{path}")
        features = load_clip(f"tiny-pair-quickgelu:{path}").text_features(PROMPTS)
        assert features.dtype == torch.float32
    plain = load_clip(f"tiny-pair:{tmp_path / 'other.pt'}").text_features(PROMPTS)
    assert not torch.equal(plain, features)


def test_open_clips_own_names_of_files_tell_the_activation(tmp_path: Path) -> None:
    for name, asked, wanted in (
        ("vit_b_32-quickgelu-laion400m_e32-46683a32.pt", "ViT-B-32", "ViT-B-32-quickgelu"),
        ("vit_b_32-laion2b_e16-af8dbd0c.pth", "ViT-B-32-quickgelu", "ViT-B-32"),
    ):
        torch.save({"logit_scale": torch.tensor(0.1)}, tmp_path / name)
        with pytest.raises(ValueError, match=rf"another activation \(by its name\).*; name it {wanted}:"):
            load_clip(f"{asked}:{tmp_path / name}")
