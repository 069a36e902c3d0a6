"""rlvid's Wan model against diffusers' own pipeline, on the same weights and from the same noise."""

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from rlvid.diffusion.chain import denoise
from rlvid.models.noise_path import RectifiedFlow
from rlvid.models.wan import WanModel
from rlvid.toy.tiny_wan import tiny_wan, tiny_wan_pipeline

PROMPTS = ["a red circle moving left", "a dog", " <b>a</b>  blue\n square &amp;amp; , a dog "]


@pytest.fixture(scope="module", params=["2.1", "2.2"])
def model(request: pytest.FixtureRequest) -> WanModel:
    return tiny_wan(request.param)


class Euler(FlowMatchEulerDiscreteScheduler):
    """diffusers' scheduler on Wan's grid: its own one applies the shift twice."""

    def set_timesteps(self, steps: int, **options: Any) -> None:
        super().set_timesteps(sigmas=torch.linspace(1, 0, steps + 1)[:steps].tolist(), **options)


@pytest.mark.parametrize(("steps", "guidance", "shift"), [(4, 5.0, 3.0), (10, 5.0, 5.0), (4, 1.0, 3.0)])
def test_the_latents_are_those_of_diffusers(model: WanModel, steps: int, guidance: float, shift: float) -> None:
    pipe = tiny_wan_pipeline(model)
    pipe.scheduler = Euler(shift=shift)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(len(PROMPTS), *model.latent_shape)
    theirs = pipe(
        PROMPTS, height=model.height, width=model.width, num_frames=model.frames, num_inference_steps=steps,
        guidance_scale=guidance, latents=noise.clone(), max_sequence_length=16, output_type="latent",
    ).frames  # fmt: skip
    text = model.encode_prompts(PROMPTS)
    ours = denoise(model, noise, text, RectifiedFlow(shift).grid(steps), guidance=guidance)
    assert theirs.std() > 0.1
    assert (ours[0] - ours[1]).abs().max() > 1e-2, "the prompts make no difference"
    assert float((ours - theirs).abs().max()) <= 3e-6


def test_prompts_are_embedded_as_by_diffusers(model: WanModel) -> None:
    pipe = tiny_wan_pipeline(model)
    for length in (16, 5):
        assert model.text is not None
        model.text.length = length
        theirs, negative = pipe.encode_prompt(PROMPTS, max_sequence_length=length)
        ours = model.encode_prompts(PROMPTS)
        assert ours.shape == (3, length, 16)
        assert torch.equal(ours, theirs)
        assert torch.equal(model.encode_prompts([""]).expand_as(negative), negative)
    model.text.length = 16


def test_videos_are_encoded_and_decoded_as_by_diffusers(model: WanModel) -> None:
    frames = torch.rand(2, model.frames, 3, model.height, model.width)
    config = model.vae.config
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
    theirs = model.vae.encode(frames.transpose(1, 2) * 2 - 1).latent_dist
    ours = model.encode_frames(frames)
    assert ours.mean.shape == (2, *model.latent_shape)
    torch.testing.assert_close(ours.mean, (theirs.mode() - mean) * (1 / std), rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.std, theirs.std / std, rtol=1e-6, atol=0)
    pipe = tiny_wan_pipeline(model)
    pipe.scheduler = Euler(shift=3.0)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, *model.latent_shape)
    options = {"height": model.height, "width": model.width, "num_frames": model.frames, "num_inference_steps": 2}
    latents, pixels = (
        pipe("a dog", latents=noise.clone(), max_sequence_length=16, output_type=kind, **options).frames
        for kind in ("latent", "pt")
    )
    decoded = model.decode_frames(latents, torch.arange(model.frames)[None])
    torch.testing.assert_close(decoded.clamp(0, 1), pixels, rtol=0, atol=3e-6)  # it divides by 1 / std


def test_one_timestep_a_video_is_one_a_token(model: WanModel) -> None:
    """Wan2.2's pipeline gives each token its timestep; for text-to-video all of them are the same."""
    pipe = tiny_wan_pipeline(model)
    pipe.scheduler = Euler(shift=5.0)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, *model.latent_shape)
    options = {"height": model.height, "width": model.width, "num_frames": model.frames, "num_inference_steps": 3}
    results = []
    for expand in (False, True):
        pipe.register_to_config(expand_timesteps=expand)
        latents = noise.clone()
        results.append(pipe("a dog", latents=latents, max_sequence_length=16, output_type="latent", **options).frames)
    assert float((results[0] - results[1]).abs().max()) <= 3e-6
