"""One update of all three nets, or of the energy net alone."""

import math
from typing import cast

import torch
from torch import Tensor

from jebm.config import Config
from jebm.core.distributions import DiagGaussian
from jebm.core.energy import EnergyNet
from jebm.core.langevin import ChainInfo
from jebm.core.objective import Terms, mean_f
from jebm.core.prior import sample_prior
from jebm.errors import DivergedError
from jebm.rng import Noise
from jebm.train.metrics import Clock
from jebm.train.runtime import Runtime
from jebm.train.state import TrainState, learning_rate

__all__ = ["energy_step", "train_step"]

_REMEDY = "lower optimizer.energy.lr or energy.output_scale, or turn energy.spectral_norm on"


def train_step(
    state: TrainState,
    config: Config,
    runtime: Runtime,
    x_BCHW: Tensor,
    noise: Noise,
    clock: Clock,
    *,
    steps_per_epoch: int,
    total_steps: int,
    stop: bool = False,
) -> tuple[dict[str, Tensor], bool]:
    """Do update `state.step` on this rank's share of the batch.

    Returns this rank's metrics (() and (L,) tensors on the device) and whether any rank's `stop` is set.

    Raises:
        DivergedError: loss or gradient is not finite on some rank. Raised on all ranks, before any parameter
            moved; where it is that of a further update of the energy, the others have moved.
    """
    step = state.step
    tilted = state.model.energy is not None and step >= round(config.train.gaussian_share * total_steps)
    prior_z, chain = None, None
    # Negative phase, on the bare energy net: nothing here belongs to DDP.
    if tilted:
        with clock("chain"):
            prior_z, chain = sample_prior(
                state.model, config.langevin, len(x_BCHW), noise(step, "prior chain")
            )
    posterior_noise = noise(step, "posterior")(len(x_BCHW), state.model.latent_dim)
    pieces = config.train.accumulate
    prior_pieces = [None] * pieces if prior_z is None else prior_z.chunk(pieces)
    terms: list[Terms] = []
    for i, (x, e, z) in enumerate(
        zip(x_BCHW.chunk(pieces), posterior_noise.chunk(pieces), prior_pieces, strict=True)
    ):
        with state.gradients_stay_local(when=i < pieces - 1):
            terms.append(state.objective(x, e, z))
            torch.autograd.backward(terms[-1].loss / pieces)
    means = {
        name: torch.stack([getattr(piece, name) for piece in terms]).mean(0).detach()
        for name in ("loss", "distortion", "rate_L", "f_posterior", "f_prior")
    }
    moving = [player for player in state.players if tilted or player.name != "energy"]
    norms = {player.name: player.gradient_norm() for player in moving}

    finite = math.isfinite(float(means["loss"] + sum(norms.values())))
    all_finite, all_go_on = runtime.agree(finite, not stop)
    if not all_finite:
        raise DivergedError(
            f"loss or gradient is not finite at step {step} (no parameter was moved by it); {_REMEDY}"
        )
    rates = {
        player.name: learning_rate(
            player.config, step, steps_per_epoch=steps_per_epoch, total_steps=total_steps
        )
        for player in moving
    }
    for player in moving:
        player.update(rates[player.name])
    for player in state.players:
        player.adam.zero_grad()
    if state.model.energy is not None and tilted:
        state.model.energy.power_iteration()
        if config.train.energy_updates > 1:
            posterior = DiagGaussian(
                *(torch.cat(moments) for moments in zip(*(t.posterior for t in terms), strict=True))
            )
            for i in range(1, config.train.energy_updates):
                _update_energy(state, config, runtime, posterior, noise, clock, rates["energy"], i)
    state.average()
    state.step += 1

    metrics = {
        "loss": means["loss"],
        "distortion": means["distortion"],
        "rate": means["rate_L"],
        "f_posterior": means["f_posterior"],
        "f_prior": means["f_prior"],
        **{f"gradient_norm/{name}": norm.detach() for name, norm in norms.items()},
        **_chain_metrics(chain),
    }
    return metrics, not all_go_on


def energy_step(
    state: TrainState,
    config: Config,
    runtime: Runtime,
    posterior: DiagGaussian,
    noise: Noise,
    clock: Clock,
    *,
    steps_per_epoch: int,
    total_steps: int,
    stop: bool = False,
) -> tuple[dict[str, Tensor], bool]:
    """Do update `state.step` of the energy net alone, `train.energy_updates` times, on posteriors (B, D).

    Returns what `train_step` does, of the last of them. Raises DivergedError on all ranks.
    """
    step = state.step
    _, all_go_on = runtime.agree(True, not stop)
    rate = learning_rate(
        config.optimizer.energy, step, steps_per_epoch=steps_per_epoch, total_steps=total_steps
    )
    metrics: dict[str, Tensor] = {}
    for i in range(config.train.energy_updates):
        metrics = _update_energy(state, config, runtime, posterior, noise, clock, rate, i)
    state.average()
    state.step += 1
    return metrics, not all_go_on


def _update_energy(
    state: TrainState,
    config: Config,
    runtime: Runtime,
    posterior: DiagGaussian,
    noise: Noise,
    clock: Clock,
    rate: float,
    i: int,
) -> dict[str, Tensor]:
    """Do the `i`-th update of the energy at `state.step`: new chains, new samples of the posteriors.

    Its gradient is a few thousand numbers: reduced by one all-reduce here, and not by DDP, which has the
    same parameters in its buckets.
    """
    model, step = state.model, state.step
    energy = cast(EnergyNet, model.energy)
    shape = posterior.mean_BD.shape
    with clock("chain"):
        prior_z, chain = sample_prior(model, config.langevin, shape[0], noise(step, f"prior chain {i}"))
    posterior_z = posterior.rsample(noise(step, f"posterior {i}")(*shape))
    f_posterior, f_prior = mean_f(energy, posterior_z, prior_z)
    player = state.players[-1]
    parameters = list(player.parameters.values())
    gradients = torch.autograd.grad(f_prior - f_posterior, parameters)
    flat = runtime.mean(torch.cat([gradient.reshape(-1) for gradient in gradients]))
    for parameter, gradient in zip(
        parameters, torch.split(flat, [p.numel() for p in parameters]), strict=True
    ):
        parameter.grad = gradient.view_as(parameter)
    norm = player.gradient_norm()
    if not math.isfinite(float(norm)):  # of the mean over ranks: the same on all of them
        raise DivergedError(f"the energy's gradient is not finite at step {step}; {_REMEDY}")
    player.update(rate)
    player.adam.zero_grad()
    energy.power_iteration()
    metrics = {
        "loss": f_prior - f_posterior,
        "f_posterior": f_posterior,
        "f_prior": f_prior,
        "gradient_norm/energy": norm,
        **_chain_metrics(chain),
    }
    return {name: value.detach() for name, value in metrics.items()}


def _chain_metrics(chain: ChainInfo | None) -> dict[str, Tensor]:
    if chain is None:  # there was none: the prior is Gaussian
        return {}
    return {"chain/gradient_norm": chain.gradient_norm, "chain/displacement": chain.displacement}
