"""Which images are out of distribution: scores of images, and how well a score separates two sets.

One convention: a higher score means more in-distribution, and anomalies are the positive class of every
measure, detected by a low score. The definition of a score fixes its sign; no sign is flipped because of the
result.

Shapes: B batch, C channels, H height, W width, D latent width of all layers together, bottom layer first, L
layers, N and M images, V distinct scores.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from jebm.config import Langevin
from jebm.core.distributions import standard_log_density
from jebm.core.model import JointModel
from jebm.evaluate.chains import Tilt, value_and_gradient
from jebm.evaluate.hierarchy import layer_columns, resample, tilt_of
from jebm.rng import Normal

__all__ = [
    "Detection",
    "auroc",
    "average_precision",
    "detection",
    "detections",
    "detections_by_label",
    "fpr_at_tpr",
    "log_marginal_tilt",
    "scores",
]


# -------------------------------------------------------------------------------------- scores of an image


@torch.no_grad()
def scores(
    model: JointModel,
    x_BCHW: Tensor,
    normal: Normal,
    config: Langevin,
    *,
    log_z: float,
    samples: int = 1,
    marginal_samples: int = 64,
) -> dict[str, Tensor]:
    """Return name -> score (B,), float64, in nats: higher is more in-distribution.

    With z ~ q(z|x), and `samples` S draws of it:
      "log p(x, z)"  log p(x|z) + f(z) + log p0(z), unnormalised: the paper's score; mean over the draws
      "log p(x|z)"   quality of the reconstruction: minus distortion; mean
      "f"            f(z); mean
      "log prior"    f(z) + log p0(z) - log Z; mean
      "ELBO"         log p(x, z) - log Z - log q(z|x); log of the mean of exp: with S > 1 the
                     importance-weighted bound
      "L>k"          k = 1 … L-1: the same with the k lowest layers from the prior, log p(x|z)
                     + log p(z_{>k}) - log q(z_{>k}|x), z_{>k} ~ q, z_{<=k} ~ p(z_{<=k} | z_{>k}) by Langevin
      "-LLR>k"       L>k - ELBO, of the same z_{>k}: LLR>k = ELBO - L>k is high for anomalies
    The last two adapt Havtorn et al. (2021) to the EBM prior; their code takes the mode of the conditional
    prior for z_{<=k}, we draw samples, as their text does. log p(z_{>k}) is estimated from `marginal_samples`
    draws (see `log_marginal_tilt`). `log_z` is 0 for the Gaussian prior.
    """
    f, layers = tilt_of(model), len(model.latent_dims)
    features = model.inference(x_BCHW)
    draws: dict[str, list[Tensor]] = {}
    for _ in range(samples):
        posterior = model.along(features, normal(len(x_BCHW), model.latent_dim))
        z_BD, log_q_BD = posterior.code_BD, posterior.log_density().double()
        drawn = _joint_scores(model, f, x_BCHW, z_BD, log_z)
        drawn["ELBO"] = drawn["log p(x|z)"] + drawn["log prior"] - log_q_BD.sum(1)
        for k in range(1, layers):
            # Draw the k lowest layers from the prior given those above.
            below = layer_columns(model.latent_dims, range(k))
            new_z_BD = resample(f, z_BD, below, normal, config)
            log_p_B = standard_log_density(z_BD[:, len(below) :]).double() - log_z
            if f is not None:
                log_p_B += log_marginal_tilt(f, new_z_BD, below, normal, marginal_samples).log_mean_B
            log_ratio_B = log_p_B - log_q_BD[:, len(below) :].sum(1)
            drawn[f"L>{k}"] = _log_likelihood(model, x_BCHW, new_z_BD) + log_ratio_B
        for name, values_B in drawn.items():
            draws.setdefault(name, []).append(values_B)
    result = {name: _over_draws(name, torch.stack(values)) for name, values in draws.items()}
    return result | {f"-LLR>{k}": result[f"L>{k}"] - result["ELBO"] for k in range(1, layers)}


def _joint_scores(
    model: JointModel, f: Tilt | None, x_BCHW: Tensor, z_BD: Tensor, log_z: float
) -> dict[str, Tensor]:
    """Return the scores that depend only on one draw of z."""
    log_likelihood_B = _log_likelihood(model, x_BCHW, z_BD)
    f_B = torch.zeros_like(log_likelihood_B) if f is None else f(z_BD).double()
    log_prior_B = f_B + standard_log_density(z_BD).double() - log_z
    return {
        "log p(x, z)": log_likelihood_B + log_prior_B + log_z,
        "log p(x|z)": log_likelihood_B,
        "f": f_B,
        "log prior": log_prior_B,
    }


def _over_draws(name: str, values_SB: Tensor) -> Tensor:
    """Return a score over S draws of z: the log of a mean of exp if it bounds log p(x), else the mean."""
    if name.startswith(("ELBO", "L>")):
        return values_SB.logsumexp(0) - math.log(len(values_SB))
    return values_SB.mean(0)


def _log_likelihood(model: JointModel, x_BCHW: Tensor, z_BD: Tensor) -> Tensor:
    """Return log p(x|z), (B,), float64, in nats."""
    return -model.distortion(x_BCHW, z_BD).double() - model.likelihood.constant(x_BCHW[0].numel())


class MarginalTilt(NamedTuple):
    """The average of exp f over some columns of z, for each image."""

    log_mean_B: Tensor
    """log E[exp f], float64, in nats."""
    effective_share_B: Tensor
    """Effective over actual sample size of the weights, in (0, 1]: near 1 / samples, one draw dominates."""


@torch.no_grad()
def log_marginal_tilt(
    f: Callable[[Tensor], Tensor], z_BD: Tensor, columns: Sequence[int], normal: Normal, samples: int
) -> MarginalTilt:
    """Return log E[exp f(z)] over z_F ~ N(0, I) in `columns`, the rest of z fixed, from `samples` draws.

    With z_U for the rest, p(z_U) = int exp(f(z)) p0(z) dz_F / Z, so that

        log p(z_U) = log E_p0(z_F)[exp f(z)] + log p0(z_U) - log Z.

    Draws of p0 only would miss the region where a steep f puts its weight. So a third of the draws comes from
    p0, and a third each from N(m, I), with m found by ascent on f + log p0 from 0 and from z's own columns;
    weights use the mixture of the three (the balance heuristic of Veach and Guibas 1995). For a linear f,
    N(m, I) is exact. The mean is unbiased; its logarithm is too low by about (1 / share - 1) / (2 samples).
    """
    free_F = torch.tensor(columns, dtype=torch.long, device=z_BD.device)
    starts = torch.cat([z_BD.index_fill(1, free_F, 0), z_BD])
    centres_KBF = torch.stack([torch.zeros_like(z_BD[:, free_F]), *_climbed(f, starts, free_F).chunk(2)])
    kinds = len(centres_KBF)
    shares_K1 = torch.tensor([[len(range(k, samples, kinds)) / samples] for k in range(kinds)]).to(z_BD)
    z_BD = z_BD.clone()
    log_sum_B = log_squares_B = torch.full((len(z_BD),), -math.inf, dtype=torch.float64, device=z_BD.device)
    for draw in range(samples):
        z_BF = centres_KBF[draw % kinds] + normal(len(z_BD), len(columns))
        # log of the mixture's density over that of p0
        log_ratio_KB = (centres_KBF * (z_BF - 0.5 * centres_KBF)).sum(2) + shares_K1.log()
        log_weight_B = (f(z_BD.index_copy_(1, free_F, z_BF)) - log_ratio_KB.logsumexp(0)).double()
        log_sum_B = torch.logaddexp(log_sum_B, log_weight_B)
        log_squares_B = torch.logaddexp(log_squares_B, 2 * log_weight_B)
    share_B = (2 * log_sum_B - log_squares_B).exp() / samples
    return MarginalTilt(log_sum_B - math.log(samples), share_B)


def _climbed(f: Callable[[Tensor], Tensor], z_BD: Tensor, free_F: Tensor) -> Tensor:
    """Return z_F, (B, F), after 32 ascent steps on f(z) + log N(z_F; 0, I)."""
    evaluate = value_and_gradient(f)
    z_BD = z_BD.clone()
    for _ in range(32):
        _, gradient_BD = evaluate(z_BD)
        z_BD.index_copy_(1, free_F, 0.7 * z_BD[:, free_F] + 0.3 * gradient_BD[:, free_F])
    return z_BD[:, free_F]


# ------------------------------------------------------------------------------------ how well they separate


def auroc(positive_N: Tensor, negative_M: Tensor) -> float:
    """Return P(positive > negative) + P(equal) / 2, in [0, 1]: the area under the ROC curve.

    Here and below: exact, ties included, in O(n log n); NaN if a side is empty or a score is NaN.
    """
    if _undefined(positive_N, negative_M):
        return math.nan
    true_V, false_V = _counts(positive_N, negative_M)
    new_true_V, new_false_V = _differences(true_V), _differences(false_V)
    won = (new_true_V * (len(negative_M) - false_V + 0.5 * new_false_V)).sum()
    return float(won / (len(positive_N) * len(negative_M)))


def average_precision(positive_N: Tensor, negative_M: Tensor, *, share: float | None = None) -> float:
    """Return the sum over thresholds of precision times the gain in recall, in (0, 1]: AUPRC, in steps.

    A random score has about N / (N + M), so values depend on the sizes of the two sets. With `share`, in
    (0, 1), positives are weighted to make up that share of all, and a random score has about `share`.
    """
    if _undefined(positive_N, negative_M):
        return math.nan
    true_V, false_V = _counts(positive_N, negative_M)
    weight = 1.0 if share is None else share / (1 - share) * len(negative_M) / len(positive_N)
    precision_V = weight * true_V / (weight * true_V + false_V)
    return float((_differences(true_V) * precision_V).sum() / len(positive_N))


def fpr_at_tpr(positive_N: Tensor, negative_M: Tensor, tpr: float) -> float:
    """Return the share of negatives at or above the highest threshold that detects `tpr` of the positives."""
    if _undefined(positive_N, negative_M):
        return math.nan
    true_V, false_V = _counts(positive_N, negative_M)
    first = int((true_V / len(positive_N) >= tpr).int().argmax())
    return float(false_V[first] / len(negative_M))


def _undefined(positive_N: Tensor, negative_M: Tensor) -> bool:
    return any(len(side) == 0 or bool(side.isnan().any()) for side in (positive_N, negative_M))


def _counts(positive_N: Tensor, negative_M: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many positives and negatives lie at or above each distinct score, highest first, (V,)."""
    both = torch.cat([positive_N.double(), negative_M.double()])
    distinct_V, place = torch.unique(both, return_inverse=True)
    true_V, false_V = (
        torch.bincount(side, minlength=len(distinct_V)).flip(0).cumsum(0).double()
        for side in place.split([len(positive_N), len(negative_M)])
    )
    return true_V, false_V


