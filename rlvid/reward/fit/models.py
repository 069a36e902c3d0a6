"""Models of fitted rewards: a CLIP that scores images, and a small transformer over its features that scores videos."""

import math

import torch
from open_clip.model import CLIP
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn

from rlvid.reward.clip import at_least_float32, in_chunks
from rlvid.reward.preprocess import Preprocess, normalise

LARGEST_SCALE = 100.0
"""Of cosines; a fit keeps it, as CLIP's training does."""
_LEAST_ENERGY = 1e-4
"""Is added to a channel's energy, so that stillness has a logarithm."""


class Backbone(nn.Module):
    """Features of a CLIP, with a gradient in its weights and in pixels.

    Args:
        clip: an open_clip model; its parameters that require a gradient are fitted.
        preprocess: the policy that makes frames the model's input.
        grid: patches of a frame are averaged to ``grid`` x ``grid``; 0 for none.
        chunk: most images in one pass of the model.
        recompute: whether activations are computed again in the backward pass.
        scale: the factor of cosines, of a CLIP whose weights are of a coarser type; default: of its own weights.
    """

    fixed_scale: Tensor | None

    def __init__(
        self,
        clip: CLIP,
        preprocess: Preprocess,
        *,
        grid: int = 0,
        chunk: int = 64,
        recompute: bool = False,
        scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("fixed_scale", scale, persistent=False)
        self.clip, self.preprocess, self.grid, self.chunk, self.recompute = clip, preprocess, grid, chunk, recompute
        clip.visual.output_tokens = grid > 0

    @property
    def width(self) -> int:
        """See ``width_of``."""
        return width_of(self.clip, self.grid)

    @property
    def scale(self) -> Tensor:
        """The factor of cosines."""
        return at_least_float32(self.clip.logit_scale).exp() if self.fixed_scale is None else self.fixed_scale

    def text(self, tokens_BL: Tensor) -> Tensor:
        """Returns normalised text_BD, float32 or float64, from token ids."""
        return nn.functional.normalize(at_least_float32(self.clip.encode_text(tokens_BL)), dim=-1)

    def forward(self, frames_BFCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Returns normalised embeddings image_BFD of frames in [0, 1], and N numbers of their patches, patch_BFN."""
        return self.divide(self.look(frames_BFCHW))

    def look(self, frames_BFCHW: Tensor) -> Tensor:
        """Returns all that the image tower says of frames in [0, 1]: look_BFM, at least float32."""
        images = normalise(self.preprocess(frames_BFCHW.flatten(0, 1))).to(self.clip.logit_scale.dtype)
        flat = in_chunks(self._look, self.chunk, self.recompute, images)
        return at_least_float32(flat).unflatten(0, frames_BFCHW.shape[:2])

    def divide(self, look_BFM: Tensor) -> tuple[Tensor, Tensor]:
        """Returns image_BFD and patch_BFN, as ``forward``, of what ``look`` returned."""
        size = self.clip.visual.output_dim
        return nn.functional.normalize(look_BFM[..., :size], dim=-1), look_BFM[..., size:]

    def _look(self, images_NCHW: Tensor) -> Tensor:
        """Returns embeddings and averaged patches in one row an image."""
        if not self.grid:
            return self.clip.visual(images_NCHW)
        embedding_ND, patch_NPW = self.clip.visual(images_NCHW)
        square = patch_NPW.transpose(1, 2).unflatten(2, self.clip.visual.grid_size)
        coarse = nn.functional.adaptive_avg_pool2d(square, self.grid)
        return torch.cat([embedding_ND, coarse.flatten(2).transpose(1, 2).flatten(1)], 1)


def width_of(clip: CLIP, grid: int) -> int:
    """Returns how many numbers the head sees of a frame: its embedding, products with the prompt's, and patches."""
    return 2 * clip.visual.output_dim + grid**2 * patch_width(clip)


def patch_width(clip: CLIP) -> int:
    """Returns how many numbers the image tower says of a patch."""
    return int(clip.visual.ln_post.normalized_shape[0])


class ImageScorer(nn.Module):
    """Scores images against prompts by the scaled cosine of a CLIP: the one axis of an image reward."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, frames_BSCHW: Tensor, tokens_BL: Tensor) -> Tensor:
        """Returns scores (B, 1): the mean over S frames."""
        image_BSD, patch_BSN = self.backbone(frames_BSCHW)
        return self.score(image_BSD, patch_BSN, self.backbone.text(tokens_BL))

    def score(self, image_BSD: Tensor, patch_BSN: Tensor, text_BD: Tensor) -> Tensor:
        """Returns the same from the features of the backbone; patches play no part."""
        return self.backbone.scale * torch.einsum("bsd,bd->bs", image_BSD, text_BD).mean(1, keepdim=True)


class TemporalHead(nn.Module):
    """A transformer over the features of frames that scores videos of any length, an axis a head; 0 at first.

    Its tokens are a learned one for each axis, one of the prompt, and one of each frame, with the sinusoidal position
    of the frame's number (Vaswani et al. 2017, section 3.5). A convolution over three frames adds to a frame how it
    differs from its neighbours. ``MotionEnergy`` adds how much its patches change.

    Args:
        features: numbers of a frame N; patches are the last of them.
        text: numbers of a prompt's embedding D.
        axes: number of heads A.
        patch: numbers of a patch; 0 without patches.
        motion: channels whose energy is added; 0 without.
        width: of tokens; a multiple of 2 and of ``heads``.
        layers: of the transformer.
        heads: of its attention.
    """

    def __init__(
        self,
        features: int,
        text: int,
        axes: int,
        *,
        patch: int = 0,
        motion: int = 0,
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.motion = MotionEnergy(features - 2 * text, patch, motion, width) if motion else None
        self.frame, self.prompt = nn.Linear(features, width), nn.Linear(text, width)
        self.change = nn.Conv1d(width, width, 3, padding=1, padding_mode="replicate")
        self.mix = nn.Linear(width, width)
        self.axis = nn.Parameter(torch.randn(axes, width) * width**-0.5)
        self.blocks = nn.ModuleList(ResidualAttentionBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Parameter(torch.zeros(axes, width))

    def forward(self, frame_BFN: Tensor, text_BD: Tensor) -> Tensor:
        """Returns scores (B, A)."""
        frame_BFW = self.frame(frame_BFN.to(self.out))
        change_BFW = self.change(frame_BFW.transpose(1, 2)).transpose(1, 2)
        frame_BFW = frame_BFW + self.mix(nn.functional.gelu(change_BFW))
        if self.motion is not None:
            frame_BFW = frame_BFW + self.motion(frame_BFN.to(self.out))
        frame_BFW = frame_BFW + positions(*frame_BFW.shape[1:]).to(frame_BFW)
        axis_BAW = self.axis.expand(len(frame_BFW), -1, -1)
        token_BTW = torch.cat([axis_BAW, self.prompt(text_BD.to(self.out))[:, None], frame_BFW], 1)
        for block in self.blocks:
            token_BTW = block(token_BTW)
        return torch.einsum("baw,aw->ba", self.norm(token_BTW[:, : len(self.axis)]), self.out)


class MotionEnergy(nn.Module):
    """Makes a vector of each frame: how strongly its patches move, and how strongly their motion changes.

    The energy of a channel is the logarithm of the mean square, over the patches of a frame, of its first or second
    difference in time. Smooth motion has little of the second; a subject that trembles has much. A transformer over
    averaged patches hardly finds that by itself.

    Args:
        numbers: length of all patches of a frame; they are the last part of its features.
        patch: length of one patch.
        channels: number of linear maps of a patch whose energies are taken.
        width: length of the vector.
    """

    def __init__(self, numbers: int, patch: int, channels: int, width: int) -> None:
        super().__init__()
        self.numbers, self.patch = numbers, patch
        self.channel = nn.Linear(patch, channels)
        self.norm = nn.LayerNorm(2 * channels)
        self.say = nn.Sequential(nn.Linear(2 * channels, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, frame_BFN: Tensor) -> Tensor:
        """Returns (B, F, width); the first and the last frame have themselves as neighbours."""
        x_BFPC = self.channel(frame_BFN[..., -self.numbers :].unflatten(2, (-1, self.patch)))
        before, after = torch.cat([x_BFPC[:, :1], x_BFPC[:, :-1]], 1), torch.cat([x_BFPC[:, 1:], x_BFPC[:, -1:]], 1)
        change_2 = ((after - before) / 2, after - 2 * x_BFPC + before)
        energy_BFE = torch.cat([(each.square().mean(2) + _LEAST_ENERGY).log() for each in change_2], 2)
        said: Tensor = self.say(self.norm(energy_BFE))
        return said


class VideoScorer(nn.Module):
    """Scores whole videos: the mean of the frames' scaled cosines, as ``ImageScorer``, plus what a head says.

    The head sees the frames' embeddings, their products with the prompt's, whose sum is the cosine, and patches.
    Patches say where things are, which an embedding does not; their change over frames is motion. So a fit begins with
    the judgement of single frames, and learns what they do not show.
    """

    def __init__(self, backbone: Backbone, head: TemporalHead) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, frames_BFCHW: Tensor, tokens_BL: Tensor) -> Tensor:
        """Returns scores (B, A) of videos in [0, 1]."""
        image_BFD, patch_BFN = self.backbone(frames_BFCHW)
        return self.score(image_BFD, patch_BFN, self.backbone.text(tokens_BL))

    def score(self, image_BFD: Tensor, patch_BFN: Tensor, text_BD: Tensor) -> Tensor:
        """Returns the same from the features of the backbone."""
        product_BFD = image_BFD * text_BD[:, None]
        cosine_B1 = product_BFD.sum(2).mean(1, keepdim=True)
        return self.backbone.scale * cosine_B1 + self.head(torch.cat([image_BFD, product_BFD, patch_BFN], 2), text_BD)


def positions(count: int, width: int) -> Tensor:
    """Returns sinusoidal positions (count, width), float32: sines of width / 2 frequencies, then cosines."""
    frequency = torch.exp(torch.arange(width // 2) * (-math.log(10_000) / (width // 2)))
    angle = torch.arange(count)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)


def choose_layers(clip: CLIP, layers: int | None, image: bool = True) -> None:
    """Lets the last ``layers`` groups of the towers be fitted; None for all weights, 0 for none.

    A group is, from the end: the projection, the last block with its norm, then a block each.

    Args:
        clip: the model.
        layers: of each tower.
        image: whether the image tower is fitted, too.

    Raises:
        ValueError: a tower has fewer groups.
    """
    text = (clip.text_projection, clip.ln_final, clip.transformer.resblocks)
    towers = [(clip.visual.proj, clip.visual.ln_post, clip.visual.transformer.resblocks)] * image + [text]
    most = 1 + min(len(blocks) for _, _, blocks in towers)
    if layers is not None and not 0 <= layers <= most:
        raise ValueError(f"layers = {layers}: the smaller tower has {most} groups of layers; allowed: 0 to {most}")
    clip.requires_grad_(layers is None)
    if not image:
        clip.visual.requires_grad_(False)
    if layers:
        clip.logit_scale.requires_grad_(True)
        for projection, norm, blocks in towers:
            projection.requires_grad_(True)
            for each in (norm, *blocks[len(blocks) - layers + 1 :]) if layers > 1 else ():
                each.requires_grad_(True)
