"""Likelihoods p(x|u) by name: Gaussian, mixture of discretised logistics, Bernoulli.

Shapes: B batch, C channels, H height, W width, P parameters of a pixel, K components of a mixture.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jebm.config import LEAST_STD
from jebm.config import Likelihood as LikelihoodConfig
from jebm.core.parts import Likelihood

__all__ = ["Bernoulli", "DiscretisedLogistic", "Gaussian", "build_likelihood"]

_LOG_SCALE = 7.0
"""Logistics narrower than exp(-7), an eighth of a level, or wider than exp(7) only overflow."""
_HALF_LEVEL = 1 / 255


class Gaussian(Likelihood):
    """x ~ N(tanh(parameters), sigma^2 I), with one fixed or learned sigma, or one per channel."""

    def __init__(self, config: LikelihoodConfig, channels: int) -> None:
        super().__init__(channels)
        self._fixed: float | None = config.std if config.learn_std == "no" else None
        if self._fixed is None:
            sigmas = channels if config.learn_std == "per_channel" else 1
            self.log_std = nn.Parameter(torch.full((sigmas,), math.log(config.std)))

    @property
    def std(self) -> Tensor | float:
        """sigma: the fixed number, or the present values, one or (C,)."""
        return self._fixed if self._fixed is not None else self._log_std().exp()

    def _log_std(self) -> Tensor:
        """Return log sigma, held above the floor; its gradient is not, so that sigma can come back."""
        held = self.log_std.detach().clamp(min=math.log(LEAST_STD))
        return held + (self.log_std - self.log_std.detach())

    def distortion(self, x_BCHW: Tensor, parameters_BPHW: Tensor) -> Tensor:
        """Return |x - mean|^2 / (2 sigma^2), plus log sigma of each pixel if it is learned, (B,), in nats."""
        error_BCHW = (x_BCHW - self.mean(parameters_BPHW)).square()
        if self._fixed is not None:
            return error_BCHW.sum(dim=(1, 2, 3)) / (2 * self._fixed**2)
        log_std_C = self._log_std().to(x_BCHW.dtype)
        _, channels, height, width = x_BCHW.shape
        scaled_BC = error_BCHW.sum(dim=(2, 3)) * (0.5 * torch.exp(-2 * log_std_C))
        return scaled_BC.sum(1) + height * width * log_std_C.expand(channels).sum()

    def mean(self, parameters_BPHW: Tensor) -> Tensor:
        """Return tanh(parameters), (B, C, H, W), in (-1, 1)."""
        return torch.tanh(parameters_BPHW)

    def metrics(self) -> dict[str, Tensor]:
        """Return sigma, its mean over channels, if it is learned."""
        return {} if self._fixed is not None else {"likelihood_std": self._log_std().exp().mean().detach()}

    def constant(self, pixels: int) -> float:
        """Return pixels log(2 pi sigma^2) / 2 for a fixed sigma, pixels log(2 pi) / 2 for a learned one."""
        return pixels * 0.5 * math.log(2 * math.pi * (self._fixed or 1.0) ** 2)


class DiscretisedLogistic(Likelihood):
    """A probability of the 256 levels: a mixture of K logistics, integrated over each level.

    Salimans et al. 2017 (PixelCNN++), eq. 1 to 3, as deep VAEs use it: given the component, the mean of a
    channel shifts linearly with the channels before it. The levels at both ends take the tails, so that the
    256 probabilities add up to one. Bits a dimension compare with published ones.
    """

    levels_offset = 0.0

    def __init__(self, components: int, channels: int) -> None:
        super().__init__(channels)
        self._components, self._channels = components, channels
        self.outputs = components * (1 + 2 * channels + channels * (channels - 1) // 2)

    def _split(self, parameters_BPHW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return logits (B, K, H, W); means and log-scales (B, C, K, H, W); shifts (B, C(C-1)/2, K, H, W)."""
        components, channels = self._components, self._channels
        batch, _, height, width = parameters_BPHW.shape
        pairs = channels * (channels - 1) // 2
        logits, rest = torch.split(parameters_BPHW, [components, (2 * channels + pairs) * components], 1)
        rest = rest.view(batch, 2 * channels + pairs, components, height, width)
        means, log_scales, shifts = torch.split(rest, [channels, channels, pairs], 1)
        return logits, means, log_scales.clamp(-_LOG_SCALE, _LOG_SCALE), torch.tanh(shifts)

    def distortion(self, x_BCHW: Tensor, parameters_BPHW: Tensor) -> Tensor:
        """Return -log P(levels of x), (B,), in nats, never negative."""
        logits, means, log_scales, shifts = self._split(parameters_BPHW)
        x = x_BCHW.unsqueeze(2)
        log_mass = self._log_mass(x, self._shifted(means, shifts, list(x.unbind(1))), log_scales)
        per_pixel_BHW = torch.logsumexp(log_mass.sum(1) + F.log_softmax(logits, 1), 1)
        return -per_pixel_BHW.sum(dim=(1, 2))

    def _shifted(self, means: Tensor, shifts: Tensor, before: list[Tensor]) -> Tensor:
        """Return the means (B, C, K, H, W) given the values of the channels before each."""
        columns, pair = [], 0
        for channel in range(self._channels):
            mean = means[:, channel]
            for other in range(channel):
                mean = mean + shifts[:, pair] * before[other]
                pair += 1
            columns.append(mean)
        return torch.stack(columns, 1)

    @staticmethod
    def _log_mass(x: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
        """Return the log-probability of each value's level under each logistic, (B, C, K, H, W)."""
        centred, inverse = x - means, torch.exp(-log_scales)
        upper, lower = inverse * (centred + _HALF_LEVEL), inverse * (centred - _HALF_LEVEL)
        # P(level) = S(upper) - S(lower) = S(upper) S(-lower) (1 - exp(lower - upper)): no cancellation.
        inside = F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(lower - upper))
        # The levels at both ends take the tails.
        first, last = x < -1 + _HALF_LEVEL, x > 1 - _HALF_LEVEL
        return torch.where(first, F.logsigmoid(upper), torch.where(last, F.logsigmoid(-lower), inside))

    def mean(self, parameters_BPHW: Tensor) -> Tensor:
        """Return the mean of the mixture before rounding to levels, clipped to [-1, 1], (B, C, H, W)."""
        logits, means, _, shifts = self._split(parameters_BPHW)
        expected: list[Tensor] = []
        for channel in range(self._channels):  # linear in the channels before, so means may stand for them
            pair = channel * (channel - 1) // 2
            mean = means[:, channel]
            for other in range(channel):
                mean = mean + shifts[:, pair + other] * expected[other]
            expected.append(mean.clamp(-1, 1))
        weights_BKHW = torch.softmax(logits, 1)
        return (torch.stack(expected, 1) * weights_BKHW.unsqueeze(1)).sum(2).clamp(-1, 1)


class Bernoulli(Likelihood):
    """A probability of black-and-white images: pixels above the middle grey are 1, the others 0."""

    levels_offset = 0.0

    def distortion(self, x_BCHW: Tensor, parameters_BPHW: Tensor) -> Tensor:
        """Return -log P(x > 0), (B,), in nats; the parameters are logits."""
        bits = (x_BCHW > 0).to(x_BCHW.dtype)
        return F.binary_cross_entropy_with_logits(parameters_BPHW, bits, reduction="none").sum(dim=(1, 2, 3))

    def mean(self, parameters_BPHW: Tensor) -> Tensor:
        """Return 2 P(1) - 1, (B, C, H, W), in (-1, 1)."""
        return torch.tanh(0.5 * parameters_BPHW)


def build_likelihood(config: LikelihoodConfig, channels: int) -> Likelihood:
    """Return the likelihood of a config for images of this many channels."""
    if config.kind == "gaussian":
        return Gaussian(config, channels)
    if config.kind == "bernoulli":
        return Bernoulli(channels)
    return DiscretisedLogistic(config.components, channels)
