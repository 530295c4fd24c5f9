"""Arms against one another over seeds: what is measured of each model, and which claims that supports.

Arms are paired: for a seed they begin with the same weights of generator and inference net, and see the same
images and noise in the same order. So the differences within a seed are what is tested. The gates are
conditions under which a difference means something at all: a prior whose chains run away, or whose log Z
hangs on a few weights, can look better than it is.

Shapes: N images, B batch, C channels, H rows, W columns, D latent width, T recorded times of chains.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from jebm.config import Config
from jebm.core.model import JointModel
from jebm.core.objective import reconstruct
from jebm.core.prior import sample_prior
from jebm.data.dataset import ImageSet
from jebm.data.loader import to_float
from jebm.evaluate.chains import Estimate, run_chains
from jebm.evaluate.features import FeatureNet
from jebm.evaluate.hierarchy import tilt_of
from jebm.evaluate.likelihood import likelihood, log_partition_annealed, log_partition_reverse
from jebm.evaluate.samples import BATCH, image_features, sample_quality
from jebm.evaluate.statistics import Interval, PairedTest, Ratio, paired_ratio, paired_t_test, t_interval
from jebm.evaluate.two_sample import two_sample_auc
from jebm.rng import Noise, gaussian_noise

__all__ = [
    "GATES",
    "LONG_STEPS",
    "REFERENCE",
    "Claim",
    "Comparison",
    "Contrast",
    "Gate",
    "Measure",
    "Row",
    "compare",
    "document",
    "finite",
    "long_factor",
    "markdown",
    "measure_model",
    "measures",
]

REFERENCE = "gaussian"
"""The arm that the others are held against."""

LONG_STEPS = 2_000
"""Steps that long chains have at least, by the gates below."""

Row = dict[str, float]
"""The measures of one model by name; NaN where one does not exist. Of a run that diverged: empty."""


# ----------------------------------------------------------------------------------------- of one model


@dataclass(frozen=True)
class Measure:
    """A number that is taken of every model."""

    name: str
    title: str
    better: Literal["lower", "higher"] | None
    digits: int
    """Shown after the point."""
    meaning: str
    ratio: bool = False
    """Whether the arms' ratio says more than their difference."""


def measures(layers: int) -> tuple[Measure, ...]:
    """Return the measures of a model with so many latent layers, in the order of the table."""
    nats = "nats for one image"
    rates = (
        Measure(f"rate_{i}", f"rate, layer {i}", None, 2, f"KL(q(z{i}|x) ‖ N(0, I)), {nats}")
        for i in range(1, layers + 1)
    )
    return (
        Measure("distortion", "distortion", "lower", 2, f"-E_q[log p(x|z)] with all constants, {nats}"),
        Measure("mse", "MSE", "lower", 4, "of reconstructions at the mean of q(z|x), pixels in [-1, 1]"),
        *rates,
        Measure("active_units", "active units", None, 1, "latents whose posterior mean moves"),
        Measure("gain", "ELBO gain", "higher", 2, f"E_q[f] - log Z, log Z annealed up from N(0, I), {nats}"),
        Measure(
            "gain_reverse",
            "ELBO gain, other side",
            "higher",
            2,
            "the same with log Z annealed down from the prior: the truth lies between the two",
        ),
        Measure("elbo", "ELBO", "higher", 2, f"gain - distortion - rates, {nats}"),
        Measure("ais_share", "AIS effective share", None, 2, "of annealed chains: how far to trust log Z"),
        Measure("acceptance", "acceptance", None, 3, "of a Metropolis check of the Langevin steps"),
        Measure("f_drift", "drift of f", None, 2, "mean f after the long chains less after the short, nats"),
        Measure(
            "norm_ratio", "norm of z", None, 3, "mean of it after the long chains, over that under N(0, I)"
        ),
        Measure(
            "auc",
            "two-sample AUC",
            "lower",
            3,
            "of a classifier of prior against posterior latents; 0.5: it cannot tell",
        ),
        Measure("auc_long", "two-sample AUC, long chains", "lower", 3, "the same after the long chains"),
        Measure("frechet", "Fréchet", "lower", 2, "prior samples against held-out images", ratio=True),
        Measure("frechet_long", "Fréchet, long chains", "lower", 2, "after the long chains", ratio=True),
        Measure(
            "frechet_posterior",
            "Fréchet to posterior",
            "lower",
            2,
            "images of prior samples against images of posterior samples: the prior's part alone",
            ratio=True,
        ),
        Measure(
            "frechet_posterior_long",
            "Fréchet to posterior, long chains",
            "lower",
            2,
            "after the long chains",
            ratio=True,
        ),
        Measure("kid", "100 KID", "lower", 2, "kernel distance of prior samples to held-out images"),
        Measure("kid_long", "100 KID, long chains", "lower", 2, "after the long chains"),
        Measure("precision", "precision", "higher", 3, "share of samples that could be real"),
        Measure("precision_long", "precision, long chains", "higher", 3, "after the long chains"),
        Measure("recall", "recall", "higher", 3, "share of real images that could be samples"),
        Measure("recall_long", "recall, long chains", "higher", 3, "after the long chains"),
        Measure(
            "frechet_reconstructions",
            "Fréchet of reconstructions",
            "lower",
            2,
            "what the decoder alone can do",
        ),
        Measure("frechet_floor", "Fréchet of real images", None, 2, "one half against the other: the floor"),
    )


