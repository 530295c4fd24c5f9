"""The section on known factors: what each layer's code tells of each of them.

Shapes: N images, B batch, D latent width of all layers together, F factors, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from jebm.data.dataset import ImageSet
from jebm.errors import DataError
from jebm.evaluate.estimates import Estimate, Means
from jebm.evaluate.factors import BINS, Information, information
from jebm.evaluate.hierarchy import LatentClassifiers, train_code_classifiers
from jebm.evaluate.subject import Subject
from jebm.report.catalogue import figure
from jebm.report.findings import Measured, Section, Table
from jebm.rng import generator

__all__ = ["factors_section"]

_MEASURES = ("factors_told", "mig", "disentanglement", "completeness")
_TRAINING_IMAGES = 20_000
_UPDATES = 2_000
_BATCH = 128


@dataclass(frozen=True)
class _Codes:
    """Posterior means of images and their factors, on the device."""

    code_ND: Tensor
    factors_NF: Tensor


@dataclass(frozen=True)
class _Probe:
    """How well each layer's classifier tells one factor."""

    name: str
    categories: int
    most_frequent: float
    """Share of the most frequent category: what a constant answer gets right."""
    accuracies: Sequence[Estimate]
    """Of each layer, bottom first."""

    def told(self, layer: int) -> float:
        """Return the share that a layer's classifier gets right of what a constant answer gets wrong."""
        left = 1 - self.most_frequent
        return max(0.0, self.accuracies[layer].value - self.most_frequent) / left if left else 0.0


@torch.no_grad()
def factors_section(subject: Subject, *, full: bool = True) -> Section:
    """Return what each layer tells of each factor: probes, MIG, and DCI of mutual information.

    The images have factors, the same as the training images: `suite.check`.
    """
    # Probes learn from training images; everything is measured on the others.
    seen = _codes(subject, subject.train, min(_TRAINING_IMAGES, len(subject.train.images_NHWC)))
    unseen = _codes(subject, subject.images, len(subject.images_NHWC))
    factors = subject.images.manifest.factors
    probes = [
        _probe(subject, index, factor.name, len(factor.categories), (seen, unseen))
        for index, factor in enumerate(factors)
    ]
    found = information(unseen.code_ND, unseen.factors_NF, [len(factor.categories) for factor in factors])
    # A row for each layer, bottom first.
    rows = [
        (
            sum(probe.told(layer) for probe in probes) / len(probes),
            *(part.gap(), part.disentanglement(), part.completeness()),
        )
        for layer, part in enumerate(map(found.of, subject.layer_columns))
    ]
    return Section(
        "factors",
        "Factors",
        f"What each latent layer tells of {len(factors)} known factors. Factors that tell one another, such "
        "as a style and its family, keep disentanglement below 1.",
        figures=tuple(
            figure(measure, row[index], layer=layer)
            for index, measure in enumerate(_MEASURES)
            for layer, row in zip(subject.layers, rows, strict=True)
        ),
        tables=(_accuracies(subject, probes), _latents(subject, probes, found)),
    )


def _codes(subject: Subject, images: ImageSet, count: int) -> _Codes:
    """Return the posterior means of the first images of a set, with their factors."""

    def values(_position: int, rows: slice) -> Tensor:
        return subject.model.mean_code(subject.batch(rows, images.images_NHWC))

    code_ND = subject.rows(count, subject.model.latent_dim, values).float().to(subject.device)
    if images.factors_NF is None:
        raise DataError(f"{images.manifest.name} ({images.manifest.split}): has no factors")
    numbers_NF = torch.from_numpy(images.factors_NF[:count].astype(np.int64))
    return _Codes(code_ND, numbers_NF.to(subject.device))


def _probe(subject: Subject, index: int, name: str, categories: int, sets: tuple[_Codes, _Codes]) -> _Probe:
    """Train a classifier of one factor for each layer on the first set, and measure it on the second."""
    seen, unseen = sets

    def batch(step: int) -> tuple[Tensor, Tensor]:
        stream = generator(subject.seed, 0, step, f"images of the probe of {name}")
        chosen_B = torch.randint(len(seen.code_ND), (_BATCH,), generator=stream).to(subject.device)
        return seen.code_ND[chosen_B], seen.factors_NF[chosen_B, index]

    probe = LatentClassifiers.initial(subject.model.latent_dims, categories, subject.seed)
    with torch.enable_grad():
        train_code_classifiers(probe.to(subject.device), batch, updates=_UPDATES)
    truth_N = unseen.factors_NF[:, index]
    means = Means(len(subject.layers))
    means.add((probe(unseen.code_ND).argmax(2) == truth_N).T.cpu())
    return _Probe(name, categories, float(truth_N.bincount().max()) / len(truth_N), means.result())


def _accuracies(subject: Subject, probes: Sequence[_Probe]) -> Table:
    return Table(
        "Accuracy of each layer, by factor",
        ("factor", "categories", "most frequent", *subject.layers),
        tuple(
            (each.name, each.categories, each.most_frequent, *(Measured(*one) for one in each.accuracies))
            for each in probes
        ),
        "Of a classifier of the layer's posterior mean alone (linear to 256, ReLU, linear; "
        f"{_UPDATES:,} updates). Most frequent: share of the most frequent category, which a constant answer "
        "gets right. ± is a standard error.",
    )


def _latents(subject: Subject, probes: Sequence[_Probe], found: Information) -> Table:
    """Return the single latent of each layer that tells most of each factor."""
    share_DF = found.shared_DF / found.entropy_F.clamp(min=torch.finfo(torch.float64).tiny)
    best_LF = [share_DF[columns].max(0).values.tolist() for columns in subject.layer_columns]
    return Table(
        "What the best latent of each layer tells, by factor",
        ("factor", *subject.layers),
        tuple((probe.name, *(row[index] for row in best_LF)) for index, probe in enumerate(probes)),
        f"Mutual information of one latent, in {BINS} bins of equal width, with the factor, over the "
        "factor's entropy; the most over the layer's latents. MIG, disentanglement and completeness are made "
        "of such information. It is too large for few images, most for factors of rare categories.",
    )
