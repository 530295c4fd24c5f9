"""The section on samples: distances of the prior's images to real ones and to the posterior's; pictures.

Shapes: N images, B batch, C channels, H height, W width, F features, R rows and K columns of a picture.
"""

from dataclasses import replace

import torch
from torch import Tensor

from jebm.core.objective import reconstruct
from jebm.evaluate.features import FeatureNet, is_fid
from jebm.evaluate.samples import image_features, prior_samples, sample_quality
from jebm.evaluate.subject import Subject, figure, picture
from jebm.report.findings import Picture, Section, Table

__all__ = ["samples_section"]


@torch.no_grad()
def samples_section(subject: Subject, *, full: bool = False) -> Section:
    """Return distances of prior samples to real images and to the posterior's; the same in full."""
    config = subject.config
    real_NF = image_features(subject.images_NHWC, subject.net, share=subject.share)
    quality = sample_quality(
        subject.model,
        config.langevin,
        subject.images_NHWC,
        real_NF,
        subject.net,
        subject.noise,
        count=subject.samples,
        chain_factor=config.evaluation.chain_factor,
        gaussian=True,
        share=subject.share,
    )
    short, long = quality["samples"], quality["samples_long"]
    names = {
        "real_floor": "real against real (halves)",
        "reconstructions": "reconstructions",
        "posterior_samples": "decoded from z ~ q(z|x)",
        "samples": _chains(short["steps"]),
        "samples_long": _chains(long["steps"]),
        "samples_gaussian": "the same generator, z ~ N(0, I)",
    }
    fid = is_fid(subject.net)
    name_of_distance = "FID" if fid else "Fréchet distance"
    columns = ("frechet", "kid", "kid_standard_error", "precision", "recall", "density", "coverage")
    distances = Table(
        "Distances to real images",
        (
            "images",
            "FID" if fid else "Fréchet",
            *("KID", "± standard error", "precision", "recall", "density", "coverage", "n"),
        ),
        tuple(
            (shown, *(quality[name][column] for column in columns), quality[name]["n"])
            for name, shown in names.items()
        ),
        f"In the features of {subject.net.name}"
        + (" with the known weights. FID: Fréchet " if fid else ", so no FID. Fréchet: ")
        + "distance of two Gaussians with these moments, biased upwards for few images; KID: unbiased, cubic "
        "kernel. Precision: samples that could be real; recall: real images that could be samples. The last "
        "row has no tilt: what the EBM prior is worth is the difference to it.",
    )
    posterior = Table(
        "The prior against the aggregate posterior, through the same decoder",
        ("samples", "Fréchet", "KID", "± standard error", "n", "n of the posterior"),
        tuple(
            (names[name], *quality[f"{name}_to_posterior"].values())
            for name in ("samples", "samples_long", "samples_gaussian")
        ),
        "Distance between images decoded from the prior and images decoded from z ~ q(z|x) of held-out "
        "images: the decoder's blur cancels; 0 but for chance where the prior is the aggregate posterior.",
    )
    to_posterior, gaussian = quality["samples_long_to_posterior"], quality["samples_gaussian"]
    figures = (
        figure(
            f"{name_of_distance}, long chains",
            long["frechet"],
            f"Between {subject.samples:,} prior samples and {len(subject.images_NHWC):,} real images, after "
            f"{long['steps']} Langevin steps: the prior itself, where the chains have mixed.",
            better="lower",
        ),
        figure(
            "Fréchet distance to the posterior, long chains",
            to_posterior["frechet"],
            "Between images decoded from the prior and from q(z|x): what the prior alone has wrong.",
            better="lower",
        ),
        figure(
            f"{name_of_distance}, short chains",
            short["frechet"],
            f"After the {short['steps']} steps of training: a sampler of its own.",
            better="lower",
        ),
        figure(
            f"{name_of_distance}, N(0, I)",
            gaussian["frechet"],
            "Of the same generator without the tilt: the Gaussian prior's figure.",
        ),
        figure(
            "Fréchet distance to the posterior, N(0, I)",
            quality["samples_gaussian_to_posterior"]["frechet"],
            "The same without the tilt.",
        ),
        figure(
            f"{name_of_distance} of real images",
            quality["real_floor"]["frechet"],
            "One half of the real images against the other: the floor, at half the number of images.",
        ),
        figure(
            "KID, long chains",
            long["kid"],
            "Kernel distance (unbiased) after the long chains.",
            better="lower",
            error=long["kid_standard_error"],
        ),
    )
    warnings = _warnings_of_net(subject.net, min(subject.samples, len(subject.images_NHWC)))
    warnings += [
        f"{quality[name]['not_finite']:,} of {quality[name]['n']:,} images are not finite: {names[name]}"
        for name in names
        if quality[name]["not_finite"]
    ]
    return Section(
        "samples",
        "Samples",
        "How far images of the prior are from real ones, beside what the decoder alone could reach "
        "(reconstructions), what chance gives (real against real) and what N(0, I) gives without the tilt.",
        0.0,
        figures,
        (distances, posterior),
        pictures=_sample_pictures(subject, long["steps"]),
        warnings=tuple(warnings),
    )


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


_SHOWN = 100


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
    """Return a batch of images as a table (R, K, C, H, W); what does not fill a row is left out."""
    rows = len(x_BCHW) // columns
    return x_BCHW[: rows * columns].view(rows, columns, *x_BCHW.shape[1:])
