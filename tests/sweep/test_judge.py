"""How far an answer can be trusted, and what to mind: sentences that follow from the trials."""

import random

import pytest
from made_sweeps import FULL, center, draw, ended, make_sweep, pruned, read, sweep_of, trial
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from scipy import stats

from jebm.sweep.importances import Importance
from jebm.sweep.judge import concerns, confidence, rank_correlation

WIDTH = {"energy.width": IntDistribution(0, 100)}


def widths(best, *others, space=WIDTH, key="energy.width"):
    """A sweep whose first trial is the best, by the values of one key."""
    return sweep_of(
        [ended(i, {key: value}, 10.0 + i) for i, value in enumerate((best, *others))], space=space
    )


# ── Rank correlation ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(5))
def test_the_rank_correlation_is_spearmans(seed):
    generator = random.Random(seed)
    one, other = ([generator.gauss(0, 1) for _ in range(20)] for _ in range(2))
    assert rank_correlation(one, other) == pytest.approx(stats.spearmanr(one, other).statistic)
    assert rank_correlation(one, [value**3 for value in one]) == pytest.approx(1)
    assert rank_correlation(one, [-value for value in one]) == pytest.approx(-1)
    assert rank_correlation(one, other) == pytest.approx(rank_correlation(other, one))


def early(finals, *, stopped=1):
    """A sweep whose trials were in order at first, and end as given."""
    curves = [((5000, 100.0 + i), (FULL, final)) for i, final in enumerate(finals)]
    trials = [ended(i, center(), curve[-1][1], curve=curve) for i, curve in enumerate(curves)]
    return sweep_of(trials + [ended(len(trials) + i, center()) for i in range(stopped)])


def test_foresight_needs_six_curves_and_a_pruned_trial():
    def of(sweep):
        return [line for line in confidence(sweep) if "rank correlation" in line]

    finals = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert len(of(early(finals))) == 1
    assert of(early(finals, stopped=0)) == []
    assert of(early(finals[:5])) == []


# ── Edges ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("value", "edge"),
    [(0, "lower"), (5, "lower"), (6, ""), (50, ""), (94, ""), (96, "upper"), (100, "upper")],
)
def test_a_twentieth_of_the_range_is_its_edge(value, edge):
    lines = [line for line in concerns(widths(value, 40, 45, 50, 55, 60), []) if "edge of the search" in line]
    assert [line.split(" edge")[0].split()[-1] for line in lines] == ([edge] if edge else [])


def test_the_edge_of_a_log_range_is_on_its_scale():
    space = {"lr": FloatDistribution(1e-6, 1.0, log=True)}
    # Of the six decades the lowest 0.3: up to 2e-6. On a linear scale all these would lie at the lower edge.
    for value, at_edge in ((1.9e-6, True), (2.1e-6, False), (1e-3, False)):
        found = concerns(widths(value, *[1e-3] * 6, space=space, key="lr"), [])
        assert any("lower edge of the search (1e-06)" in line for line in found) == at_edge


@pytest.mark.parametrize("choices", [[10, 20], ["a", "b", "c"], [True, False]])
def test_choices_without_a_middle_have_no_edge(choices):
    space = {"key": CategoricalDistribution(choices)}
    assert not any("edge" in line for line in concerns(widths(*[choices[0]] * 6, space=space, key="key"), []))


def test_an_edge_counts_the_leaders_that_lie_there():
    (line,) = [line for line in concerns(widths(100, 99, 91, 50, 50, 95), []) if "edge" in line]
    assert line.endswith("(100), as do 3 of the 5 leading trials: widen the range there.")
    (line,) = [line for line in concerns(widths(100, 50, 50, 50, 50), []) if "edge" in line]
    assert "as does 1 of the 5 leading trials" in line


@pytest.mark.parametrize(("others", "told"), [((100, 100, 50, 50), True), ((100, 50, 50, 50), False)])
def test_a_key_without_effect_is_told_where_most_leaders_agree(others, told):
    silent = [Importance("energy.width", 0.1, 0.2)]
    assert any("edge" in line for line in concerns(widths(100, *others), silent)) == told


