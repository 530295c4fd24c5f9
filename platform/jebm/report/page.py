"""Findings as one HTML page that opens offline.

The page loads nothing and runs no script: style, plots and pictures are in it, and its content security
policy forbids anything else. The template escapes all text of the findings, since it may come from a bucket.
"""

import base64
import hashlib
import importlib.resources
import io
import re
from collections.abc import Callable
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from jebm.report.findings import Curve, Drawing, Findings, Picture, Section, Table, duration, shown, yaml_text
from jebm.report.plots import curve_svg

__all__ = ["KEY_FIGURES", "page"]

KEY_FIGURES = 2
"""How many of each section's first figures the summary shows."""

_PICTURE_WIDTH = 640
"""The largest width to which a small picture is enlarged."""


def page(findings: Findings, refresh_seconds: int | None = None) -> str:
    """Return the page: title, warnings, key figures and cover pictures first, then each section.

    With `refresh_seconds`, a browser asks for it again after that time.
    """
    style = _resource("page.css")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= _FILTERS
    return environment.from_string(
        _resource("page.html.j2")
    ).render(
        findings=findings,
        refresh_seconds=refresh_seconds,
        style=Markup(style),  # noqa: S704  (our own file)
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        key_figures=[(s, figure) for s in findings.sections for figure in s.figures[:KEY_FIGURES]],
        covers=[(s, picture) for s in findings.sections for picture in s.pictures if picture.cover],
        warnings=[(s, warning) for s in findings.sections for warning in s.warnings],
    )


def _resource(name: str) -> str:
    return importlib.resources.files("jebm.report").joinpath(name).read_text(encoding="utf-8")


def _anchor(section: Section) -> str:
    return f"section-{re.sub('[^a-z0-9]+', '-', section.name.lower())}"


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _plot_source(plot: Curve | Drawing) -> str | None:
    """Return the image of a plot; None if there is nothing to draw."""
    svg = plot.svg if isinstance(plot, Drawing) else curve_svg(plot)
    return None if svg is None else _data_uri(svg, "svg+xml")


def _size(picture: Picture) -> tuple[int, int]:
    """Return the width and height to show it at: a whole multiple of its size, so that widths are similar."""
    with Image.open(io.BytesIO(picture.png), formats=["PNG"]) as image:
        width, height = image.size
    scale = max(1, min(3, _PICTURE_WIDTH // max(1, width)))
    return scale * width, scale * height


def _is_numeric(table: Table, column: int) -> bool:
    """Return whether a column is right-aligned: no cell in it is text."""
    return not any(isinstance(row[column], str) for row in table.rows if column < len(row))


_FILTERS: dict[str, Callable[..., Any]] = {
    "anchor": _anchor,
    "arrow": {"lower": "↓", "higher": "↑"}.__getitem__,
    "duration": duration,
    "is_numeric": _is_numeric,
    "plot_source": _plot_source,
    "png_source": lambda picture: _data_uri(picture.png, "png"),
    "shown": shown,
    "size": _size,
    "yaml": yaml_text,
}
