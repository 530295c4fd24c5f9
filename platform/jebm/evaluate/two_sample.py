"""Can a classifier tell samples of two distributions apart? If not, they agree as far as it can see.

Applied to latents: samples of the prior against the aggregate posterior, the mean of q(z|x) over images. A
good prior equals the aggregate posterior; what a classifier finds is where the prior is wrong.

Shapes: N and M samples, B both together, D latent width.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jebm.evaluate.ood import auroc
from jebm.rng import generator

__all__ = ["two_sample_auc"]

_WIDTH = 64
_UPDATES = 200
_LEARNING_RATE = 1e-2
_WEIGHT_DECAY = 0.02
_CHECK_EVERY = 10


@torch.enable_grad()
def two_sample_auc(one_ND: Tensor, other_MD: Tensor, *, seed: int = 0) -> float:
    """Return the area under the ROC curve of a classifier that tells `one` from `other`: 0.5 if it cannot.

    A net with one hidden layer is trained on half of the samples and tested on the other half, then with the
    halves swapped; the mean of both (Lopez-Paz and Oquab 2017, with the AUC in place of the accuracy). Chance
    may take it a little below 0.5. It is a lower bound of the best classifier's, and lower for fewer samples:
    compare only values with the same numbers of samples. NaN if a sample is not finite or a side has fewer
    than eight.
    """
    if min(len(one_ND), len(other_MD)) < 8 or not (one_ND.isfinite().all() and other_MD.isfinite().all()):
        return float("nan")
    areas = []
    for fold in range(2):
        seen, unseen = ([side.float().cpu()[k::2] for side in (one_ND, other_MD)] for k in (fold, 1 - fold))
        score = _trained(seen[0], seen[1], seed + fold)
        areas.append(auroc(score(unseen[0]), score(unseen[1])))
    return sum(areas) / 2


class _Classifier(nn.Module):
    """One logit of standardised samples and their squares: linear, plus one hidden layer that begins at zero.

    The linear part by itself separates distributions that differ in mean or spread, with little to overfit.
    """

    def __init__(self, train_BD: Tensor) -> None:
        super().__init__()
        self.mean_D, self.std_D = train_BD.mean(0), train_BD.std(0).clamp(min=1e-6)
        width = 2 * train_BD.shape[1]
        self.linear = nn.Linear(width, 1)
        last = nn.Linear(_WIDTH, 1)
        self.hidden = nn.Sequential(nn.Linear(width, _WIDTH), nn.ReLU(), last)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(last.weight)

    def forward(self, z_BD: Tensor) -> Tensor:
        """Return logits, (B,)."""
        scaled_BD = (z_BD - self.mean_D) / self.std_D
        h = torch.cat([scaled_BD, scaled_BD.square() - 1], 1)
        logit_B: Tensor = (self.linear(h) + self.hidden(h)).squeeze(1)
        return logit_B


def _trained(one_ND: Tensor, other_MD: Tensor, seed: int) -> _Classifier:
    """Return the net at its best loss on every fourth sample, which is kept out of training."""
    kept = [torch.arange(len(side)) % 4 != 3 for side in (one_ND, other_MD)]
    sides = ((one_ND[kept[0]], other_MD[kept[1]]), (one_ND[~kept[0]], other_MD[~kept[1]]))
    train_BD, check_BD = (torch.cat(pair) for pair in sides)
    (target_B, weight_B), (check_target_B, check_weight_B) = (_targets(*pair) for pair in sides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, 0, 0, "two-sample classifier").initial_seed())
        net = _Classifier(train_BD)
    adam = torch.optim.AdamW(net.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY, fused=True)
    lowest, best = float("inf"), copy.deepcopy(net)
    for update in range(_UPDATES):
        if update % _CHECK_EVERY == 0:
            with torch.no_grad():
                check = float(_loss(net(check_BD), check_target_B, check_weight_B))
            if check < lowest:
                lowest, best = check, copy.deepcopy(net)
        adam.zero_grad()
        torch.autograd.backward(_loss(net(train_BD), target_B, weight_B))
        adam.step()
    return best.requires_grad_(requires_grad=False)


def _targets(one_ND: Tensor, other_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Return classes and weights, (B,): both sides weigh the same, whatever their numbers of samples."""
    target_B = torch.cat([torch.ones(len(one_ND)), torch.zeros(len(other_MD))])
    weight_B = torch.where(target_B == 1, 0.5 / max(1, len(one_ND)), 0.5 / max(1, len(other_MD)))
    return target_B, weight_B


def _loss(logit_B: Tensor, target_B: Tensor, weight_B: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logit_B, target_B, weight_B, reduction="sum")
