"""A sweep's findings hold every number of its trials, and say first what the answer is."""

import math
import random

import pytest
from made_sweeps import FULL, SPACE, center, draw, ended, sweep_of, value_at

from jebm.report.findings import Findings, Section, Table
from jebm.store.storage import open_store
from jebm.sweep.findings import sweep_findings
from jebm.sweep.results import STATUSES, Sweep

PNG = b"\x89PNG\r\n\x1a\n rest"


def of(sweep: Sweep) -> Findings:
    return sweep_findings(sweep, open_store("memory://empty/sweep"))


def section(findings: Findings, name: str) -> Section:
    (found,) = [section for section in findings.sections if section.name == name]
    return found


def table(found: Section, title: str) -> Table:
    (one,) = [table for table in found.tables if table.title == title]
    return one


def column(found: Table, name: str) -> list[object]:
    return [row[found.columns.index(name)] for row in found.rows]


@pytest.fixture(scope="module")
def mixed() -> Sweep:
    """Twenty finished trials of a known function, and one of every other status."""
    generator = random.Random(0)
    points = [draw(generator) for _ in range(26)]
    trials = [ended(i, p, value_at(p), seconds=60.0 * (i + 1)) for i, p in enumerate(points[:20])]
    others = [status for status in STATUSES if status != "finished"]
    trials += [
        ended(20 + i, point, status=status, images=1000 * i, curve=((1000, 77.0),), seconds=30.0)
        for i, (point, status) in enumerate(zip(points[20:], others, strict=False))
    ]
    return sweep_of(trials)


@pytest.fixture(scope="module")
def findings(mixed: Sweep) -> Findings:
    return of(mixed)


def test_the_sections_come_with_the_answer_first(findings: Findings) -> None:
    assert [section.name for section in findings.sections] == ["answer", "plots", "trials", "cost", "search"]


def test_every_trial_stands_once_with_its_values(mixed: Sweep, findings: Findings) -> None:
    found = table(section(findings, "trials"), "Trials")
    assert column(found, "trial") == [trial.name for trial in mixed.trials]
    assert column(found, "status") == [trial.status for trial in mixed.trials]
    assert column(found, "images") == [trial.images for trial in mixed.trials]
    assert column(found, "distortion")[:20] == [trial.values[0] for trial in mixed.trials[:20]]
    assert column(found, "distortion")[20:] == ["(77)"] * 5  # the last report of what did not finish
    for key in ("langevin.step_size", "energy.width"):
        assert column(found, key) == [trial.params[key] for trial in mixed.trials]
    assert {len(row) for row in found.rows} == {len(found.columns)}


def test_the_best_values_have_their_place_in_what_was_searched(mixed: Sweep, findings: Findings) -> None:
    best = min(mixed.trials[:20], key=lambda trial: trial.values[0])
    found = table(section(findings, "answer"), "The best values")
    assert sorted(column(found, "key")) == sorted(SPACE)
    place = dict(zip(column(found, "key"), column(found, "place in its range"), strict=True))
    width = best.params["energy.width"]
    assert place["energy.width"] == f"{(width - 10) / 190:.0%}"
    size = math.log(best.params["langevin.step_size"] / 0.05) / math.log(20)
    assert place["langevin.step_size"] == f"{size:.0%}"
    assert place["model.latent_dims"] == ""  # choices without an order
    assert (
        dict(zip(column(found, "key"), column(found, "searched"), strict=True))["energy.width"] == "10 to 200"
    )
    assert "importance" in found.columns


def test_the_figure_is_the_best_trials(mixed: Sweep, findings: Findings) -> None:
    (figure,) = section(findings, "answer").figures
    assert (figure.name, figure.better) == ("distortion", "lower")
    assert figure.value == min(trial.values[0] for trial in mixed.trials[:20])


def test_times_and_images_add_up(mixed: Sweep, findings: Findings) -> None:
    found = table(section(findings, "cost"), "Training time")
    assert column(found, "status") == [*STATUSES, "all"]
    counts, images = column(found, "trials"), column(found, "images")
    assert sum(counts[:-1]) == counts[-1] == 25  # type: ignore[arg-type]
    assert sum(images[:-1]) == images[-1] == sum(trial.images for trial in mixed.trials)  # type: ignore[arg-type]


def test_pruning_saves_what_the_pruned_would_have_trained() -> None:
    whole = ended(0, center(), 1.0, seconds=600.0)
    half = ended(1, center(), images=FULL // 2, seconds=300.0)
    text = section(of(sweep_of([whole, half])), "cost").meaning
    assert "trained for 15.0 min in all; 33% of it went into trials that were pruned or diverged" in text
    assert "Pruning saved about 5.0 min more." in text
    assert "Pruning saved" not in section(of(sweep_of([whole])), "cost").meaning


@pytest.mark.parametrize(
    ("trials", "headline"),
    [
        ([], "No answer: no trial has finished, and none is running."),
        ([ended(0, {}, status="running")], "No answer yet: no trial has finished; 0 of those that run"),
        ([ended(0, {}, status="running", curve=((1, 2.0),))], "1 of those that run reported already."),
        ([ended(0, center(), 2.0)], "2 distortion of trial t0000, the lowest of 1 finished trial."),
        ([ended(i, center(), 2.0 + i) for i in range(3)], "finished trials; their median is 3."),
    ],
)
def test_the_answer_in_a_sentence(trials: list, headline: str) -> None:  # type: ignore[type-arg]
    assert headline in section(of(sweep_of(trials)), "answer").meaning


def test_errors_stand_below_the_trials() -> None:
    trials = [ended(0, {}, status="failed", error="no memory"), ended(1, center(), 1.0)]
    assert section(of(sweep_of(trials)), "trials").notes == ("t0000: no memory",)


def test_a_front_has_a_column_for_each_objective_and_no_importance_without_ten_trials() -> None:
    goals = (("distortion", "minimize"), ("speed", "maximize"))
    sweep = sweep_of([ended(i, center(), float(i), float(i)) for i in range(4)], objectives=goals)
    answer = section(of(sweep), "answer")
    front = table(answer, "The Pareto front")
    assert column(front, "distortion") == column(front, "speed") == [0.0, 1.0, 2.0, 3.0]
    assert [figure.better for figure in answer.figures] == ["lower", "higher"]
    assert "4 trials on the front" in answer.meaning
    assert "importance" not in table(answer, "The best values").columns
    assert of(sweep).lead[0] == "Goal: minimize distortion and maximize speed."


def test_pictures_are_the_last_sheets_of_best_and_worst() -> None:
    store = open_store("memory://pictures/sweep")
    for number, step in ((0, 10), (0, 200), (1, 10), (2, 10)):
        store.put(f"trials/t{number:04d}/pictures/step-{step:08d}.png", PNG + bytes([number, step]))
    store.put("trials/t0002/pictures/step-00000999.png", b"no picture")
    sweep = sweep_of([ended(i, center(), value) for i, value in enumerate([1.0, 2.0, 3.0])])
    (best,) = section(sweep_findings(sweep, store), "answer").pictures  # the worst one's last is no PNG
    assert (best.title, best.png) == ("The best: t0000", PNG + bytes([0, 200]))
    assert "after 200 steps" in best.meaning
