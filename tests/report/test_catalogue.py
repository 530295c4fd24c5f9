"""The catalogue: each measure is named once, and the documentation says what it says."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from jebm.report.catalogue import GROUPS, MEASURES, figure, measure, of_metric

ROOT = Path(__file__).resolve().parents[2]


def test_a_name_belongs_to_one_measure():
    assert len(MEASURES) == sum(map(len, GROUPS.values()))


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_reads_as_a_sentence_with_every_field_set(name):
    shown = measure(name)
    assert not set("{}") & set(shown.title + shown.meaning)
    assert shown.meaning.endswith(".")
    assert shown.title == shown.title.strip() != ""


def test_fields_are_set_and_whole_numbers_have_commas():
    assert measure("frechet", short=2000, distance="FID").title == "FID, short chains"
    assert "2,000 steps" in measure("frechet", short=2000).meaning
    assert "K steps" in measure("frechet").meaning


def test_a_figure_has_what_the_catalogue_says_and_no_number_that_json_does_not_know():
    found = figure("elbo", (-600.5, 0.25))
    assert (found.name, found.unit, found.better) == ("ELBO", "nats", "higher")
    assert (found.value, found.error) == (-600.5, 0.25)
    assert figure("kid_long", 0.5, error=0.1).error == 0.1
    for lost in (None, math.nan, (math.inf, 1.0)):
        assert (figure("elbo", lost).value, figure("elbo", lost).error) == (None, None)
    assert figure("elbo", (1.0, math.nan)).error is None
    with pytest.raises(KeyError, match="no_such"):
        figure("no_such", 1.0)


def test_a_metric_of_training_is_known_by_its_name():
    assert of_metric("evaluation/elbo") == measure("elbo")
    assert of_metric("evaluation/unheard_of") is None
    assert of_metric("elbo") is None


def test_the_tables_of_the_documentation_are_those_of_the_catalogue():
    check = [sys.executable, "scripts/write-docs", "--check"]
    assert subprocess.run(check, cwd=ROOT, check=False).returncode == 0, "run scripts/write-docs"
