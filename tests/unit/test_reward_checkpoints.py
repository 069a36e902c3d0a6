"""Weights of others: what does not fit is named, what could run code is refused, versions are told apart."""

import contextlib
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig

from rlvid.config.reward import RewardConfig
from rlvid.models.weights import fill, headers, read_weights
from rlvid.reward import imagereward, published
from rlvid.reward.clip import ClipReward, build_clip
from rlvid.reward.huggingface import open_clip_config
from rlvid.reward.imagereward import build_blip, configs
from rlvid.reward.load import check_reward, load_reward
from rlvid.reward.published import md5

SMALL: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 14, "layers": 3, "width": 16, "head_width": 8, "patch_size": 7},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published structures in miniature: so small that files of them are quick."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small", SMALL)
    monkeypatch.setattr(published, "STRUCTURES", dict.fromkeys(published.STRUCTURES, "small"))
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"hidden_size": 8, "encoder_hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes = {"image_size": 32, "patch_size": 16}
    monkeypatch.setattr(imagereward, "VISION", imagereward.VISION | vision | sizes)
    monkeypatch.setattr(imagereward, "TEXT", imagereward.TEXT | text | {"num_attention_heads": 2})


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return build_clip(SMALL).state_dict()


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.getcwd, ()


# ---------------------------------------------------------------------------------------------------------- reading


def test_weights_are_read_from_every_form(tmp_path: Path) -> None:
    tensors = {"a": torch.rand(2), "b": torch.rand(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    torch.save(tensors, tmp_path / "plain.pt")
    torch.save({"state_dict": {f"module.{name}": each for name, each in tensors.items()}}, tmp_path / "wrapped.pt")
    (link := tmp_path / "link").symlink_to(".")
    for path in (tmp_path, link, tmp_path / "model.safetensors", tmp_path / "plain.pt", tmp_path / "wrapped.pt"):
        read = read_weights(path, "here")
        assert headers(path, "here").keys() == tensors.keys()
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    for place in (1, 2):
        save_file({f"part{place}": torch.rand(2)}, tmp_path / f"model-0000{place}-of-00002.safetensors")
    assert read_weights(tmp_path, "here").keys() == {"part1", "part2"}


def test_a_pickle_that_wants_code_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.rand(2)}, "optimizer": Code()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"here: evil.pt is a pickle .* \(posix.getcwd\); it is not") as error:
        read_weights(tmp_path / "evil.pt", "here")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.pt", b"not a checkpoint at all", "a.pt is no checkpoint of torch"),
        ("a.pt", b"", "a.pt is empty"),
        ("a.pt", b"PK\x03\x04 and then no more", "a.pt is damaged"),
        ("a.safetensors", b"short", "a.safetensors is damaged"),
        ("a.pt", b"version https://git-lfs.github.com/spec/v1\noid", "a.pt is a Git LFS pointer"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid", "a.safetensors is a Git LFS pointer"),
        ("a.pt", b"<!doctype html>\n<html>", "a.pt is a web page"),
        ("a.pt", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "a.pt is a web page"),
    ],
)
def test_damaged_files_are_told(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        read_weights(tmp_path / name, "here")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=words):
        headers(tmp_path / name, "here")


def test_archives_of_other_kinds_are_told(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "packed.pt", "w") as archive:
        archive.writestr("HPS_v2_compressed.pt", b"x")
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "program.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    torch.save({"a": torch.rand(2)}, tmp_path / "half.pt")
    data = (tmp_path / "half.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(data[: len(data) // 2])
    for name, words in (
        ("packed.pt", "is a zip archive of HPS_v2_compressed.pt; unpack it"),
        ("program.pt", "is a TorchScript program"),
        ("module.pt", "is a pickle that holds more than weights"),
        ("half.pt", "is damaged"),
    ):
        for read in (headers, read_weights):
            with pytest.raises(ValueError, match=f"here: {name} {words}"):
                read(tmp_path / name, "here")


def test_an_unfinished_download_is_told(tmp_path: Path) -> None:
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / ".cache" / "huggingface" / "abc.incomplete").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"there is an unfinished download, abc\.incomplete"):
        read_weights(tmp_path, "here")


