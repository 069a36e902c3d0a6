"""Forecasts of the network's output between calls, in the part of a chain without gradient.

A first-order forecast, as TaylorSeer's of a network's features (Liu et al. 2025), of the output itself:

    o(p) = o_1 + (u(p) - u(p_1)) / (u(p_1) - u(p_0)) (o_1 - o_0)

==============  ==========================================================================================
code            meaning
==============  ==========================================================================================
``o_1``, ``o_0``  the network's outputs (eps or v) at the last two points p_1 and p_0 at which it was called
``u``           the share of noise at a point, sigma / (alpha + sigma)
==============  ==========================================================================================

An output that is held, o(p) = o_1, would make deterministic steps that end where one longer step ends: on the paths of
``rlvid.models.noise_path`` that is the same as a chain with fewer points. So the network
is called at the first two steps.
"""

from dataclasses import dataclass

from torch import Tensor

from rlvid.models.noise_path import NoisePath, Prediction


@dataclass(frozen=True)
class _Call:
    share: Tensor
    guidance: float
    output: Tensor


class Forecast:
    """Holds the last two outputs of a chain's network, and forecasts those at the steps between its calls.

    Args:
        path: of the chain.
        every: n; the network is called at steps 0, n, 2 n, ..., and at the first two steps of each guidance.
    """

    def __init__(self, path: NoisePath, every: int) -> None:
        self._path, self._every = path, every
        self._last: _Call | None = None
        self._before: _Call | None = None

    def prediction(self, index: int, point: float, guidance: float, x: Tensor) -> Prediction | None:
        """Returns the forecast for latents x (B, C, F, h, w) at a step; None where the network is to be called."""
        last, before = self._last, self._before
        if last is None or before is None or index % self._every == 0 or last.guidance != guidance:
            return None
        ahead = (self._path.share(point) - last.share) / (last.share - before.share)
        output = last.output + float(ahead) * (last.output - before.output)
        return self._path.prediction(output, x, self._path.level(point, x))

    def keep(self, point: float, guidance: float, prediction: Prediction) -> None:
        """Keeps the network's output at a step; under another guidance than at the last call, forecasts begin anew."""
        last, output = self._last, self._path.predicted(prediction)
        self._before = last if last is not None and last.guidance == guidance else None
        self._last = _Call(self._path.share(point), guidance, output)
