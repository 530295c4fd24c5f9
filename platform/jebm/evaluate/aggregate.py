"""The oracle: the aggregate posterior as prior, which says how much a prior had to gain over N(0, I).

For a fixed q(z|x), no prior has a higher ELBO than the aggregate posterior q(z) = E_x[q(z|x)]: its gain over
N(0, I) is KL(q(z) || N(0, I)) nats (Hoffman and Johnson 2016; Tomczak and Welling 2018, sec. 2). A tilt's
gain is a share of that.

q(z) is not known. Here it is a mixture of the training images' posteriors, smoothed with a bandwidth chosen
on training images that the mixture does not contain. It is a normalised prior fitted without held-out images,
so its gain on held-out codes is, in expectation, a lower bound: a very good tilt can gain more. Where a
layer's posterior depends on the layers above, a component has the moments along one sample.

Shapes: N components (training images), M codes, B codes at a time, D latent width, H height, W width, C
channels.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from jebm.core.distributions import standard_log_density
from jebm.errors import DataError, StoreError
from jebm.evaluate.estimates import Estimate
from jebm.evaluate.subject import Subject

__all__ = ["AggregatePosterior", "Oracle", "fit_aggregate", "oracle", "oracle_of"]

BANDWIDTHS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
_COMPONENTS = 20_000
_CHECK_EVERY = 20
"""Of the training images used, every 20th chooses the bandwidth; the others are the components."""
_BLOCK_BYTES = 8 << 20
_LEAST_GAIN = 1e-3


@dataclass(frozen=True)
class AggregatePosterior:
    """A mixture of smoothed posteriors, 1/N sum_i N(m + sqrt(1 - h^2) (mu_i - m), V_i + h^2 S), diagonal.

    m and S are mean and variance of the posterior means mu_i, V_i the posterior variances. h = 0 is the
    mixture of the posteriors itself, h = 1 puts all components at m; the variance of the means is S for any h
    (shrinkage: West 1993). A latent whose posterior is the same for all images is not smoothed.
    """

    mean_ND: Tensor
    """mu_i, float64."""
    log_variance_ND: Tensor
    """log V_i, float64."""
    bandwidth: float
    """h, in [0, 1]."""

    @torch.no_grad()
    def log_density(self, z_MD: Tensor) -> Tensor:
        """Return log q(z) of each code, (M,), float64, in nats: exact, over all components, in blocks."""
        # The components' centres and variances after smoothing.
        centre_D, spread_D = self.mean_ND.mean(0), self.mean_ND.var(0, correction=0)
        shrunk_ND = math.sqrt(1 - self.bandwidth**2) * (self.mean_ND - centre_D)
        precision_ND = (self.log_variance_ND.exp() + self.bandwidth**2 * spread_D).reciprocal()
        # log N(z; mu, V) = [z^2, z] [-1/2V, mu/V] - (mu^2/V + log V + D log 2 pi) / 2: one matrix product.
        linear_ND = precision_ND * shrunk_ND
        factors_N = torch.cat([-0.5 * precision_ND, linear_ND], 1).T.contiguous()
        constant_N = -0.5 * (linear_ND * shrunk_ND - precision_ND.log() + math.log(2 * math.pi)).sum(1)
        # In blocks that stay in a processor's cache.
        found, block = [], max(1, _BLOCK_BYTES // (8 * len(shrunk_ND)))
        for z_BD in torch.split(z_MD.double() - centre_D, block):
            log_BN = torch.addmm(constant_N, torch.cat([z_BD.square(), z_BD], 1), factors_N)
            largest_B1 = log_BN.amax(1, keepdim=True)
            found.append(log_BN.sub_(largest_B1).exp_().sum(1).log() + largest_B1.squeeze(1))
        return torch.cat(found) - math.log(len(shrunk_ND))


def fit_aggregate(mean_ND: Tensor, log_variance_ND: Tensor, check_MD: Tensor) -> AggregatePosterior:
    """Return the mixture of posteriors with the bandwidth of `BANDWIDTHS` that the codes `check_MD` prefer.

    `check_MD` are codes of images that are not among the components.
    """
    candidates = [AggregatePosterior(mean_ND.double(), log_variance_ND.double(), h) for h in BANDWIDTHS]
    return max(candidates, key=lambda each: float(each.log_density(check_MD).mean()))


class Oracle(NamedTuple):
    """How much there was to gain over N(0, I), and how much of it the tilt gains, on the same codes."""

    gain: Estimate
    """E_q[log q(z) - log N(z; 0, I)], in nats."""
    share: Estimate
    """(E_q[f] - log Z) / gain; NaN if the gain is below two standard errors or a thousandth of a nat."""
    components: int
    bandwidth: float


def oracle_of(gain_M: Tensor, f_M: Tensor, log_z: Estimate, prior: AggregatePosterior) -> Oracle:
    """Return the oracle's figures from log q(z) - log N(z; 0, I) and f(z) of the same codes, (M,) each.

    The share's standard error is that of a ratio of paired means, with log Z's own error (delta method).
    """
    count, gain = len(gain_M), float(gain_M.mean())
    error = float(gain_M.std() / math.sqrt(count))
    share = Estimate(math.nan, math.nan)
    if gain > max(2 * error, _LEAST_GAIN):
        ratio = (float(f_M.mean()) - log_z.value) / gain
        spread = float((f_M - ratio * gain_M).std() / math.sqrt(count))
        share = Estimate(ratio, math.hypot(spread, log_z.standard_error) / gain)
    return Oracle(Estimate(gain, error), share, len(prior.mean_ND), prior.bandwidth)


@torch.no_grad()
def oracle(subject: Subject, images_NHWC: npt.NDArray[np.uint8]) -> Oracle | None:
    """Return the oracle's figures on held-out images, at the codes that `subject.likelihood` draws.

    None if some worker cannot read the training images, or they are of another shape.
    """
    if not _training_images(subject):
        return None
    width = subject.model.latent_dim
    # Fit on training images spread evenly over the set, which may be sorted by class.
    train_NHWC = subject.train.images_NHWC
    used = min(len(train_NHWC), _COMPONENTS * _CHECK_EVERY // (_CHECK_EVERY - 1))
    chosen_NHWC = train_NHWC[np.arange(used) * len(train_NHWC) // used]
    fitted_on = _posteriors(subject, chosen_NHWC, "aggregate posterior")
    code_ND, mean_ND, log_variance_ND = torch.split(fitted_on, width, 1)
    check_N = torch.arange(used) % _CHECK_EVERY == _CHECK_EVERY - 1
    prior = fit_aggregate(mean_ND[~check_N], log_variance_ND[~check_N], code_ND[check_N])
    # Each worker computes the densities of its share of the held-out codes.
    held_out_MD = _posteriors(subject, images_NHWC, "likelihood")[:, :width]

    def figures(_position: int, rows: slice) -> Tensor:
        z_BD = held_out_MD[rows]
        f_B = z_BD.new_zeros(len(z_BD))
        if subject.tilt is not None:
            f_B = subject.tilt(z_BD.float().to(subject.device)).double().cpu()
        return torch.stack([prior.log_density(z_BD) - standard_log_density(z_BD), f_B], 1)

    gain_M, f_M = subject.rows(len(images_NHWC), 2, figures).unbind(1)
    return oracle_of(gain_M, f_M, subject.log_z, prior)


def _training_images(subject: Subject) -> bool:
    """Return whether all workers can read two or more training images that the model takes."""
    try:
        train_NHWC = subject.train.images_NHWC
        missing = len(train_NHWC) < 2 or train_NHWC.shape[1:] != subject.images_NHWC.shape[1:]
    except (DataError, StoreError):
        missing = True
    return not subject.share.total(torch.tensor([float(missing)])).item()


def _posteriors(subject: Subject, images_NHWC: npt.NDArray[np.uint8], purpose: str) -> Tensor:
    """Return one code, the mean and the log-variance of q(z|x) of each image, (N, 3 D), float64."""

    def moments(position: int, rows: slice) -> Tensor:
        x_BCHW = subject.batch(rows, images_NHWC)
        noise_BD = subject.noise(position, purpose)(len(x_BCHW), subject.model.latent_dim)
        return torch.cat(subject.model.posterior(x_BCHW, noise_BD), 1)

    return subject.rows(len(images_NHWC), 3 * subject.model.latent_dim, moments)