def test_a_damaged_archive_is_always_one_error(tmp_path: Path) -> None:
    """Whatever bytes change: read as other numbers, or refused in one line."""
    torch.save({"state_dict": {"a": torch.rand(4), "b": torch.rand(2, 2)}}, tmp_path / "whole.pt")
    data, generator = (tmp_path / "whole.pt").read_bytes(), torch.Generator().manual_seed(0)
    for place in torch.randint(len(data), (60,), generator=generator).tolist():
        (tmp_path / "a.pt").write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        with contextlib.suppress(ValueError):
            read_weights(tmp_path / "a.pt", "here")


def test_what_holds_no_weights_is_told(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "epoch.pt")
    for name in ("list.pt", "epoch.pt"):
        with pytest.raises(ValueError, match=f"here: {name} holds no table of weights"):
            read_weights(tmp_path / name, "here")
    with pytest.raises(ValueError, match="here: the folder has no weights; looked for model"):
        read_weights(tmp_path, "here")


def test_keys_that_do_not_fit_are_named() -> None:
    module = nn.Sequential(*[nn.Linear(2, 2) for _ in range(3)])
    given = {"0.weight": torch.zeros(2, 3), "0.bias": torch.zeros(2), "x": torch.zeros(1), "y": torch.zeros(1)}
    with pytest.raises(ValueError, match="not the weights") as error:
        fill(module, given, "here")
    message = str(error.value)
    assert message.startswith("here: ")
    assert "4 keys missing (1.bias, 1.weight, 2.bias, ...)" in message
    assert "2 keys foreign (x, y)" in message
    assert "0.weight (2, 3) instead of (2, 2)" in message


# ------------------------------------------------------------------------------------------------- published models


@pytest.mark.usefixtures("small")
def test_a_bare_file_of_a_known_structure_is_enough(tmp_path: Path) -> None:
    torch.save({"state_dict": weights()}, tmp_path / "HPS_v2_compressed.pt")
    reward: Any = load_reward("hpsv2", path=str(tmp_path / "HPS_v2_compressed.pt"))
    frames = torch.rand(1, 2, 3, 20, 30)
    expected = ClipReward(build_clip(SMALL), reward.tokenise, reward.preprocess)
    expected.clip.load_state_dict(weights())
    assert torch.equal(reward(frames, ["a dog"]), expected(frames, ["a dog"]))
    assert (reward.preprocess.fit, reward.preprocess.size, reward.chunk, reward.recompute) == ("pad", 14, 8, True)


@pytest.mark.usefixtures("small")
def test_halves_are_read_into_the_chosen_precision(tmp_path: Path) -> None:
    torch.save({"state_dict": {name: each.half() for name, each in weights().items()}}, tmp_path / "mine.pt")
    frames = torch.rand(2, 2, 3, 14, 14)
    scores = {}
    for precision in ("float32", "bfloat16"):
        reward: Any = load_reward("hpsv2.1", path=str(tmp_path / "mine.pt"), precision=precision)
        assert {each.dtype for each in reward.parameters()} == {getattr(torch, precision)}
        scores[precision] = reward(frames, ["a dog", "a cat"])
        assert scores[precision].dtype == torch.float32
    assert not torch.equal(scores["float32"], scores["bfloat16"])
    torch.testing.assert_close(scores["float32"], scores["bfloat16"], atol=0.03, rtol=0)


@pytest.mark.usefixtures("small")
def test_a_checkpoint_of_another_model_is_told(tmp_path: Path) -> None:
    torch.save({"state_dict": weights() | {"score_head.weight": torch.zeros(1)}}, tmp_path / "mine.pt")
    with pytest.raises(ValueError, match=r"reward.path = .*mine.pt'.*1 keys foreign \(score_head.weight\)"):
        load_reward("hpsv2", path=str(tmp_path / "mine.pt"))


