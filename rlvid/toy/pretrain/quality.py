"""What the finished model is worth, by the oracle: the figures of the weights' card."""

from pathlib import Path

import torch

from rlvid import randomness
from rlvid.diffusion.chain import denoise
from rlvid.diffusion.schedule import timesteps
from rlvid.models.unet3d import load_model
from rlvid.toy.captions import PROMPT_SETS, prompt_set
from rlvid.toy.oracle import grade


@torch.no_grad()
def quality_of_model(weights: Path, videos: int = 256, batch: int = 32) -> dict[str, float]:
    """Oracle accuracy of generated videos (D = 20, g = 3), for each prompt set; at most 240 prompts are distinct each."""
    model = load_model(str(weights / "model"), frames=8)
    every = torch.arange(model.frames)[None]
    figures: dict[str, float] = {}
    for name in PROMPT_SETS:
        prompts = prompt_set(name, videos if name == "in_domain" else 96)
        grades = []
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            noise = randomness.normal(model.latent_shape, 0, "generate", [(start + i,) for i in range(len(part))])
            latents = denoise(model, noise, model.encode_prompts(part), timesteps(20), guidance=3.0)
            frames = model.decode_frames(latents, every.expand(len(part), -1)).clamp(0, 1)
            grades.append(grade(frames, part))
        for key in grades[0]:
            figures[f"{name} {key}"] = torch.cat([g[key] for g in grades]).float().mean().item()
    return figures
