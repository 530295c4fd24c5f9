"""Can a classifier tell samples of two distributions apart? If not, they agree as far as it can see.

Applied to latents: samples of the prior against the aggregate posterior, the mean of q(z|x) over images. A
good prior equals the aggregate posterior; what a classifier finds is where the prior is wrong.

With hundreds of latents and a thousand samples, a net by itself fits the noise, and a ridge finds less than
a lasso where few latents differ. For a shift m of ten among D = 304 coordinates whose best AUC is .775, means
of N / 2 samples a side give at most Phi(|m|^2 / sqrt(2 (|m|^2 + 4 D / N))) = .70 without such a selection.

Shapes: N and M samples, B both together, D latent width, W = 2 D features.
"""

import copy
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jebm.evaluate.ood import auroc
from jebm.rng import generator

__all__ = ["two_sample_auc"]

_STRENGTHS = 12
_LASSO_FACTOR = 0.8
_RIDGE_FACTOR = 0.5
_LARGEST_RIDGE = 4.0
"""In units of the loss's curvature."""
_GRADIENT_STEPS = 60
"""For each strength of a penalty, from the solution of the stronger one."""

_WIDTH = 64
_UPDATES = 200
_LEARNING_RATE = 3e-3
_WEIGHT_DECAY = 0.02
_CHECK_EVERY = 10
_PATIENCE = 5
"""Checks without a better loss after which training ends."""


def two_sample_auc(one_ND: Tensor, other_MD: Tensor, *, seed: int = 0) -> float:
    """Return the area under the ROC curve of a classifier that tells `one` from `other`: 0.5 if it cannot.

    The classifier sees each coordinate and its square: linear, with a lasso or a ridge, plus a net with one
    hidden layer. It is trained on half of the samples and tested on the other half, then with the halves
    swapped; the mean of both (Lopez-Paz and Oquab 2017, with the AUC in place of the accuracy). Chance may
    take it a little below 0.5. It is a lower bound of the best classifier's, and lower for fewer samples:
    compare only values with the same numbers of samples. NaN if a sample is not finite or a side has fewer
    than eight.
    """
    if min(len(one_ND), len(other_MD)) < 8 or not (one_ND.isfinite().all() and other_MD.isfinite().all()):
        return math.nan
    areas = []
    for fold in range(2):
        seen, unseen = ([side.float().cpu()[k::2] for side in (one_ND, other_MD)] for k in (fold, 1 - fold))
        score = _trained(seen[0], seen[1], seed + fold)
        areas.append(auroc(score(unseen[0]), score(unseen[1])))
    return sum(areas) / 2


class _Sides(NamedTuple):
    """Features of both sides, with classes and weights: each side weighs a half in all."""

    h_BW: Tensor
    target_B: Tensor
    weight_B: Tensor

    @classmethod
    def of(cls, one_NW: Tensor, other_MW: Tensor) -> Self:
        target_B = torch.cat([torch.ones(len(one_NW)), torch.zeros(len(other_MW))])
        weight_B = torch.where(target_B == 1, 0.5 / len(one_NW), 0.5 / len(other_MW))
        return cls(torch.cat([one_NW, other_MW]), target_B, weight_B)

    def loss(self, logit_B: Tensor) -> Tensor:
        """Return the cross-entropy, log 2 for logits of zero."""
        return F.binary_cross_entropy_with_logits(logit_B, self.target_B, self.weight_B, reduction="sum")

    def gradient(self, slope_W: Tensor) -> Tensor:
        """Return the gradient of the loss of the logits h slope, (W,)."""
        return self.h_BW.mT @ (self.weight_B * (torch.sigmoid(self.h_BW @ slope_W) - self.target_B))

    def curvature(self) -> float:
        """Return a bound of the loss's second derivative in the slope."""
        weighted_BW = self.weight_B.sqrt()[:, None] * self.h_BW
        return 0.25 * float(torch.linalg.matrix_norm(weighted_BW, 2)) ** 2


class _Penalty(NamedTuple):
    """lasso |slope|_1 + ridge |slope|^2 / 2."""

    lasso: float
    ridge: float