@pytest.mark.usefixtures("small")
def test_weights_that_cannot_be_the_rewards_are_told_before_their_numbers_are_read(tmp_path: Path) -> None:
    def told(name: str, path: Path) -> str:
        with pytest.raises(ValueError, match=r"reward.path = ") as error:
            check_reward(RewardConfig(name=name, path=str(path)), needs_gradient=True)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
        return str(error.value)

    torch.save(weights() | {"logit_scale": None, "x": torch.zeros(1)}, tmp_path / "none.pt")
    assert "holds no table of weights" in told("hpsv2", tmp_path / "none.pt")
    torch.save({k: v for k, v in weights().items() if k != "visual.proj"}, tmp_path / "less.pt")
    assert "1 keys missing (visual.proj)" in told("hpsv2.1", tmp_path / "less.pt")
    torch.save(weights() | {"visual.proj": torch.zeros(16, 8, dtype=torch.int8)}, tmp_path / "small.pt")
    assert "small.pt holds visual.proj as int8" in told("pickscore", tmp_path / "small.pt")
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "clip_text_model"}')
    save_file(weights(), folder / "model.safetensors")
    assert "config.json is of a model of type 'clip_text_model'; expected 'clip'" in told("pickscore", folder)
    (folder / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid")
    assert "config.json is a Git LFS pointer" in told("clip", folder)
    (folder / "config.json").unlink()
    own = {"model_cfg": SMALL | {"quick_gelu": True}}
    (folder / "open_clip_config.json").write_text(json.dumps(own))
    assert load_reward("clip", path=str(folder)).clip.visual.transformer.resblocks[0].mlp.gelu.__class__.__name__ == (
        "QuickGELU"
    )
    theirs = CLIPConfig(text_config={"hidden_act": "gelu"}, vision_config={"hidden_act": "gelu"})
    theirs.save_pretrained(folder)
    assert "name different activations" in told("clip", folder)
    rewards = {name: each.clone() for name, each in weights().items()}
    rewards["visual.proj"][0, 0] = torch.nan
    torch.save(rewards, tmp_path / "nan.pt")
    with pytest.raises(ValueError, match=r"1 weights are NaN or infinite \(visual.proj\)"):
        load_reward("hpsv2", path=str(tmp_path / "nan.pt"))
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "vocab.txt").write_text("[PAD]\n")
    torch.save(weights(), tmp_path / "image" / "ImageReward.pt")
    assert "not the weights of this model" in told("imagereward", tmp_path / "image")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("asked", "other"), [("hpsv2", "hpsv2.1"), ("hpsv2.1", "hpsv2")])
def test_the_other_version_of_hps_is_told_by_name_or_digest(
    asked: str, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = tmp_path / published.HPS_FILES[other][0]
    torch.save({"state_dict": weights()}, public)
    message = f"is the public file of {other}, not of {asked}; set the reward's name to {other}"
    with pytest.raises(ValueError, match=message):
        load_reward(asked, path=str(public))
    renamed = public.rename(tmp_path / "hps.pt")
    load_reward(asked, path=str(renamed))
    monkeypatch.setitem(published.HPS_FILES, other, (published.HPS_FILES[other][0], md5(renamed)))
    with pytest.raises(ValueError, match=message):
        load_reward(asked, path=str(renamed))
    load_reward(other, path=str(renamed))


@pytest.mark.usefixtures("small")
def test_what_a_path_lacks_is_told_before_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "file.pt").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text("{}")
    cases = [
        ("hpsv2", None, r"reward.path is not set, and the reward 'hpsv2' needs it: a local file or folder"),
        ("hpsv2", "gone.pt", r"reward.path = 'gone.pt': no such file or folder; docs/rewards.md says"),
        ("clip", "file.pt", r"is a file, which does not say the model's structure"),
        ("clip", "empty", r"neither config.json \(transformers\) nor open_clip_config.json"),
        ("aesthetic", "clip", r"the folder lacks LAION's head, sac\+logos"),
        ("imagereward", "empty", r"lacks ImageReward.pt and vocab.txt"),
        ("imagereward", "file.pt", r"lacks ImageReward.pt and vocab.txt"),
        ("custom", None, r"needs it: FILE.py:FUNCTION"),
    ]  # fmt: skip
    for name, path, words in cases:
        given = path if path is None or path == "gone.pt" else str(tmp_path / path)
        config = RewardConfig(name=name, path=given)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=words):
            check_reward(config, needs_gradient=True)
        held_out = RewardConfig(held_out=name, held_out_path=given)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=words.replace("reward.path", "reward.held_out_path")):
            check_reward(held_out, needs_gradient=True)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["hpsv2", "hpsv2.1", "pickscore", "clip", "aesthetic", "imagereward"])
