"""A run's networks on the meta device, and what a row of each costs."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP
from torch import Tensor, nn
from torch.nn import functional as F

from rlvid.config import RunConfig
from rlvid.config.model import BUILT_IN
from rlvid.config.reward import RewardConfig
from rlvid.models.folders import WAN, family, structure_folder
from rlvid.models.lora import inject_lora
from rlvid.models.recompute import prepare, recomputing
from rlvid.models.unet3d import DTYPES, LAYERS
from rlvid.models.untrained import outline
from rlvid.models.video_shape import VideoShape, resolved_shape
from rlvid.plan.measure import FREE, Cost, measure
from rlvid.plan.network import NONE, Network, network_of
from rlvid.reward.builtin import BUILTIN, builtin_folder
from rlvid.reward.imagereward import LENGTH, VISION, build_blip, configs
from rlvid.reward.load import scores_whole_videos
from rlvid.reward.published import STRUCTURES, outline_clip
from rlvid.reward.video import plan_frames


@dataclass(frozen=True)
class Parts:
    """A run's networks, and the shapes that they work on: latents (C, F, h, w), text (L, D), frames, pixels.

    ``text_resident`` says whether the text encoder stays beside training; else prompts are embedded before it.
    ``judges`` are the guard's further rewards.
    """

    denoiser: Network
    autoencoder: Network
    text_encoder: Network
    reward: Network
    held_out: Network
    adapted_layers: int
    latent_shape: tuple[int, int, int, int]
    text_shape: tuple[int, int]
    frames: int
    height: int
    width: int
    text_resident: bool = True
    judges: tuple[Network, ...] = ()

    @property
    def causal(self) -> bool:
        """Whether the decoder goes through a video chunk by chunk; else it decodes each frame by itself."""
        return self.autoencoder.decode is not None

    @property
    def pixels(self) -> int:
        """Pixels of a frame."""
        return self.height * self.width


def outline_parts(config: RunConfig) -> Parts:
    """Builds and measures what ``config`` asks for; no weights are read.

    Raises:
        ValueError: the model's configuration is missing, its size does not fit, or no layer has a target's name.
    """
    spec, gradient = config.model, config.method.needs_gradient
    shape = resolved_shape(spec)
    if family(spec.path) is WAN:
        parts = _wan(config, shape)
    else:
        parts = _model(
            structure_folder(spec.path), spec.precision, shape,
            (spec.lora.rank, tuple(spec.lora.targets)) if spec.finetune == "lora" else None,
        )  # fmt: skip
        if not gradient:
            parts = replace(parts, autoencoder=replace(parts.autoencoder, cost=parts.autoencoder.cost.forward))
    return replace(
        parts,
        reward=_reward(config.reward.parts, config.reward, shape, gradient),
        held_out=_reward([(config.reward.held_out, config.reward.held_out_path)], config.reward, shape, False),
        judges=tuple(_reward([judge], config.reward, shape, False) for judge in _judges(config)),
    )


def _judges(config: RunConfig) -> list[tuple[str, str | None]]:
    return [(each.name, each.path) for each in config.guard_rewards] if config.guard.every else []


def _wan(config: RunConfig, shape: VideoShape) -> Parts:
    from rlvid.plan import wan  # seconds of imports, for these models alone

    spec = config.model
    denoiser, adapted = wan.transformer(spec)
    latent_shape, text_shape = wan.shapes(spec)
    return Parts(
        denoiser=denoiser if spec.finetune == "lora" else replace(denoiser, weights=4 * denoiser.parameters),
        autoencoder=wan.autoencoder(
            spec,
            last_frames(config, shape.frames),
            backward=config.method.needs_gradient,
            recompute=config.train.checkpoint_activations,
        ),
        text_encoder=wan.text_encoder(spec.path, spec.precision, text_shape[0]),
        reward=NONE,
        held_out=NONE,
        adapted_layers=adapted,
        latent_shape=latent_shape,
        text_shape=text_shape,
        frames=shape.frames,
        height=shape.height,
        width=shape.width,
        text_resident=spec.path in BUILT_IN,  # a structure stands for the model that has its weights
    )


def last_frames(config: RunConfig, frames: int) -> tuple[int, ...]:
    """Returns the scored frames of a video that need the most of a causal decoder: the last one of each segment."""
    reward = config.reward
    if scores_whole_videos(reward):
        return tuple(range(frames))
    latest_1S = torch.full((1, reward.segments), 1 - torch.finfo(torch.float32).eps)
    chosen = plan_frames(latest_1S, frames, reward.attenuation, config.frame_weights, reward.skip_below)
    return tuple(chosen.frames_BS[0].tolist())


@lru_cache(maxsize=8)  # the full-size denoiser takes seconds, and plans are compared
def _model(folder: Path, precision: str, shape: VideoShape, lora: tuple[int, tuple[str, ...]] | None) -> Parts:
    """Returns the networks but for rewards, whatever the method: methods are compared, and the denoiser is the same."""
    unet, vae, encoder = (nn.Module.to(p, DTYPES[precision]).requires_grad_(False) for p in outline(folder))
    base = sum(p.numel() for p in unet.parameters())
    adapter = inject_lora(unet, lora[0], list(lora[1]), seed=0) if lora else []
    if not lora:
        unet.requires_grad_(True)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    latent_shape = (unet.config.in_channels, shape.frames, shape.height // factor, shape.width // factor)
    text_shape = (encoder.config.max_position_embeddings, encoder.config.hidden_size)
    cost = _denoise(unet, latent_shape, text_shape)
    prepare(unet, LAYERS)
    with recomputing(True):
        again = _denoise(unet, latent_shape, text_shape)
    denoiser = replace(network_of(unet, cost, base), cost_recomputed=again)
    return Parts(
        denoiser=denoiser if lora else replace(denoiser, weights=4 * base),  # trained weights are float32
        autoencoder=network_of(vae, _decode(vae, latent_shape[2:])),
        text_encoder=network_of(encoder, FREE),
        reward=NONE,
        held_out=NONE,
        adapted_layers=len(adapter) // 2,
        latent_shape=latent_shape,
        text_shape=text_shape,
        frames=shape.frames,
        height=shape.height,
        width=shape.width,
    )


def _denoise(unet: Any, latent_shape: tuple[int, ...], text_shape: tuple[int, int]) -> Cost:
    with torch.device("meta"):
        latents_BCFhw = torch.empty(1, *latent_shape, dtype=unet.dtype)
        text_BLD = torch.empty(1, *text_shape, dtype=unet.dtype)
        timestep_B = torch.empty(1, dtype=torch.int64)

    def run() -> Tensor:
        output: Tensor = unet(latents_BCFhw, timestep_B, encoder_hidden_states=text_BLD, return_dict=False)[0]
        return output

    return measure(unet, run, backward=True, known=(latents_BCFhw, text_BLD, timestep_B))


def _decode(vae: Any, sides: tuple[int, int]) -> Cost:
    latents_NChw = torch.empty(
        1, vae.config.latent_channels, *sides, dtype=vae.dtype, device="meta", requires_grad=True
    )
    return measure(vae, lambda: vae.decode(latents_NChw).sample, backward=True, known=(latents_NChw,))


def _reward(
    names: Sequence[tuple[str | None, str | None]], config: RewardConfig, shape: VideoShape, backward: bool
) -> Network:
    """Returns the networks of one reward, or of all parts of a mixture: their sums, as all of them see every image."""
    measured = (_measured_judge(name, path, shape, config.precision, backward) for name, path in names)
    found = [network for network in measured if network != NONE]
    if not found:
        return NONE
    learned = [name not in BUILTIN for name, _ in names]
    costs = [astuple(network.cost) for network in found]
    return Network(
        parameters=sum(network.parameters for network in found),
        trainable=0,
        weights=sum(network.weights for network in found),
        cost=Cost(*(sum(values) for values in zip(*costs, strict=True))),
        chunk=config.chunk or (8 if any(learned) else 64),
        recompute=any(learned) if config.checkpoint_activations is None else config.checkpoint_activations,
    )


@lru_cache(maxsize=16)  # building one takes as long as measuring it, and plans are compared
def _measured_judge(name: str | None, path: str | None, shape: VideoShape, precision: str, backward: bool) -> Network:
    judge = _judge(name, path)
    if judge is None:
        return NONE
    images_NCHW = torch.empty(1, 3, shape.height, shape.width, requires_grad=backward, device="meta")
    judge.eval().requires_grad_(False).to(DTYPES[precision])
    run = partial(judge, images_NCHW)
    return network_of(judge, measure(judge, run, backward=backward, known=(images_NCHW,)))


def _judge(name: str | None, path: str | None) -> nn.Module | None:
    """Returns the network that a reward runs on each image, on the meta device; None for other rewards.

    The head of a fitted video reward is left out: it is small beside its CLIP.
    """
    with torch.device("meta"):
        if name == "imagereward":
            return _BlipJudge()
        if name in BUILTIN or name in STRUCTURES or name == "fitted":
            return _ClipJudge(_clip_outline(name, path))
    return None


def _clip_outline(name: str, path: str | None) -> CLIP:
    if name in BUILTIN:
        return outline_clip(name, builtin_folder(name), name)
    return outline_clip(name, Path(path).expanduser() if path else None, f"{path!r}")


class _ClipJudge(nn.Module):
    """An open_clip reward: what is computed for each image; text features are computed once for each prompt."""

    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        self.clip, size = clip, clip.visual.image_size
        self.size = size if isinstance(size, int) else size[0]

    def forward(self, images_NCHW: Tensor) -> Tensor:
        return self.clip.encode_image(_resize(images_NCHW, self.size).to(self.clip.logit_scale.dtype)).float()


class _BlipJudge(nn.Module):
    """ImageReward: ViT-L/16, BERT-base that looks at the image in every layer, and five linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.text, self.head = build_blip(*configs())

    def forward(self, images_NCHW: Tensor) -> Tensor:
        dtype = self.vision.dtype
        seen = self.vision(_resize(images_NCHW, VISION["image_size"]).to(dtype)).last_hidden_state
        tokens_NL = torch.zeros(len(images_NCHW), LENGTH, dtype=torch.int64, device=images_NCHW.device)
        # The padding's mask is left out: transformers would look at its values, and it only adds to the logits.
        read = self.text(tokens_NL, encoder_hidden_states=seen, is_decoder=False).last_hidden_state
        score: Tensor = self.head(read[:, 0])
        return score.float()


def _resize(images_NCHW: Tensor, size: int) -> Tensor:
    return F.interpolate(images_NCHW, (size, size), mode="bicubic", antialias=True, align_corners=False)
