"""Metrics of videos, one number per clip. Show consistency beside motion: a frozen clip has a consistency of 1.

==================  ======================================================================================
metric              definition, with c_f and t the normalised CLIP features of frame f and of the prompt
==================  ======================================================================================
CLIPSIM             mean over f of c_f . t (Wu et al. 2021)
``consecutive``     mean over f of c_f . c_{f+1} (Gen-1, InstructVideo)
``all_pairs``       mean over f < g of c_f . c_g (TGVE)
``vbench``          mean over f > 0 of (max(0, c_f . c_{f-1}) + max(0, c_f . c_0)) / 2 (VBench's background and
                    subject consistency)
motion              mean absolute difference of consecutive frames, in pixel values of [0, 1] (``rlvid.reward.motion``)
flickering          1 - motion of frames of 8 bits (VBench's temporal flickering): 1 for a frozen clip
diversity           mean of 1 - v_a . v_b over pairs of clips of a prompt; v is the normalised mean of c_f
==================  ======================================================================================
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rlvid.evaluate.clip import FrameTextModel
from rlvid.reward.motion import motion

Consistency = Literal["consecutive", "all_pairs", "vbench"]
CONSISTENCIES = ("consecutive", "all_pairs", "vbench")


def similarity(image_BFD: Tensor, text_BD: Tensor) -> Tensor:
    """Returns CLIPSIM (B,) of normalised features, in [-1, 1]."""
    return torch.einsum("bfd,bd->bf", image_BFD, text_BD).mean(1)


def consistency(image_BFD: Tensor, definition: Consistency = "consecutive") -> Tensor:
    """Returns the temporal consistency (B,) of normalised features, in [-1, 1], or [0, 1] for ``vbench``.

    Raises:
        ValueError: unknown definition, or fewer than two frames.
    """
    if image_BFD.shape[1] < 2:
        raise ValueError(f"temporal consistency: a clip has {image_BFD.shape[1]} frame(s); needs 2 or more")
    previous_BF = (image_BFD[:, 1:] * image_BFD[:, :-1]).sum(2)
    if definition == "consecutive":
        return previous_BF.mean(1)
    if definition == "all_pairs":
        first, second = torch.triu_indices(image_BFD.shape[1], image_BFD.shape[1], offset=1).tolist()
        return (image_BFD[:, first] * image_BFD[:, second]).sum(2).mean(1)
    if definition == "vbench":
        first_BF = (image_BFD[:, 1:] * image_BFD[:, :1]).sum(2)
        return ((previous_BF.clamp(min=0) + first_BF.clamp(min=0)) / 2).mean(1)
    raise ValueError(f"temporal consistency {definition!r} does not exist; allowed: {', '.join(CONSISTENCIES)}")


@torch.no_grad()
def clipsim(clip: FrameTextModel, frames_BFCHW: Tensor, prompts: list[str]) -> Tensor:
    """Returns CLIPSIM of frames in [0, 1] with their prompts: (B,), float32 in [-1, 1]."""
    return similarity(clip.image_features(frames_BFCHW), clip.text_features(prompts))


@torch.no_grad()
def temporal_consistency(clip: FrameTextModel, frames_BFCHW: Tensor, definition: Consistency = "consecutive") -> Tensor:
    """Returns the temporal consistency of frames in [0, 1]: (B,), float32; see ``consistency``."""
    return consistency(clip.image_features(frames_BFCHW), definition)


def flickering(frames_BFCHW: Tensor) -> Tensor:
    """VBench's temporal flickering: (255 - mean absolute difference of consecutive 8-bit frames) / 255, (B,) in [0, 1].

    A higher value means less flickering. VBench measures it on static scenes.

    Raises:
        ValueError: fewer than two frames.
    """
    return 1 - motion((frames_BFCHW.clamp(0, 1) * 255).round()) / 255


@torch.no_grad()
def diversity(image_BFD: Tensor, prompts: list[str]) -> Tensor:
    """Returns the mean CLIP distance of each clip to the other clips of its prompt: (B,), float32 in [0, 2].

    NaN where a prompt has one clip only. With equally many clips a prompt, the mean over clips is the mean pairwise
    distance.
    """
    clip_BD = F.normalize(image_BFD.mean(1), dim=1)
    number = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
    prompt_B = torch.tensor([number[p] for p in prompts], device=clip_BD.device)
    fellow_BB = (prompt_B[:, None] == prompt_B[None, :]).fill_diagonal_(False)
    distance_BB = torch.where(fellow_BB, 1 - clip_BD @ clip_BD.T, 0.0)
    return distance_BB.sum(1) / fellow_BB.sum(1)
