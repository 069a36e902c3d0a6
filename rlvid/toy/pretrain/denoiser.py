"""Stage 2: the text-to-video model itself, on clips of varied quality: ``UNet3DConditionModel`` and its text encoder.

First on single frames, then on three of a clip's, then on whole clips, as ModelScopeT2V came from an image model: what
a caption says of colours and shapes, and then of motion, is learned from many times more captions for the same work.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet3DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedModel

from rlvid.diffusion.chain import offset_noise
from rlvid.toy.pretrain.common import draw_footage, fit, half
from rlvid.toy.pretrain.text import CONTEXT_LENGTH, build_text_encoder
from rlvid.world.captions import write_captions
from rlvid.world.render import SUBJECTS, sample_clips

OFFSET_NOISE = 0.2
"""Strength of noise that is constant over a clip (per channel), added in training.

The mean of a clip shows through even at the last timestep, for it averages the noise of 512 places. A model that has
learned to read the background there, and not from the caption, paints gray at sampling, which starts from pure noise.
With this noise the mean tells nothing.
"""


@dataclass(frozen=True)
class Phase:
    """So many steps on batches of clips of ``frames`` frames: a random one, or some from the first to the last.

    ``hidden`` is how many clips that do not show at all are added to each that does, at the last 150 timesteps. Even
    there a clip's layout shows through its noise, and with it which way the subject moves; a model that reads it there
    follows, at sampling, whatever pure noise happens to look like. Hidden clips have pure noise for input, and for
    target the noise that would lead to them, so that the caption alone must say what to paint.

    Two frames are not enough: bfloat16 convolutions over two give NaN gradients on CPUs (torch 2.14).
    """

    frames: int
    batch: int
    steps: int
    hidden: float
    peak: float
    """Learning rate after warm-up."""
    degraded: float | Mapping[str, float] = 0.5
    """Share of degraded clips, of all kinds or of each; in the last phase it is the room for reward fine-tuning."""


def build_denoiser() -> UNet3DConditionModel:
    """Builds the denoiser: two levels of 32 and 64 channels, attention in both, 1.9 M parameters, no dropout."""
    denoiser = UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock3D",) * 2,
        up_block_types=("CrossAttnUpBlock3D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=64,
        attention_head_dim=8,
    )
    for module in denoiser.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    denoiser.set_attn_processor(AttnProcessor())  # a third faster than the fused kernel on sequences this short
    return denoiser


def build_scheduler() -> DDIMScheduler:
    """ModelScopeT2V's schedule: betas from 0.00085 to 0.012, linear in their square roots, 1,000 steps."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@torch.no_grad()