def _trained(one_ND: Tensor, other_MD: Tensor, seed: int) -> Callable[[Tensor], Tensor]:
    """Return a classifier, from samples to logits: a linear one, and what a net adds to it.

    Every fourth sample chooses the penalty and when the net stops.
    """
    features = _features(one_ND, other_MD)
    all_NW, all_MW = features(one_ND), features(other_MD)
    kept = [torch.arange(len(side)) % 4 != 3 for side in (all_NW, all_MW)]
    train = _Sides.of(all_NW[kept[0]], all_MW[kept[1]])
    check = _Sides.of(all_NW[~kept[0]], all_MW[~kept[1]])
    # The linear part by itself separates distributions that differ in mean or spread.
    lowest, slope_W, chosen = math.log(2), torch.zeros(train.h_BW.shape[1]), None
    for penalty, tried_W in _path(train):
        loss = float(check.loss(check.h_BW @ tried_W))
        if loss < lowest:
            lowest, slope_W, chosen = loss, tried_W, penalty
    net = _net_beside(slope_W, train, check, seed)
    # The penalty holds for all samples too: the linear part takes those that have chosen it.
    if chosen is not None:
        both = _Sides.of(all_NW, all_MW)
        slope_W = _slope(both, both.curvature(), slope_W, chosen)

    def score(z_BD: Tensor) -> Tensor:
        h_BW = features(z_BD)
        with torch.no_grad():
            logit_B: Tensor = h_BW @ slope_W + net(h_BW).squeeze(1)
        return logit_B

    return score


def _features(one_ND: Tensor, other_MD: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the map to standardised coordinates and their squares less one, (B, W); sides weigh the same."""
    sides = [side.double() for side in (one_ND, other_MD)]  # squares of chains that run away are finite
    mean_D = (sides[0].mean(0) + sides[1].mean(0)) / 2
    variances = [(side - mean_D).square().mean(0) for side in sides]
    std_D = ((variances[0] + variances[1]) / 2).sqrt().clamp(min=1e-6)

    def features(z_BD: Tensor) -> Tensor:
        scaled_BD = ((z_BD.double() - mean_D) / std_D).float()
        return torch.cat([scaled_BD, scaled_BD.square() - 1], 1)

    return features


def _path(train: _Sides) -> Iterator[tuple[_Penalty, Tensor]]:
    """Yield penalties, first of a lasso, then of a ridge, each weaker than the last, with their slopes."""
    curvature = train.curvature()
    zero_W = torch.zeros(train.h_BW.shape[1])
    strongest = float(train.gradient(zero_W).abs().max())  # of the lasso: the slope is zero
    lasso = [_Penalty(strongest * _LASSO_FACTOR ** (k + 1), 0.0) for k in range(_STRENGTHS)]
    ridge = [_Penalty(0.0, _LARGEST_RIDGE * curvature * _RIDGE_FACTOR**k) for k in range(_STRENGTHS)]
    for penalties in (lasso, ridge):
        slope_W = zero_W
        for penalty in penalties:
            slope_W = _slope(train, curvature, slope_W, penalty)
            yield penalty, slope_W


def _slope(sides: _Sides, curvature: float, start_W: Tensor, penalty: _Penalty) -> Tensor:
    """Return the slope with the least loss and penalty, (W,), by accelerated proximal gradient steps.

    Beck and Teboulle 2009 (FISTA).
    """
    slope_W = ahead_W = start_W
    momentum = 1.0
    for _ in range(_GRADIENT_STEPS):
        moved_W = ahead_W - sides.gradient(ahead_W) / curvature
        new_W = F.softshrink(moved_W, penalty.lasso / curvature) / (1 + penalty.ridge / curvature)
        new_momentum = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead_W = new_W + (momentum - 1) / new_momentum * (new_W - slope_W)
        slope_W, momentum = new_W, new_momentum
    return slope_W


@torch.enable_grad()
def _net_beside(slope_W: Tensor, train: _Sides, check: _Sides, seed: int) -> nn.Module:
    """Return a net whose output, (B, 1), improves the linear logits on `check`; it is 0 if none does."""
    last = nn.Linear(_WIDTH, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, 0, 0, "two-sample classifier").initial_seed())
        net = nn.Sequential(nn.Linear(len(slope_W), _WIDTH), nn.ReLU(), last)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    adam = torch.optim.AdamW(net.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY, fused=True)
    linear_B, check_linear_B = train.h_BW @ slope_W, check.h_BW @ slope_W
    lowest, best, best_update = math.inf, copy.deepcopy(net), 0
    for update in range(_UPDATES):
        if update % _CHECK_EVERY == 0:
            with torch.no_grad():
                loss = float(check.loss(check_linear_B + net(check.h_BW).squeeze(1)))
            if loss < lowest:
                lowest, best, best_update = loss, copy.deepcopy(net), update
            elif update - best_update >= _PATIENCE * _CHECK_EVERY:
                break
        adam.zero_grad()
        torch.autograd.backward(train.loss(linear_B + net(train.h_BW).squeeze(1)))
        adam.step()
    return best.requires_grad_(requires_grad=False)
