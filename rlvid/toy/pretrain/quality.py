"""Measures the finished model by the oracle: the figures of the weights' card."""

from pathlib import Path

import torch

from rlvid import randomness
from rlvid.diffusion.chain import denoise
from rlvid.models.base import VideoModel
from rlvid.world.captions import PROMPT_SETS, prompt_set
from rlvid.world.grade import grade


@torch.no_grad()
def quality_of_model(model: VideoModel, videos: int, others: int) -> dict[str, float]:
    """Oracle accuracy of generated videos (D = 20, g = 3): ``videos`` in domain, ``others`` of each other set."""
    every = torch.arange(model.frames)[None]
    figures: dict[str, float] = {}
    for name in PROMPT_SETS:
        prompts = prompt_set(name, videos if name == "in_domain" else others)
        grades = []
        for start in range(0, len(prompts), 16):
            part = prompts[start : start + 16]
            noise = randomness.normal(model.latent_shape, 0, "generate", [(start + i,) for i in range(len(part))])
            latents = denoise(model, noise, model.encode_prompts(part), model.path.grid(20), guidance=3.0)
            frames = model.decode_frames(latents, every.expand(len(part), -1)).clamp(0, 1)
            grades.append(grade(frames, part))
        for key in grades[0]:
            figures[f"{name} {key}"] = torch.cat([g[key] for g in grades]).float().mean().item()
    return figures


def write_card(weights: Path, figures: dict[str, dict[str, float]], seed: int) -> None:
    """Writes ``README.md`` beside the weights: what they are, how they were made, and what they are worth."""

    def table(values: dict[str, float]) -> str:
        rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in values.items())
        return f"| measure | value |\n|---|---|\n{rows}\n"

    sections = "\n".join(f"### {name}\n\n{table(values)}" for name, values in figures.items())
    (weights / "README.md").write_text(
        f"""# Weights of the built-in world

Trained from scratch on clips that `rlvid/world/render.py` draws: no outside data, no outside weights. Coloured shapes
and patterns on plain backgrounds, 8 or 9 frames of 32 x 32, captions in English. To rebuild them:

    python -m rlvid.toy.pretrain --seed {seed} --out FOLDER

The first model takes about two hours on two CPU cores that do nothing else, the rewards longer.
Another number of threads or another machine gives other bits. Stored as safetensors: models in float32, rewards in
float16. Licence: Apache-2.0.

* `model/`: diffusers' layout. An autoencoder (0.8 M parameters, latents 8 x 8 x 4), a CLIP text encoder, and a
  `UNet3DConditionModel` of 1.9 M parameters trained on clips of which half are blurred, noisy, washed out or
  flickering, and in its last 400 steps nearly all of low quality, most of them washed out.
* `wan/`: diffusers' layout, of Wan2.1's classes: a causal autoencoder, a UMT5 text encoder and a transformer that is
  trained by flow matching, 1.6 M parameters in all, for 9 frames of 32 x 32. Half of its clips were washed out or
  blurred.
* The other folders are rewards, as `rlvid reward fit` writes them. Each begins with a CLIP that was trained on single
  frames and their captions alone, and is fitted to votes of the oracle (`python -m rlvid.fitting.votes`): on pairs of
  rendered clips, and on videos of the model and of models that were fine-tuned on rewards, some of them at too high a
  learning rate.
  * `frames/`: scores single frames, to train on.
  * `video/`: scores whole videos, to train on. Its image tower is that of `frames/`.
  * `heldout-frames/`, `heldout-video/`: the same from another CLIP, other clips and other votes, among them votes on
    models that were fine-tuned on the two above. To judge with; never trained on.
  * `unvoted/`: scores single frames, and was fitted to captions alone, without votes. To judge with.

They are for trying, testing and teaching: the model knows this world and nothing else.

## Figures

Rewards on votes about prompts that they were not fitted on, in all and by kind of pair; votes err in 8 % of the pairs.
The models by the oracle (`rlvid/world/oracle.py`), D = 20, g = 3, on 256 prompts in domain and 96 of each other set.
Means of 0 / 1 hits for subject, colour, background and motion.

{sections}""",
        encoding="utf-8",
    )
