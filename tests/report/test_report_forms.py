"""A report: what a browser, TensorBoard and a later reader find in it."""

import base64
import hashlib
import io
import json
import math
import re
from dataclasses import replace
from xml.etree import ElementTree as ET

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from html_page import HtmlPage
from jebm.report.findings import (
    Curve,
    Drawing,
    Figure,
    Findings,
    Listing,
    Measured,
    Picture,
    Section,
    Table,
    number,
)
from jebm.report.page import KEY_FIGURES
from jebm.report.plots import curve_svg
from jebm.report.write import write_report
from jebm.store.storage import LocalStore, Store, StoreError, open_store

HOSTILE = (
    "</style></script><script>alert(1)</script><img src=x onerror=alert(1)>\"'`|*_[x](y)&amp;\n# h\ud800"
)


def png(width: int = 40, height: int = 20) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).save(file, "PNG")
    return file.getvalue()


def figure(name: str = "ELBO", value: float | None = -615.93, error: float | None = 12.34, **other) -> Figure:
    return Figure(name, value, error, **{"unit": "nats", "better": "higher", "meaning": "A bound.", **other})


def curve(*lines: tuple[float, ...], x: tuple[float, ...] | None = None) -> Curve:
    axis = tuple(map(float, range(len(lines[0])))) if x is None else x
    named = {f"line {index}": line for index, line in enumerate(lines)}
    return Curve("f along the chain", "steps", "mean f", axis, named, "It should settle.")


def findings() -> Findings:
    likelihood = Section(
        name="likelihood",
        title="Likelihood",
        meaning="How probable the images are.",
        seconds=3.25,
        figures=(
            figure(),
            figure("gain", 0.3261, 0.0104),
            figure("log Z", 0.1259, None, better=None),
            figure("lost", None, None, better="lower"),
        ),
        tables=(
            Table(
                "By layer",
                ("layer", "width", "rate"),
                (("z1", 2, Measured(2.9764, 0.021)), ("z2", 1200, None)),
                "Layers.",
            ),
        ),
        warnings=("log Z rests on few chains",),
    )
    hierarchy = Section(
        name="hierarchy",
        title="Hierarchy",
        meaning="What a layer does.",
        seconds=120.0,
        curves=(curve((0.0, 1.5, 2.0), (1.0, 1.0, 1.0)),),
        pictures=(Picture("z1 varies", "hierarchy-z1.png", png(), "Along a row."),),
    )
    provenance = {"checkpoint": "s3://bucket/runs/mine/checkpoints/step-00001200-a0001", "step": "1200"}
    lead = ("s3://bucket/runs/mine/checkpoints/step-00001200-a0001", "2 measures in 2.1 min")
    return Findings(
        "mine at step 1,200",
        lead,
        provenance,
        {"energy": {"width": 50}, "model": {"dims": [2, 10]}},
        (likelihood, hierarchy),
    )


def hostile(*, pictures: bool, text: str = HOSTILE) -> Findings:
    """Findings with a hostile text wherever one can be."""
    section = Section(
        name=text,
        title=text,
        meaning=text,
        seconds=1.0,
        figures=(figure(text, unit=text, meaning=text),),
        tables=(Table(text, (text, "b"), ((text, 1.0), (None, text)), text),),
        curves=(Curve(text, text, text, (0.0, 1.0), {text: (0.0, 1.0), "b": (1, 2)}, text),),
        pictures=(Picture(text, "a.png", png(), text),) if pictures else (),
        drawings=(Drawing(text, b"<svg/>", text),),
        notes=(text,),
        listings=(Listing(text, text),),
        warnings=(text,),
    )
    return Findings(
        text,
        (text,),
        {"checkpoint": text, "step": text, text: text},
        {text: {"a": text}},
        (section,),
    )


class Page(HtmlPage):
    """The page of a stored report."""

    def __init__(self, store: Store) -> None:
        super().__init__(store.get("evaluation.html").decode())


