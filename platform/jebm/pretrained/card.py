"""The model card of an exported model: what it is, how it was measured and made, as Markdown for a hub.

The figures are those of the run's newest evaluation of that checkpoint, else of its last quick look.
"""

import json
import logging
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from jebm.campaign.traces import evaluated, evaluations, pictures, png_at
from jebm.config import PLACES, Config, config_to_dict, leaves, role_of
from jebm.core.by_class import BASES, named_modules
from jebm.errors import StoreError
from jebm.evaluate.restore import Restored
from jebm.pretrained.folder import CARD, PICTURES, shareable
from jebm.report.catalogue import of_metric
from jebm.report.findings import NONE, Cell, Findings, Listing, Picture, Section, Table, number, yaml_text
from jebm.report.markdown import markdown
from jebm.store.manifest import Manifest
from jebm.store.records import listed_objects, read_object
from jebm.store.storage import Store
from jebm.untrusted import JsonObject, typed

__all__ = ["card", "command_of"]

_LOG = logging.getLogger("jebm.pretrained")

_SHEET = "samples.png"
_PNG = re.compile(r"pictures/[\w.-]+\.png", re.ASCII)
_SIDE = 1.96  # standard errors on each side of a 95% interval
_COLUMNS = ("figure", "value", "95% interval", "unit", "better", "what it is")
_LICENCE = "# license: not chosen yet. Names: https://huggingface.co/docs/hub/repositories-licenses\n"
_USE = """\
import jebm

model = jebm.from_pretrained("PLACE"{trust})  # this folder, or hf://org/name
images = model.sample(16)  # (16, {channels}, {size}, {size}), in [-1, 1]
codes = model.encode(images)  # means, samples and rates of the posterior
again = model.decode(codes.mean_ND)"""
_PRIORS = {"joint": "an energy-based prior over all layers", "top": "an energy-based prior on the top layer"}


@dataclass(frozen=True)
class _Measured:
    """What is known of a checkpoint: sections of figures, the data they are of, a sheet of samples."""

    sections: Sequence[Section] = ()
    data: str = ""
    headline: Sequence[tuple[str, float]] = ()
    sheet: bytes | None = None


def card(
    found: Restored, origin: Mapping[str, str], provenance: Mapping[str, str], run: Store
) -> dict[str, bytes]:
    """Return README.md, and the sheet of samples if there is one, by key; `run` is the run's store."""
    config, model = found.config, found.config.model
    measured = _measured(run, found.manifest)
    modules = named_modules(config, BASES)
    use = _USE.format(
        trust=f", trust={json.dumps(modules)}" if modules else "",
        channels=model.image_channels,
        size=model.image_size,
    )
    needs = f"It needs the module {', '.join(modules)}: its code runs on loading." if modules else ""
    prior = _PRIORS[config.prior.kind] if config.has_energy else "a Gaussian prior"
    findings = Findings(
        f"{origin['run']}, a jebm model",
        (
            f"A generator of images, {model.image_size}x{model.image_size}x{model.image_channels}, with "
            f"latent layers of {', '.join(map(str, model.latent_dims))} (bottom to top) and {prior}, after "
            f"{int(origin['step']):,} steps. After Cui, Wu and Han, ICCV 2023 (arXiv 2310.09604).",
            "No licence has been chosen for this model: the first lines of this file have a place for it.",
        ),
        {**origin, **provenance},
        {},
        (
            Section("use", "Use", needs, listings=(Listing("In Python:", use),)),
            *measured.sections,
            Section(
                "training",
                "Training",
                f"Trained on images with the sha256 {origin['data_sha256']} (of their pixels), by the "
                "command below. Paths and URIs in it are cut down to their last name.",
                listings=(Listing("The command:", command_of(config, origin)),),
            ),
        ),
    )
    text = f"---\n{_front(origin['run'], measured)}{_LICENCE}---\n\n{markdown(findings)}"
    files = {CARD: text.encode("utf-8", "backslashreplace")}
    return files if measured.sheet is None else files | {f"{PICTURES}{_SHEET}": measured.sheet}


def command_of(config: Config, origin: Mapping[str, str]) -> str:
    """Return the command that trains this config: every key that shapes the result and is not a default."""
    usual = dict(leaves(config_to_dict(Config())))
    words = ["jebm", "train", "--cluster.workers", origin["workers"]]
    for key, value in leaves(shareable(config)):
        named = key in ("run.name", "data.train") or (value != usual.get(key) and key in PLACES)
        if named or (value != usual.get(key) and role_of(key) != "where"):
            words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(words)


