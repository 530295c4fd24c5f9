"""What each latent layer does: pictures with one layer varied, and how well each layer predicts the class.

Layers are counted from 0, the bottom, as in `model.latent_dims`. The joint prior couples them, so there are
two ways to redraw a layer while the others stay fixed:

    conditional  from p(z_l | the other layers), by Langevin with the others clamped;
    marginal     from p(z_l): that layer of another prior sample, whatever the others are.

Measures of images take one batch and its noise; their results accumulate over batches
(`jebm.evaluate.estimates.Means`). T (`GeneratorNet.latents`) is assumed to be the identity, as it is for this
ladder.

Shapes: B batch, C channels, H height, W width, D latent width of all layers together, bottom layer first, F
latent columns that are redrawn, L layers, R rows, K columns of a picture.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jebm.config import Langevin
from jebm.core.langevin import langevin
from jebm.core.model import JointModel
from jebm.core.prior import sample_prior
from jebm.evaluate.chains import Tilt, value_and_gradient
from jebm.rng import Normal, generator

__all__ = [
    "LatentClassifiers",
    "Source",
    "changed_classes",
    "correct_by_layer",
    "hierarchical_samples",
    "interpolate",
    "layer_columns",
    "pictured",
    "resample",
    "resample_layer",
    "tilt_of",
    "train_code_classifiers",
    "train_latent_classifiers",
    "traverse",
    "traverse_plane",
]

Source = Literal["conditional", "marginal"]
"""The distribution that a layer is redrawn from."""


# ---------------------------------------------------------------------------------------- a layer redrawn


def tilt_of(model: JointModel) -> Tilt | None:
    """Return the model's f with its weights resolved once; None for the Gaussian prior."""
    if model.energy is None:
        return None
    return Tilt(model.energy, model.generator.latents, unseen=model.unseen)


def layer_columns(latent_dims: Sequence[int], layers: Iterable[int]) -> list[int]:
    """Return the columns of z that hold these layers."""
    ends = [0, *accumulate(latent_dims)]
    return [column for layer in layers for column in range(ends[layer], ends[layer + 1])]


@torch.no_grad()
def resample(
    f: Callable[[Tensor], Tensor] | None,
    z_BD: Tensor,
    columns: Sequence[int],
    normal: Normal,
    config: Langevin,
) -> Tensor:
    """Return z (B, D) with `columns` drawn from their conditional prior given the other columns.

    Runs `config.steps` Langevin steps from fresh N(0, I) on p(z_F | rest), proportional to exp(f(z)) N(z_F;
    0, I): the same short-run chain as for samples of all layers. Without f (the Gaussian prior) the draws are
    exact.
    """
    z_BD = z_BD.clone()
    free_F = torch.tensor(columns, dtype=torch.long, device=z_BD.device)
    z_BF = normal(len(z_BD), len(columns))
    if f is not None:
        evaluate = value_and_gradient(f)

        def score(z_BF: Tensor) -> Tensor:
            _, gradient_BD = evaluate(z_BD.index_copy_(1, free_F, z_BF))
            return gradient_BD[:, free_F] - z_BF

        z_BF, _ = langevin(score, z_BF, normal, steps=config.steps, step_size=config.step_size)
    return z_BD.index_copy_(1, free_F, z_BF)


@torch.no_grad()
def resample_layer(
    model: JointModel, z_BD: Tensor, layer: int, config: Langevin, normal: Normal, *, source: Source
) -> Tensor:
    """Return z (B, D) with one layer redrawn from the prior and the others unchanged."""
    columns = layer_columns(model.latent_dims, [layer])
    if source == "conditional":
        return resample(tilt_of(model), z_BD, columns, normal, config)
    other_BD, _ = sample_prior(model, config, len(z_BD), normal)
    z_BD = z_BD.clone()
    z_BD[:, columns] = other_BD[:, columns]
    return z_BD


# ------------------------------------------------------------------------------------------------ pictures


@torch.no_grad()
def pictured(model: JointModel, z_RKD: Tensor) -> Tensor:
    """Return the decoder's means for a table of codes, (R, K, C, H, W), in (-1, 1)."""
    x = model.decode(z_RKD.flatten(0, 1))
    return x.view(*z_RKD.shape[:2], *x.shape[1:])


@torch.no_grad()
def hierarchical_samples(
    model: JointModel,
    config: Langevin,
    layer: int,
    normal: Normal,
    *,
    rows: int,
    columns: int,
    source: Source,
) -> Tensor:
    """Return images (R, K, C, H, W): each row shows one prior sample with only `layer` redrawn.

    This is the paper's hierarchical sampling. The other layers are the same along a row.
    """
    z_RD, _ = sample_prior(model, config, rows, normal)
    z_BD = z_RD.repeat_interleave(columns, 0)
    z_BD = resample_layer(model, z_BD, layer, config, normal, source=source)
    return pictured(model, z_BD.view(rows, columns, -1))


def traverse(z_RD: Tensor, column: int, values_K: Tensor) -> Tensor:
    """Return codes (R, K, D): along a row, one column of z takes the values and the rest is that row's code.

    `layer_columns` returns a layer's columns.
    """
    z_RKD = z_RD[:, None].repeat(1, len(values_K), 1)
    z_RKD[:, :, column] = values_K
    return z_RKD


