"""Distances between real and generated images, computed on their features.

`Distances` records how many images it was computed from: the Fréchet distance is biased upwards, by about (F
+ 5)/4 tr(C) (1/N + 1/M) for Gaussian features of covariance C = c I, so values at different N are not
comparable, and a value means little without that of real images against real ones (`real_floor`). The kernel
distance is unbiased.

Shapes: N real images, M generated images, B batch, F features, G = F + 1.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from jebm.errors import ConfigError, DivergedError
from jebm.evaluate.estimates import Estimate
from jebm.rng import generator

__all__ = [
    "DensityCoverage",
    "Distances",
    "Moments",
    "PrecisionRecall",
    "density_coverage",
    "distances",
    "frechet_distance",
    "kernel_distance",
    "precision_recall",
    "real_floor",
]

_SUBSET_IMAGES = 1_000
_FEWEST_SUBSETS = 10
_BLOCK_IMAGES = 1_000
"""Images whose features are converted to float64 at a time."""
_PAIRS = 1 << 20
"""Distances held at a time: 4 MB in float32, which fits in the processor's cache."""


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]: generated images that could be real, real images that could be generated."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Density >= 0, about 1 for equal distributions; coverage in [0, 1]."""

    density: float
    coverage: float


class Moments:
    """First and second moments of features, as sums in float64 that add over batches and ranks."""

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        """Start with no images; `sums_GG` is the sum of `[1, x] [1, x]^T` over images x, (G, G), float64."""
        self.sums_GG = torch.zeros(features + 1, features + 1, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, features_NF: Tensor) -> Self:
        """Return the moments of these features."""
        moments = cls(features_NF.shape[1], features_NF.device)
        for features_BF in torch.split(features_NF, _BLOCK_IMAGES):
            moments.add(features_BF)
        return moments

    def add(self, features_BF: Tensor) -> None:
        """Add a batch of images."""
        x_BG = torch.nn.functional.pad(features_BF.double(), (1, 0), value=1.0)
        self.sums_GG += x_BG.T @ x_BG

    @property
    def images(self) -> int:
        """Number of images added."""
        return round(float(self.sums_GG[0, 0]))

    def mean(self) -> Tensor:
        """Return the mean, (F,), float64."""
        mean_F: Tensor = self.sums_GG[0, 1:] / self.sums_GG[0, 0]
        return mean_F

    def covariance(self) -> Tensor:
        """Return the unbiased covariance, (F, F), float64; raises ConfigError for fewer than two images."""
        if self.images < 2:
            raise ConfigError(f"a covariance needs at least 2 images, not {self.images}; take more samples")
        mean_F = self.mean()
        scatter_FF = self.sums_GG[1:, 1:] - self.images * torch.outer(mean_F, mean_F)
        return scatter_FF / (self.images - 1)


