"""The same networks driven as InstructVideo's published code drives them, for comparison in one run.

That is ali-vilab/VGen on GitHub, as its training entrance (t2v_instructvideo), its DiffRewardModel, its DDIM and the
switches of its 20-step description say (chunk_size 1, decoder_bs 1, use_checkpoint and grad_checkpointing both on).

=====================  =====================================  ==================================================
stage                  published                              rlvid
=====================  =====================================  ==================================================
source clip, prompts   encoded in every step, frame by frame  encoded once, before the training
guidance               two calls of the denoiser              both branches in one call
gradient step          checkpointed whole, and its blocks     each layer checkpointed by itself
                       again inside
decoding               all F frames, one by one, in the       the S frames that the reward looks at
                       graph
reward's text tower    in every step                          once for each prompt
=====================  =====================================  ==================================================

Everything else is shared, down to the noise, so that both sides come to the same gradient: that is checked.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from diffusers import UNet3DConditionModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlvid.models.guidance import Guidance
from rlvid.models.noise_path import Point, Prediction
from rlvid.models.unet3d import UNet3DModel
from rlvid.reward.clip import ClipReward, at_least_float32


class ReleasedModel(UNet3DModel):
    """The model as released code drives it; ``decode_chunk=1`` makes it encode and decode frame by frame."""

    def encode_text(self, prompts: list[str]) -> Tensor:
        """Returns embeddings of prompts; the negative prompt's are made anew, too."""
        self.negative_1LD = self.encode_prompts([""])
        return self.encode_prompts(prompts)

    def predict(
        self,
        latents_BCFhw: Tensor,
        point: Point,
        text_BLD: Tensor,
        guidance: Guidance,
        *,
        unconditional_gradient: bool = True,
        recompute: bool = False,
    ) -> Prediction:
        """Predicts with one branch after the other; ``recompute`` checkpoints the whole network."""
        assert isinstance(guidance, float), "released code guides at all levels alike"
        if recompute and torch.is_grad_enabled():
            whole = partial(self.predict, point=point, text_BLD=text_BLD, guidance=guidance)
            return checkpoint(whole, latents_BCFhw, use_reentrant=False)
        cond = self.path.predicted(super().predict(latents_BCFhw, point, text_BLD, 1.0))
        negative_BLD = self.negative(text_BLD)
        uncond = self.path.predicted(super().predict(latents_BCFhw, point, negative_BLD, 1.0))
        output = uncond + guidance * (cond - uncond)
        latents_BCFhw = latents_BCFhw.to(output.dtype)
        return self.path.prediction(output, latents_BCFhw, self.path.level(point, latents_BCFhw))

    def decode_frames(self, latents_BCFhw: Tensor, frames_BS: Tensor, *, recompute: bool = False) -> Tensor:
        """Decodes all frames and returns the chosen ones; ``recompute`` changes nothing."""
        return decode_first(super().decode_frames, latents_BCFhw, frames_BS, self.frames)


def decode_first(decode: Callable[..., Tensor], latents_BCFhw: Tensor, frames_BS: Tensor, count: int) -> Tensor:
    """Decodes the first ``count`` frames with their activations kept, and returns the chosen ones: BSCHW."""
    every_BF = torch.arange(count, device=latents_BCFhw.device).expand(len(latents_BCFhw), -1)
    return decode(latents_BCFhw, every_BF)[torch.arange(len(frames_BS))[:, None], frames_BS]


class FreshText:
    """A reward that runs its text tower every time."""

    def __init__(self, reward: ClipReward) -> None:
        self._reward = reward

    def __call__(self, frames_BSCHW: Tensor, prompts: list[str]) -> Tensor:
        clip = self._reward.clip
        with torch.no_grad():
            text = at_least_float32(clip.encode_text(self._reward.tokenise(prompts).to(clip.logit_scale.device)))
        text_BD = nn.functional.normalize(text, dim=-1)
        cosine_BS = torch.einsum("bsd,bd->bs", self._reward.image_features(frames_BSCHW), text_BD)
        return cosine_BS * self._reward.scale + self._reward.shift


@contextmanager
def nested_checkpoints(unet: UNet3DConditionModel) -> Iterator[None]:
    """Every block of the denoiser is checkpointed for itself, inside whatever checkpoints the whole."""
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own shows again
