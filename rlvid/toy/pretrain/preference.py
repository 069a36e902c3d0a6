"""Stage 2: the image reward, a small open_clip model: contrastive first, then on preference pairs as HPSv2 was."""

import math
from typing import Any

import torch
from diffusers import AutoencoderKL
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTokenizer

from rlvid.reward.preprocess import normalise
from rlvid.toy.pretrain.common import draw_footage, fit
from rlvid.toy.pretrain.text import CONTEXT_LENGTH
from rlvid.world.captions import write_captions
from rlvid.world.render import BACKGROUNDS, COLOURS, SUBJECTS, Clips, degrade, render, sample_clips, sample_degradation

LARGEST_SCALE = 20.0
"""Bound of the logit scale: a small one spreads the cosines of good and bad frames instead of saturating early."""

ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"layers": 3, "width": 64, "head_width": 16, "image_size": 32, "patch_size": 4},
    "text_cfg": {"context_length": CONTEXT_LENGTH, "width": 64, "heads": 4, "layers": 2},
}


def build_reward(vocabulary: int) -> CLIP:
    """Builds the reward: a ViT of three layers over 4 x 4 patches, a text transformer of two; 0.3 M parameters."""
    vision = CLIPVisionCfg(**ARCHITECTURE["vision_cfg"])
    text = CLIPTextCfg(vocab_size=vocabulary, **ARCHITECTURE["text_cfg"])
    return CLIP(embed_dim=ARCHITECTURE["embed_dim"], vision_cfg=vision, text_cfg=text)


def swap_one_label(clips: Clips, generator: torch.Generator) -> Clips:
    """Exchanges the subject, the colour or the background of clips, which the reward must distinguish."""
    count = len(clips)
    which_B = torch.randint(3, (count,), generator=generator)
    step_B = torch.randint(1, 5, (count,), generator=generator)
    return Clips(
        torch.where(which_B == 0, (clips.subject_B + step_B) % len(SUBJECTS), clips.subject_B),
        torch.where(which_B == 1, (clips.colour_B + step_B) % len(COLOURS), clips.colour_B),
        torch.where(which_B == 2, (clips.background_B + step_B) % len(BACKGROUNDS), clips.background_B),
        clips.motion_B.clamp_max(4), clips.x_B, clips.y_B, clips.radius_B, clips.phase_B,
    )  # fmt: skip


