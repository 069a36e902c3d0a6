"""LAION's aesthetic predictor: linear layers without activations on a CLIP image embedding, so one affine map."""

from pathlib import Path

import torch
from torch import Tensor, nn

from rlvid.models.weights import check_finite, read_weights
from rlvid.reward.clip import ImageFeatures
from rlvid.reward.preprocess import Preprocess

HEAD_FILE = "sac+logos+ava1-l14-linearMSE.pth"
_WIDTHS = (1024, 128, 64, 16, 1)
_PLACES = (0, 2, 4, 6, 7)  # of the layers in the file; dropout stands between them


class AestheticReward(ImageFeatures):
    """LAION's aesthetic predictor: an affine function of the normalised image embedding.

    Args:
        visual: the image tower of a CLIP model; it is frozen and put into evaluation mode.
        weight_D: w.
        bias: b, a scalar.
        preprocess: how frames become the tower's input.
        chunk: most images that go through the tower at once.
        recompute: see ``in_chunks``.
    """

    def __init__(
        self,
        visual: nn.Module,
        weight_D: Tensor,
        bias: Tensor,
        preprocess: Preprocess,
        chunk: int = 8,
        *,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.visual, self.preprocess = visual.eval().requires_grad_(False), preprocess
        self.chunk, self.recompute = chunk, recompute
        self.register_buffer("weight_D", weight_D)
        self.register_buffer("bias", bias)

    def forward(self, frames_BSCHW: Tensor, prompts: list[str]) -> Tensor:
        """Returns scores_BS, float32; the prompts play no part."""
        return self.image_features(frames_BSCHW) @ self.get_buffer("weight_D") + self.get_buffer("bias")


def fold(layers: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Folds linear layers (weight, bias) without activations between them into one: weight (D,), bias, float32.

    The product is taken in float64; the last layer has one output.
    """
    weight, bias = (each.double() for each in layers[0])
    for next_weight, next_bias in layers[1:]:
        weight, bias = next_weight.double() @ weight, next_weight.double() @ bias + next_bias.double()
    return weight[0].float(), bias[0].float()


def head(file: Path | None, width: int, where: str) -> tuple[Tensor, Tensor]:
    """LAION's layers as one affine map: weight_D and bias, float32; random layers of the same shapes without a file.

    Args:
        file: with the keys of LAION's file.
        width: D of the embedding.
        where: what errors begin with.

    Raises:
        ValueError: the file holds other weights.
    """
    ends = zip(_PLACES, (width, *_WIDTHS[:-1]), _WIDTHS, strict=True)
    shapes = {f"layers.{place}": (out, into) for place, into, out in ends}
    if file is None:
        generator = torch.Generator().manual_seed(0)
        draws = [torch.randn(shape, generator=generator) / shape[1] ** 0.5 for shape in shapes.values()]
        return fold([(draw, torch.zeros(len(draw))) for draw in draws])
    weights = read_weights(file, where)
    expected: dict[str, tuple[int, ...]] = {f"{layer}.weight": shape for layer, shape in shapes.items()}
    expected |= {f"{layer}.bias": shape[:1] for layer, shape in shapes.items()}
    if {name: tuple(tensor.shape) for name, tensor in weights.items()} != expected:
        raise ValueError(
            f"{where}: {file.name} is not LAION's head for embeddings of {width} numbers; its keys begin with "
            f"{', '.join(sorted(weights)[:3])}"
        )
    check_finite(weights, f"{where}: {file.name}")
    return fold([(weights[f"{layer}.weight"], weights[f"{layer}.bias"]) for layer in shapes])
