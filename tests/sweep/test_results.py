"""What a sweep's folder becomes: trials with what they are worth, in their order."""

import random
from pathlib import Path

import pytest
from made_sweeps import FULL, center, draw, ended, make_sweep, pruned, read, running, sweep_of, trial
from optuna.trial import TrialState

from jebm.sweep.results import TOP


def names(trials):
    return [trial.number for trial in trials]


# ── Order ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_the_ranking_sorts_what_finished_and_keeps_the_order_of_equals(direction):
    values = [3.0, 1.0, 2.0, 1.0]
    trials = [ended(i, {}, value if direction == "minimize" else -value) for i, value in enumerate(values)]
    sweep = sweep_of([*trials, ended(4, {}), ended(5, {}, status="failed")], objectives=(("x", direction),))
    assert names(sweep.ranking()) == [1, 3, 2, 0]
    assert sweep.best().number == 1
    assert names(sweep.leaders()) == [1, 3, 2, 0]


def test_the_full_ranking_puts_stopped_trials_behind_by_how_far_they_came():
    sweep = sweep_of(
        [
            ended(0, {}, status="diverged", images=500),
            ended(1, {}, images=100, curve=((100, 9.0),)),
            ended(2, {}, images=200, curve=((200, 9.0),)),
            ended(3, {}, images=200, curve=((200, 7.0),)),
            ended(4, {}, images=200),  # never measured
            ended(5, {}, 8.0),
            ended(6, {}, status="failed"),
            ended(7, {}, status="running"),
            ended(8, {}, status="diverged", images=900),
        ]
    )
    assert names(sweep.full_ranking()) == [5, 3, 2, 4, 1, 8, 0]
    assert names(sweep.judged) == [0, 1, 2, 3, 4, 5, 8]


def test_the_leaders_of_one_objective_are_the_top_few():
    sweep = sweep_of([ended(i, {}, float(i)) for i in range(2 * TOP)])
    assert names(sweep.leaders()) == list(range(TOP))


def test_without_a_finished_trial_there_is_no_best():
    sweep = sweep_of([ended(0, {}), ended(1, {}, status="running")])
    assert sweep.best() is None
    assert sweep.leaders() == sweep.front() == []


@pytest.mark.parametrize("seed", range(4))
def test_the_front_is_what_no_trial_beats_in_all_respects(seed):
    generator = random.Random(seed)
    points = [(generator.randint(0, 5), generator.randint(0, 5), generator.randint(0, 5)) for _ in range(30)]
    goals = (("a", "minimize"), ("b", "maximize"), ("c", "minimize"))
    sweep = sweep_of([ended(i, {}, *map(float, point)) for i, point in enumerate(points)], objectives=goals)
    beaten = {
        i
        for i, (a, b, c) in enumerate(points)
        if any(x <= a and y >= b and z <= c and (x, y, z) != (a, b, c) for x, y, z in points)
    }
    assert set(names(sweep.front())) == set(range(30)) - beaten
    assert [trial.values[0] for trial in sweep.front()] == sorted(t.values[0] for t in sweep.front())


def test_places_leave_out_what_has_none():
    trials = [
        ended(0, {"energy.width": 10, "model.latent_dims": "[4, 4, 8]"}, 1.0),
        ended(1, {"energy.width": 200}, 1.0),
        ended(2, {"langevin.steps": 20}, 1.0),
    ]
    sweep = sweep_of(trials)
    assert sweep.places("energy.width", trials) == [0.0, 1.0]
    assert sweep.places("langevin.steps", trials) == [0.5]
    assert sweep.places("model.latent_dims", trials) == []


# ── Read from a journal ─────────────────────────────────────────────────────────────────────────────────


def test_a_trial_is_read_with_what_became_of_it(tmp_path):
    trials = [
        trial(center(), 1.0),
        pruned(center(), 10_000),
        pruned(center(), 5_000, status="diverged"),
        trial(center(), state=TrialState.FAIL, curve={}, error="out\nof  memory"),
        running(center(), 5_000),
    ]
    sweep = read(make_sweep(tmp_path / "s", trials))
    assert [t.status for t in sweep.trials] == ["finished", "pruned", "diverged", "failed", "running"]
    assert [t.values for t in sweep.trials] == [(1.0,), (), (), (), ()]
    assert [t.images for t in sweep.trials] == [FULL, 10_000, 5_000, 0, 5_000]
    assert sweep.trials[3].error == "out of memory"
    assert sweep.trials[0].last == 1.0
    assert sweep.trials[1].last == sweep.trials[1].curve[-1][1]
    assert sweep.trials[3].last is None
    assert set(sweep.space) == set(center())


def test_a_curve_is_sorted_by_images(tmp_path):
    curve = {300: 3.0, 100: 1.0}
    (found,) = read(make_sweep(tmp_path / "s", [trial(center(), 1.0, curve=curve)])).trials
    assert found.curve == ((100, 1.0), (300, 3.0))


@pytest.mark.parametrize("run", ["../t0001", "t1/x", "", "t1234567890", 7, None])
def test_a_trial_whose_run_has_a_strange_name_has_its_own(tmp_path, run):
    (found,) = read(make_sweep(tmp_path / "s", [trial(center(), 1.0, run=run)])).trials
    assert found.name == "t0000"


@pytest.mark.parametrize("amount", ["long", None, True, -3.0, [1]])
def test_what_is_no_amount_counts_nothing(tmp_path, amount):
    made = trial(center(), 1.0, seconds=amount, attempts=amount)
    (found,) = read(make_sweep(tmp_path / "s", [made])).trials
    assert (found.seconds, found.attempts) == (0.0, 0)


def test_a_sweep_lasts_from_its_first_start_to_its_last_end(tmp_path):
    sweep = read(make_sweep(tmp_path / "s", [trial(center(), 1.0), running(center())]))
    assert (sweep.ended - sweep.started).total_seconds() == 7200
    assert read(make_sweep(tmp_path / "none", [])).started is None


def test_half_a_line_at_the_end_of_the_journal_is_no_damage(tmp_path):
    folder = make_sweep(tmp_path / "s", [trial(draw(random.Random(0)), 1.0)])
    with Path(folder, "study.log").open("a") as journal:
        journal.write('{"op_code": 5, "worker')
    assert len(read(folder).trials) == 1
