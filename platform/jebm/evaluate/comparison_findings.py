"""A comparison's findings: the table of measures, the gates, the claims."""

import math
from collections.abc import Mapping

from jebm.config import Config, config_to_dict
from jebm.evaluate.comparison import GATES, REFERENCE, Comparison, difference_of
from jebm.evaluate.statistics import Interval
from jebm.report.findings import Cell, Findings, Measured, Section, Table, plural

__all__ = ["comparison_findings"]


def comparison_findings(comparison: Comparison, facts: Mapping[str, str], config: Config) -> Findings:
    """Return the findings of a comparison of priors; `facts` say how the numbers were produced."""
    arms = " | ".join(comparison.arms)
    return Findings(
        title=f"{config.run.name}: priors compared",
        lead=(
            f"Arms: {arms}, {plural(len(comparison.seeds), 'seed')} each.",
            f"Held-out images: {facts.get('held-out images', config.data.held_out or config.data.train)}.",
            f"Budget of each run: {facts.get('budget of each run', 'unknown')}.",
        ),
        provenance=dict(facts),
        config=config_to_dict(config),
        sections=(_claims(comparison), _measures(comparison), _gates(comparison), _meanings(comparison)),
    )


def _claims(comparison: Comparison) -> Section:
    return Section(
        "claims",
        "Claims",
        "Sentences that were written before the runs, and whether these runs support them.",
        notes=tuple(claim.sentence for claim in comparison.claims),
        warnings=tuple(
            f"{arm}: training diverged with seed {', '.join(map(str, lost))}; not in the means."
            for arm, lost in comparison.diverged.items()
            if lost
        ),
    )


def _measures(comparison: Comparison) -> Section:
    arms = comparison.arms
    others = [arm for arm in arms if arm != REFERENCE]
    rows: list[tuple[Cell, ...]] = []
    for measure in comparison.measures:
        arrow = {"lower": " ↓", "higher": " ↑", None: ""}[measure.better]
        means = [comparison.means[arm].get(measure.name) for arm in arms]
        contrasts = [comparison.contrasts[arm].get(measure.name) for arm in others]
        rows.append(
            (
                f"{measure.title}{arrow}",
                *map(_cell, means),
                *("" if found is None else difference_of(found, measure) for found in contrasts),
            )
        )
    table = Table(
        "Means and paired differences",
        ("measure", *arms, *(f"{arm} - {REFERENCE}" for arm in others)),
        tuple(rows),
        f"Mean over {plural(len(comparison.seeds), 'seed')} ± half of its 95 % t-interval. Differences are "
        "paired by seed: mean [95 % interval], p of the paired t-test, for distances the ratio (geometric "
        "mean). Nothing is corrected for the number of tests.",
    )
    return Section(
        "measures",
        "Measures",
        "What was measured of each model, on the same images with the same noise.",
        tables=(table,),
        notes=tuple(filter(None, (_share_in_words(comparison, arm) for arm in others))),
    )


def _share_in_words(comparison: Comparison, arm: str) -> str:
    """Return how much of what there was to gain an arm's tilt gains; empty if that is not known.

    The share is of each seed's own run, so that its interval is one of paired values.
    """
    means = comparison.means[arm]
    if not {"elbo_gain", "oracle_gain", "oracle_share"} <= means.keys():
        return ""
    share, half_width = means["oracle_share"]
    interval = f" [{share - half_width:.2f}, {share + half_width:.2f}]" if math.isfinite(half_width) else ""
    return (
        f"{arm}: the tilt gains {means['elbo_gain'].mean:.1f} of the {means['oracle_gain'].mean:.1f} nats "
        f"that the oracle gains as prior on the same codes, a share of {share:.2f}{interval}."
    )


def _cell(mean: Interval | None) -> Cell:
    if mean is None:
        return None
    return Measured(mean.mean, mean.half_width if math.isfinite(mean.half_width) else None)


def _gates(comparison: Comparison) -> Section:
    others = [arm for arm in comparison.arms if arm != REFERENCE]
    seeds = len(comparison.seeds)
    rows: list[tuple[Cell, ...]] = []
    for gate in GATES:
        passed = [comparison.gates[arm][gate.title] for arm in others]
        verdicts = [f"{'passed' if n == seeds else 'failed'}: {n} of {plural(seeds, 'seed')}" for n in passed]
        rows.append((gate.title, *verdicts))
    meaning = "Conditions under which a difference means something at all."
    table = Table("Gates", ("gate", *others), tuple(rows), "Seeds that pass, of all.")
    return Section("gates", "Gates", meaning, tables=(table,))


def _meanings(comparison: Comparison) -> Section:
    return Section(
        "meanings",
        "What each measure is",
        "N images are compared with M samples; K is langevin.steps, L the length of the long chains.",
        notes=tuple(
            f"{measure.title}{measure.unit and f' ({measure.unit})'}: {measure.meaning}"
            for measure in comparison.measures
        ),
    )
