"""Tables and claims of experiments/anomalies.py.

The claims were written before any run with this protocol; each table marks them held or failed.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from anomaly_cases import BASELINES, ORACLE  # type: ignore[import-not-found, unused-ignore]
from anomaly_measures import FISHER, ONE_IN_TEN, SCORE  # type: ignore[import-not-found, unused-ignore]

from jebm.campaign.rows import Row
from jebm.evaluate.statistics import t_interval

PAPER_DIGITS = (1, 4, 5, 7, 9)
PAPER = {  # AUPRC with each of these digits held out: table 3 of arXiv 2310.09604
    "VAE (paper)": (0.063, 0.337, 0.325, 0.148, 0.104),
    "HVAE, L>0 (paper)": (0.494, 0.920, 0.913, 0.680, 0.791),
    "LEBM (paper)": (0.336, 0.630, 0.619, 0.463, 0.413),
    "joint EBM (paper)": (0.722, 0.949, 0.980, 0.941, 0.935),
}
MEASURES = {
    "auroc": "AUROC",
    "auprc": "AUPRC, all anomalous images tested",
    ONE_IN_TEN: "AUPRC, anomalies weighted to one in ten",
}


class Results:
    """Measured rows, each with its anomaly, arm and seed."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.arms = list(dict.fromkeys(row["arm"] for row in rows))
        self.classes = sorted({row["anomaly"] for row in rows}, key=lambda name: (len(name), name))
        self.seeds = sorted({row["seed"] for row in rows})

    def by_seed(self, arm: str, score: str, measure: str, held_out: str) -> dict[int, float]:
        """Return seed -> value; a baseline's value, which knows no seed, stands for every seed."""
        found = {
            row["seed"]: row["measures"][score][measure]
            for row in self.rows
            if (row["arm"], row["anomaly"]) == (arm, held_out) and score in row["measures"]
        }
        return dict.fromkeys(self.seeds, *found.values()) if arm in BASELINES and found else found

    def mean_by_seed(self, arm: str, score: str, measure: str) -> dict[int, float]:
        """Return seed -> mean over classes, for the seeds that have all classes."""
        columns = [self.by_seed(arm, score, measure, held_out) for held_out in self.classes]
        complete = set(self.seeds).intersection(*columns)
        return {seed: statistics.fmean(column[seed] for column in columns) for seed in sorted(complete)}

    def means(self, measure: str, *cells: tuple[str, str]) -> list[float] | None:
        """Return the mean over classes of each (arm, score), over the seeds that all of them have."""
        found = [self.mean_by_seed(arm, score, measure) for arm, score in cells]
        common = set(self.seeds).intersection(*found)
        return [statistics.fmean(each[s] for s in common) for each in found] if common else None


# --------------------------------------------------------------------------------------------------- claims


@dataclass(frozen=True)
class Claim:
    """A sentence about means over classes and seeds."""

    text: str
    measure: str
    cells: tuple[tuple[str, str], ...]
    """(arm, score) of each figure."""
    holds: Callable[[Sequence[float]], bool]
    """Whether it holds, given the figures in this order."""


def _rising(values: Sequence[float]) -> bool:
    return all(low < high for low, high in pairwise(values))


CLAIMS = (
    Claim(
        "a better prior ranks better by its own density: log prior of gaussian < top < joint",
        "auroc",
        (("gaussian", "log prior"), ("top", "log prior"), ("joint", "log prior")),
        _rising,
    ),
    Claim(
        "the same for a prior learned on frozen nets: log prior of gaussian < two_stage < oracle",
        "auroc",
        (("gaussian", "log prior"), ("two_stage", "log prior"), (ORACLE, "log prior")),
        _rising,
    ),
    Claim(
        "no prior moves log p(x, z), the paper's score, by .01: gaussian and joint",
        "auprc",
        (("gaussian", SCORE), ("joint", SCORE)),
        lambda values: abs(values[1] - values[0]) < 0.01,
    ),
    Claim(
        "not even the oracle moves log p(x, z) by .01: gaussian and oracle",
        "auprc",
        (("gaussian", SCORE), (ORACLE, SCORE)),
        lambda values: abs(values[1] - values[0]) < 0.01,
    ),
    Claim(
        "a nearest-neighbour distance in pixels is above log p(x, z) of a Gaussian prior: gaussian < knn",
        "auroc",
        (("gaussian", SCORE), ("knn", SCORE)),
        _rising,
    ),
    Claim(
        "with the oracle, Fisher's sum of reconstruction and prior is above log p(x, z)",
        "auroc",
        ((ORACLE, SCORE), (ORACLE, FISHER)),
        _rising,
    ),
)


