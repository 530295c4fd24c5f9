"""The measures of chains, for the catalogue."""

from jebm.report.measure import Measure

__all__ = ["CHAINS"]

CHAINS = (
    Measure(
        "acceptance",
        "acceptance",
        "Share of the steps that a Metropolis check would take; below 0.8 the step size biases the samples.",
        "share",
        "higher",
        3,
    ),
    Measure(
        "f_drift",
        "drift of f",
        "Mean f after {long} steps less that after {short}: 0 where {short} steps are enough.",
        "nats",
    ),
    Measure(
        "f_gap",
        "f by start",
        "Mean f at the end of chains from posterior samples less that of chains from N(0, I): 0, but for "
        "errors, where neither start matters; from 0.5 on, samples miss a part of the prior.",
        "nats",
    ),
    Measure("norm_drift", "drift of |z|", "The same for |z|, from {short} to {long} steps."),
    Measure(
        "norm_ratio",
        "growth of the norm of z",
        "Mean |z| after the long chains over that under N(0, I), where they begin.",
        digits=3,
    ),
    Measure(
        "f_r_hat",
        "split R-hat of f",
        "1 where chains agree with one another and over time; above 1.1 they do not.",
        better="lower",
    ),
    Measure("z_r_hat", "largest split R-hat of z", "The same over the latents.", better="lower"),
    Measure(
        "f_r_hat_both",
        "split R-hat of f, both starts",
        "Over the chains from N(0, I) and those from posterior samples together.",
        better="lower",
    ),
    Measure(
        "z_r_hat_both", "largest split R-hat of z, both starts", "The same over the latents.", better="lower"
    ),
    Measure(
        "f_effective_samples",
        "effective samples of f",
        "Independent draws that tell as much of f as {chains} chains of {long} steps.",
        "samples",
        "higher",
    ),
    Measure(
        "z_effective_samples", "effective samples of z", "The fewest over the latents.", "samples", "higher"
    ),
    Measure(
        "start_left",
        "what is left of the start",
        "(1 - s²/2)^{short}: of the noise that a chain begins with, where f is flat.",
        "share",
        "lower",
    ),
    Measure(
        "stationary_variance",
        "stationary variance",
        "What the chain makes of a variance of 1 where f is flat.",
    ),
    Measure(
        "f_start",
        "f of posterior samples",
        "Mean over {images} images; chains from N(0, I) end at {other_end}.",
        "nats",
    ),
)
