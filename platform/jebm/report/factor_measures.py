"""The measures of known factors in the catalogue."""

from jebm.report.measure import Measure

__all__ = ["FACTORS"]

FACTORS = (
    Measure(
        "factors_told",
        "factors told, {layer}",
        "What a classifier of this layer's code gets right of what the most frequent category gets wrong; "
        "the mean over factors.",
        "share",
        digits=3,
    ),
    Measure(
        "mig",
        "MIG, {layer}",
        "Mutual information gap: how much more of a factor its best latent of this layer tells than the "
        "second best, over the factor's entropy.",
        "share",
        "higher",
        3,
    ),
    Measure(
        "disentanglement",
        "disentanglement, {layer}",
        "How far each latent of this layer tells one factor alone (DCI's D, of mutual information); 1 if "
        "each does.",
        "share",
        "higher",
        3,
    ),
    Measure(
        "completeness",
        "completeness, {layer}",
        "How far each factor is told by one latent of this layer alone (DCI's C); 1 if each is.",
        "share",
        "higher",
        3,
    ),
)