def verdicts(results: Results) -> Iterator[str]:
    """Yield a line for each claim: held or failed, with its figures, or not tested."""
    for claim in CLAIMS:
        values = results.means(claim.measure, *claim.cells)
        if values is None:
            yield f"- not tested: {claim.text}"
        else:
            figures = ", ".join(f"{value:.3f}" for value in values)
            word = "**held**" if claim.holds(values) else "**failed**"
            yield f"- {word}: {claim.text} ({MEASURES[claim.measure]} {figures})"


# --------------------------------------------------------------------------------------------------- tables


def class_tables(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of the tables for classes held out, with the paper's numbers, and of the claims."""
    results = Results(rows)
    digits = tuple(int(name) for name in results.classes)
    for measure, title in MEASURES.items():
        yield f"\n**{title}: log p(x, z), by the class held out**\n"
        yield _line("", *results.classes, "mean")
        yield _line(*["---"] * (len(results.classes) + 2))
        yield _line("chance", *_chance(results, measure))
        for arm in results.arms:
            yield _by_class(results, arm, SCORE, measure)
        if measure == "auprc" and set(digits) <= set(PAPER_DIGITS):
            yield from _paper_lines(digits)
    for measure, title in MEASURES.items():
        yield f"\n**{title}: mean over classes, each score**\n"
        yield _line("score", *results.arms)
        yield _line(*["---"] * (len(results.arms) + 1))
        scores = dict.fromkeys(score for row in rows for score in row["measures"])
        for score in scores:
            cells = (results.mean_by_seed(arm, score, measure) for arm in results.arms)
            yield _line(score, *map(_shown, cells))
    yield "\n**Claims, written before the runs**\n"
    yield from verdicts(results)
    steps = sorted({row["step"] for row in rows if row["arm"] not in BASELINES})
    yield (
        f"\n± is a 95 % t-interval over seeds {results.seeds}; baselines have none. {steps} updates. All"
        " images pooled; a fifth of the normal ones and all anomalous ones are tested, a tenth of the other"
        " normal ones is kept out of training as reference."
    )


def _by_class(results: Results, arm: str, score: str, measure: str) -> str:
    """Return a line with an arm's value for each class, and their mean."""
    cells = [results.by_seed(arm, score, measure, held_out) for held_out in results.classes]
    return _line(arm, *map(_shown, (*cells, results.mean_by_seed(arm, score, measure))))


def _paper_lines(digits: Sequence[int]) -> Iterator[str]:
    """Yield the paper's rows for these digits; its shares of anomalies are not given and differ by row."""
    for name, values in PAPER.items():
        known = [values[PAPER_DIGITS.index(digit)] for digit in digits]
        yield _line(name, *(f"{value:.3f}" for value in (*known, statistics.fmean(known))))


def _chance(results: Results, measure: str) -> Iterator[str]:
    """Yield what a random score has for each class, and the mean."""
    if measure != "auprc":
        yield from [{"auroc": "0.500", ONE_IN_TEN: "0.100"}[measure]] * (len(results.classes) + 1)
        return
    sizes = {row["anomaly"]: (row["anomalous images"], row["normal images"]) for row in results.rows}
    chance = [sizes[name][0] / sum(sizes[name]) for name in results.classes]
    yield from (f"{value:.3f}" for value in (*chance, statistics.fmean(chance)))


def ood_tables(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of the table of all scores and arms against another data set."""
    results = Results(rows)
    names = {"auroc": "AUROC", "auprc": "AUPRC", "fpr80": "FPR80"}
    sizes = sorted({(row["normal images"], row["anomalous images"]) for row in rows})
    yield f"\n**Normal and anomalous images {sizes}; anomalies: {rows[0]['anomaly']}**\n"
    yield _line("arm", "score", *names.values(), "seeds")
    yield _line(*["---"] * (len(names) + 3))
    for arm in results.arms:
        for score in rows[0]["measures"]:
            cells = [results.by_seed(arm, score, measure, rows[0]["anomaly"]) for measure in names]
            yield _line(arm, score, *map(_shown, cells), len(cells[0]))
    yield (
        "\n± is a 95 % t-interval over seeds."
        " A random score has AUROC 0.5, FPR80 0.8, and as AUPRC the share of anomalies."
    )


def _shown(by_seed: Mapping[int, float]) -> str:
    """Return the mean with its 95 % t-interval over seeds; the value if all seeds have the same."""
    values = [*by_seed.values()]
    if len(set(values)) < 2:
        return f"{values[0]:.3f}" if values else ""
    found = t_interval(values)
    return f"{found.mean:.3f} ± {found.half_width:.3f}"


def _line(*cells: object) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in cells)} |"