def frechet_distance(real: Moments, generated: Moments) -> float:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^½ C2 C1^½)^½), >= 0, of Gaussians with these moments.

    (Dowson and Landau 1982; on features, Heusel et al. 2017.) With any factors C = S S^T the last trace is
    the sum of the singular values of S1^T S2, so that only rounding, clipped here, can make it negative.
    Raises ConfigError for fewer than two images on a side, DivergedError for moments that are not finite.
    """
    root1_FF, root2_FF = _root(real), _root(generated)
    cross = torch.linalg.svdvals(root1_FF.T @ root2_FF).sum()
    spread = root1_FF.square().sum() + root2_FF.square().sum() - 2 * cross
    value = (real.mean() - generated.mean()).square().sum() + spread
    return max(0.0, float(value))


def _root(moments: Moments) -> Tensor:
    """Return S with S S^T = C, (F, F)."""
    covariance_FF = moments.covariance()
    _require_finite(covariance_FF)
    variance_F, direction_FF = torch.linalg.eigh(covariance_FF)
    # Rounding turns a variance of zero into about 1e-16, whose square root, 1e-8, would count.
    least = variance_F[-1] * len(variance_F) * torch.finfo(variance_F.dtype).eps
    root_FF: Tensor = direction_FF * torch.where(variance_F > least, variance_F, 0).sqrt()
    return root_FF


def kernel_distance(real_NF: Tensor, generated_MF: Tensor, *, seed: int = 0) -> Estimate:
    """Return the squared maximum mean discrepancy with the kernel (x·y / F + 1)^3, unbiased: it may be < 0.

    (KID: Bińkowski, Sutherland, Arbel and Gretton 2018.) The mean over subsets of 1,000 images, or fewer if
    there are not ten of that size. The seed draws them; they are disjoint, hence independent, so their spread
    gives the standard error. Images beyond min(N, M) are not used. Raises ConfigError for fewer than 20
    images on a side, DivergedError for features that are not finite.
    """
    _require_finite(real_NF, generated_MF)
    fewest = min(len(real_NF), len(generated_MF))
    size = min(_SUBSET_IMAGES, fewest // _FEWEST_SUBSETS)
    if size < 2:
        raise ConfigError(f"a kernel distance needs at least 20 images, not {fewest}; take more samples")
    subsets = fewest // size
    stream = generator(seed, 0, 0, "kernel distance")
    x_SBF, y_SBF = (
        features[torch.randperm(len(features), generator=stream)[: subsets * size].to(features.device)].view(
            subsets, size, -1
        )
        for features in (real_NF, generated_MF)
    )
    squared_S = torch.stack([_discrepancy(x.double(), y.double()) for x, y in zip(x_SBF, y_SBF, strict=True)])
    return Estimate(float(squared_S.mean()), float(squared_S.std() / math.sqrt(subsets)))


def _discrepancy(x_BF: Tensor, y_BF: Tensor) -> Tensor:
    """Return the U-statistic of the squared discrepancy, (), in which no image is paired with itself."""
    count, features = x_BF.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / features + 1).pow(3)

    def within(a: Tensor) -> Tensor:
        k_BB = kernel(a, a)
        return (k_BB.sum() - k_BB.diagonal().sum()) / (count * (count - 1))

    return within(x_BF) + within(y_BF) - 2 * kernel(x_BF, y_BF).mean()


def precision_recall(real_NF: Tensor, generated_MF: Tensor, *, neighbours: int = 3) -> PrecisionRecall:
    """Return improved precision and recall (Kynkäänniemi, Karras, Laine, Lehtinen and Aila 2019).

    Each side's support is the union of balls around its images that reach to the k-th nearest neighbour on
    the same side, k = `neighbours`; precision is the share of generated images in the support of the real
    ones, recall the share of real ones in the support of the generated. Raises ConfigError for k images or
    fewer on a side, DivergedError for features that are not finite.
    """
    real_NF, generated_MF = _centred(real_NF, generated_MF)
    radius_N, radius_M = _radii(real_NF, neighbours), _radii(generated_MF, neighbours)
    recalled_N = torch.zeros(len(real_NF), dtype=torch.bool, device=real_NF.device)
    precise = 0
    for begin, squared_BN in _squared_distances(generated_MF, real_NF):
        precise += int((squared_BN <= radius_N).any(1).sum())
        recalled_N |= (squared_BN <= radius_M[begin : begin + len(squared_BN), None]).any(0)
    return PrecisionRecall(precise / len(generated_MF), int(recalled_N.sum()) / len(real_NF))


def density_coverage(real_NF: Tensor, generated_MF: Tensor, *, neighbours: int = 5) -> DensityCoverage:
    """Return density and coverage (Naeem, Oh, Uh, Choi and Yoo 2020).

    With the real images' balls as in `precision_recall`: density is the mean number of balls that contain a
    generated image, divided by k; coverage is the share of real images whose ball contains at least one. For
    equal distributions their expectations are 1 and 1 - prod_{i=1..k} (N - i) / (N + M - i): 0.969 for N = M,
    k = 5. Raises as `precision_recall`.
    """
    real_NF, generated_MF = _centred(real_NF, generated_MF)
    radius_N = _radii(real_NF, neighbours)
    covered_N = torch.zeros(len(real_NF), dtype=torch.bool, device=real_NF.device)
    held = 0
    for _, squared_BN in _squared_distances(generated_MF, real_NF):
        within_BN = squared_BN <= radius_N
        held += int(within_BN.sum())
        covered_N |= within_BN.any(0)
    return DensityCoverage(held / (neighbours * len(generated_MF)), int(covered_N.sum()) / len(real_NF))


def _centred(real_NF: Tensor, generated_MF: Tensor) -> tuple[Tensor, Tensor]:
    """Return both minus the real mean, which avoids cancellation in |x|^2 + |y|^2 - 2 x·y."""
    _require_finite(real_NF, generated_MF)
    mean_F = real_NF.mean(0)
    return real_NF - mean_F, generated_MF - mean_F


def _radii(x_NF: Tensor, neighbours: int) -> Tensor:
    """Return each row's squared distance to its k-th nearest other row, (N,)."""
    if len(x_NF) <= neighbours:
        raise ConfigError(f"the {neighbours} nearest of {len(x_NF)} images do not exist; take more samples")
    nearest = []
    for begin, squared_BN in _squared_distances(x_NF, x_NF):
        squared_BN[:, begin:].fill_diagonal_(math.inf)
        nearest.append(squared_BN.topk(neighbours, largest=False).values[:, -1])
    return torch.cat(nearest)


