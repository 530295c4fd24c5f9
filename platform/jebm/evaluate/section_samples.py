"""The section on samples: distances of the prior's images to real ones and to the posterior's; pictures.

Shapes: N images, B batch, C channels, H height, W width, F features, R rows and K columns of a picture.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from jebm.core.objective import reconstruct
from jebm.evaluate.features import FeatureNet, is_fid
from jebm.evaluate.latents import latent_samples
from jebm.evaluate.samples import prior_samples, sample_measures, sample_quality
from jebm.evaluate.subject import Subject, picture
from jebm.report.catalogue import figure
from jebm.report.findings import Figure, Measured, Picture, Section, Table

__all__ = ["samples_section"]

_SHOWN = 100
_HIGH_PRECISION = 0.5
_NO_RECALL = 0.02
_FIGURES = (
    *("frechet_long", "frechet_posterior_long", "frechet", "frechet_gaussian", "frechet_posterior_gaussian"),
    *("frechet_floor", "kid_long"),
)
_SETS = ("samples", "samples_long", "samples_gaussian")
Quality = Mapping[str, Mapping[str, Any]]


@torch.no_grad()
def samples_section(subject: Subject, *, full: bool = False) -> Section:
    """Return distances of prior samples to real images and to the posterior's; `full` changes nothing."""
    quality = sample_quality(subject, factor=subject.config.evaluation.chain_factor, gaussian=True)
    names = _names(quality)
    lost = [
        f"{quality[name]['not_finite']:,} of {quality[name]['n']:,} images are not finite: {title}"
        for name, title in names.items()
        if quality[name]["not_finite"]
    ]
    images = min(subject.samples, len(subject.images_NHWC))
    return Section(
        "samples",
        "Samples",
        "How far images of the prior are from real ones, beside what the decoder alone could reach "
        "(reconstructions), what chance gives (real against real) and what N(0, I) gives without the tilt.",
        figures=(*_figures(subject, quality), *_latent_figures(subject)),
        tables=(_to_real(subject.net, quality, names), _to_posterior(quality, names)),
        pictures=_sample_pictures(subject, quality["samples_long"]["steps"]),
        notes=tuple(_alike(quality, names)),
        warnings=(*_warnings_of_net(subject.net, images), *lost),
    )


def _names(quality: Quality) -> dict[str, str]:
    """Return set of images -> its name in the tables."""
    return {
        "real_floor": "real against real (halves)",
        "reconstructions": "reconstructions",
        "posterior_samples": "decoded from z ~ q(z|x)",
        "samples": _chains(quality["samples"]["steps"]),
        "samples_long": _chains(quality["samples_long"]["steps"]),
        "samples_gaussian": "the same generator, z ~ N(0, I)",
    }


def _figures(subject: Subject, quality: Quality) -> tuple[Figure, ...]:
    values = sample_measures(quality)
    fields = {
        "samples": subject.samples,
        "images": len(subject.images_NHWC),
        "short": quality["samples"]["steps"],
        "long": quality["samples_long"]["steps"],
        **({"distance": "FID"} if is_fid(subject.net) else {}),
    }
    errors = {"kid_long": quality["samples_long"]["kid_standard_error"]}
    return tuple(figure(name, values[name], error=errors.get(name), **fields) for name in _FIGURES)


def _latent_figures(subject: Subject) -> list[Figure]:
    """Return how well a classifier tells latents of the prior from those of the posterior."""
    long = latent_samples(subject, factor=subject.config.evaluation.chain_factor)
    # Samples of the Gaussian prior are exact and need no chain.
    short = [] if subject.tilt is None else [figure("auc", latent_samples(subject, factor=1).auc())]
    layers = zip(subject.layers, subject.layer_columns, strict=True)
    each = (figure("auc_layer", long.auc(columns), layer=layer) for layer, columns in layers)
    return [figure("auc_long", long.auc()), *short, *each]


