"""How far a sweep's answer can be trusted, and what to check first: sentences without markup."""

from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

from jebm.config import leaves
from jebm.report.findings import number, plural
from jebm.sweep.dimensions import listed, ordered_choices, position, setting
from jebm.sweep.importances import FEWEST_RANKED, Importance
from jebm.sweep.results import STATUSES, TOP, Sweep, Trial

__all__ = ["concerns", "confidence", "rank_correlation"]

_EDGE = 0.05  # of a range, on its own scale


# ── How sure ────────────────────────────────────────────────────────────────────────────────────────────


def confidence(sweep: Sweep) -> list[str]:
    """Return sentences on how far the answer can be trusted."""
    sentences = [_counts(sweep)]
    ranking = sweep.ranking()
    if len(ranking) >= 2 and len(sweep.objectives) == 1:
        sentences.append(_spread(sweep, ranking[:TOP]))
    if len(ranking) >= 2 * TOP and len(sweep.objectives) == 1:
        sentences += _agreement(sweep, ranking[:TOP])
    if ranking:
        sentences += _seeds(sweep)
        sentences += _foresight(sweep)
    return sentences


def _counts(sweep: Sweep) -> str:
    counts = Counter(trial.status for trial in sweep.trials)
    parts = [f"{counts[status]} {status}" for status in STATUSES if counts[status]]
    return f"{plural(len(sweep.trials), 'trial')}: {listed(parts) or 'none yet'}."


def _spread(sweep: Sweep, top: Sequence[Trial]) -> str:
    best, second, last = top[0].values[0], top[1].values[0], top[-1].values[0]
    near = f"the second, {top[1].name}, is {_apart(second, best)} behind"
    if len(top) == 2:
        return f"Of the two finished trials {near}."
    return (
        f"The top {len(top)} lie within {_apart(last, best)} of one another ({sweep.objectives[0].metric} "
        f"{number(best)} to {number(last)}); {near}."
    )


def _agreement(sweep: Sweep, top: Sequence[Trial]) -> list[str]:
    agreed, free = [], []
    for key in sweep.space:
        values = [trial.params[key] for trial in top if key in trial.params]
        places = sweep.places(key, top)
        if len(places) == len(top):
            low, high = setting(min(values)), setting(max(values))
            shown = f"{key} ({low if low == high else f'{low} to {high}'})"
            if max(places) - min(places) <= 0.25:
                agreed.append(shown)
            elif max(places) - min(places) >= 0.6:
                free.append(shown)
        elif len(values) == len(top) and len(set(map(setting, values))) == 1:
            agreed.append(f"{key} ({setting(values[0])})")
    return [
        *([f"The top {len(top)} agree on {listed(agreed)}."] if agreed else []),
        *([f"They reach their values with very different {listed(free)}."] if free else []),
    ]


def _seeds(sweep: Sweep) -> list[str]:
    if "run.seed" in sweep.space:
        return []
    seed = dict(leaves(sweep.config)).get("run.seed", 0)
    return [
        f"All trials share run.seed {setting(seed)}, so the luck of a seed is not in these numbers: before "
        f"a small difference counts, train the top trials again with other seeds."
    ]


def _foresight(sweep: Sweep) -> list[str]:
    """Say whether pruning was safe: how well early reports of finished trials predict their final ranks."""
    curves = [dict(trial.curve) for trial in sweep.ranking()]
    shared = sorted(set.intersection(*map(set, curves))) if curves else []
    early = [images for images in shared if images <= shared[-1] / 2]
    if not early or len(curves) < 6 or not sweep.having("pruned"):
        return []
    now, later = [curve[early[0]] for curve in curves], [trial.values[0] for trial in sweep.ranking()]
    agreement = rank_correlation(now, later)
    orders = f"the order at {early[0]:,} images and at the end (rank correlation {agreement:.2f})"
    if agreement >= 0.6:
        return [f"Among the finished trials {orders} is much the same: pruning early lost little."]
    return [f"Among the finished trials {orders} differs: pruning early may have lost good ones."]


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Return Spearman's rank correlation of values without ties, -1 to 1."""
    ranks = np.array([np.argsort(np.argsort(values)) for values in (one, other)])
    return float(np.corrcoef(ranks)[0, 1])


# ── What to mind ────────────────────────────────────────────────────────────────────────────────────────


