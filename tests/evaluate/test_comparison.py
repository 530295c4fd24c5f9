"""Gates and claims on rows made by hand."""

import json
import math

import pytest
from scipy import stats

from jebm.config import Config
from jebm.evaluate.comparison import GATES, Comparison, compare, document
from jebm.evaluate.comparison_findings import comparison_findings
from jebm.evaluate.measures import Row, measures
from jebm.report.markdown import markdown
from jebm.report.write import finite

SEEDS = (5, 6, 7, 8, 9)


# ----------------------------------------------------------------------------------------- rows by hand


def page_of(comparison: Comparison) -> str:
    return markdown(comparison_findings(comparison, {"seeds": "5"}, Config()))


def row(**changes: float) -> Row:
    plain = {measure.name: 1.0 for measure in measures(2)}
    mixed = {"f_drift": 0.1, "f_gap": 0.2, "log_z_gap": 0.03, "log_z_share": 0.9}
    return plain | mixed | {"frechet_long": 40.0, "mse": 0.02, **changes}


def rows(changes: dict[str, list[float]]) -> dict[int, Row]:
    """Return rows of all seeds; each measure has its own value at each seed."""
    return {
        seed: row(**{name: values[i] for name, values in changes.items()}) for i, seed in enumerate(SEEDS)
    }


GAUSSIAN = rows(
    {"frechet_long": [44.0, 40.0, 47.0, 39.0, 52.0], "elbo": [-200.0, -190.0, -204.0, -187.0, -215.0]}
)
BETTER = rows(
    {"frechet_long": [20.0, 18.0, 21.0, 16.0, 25.0], "elbo": [-198.0, -193.0, -203.0, -190.0, -212.0]}
)


@pytest.mark.parametrize(
    ("gate", "passing", "failing"),
    [
        (0, {"f_drift": -0.49}, {"f_drift": -0.5}),
        (1, {"frechet_long": 43.9}, {"frechet_long": 44.0}),
        (2, {"norm_ratio": 1.49}, {"norm_ratio": 1.5}),
        (3, {"mse": 0.0219}, {"mse": 0.0221}),
        (3, {"mse": 0.001}, {"mse": math.nan}),
        (4, {"log_z_share": 0.2}, {"log_z_share": 0.19}),
        (4, {"log_z_share": 0.2}, {"log_z_share": math.nan}),
        (5, {"f_gap": -0.99}, {"f_gap": 1.0}),
        (6, {"log_z_gap": 0.49}, {"log_z_gap": -0.5}),
    ],
)
def test_a_gate_counts_the_seeds_that_pass_it(gate, passing, failing):
    reference = {seed: row(frechet_long=44.0) for seed in SEEDS}
    arm = {seed: row(**{"frechet_long": 20.0, **(failing if seed == 7 else passing)}) for seed in SEEDS}
    found = compare({"gaussian": reference, "joint": arm}, 2).gates["joint"]
    assert found == {each.title: 5 - (each is GATES[gate]) for each in GATES}


def test_differences_are_paired_by_seed():
    found = compare({"gaussian": GAUSSIAN, "joint": BETTER}, 2).contrasts["joint"]["frechet_long"]
    ours, theirs = ([of[seed]["frechet_long"] for seed in SEEDS] for of in (BETTER, GAUSSIAN))
    expected = stats.ttest_rel(ours, theirs)
    assert found.test.p_value == pytest.approx(expected.pvalue, rel=1e-6)
    assert found.ratio is not None
    assert found.ratio.value == pytest.approx(stats.gmean(ours) / stats.gmean(theirs))
    # The order in which an arm's seeds were measured is of no account.
    turned = dict(reversed(BETTER.items()))
    assert compare({"gaussian": GAUSSIAN, "joint": turned}, 2).contrasts["joint"]["frechet_long"] == found