def _differences(counts_V: Tensor) -> Tensor:
    return torch.diff(counts_V, prepend=counts_V.new_zeros(1))


# ---------------------------------------------------------------------------------------------- the protocol


class Detection(NamedTuple):
    """How well one score tells anomalies (the positive class) from normal images."""

    auroc: float
    auprc: float
    """Average precision; about the share of anomalies for a random score."""
    fpr80: float
    """Share of normal images taken for anomalies at the threshold that detects 80 % of the anomalies."""
    fpr95: float


def detection(normal_N: Tensor, anomalous_M: Tensor) -> Detection:
    """Return the measures of a score (higher: more in-distribution) on normal and anomalous images."""
    sides = -anomalous_M, -normal_N
    return Detection(
        auroc(*sides), average_precision(*sides), fpr_at_tpr(*sides, 0.8), fpr_at_tpr(*sides, 0.95)
    )


def detections(normal: Mapping[str, Tensor], anomalous: Mapping[str, Tensor]) -> dict[str, Detection]:
    """Return score -> measures, for `scores` of a normal and of an anomalous data set."""
    return {name: detection(normal[name], anomalous[name]) for name in normal}


def detections_by_label(
    scores_: Mapping[str, Tensor], labels_N: Tensor, anomalous: int
) -> dict[str, Detection]:
    """Return score -> measures, with one class of a data set as the anomaly (paper, table 3).

    The model must be trained without that class; images without a label (-1) are left out.
    """
    is_anomaly_N, is_normal_N = labels_N == anomalous, (labels_N >= 0) & (labels_N != anomalous)
    normal, anomalies = (
        {name: values_N[chosen_N] for name, values_N in scores_.items()}
        for chosen_N in (is_normal_N, is_anomaly_N)
    )
    return detections(normal, anomalies)
