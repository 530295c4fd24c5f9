"""Compare arms over seeds: which differences there are, and which claims they support.

Arms are paired: for one seed they start from the same generator and inference weights, and see the same
images and noise in the same order. So the tests use the differences within a seed. The gates are conditions
under which a difference means something at all: a prior whose chains run away, or whose log Z depends on a
few weights, can look better than it is.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from jebm.evaluate.measures import Row, measures
from jebm.evaluate.statistics import Interval, PairedTest, Ratio, paired_ratio, paired_t_test, t_interval
from jebm.report.findings import plural
from jebm.report.measure import Measure

__all__ = [
    "GATES",
    "REFERENCE",
    "Claim",
    "Comparison",
    "Contrast",
    "Gate",
    "compare",
    "difference_of",
    "document",
]

REFERENCE = "gaussian"
"""The arm that the others are compared with."""

_CLAIMS = (
    ("frechet", "prior samples are nearer to held-out images"),
    ("frechet_long", "prior samples of long chains are nearer to held-out images"),
    ("frechet_posterior_long", "images of long chains are nearer to images of posterior samples"),
    ("auc_long", "the prior of long chains is harder to tell from the aggregate posterior"),
    ("elbo", "the normalised ELBO is higher"),
)
"""Measure, and the claim about an arm that is better in it."""
_GAIN_CLAIM = ("elbo_gain_above", "the tilt adds to the ELBO, by the bound that does not flatter it")
_JOINT_AGAINST_TOP = ("joint", "top")
"""An energy over all layers models more than one over only the top layer of the same ladder (not LEBM)."""


@dataclass(frozen=True)
class Gate:
    """A condition that a model must meet before its figures are trusted."""

    title: str
    passes: Callable[[Row, Row], bool]
    """Takes the model's row and the Gaussian prior's of the same seed; NaN never passes."""
    mixing: bool = False
    """Whether samples and log Z are not the prior's own where it fails: no claim of such an arm holds."""


GATES: tuple[Gate, ...] = (
    Gate(
        "mean f moves by less than 0.5 nats in the long chains",
        lambda row, _: abs(row["f_drift"]) < 0.5,
        mixing=True,
    ),
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
    Gate("AIS effective share is at least 20 %", lambda row, _: row["log_z_share"] >= 0.2, mixing=True),
    Gate(
        "mean f of chains from posterior samples ends within 1 nat of that of chains from N(0, I)",
        lambda row, _: abs(row["f_gap"]) < 1,
        mixing=True,
    ),
    Gate(
        "log Z from inside is within 0.5 nats of that from below",
        lambda row, _: abs(row["log_z_gap"]) < 0.5,
        mixing=True,
    ),
)


@dataclass(frozen=True)
class Contrast:
    """A measure of one arm against that of another, over the seeds that have both."""

    test: PairedTest
    ratio: Ratio | None
    """Set if the ratio is more informative and all values are positive."""


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
    """The result over all arms and seeds."""

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
    """arm -> gate -> number of seeds that pass."""
    claims: tuple[Claim, ...]


def compare(rows: Mapping[str, Mapping[int, Row]], layers: int) -> Comparison:
    """Compare arm -> seed -> row; all arms have the same seeds, and `REFERENCE` is one of the arms.

    The row of a run that diverged is empty: it passes no gate, is excluded from means and pairs, and its
    arm's claims do not hold.
    """
    arms, seeds = tuple(rows), tuple(rows[REFERENCE])
    all_measures = measures(layers)
    others = [arm for arm in arms if arm != REFERENCE]
    # Each arm separately, then against the reference, pair by pair.
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
    # Claims, each with the gates that its arm fails.
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
    """Return a measure by seed, for seeds where it is a number."""
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


def _failed(gates: Mapping[str, int], seeds: int) -> dict[str, bool]:
    """Return each gate that some seed fails, and how many pass -> whether it is one of mixing."""
    return {
        f"{gate.title} ({gates[gate.title]} of {plural(seeds, 'seed')})": gate.mixing
        for gate in GATES
        if gates[gate.title] < seeds
    }


def _claim(
    arm: str,
    against: str,
    measure: Measure,
    text: str,
    rows: Mapping[str, Mapping[int, Row]],
    *,
    failed: Mapping[str, bool],
) -> Claim:
    # The evidence from the seeds that both arms have, and why it may not count.
    contrast = _contrast(rows[arm], rows[against], measure)
    lost = [name for name in (arm, against) if len(_values(rows[name], measure.name)) < len(rows[name])]
    verdict: Literal["holds", "open", "contradicted"] = "open"
    unmixed = any(failed.values())
    if contrast is None:
        reason = "no seed has the figure for both"
    else:
        test = contrast.test
        good, bad = test.surely_below, test.surely_above
        if measure.better == "higher":
            good, bad = bad, good
        reason = difference_of(contrast, measure) + f", {plural(test.pairs, 'seed')}"
        if lost:
            reason += f"; not every seed of {' and '.join(lost)} has the figure"
        elif test.pairs < 2:
            reason += "; one seed tells nothing of chance"
        elif good:
            verdict = "open" if unmixed else "holds"
        elif bad:
            verdict = "contradicted"
        else:
            reason += "; the interval holds zero"
    # The verdict in words.
    said = {
        "holds": "holds at this budget",
        "open": "is not shown at this budget",
        "contradicted": "is contradicted at this budget",
    }[verdict]
    sentence = f"{arm} against {against}: “{text}” {said} ({measure.title}: {reason})."
    if failed and (verdict == "holds" or unmixed):
        sentence += f" But {arm} fails a gate: {'; '.join(failed)}."
    return Claim(arm, against, measure.name, verdict, sentence)


def _number(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def difference_of(contrast: Contrast, measure: Measure) -> str:
    """Return a difference with its 95 % interval, p and, for distances, the ratio of the arms."""
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


def document(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison as plain values; `jebm.report.write.finite` makes them JSON."""
    # Arms, gates and claims, then the numbers for each arm and measure.
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