@pytest.fixture
def output(tmp_path) -> LocalStore:
    return LocalStore(tmp_path / "out")


@pytest.fixture
def page(output) -> Page:
    write_report(findings(), output, "evaluation")
    return Page(output)


# ── The page ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_page_loads_nothing_and_runs_nothing(page):
    assert {tag for tag, _ in page.elements}.isdisjoint(
        {"script", "link", "iframe", "object", "embed", "base", "form", "audio", "video"}
    )
    loading = ("src", "srcset", "href", "xlink:href", "action", "data", "poster", "background", "style")
    targets = [target for attribute in loading for target in page.having(attribute)]
    assert [
        t for t in targets if not t.startswith(("#", "data:image/png;base64,", "data:image/svg+xml;base64,"))
    ] == []
    assert not re.search(r"url\(|@import|image-set", page.style)
    (policy,) = [e["content"] for tag, e in page.elements if tag == "meta" and "http-equiv" in e]
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    )


def test_every_link_leads_somewhere(page):
    targets = {target.removeprefix("#") for target in page.having("href")}
    assert targets == {"section-likelihood", "section-hierarchy", "provenance"}
    assert targets <= set(page.having("id"))


def test_the_summary_comes_first_with_warnings_and_key_figures(page):
    summary, _, rest = page.words.partition("How probable the images are.")
    assert "mine at step 1,200" in summary
    assert "2 measures in 2.1 min" in summary
    assert "log Z rests on few chains" in summary
    assert "-616 ± 12 ELBO nats ↑ higher is better" in summary
    assert "0.326 ± 0.010 gain" in summary
    assert KEY_FIGURES == 2
    assert "0.1259" not in summary  # the third
    assert "0.1259" in rest
    assert "lost A bound. – nats" in rest  # noqa: RUF001


def test_nothing_to_mind_is_said(output):
    found = findings()
    write_report(replace(found, sections=found.sections[1:]), output, "evaluation")
    assert "No section has a warning" in Page(output).words


def test_tables_curves_config_and_provenance_are_there(page):
    assert "layer width rate z1 2 2.976 ± 0.021 z2 1,200 –" in page.words  # noqa: RUF001
    assert "It should settle." in page.words
    assert "energy: {width: 50}" in page.words
    assert "step 1200" in page.words
    (plot,) = [e for tag, e in page.elements if tag == "img" and e.get("class") == "plot"]
    drawn = base64.b64decode(plot["src"].partition(",")[2]).decode()
    assert {"line 0", "line 1", "steps", "mean f"} <= texts(drawn)


def test_pictures_are_in_the_page_and_beside_it(page, output):
    (image,) = [e for tag, e in page.elements if tag == "img" and e.get("class") != "plot"]
    assert (
        base64.b64decode(image["src"].partition(",")[2]) == output.get("pictures/hierarchy-z1.png") == png()
    )
    assert (image["width"], image["height"]) == ("120", "60")  # three times as wide, whole pixels
    assert "image-rendering: pixelated" in page.style
    assert "![z1 varies](<pictures/hierarchy-z1.png>)" in output.get("evaluation.md").decode()


def test_the_same_findings_give_the_same_bytes(output, tmp_path):
    write_report(findings(), output, "evaluation")
    again = open_store("memory://reports/again")
    write_report(findings(), again, "evaluation")
    names = ["evaluation.html", "evaluation.json", "evaluation.md", "pictures/hierarchy-z1.png"]
    assert [info.key for info in output.list()][:4] == names
    for name in names:
        assert output.get(name) == again.get(name)


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (-615.93, 12.34, "-616 ± 12"),
        (-0.0001, 0.013, "0.000 ± 0.013"),
        (123456.7, 0.5, "123,456.70 ± 0.50"),
        (0.99123, 0.0021, "0.9912 ± 0.0021"),
        (5.0, 0.0, "5 ± 0"),
        (1.5e-9, 2e-10, "1.5e-09 ± 2e-10"),
        (math.inf, 1.0, "inf ± 1"),
        (31.268, None, "31.27"),
        (None, 1.0, "–"),  # noqa: RUF001
    ],
)
def test_a_value_has_the_digits_that_its_error_leaves(output, value, error, shown):
    section = replace(findings().sections[0], figures=(figure(value=value, error=error),))
    write_report(Findings("t", (), {}, {}, (section,)), output, "evaluation")
    assert f"| {shown} | nats |" in output.get("evaluation.md").decode()


