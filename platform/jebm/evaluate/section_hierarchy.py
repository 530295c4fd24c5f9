"""The section on the hierarchy: what each latent layer does, in pictures, classes and shares in f.

Shapes: N images, B batch, C channels, H height, W width, D latent width of all layers together, L layers, R
rows and K columns of a picture, T recorded times of a chain.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from jebm.data.loader import to_float
from jebm.evaluate.chains import run_chains
from jebm.evaluate.estimates import Estimate, Means
from jebm.evaluate.hierarchy import (
    Source,
    changed_classes,
    correct_by_layer,
    hierarchical_samples,
    interpolate,
    pictured,
    train_latent_classifiers,
    traverse,
    traverse_plane,
)
from jebm.evaluate.layer_effects import energy_draws, layer_effects
from jebm.evaluate.subject import Subject, labels, picture
from jebm.report.catalogue import figure
from jebm.report.findings import Measured, Picture, Section, Table
from jebm.rng import generator

__all__ = ["hierarchy_section"]


_SOURCES: tuple[Source, ...] = ("conditional", "marginal")
_ACTIVE_VARIANCE = 0.01
_GRID = 10
_PAIRS = 8
_REACH = 2.5
_CLASSIFIER_UPDATES = 5000
_CLASSIFIER_BATCH = 128
_CHANGED_IMAGES = 1000
_DRAWS = 2000


@torch.no_grad()
def hierarchy_section(subject: Subject, *, full: bool = False) -> Section:
    """Return what each layer does: in pictures; in full also in classes, active units and shares in f."""
    pictures = _hierarchical_pictures(subject, "conditional")
    meaning = "What each latent layer does: samples in which one layer alone is drawn anew."
    if not full:
        return Section("hierarchy", "Hierarchy", meaning, pictures=tuple(pictures))
    pictures += _hierarchical_pictures(subject, "marginal") + _walks(subject)
    # In full: how each layer relates to the class.
    accuracy = _latent_accuracy(subject)
    changed = {source: _changed(subject, source) for source in _SOURCES}
    top, bottom = subject.layers[-1], subject.layers[0]
    figures = (
        figure("accuracy_top", accuracy[-1], layer=top),
        figure("accuracy_bottom", accuracy[0], layer=bottom),
        *(
            figure("class_changed", share, layer=layer)
            for layer, share in zip(subject.layers, changed["conditional"], strict=True)
        ),
    )
    return Section(
        "hierarchy",
        "Hierarchy",
        meaning + " The paper's claim is that the class lies at the top and detail at the bottom.",
        figures=figures,
        tables=(_classes(subject, accuracy, changed), *_effects(subject)),
        pictures=tuple(pictures),
    )


def _classes(
    subject: Subject, accuracy: Sequence[Estimate], changed: Mapping[Source, Sequence[Estimate]]
) -> Table:
    """Return how well each layer predicts the class, and how many of its latents are active."""
    variances = _split(subject, _posterior_means(subject).variances())
    active = [int((part > _ACTIVE_VARIANCE).sum()) for part in variances]
    return Table(
        "Layers, bottom first",
        (
            "layer",
            "classifier accuracy",
            "class changed, layer from its conditional",
            "class changed, layer of another sample",
            "active units",
        ),
        tuple(
            (layer, *(Measured(*shares[i]) for shares in (accuracy, *changed.values())), active[i])
            for i, layer in enumerate(subject.layers)
        ),
        "Accuracy of a classifier of the layer's posterior mean alone (linear to 256, ReLU, linear; 5,000 "
        "updates; paper, table 1). Changed: share of reconstructions whose class another classifier sees "
        f"change when this layer alone is drawn anew, of {_CHANGED_IMAGES:,} images at most. Active: latents "
        "whose posterior mean has a variance above 0.01. ± is a standard error.",
    )


def _hierarchical_pictures(subject: Subject, source: Source) -> list[Picture]:
    drawn = {
        "conditional": "given the others, by Langevin with the others clamped",
        "marginal": "from another sample of the prior, whatever the others are",
    }
    pictures = []
    for layer in reversed(range(len(subject.layers))):
        x_RKCHW = hierarchical_samples(
            subject.model,
            subject.config.langevin,
            layer,
            subject.noise(0, "hierarchical samples"),
            rows=_GRID,
            columns=_GRID,
            source=source,
        )
        name = subject.layers[layer]
        title = f"{name} varies along a row{_place(subject, layer)}, {source}"
        file = f"hierarchy-{name}.png" if source == "conditional" else f"hierarchy-{name}-{source}.png"
        meaning = f"In each row one sample of the prior of which {name} alone is drawn anew, {drawn[source]}."
        top = layer == len(subject.layers) - 1
        pictures.append(picture(title, file, x_RKCHW, meaning, cover=top and source == "conditional"))
    return pictures


def _place(subject: Subject, layer: int) -> str:
    return {0: " (bottom)", len(subject.layers) - 1: " (top)"}.get(layer, "")


def _split(subject: Subject, values_D: Tensor) -> tuple[Tensor, ...]:
    return torch.split(values_D, subject.model.latent_dims)


def _posterior_means(subject: Subject) -> Means:
    def means(_position: int, rows: slice) -> Tensor:
        return subject.model.mean_code(subject.batch(rows))

    return subject.means(len(subject.images_NHWC), subject.model.latent_dim, means)


def _walks(subject: Subject) -> list[Picture]:
    """Return traversals of each layer, by one latent and by two, and interpolations between images."""
    model = subject.model
    z_BD = model.mean_code(subject.batch(slice(0, 2 * _PAIRS)))
    variances = _split(subject, _posterior_means(subject).variances())
    values_K = torch.linspace(-_REACH, _REACH, _GRID + 1, device=subject.device)
    pictures = []
    for layer, columns in enumerate(subject.layer_columns):
        name = subject.layers[layer]
        # The latents that vary most over images, in descending order.
        chosen = [columns[i] for i in variances[layer].argsort(descending=True)[:_GRID].tolist()]
        z_RKD = torch.cat([traverse(z_BD[:1], column, values_K) for column in chosen])
        pictures.append(
            picture(
                f"One latent of {name} varies along a row",
                f"traversal-{name}.png",
                pictured(model, z_RKD),
                f"The code of the first image, of which one latent of {name} goes from {-_REACH:g} to "
                f"{_REACH:g}; the latents that vary most over images, most first.",
            )
        )
        if len(chosen) > 1:
            z_KKD = traverse_plane(z_BD[0], (chosen[0], chosen[1]), values_K)
            pictures.append(
                picture(
                    f"Two latents of {name} vary",
                    f"plane-{name}.png",
                    pictured(model, z_KKD),
                    f"The two latents of {name} that vary most, one downwards and one to the right.",
                )
            )
    pairs = len(z_BD) // 2
    z_RKD = interpolate(z_BD[:pairs], z_BD[pairs : 2 * pairs], _GRID)
    meaning = "Straight from the posterior mean of one image to that of another, in equal steps."
    return [*pictures, picture("Interpolations", "interpolation.png", pictured(model, z_RKD), meaning)]


def _latent_accuracy(subject: Subject) -> list[Estimate]:
    """Return the accuracy on held-out images of each layer's classifier, trained on the training images."""
    labels_N = labels(subject.train, len(subject.train.images_NHWC))
    test_labels_N = labels(subject.images, len(subject.images_NHWC))

    def training_batch(step: int) -> tuple[Tensor, Tensor]:
        stream = generator(subject.seed, 0, step, "latent classifiers' images")
        chosen_B = torch.randint(len(labels_N), (_CLASSIFIER_BATCH,), generator=stream)
        x_BCHW = to_float(subject.train.images_NHWC[chosen_B.numpy()], subject.device)
        return x_BCHW, labels_N[chosen_B].to(subject.device)

    # Train on the training images, measure on held-out ones.
    with torch.enable_grad():
        classifiers = train_latent_classifiers(
            subject.model,
            training_batch,
            classes=int(max(labels_N.max(), test_labels_N.max())) + 1,
            updates=_CLASSIFIER_UPDATES,
            seed=subject.seed,
        )
    # Images without a label do not count.
    layers = len(subject.layers)

    def correct(_position: int, rows: slice) -> Tensor:
        labels_B = test_labels_N[rows].to(subject.device)
        right = torch.full((len(labels_B), layers), math.nan, dtype=torch.float64, device=subject.device)
        right[labels_B >= 0] = correct_by_layer(
            subject.model, classifiers, subject.batch(rows), labels_B
        ).double()
        return right

    right_NL = subject.rows(len(test_labels_N), layers, correct)
    means = Means(layers)
    means.add(right_NL[test_labels_N >= 0])
    return means.result()