def concerns(sweep: Sweep, importances: Sequence[Importance]) -> list[str]:
    """Return sentences on what to check before trusting the best, most urgent first."""
    ended = sweep.having(*STATUSES[:4])
    finished, diverged, failed = sweep.having("finished"), sweep.having("diverged"), sweep.having("failed")
    sentences = []
    # Trials that diverged, failed or were pruned.
    if ended and len(diverged) == len(ended):
        sentences.append(
            f"{_all(len(ended))} diverged: there is no best config. Search "
            f"lower learning rates or a smaller langevin.step_size, or set clip_norm."
        )
    elif diverged and len(diverged) >= len(ended) / 10:
        sentences.append(f"{_share(len(diverged), len(ended))} diverged.{_cause(sweep, diverged)}")
    if failed:
        errors = Counter(trial.error or "without a message" for trial in failed)
        often, times = max(errors.items(), key=lambda item: item[1])
        sentences.append(f"{_share(len(failed), len(ended))} failed; {times} with: {often}")
    pruned = sweep.having("pruned")
    if len(pruned) >= 0.85 * len(ended) and len(ended) >= TOP:
        sentences.append(
            f"{_share(len(pruned), len(ended))} were pruned, so the answer rests on few: prune later."
        )
    if 0 < len(finished) < FEWEST_RANKED:
        sentences.append(f"Only {plural(len(finished), 'trial')} finished: a first look, not a result.")
    best = sweep.best()
    if best is not None and len(finished) >= TOP:
        sentences += _edges(sweep, best, {item.key for item in importances if not item.significant})
    if best is not None:
        sentences += _unfinished_business(sweep, best)
    return sentences


def _cause(sweep: Sweep, diverged: Sequence[Trial]) -> str:
    """Name the key that separates diverged from other trials, if one clearly does (AUC of at least 0.9)."""
    others = sweep.having("finished", "pruned")
    if len(diverged) < 3 or len(others) < 3:
        return ""
    best = (0.4, "")
    for key in sweep.space:
        theirs, rest = sweep.places(key, diverged), sweep.places(key, others)
        if len(theirs) < 3 or len(rest) < 3:
            continue
        wins = sum((a > b) + (a == b) / 2 for a in theirs for b in rest) / (len(theirs) * len(rest))
        if abs(wins - 0.5) > best[0]:
            values = [trial.params[key] for trial in diverged if key in trial.params]
            low = wins > 0.5
            bound = f"{'at least' if low else 'at most'} {setting(min(values) if low else max(values))}"
            best = (
                abs(wins - 0.5),
                f" They stand out by a {'high' if low else 'low'} {key}: {bound} in all of them.",
            )
    return best[1]


def _edges(sweep: Sweep, best: Trial, silent: Collection[str]) -> list[str]:
    """Name the keys whose best value lies at an edge; `silent` keys only if most top trials do too."""
    sentences = []
    top = sweep.leaders()
    for key, value in best.params.items():
        distribution = sweep.space[key]
        place = position(distribution, value)
        if place is None or len(ordered_choices(distribution)) == 2:  # one of two choices is always an end
            continue
        high = place > 0.5
        if min(place, 1 - place) > _EDGE:
            continue
        there = sum((1 - at if high else at) <= 2 * _EDGE for at in sweep.places(key, top))
        if key in silent and there <= len(top) / 2:
            continue
        end = _ends(distribution)[high]
        sentences.append(
            f"{key} = {setting(value)} lies at the {'upper' if high else 'lower'} edge of the search "
            f"({number(end)}), as {'does' if there == 1 else 'do'} {there} of the "
            f"{len(top)} leading trials: widen the range there."
        )
    return sentences


def _ends(distribution: BaseDistribution) -> tuple[float, float]:
    if isinstance(distribution, FloatDistribution | IntDistribution):
        return distribution.low, distribution.high
    low, *_, high = ordered_choices(distribution)
    return low, high


def _unfinished_business(sweep: Sweep, best: Trial) -> list[str]:
    """Say what longer training or a longer sweep might still gain."""
    sentences = []
    if len(best.curve) >= 4:
        total = best.curve[-1][0]
        before = [value for images, value in best.curve if images <= 0.75 * total]
        now = best.curve[-1][1]
        if before and before[-1] != 0:
            gain = sweep.objectives[0].sign * (before[-1] - now) / abs(before[-1])
            if gain >= 0.02:
                sentences.append(
                    f"The best trial still improved by {gain:.0%} over its last quarter: with longer "
                    f"training the order of the top trials may change."
                )
    ended = sweep.having(*STATUSES[:4])
    after = [trial for trial in ended if trial.number > best.number]
    if len(sweep.objectives) == 1 and len(ended) >= 2 * TOP and len(after) < 0.1 * len(ended):
        sentences.append(
            f"The best came late ({best.name} of {len(sweep.trials)}): more trials may find a better one."
        )
    return sentences


# ── Words ───────────────────────────────────────────────────────────────────────────────────────────────


def _apart(one: float, other: float) -> str:
    """Return how far two values are apart, in percent of the second unless that is about 0."""
    difference = abs(one - other)
    if abs(other) < 1e-9:
        return number(difference)
    percent = 100 * difference / abs(other)
    return f"{percent:.2g}%" if percent < 99 else f"{percent:,.0f}%"


def _share(part: int, whole: int) -> str:
    return f"{part} of {plural(whole, 'trial')} ({part / whole:.0%})"


def _all(count: int) -> str:
    return "The only trial" if count == 1 else f"All {count} trials"
