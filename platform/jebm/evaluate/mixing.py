"""Have chains mixed? R-hat and effective sample size of their recorded draws.

Shapes: T recorded times, B chains, C scalar functionals.
"""

import math

import torch
from torch import Tensor

__all__ = ["bulk_effective_sample_size", "rank_normalised_split_r_hat"]


def rank_normalised_split_r_hat(draws_TBC: Tensor) -> Tensor:
    """Return R-hat of each functional, (C,), float64: 1 if chains agree with one another and over time.

    The larger of the two of Vehtari, Gelman, Simpson, Carpenter and Burkner (2021): of the rank-normalised
    halves of the chains (location), and of their distances from the median (scale). They recommend < 1.01. It
    is 1 for a constant, and NaN for fewer than four draws or if a draw is NaN.
    """
    if len(draws_TBC) < 4:
        return torch.full_like(draws_TBC[0, 0], math.nan, dtype=torch.float64)
    halves_TBC = _halves(draws_TBC)
    distances_TBC = (halves_TBC - _median(halves_TBC)).abs()
    return torch.maximum(*(_r_hat(_rank_normalised(values)) for values in (halves_TBC, distances_TBC)))


def bulk_effective_sample_size(draws_TBC: Tensor) -> Tensor:
    """Return how many independent draws fix each functional's centre as well as all T x B, (C,), float64.

    Uses the rank-normalised halves of the chains and Geyer's initial monotone sequence (Vehtari et al. 2021,
    eq. 10-13): autocorrelations of all chains together are summed in pairs as long as the pairs are positive.
    It is T x B for a constant, and NaN for fewer than eight draws or if a draw is NaN.
    """
    if len(draws_TBC) < 8:
        return torch.full_like(draws_TBC[0, 0], math.nan, dtype=torch.float64)
    z_TBC = _rank_normalised(_halves(draws_TBC))
    draws, chains, _ = z_TBC.shape
    total = draws * chains
    spectrum = torch.fft.rfft(z_TBC - z_TBC.mean(0), n=2 * draws, dim=0).abs().square().mean(1)
    autocovariance_TC = torch.fft.irfft(spectrum, n=2 * draws, dim=0)[:draws] / draws
    within_C = autocovariance_TC[0] * draws / (draws - 1)
    variance_C = autocovariance_TC[0] + z_TBC.mean(0).var(0)  # splitting makes at least two chains
    correlation_TC = 1 - (within_C - autocovariance_TC) / variance_C
    correlation_TC[0] = 1
    # Pairs of lags (0, 1), (2, 3), …; if none is negative, the last one ends the sum.
    pairs = (draws - 1) // 2
    even_PC, odd_PC = correlation_TC[: 2 * pairs : 2], correlation_TC[1 : 2 * pairs : 2]
    sums_PC = even_PC + odd_PC
    kept_PC = (sums_PC > 0).long().cumprod(0)
    kept_PC[-1] = 0
    first_out_C = kept_PC.sum(0)
    tail_C = even_PC.gather(0, first_out_C[None])[0].clamp(min=0)
    time_C = -1 + 2 * (sums_PC.cummin(0).values * kept_PC).sum(0) + tail_C
    effective_C = total / time_C.clamp(min=1 / math.log10(total))
    return torch.where(variance_C == 0, float(total), effective_C)


def _halves(draws_TBC: Tensor) -> Tensor:
    """Return the first and last T // 2 draws of each chain as separate chains, float64."""
    half = len(draws_TBC) // 2
    return torch.cat([draws_TBC[:half], draws_TBC[len(draws_TBC) - half :]], 1).double()


def _median(values_TBC: Tensor) -> Tensor:
    """Return the median over draws and chains, (C,): for an even count, the mean of the middle two."""
    ordered = values_TBC.flatten(0, 1).sort(0).values
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def _rank_normalised(values_TBC: Tensor) -> Tensor:
    """Return standard normal scores of the ranks among all draws (Blom); ties share their mean rank."""
    columns = []
    for values in values_TBC.flatten(0, 1).T:
        _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
        rank = (counts.cumsum(0).double() - 0.5 * (counts.double() - 1))[place]
        score = torch.special.ndtri((rank - 0.375) / (len(values) + 0.25))
        columns.append(torch.where(values.isnan().any(), math.nan, score))
    return torch.stack(columns, 1).view(values_TBC.shape)


def _r_hat(values_TBC: Tensor) -> Tensor:
    """Return R-hat (Gelman et al. 2013, eq. 11.4) of each functional, (C,); 1 for a constant."""
    draws = len(values_TBC)
    within_C = values_TBC.var(0).mean(0)
    between_C = values_TBC.mean(0).var(0)
    r_hat_C = ((draws - 1) / draws + between_C / within_C).sqrt()
    return torch.where((within_C == 0) & (between_C == 0), 1.0, r_hat_C)