def _changed(subject: Subject, source: Source) -> list[Estimate]:
    def changed(position: int, rows: slice) -> Tensor:
        normal = subject.noise(position, f"changed classes, {source}")
        x_BCHW = subject.batch(rows)
        predict, langevin = subject.classifier.predict, subject.config.langevin
        return changed_classes(subject.model, x_BCHW, predict, langevin, normal, source=source)

    count = min(_CHANGED_IMAGES, len(subject.images_NHWC))
    return subject.means(count, len(subject.layers), changed).result()


def _effects(subject: Subject) -> list[Table]:
    """Return the layers' shares in f under N(0, I) and under the prior; none for the Gaussian prior."""
    if subject.tilt is None:
        return []
    langevin, dims = subject.config.langevin, subject.model.latent_dims
    normal = subject.noise(0, "layers' share in f")
    start_BD = normal(_DRAWS, subject.model.latent_dim)
    trace = run_chains(
        subject.tilt,
        start_BD,
        normal,
        steps=langevin.steps,
        step_size=langevin.step_size,
        every=langevin.steps,
    )
    # Both distributions of z: the start and the end of the chains.
    starts = {
        "N(0, I)": energy_draws(subject.tilt, dims, start_BD, normal, None),
        "the prior": energy_draws(subject.tilt, dims, trace.z_TBD[-1], normal, langevin),
    }
    return [
        Table(
            f"Effect of each layer on f, z from {start}",
            ("layer", "alone", "with others", "change of f (nats)"),
            tuple(
                (layer, *(Measured(*share) for share in (effect.first_order, effect.total, effect.change)))
                for layer, effect in zip(subject.layers, layer_effects(draws), strict=True)
            ),
            "Alone: share of f's variance that the layer tells by itself; with others: share that the other "
            "layers leave open (Sobol's indices). Change: mean |f(z) - f(z')| when it alone is drawn anew. "
            "± is a standard error.",
        )
        for start, draws in starts.items()
    ]