class PreferencePairs:
    """Draws frames as a text-to-video model would show them, with worse ones for the same caption beside them."""

    def __init__(self, vae: AutoencoderKL, tokenizer: CLIPTokenizer, generator: torch.Generator) -> None:
        self.vae, self.tokenizer, self.generator = vae, tokenizer, generator

    def tokens(self, captions: list[str]) -> Tensor:
        """Returns token ids (B, 24) of captions."""
        batch = self.tokenizer(
            captions, padding="max_length", truncation=True, max_length=CONTEXT_LENGTH, return_tensors="pt"
        )
        return batch["input_ids"].to(self.vae.device)

    def _frame(self, clips: Clips) -> Tensor:
        # One frame a clip: a random one of four, from the first to the last.
        frames_BFCHW = render(clips, frames=4)
        pick_B = torch.randint(4, (len(clips),), generator=self.generator)
        return frames_BFCHW[torch.arange(len(clips)), pick_B]

    def _spoil(self, frames_BCHW: Tensor) -> Tensor:
        kind_B, strength_B = sample_degradation(len(frames_BCHW), self.generator, share=1.0)
        return degrade(frames_BCHW[:, None], kind_B, strength_B, self.generator)[:, 0]

    @torch.no_grad()
    def _through_latents(self, frames_BCHW: Tensor, noise: float) -> Tensor:
        # Latent noise gives the smears and wrong outlines that an unsure denoiser leaves behind.
        latents = self.vae.encode(frames_BCHW.to(self.vae.device) * 2 - 1).latent_dist.mean
        scale = noise * torch.rand(len(latents), 1, 1, 1, generator=self.generator).to(latents)
        latents = latents + scale * torch.randn(latents.shape, generator=self.generator).to(latents) * latents.std()
        return (self.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draws tokens (B, 24) and frames_BCHW in [0, 1]: the preferred one, its degraded copy, another caption's."""
        clips = sample_clips(count, self.generator)
        other = swap_one_label(clips, self.generator)
        good, wrong = self._frame(clips), self._frame(other)
        bad, half = self._spoil(good), count // 2
        good = torch.cat([good[:half].to(self.vae.device), self._through_latents(good[half:], 0.0)])
        bad = torch.cat([bad[:half].to(self.vae.device), self._through_latents(bad[half:], 0.6)])
        wrong = torch.cat([wrong[:half].to(self.vae.device), self._through_latents(wrong[half:], 0.0)])
        return self.tokens(write_captions(clips, self.generator)), good, bad, wrong


def fit_reward(
    seed: int, contrastive_steps: int, preference_steps: int, vae: AutoencoderKL, tokenizer: CLIPTokenizer
) -> CLIP:
    """Trains one reward; different seeds see different clips from the first step on."""
    torch.manual_seed(seed)
    pairs = PreferencePairs(vae, tokenizer, torch.Generator().manual_seed(seed))
    model = build_reward(len(tokenizer)).to(vae.device).train()
    targets = torch.arange(128, device=vae.device)

    def embed(images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image = model.encode_image(normalise(images), normalize=True)
        text = model.encode_text(tokens, normalize=True)
        return image, text, model.logit_scale.exp().clamp(max=LARGEST_SCALE)

    def contrastive(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        logits = scale * image @ text.T
        return (F.cross_entropy(logits, targets[: len(image)]) + F.cross_entropy(logits.T, targets[: len(image)])) / 2

    def contrastive_step(step: int) -> Tensor:
        footage = draw_footage(128, pairs.generator)
        frame = int(torch.randint(8, (), generator=pairs.generator))
        frames = footage.frames_BFCHW[:, frame].to(vae.device)
        return contrastive(*embed(frames, pairs.tokens(footage.captions)))

    def preference_step(step: int) -> Tensor:
        tokens, good, bad, wrong = pairs.draw(64)
        image, text, scale = embed(torch.cat([good, bad, wrong]), tokens)
        good_B, bad_B, wrong_B = ((part * text).sum(1) for part in image.chunk(3))
        # HPSv2's objective: the preferred image of a pair wins the softmax over the two scores.
        pairwise = F.softplus(scale * (bad_B - good_B)) + F.softplus(scale * (wrong_B - good_B))
        return pairwise.mean() + 0.3 * contrastive(image[: len(good)], text, scale)

    with torch.no_grad():
        model.logit_scale.fill_(math.log(10.0))
    fit([model], contrastive_step, steps=contrastive_steps, peak=2e-3, name=f"reward {seed}, contrastive")
    fit([model], preference_step, steps=preference_steps, peak=1e-3, name=f"reward {seed}, preference")
    return model.eval().requires_grad_(False)


@torch.no_grad()
def preference_accuracy(model: CLIP, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> dict[str, float]:
    """Returns the share of held-out pairs where the clean frame, or the one that fits the caption, scores higher."""
    pairs = PreferencePairs(vae, tokenizer, torch.Generator().manual_seed(99))
    tokens, good, bad, wrong = pairs.draw(512)
    text = model.encode_text(tokens, normalize=True)
    good_B, bad_B, wrong_B = (
        (model.encode_image(normalise(x), normalize=True) * text).sum(1) for x in (good, bad, wrong)
    )
    return {
        "clean over degraded": (good_B > bad_B).float().mean().item(),
        "matching over mismatching": (good_B > wrong_B).float().mean().item(),
        "mean clean": good_B.mean().item(),
        "mean degraded": bad_B.mean().item(),
        "mean mismatching": wrong_B.mean().item(),
    }
