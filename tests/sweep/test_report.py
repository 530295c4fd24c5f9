"""Reports of sweeps whose truth is known."""

import base64
import io
import json
import math
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import optuna
import pytest
import yaml
from made_sweeps import FULL, SPACE, center, draw, make_sweep, pruned, read, running, trial, value_at
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from html_page import HtmlPage
from jebm.config import Config, config_to_dict, leaves
from jebm.errors import CheckpointError, ConfigError, StoreError
from jebm.parser import load_config
from jebm.store.storage import open_store
from jebm.sweep.axes import KeyAxis, ValueAxis
from jebm.sweep.drawings import best_so_far
from jebm.sweep.importances import find_importances, what_mattered
from jebm.sweep.judge import concerns, confidence
from jebm.sweep.key_drawings import smooth
from jebm.sweep.report import make_report, write_tensorboard


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), level).save(file, "PNG")
    return file.getvalue()


class Page(HtmlPage):
    """A sweep's page, with its plots and pictures."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.read_text(encoding="utf-8"))

    @property
    def plots(self) -> dict[str, ET.Element]:
        """The plots by their titles, as the SVG that they are."""
        alts = {e["alt"].partition(". ")[0]: e["src"] for t, e in self.elements if t == "img" and "alt" in e}
        inside = "data:image/svg+xml;base64,"
        return {
            title: ET.fromstring(base64.b64decode(source.removeprefix(inside)))
            for title, source in alts.items()
            if source.startswith(inside)
        }

    @property
    def pictures(self) -> list[bytes]:
        sources = self.having("src")
        inside = "data:image/png;base64,"
        return [base64.b64decode(s.removeprefix(inside)) for s in sources if s.startswith(inside)]


SVG = "{http://www.w3.org/2000/svg}"


def group(plot: ET.Element, name: str) -> list[ET.Element]:
    """What a plot has of one name: marks of a status, the line of a trial."""
    return [g for g in plot.iter(f"{SVG}g") if g.get("id") == name]


def marks(plot: ET.Element) -> int:
    return sum(
        len(list(g.iter(f"{SVG}use")))
        for name in ("finished", "pruned", "diverged", "best")
        for g in group(plot, name)
    )


@dataclass
class Made:
    """A sweep of fifty trials in which everything happens once, and its report."""

    folder: str
    output: Path
    trials: list[FrozenTrial] = field(default_factory=list)

    @property
    def page(self) -> Page:
        return Page(self.output / "report.html")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    generator = random.Random(1)
    place = tmp_path_factory.mktemp("made")
    trials = []
    for number in range(50):
        params = draw(generator)
        if params["optimizer.generator.lr"] > 4e-3:
            trials.append(pruned(params, 10_000, status="diverged"))
        elif value_at(params) > 25:
            trials.append(pruned(params, 20_000, value=value_at(params)))
        elif number in (20, 30):
            trials.append(
                trial(params, state=TrialState.FAIL, curve={}, error="RuntimeError: out\nof memory")
            )
        else:
            trials.append(trial(params, value_at(params)))
    made = Made(make_sweep(place / "sweep", trials), place / "report", trials)
    pictures = Path(made.folder, "trials")
    for rank, level in ((0, 50), (-1, 200)):
        run = pictures / read(made.folder).ranking()[rank].name / "pictures"
        run.mkdir(parents=True)
        (run / "step-00000010.png").write_bytes(png(level + 1))
        (run / "step-00000200.png").write_bytes(png(level))
        (run / "step-00000300.png.txt").write_text("no picture")
    assert make_report(open_store(made.folder), made.output) == made.output / "report.html"
    return made


# ── The answer ──────────────────────────────────────────────────────────────────────────────────────────


def finished(made: Made) -> list[FrozenTrial]:
    return sorted((t for t in made.trials if t.state == TrialState.COMPLETE), key=lambda t: t.value)


def test_the_answer_is_the_best_trial_and_a_config_that_trains_it(made):
    best = finished(made)[0]
    config = dict(leaves(config_to_dict(load_config(made.output / "best.yaml"))))
    params = best.params | {"model.latent_dims": json.loads(best.params["model.latent_dims"])}
    base = dict(leaves(config_to_dict(Config())))
    assert config == base | params | {"run.name": "sweep-best"}
    page, text = made.page, (made.output / "report.md").read_text()
    said = (
        f"{best.value:.4g} distortion of trial {best.user_attrs['run']}, the lowest of {len(finished(made))}"
    )
    assert said in page.words
    assert said in text
    for place in (page.words, text):
        assert "jebm train --config best.yaml" in place
        assert f"{best.params['optimizer.generator.lr']:.4g}" in place


def test_a_maximised_objective_has_its_best_at_the_top(tmp_path):
    params = draw(random.Random(0))
    folder = make_sweep(
        tmp_path / "s", [trial(params, v) for v in (1.0, 3.0, 2.0)], objectives=(("score", "maximize"),)
    )
    assert [t.values[0] for t in read(folder).ranking()] == [3.0, 2.0, 1.0]
    page = Page(make_report(open_store(folder), tmp_path / "out"))
    assert "3 score of trial t0001, the highest of 3 finished trials" in page.words


def test_importances_have_the_order_of_the_function(made):
    found = find_importances(read(made.folder))
    assert {item.key for item in found} == set(SPACE)
    assert sum(item.share for item in found) == pytest.approx(1)
    assert [item.key for item in found[:2]] == ["langevin.step_size", "optimizer.generator.lr"]
    assert found[0].share > 2 * found[2].share
    assert found[0].significant
    assert not {item.key for item in found if item.significant} & {"energy.width", "model.latent_dims"}
    said = what_mattered(read(made.folder), found)
    assert said.startswith(f"Of the searched keys langevin.step_size ({found[0].share:.0%})")
    assert "energy.width" in said.partition("no effect beyond chance")[0].rpartition("For")[2]


def test_few_trials_get_a_line_instead_of_noise(tmp_path):
    generator = random.Random(0)
    folder = make_sweep(tmp_path / "s", [trial(draw(generator), float(i)) for i in range(9)])
    sweep = read(folder)
    assert find_importances(sweep) == []
    assert what_mattered(sweep, []).startswith("Too few trials to say: 9 finished, were pruned or diverged")
    page = Page(make_report(open_store(folder), tmp_path / "out"))
    assert "importance" not in [text.strip() for text in re.findall(r"<th[^>]*>([^<]*)", str(page.elements))]
    assert "Only 9 trials finished" in page.words


# ── How sure, and what to mind ──────────────────────────────────────────────────────────────────────────


def test_counts_and_causes_are_those_of_the_trials(made):
    sweep = read(made.folder)
    counts = {status: len(sweep.having(status)) for status in ("finished", "pruned", "diverged", "failed")}
    assert confidence(sweep)[0] == (
        f"50 trials: {counts['finished']} finished, {counts['pruned']} pruned, {counts['diverged']} diverged "
        f"and 2 failed."
    )
    said = concerns(sweep, [])
    lowest = min(t.params["optimizer.generator.lr"] for t in sweep.having("diverged"))
    assert said[0] == (
        f"{counts['diverged']} of 50 trials ({counts['diverged'] / 50:.0%}) diverged. They stand out by a "
        f"high optimizer.generator.lr: at least {lowest:.4g} in all of them."
    )
    assert said[1] == "2 of 50 trials (4%) failed; 2 with: RuntimeError: out of memory"
    values = [t.value for t in finished(made)]
    assert any(
        f"within {100 * (values[4] - values[0]) / values[0]:.2g}% of one another" in line
        for line in confidence(sweep)
    )
    assert any("share run.seed 0" in line for line in confidence(sweep))


def test_cost_adds_up(made):
    sweep = read(made.folder)
    hours = sum(t.seconds for t in sweep.trials) / 3600
    lost = sum(t.seconds for t in sweep.having("pruned", "diverged")) / 3600
    saved = len(sweep.having("pruned")) * (FULL - 20_000) / 100 / 60  # a trial takes a second for 100 images
    said = (
        f"The trials trained for {hours:.1f} h in all; {lost / hours:.0%} of it went into trials that "
        f"were pruned or diverged. Pruning saved about {saved:.1f} min more."
    )
    assert said in made.page.words
    assert said in (made.output / "report.md").read_text()
    assert f"all 50 {hours:.1f} h 100% {sum(t.images for t in sweep.trials):,}" in made.page.words


# ── Sweeps that have not gone far, or went wrong ────────────────────────────────────────────────────────


def test_a_sweep_without_a_finished_trial_says_so(tmp_path):
    folder = make_sweep(tmp_path / "s", [running(draw(random.Random(0)), 10_000), running({})])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "best.yaml").write_text("of another sweep")
    page = Page(make_report(open_store(folder), tmp_path / "out"))
    assert "No answer yet: no trial has finished; 1 of those that run reported already." in page.words
    assert "2 still running or waiting" in page.words
    assert "train.py" not in page.words
    assert list(page.plots) == ["Learning curves"]
    assert not (tmp_path / "out" / "best.yaml").exists()


def test_a_study_without_trials_has_a_report(tmp_path):
    page = Page(make_report(open_store(make_sweep(tmp_path / "s", [])), tmp_path / "out"))
    assert "0 trials: none yet." in page.words
    assert page.plots == {}


def test_one_finished_trial_is_the_best(tmp_path):
    folder = make_sweep(tmp_path / "s", [trial(draw(random.Random(0)), 5.0)])
    page = Page(make_report(open_store(folder), tmp_path / "out"))
    assert "5 distortion of trial t0000, the lowest of 1 finished trial." in page.words
    assert "Only 1 trial finished" in page.words
    assert (tmp_path / "out" / "best.yaml").exists()


def test_all_diverged_is_the_first_warning(tmp_path):
    generator = random.Random(0)
    folder = make_sweep(tmp_path / "s", [pruned(draw(generator), 5000, status="diverged") for _ in range(4)])
    page = Page(make_report(open_store(folder), tmp_path / "out"))
    assert "No answer: no trial has finished, and none is running." in page.words
    assert "What to mind The answer : All 4 trials diverged: there is no best config." in page.words
    assert not (tmp_path / "out" / "best.yaml").exists()


def test_a_running_sweep_counts_what_has_ended(tmp_path):
    generator = random.Random(0)
    trials = [trial(draw(generator), 10.0 + i) for i in range(3)] + [running(draw(generator), 5000)]
    page = Page(make_report(open_store(make_sweep(tmp_path / "s", trials)), tmp_path / "out"))
    assert "10 distortion of trial t0000, the lowest of 3 finished trials; their median is 11." in page.words
    assert "4 trials: 3 finished and 1 running." in page.words


# ── Several objectives ──────────────────────────────────────────────────────────────────────────────────


def test_the_pareto_front_is_found_and_its_first_is_the_config(tmp_path):
    generator = random.Random(4)
    points = [(generator.random(), generator.random()) for _ in range(30)]
    front = {  # first down, second up
        i
        for i, (a, b) in enumerate(points)
        if not any(c <= a and d >= b and (c, d) != (a, b) for c, d in points)
    }
    assert 1 < len(front) < 30
    widths = [10 + i for i in range(30)]
    trials = [
        trial(center() | {"energy.width": width}, list(point))
        for width, point in zip(widths, points, strict=True)
    ]
    folder = make_sweep(
        tmp_path / "s", trials, objectives=(("distortion", "minimize"), ("speed", "maximize"))
    )
    assert {t.number for t in read(folder).front()} == front
    page = Page(make_report(open_store(folder), tmp_path / "out"))
    assert f"{len(front)} trials on the front" in page.words
    lowest = min(range(30), key=lambda i: points[i][0])
    assert load_config(tmp_path / "out" / "best.yaml").energy.width == widths[lowest]
    (stars,) = group(page.plots["The Pareto front"], "front")
    assert len(list(stars.iter(f"{SVG}use"))) == len(front)
    assert "distortion and maximize speed" in (tmp_path / "out" / "report.md").read_text()


# ── Figures ─────────────────────────────────────────────────────────────────────────────────────────────


def test_plots_hold_every_trial(made):
    plots = made.page.plots
    assert list(plots) == [
        *("How the search went", "Learning curves", "Each searched key by itself"),
        *("Two keys together", "All keys together"),
    ]
    sweep = read(made.folder)
    ended = sweep.having("finished", "pruned", "diverged")
    assert marks(plots["How the search went"]) == len(ended)
    assert marks(plots["Each searched key by itself"]) == len(ended) * len(SPACE)
    assert all(len(group(plots["Learning curves"], trial.name)) == 1 for trial in ended)
    assert all(len(group(plots["All keys together"], t.name)) == 1 for t in sweep.having("finished"))
    texts = {"".join(text.itertext()) for text in plots["Two keys together"].iter(f"{SVG}text")}
    assert {"langevin.step_size", "optimizer.generator.lr", "distortion"} <= texts


def test_the_line_of_the_best_so_far_is_a_running_minimum(made):
    done = [(i, t.value) for i, t in enumerate(made.trials) if t.state == TrialState.COMPLETE]
    steps = [(i, v) for k, (i, v) in enumerate(done) if v < min([w for _, w in done[:k]], default=math.inf)]
    assert [(t.number, t.values[0]) for t in best_so_far(read(made.folder))] == steps


def test_the_map_is_good_where_the_function_is(made):
    sweep = read(made.folder)
    finished, key = sweep.having("finished"), KeyAxis.of(sweep, "langevin.step_size")
    other = KeyAxis.of(sweep, "optimizer.generator.lr")
    places = np.array([[axis.scaled(t.params[axis.key]) for axis in (key, other)] for t in finished])
    shares = np.linspace(0, 1, 40)
    surface = smooth(places, np.array([t.values[0] for t in finished]), (shares, shares))
    best = np.unravel_index(np.nanargmin(surface), surface.shape)[0]
    assert abs(shares[best] - key.scaled(0.2)) < 0.2  # the function's best step size is 0.2
    assert np.isnan(surface).any()  # nothing is said where nobody looked


def test_an_outlier_does_not_flatten_the_plots(tmp_path):
    generator = random.Random(0)
    trials = [trial(draw(generator), 10.0 + i) for i in range(10)] + [trial(draw(generator), 1e9)]
    folder = make_sweep(tmp_path / "s", trials)
    axis = ValueAxis.of(read(folder).objectives[0], [t.value for t in trials])
    assert (axis.high < 40, axis.beyond) == (True, 1)
    page = Page(make_report(open_store(folder), tmp_path / "out"))
    assert "1 value lies beyond the axis." in page.words


# ── The page by itself ──────────────────────────────────────────────────────────────────────────────────


def test_the_page_loads_nothing_and_runs_nothing(made):
    page = made.page
    loading = ("src", "srcset", "href", "xlink:href", "action", "formaction", "data", "poster", "background")
    targets = [target for attribute in loading for target in page.having(attribute)]
    inside = ("#", "data:image/png;base64,", "data:image/svg+xml;base64,")
    assert [target for target in targets if not target.startswith(inside)] == []
    assert page.scripts == []
    (policy,) = [e["content"] for tag, e in page.elements if tag == "meta" and "http-equiv" in e]
    assert "script" not in policy


def test_the_same_sweep_gives_the_same_bytes(made, tmp_path):
    make_report(open_store(made.folder), tmp_path)
    for name in ("report.html", "report.md", "report.json", "best.yaml"):
        assert (tmp_path / name).read_bytes() == (made.output / name).read_bytes()


def test_the_last_sheets_of_best_and_worst_are_in_the_page(made):
    assert made.page.pictures == [png(50), png(200)]
    names = [t.user_attrs["run"] for t in (finished(made)[0], finished(made)[-1])]
    assert all(f"Trial {name} after 200 steps" in made.page.words for name in names)


def test_what_is_no_png_stays_out(tmp_path):
    folder = make_sweep(tmp_path / "s", [trial(draw(random.Random(0)), 1.0)])
    sheet = Path(folder, "trials", "t0000", "pictures", "step-00000001.png")
    sheet.parent.mkdir(parents=True)
    sheet.write_text("<svg onload=alert(1)>")
    assert Page(make_report(open_store(folder), tmp_path / "out")).pictures == []


BEGUN = '{"format": "jebm-sweep", "version": 1, "search": {"space": {}}, "starts": [], "data_sha256": "", '
EVIL = "</script><img src=x onerror=alert(1)>\"'`|*_[x](javascript:alert(1))&amp;\nevil: 1\n# h"


def hostile_sweep(folder: Path) -> str:
    config = config_to_dict(Config())
    config["data"]["held_out"] = EVIL
    space = {"data.train": CategoricalDistribution([EVIL, "b"]), EVIL: FloatDistribution(0, 1)}
    trials = [trial({"data.train": (EVIL, "b")[i % 2]}, float(i), space=space) for i in range(12)]
    trials[0].set_user_attr("run", f"../../{EVIL}")
    trials += [pruned_in({"data.train": EVIL, EVIL: 0.5}, space)]
    trials += [trial({EVIL: 0.5}, state=TrialState.FAIL, curve={}, space=space, error=EVIL, seconds=EVIL)]
    return make_sweep(
        folder,
        trials,
        objectives=((EVIL, "minimize"),),
        name=f"a{EVIL}",
        config=config,
        search={EVIL: [EVIL], "space": {}},
        facts={EVIL: EVIL},
    )


def pruned_in(params, space):
    return trial(
        params, state=TrialState.PRUNED, curve={5000: 3.0}, space=space, status=EVIL, images=EVIL, attempts=[]
    )


def test_hostile_texts_stay_texts(tmp_path):
    page = Page(make_report(open_store(hostile_sweep(tmp_path / "s")), tmp_path / "out"))
    assert page.scripts == page.pictures == []
    assert [name for _, found in page.elements for name in found if name.startswith("on")] == []
    assert page.words.count("<img src=x onerror=alert(1)>") > 10  # it is there, as text
    assert page.plots  # each is well-formed
    for plot in page.plots.values():
        assert {element.tag for element in plot.iter()}.isdisjoint({f"{SVG}script", f"{SVG}image"})


def test_hostile_texts_stay_texts_in_markdown_and_yaml(tmp_path):
    make_report(open_store(hostile_sweep(tmp_path / "s")), tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("    ")]  # code
    assert any("&lt;img" in line for line in lines)
    assert not [line for line in lines if "<" in line or re.search(r"(?<!\\)\[", line)]
    assert [line for line in lines if line.startswith("#") and "onerror" in line] == [lines[0]]  # its name
    tables = [line for line in lines if line.startswith("| t00")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in tables}) == 1  # no cell opens another
    best = yaml.safe_load((tmp_path / "out" / "best.yaml").read_text())
    assert best.keys() == config_to_dict(Config()).keys()
    assert best["run"]["name"] == "best"


# ── Reading ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_sweep_is_read_from_any_store(tmp_path):
    folder = Path(make_sweep(tmp_path / "s", [trial(draw(random.Random(0)), 1.0)]))
    memory = open_store("memory://reports/runs/s")
    for name in ("sweep.json", "study.log"):
        memory.put(name, (folder / name).read_bytes())
    memory.put("trials/t0000/pictures/step-00000001.png", png(9))
    page = Page(make_report(memory, tmp_path / "out"))
    assert len(page.pictures) == 1
    assert "1 distortion of trial t0000" in page.words


def damage(folder: Path, what: str) -> None:
    journal, description = folder / "study.log", folder / "sweep.json"
    if what == "missing":
        description.unlink()
    elif what == "not begun":
        journal.unlink()
    elif what == "no json":
        description.write_text("{")
    elif what == "no config":
        description.write_text(BEGUN + '"provenance": {}}')
    elif what == "config no mapping":
        description.write_text(BEGUN + '"provenance": {}, "config": 3}')
    elif what == "deep":
        description.write_text(
            BEGUN + '"provenance": {}, "config": ' + '{"a":' * 99_999 + "1" + "}" * 100_000
        )
    elif what == "half a character":
        description.write_text(BEGUN + '"provenance": {"a": "\\ud800"}, "config": {}}')
    elif what == "a folder":
        description.unlink()
        description.mkdir()
    elif what == "not UTF-8":
        description.write_bytes(b"\xff\xfe{}")
    elif what == "deep journal":
        journal.write_text('{"op_code": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    elif what == "no number":
        journal.write_text(re.sub(r'"5000":[0-9.]+', '"5000":"x"', journal.read_text()))
    elif what == "result no number":
        journal.write_text(journal.read_text().replace('"value":1.0', '"value":"x"'))
    elif what == "journal":
        journal.write_text("no journal\n" * 3)
    elif what == "operations":
        journal.write_text('{"op_code": 5, "worker_id": "x"}\n')
    elif what == "two studies":
        optuna.create_study(study_name="b", storage=JournalStorage(JournalFileBackend(str(journal))))
    elif what == "out of range":
        journal.write_text(journal.read_text().replace('"energy.width":100', '"energy.width":9999'))
        journal.write_text(journal.read_text().replace('"energy.width": 100', '"energy.width": 9999'))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "no sweep here"),
        ("not begun", "has not begun"),
        ("no json", r"sweep\.json: is damaged"),
        ("no config", "config"),
        ("config no mapping", "config is a int, not a dict"),
        ("deep", r"sweep\.json: is damaged \(more than 64 levels"),
        ("half a character", r"sweep\.json: is damaged"),
        ("a folder", r"sweep\.json: is damaged \(it is not a file"),
        ("not UTF-8", r"sweep\.json: is damaged"),
        ("deep journal", r"study\.log: no readable Optuna journal"),
        ("no number", r"study\.log: no readable Optuna journal"),
        ("result no number", r"study\.log: no readable Optuna journal"),
        ("journal", r"study\.log: no readable Optuna journal"),
        ("operations", r"study\.log: no readable Optuna journal"),
        ("two studies", r"study\.log: no readable Optuna journal with one study"),
        ("out of range", r"study\.log: .*trial 0 has energy\.width 9999"),
    ],
)
def test_bad_input_is_named_in_one_line(tmp_path, what, message):
    folder = Path(make_sweep(tmp_path / "s", [trial(center(), 1.0)]))
    damage(folder, what)
    with pytest.raises(CheckpointError, match=message) as caught:
        make_report(open_store(str(folder)), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_base_config_of_another_version_is_named(tmp_path):
    config = config_to_dict(Config())
    config["energy"]["colour"] = "blue"
    folder = make_sweep(tmp_path / "s", [trial(center(), 1.0)], config=config)
    with pytest.raises(ConfigError, match=r"sweep\.json: .*energy\.colour"):
        make_report(open_store(folder), tmp_path / "out")


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "out").write_text("a file")
    folder = make_sweep(tmp_path / "s", [trial(center(), 1.0)])
    with pytest.raises(StoreError, match="out: cannot write the report"):
        make_report(open_store(folder), tmp_path / "out")


# ── TensorBoard ─────────────────────────────────────────────────────────────────────────────────────────


def test_tensorboard_gets_the_values_of_every_trial(tmp_path):
    params = center() | {"model.latent_dims": "[4, 4, 8]"}
    folder = make_sweep(tmp_path / "s", [trial(params, 7.0), pruned(params, 10_000)])
    board = write_tensorboard(open_store(folder), tmp_path / "out")
    assert board == tmp_path / "out" / "tensorboard"
    first = sorted(path.parent.name for path in board.rglob("events.out.*"))
    assert set(first) == {"t0000", "t0001"}
    write_tensorboard(open_store(folder), tmp_path / "out")  # replaces what the first call wrote
    assert sorted(path.parent.name for path in board.rglob("events.out.*")) == first
    found = {}
    for run in ("t0000", "t0001"):
        events = EventAccumulator(str(board / run)).Reload()
        content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
        values = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
        found[run] = {key: getattr(value, value.WhichOneof("kind")) for key, value in values.items()}
        scalars = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
        found[run] |= {f"/{tag}": value for tag, value in scalars.items()}
    assert found["t0000"] == params | {
        "status": "finished",
        "/distortion": 7.0,
        "/images": float(FULL),
        "/seconds": FULL / 100,
    }
    assert "/distortion" not in found["t0001"]
    assert found["t0001"]["status"] == "pruned"
