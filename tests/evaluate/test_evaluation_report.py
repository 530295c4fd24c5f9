"""The report of an evaluation: what a browser, TensorBoard and a later reader find in it."""

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jebm.errors import CheckpointError
from jebm.evaluate.findings import Curve, Figure, Findings, Picture, Section, Table
from jebm.evaluate.plot import line_plot, number, svg_file
from jebm.evaluate.report import KEY_FIGURES, read_findings, write_report
from jebm.store.storage import LocalStore, ObjectMissingError, Store, StoreError, open_store

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
            Table("By layer", ("layer", "width", "rate"), (("z1", 2, 2.976), ("z2", 1200, None)), "Layers."),
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
    return Findings(
        provenance, {"energy": {"width": 50}, "model": {"dims": [2, 10]}}, (likelihood, hierarchy)
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
        warnings=(text,),
    )
    return Findings({"checkpoint": text, "step": text, text: text}, {text: {"a": text}}, (section,))


class Page(HTMLParser):
    """What a browser makes of a page: elements with their attributes, text, style."""

    def __init__(self, store: Store) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = self.style = self._inside = ""
        self.feed(store.get("evaluation.html").decode())
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""
        self.text += " "

    def handle_data(self, data):
        if self._inside == "style":
            self.style += data
        else:
            self.text += data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())

    def having(self, attribute: str) -> list[str]:
        return [found[attribute] for _, found in self.elements if attribute in found]


@pytest.fixture
def output(tmp_path) -> LocalStore:
    return LocalStore(tmp_path / "out")


@pytest.fixture
def page(output) -> Page:
    write_report(findings(), output)
    return Page(output)


# ── The page ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_page_loads_nothing_and_runs_nothing(page):
    assert {tag for tag, _ in page.elements}.isdisjoint(
        {"script", "link", "iframe", "object", "embed", "base", "form", "audio", "video"}
    )
    loading = ("src", "srcset", "href", "xlink:href", "action", "data", "poster", "background", "style")
    targets = [target for attribute in loading for target in page.having(attribute)]
    assert [t for t in targets if not t.startswith(("#", "data:image/png;base64,"))] == []
    assert not re.search(r"url\(|@import|image-set", page.style)
    (policy,) = [e["content"] for tag, e in page.elements if tag == "meta" and "http-equiv" in e]
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    )


def test_every_link_leads_somewhere(page):
    targets = {target.removeprefix("#") for target in page.having("href")}
    assert targets == {"measure-likelihood", "measure-hierarchy", "provenance"}
    assert targets <= set(page.having("id"))


def test_the_summary_comes_first_with_warnings_and_key_figures(page):
    summary, _, rest = page.words.partition("How probable the images are.")
    assert "Evaluation at step 1,200" in summary
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
    write_report(replace(found, sections=found.sections[1:]), output)
    assert "No measure has a warning" in Page(output).words


def test_tables_curves_config_and_provenance_are_there(page):
    assert "layer width rate z1 2 2.976 z2 1,200 –" in page.words  # noqa: RUF001
    assert "It should settle." in page.words
    assert "energy: {width: 50}" in page.words
    assert "step 1200" in page.words


def test_pictures_are_in_the_page_and_beside_it(page, output):
    ((_, image),) = [found for found in page.elements if found[0] == "img"]
    assert (
        base64.b64decode(image["src"].partition(",")[2]) == output.get("pictures/hierarchy-z1.png") == png()
    )
    assert (image["width"], image["height"]) == ("120", "60")  # three times as wide, whole pixels
    assert "image-rendering: pixelated" in page.style
    assert "![z1 varies](<pictures/hierarchy-z1.png>)" in output.get("evaluation.md").decode()


def test_the_same_findings_give_the_same_bytes(output, tmp_path):
    write_report(findings(), output)
    again = open_store("memory://reports/again")
    write_report(findings(), again)
    names = ["evaluation.html", "evaluation.json", "evaluation.md", "pictures/hierarchy-z1.png"]
    assert [info.key for info in output.list()][:4] == names
    for name in names:
        assert output.get(name) == again.get(name)


