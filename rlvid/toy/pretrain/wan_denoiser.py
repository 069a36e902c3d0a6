"""The text-to-video transformer of the model of Wan's classes: ``WanTransformer3DModel``, trained by flow matching.

=============  ==========================================================================
code           meaning
=============  ==========================================================================
``sigma_B``    s, the noise level of a clip: x_s = (1 - s) x0 + s eps
``velocity``   v = eps - x0, the network's target
``SHIFT``      of levels towards noise in sampling, as Wan's; training draws levels evenly
=============  ==========================================================================

First on the first latent frame alone, which is an image, then on whole clips. A shift in training would leave few draws
at the low levels, where an outline becomes sharp: these latents are small (Esser et al. 2024, section 5.3.2).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from torch import Tensor, nn

from rlvid import randomness
from rlvid.files import atomic_file
from rlvid.models.folders import WAN
from rlvid.models.noise_path import RectifiedFlow
from rlvid.models.stored import WAN_CLASSES
from rlvid.models.wan_text import UMT5Embedder
from rlvid.toy.pretrain.common import draw_footage, fit, log
from rlvid.toy.pretrain.wan_autoencoder import FRAMES, QUALITY
from rlvid.toy.pretrain.wan_text import TEXT_WIDTH

SHIFT = 3.0
_PART = 64  # clips that are encoded at once


@dataclass(frozen=True)
class TransformerPhase:
    """So many steps on batches of clips, of which the first ``frames`` latent frames are seen.

    ``hidden`` is how many clips that do not show at all are added to each that does: their level is 1, pure noise, from
    which sampling starts. There the caption alone says what to paint.
    """

    frames: int
    batch: int
    steps: int
    peak: float
    """Learning rate after warm-up."""
    hidden: float = 0.15


def transformer_phases(steps: Callable[[int], int]) -> list[TransformerPhase]:
    """Returns the plan: images, then clips."""
    return [
        TransformerPhase(frames=1, batch=64, steps=steps(3000), peak=1.5e-3),
        TransformerPhase(frames=3, batch=32, steps=steps(24000), peak=1.5e-3),
    ]


def build_wan_transformer() -> WanTransformer3DModel:
    """Builds the transformer: five layers of four heads of 24 channels, 0.85 M parameters; it begins with v = 0."""
    transformer = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=8,
        out_channels=8,
        text_dim=TEXT_WIDTH,
        freq_dim=128,
        ffn_dim=384,
        num_layers=5,
        rope_max_seq_len=32,
    )
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def build_wan_scheduler() -> UniPCMultistepScheduler:
    """Wan2.1's scheduler, with the shift of sampling."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=SHIFT
    )


@torch.no_grad()
def wan_bank(vae: AutoencoderKLWan, count: int, seed: int, file: Path | None = None) -> tuple[Tensor, list[str]]:
    """Encodes N drawn clips, a share of them degraded.

    Args:
        vae: frozen.
        count: N, rounded up to whole parts of 64.
        seed: of the clips.
        file: keeps the latents from one call to the next; None keeps nothing.

    Returns:
        normalised latents (N, C, f, h, w) on the CPU, and captions.
    """
    stored = torch.load(file, weights_only=True) if file is not None and file.is_file() else None
    mean_C, std_C = (torch.tensor(vae.config[name]) for name in ("latents_mean", "latents_std"))
    latents, captions, parts = [], [], -(-count // _PART)
    for part in range(parts):
        footage = draw_footage(_PART, randomness.generator(seed, "wan bank", part), QUALITY, FRAMES)
        captions += footage.captions
        if stored is None:
            pixels = footage.frames_BFCHW.transpose(1, 2).to(vae.device) * 2 - 1
            mean = vae.encode(pixels).latent_dist.mean.cpu()
            latents.append((mean - mean_C[:, None, None, None]) / std_C[:, None, None, None])
            if (part + 1) % 10 == 0 or part + 1 == parts:
                log.info("bank of clips %d/%d", (part + 1) * _PART, parts * _PART)
    found = torch.cat(latents) if stored is None else stored
    if file is not None and stored is None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as unfinished:
            torch.save(found, unfinished)
    return found, captions


@torch.no_grad()
def embed(text: UMT5Embedder, captions: list[str]) -> Tensor:
    """Returns text_NLD of captions, on the CPU."""
    return torch.cat([text.embed(captions[place : place + 512]).cpu() for place in range(0, len(captions), 512)])


def fit_wan_transformer(
    seed: int,
    phases: list[TransformerPhase],
    latents_NCfhw: Tensor,
    text_NLD: Tensor,
    empty_1LD: Tensor,
    device: torch.device,
    work: Path | None = None,
) -> WanTransformer3DModel:
    """Trains the transformer on the velocity; one caption in ten is ``empty_1LD``, the embedding of no words.

    Args:
        seed: of weights, rows, levels and noise.
        phases: in order.
        latents_NCfhw: normalised.
        text_NLD: embeddings of their captions.
        empty_1LD: embedding of the prompt that guidance leads away from.
        device: of the weights.
        work: folder of the states of unfinished phases; None keeps none.
    """
    torch.manual_seed(seed)
    transformer = build_wan_transformer().to(device).train()
    path = RectifiedFlow(1.0)
    for number, phase in enumerate(phases):

        def loss_of_step(step: int, number: int = number, phase: TransformerPhase = phase) -> Tensor:
            generator, batch = randomness.generator(seed, "wan denoiser", number, step), phase.batch
            rows = torch.randint(len(latents_NCfhw), (batch,), generator=generator)
            drop = torch.rand(batch, 1, 1, generator=generator) < 0.1
            text = torch.where(drop, empty_1LD, text_NLD[rows]).to(device)
            x0 = latents_NCfhw[rows, :, : phase.frames].to(device)
            noise = torch.randn(x0.shape, generator=generator).to(device)
            sigma_B = draw_levels(path, batch, phase.hidden, generator).to(device)
            level = path.level(sigma_B, x0)
            noisy = level.alpha * x0 + level.sigma * noise
            velocity = transformer(noisy, path.timestep(sigma_B, device), text, return_dict=False)[0]
            return (velocity - (noise - x0)).square().mean()

        fit(
            [transformer],
            loss_of_step,
            steps=phase.steps,
            peak=phase.peak,
            decay=0.998,
            name=f"wan denoiser, phase {number + 1}, {phase.frames} latent frames",
            state=work / f"wan-denoiser-{number + 1}.pt" if work else None,
        )
    return transformer.eval().requires_grad_(False)


def draw_levels(path: RectifiedFlow, batch: int, hidden: float, generator: torch.Generator) -> Tensor:
    """Returns levels (B,), float32: stratified over the batch, which steadies the loss; 1 for hidden clips."""
    strata = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch * (1 + hidden)
    return torch.where(strata >= 1, 1.0, path.draw(strata.clamp_max(1.0)))


def save_wan(transformer: WanTransformer3DModel, text: UMT5Embedder, folder: Path) -> None:
    """Writes all parts but the autoencoder in diffusers' layout; the transformer says that the stage is done."""
    text.tokenizer.save_pretrained(folder / "tokenizer")
    text.encoder.save_pretrained(folder / "text_encoder")
    build_wan_scheduler().save_pretrained(folder / "scheduler")
    classes = WAN_CLASSES | {"tokenizer": ["transformers", "PreTrainedTokenizerFast"], "transformer_2": [None, None]}
    index = {"_class_name": WAN.pipeline, "boundary_ratio": None, "expand_timesteps": False, **classes}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    transformer.save_pretrained(folder / "transformer")