def test_four_finished_trials_are_too_few_for_an_edge():
    assert not any("edge" in line for line in concerns(widths(100, 100, 100, 100), []))


# ── Causes ──────────────────────────────────────────────────────────────────────────────────────────────


def diverging(lost, kept):
    groups = [({"energy.width": w}, "diverged") for w in lost] + [
        ({"energy.width": w}, "pruned") for w in kept
    ]
    return sweep_of([ended(i, point, status=s) for i, (point, s) in enumerate(groups)], space=WIDTH)


@pytest.mark.parametrize(
    ("lost", "kept", "cause"),
    [
        ((80, 90, 95), (10, 20, 30), "They stand out by a high energy.width: at least 80 in all of them."),
        ((5, 8, 9), (10, 20, 30), "They stand out by a low energy.width: at most 9 in all of them."),
        ((10, 50, 90), (20, 40, 60), ""),  # among the others
        ((80, 90), (10, 20, 30), ""),  # two may be chance
        ((80, 90, 95), (10, 20), ""),
    ],
)
def test_a_cause_is_named_where_a_key_tells_the_diverged_apart(lost, kept, cause):
    line = concerns(diverging(lost, kept), [])[0]
    assert (
        line
        == f"{len(lost)} of {len(lost) + len(kept)} trials ({len(lost) / (len(lost) + len(kept)):.0%}) "
        + (f"diverged. {cause}" if cause else "diverged.")
    )


def test_one_in_twenty_that_diverged_is_no_concern():
    assert not any("diverged" in line for line in concerns(diverging([80], range(19)), []))


def test_when_all_diverge_the_remedy_comes_first():
    assert concerns(diverging([80], []), [])[0].startswith(
        "The only trial diverged: there is no best config."
    )
    assert concerns(diverging([80, 90], []), [])[0].startswith(
        "All 2 trials diverged: there is no best config."
    )


def test_the_most_frequent_error_is_quoted():
    errors = ["no memory", "no disk", "no memory", ""]
    sweep = sweep_of([ended(i, {}, status="failed", error=error) for i, error in enumerate(errors)])
    assert concerns(sweep, []) == ["4 of 4 trials (100%) failed; 2 with: no memory"]


@pytest.mark.parametrize(("stopped", "finished", "told"), [(17, 3, True), (16, 4, False), (3, 0, False)])
def test_an_answer_that_rests_on_few_says_so(stopped, finished, told):
    trials = [ended(i, center(), *([1.0] if i < finished else [])) for i in range(stopped + finished)]
    assert any("prune later" in line for line in concerns(sweep_of(trials), [])) == told


def test_a_late_best_asks_for_more_trials():
    values = [float(20 - i) for i in range(20)]
    late = sweep_of([ended(i, center(), value) for i, value in enumerate(values)])
    assert "The best came late (t0019 of 20): more trials may find a better one." in concerns(late, [])
    early_best = sweep_of([ended(i, center(), value) for i, value in enumerate(reversed(values))])
    assert not any("came late" in line for line in concerns(early_best, []))


# ── How sure ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_spread_of_the_top_is_relative_to_the_best():
    lines = confidence(sweep_of([ended(i, center(), value) for i, value in enumerate([10.0, 10.5, 11.0])]))
    assert (
        "The top 3 lie within 10% of one another (distortion 10 to 11); the second, t0001, is 5% behind."
        in lines
    )
    lines = confidence(sweep_of([ended(i, center(), value) for i, value in enumerate([0.0, 0.5])]))
    assert "Of the two finished trials the second, t0001, is 0.5 behind." in lines  # no percent of nothing