def test_findings_without_sections_have_a_report(output):
    write_report(Findings({}, {}), output)
    assert "0 measures" in Page(output).words
    assert read_findings(output) == Findings({}, {})


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
    write_report(Findings({}, {}, (section,)), output)
    assert f"| {shown} | nats |" in output.get("evaluation.md").decode()


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
    write_report(hostile(pictures=True), output)
    page = Page(output)
    tags = [tag for tag, _ in page.elements]
    assert "script" not in tags
    assert tags.count("img") == tags.count("style") == 1
    assert [name for _, found in page.elements for name in found if name.startswith("on")] == []
    assert page.words.count("<script>alert(1)</script>") > 15  # it is there, as text


def test_hostile_texts_from_a_bucket_stay_texts(output):
    write_report(hostile(pictures=False), output)
    read = read_findings(output)
    # A half character is no JSON: it comes back as the text that stood for it.
    written = hostile(pictures=False, text=HOSTILE.replace("\ud800", r"\ud800"))
    assert read == written
    again, straight = open_store("memory://reports/again"), open_store("memory://reports/straight")
    write_report(read, again)
    write_report(written, straight)
    assert again.get("evaluation.html") == straight.get("evaluation.html")


def test_hostile_texts_stay_texts_in_markdown(output):
    write_report(hostile(pictures=True), output)
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
        write_report(Findings({}, {}, (section,)), output)
    assert not list(output.list())


# ── Reading back ────────────────────────────────────────────────────────────────────────────────────────


def without_pictures(found: Findings) -> Findings:
    return replace(found, sections=tuple(replace(section, pictures=()) for section in found.sections))


def test_findings_come_back_without_their_pictures(output):
    write_report(findings(), output)
    assert read_findings(output) == without_pictures(findings())
    document = json.loads(output.get("evaluation.json"))
    assert document["schema"] == 1
    assert document["sections"][1]["pictures"][0]["file"] == "pictures/hierarchy-z1.png"


def test_json_is_strict_where_numbers_are_not_finite(output):
    section = Section(
        name="a",
        title="A",
        meaning="",
        seconds=1.0,
        figures=(figure(value=math.nan, error=math.inf),),
        tables=(Table("t", ("a",), ((math.nan,), (-math.inf,)), ""),),
        curves=(curve((0.0, math.nan, math.inf)),),
    )
    write_report(Findings({}, {"a": math.nan}, (section,)), output)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads(output.get("evaluation.json"), parse_constant=refuse)
    (read,) = read_findings(output).sections
    assert (read.figures[0].value, read.figures[0].error) == (None, None)
    assert read.tables[0].rows == ((None,), (None,))
    assert [math.isnan(y) for y in read.curves[0].lines["line 0"]] == [False, True, True]


def test_no_report_is_said(output):
    with pytest.raises(ObjectMissingError, match=r"evaluation\.json"):
        read_findings(output)


def damaged() -> Iterator[bytes]:
    yield from (b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000, b'{"schema": 1}')
    store = open_store("memory://reports/damaged")
    write_report(findings(), store)
    whole = json.loads(store.get("evaluation.json"))

    def with_section(**values: object) -> bytes:
        return json.dumps(whole | {"sections": [whole["sections"][0] | values]}).encode()

    yield json.dumps(whole | {"provenance": {"step": 3}}).encode()
    yield json.dumps(whole | {"config": []}).encode()
    yield with_section(title=["x"])
    yield with_section(seconds=10**400)
    yield with_section(figures=[whole["sections"][0]["figures"][0] | {"value": "high"}])
    yield with_section(figures=[whole["sections"][0]["figures"][0] | {"better": "<b>"}])
    yield with_section(tables=[whole["sections"][0]["tables"][0] | {"rows": [[{"a": 1}]]}])


def test_a_damaged_report_is_refused_in_one_line(output):
    for content in damaged():
        output.put("evaluation.json", content)
        with pytest.raises(CheckpointError, match=r"evaluation\.json: is damaged .*evaluate again") as caught:
            read_findings(output)
        assert "\n" not in str(caught.value)


def test_another_schema_is_refused(output):
    output.put("evaluation.json", b'{"schema": 2}')
    with pytest.raises(CheckpointError, match="has schema 2, this version reads 1"):
        read_findings(output)