def test_random_weights_of_the_full_structure_score_and_give_gradients(name: str) -> None:
    state = torch.get_rng_state()
    reward = load_reward(name, path="random")
    assert torch.equal(torch.get_rng_state(), state), "nobody else's random numbers are used up"
    frames = torch.rand(2, 3, 3, 40, 30, requires_grad=True)
    scores = reward(frames, ["a dog", "a red circle"])
    assert (scores.shape, scores.dtype) == ((2, 3), torch.float32)
    (gradient,) = torch.autograd.grad(scores.sum(), frames)
    assert gradient.isfinite().all()
    assert gradient.any()
    assert not any(each.requires_grad for each in reward.parameters())
    assert torch.equal(load_reward(name, path="random")(frames, ["a dog", "a red circle"]), scores)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["hpsv2", "aesthetic", "imagereward"])
def test_recomputed_chunks_give_the_same_gradients_and_keep_less(name: str) -> None:
    frames = torch.rand(2, 4, 3, 40, 30, requires_grad=True)
    found, kept = [], []
    for settings in ({"chunk": 8, "checkpoint_activations": False}, {"chunk": 3, "checkpoint_activations": True}):
        reward = load_reward(name, path="random", **settings)
        sizes: list[int] = []

        def keep(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            scores = reward(frames, ["a dog", "a red circle"])
        (gradient,) = torch.autograd.grad(scores.square().sum(), frames)
        found.append((scores.detach(), gradient))
        kept.append(sum(sizes))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-7, rtol=1e-4)
    assert kept[1] < kept[0] / 2


def test_the_full_structures_have_the_published_sizes() -> None:
    with torch.device("meta"):
        clips = {name: build_clip(open_clip.get_model_config(each)) for name, each in published.STRUCTURES.items()}
        blip = nn.ModuleList(build_blip(*configs()))
    count = {name: sum(each.numel() for each in model.parameters()) for name, model in clips.items()}
    assert count == {
        "hpsv2": 986_109_441, "hpsv2.1": 986_109_441, "pickscore": 986_109_441, "clip": 427_616_513,
        "aesthetic": 427_616_513,
    }  # fmt: skip
    unused = (1024 + 1) * 256 + (768 + 1) * 256  # the checkpoint's two projections
    assert sum(each.numel() for each in blip.parameters()) + unused == 446_665_953


@pytest.mark.parametrize(
    ("name", "path", "words"),
    [
        ("brightness", "x.pt", "reward.path = 'x.pt': the reward 'brightness' takes no path"),
        ("builtin-heldout", "x.pt", "'builtin-heldout' takes no path"),
        ("clip", "x.py:score", "'clip' takes a checkpoint"),
    ],
)
def test_a_path_that_is_not_for_the_reward_is_told(name: str, path: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_reward(name, path=path)


def test_another_class_of_open_clip_is_told(tmp_path: Path) -> None:
    config = SMALL | {"vision_cfg": SMALL["vision_cfg"] | {"timm_model_name": "vit_base_patch16_siglip_224"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    save_file(weights(), tmp_path / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match=r"open_clip_config.json is of another class than CLIP"):
        load_reward("clip", path=str(tmp_path))


def test_an_activation_that_open_clip_lacks_is_told(tmp_path: Path) -> None:
    config = CLIPConfig(text_config={"hidden_act": "relu"}, vision_config={"hidden_act": "gelu"})
    with pytest.raises(ValueError, match="activations 'gelu' and 'relu'; supported"):
        open_clip_config(config)
    assert json.loads(json.dumps(open_clip_config(CLIPConfig())))["quick_gelu"] is True