def test_findings_without_sections_have_a_report(output):
    write_report(Findings("t", (), {}, {}), output, "evaluation")
    assert "Provenance" in Page(output).words


def test_numbers_are_short():
    assert [number(n) for n in (1200, 1.2e-5, 31.268, 1498.74, 1e15)] == [
        "1,200",
        "1.2e-05",
        "31.27",
        "1,498.7",
        "1e+15",
    ]


# ── Hostile texts ───────────────────────────────────────────────────────────────────────────────────────


def test_hostile_texts_stay_texts(output):
    write_report(hostile(pictures=True), output, "evaluation")
    page = Page(output)
    tags = [tag for tag, _ in page.elements]
    assert "script" not in tags
    assert (tags.count("img"), tags.count("style")) == (3, 1)
    assert [name for _, found in page.elements for name in found if name.startswith("on")] == []
    assert page.words.count("<script>alert(1)</script>") > 15  # it is there, as text


def test_hostile_texts_stay_texts_in_markdown(output):
    write_report(hostile(pictures=True), output, "evaluation")
    lines = output.get("evaluation.md").decode().splitlines()
    text = [line for line in lines if not line.startswith(("    ", "!["))]  # code, and our own link
    assert any("&lt;img" in line for line in text)
    assert not [line for line in text if "<" in line or re.search(r"(?<!\\)\[", line)]
    for line in (line for line in text if line.startswith("| ")):
        assert len(re.findall(r"(?<!\\)\|", line)) in (3 + 1, 5 + 1, 2 + 1)  # no cell opens another


@pytest.mark.parametrize("file", ["../a.png", "/a.png", "a/../../b.png", ""])
def test_a_picture_stays_below_the_report(output, file):
    section = replace(findings().sections[1], pictures=(Picture("t", file, png(), "m"),))
    with pytest.raises(StoreError):
        write_report(Findings("t", (), {}, {}, (section,)), output, "evaluation")
    assert not list(output.list())


def test_json_is_strict_where_numbers_are_not_finite(output):
    section = Section(
        name="a",
        title="A",
        meaning="",
        seconds=1.0,
        figures=(figure(value=math.nan, error=math.inf),),
        tables=(Table("t", ("a",), ((math.nan,), (-math.inf,), (Measured(2.0, math.nan),)), ""),),
        curves=(curve((0.0, math.nan, math.inf)),),
    )
    write_report(Findings("t", (), {}, {"a": math.nan}, (section,)), output, "evaluation")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    document = json.loads(output.get("evaluation.json"), parse_constant=refuse)
    (read,) = document["sections"]
    assert (document["schema"], document["config"]) == (2, {"a": None})
    assert (read["figures"][0]["value"], read["figures"][0]["error"]) == (None, None)
    assert read["tables"][0]["rows"] == [[None], [None], [{"value": 2.0, "error": None}]]
    assert read["curves"][0]["lines"]["line 0"] == [0.0, None, None]


# ── TensorBoard ─────────────────────────────────────────────────────────────────────────────────────────