def traverse_plane(z_D: Tensor, columns: tuple[int, int], values_K: Tensor) -> Tensor:
    """Return codes (K, K, D): the first of two columns of z varies down, the second to the right."""
    z_KKD = z_D.repeat(len(values_K), len(values_K), 1)
    z_KKD[:, :, columns[0]] = values_K[:, None]
    z_KKD[:, :, columns[1]] = values_K
    return z_KKD


def interpolate(start_RD: Tensor, end_RD: Tensor, columns: int) -> Tensor:
    """Return codes (R, K, D) on the line from `start_RD` to `end_RD`, both included, in equal steps."""
    t_K1 = torch.linspace(0, 1, columns, dtype=start_RD.dtype, device=start_RD.device)[:, None]
    return (1 - t_K1) * start_RD[:, None] + t_K1 * end_RD[:, None]


# ---------------------------------------------------------------------------------- the class in each layer


class LatentClassifiers(nn.Module):
    """One classifier for each layer's code: linear to 256, ReLU, linear to the classes (paper, table 1)."""

    def __init__(self, latent_dims: Sequence[int], classes: int) -> None:
        super().__init__()
        self.latent_dims = list(latent_dims)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 256), nn.ReLU(), nn.Linear(256, classes)) for dim in latent_dims
        )

    @classmethod
    def initial(cls, latent_dims: Sequence[int], classes: int, seed: int) -> "LatentClassifiers":
        """Return untrained classifiers, whose weights depend only on `seed`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(seed, 0, 0, "latent classifiers").initial_seed())
            return cls(latent_dims, classes)

    def forward(self, code_BD: Tensor) -> Tensor:
        """Return the logits, (L, B, classes)."""
        parts = torch.split(code_BD, self.latent_dims, dim=1)
        return torch.stack([layer(part) for layer, part in zip(self.layers, parts, strict=True)])


def train_latent_classifiers(
    model: JointModel,
    batch: Callable[[int], tuple[Tensor, Tensor]],
    *,
    classes: int,
    updates: int = 5000,
    seed: int = 0,
) -> LatentClassifiers:
    """Return classifiers trained on the posterior means of labelled images, one per layer.

    `batch(step)` gives images (B, C, H, W) and labels (B,), int64; -1 means no label and is skipped. Uses
    Adam, with a rate of 1e-3 that falls linearly to 0 over the `updates`. Holds one batch at a time. Initial
    weights depend only on `seed`. The code is the mean of q(z|x) as it is, without noise or scaling.
    """

    def codes(step: int) -> tuple[Tensor, Tensor]:
        x_BCHW, labels_B = batch(step)
        with torch.no_grad():
            return model.mean_code(x_BCHW), labels_B

    classifiers = LatentClassifiers.initial(model.latent_dims, classes, seed)
    return train_code_classifiers(classifiers.to(next(model.parameters()).device), codes, updates=updates)


def train_code_classifiers(
    classifiers: LatentClassifiers, batch: Callable[[int], tuple[Tensor, Tensor]], *, updates: int
) -> LatentClassifiers:
    """Return the classifiers trained on codes; `batch(step)` gives codes (B, D) and labels (B,), int64.

    A label of -1 is skipped.
    """
    # Adam moves each weight by its own gradients, so one sum of losses trains each layer's net separately.
    optimizer = torch.optim.Adam(classifiers.parameters(), lr=1e-3)
    for step in range(updates):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / updates)
        code_BD, labels_B = batch(step)
        logits_LBK = classifiers(code_BD[labels_B >= 0])
        targets = labels_B[labels_B >= 0].expand(len(logits_LBK), -1)
        loss = F.cross_entropy(logits_LBK.flatten(0, 1), targets.flatten()) * len(logits_LBK)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return classifiers.requires_grad_(requires_grad=False)


@torch.no_grad()
def correct_by_layer(
    model: JointModel, classifiers: LatentClassifiers, x_BCHW: Tensor, labels_B: Tensor
) -> Tensor:
    """Return which labelled images each layer's classifier gets right, (labelled, L), bool.

    For `Means`: the accuracy of each layer, bottom to top, and its standard error over the test images, for
    the trained classifier.
    """
    labelled_B = labels_B >= 0
    logits_LBK = classifiers(model.mean_code(x_BCHW[labelled_B]))
    correct_LB: Tensor = logits_LBK.argmax(2) == labels_B[labelled_B]
    return correct_LB.T


@torch.no_grad()
def changed_classes(
    model: JointModel,
    x_BCHW: Tensor,
    predict: Callable[[Tensor], Tensor],
    config: Langevin,
    normal: Normal,
    *,
    source: Source,
) -> Tensor:
    """Return which images change class when one layer is redrawn from the prior, (B, L), bool.

    The code is the posterior's mean; `predict` maps images (B, C, H, W) to classes (B,), and is applied to
    the decoder's mean before and after. For `Means`: the share of images for each layer, and its standard
    error.
    """
    z_BD = model.mean_code(x_BCHW)
    before_B = predict(model.decode(z_BD))
    changed = []
    for layer in range(len(model.latent_dims)):
        new_z_BD = resample_layer(model, z_BD, layer, config, normal, source=source)
        changed.append(predict(model.decode(new_z_BD)) != before_B)
    return torch.stack(changed, 1)