def long_factor(config: Config) -> int:
    """Return the length of the long chains in multiples of `langevin.steps`: the first to `LONG_STEPS`.

    At least 2; `evaluation.chain_factor` has no say, so that comparisons agree on what is long.
    """
    return max(2, -(-LONG_STEPS // config.langevin.steps))


@torch.no_grad()
def measure_model(model: JointModel, config: Config, held_out: ImageSet, net: FeatureNet) -> Row:
    """Return all `measures` of a model on held-out images, by name.

    Distances are taken with the first `evaluation.samples` images. Noise depends on `run.seed` alone, so that
    the models of one seed see the same.

    Raises:
        ConfigError: too few held-out images for a distance.
    """
    device = next(model.parameters()).device
    noise = gaussian_noise(config.run.seed, 0, device)
    images_NHWC = held_out.images_NHWC
    compared_NHWC = images_NHWC[: config.evaluation.samples]
    factor = long_factor(config)
    sampler, log_z = _sampler(model, config, noise)

    def batches() -> Iterator[Tensor]:
        for first in range(0, len(images_NHWC), BATCH):
            yield to_float(images_NHWC[first : first + BATCH].copy(), device)  # of read-only memory

    found = likelihood(model, batches(), noise, log_z)
    squares = sum(
        float((reconstruct(model, x_BCHW) - x_BCHW).double().square().sum()) for x_BCHW in batches()
    )
    quality = sample_quality(
        model,
        config.langevin,
        compared_NHWC,
        image_features(compared_NHWC, net),
        net,
        noise,
        count=config.evaluation.samples,
        chain_factor=factor,
    )
    short, long = quality["samples"], quality["samples_long"]
    values: dict[str, float | None] = {
        "distortion": found.distortion.value,
        "mse": squares / images_NHWC.size,
        **{f"rate_{i}": rate.value for i, rate in enumerate(found.rate_L, 1)},
        "active_units": float(sum(found.active_units)),
        "gain": found.gain.value,
        "elbo": found.elbo.value,
        **sampler,
        "gain_reverse": found.f_posterior.value - sampler["log_z_reverse"],
        **_two_samples(model, config, compared_NHWC.shape[0], batches(), noise),
        **{name: short[name] for name in ("frechet", "precision", "recall")},
        **{f"{name}_long": long[name] for name in ("frechet", "precision", "recall")},
        "frechet_posterior": quality["samples_to_posterior"]["frechet"],
        "frechet_posterior_long": quality["samples_long_to_posterior"]["frechet"],
        "kid": None if short["kid"] is None else 100 * short["kid"],
        "kid_long": None if long["kid"] is None else 100 * long["kid"],
        "frechet_reconstructions": quality["reconstructions"]["frechet"],
        "frechet_floor": quality["real_floor"]["frechet"],
    }
    numbers = {name: math.nan if value is None else float(value) for name, value in values.items()}
    return {measure.name: numbers[measure.name] for measure in measures(len(model.latent_dims))}


_CHAINS = 1_000


def _sampler(model: JointModel, config: Config, noise: Noise) -> tuple[dict[str, float], Estimate]:
    """Return what there is to say of the prior's chains, and log Z: of the Gaussian prior, exact."""
    tilt = tilt_of(model)
    if tilt is None:
        exact = {"log_z_reverse": 0.0, "ais_share": 1.0, "acceptance": 1.0, "f_drift": 0.0, "norm_ratio": 1.0}
        return exact, Estimate(0.0, 0.0)
    lower = log_partition_annealed(tilt, model.latent_dim, noise(0, "log Z"))
    upper = log_partition_reverse(tilt, lower.end_BD, noise(0, "log Z, reverse"))
    short, long = config.langevin.steps, long_factor(config) * config.langevin.steps
    trace = run_chains(
        tilt,
        noise(0, "chain start")(_CHAINS, model.latent_dim),
        noise(0, "chain"),
        steps=long,
        step_size=config.langevin.step_size,
        every=short,
    )
    mean_f_T, mean_norm_T = trace.f_TB.double().mean(1), trace.z_TBD.double().norm(dim=2).mean(1)
    figures = {
        "log_z_reverse": upper.log_z.value,
        "ais_share": lower.effective_share,
        "acceptance": trace.acceptance,
        "f_drift": float(mean_f_T[-1] - mean_f_T[1]),
        "norm_ratio": float(mean_norm_T[-1] / mean_norm_T[0]),  # chains start in N(0, I)
    }
    return figures, lower.log_z


def _two_samples(
    model: JointModel, config: Config, count: int, batches: Iterator[Tensor], noise: Noise
) -> dict[str, float]:
    """Return how well a classifier tells `count` latents of the prior from as many of posteriors."""
    parts: list[Tensor] = []
    for position, x_BCHW in enumerate(batches):
        if position * BATCH >= count:
            break
        posterior = model.inference(x_BCHW)
        parts.append(posterior.rsample(noise(position, "two-sample posterior")(*posterior.mean_BD.shape)))
    posterior_ND = torch.cat(parts)[:count]

    def auc(steps: int) -> float:
        langevin = replace(config.langevin, steps=steps)
        prior_ND, _ = sample_prior(model, langevin, count, noise(0, "two-sample prior"))
        return two_sample_auc(prior_ND, posterior_ND, seed=config.run.seed)

    short = auc(config.langevin.steps)
    # Samples of the Gaussian prior are exact, and need no chain.
    long = short if model.energy is None else auc(long_factor(config) * config.langevin.steps)
    return {"auc": short, "auc_long": long}


# -------------------------------------------------------------------------------------------- of all arms


@dataclass(frozen=True)
class Gate:
    """A condition that a model has to meet before its figures are believed."""

    title: str
    passes: Callable[[Row, Row], bool]
    """Of the model's row and of the Gaussian prior's of the same seed; NaN passes nothing."""


GATES: tuple[Gate, ...] = (
    Gate("mean f moves by less than 0.5 nats in the long chains", lambda row, _: abs(row["f_drift"]) < 0.5),
    Gate(
        "Fréchet after the long chains is below the Gaussian prior's",
        lambda row, gaussian: row["frechet_long"] < gaussian["frechet_long"],
    ),
    Gate(
        "norm of z after the long chains is below 1.5 times the Gaussian prior's",
        lambda row, gaussian: row["norm_ratio"] < 1.5 * gaussian["norm_ratio"],
    ),
    Gate(
        "MSE is at most 10 % above the Gaussian prior's",
        lambda row, gaussian: row["mse"] <= 1.1 * gaussian["mse"],
    ),
    Gate("AIS effective share is at least 20 %", lambda row, _: row["ais_share"] >= 0.2),
)


@dataclass(frozen=True)
class Contrast:
    """A measure of one arm against the same of another, over the seeds that have both."""

    test: PairedTest
    ratio: Ratio | None
    """Where the ratio says more, and all values are positive."""


@dataclass(frozen=True)
class Claim:
    """A sentence that the figures support, contradict, or leave open."""

    arm: str
    against: str
    measure: str
    verdict: Literal["holds", "open", "contradicted"]
    sentence: str


@dataclass(frozen=True)
class Comparison:
    """What the rows of all arms and seeds come to."""

    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    measures: tuple[Measure, ...]
    means: Mapping[str, Mapping[str, Interval]]
    """arm -> measure -> mean over the seeds that have it."""
    diverged: Mapping[str, tuple[int, ...]]
    """arm -> seeds whose training diverged."""
    contrasts: Mapping[str, Mapping[str, Contrast]]
    """arm -> measure -> against the Gaussian prior."""
    gates: Mapping[str, Mapping[str, int]]
    """arm -> gate -> seeds that pass, of all."""
    claims: tuple[Claim, ...]


_CLAIMS = (
    ("frechet", "prior samples are nearer to held-out images"),
    ("frechet_long", "prior samples of long chains are nearer to held-out images"),
    ("frechet_posterior_long", "images of long chains are nearer to images of posterior samples"),
    ("auc_long", "the prior of long chains is harder to tell from the aggregate posterior"),
    ("elbo", "the normalised ELBO is higher"),
)
"""Measure, and what is claimed of an arm where it is better."""

_GAIN_CLAIM = ("gain_reverse", "the tilt adds to the ELBO, by the bound that does not flatter it")

_JOINT_AGAINST_TOP = ("joint", "top")
"""The paper's claim against LEBM: an energy over all layers models more than one over the top layer."""


def compare(rows: Mapping[str, Mapping[int, Row]], layers: int) -> Comparison:
    """Return the comparison of arm -> seed -> row; all arms have the same seeds, `REFERENCE` is one of them.

    The row of a run that diverged is empty: it passes no gate, is left out of means and pairs, and its arm's
    claims do not hold.
    """
    arms, seeds = tuple(rows), tuple(rows[REFERENCE])
    all_measures = measures(layers)
    others = [arm for arm in arms if arm != REFERENCE]
    means: dict[str, dict[str, Interval]] = {}
    for arm in arms:
        values = {m.name: list(_values(rows[arm], m.name).values()) for m in all_measures}
        means[arm] = {name: t_interval(found) for name, found in values.items() if found}
    contrasts = {arm: _contrasts(rows[arm], rows[REFERENCE], all_measures) for arm in others}
    gates = {
        arm: {
            gate.title: sum(
                bool(rows[arm][seed] and rows[REFERENCE][seed])
                and gate.passes(rows[arm][seed], rows[REFERENCE][seed])
                for seed in seeds
            )
            for gate in GATES
        }
        for arm in others
    }
    diverged = {arm: tuple(seed for seed in seeds if not rows[arm][seed]) for arm in arms}
    by_name = {m.name: m for m in all_measures}
    pairs = [(arm, REFERENCE, name, text) for arm in others for name, text in (*_CLAIMS, _GAIN_CLAIM)]
    joint, top = _JOINT_AGAINST_TOP
    if {joint, top} <= set(arms):
        pairs += [(joint, top, name, text) for name, text in _CLAIMS]
    claims = [
        _claim(arm, against, by_name[name], text, rows, failed=_failed(gates[arm], len(seeds)))
        for arm, against, name, text in pairs
    ]
    return Comparison(arms, seeds, all_measures, means, diverged, contrasts, gates, tuple(claims))


def _values(rows: Mapping[int, Row], name: str) -> dict[int, float]:
    """Return a measure by seed, where it is a number."""
    return {seed: row[name] for seed, row in rows.items() if math.isfinite(row.get(name, math.nan))}


def _contrast(first: Mapping[int, Row], second: Mapping[int, Row], measure: Measure) -> Contrast | None:
    one, other = _values(first, measure.name), _values(second, measure.name)
    common = [seed for seed in one if seed in other]
    if not common:
        return None
    pair = [one[seed] for seed in common], [other[seed] for seed in common]
    positive = min(*pair[0], *pair[1]) > 0
    return Contrast(paired_t_test(*pair), paired_ratio(*pair) if measure.ratio and positive else None)


def _contrasts(
    first: Mapping[int, Row], second: Mapping[int, Row], all_measures: Sequence[Measure]
) -> dict[str, Contrast]:
    found = {measure.name: _contrast(first, second, measure) for measure in all_measures}
    return {name: contrast for name, contrast in found.items() if contrast is not None}


def _failed(gates: Mapping[str, int], seeds: int) -> list[str]:
    return [f"{title} ({passed} of {_seeds(seeds)})" for title, passed in gates.items() if passed < seeds]


def _claim(
    arm: str,
    against: str,
    measure: Measure,
    text: str,
    rows: Mapping[str, Mapping[int, Row]],
    *,
    failed: Sequence[str],
) -> Claim:
    contrast = _contrast(rows[arm], rows[against], measure)
    lost = [name for name in (arm, against) if len(_values(rows[name], measure.name)) < len(rows[name])]
    verdict: Literal["holds", "open", "contradicted"] = "open"
    if contrast is None:
        reason = "no seed has the figure for both"
    else:
        test = contrast.test
        good, bad = test.surely_below, test.surely_above
        if measure.better == "higher":
            good, bad = bad, good
        reason = _difference(contrast, measure) + f", {_seeds(test.pairs)}"
        if lost:
            reason += f"; not every seed of {' and '.join(lost)} has the figure"
        elif test.pairs < 2:
            reason += "; one seed tells nothing of chance"
        elif good:
            verdict = "holds"
        elif bad:
            verdict = "contradicted"
        else:
            reason += "; the interval holds zero"
    said = {
        "holds": "holds at this budget",
        "open": "is not shown at this budget",
        "contradicted": "is contradicted at this budget",
    }[verdict]
    sentence = f"{arm} against {against}: “{text}” {said} ({measure.title}: {reason})."
    if verdict == "holds" and failed:
        sentence += f" But {arm} fails a gate: {'; '.join(failed)}."
    return Claim(arm, against, measure.name, verdict, sentence)


# ------------------------------------------------------------------------------------------------ written


def _seeds(count: int) -> str:
    return f"{count} seed" if count == 1 else f"{count} seeds"


def _number(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def _difference(contrast: Contrast, measure: Measure) -> str:
    (mean, half), p, digits = contrast.test.difference, contrast.test.p_value, measure.digits
    if half == 0 and mean == 0:
        return "no difference"
    text = f"{'+' if mean > 0 else ''}{_number(mean, digits)}"
    if math.isfinite(half):
        text += f" [{_number(mean - half, digits)}, {_number(mean + half, digits)}]"
        text += ", p < 0.0001" if p < 1e-4 else f", p = {p:.2g}"
    if contrast.ratio is not None:
        text += f", ratio {contrast.ratio.value:.2f}"
    return text


def _mean(interval: Interval | None, digits: int) -> str:
    if interval is None:
        return ""
    half = f" ± {_number(interval.half_width, digits)}" if math.isfinite(interval.half_width) else ""
    return _number(interval.mean, digits) + half


def markdown(comparison: Comparison, facts: Mapping[str, str]) -> str:
    """Return the comparison as a Markdown page: table, gates, claims, what the measures mean, `facts`."""
    arms, seeds = comparison.arms, comparison.seeds
    others = [arm for arm in arms if arm != REFERENCE]
    lines = [
        "# Priors compared",
        "",
        f"Mean over {_seeds(len(seeds))} ± half of its 95 % t-interval; differences are paired by seed: mean "
        "[95 % interval], p of the paired t-test, and for distances the ratio (geometric mean). Nothing is "
        "corrected for the number of tests.",
        "",
        "| | " + " | ".join([*arms, *(f"{arm} - {REFERENCE}" for arm in others)]) + " |",
        "|---" * (1 + len(arms) + len(others)) + "|",
    ]
    for measure in comparison.measures:
        arrow = {"lower": " ↓", "higher": " ↑", None: ""}[measure.better]
        cells = [_mean(comparison.means[arm].get(measure.name), measure.digits) for arm in arms]
        for arm in others:
            contrast = comparison.contrasts[arm].get(measure.name)
            cells.append("" if contrast is None else _difference(contrast, measure))
        lines.append(f"| {measure.title}{arrow} | " + " | ".join(cells) + " |")
    for arm, lost in comparison.diverged.items():
        if lost:
            lines += [
                "",
                f"{arm}: training diverged with seed {', '.join(map(str, lost))}; not in the means.",
            ]
    lines += ["", "## Gates", "", "| | " + " | ".join(others) + " |", "|---" * (1 + len(others)) + "|"]
    for gate in GATES:
        passed = [comparison.gates[arm][gate.title] for arm in others]
        cells = [f"{'passed' if n == len(seeds) else 'failed'}: {n} of {_seeds(len(seeds))}" for n in passed]
        lines.append(f"| {gate.title} | " + " | ".join(cells) + " |")
    lines += ["", "## Claims", ""]
    lines += [f"- {claim.sentence}" for claim in comparison.claims]
    lines += ["", "## What the measures mean", ""]
    lines += [f"- **{measure.title}**: {measure.meaning}" for measure in comparison.measures]
    lines += ["", "## Where it comes from", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    return "\n".join(lines) + "\n"


def document(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison as plain values; `finite` makes them JSON."""
    values: dict[str, Any] = {
        "arms": comparison.arms,
        "seeds": comparison.seeds,
        "measures": [asdict(measure) for measure in comparison.measures],
        "diverged": comparison.diverged,
        "gates": comparison.gates,
        "claims": [asdict(claim) for claim in comparison.claims],
    }
    values["means"] = {
        arm: {name: interval._asdict() for name, interval in found.items()}
        for arm, found in comparison.means.items()
    }
    values["contrasts"] = {
        arm: {
            name: {
                "difference": contrast.test.difference._asdict(),
                "p_value": contrast.test.p_value,
                "pairs": contrast.test.pairs,
                "ratio": None if contrast.ratio is None else contrast.ratio._asdict(),
            }
            for name, contrast in found.items()
        }
        for arm, found in comparison.contrasts.items()
    }
    return values


def finite(value: Any) -> Any:  # noqa: ANN401  # JSON has no narrower type
    """Return nested plain values with None for numbers that are not finite, which JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