def test_a_claim_holds_where_the_interval_excludes_zero_on_the_right_side():
    found = compare({"gaussian": GAUSSIAN, "joint": BETTER, "top": GAUSSIAN}, 2)
    verdicts = {(claim.arm, claim.against, claim.measure): claim for claim in found.claims}
    assert verdicts["joint", "gaussian", "frechet_long"].verdict == "holds"
    assert verdicts["joint", "gaussian", "elbo"].verdict == "open"
    assert verdicts["joint", "top", "frechet_long"].verdict == "holds"
    assert verdicts["top", "gaussian", "frechet_long"].verdict == "open"
    turned = compare({"gaussian": BETTER, "joint": GAUSSIAN}, 2)
    (worse,) = (claim for claim in turned.claims if claim.measure == "frechet_long")
    assert worse.verdict == "contradicted"
    # Higher is better here, lower there.
    good = {seed: {**row_, "elbo": GAUSSIAN[seed]["elbo"] + 3 + seed / 10} for seed, row_ in BETTER.items()}
    (elbo,) = (c for c in compare({"gaussian": GAUSSIAN, "joint": good}, 2).claims if c.measure == "elbo")
    assert elbo.verdict == "holds"


def test_a_claim_of_an_arm_that_fails_a_gate_says_so():
    blurred = {seed: {**row_, "mse": 0.03 if seed == 6 else 0.02} for seed, row_ in BETTER.items()}
    found = compare({"gaussian": GAUSSIAN, "joint": blurred}, 2)
    (claim,) = (claim for claim in found.claims if claim.measure == "frechet_long")
    assert claim.verdict == "holds"
    assert f"fails a gate: {GATES[3].title} (4 of 5 seeds)" in claim.sentence


@pytest.mark.parametrize("fault", [{"f_drift": 2.0}, {"f_gap": 3.0}, {"log_z_gap": 4.7}])
def test_a_prior_that_has_not_mixed_wins_nothing(fault):
    """Its samples and its log Z are of a part of the prior, so that it would be judged as another."""
    stuck = {seed: {**row_, **(fault if seed == 6 else {})} for seed, row_ in BETTER.items()}
    found = compare({"gaussian": GAUSSIAN, "joint": stuck}, 2)
    assert "holds" not in {claim.verdict for claim in found.claims}
    (claim,) = (claim for claim in found.claims if claim.measure == "frechet_long")
    assert "is not shown at this budget" in claim.sentence
    assert "joint fails a gate" in claim.sentence


@pytest.mark.parametrize("lost", [{}, row(frechet_long=math.nan)])
def test_a_seed_that_was_lost_takes_the_claim_with_it(lost):
    """Else the seeds that did not blow up would speak for all."""
    found = compare({"gaussian": GAUSSIAN, "joint": {**BETTER, 8: lost}}, 2)
    (claim,) = (claim for claim in found.claims if claim.measure == "frechet_long")
    assert claim.verdict == "open"
    assert "4 seeds; not every seed of joint has the figure" in claim.sentence
    assert found.gates["joint"][GATES[1].title] == 4
    assert found.diverged["joint"] == (() if lost else (8,))
    page = page_of(found)
    assert ("diverged with seed 8" in page) == (not lost)
    assert json.loads(json.dumps(finite(document(found)), allow_nan=False))["seeds"] == list(SEEDS)


def test_one_seed_claims_nothing():
    found = compare({"gaussian": {5: GAUSSIAN[5]}, "joint": {5: BETTER[5]}}, 2)
    assert {claim.verdict for claim in found.claims} == {"open"}
    assert "inf" not in page_of(found)
    json.dumps(finite(document(found)), allow_nan=False)


def test_the_table_has_a_cell_for_each_arm_and_each_difference():
    page = page_of(compare({"gaussian": GAUSSIAN, "joint": BETTER, "top": BETTER}, 2))
    table = [line for line in page.split("## Gates")[0].splitlines() if line.startswith("| ")]
    assert {line.count("|") for line in table} == {1 + 1 + 3 + 2}
    (line,) = (line for line in table if line.startswith("| Fréchet distance, long chains"))
    assert "20.0 ± 4.2" in line
    assert "p &lt; 0.0001, ratio 0.45" in line
