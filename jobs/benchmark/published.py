"""The same networks driven as published code of other projects drives them, for comparison in one run.

Everything else is shared with rlvid, down to the noise, so that both sides come to the same gradient: that is checked.
A step that is alike on both sides is left out of the tables. All but ddpo-pytorch encode the prompts and the negative
prompt in every step, and run the reward's text tower in every step; rlvid does so once, before the training. The way of
InstructVideo's code is in ``jobs.benchmark.released``. Beside Wan's peers, rlvid also stands with all activations kept.

**VADER** (mihirp1998/VADER: VADER-ModelScope/ms_custom.py, train_t2v_lora.py, models/unet_3d_blocks.py) back-propagates
through the last step. Guidance runs in one call and layers are checkpointed, as in rlvid. rlvid's draft is beside it.

=====================  =====================================  ==================================================
stage                  published                              rlvid
=====================  =====================================  ==================================================
decoding               the scored frames one by one, with     the scored frames in one call, computed again in the
                       their activations kept                 backward pass
=====================  =====================================  ==================================================

**DRaFT** as in UniRL (Tencent-Hunyuan/UniRL: roles.py, models/wan21.py and examples/wan21_t2v_videoalign_refl.yaml, all
in experimental/refl, and unirl/models/wan21/vae.py), through the last step. The unconditional branch has no gradient
and a call of its own; layers are checkpointed, as in rlvid. Published code decodes in tiles, here whole; its reward
is a model of its own, here the shared one.

=====================  =====================================  ==================================================
stage                  published                              rlvid
=====================  =====================================  ==================================================
decoding               all frames, with their activations     the frames up to the last scored one (Wan), or the
                       kept                                   scored ones (U-Net), computed again
backward pass          one, reward to adapter                 Wan: the decoder's ends before the denoiser's begins
=====================  =====================================  ==================================================

**VideoX-Fun** (aigc-apps/VideoX-Fun: scripts/wan2.1/train_reward_lora.py and scripts/wan2.1_fun/train_reward_lora.sh)
back-propagates through the last five steps (``tail``). Guidance runs in one call and blocks are checkpointed, as in
rlvid. Published code scores frames of the first ``num_decoded_latents`` latents; here they reach to the last scored
frame. Its HPSv2 (videox_fun/reward/reward_fn.py) runs both towers for each frame in turn; here the text tower runs once
a step and the image tower once on all frames.

=====================  =====================================  ==================================================
stage                  published                              rlvid
=====================  =====================================  ==================================================
steps before the tail  with a graph, cut off after the call   without a graph
decoding               the first latents, with the            the same latents; each chunk is computed again
                       activations of all chunks kept         in the backward pass
backward pass          one, reward to adapter                 the decoder's ends before the denoiser's begins
=====================  =====================================  ==================================================

**ddpo-pytorch** (kvablack/ddpo-pytorch: scripts/train.py, config/base.py), and TRL's DDPO, which has the same loops
(huggingface/trl: trl/trainer/ddpo_trainer.py). Guidance runs in one call on the doubled batch, as in rlvid. Published
code also trains on a chain's last step; rlvid's chain ends without noise, so both sides leave it out. Batches are of
one sample in the published defaults.

=====================  =====================================  ==================================================
stage                  published                              rlvid
=====================  =====================================  ==================================================
prompts                in every step, without the negative    once
sampling               one sample at a time                   the whole batch
decoding               all frames, without a graph            the scored frames
training               a denoiser call for each sample and    a call for each step of the chain, on the whole batch
                       step, activations kept                 (activations kept; or computed again, a side of its own)
=====================  =====================================  ==================================================
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from jobs.benchmark.released import decode_first
from rlvid.models.base import VideoModel
from rlvid.models.decoded import Decoded
from rlvid.models.noise_path import Prediction


class Published:
    """A model as published code drives it; the rest is the model's own."""

    fresh_reward_text = True
    """Whether the reward's text tower runs in every step."""

    def __init__(self, model: VideoModel) -> None:
        self._model: Any = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def encode_text(self, prompts: list[str]) -> Tensor:
        """Returns embeddings text_BLD of prompts; the negative prompt's are made anew, too."""
        self._model.negative_1LD = self._model.encode_prompts([self._model.negative_prompt])
        return self._model.encode_prompts(prompts)

    def decode_frames(self, latents_BCFhw: Tensor, frames_BS: Tensor, *, recompute: bool = False) -> Tensor:
        """Decodes all frames and returns the chosen ones; ``recompute`` changes nothing."""
        return decode_first(self._model.decode_frames, latents_BCFhw, frames_BS, self._model.frames)

    def decode(self, latents_BCFhw: Tensor, frames_BS: Tensor, *, recompute: bool = False) -> Decoded:
        """Decodes in the graph of the latents."""
        return Decoded(self.decode_frames(latents_BCFhw, frames_BS))


class UniRL(Published):
    """DRaFT with all frames decoded; its guidance is rlvid's own with ``unconditional_gradient`` off."""


class Vader(Published):
    """Decodes the chosen frames one by one."""

    def decode_frames(self, latents_BCFhw: Tensor, frames_BS: Tensor, *, recompute: bool = False) -> Tensor:
        """Returns the chosen frames; ``recompute`` changes nothing."""
        single = [
            self._model.decode_frames(latents_1CFhw, frame_11)
            for latents_1CFhw, frames_1S in zip(latents_BCFhw.split(1), frames_BS.split(1), strict=True)
            for frame_11 in frames_1S.split(1, dim=1)
        ]
        return torch.cat(single).reshape(*frames_BS.shape, *single[0].shape[2:])


class VideoXFun(Published):
    """Builds a graph in every step of a Wan model's chain, and decodes the first latents at once."""

    def predict(self, latents_BCFhw: Tensor, *inputs: Any, **options: Any) -> Prediction:
        """Predicts with a graph, which is cut off where the chain has none."""
        if torch.is_grad_enabled():
            return self._model.predict(latents_BCFhw, *inputs, **options)
        with torch.enable_grad():
            found = self._model.predict(latents_BCFhw, *inputs, **options)
        return Prediction(found.x0.detach(), found.eps.detach())

    def decode_frames(self, latents_BCFhw: Tensor, frames_BS: Tensor, *, recompute: bool = False) -> Tensor:
        """Decodes the latents up to the last chosen frame; ``recompute`` changes nothing."""
        chunks = -(-int(frames_BS.max()) // self._model.stride)
        decode = partial(self._model.decode_frames, recompute=False)
        return decode_first(decode, latents_BCFhw, frames_BS, 1 + chunks * self._model.stride)


class DdpoPytorch(Published):
    """Decodes whole samples; the size of its calls is a setting of the run (``train.micro_batch``)."""

    fresh_reward_text = False

    def encode_text(self, prompts: list[str]) -> Tensor:
        """Returns embeddings text_BLD of prompts."""
        return self._model.encode_prompts(prompts)