def _squared_distances(x_MF: Tensor, y_NF: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield |x - y|^2 of some x and all y, (B, N), and the index of the first x."""
    y_norm_N = y_NF.square().sum(1)
    rows = max(1, _PAIRS // len(y_NF))
    for begin in range(0, len(x_MF), rows):
        x_BF = x_MF[begin : begin + rows]
        norms_BN = x_BF.square().sum(1)[:, None] + y_norm_N
        yield begin, norms_BN.addmm_(x_BF, y_NF.T, alpha=-2).clamp_(min=0)


def _require_finite(*features: Tensor) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in features):
        raise DivergedError("features of images are not finite; look for pixels that are not")


@dataclass(frozen=True)
class Distances:
    """All distances between generated and real images, and the numbers of images behind them."""

    n: int
    n_real: int
    frechet: float
    kid: float
    kid_standard_error: float
    precision: float
    recall: float
    density: float
    coverage: float


def distances(real_NF: Tensor, generated_MF: Tensor, *, seed: int = 0) -> Distances:
    """Return all distances between two sets of features; raises as the functions that compute them."""
    kid = kernel_distance(real_NF, generated_MF, seed=seed)
    precision, recall = precision_recall(real_NF, generated_MF)
    density, coverage = density_coverage(real_NF, generated_MF)
    return Distances(
        n=len(generated_MF),
        n_real=len(real_NF),
        frechet=frechet_distance(Moments.of(real_NF), Moments.of(generated_MF)),
        kid=kid.value,
        kid_standard_error=kid.standard_error,
        precision=precision,
        recall=recall,
        density=density,
        coverage=coverage,
    )


def real_floor(real_NF: Tensor, *, seed: int = 0) -> Distances:
    """Return the distances between two disjoint halves of real images: no generator can do better.

    The seed draws the halves. They have N / 2 images each, so their Fréchet distance is more biased than that
    of samples compared with all N. Raises as the functions that compute the distances.
    """
    stream = generator(seed, 0, 0, "real floor")
    order_N = torch.randperm(len(real_NF), generator=stream).to(real_NF.device)
    half = len(real_NF) // 2
    return distances(real_NF[order_N[:half]], real_NF[order_N[half : 2 * half]], seed=seed)