def encode_bank(
    vae: AutoencoderKL, count: int, degraded: float | Mapping[str, float], generator: torch.Generator
) -> tuple[Tensor, list[str]]:
    """Encodes N drawn clips, some degraded: latents (N, C, F, h, w), scaled to unit variance, and captions."""
    latents, captions = [], []
    for _ in range(count // 64):
        footage = draw_footage(64, generator, degraded)
        frames = footage.frames_BFCHW.flatten(0, 1).to(vae.device) * 2 - 1
        with half(vae.device):
            z = vae.encode(frames).latent_dist.mean * vae.config.scaling_factor
        latents.append(z.float().unflatten(0, (64, -1)).transpose(1, 2).contiguous())
        captions += footage.captions
    return torch.cat(latents), captions


def fit_text_encoder(
    encoder: PreTrainedModel, states_of: Callable[[list[str]], Tensor], generator: torch.Generator, steps: int
) -> None:
    """Teaches the encoder to keep a caption's four labels readable, linearly, in the mean of its states.

    Cross-attention starts as a plain mean, so the denoiser hears what a caption says from its first step on.

    Args:
        encoder: of any class.
        states_of: returns the encoder's states (B, L, D) of captions, with a gradient.
        generator: of the captions.
        steps: of 128 captions.
    """
    heads = nn.ModuleList(nn.Linear(encoder.config.hidden_size, n) for n in (len(SUBJECTS), 8, 5, 6)).to(encoder.device)

    def loss_of_step(step: int) -> Tensor:
        clips = sample_clips(128, generator)
        states = states_of(write_captions(clips, generator)).mean(1)
        labels = (clips.subject_B, clips.colour_B, clips.background_B, clips.motion_B)
        return torch.stack(
            [nn.functional.cross_entropy(h(states), y.to(states.device)) for h, y in zip(heads, labels, strict=True)]
        ).mean()

    fit([encoder, heads], loss_of_step, steps=steps, peak=2e-3, decay=0.99, name="text encoder")


def tokens_of(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Returns token ids (B, 24) of captions."""
    return tokenizer(
        captions, padding="max_length", truncation=True, max_length=CONTEXT_LENGTH, return_tensors="pt"
    ).input_ids


def fit_denoiser(
    seed: int,
    phases: list[Phase],
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    bank: int = 12288,
    text_steps: int = 400,
) -> tuple[UNet3DConditionModel, CLIPTextModel]:
    """Trains the text encoder on labels and freezes it, then trains the denoiser on the noise prediction.

    Trained together, the encoder forgets the words for motion before the denoiser has any use for them.
    Phases draw from a ``bank`` of so many encoded clips; in each, the learning rate warms up and decays again.
    """
    torch.manual_seed(seed)
    encoder = build_text_encoder(tokenizer).to(vae.device).train()

    def states_of(captions: list[str]) -> Tensor:
        return encoder(tokens_of(tokenizer, captions).to(encoder.device)).last_hidden_state

    fit_text_encoder(encoder, states_of, torch.Generator().manual_seed(seed), steps=text_steps)
    encoder.eval().requires_grad_(False)
    denoiser = build_denoiser().to(vae.device).train()
    generator = torch.Generator().manual_seed(seed + 1)
    share, empty = None, tokens_of(tokenizer, [""])
    for phase in phases:
        if phase.degraded != share:
            share = phase.degraded
            latents_N, captions = encode_bank(vae, bank, share, generator)
            tokens_N = tokens_of(tokenizer, captions)
        fit_phase(denoiser, encoder, phase, latents_N, tokens_N, empty, generator)
    return denoiser.eval().requires_grad_(False), encoder


def fit_phase(
    denoiser: UNet3DConditionModel,
    encoder: CLIPTextModel,
    phase: Phase,
    latents_N: Tensor,
    tokens_N: Tensor,
    empty: Tensor,
    generator: torch.Generator,
) -> None:
    """Trains one phase on noise prediction; one caption in ten is ``empty``, the tokens of no words."""
    device, batch = denoiser.device, phase.batch
    abar = build_scheduler().alphas_cumprod.to(device)

    def loss_of_step(step: int) -> Tensor:
        rows = torch.randint(len(latents_N), (batch,), generator=generator)
        drop = torch.rand(batch, 1, generator=generator) < 0.1
        tokens = torch.where(drop, empty, tokens_N[rows]).to(device)
        # Stratified over the batch: the same distribution of timesteps with a steadier loss.
        strata = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch * (1 + phase.hidden)
        hidden_B = strata >= 1
        strata = torch.where(hidden_B, 0.85 + 0.15 * (strata - 1) / phase.hidden, strata)
        timestep_B = (strata * 1000).long().clamp_max(999).to(device)
        hidden_B = hidden_B.to(device)[:, None, None, None, None]
        x0 = latents_N[rows]
        if phase.frames == 1:
            x0 = x0[torch.arange(batch), :, torch.randint(x0.shape[2], (batch,), generator=generator), None]
        else:
            x0 = x0[:, :, torch.linspace(0, x0.shape[2] - 1, phase.frames).round().long()]
        offset = torch.randn(*x0.shape[:2], 1, generator=generator)
        noise = offset_noise(torch.randn(x0.shape, generator=generator), offset, OFFSET_NOISE).to(device)
        abar_B = abar[timestep_B][:, None, None, None, None]
        signal = abar_B.sqrt() * x0.to(device)
        noisy = torch.where(hidden_B, noise, signal + (1 - abar_B).sqrt() * noise)
        noise = torch.where(hidden_B, (noise - signal) / (1 - abar_B).sqrt(), noise)
        with torch.no_grad():
            text = encoder(tokens).last_hidden_state
        with half(device):
            predicted = denoiser(noisy, timestep_B, encoder_hidden_states=text).sample
        weight_B = weights_of_timesteps(abar[timestep_B])
        return (weight_B * (predicted.float() - noise).square().flatten(1).mean(1)).sum() / weight_B.sum()

    fit([denoiser], loss_of_step, steps=phase.steps, peak=phase.peak, name=f"denoiser, {phase.frames} frames")


def weights_of_timesteps(abar_B: Tensor) -> Tensor:
    """min(SNR, 5) / SNR (Hang et al. 2023), which spends little on the last traces of noise, times min(SNR, 1)^-0.3.

    The second factor is for the first steps of sampling, where an error of the noise is many times larger in the clip.
    """
    snr_B = abar_B / (1 - abar_B)
    return snr_B.clamp_max(5.0) / snr_B * snr_B.clamp_max(1.0) ** -0.3