def test_tensorboard_shows_figures_and_pictures_at_the_step(output, tmp_path):
    other = "tensorboard/events.out.tfevents.1.training"
    output.put(other, b"")
    write_report(findings(), output, "evaluation")
    write_report(findings(), output, "evaluation")
    events = [info.key for info in output.list("tensorboard/")]
    assert events == [other, "tensorboard/events.out.tfevents.evaluation"]
    board = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    board.Reload()
    names = ["ELBO", "gain", "log Z"]  # not the one without a value
    assert sorted(board.Tags()["scalars"]) == sorted(f"evaluation/likelihood/{name}" for name in names)
    (event,) = board.Scalars("evaluation/likelihood/ELBO")
    assert (event.step, event.value) == (1200, pytest.approx(-615.93))
    (image,) = board.Images("evaluation/hierarchy/z1 varies")
    assert (image.step, image.width, image.height) == (1200, 40, 20)


# ── Plots ───────────────────────────────────────────────────────────────────────────────────────────────

SVG = "{http://www.w3.org/2000/svg}"


def texts(drawn: str | bytes) -> set[str]:
    """What a reader finds written in a plot."""
    return {"".join(element.itertext()).strip() for element in ET.fromstring(drawn).iter(f"{SVG}text")}


def lines(drawn: bytes) -> list[list[str]]:
    """The strokes of each line: the letters of its path."""
    groups = [g for g in ET.fromstring(drawn).iter(f"{SVG}g") if re.fullmatch(r"line2d_\d+", g.get("id", ""))]
    found = [g.find(f"{SVG}path") for g in groups if g.get("id")]
    styled = [p for p in found if p is not None and "stroke-width: 1.6" in (p.get("style") or "")]
    return [re.findall(r"[A-Z]", path.get("d", "")) for path in styled]


def test_a_plot_names_axes_and_lines_and_needs_nothing_else():
    drawn = curve_svg(curve((0.0, 1.5, 2.0), (1.0, 1.0, 1.0)))
    assert drawn == curve_svg(curve((0.0, 1.5, 2.0), (1.0, 1.0, 1.0)))
    assert {"steps", "mean f", "line 0", "line 1"} <= texts(drawn)
    loading = re.findall(rb'(?:href|src)="([^"]*)"|url\(([^)]*)\)', drawn)
    assert [target for pair in loading for target in pair if target and not target.startswith(b"#")] == []
    assert b"<script" not in drawn


def test_values_that_are_not_finite_leave_gaps():
    drawn = curve_svg(curve((0.0, 1.0, math.nan, 1.0, math.inf, 3.0), (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)))
    assert [line.count("M") for line in lines(drawn)][:2] == [3, 1]


@pytest.mark.parametrize(
    "values", [(1.0,), (0.0, 0.0), (5.0, 5.0 + 1e-12), (1e-320, 0.0), (-1e250, 1e250), (1e-5, 3e-5)]
)
def test_any_finite_values_can_be_drawn(values):
    assert texts(curve_svg(curve(values)))


def test_what_cannot_be_drawn_is_said(output):
    assert curve_svg(curve((math.nan, math.inf))) is None
    assert curve_svg(Curve("t", "x", "y", (), {}, "")) is None
    assert curve_svg(curve((-1.7e308, 1.7e308))) is None
    section = Section("a", "A", "", curves=(curve((math.nan,)),))
    write_report(Findings("t", (), {}, {}, (section,)), output, "evaluation")
    assert "No line has a value that can be drawn." in Page(output).words


def test_logarithmic_axes_refuse_what_has_no_logarithm():
    assert curve_svg(curve((0.02, 0.2, 2.0), x=(10.0, 100.0, 1000.0)), logarithmic=True)
    for value in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="no place on a logarithmic axis"):
            curve_svg(curve((1.0, value), x=(1.0, 2.0)), logarithmic=True)


def test_a_name_is_text_in_a_plot_whatever_it_holds():
    name = "$x^{$ <b>&amp; \x1b[2J \u65e5\u672c \ud800"
    assert r"$x^{$ <b>&amp; \x1b[2J 日本 \ud800" in texts(
        curve_svg(Curve(name, name, "y", (0, 1), {name: (0, 1)}, name))
    )