# ── TensorBoard ─────────────────────────────────────────────────────────────────────────────────────────


def test_tensorboard_shows_figures_and_pictures_at_the_step(output, tmp_path):
    other = "tensorboard/events.out.tfevents.1.training"
    output.put(other, b"")
    write_report(findings(), output)
    write_report(findings(), output)
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


# ── Curves ──────────────────────────────────────────────────────────────────────────────────────────────


def paths(drawn: str) -> list[str]:
    plot = re.split(r"<svg class=|<g ", drawn)[-1]  # without the legend
    return re.findall(r'<path class="line-\d(?: dashed)?" d="(M[^"]*)"', plot)


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]


def test_a_line_lies_where_its_values_are():
    drawn = line_plot(curve((0.0, 2.0, 10.0), x=(0.0, 5.0, 10.0)))
    (left, bottom), (x, y), (right, top) = points(paths(drawn)[0])
    labels = {
        text: float(place) for place, text in re.findall(r'<text x="64" y="([\d.]+)"[^>]*>([^<]+)', drawn)
    }
    assert list(labels) == ["0", "2", "4", "6", "8", "10"]
    assert (bottom, top) == (labels["0"] - 4, labels["10"] - 4)  # the text's baseline is 4 below its line
    assert x == pytest.approx((left + right) / 2, abs=0.1)
    assert y == pytest.approx(labels["2"] - 4, abs=0.1)


def test_values_that_are_not_finite_leave_gaps():
    (path,) = paths(line_plot(curve((0.0, 1.0, math.nan, 1.0, math.inf, 3.0))))
    assert [letter for letter in path if letter.isalpha()] == ["M", "L", "M", "M"]


def test_many_lines_differ_by_colour_and_dashes():
    drawn = line_plot(curve(*[(0.0, float(i)) for i in range(8)]))
    assert len(set(re.findall(r'<path class="(line-\d(?: dashed)?)" d="M[67]', drawn))) == 8
    assert drawn.count("<li>") == 8


@pytest.mark.parametrize(
    "values",
    [(1.0,), (0.0, 0.0), (5.0, 5.0 + 1e-12), (1e-320, 0.0), (-1e250, 1e250), (1e-5, 3e-5), (0.1, 0.3)],
)
def test_any_finite_values_can_be_drawn(values):
    (path,) = paths(line_plot(curve(values)))
    assert all(0 <= x <= 720 and 0 <= y <= 300 for x, y in points(path))


def test_what_cannot_be_drawn_is_said():
    assert "No line has a finite value" in line_plot(curve((math.nan, math.inf)))
    assert "No line has a finite value" in line_plot(Curve("t", "x", "y", (), {}, ""))
    assert "too large" in line_plot(curve((-1.7e308, 1.7e308)))


def test_a_file_of_its_own_has_logarithmic_axes_and_needs_nothing_else():
    drawn = svg_file(curve((0.02, 0.2, 2.0), (3.0, 3.0, 3.0), x=(10.0, 100.0, 1000.0)))
    assert ET.fromstring(drawn).tag == "{http://www.w3.org/2000/svg}svg"
    assert "href" not in drawn
    assert "url(" not in drawn
    left, middle, right = points(paths(drawn)[0])
    assert middle == pytest.approx([(a + b) / 2 for a, b in zip(left, right, strict=True)], abs=0.1)
    labels = re.findall(r'<text x="64"[^>]*>([^<]+)', drawn)
    assert labels == ["0.02", "0.05", "0.1", "0.2", "0.5", "1", "2", "5"]
    legend = drawn.partition("<g ")[0]
    assert legend.count("<path") == legend.count("<text") == 2


@pytest.mark.parametrize("values", [(3.0,), (7.0, 7.0), (1e-300, 1e280), (0.999, 1.001)])
def test_any_positive_values_can_be_drawn_in_a_file(values):
    (path,) = paths(svg_file(curve(values, x=tuple(range(1, 1 + len(values))))))
    assert all(0 <= x <= 720 and 0 <= y <= 300 for x, y in points(path))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_value_without_a_logarithm_is_refused(value):
    with pytest.raises(ValueError, match="no place on a logarithmic axis"):
        svg_file(curve((1.0, value), x=(1.0, 2.0)))
