"""rlvid's sampler against diffusers' own text-to-video pipeline, on the same weights and from the same noise."""

import pytest
import torch
from diffusers import TextToVideoSDPipeline
from helpers import scheduler
from torch import Tensor

from rlvid import randomness
from rlvid.diffusion.chain import denoise
from rlvid.diffusion.generate import generate
from rlvid.models.unet3d import UNet3DModel
from rlvid.toy.tiny import tiny_model

PROMPTS = ["a red circle moving left", "a dog", "eine Katze, 3 !!!"]


@pytest.fixture(scope="module")
def model() -> UNet3DModel:
    return tiny_model()


def pipeline(model: UNet3DModel, final: str, latents_BCFhw: Tensor, prompts: list[str], **options: object) -> Tensor:
    """What diffusers makes of the noise; prompts go through its own tokenisation and encoding."""
    parts = {"vae": model.vae, "text_encoder": model.text_encoder, "tokenizer": model.tokenizer}
    pipe = TextToVideoSDPipeline(**parts, unet=model.denoiser, scheduler=scheduler(final=final))
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompts, model.height, model.width, model.frames, latents=latents_BCFhw.clone(), return_dict=False, **options
    )[0]


@pytest.mark.parametrize(
    ("steps", "guidance", "final"),
    [
        (1, 9.0, "paper"),
        (5, 9.0, "paper"),
        (5, 9.0, "exact"),
        (5, 1.0, "paper"),
        (20, 9.0, "paper"),
        pytest.param(50, 9.0, "paper", marks=pytest.mark.slow),
    ],
)
def test_the_latents_are_those_of_diffusers(model: UNet3DModel, steps: int, guidance: float, final: str) -> None:
    latents = torch.randn(3, *model.latent_shape)
    theirs = pipeline(
        model, final, latents, PROMPTS, num_inference_steps=steps, guidance_scale=guidance, output_type="latent"
    )
    with torch.no_grad():
        text = model.encode_prompts(PROMPTS)
        ours = denoise(model, latents, text, model.path.grid(steps), guidance=guidance, final=final)
    assert theirs.std() > 0.1
    assert (ours[0] - ours[1]).abs().max() > 1e-2, "the prompts make no difference"
    assert float((ours - theirs).abs().max() / theirs.abs().max()) <= 1e-5


def test_the_videos_are_those_of_diffusers(model: UNet3DModel) -> None:
    """From the noise of ``generate`` to pixels, with the decoder's clamp."""
    positions = [(index,) for index in range(len(PROMPTS))]
    noise = randomness.normal(model.latent_shape, 3, "generate", positions)
    options = {"num_inference_steps": 5, "guidance_scale": 9.0, "output_type": "pt"}
    theirs = pipeline(model, "paper", noise, PROMPTS, **options)
    ours = generate(model, PROMPTS, seed=3, steps=5, guidance=9.0, final="paper")
    assert theirs.shape == ours.shape
    assert float(theirs.std()) > 0.01
    assert float((ours - theirs).abs().max()) <= 1e-5
