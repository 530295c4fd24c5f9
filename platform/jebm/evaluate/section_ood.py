"""The section on out-of-distribution images: how well scores detect other data sets or one class of the data.

Shapes: N images, B batch, C scores (channels in x_BCHW), H height, W width.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from jebm.evaluate.ood import Detection, detections, detections_by_label, scores
from jebm.evaluate.subject import Subject, finite, labels
from jebm.report.catalogue import figure
from jebm.report.findings import Section, Table

__all__ = ["ood_section"]


@torch.no_grad()
def ood_section(subject: Subject, *, full: bool = True) -> Section:
    """Return how well each score separates other data sets, or one class of the data, from the data."""
    normal = _scores(subject, subject.images_NHWC, "scores")
    figures, tables = [], []
    paper, conditional = "log p(x, z)", f"L>{len(subject.layers) - 1}"
    # Against other data sets.
    for name, images in subject.out.items():
        found = detections(normal, _scores(subject, images.images_NHWC[: subject.samples], f"scores {name}"))
        tables.append(
            Table(
                f"Against {name}",
                ("score", "AUROC", "AUPRC", "FPR80", "FPR95"),
                tuple((score, *map(finite, found[score])) for score in found),
                f"{len(subject.images_NHWC):,} images of the data are normal, "
                f"{min(subject.samples, len(images.images_NHWC)):,} of {name} are anomalies, the positive "
                "class. A random score has an AUROC of 0.5, and an AUPRC of the share of anomalies. FPR80: "
                "share of normal images taken for anomalies where 80 % of the anomalies are found.",
            )
        )
        shown = [paper, *([conditional] if conditional in found else [])]
        figures += [figure("auroc", found[score].auroc, score=score, anomalies=name) for score in shown]
    # Against one class of the data.
    labels_N = None if subject.images.labels_N is None else labels(subject.images, len(subject.images_NHWC))
    if labels_N is not None:
        tables.append(_by_label(normal, labels_N))
    nothing = "no other data set was given (--out-of-distribution), and there are no labels"
    return Section(
        "ood",
        "Out of distribution",
        "How well scores of the model tell images that it does not know: higher is more in-distribution, and "
        "the sign of each score is fixed by what it is. Of one run: intervals need several seeds.",
        figures=tuple(figures),
        tables=tuple(tables),
        warnings=() if tables else (nothing,),
    )


def _scores(subject: Subject, images_NHWC: npt.NDArray[np.uint8], purpose: str) -> dict[str, Tensor]:
    """Return score -> values of all images, (N,), on every worker."""
    layers = len(subject.layers)
    names = ["log p(x, z)", "log p(x|z)", "f", "log prior", "ELBO"]
    names += [f"{score}>{k}" for score in ("L", "-LLR") for k in range(1, layers)]
    log_z = subject.log_z.value

    def scored(position: int, rows: slice) -> Tensor:
        x_BCHW = subject.batch(rows, images_NHWC)
        normal = subject.noise(position, purpose)
        found = scores(subject.model, x_BCHW, normal, subject.config.langevin, log_z=log_z)
        return torch.stack([found[name] for name in names], 1)

    values_NC = subject.rows(len(images_NHWC), len(names), scored)
    columns = dict(zip(names, values_NC.T, strict=True))
    if subject.tilt is None:
        del columns["f"]  # constant
    return columns


def _by_label(normal: Mapping[str, Tensor], labels_N: Tensor) -> Table:
    rows: list[tuple[str | float | int | None, ...]] = []
    for label in sorted(set(labels_N[labels_N >= 0].tolist())):
        found: dict[str, Detection] = detections_by_label(normal, labels_N, label)
        rows.append((label, *(finite(found[score].auprc) for score in normal)))
    return Table(
        "Each class as the anomaly: AUPRC",
        ("class", *normal),
        tuple(rows),
        "One class of the data against all others (paper, table 3). It tells something where the model was "
        "trained without that class; a random score has the class's share of the images.",
    )
