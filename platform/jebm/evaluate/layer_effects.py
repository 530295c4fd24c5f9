"""The layers' part in f: how much of f's variance each latent layer explains, and how much it changes f.

Shapes: B batch, D latent width of all layers together, bottom layer first, L layers, N draws.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from jebm.config import Langevin
from jebm.evaluate.estimates import Estimate
from jebm.evaluate.hierarchy import layer_columns, resample
from jebm.rng import Normal

__all__ = ["EnergyDraws", "LayerEffect", "energy_draws", "layer_effects"]


class EnergyDraws(NamedTuple):
    """Values of f at draws z and at two twins of z for each layer, in nats. Concatenate to add batches."""

    f_N: Tensor
    f_kept_NL: Tensor
    """f at a twin that shares layer l with z, and nothing else."""
    f_replaced_NL: Tensor
    """f at a twin that shares all but layer l with z."""


@torch.no_grad()
def energy_draws(
    f: Callable[[Tensor], Tensor],
    latent_dims: Sequence[int],
    z_BD: Tensor,
    normal: Normal,
    config: Langevin | None,
) -> EnergyDraws:
    """Return f at `z_BD` and at its twins.

    With `config`, z is a sample of the prior and its twins are drawn from conditional priors: the layers are
    dependent. With None, z and its twins are draws of N(0, I), whose layers are independent.
    """
    layers = range(len(latent_dims))
    tilt = None if config is None else f

    def twins(replaced: Iterable[int]) -> Tensor:
        columns = layer_columns(latent_dims, replaced)
        return f(resample(tilt, z_BD, columns, normal, config or Langevin()))

    kept = [twins(other for other in layers if other != layer) for layer in layers]
    replaced = [twins([layer]) for layer in layers]
    return EnergyDraws(f(z_BD), torch.stack(kept, 1), torch.stack(replaced, 1))


class LayerEffect(NamedTuple):
    """The effect of one layer on f. Shares are NaN if f is constant."""

    first_order: Estimate
    """Var(E[f | z_l]) / Var(f): the share of f's variance that the layer explains on its own."""
    total: Estimate
    """E[Var(f | the other layers)] / Var(f): the share that the others leave unexplained; at least the
    first-order one if layers are independent."""
    change: Estimate
    """Mean |f(z) - f(z')| when only this layer is redrawn, in nats."""


def layer_effects(draws: EnergyDraws) -> list[LayerEffect]:
    """Return the effect of each layer on f, bottom first: Sobol's indices, by pick-freeze.

    z and its twin are independent given what they share, so Cov(f, f') = Var(E[f | what they share]), even if
    layers depend on each other. The estimator is the symmetric one of Monod et al. (2006), with a standard
    error by the delta method (Janon et al. 2014); the total index is 1 minus that of all other layers
    together (Homma and Saltelli 1996).
    """
    effects = []
    for kept_N, replaced_N in zip(draws.f_kept_NL.T, draws.f_replaced_NL.T, strict=True):
        first_order = _shared_share(draws.f_N, kept_N)
        others = _shared_share(draws.f_N, replaced_N)
        change_N = (draws.f_N - replaced_N).abs().double()
        change = Estimate(float(change_N.mean()), float(change_N.std() / math.sqrt(len(change_N))))
        effects.append(LayerEffect(first_order, Estimate(1 - others.value, others.standard_error), change))
    return effects


def _shared_share(f_N: Tensor, twin_f_N: Tensor) -> Estimate:
    """Return Cov(f, f') / Var(f) of exchangeable pairs."""
    f_N, twin_f_N = f_N.double(), twin_f_N.double()
    mean = (f_N.mean() + twin_f_N.mean()) / 2
    product_N = (f_N - mean) * (twin_f_N - mean)
    square_N = ((f_N - mean).square() + (twin_f_N - mean).square()) / 2
    share = product_N.mean() / square_N.mean()
    influence_N = (product_N - share * square_N) / square_N.mean()
    return Estimate(float(share), float(influence_N.std() / math.sqrt(len(f_N))))
