"""Which keys decided: found on functions that say so themselves; silence where there is nothing to find."""

import math
import random

import pytest
from made_sweeps import SPACE, draw, ended, make_sweep, pruned, read, sweep_of, trial, value_at

from jebm.sweep.importances import FEWEST_RANKED, Importance, find_importances, what_mattered


def planted(function, seed=0, count=40, **kwargs):
    """A sweep of random trials whose result is a function of their values."""
    generator = random.Random(seed)
    points = [draw(generator) for _ in range(count)]
    return sweep_of([ended(i, point, *function(point)) for i, point in enumerate(points)], **kwargs)


def significant(sweep):
    return [item.key for item in find_importances(sweep) if item.significant]


FUNCTIONS = {
    "langevin.step_size": lambda p: abs(math.log(p["langevin.step_size"] / 0.2)),
    "optimizer.generator.lr": lambda p: -math.log(p["optimizer.generator.lr"]),
    "energy.width": lambda p: p["energy.width"],
    "langevin.steps": lambda p: {10: 3.0, 20: 1.0, 40: 2.0}[p["langevin.steps"]],
    "model.latent_dims": lambda p: len(p["model.latent_dims"]),
}


@pytest.mark.parametrize("key", FUNCTIONS)
def test_the_only_key_that_matters_is_found(key):
    noise = random.Random(1)
    found = find_importances(planted(lambda p: (FUNCTIONS[key](p) + 0.01 * noise.random(),)))
    assert found[0].key == key
    assert found[0].significant
    assert found[0].share > 0.5


def test_two_keys_that_matter_together_are_both_found():
    def product(point):
        return (
            math.log(point["langevin.step_size"] / 0.05) * math.log(point["optimizer.generator.lr"] / 1e-5),
        )

    assert set(significant(planted(product, count=80))) == {"langevin.step_size", "optimizer.generator.lr"}


def test_shares_are_sorted_and_sum_to_one():
    found = find_importances(planted(lambda p: (value_at(p),)))
    assert {item.key for item in found} == set(SPACE)
    assert sum(item.share for item in found) == pytest.approx(1)
    assert [item.share for item in found] == sorted((item.share for item in found), reverse=True)


def test_only_the_order_of_the_results_counts():
    sweep = planted(lambda p: (value_at(p),))
    assert find_importances(planted(lambda p: (math.exp(value_at(p)),))) == find_importances(sweep)
    upside_down = planted(lambda p: (-value_at(p),), objectives=(("score", "maximize"),))
    assert find_importances(upside_down) == find_importances(sweep)


def test_nor_does_the_order_of_the_trials():
    sweep = planted(lambda p: (value_at(p),))
    turned = sweep_of([ended(i, t.params, *t.values) for i, t in enumerate(reversed(sweep.trials))])
    assert find_importances(turned) == find_importances(sweep)


@pytest.mark.parametrize("count", [FEWEST_RANKED - 1, FEWEST_RANKED])
def test_a_handful_of_trials_says_nothing(count):
    assert bool(find_importances(planted(lambda p: (value_at(p),), count=count))) == (count >= FEWEST_RANKED)


def test_failed_and_running_trials_do_not_count():
    sweep = planted(lambda p: (value_at(p),))
    more = [ended(40 + i, draw(random.Random(i)), status=s) for i, s in enumerate(["failed", "running"] * 9)]
    assert find_importances(sweep_of([*sweep.trials, *more])) == find_importances(sweep)


def test_without_a_key_there_is_nothing_to_find():
    assert find_importances(sweep_of([ended(i, {}, float(i)) for i in range(20)], space={})) == []


def test_what_cannot_be_told_from_chance_is_said_to_be_so():
    sweep = planted(lambda p: (value_at(p),))
    silent = [Importance("langevin.step_size", 0.7, 0.8), Importance("energy.width", 0.3, 0.3)]
    assert what_mattered(sweep, silent).startswith("Nothing that 40 trials could show")
    loud = [Importance("langevin.step_size", 0.7, 0.2), Importance("energy.width", 0.3, 0.3)]
    assert what_mattered(sweep, loud) == (
        "Of the searched keys langevin.step_size (70%) decides whether a trial ends in the better half. "
        "For energy.width the trials show no effect beyond chance."
    )
    both = [Importance("langevin.step_size", 0.6, 0.2), Importance("energy.width", 0.4, 0.3)]
    assert "langevin.step_size (60%) and energy.width (40%) decide whether" in what_mattered(sweep, both)


@pytest.mark.parametrize(("width", "settled"), [(40, True), (190, False)])
def test_a_range_of_which_a_quarter_was_tried_hardly_varied(width, settled):
    generator = random.Random(3)
    points = [draw(generator) | {"energy.width": generator.randint(10, width)} for _ in range(40)]
    sweep = sweep_of([ended(i, point, value_at(point)) for i, point in enumerate(points)])
    text = what_mattered(
        sweep, [Importance("langevin.step_size", 0.9, 0.2), Importance("energy.width", 0.1, 0.2)]
    )
    assert ("energy.width hardly varied" in text) == settled


def test_noise_has_no_important_keys(tmp_path):
    wrong = 0
    for seed in range(2):
        generator = random.Random(seed)
        trials = [trial(draw(generator), generator.random()) for _ in range(40)]
        folder = make_sweep(tmp_path / str(seed), trials)
        wrong += sum(item.significant for item in find_importances(read(folder)))
    assert wrong <= 1  # of 10 keys, where one in 51 passes by chance


def test_pruned_trials_tell_what_mattered(tmp_path):
    # All finished trials are equally good: only that high learning rates were pruned says anything.
    generator = random.Random(5)
    trials = []
    for _ in range(40):
        params = draw(generator)
        bad = params["optimizer.generator.lr"] > 3e-4
        trials.append(pruned(params, 10_000) if bad else trial(params, 10 + 0.001 * generator.random()))
    found = find_importances(read(make_sweep(tmp_path / "s", trials)))
    assert [item.key for item in found if item.significant] == ["optimizer.generator.lr"]


def test_what_the_search_settled_on_is_not_called_unimportant(tmp_path):
    generator = random.Random(2)
    trials = []
    for i in range(40):
        params = draw(generator) | {"langevin.steps": 10 if i else 40}
        trials.append(trial(params, value_at(params)))
    sweep = read(make_sweep(tmp_path / "s", trials))
    said = what_mattered(sweep, find_importances(sweep))
    assert "langevin.steps hardly varied" in said
