"""Write a report in all its formats."""

import io
import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from jebm.report.findings import Findings, Section
from jebm.report.markdown import markdown
from jebm.report.page import page
from jebm.store.storage import Store

__all__ = ["SCHEMA", "finite", "write_report"]

SCHEMA = 2
"""Version of the JSON format."""


def write_report(findings: Findings, output: Store, name: str) -> None:
    """Write the findings as a page, as Markdown and as JSON, with pictures and events for TensorBoard.

        NAME.html      one page with everything in it
        NAME.md        the same for a terminal, with links to the pictures
        NAME.json      everything but pictures and drawings; numbers that are not finite are null
        pictures/      the PNGs
        tensorboard/   scalars NAME/<section>/<figure> and the pictures, at provenance["step"], if present

    The same findings give the same bytes, except in TensorBoard's events. The page is written last: if it
    exists, so does the rest.

    Raises:
        StoreError: the output cannot be written, or a picture's file name is invalid.
    """
    for section in findings.sections:
        for picture in section.pictures:
            output.put(f"pictures/{picture.file}", picture.png)
    step = findings.provenance.get("step", "")
    if step.isascii() and step.isdecimal():
        # A fixed name, so that a later report replaces its own events and no others.
        output.put(f"tensorboard/events.out.tfevents.{name}", _events(findings, name, int(step)))
    for suffix, text in (
        ("json", _document(findings)),
        ("md", markdown(findings)),
        ("html", page(findings)),
    ):
        output.put(f"{name}.{suffix}", text.encode("utf-8", "backslashreplace"))


def finite(value: object) -> object:
    """Return nested plain values with None for each number that is not finite, which JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): finite(item) for name, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def _document(findings: Findings) -> str:
    bare = replace(findings, sections=tuple(map(_without_images, findings.sections)))
    document = {"schema": SCHEMA, **asdict(bare)}
    for section, values in zip(findings.sections, document["sections"], strict=True):
        values["pictures"] = [
            {"title": picture.title, "file": f"pictures/{picture.file}", "meaning": picture.meaning}
            for picture in section.pictures
        ]
        values["drawings"] = [{"title": d.title, "meaning": d.meaning} for d in section.drawings]
    return json.dumps(finite(document), allow_nan=False, ensure_ascii=False, indent=1) + "\n"


def _without_images(section: Section) -> Section:
    return replace(section, pictures=(), drawings=())


def _events(findings: Findings, name: str, step: int) -> bytes:
    with tempfile.TemporaryDirectory(prefix="jebm-") as folder:
        with SummaryWriter(folder) as writer:
            for section in findings.sections:
                for figure in section.figures:
                    if figure.value is not None and math.isfinite(figure.value):
                        writer.add_scalar(_tag(name, section, figure.name), figure.value, step)
                for picture in section.pictures:
                    with Image.open(io.BytesIO(picture.png), formats=["PNG"]) as image:
                        pixels = np.asarray(image.convert("RGB"))
                    writer.add_image(_tag(name, section, picture.title), pixels, step, dataformats="HWC")
        (events,) = Path(folder).iterdir()
        return events.read_bytes()


def _tag(report: str, section: Section, name: str) -> str:
    return f"{report}/{section.name}/{name}".encode("utf-8", "backslashreplace").decode()