def _to_real(net: FeatureNet, quality: Quality, names: Mapping[str, str]) -> Table:
    fid = is_fid(net)
    columns = ("precision", "recall", "density", "coverage", "n")
    return Table(
        "Distances to real images",
        ("images", "FID" if fid else "Fréchet", "KID", *columns),
        tuple(
            (title, quality[name]["frechet"], _kid(quality[name]), *map(quality[name].get, columns))
            for name, title in names.items()
        ),
        f"In the features of {net.name}"
        + (" with the known weights. FID: Fréchet " if fid else ", so no FID. Fréchet: ")
        + "distance of two Gaussians with these moments, biased upwards for few images; KID: unbiased, cubic "
        "kernel, ± its standard error. Precision: samples that could be real; recall: real images that could "
        "be samples. The last row has no tilt: what the EBM prior is worth is the difference to it.",
    )


def _to_posterior(quality: Quality, names: Mapping[str, str]) -> Table:
    found = {names[name]: quality[f"{name}_to_posterior"] for name in _SETS}
    return Table(
        "The prior against the aggregate posterior, through the same decoder",
        ("samples", "Fréchet", "KID", "n", "n of the posterior"),
        tuple((name, to["frechet"], _kid(to), to["n"], to["n_posterior"]) for name, to in found.items()),
        "Distance between images decoded from the prior and images decoded from z ~ q(z|x) of held-out "
        "images: the decoder's blur cancels; 0 but for chance where the prior is the aggregate posterior.",
    )


def _kid(values: Mapping[str, Any]) -> Measured:
    return Measured(values["kid"], values["kid_standard_error"])


def _alike(quality: Quality, names: Mapping[str, str]) -> list[str]:
    """Return what to make of a high precision without recall, as of a model that has learnt nothing yet."""
    lines = []
    for name in ("samples_long", "samples"):
        precision, recall = quality[name]["precision"], quality[name]["recall"]
        if precision is not None and precision >= _HIGH_PRECISION and recall <= _NO_RECALL:
            lines.append(
                f"{names[name]}: precision {precision:.2f} with recall {recall:.2f} means images that hardly "
                "differ, as of an untrained or collapsed model: each could be real, but most real ones could "
                "not be theirs."
            )
    return list(dict.fromkeys(lines))


def _warnings_of_net(net: FeatureNet, images: int) -> list[str]:
    warnings = []
    if net.name == "inceptionv3" and not is_fid(net):
        warnings.append(
            f"The weights of inceptionv3 (sha256 {net.sha256[:8]}…) are not the known ones: no FID, and not "
            "comparable with published ones."
        )
    if images < net.dimension:
        warnings.append(
            f"{images:,} images are fewer than the {net.dimension:,} features of {net.name}: their "
            "covariance has not full rank, and much of each Fréchet distance is bias; take more."
        )
    return warnings


def _chains(steps: int) -> str:
    return f"prior samples, {steps:,} Langevin steps" if steps else "prior samples (exact)"


def _sample_pictures(subject: Subject, long_steps: int) -> tuple[Picture, ...]:
    langevin = subject.config.langevin
    shown = {"samples": langevin.steps, "samples-long": long_steps} if long_steps else {"samples": 0}
    pictures = []
    for file, steps in shown.items():
        config = replace(langevin, steps=steps or langevin.steps)
        x_BCHW = next(prior_samples(subject.model, config, _SHOWN, subject.noise))
        title = _chains(steps)[0].upper() + _chains(steps)[1:]
        meaning = "The same noise in each picture: a longer chain goes on where the shorter one ended."
        last = file == list(shown)[-1]
        pictures.append(picture(title, f"{file}.png", _table_of(x_BCHW, 10), meaning, cover=last))
    x_BCHW = subject.batch(slice(0, 50))
    pairs = torch.stack([_table_of(x_BCHW, 10), _table_of(reconstruct(subject.model, x_BCHW), 10)], 1)
    title, meaning = "Images and their reconstructions", "A row of images, below it their reconstructions."
    return (*pictures, picture(title, "reconstructions.png", pairs.flatten(0, 1), meaning, cover=True))


def _table_of(x_BCHW: Tensor, columns: int) -> Tensor:
    """Return a batch of images as a table (R, K, C, H, W); an incomplete last row is dropped."""
    rows = len(x_BCHW) // columns
    return x_BCHW[: rows * columns].view(rows, columns, *x_BCHW.shape[1:])
