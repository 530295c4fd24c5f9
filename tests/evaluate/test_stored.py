"""Reports that an earlier version has written: what they tell, today's pages tell, and in today's words.

`stored/` has the JSON of an evaluation (all measures, of a small model after three steps) and of a comparison
(two arms, two seeds), as the version before the catalogue wrote them.
"""

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jebm.report.catalogue import MEASURES
from jebm.report.findings import Cell, Curve, Figure, Findings, Listing, Measured, Section, Table, shown
from jebm.report.markdown import markdown
from jebm.report.page import page

STORED = Path(__file__).parent / "stored"


def cell(value: Any) -> Cell:
    return Measured(**value) if isinstance(value, dict) else value


def section(values: dict[str, Any]) -> Section:
    return Section(
        values["name"],
        values["title"],
        values["meaning"],
        values["seconds"],
        tuple(Figure(**each) for each in values["figures"]),
        tuple(
            Table(
                each["title"],
                tuple(each["columns"]),
                tuple(tuple(map(cell, row)) for row in each["rows"]),
                each["meaning"],
            )
            for each in values["tables"]
        ),
        tuple(
            Curve(**each | {"x": tuple(each["x"]), "lines": {k: tuple(y) for k, y in each["lines"].items()}})
            for each in values["curves"]
        ),
        notes=tuple(values["notes"]),
        listings=tuple(Listing(**each) for each in values["listings"]),
        warnings=tuple(values["warnings"]),
    )


def findings(name: str) -> Findings:
    values = json.loads((STORED / f"{name}.json").read_text(encoding="utf-8"))
    sections = tuple(map(section, values["sections"]))
    return Findings(values["title"], tuple(values["lead"]), values["provenance"], values["config"], sections)


def texts(found: Findings) -> Iterator[str]:
    """Yield everything that a reader has to find: all but what is drawn."""
    yield found.title
    yield from found.lead
    yield from found.provenance.values()
    for each in found.sections:
        yield from (each.title, each.meaning, *each.notes, *each.warnings)
        for figure in each.figures:
            yield from (figure.name, figure.meaning, figure.unit, shown(figure))
        for table in each.tables:
            yield from (table.title, table.meaning, *table.columns)
            yield from (shown(value) for row in table.rows for value in row)


def plain(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("name", ["evaluation", "comparison"])
def test_every_number_and_word_of_a_stored_report_is_on_today_s_page(name: str) -> None:
    found = findings(name)
    nodes = {plain(html.unescape(node)) for node in re.split(r"<[^>]*>", page(found))}
    written = plain(html.unescape(re.sub(r"\\(.)", r"\1", markdown(found))))
    wanted = list(map(plain, texts(found)))
    assert len(wanted) > 100
    for text in wanted:
        assert text in nodes
        assert text in written


@pytest.mark.parametrize("name", ["evaluation", "comparison"])
def test_every_point_of_a_stored_curve_is_drawn(name: str) -> None:
    found = findings(name)
    curves = [curve for each in found.sections for curve in each.curves]
    assert page(found).count('<img class="plot"') == len(curves)


def pattern(text: str) -> str:
    """Return a regular expression for a title or meaning whose fields may be anything."""
    return re.sub(r"\\\{\w+\\\}", ".+", re.escape(text))


def test_every_figure_of_a_stored_evaluation_is_a_measure_of_the_catalogue() -> None:
    figures = [figure for each in findings("evaluation").sections for figure in each.figures]
    assert len(figures) > 30
    for figure in figures:
        assert any(
            re.fullmatch(pattern(measure.title), figure.name)
            and re.fullmatch(pattern(measure.meaning), figure.meaning)
            and (measure.unit, measure.better) == (figure.unit, figure.better)
            for measure in MEASURES.values()
        ), figure