def _measured(run: Store, manifest: Manifest) -> _Measured:
    """Return what an evaluation of the checkpoint tells, else what training has noted of it."""
    for key in evaluations(run):
        try:
            document = read_object(run, key)
            checkpoint = str(typed(document, "provenance", dict).get("checkpoint"))
            if checkpoint.rpartition("/")[2] == manifest.name:
                return _of_evaluation(run.child(key.rpartition("/")[0]), document)
        except (StoreError, ValueError) as error:
            _LOG.warning("%s/%s: passed over (%s)", run.uri, key, error)
    # No evaluation: the quick looks, whose numbers come without errors.
    rows: list[tuple[Cell, ...]] = []
    for name, value in sorted(manifest.metrics.items()):
        if measure := of_metric(name):
            filled = measure.filled()
            rows.append((filled.title, number(value), NONE, filled.unit, filled.better or "", filled.meaning))
    section = Section(
        "quick",
        "Figures",
        "Measured during training, on few images. jebm evaluate gives figures with intervals: export again "
        "after it.",
        tables=(Table("Figures", _COLUMNS, tuple(rows), ""),) if rows else (),
    )
    steps = [step for step in pictures(run) if step <= manifest.step]
    sheet = png_at(run, pictures(run)[max(steps)]) if steps else None
    return _Measured((*_pictured(sheet), section), sheet=sheet)


def _of_evaluation(place: Store, document: JsonObject) -> _Measured:
    """Return an evaluation's figures, warnings and sheet of samples; ValueError if it is malformed."""
    sections, sheet = [], None
    headline: list[tuple[str, float]] = []
    for stored in listed_objects(document, "sections"):
        rows = tuple(_rows(listed_objects(stored, "figures")))
        name, warnings = typed(stored, "name", str), typed(stored, "warnings", list)
        sections.append(
            Section(
                name,
                typed(stored, "title", str),
                typed(stored, "meaning", str),
                tables=(Table("Figures", _COLUMNS, rows, ""),) if rows else (),
                warnings=tuple(map(str, warnings)),
            )
        )
        if name == "likelihood":
            figures = [each for each in listed_objects(stored, "figures") if each.get("value") is not None]
            named = [(typed(each, "name", str), evaluated(each)) for each in figures]
            headline = [(each, figure.value) for each, figure in named if figure.better]
        files = [typed(each, "file", str) for each in listed_objects(stored, "pictures")]
        if name == "samples" and files and _PNG.fullmatch(files[0]):
            sheet = png_at(place, files[0])
    data = str(typed(document, "provenance", dict).get("data", "unknown"))
    about = Section(
        "about",
        "Figures",
        f"Measured on {data}. A 95% interval is {_SIDE} standard errors wide on each side.",
    )
    return _Measured((*_pictured(sheet), about, *sections), data, headline, sheet)


def _rows(figures: Sequence[JsonObject]) -> Iterator[tuple[Cell, ...]]:
    for figure in figures:
        value, interval, better = NONE, NONE, ""
        if figure.get("value") is not None:
            found = evaluated(figure)
            value, better = number(found.value), found.better
            if found.error is not None:
                low, high = found.value - _SIDE * found.error, found.value + _SIDE * found.error
                interval = f"{number(low)} to {number(high)}"
        yield (
            typed(figure, "name", str),
            value,
            interval,
            typed(figure, "unit", str),
            better,
            typed(figure, "meaning", str),
        )


def _pictured(sheet: bytes | None) -> tuple[Section, ...]:
    if sheet is None:
        return ()
    return (
        Section("pictures", "Pictures", "", pictures=(Picture("A sheet of samples", _SHEET, sheet, ""),)),
    )


def _front(name: str, measured: _Measured) -> str:
    """Return the hub's metadata as YAML; figures only if an evaluation has measured them."""
    front: dict[str, object] = {
        "library_name": "jebm",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["energy-based-model", "latent-variable-model", "hierarchical", "image-generation"],
    }
    if measured.headline:
        result = {
            "task": {"type": "unconditional-image-generation"},
            "dataset": {"type": "images", "name": measured.data},
            "metrics": [{"type": each, "value": value} for each, value in measured.headline],
        }
        front["model-index"] = [{"name": name, "results": [result]}]
    return yaml_text(front)
