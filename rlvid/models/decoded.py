"""Decoded frames, and the way of a loss on them back to their latents.

=================  ======================================================
code               meaning
=================  ======================================================
``frames``         y = D(x), BSCHW
``loss``           L, a function of y
``pixels``         dL/dy
``gradient``       dL/dx = J^T dL/dy, with J = dD/dx, held fixed
=================  ======================================================

The sum of x times ``gradient`` has the gradient of L in x and in whatever x depends on. So the backward pass of a
training step begins at the latents, after the graphs of the reward and of the decoder are gone.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rlvid.config import RunConfig
from rlvid.config.methods import GRADIENT_METHODS
from rlvid.models.folders import UNET3D, WAN, family

Decode = Callable[[Tensor], Tensor]
"""Decodes latents BCFhw to frames BSCHW, differentiably."""
Share = Callable[[Tensor], Tensor]
"""Gives the share of each video's gradient that the decoder keeps (N,), for a gradient of the frames BSCHW."""


class Decoded:
    """Frames in the graph of their latents: a loss on them is back-propagated as it is.

    Attributes:
        frames: BSCHW, about [0, 1].
    """

    def __init__(self, frames_BSCHW: Tensor) -> None:
        self.frames = frames_BSCHW

    def pull_back(self, loss: Tensor, *, scale: float = 1.0, measure: bool = False) -> tuple[Tensor, Tensor | None]:
        """Makes a loss on the frames one on the latents, of the same value and gradient. Call it once.

        Args:
            loss: a scalar, a function of ``frames``.
            scale: factor of gradients on their way, so that those of half precision do not vanish.
            measure: whether to measure the share of the gradient that is kept.

        Returns:
            The loss, and for each video with a gradient the share of it that is kept (N,); None where it is not
            measured, or nothing is left out.
        """
        return loss, None


class DecodedApart(Decoded):
    """Frames apart from the graph of their latents, so that the decoder's backward pass is over before the denoiser's.

    Args:
        latents_BCFhw: with their graph.
        decode: the decoder.
        share: measures the share of the gradient that ``decode`` keeps; None where it keeps all.
    """

    def __init__(self, latents_BCFhw: Tensor, decode: Decode, share: Share | None = None) -> None:
        self._latents, self._share = latents_BCFhw, share
        self._held = latents_BCFhw.detach().requires_grad_()
        self._inside = decode(self._held)
        self._pixels = self._inside.detach().requires_grad_()
        super().__init__(self._pixels.clone())  # a reward may write into its frames, which a leaf refuses

    def pull_back(self, loss: Tensor, *, scale: float = 1.0, measure: bool = False) -> tuple[Tensor, Tensor | None]:
        """See ``Decoded.pull_back``."""
        (pixels_BSCHW,) = torch.autograd.grad(loss * scale, self._pixels)
        share_N = self._share(pixels_BSCHW) if measure and self._share is not None else None
        (gradient_BCFhw,) = torch.autograd.grad(self._inside, self._held, pixels_BSCHW)
        product = (self._latents * (gradient_BCFhw / scale)).sum()
        return loss.detach() + (product - product.detach()), share_N


def check_decoding(config: RunConfig) -> None:
    """Checks that the settings of a run's decoder mean something for its model and its method.

    Raises:
        ValueError: a setting of a causal decoder with another one, with a method that back-propagates nothing through
            it, or with the graph of all chunks in place of caches; ``model.decode_share`` without a window;
            ``model.decode_chunk`` with a causal decoder.
    """
    spec, method = config.model, config.method
    of_caches = {
        "decode_offload": spec.decode_offload or None,
        "decode_cache_precision": None if spec.decode_cache_precision == "float32" else spec.decode_cache_precision,
    }
    given = {"decode_window": spec.decode_window, "decode_share": None if spec.decode_share else False, **of_caches}
    for key, value in given.items():
        if value is None:
            continue
        setting = f"model.{key} = {str(value).lower()}"
        if family(spec.path) is UNET3D:
            raise ValueError(
                f"{setting}: model.path = {spec.path!r} decodes each frame by itself; leave it out, it is for causal "
                "autoencoders (Wan)"
            )
        if not method.needs_gradient:
            raise ValueError(
                f"{setting} is for methods that back-propagate the reward ({GRADIENT_METHODS}); no gradient of method "
                f"{method.name!r} flows through the decoder: leave it out"
            )
        if key in of_caches and spec.decode_window is None and not config.train.checkpoint_activations:
            raise ValueError(
                f"{setting}: train.checkpoint_activations = false keeps the graph of all chunks, and no caches; set "
                f"train.checkpoint_activations=true, or leave {key} out"
            )
    if not spec.decode_share and spec.decode_window is None:
        raise ValueError(
            "model.decode_share = false: without model.decode_window the whole gradient is kept, and nothing is "
            "measured; leave it out"
        )
    chunk = type(spec).model_fields["decode_chunk"].default
    if spec.decode_chunk != chunk and family(spec.path) is WAN:
        raise ValueError(
            f"model.decode_chunk = {spec.decode_chunk}: model.path = {spec.path!r} has a causal autoencoder, which "
            f"decodes chunk by chunk always; leave it out, or set model.decode_chunk={chunk}, the default"
        )