def test_what_the_top_agrees_on_and_what_is_free():
    generator = random.Random(0)
    points = [
        draw(generator) | {"energy.width": 100 + i, "model.latent_dims": "[4, 4, 8]"} for i in range(10)
    ]
    for point, size in zip(points, (0.05, 1.0, 0.06, 0.9, 0.5), strict=False):
        point["langevin.step_size"] = size
    lines = confidence(sweep_of([ended(i, point, 1.0 + i) for i, point in enumerate(points)]))
    (agreed,) = [line for line in lines if line.startswith("The top 5 agree on ")]
    assert "energy.width (100 to 104)" in agreed
    assert "model.latent_dims ([4, 4, 8])" in agreed
    (free,) = [line for line in lines if line.startswith("They reach their values with very different ")]
    assert "langevin.step_size (0.05 to 1)" in free


def test_seeds_that_are_searched_are_no_luck():
    space = {"run.seed": IntDistribution(0, 9)}
    sweep = sweep_of([ended(i, {"run.seed": i}, 1.0 + i) for i in range(3)], space=space)
    assert not any("share run.seed" in line for line in confidence(sweep))
    assert any("share run.seed 0" in line for line in confidence(sweep_of(list(sweep.trials), space=WIDTH)))


def test_several_objectives_have_no_single_top():
    goals = (("distortion", "minimize"), ("speed", "maximize"))
    sweep = sweep_of([ended(i, center(), float(i), float(i)) for i in range(12)], objectives=goals)
    assert not any(line.startswith(("The top", "Of the two")) for line in confidence(sweep))


def test_a_sweep_without_trials_has_one_sentence():
    assert confidence(sweep_of([])) == ["0 trials: none yet."]
    assert concerns(sweep_of([]), []) == []


# ── Read from journals ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("key", "value", "edge"),
    [
        ("langevin.step_size", 0.99, "upper edge of the search (1)"),
        ("optimizer.generator.lr", 1.1e-5, "lower edge of the search (1e-05)"),
        ("energy.width", 200, "upper edge of the search (200)"),
        ("langevin.steps", 10, "lower edge of the search (10)"),
    ],
)
def test_a_best_at_the_edge_asks_for_a_wider_range(tmp_path, key, value, edge):
    others = [trial(center() | {"langevin.steps": 20}, 2.0 + i) for i in range(6)]
    best = trial(center() | {"langevin.steps": 20, key: value}, 1.0)
    sweep = read(make_sweep(tmp_path / "s", [*others, best]))
    assert any(line.startswith(f"{key} = {value}") and edge in line for line in concerns(sweep, []))
    # One trial alone at the edge of a key that does nothing is chance.
    assert not any(line.startswith(key) for line in concerns(sweep, [Importance(key, 0.1, 0.5)]))


def test_a_best_in_the_middle_asks_for_nothing(tmp_path):
    params = center() | {"langevin.steps": 20, "model.latent_dims": "[4, 4, 8]"}
    trials = [trial(params, 1.0 + i, curve={FULL: 1.0 + i}) for i in range(12)]
    assert (
        concerns(read(make_sweep(tmp_path / "s", trials)), [])
        == [
            # Nothing else can be said of twelve copies of one trial, of which the first is the best.
        ]
    )


def test_a_curve_that_still_falls_and_a_late_best_are_told(tmp_path):
    falling = {
        images: 100.0 - images / 1000 for images in range(5000, FULL + 1, 5000)
    }  # 55 at 3/4, 40 at last
    trials = [trial(center(), 41.0 + i) for i in range(11)] + [trial(center(), 40.0, curve=falling)]
    said = " ".join(concerns(read(make_sweep(tmp_path / "s", trials)), []))
    assert "still improved by 27% over its last quarter" in said
    assert "came late (t0011 of 12)" in said


def test_early_order_is_compared_with_the_final_one(tmp_path):
    def sweep_of(name, finals):
        curves = [{5000: 100.0 + i, FULL: final} for i, final in enumerate(finals)]
        trials = [trial(center(), c[FULL], curve=c) for c in curves]
        return " ".join(confidence(read(make_sweep(tmp_path / name, [*trials, pruned(center(), 5000)]))))

    assert "rank correlation 1.00) is much the same" in sweep_of("same", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert "rank correlation -1.00) differs" in sweep_of("reversed", [6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
