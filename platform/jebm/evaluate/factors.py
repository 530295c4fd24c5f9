"""What a code tells of known factors, latent by latent: mutual information, MIG, DCI.

A factor is a category of an image, such as its hair (`jebm.data.factors`). Information is in nats, estimated
from histograms: of `BINS` bins of equal width over a latent's range, as in Locatello et al. (arXiv
1811.12359). Of N images it is too large by about (bins - 1)(categories - 1)/(2N), alike for all latents.

Shapes: N images, D latents of the code, F factors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BINS", "Information", "information"]

BINS = 20


@dataclass(frozen=True)
class Information:
    """The mutual information of each latent and each factor."""

    shared_DF: Tensor
    """Nats, at least 0, float64."""
    entropy_F: Tensor
    """The factors' entropies, nats, float64."""

    def of(self, columns: Sequence[int]) -> "Information":
        """Return that of some latents alone, such as a layer's."""
        return Information(self.shared_DF[list(columns)], self.entropy_F)

    def gap(self) -> float:
        """Return the mutual information gap (MIG; Chen et al., arXiv 1802.04942, eq. 6), in [0, 1].

        The mean over factors of the difference between the two latents that tell most of it, over the
        factor's entropy; with one latent, the second tells nothing. NaN if no factor varies.
        """
        varies_F = self.entropy_F > 0
        padded_DF = torch.cat([self.shared_DF, torch.zeros_like(self.shared_DF[:1])])
        first_F, second_F = padded_DF.topk(2, dim=0).values
        return float(((first_F - second_F) / self.entropy_F)[varies_F].mean())

    def disentanglement(self) -> float:
        """Return how far each latent tells one factor alone (DCI's D; Eastwood and Williams 2018), in [0, 1].

        One less the entropy, to base F, of a latent's information over factors; the mean over latents,
        weighted by what they tell. NaN with one factor, or if nothing is told.
        """
        return _concentration(self.shared_DF)

    def completeness(self) -> float:
        """Return how far each factor is told by one latent alone (DCI's C), in [0, 1].

        As `disentanglement`, of a factor's information over latents; NaN with one latent.
        """
        return _concentration(self.shared_DF.T)


def _concentration(shared_RC: Tensor) -> float:
    """Return the mean over rows, weighted by their sums, of 1 - entropy over columns to base C."""
    rows_R, columns = shared_RC.sum(1), shared_RC.shape[1]
    if columns < 2 or not rows_R.sum() > 0:
        return float("nan")
    kept_RC, weight_R = shared_RC[rows_R > 0], rows_R[rows_R > 0]
    entropy_R = torch.special.entr(kept_RC / weight_R[:, None]).sum(1)
    base = torch.tensor(float(columns), dtype=shared_RC.dtype).log()
    return float(((1 - entropy_R / base) * weight_R).sum() / weight_R.sum())


def information(code_ND: Tensor, factors_NF: Tensor, categories: Sequence[int]) -> Information:
    """Return what each latent of a code tells of each factor.

    `factors_NF` are the factors' numbers, int64; `categories` how many there are of each.
    """
    bins_ND = _binned(code_ND.double())
    shared = []
    for factor, count in enumerate(categories):
        # One histogram of bins against categories for each latent.
        cell_ND = bins_ND * count + factors_NF[:, factor, None]
        joint_D = [torch.bincount(cell_N, minlength=BINS * count).view(BINS, count) for cell_N in cell_ND.T]
        shared.append(torch.stack([_shared(counts.double()) for counts in joint_D]))
    frequencies = [
        torch.bincount(factors_NF[:, factor], minlength=count).double() / len(factors_NF)
        for factor, count in enumerate(categories)
    ]
    return Information(
        torch.stack(shared, 1), torch.stack([torch.special.entr(each).sum() for each in frequencies])
    )


def _binned(code_ND: Tensor) -> Tensor:
    """Return each value's bin of its latent's range, int64, from 0 to BINS - 1."""
    low_D, high_D = code_ND.aminmax(dim=0)
    width_D = ((high_D - low_D) / BINS).clamp(min=torch.finfo(code_ND.dtype).tiny)
    bins_ND: Tensor = ((code_ND - low_D) / width_D).long().clamp(0, BINS - 1)
    return bins_ND


def _shared(counts: Tensor) -> Tensor:
    """Return the mutual information of the rows and columns of a table of counts, at least 0."""
    joint = counts / counts.sum()
    entropies = (torch.special.entr(part).sum() for part in (joint.sum(0), joint.sum(1), joint))
    columns, rows, both = entropies
    shared: Tensor = columns + rows - both
    return shared.clamp(min=0)
