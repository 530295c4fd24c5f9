"""The prior against the aggregate posterior as latents: how well a classifier tells them apart.

Shapes: N samples, D latent width of all layers together.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from jebm.core.prior import sample_prior
from jebm.evaluate.subject import Subject
from jebm.evaluate.two_sample import two_sample_auc

__all__ = ["LatentSamples", "latent_samples"]

_MOST_SAMPLES = 1_000
"""An AUC depends on the number of samples, so reports, the quick look and comparisons use the same."""


class LatentSamples(NamedTuple):
    """As many latents of the prior as of the aggregate posterior."""

    prior_ND: Tensor
    posterior_ND: Tensor
    seed: int

    def auc(self, columns: Sequence[int] | None = None) -> float:
        """Return the two-sample AUC of these columns, by default of all: 0.5 if nothing tells them apart."""
        chosen = slice(None) if columns is None else list(columns)
        return two_sample_auc(self.prior_ND[:, chosen], self.posterior_ND[:, chosen], seed=self.seed)


@torch.no_grad()
def latent_samples(subject: Subject, *, factor: int) -> LatentSamples:
    """Return up to 1,000 a side: after chains of `factor` times `langevin.steps`, and of q(z|x)."""
    count, langevin = min(_MOST_SAMPLES, len(subject.images_NHWC)), subject.config.langevin
    posterior_ND = subject.posterior_codes(count, subject.noise(0, "two-sample posterior"))
    longer = replace(langevin, steps=factor * langevin.steps)
    prior_ND, _ = sample_prior(subject.model, longer, count, subject.noise(0, "two-sample prior"))
    return LatentSamples(prior_ND, posterior_ND, subject.seed)
